"""The undo: thaw, put back what was found, and remove what we made.

A value is put back only while it is still ours; what somebody else wrote since is left and reported. A directory of
ours that is occupied stays at the least weight, thawed and without limits, so that an upgrade never lifts running batch
to the weight of a service. Clearing cpu.idle leaves weight 100 (shares 1024), so the weight is written after it.
"""

from __future__ import annotations

import contextlib
import errno
import signal
from collections.abc import Iterable

import msgspec
import structlog

from colocate.actuate.journal import DRIVER_KINDS, Entry, Journal, newest_found
from colocate.cgroup.knobfiles import frozen_in, read_knob, write_knob
from colocate.cgroup.port import CgroupGone, FilePort
from colocate.cgroup.tree import (
    inodes_of,
    joined,
    processes,
    processes_anywhere,
    processes_below,
    rmdir_tree,
    start_time,
)
from colocate.errors import JournalBroken
from colocate.knob import KNOBS, same

log = structlog.get_logger()
_FREEZERS = {"cgroup.freeze": "0", "freezer.state": "THAWED"}
_ORDER = {"freezer.state": 0, "cgroup.freeze": 0, "cpu.idle": 1, "cpu.shares": 2, "cpu.weight": 2}
PASSES = 3


class Report(msgspec.Struct, kw_only=True):
    """What the undo did and what it left."""

    restored: list[str] = []
    left_to_others: list[str] = []
    occupied: list[str] = []
    capped: list[str] = []
    """Cgroups whose devices keep their power limits as long as they are occupied."""
    removed: list[str] = []
    failed: list[str] = []

    @property
    def clean(self) -> bool:
        """Nothing of ours is left."""
        return not (self.waits or self.failed)

    @property
    def waits(self) -> list[str]:
        """Cgroups whose end is waited for."""
        return [*self.occupied, *self.capped]


def _where(entry: Entry) -> str:
    return f"{entry.hierarchy}:{entry.path}" + (f"/{entry.file}" if entry.file else "")


def thaw_all(port: FilePort, journal: Journal, report: Report) -> None:
    """Thaw every directory of ours with all below it, first of all; one that refuses does not stop the others."""
    for path in dict.fromkeys(e.path for e in journal.entries if e.kind == "made"):
        try:
            thaw_below(port, path)
        except OSError as error:
            report.failed.append(f"{path}: thaw: {error.strerror}")


def thaw_everything(port: FilePort, journal: Journal, report: Report) -> None:
    """Thaw what is ours and what we froze in place; all else stays as it is."""
    thaw_all(port, journal, report)
    frozen = [e for e in journal.entries if e.kind == "value" and e.file in _FREEZERS]
    for entry in frozen:
        thawed = _FREEZERS[entry.file]
        try:
            current = port.read(entry.hierarchy, entry.path, entry.file, entry.inode)
            if current is not None and current.strip() not in (thawed, entry.found.strip()):
                port.write(entry.hierarchy, entry.path, entry.file, thawed, entry.inode)
        except CgroupGone:
            continue
        except OSError as error:
            report.failed.append(f"{_where(entry)}: thaw: {error.strerror}")


def thaw_below(port: FilePort, path: str) -> None:
    """Thaw a cgroup and its descendants in whichever freezer they are frozen."""
    inodes = inodes_of(port, path)
    for write in frozen_in(port, path, inodes):
        with contextlib.suppress(CgroupGone):
            port.write(write.hierarchy, path, write.file, write.value, inodes[write.hierarchy])
    children = {c for h in inodes for c in port.children(h, path)}
    for child in sorted(children):
        thaw_below(port, joined(path, child))


def _restore_values(port: FilePort, entries: list[Entry], report: Report) -> list[Entry]:
    """Put found values back; the entries that could not be resolved are returned."""
    found, ours = newest_found(entries)
    waiting = sorted(found, key=lambda k: _ORDER.get(k[3], 3))
    for attempt in range(PASSES):
        again = []
        for key in waiting:
            entry = found[key]
            outcome = _restore_one(port, entry, ours[key], report)
            if outcome == errno.EINVAL and attempt + 1 < PASSES:
                again.append(key)  # a parent or child that is still to come is in the way
            elif outcome:
                report.failed.append(f"{_where(entry)}: errno {outcome} ({errno.errorcode.get(outcome, '?')})")
        waiting = again
    return [e for e in entries if any(f.startswith(f"{_where(e)}: ") for f in report.failed)]


