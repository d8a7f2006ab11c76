"""The memory law: batch has what the services will not need, and gives it back by a ladder while they stall.

Owns memory.high, memory.max and memory.reclaim of the tier, and the checkpoint signal. v2 rungs: high -> reclaim ->
checkpoint signal (high lifted until its deadline) -> freeze request (skipped without swap: it frees nothing) -> evict
request. v1 has no memory.high; its limit kills inside the group when reached, so it is never set below usage plus
headroom and the ladder is reclaim -> checkpoint -> evict. Page cache is not pressure: the evidence is the services'
stall time and the memory that is left without cache. designs/0002-memory.md.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from colocate.config import PolicySpec
from colocate.model.forecast import Forecast
from colocate.plan import Action, Rejected, Request, Verdict
from colocate.snapshot import NodeSnapshot, Workload
from colocate.units import format_bytes

LAW = "memory"
LEAST_BYTES = 64 << 20
V1_HEADROOM_BYTES = 64 << 20
GRAIN_BYTES = 1 << 20
HYSTERESIS_RATIO = 0.02
CRITICAL_RATIO = 0.01
RUNGS_V2 = ("high", "reclaim", "checkpoint", "freeze", "evict")
RUNGS_V1 = ("limit", "reclaim", "checkpoint", "evict")


class MemoryState(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What the law remembers. Times are monotonic seconds."""

    rung: int = -1
    """Index into the rungs; -1 is calm."""
    since: float = 0.0
    pressed: float = 0.0
    """When pressure was last seen."""
    allowance_bytes: int = 0
    signalled: dict[str, float] = {}
    """Jobs that were sent their checkpoint signal in this episode, with the deadline."""


class Decision(NamedTuple):
    """What the law wants this tick."""

    state: MemoryState
    actions: list[Action]
    verdict: Verdict
    rejected: list[Rejected]
    requests: list[Request]


