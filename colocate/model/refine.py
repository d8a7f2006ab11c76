"""A class's curve, made better by the jobs of that class that run: what each did a second under which cap.

How fast a job is at all differs from job to job, so each has a scale of its own, and only what it did under one cap
against what it did under another tells of the curve: log(rate) = scale - log(1 + S(cap)). What a job did is weighed by
its seconds against the curve that was there before; between two of its caps an observation counts for both by how near
they are. The scales and the corrections are found in turn (backfitting: Hastie and Tibshirani, 1990), and the result
is made to fall again (pool adjacent violators). A job that ran under one cap alone says nothing, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from colocate.model.power import falling

Floats = NDArray[np.float64]
BEFORE_SECONDS = 600.0
"""What was there before counts as much as so long a time at each of its caps: about what a sweep runs there."""
ROUNDS = 30
LEAST_RATE = 1e-12
MOST_CORRECTION = float(np.log(3.0))
"""Of a time at one cap: what would change it by more is no correction, but another job or a mistake."""
NEAR_WATTS = 5.0
"""Limits are told in steps: one so little beyond a curve's end is at it."""


class Did(NamedTuple):
    """What one job did under one cap."""

    watts: float
    """Of each of its cards."""
    work: float
    """In any unit, the same for all of this job's."""
    seconds: float


def refined(caps: Floats, slowdowns: Floats, jobs: Sequence[Sequence[Did]]) -> tuple[Floats, Floats]:
    """The slowdowns at these caps, better known, and by how many seconds of jobs each is; shapes (caps,).

    `caps` ascend, `slowdowns` never rise. The slowdown at the greatest cap stays what it is: it is what the others are
    against. Caps outside of them are not used.
    """
    known, reach = np.log1p(slowdowns), (caps[0] - NEAR_WATTS, caps[-1] + NEAR_WATTS)
    rows = [(j, d) for j, job in enumerate(jobs) for d in job if reach[0] <= d.watts <= reach[1] and _moved(d)]
    if not rows:
        return slowdowns, np.zeros_like(caps)
    of = np.array([j for j, _ in rows])
    at, work, seconds = (np.array(column) for column in zip(*(did for _, did in rows), strict=True))
    at, log_rate = np.clip(at, caps[0], caps[-1]), np.log(work / seconds)
    right = np.clip(np.searchsorted(caps, at, side="right"), 1, caps.size - 1)
    share = (at - caps[right - 1]) / (caps[right] - caps[right - 1])
    straight = np.zeros((at.size, caps.size))
    straight[np.arange(at.size), right - 1], straight[np.arange(at.size), right] = 1.0 - share, share
    weights, correction = np.maximum(np.bincount(of, seconds), 1e-9), np.zeros_like(caps)
    by = straight * seconds[:, None]
    for _ in range(ROUNDS):
        times = np.exp(known + correction)  # between two caps the straight line counts, of the time and not of its log
        told = straight @ times
        near = straight * times / told[:, None]
        by = near * seconds[:, None]
        scales = np.bincount(of, seconds * (log_rate + np.log(told))) / weights
        missed = scales[of] - log_rate - np.log(told) + near @ correction
        correction = np.clip((by.T @ missed) / (BEFORE_SECONDS + by.sum(axis=0)), -MOST_CORRECTION, MOST_CORRECTION)
        correction[-1] = 0.0
    heard = (straight * seconds[:, None])[_differs(of, at)].sum(axis=0)
    longer = np.maximum(falling(known + correction, BEFORE_SECONDS + by.sum(axis=0)), known[-1])
    longer[-1] = known[-1]
    return np.expm1(longer), heard


def _moved(did: Did) -> bool:
    """Whether so much was done that its logarithm says something."""
    return did.seconds > 0.0 and did.work > LEAST_RATE * did.seconds


def _differs(of: NDArray[np.int64], at: Floats) -> NDArray[np.bool_]:
    """Whether an observation's job ran under another cap too."""
    least, most = np.full(of.max() + 1, np.inf), np.full(of.max() + 1, -np.inf)
    np.minimum.at(least, of, at)
    np.maximum.at(most, of, at)
    return np.asarray((most > least)[of])
