"""Applies a Plan: journal first, write, read back. One action failing gives a failed Outcome; the tick goes on.

What may block for seconds (memory.high, memory.reclaim, v1's limits) runs off the loop with a deadline. The writer
remembers what it wrote, so that somebody else's writing is noticed on the next snapshot.
"""

from __future__ import annotations

import asyncio
import errno
import signal

import msgspec
import structlog

from colocate.actuate.journal import Entry, Journal
from colocate.actuate.restore import kill_below
from colocate.cgroupfs import UNIFIED, CgroupGone, FilePort, processes_below
from colocate.decide.pipeline import already
from colocate.errors import JournalBroken
from colocate.knobs import WRITE_ONLY, FileWrite, file_writes, same
from colocate.plan import Action, Outcome, Plan
from colocate.snapshot import NodeSnapshot, Workload

log = structlog.get_logger()
BLOCKING_DEADLINE_SECONDS = 2.0
YIELD_SECONDS = 60.0


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
        self._blocking: dict[tuple[str, str], asyncio.Task[Outcome]] = {}
        self._complained: dict[tuple[str, str], tuple[str, int | None]] = {}

    def drifts(self, snapshot: NodeSnapshot, *, yields: bool, kubernetes: bool) -> list[Drift]:
        """Knobs whose value on disk is not the one that we wrote last; with `yields` they are left alone a while."""
        known = dict(snapshot.workloads)
        if snapshot.tier is not None:
            known["tier"] = snapshot.tier
        found = []
        for key, (inodes, value) in list(self._written.items()):
            workload = known.get(key[0])
            if workload is None or workload.inodes != inodes:
                del self._written[key]
                continue
            current = workload.knobs.get(key[1])
            if current is not None and not already(key[1], value, current) and not same(key[1], value, current):
                found.append(Drift(key[0], key[1], value, current, _guess(key[1], current, kubernetes)))
                del self._written[key]
                if yields:
                    self._yielded[key] = snapshot.monotonic_seconds + YIELD_SECONDS
        return found

    async def apply(self, plan: Plan, snapshot: NodeSnapshot) -> list[Outcome]:
        """Apply the actions in their order."""
        known: dict[str, Workload] = dict(snapshot.workloads)
        if snapshot.tier is not None:
            known["tier"] = snapshot.tier
        outcomes = []
        for action in plan.actions:
            workload = known.get(action.workload)
            if workload is None:
                outcomes.append(self._outcome(action, "skipped", error="the workload is gone"))
            elif self._shadow:
                outcomes.append(self._outcome(action, "shadow", found=workload.knobs.get(action.knob)))
            elif self._yielded.get((action.workload, action.knob), 0.0) > snapshot.monotonic_seconds:
                outcomes.append(self._outcome(action, "skipped", error="yielded to another writer"))
            else:
                outcomes.append(await self._apply_one(action, workload))
        return outcomes

    def _outcome(self, action: Action, status: str, *, found: str | None = None, error: str = "") -> Outcome:
        return msgspec.convert(
            {
                "workload": action.workload,
                "knob": action.knob,
                "value": action.value,
                "status": status,
                "found": found,
                "error": error,
                "reason": action.reason,
            },
            Outcome,
        )

    async def _apply_one(self, action: Action, workload: Workload) -> Outcome:
        if not action.knob.startswith("memory."):
            return self._write(action, workload)
        key = (action.workload, action.knob)
        running = self._blocking.get(key)
        if running is not None and not running.done():
            return self._outcome(action, "skipped", error="the last write has not come back yet")
        task = asyncio.create_task(asyncio.to_thread(self._write, action, workload))
        self._blocking[key] = task
        try:
            return await asyncio.wait_for(asyncio.shield(task), BLOCKING_DEADLINE_SECONDS)
        except TimeoutError:
            return self._outcome(action, "failed", error="the kernel is still reclaiming")

    def _write(self, action: Action, workload: Workload) -> Outcome:
        try:
            if action.knob == "signal":
                number = signal.Signals[action.value]
                pids = self._pids(workload)
                for pid in pids:
                    self._port.kill(pid, number)
                return self._outcome(action, "applied", found=str(len(pids)))
            if action.knob == "cgroup.kill":
                return self._outcome(action, "applied", found=str(kill_below(self._port, action.path, workload.inodes)))
            writes = file_writes(self._port.layout, action.knob, action.value, workload.inodes)
            writes = [w for w in writes if w.hierarchy in workload.inodes]
            if not writes:
                return self._outcome(action, "skipped", error="this host has no such knob")
            changed, before = False, None
            for write in writes:
                found = self._write_file(write, action, workload)
                changed = changed or found is not None
                before = before or found
            self._written[(action.workload, action.knob)] = (workload.inodes, action.value)
            return self._outcome(action, "applied" if changed else "unchanged", found=before)
        except CgroupGone:
            return self._outcome(action, "skipped", error="the cgroup is gone")
        except (JournalBroken, KeyError, ValueError) as error:
            return self._outcome(action, "skipped", error=f"{type(error).__name__}: {error}")
        except OSError as error:
            self._complain(action, error)
            return self._outcome(action, "failed", error=f"{errno.errorcode.get(error.errno or 0)}: {error.strerror}")

    def _complain(self, action: Action, error: OSError) -> None:
        """Log a failure once, not every tick until it is mended."""
        key, said = (action.path, action.knob), (action.value, error.errno)
        if self._complained.get(key) != said:
            self._complained[key] = said
            loud = log.error if error.errno in (errno.EINVAL, errno.EBUSY) else log.warning
            loud("write_failed", path=action.path, knob=action.knob, value=action.value, error=error.strerror)

    def _pids(self, workload: Workload) -> list[int]:
        return sorted({p for h in workload.inodes for p in processes_below(self._port, h, workload.path)})

    def _write_file(self, write: FileWrite, action: Action, workload: Workload) -> str | None:
        """The value found if the file was changed, None if it already had the value. Raises OSError, JournalBroken."""
        inode = workload.inodes[write.hierarchy]
        write_only = write.file in WRITE_ONLY
        found = None if write_only else self._port.read(write.hierarchy, action.path, write.file, inode)
        if found is not None and same(write.file, write.value, found):
            return None
        if found is None and not write_only:
            raise CgroupGone(errno.ENOENT, f"{action.path}/{write.file} is gone")
        if workload.in_place and not write_only:
            self._journal.add(*self._before_values(write, action, inode, found or ""))
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

    def _before_values(self, write: FileWrite, action: Action, inode: int, found: str) -> list[Entry]:
        """What a write destroys: the file's own value, and for cpu.idle the weight, which comes back as the default."""
        entry = Entry(
            kind="value",
            boot_id=self._journal.boot_id,
            hierarchy=write.hierarchy,
            path=action.path,
            inode=inode,
            file=write.file,
            found=found,
            wanted=write.value,
            reason=action.reason,
        )
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
        """Wait for writes that are still under way, at most the deadline."""
        pending = [t for t in self._blocking.values() if not t.done()]
        if pending:
            await asyncio.wait(pending, timeout=BLOCKING_DEADLINE_SECONDS)
