"""The law of one card: how batch may use a GPU on which services run, by what the services feel.

    open    batch runs; nothing is written
    gate    batch runs while the services are idle: it is stopped when one begins, and let go `hold_off` after the last
    dial    batch runs for a share of every period, whatever the services do: for services whose requests last longer
    probe   batch runs for moments in which no service is busy, to see for how long it goes on when it is stopped
    off     batch is stopped

Which one protects is a matter of the drain: what a stopped job has launched runs on. A gate costs a request at most
reaction + drain + a time slice, a dial the share and the drain of each period, and where neither fits within the room
between the service's own p99 and its target, the law says so (`CannotProtect`) and keeps the job off.

A violation is a count: k of n requests beyond the target, against what chance allows of one in a hundred (binomial).
A plain p99 of a window cries with no batch at all. Requests that wait behind each other are late together, so of one
reading only some are counted (declustering, as for extremes: Coles, 2001, 5.3), unless most of many are late.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import lt
from typing import Literal

import msgspec

from colocate.model.gpu import UNKNOWN_DRAIN_SECONDS, Drains, Slowdown, learn, queueing, stretch
from colocate.model.slack import beyond_target, quantile_of
from colocate.model.special import binomial_bound
from colocate.plan import Verdict
from colocate.units import format_duration

LAW = "gpu"
Mode = Literal["open", "gate", "dial", "probe", "off"]
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
DOUBTFUL_ROOMS = 4.0
WORTH = 1.2
"""By so much more must another mode leave for batch."""
QUEUES_RATIO = 1.3
"""Requests of which the slowest take less than so many times the median do not wait for each other: they are worked at
together."""
SEES_RATIO = 0.5
"""A sensor that sees less of the time in which a service works is not believed."""
LEAST_PROBE_HOLD_OFF_SECONDS, MOST_PROBE_HOLD_OFF_SECONDS = 0.01, 0.1
DEFAULT_MODES = ("open", "gate", "dial")
LEAST_DRAINS = 5
"""So often is a job stopped to see for how long it goes on, before that is taken as known."""
MOST_LOOKS = 24
"""So often where most looks would let it run and one in twenty would not: one look may have been mistaken."""
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
    sensor_busy: float | None = None
    """The share of the time in which the sensor saw it work."""


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
    sensor_problem: str = ""
    """Why by nothing."""
    sensing: bool = False
    """Whether that is still being found out."""
    counted: bool = True
    """Whether the card has counters by which a drain can be seen."""
    stopped: bool = True
    """Whether all jobs are read to be stopped: one that is on its way out runs."""
    gap: bool = False
    """Nobody looked for a while, and batch may have run."""
    modes: tuple[str, ...] = DEFAULT_MODES
    """Those that the policy allows."""
    reaction_seconds: float = 0.005
    """From the sensor to the stop, its 95th percentile."""
    slice_seconds: float = 0.0022
    """A time slice and a switch."""


class ServiceState(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What is remembered of a service."""

    bounds: tuple[float, ...] = ()
    target: float = 0.0
    """What its counts are of: with others they mean something else."""
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
    changed_at: float = 0.0
    off_at: float | None = None
    """Since when batch has been stopped for good; None while it may run."""
    ran_at: float | None = None
    """When batch could run last: what services felt until its drain was over is not theirs alone."""
    hold_seconds: float = FIRST_HOLD_SECONDS
    held_until: float = 0.0
    not_open_until: float = 0.0
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
    sensed: bool = True
    """Whether something shows within milliseconds that services are idle."""


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

    queues: bool = True
    """Whether its requests wait for each other, as of one that answers one after the other; one that works at several
    at once does not make them wait longer by being slower."""

    def longer(self, sigma: float, share: float) -> float:
        """By how much its requests take longer beside this share of batch."""
        slower = stretch(sigma, share)
        return slower * queueing(self.alone_busy, slower) if self.queues else slower

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
    replace = msgspec.structs.replace
    if card.gap:
        forgotten = {id_: _alone_of(known) for id_, known in state.services.items()}
        state = replace(state, services=forgotten, changed_at=card.now, ran_at=card.now)
    if jobs != state.jobs:  # what was felt beside others says nothing of these
        state = replace(state, jobs=jobs, changed_at=card.now, not_ours=False, violated=False)
    if jobs and (state.mode != "off" or not card.stopped):
        state = replace(state, ran_at=card.now, off_at=card.now if state.mode == "off" else None)
    state, felt = _listen(card, state)
    card = _believed(card, felt)
    if not card.jobs or not card.services:
        nobody = "no batch job is on this card" if not card.jobs else "no service is on this card"
        return _decision(card, _turn(card, state, "open"), "NothingShared", nobody)
    drain = max(job.drains.bound() for job in card.jobs)
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
    if state.not_ours and state.mode in ("gate", "dial"):
        return _decision(card, state, "NotOurs", "a service is past its target whatever batch does: it is on probation")
    if card.now < state.held_until:
        left = format_duration(state.held_until - card.now)
        said = f"batch was stopped for a violation; it is tried again in {left}"
        return _decision(card, _turn(card, state, "off"), "HeldDown", said)
    state = msgspec.structs.replace(state, violated=False)
    return _choose(card, state, felt, drain, soft=bool(soft))


