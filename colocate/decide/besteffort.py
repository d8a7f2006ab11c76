"""The CPU law's third part: batch is strictly below kubelet's BestEffort, which no weight gives.

The kernel alone shares 77:23 (v2 idle), 40:60 the wrong way (v1 idle) or 50:50 (equal weights) between BestEffort and
batch. So, while BestEffort waits for CPUs, batch goes to its floor; then the CPUs that stay idle all the same are CPUs
that BestEffort cannot use (it waits for itself, or is pinned elsewhere), and batch may have exactly those. The test is
repeated, ever less often, so that hogs which wait only for each other do not starve batch for ever.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from colocate.config import PolicySpec
from colocate.model.forecast import Forecast
from colocate.snapshot import NodeSnapshot
from colocate.units import parse_cpulist

SETTLE_TICKS = 2
ELSEWHERE_SECONDS = 30.0
MAX_ELSEWHERE_SECONDS = 300.0


class BestEffortState(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """`clear`: no limit; `floor`: it waits; `elsewhere`: on the CPUs it cannot use; `growing`: it waits no more."""

    mode: Literal["clear", "floor", "elsewhere", "growing"] = "clear"
    grant_cores: float | None = None
    cpus: tuple[int, ...] | None = None
    ticks: int = 0
    until: float = 0.0
    seconds: float = 0.0
    reason: str = ""
    message: str = ""


def _can_confine(snapshot: NodeSnapshot) -> bool:
    """Whether all batch work can be kept to chosen CPUs: work governed in place keeps its own cpuset."""
    in_place = any(w.in_place for w in snapshot.of("batch"))
    return snapshot.tier is not None and "cpuset.cpus" in snapshot.tier.knobs and not in_place


def _confined(snapshot: NodeSnapshot, cpus: tuple[int, ...] | None, ticks: int) -> bool:
    """Whether the tier really is where it was sent, one tick later."""
    if ticks <= 1 or cpus is None or snapshot.tier is None:
        return True
    return set(parse_cpulist(snapshot.tier.knobs.get("cpuset.cpus", ""))) <= set(cpus)


def step(state: BestEffortState, snapshot: NodeSnapshot, forecast: Forecast, spec: PolicySpec) -> BestEffortState:
    """The next state. Settles for SETTLE_TICKS at the floor before it concludes anything."""
    now = snapshot.monotonic_seconds
    waiting = forecast.besteffort_waiting_ratio
    waits = waiting > spec.cpu.best_effort_waits / 100
    text = f"BestEffort waits for a CPU {waiting:.1%} of the time"
    floor = BestEffortState(
        mode="floor",
        grant_cores=spec.cpu.floor,
        seconds=state.seconds,
        reason="BestEffortWaits",
        message=f"{text}: batch is below it",
    )
    if state.mode == "clear":
        return floor if waits and forecast.batch_cores > 2 * spec.cpu.floor else state
    ticks = state.ticks + 1
    if state.mode == "floor":
        if not waits:
            return BestEffortState(
                mode="growing", grant_cores=spec.cpu.floor, reason="BestEffortSatisfied", message=f"{text}: batch grows"
            )
        if ticks >= SETTLE_TICKS and forecast.idle_cpus and _can_confine(snapshot):
            seconds = min(max(state.seconds * 2, ELSEWHERE_SECONDS), MAX_ELSEWHERE_SECONDS)
            return BestEffortState(
                mode="elsewhere",
                cpus=forecast.idle_cpus,
                until=now + seconds,
                seconds=seconds,
                reason="BestEffortElsewhere",
                message=f"{text}, but leaves {len(forecast.idle_cpus)} CPU(s) idle: batch may have those",
            )
        return msgspec.structs.replace(floor, ticks=ticks)
    if state.mode == "elsewhere":
        if not waits:
            return BestEffortState()
        if now >= state.until or not _confined(snapshot, state.cpus, ticks):
            return floor
        return msgspec.structs.replace(state, ticks=ticks)
    if waits:
        return floor
    grant = round((state.grant_cores or 0.0) + forecast.node_cores * spec.cpu.growth / 100, 4)
    if grant >= forecast.node_cores:
        return BestEffortState()
    return msgspec.structs.replace(state, grant_cores=grant, ticks=ticks, message=f"{text}: batch grows")
