"""Applies a Plan: journal first, write, read back. One action failing gives a failed Outcome; the tick goes on.

What may block runs in a worker of its target: knobs at which the kernel reclaims memory, and everything in cgroups that
are not ours, for there the before-value must be on disk first. Its outcome comes with a later tick. The writer
remembers what it wrote, so that somebody else's writing is noticed on the next snapshot, and what owners had given
before.
"""

from __future__ import annotations

import errno
import signal
import threading
from collections import deque
from collections.abc import Callable, Mapping, Set
from functools import partial
from typing import NamedTuple

import msgspec
import structlog

from colocate.actuate.journal import Entry, Journal, newest_found
from colocate.actuate.restore import kill_below
from colocate.actuate.workers import Workers
from colocate.cgroup.knobfiles import FileWrite, decode_knob, file_writes
from colocate.cgroup.layout import UNIFIED
from colocate.cgroup.port import CgroupGone, FilePort
from colocate.cgroup.tree import processes_below
from colocate.errors import JournalBroken
from colocate.knob import KNOBS, is_act, same
from colocate.plan import Action, Outcome, Plan, Status
from colocate.snapshot import NodeSnapshot, Workload

log = structlog.get_logger()
SETTLE_SECONDS = 2.0
YIELD_SECONDS = 60.0
ENDS = ("signal", "cgroup.kill")
OURS_KEPT = 32
"""A knob that reads as none of so many values of ours was written by somebody else."""


class Care(NamedTuple):
    """What a GPU driver asks of whoever writes."""

    not_to_freeze: Set[str] = frozenset()
    """Workloads with which it does something just now: a frozen one would hang it."""
    before_end: Mapping[str, Callable[[], object]] = {}
    """What is done for a workload before its processes are ended, for others' sake; it may take a moment."""


NO_CARE = Care()


class Drift(msgspec.Struct, frozen=True):
    """Somebody else wrote a knob of ours."""

    workload: str
    knob: str
    ours: str
    found: str
    probably: str


def _guess(knob: str, found: str, kubernetes: bool) -> str:
    if knob == "cpu.max" and found.startswith("max") and kubernetes:
        return "systemd, told by kubelet about the unit (it rewrites the whole CPU controller)"
    if knob in ("cpu.weight", "cpu.idle", "cpu.max") and kubernetes:
        return "kubelet or the container runtime"
    return "an administrator or another agent"


