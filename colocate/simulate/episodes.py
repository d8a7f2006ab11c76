"""The queue of `queue.py` one decision at a time, many pools side by side: environments and training run on it.

A decision is which of the jobs that wait has the next processors. Between two of them time passes by the same protocol,
so that an episode in which the least score is always chosen starts every job when `queue.started` says.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from colocate.simulate.queue import BOUND_SECONDS, Jobs

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
FREE, ARRIVED, QUEUED, RUNNING, STARTED, FIRST = range(6)
"""Columns of `Pools.counts`: free processors; jobs that have come, that wait, that run, that were started; and the
number in the trace of the first job of the episode."""
DAY_HALF_SECONDS, LONG_SECONDS = 43_200.0, 86_400.0
FEATURES = 8
WEIGHTS = (
    "log run",
    "log processors",
    "log wait",
    "fits",
    "run x processors",
    "wait x run",
    "run x share",
    "fits x run",
)
"""Of a linear score: by what each of its weights counts."""


class Pools(NamedTuple):
    """Pools side by side, a row each, every one with an episode of the same number of jobs."""

    now: Floats
    """(pools,) seconds."""
    counts: Ints
    """(pools, 6), see FREE."""
    start: Floats
    """(pools, jobs) when each was started; NaN: not yet."""
    queue: Ints
    """(pools, jobs) who waits, as they arrived, by number in the episode."""
    running: Ints
    """(pools, jobs) who runs, as they were started."""


def new_pools(pools: int, jobs: int) -> Pools:
    """To be begun with `begin`."""
    queue, running = (np.zeros((pools, jobs), np.int64) for _ in range(2))
    return Pools(np.zeros(pools), np.zeros((pools, 6), np.int64), np.full((pools, jobs), np.nan), queue, running)


@numba.njit(cache=True, nogil=True)
def begin(pools: Pools, jobs: Jobs, size: int, i: int, first: int) -> None:
    """An empty pool, and the episode of the trace's jobs from `first` on, up to the first decision."""
    pools.counts[i, :] = 0
    pools.counts[i, FREE], pools.counts[i, FIRST] = size, first
    pools.start[i, :] = np.nan
    pools.now[i] = jobs.submit[first]
    while pools.counts[i, QUEUED] == 0:
        _pass(pools, jobs, i)


@numba.njit(cache=True, nogil=True)
def _next_end(pools: Pools, jobs: Jobs, i: int) -> tuple[float, int]:
    """When the next job ends, of equals who was started first, and its place among those that run."""
    first, at, best = pools.counts[i, FIRST], -1, np.inf
    for r in range(pools.counts[i, RUNNING]):
        j = pools.running[i, r]
        end = pools.start[i, j] + jobs.run[first + j]
        if end < best:
            best, at = end, r
    return best, at


@numba.njit(cache=True, nogil=True)
def _pass(pools: Pools, jobs: Jobs, i: int) -> None:
    """Until a job comes, or one ends; of both at once it comes first."""
    counts, first = pools.counts[i], pools.counts[i, FIRST]
    end, at = _next_end(pools, jobs, i)
    if counts[ARRIVED] < pools.start.shape[1] and jobs.submit[first + counts[ARRIVED]] <= end:
        pools.now[i] = max(pools.now[i], jobs.submit[first + counts[ARRIVED]])
        pools.queue[i, counts[QUEUED]] = counts[ARRIVED]
        counts[QUEUED] += 1
        counts[ARRIVED] += 1
        return
    pools.now[i] = max(pools.now[i], end)
    counts[FREE] += jobs.procs[first + pools.running[i, at]]
    counts[RUNNING] -= 1
    for r in range(at, counts[RUNNING]):
        pools.running[i, r] = pools.running[i, r + 1]


@numba.njit(cache=True, nogil=True)
def _start(pools: Pools, jobs: Jobs, i: int, at: int) -> float:
    """Start the job at a place of the queue now; its bounded slowdown."""
    counts, first, j = pools.counts[i], pools.counts[i, FIRST], pools.queue[i, at]
    for q in range(at, counts[QUEUED] - 1):
        pools.queue[i, q] = pools.queue[i, q + 1]
    counts[QUEUED] -= 1
    pools.start[i, j] = pools.now[i]
    pools.running[i, counts[RUNNING]] = j
    counts[RUNNING] += 1
    counts[STARTED] += 1
    counts[FREE] -= jobs.procs[first + j]
    run = jobs.run[first + j]
    return float(max((pools.now[i] - jobs.submit[first + j] + run) / max(run, BOUND_SECONDS), 1.0))


@numba.njit(cache=True, nogil=True)
def _shadow(pools: Pools, jobs: Jobs, i: int, wanted: int) -> float:
    """When, by what the running jobs asked for, so many processors are free."""
    count, first, free = pools.counts[i, RUNNING], pools.counts[i, FIRST], pools.counts[i, FREE]
    until = np.empty(count)
    for r in range(count):
        j = pools.running[i, r]
        until[r] = pools.start[i, j] + jobs.request[first + j]
    for r in np.argsort(until):
        free += jobs.procs[first + pools.running[i, r]]
        if free >= wanted:
            return float(until[r])
    return float(pools.now[i])


