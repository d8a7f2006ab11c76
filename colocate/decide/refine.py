"""Models of classes of jobs are made better by what running jobs say of their progress (`colocate progress`).

Between two of its words a job did so much under one limit, if that was in force all the while and nothing of it was
stopped. Several limits come by themselves where budgets, signals and deadlines move them. Where the policy lets jobs be
tried, one that has time to spare is also held to a little less for a minute of every ten: as far as what it may lose
(`--max-slowdown`) or its deadline lets it, by the model as it is known, never beyond.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import msgspec
import numpy as np

from colocate.decide.caps import whole_up
from colocate.decide.deadlines import SPARE, Curve, Progress, limits_of
from colocate.decide.power_jobs import STEP_WATTS, Job, curve_of
from colocate.model.refine import Did, refined
from colocate.policy.schema import PowerModel, PowerPoint, PowerPolicy
from colocate.snapshot import NodeSnapshot, Workload

LEAST_SECONDS = 5.0
"""Between two words of a job: of less, their own delay is too much of it."""
BIN_WATTS = 5.0
MOST_JOBS = 32
"""Of a class so many are remembered."""
TRY_SECONDS, TRY_EVERY = 60.0, 10
"""For so long a job is tried, one of so many such times."""
TRY_STEP = 0.1
"""By such a share of what it asks for."""


class Saying(msgspec.Struct, frozen=True, omit_defaults=True):
    """Since a job's last word."""

    at_seconds: float
    ratio: float
    watts: float | None = None
    """The limit in force on its cards since then; None: it was another meanwhile, it stood still, or was not alone."""
    every_seconds: float = 0.0
    """So long it was since the word before; 0: there was none."""
    counts: bool = False
    """Whether what it does until its next word counts: not before its second one, for a job that goes on from a
    checkpoint leaps once, nor after it went back."""


