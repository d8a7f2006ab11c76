"""The memory law: batch has what the services will not need, and gives it back by a ladder while they stall for want.

Owns memory.high, memory.max and memory.reclaim of batch, and the checkpoint signal. A stall moves batch only if it can
be batch's doing: the node is short of memory, batch holds some of it, and the service is not at its own limit. v2
rungs: high -> reclaim -> checkpoint signal (a little room until all have answered) -> freeze request (skipped without
swap: it frees nothing) -> evict request. v1 has no memory.high; its limit kills inside the group when reached, so it is
never below usage plus headroom and the ladder is limit -> reclaim -> checkpoint -> evict. One shortage evicts one job
at a time: what is on its way out, and what it will free, counts. Page cache is not pressure. designs/0002-memory.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec

from colocate.decide.law import Decision, View, act
from colocate.knob import narrowest
from colocate.plan import Action, Rejected, Request, Verdict
from colocate.snapshot import NodeSnapshot, Workload
from colocate.units import format_bytes

LAW = "memory"
LEAST_BYTES = 64 << 20
V1_HEADROOM_BYTES = CHECKPOINT_BYTES = 64 << 20
"""Beyond what batch holds: of a limit that kills on v1, and to write a checkpoint in."""
GRAIN_BYTES = 1 << 20
HYSTERESIS_RATIO = 0.02
CRITICAL_RATIO = 0.01
SHORT_RATIO = 0.1
"""Of the node: with more than this left (cache counted), nobody stalls for want of the node's memory."""
AHEAD_SECONDS = 1.0
"""How soon what grows may be beyond a limit: a tick, a rung, and the time a checkpoint takes."""
CRAWL_RATIO = 0.5
"""A job whose processes all stall more than this at the allowance does no work, though it runs."""
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
    signalled: dict[str, tuple[float, float]] = {}
    """Jobs that were sent their checkpoint signal since the rung was entered: when, and until when they have."""
    asked: tuple[str, ...] = ()
    """Jobs whose eviction was asked for, and that have not all gone."""
    settled: float = 0.0
    """Until then a stall may still be one of before the last eviction freed its memory."""
    over: float = 0.0
    """Since when batch wants more than its allowance; 0: it does not."""
    by_over: bool = False
    """The ladder was entered for that, and not because a service stalled."""
    held_bytes: int = 0
    """The tier's working set, at least a second ago."""
    held_at: float = 0.0
    grows: float = 0.0
    """By how many bytes it grew a second since then."""
    lifted: dict[str, int] = {}
    """High marks while checkpoints are written, by workload."""


def batch_bytes(snapshot: NodeSnapshot) -> int:
    """The working set of all batch work."""
    if snapshot.tier is not None and snapshot.tier.working_set_bytes is not None:
        in_place = sum(w.working_set_bytes or 0 for w in snapshot.of("batch") if w.in_place)
        return snapshot.tier.working_set_bytes + in_place
    return sum(w.working_set_bytes or 0 for w in snapshot.of("batch"))


def left_bytes(snapshot: NodeSnapshot) -> int | None:
    """What is available on the node; what services have mapped is not."""
    if snapshot.memory_available_bytes is None:
        return None
    return max(snapshot.memory_available_bytes - sum(w.mapped_bytes for w in snapshot.of("service")), 0)


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
    left = left_bytes(snapshot)
    if left is not None:
        used = snapshot.memory_bytes - left
        others = max(used - services - batch_bytes(snapshot), 0)
    peak, reserve = view.forecast.services_peak_bytes, view.spec.memory.reserve / 100
    return int(allow(snapshot.memory_bytes, peak, others, reserve, before))


def pressure(view: View) -> tuple[str, list[Rejected]]:
    """Who stalls for want of memory that batch could give back, in words, empty if nobody; and who stalls otherwise."""
    snapshot, spec = view.snapshot, view.spec
    left, total = left_bytes(snapshot), snapshot.memory_bytes
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


def _unsaved(state: MemoryState, view: View) -> bool:
    """Whether a checkpoint may still be on its way: its deadline has not passed, and its job has not answered."""
    for id_, (told, deadline) in state.signalled.items():
        job = view.snapshot.workloads.get(id_)
        if view.now < deadline and job is not None and (job.checkpointed_seconds or 0.0) <= told:
            return True
    return False


def _room_to_save(snapshot: NodeSnapshot) -> dict[str, int]:
    """What the tier and batch in place hold, and a little more."""
    tier = [snapshot.tier] if snapshot.tier is not None else []
    governed = [*tier, *(w for w in snapshot.of("batch") if w.in_place)]
    return {w.id: w.memory_bytes + CHECKPOINT_BYTES for w in governed if w.memory_bytes is not None}