@numba.njit(cache=True, nogil=True)
def choose(pools: Pools, jobs: Jobs, i: int, at: int, backfill: bool) -> float:
    """The job at a place of the queue has the next processors; up to the next decision, or the episode's end.

    The sum of the bounded slowdowns of all jobs that were started by then.
    """
    counts, first, n = pools.counts[i], pools.counts[i, FIRST], pools.start.shape[1]
    chosen, found = pools.queue[i, at], 0.0
    wanted = jobs.procs[first + chosen]
    shadow = _shadow(pools, jobs, i, wanted) if backfill and wanted > counts[FREE] else 0.0
    while wanted > counts[FREE]:
        if backfill:
            q = 0
            while q < counts[QUEUED]:
                j = pools.queue[i, q]
                fits = jobs.procs[first + j] <= counts[FREE]
                if fits and pools.now[i] + jobs.request[first + j] < shadow:
                    found += _start(pools, jobs, i, q)
                else:
                    q += 1
        _pass(pools, jobs, i)
    for q in range(counts[QUEUED]):
        if pools.queue[i, q] == chosen:
            found += _start(pools, jobs, i, q)
            break
    while counts[QUEUED] == 0 and counts[STARTED] < n:
        _pass(pools, jobs, i)
    return found


def looks(jobs: Jobs, size: int) -> NDArray[np.float32]:
    """(jobs, 3) of 0 to 1: what of an observation of each job never changes."""
    asked = np.minimum(np.log1p(jobs.request) / np.log1p(LONG_SECONDS), 1.0)
    columns = asked, jobs.procs / size, np.log1p(jobs.procs) / np.log1p(size)
    return np.ascontiguousarray(np.stack(columns, axis=1), dtype=np.float32)


@numba.njit(cache=True, nogil=True)
def observe(pools: Pools, jobs: Jobs, look: NDArray[np.float32], size: int, i: int, seen: NDArray[np.float32]) -> None:
    """The first jobs that wait, a row each of FEATURES numbers from 0 to 1; rows of nobody are 0."""
    first, now, free = pools.counts[i, FIRST], pools.now[i], pools.counts[i, FREE]
    waiting = min(pools.counts[i, QUEUED], seen.shape[0])
    left, share = np.float32(free / size), np.float32(pools.counts[i, QUEUED] / pools.start.shape[1])
    for q in range(waiting):
        j = first + pools.queue[i, q]
        waited = now - jobs.submit[j]
        seen[q, 0] = 1.0
        seen[q, 1] = waited / (waited + DAY_HALF_SECONDS)
        seen[q, 2], seen[q, 3], seen[q, 4] = look[j, 0], look[j, 1], look[j, 2]
        seen[q, 5] = 1.0 if jobs.procs[j] <= free else 0.0
        seen[q, 6], seen[q, 7] = left, share
    seen[waiting:] = 0.0


@numba.njit(cache=True, nogil=True)
def fixed_scores(jobs: Jobs, size: int, weights: Floats) -> tuple[Floats, Floats]:
    """Of each job, what of its linear score (see WEIGHTS) never changes, and the log of what it asks for."""
    lr, ln = np.log10(jobs.request + 1.0), np.log10(jobs.procs)
    return weights[0] * lr + weights[1] * ln + weights[4] * lr * ln + weights[6] * lr * jobs.procs / size, lr


@numba.njit(cache=True, nogil=True)
def least(pools: Pools, jobs: Jobs, i: int, weights: Floats, fixed: Floats, lr: Floats) -> int:
    """The place of the job with the least linear score; of equals who came first."""
    first, now, free = pools.counts[i, FIRST], pools.now[i], pools.counts[i, FREE]
    best, at = np.inf, 0
    waits = weights[2] != 0.0 or weights[5] != 0.0
    for q in range(pools.counts[i, QUEUED]):
        j = first + pools.queue[i, q]
        score = fixed[j]
        if jobs.procs[j] <= free:
            score += weights[3] + weights[7] * lr[j]
        if waits:
            score += (weights[2] + weights[5] * lr[j]) * np.log10(now - jobs.submit[j] + 1.0)
        if score < best:
            best, at = score, q
    return at


@numba.njit(cache=True, nogil=True)
def rated(pools: Pools, jobs: Jobs, size: int, firsts: Ints, weights: Floats, backfill: bool) -> Floats:
    """The average bounded slowdown of each episode that begins at `firsts`, under a linear score."""
    found, n = np.zeros(firsts.size), pools.start.shape[1]
    fixed, lr = fixed_scores(jobs, size, weights)
    for e in range(firsts.size):
        begin(pools, jobs, size, 0, firsts[e])
        while pools.counts[0, STARTED] < n:
            found[e] += choose(pools, jobs, 0, least(pools, jobs, 0, weights, fixed, lr), backfill)
    found /= n
    return found


@numba.njit(cache=True, nogil=True)
def step_all(
    pools: Pools,
    jobs: Jobs,
    look: NDArray[np.float32],
    size: int,
    at: Ints,
    backfill: bool,
    slowdowns: Floats,
    seen: NDArray[np.float32],
) -> None:
    """`choose` and `observe` in every pool; a place below 0 leaves that pool as it is."""
    for i in range(at.size):
        if at[i] >= 0:
            slowdowns[i] = choose(pools, jobs, i, at[i], backfill)
            observe(pools, jobs, look, size, i, seen[i])
