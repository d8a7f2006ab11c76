"""The law of all cards of a node: who shares which card, and what `gpu.py` decides for each, as requests.

A batch job alone on a card, and services among themselves, are nobody's business here. A job on two cards obeys both.
designs/0008-gpu.md.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

import msgspec

from colocate.decide.card_memory import Bounds, CardMemory, guard
from colocate.decide.gpu import (
    LAW,
    LEAST_DRAINS,
    MOST_LOOKS,
    CardDecision,
    CardSeen,
    CardState,
    JobSeen,
    ServiceSeen,
    as_decision,
    decide_card,
)
from colocate.decide.law import Decision, View
from colocate.model.gpu import Drains
from colocate.plan import MemoryLimit, Pulse, Request, Verdict
from colocate.snapshot import Card, Workload
from colocate.units import format_duration

LEAST_WINDOW_SECONDS = 10.0
"""Of an objective, on a card: what a gate costs is seldom, and a shorter one holds too few requests."""
LOST_AFTER_SECONDS = 10.0
STARVED_RATIO = 0.01
STALE_SECONDS = 30.0
"""Of so long a time one sample of what a job used says nothing."""
PREEMPTED_SECONDS = 0.01
"""What a suspended queue's running waves need to be saved, at most (a plan for an MI308X reckons with 5 ms; not
measured)."""
HOST_RESERVE_RATIO = 0.1
"""Of the host's memory, which no job is taken into."""
GAP_TICKS, GAP_SECONDS = 3.0, 1.0
UNJUDGED_HOLD_OFF_SECONDS, UNJUDGED_DRAINS = 0.05, 3
UNJUDGED_SECONDS = 0.05
"""What a request of a service without an SLO may lose to batch."""
STRICTNESS = {"off": 0, "probe": 1, "gate": 2, "dial": 3, "open": 4}


class Progress(msgspec.Struct, frozen=True, omit_defaults=True):
    """How much of its cards a held job had since a time. Monotonic seconds of the readings."""

    since: float
    until: float
    seconds: float = 0.0
    known: bool = True
    """Whether it was told all the time: of whom it was not, nothing is concluded."""


