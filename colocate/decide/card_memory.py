"""The memory of a card that batch shares with services: it must never run out, for whoever asks next is refused.

A driver gives memory to whoever asks first, and a frozen job keeps what it has. So batch is stopped before what is free
falls below the reserve: a process that is stopped asks for nothing. What it holds comes free when it goes: the largest
goes first, where the reserve is touched all the same, or where batch was stopped for it for `freeze.maxFrozen`. A job
that has declared more than there is room for goes before it has taken that. Where the driver may hold processes, and
the policy wants it, the largest goes into the host's memory first, and comes back when there is room again. Where the
driver limits what a cgroup may have, batch meets its limit before the reserve. designs/0008-gpu.md.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from colocate.plan import MemoryLimit, Request, Verdict
from colocate.snapshot import Card, Workload
from colocate.units import format_bytes, format_duration

LAW = "gpu-memory"
LOOK_AHEAD_SECONDS = 5.0
"""Batch is stopped when it would have reached the reserve by then."""
RATE_SECONDS = 3.0
"""How long the mean of its growth remembers."""
TOUCHED_SECONDS = 2.0
"""So long below the reserve, with batch stopped, and one has to go."""
STOPPED_SECONDS = 15.0
"""So long stopped for it, and one is taken off the card, if that may be: sooner than it would be evicted."""
ROOM_SECONDS = 60.0
"""There must have been room for so long before one comes back."""
LIMIT_STEP = 256 << 20
PEAK_SECONDS = 600.0
"""How long a service's peak counts."""


class Suspended(msgspec.Struct, frozen=True, omit_defaults=True):
    """One job that was taken off the card."""

    size: int
    """Bytes that it had there."""
    at: float
    room_since: float | None = None
    """Since when there has been room for it."""