def _advance(state: MemoryState, why: str, over: str, rungs: tuple[str, ...], view: View) -> MemoryState:
    """The ladder; who only wants more than the allowance is not squeezed, but saved and one of them evicted."""
    memory, v2 = view.spec.memory, rungs is RUNGS_V2
    useful = rungs if why else ("checkpoint", "evict")
    helps = sum(1 << i for i, rung in enumerate(rungs) if rung in useful and _helps(rung, view.snapshot, v2))
    before, stalls = state.rung, bool(why or over)
    saving = before >= 0 and rungs[before] == "checkpoint"
    waits = saving and _unsaved(state, view)
    saved = saving and not waits and bool(state.signalled)  # what is done from now on would be lost
    rung, since, pressed = climb(
        before, state.since, state.pressed, view.now, stalls, waits, helps, len(rungs),
        0.0 if saved else memory.rung, memory.calm,
    )  # fmt: skip
    if before < 0 or why:
        state = msgspec.structs.replace(state, by_over=not why)
    if rung != before and rungs[rung] == "checkpoint":  # each time anew: work has been done since the last one
        state = msgspec.structs.replace(state, signalled={}, lifted=_room_to_save(view.snapshot))
    return msgspec.structs.replace(state, rung=rung, since=since, pressed=pressed)


def _settle(state: MemoryState, view: View) -> MemoryState:
    """Notice that all whose eviction this law asked for have gone.

    That ends the episode: the tier has its allowance again, and what was felt until then says nothing of what is left.
    """
    if not state.asked or any(id_ in view.evicting for id_ in state.asked):
        return state
    settled = view.now + max(view.spec.memory.rung, view.forecast.interval_seconds)
    return MemoryState(settled=settled, allowance_bytes=state.allowance_bytes)


def _grown(state: MemoryState, view: View) -> MemoryState:
    """How fast the tier grows, over a second or more: nothing stops it on v1, so what it will have counts there."""
    tier = view.snapshot.tier
    if tier is None or tier.working_set_bytes is None:
        return msgspec.structs.replace(state, held_at=0.0, grows=0.0)
    at, held = tier.at_seconds or view.now, tier.working_set_bytes
    if not state.held_at:
        return msgspec.structs.replace(state, held_bytes=held, held_at=at)
    if at - state.held_at < AHEAD_SECONDS:
        return state
    grows = max(held - state.held_bytes, 0) / (at - state.held_at)
    return msgspec.structs.replace(state, held_bytes=held, held_at=at, grows=grows)


def _crawling(view: View) -> list[Workload]:
    """Jobs of the tier that stall most of the time, but not at a limit of their own."""
    found = []
    for job in view.snapshot.of("batch"):
        own = job.knobs.get("memory.max", "max")
        at_own = own.isdigit() and (job.memory_bytes or 0) >= 0.9 * int(own)
        ratio = view.forecast.workloads[job.id].memory_full_ratio or 0.0
        if not job.in_place and not at_own and ratio >= CRAWL_RATIO:
            found.append(job)
    return found


def _over(state: MemoryState, view: View, *, v2: bool) -> tuple[MemoryState, str, list[Workload]]:
    """Batch that wants more than its allowance, in words, when it has done so for long; and who of it could go.

    v2 holds it at the allowance, where it crawls and does no work. v1 has no such mark: when the node is short, what
    batch has beyond its allowance is the services', and so is what it will have when a checkpoint is written.
    """
    tier, allowed, now = view.snapshot.tier, state.allowance_bytes, view.now
    held, left = (tier.working_set_bytes or 0) if tier is not None else 0, left_bytes(view.snapshot)
    high = tier.knobs.get("memory.high", "max") if tier is not None and v2 else "max"
    text, patience = "", view.spec.memory.crawl
    among = [w for w in view.snapshot.of("batch") if not w.in_place and (w.working_set_bytes or 0) >= LEAST_BYTES]
    soon = state.grows * AHEAD_SECONDS
    if not v2:
        short = left is not None and left - soon < SHORT_RATIO * view.snapshot.memory_bytes
        if short and among and held + soon > allowed:
            text, patience = f"batch holds {format_bytes(held)}, its allowance is {format_bytes(allowed)}", 0.0
            text += f", and it grows by {format_bytes(int(soon))} a second" if held <= allowed else ""
    elif high.isdigit() and (state.rung < 0 or state.by_over):
        saving = state.rung >= 0 and RUNGS_V2[state.rung] == "checkpoint"  # it has a little room meanwhile
        at_mark = int(high) >= (1 - HYSTERESIS_RATIO) * allowed and held >= 0.9 * allowed
        crawling = _crawling(view)
        among = [w for w in among if w in crawling] or among
        if at_mark and (crawling or (saving and state.over)):
            who = " and ".join(w.name for w in crawling) or "batch"
            text = f"{who} cannot have more than batch's allowance of {format_bytes(allowed)}, and does no work"
            text += f" (for {now - state.over:.0f} s)" if state.over else ""
    since = (state.over or now) if text else 0.0
    state = msgspec.structs.replace(state, over=since)
    return state, text if text and now - since >= patience else "", among


