"""The power budget of a node: by how much caps are lowered so that its GPUs together stay within it.

Only caps of who asked for watts are lowered, and none below what its card can be set to. What other cards may draw
counts against the budget: one that somebody is on its limit, one that nobody is on what it draws. Of the rest each job
gets what makes the worst slowdown least (`power.py`), by its class's curve or, of a class that is not known, as if the
time grew as the cap falls (GEOPM's rule where it has no model). One whose cards have long drawn less than that is not
slowed down to there (`unused.py`). A job's cards have one cap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import msgspec
import numpy as np

from colocate.decide.allowance import PowerState
from colocate.decide.boost import Boosted, boosted
from colocate.decide.caps import LAW, Capped, whole_up
from colocate.decide.deadlines import Curve, Floor, Progress, floors, progressed
from colocate.decide.elastic import Shifted, shifted
from colocate.decide.power import BudgetTooSmallError, Splits, least_watts, split_budget
from colocate.decide.power_jobs import POINTS, STEP_WATTS, Curves, Job, cards_of_one, curves_of, jobs_of
from colocate.decide.refine import Heard, tried
from colocate.plan import GpuTarget, PowerCap, PowerNeeds, Verdict
from colocate.policy.schema import PowerPolicy
from colocate.snapshot import Card, NodeSnapshot

SLOWDOWNS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 1.0, 2.0)
"""At which it is told what is enough."""
NODE = "node"
"""What a verdict about all cards together is about."""


class Known(NamedTuple):
    """What is remembered of jobs."""

    progress: Mapping[str, Progress] = {}
    """Of those that have a deadline, as `shifted`."""
    shifted: Mapping[str, Shifted] = {}
    heard: Heard = Heard()
    boosted: Mapping[str, Boosted] = {}


class Budgeted(NamedTuple):
    """What comes of a budget, and what is remembered for it."""

    capped: Capped
    progress: dict[str, Progress]
    shifted: dict[str, Shifted]
    boosted: dict[str, Boosted]
    needs: PowerNeeds | None
    """How much who asks for watts would feel less of them, for a budget of several nodes; None: nobody asks."""


def others_watts(cards: Mapping[str, Card], capped: set[str]) -> float:
    """What the cards that no cap of ours is on may draw."""
    found = 0.0
    for uuid, card in cards.items():
        if uuid in capped:
            continue
        used = bool(card.users or card.strangers)
        known = (card.limit_watts, card.most_watts, card.watts) if used else (card.watts, card.limit_watts)
        found += next((watts for watts in known if watts is not None), 0.0)
    return found


def budgeted(
    capped: Capped,
    snapshot: NodeSnapshot,
    policy: PowerPolicy,
    power: PowerState,
    enough: Mapping[str, float],
    known: Known,
) -> Budgeted:
    """The same caps, lowered as far as what they may add up to needs, and a verdict about that.

    `enough`: watts that a card is seen to need at most, by its UUID.
    """
    asked = jobs_of(capped, snapshot, enough)
    curves = curves_of(asked, snapshot, policy.models)
    of_job = {job.workload: Curve(caps, longer) for job, caps, longer in zip(asked, *curves, strict=True)}
    done = progressed(known.progress, snapshot, of_job)
    least = floors(done, snapshot, of_job)
    others = others_watts(snapshot.cards, {uuid for job in asked for uuid in job.cards})
    alone = cards_of_one(capped)
    free = [job for job in asked if alone.issuperset(job.cards)]  # a neighbour on the card is not slowed for these
    later = shifted(known.shifted, snapshot, policy, free, of_job, done, others)
    less = tried(known.heard, snapshot, policy, free, of_job, done)
    moved = {id_: plan.watts for id_, plan in later.items()}
    moved |= {id_: min(watts, moved.get(id_, watts)) for id_, watts in less.items()}
    jobs = [job._replace(watts=moved.get(job.workload, job.watts)) for job in asked]
    kept = [job.at_least(least[job.workload].watts) if job.workload in least else job for job in jobs]
    if kept != asked:
        curves = curves_of(kept, snapshot, policy.models)
    asks = {job.workload: job.watts for job in jobs}
    least = {id_: floor._replace(watts=min(floor.watts, asks.get(id_, floor.watts))) for id_, floor in least.items()}
    capped = _moved(capped, asked, jobs, later, snapshot)
    found, spare = _within(capped, kept, jobs, curves, snapshot, policy, power, least, others)
    more: dict[str, Boosted] = {}
    if policy.boost and spare is not None:
        whole = [job for job in free if moved.get(job.workload, job.watts) >= job.watts]
        more = boosted(known.boosted, whole, snapshot, policy, spare)
        found = _raised(found, whole, more)
    return Budgeted(found, done, later, more, _needs(kept, curves))


def _raised(capped: Capped, jobs: list[Job], more: Mapping[str, Boosted]) -> Capped:
    """The same with what is lent to jobs."""
    lent = [(job, more[job.workload].watts) for job in jobs if job.workload in more]
    by_card = {uuid: watts for job, watts in lent if watts > job.watts for uuid in job.cards}
    if not by_card:
        return capped
    caps, verdicts = list(capped.caps), list(capped.verdicts)
    for i, cap in enumerate(caps):
        watts = by_card.get(cap.target.uuid, 0.0) if isinstance(cap.target, GpuTarget) else 0.0
        if cap.watts is not None and watts > cap.watts:
            caps[i] = msgspec.structs.replace(cap, watts=watts, unboosted=cap.watts)
    for i, verdict in enumerate(verdicts):
        if verdict.subject in by_card:
            watts = by_card[verdict.subject]
            text = f"it is lent {watts:g} W of the budget while it draws them and nobody asks"
            verdicts[i] = msgspec.structs.replace(_with(verdict, "Boosted", text, watts), state="open")
    return Capped(tuple(caps), tuple(verdicts))


def _with(verdict: Verdict, reason: str, text: str, watts: float, **numbers: float) -> Verdict:
    """A card's own verdict, where it has other watts than are asked for."""
    message, told = f"{verdict.message}; {text}", {"cap_watts": watts, **numbers}
    return msgspec.structs.replace(verdict, reason=reason, message=message, numbers=told)


