"""The cards of a node as the agent has them: read beside the tick, and batch on them stopped and let go by the hand.

Imported only where there may be cards.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import msgspec
import structlog

from colocate.actuate import mps
from colocate.actuate.caps import Caps
from colocate.actuate.gates import FreezeGate, Gate, LockGate, SuspendGate
from colocate.actuate.hand import KEPT_DRAINS, Grant, Hand, Probe
from colocate.actuate.holds import Holds
from colocate.actuate.preemption import Preemption
from colocate.actuate.writer import ENDS, Care
from colocate.cgroup.port import FilePort
from colocate.cgroup.tree import Tree
from colocate.observe.busy import LOOK_SECONDS, Busy, watched
from colocate.observe.busy import Verdict as Sense
from colocate.observe.card_energy import MOST_STEP_SECONDS, CardEnergy, CardReading, Ran
from colocate.observe.containers import consumer_of
from colocate.observe.nvml import Cards, NvmlSilent, Worker
from colocate.observe.workloads import Target
from colocate.plan import Plan, Pulse
from colocate.policy.schema import PolicySpec
from colocate.snapshot import Card, CardUser, NodeSnapshot, Workload

log = structlog.get_logger()
LATE_SECONDS, LONG_BEFORE_SECONDS = 0.005, 0.02
"""A mark that was set so much later than the stop has missed some of it; so long before, and what ran until the stop is
not known well enough."""
WINDOW_SECONDS = 0.105
"""GPM says nothing of less than a tenth of a second."""
MOST_DRAIN_SECONDS = 3.0
SAMPLE_SECONDS = 0.2
"""Between NVML's samples of what a process ran (measured: benchmarks/gpu)."""
NOTHING_SECONDS = 0.0005
"""Less than this in a window is the counters' own noise."""
LEASE_SECONDS, LEASE_TICKS = 2.0, 2.0
LEND_TICKS = 5
STEP_TICKS = 2.5
END_SECONDS = 5.0
"""For so long a client of MPS may take to be ended before its processes are."""
SWITCH_SECONDS = 0.0005


