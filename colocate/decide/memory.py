"""The memory law: batch has what the services will not need, and gives it back by a ladder while they stall for want.

Owns memory.high, memory.max and memory.reclaim of batch, and the checkpoint signal. A stall moves batch only if it can
be batch's doing: the node is short of memory, batch holds some of it, and the service is not at its own limit. v2
rungs: high -> reclaim -> checkpoint signal (high lifted until its deadline) -> freeze request (skipped without swap: it
frees nothing) -> evict request. v1 has no memory.high; its limit kills inside the group when reached, so it is never
below usage plus headroom and the ladder is limit -> reclaim -> checkpoint -> evict. One shortage evicts one job at a
time: what is on its way out, and what it will free, counts. Page cache is not pressure. designs/0002-memory.md.
"""

from __future__ import annotations

import math

import msgspec

from colocate.decide.law import Decision, View, act
from colocate.knob import narrowest
from colocate.plan import Action, Rejected, Request, Verdict
from colocate.snapshot import NodeSnapshot, Workload
from colocate.units import format_bytes

LAW = "memory"
LEAST_BYTES = 64 << 20
V1_HEADROOM_BYTES = 64 << 20
GRAIN_BYTES = 1 << 20
HYSTERESIS_RATIO = 0.02
CRITICAL_RATIO = 0.01
SHORT_RATIO = 0.1
"""Of the node: with more than this left (cache counted), nobody stalls for want of the node's memory."""
STUCK_RATIO = 0.5
"""A job whose processes all stall more than this at our limit does no work, though it runs."""
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
    leaving: tuple[str, ...] = ()
    """Jobs that were on their way out at the last look."""
    settled: float = 0.0
    """Until then a stall may still be one of before the last eviction freed its memory."""
    stuck: dict[str, float] = {}
    """Since when a job stalls at our limit."""


def batch_bytes(snapshot: NodeSnapshot) -> int:
    """The working set of all batch work."""
    if snapshot.tier is not None and snapshot.tier.working_set_bytes is not None:
        in_place = sum(w.working_set_bytes or 0 for w in snapshot.of("batch") if w.in_place)
        return snapshot.tier.working_set_bytes + in_place
    return sum(w.working_set_bytes or 0 for w in snapshot.of("batch"))


def allow(
    node_bytes: float, peak_bytes: float, others_bytes: float, reserve_ratio: float, before_bytes: float
) -> float:
    """The core: what batch may have, in whole MiB; small changes of the one `before` (0: none) are not followed."""
    left = node_bytes - peak_bytes - others_bytes - math.floor(node_bytes * reserve_ratio)
    allowed = max(math.floor(left / GRAIN_BYTES) * GRAIN_BYTES, LEAST_BYTES)
    if before_bytes > 0.0 and abs(allowed - before_bytes) <= HYSTERESIS_RATIO * before_bytes:
        return before_bytes
    return float(allowed)


def presses(
    stall_ratio: float,
    threshold_ratio: float,
    left_bytes: float,
    node_bytes: float,
    own_limit: bool,
    batch_bytes: float,
) -> bool:
    """The core: whether a service's stall can be batch's doing."""
    if not stall_ratio > threshold_ratio or own_limit or batch_bytes < LEAST_BYTES:
        return False
    return left_bytes < SHORT_RATIO * node_bytes


def climb(
    rung: int,
    since: float,
    pressed: float,
    now: float,
    stalls: bool,
    waits: bool,
    helps: int,
    rungs: int,
    rung_seconds: float,
    calm_seconds: float,
) -> tuple[int, float, float]:
    """The core: the next (rung, since, pressed). `helps` has a bit for each rung that can do anything here."""
    if not stalls:
        if rung >= 0 and now - pressed >= calm_seconds:
            # Down to the first rung, then calm: the rungs between are acts, not limits to be held.
            return (0, now, now) if rung > 0 else (-1, now, 0.0)
        return rung, since, pressed
    following = 0
    if rung >= 0:
        if now - since < rung_seconds or waits or rung + 1 >= rungs:
            return rung, since, now
        following = rung + 1
    while following + 1 < rungs and not (helps >> following) & 1:
        following += 1
    return following, now, now


