"""The one table of knobs: how a value is written, when two mean the same, which is wider, and their order in a plan.

Knobs are named as cgroup v2 names its files; v1's files stand beside those that they are the other spelling of. A new
knob is one row here, its law in `decide/` and that law's line in `pipeline.LAWS`; what reads it back, undoes it and
orders it goes by this table. A value of another form needs a codec here as well. Sources: cgroup-v2.rst,
cgroup-v1/{cpusets,memory,freezer-subsystem}.rst.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from colocate.units import cores_of_cpu_max, format_cpulist, parse_cpulist

Codec = Literal["number", "bandwidth", "cpulist", "bytes", "flag", "act"]
_PAGE_BYTES = 4096
UNLIMITED_V1 = 0x7FFFFFFFFFFFF000


class Knob(NamedTuple):
    """One knob."""

    codec: Codec
    """`bandwidth`: quota and period; `flag`: 1 is the narrower; `act`: done, not held."""
    place: int
    """In a plan, of a value that is not a limit to be nested: thaw and signal come first, freeze and kill last."""
    open_value: str | None = None
    """The value with which nothing of ours is in force."""
    blocking: bool = False
    """Whether the kernel may take seconds to take it (it reclaims memory first)."""
    v1: str = ""
    """The file's name on cgroup v1, where it is another."""


LIMIT = 4
"""The place of limits that the kernel nests: widened from parent to child, then tightened from child to parent (6)."""

KNOBS: dict[str, Knob] = {
    "signal": Knob("act", 1),
    "cpu.idle": Knob("flag", 5, "0"),
    "cpu.weight": Knob("number", 3, "1", v1="cpu.shares"),
    "cpu.max": Knob("bandwidth", LIMIT, "max 100000", v1="cpu.cfs_quota_us"),
    "cpuset.cpus": Knob("cpulist", LIMIT, ""),
    "memory.high": Knob("bytes", LIMIT, "max", blocking=True),
    "memory.max": Knob("bytes", LIMIT, "max", blocking=True, v1="memory.limit_in_bytes"),
    "memory.reclaim": Knob("act", 7, blocking=True, v1="memory.force_empty"),
    "cgroup.freeze": Knob("flag", 8, "0", v1="freezer.state"),
    "cgroup.kill": Knob("act", 9),
}
HELD = tuple(name for name, knob in KNOBS.items() if knob.codec != "act")
"""Knobs whose value stays on disk, so that it can be read back."""
_BY_FILE = KNOBS | {knob.v1: knob for knob in KNOBS.values() if knob.v1}


def is_act(file: str) -> bool:
    """Whether writing it is an act, of which nothing can be read back. `file` is a knob or its v1 name."""
    return file in _BY_FILE and _BY_FILE[file].codec == "act"


def _bytes(text: str) -> int:
    if text in ("max", "-1"):
        return UNLIMITED_V1
    return int(text) if text.isdigit() else -1


def same(file: str, one: str, other: str) -> bool:
    """Whether two texts of a knob's file (v2's or v1's) mean the same: page rounding, `max`, periods and CPU lists.

    An act is never the same: it is done again.
    """
    one, other = one.strip(), other.strip()
    knob = _BY_FILE.get(file)
    codec = knob.codec if knob is not None else "number"
    if codec == "act":
        return False
    if one == other:
        return True
    try:
        if codec == "cpulist":
            return parse_cpulist(one) == parse_cpulist(other)
        if file == "cpu.max":
            return cores_of_cpu_max(one) == cores_of_cpu_max(other)
    except ValueError:  # what somebody wrote that is no value
        return False
    if codec == "bytes":
        return _bytes(one) // _PAGE_BYTES == _bytes(other) // _PAGE_BYTES and _bytes(one) >= 0
    return file == "freezer.state" and {one, other} == {"FROZEN", "FREEZING"}


def width(knob: str, value: str) -> float:
    """How much a value leaves to the workload; larger is wider. Of held knobs in the v2 vocabulary only."""
    codec = KNOBS[knob].codec
    if codec == "cpulist":
        return float(len(parse_cpulist(value))) if value.strip() else float("inf")
    if codec == "bandwidth":
        cores = cores_of_cpu_max(value)
        return float("inf") if cores is None else cores
    if codec == "bytes":
        return float("inf") if value.strip() == "max" else float(value)
    return -float(value) if codec == "flag" else float(value)


def narrowest(knob: str, one: str, other: str) -> str:
    """Of two values the one that leaves less; of CPU lists what both allow, or `other` if that is nothing."""
    if KNOBS[knob].codec == "cpulist" and one.strip() and other.strip():
        both = [c for c in parse_cpulist(one) if c in parse_cpulist(other)]
        return format_cpulist(both) if both else other
    return one if width(knob, one) <= width(knob, other) else other


def place(knob: str, value: str, found: str | None, depth: int) -> tuple[int, int]:
    """Where an action belongs in a plan, so that the kernel allows every step between; `depth` is the cgroup's."""
    row = KNOBS[knob]
    if row.codec == "flag" and value == "0":
        return (0 if knob == "cgroup.freeze" else 2), depth
    if row.place != LIMIT:
        return row.place, depth
    tightens = found is None or width(knob, value) < width(knob, found)
    return (6, -depth) if tightens else (LIMIT, depth)
