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
    known = np.log1p(slowdowns)
    rows = [(j, d) for j, job in enumerate(jobs) for d in job if caps[0] <= d.watts <= caps[-1] and _moved(d)]
    if not rows:
        return slowdowns, np.zeros_like(caps)
    of = np.array([j for j, _ in rows])
    at, work, seconds = (np.array(column) for column in zip(*(did for _, did in rows), strict=True))
    log_rate = np.log(work / seconds)
    right = np.clip(np.searchsorted(caps, at, side="right"), 1, caps.size - 1)
    share = (at - caps[right - 1]) / (caps[right] - caps[right - 1])
    near = np.zeros((at.size, caps.size))
    near[np.arange(at.size), right - 1], near[np.arange(at.size), right] = 1.0 - share, share
    told = near @ known
    weights = np.bincount(of, seconds)
    by, correction = near * seconds[:, None], np.zeros_like(caps)
    for _ in range(ROUNDS):
        scales = np.bincount(of, seconds * (log_rate + told + near @ correction)) / np.maximum(weights, 1e-9)
        missed = scales[of] - log_rate - told
        correction = (by.T @ missed) / (BEFORE_SECONDS + by.sum(axis=0))
        correction[-1] = 0.0
    heard = by[_differs(of, at)].sum(axis=0)
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
