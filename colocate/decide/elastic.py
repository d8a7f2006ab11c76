"""Jobs with a deadline draw most of their watts while power is clean or cheap, as far as that deadline lets them.

The signal's forecast says what each hour costs, a job's curve what it does with how many watts (`model/slots.py`): so
a limit falls in dear hours and is whole in cheap ones, and what is not needed at all is not drawn. Nothing is paused.
What is planned for later counts on the watts that the signal's own steps leave then; whoever is held to less by others
meanwhile is behind, which the next plan, a minute later, makes up for. Where nothing is foretold, or the same always,
that leaves the watts that do most for their energy. Only where the policy says so.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import numpy as np
from numpy.typing import NDArray

from colocate.decide.caps import whole_up
from colocate.decide.deadlines import SPARE, Curve, Progress
from colocate.decide.power_jobs import STEP_WATTS, Job
from colocate.model.slots import cheapest
from colocate.policy.schema import PowerPolicy
from colocate.snapshot import NodeSnapshot

AGAIN_SECONDS = 60.0
MOST_SLOTS = 48
WORTH = 0.01
"""What saves less is not worth a limit."""


class Shifted(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one job is to draw for now."""

    watts: float
    """On each of its cards; what it asks for where nothing is to be gained."""
    until_seconds: float
    """Monotonic: then it is planned anew."""
    asked: float
    signal: float
    """What that was planned of, and while the signal was so high."""
    saved: float = 0.0
    """Of what its work would cost at once, so much less."""


def shifted(
    known: Mapping[str, Shifted],
    snapshot: NodeSnapshot,
    policy: PowerPolicy,
    jobs: list[Job],
    curves: Mapping[str, Curve],
    done: Mapping[str, Progress],
    others: float,
) -> dict[str, Shifted]:
    """Of each job with a deadline and work left; `others` are watts of cards that are no job's here."""
    ahead, now = snapshot.power_ahead, snapshot.monotonic_seconds
    if not policy.signal.elastic or snapshot.power_signal is None or not ahead:
        return {}
    asked = sum(job.watts * len(job.cards) for job in jobs)
    found: dict[str, Shifted] = {}
    planned = False
    for job in jobs:
        workload, before = snapshot.workloads.get(job.workload), known.get(job.workload)
        if workload is None or workload.due_seconds is None or workload.work_seconds is None:
            continue
        planned_of = (before.asked, before.signal) if before is not None else ()
        if before is not None and now < before.until_seconds and planned_of == (job.watts, ahead[0][1]):
            found[job.workload] = before
            continue
        if planned:  # one a tick: a plan takes a few milliseconds
            if before is not None and before.asked == job.watts:
                found[job.workload] = before
            continue
        work = workload.work_seconds - done[job.workload].done_seconds if job.workload in done else 0.0
        left = workload.due_seconds - now - (1.0 - SPARE) * workload.work_seconds
        if work > 0.0 and left > work:
            planned = True
            share = [_share(price, policy, asked, others) for _, price in ahead]
            found[job.workload] = _planned(job, curves[job.workload], ahead, np.array(share), work, left, snapshot)
    return found


def _share(price: float, policy: PowerPolicy, asked: float, others: float) -> float:
    """Of what is asked for, how much can be had while the signal is so high."""
    budgets = [step.budget for step in policy.signal.steps if price > step.above]
    budget = min(policy.budget, budgets[-1]) if budgets else policy.budget
    return min(max(budget - others, 0.0) / asked, 1.0) if policy.budget and asked > 0.0 else 1.0


def _planned(
    job: Job,
    curve: Curve,
    ahead: tuple[tuple[float, float], ...],
    share: NDArray[np.float64],
    work: float,
    left: float,
    snapshot: NodeSnapshot,
) -> Shifted:
    start = snapshot.time_seconds
    begins = np.array([at for at, _ in ahead])
    edges = np.unique(np.concatenate(([start, start + left], begins[(begins > start) & (begins < start + left)])))
    if edges.size - 1 > MOST_SLOTS:
        edges = np.linspace(start, start + left, MOST_SLOTS + 1)
    prices, shares = _means(edges, begins, np.array([price for _, price in ahead]), share)
    watts = np.minimum(curve.caps, max(job.enough, job.least))  # more is not drawn
    kept = np.concatenate(([True], np.diff(watts) > 0.0))
    speeds = 1.0 / (1.0 + curve.longer)
    plan = cheapest(prices, np.diff(edges), job.watts * shares, watts[kept], speeds[kept], work)
    until = snapshot.monotonic_seconds + min(AGAIN_SECONDS, float(edges[1] - edges[0]))
    if plan is None or plan.at_once <= 0.0 or plan.cost > (1.0 - WORTH) * plan.at_once:
        return Shifted(job.watts, until, job.watts, ahead[0][1])
    # It has the upper of two points first, and the lower one once the plans that follow see that it is enough. What is
    # the most that it draws is no limit to it: where it needs more after all, it is seen.
    now = job.watts
    if plan.corner < float(watts[-1]):
        now = min(max(whole_up(plan.corner, STEP_WATTS), job.least), job.watts)
    return Shifted(now, until, job.watts, ahead[0][1], round(1.0 - plan.cost / plan.at_once, 3))


def _means(
    edges: NDArray[np.float64], begins: NDArray[np.float64], prices: NDArray[np.float64], share: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The mean price of each slot and the share that can be had in it; beyond the forecast the mean of it counts.

    The last point is of as long as the one before it, for it is not told how long it lasts.
    """
    last = float(begins[-1] - begins[-2]) if begins.size > 1 else float(edges[-1] - begins[-1])
    bounds = np.append(begins, begins[-1] + last)
    inside = np.maximum(
        np.minimum(edges[1:, None], bounds[None, 1:]) - np.maximum(edges[:-1, None], bounds[None, :-1]), 0.0
    )
    rest = np.maximum(np.diff(edges) - inside.sum(axis=1), 0.0)
    ahead = np.maximum(bounds[1:] - np.maximum(bounds[:-1], edges[0]), 0.0)
    mean, usual = (float(np.sum(each * ahead) / max(np.sum(ahead), 1e-9)) for each in (prices, share))
    seconds = np.diff(edges)
    return (inside @ prices + rest * mean) / seconds, (inside @ share + rest * usual) / seconds
