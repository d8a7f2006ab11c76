"""The node manager: the loop that joins the five verbs, and the order in which it starts and stops.

Start: lock, undo what a predecessor left, make the tier. Each tick: observe, model, decide, actuate, record. Stop:
undo, or with `handover` leave the grants to the successor. Killed at any instant, the guardian undoes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any, Protocol

import msgspec
import structlog

from colocate.actuate.guardian import OCCUPIED, Guardian
from colocate.actuate.journal import Journal
from colocate.actuate.restore import Report, restore, restore_paths, thaw_everything
from colocate.actuate.statedir import StateDirectory
from colocate.actuate.tier import TierMaker
from colocate.actuate.writer import Drift, Writer
from colocate.cgroupfs import FilePort, joined, start_time
from colocate.config import Calibration, ColocationPolicy
from colocate.decide.pipeline import LawState, decide
from colocate.errors import ColocateError, JournalBroken
from colocate.jobs.registry import Job, Registry
from colocate.model.forecast import Forecast, ModelState, forecast
from colocate.model.kernels import Kernels
from colocate.model.state import from_builtins, to_builtins
from colocate.observe.latency import LatencyScraper
from colocate.observe.observer import Observer
from colocate.observe.pressure import PressureWatch
from colocate.plan import Outcome, Plan
from colocate.report.record import Recorder
from colocate.snapshot import NodeSnapshot

log = structlog.get_logger()
MODEL_FILE = "model.json"
HANDOVER_FILE = "handover.json"
SAVE_MODEL_EVERY_SECONDS = 300.0
SCRAPE_WAIT_RATIO = 0.15
FORGET_TOGETHER = 20


class Clock(Protocol):
    """The `time` module, or a model's clock."""

    def time(self) -> float:
        """Wall clock, seconds."""

    def monotonic(self) -> float:
        """Seconds that never go back."""


class Tick(msgspec.Struct, frozen=True):
    """What the last tick saw and did."""

    snapshot: NodeSnapshot
    forecast: Forecast
    plan: Plan
    outcomes: list[Outcome]
    drifts: list[Drift]
    seconds: float