def _believed(card: CardSeen, felt: list[Felt]) -> CardSeen:
    """The same, without a sensor that misses much of the time in which a service works: its waits for the card, say."""
    for f in felt:
        busy = f.seen.sensor_busy
        if card.sensor and f.alone_p50 is not None and busy is not None and busy < SEES_RATIO * f.alone_busy:
            why = (
                f"{f.seen.name}: its {card.sensor} shows work in {busy:.0%} of the time, its latency {f.alone_busy:.0%}"
            )
            why += ": name a gauge of its requests in slo.gauges"
            return msgspec.structs.replace(card, sensor="", sensor_problem=why)
    return card


def _listen(card: CardSeen, state: CardState) -> tuple[CardState, list[Felt]]:
    """What each service felt: alone, if nothing of ours ran; and since the last change."""
    drain = max((job.drains.bound() for job in card.jobs), default=UNKNOWN_DRAIN_SECONDS)
    services, felt = {}, []
    for seen in card.services:
        known = state.services.get(seen.id, ServiceState())
        fresh = bool(seen.counts) and seen.read_at > known.read_at
        if known.last and (known.bounds, known.target) != (seen.bounds_seconds, seen.target_seconds):
            known = _alone_of(known) if known.bounds == seen.bounds_seconds else ServiceState()
        if fresh and (len(known.last) != len(seen.counts) or any(map(lt, seen.counts, known.last))):
            first = ServiceState(
                bounds=seen.bounds_seconds,
                target=seen.target_seconds,
                last=seen.counts,
                read_at=seen.read_at,
                window=((seen.read_at, seen.counts, 0.0),),
            )
            if len(known.alone) == len(seen.counts):  # it has started anew: what it is alone it was before
                first = msgspec.structs.replace(first, alone=known.alone, alone_seconds=known.alone_seconds)
            known = first
        elif fresh:
            since = state.ran_at + drain if state.ran_at is not None else None
            quiet = (since is None or known.read_at >= since) and not (card.jobs and state.violated)
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
    return msgspec.structs.replace(
        known,
        last=seen.counts,
        read_at=seen.read_at,
        alone=alone,
        alone_seconds=seconds,
        late=late,
        window=tuple(window),
    )


