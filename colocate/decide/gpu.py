"""The law of one card: how batch may use a GPU on which services run, by what the services feel.

    open    batch runs; nothing is written
    gate    batch runs while the services are idle: it is stopped when one begins, and let go `hold_off` after the last
    dial    batch runs for a share of every period, whatever the services do: for services whose requests last longer
    off     batch is stopped

Which one protects is a matter of the drain: what a stopped job has launched runs on. A gate costs a request at most
reaction + drain + a time slice, a dial the share and the drain of each period, and where neither fits within the room
between the service's own p99 and its target, the law says so (`CannotProtect`) and keeps the job off.

A violation is a count: k of n requests beyond the target, against what chance allows of one in a hundred (binomial).
A plain p99 of a window cries with no batch at all. Requests that wait behind each other are late together, so of one
reading only some are counted (declustering, as for extremes: Coles, 2001, 5.3), unless most of many are late.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import lt
from typing import Literal

import msgspec

from colocate.model.gpu import Drains, Slowdown, learn, queueing, stretch
from colocate.model.slack import beyond_target, quantile_of
from colocate.model.special import binomial_bound
from colocate.plan import Verdict
from colocate.units import format_duration

LAW = "gpu"
Mode = Literal["open", "gate", "dial", "off"]
SOFT, HARD = 0.95, 0.9999
ALLOWED = 0.01
"""The share of requests that may be beyond a p99 target."""
LEAST_REQUESTS, OPEN_REQUESTS = 100, 400
"""Fewer say little; and where all was predicted to have room, so many at least are the measure of a violation."""
MOST_OF_A_READING, MOST_OF_A_READING_RATIO = 3.0, 0.03
"""Of the requests beyond the target in one reading so many are counted: this, or this share of all; ..."""
FLAGRANT, FLAGRANT_RATIO = 20.0, 0.5
"""... all of them where it is so many, and this share."""
ALONE_REQUESTS = 2000.0
"""What is known of the service alone is of about so many of its last requests."""
FIRST_HOLD_SECONDS, MOST_HOLD_SECONDS = 10.0, 300.0
LEAST_PERIOD_SECONDS, MOST_PERIOD_SECONDS = 0.1, 1.0
LEAST_HOLD_OFF_SECONDS, MOST_HOLD_OFF_SECONDS = 0.002, 10.0
PROBATION_SHARE = 0.05
MARGIN = 1.25
"""Of a gate's cost, to begin with it; it is kept until the cost itself no longer fits."""
HOLD_AFTER_SECONDS, CLOSE_AFTER_SECONDS = 3.0, 10.0
"""Readings older than this: nothing grows; and nothing is open."""
REQUEST_PERIODS = 5.0
"""A dial is for requests that last at least so many periods: each of them then feels the share, and no more."""
ROOM = 0.2
"""The share of the target that must be left for more."""