def decide_memory(view: View, state: MemoryState) -> Decision:
    """The memory law for one tick."""
    snapshot, spec = view.snapshot, view.spec
    v2 = "memory.high" in snapshot.capabilities
    rungs = RUNGS_V2 if v2 else RUNGS_V1
    allowed = allowance_bytes(view, state.allowance_bytes)
    state = _grown(_settle(msgspec.structs.replace(state, allowance_bytes=allowed), view), view)
    state, over, among = _over(state, view, v2=v2)
    why, rejected = pressure(view)
    if (why or over) and view.now < state.settled:
        rejected.append(Rejected(law=LAW, considered="the next rung", why="an eviction has just freed memory"))
        why = over = ""
    stale = view.stale("workloads")
    left_open = stale >= spec.staleness.open_after
    if stale < spec.staleness.stop_tightening_after:
        state = _advance(state, why, over, rungs, view)
    if left_open:
        state = MemoryState(allowance_bytes=allowed)
    rung = rungs[state.rung] if state.rung >= 0 else "calm"
    reason, message = _words(view, state, rung, why, over)
    actions = _limits(view, state, rung, reason, message, v2=v2, stalls=bool(why), left_open=left_open)
    requests = []
    if (why or over) and rung == "checkpoint":
        state, signals = _signals(view, state, message)
        actions += signals
    if why and rung == "freeze":
        requests = [_request("freeze", w, reason, message) for w in snapshot.of("batch")]
    if (why or over) and rung == "evict" and not view.evicting:
        victims = least_loss(view, view.snapshot.of("batch") if why else among)
        requests = [_request("evict", w, reason, message) for w in victims]
        state = msgspec.structs.replace(state, asked=tuple(w.id for w in victims))
    if state.rung < 0:
        state = msgspec.structs.replace(state, signalled={})
    numbers = {
        "node_bytes": float(snapshot.memory_bytes),
        "services_peak_bytes": float(view.forecast.services_peak_bytes),
        "batch_bytes": float(batch_bytes(snapshot)),
        "allowance_bytes": float(allowed),
    }
    verdict = Verdict(law=LAW, state=rung, reason=reason, message=message, numbers=numbers)
    return Decision(state, actions, verdict, rejected, requests)


def _words(view: View, state: MemoryState, rung: str, why: str, over: str) -> tuple[str, str]:
    leaving = f"; {len(view.evicting)} job(s) on their way out" if view.evicting else ""
    if why:
        return "MemoryPressure", why + leaving
    if over:
        return "OverAllowance", over + leaving
    if state.rung >= 0:
        reason = "OverAllowance" if state.by_over else "MemoryPressure"
        return reason, f"calm since {view.now - state.pressed:.1f} s, rung {rung} still in force"
    return "MemoryAllowance", (
        f"allowance {format_bytes(state.allowance_bytes)} = node {format_bytes(view.snapshot.memory_bytes)} - "
        f"services' peak {format_bytes(view.forecast.services_peak_bytes)} - others - reserve "
        f"{view.spec.memory.reserve:g} %"
    )


def _signals(view: View, state: MemoryState, message: str) -> tuple[MemoryState, list[Action]]:
    signalled, actions = dict(state.signalled), []
    for job in view.snapshot.of("batch"):
        if job.checkpoint_signal and job.id not in signalled and job.id not in view.evicting:
            # One deadline for all: jobs that come and go must not hold the ladder here for ever.
            signalled[job.id] = view.now, state.since + view.spec.memory.checkpoint_deadline
            actions.append(act(LAW, job, "signal", job.checkpoint_signal, "CheckpointSignal", message))
    return msgspec.structs.replace(state, signalled=signalled), actions


def _request(verb: Literal["freeze", "evict"], job: Workload, reason: str, message: str) -> Request:
    return Request(verb=verb, workload=job.id, law=LAW, reason=reason, message=message)


