"""The queue simulator against a slow one that is read off the protocol, and laws that every queue keeps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colocate.simulate.queue import Jobs, bounded_slowdown, started

SIZE = 8


def jobs_of(rows):
    """(gap since the one before, run, asked for longer by, processors) of each."""
    gaps, run, more, procs = (np.array(column) for column in zip(*rows, strict=True))
    run = run.astype(float)
    return Jobs(np.cumsum(gaps).astype(float), run, run + more, procs.astype(np.int64))


ROWS = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9), st.integers(0, 4), st.integers(1, SIZE)), min_size=1)


def slowly(jobs, score, size, backfill):
    """The protocol in plain Python, with lists that are sorted anew each time."""
    now, free, arrived, start = 0.0, size, 0, {}
    queue: list[int] = []
    running: list[int] = []
    n = len(jobs.submit)

    def begin(j):
        nonlocal free
        start[j] = now
        free -= jobs.procs[j]
        running.append(j)
        queue.remove(j)

    def step():
        nonlocal now, free, arrived
        running.sort(key=lambda j: start[j] + jobs.run[j])
        end = start[running[0]] + jobs.run[running[0]] if running else np.inf
        if arrived < n and jobs.submit[arrived] <= end:
            now = max(now, jobs.submit[arrived])
            queue.append(arrived)
            arrived += 1
        else:
            now = max(now, end)
            free += jobs.procs[running.pop(0)]

    while len(start) < n:
        while not queue:
            step()
        queue.sort(key=lambda j: score[j])
        chosen = queue[0]
        if jobs.procs[chosen] > free and backfill:
            left = free
            for j in sorted(running, key=lambda j: start[j] + jobs.request[j]):
                left += jobs.procs[j]
                shadow = start[j] + jobs.request[j]
                if left >= jobs.procs[chosen]:
                    break
        while jobs.procs[chosen] > free:
            if backfill:
                queue.sort(key=lambda j: jobs.submit[j])
                for j in queue[:]:
                    if jobs.procs[j] <= free and now + jobs.request[j] < shadow:
                        begin(j)
            step()
        begin(chosen)
    return np.array([start[j] for j in range(n)])


@settings(max_examples=300, deadline=None)
@given(rows=ROWS, backfill=st.booleans(), by=st.sampled_from(["submit", "request", "procs"]))
def test_every_job_starts_when_the_protocol_says(rows, backfill, by):
    jobs = jobs_of(rows)
    score = getattr(jobs, by).astype(float)
    assert started(jobs, score, SIZE, backfill=backfill).tolist() == slowly(jobs, score, SIZE, backfill).tolist()


@settings(max_examples=200, deadline=None)
@given(rows=ROWS, backfill=st.booleans(), seed=st.integers(0, 99))
def test_no_job_is_lost_and_the_pool_is_never_exceeded(rows, backfill, seed):
    jobs = jobs_of(rows)
    start = started(jobs, np.random.default_rng(seed).random(len(rows)), SIZE, backfill=backfill)
    assert (start >= jobs.submit).all()
    for at in start:
        assert jobs.procs[(start <= at) & (at < start + jobs.run)].sum() <= SIZE


@settings(max_examples=200, deadline=None)
@given(rows=ROWS, more=st.integers(1, 8))
def test_more_processors_start_no_job_later_in_the_order_of_arrival(rows, more):
    """Strict order without backfilling has no anomaly: who runs at a moment ran then with fewer as well, or had run."""
    jobs = jobs_of(rows)
    few, many = (started(jobs, jobs.submit, size, backfill=False) for size in (SIZE, SIZE + more))
    assert (many <= few).all()


def test_a_job_that_never_fits_is_named():
    jobs = jobs_of([(0, 1, 0, 1), (0, 1, 0, SIZE + 1)])
    with pytest.raises(ValueError, match=f"job 1 asks for {SIZE + 1} processors of {SIZE}"):
        started(jobs, jobs.submit, SIZE, backfill=False)


def test_a_short_job_counts_as_ten_seconds_and_none_as_faster_than_alone():
    jobs = Jobs(np.zeros(2), np.array([1.0, 20.0]), np.array([1.0, 20.0]), np.ones(2, np.int64))
    assert bounded_slowdown(jobs, np.array([19.0, 0.0])) == pytest.approx((2.0 + 1.0) / 2)