def allowance_bytes(snapshot: NodeSnapshot, forecast: Forecast, spec: PolicySpec) -> int:
    """node - services' forecast working set - everybody else's use - reserve, in MiB; never below 64 MiB.

    Everybody else is what is neither available nor a service's nor batch's.
    """
    reserve = int(snapshot.memory_bytes * spec.memory.reserve / 100)
    services = sum(w.working_set_bytes or 0 for w in snapshot.of("service"))
    batch = batch_bytes(snapshot)
    others = 0
    if snapshot.memory_available_bytes is not None:
        others = max(snapshot.memory_bytes - snapshot.memory_available_bytes - services - batch, 0)
    left = snapshot.memory_bytes - forecast.services_peak_bytes - others - reserve
    return max(left // GRAIN_BYTES * GRAIN_BYTES, LEAST_BYTES)


def batch_bytes(snapshot: NodeSnapshot) -> int:
    """The working set of all batch work."""
    if snapshot.tier is not None and snapshot.tier.working_set_bytes is not None:
        in_place = sum(w.working_set_bytes or 0 for w in snapshot.of("batch") if w.in_place)
        return snapshot.tier.working_set_bytes + in_place
    return sum(w.working_set_bytes or 0 for w in snapshot.of("batch"))


def pressure(snapshot: NodeSnapshot, forecast: Forecast, spec: PolicySpec) -> str:
    """Who stalls, in words; empty if nobody does."""
    for workload in snapshot.of("service"):
        ratio = forecast.workloads[workload.id].memory_pressure_ratio
        if ratio is not None and ratio > spec.memory.pressure / 100:
            return f"{workload.name} stalls on memory {ratio:.1%} of the time (over {spec.memory.pressure:g} %)"
    left = snapshot.memory_available_bytes
    if left is not None and left < CRITICAL_RATIO * snapshot.memory_bytes:
        return f"only {format_bytes(left)} of the node's memory are left"
    return ""


def _advance(
    state: MemoryState, stalls: bool, rungs: tuple[str, ...], snapshot: NodeSnapshot, spec: PolicySpec
) -> MemoryState:
    now, replace = snapshot.monotonic_seconds, msgspec.structs.replace
    if not stalls:
        if state.rung >= 0 and now - state.pressed >= spec.memory.calm:
            # Down to the first rung, then calm: the rungs between are acts, not limits to be held.
            calmer = replace(state, rung=0, since=now, pressed=now)
            return calmer if state.rung > 0 else MemoryState(allowance_bytes=state.allowance_bytes)
        return state
    state = replace(state, pressed=now)
    if state.rung < 0:
        return replace(state, rung=0, since=now)
    waiting = rungs[state.rung] == "checkpoint" and any(now < d for d in state.signalled.values())
    if now - state.since < spec.memory.rung or waiting or state.rung + 1 >= len(rungs):
        return state
    following = state.rung + 1
    if rungs[following] == "checkpoint" and not any(w.checkpoint_signal for w in snapshot.of("batch")):
        following += 1
    if rungs[following] == "freeze" and snapshot.swap_free_bytes == 0:
        following += 1
    return replace(state, rung=following, since=now)


def decide_memory(snapshot: NodeSnapshot, forecast: Forecast, spec: PolicySpec, state: MemoryState) -> Decision:
    """The memory law for one tick."""
    v2 = "memory.high" in snapshot.capabilities
    rungs = RUNGS_V2 if v2 else RUNGS_V1
    used = batch_bytes(snapshot)
    allowed = allowance_bytes(snapshot, forecast, spec)
    if state.allowance_bytes and abs(allowed - state.allowance_bytes) <= HYSTERESIS_RATIO * state.allowance_bytes:
        allowed = state.allowance_bytes
    why = pressure(snapshot, forecast, spec)
    rejected = []
    if why and used < LEAST_BYTES:
        rejected.append(
            Rejected(law=LAW, considered="the ladder", why=f"{why}, but batch holds only {format_bytes(used)}")
        )
        why = ""
    stale = snapshot.stale_ticks.get("workloads", 0)
    if stale < spec.staleness.stop_tightening_after:
        state = _advance(state, bool(why), rungs, snapshot, spec)
    if stale >= spec.staleness.open_after:
        state = MemoryState()
    state = msgspec.structs.replace(state, allowance_bytes=allowed)
    rung = rungs[state.rung] if state.rung >= 0 else "calm"
    reason = "MemoryPressure" if state.rung >= 0 else "MemoryAllowance"
    message = why or (
        f"allowance {format_bytes(allowed)} = node {format_bytes(snapshot.memory_bytes)} - services' peak "
        f"{format_bytes(forecast.services_peak_bytes)} - others - reserve {spec.memory.reserve:g} %"
        if state.rung < 0
        else f"calm since {snapshot.monotonic_seconds - state.pressed:.1f} s, rung {rung} still in force"
    )
    signalled = dict(state.signalled)
    actions = _limits(snapshot, state, rung, allowed, used, v2, reason, message, stale >= spec.staleness.open_after)
    requests: list[Request] = []
    if why and rung == "checkpoint":
        for job in snapshot.of("batch"):
            if job.checkpoint_signal and job.id not in signalled:
                # One deadline for all: jobs that come and go must not hold the ladder here for ever.
                signalled[job.id] = state.since + spec.memory.checkpoint_deadline
                actions.append(_action(job, "signal", job.checkpoint_signal, "CheckpointSignal", message))
    if why and rung == "freeze":
        requests = [_request("freeze", w, message) for w in snapshot.of("batch")]
    if why and rung == "evict" and snapshot.of("batch"):
        victim = least_loss(snapshot, forecast)
        requests = [_request("evict", w, message) for w in victim]
    state = msgspec.structs.replace(state, signalled=signalled if state.rung >= 0 else {})
    numbers = {
        "node_bytes": float(snapshot.memory_bytes),
        "services_peak_bytes": float(forecast.services_peak_bytes),
        "batch_bytes": float(used),
        "allowance_bytes": float(allowed),
    }
    verdict = Verdict(law=LAW, state=rung, reason=reason, message=message, numbers=numbers)
    return Decision(state, actions, verdict, rejected, requests)


def _action(workload: Workload, knob: str, value: str, reason: str, message: str) -> Action:
    return Action(
        workload=workload.id, path=workload.path, knob=knob, value=value, reason=reason, message=message, law=LAW
    )


def _request(verb: str, workload: Workload, message: str) -> Request:
    return Request(
        verb="freeze" if verb == "freeze" else "evict",
        workload=workload.id,
        law=LAW,
        reason="MemoryPressure",
        message=message,
    )


def _limits(
    snapshot: NodeSnapshot,
    state: MemoryState,
    rung: str,
    allowed: int,
    used: int,
    v2: bool,
    reason: str,
    message: str,
    left_open: bool,
) -> list[Action]:
    tier = snapshot.tier
    if tier is None or tier.memory_bytes is None:
        return []
    actions = []
    if not v2:
        least = tier.memory_bytes + V1_HEADROOM_BYTES
        value = max(allowed, least) // GRAIN_BYTES * GRAIN_BYTES
        current = tier.knobs.get("memory.max", "max")
        if left_open:
            actions.append(_action(tier, "memory.max", "max", reason, message))
        elif not current.isdigit() or int(current) < least or abs(int(current) - value) > HYSTERESIS_RATIO * value:
            actions.append(_action(tier, "memory.max", str(value), reason, message))
        if rung == "reclaim" and state.since == state.pressed == snapshot.monotonic_seconds:
            actions.append(_action(tier, "memory.reclaim", str(used // 4), reason, message))
        return actions
    if left_open or rung == "checkpoint":
        value_text = "max"  # a job that is throttled at its high mark cannot write its checkpoint in time
    elif state.rung >= 0:
        value_text = str(max(min(allowed, int(used * 0.9)) // GRAIN_BYTES * GRAIN_BYTES, LEAST_BYTES))
        current = tier.knobs.get("memory.high", "max")
        if current.isdigit() and int(current) <= int(value_text):
            value_text = current  # never widened while they stall
    else:
        value_text = str(allowed)
    actions.append(_action(tier, "memory.high", value_text, reason, message))
    if rung == "reclaim" and state.since == state.pressed == snapshot.monotonic_seconds:
        actions.append(_action(tier, "memory.reclaim", str(max(used // 4, GRAIN_BYTES)), reason, message))
    return actions


def lost_work(workload: Workload, forecast: Forecast, now_seconds: float) -> float:
    """Core-seconds plus GiB-seconds since the last checkpoint (or the start): what an eviction throws away."""
    since = workload.checkpointed_seconds or workload.started_seconds or now_seconds
    cores = workload.requested_cores or forecast.workloads[workload.id].usage_cores or 0.0
    return max(now_seconds - since, 0.0) * (cores + (workload.working_set_bytes or 0) / (1 << 30))


def least_loss(snapshot: NodeSnapshot, forecast: Forecast) -> list[Workload]:
    """The job to evict: lowest priority, then least lost work; a gang counts and goes whole; never an empty one."""
    gangs: dict[str, list[Workload]] = {}
    for workload in snapshot.of("batch"):
        if (workload.working_set_bytes or 0) > 0:
            gangs.setdefault(workload.gang or workload.id, []).append(workload)

    def cost(members: list[Workload]) -> tuple[int, float, str]:
        lost = sum(lost_work(w, forecast, snapshot.monotonic_seconds) for w in members)
        return max(w.priority for w in members), round(lost, 3), members[0].id

    return min(gangs.values(), key=cost, default=[])
