"""Jobs that can be stopped and go on later, on one pool of GPUs: who runs is decided anew in rounds.

For the orders that papers compare: by arrival, by what a job takes or has left (oracles), by what it has had (2D-LAS of
Tiresias, NSDI 2019), by how much it is delayed (finish-time fairness of Themis, NSDI 2020). Where GPUs are on which
nodes is not looked at. A job that ends within a round leaves its GPUs idle until the next one.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]
FIFO, SHORTEST, LEAST_LEFT, LEAST_SERVICE_LEFT, LEAST_HAD, MOST_DELAYED = range(6)
QUEUE_GPU_SECONDS = (3250.0, 7200.0, 18000.0)
"""What a job has had when it goes to the next queue of Tiresias (its `run_sim.py`)."""


class Runs(NamedTuple):
    """Jobs by their arrival; one array each."""

    submit: Floats
    """Seconds."""
    run: Floats
    """Seconds on its GPUs."""
    guess: Floats
    """The same as whoever decides believes it, for SHORTEST."""
    gpus: Ints


@numba.njit(cache=True, nogil=True)
def queue_of(had: float) -> int:
    """Of Tiresias, by GPU-seconds of service."""
    for i in range(len(QUEUE_GPU_SECONDS)):
        if had < QUEUE_GPU_SECONDS[i]:
            return i
    return len(QUEUE_GPU_SECONDS)


@numba.njit(cache=True, nogil=True)
def key_of(order: int, jobs: Runs, j: int, left: float, now: float) -> float:
    """The least is first; of equals who came first."""
    if order == FIFO:
        return float(jobs.submit[j])
    if order == SHORTEST:
        return float(jobs.guess[j])
    if order == LEAST_LEFT:
        return left
    if order == LEAST_SERVICE_LEFT:
        return float(left * jobs.gpus[j])
    if order == LEAST_HAD:
        return float(queue_of((jobs.run[j] - left) * jobs.gpus[j]))
    return float(-(now - jobs.submit[j] + left) / max(jobs.run[j], 1.0))


@numba.njit(cache=True, nogil=True)
def _sort(line: Ints, count: int, key: Floats) -> None:
    """Those that wait or run, by their keys; they were sorted, but for a few."""
    for i in range(1, count):
        j, at = line[i], i
        while at > 0 and key[line[at - 1]] > key[j]:
            line[at] = line[at - 1]
            at -= 1
        line[at] = j


@numba.njit(cache=True, nogil=True)
def _admit(
    line: Ints, count: int, jobs: Runs, capacity: int, runs: Flags, delay: Floats, restart: float, strict: bool
) -> None:
    """Who runs in this round."""
    free, blocked = capacity, False
    for i in range(count):
        j = line[i]
        fits = jobs.gpus[j] <= free and not blocked
        blocked = blocked or (strict and not fits)
        if fits:
            free -= jobs.gpus[j]
            if not runs[j]:
                delay[j] = restart
        runs[j] = fits


@numba.njit(cache=True, nogil=True)
def _work(
    line: Ints, count: int, now: float, passed: float, runs: Flags, delay: Floats, left: Floats, end: Floats
) -> int:
    """What is done in so many seconds; how many are left."""
    kept = 0
    for i in range(count):
        j = line[i]
        if runs[j]:
            waits = min(delay[j], passed)
            delay[j] -= waits
            worked = passed - waits
            if left[j] <= worked + 1e-9:
                end[j], runs[j] = now + waits + left[j], False
                continue
            left[j] -= worked
        line[kept] = j
        kept += 1
    return kept


@numba.njit(cache=True, nogil=True)
def ends(
    jobs: Runs, capacity: int, order: int, round_seconds: float, restart_seconds: float, preempts: bool, strict: bool
) -> Floats:
    """When each job ends, seconds. `strict`: nobody is looked at past one that does not fit.

    Every job must fit the pool. A job that goes on, or begins, works only after `restart_seconds`.
    """
    n = jobs.submit.size
    end, left, key, delay = np.full(n, np.nan), jobs.run.copy(), np.zeros(n), np.zeros(n)
    line, runs, count, arrived, now = np.empty(n, np.int64), np.zeros(n, np.bool_), 0, 0, 0.0
    while arrived < n or count > 0:
        if count == 0:
            now = max(now, np.ceil(jobs.submit[arrived] / round_seconds) * round_seconds)
        while arrived < n and jobs.submit[arrived] <= now:
            line[count] = arrived
            count, arrived = count + 1, arrived + 1
        for i in range(count):
            stays = runs[line[i]] and not preempts
            key[line[i]] = -np.inf if stays else key_of(order, jobs, line[i], left[line[i]], now)
        _sort(line, count, key)
        _admit(line, count, jobs, capacity, runs, delay, restart_seconds, strict)
        then = now + round_seconds
        if order <= LEAST_SERVICE_LEFT:  # nobody overtakes between two events
            then = jobs.submit[arrived] if arrived < n else np.inf
            for i in range(count):
                if runs[line[i]]:
                    then = min(then, now + delay[line[i]] + left[line[i]])
        passed = max(np.ceil((then - now) / round_seconds), 1.0) * round_seconds
        count, now = _work(line, count, now, passed, runs, delay, left, end), now + passed
    return end