def _moved(
    capped: Capped, asked: list[Job], jobs: list[Job], later: Mapping[str, Shifted], snapshot: NodeSnapshot
) -> Capped:
    """The same, where what `jobs` have is less than they asked for: because their work is cheaper later, or to see what
    they do with less."""
    moved = {job.workload: job for was, job in zip(asked, jobs, strict=True) if job.watts < was.watts}
    by_card = {uuid: job.watts for job in moved.values() for uuid in job.cards}
    if not by_card:
        return capped
    of_card = {uuid: later.get(id_) for id_, job in moved.items() for uuid in job.cards}
    verdicts = list(capped.verdicts)
    for i, verdict in enumerate(verdicts):
        if verdict.subject not in by_card:
            continue
        watts, plan = by_card[verdict.subject], of_card[verdict.subject]
        if plan is not None and plan.watts <= watts:
            text = f"it has {watts:g} W while the signal is {snapshot.power_signal:g}, for the rest of its work"
            text += f" costs {plan.saved:.0%} less than at once, and is done by its deadline"
            verdicts[i] = _with(verdict, "Shifted", text, watts, saved_ratio=plan.saved)
        else:
            text = f"it has {watts:g} W for a minute, to see what jobs of its class do with less"
            verdicts[i] = _with(verdict, "Tried", text, watts)
    return Capped(tuple(_lowered(cap, by_card) for cap in capped.caps), tuple(verdicts))


def _within(
    capped: Capped,
    kept: list[Job],
    plain: list[Job],
    curves: Curves,
    snapshot: NodeSnapshot,
    policy: PowerPolicy,
    power: PowerState,
    floored: Mapping[str, Floor],
    others: float,
) -> tuple[Capped, float | None]:
    """By `kept`, which keep deadlines and whose `curves` these are, or where there is not enough for that by the
    `plain` ones; beside cards that may draw `others`. And the watts that are left where everybody has what he asks for,
    None where there is no budget."""
    share, jobs = snapshot.power_share, kept
    if not policy.budget and not share:
        return capped, None
    others = whole_up(others, STEP_WATTS)
    asked = sum(len(job.cards) * job.watts for job in jobs)
    left = power.watts - others if policy.budget else math.inf
    of, numbers = _allowed(power), {"budget_watts": float(policy.budget), "allowed_watts": power.watts}
    if share and share < left:  # of who asks for watts alone: a PowerBudget sets what else a node draws aside
        left, of = float(share), f"{share} W that a PowerBudget of several nodes leaves to this one"
        numbers = {"budget_watts": float(share), "allowed_watts": float(share)}
    numbers |= {
        "others_watts": round(others, 1),
        "asked_watts": round(asked, 1),
    }
    if asked <= left or not jobs:
        fits = left >= 0
        said = f"{asked:g} W are asked for, and {others:g} W go to other cards, of {of}"
        said += _deadlines(floored, snapshot, {})
        reason = "WithinBudget" if fits else "BudgetTooSmall"
        return capped._replace(verdicts=(*capped.verdicts, _said("open", reason, said, numbers))), left - asked
    if not _fit(jobs, left):  # who is late anyhow takes nobody else's time
        jobs = [one if floored.get(one.workload, NONE).late else job for one, job in zip(plain, kept, strict=True)]
    if not _fit(jobs, left):
        jobs = plain
    if jobs is not kept:
        curves = curves_of(jobs, snapshot, policy.models)
    allowed, worst = _split(jobs, curves, left)
    total = sum(len(job.cards) * allowed[job.workload] for job in jobs)
    reason = "Lowered" if total <= left else "BudgetTooSmall"
    text = f"{asked:g} W are asked for and {max(left, 0.0):g} W of {of} are left: jobs have {total:g} W"
    text += f", the worst is about {worst:.0%} slower" if reason == "Lowered" else ", the least that their cards take"
    text += _deadlines(floored, snapshot, allowed)
    verdict = _said("capped", reason, text, {**numbers, "worst_slowdown": round(worst, 4)})
    by_card = {uuid: allowed[job.workload] for job in jobs for uuid in job.cards}
    seen = {uuid: job.enough for job in jobs for uuid in job.cards if job.enough < job.watts}
    caps = tuple(_lowered(cap, by_card) for cap in capped.caps)
    verdicts = tuple(_told(v, by_card, of, seen) for v in capped.verdicts)
    return Capped(caps, (*verdicts, verdict)), 0.0