class Ran(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a job of a class has done so far."""

    class_: str
    did: tuple[Did, ...] = ()


class Heard(msgspec.Struct, frozen=True, omit_defaults=True):
    """What jobs have said."""

    saying: dict[str, Saying] = {}
    ran: dict[str, Ran] = {}
    """The latest last; by the job's id and start, so that another job of its name is another."""
    limits: dict[str, float] = {}
    """In the tick before: of each job that was alone on its cards and ran."""
    at_seconds: float = 0.0
    """When that tick was, monotonic."""


def heard(known: Heard, snapshot: NodeSnapshot, policy: PowerPolicy) -> Heard:
    """With what the jobs of this tick have said."""
    if not policy.refine:
        return Heard(ran=known.ran)
    classes = {model.name for model in policy.models}
    saying, ran, limits = dict[str, Saying](), dict(known.ran), _undisturbed(snapshot)
    for id_, workload in snapshot.workloads.items():
        if workload.power_class not in classes or workload.done_ratio is None:
            continue
        limit, before, at = limits.get(id_), known.saying.get(id_), workload.done_at_seconds
        if before is not None and at == before.at_seconds:
            saying[id_] = before if _in_force(before, limit) else msgspec.structs.replace(before, watts=None)
            continue
        # What was in force when it spoke is known if it was so in the tick before, which was before it spoke.
        before_it = known.limits.get(id_)
        same = limit is not None and before_it is not None and abs(before_it - limit) < 1.0
        limit = limit if same and known.at_seconds <= at + 1.0 else None
        if before is None or at < before.at_seconds or workload.done_ratio < before.ratio:
            saying[id_] = Saying(at, workload.done_ratio, limit)
            continue
        seconds, work = at - before.at_seconds, workload.done_ratio - before.ratio
        if before.counts and before.watts is not None and _in_force(before, limit) and seconds >= LEAST_SECONDS:
            key = f"{id_} {workload.started_seconds:.3f}"
            ran[key] = _more(ran.pop(key, Ran(workload.power_class)), Did(before.watts, work, seconds))
        saying[id_] = Saying(at, workload.done_ratio, limit, seconds, counts=True)
    return Heard(saying, _latest(ran), limits, snapshot.monotonic_seconds)


def _undisturbed(snapshot: NodeSnapshot) -> dict[str, float]:
    """The limit of each that runs and that nobody else is with on any of its cards."""
    limits = limits_of(snapshot)
    for card in snapshot.cards.values():
        if len(card.users) > 1 or card.strangers or card.suspended:
            for id_ in card.users:
                limits.pop(id_, None)
    stopped = {id_ for id_, workload in snapshot.workloads.items() if workload.frozen or workload.gang_held}
    return {id_: limit for id_, limit in limits.items() if id_ not in stopped}


def _latest(ran: dict[str, Ran]) -> dict[str, Ran]:
    """At most MOST_JOBS of a class: first those are forgotten that tell nothing, for they ran under one limit alone."""
    kept = dict(ran)
    for class_ in {one.class_ for one in ran.values()}:
        mine = [key for key, one in ran.items() if one.class_ == class_]
        mine.sort(key=lambda key: len(ran[key].did) > 1)  # stable: the latest stay last
        for key in mine[: max(len(mine) - MOST_JOBS, 0)]:
            del kept[key]
    return kept


def _in_force(saying: Saying, limit: float | None) -> bool:
    return saying.watts is not None and limit is not None and abs(saying.watts - limit) < 1.0


def _more(ran: Ran, did: Did) -> Ran:
    by_bin = {round(one.watts / BIN_WATTS): one for one in ran.did}
    one = by_bin.get(round(did.watts / BIN_WATTS), Did(did.watts, 0.0, 0.0))
    seconds = one.seconds + did.seconds
    watts = (one.watts * one.seconds + did.watts * did.seconds) / seconds
    by_bin[round(did.watts / BIN_WATTS)] = Did(round(watts, 3), one.work + did.work, seconds)
    return msgspec.structs.replace(ran, did=tuple(sorted(by_bin.values())))


def better(policy: PowerPolicy, known: Heard) -> PowerPolicy:
    """The policy with its models as the jobs that ran tell of them; itself where they are not to be refined."""
    if not policy.refine or not known.ran:
        return policy
    told = _told_of(known)
    models = tuple(_better(model, told.get(model.name, ()))[0] for model in policy.models)
    return msgspec.structs.replace(policy, models=models)


class KnownClass(msgspec.Struct, frozen=True):
    """A class, and how well it is known."""

    name: str
    points: tuple[PowerPoint, ...]
    """As they are used, with what jobs said."""
    policy: tuple[float, ...]
    """The slowdowns that the policy has at these caps."""
    jobs: int
    """How many ran under more than one cap, and have said what they did."""
    seconds: tuple[float, ...]
    """Of these at each cap, or near it."""


def known_classes(policy: PowerPolicy, known: Heard) -> list[KnownClass]:
    """Every class of the policy."""
    found, told = [], _told_of(known)
    for before, used in zip(policy.models, better(policy, known).models, strict=True):
        jobs = told.get(before.name, ())
        _, seconds = _better(before, jobs)
        slowdowns = tuple(point.slowdown for point in before.points)
        found.append(KnownClass(before.name, used.points, slowdowns, len(jobs), seconds))
    return found


def _told_of(known: Heard) -> dict[str, tuple[tuple[Did, ...], ...]]:
    """By class, what those of its jobs did that ran under more than one cap: the others tell nothing."""
    of: dict[str, tuple[tuple[Did, ...], ...]] = {}
    for one in known.ran.values():
        if len(one.did) > 1:
            of[one.class_] = (*of.get(one.class_, ()), one.did)
    return of


@lru_cache(maxsize=64)
def _better(model: PowerModel, jobs: tuple[tuple[Did, ...], ...]) -> tuple[PowerModel, tuple[float, ...]]:
    """With the seconds that it is known by at each cap; the same until a job of the class has said something."""
    after, seconds = refined(*curve_of(model), jobs)
    points = tuple(PowerPoint(point.watts, round(float(s), 4)) for point, s in zip(model.points, after, strict=True))
    return msgspec.structs.replace(model, points=points), tuple(round(float(each), 1) for each in seconds)


def tried(
    known: Heard,
    snapshot: NodeSnapshot,
    policy: PowerPolicy,
    jobs: list[Job],
    curves: Mapping[str, Curve],
    done: Mapping[str, Progress],
) -> dict[str, float]:
    """Of the jobs that are held to less for a minute, so that their class's curve is better known: the watts of each
    of their cards."""
    if not policy.refine or not policy.explore:
        return {}
    found = {}
    now = snapshot.monotonic_seconds
    for job in jobs:
        workload, saying = snapshot.workloads.get(job.workload), known.saying.get(job.workload)
        if workload is None or saying is None or now - saying.at_seconds > TRY_SECONDS:
            continue
        if not LEAST_SECONDS <= saying.every_seconds <= TRY_SECONDS / 3.0:
            continue
        if int((now - workload.started_seconds) // TRY_SECONDS) % TRY_EVERY != TRY_EVERY - 1:
            continue
        watts = max(whole_up((1.0 - TRY_STEP) * job.watts, STEP_WATTS), job.least)
        slower = float(np.interp(watts, *curves[job.workload])) / TRY_EVERY
        if watts < job.watts and slower <= _may_lose(workload, job, policy, done.get(job.workload), now):
            found[job.workload] = watts
    return found


def _may_lose(workload: Workload, job: Job, policy: PowerPolicy, done: Progress | None, now: float) -> float:
    """By how much longer it may take than with what it has."""
    if workload.due_seconds is not None and workload.work_seconds is not None and done is not None:
        left = workload.work_seconds - done.done_seconds
        return SPARE * (workload.due_seconds - now) / left - 1.0 if left > 0.0 else 0.0
    model = next((m for m in policy.models if m.name == workload.power_class), None)
    if workload.max_slowdown is None or model is None:
        return 0.0
    return (1.0 + workload.max_slowdown) / (1.0 + float(np.interp(job.watts, *curve_of(model)))) - 1.0