def _restore_one(port: FilePort, entry: Entry, ours: Iterable[str], report: Report) -> int:
    try:
        current = port.read(entry.hierarchy, entry.path, entry.file, entry.inode)
    except OSError as error:
        return error.errno or errno.EIO
    if current is None or current.strip() == entry.found.strip():
        return 0
    if entry.file == "cgroup.subtree_control":
        return _drop_controllers(port, entry, current, report)
    if _FREEZERS.get(entry.file) == current.strip():
        return 0  # found frozen by others, and running now: an undo never freezes
    if not any(same(entry.file, wanted, current) for wanted in ours):
        report.left_to_others.append(f"{_where(entry)}: now {current.strip()}, found {entry.found.strip()}")
        return 0
    try:
        port.write(entry.hierarchy, entry.path, entry.file, entry.found, entry.inode)
    except CgroupGone:
        return 0
    except OSError as error:
        return error.errno or errno.EIO
    report.restored.append(f"{_where(entry)} = {entry.found.strip()}")
    return 0


def _drop_controllers(port: FilePort, entry: Entry, current: str, report: Report) -> int:
    added = [c for c in current.split() if c not in entry.found.split()]
    if not added:
        return 0
    try:
        text = " ".join(f"-{c}" for c in added)
        port.write(entry.hierarchy, entry.path, entry.file, text, entry.inode)
    except CgroupGone:
        return 0
    except OSError as error:
        # A child of somebody else may use the controller by now; it is then theirs.
        if error.errno == errno.EBUSY:
            report.left_to_others.append(f"{_where(entry)}: {' '.join(added)} is in use")
            return 0
        return error.errno or errno.EIO
    report.restored.append(f"{_where(entry)} = {entry.found.strip()}")
    return 0


def open_tier(port: FilePort, path: str, *, is_tier: bool) -> None:
    """The open state of a directory of ours: no limit of ours in force, the tier at the least weight."""
    inodes = inodes_of(port, path)
    parent = path.rpartition("/")[0] or "/"
    kept = (
        () if is_tier else ("cpu.weight", "memory.max")
    )  # a job's own weight and --memory stay as they were asked for
    for knob, row in KNOBS.items():
        value = row.open_value
        if not value or knob in kept or row.codec == "act" or knob == "cgroup.freeze":
            continue
        current = read_knob(port, path, knob, inodes)
        if current is not None and current != value:
            write_knob(port, path, knob, value, inodes)
    if read_knob(port, path, "cpuset.cpus", inodes):
        if port.layout.version == 2:
            cpus = "\n"  # an empty cpuset follows the parent; a write of no bytes would do nothing
        else:
            parent_inodes = inodes_of(port, parent)
            cpus = read_knob(port, parent, "cpuset.cpus", parent_inodes) or ""
        if cpus:
            write_knob(port, path, "cpuset.cpus", cpus, inodes)


def _remove_made(port: FilePort, entries: list[Entry], report: Report) -> list[Entry]:
    left = []
    ordered = sorted(entries, key=lambda e: -e.path.count("/"))
    for entry in ordered:
        if entry.inode not in (0, port.inode(entry.hierarchy, entry.path)):
            continue
        if port.inode(entry.hierarchy, entry.path) is None:
            continue
        try:
            occupied = processes_below(port, entry.hierarchy, entry.path)
            removed = not occupied and rmdir_tree(port, entry.hierarchy, entry.path)
        except OSError as error:
            report.failed.append(f"{_where(entry)}: {error.strerror}")
            left.append(entry)
            continue
        if removed:
            report.removed.append(_where(entry))
        else:
            left.append(entry)
    left = [e for e in left if e.inode]
    paths = sorted({e.path for e in left})
    for path in paths:  # parents first, so that a child's limits may be widened after its parent's
        report.occupied.append(path)
        try:
            open_tier(port, path, is_tier=not any(path.startswith(f"{p}/") for p in paths))
        except OSError as error:
            report.failed.append(f"{path}: {error.strerror}")
    return left


def _move_back(port: FilePort, entries: list[Entry], made: list[Entry]) -> None:
    ours = {(e.hierarchy, e.path) for e in made}
    for entry in entries:
        if start_time(port, entry.pid) != entry.start_time:
            continue
        inside = any(h == entry.hierarchy and entry.pid in processes(port, h, p) for h, p in ours)
        if inside and port.inode(entry.hierarchy, entry.path) is not None:
            try:
                port.write(entry.hierarchy, entry.path, "cgroup.procs", str(entry.pid))
            except OSError:
                continue