def _limits(
    view: View,
    state: MemoryState,
    rung: str,
    reason: str,
    message: str,
    *,
    v2: bool,
    stalls: bool,
    left_open: bool,
) -> list[Action]:
    now_reclaimed = rung == "reclaim" and state.since == state.pressed == view.now
    actions = []
    tier = view.snapshot.tier
    governed = [w for w in view.snapshot.of("batch") if w.in_place and "memory.high" in w.knobs]
    if tier is not None and tier.memory_bytes is not None:
        value = _tier_value(tier, state, rung, v2=v2, stalls=stalls, left_open=left_open)
        if value is not None:
            actions.append(act(LAW, tier, "memory.high" if v2 else "memory.max", value, reason, message))
        if now_reclaimed and (tier.working_set_bytes or 0) >= GRAIN_BYTES:
            amount = max((tier.working_set_bytes or 0) // 4, GRAIN_BYTES)
            actions.append(act(LAW, tier, "memory.reclaim", str(amount), reason, message))
    for workload in governed:  # only during an episode; then its owner's own value is back
        found = workload.found.get("memory.high", workload.knobs["memory.high"])
        held = workload.working_set_bytes or 0
        value = found
        if state.rung >= 0 and not state.by_over and held >= LEAST_BYTES and not left_open:
            mark = _squeezed(workload, held) if stalls else _held(workload, held)
            if rung == "checkpoint":
                mark = str(state.lifted.get(workload.id, held + CHECKPOINT_BYTES))
            value = narrowest("memory.high", mark, found)
        actions.append(act(LAW, workload, "memory.high", value, reason, message))
        if now_reclaimed and held >= LEAST_BYTES:
            actions.append(act(LAW, workload, "memory.reclaim", str(held // 4), reason, message))
    return actions


def _squeezed(workload: Workload, held_bytes: float) -> str:
    """While services stall: 90 % of what batch holds; a mark that is lower already stays."""
    value = max(int(held_bytes * 0.9) // GRAIN_BYTES * GRAIN_BYTES, LEAST_BYTES)
    return narrowest("memory.high", str(value), workload.knobs.get("memory.high", "max"))


def _held(workload: Workload, held_bytes: float) -> str:
    """When that has helped: no more than batch has, but with that it may work."""
    current = workload.knobs.get("memory.high", "max")
    return str(max(int(held_bytes) // GRAIN_BYTES * GRAIN_BYTES, int(current) if current.isdigit() else 0))


def _tier_value(
    tier: Workload, state: MemoryState, rung: str, *, v2: bool, stalls: bool, left_open: bool
) -> str | None:
    """The tier's limit; None to leave it."""
    allowed, used = state.allowance_bytes, tier.working_set_bytes or 0
    if left_open:
        return "max"
    if not v2:
        least = (tier.memory_bytes or 0) + max(V1_HEADROOM_BYTES, int(state.grows * AHEAD_SECONDS))
        wanted = max(allowed, least) // GRAIN_BYTES * GRAIN_BYTES
        current = tier.knobs.get("memory.max", "max")
        stays = current.isdigit() and int(current) >= least and abs(int(current) - wanted) <= HYSTERESIS_RATIO * wanted
        return None if stays else str(wanted)
    if rung == "checkpoint":  # who is throttled at its high mark cannot write its checkpoint in time
        return str(state.lifted[tier.id]) if tier.id in state.lifted else None
    if state.rung < 0:
        return str(allowed)
    return narrowest("memory.high", _squeezed(tier, used) if stalls else _held(tier, used), str(allowed))


def lost_work(workload: Workload, now_seconds: float) -> float:
    """What an eviction throws away: CPU-seconds that were spent, and GiB held for seconds, since the last checkpoint.

    Without a checkpoint: since the start of its oldest process.
    """
    since = workload.checkpointed_seconds or workload.started_seconds or now_seconds
    spent = max((workload.cpu_usage_us or 0) - workload.checkpointed_cpu_us, 0) / 1e6
    return spent + max(now_seconds - since, 0.0) * (workload.working_set_bytes or 0) / (1 << 30)


def least_loss(view: View, among: Sequence[Workload]) -> list[Workload]:
    """The job to evict: lowest priority, then least lost work; a gang counts and goes whole; never an empty one.

    Of those `among` that hold enough for their going to be felt, if there are any; a gang is one if a member is.
    """
    gangs: dict[str, list[Workload]] = {}
    for workload in view.snapshot.of("batch"):
        if (workload.working_set_bytes or 0) > 0:
            gangs.setdefault(workload.gang or workload.id, []).append(workload)
    chosen = {w.gang or w.id for w in among}
    choice = [members for key, members in gangs.items() if key in chosen]
    large = [members for members in choice if sum(w.working_set_bytes or 0 for w in members) >= LEAST_BYTES]

    def cost(members: list[Workload]) -> tuple[int, float, str]:
        lost = sum(lost_work(w, view.now) for w in members)
        return max(w.priority for w in members), round(lost, 3), members[0].id

    return min(large or choice, key=cost, default=[])
