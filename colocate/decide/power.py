"""Watts among jobs: how a budget is split so that the job that loses most loses least.

min max_j S_j(P_j) / w_j with sum P_j <= budget and floor_j <= P_j <= greatest_j. Each S_j falls with its cap, so for a
common slowdown t the least cap of each job that keeps it is known, and their sum falls with t: bisection finds the
least t that the budget allows. What is left then goes to all in proportion to what each could still use.
Source: GEOPM's allocation of a job's budget to its nodes, here over jobs, with weights.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
STEPS = 40
"""Of the bisection: a millionth of a millionth of the greatest slowdown."""


class Splits(NamedTuple):
    """What each job gets, watts, and the worst slowdown that comes of it, by its weight."""

    caps: Floats
    worst: float


class BudgetTooSmallError(ValueError):
    """The budget does not even cover every job's floor."""


def split_budget(caps: Floats, slowdowns: Floats, budget_watts: float, weights: Floats | None = None) -> Splits:
    """Caps for jobs. Raises BudgetTooSmallError.

    `caps`: (jobs, points), ascending watts, the first a job's floor and the last its greatest; `slowdowns`: the same
    shape, never rising. Between points the straight line counts. `weights`: one of 2 may slow down twice as much.
    """
    jobs = caps.shape[0]
    if not jobs:
        return Splits(np.zeros(0), 0.0)
    weighted = slowdowns / (np.ones(jobs) if weights is None else weights)[:, None]
    floors, greatest = caps[:, 0], caps[:, -1]
    if floors.sum() > budget_watts:
        raise BudgetTooSmallError(f"{budget_watts:g} W are less than the floors of {jobs} job(s), {floors.sum():g} W")
    low, high = float(min(weighted.min(), 0.0)), float(weighted.max())
    if least_watts(caps, weighted, low).sum() <= budget_watts:
        high = low
    for _ in range(STEPS):
        middle = (low + high) / 2.0
        fits = least_watts(caps, weighted, middle).sum() <= budget_watts
        low, high = (low, middle) if fits else (middle, high)
    found = least_watts(caps, weighted, high)
    room = greatest - found
    if room.sum() > 0.0:
        found = found + room * min((budget_watts - found.sum()) / room.sum(), 1.0)
    return Splits(found, float(_at(caps, weighted, found).max()))


def least_watts(caps: Floats, slowdowns: Floats, most: float) -> Floats:
    """Of each job the least cap that slows it down by no more than this; its greatest where none does."""
    rows = np.arange(caps.shape[0])
    after = np.sum(slowdowns > most, axis=1)  # they fall: so many points are too slow
    i = np.clip(after, 1, caps.shape[1] - 1)
    left, right = slowdowns[rows, i - 1], slowdowns[rows, i]
    part = np.clip(np.divide(left - most, left - right, out=np.ones_like(left), where=left > right), 0.0, 1.0)
    between = caps[rows, i - 1] + part * (caps[rows, i] - caps[rows, i - 1])
    return np.where(after == 0, caps[:, 0], between)


def _at(caps: Floats, slowdowns: Floats, chosen: Floats) -> Floats:
    rows = np.arange(caps.shape[0])
    i = np.clip(np.sum(caps <= chosen[:, None], axis=1), 1, caps.shape[1] - 1)
    gap = caps[rows, i] - caps[rows, i - 1]
    part = np.divide(chosen - caps[rows, i - 1], gap, out=np.zeros_like(gap), where=gap > 0.0)
    return np.asarray(slowdowns[rows, i - 1] + np.clip(part, 0.0, 1.0) * (slowdowns[rows, i] - slowdowns[rows, i - 1]))