class NodeCards:
    """What joins readings, sensors and the hand."""

    def __init__(self, port: FilePort, cards: Cards, holds: Holds, caps: Caps, tree: Callable[[], Tree]) -> None:
        sys.setswitchinterval(SWITCH_SECONDS)  # the hand takes the interpreter from a tick after each of its calls
        self.cards, self.holds, self.caps = cards, holds, caps
        self.energy = CardEnergy()
        self.allotted: dict[str, tuple[str, ...]] = {}
        """Of each workload that was given cards before it started, their UUIDs or indices."""
        self.busy = Busy(port)
        self.hand = Hand(self.busy, self._measure)
        self._port, self._tree = port, tree
        self._preemption = Preemption()
        self._uncounted: frozenset[str] = frozenset()
        """Cards without counters by which a drain is seen."""
        self._ended: dict[str, threading.Event] = {}
        """Of who leaves and was a client of MPS: whether it is none any more."""
        self._mps_problem = ""
        self._drains: dict[tuple[str, str], tuple[tuple[float, float], ...]] = {}
        """Also of a time in which a job is not in the hand."""
        self._waited: dict[str, int] = {}
        """For how many ticks a workload's freezer has not been lent."""
        self._unlent: set[str] = set()

    def collect(self, targets: Iterable[Target]) -> dict[str, Card]:
        """The cards, with what the hand and the sensors know of who is on them; the next reading is asked for."""
        self.cards.read()
        found = self.cards.collect(targets)
        self._uncounted = frozenset(uuid for uuid, card in found.items() if not card.counted)
        for key, drains in self.hand.drains().items():
            known = self._drains.get(key, ())
            newer = [d for d in drains if not known or d[0] > known[-1][0]]
            self._drains[key] = (*known, *newer)[-KEPT_DRAINS:]
        on = {(id_, card.uuid) for card in found.values() for id_ in card.users}
        self._drains = {key: d for key, d in self._drains.items() if key in on}
        verdicts, reaction = self.busy.verdicts(), self.hand.reaction_seconds
        for uuid, card in found.items():
            users = {id_: self._user(id_, uuid, user, verdicts) for id_, user in card.users.items()}
            names, given = {uuid, str(card.index)}, dict(self.allotted)
            slowest = self.busy.slowest_seconds(card.users)  # looks are at CPU counters; what gauges tell may be older
            reacts = round(reaction + slowest - LOOK_SECONDS, 6) if reaction is not None else None
            held = msgspec.structs.replace(
                card,
                struck=self.holds.struck,
                suspended=self.holds.suspended(uuid),
                allotted=tuple(sorted(i for i, cards in given.items() if names & {*cards})),
            )
            found[uuid] = msgspec.structs.replace(held, users=users, reaction_seconds=reacts)
        return found

    def attribute(self, snapshot: NodeSnapshot) -> None:
        """Count whose energy it was that the cards drew."""
        readings, tree = [], self._tree()
        for uuid, card in snapshot.cards.items():
            ran = [Ran(consumer_of(path, tree), percent) for path, percent in self.cards.ran.get(uuid, ())]
            readings.append(CardReading(uuid, card.at_seconds, card.watts, card.mig, ran))
        self.energy.add(snapshot.monotonic_seconds, readings)

    def _user(self, id_: str, uuid: str, user: CardUser, verdicts: Mapping[str, Sense]) -> CardUser:
        found = verdicts.get(id_)
        user = msgspec.structs.replace(user, drains=self._drains.get((id_, uuid), ()))
        if found is None:
            return user
        busy = round(found.busy_ratio, 4) if found.busy_ratio is not None else None
        sensing = not found.known
        return msgspec.structs.replace(
            user, sensor=found.sensor, sensor_problem=found.problem, sensing=sensing, busy_ratio=busy
        )

    def act(self, plan: Plan, snapshot: NodeSnapshot, spec: PolicySpec, lent: set[str]) -> None:
        """Look at whom the plan goes by, and hand over what it grants; whatever goes wrong there ends no agent."""
        try:
            if spec.power.attribution:
                self.energy.most_step_seconds = max(MOST_STEP_SECONDS, STEP_TICKS * spec.tick)
                self.attribute(snapshot)
            self.watch(snapshot, spec)
            self.grant(plan, snapshot, lent, spec.tick)
            self.holds.act(plan, snapshot, self.cards.pids)
            self.caps.act(plan, snapshot)
            kept = {p for i in plan.pulses for p in self.cards.pids.get(i, ())}
            for pid in self._preemption.held() - kept:
                self._preemption.want(pid, "released")
        except Exception:
            log.exception("cards_failed", effect="batch on cards is let go")
            self.hand.grant({})

    def watch(self, snapshot: NodeSnapshot, spec: PolicySpec) -> None:
        """Look at the services that share a card with batch."""
        objectives = {s.name: s.slo for s in spec.services if s.slo is not None}
        shared = {}
        for id_ in snapshot.beside_batch_on_cards:
            workload = snapshot.workloads[id_]
            if workload.tier == "service":
                slo = objectives.get(self.cards.entries.get(id_, workload.name))
                shared[id_] = watched(workload, *((slo.url, slo.gauges) if slo is not None else ("", ())))
        self.busy.watch(shared)
        self.hand.looks_always = bool(shared)

    def grant(self, plan: Plan, snapshot: NodeSnapshot, lent: set[str], tick_seconds: float) -> None:
        """Hand over what the plan grants of what was lent, until the next ticks."""
        until = time.monotonic() + max(LEASE_SECONDS, LEASE_TICKS * tick_seconds)
        grants, waited = {}, dict[str, int]()
        for id_, pulses in plan.pulses.items():
            workload = snapshot.workloads.get(id_)
            if workload is not None and id_ not in lent:
                waited[id_] = self._waited.get(id_, 0) + 1
            elif workload is not None:
                grants[id_] = Grant(self._gate(workload, pulses), pulses, until)
        self._waited, self._unlent = waited, {i for i, ticks in waited.items() if ticks > LEND_TICKS}
        stay = {a.workload for a in plan.actions if a.knob == "cgroup.freeze" and a.value == "1"}
        self.hand.grant(grants, frozenset(stay))

    def _gate(self, workload: Workload, pulses: tuple[Pulse, ...]) -> Gate:
        processes = self.cards.pids.get(workload.id, {})
        if processes and all(p.by == "lock" for p in pulses) and self.holds.may_hold(workload.path, processes):
            return LockGate(self.holds.driver, workload.path, dict(processes))
        if processes and all(p.by == "suspend" for p in pulses) and all(map(self._preemption.may, processes)):
            return SuspendGate(self._preemption, workload.path, tuple(processes))
        return FreezeGate(self._port, workload.path, dict(workload.inodes))

    def care(self, plan: Plan, snapshot: NodeSnapshot, leaving: Iterable[str]) -> Care:
        """What is to be heeded when this plan is written: a client of MPS that leaves is ended there first."""
        ends = {a.workload for a in plan.actions if a.knob in ENDS} | set(leaving)
        clients = {i for i in ends if any(card.mps and i in card.users for card in snapshot.cards.values())}
        for id_ in clients - set(self._ended):
            self._ended[id_] = threading.Event()
            threading.Thread(target=self._end_clients, args=(id_,), name="mps", daemon=True).start()
        self._ended = {i: done for i, done in self._ended.items() if i in ends}
        before = {i: partial(self._ended[i].wait, END_SECONDS) for i in self._ended}
        return Care(self.holds.waiting(plan, self.cards.pids), before)

    def _end_clients(self, id_: str) -> None:
        self._mps_problem = mps.end_clients(list(self.cards.pids.get(id_, ())))
        if self._mps_problem:
            log.warning("mps_client_not_ended", workload=id_, why=self._mps_problem, effect="others may fault with it")
        self._ended[id_].set()

    def may_be_ended(self, id_: str) -> bool:
        """Whether it is no client of MPS any more."""
        done = self._ended.get(id_)
        return done is None or done.is_set()

    def problems(self) -> dict[str, str]:
        """What an operator should mend."""
        found = {f"gpu {i}": f"{i} cannot be stopped: {why}" for i, why in self.hand.problems().items()}
        found |= {
            f"gpu {i}": f"{i} is not stopped: its freezer could not be put into the journal" for i in self._unlent
        }
        found |= self.holds.problems()
        found |= self.caps.problems()
        found |= {f"gpu amd {p}": f"its queues are not suspended: {why}" for p, why in self._preemption.refused.items()}
        if self._mps_problem:
            found["gpu mps"] = f"batch cannot be ended without a fault of its neighbours: {self._mps_problem}"
        if self.cards.problem:
            found["gpu"] = f"the cards cannot be read: {self.cards.problem}"
        return found

    def _measure(self, probe: Probe) -> None:
        """Beside everything else; probes are seldom."""
        if probe.card in self._uncounted:
            probe.finish(None)
            return
        threading.Thread(target=self._look_at, args=(self.cards.worker, probe), name="probe", daemon=True).start()

    def _look_at(self, worker: Worker, probe: Probe) -> None:
        """For how long the card was busy after its jobs were stopped: windows of its counters until one is quiet.

        Where a service comes in between, what the jobs' own processes ran from then on is a lower bound.
        """
        drain: float | None = None
        try:
            marked, wall = worker.ask(ask="mark", uuid=probe.card)["at"], time.time()
            probe.marked.set()
            busy = 0.0
            while not probe.spoiled:
                time.sleep(WINDOW_SECONDS)
                seen = worker.ask(ask="since", uuid=probe.card)
                window = seen["percent"] / 100.0 * seen["seconds"]
                busy += window
                if window < 0.95 * seen["seconds"] or busy > MOST_DRAIN_SECONDS:
                    break
            # Until a request of the last moment would be seen.
            time.sleep(self.busy.slowest_seconds(probe.services) + LATE_SECONDS)
            if probe.stopped_at is None:
                return
            before = probe.stopped_at - marked  # it ran until then; negative: nobody looked until the mark
            if not -LATE_SECONDS <= before <= LONG_BEFORE_SECONDS or (
                not probe.services and self._others_ran(worker, probe, wall + before)
            ):
                drain = None
            elif probe.spoiled:
                drain = self._ran_since(worker, probe, wall + before) if probe.thorough else None
            elif busy <= NOTHING_SECONDS and not self._worked(worker, probe):
                drain = None  # it had not begun: that it ends at once says nothing
            else:
                drain = max(busy - before, 0.0)
        except NvmlSilent as error:
            log.warning("drain_not_seen", card=probe.card, why=str(error))
        finally:
            probe.finish(drain)

    def _pids(self, probe: Probe) -> list[int]:
        return [pid for job in probe.jobs for pid in self.cards.pids.get(job, ())]

    def _worked(self, worker: Worker, probe: Probe) -> bool:
        """Whether anything of these jobs ran on the card in the last second."""
        pids = self._pids(probe)
        cards = worker.ask(ask="read")["cards"]
        return any(c["uuid"] == probe.card and any(p[0] in pids and p[3] for p in c["processes"]) for c in cards)

    def _others_ran(self, worker: Worker, probe: Probe, stopped: float) -> bool:
        """Whether anybody else ran on the card after the stop, as is known half a second later."""
        time.sleep(2.5 * SAMPLE_SECONDS)
        mine = self._pids(probe)
        samples = worker.ask(ask="samples", uuid=probe.card, pids=[], since=stopped)["samples"]
        return any(pid not in mine and percent for pid, _, percent in samples)

    def _ran_since(self, worker: Worker, probe: Probe, stopped: float) -> float | None:
        """At least so long their kernels ran after a time (wall clock), by NVML's samples; None if it says nothing."""
        pids, samples = self._pids(probe), {}
        deadline = time.monotonic() + MOST_DRAIN_SECONDS
        newest = stopped
        while time.time() < newest + 2.5 * SAMPLE_SECONDS and time.monotonic() < deadline:
            time.sleep(SAMPLE_SECONDS / 2)
            for pid, at, percent in worker.ask(ask="samples", uuid=probe.card, pids=pids, since=stopped)["samples"]:
                samples[pid, at] = percent / 100.0 * SAMPLE_SECONDS
                newest = max(newest, at)
        least = sum(samples.values()) - SAMPLE_SECONDS  # the first of them began before the stop
        return least if least > 0.0 else None

    def close(self) -> None:
        """Let everything go, and end the worker."""
        self.hand.close()
        self.caps.close()
        self.holds.close()
        self._preemption.close()
        self.busy.close()
        self.cards.close()