def allowance_bytes(view: View, before: int = 0) -> int:
    """node - services' forecast working set - everybody else's use - reserve, in MiB; never below 64 MiB.

    Everybody else is what is neither available nor a service's nor batch's.
    """
    snapshot = view.snapshot
    services = sum(w.working_set_bytes or 0 for w in snapshot.of("service"))
    others = 0
    if snapshot.memory_available_bytes is not None:
        used = snapshot.memory_bytes - snapshot.memory_available_bytes
        others = max(used - services - batch_bytes(snapshot), 0)
    peak, reserve = view.forecast.services_peak_bytes, view.spec.memory.reserve / 100
    return int(allow(snapshot.memory_bytes, peak, others, reserve, before))


def pressure(view: View) -> tuple[str, list[Rejected]]:
    """Who stalls for want of memory that batch could give back, in words, empty if nobody; and who stalls otherwise."""
    snapshot, spec = view.snapshot, view.spec
    left, total = snapshot.memory_available_bytes, snapshot.memory_bytes
    batch = batch_bytes(snapshot)
    why, rejected = "", []
    for workload in snapshot.of("service"):
        now = view.forecast.workloads[workload.id]
        ratio = now.memory_pressure_ratio
        if ratio is None or ratio <= spec.memory.pressure / 100:
            continue
        text = f"{workload.name} stalls on memory {ratio:.1%} of the time (over {spec.memory.pressure:g} %)"
        threshold, remains = spec.memory.pressure / 100, 0.0 if left is None else float(left)
        if not presses(ratio, threshold, remains, total, now.at_own_limit, batch):
            cause = f"batch holds only {format_bytes(batch)}"
            if now.at_own_limit:
                cause = "it is at its own limit"
            elif left is not None and left >= SHORT_RATIO * total:
                cause = f"{format_bytes(left)} of {format_bytes(total)} are free on the node"
            rejected.append(Rejected(law=LAW, considered="the ladder", why=f"{text}, but {cause}"))
        elif not why:
            why = text
    if not why and left is not None and left < CRITICAL_RATIO * total:
        why = f"only {format_bytes(left)} of the node's memory are left"
        if batch < LEAST_BYTES:
            rejected.append(
                Rejected(law=LAW, considered="the ladder", why=f"{why}, but batch holds only {format_bytes(batch)}")
            )
            why = ""
    return why, rejected


def _helps(rung: str, snapshot: NodeSnapshot, v2: bool) -> bool:
    """Whether a rung can do anything here."""
    batch = snapshot.of("batch")
    if rung == "checkpoint":
        return any(w.checkpoint_signal for w in batch)
    if rung == "freeze":
        return snapshot.swap_free_bytes > 0
    if rung == "limit":
        return snapshot.tier is not None and (snapshot.tier.working_set_bytes or 0) >= LEAST_BYTES
    return rung not in ("high", "reclaim") or v2 or snapshot.tier is not None


def _advance(state: MemoryState, stalls: bool, rungs: tuple[str, ...], view: View) -> MemoryState:
    memory, v2 = view.spec.memory, rungs is RUNGS_V2
    helps = sum(1 << i for i, rung in enumerate(rungs) if _helps(rung, view.snapshot, v2))
    waits = (
        state.rung >= 0 and rungs[state.rung] == "checkpoint" and any(view.now < d for d in state.signalled.values())
    )
    rung, since, pressed = climb(
        state.rung, state.since, state.pressed, view.now, stalls, waits, helps, len(rungs), memory.rung, memory.calm
    )
    return msgspec.structs.replace(state, rung=rung, since=since, pressed=pressed)


def _settle(state: MemoryState, view: View) -> MemoryState:
    """Notice that an eviction has ended: what was felt until then says nothing of what is left."""
    leaving = tuple(sorted(view.evicting))
    gone = [id_ for id_ in state.leaving if id_ not in view.evicting]
    settled = view.now + max(view.spec.memory.rung, view.forecast.interval_seconds) if gone else state.settled
    return msgspec.structs.replace(state, leaving=leaving, settled=settled)