def restore(port: FilePort, journal: Journal, *, move_back: bool = False) -> Report:
    """Undo everything the journal knows; what cannot be undone yet (occupied directories) stays in it.

    With `move_back`, processes that `colocate run` moved return to their former cgroups first.
    """
    report = Report()
    thaw_all(port, journal, report)
    held = [e for e in journal.entries if e.kind in DRIVER_KINDS and e.kind != "cap"]
    caps = [e for e in journal.entries if e.kind == "cap"]
    control = [e for e in journal.entries if e.kind == "value" and e.file == "cgroup.subtree_control"]
    values = [e for e in journal.entries if e.kind == "value" and e.file != "cgroup.subtree_control"]
    made = [e for e in journal.entries if e.kind == "made"]
    moved = [e for e in journal.entries if e.kind == "moved"]
    unresolved = [*_restore_values(port, values, report), *_release_held(port, held, report)]
    unresolved += lift_caps(port, caps, report)
    if move_back:
        _move_back(port, moved, made)
    left = _remove_made(port, made, report)
    # Controllers can be dropped only when the directories below that use them are gone.
    unresolved += control if left else _restore_values(port, control[::-1], report)
    alive = [e for e in moved if left and start_time(port, e.pid) == e.start_time]
    remaining = [*unresolved, *left, *alive]
    if remaining != journal.entries:
        try:
            journal.replace(remaining)
        except JournalBroken as error:  # a full disk: what is undone stays undone, and old entries are looked at again
            log.error("journal_broken", error=str(error))
    return report


def _release_held(port: FilePort, entries: list[Entry], report: Report) -> list[Entry]:
    """What GPU drivers hold, after the thaw, for a frozen process cannot be let go; what could not be is returned."""
    if not entries:
        return []
    from colocate.actuate.driver import undo

    failed = undo(port, entries)
    for entry, why in failed:
        report.failed.append(f"{entry.path}: {f'process {entry.pid}' if entry.pid else entry.file}: {why}")
    left = {(e.pid, e.start_time, e.path, e.file) for e, _ in failed}
    report.restored += [f"{e.path}: {e.file or f'process {e.pid}'}" for e in entries if e.kind == "setting"]
    return [e for e in entries if (e.pid, e.start_time, e.path, e.file) in left]


def lift_caps(port: FilePort, entries: list[Entry], report: Report) -> list[Entry]:
    """Power limits whose workloads have ended; those of the others stay, and their cgroups are waited for."""
    if not entries:
        return []
    from colocate.actuate.caps import put_back_caps

    left, failed = put_back_caps(port, entries)
    report.failed += [f"power limit of {uuid}: {why}" for uuid, why in failed.items()]
    report.restored += [f"power limit of {uuid}" for uuid in sorted({e.file for e in entries} - {e.file for e in left})]
    report.capped += sorted({e.path for e in left if e.file not in failed})
    return left


def restore_paths(port: FilePort, journal: Journal, paths: set[str]) -> Report:
    """Put back what was found in these cgroups, which are no longer governed, and forget them."""
    report = Report()
    mine = [e for e in journal.entries if e.kind == "value" and e.path in paths]
    unresolved = {e.key for e in _restore_values(port, mine, report)}
    resolved = {e.key for e in mine} - unresolved
    with contextlib.suppress(JournalBroken):  # filtered where the journal is locked: workers add to it meanwhile
        journal.keep(lambda e: e.kind != "value" or e.key not in resolved)
    return report


def let_go(port: FilePort, journal: Journal) -> Report:
    """Thaw everything, lift every limit of ours, and put found values back, without touching the journal."""
    report = Report()
    thaw_everything(port, journal, report)
    values = [e for e in journal.entries if e.kind == "value" and e.file != "cgroup.subtree_control"]
    _restore_values(port, values, report)
    _release_held(port, [e for e in journal.entries if e.kind == "process"], report)
    made = sorted({e.path for e in journal.entries if e.kind == "made"})
    for path in made:  # parents first, so that a child's limits may be widened after its parent's
        try:
            if inodes_of(port, path):
                open_tier(port, path, is_tier=not any(path.startswith(f"{p}/") for p in made))
        except OSError as error:
            report.failed.append(f"{path}: {error.strerror}")
    return report


def kill_below(port: FilePort, path: str, inodes: dict[str, int]) -> int:
    """SIGKILL every process below a cgroup, thawed, by cgroup.kill where the kernel has it; how many were there."""
    pids = processes_anywhere(port, path)
    thaw_below(port, path)
    kill_hierarchy = port.layout.hierarchy("kill")
    if kill_hierarchy in inodes and kill_hierarchy is not None:
        try:
            port.write(kill_hierarchy, path, "cgroup.kill", "1", inodes[kill_hierarchy])
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EOPNOTSUPP, errno.ENODEV):
                raise
    for pid in processes_anywhere(port, path):  # looked up anew: a pid of the first look may be another process by now
        port.kill(pid, signal.SIGKILL)
    return len(pids)
