"""The node manager: the loop that joins the five verbs, and the order in which it starts and stops.

Start: lock, undo what a predecessor left, make the tier. Each tick: observe, model, decide, actuate, record. Stop:
undo, or with `handover` leave the grants to the successor. Killed at any instant, the guardian undoes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import structlog

from colocate.actuate.guardian import OCCUPIED, Guardian
from colocate.actuate.journal import Journal
from colocate.actuate.restore import Report, lift_caps, restore, restore_paths, thaw_everything
from colocate.actuate.statedir import CLASSES_FILE, HANDOVER_FILE, MODEL_FILE, SHARE_FILE, StateDirectory
from colocate.actuate.tier import TierMaker
from colocate.actuate.workers import Workers
from colocate.actuate.writer import NO_CARE, SETTLE_SECONDS, Drift, Writer
from colocate.agent.lately import Lately
from colocate.agent.registry import Job, Registry
from colocate.agent.watts import Watts
from colocate.calibration import Calibration
from colocate.cgroup.port import FilePort, KernelPort
from colocate.cgroup.tree import cgroup_of, joined, main_hierarchy, start_time
from colocate.decide.pipeline import LawState, decide, laws_from_builtins, laws_to_builtins
from colocate.decide.refine import Heard, better, known_classes
from colocate.errors import ColocateError, JournalBroken, StateTooOld
from colocate.model.forecast import Forecast, ModelState, forecast
from colocate.model.kernels import Kernels
from colocate.model.state import from_builtins, to_builtins, without_times
from colocate.observe.energy import Account
from colocate.observe.latency import LatencyScraper
from colocate.observe.longwaits import KNOWN_SECONDS, LongWaits
from colocate.observe.node import has_amd, has_nvidia
from colocate.observe.observer import Observer
from colocate.observe.pressure import PressureWatch
from colocate.plan import Outcome, Plan
from colocate.policy.schema import ColocationPolicy, PowerPolicy
from colocate.report.record import Before, Recorder
from colocate.snapshot import NodeSnapshot

if TYPE_CHECKING:
    from colocate.agent.cards import NodeCards

log = structlog.get_logger()
SAVE_MODEL_EVERY_SECONDS = 300.0
SCRAPE_WAIT_RATIO = 0.15
FORGET_TOGETHER = 20
LEAST_BETWEEN_SECONDS = 0.1
"""Between two ticks, whoever wakes us."""
MOST_BUSY_RATIO = 0.25
"""Of one CPU, that being woken may cost."""
STRAYS_EVERY_SECONDS = 5.0
LIFT_EVERY_SECONDS = 2.0
PULSE_SILENCE_SECONDS = 5.0
"""While batch is stopped and let go within milliseconds, our guardian is told to wait no longer for us than this."""


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
        own_clock = clock is time  # a model's clock stands still while a tick reads
        self.observer = Observer(
            port, policy, self.registry.known, self.scraper, clock.monotonic if own_clock else None
        )
        self.writer = Writer(port, journal, shadow=shadow)
        tree, lister = lambda: self.observer.tree, self.observer.lister
        self.watts = Watts(port, tree, lister, self._on_cards, self.power_policy, self._allowed_watts)
        self.tier = TierMaker(port, journal, self.observer.tree)
        self.recorder = recorder or Recorder(None, policy.spec.records, "none")
        self._watch: PressureWatch | None = None
        self._long_waits: LongWaits | None = None
        self._look_again_seconds: float | None = None
        self._cards: NodeCards | None = None
        self.model = ModelState()
        self.laws = LawState()
        self.last: Tick | None = None
        self.counts: dict[tuple[str, str], int] = {}
        self.on_tick: list[Callable[[Tick], None]] = []
        self.lately = Lately()
        self.on_evicted: list[Callable[[Job], None]] = []
        self.warming = False
        """Whether the compiled kernels are still being made: that costs CPU which the node will not need again."""
        self._next_kernels: tuple[Kernels, str] | None = None
        self._next_policy: ColocationPolicy | None = None
        self._wake = asyncio.Event()
        self._woken = False
        self._strays_at = float("-inf")
        self._workers: Workers[bool] = Workers()
        self._model_saved = 0.0
        self._forgotten: set[str] = set()
        self._tier_inodes: dict[str, int] = {}
        """Of the tier, as last seen."""

    def _take_over(self) -> bool:
        """Whether a predecessor handed its grants over; then its laws' memory is ours."""
        data = self.state.load(HANDOVER_FILE) if self.state is not None else None
        if self.state is None or data is None:
            return False
        (self.state.path / HANDOVER_FILE).unlink(missing_ok=True)
        try:
            if data["boot_id"] != self.journal.boot_id:
                return False  # its times are of another clock, and what it governed is gone
            self.laws = laws_from_builtins(data["laws"], str(self.state.path / HANDOVER_FILE))
        except (KeyError, ColocateError, msgspec.ValidationError) as error:
            log.warning("handover_unusable", error=str(error))
            return False
        return True

    def open(self) -> Report:
        """Undo what a predecessor left (unless it handed over) and make the tier. Raises HostUnfit, StateTooNew."""
        known = False
        if self.state is not None and (data := self.state.load(MODEL_FILE)) is not None:
            try:
                # Times of another boot or process cannot be compared; what was learnt of the workloads stays.
                self.model = without_times(from_builtins(data, str(self.state.path / MODEL_FILE)))
                known = True
            except (KeyError, TypeError, ValueError, StateTooOld, msgspec.ValidationError) as error:
                log.warning("model_state_unusable", error=str(error))
        handover = not self.shadow and self._take_over()
        if handover and not known:  # what the laws remember was counted from another zero
            suspended = msgspec.structs.replace(self.laws.cpu, suspended=True)
            self.laws = msgspec.structs.replace(self.laws, cpu=suspended)
        if not handover and self.state is not None and (data := self.state.load(CLASSES_FILE)) is not None:
            try:
                self.laws = msgspec.structs.replace(self.laws, heard=msgspec.convert(data, Heard))
            except msgspec.ValidationError:
                self.state.set_aside(CLASSES_FILE)
        report = Report() if handover or self.shadow else restore(self.port, self.journal)
        self._find_cards()
        if not self.shadow:
            self.tier.ensure_tier()
            if self.guardian is not None:
                self.guardian.ensure()
        return report

    def power_policy(self) -> PowerPolicy:
        """With its models as jobs' progress has made them."""
        return better(self.policy.spec.power, self.laws.heard)

    def _find_cards(self) -> None:
        """Look at cards from now on, if there may be some: nothing of theirs is imported elsewhere."""
        gpu = self.policy.spec.gpu
        nvidia, amd = os.path.exists(gpu.nvml_library) if gpu.nvml_library else has_nvidia(), has_amd()
        if not (gpu.enabled and isinstance(self.port, KernelPort) and (nvidia or amd)):
            return
        from colocate.actuate.caps import Caps
        from colocate.actuate.driver import Driver
        from colocate.actuate.holds import Holds
        from colocate.agent.cards import NodeCards
        from colocate.observe.nvml import Cards

        cards = Cards(self.port, gpu.nvml_library, nvidia=nvidia, amd=amd)
        holds = Holds(self.port, self.journal, self.state, gpu.nvml_library)
        caps = Caps(self.port, self.journal, Driver(gpu.nvml_library), gpu.nvml_library, shadow=self.shadow)
        self._cards = NodeCards(self.port, cards, holds, caps, lambda: self.observer.tree)
        for job in self.registry.jobs.values():
            if job.power_watts is not None:
                self.watts.job_known(job.name, job.visible_gpus)
        self.observer.cards = self._cards.collect

    @property
    def card_energy(self) -> Account:
        """Whose energy the GPUs' meters counted, where the policy wants that."""
        wanted = self._cards is not None and self.policy.spec.power.attribution
        return self._cards.energy.account if wanted and self._cards is not None else Account()

    def _on_cards(self) -> tuple[NodeCards | None, NodeSnapshot | None]:
        return self._cards, self.last.snapshot if self.last is not None else None

    def set_power_share(self, watts: int) -> None:
        """What the cluster leaves of its power budgets to who asks for watts here; 0: all of it. Kept over a restart,
        for it is to count without the API server too."""
        self.observer.power_share = watts
        if self.state is not None:
            self._workers.submit(SHARE_FILE, partial(self.state.save, SHARE_FILE, {"watts": watts}))
        self._wake.set()

    def power_in_force(self) -> float | None:
        """Watts that the power limits of who asks for watts add up to; None where this agent governs no cards, or some
        that such a workload is on has no limit."""
        last = self.last
        if self._cards is None or last is None:
            return None
        limits = self._cards.caps.limits()
        asking = {id_ for id_, workload in last.snapshot.workloads.items() if workload.power_watts}
        open_ = any(
            uuid not in limits and asking & {*card.users, *card.allotted} for uuid, card in last.snapshot.cards.items()
        )
        return None if open_ else sum(limits.values())

    def _allowed_watts(self) -> float:
        budget = self.policy.spec.power.budget
        return self.laws.power.watts if self.laws.power.budget == budget else float(budget)

    def set_policy(self, policy: ColocationPolicy) -> None:
        """Put another policy in force with the next tick."""
        self._next_policy = policy
        self._wake.set()

    def may_be_ended(self, id_: str) -> bool:
        """Whether nothing has to be done first by which others would come to harm."""
        return self._cards is None or self._cards.may_be_ended(id_)

    def set_kernels(self, kernels: Kernels, backend: str) -> None:
        """Compute with these from the next tick on: one that is under way is recorded as what computed it."""
        self._next_kernels = (kernels, backend)

    def wake(self, why: str) -> None:
        """Tick now: a service stalls."""
        log.debug("woken", why=why)
        self._wake.set()

    def _begin(self) -> None:
        """What changed since the last tick is in force from now on, for a whole tick."""
        if self._next_kernels is not None:
            (self.kernels, self.recorder.backend), self._next_kernels = self._next_kernels, None
        if self._next_policy is not None:
            self.policy = self.observer.policy = self._next_policy
            self._next_policy = None

    @property
    def _patience(self) -> float:
        """How long we may be silent before our guardian lets everything go, in seconds."""
        if self.last is not None and self.last.plan.pulses:
            return max(PULSE_SILENCE_SECONDS, 5 * self.policy.spec.tick)
        return max(self.policy.spec.freeze.max_frozen, 5 * self.policy.spec.tick)

    def _observe(self) -> tuple[NodeSnapshot, list[Drift]]:
        """The snapshot with what owners had given, and who else writes our knobs."""
        snapshot = self.observer.snapshot(self.clock.time(), self.clock.monotonic())
        kubernetes = self.observer.tree.kubepods is not None
        if self.warming:
            snapshot = msgspec.structs.replace(snapshot, warming=True)
        in_place = {i: w for i, w in snapshot.workloads.items() if w.in_place}
        if in_place:  # before drifts are looked at, which forgets what we wrote
            replace = msgspec.structs.replace
            given = {i: replace(w, found=self.writer.found(w)) for i, w in in_place.items()}
            snapshot = replace(snapshot, workloads={**snapshot.workloads, **given})
        if self.last is not None and snapshot.monotonic_seconds - self.last.snapshot.monotonic_seconds > self._patience:
            self.writer.forget_written()
        drifts = self.writer.drifts(snapshot, yields=self.policy.spec.drift == "yield", kubernetes=kubernetes)
        for drift in drifts:
            log.warning("drift", **msgspec.to_builtins(drift), policy=self.policy.spec.drift)
        return snapshot, drifts

    async def tick(self) -> Tick:
        """Observe, model, decide, actuate, record: once."""
        started = time.perf_counter()
        self._begin()
        spec, policy, arm, window = self.policy.spec, self.policy, self.recorder.arm, self.recorder.window
        objectives = {s.name: s.slo for s in spec.services if s.slo is not None}
        # A tick that was woken is about memory: it waits for nobody's page.
        await self.scraper.scrape(objectives, 0.0 if self._woken else min(SCRAPE_WAIT_RATIO * spec.tick, 0.1))
        self.observer.refresh_pods()
        snapshot, drifts = self._observe()
        former, self.tier.tree = self.tier.tree.tier_path, self.observer.tree
        model_before, laws_before = self.model, self.laws
        self.model, seen = forecast(snapshot, self.model, spec, self.kernels)
        self.laws, plan = decide(snapshot, seen, spec, self.calibration, self.laws, arm)
        cpu = next((v for v in plan.verdicts if v.law == "cpu"), None)
        self.observer.looks_for_strangers = cpu is not None and cpu.reason != "NothingSuffers"
        if not self.shadow:
            # Its caller hears of an eviction before the signal arrives, and can tell it from another end.
            for job in self.registry.note(plan):
                for told in self.on_evicted:
                    told(job)
        if self._cards is not None:
            lent = self.writer.lend(plan, snapshot) if not self.shadow else set()
            granted = (
                msgspec.structs.replace(plan, pulses={}, suspended=(), limits=(), caps=()) if self.shadow else plan
            )
            self._cards.act(granted, snapshot, spec, lent)
        care = NO_CARE
        if self._cards is not None and not self.shadow:
            care = self._cards.care(plan, snapshot, self.laws.eviction.under_way)
        outcomes = await self.writer.apply(plan, snapshot, care)
        self.registry.delivered(outcomes, snapshot)
        self.lately.add(snapshot, plan, outcomes, drifts)
        for outcome in outcomes:
            key = (outcome.reason, outcome.status)
            self.counts[key] = self.counts.get(key, 0) + 1
        if not self.shadow:
            if former != self.tier.tree.tier_path:
                self.tier.remove_job(former)  # unless jobs are in it, which follow
            self._release(snapshot)
        before = Before(model_before, laws_before, policy, self.calibration, arm, window)
        self.recorder.write(snapshot, seen, plan, outcomes, before)
        self._look_closely(snapshot, seen)
        self._housekeep(snapshot)
        self.last = Tick(snapshot, seen, plan, outcomes, drifts, time.perf_counter() - started)
        for told_tick in self.on_tick:
            told_tick(self.last)
        return self.last

    def _release(self, snapshot: NodeSnapshot) -> None:
        """Put back what was found in a cgroup that is no longer batch in place: the policy or its selector changed."""
        governed = {w.path for w in snapshot.of("batch") if w.in_place}
        left = {e.path for e in self.journal.entries if e.kind == "value" and e.file != "cgroup.subtree_control"}
        if snapshot.stale_seconds or not (left - governed):
            return
        gone = left - governed
        if not self._workers.busy("release"):

            def release() -> bool:
                report = restore_paths(self.port, self.journal, gone)
                log.info("released", paths=sorted(gone), restored=report.restored, failed=report.failed)
                return True

            self._workers.submit("release", release)

    def _look_closely(self, snapshot: NodeSnapshot, seen: Forecast) -> None:
        """At services that are judged by their waiting, once it may matter whether they feel it."""
        if self._long_waits is None:
            return
        waiting = {
            w.id: (w.path, seen.workloads[w.id].cpu_pressure_ratio or 0.0)
            for w in snapshot.of("service")
            if w.cpu_pressure_us is not None and seen.workloads[w.id].evidence != "latency"
        }
        half = 0.5 * self.policy.spec.cpu.pressure / 100
        new = self._long_waits.watch(waiting, half, snapshot.monotonic_seconds)
        self._look_again_seconds = KNOWN_SECONDS if new else None

    def _housekeep(self, snapshot: NodeSnapshot) -> None:
        self.port.tidy()
        if self._watch is not None:
            self._watch.watch(self.observer.watched(snapshot))
        if self.guardian is not None and not self.shadow:
            self.guardian.ensure()
            self.guardian.beat(self._patience)
        if not self.shadow:
            # systemd ends it with its last pod, and makes another with the next one, perhaps within a tick.
            if snapshot.tier is None or (self._tier_inodes and snapshot.tier.inodes != self._tier_inodes):
                self.tier.ensure_tier()
            self._tier_inodes = snapshot.tier.inodes if snapshot.tier is not None else {}
            self._enable_in_place(snapshot)
            self._look_for_strays(snapshot.monotonic_seconds)
            self._rehome()
            if self._cards is None and any(e.kind == "cap" for e in self.journal.entries):
                self._workers.submit("caps", self._lift_caps)  # of an agent before us; GPUs are not looked at now
        if self.state is not None and self.journal.astray():
            self._workers.submit("journal", self._rewrite_journal)
        if self.state is not None and snapshot.monotonic_seconds - self._model_saved > SAVE_MODEL_EVERY_SECONDS:
            self._model_saved = snapshot.monotonic_seconds
            save = partial(self.state.save, MODEL_FILE, to_builtins(self.model))
            self._workers.submit(MODEL_FILE, save)
            self._workers.submit(CLASSES_FILE, self._save_classes)

    def _save_classes(self) -> bool:
        """What jobs did; of what they are saying right now a successor has not seen all."""
        ran = self.laws.heard.ran
        return bool(ran and self.state and self.state.save(CLASSES_FILE, msgspec.to_builtins(Heard(ran=ran))))

    def _lift_caps(self) -> bool:
        time.sleep(LIFT_EVERY_SECONDS)
        report = Report()
        entries = [e for e in self.journal.entries if e.kind == "cap"]
        left = lift_caps(self.port, entries, report)
        for why in report.failed:
            log.warning("power_limit_stays", why=why)
        with contextlib.suppress(JournalBroken):
            self.journal.keep(lambda e: e.kind != "cap" or e in left)
        return not report.failed

    def _rewrite_journal(self) -> bool:
        try:
            self.journal.rewrite()
        except JournalBroken as error:
            log.error("journal_broken", error=str(error))
            return False
        log.warning("journal_rewritten", path=str(self.journal.path), why="the file was gone")
        self.registry.save()
        return True

    def _enable_in_place(self, snapshot: NodeSnapshot) -> None:
        """Batch in place whose parent hands out no cpu controller gets one, journaled, or is named as ungovernable."""
        for workload in snapshot.of("batch"):
            if not workload.in_place or "cpu.max" in workload.knobs:
                self.observer.extra_problems.pop(f"{workload.id} (cpu)", None)
                continue
            why = ""
            try:
                self.tier.enable_for(workload.path)
            except (ColocateError, OSError) as error:
                why = str(error).splitlines()[0]
            self.observer.extra_problems[f"{workload.id} (cpu)"] = (
                f"{workload.name}: {workload.path} has no cpu controller, so its CPU use cannot be governed"
                + (f": {why}" if why else "")
            )

    def _look_for_strays(self, now: float) -> None:
        """A job whose process has left the tier (sudo, systemd-run, a daemon) is governed no more: say so."""
        if now - self._strays_at < STRAYS_EVERY_SECONDS:
            return
        self._strays_at = now
        hierarchy = main_hierarchy(self.port)
        for job in self.registry.jobs.values():
            path = cgroup_of(self.port, job.pid, hierarchy)
            astray = path is not None and path != job.path and not path.startswith(f"{job.path}/")
            if astray and start_time(self.port, job.pid) == job.start_time:
                said = f"{job.name}: its process {job.pid} has left the tier for {path}, and is not governed there"
                self.observer.extra_problems[f"job {job.name}"] = said
            else:
                self.observer.extra_problems.pop(f"job {job.name}", None)

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
        """Tick until told to stop; sooner when a service stalls on memory, or a law wants to look again."""
        spec = self.policy.spec
        if isinstance(self.port, KernelPort):  # a model stands still between ticks, and has no threads to look at
            self._watch = PressureWatch(self.port.layout, self.wake, spec.memory.pressure / 100, spec.memory.poll)
            self._long_waits = LongWaits(self.port)
            self.observer.long_waits = self._long_waits.waited_us
        async with asyncio.TaskGroup() as tasks:
            stopping = tasks.create_task(stop.wait())
            following = time.monotonic()
            while not stop.is_set():
                begun = time.monotonic()
                done = await self.tick()
                now = time.monotonic()  # a tick that was woken early must not put off the next ones
                following = max(min(following, begun) + self.policy.spec.tick, now + 0.01)
                wished = (done.plan.look_again_seconds, self._look_again_seconds)
                again = min((w for w in wished if w is not None), default=None)
                due = following if again is None else min(following, max(begun + again, now + LEAST_BETWEEN_SECONDS))
                earliest = max(begun + LEAST_BETWEEN_SECONDS, begun + (now - begun) / MOST_BUSY_RATIO)
                woken = tasks.create_task(self._wake.wait())
                await _first_of({woken, stopping}, due - time.monotonic())
                if woken.done():  # whoever wakes us cannot keep us busy
                    await _first_of({stopping}, min(earliest, due) - time.monotonic())
                woken.cancel()
                self._woken = self._wake.is_set()
                self._wake.clear()

    async def close(self, *, handover: bool = False) -> Report:
        """Stop in order: undo, or leave the grants to a successor."""
        report = Report()
        if self._cards is not None:
            self._cards.close()
        word = ""  # without a word the guardian undoes what could not be undone here
        try:
            await self.writer.settle()
            stuck = self.writer.close()
            if not self.shadow and handover:
                thaw_everything(self.port, self.journal, report)  # nobody may be there to thaw it
            elif not self.shadow:
                report = restore(self.port, self.journal)
            word = "handover" if handover else OCCUPIED if report.waits else "done"
            if stuck and not handover:
                word = ""  # what that worker may still do the guardian undoes, once we are gone
        finally:
            if self._watch is not None:
                self._watch.close()
            if self._long_waits is not None:
                self._long_waits.close()
            if self.guardian is not None:
                self.guardian.dismiss(word)
            await self._workers.settle(SETTLE_SECONDS)
            if self.state is not None:
                self.state.save(MODEL_FILE, to_builtins(self.model))
                self._save_classes()
                if handover:
                    laws = laws_to_builtins(self.laws)
                    self.state.save(HANDOVER_FILE, {"boot_id": self.journal.boot_id, "laws": laws})
            self.registry.close()
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
            self.journal.keep(
                lambda e: (
                    not (e.kind == "made" and e.path in gone and self.port.inode(e.hierarchy, e.path) is None)
                    and not (e.kind == "moved" and start_time(self.port, e.pid) != e.start_time)
                )
            )

    def problems(self) -> dict[str, str]:
        """What an operator should mend, by what it is about."""
        scraped = {f"{name} (latency)": f"{name}: {problem}" for name, problem in self.scraper.problems.items()}
        cards = self._cards.problems() if self._cards is not None else {}
        return {**self.observer.problems, **self.observer.extra_problems, **scraped, **cards}

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
            "lately": msgspec.to_builtins(list(self.lately.notes)),
            "laws": msgspec.to_builtins(self.laws),
            "power_classes": msgspec.to_builtins(known_classes(self.policy.spec.power, self.laws.heard)),
            "calibration": msgspec.to_builtins(self.calibration),
            "problems": self.problems(),
            "shadow": self.shadow,
            "tick_seconds": self.last.seconds,
        }


async def _first_of(tasks: set[asyncio.Task[Any]], seconds: float) -> None:
    """Wait until one of them is done, at most so long."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait(tasks, timeout=max(seconds, 0.0), return_when=asyncio.FIRST_COMPLETED)