class CardsState(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is remembered of each card, by UUID, and of each held job."""

    cards: dict[str, CardState] = {}
    memory: dict[str, CardMemory] = {}
    progress: dict[str, Progress] = {}
    at: float = 0.0
    """Of the last tick."""


def decide_cards(view: View, state: CardsState) -> Decision:
    """One tick of all cards. What is known of a card that is not read just now is kept."""
    known, memory = dict(state.cards), dict(state.memory)
    verdicts: list[Verdict] = []
    also: list[Verdict] = []
    requests: list[Request] = []
    held: dict[str, list[Card]] = {}
    limits: list[MemoryLimit] = []
    for uuid, card in sorted(view.snapshot.cards.items()):
        services, jobs = _sharing(view, card)
        decision = _card(view, card, services, jobs, state)
        known[uuid] = decision.state
        verdicts.append(msgspec.structs.replace(decision.verdict, subject=uuid))
        if decision.state.mode != "open":
            requests += [_request(view, card, services, job, decision) for job in jobs]
            for job in jobs:
                held.setdefault(job.id, []).append(card)
        guarded = guard(card, services, jobs, memory.get(uuid, CardMemory()), _bounds(view, card, jobs))
        memory[uuid] = guarded.state
        requests += guarded.requests
        limits += guarded.limits
        if guarded.verdict is not None:
            also.append(msgspec.structs.replace(guarded.verdict, subject=uuid))
    requests = [r for r in requests if r.workload in view.snapshot.workloads]  # who is off a card may have ended since
    requests = [*_gangs_together(view, requests), *_refused(view)]
    progress = _progress(view, state, held)
    requests += _starved(view, progress)
    strictest = min(verdicts, key=lambda v: STRICTNESS[v.state])
    also = [*(v for v in verdicts if v is not strictest), *also]
    after = CardsState(known, memory, progress, view.now)
    return Decision(after, [], strictest, requests=requests, also=also, limits=limits)


def _sharing(view: View, card: Card) -> tuple[list[Workload], list[Workload]]:
    """Who is on it: services, and batch, those with the longest drain first."""
    there = [view.snapshot.workloads[i] for i in card.users if i in view.snapshot.workloads]
    services = [w for w in there if w.tier == "service"]

    def drain(job: Workload) -> float:
        return -Drains(card.users[job.id].drains).bound()

    return services, sorted((w for w in there if w.tier == "batch"), key=lambda w: (drain(w), w.id))


def _drains(view: View, card: Card, job: Workload) -> Drains:
    """For how long it goes on when it is stopped: as it was seen, or for a moment where it is preempted."""
    if card.preempts:
        return Drains(((view.now, PREEMPTED_SECONDS),) * LEAST_DRAINS)
    return Drains(card.users[job.id].drains)


def _held_by_driver(view: View, card: Card) -> bool:
    """Whether the driver may hold batch of this card: it is on the policy's list, and has not failed at it.

    Neither with MPS nor with MIG (CUDA driver API, 6.37).
    """
    listed = any(fnmatchcase(card.driver, pattern) for pattern in view.spec.gpu.lock_drivers)
    return listed and not (card.struck or card.mps or card.mig or card.virtual)


def _bounds(view: View, card: Card, jobs: list[Workload]) -> Bounds:
    """What the guard of a card's memory has to keep to."""
    allowed = view.spec.gpu.suspend and _held_by_driver(view, card)
    alone = [w for w in jobs if allowed and not w.gang]  # the others of a gang would wait for it without end
    can = {w.id for w in alone if _room_on_host(view, w) >= (card.users[w.id].memory_bytes or 0)}
    going = frozenset(id_ for id_ in card.suspended if id_ in view.snapshot.workloads)
    return Bounds(view.spec.gpu.memory_reserve, frozenset(can), going, view.spec.gpu.starved_after)


def _room_on_host(view: View, job: Workload) -> int:
    """Bytes that it can take into the host's memory: within its own limit, the tier's and what is available."""
    available = view.snapshot.memory_available_bytes or 0
    rooms = [available - view.snapshot.memory_bytes * HOST_RESERVE_RATIO]
    for one in (job, view.snapshot.tier):
        limit = one.knobs.get("memory.max", "max") if one is not None else "max"
        if one is not None and limit.isdigit():
            rooms.append(int(limit) - (one.memory_bytes or 0))
    return max(int(min(rooms)), 0)


def _card(view: View, card: Card, services: list[Workload], jobs: list[Workload], every: CardsState) -> CardDecision:
    now, state = view.now, every.cards.get(card.uuid, CardState())
    if (card.mig or card.virtual) and services and jobs:
        what = "is divided by MIG" if card.mig else "is a part of a virtualized one"
        text = f"the card {what}: who meets whom on it cannot be seen, and batch is let be"
        return _plain(msgspec.structs.replace(state, mode="open"), "Unsupported", text)
    if card.preempts and not view.spec.gpu.suspend_queues and services and jobs:
        text = "batch on AMD's GPUs is let be unless gpu.suspendQueues is on"
        return _plain(msgspec.structs.replace(state, mode="open"), "Unsupported", text)
    sensor, why = _sensor(card, services)
    age = now - card.at_seconds
    if age > LOST_AFTER_SECONDS:
        text = f"the driver has not answered for {format_duration(age)}: {card.problem}; what was decided stays"
        return _plain(state, "CardLost", text, sensed=bool(sensor))
    users = [card.users[w.id] for w in services]
    sensing = any(u.sensing or not (u.sensor or u.sensor_problem) for u in users)
    judged = [w for w in services if w.objective is not None]
    stopping = all(w.frozen and w.id not in view.evicting for w in jobs)
    seen = CardSeen(
        uuid=card.uuid,
        now=now,
        services=tuple(_service(w, card.users[w.id].busy_ratio) for w in judged),
        jobs=tuple(JobSeen(id=w.id, name=w.name, drains=_drains(view, card, w)) for w in jobs),
        sensor=sensor,
        sensor_problem=why,
        sensing=sensing,
        counted=card.counted,
        stopped=stopping,
        gap=every.at > 0.0 and now - every.at > GAP_TICKS * view.spec.tick + GAP_SECONDS,
        modes=view.spec.gpu.modes,
    )
    if card.reaction_seconds is not None:
        seen = msgspec.structs.replace(seen, reaction_seconds=card.reaction_seconds)
    decision = decide_card(seen, state)
    unjudged = next((w.name for w in services if w.objective is None), "")
    if not unjudged or not jobs:
        return decision
    beside = _beside_unjudged(seen, decision.state, unjudged)
    stricter = STRICTNESS[beside.state.mode] < STRICTNESS[decision.state.mode] or not judged
    return beside if stricter else decision


def _beside_unjudged(seen: CardSeen, state: CardState, name: str) -> CardDecision:
    """What a service without an SLO gets: batch runs only while it is seen to be idle, and stops soon."""
    mend = f"{name} has no slo, so what it feels is not known"
    turned = msgspec.structs.replace(state, mode="off")
    least = min(len(job.drains.samples) for job in seen.jobs)
    cost = max(job.drains.bound() for job in seen.jobs) + seen.reaction_seconds
    if seen.sensing:
        return _plain(turned, "Learning", f"{mend}; by what it is seen to be idle is being found out")
    if not seen.sensor or "gate" not in seen.modes:
        return _plain(
            turned, "NoObjective", f"{mend}, nor within milliseconds whether it is idle ({seen.sensor_problem})"
        )
    gate = msgspec.structs.replace(state, mode="gate", hold_off=UNJUDGED_HOLD_OFF_SECONDS, off_at=None)
    usual = max(job.drains.bound(0.5) for job in seen.jobs) + seen.reaction_seconds
    looks = MOST_LOOKS if usual <= UNJUDGED_SECONDS < cost else UNJUDGED_DRAINS
    if least < looks and seen.counted:
        return _plain(
            msgspec.structs.replace(gate, mode="probe"), "Learning", f"{mend}; how long batch goes on neither"
        )
    if cost > UNJUDGED_SECONDS:
        text = f"{mend}, and a request that meets batch would lose {format_duration(cost)}"
        return _plain(turned, "NoObjective", f"{text}: more than {format_duration(UNJUDGED_SECONDS)}")
    return _plain(gate, "NoObjective", f"{mend}: batch runs while all services are idle")


def _service(workload: Workload, busy_ratio: float | None) -> ServiceSeen:
    assert workload.objective is not None
    objective, latency = workload.objective, workload.latency
    return ServiceSeen(
        id=workload.id,
        name=workload.name,
        target_seconds=objective.p99_seconds,
        window_seconds=max(objective.window_seconds, LEAST_WINDOW_SECONDS),
        bounds_seconds=latency.bounds_seconds if latency is not None else (),
        counts=latency.counts if latency is not None else (),
        read_at=latency.at_seconds if latency is not None else 0.0,
        sensor_busy=busy_ratio,
    )


def _sensor(card: Card, services: list[Workload]) -> tuple[str, str]:
    """By what all services are seen to be idle, or why that cannot be seen."""
    sensors = set()
    for service in services:
        user = card.users[service.id]
        if not user.sensor:
            return "", f"{service.name}: {user.sensor_problem or 'it has not been looked at yet'}"
        sensors.add(user.sensor)
    return "+".join(sorted(sensors)), ""


def _plain(state: CardState, reason: str, message: str, *, sensed: bool = True) -> CardDecision:
    return as_decision(state, Verdict(law=LAW, state=state.mode, reason=reason, message=message), sensed=sensed)


def _request(view: View, card: Card, services: list[Workload], job: Workload, decision: CardDecision) -> Request:
    verdict, mode = decision.verdict, decision.state.mode
    request = Request(verb="freeze", workload=job.id, law=LAW, reason=verdict.reason, message=verdict.message)
    if mode == "off" or mode == "open":  # one by one, for the types
        patience = view.spec.gpu.starved_after if verdict.reason == "Learning" else None
        return msgspec.structs.replace(request, patience_seconds=patience)
    pulse = Pulse(
        by="suspend" if card.preempts else "lock" if _held_by_driver(view, card) else "freeze",
        card=card.uuid,
        mode=mode,
        services=tuple(w.id for w in services) if decision.sensed else (),
        hold_off_seconds=round(decision.state.hold_off, 4),
        period_seconds=round(decision.period_seconds, 4),
        on_seconds=round(decision.on_seconds, 4),
    )
    return msgspec.structs.replace(request, verb="pulse", pulse=pulse)


def _gangs_together(view: View, requests: list[Request]) -> list[Request]:
    """The same, and what is asked of one member of a gang is asked of all that are on this node: they wait for it.

    Who is on other nodes waits all the same (NCCL's watchdog: ten minutes), and is frozen if that lasts (gangs.py).
    """
    members: dict[str, list[Workload]] = {}
    for job in view.snapshot.of("batch"):
        if job.gang:
            members.setdefault(job.gang, []).append(job)
    together = list(requests)
    for request in requests:
        one = view.snapshot.workloads[request.workload]
        for other in members.get(one.gang, ()) if request.verb in ("freeze", "pulse") else ():
            asked = msgspec.structs.replace(request, workload=other.id, message=f"with {one.name}: {request.message}")
            same = any((r.verb, r.workload, r.pulse) == (asked.verb, asked.workload, asked.pulse) for r in together)
            if not same:
                together.append(asked)
    return together


def _refused(view: View) -> list[Request]:
    """Members of gangs that share a card with a service, where the policy wants none."""
    if view.spec.gpu.gangs != "refused":
        return []
    found = {}
    for uuid, card in sorted(view.snapshot.cards.items()):
        services, jobs = _sharing(view, card)
        for job in jobs if services else ():
            text = f"{job.name} is of a gang, and on the card {uuid} with {services[0].name}: gpu.gangs is refused"
            if job.gang:
                found[job.id] = Request(verb="evict", workload=job.id, law=LAW, reason="GangRefused", message=text)
    return list(found.values())


def _progress(view: View, state: CardsState, held: dict[str, list[Card]]) -> dict[str, Progress]:
    """Of the jobs that are held: the time that each had of the card that it uses most, in spans of `starvedAfter`."""
    found = {}
    for id_, cards in held.items():
        at = max(c.at_seconds for c in cards)
        known = state.progress.get(id_)
        if known is None or (_span(known) >= view.spec.gpu.starved_after and not _starves(known)):
            known = Progress(at, at)
        passed = at - known.until
        if passed <= 0.0:
            found[id_] = known  # nothing new was read
            continue
        told = [c.users[id_].percent for c in cards]
        had = max((p for p in told if p is not None), default=0) / 100 * passed
        whole = known.known and None not in told and passed <= STALE_SECONDS
        found[id_] = Progress(known.since, at, known.seconds + had, whole)
    return found


def _span(progress: Progress) -> float:
    return progress.until - progress.since


def _starves(progress: Progress) -> bool:
    return progress.known and progress.seconds < STARVED_RATIO * _span(progress)


def _starved(view: View, progress: dict[str, Progress]) -> list[Request]:
    found = []
    for id_, had in progress.items():
        if _span(had) < view.spec.gpu.starved_after or not _starves(had):
            continue
        name = view.snapshot.workloads[id_].name
        text = f"{name} had {had.seconds:.1f} s of its card in {format_duration(_span(had))}: elsewhere it gets more"
        found.append(Request(verb="evict", workload=id_, law=LAW, reason="Starved", message=text))
    return found