class Agent:
    """One node's manager. `port`, `clock` and `kernels` may be the kernel model's, a model's clock and numpy twins."""

    def __init__(
        self,
        port: FilePort,
        policy: ColocationPolicy,
        kernels: Kernels,
        journal: Journal,
        *,
        state: StateDirectory | None = None,
        calibration: Calibration | None = None,
        recorder: Recorder | None = None,
        guardian: Guardian | None = None,
        shadow: bool = False,
        clock: Clock = time,
    ) -> None:
        self.port, self.policy, self.kernels, self.journal, self.clock = port, policy, kernels, journal, clock
        self.state, self.shadow, self.guardian = state, shadow, guardian
        self.calibration = calibration or Calibration()
        self.registry = Registry(state)
        self.scraper = LatencyScraper()
        self.observer = Observer(port, policy, self.registry.known, self.scraper)
        self.writer = Writer(port, journal, shadow=shadow)
        self.tier = TierMaker(port, journal, self.observer.tree)
        self.recorder = recorder or Recorder(None, policy.spec.records, "none")
        self.watch: PressureWatch | None = None
        self.model = ModelState()
        self.laws = LawState()
        self.last: Tick | None = None
        self.counts: dict[tuple[str, str], int] = {}
        self.on_tick: list[Callable[[Tick], None]] = []
        self.on_evicted: list[Callable[[Job], None]] = []
        self._next_kernels: tuple[Kernels, str] | None = None
        self._wake = asyncio.Event()
        self._model_saved = 0.0
        self._forgotten: set[str] = set()

    def _take_over(self) -> bool:
        """Whether a predecessor handed its grants over; then its laws' memory is ours."""
        data = self.state.load(HANDOVER_FILE) if self.state is not None else None
        if self.state is None or data is None:
            return False
        (self.state.path / HANDOVER_FILE).unlink(missing_ok=True)
        try:
            if data["boot_id"] != self.journal.boot_id:
                return False  # its times are of another clock, and what it governed is gone
            self.laws = msgspec.convert(data["laws"], LawState)
        except (KeyError, msgspec.ValidationError) as error:
            log.warning("handover_unusable", error=str(error))
            return False
        return True

    def open(self) -> Report:
        """Undo what a predecessor left (unless it handed over) and make the tier. Raises HostUnfit, StateTooNew."""
        if self.state is not None and (data := self.state.load(MODEL_FILE)) is not None:
            try:
                model = from_builtins(data, str(self.state.path / MODEL_FILE))
                # Times of another boot or process cannot be compared; what was learnt of the workloads stays.
                self.model = msgspec.structs.replace(model, previous=None, windows={})
            except (KeyError, TypeError, ValueError, msgspec.ValidationError) as error:
                log.warning("model_state_unusable", error=str(error))
        handover = not self.shadow and self._take_over()
        report = Report() if handover or self.shadow else restore(self.port, self.journal)
        if not self.shadow:
            self.tier.ensure_tier()
            if self.guardian is not None:
                self.guardian.ensure()
        return report

    def set_policy(self, policy: ColocationPolicy) -> None:
        """Put another policy in force with the next tick."""
        self.policy = self.observer.policy = policy
        self._wake.set()

    def set_kernels(self, kernels: Kernels, backend: str) -> None:
        """Compute with these from the next tick on: one that is under way is recorded as what computed it."""
        self._next_kernels = (kernels, backend)

    def wake(self, why: str) -> None:
        """Tick now: a service stalls."""
        log.debug("woken", why=why)
        self._wake.set()

    async def tick(self) -> Tick:
        """Observe, model, decide, actuate, record: once."""
        started = time.perf_counter()
        if self._next_kernels is not None:
            (self.kernels, self.recorder.backend), self._next_kernels = self._next_kernels, None
        spec = self.policy.spec
        objectives = {s.name: s.slo for s in spec.services if s.slo is not None}
        await self.scraper.scrape(objectives, min(SCRAPE_WAIT_RATIO * spec.tick, 0.1))
        self.observer.refresh_pods()
        snapshot = self.observer.snapshot(self.clock.time(), self.clock.monotonic())
        former, self.tier.tree = self.tier.tree.tier_path, self.observer.tree
        if former != self.tier.tree.tier_path and not self.shadow:
            self.tier.remove_job(former)  # unless jobs are in it, which follow
        kubernetes = self.observer.tree.kubepods is not None
        drifts = self.writer.drifts(snapshot, yields=spec.drift == "yield", kubernetes=kubernetes)
        for drift in drifts:
            log.warning("drift", **msgspec.to_builtins(drift), policy=spec.drift)
        model_before, laws_before = self.model, self.laws
        self.model, seen = forecast(snapshot, self.model, spec, self.kernels)
        self.laws, plan = decide(snapshot, seen, spec, self.calibration, self.laws, self.recorder.arm)
        if not self.shadow:
            # Its caller hears of an eviction before the signal arrives, and can tell it from another end.
            for job in self.registry.note(plan, snapshot.monotonic_seconds):
                for told in self.on_evicted:
                    told(job)
            self._release(snapshot)
        outcomes = await self.writer.apply(plan, snapshot)
        for outcome in outcomes:
            key = (outcome.reason, outcome.status)
            self.counts[key] = self.counts.get(key, 0) + 1
        self.recorder.write(snapshot, seen, plan, outcomes, model_before, laws_before, self.policy, self.calibration)
        self._housekeep(snapshot)
        self.last = Tick(snapshot, seen, plan, outcomes, drifts, time.perf_counter() - started)
        for told_tick in self.on_tick:
            told_tick(self.last)
        return self.last

    def _release(self, snapshot: NodeSnapshot) -> None:
        """Put back what was found in a cgroup that is no longer batch in place: the policy or its selector changed."""
        governed = {w.path for w in snapshot.of("batch") if w.in_place}
        left = {e.path for e in self.journal.entries if e.kind == "value" and e.file != "cgroup.subtree_control"}
        if snapshot.stale_ticks or not (left - governed):
            return
        report = restore_paths(self.port, self.journal, left - governed)
        log.info("released", paths=sorted(left - governed), restored=report.restored, failed=report.failed)

    def _housekeep(self, snapshot: NodeSnapshot) -> None:
        if self.watch is not None:
            self.watch.watch(self.observer.watched(snapshot))
        if self.guardian is not None and not self.shadow:
            self.guardian.ensure()
        if not self.shadow:
            if snapshot.tier is None:
                self.tier.ensure_tier()
            self._rehome()
        if self.state is not None and snapshot.monotonic_seconds - self._model_saved > SAVE_MODEL_EVERY_SECONDS:
            self._model_saved = snapshot.monotonic_seconds
            self.state.save(MODEL_FILE, to_builtins(self.model))

    def _rehome(self) -> None:
        """Jobs follow the tier: a kubelet that starts after us makes its tree then, and the tier belongs in there."""
        for job in self.registry.jobs.values():
            former = job.path
            if former == joined(self.tier.tree.tier_path, job.name):
                continue
            try:
                placement = self.tier.rehome(job.name, former, job.memory_bytes)
            except (ColocateError, OSError) as error:
                log.warning("job_not_rehomed", job=job.name, error=str(error))
                continue
            job.path = placement.path
            self.registry.save()
            self.tier.remove_job(former)
            self.forget_made(former)
            self.tier.remove_job(former.rpartition("/")[0])  # goes with the last job
            log.info("job_rehomed", job=job.name, former=former, path=job.path)

    async def run(self, stop: asyncio.Event) -> None:
        """Tick until told to stop; at once when a service stalls on memory."""
        spec = self.policy.spec
        self.watch = PressureWatch(self.port, self.wake, spec.memory.pressure / 100, spec.memory.poll)
        async with asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(self.watch.run())
            stopping = tasks.create_task(stop.wait())
            following = time.monotonic()
            while not stop.is_set():
                await self.tick()
                now = time.monotonic()  # a tick that was woken early must not put off the next ones
                following = max(min(following, now) + self.policy.spec.tick, now + 0.01)
                woken = tasks.create_task(self._wake.wait())
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait(
                        {woken, stopping},
                        timeout=max(following - time.monotonic(), 0.0),
                        return_when=asyncio.FIRST_COMPLETED,
                    )
                woken.cancel()
                self._wake.clear()
            watching.cancel()

    async def close(self, *, handover: bool = False) -> Report:
        """Stop in order: undo, or leave the grants to a successor."""
        report = Report()
        word = b""  # without a word the guardian undoes what could not be undone here
        try:
            await self.writer.settle()
            if not self.shadow and handover:
                thaw_everything(self.port, self.journal, report)  # nobody may be there to thaw it
            elif not self.shadow:
                report = restore(self.port, self.journal)
            word = b"handover" if handover else OCCUPIED if report.occupied else b"done"
        finally:
            if self.guardian is not None:
                self.guardian.dismiss(word)
            if self.state is not None:
                self.state.save(MODEL_FILE, to_builtins(self.model))
                if handover:
                    self.state.save(
                        HANDOVER_FILE, {"boot_id": self.journal.boot_id, "laws": msgspec.to_builtins(self.laws)}
                    )
            self.journal.close()
            self.recorder.close()
            await self.scraper.close()
            await self.observer.lister.close()
        return report

    def forget_made(self, path: str) -> None:
        """Take a directory of ours that was removed out of the journal, once there are many such entries."""
        self._forgotten.add(path)
        if len(self._forgotten) < FORGET_TOGETHER:
            return
        gone, self._forgotten = self._forgotten, set()
        with contextlib.suppress(JournalBroken):
            self.journal.replace(
                e
                for e in self.journal.entries
                if not (e.kind == "made" and e.path in gone and self.port.inode(e.hierarchy, e.path) is None)
                and not (e.kind == "moved" and start_time(self.port, e.pid) != e.start_time)
            )

    def problems(self) -> dict[str, str]:
        """What an operator should mend, by what it is about."""
        scraped = {f"{name} (latency)": f"{name}: {problem}" for name, problem in self.scraper.problems.items()}
        return {**self.observer.problems, **scraped}

    def explain(self) -> dict[str, Any]:
        """The last tick as plain data, for the socket and /debug/plan."""
        if self.last is None:
            return {}
        return {
            "plan": msgspec.to_builtins(self.last.plan),
            "forecast": msgspec.to_builtins(self.last.forecast),
            "snapshot": msgspec.to_builtins(self.last.snapshot),
            "outcomes": msgspec.to_builtins(self.last.outcomes),
            "drifts": msgspec.to_builtins(self.last.drifts),
            "laws": msgspec.to_builtins(self.laws),
            "calibration": msgspec.to_builtins(self.calibration),
            "problems": self.problems(),
            "shadow": self.shadow,
            "tick_seconds": self.last.seconds,
        }