def _stuck(state: MemoryState, view: View) -> tuple[MemoryState, list[Request]]:
    """Jobs that crawl at a limit of ours, neither killed nor running: they hold memory and do no work."""
    since: dict[str, float] = {}
    requests = []
    tier = view.snapshot.tier
    for job in view.snapshot.of("batch"):
        ratio = view.forecast.workloads[job.id].memory_full_ratio
        limited = job if job.in_place else tier
        high = limited.knobs.get("memory.high", "max") if limited is not None else "max"
        ours = high.isdigit() and high != (limited.found.get("memory.high") if limited is not None else None)
        at_high = ours and limited is not None and (limited.memory_bytes or 0) >= 0.9 * int(high)
        if not at_high or ratio is None or ratio < STUCK_RATIO:
            continue
        since[job.id] = state.stuck.get(job.id, view.now)
        lasted = view.now - since[job.id]
        if lasted > view.spec.freeze.max_frozen and job.id not in view.evicting:
            mark = format_bytes(int(high))
            message = f"{job.name} stalls {ratio:.0%} of the time at its limit of {mark}, for {lasted:.0f} s already"
            requests.append(Request(verb="evict", workload=job.id, law=LAW, reason="MemoryStuck", message=message))
    return msgspec.structs.replace(state, stuck=since), requests


def decide_memory(view: View, state: MemoryState) -> Decision:
    """The memory law for one tick."""
    snapshot, spec = view.snapshot, view.spec
    v2 = "memory.high" in snapshot.capabilities
    rungs = RUNGS_V2 if v2 else RUNGS_V1
    allowed = allowance_bytes(view, state.allowance_bytes)
    state = _settle(state, view)
    why, rejected = pressure(view)
    if why and view.now < state.settled:
        rejected.append(Rejected(law=LAW, considered="the next rung", why="an eviction has just freed memory"))
        why = ""
    stale = view.stale("workloads")
    left_open = stale >= spec.staleness.open_after
    if stale < spec.staleness.stop_tightening_after:
        state = _advance(state, bool(why), rungs, view)
    if left_open:
        state = MemoryState()
    state, requests = _stuck(msgspec.structs.replace(state, allowance_bytes=allowed), view)
    rung = rungs[state.rung] if state.rung >= 0 else "calm"
    reason, message = _words(view, state, rung, why, allowed)
    actions = _limits(view, state, rung, reason, message, v2=v2, left_open=left_open)
    if why and rung == "checkpoint":
        state, signals = _signals(view, state, message)
        actions += signals
    if why and rung == "freeze":
        requests += [_request("freeze", w, message) for w in snapshot.of("batch")]
    if why and rung == "evict" and not view.evicting:
        requests += [_request("evict", w, message) for w in least_loss(view)]
    if state.rung < 0:
        state = msgspec.structs.replace(state, signalled={})
    numbers = {
        "node_bytes": float(snapshot.memory_bytes),
        "services_peak_bytes": float(view.forecast.services_peak_bytes),
        "batch_bytes": float(batch_bytes(snapshot)),
        "allowance_bytes": float(allowed),
    }
    if requests:
        reason, message = requests[0].reason, requests[0].message
    verdict = Verdict(law=LAW, state=rung, reason=reason, message=message, numbers=numbers)
    return Decision(state, actions, verdict, rejected, requests)


def _words(view: View, state: MemoryState, rung: str, why: str, allowed: int) -> tuple[str, str]:
    if why:
        leaving = f"; {len(view.evicting)} job(s) on their way out" if view.evicting else ""
        return "MemoryPressure", why + leaving
    if state.rung >= 0:
        return "MemoryPressure", f"calm since {view.now - state.pressed:.1f} s, rung {rung} still in force"
    return "MemoryAllowance", (
        f"allowance {format_bytes(allowed)} = node {format_bytes(view.snapshot.memory_bytes)} - services' peak "
        f"{format_bytes(view.forecast.services_peak_bytes)} - others - reserve {view.spec.memory.reserve:g} %"
    )


def _signals(view: View, state: MemoryState, message: str) -> tuple[MemoryState, list[Action]]:
    signalled, actions = dict(state.signalled), []
    for job in view.snapshot.of("batch"):
        if job.checkpoint_signal and job.id not in signalled and job.id not in view.evicting:
            # One deadline for all: jobs that come and go must not hold the ladder here for ever.
            signalled[job.id] = state.since + view.spec.memory.checkpoint_deadline
            actions.append(act(LAW, job, "signal", job.checkpoint_signal, "CheckpointSignal", message))
    return msgspec.structs.replace(state, signalled=signalled), actions