class Writer:
    """Owner of every write to a knob."""

    def __init__(self, port: FilePort, journal: Journal, *, shadow: bool) -> None:
        self._port, self._journal, self._shadow = port, journal, shadow
        self._written: dict[tuple[str, str], tuple[dict[str, int], str]] = {}
        self._yielded: dict[tuple[str, str], float] = {}
        self._workers: Workers[list[Outcome]] = Workers()
        self._complained: dict[tuple[str, str], tuple[str, int | None]] = {}
        self._found: dict[tuple[str, str], tuple[dict[str, int], str]] = {}
        self._ours: dict[tuple[str, str], tuple[dict[str, int], deque[str]]] = {}
        """The values that we wrote into a knob of batch in place of late, or a predecessor did."""
        self._lent: dict[str, dict[str, int]] = {}
        """Batch in place whose freezer is in the journal, so that the hand may have it."""
        self._queued: dict[str, list[tuple[Action, Workload]]] = {}
        self._lock = threading.Lock()
        self._before_end: dict[str, Callable[[], object]] = {}
        self._closed = False

    def drifts(self, snapshot: NodeSnapshot, *, yields: bool, kubernetes: bool) -> list[Drift]:
        """Knobs whose value on disk is not the one that we wrote last; with `yields` they are left alone a while."""
        known = dict(snapshot.workloads)
        if snapshot.tier is not None:
            known["tier"] = snapshot.tier
        found = []
        for key, (inodes, value) in list(self._written.items()):
            workload = known.get(key[0])
            if workload is None or workload.inodes != inodes:
                self._written.pop(key, None)
                continue
            current = workload.knobs.get(key[1])
            if current is None or self._workers.busy(workload.path):
                continue  # a write of our own that has not come back is no drift
            if not same(key[1], value, current):
                found.append(Drift(key[0], key[1], value, current, _guess(key[1], current, kubernetes)))
                self._written.pop(key, None)
                if yields:
                    self._yielded[key] = snapshot.monotonic_seconds + YIELD_SECONDS
        return found

    def found(self, workload: Workload) -> dict[str, str]:
        """What its owner had given batch in place before us, or gave since; empty if it is not in place."""
        if not workload.in_place:
            return {}
        values = {}
        for knob, current in workload.knobs.items():
            key = (workload.id, knob)
            kept, ours = self._found.get(key), self._ours.get(key)
            if ours is None or ours[0] != workload.inodes:
                ours = self._ours[key] = (workload.inodes, deque(maxlen=OURS_KEPT))
            if kept is None or kept[0] != workload.inodes:
                before, wrote = self._journaled(workload, knob)
                ours[1].extend(wrote)
                kept = (workload.inodes, current if before is None else before)
            known = same(knob, kept[1], current) or any(same(knob, value, current) for value in list(ours[1]))
            if not known and not self._workers.busy(workload.path):
                kept = (workload.inodes, current)  # somebody else's since: that is what counts now
            self._found[key] = kept
            values[knob] = kept[1]
        return values

    def lend(self, plan: Plan, snapshot: NodeSnapshot) -> set[str]:
        """Whose freezer the hand may have: what is found in it is ours then, and no drift.

        One that is not ours is in the journal first, and so is lent a tick later.
        """
        lent = set()
        for id_ in plan.pulses:
            workload, key = snapshot.workloads.get(id_), (id_, "cgroup.freeze")
            self._written.pop(key, None)
            if workload is None:
                continue
            if workload.in_place:
                ours = self._ours.setdefault(key, (workload.inodes, deque(maxlen=OURS_KEPT)))
                ours[1].extend(v for v in ("0", "1") if v not in ours[1])
                with self._lock:  # what still waits would come in the hand's way
                    if waiting := self._queued.get(workload.path):
                        waiting[:] = [w for w in waiting if w[0].knob != "cgroup.freeze"]
                if self._lent.get(id_) != workload.inodes:
                    self._workers.submit(f"lend {workload.path}", partial(self._note_lent, workload))
                    continue
            lent.add(id_)
        return lent

    def _note_lent(self, workload: Workload) -> list[Outcome]:
        writes = file_writes(self._port.layout, "cgroup.freeze", "1", workload.inodes)
        try:
            for write in (w for w in writes if w.hierarchy in workload.inodes):
                inode = workload.inodes[write.hierarchy]
                found = self._port.read(write.hierarchy, workload.path, write.file, inode)
                if found is None:
                    return []
                known = any(
                    (e.path, e.file, e.inode) == (workload.path, write.file, inode) for e in self._journal.entries
                )
                if not known:
                    self._journal.add(self._before_value(write, workload.path, inode, found.strip(), "PulseGranted"))
        except (JournalBroken, OSError) as error:
            log.warning("not_lent", path=workload.path, error=str(error))
            return []
        self._lent[workload.id] = workload.inodes
        return []

    def forget_written(self) -> None:
        """We were away for so long that our guardian has let everything go: what is there now is no drift."""
        self._written.clear()

    def close(self) -> bool:
        """Write no more, also not what a worker still waits with; whether one does."""
        self._closed = True
        return not self._workers.idle

    def _journaled(self, workload: Workload, knob: str) -> tuple[str | None, list[str]]:
        """What a predecessor found before it changed the knob, and what it wrote, in the v2 vocabulary."""
        entries = [e for e in self._journal.entries if e.kind == "value" and e.path == workload.path]
        found, wrote = newest_found(e for e in entries if workload.inodes.get(e.hierarchy) == e.inode)
        if not found:
            return None, []
        before = decode_knob(knob, {key[3]: entry.found for key, entry in found.items()})
        written = [decode_knob(knob, {key[3]: value}) for key, values in wrote.items() for value in values]
        return before, [value for value in written if value is not None]

    async def apply(self, plan: Plan, snapshot: NodeSnapshot, care: Care = NO_CARE) -> list[Outcome]:
        """Apply the actions in their order. What a worker does is `started`; what has come back meanwhile is added."""
        known: dict[str, Workload] = dict(snapshot.workloads)
        if snapshot.tier is not None:
            known["tier"] = snapshot.tier
        outcomes = [outcome for done in self._workers.arrived() for outcome in done]
        later: dict[str, list[tuple[Action, Workload]]] = {}
        for action in plan.actions:
            workload = known.get(action.workload)
            if workload is None:
                outcomes.append(self._outcome(action, "skipped", error="the workload is gone"))
            elif action.workload in care.not_to_freeze and (action.knob, action.value) == ("cgroup.freeze", "1"):
                outcomes.append(self._outcome(action, "skipped", error="the GPU driver is doing something with it"))
            elif self._shadow:
                outcomes.append(self._outcome(action, "shadow", found=workload.knobs.get(action.knob)))
            elif self._yielded.get((action.workload, action.knob), 0.0) > snapshot.monotonic_seconds:
                outcomes.append(self._outcome(action, "skipped", error="yielded to another writer"))
            elif action.knob in ENDS and action.workload in care.before_end:
                self._before_end[action.workload] = care.before_end[action.workload]
                later.setdefault(action.path, []).append((action, workload))
                outcomes.append(self._outcome(action, "started"))
            elif KNOBS[action.knob].blocking or (workload.in_place and not is_act(action.knob)):
                later.setdefault(action.path, []).append((action, workload))
                outcomes.append(self._outcome(action, "started"))
            else:
                outcomes.append(self._write(action, workload))
        for path, actions in later.items():
            outcomes += self._queue(path, actions)
            self._workers.submit(path, partial(self._write_queued, path))
        return outcomes

    def _queue(self, path: str, actions: list[tuple[Action, Workload]]) -> list[Outcome]:
        """Add to what waits for a target: a knob's newest value counts, an act is never dropped."""
        newer = {(a.workload, a.knob) for a, _ in actions if not is_act(a.knob)}
        with self._lock:
            waiting = self._queued.get(path, [])
            dropped = [a for a, _ in waiting if (a.workload, a.knob) in newer]
            self._queued[path] = [w for w in waiting if (w[0].workload, w[0].knob) not in newer] + actions
        return [self._outcome(a, "skipped", error="a newer value came first") for a in dropped]

    def _write_queued(self, path: str) -> list[Outcome]:
        with self._lock:
            actions = self._queued.pop(path, [])
        return [self._write(action, workload) for action, workload in actions]

    def _outcome(self, action: Action, status: Status, *, found: str | None = None, error: str = "") -> Outcome:
        return Outcome(
            workload=action.workload,
            knob=action.knob,
            value=action.value,
            status=status,
            found=found,
            error=error,
            reason=action.reason,
        )

    def _write(self, action: Action, workload: Workload) -> Outcome:
        if action.knob in ENDS and (first := self._before_end.pop(action.workload, None)) is not None:
            first()
        try:
            if action.knob == "signal":
                return self._signal(action, workload)
            if action.knob == "cgroup.kill":
                return self._outcome(action, "applied", found=str(kill_below(self._port, action.path, workload.inodes)))
            writes = file_writes(self._port.layout, action.knob, action.value, workload.inodes)
            writes = [w for w in writes if w.hierarchy in workload.inodes]
            if not writes:
                return self._outcome(action, "skipped", error="it is in no hierarchy that has such a knob")
            if not is_act(action.knob):
                self._written[(action.workload, action.knob)] = (workload.inodes, action.value)
                if workload.in_place:
                    ours = self._ours.setdefault(
                        (action.workload, action.knob), (workload.inodes, deque(maxlen=OURS_KEPT))
                    )
                    ours[1].append(action.value)
            changed, before = False, None
            for write in writes:
                found = self._write_file(write, action, workload)
                changed = changed or found is not None
                before = before or found
                if changed and action.knob == "cgroup.freeze":
                    break  # of two freezers in which it is frozen one is somebody else's
            return self._outcome(action, "applied" if changed else "unchanged", found=before)
        except CgroupGone:
            return self._outcome(action, "skipped", error="the cgroup is gone")
        except (JournalBroken, KeyError, ValueError) as error:
            self._written.pop((action.workload, action.knob), None)
            return self._outcome(action, "skipped", error=f"{type(error).__name__}: {error}")
        except OSError as error:
            self._written.pop((action.workload, action.knob), None)
            self._complain(action, error)
            return self._outcome(action, "failed", error=f"{errno.errorcode.get(error.errno or 0)}: {error.strerror}")

    def _signal(self, action: Action, workload: Workload) -> Outcome:
        """Send a signal to those processes that handle it: its default action would end helpers of who does.

        If nobody handles SIGTERM all get it, for they shall end; any other signal is then not sent.
        """
        number = signal.Signals[action.value]
        pids = sorted({p for h in workload.inodes for p in processes_below(self._port, h, workload.path)})
        handling = [pid for pid in pids if _handles(self._port, pid, number)]
        if not handling and number != signal.SIGTERM:
            return self._outcome(action, "skipped", error=f"no process of {workload.name} handles {action.value}")
        for pid in handling or pids:
            self._port.kill(pid, number)
        return self._outcome(action, "applied", found=str(len(handling or pids)))

    def _complain(self, action: Action, error: OSError) -> None:
        """Log a failure once, not every tick until it is mended."""
        key, said = (action.path, action.knob), (action.value, error.errno)
        if self._complained.get(key) != said:
            self._complained[key] = said
            loud = log.error if error.errno in (errno.EINVAL, errno.EBUSY) else log.warning
            loud("write_failed", path=action.path, knob=action.knob, value=action.value, error=error.strerror)

    def _write_file(self, write: FileWrite, action: Action, workload: Workload) -> str | None:
        """The value found if the file was changed, None if it already had the value. Raises OSError, JournalBroken."""
        inode = workload.inodes[write.hierarchy]
        write_only = is_act(write.file)
        found = None if write_only else self._port.read(write.hierarchy, action.path, write.file, inode)
        if found is not None and same(write.file, write.value, found):
            return None
        if found is None and not write_only:
            if self._port.inode(write.hierarchy, action.path) == inode:
                raise OSError(
                    errno.ENOENT, f"{action.path} has no {write.file}: its parent hands out no such controller"
                )
            raise CgroupGone(errno.ENOENT, f"{action.path}/{write.file} is gone")
        if workload.in_place and not write_only:
            self._journal.add(*self._before_values(write, action, inode, found or ""))
            if self._closed:
                raise CgroupGone(errno.ESHUTDOWN, "the agent has ended meanwhile")
        try:
            self._port.write(write.hierarchy, action.path, write.file, write.value, inode)
        except OSError as error:
            if write.file == "memory.reclaim" and error.errno == errno.EAGAIN:
                return "partly"  # less could be reclaimed than was asked for: an answer, not a failure
            raise
        if write_only:
            return "done"
        after = self._port.read(write.hierarchy, action.path, write.file, inode)
        if after is not None and not same(write.file, write.value, after):
            raise OSError(errno.EINVAL, f"wrote {write.value}, reads back {after.strip()}")
        return found

    def _before_value(self, write: FileWrite, path: str, inode: int, found: str, reason: str) -> Entry:
        return Entry(
            kind="value",
            boot_id=self._journal.boot_id,
            hierarchy=write.hierarchy,
            path=path,
            inode=inode,
            file=write.file,
            found=found,
            wanted=write.value,
            reason=reason,
        )

    def _before_values(self, write: FileWrite, action: Action, inode: int, found: str) -> list[Entry]:
        """What a write destroys: the file's own value, and for cpu.idle the weight, which comes back as the default."""
        entry = self._before_value(write, action.path, inode, found, action.reason)
        if write.file != "cpu.idle" or write.value != "1":
            return [entry]
        weight, default, idle = (
            ("cpu.weight", "100", "0") if write.hierarchy == UNIFIED else ("cpu.shares", "1024", "3")
        )
        before = self._port.read(write.hierarchy, action.path, weight, inode)
        if before is None:
            return [entry]
        replace = msgspec.structs.replace
        return [replace(entry, file=weight, found=before, wanted=w) for w in (default, idle)] + [entry]

    async def settle(self) -> None:
        """Wait for writes that are still under way, for a moment."""
        await self._workers.settle(SETTLE_SECONDS)


def _handles(port: FilePort, pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal (SigCgt of /proc/<pid>/status, a mask in hexadecimal)."""
    for line in (port.proc(f"/proc/{pid}/status") or "").splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False