class CardMemory(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What is remembered of a card. Times are monotonic seconds."""

    at: float = 0.0
    batch_bytes: int = 0
    bytes_per_second: float = 0.0
    """By which batch grows."""
    stopped: bool = False
    stopped_at: float | None = None
    touched_at: float | None = None
    """Since when less than the reserve has been free."""
    peaks: dict[str, tuple[float, int]] = {}
    """Of each service: when it used most of late, and how much."""
    suspended: dict[str, Suspended] = {}
    """Batch that was taken off the card."""


class Bounds(NamedTuple):
    """What the guard of one card has to keep to."""

    reserve_bytes: int
    can_be_suspended: frozenset[str] = frozenset()
    """Batch that may be taken into the host's memory, and fits there."""
    there: frozenset[str] = frozenset()
    """Batch that is suspended, or on its way, and still exists."""
    most_suspended_seconds: float = 600.0


class Guarded(NamedTuple):
    """What the guard wants of one card."""

    state: CardMemory
    verdict: Verdict | None
    requests: list[Request]
    limits: list[MemoryLimit] = []  # noqa: RUF012 - nobody changes it


def guard(card: Card, services: list[Workload], jobs: list[Workload], state: CardMemory, bounds: Bounds) -> Guarded:
    """One tick of one card. Pure. Nothing is said of a card whose memory is not told, or that nobody shares."""
    state, away = _away(card, bool(services), state, bounds)
    found = _here(card, services, [w for w in jobs if w.id not in state.suspended], state, bounds)
    limits = _limits(card, services, jobs, found.state, bounds.reserve_bytes) if card.limits else []
    return Guarded(found.state, found.verdict, [*away, *found.requests], limits)


def _away(card: Card, shared: bool, state: CardMemory, bounds: Bounds) -> tuple[CardMemory, list[Request]]:
    """Of those that are not on the card: who stays away, who comes back, and who has to go."""
    total, used = card.memory_bytes, card.memory_used_bytes
    kept, requests = dict[str, Suspended](), []
    for id_, one in state.suspended.items():
        how = card.suspended.get(id_, "going")
        if id_ not in bounds.there and card.at_seconds - one.at > TOUCHED_SECONDS:
            continue  # it has ended
        room = total is not None and used is not None and total - used > one.size + 2 * bounds.reserve_bytes
        since = (one.room_since if one.room_since is not None else card.at_seconds) if room else None
        why = f"its {format_bytes(one.size)} on the card were needed there"
        if how not in ("going", "suspended"):
            text = f"it could not be taken off its card: {how}"
            requests.append(Request(verb="evict", workload=id_, law=LAW, reason="CardMemory", message=text))
        elif card.at_seconds - one.at > bounds.most_suspended_seconds:
            text = f"{why}, and have been for {format_duration(card.at_seconds - one.at)}: elsewhere there is room"
            requests.append(Request(verb="evict", workload=id_, law=LAW, reason="Starved", message=text))
        elif since is not None and (not shared or card.at_seconds - since >= ROOM_SECONDS):
            continue  # it comes back
        kept[id_] = Suspended(one.size, one.at, since)
        requests.append(Request(verb="suspend", workload=id_, law=LAW, reason="CardMemory", message=why))
    return msgspec.structs.replace(state, suspended=kept), requests


def _limits(
    card: Card, services: list[Workload], jobs: list[Workload], state: CardMemory, reserve_bytes: int
) -> list[MemoryLimit]:
    """What services used at most is kept for them, and batch has what is left of the card.

    In whole steps, so that they seldom change: up for services, down for batch.
    """
    if not services or not jobs or card.memory_bytes is None or card.mig or card.virtual:
        return []
    peaks = {w.id: -(-state.peaks.get(w.id, (0.0, 0))[1] // LIMIT_STEP) * LIMIT_STEP for w in services}
    has = {w.id: card.users[w.id].memory_bytes or 0 for w in jobs}
    left = card.memory_bytes - sum(peaks.values()) - reserve_bytes
    limits = [MemoryLimit(card=card.uuid, workload=id_, soft_bytes=peak) for id_, peak in peaks.items() if peak]
    for job in jobs:
        others = sum(max(has[w.id], w.gpu_memory_bytes or 0) for w in jobs if w is not job)
        most = max(left - others, 0) // LIMIT_STEP * LIMIT_STEP
        if job.gpu_memory_bytes is not None:
            most = min(most, job.gpu_memory_bytes)
        most = max(most, -(-has[job.id] // LIMIT_STEP) * LIMIT_STEP)  # what it has is not taken away by a limit
        limits.append(MemoryLimit(card=card.uuid, workload=job.id, hard_bytes=most))
    return limits


def _here(card: Card, services: list[Workload], jobs: list[Workload], state: CardMemory, bounds: Bounds) -> Guarded:
    reserve_bytes = bounds.reserve_bytes
    total, used = card.memory_bytes, card.memory_used_bytes
    divided = card.mig or card.virtual  # what is free of the whole is nobody's
    if total is None or used is None or divided or not services or not jobs or card.at_seconds <= state.at:
        kept = state if services and jobs else CardMemory(suspended=state.suspended)
        return Guarded(
            kept, None, [_stop(w, "what it was stopped for is not over") for w in jobs] if kept.stopped else []
        )
    state = _look(card, services, jobs, state)
    left = total - used - reserve_bytes
    room = f"{format_bytes(max(total - used, 0))} free on the card, reserve {format_bytes(reserve_bytes)}"
    if excess := _declared_too_much(card, jobs, state, total, reserve_bytes):
        newest = max((w for w in jobs if w.gpu_memory_bytes is not None), key=lambda w: (w.started_seconds, w.id))
        return _go(state, newest, jobs, f"{newest.name} declares {excess}")
    grows = state.bytes_per_second
    reached = left / grows if grows > 0.0 else float("inf")
    if left < 0:
        touched = state.touched_at if state.touched_at is not None else card.at_seconds
        state = msgspec.structs.replace(state, stopped=True, touched_at=touched)
        if card.at_seconds - touched >= TOUCHED_SECONDS:
            return _make_room(card, state, jobs, bounds, room)
    elif reached <= LOOK_AHEAD_SECONDS:
        state = msgspec.structs.replace(state, stopped=True, touched_at=None)
        room += f", and batch grows by {format_bytes(int(grows))}/s"
    elif left >= reserve_bytes or not state.stopped:
        state = msgspec.structs.replace(state, stopped=False, stopped_at=None, touched_at=None)
        return Guarded(state, _verdict("free", "CardMemory", room), [])
    else:
        state = msgspec.structs.replace(state, touched_at=None)
    stopped_at = state.stopped_at if state.stopped_at is not None else card.at_seconds
    state = msgspec.structs.replace(state, stopped_at=stopped_at)
    if card.at_seconds - stopped_at >= STOPPED_SECONDS and bounds.can_be_suspended:
        return _make_room(card, state, jobs, bounds, room)
    return Guarded(
        state, _verdict("stopped", "CardMemory", f"{room}: batch is stopped"), [_stop(w, room) for w in jobs]
    )


def _make_room(card: Card, state: CardMemory, jobs: list[Workload], bounds: Bounds, room: str) -> Guarded:
    """The largest goes, into the host's memory if that may be."""
    largest = max(jobs, key=lambda w: (card.users[w.id].memory_bytes or 0, w.id))
    why = f"{room}: {largest.name} holds most of batch"
    if largest.id not in bounds.can_be_suspended:
        return _go(state, largest, jobs, why)
    size = card.users[largest.id].memory_bytes or 0
    away = {**state.suspended, largest.id: Suspended(size, card.at_seconds)}
    state = msgspec.structs.replace(state, suspended=away, stopped=False, stopped_at=None, touched_at=None)
    ask = Request(verb="suspend", workload=largest.id, law=LAW, reason="CardMemory", message=why)
    others = [_stop(w, why) for w in jobs if w is not largest]
    return Guarded(state, _verdict("suspending", "CardMemory", why), [ask, *others])


def _look(card: Card, services: list[Workload], jobs: list[Workload], state: CardMemory) -> CardMemory:
    """How batch grows, and what services used at most."""
    batch = sum(card.users[w.id].memory_bytes or 0 for w in jobs)
    passed = card.at_seconds - state.at
    rate = 0.0
    if state.at and passed > 0.0:
        seen = max(batch - state.batch_bytes, 0) / passed
        weight = min(passed / RATE_SECONDS, 1.0)
        rate = max(
            seen * weight + state.bytes_per_second * (1.0 - weight), seen if seen > state.bytes_per_second else 0.0
        )
    peaks = {}
    for service in services:
        at, most = state.peaks.get(service.id, (card.at_seconds, 0))
        used = card.users[service.id].memory_bytes or 0
        fresh = used >= most or card.at_seconds - at > PEAK_SECONDS
        peaks[service.id] = (card.at_seconds, used) if fresh else (at, most)
    return msgspec.structs.replace(state, at=card.at_seconds, batch_bytes=batch, bytes_per_second=rate, peaks=peaks)


def _declared_too_much(card: Card, jobs: list[Workload], state: CardMemory, total: int, reserve_bytes: int) -> str:
    """What jobs declare beyond what there is room for beside the services' peaks, in words; empty if it fits."""
    declared = {w.id: w.gpu_memory_bytes for w in jobs if w.gpu_memory_bytes is not None}
    if not declared:
        return ""
    used = {w.id: card.users[w.id].memory_bytes or 0 for w in jobs}
    batch = sum(max(declared.get(id_, 0), used[id_]) for id_ in used)
    peak = sum(most for _, most in state.peaks.values())
    if batch + peak + reserve_bytes <= total:
        return ""
    together = "" if len(jobs) == 1 else f", {format_bytes(batch)} with the others"
    last = max((w for w in jobs if w.id in declared), key=lambda w: (w.started_seconds, w.id))
    return (
        f"{format_bytes(declared[last.id])}{together}, the services used up to {format_bytes(peak)}, the reserve is "
        f"{format_bytes(reserve_bytes)}: more than the card's {format_bytes(total)}"
    )


def _verdict(state: str, reason: str, message: str) -> Verdict:
    return Verdict(law=LAW, state=state, reason=reason, message=message)


def _stop(job: Workload, why: str) -> Request:
    return Request(verb="freeze", workload=job.id, law=LAW, reason="CardMemory", message=why)


def _go(state: CardMemory, leaver: Workload, jobs: list[Workload], why: str) -> Guarded:
    """One goes, and the others stand still meanwhile."""
    evict = Request(verb="evict", workload=leaver.id, law=LAW, reason="CardMemory", message=why)
    stop = [_stop(w, why) for w in jobs if w.id != leaver.id]
    return Guarded(state, _verdict("evicting", "CardMemory", why), [evict, *stop])
