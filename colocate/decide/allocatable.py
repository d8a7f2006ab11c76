"""What batch pods are promised of this node: `kubernetes.io/batch-cpu` and `kubernetes.io/batch-memory`.

node - reserve - what all others will need while a batch pod runs. It shrinks in the tick in which more is needed, and
grows by a part of the node in five minutes: a scheduler that believed too much has placed a pod by then. Values are on
a grid, so that a node whose load only breathes writes nothing. It asks for no knob: the shell publishes its verdict.
designs/0007-batch-resources.md.
"""

from __future__ import annotations

import math

import msgspec

from colocate.decide.law import Decision, View
from colocate.decide.reference.koordlet import CPU_RECLAIM_PERCENT, MEMORY_RECLAIM_PERCENT
from colocate.model.needs import SLOT_SECONDS
from colocate.plan import Verdict
from colocate.units import format_bytes, format_duration

LAW = "allocatable"
GRAIN_RATIO = 0.01
"""Of the node: what is promised is a multiple of it."""
GROW_AGAIN_SECONDS = 60.0
LEARNING_MARGIN = 1.1
SETTLE_SECONDS = 10.0
"""A node that nothing has been learnt of is looked at for so long before anything is promised."""


class AllocatableState(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What is promised now."""

    cores: float = 0.0
    size: float = 0.0
    """Bytes."""
    seen_seconds: float | None = None
    """Since when the need is known, monotonic."""
    grown_seconds: float | None = None
    """When it grew last, monotonic; None before the first time, when it may grow at once."""


def promise(left: float, promised: float, grain: float, step: float, may_grow: bool) -> float:
    """The core: what is promised of what is `left`, in whole grains; never more than that, and never negative."""
    target = max(math.floor(left / grain + 1e-9) * grain, 0.0)
    if target <= promised:
        return target
    if not may_grow or target - promised < 2 * grain:
        return promised
    return min(target, promised + max(step, grain))


def decide_allocatable(view: View, state: AllocatableState) -> Decision:
    """The law for one tick."""
    snapshot, forecast, spec = view.snapshot, view.forecast, view.spec
    promised, stale = spec.batch_resources, view.stale("node", "workloads", "tier")
    if stale >= spec.staleness.open_after or forecast.needs_cores is None or forecast.needs_bytes is None:
        if stale < spec.staleness.open_after:
            return Decision(state, [], _verdict(state, "Unknown", "what the node's services use is not known yet"))
        nothing = AllocatableState(seen_seconds=view.now, grown_seconds=view.now)
        text = f"readings are {stale:.0f} s old: nothing is promised"
        return Decision(nothing, [], _verdict(nothing, "StaleReadings", text))
    cores, size, text = _demand(view)
    node, memory = forecast.node_cores, float(snapshot.memory_bytes)
    margins = spec.cpu.reserve, spec.memory.reserve
    if promised.law == "koordinator":
        margins = 100.0 - CPU_RECLAIM_PERCENT, 100.0 - MEMORY_RECLAIM_PERCENT
    reserve, reserve_bytes = node * margins[0] / 100, memory * margins[1] / 100
    shared = node - len(snapshot.reserved_cpus)
    seen = view.now if state.seen_seconds is None else state.seen_seconds
    if state.grown_seconds is None:
        due, share = forecast.coming_cores is not None or view.now - seen >= SETTLE_SECONDS, 1.0
    else:
        due = view.now - state.grown_seconds >= GROW_AGAIN_SECONDS
        share = promised.growth / 100 * (GROW_AGAIN_SECONDS / SLOT_SECONDS)
    left, left_bytes = min(node - reserve - cores, shared), memory - reserve_bytes - size
    following = AllocatableState(
        cores=round(promise(left, state.cores, GRAIN_RATIO * node, share * node, due), 6),
        size=promise(left_bytes, state.size, GRAIN_RATIO * memory, share * memory, due),
        seen_seconds=seen,
        grown_seconds=state.grown_seconds,
    )
    if following.cores > state.cores or following.size > state.size:
        following = msgspec.structs.replace(following, grown_seconds=view.now)
    message = (
        f"{following.cores:.2f} of {node:.2f} cores and {format_bytes(int(following.size))} of "
        f"{format_bytes(int(memory))}: node - reserve {reserve:.2f}, {format_bytes(int(reserve_bytes))} - "
        f"{cores:.2f}, {format_bytes(int(size))} that all others {text}"
    )
    numbers = {"needs_cores": forecast.needs_cores, "coming_cores": round(cores, 4), "coming_bytes": size}
    return Decision(
        following,
        [],
        _verdict(following, "Learning" if forecast.coming_cores is None else "Promised", message, numbers),
    )


def _demand(view: View) -> tuple[float, float, str]:
    """Cores and bytes that are kept for all but batch, and why, in words."""
    snapshot, forecast, promised = view.snapshot, view.forecast, view.spec.batch_resources
    asked = [w for w in snapshot.of("service") if w.asked_cores is not None]
    cores, size = forecast.needs_cores or 0.0, float(forecast.needs_bytes or 0)
    if promised.law == "koordinator":
        asked = [w for w in asked if forecast.workloads[w.id].usage_cores is None]
        text = "use now (Koordinator's law)"
    elif forecast.coming_cores is not None and forecast.coming_bytes is not None:
        asked = [w for w in asked if view.now - w.started_seconds < promised.runtime]
        cores, size = max(cores, forecast.coming_cores), max(size, float(forecast.coming_bytes))
        text = f"may need within {format_duration(promised.runtime)} at a risk of {promised.risk:g} %"
    else:
        cores, size = LEARNING_MARGIN * cores, LEARNING_MARGIN * size
        text = "ask for, or use (what they will need is being learnt)"
    cores += sum(_unseen(w.asked_cores, forecast.workloads[w.id].usage_cores) for w in asked)
    size += sum(_unseen(w.asked_bytes, w.working_set_bytes) for w in asked)
    return cores, size, text


def _unseen(asked: float | None, used: float | None) -> float:
    """What a workload has asked for and nobody has seen it use."""
    return max((asked or 0) - (used or 0), 0.0)


def _verdict(state: AllocatableState, reason: str, message: str, numbers: dict[str, float] | None = None) -> Verdict:
    figures = {"batch_cpu_milli": float(int(state.cores * 1000)), "batch_memory_bytes": float(int(state.size))}
    word = "promised" if state.cores or state.size else "nothing"
    return Verdict(law=LAW, state=word, reason=reason, message=message, numbers=figures | (numbers or {}))