NONE = Floor(0.0, False)


def _fit(jobs: list[Job], left: float) -> bool:
    return sum(len(job.cards) * job.least for job in jobs) <= left


def _deadlines(floored: Mapping[str, Floor], snapshot: NodeSnapshot, allowed: Mapping[str, float]) -> str:
    """Who will be late, and whose deadline is kept; `allowed` is what each has where that is less than it asks for."""
    names = {id_: snapshot.workloads[id_].name for id_ in floored}
    late = {i for i, floor in floored.items() if floor.late or allowed.get(i, math.inf) < int(floor.watts)}
    kept = sorted(names[i] for i in floored.keys() - late)
    text = f"; not done by its deadline: {', '.join(sorted(names[i] for i in late))}" if late else ""
    return text + (f"; deadlines are kept: {', '.join(kept)}" if kept and allowed else "")


def _needs(jobs: list[Job], curves: Curves) -> PowerNeeds | None:
    if not jobs:
        return None
    caps, longer = curves
    cards = np.array([len(job.cards) for job in jobs], dtype=np.float64)
    return _needs_of(caps.tobytes(), longer.tobytes(), cards.tobytes())


@lru_cache(maxsize=4)
def _needs_of(caps: bytes, longer: bytes, cards: bytes) -> PowerNeeds:
    """They are the same for most ticks, and take a millisecond."""
    many = np.frombuffer(cards)
    watts, slower = (np.frombuffer(each).reshape(len(many), POINTS) for each in (caps, longer))
    least = tuple((t, round(float((least_watts(watts, slower, t) * many).sum()), 1)) for t in SLOWDOWNS)
    return PowerNeeds(float((watts[:, -1] * many).sum()), least)


def _split(jobs: list[Job], curves: Curves, left: float) -> tuple[dict[str, float], float]:
    """What each card of a job gets, whole watts, and the worst slowdown."""
    caps, longer = curves
    cards = np.array([len(job.cards) for job in jobs], dtype=np.float64)
    found = _split_of((caps * cards[:, None]).tobytes(), longer.tobytes(), left)
    if found is None:
        return {job.workload: whole_up(job.least) for job in jobs}, float(longer[:, 0].max())
    each = found.caps / cards
    whole = {job.workload: max(float(int(w)), whole_up(job.least)) for job, w in zip(jobs, each, strict=True)}
    return whole, found.worst


@lru_cache(maxsize=4)
def _split_of(caps: bytes, longer: bytes, left: float) -> Splits | None:
    """It is the same for most ticks, and takes milliseconds; None of a budget below all floors."""
    watts, slower = (np.frombuffer(each).reshape(-1, POINTS) for each in (caps, longer))
    try:
        return split_budget(watts, slower, left)
    except BudgetTooSmallError:
        return None


def _lowered(cap: PowerCap, by_card: Mapping[str, float]) -> PowerCap:
    if cap.watts is None or not isinstance(cap.target, GpuTarget):
        return cap
    return msgspec.structs.replace(cap, watts=min(cap.watts, by_card.get(cap.target.uuid, cap.watts)))


def _allowed(power: PowerState) -> str:
    return f"{power.watts:g} W" + (f" ({power.why}; the budget is {power.budget} W)" if power.why else "")


def _told(verdict: Verdict, by_card: Mapping[str, float], of: str, seen: Mapping[str, float]) -> Verdict:
    """A card's own verdict, where it has less than is asked for."""
    watts = by_card.get(verdict.subject)
    if watts is None or watts >= verdict.numbers.get("cap_watts", 0.0):
        return verdict
    text, enough = f"the node's budget, {of}, leaves it {watts:g} W", seen.get(verdict.subject)
    if enough is not None:
        text += f"; in the last minute {enough:.0f} W were enough for it"
    return _with(verdict, "Lowered", text, watts)


def _said(state: str, reason: str, message: str, numbers: dict[str, float]) -> Verdict:
    return Verdict(law=LAW, state=state, reason=reason, message=message, numbers=numbers, subject=NODE)
