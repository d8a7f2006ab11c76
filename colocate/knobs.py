"""The one table between the laws' vocabulary (cgroup v2 file names) and the files of this host's hierarchies.

The v1 side uses cgroupspy's file interfaces as codecs. The weight conversion is ours: kubelet's BestEffort has
cpu.shares 2 on v1 and cpu.weight 1 on v2, and both mean "the least". On v1 a frozen freezer cgroup holds back even
SIGKILL, so the unified hierarchy's `cgroup.freeze` is used wherever the cgroup exists there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from cgroupspy.interfaces import CommaDashSetFile, IntegerFile

from colocate.cgroupfs import UNIFIED, CgroupGone, FilePort, Layout
from colocate.units import CPU_PERIOD_US, format_cpulist, parse_cpulist, shares_of_weight, weight_of_shares

_INTEGER = IntegerFile("")
_CPUS = CommaDashSetFile("")
_PAGE_BYTES = 4096
_UNLIMITED_V1 = 0x7FFFFFFFFFFFF000

WRITE_ONLY = ("memory.reclaim", "cgroup.kill", "memory.force_empty")


class FileWrite(NamedTuple):
    """One control file of one hierarchy and the text to write."""

    hierarchy: str
    file: str
    value: str


def _encode_v1(knob: str, value: str) -> list[tuple[str, str, str]]:
    """(controller, file, text) of a knob on v1; empty if v1 has nothing like it."""
    if knob == "cpu.weight":
        shares = 2 if int(value) == 1 else shares_of_weight(int(value))
        return [("cpu", "cpu.shares", str(_INTEGER.sanitize_set(shares)))]
    if knob == "cpu.max":
        quota, _, period = value.partition(" ")
        wanted: Any = None if quota == "max" else int(quota)
        return [
            ("cpu", "cpu.cfs_period_us", str(int(period or CPU_PERIOD_US))),
            ("cpu", "cpu.cfs_quota_us", str(_INTEGER.sanitize_set(wanted))),
        ]
    if knob == "memory.max":
        wanted = None if value == "max" else int(value)
        return [("memory", "memory.limit_in_bytes", str(_INTEGER.sanitize_set(wanted)))]
    if knob == "memory.reclaim":
        return [("memory", "memory.force_empty", "1")]
    if knob == "cpuset.cpus":
        return [("cpuset", "cpuset.cpus", str(_CPUS.sanitize_set(set(parse_cpulist(value)))))]
    return [("cpu", "cpu.idle", value)] if knob == "cpu.idle" else []


def file_writes(layout: Layout, knob: str, value: str, inodes: dict[str, int] | None = None) -> list[FileWrite]:
    """The files to write, in order, for a knob's value; empty if this host has no such knob.

    `inodes` tells in which hierarchies the cgroup exists, to choose between the two freezers.
    """
    if knob == "cgroup.freeze":
        hierarchy = layout.hierarchy("freeze")
        if hierarchy == UNIFIED and (inodes is None or UNIFIED in inodes):
            return [FileWrite(UNIFIED, "cgroup.freeze", value)]
        freezer = layout.hierarchy("freezer")
        return [FileWrite(freezer, "freezer.state", "FROZEN" if value == "1" else "THAWED")] if freezer else []
    if knob == "cgroup.kill":
        hierarchy = layout.hierarchy("kill")
        return [FileWrite(hierarchy, "cgroup.kill", "1")] if hierarchy and (not inodes or hierarchy in inodes) else []
    controller = knob.partition(".")[0]
    hierarchy = layout.hierarchy(controller)
    if hierarchy is None:
        return []
    if hierarchy == UNIFIED:
        return [FileWrite(UNIFIED, knob, value)]
    return [FileWrite(layout.controllers[c], file, text) for c, file, text in _encode_v1(knob, value)]


def same(file: str, wanted: str, found: str) -> bool:
    """Whether the kernel's text means what was written: numbers, page rounding, `max` and CPU lists considered."""
    wanted, found = wanted.strip(), found.strip()
    if wanted == found:
        return True
    if file == "cpuset.cpus":
        return parse_cpulist(wanted) == parse_cpulist(found)
    if file.startswith("memory."):
        high, low = (_UNLIMITED_V1 if t in ("max", "-1") else int(t) if t.isdigit() else -1 for t in (wanted, found))
        return high // _PAGE_BYTES == low // _PAGE_BYTES and high >= 0
    if file == "freezer.state":
        return wanted == "FROZEN" and found == "FREEZING"
    return False


def read_knob(port: FilePort, path: str, knob: str, inodes: dict[str, int]) -> str | None:
    """A knob's value on disk in the v2 vocabulary, None if this host or this cgroup has no such knob."""
    layout = port.layout
    if knob == "cgroup.freeze":
        return _read_freeze(port, path, inodes)
    hierarchy = layout.hierarchy(knob.partition(".")[0])
    if hierarchy is None or hierarchy not in inodes:
        return None
    inode = inodes[hierarchy]
    if hierarchy == UNIFIED:
        text = port.read(UNIFIED, path, knob, inode)
        return text.strip() if text is not None else None
    if knob == "cpu.max":
        quota = port.read(hierarchy, path, "cpu.cfs_quota_us", inode)
        period = port.read(hierarchy, path, "cpu.cfs_period_us", inode)
        if quota is None or period is None:
            return None
        value = _INTEGER.sanitize_get(quota)
        return f"{'max' if value is None else value} {int(period)}"
    file = {"cpu.weight": "cpu.shares", "memory.max": "memory.limit_in_bytes"}.get(knob, knob)
    text = port.read(hierarchy, path, file, inode)
    if text is None:
        return None
    if knob == "cpu.weight":
        return str(weight_of_shares(int(text)))
    if knob == "memory.max":
        return "max" if int(text) >= _UNLIMITED_V1 else text.strip()
    if knob == "cpuset.cpus":
        return format_cpulist(_CPUS.sanitize_get(text))
    return text.strip()


def _read_freeze(port: FilePort, path: str, inodes: dict[str, int]) -> str | None:
    if UNIFIED in inodes and port.layout.hierarchy("freeze") == UNIFIED:
        text = port.read(UNIFIED, path, "cgroup.freeze", inodes[UNIFIED])
        if text is not None:
            return text.strip()
    freezer = port.layout.hierarchy("freezer")
    text = port.read(freezer, path, "freezer.state", inodes.get(freezer)) if freezer else None
    return None if text is None else ("0" if text.strip() == "THAWED" else "1")


def write_knob(port: FilePort, path: str, knob: str, value: str, inodes: dict[str, int]) -> None:
    """Write a knob without journal or verification; for our own directories and for undoing. Raises OSError."""
    for write in file_writes(port.layout, knob, value, inodes):
        if write.hierarchy in inodes:
            try:
                port.write(write.hierarchy, path, write.file, write.value, inodes[write.hierarchy])
            except CgroupGone:
                continue
