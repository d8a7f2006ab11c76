"""Between the laws' vocabulary (cgroup v2 file names, `knob`) and the files of this host's hierarchies.

The v1 side uses cgroupspy's file interfaces as codecs. The weight conversion is ours: kubelet's BestEffort has
cpu.shares 2 on v1 and cpu.weight 1 on v2, and both mean "the least". On v1 a frozen freezer cgroup holds back even
SIGKILL, so the unified hierarchy's `cgroup.freeze` is used wherever the cgroup exists there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from cgroupspy.interfaces import CommaDashSetFile, IntegerFile

from colocate.cgroup.layout import UNIFIED, Layout
from colocate.cgroup.port import CgroupGone, FilePort
from colocate.knob import KNOBS, UNLIMITED_V1
from colocate.units import CPU_PERIOD_US, format_cpulist, parse_cpulist, shares_of_weight, weight_of_shares

_INTEGER = IntegerFile("")
_CPUS = CommaDashSetFile("")


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

    `inodes` tells in which hierarchies the cgroup exists, to choose between the two freezers. A thaw names both, the
    one that is written first: a cgroup may have come to the unified hierarchy after it was frozen in the other. Of
    those only the first that is frozen is to be thawed, for the other freeze is somebody else's then.
    """
    if knob == "cgroup.freeze":
        unified = layout.hierarchy("freeze") == UNIFIED and (inodes is None or UNIFIED in inodes)
        writes = [FileWrite(UNIFIED, "cgroup.freeze", value)] if unified else []
        freezer = layout.hierarchy("freezer")
        if freezer is not None and (value == "0" or not writes):
            writes.append(FileWrite(freezer, "freezer.state", "FROZEN" if value == "1" else "THAWED"))
        return writes
    if knob == "cgroup.kill":
        hierarchy = layout.hierarchy("kill")
        return [FileWrite(hierarchy, "cgroup.kill", "1")] if hierarchy and (not inodes or hierarchy in inodes) else []
    controller = knob.partition(".")[0]
    hierarchy = layout.hierarchy(controller)
    if hierarchy is None:
        return []
    if hierarchy == UNIFIED:  # a write of no bytes never reaches the kernel: an empty cpuset is a line feed
        return [FileWrite(UNIFIED, knob, value or "\n")]
    return [FileWrite(layout.controllers[c], file, text) for c, file, text in _encode_v1(knob, value)]


def _files_of(knob: str, v2: bool) -> tuple[str, ...]:
    """The files that a knob's value is read from."""
    if v2:
        return (knob,)
    if knob == "cpu.max":
        return "cpu.cfs_quota_us", "cpu.cfs_period_us"
    return (KNOBS[knob].v1 or knob,)


def decode_knob(knob: str, texts: Mapping[str, str]) -> str | None:
    """A knob's value in the v2 vocabulary, from the texts of its files by name; None if they are missing."""
    if knob == "cgroup.freeze":
        state = texts.get("freezer.state")
        return texts.get(knob, "").strip() or (None if state is None else "0" if state.strip() == "THAWED" else "1")
    if knob in texts:
        text = texts[knob].strip()
        return format_cpulist(_CPUS.sanitize_get(text)) if knob == "cpuset.cpus" and text else text
    if knob == "cpu.max" and "cpu.cfs_quota_us" in texts:
        value = _INTEGER.sanitize_get(texts["cpu.cfs_quota_us"])
        period = int(texts.get("cpu.cfs_period_us", CPU_PERIOD_US))
        return f"{'max' if value is None else value} {period}"
    text = texts.get(KNOBS[knob].v1 or knob, "").strip()
    if not text:
        return None
    if knob == "cpu.weight":
        return str(weight_of_shares(int(text)))
    return "max" if int(text) >= UNLIMITED_V1 else text


def read_knob(port: FilePort, path: str, knob: str, inodes: dict[str, int]) -> str | None:
    """A knob's value on disk in the v2 vocabulary, None if this host or this cgroup has no such knob."""
    layout = port.layout
    if knob == "cgroup.freeze":
        return _read_freeze(port, path, inodes)
    hierarchy = layout.hierarchy(knob.partition(".")[0])
    if hierarchy is None or hierarchy not in inodes:
        return None
    files = _files_of(knob, hierarchy == UNIFIED)
    texts = {file: port.read(hierarchy, path, file, inodes[hierarchy]) for file in files}
    if any(text is None for text in texts.values()):
        return None
    return decode_knob(knob, {file: text for file, text in texts.items() if text is not None})


def _read_freeze(port: FilePort, path: str, inodes: dict[str, int]) -> str | None:
    """Frozen if it is in either freezer: that of v1 may be Docker's."""
    thaws = file_writes(port.layout, "cgroup.freeze", "0", inodes)
    found = [_read_freezer(port, path, write, inodes) for write in thaws if write.hierarchy in inodes]
    return max((f for f in found if f is not None), default=None)


def _read_freezer(port: FilePort, path: str, write: FileWrite, inodes: dict[str, int]) -> str | None:
    text = port.read(write.hierarchy, path, write.file, inodes.get(write.hierarchy))
    return None if text is None else decode_knob("cgroup.freeze", {write.file: text})


def frozen_in(port: FilePort, path: str, inodes: dict[str, int]) -> list[FileWrite]:
    """What thaws a cgroup: a write for each freezer in which it is frozen, ours first."""
    thaws = [w for w in file_writes(port.layout, "cgroup.freeze", "0", inodes) if w.hierarchy in inodes]
    return [write for write in thaws if _read_freezer(port, path, write, inodes) == "1"]


def write_knob(port: FilePort, path: str, knob: str, value: str, inodes: dict[str, int]) -> bool:
    """Write a knob without journal or verification; for our own directories and for undoing. Raises OSError.

    False if nothing could be written: the cgroup is gone, or is in no hierarchy that has such a knob.
    """
    writes = [w for w in file_writes(port.layout, knob, value, inodes) if w.hierarchy in inodes]
    if knob == "cgroup.freeze" and value == "0":
        writes = frozen_in(port, path, inodes)[:1] or writes[:1]
    written = False
    for write in writes:
        with contextlib.suppress(CgroupGone):
            port.write(write.hierarchy, path, write.file, write.value, inodes[write.hierarchy])
            written = True
    return written