def _request(verb: str, workload: Workload, message: str) -> Request:
    return Request(
        verb="freeze" if verb == "freeze" else "evict",
        workload=workload.id,
        law=LAW,
        reason="MemoryPressure",
        message=message,
    )


def _limits(
    view: View, state: MemoryState, rung: str, reason: str, message: str, *, v2: bool, left_open: bool
) -> list[Action]:
    now_reclaimed = rung == "reclaim" and state.since == state.pressed == view.now
    actions = []
    tier = view.snapshot.tier
    governed = [w for w in view.snapshot.of("batch") if w.in_place and "memory.high" in w.knobs]
    if tier is not None and tier.memory_bytes is not None:
        value = _tier_value(tier, state, rung, v2=v2, left_open=left_open)
        if value is not None:
            actions.append(act(LAW, tier, "memory.high" if v2 else "memory.max", value, reason, message))
        if now_reclaimed and (tier.working_set_bytes or 0) >= GRAIN_BYTES:
            amount = max((tier.working_set_bytes or 0) // 4, GRAIN_BYTES)
            actions.append(act(LAW, tier, "memory.reclaim", str(amount), reason, message))
    for workload in governed:  # only while a service stalls; then its owner's own value is back
        found = workload.found.get("memory.high", workload.knobs["memory.high"])
        held = workload.working_set_bytes or 0
        value = found
        if state.rung >= 0 and rung != "checkpoint" and held >= LEAST_BYTES and not left_open:
            mark = str(max(int(held * 0.9) // GRAIN_BYTES * GRAIN_BYTES, LEAST_BYTES))
            value = narrowest("memory.high", _never_widened(workload, mark), found)
        actions.append(act(LAW, workload, "memory.high", value, reason, message))
        if now_reclaimed and held >= LEAST_BYTES:
            actions.append(act(LAW, workload, "memory.reclaim", str(held // 4), reason, message))
    return actions


def _never_widened(workload: Workload, value: str) -> str:
    """While services stall a mark that is lower already stays."""
    current = workload.knobs.get("memory.high", "max")
    return current if current.isdigit() and int(current) <= int(value) else value


def _tier_value(tier: Workload, state: MemoryState, rung: str, *, v2: bool, left_open: bool) -> str | None:
    """The tier's limit; None to leave it."""
    allowed, used = state.allowance_bytes, tier.working_set_bytes or 0
    if left_open or (v2 and rung == "checkpoint"):
        return "max"  # a job that is throttled at its high mark cannot write its checkpoint in time
    if not v2:
        least = (tier.memory_bytes or 0) + V1_HEADROOM_BYTES
        wanted = max(allowed, least) // GRAIN_BYTES * GRAIN_BYTES
        current = tier.knobs.get("memory.max", "max")
        stays = current.isdigit() and int(current) >= least and abs(int(current) - wanted) <= HYSTERESIS_RATIO * wanted
        return None if stays else str(wanted)
    if state.rung < 0:
        return str(allowed)
    return _never_widened(tier, str(max(min(allowed, int(used * 0.9)) // GRAIN_BYTES * GRAIN_BYTES, LEAST_BYTES)))


def lost_work(workload: Workload, now_seconds: float) -> float:
    """What an eviction throws away: CPU-seconds that were spent, and GiB held for seconds, since the last checkpoint.

    Without a checkpoint: since the start of its oldest process.
    """
    since = workload.checkpointed_seconds or workload.started_seconds or now_seconds
    spent = max((workload.cpu_usage_us or 0) - workload.checkpointed_cpu_us, 0) / 1e6
    return spent + max(now_seconds - since, 0.0) * (workload.working_set_bytes or 0) / (1 << 30)


def least_loss(view: View) -> list[Workload]:
    """The job to evict: lowest priority, then least lost work; a gang counts and goes whole; never an empty one."""
    gangs: dict[str, list[Workload]] = {}
    for workload in view.snapshot.of("batch"):
        if (workload.working_set_bytes or 0) > 0:
            gangs.setdefault(workload.gang or workload.id, []).append(workload)

    def cost(members: list[Workload]) -> tuple[int, float, str]:
        lost = sum(lost_work(w, view.now) for w in members)
        return max(w.priority for w in members), round(lost, 3), members[0].id

    return min(gangs.values(), key=cost, default=[])