def _alone_of(known: ServiceState) -> ServiceState:
    """What it is alone; whatever else is known of it counts no more."""
    return ServiceState(bounds=known.bounds, alone=known.alone, alone_seconds=known.alone_seconds)


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
    alone_p50, alone_p99 = (quantile(known.alone, q, LEAST_REQUESTS) for q in (0.5, 0.99))
    rate = known.alone[-1] / known.alone_seconds if known.alone and known.alone_seconds > 0.0 else 0.0
    return Felt(
        seen=seen,
        requests=since[-1] if since else 0.0,
        over=window[-1][2] - window[0][2] if since else 0.0,
        p50=quantile(since, 0.5, 1),
        p99=quantile(since, 0.99, LEAST_REQUESTS),
        alone_p50=alone_p50,
        alone_p99=alone_p99,
        alone_busy=min(rate * (alone_p50 or 0.0), 0.95),
        queues=alone_p50 is None or alone_p99 is None or alone_p99 > QUEUES_RATIO * alone_p50,
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
    mode: Mode = "gate" if card.sensor and "gate" in card.modes else "dial"
    if mode not in card.modes:
        return _decision(card, state, "Violated", text)
    state = msgspec.structs.replace(state, not_ours=True, hold_seconds=before, held_until=0.0)
    hold_off, period = max(felt.alone_p50 or 0.0, 0.01), max(10.0 * (drain + card.reaction_seconds), state.period)
    state = _turn(card, state, mode, share=PROBATION_SHARE, hold_off=hold_off, period=period)
    why = f"{text}, {format_duration(off_for)} after batch was stopped: batch is let go on probation"
    return _decision(card, state, "NotOurs", why, drain)


def _choose(card: CardSeen, state: CardState, felt: list[Felt], drain: float, *, soft: bool) -> CardDecision:
    """The most open mode that protects, and how much of it."""
    tight = min(felt, key=lambda f: f.headroom or 0.0)
    room = tight.headroom or 0.0
    allowed = "open" in card.modes and card.now >= state.not_open_until
    if allowed and all(_fits_open(f, state) for f in felt):
        return _decision(
            card, _turn(card, state, "open"), "Open", f"{tight.seen.name} has room for all that batch does"
        )
    seen = min((len(job.drains.samples) for job in card.jobs), default=0)
    known = max((job.drains.bound() for job in card.jobs if job.drains.samples), default=0.0)
    mode, cap, period = _mode(card, state, felt, drain if seen else known)  # the best that it can be
    doubtful = seen == 1 and drain < DOUBTFUL_ROOMS * room  # one look alone may be mistaken
    looks = LEAST_DRAINS
    if mode == "off" and seen > 1:  # so may one of few
        usual = max(job.drains.bound(0.5) for job in card.jobs)
        doubtful, looks = _mode(card, state, felt, usual)[0] != "off", MOST_LOOKS
    sees = card.counted and (
        bool(card.sensor) or mode == "dial"
    )  # without a sensor moments are chosen blindly, and judged afterwards
    if (mode != "off" or doubtful) and seen < looks and sees and not card.sensing:
        job = min(card.jobs, key=lambda j: len(j.drains.samples))
        text = f"how long {job.name} goes on when it is stopped is being seen: it runs for moments between requests"
        longest = max(f.alone_p50 or 0.0 for f in felt)
        hold_off = min(max(LEAST_PROBE_HOLD_OFF_SECONDS, longest / 2.0), MOST_PROBE_HOLD_OFF_SECONDS)
        return _decision(card, _turn(card, state, "probe", hold_off=hold_off), "Learning", text)
    if not seen:  # a second is taken for granted
        mode, cap, period = _mode(card, state, felt, drain)
    if mode == "gate":
        return _gate(card, state, felt, soft=soft)
    if mode == "dial":
        return _dial(card, state, felt, drain, cap, period, soft=soft)
    if card.sensing:
        text = (
            f"by what services are seen to be idle is being found out ({card.sensor_problem}): batch is off until then"
        )
        return _decision(card, _turn(card, state, "off"), "Learning", text)
    text = f"drain {_ms(drain)}, headroom {_ms(room)} of {tight.seen.name}"
    if not card.sensor:
        text += f", and nothing shows within milliseconds that it is idle ({card.sensor_problem})"
    if len(card.modes) < len(DEFAULT_MODES):
        text += f"; the policy allows {', '.join(card.modes) or 'no mode'}"
    return _decision(card, _turn(card, state, "off"), "CannotProtect", text, drain)


def _mode(card: CardSeen, state: CardState, felt: list[Felt], drain: float) -> tuple[Mode, float, float]:
    """What protects with this drain: gate, dial or off; and of the dial the largest share and the period."""
    room = min(f.headroom or 0.0 for f in felt)
    margin = 1.0 if state.mode == "gate" else MARGIN
    gates = room >= margin * (card.reaction_seconds + drain + card.slice_seconds)
    gates = gates and bool(card.sensor) and "gate" in card.modes
    period = period_of(card, felt, drain)
    cap = min(_cap(f, state, drain, period) for f in felt) if LEAST_PERIOD_SECONDS <= period >= 4.0 * drain else 0.0
    dials = cap > 0.0 and "dial" in card.modes
    if gates and dials:  # both protect: whichever leaves batch more, and a change must be worth it
        idle = math.prod(1.0 - (f.seen.sensor_busy if f.seen.sensor_busy is not None else f.alone_busy) for f in felt)
        gained = cap / max(idle, 1e-9)
        gates = gained < (WORTH if state.mode == "gate" else 1.0 / WORTH if state.mode == "dial" else 1.0)
    return ("gate" if gates else "dial" if dials else "off"), cap, period


def _fits_open(felt: Felt, state: CardState) -> bool:
    """Whether batch may run all the time: as predicted, and where it does, until there is a clear violation."""
    target = felt.seen.target_seconds
    if state.mode == "open" and felt.requests >= LEAST_REQUESTS:
        return True
    predicted = (felt.alone_p99 or target) * felt.longer(state.slowdown.sigma, 1.0)
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
        fits = alone * felt.longer(state.slowdown.sigma, share) <= target
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
    text = f"batch runs for {share:.0%} of each period, at most {cap:.0%} by what that costs"
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
    return as_decision(state, verdict, sensed=bool(card.sensor))


def as_decision(state: CardState, verdict: Verdict, *, sensed: bool) -> CardDecision:
    """What a state means until the next tick."""
    if state.mode != "dial":
        return CardDecision(state=state, verdict=verdict, sensed=sensed)
    on = state.share * state.period
    return CardDecision(state=state, verdict=verdict, period_seconds=state.period, on_seconds=on, sensed=sensed)


def _ms(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1.0 else f"{seconds * 1e3:.3g} ms"
