"""Watts of a node's budget that nobody asks for go to jobs that turn them into speed, as long as they do.

A job is boosted while all its cards draw what they may (a phase that is bound by power; in others more watts change
nothing) and its class's curve says that a tenth more watts make it a fortieth faster at least. It has its own again in
the next tick once it draws less, or somebody asks for the watts: what was lent counts for nobody's start.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import numpy as np

from colocate.decide.allowance import FRESH_SECONDS
from colocate.decide.power_jobs import STEP_WATTS, Job, curve_of
from colocate.decide.unused import NEAR
from colocate.policy.schema import PowerModel, PowerPolicy
from colocate.snapshot import NodeSnapshot

EFFICIENT = 0.25
"""The least elasticity of speed over watts that is worth them."""
AGAIN_SECONDS = 60.0
"""Who did not draw what he was lent is lent nothing for so long."""
WAIT_SECONDS = 10.0
"""So long a phase has to last, and a boost before it is raised again."""


class Boosted(msgspec.Struct, frozen=True, omit_defaults=True):
    """Of one job that draws what it may."""

    watts: float
    """Of each of its cards; what it asks for as long as it is only looked at."""
    since_seconds: float


def boosted(
    known: Mapping[str, Boosted],
    jobs: list[Job],
    snapshot: NodeSnapshot,
    policy: PowerPolicy,
    spare: float,
) -> dict[str, Boosted]:
    """What the jobs have that are bound by power, where `spare` watts are left of the budget; `jobs` are those that are
    alone on their cards."""
    now, models = snapshot.monotonic_seconds, {model.name: model for model in policy.models}
    wanted: dict[str, tuple[Job, float]] = {}
    for job in jobs:
        workload = snapshot.workloads.get(job.workload)
        model = models.get(workload.power_class) if workload is not None else None
        if model is not None and _bound(job, snapshot):
            wanted[job.workload] = job, _worth(job, model, snapshot, policy)
    room = sum((watts - job.watts) * len(job.cards) for job, watts in wanted.values())
    share = min(max(spare, 0.0) / room, 1.0) if room > 0.0 else 0.0
    found = {}
    for id_, (job, most) in wanted.items():
        watts = max(STEP_WATTS * ((job.watts + share * (most - job.watts)) // STEP_WATTS), job.watts)
        before = known.get(id_, Boosted(job.watts, now))
        if (
            before.watts > job.watts
            and now - before.since_seconds >= WAIT_SECONDS
            and not _drawn(job, snapshot, before)
        ):
            found[id_] = Boosted(job.watts, now + AGAIN_SECONDS)  # it does not need them after all
            continue
        if watts > before.watts and now - before.since_seconds < WAIT_SECONDS:
            watts = max(before.watts, job.watts)
        found[id_] = before if watts == before.watts else Boosted(watts, now)
    return found


def _drawn(job: Job, snapshot: NodeSnapshot, lent: Boosted) -> bool:
    """Whether all its cards draw what it is lent, or nearly."""
    return all((snapshot.cards[uuid].watts or 0.0) >= NEAR * lent.watts for uuid in job.cards)


def _bound(job: Job, snapshot: NodeSnapshot) -> bool:
    """Whether all its cards draw what it asked for, or nearly."""
    for uuid in job.cards:
        card = snapshot.cards[uuid]
        fresh = not card.problem and snapshot.monotonic_seconds - card.at_seconds <= FRESH_SECONDS
        if not fresh or card.watts is None or card.watts < NEAR * job.watts:
            return False
    return True


def _worth(job: Job, model: PowerModel, snapshot: NodeSnapshot, policy: PowerPolicy) -> float:
    """Up to how many watts of a card each step more makes it enough faster."""
    watts, slowdowns = curve_of(model)
    takes = [snapshot.cards[uuid].most_watts for uuid in job.cards]
    most = min(job.watts * (1.0 + policy.boost / 100.0), float(watts[-1]), *(w for w in takes if w is not None))
    if job.watts < watts[0]:
        return job.watts  # nobody has measured it there
    steps = np.arange(job.watts, most + 1e-9, STEP_WATTS)
    speeds = -np.log1p(np.interp(steps, watts, slowdowns))
    enough = np.diff(speeds) >= EFFICIENT * np.diff(np.log(steps))
    return float(steps[int(np.argmin(np.append(enough, False)))]) if steps.size else job.watts
