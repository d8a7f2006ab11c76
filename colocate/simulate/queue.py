"""One pool of equal processors, and jobs that wait for it: the event loop, compiled.

A job is chosen among those that wait by the least score, and has the next processors: it is not chosen anew while it
waits for them, and nobody arrives in the queue before it has to wait. With backfilling, jobs are started past it in the
order of their arrival, if by what they asked for they are over before it could start, which is worked out once, by what
the running ones asked for (the protocol of RLScheduler, SC 2020).
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
BOUND_SECONDS = 10.0
"""Shorter jobs count as so long in a bounded slowdown (Feitelson and others, 1997)."""


class Jobs(NamedTuple):
    """Jobs by their arrival; one array each, seconds and processors."""

    submit: Floats
    run: Floats
    request: Floats
    """What they asked for."""
    procs: Ints

    def part(self, first: int, last: int) -> Jobs:
        """From one to before another."""
        at = slice(first, last)
        return Jobs(self.submit[at], self.run[at], self.request[at], self.procs[at])


def started(jobs: Jobs, score: Floats, size: int, *, backfill: bool) -> Floats:
    """When each job starts, seconds, on a pool of `size` processors; the least score first, equals as they arrived.

    Raises ValueError where a job never fits.
    """
    if len(jobs.procs) and (int(jobs.procs.max()) > size or int(jobs.procs.min()) < 1):
        at = int(np.argmax((jobs.procs > size) | (jobs.procs < 1)))
        raise ValueError(f"job {at} asks for {jobs.procs[at]} processors of {size}")
    return _run(jobs.submit, jobs.run, jobs.request, jobs.procs, score, size, backfill)


def bounded_slowdown(jobs: Jobs, start: Floats) -> float:
    """The mean of (wait + run) / run, short jobs counting as ten seconds long, none as less than one."""
    taken = start - jobs.submit + jobs.run
    return float(np.maximum(taken / np.maximum(jobs.run, BOUND_SECONDS), 1.0).mean())


@numba.njit(cache=True, nogil=True)
def _run(submit: Floats, run: Floats, request: Floats, procs: Ints, score: Floats, size: int, backfill: bool) -> Floats:
    n = submit.size
    start = np.full(n, np.nan)
    waiting = [(0.0, 0) for _ in range(0)]
    ends = [(0.0, 0) for _ in range(0)]
    """When each ends, and of equals who was started first: how many before it, times n, and the job."""
    queue = np.empty(n, np.int64)
    """Those that wait, as they arrived; only for backfilling."""
    queued, free, arrived, now, done = 0, size, 0, 0.0, 0
    while done < n:
        while not waiting:  # until somebody waits
            if ends and (arrived >= n or ends[0][0] < submit[arrived]):
                end, code = heapq.heappop(ends)
                now = max(now, end)
                free += procs[code % n]
            else:
                now = max(now, submit[arrived])
                heapq.heappush(waiting, (score[arrived], arrived))
                queue[queued] = arrived
                queued += 1
                arrived += 1
        _, chosen = heapq.heappop(waiting)
        if not np.isnan(start[chosen]):
            continue  # it was started past another one
        if procs[chosen] > free:
            shadow = now
            if backfill:
                shadow = _shadow(ends, start, request, procs, free, procs[chosen], now)
                _better_first(queue[:queued], submit, score)
            while procs[chosen] > free:
                if backfill:
                    kept = 0
                    for k in range(queued):
                        j = queue[k]
                        if not np.isnan(start[j]):
                            continue
                        if procs[j] <= free and now + request[j] < shadow:
                            start[j] = now
                            free -= procs[j]
                            heapq.heappush(ends, (now + run[j], done * n + j))
                            done += 1
                            continue
                        queue[kept] = j
                        kept += 1
                    queued = kept
                if arrived < n and submit[arrived] <= ends[0][0]:
                    now = max(now, submit[arrived])
                    heapq.heappush(waiting, (score[arrived], arrived))
                    queue[queued] = arrived
                    queued += 1
                    arrived += 1
                else:
                    end, code = heapq.heappop(ends)
                    now = max(now, end)
                    free += procs[code % n]
        start[chosen] = now
        free -= procs[chosen]
        heapq.heappush(ends, (now + run[chosen], done * n + chosen))
        done += 1
        if not waiting:
            queued = 0
    return start


@numba.njit(cache=True, nogil=True)
def _better_first(queue: Ints, submit: Floats, score: Floats) -> None:
    """Of those that arrived together the better one is asked first."""
    for k in range(1, queue.size):
        at = k
        while at > 0 and submit[queue[at]] == submit[queue[at - 1]] and score[queue[at]] < score[queue[at - 1]]:
            queue[at], queue[at - 1] = queue[at - 1], queue[at]
            at -= 1


@numba.njit(cache=True, nogil=True)
def _shadow(
    ends: list[tuple[float, int]], start: Floats, request: Floats, procs: Ints, free: int, wanted: int, now: float
) -> float:
    """When, by what the running jobs asked for, so many processors are free."""
    count = len(ends)
    until, of = np.empty(count), np.empty(count, np.int64)
    for i in range(count):
        of[i] = ends[i][1] % start.size
        until[i] = start[of[i]] + request[of[i]]
    for i in np.argsort(until):
        free += procs[of[i]]
        if free >= wanted:
            return float(until[i])
    return now
