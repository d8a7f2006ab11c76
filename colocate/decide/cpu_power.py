"""What CPU batch may use while the CPUs draw nearly all that they may: `power.cpuBudget`.

A package's own limit (RAPL) would slow services too, so batch alone gives way: by bandwidth, as Thunderbolt does (Li et
al., OSDI 2020). At 99 % of the budget its cores fall to 0.7 of what it uses, above it to its floor, within the tick;
below 90 % they grow every few seconds, by what the draw leaves and by half at most, until they limit nobody. Where the
meter is silent nothing grows, and after a while batch has its floor: a budget that cannot be watched is not kept by
hope.
"""

from __future__ import annotations

import msgspec

from colocate.decide.allowance import ACT, RELEASE
from colocate.decide.caps import LAW
from colocate.plan import Verdict
from colocate.policy.schema import PowerPolicy
from colocate.snapshot import NodeSnapshot

CPUS = "cpus"
"""What the verdict is about."""
LESS, MORE, LEAST_STEP = 0.7, 1.5, 0.05
"""Of what batch uses, where it gives way; and of what it may use, at most, where it grows: never by so much that the
budget would be reached if all that is drawn were batch's."""
GROW_SECONDS = 3.0
CREEP, CREEP_SECONDS = 0.97, 10.0
"""Below so much of the budget batch gets a little more every so often, so that nothing lies idle for ever."""
OVER = 1.0
"""At so much of the budget batch has its floor at once."""
SILENT_SECONDS = 10.0


class CpuPowerState(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """The most that batch may use for the budget's sake."""

    cores: float | None = None
    """None: no limit."""
    changed_seconds: float = 0.0
    heard_seconds: float = 0.0
    """When the meter was read last."""


def ceiling(
    state: CpuPowerState, snapshot: NodeSnapshot, batch_cores: float, policy: PowerPolicy, floor: float
) -> tuple[CpuPowerState, Verdict | None]:
    """The next state, and why; `batch_cores` is what batch uses now."""
    if not policy.cpu_budget:
        return CpuPowerState(), None
    now, watts, node = snapshot.monotonic_seconds, snapshot.cpu_watts, float(len(snapshot.cpus))
    before = state.cores
    heard = now if watts is not None else state.heard_seconds or now
    if watts is None:
        silent = now - heard
        cores = floor if silent >= SILENT_SECONDS else before
        text = f"what the CPUs draw is not known since {silent:.0f} s"
        reason = "MeterSilent"
    else:
        text, share = f"the CPUs draw {watts:.0f} W of {policy.cpu_budget} W", watts / policy.cpu_budget
        if share >= OVER:
            cores, reason = floor, "Lowered"
        elif share >= ACT:
            cores, reason = max(LESS * min(batch_cores, before or node), floor), "Lowered"
        elif before is not None and share < RELEASE and now - state.changed_seconds >= GROW_SECONDS:
            grown = max(before * min(CREEP / share if share > 0.0 else MORE, MORE), before + LEAST_STEP)
            cores, reason = (None if grown >= node else grown), "Growing"
        elif before is not None and share < CREEP and now - state.changed_seconds >= CREEP_SECONDS:
            cores, reason = min(before + LEAST_STEP, node), "Growing"
        else:
            cores = before
            reason = "WithinBudget" if before is None else "Lowered"
    cores = None if cores is None else round(max(cores, floor), 3)
    changed = now if cores != before else state.changed_seconds
    has = "batch has no limit for that" if cores is None else f"batch may use {cores:g} cores"
    numbers = {"budget_watts": float(policy.cpu_budget)}
    numbers |= {} if watts is None else {"watts": round(watts, 1)}
    numbers |= {} if cores is None else {"cores": cores}
    verdict = Verdict(
        law=LAW,
        state="open" if cores is None else "capped",
        reason=reason,
        message=f"{text}: {has}",
        numbers=numbers,
        subject=CPUS,
    )
    return CpuPowerState(cores=cores, changed_seconds=changed, heard_seconds=heard), verdict