class ServiceSeen(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One service of the card: its cumulative histogram, as of `read_at`."""

    id: str
    name: str
    target_seconds: float
    window_seconds: float = 10.0
    bounds_seconds: tuple[float, ...] = ()
    counts: tuple[float, ...] = ()
    """Cumulative, the last one is +Inf."""
    read_at: float = 0.0


class JobSeen(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One batch job of the card, and for how long it went on each time it was stopped."""

    id: str
    name: str
    drains: Drains = Drains()


class CardSeen(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One card at one tick."""

    uuid: str
    now: float
    services: tuple[ServiceSeen, ...] = ()
    jobs: tuple[JobSeen, ...] = ()
    sensor: str = ""
    """By what the services are seen to be idle within milliseconds; empty: by nothing."""
    reaction_seconds: float = 0.005
    """From the sensor to the stop, its 95th percentile."""
    slice_seconds: float = 0.0022
    """A time slice and a switch."""


class ServiceState(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is remembered of a service."""

    last: tuple[float, ...] = ()
    read_at: float = 0.0
    alone: tuple[float, ...] = ()
    """Requests per bucket, cumulative, while nothing of ours ran; old ones count less."""
    alone_seconds: float = 0.0
    """In how much time, old time counting less."""
    late: float = 0.0
    """Requests beyond the target, as they are counted, since it is known."""
    window: tuple[tuple[float, tuple[float, ...], float], ...] = ()
    """Readings since the last change, and `late` then; the newest last."""


class CardState(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What the law remembers of a card. Times are monotonic seconds."""

    mode: Mode = "open"
    share: float = 1.0
    hold_off: float = 0.0
    period: float = MOST_PERIOD_SECONDS
    """Of the dial, seconds."""
    changed_at: float = float("-inf")
    off_at: float | None = None
    """Since when batch has been stopped for good; None while it may run."""
    hold_seconds: float = FIRST_HOLD_SECONDS
    held_until: float = float("-inf")
    not_open_until: float = float("-inf")
    violated: bool = False
    """Whether a service is, or was when it was last looked at: nothing is learnt of what it is alone."""
    not_ours: bool = False
    jobs: tuple[str, ...] = ()
    slowdown: Slowdown = Slowdown()
    services: dict[str, ServiceState] = {}


class CardDecision(msgspec.Struct, frozen=True, kw_only=True):
    """What the law wants of a card until its next tick."""

    state: CardState
    verdict: Verdict
    period_seconds: float = 0.0
    """Of the dial."""
    on_seconds: float = 0.0
    """For how long of it batch is let go; its drain comes to that."""


class Felt(msgspec.Struct, frozen=True, kw_only=True):
    """What one service felt since the last change, and what it is alone."""

    seen: ServiceSeen
    requests: float = 0.0
    over: float = 0.0
    p50: float | None = None
    p99: float | None = None
    alone_p50: float | None = None
    alone_p99: float | None = None
    alone_busy: float = 0.0
    """The share of the time in which it works, alone: requests in a second times their median."""

    def hard(self, mode: Mode) -> bool:
        """Whether it is violated beyond what chance allows once in ten thousand windows."""
        trials = max(int(self.requests), OPEN_REQUESTS if mode == "open" else LEAST_REQUESTS)
        return self.over > binomial_bound(trials, ALLOWED, HARD)

    @property
    def soft(self) -> bool:
        """The same, once in twenty; of too few requests nothing so slight is known."""
        return self.requests >= LEAST_REQUESTS and self.over > binomial_bound(int(self.requests), ALLOWED, SOFT)

    @property
    def slack(self) -> float | None:
        """(target - p99) / target; None of too few requests."""
        if self.p99 is None or self.requests < LEAST_REQUESTS:
            return None
        return (self.seen.target_seconds - self.p99) / self.seen.target_seconds

    @property
    def headroom(self) -> float | None:
        """Between its p99 alone and its target, seconds."""
        return self.seen.target_seconds - self.alone_p99 if self.alone_p99 is not None else None


def decide_card(card: CardSeen, state: CardState) -> CardDecision:
    """One tick of one card. Pure."""
    jobs = tuple(job.id for job in card.jobs)
    if jobs != state.jobs:  # what was felt beside others says nothing of these
        state = msgspec.structs.replace(state, jobs=jobs, changed_at=card.now)
    state, felt = _listen(card, state)
    if not card.jobs or not card.services:
        nobody = "no batch job is on this card" if not card.jobs else "no service is on this card"
        return _decision(card, _turn(card, state, "open"), "NothingShared", nobody)
    drain = max(job.drains.bound(card.now) for job in card.jobs)
    if any(f.headroom is None for f in felt):
        missing = next(f.seen.name for f in felt if f.headroom is None)
        text = f"{missing} alone is not known yet: batch is off until it has answered {LEAST_REQUESTS} requests"
        return _decision(card, _turn(card, state, "off"), "Learning", text)
    stale = card.now - min(seen.read_at for seen in card.services)
    if stale > HOLD_AFTER_SECONDS:
        return _stale(card, state, drain, stale)
    state = _learn(card, state, felt, drain)
    hard, soft = [f for f in felt if f.hard(state.mode)], [f for f in felt if f.soft]
    if hard:
        return _violated(card, state, hard[0], drain)
    if state.not_ours and not soft and all(f.requests >= LEAST_REQUESTS for f in felt):
        state = msgspec.structs.replace(state, not_ours=False, hold_seconds=FIRST_HOLD_SECONDS)
    if state.not_ours:
        return _decision(card, state, "NotOurs", "a service is past its target whatever batch does: it is on probation")
    if card.now < state.held_until:
        left = format_duration(state.held_until - card.now)
        return _decision(card, state, "HeldDown", f"batch was stopped for a violation; it is tried again in {left}")
    state = msgspec.structs.replace(state, violated=False)
    return _choose(card, state, felt, drain, soft=bool(soft))


def _listen(card: CardSeen, state: CardState) -> tuple[CardState, list[Felt]]:
    """What each service felt: alone, if nothing of ours ran; and since the last change."""
    drain = max((job.drains.bound(card.now) for job in card.jobs), default=0.0)
    services, felt = {}, []
    for seen in card.services:
        known = state.services.get(seen.id, ServiceState())
        fresh = bool(seen.counts) and seen.read_at > known.read_at
        if fresh and (len(known.last) != len(seen.counts) or any(map(lt, seen.counts, known.last))):
            first = ServiceState(last=seen.counts, read_at=seen.read_at, window=((seen.read_at, seen.counts, 0.0),))
            if len(known.alone) == len(seen.counts):  # it has started anew: what it is alone it was before
                first = msgspec.structs.replace(first, alone=known.alone, alone_seconds=known.alone_seconds)
            known = first
        elif fresh:
            stopped = state.off_at is not None and known.read_at >= state.off_at + drain
            quiet = not card.jobs or (stopped and not state.violated)
            known = _heard(known, seen, state.changed_at, quiet=quiet)
        services[seen.id] = known
        felt.append(_felt(seen, known, state.changed_at))
    return msgspec.structs.replace(state, services=services), felt


def _heard(known: ServiceState, seen: ServiceSeen, changed_at: float, *, quiet: bool) -> ServiceState:
    new = [a - b for a, b in zip(seen.counts, known.last, strict=True)]
    alone, seconds = known.alone, known.alone_seconds
    if quiet:
        alone = alone or (0.0,) * len(new)
        left = 1.0 - min(new[-1] / ALONE_REQUESTS, 1.0)
        alone = tuple(left * a + n for a, n in zip(alone, new, strict=True))
        seconds = left * seconds + seen.read_at - known.read_at
    beyond = beyond_target(seen.bounds_seconds, new, seen.target_seconds)
    most = max(MOST_OF_A_READING, MOST_OF_A_READING_RATIO * new[-1])
    late = known.late + (beyond if beyond >= max(FLAGRANT, FLAGRANT_RATIO * new[-1]) else min(beyond, most))
    window = [*(w for w in known.window if w[0] >= changed_at), (seen.read_at, seen.counts, late)]
    while len(window) > 2 and seen.read_at - window[1][0] >= seen.window_seconds:
        if seen.counts[-1] - window[1][1][-1] < LEAST_REQUESTS:
            break  # so few requests say nothing: a longer window does
        del window[0]
    return ServiceState(seen.counts, seen.read_at, alone, seconds, late, tuple(window))


def _felt(seen: ServiceSeen, known: ServiceState, changed_at: float) -> Felt:
    def quantile(cumulative: Sequence[float], q: float, least: int) -> float | None:
        if not cumulative or cumulative[-1] < least:
            return None
        each = [a - b for a, b in zip(cumulative, [0.0, *cumulative[:-1]], strict=True)]
        return quantile_of(seen.bounds_seconds, each, q)

    since: tuple[float, ...] = ()
    window = [reading for reading in known.window if reading[0] >= changed_at]
    if len(window) > 1:
        since = tuple(a - b for a, b in zip(window[-1][1], window[0][1], strict=True))
    alone_p50 = quantile(known.alone, 0.5, LEAST_REQUESTS)
    rate = known.alone[-1] / known.alone_seconds if known.alone and known.alone_seconds > 0.0 else 0.0
    return Felt(
        seen=seen,
        requests=since[-1] if since else 0.0,
        over=window[-1][2] - window[0][2] if since else 0.0,
        p50=quantile(since, 0.5, 1),
        p99=quantile(since, 0.99, LEAST_REQUESTS),
        alone_p50=alone_p50,
        alone_p99=quantile(known.alone, 0.99, LEAST_REQUESTS),
        alone_busy=min(rate * (alone_p50 or 0.0), 0.95),
    )


def _learn(card: CardSeen, state: CardState, felt: list[Felt], drain: float) -> CardState:
    """sigma, by the service that is asked most, once enough of its requests have come since the last change."""
    most = max(felt, key=lambda f: f.requests)
    if (
        state.mode not in ("open", "dial")
        or most.requests < LEAST_REQUESTS
        or most.p50 is None
        or most.alone_p50 is None
    ):
        return state
    share = 1.0 if state.mode == "open" else min(state.share + drain / period_of(card, felt, drain), 1.0)
    return msgspec.structs.replace(state, slowdown=learn(state.slowdown, share, most.alone_p50, most.p50))


def _stale(card: CardSeen, state: CardState, drain: float, seconds: float) -> CardDecision:
    """Nothing grows. Unlike CPU, batch is not let go for that: an exporter that is gone while requests still come is
    common when a service starts anew, and on a card its requests would all meet batch.
    """
    said = f"the services' latency was read last {format_duration(seconds)} ago"
    if seconds > CLOSE_AFTER_SECONDS and state.mode in ("open", "dial"):
        mode: Mode = "gate" if card.sensor and state.mode == "open" else "off"
        state = _turn(card, state, mode, hold_off=max(state.hold_off, 0.02))
    return _decision(card, state, "StaleReadings", said, drain)


def period_of(card: CardSeen, felt: Sequence[Felt], drain: float) -> float:
    """The dial's period, seconds: long against what goes on after a stop, short against every service's requests."""
    longest = min((f.alone_p50 or 0.0 for f in felt), default=0.0) / REQUEST_PERIODS
    return min(max(10.0 * (drain + card.reaction_seconds), LEAST_PERIOD_SECONDS), longest, MOST_PERIOD_SECONDS)


def _violated(card: CardSeen, state: CardState, felt: Felt, drain: float) -> CardDecision:
    state = msgspec.structs.replace(state, violated=True)
    text = f"{felt.seen.name}: {felt.over:.0f} of {felt.requests:.0f} requests beyond {_ms(felt.seen.target_seconds)}"
    if state.mode != "off":
        if state.not_ours:  # on probation: it is as it was without us
            return _decision(card, state, "NotOurs", f"{text}, as before without batch")
        held = card.now + state.hold_seconds
        doubled = min(2.0 * state.hold_seconds, MOST_HOLD_SECONDS)
        if state.mode == "open":
            state = msgspec.structs.replace(state, not_open_until=card.now + MOST_HOLD_SECONDS)
        state = _turn(card, state, "off", held_until=held, hold_seconds=doubled)
        return _decision(card, state, "Violated", text)
    off_for = card.now - (state.off_at if state.off_at is not None else card.now)
    if off_for < drain + felt.seen.window_seconds:
        return _decision(card, state, "Violated", text)
    before = max(state.hold_seconds / 2.0, FIRST_HOLD_SECONDS)
    state = msgspec.structs.replace(state, not_ours=True, hold_seconds=before, held_until=float("-inf"))
    mode: Mode = "gate" if card.sensor else "dial"
    state = _turn(card, state, mode, share=PROBATION_SHARE, hold_off=max(felt.alone_p50 or 0.0, 0.01))
    why = f"{text}, {format_duration(off_for)} after batch was stopped: batch is let go on probation"
    return _decision(card, state, "NotOurs", why, drain)


def _choose(card: CardSeen, state: CardState, felt: list[Felt], drain: float, *, soft: bool) -> CardDecision:
    """The most open mode that protects, and how much of it."""
    tight = min(felt, key=lambda f: f.headroom or 0.0)
    room, cost = tight.headroom or 0.0, card.reaction_seconds + drain + card.slice_seconds
    if card.now >= state.not_open_until and all(_fits_open(f, state) for f in felt):
        return _decision(
            card, _turn(card, state, "open"), "Open", f"{tight.seen.name} has room for all that batch does"
        )
    margin = 1.0 if state.mode == "gate" else MARGIN
    if card.sensor and room >= margin * cost:
        return _gate(card, state, felt, soft=soft)
    period = period_of(card, felt, drain)
    cap = min(_cap(f, state, drain, period) for f in felt) if LEAST_PERIOD_SECONDS <= period >= 4.0 * drain else 0.0
    if cap > 0.0:
        return _dial(card, state, felt, drain, cap, period, soft=soft)
    unknown = next((job.name for job in card.jobs if not job.drains.samples), "")
    if unknown:
        text = f"how long {unknown} goes on when it is stopped is not known yet: it is stopped once"
        return _decision(card, _turn(card, state, "off"), "Learning", text)
    text = f"drain {_ms(drain)}, headroom {_ms(room)} of {tight.seen.name}"
    if not card.sensor:
        text += ", and nothing shows within milliseconds that it is idle"
    return _decision(card, _turn(card, state, "off"), "CannotProtect", text, drain)


def _fits_open(felt: Felt, state: CardState) -> bool:
    """Whether batch may run all the time: as predicted, and where it does, until there is a clear violation."""
    target = felt.seen.target_seconds
    if state.mode == "open" and felt.requests >= LEAST_REQUESTS:
        return True
    longer = stretch(state.slowdown.sigma, 1.0)
    predicted = (felt.alone_p99 or target) * longer * queueing(felt.alone_busy, longer)
    return predicted <= (1.0 - (ROOM / 2.0 if state.mode == "open" else ROOM)) * target


def _gate(card: CardSeen, state: CardState, felt: list[Felt], *, soft: bool) -> CardDecision:
    first = max(0.005, min(f.alone_p50 or 0.0 for f in felt) / 2.0)
    slacks = [f.slack for f in felt]
    hold_off = state.hold_off if state.mode == "gate" else first
    if soft:
        hold_off = min(4.0 * hold_off, MOST_HOLD_OFF_SECONDS)
    elif all(s is not None and s > ROOM for s in slacks):
        hold_off = max(0.8 * hold_off, LEAST_HOLD_OFF_SECONDS)
    text = f"batch runs while services are idle, {_ms(hold_off)} after the last request, by their {card.sensor}"
    return _decision(card, _turn(card, state, "gate", hold_off=hold_off), "Gate", text)


def _cap(felt: Felt, state: CardState, drain: float, period: float) -> float:
    """The largest share with which a service keeps its target, by what its share costs."""
    target, alone = 0.9 * felt.seen.target_seconds, felt.alone_p99 or felt.seen.target_seconds
    low, high = 0.0, 1.0  # the largest share by bisection: what it feels grows with it
    for _ in range(30):
        share = (low + high) / 2.0
        longer = stretch(state.slowdown.sigma, share)
        fits = alone * longer * queueing(felt.alone_busy, longer) <= target
        low, high = (share, high) if fits else (low, share)
    return max(low - drain / period, 0.0)


def _dial(
    card: CardSeen, state: CardState, felt: list[Felt], drain: float, cap: float, period: float, *, soft: bool
) -> CardDecision:
    slacks = [f.slack for f in felt]
    known = [s for s in slacks if s is not None]
    share = state.share if state.mode == "dial" else cap
    if soft or (known and min(known) < ROOM / 2.0):
        share *= 0.8
    elif len(known) == len(slacks) and min(known) > ROOM and state.mode == "dial":
        share += 0.05
    share = min(share, cap)
    text = f"batch has {share:.0%} of the card, at most {cap:.0%} by what its share costs"
    return _decision(card, _turn(card, state, "dial", share=share, period=period), "Dial", text, drain)


def _turn(card: CardSeen, state: CardState, mode: Mode, **changes: float) -> CardState:
    """To a mode: what is felt from now on is of that."""
    knobs = {"share": {"open": 1.0, "off": 0.0}.get(mode, state.share), "hold_off": state.hold_off} | changes
    same = mode == state.mode and abs(knobs["share"] - state.share) < 0.01 and knobs["hold_off"] == state.hold_off
    off_at = (state.off_at if state.off_at is not None else card.now) if mode == "off" else None
    changed_at = state.changed_at if same else card.now
    return msgspec.structs.replace(state, mode=mode, off_at=off_at, changed_at=changed_at, **knobs)


def _decision(card: CardSeen, state: CardState, reason: str, message: str, drain: float | None = None) -> CardDecision:
    floor = card.reaction_seconds + (drain or 0.0) + card.slice_seconds
    numbers = {"share": round(state.share, 4), "hold_off_seconds": round(state.hold_off, 4)}
    numbers |= {"sigma": round(state.slowdown.sigma, 4), "prediction_error": round(state.slowdown.error, 4)}
    if drain is not None:
        numbers |= {"drain_seconds": round(drain, 4), "floor_seconds": round(floor, 4)}
    verdict = Verdict(law=LAW, state=state.mode, reason=reason, message=message, numbers=numbers)
    if state.mode != "dial":
        return CardDecision(state=state, verdict=verdict)
    on = state.share * state.period
    return CardDecision(state=state, verdict=verdict, period_seconds=state.period, on_seconds=on)


def _ms(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1.0 else f"{seconds * 1e3:.3g} ms"
