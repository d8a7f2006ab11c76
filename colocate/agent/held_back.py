"""Which batch pods get less than they could use, and for what: said once it has lasted, and until it is over for good.

What is told tick by tick is the journal's and `colocate explain`'s; this is for who owns the pod, and has no right on
the node. designs/0007-batch-resources.md.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import msgspec

from colocate.cluster.api import CARD_SHARED, FROZEN, MOST_HELD_BACK, NARROWED, WAITS, WITH_GANG, PodHeldBack
from colocate.decide import freeze, gpu
from colocate.decide.pipeline import LawState
from colocate.model.forecast import Forecast
from colocate.plan import Plan
from colocate.snapshot import NodeSnapshot, Workload
from colocate.units import time_text

LASTING_SECONDS = 5.0
"""What is over sooner is not told, nor what it changes to for less."""
OVER_SECONDS = 30.0
"""What begins again sooner was not over."""
KEPT_SECONDS = 300.0
"""That it is over is told for so long: by then the cluster's side has heard of it."""
MEAN_SECONDS = 30.0
"""Of the share of the time that a pod waits for a CPU."""
WAITS_FROM, WAITS_UNTIL = 0.5, 0.3
"""Of that mean: waiting half of the time is half the speed."""
GANG_WAITS_SECONDS = 2.0
"""A member that is frozen for less the others wait for."""
GANG_HELD = "GangHeld"
MESSAGE_CHARACTERS = 256


class _Cause(NamedTuple):
    reason: str
    message: str


class _Held(msgspec.Struct):
    """One pod. Times are monotonic seconds, but for `wall`."""

    cause: str
    """What holds it back now, told or not yet; ..."""
    message: str
    began: float
    """... since when, ..."""
    wall: float
    last: float
    """... and until when."""
    told: PodHeldBack | None = None


class HeldBack:
    """Of one node, from tick to tick."""

    def __init__(self) -> None:
        self._held: dict[str, _Held] = {}
        self._waits: dict[str, float] = {}
        self._why_frozen: dict[str, str] = {}
        self._told: set[str] = set()
        self._at: float | None = None

    def look(self, snapshot: NodeSnapshot, forecast: Forecast, plan: Plan, laws: LawState) -> list[PodHeldBack]:
        """The pods to tell of after a tick, by uid; where there are too many, those that are held back come first,
        the frozen ones before all, and who has been told of stays.
        """
        now = snapshot.monotonic_seconds
        pods = {w.id: w for w in snapshot.of("batch") if w.pod}
        self._average(pods, forecast, now)
        for action in plan.actions:
            if action.knob == "cgroup.freeze" and action.value == "1":
                self._why_frozen[action.workload] = f"{action.reason}: {action.message}"
        self._why_frozen = {id_: why for id_, why in self._why_frozen.items() if id_ in laws.freeze.since}
        narrowed = next((v for v in plan.verdicts if v.law == "cpu"), None) if laws.cpu.narrows else None
        for id_, workload in pods.items():
            cause, waits = None, self._waits.get(id_)
            if workload.frozen and id_ in laws.freeze.since:
                why = self._why_frozen.get(id_, freeze.LAW)
                cause = _Cause(WITH_GANG if why.startswith(GANG_HELD) else FROZEN, why)
            elif id_ in plan.pulses:
                cause = _Cause(CARD_SHARED, _of_cards(plan, id_))
            elif narrowed is not None and (waits is None or waits >= WAITS_UNTIL):
                cause = _Cause(NARROWED, f"{narrowed.reason}: {narrowed.message}")
            elif waits is not None and waits >= (WAITS_UNTIL if self._is(id_, WAITS) else WAITS_FROM):
                cause = _Cause(WAITS, f"it waited for a CPU {waits:.0%} of the last half minute: services come first")
            self._note(workload, cause, now, snapshot.time_seconds)
        self._held = {id_: h for id_, h in self._held.items() if id_ in pods and now - h.last < _kept(h)}
        pods_told = [h.told for h in self._held.values() if h.told is not None]
        pods_told.sort(key=lambda p: (not p.reason, p.reason != FROZEN, p.uid not in self._told, p.uid))
        found = sorted(pods_told[:MOST_HELD_BACK], key=lambda pod: pod.uid)
        self._told = {pod.uid for pod in found}
        return found

    def frozen_gangs(self, snapshot: NodeSnapshot, laws: LawState) -> dict[str, str]:
        """Gang -> why a member of it has been frozen for a while, for what happens on this node."""
        found = {}
        for job in snapshot.of("batch"):
            since = laws.freeze.since.get(job.id)
            lasts = since is not None and snapshot.monotonic_seconds - since >= GANG_WAITS_SECONDS
            if job.pod and job.gang and job.frozen and lasts and job.id not in laws.gangs.since:
                found[job.gang.removeprefix("pods/")] = f"{job.name} is frozen: {self._why_frozen.get(job.id, '')}"
        return found

    def _average(self, pods: dict[str, Workload], forecast: Forecast, now: float) -> None:
        """An exponential mean of what each waited; none where the kernel does not tell (cgroup v1)."""
        passed = now - self._at if self._at is not None else 0.0
        self._at, kept, found = now, math.exp(-max(passed, 0.0) / MEAN_SECONDS), {}
        for id_ in pods:
            seen = forecast.workloads.get(id_)
            ratio = seen.cpu_pressure_ratio if seen is not None else None
            before = self._waits.get(id_)
            if ratio is not None:
                found[id_] = kept * (before or 0.0) + (1.0 - kept) * ratio
            elif before is not None:
                found[id_] = before
        self._waits = found

    def _is(self, id_: str, reason: str) -> bool:
        return id_ in self._held and self._held[id_].cause == reason

    def _note(self, workload: Workload, cause: _Cause | None, now: float, wall: float) -> None:
        held = self._held.get(workload.id)
        if cause is None:
            if held is not None and held.cause and now - held.last >= (OVER_SECONDS if held.told else 0.0):
                held.cause, held.last = "", now
                if held.told is not None:
                    held.told = msgspec.structs.replace(held.told, reason="", message="", since=time_text(wall))
            return
        if held is None:
            held = self._held[workload.id] = _Held(cause.reason, cause.message, began=now, wall=wall, last=now)
        elif held.cause != cause.reason:
            held.cause, held.message, held.began, held.wall = cause.reason, cause.message, now, wall
        held.last = now
        told = held.told.reason if held.told is not None else ""
        if held.cause != told and now - held.began >= LASTING_SECONDS:
            (namespace, _, name), uid = workload.pod.partition("/"), workload.id.removeprefix("pod:")
            held.told = PodHeldBack(
                namespace=namespace,
                name=name,
                uid=uid,
                reason=held.cause,
                message=held.message[:MESSAGE_CHARACTERS],
                since=time_text(held.wall),
            )


def _of_cards(plan: Plan, id_: str) -> str:
    """What the law says of the cards on which a workload is stopped and let go."""
    cards = {pulse.card for pulse in plan.pulses[id_]}
    return "; ".join(f"{v.reason}: {v.message}" for v in plan.verdicts if v.law == gpu.LAW and v.subject in cards)


def _kept(held: _Held) -> float:
    """For how long after its last cause a pod is still known."""
    return KEPT_SECONDS if held.told is not None else LASTING_SECONDS
