"""Which batch pods get less than they could use, and for what: said once it has lasted, and until it is over for good.

What is told tick by tick is the journal's and `colocate explain`'s; this is for who owns the pod, and has no right on
the node. designs/0007-batch-resources.md.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import msgspec

from colocate.cluster.api import PodHeldBack
from colocate.decide import freeze
from colocate.decide.pipeline import LawState
from colocate.model.forecast import Forecast
from colocate.plan import Plan
from colocate.snapshot import NodeSnapshot, Workload
from colocate.units import time_text

FROZEN, NARROWED, WAITS = "Frozen", "Narrowed", "Waits"
LASTING_SECONDS = 5.0
"""What is over sooner is not told."""
OVER_SECONDS = 30.0
"""What begins again sooner was not over."""
KEPT_SECONDS = 300.0
"""That it is over is told for so long: by then the cluster's side has heard of it."""
MEAN_SECONDS = 30.0
"""Of the share of the time that a pod waits for a CPU."""
WAITS_FROM, WAITS_UNTIL = 0.5, 0.3
"""Of that mean: waiting half of the time is half the speed."""
MOST = 64


class _Held(msgspec.Struct):
    """One pod. Times are monotonic seconds, but for `since`."""

    pod: PodHeldBack
    began: float
    last: float
    said: bool = False


class _Cause(NamedTuple):
    reason: str
    message: str


class HeldBack:
    """Of one node, from tick to tick."""

    def __init__(self) -> None:
        self._held: dict[str, _Held] = {}
        self._waits: dict[str, float] = {}
        self._why_frozen: dict[str, str] = {}
        self._at: float | None = None

    def look(self, snapshot: NodeSnapshot, forecast: Forecast, plan: Plan, laws: LawState) -> list[PodHeldBack]:
        """The pods to tell of after a tick, by uid; at most `MOST`, those first that are held back now."""
        now = snapshot.monotonic_seconds
        pods = {w.id: w for w in snapshot.of("batch") if w.pod}
        self._average(pods, forecast, now)
        for action in plan.actions:
            if action.knob == "cgroup.freeze" and action.value == "1":
                self._why_frozen[action.workload] = f"{action.reason}: {action.message}"
        self._why_frozen = {id_: why for id_, why in self._why_frozen.items() if id_ in laws.freeze.since}
        narrowed = next((v for v in plan.verdicts if v.law == "cpu"), None) if laws.cpu.narrows else None
        for id_, workload in pods.items():
            cause = None
            waits = self._waits.get(id_)
            if id_ in laws.freeze.since:
                cause = _Cause(FROZEN, self._why_frozen.get(id_, freeze.LAW))
            elif narrowed is not None and (waits is None or waits >= WAITS_UNTIL):
                cause = _Cause(NARROWED, f"{narrowed.reason}: {narrowed.message}")
            elif waits is not None and waits >= (WAITS_UNTIL if self._is(id_, WAITS) else WAITS_FROM):
                cause = _Cause(WAITS, f"it waited for a CPU {waits:.0%} of the last half minute: services come first")
            self._note(workload, cause, now, snapshot.time_seconds)
        self._held = {
            id_: held
            for id_, held in self._held.items()
            if id_ in pods and now - held.last < (KEPT_SECONDS if held.said else LASTING_SECONDS)
        }
        told = sorted((h for h in self._held.values() if h.said), key=lambda h: (not h.pod.reason, -h.last, h.pod.uid))
        return sorted((h.pod for h in told[:MOST]), key=lambda pod: pod.uid)

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
        return id_ in self._held and self._held[id_].pod.reason == reason

    def _note(self, workload: Workload, cause: _Cause | None, now: float, wall: float) -> None:
        held = self._held.get(workload.id)
        if cause is None:
            if held is not None and held.pod.reason and now - held.last >= OVER_SECONDS:
                over = msgspec.structs.replace(held.pod, reason="", message="", since=time_text(wall))
                held.pod, held.last = over, now
            return
        if held is None or held.pod.reason != cause.reason:
            (namespace, _, name), uid = workload.pod.partition("/"), workload.id.removeprefix("pod:")
            pod = PodHeldBack(namespace=namespace, name=name, uid=uid, reason=cause.reason, message=cause.message)
            pod = msgspec.structs.replace(pod, since=time_text(wall))
            if held is None:
                held = self._held[workload.id] = _Held(pod, began=now, last=now)
            held.pod = pod
        held.last = now
        held.said = held.said or now - held.began >= LASTING_SECONDS
