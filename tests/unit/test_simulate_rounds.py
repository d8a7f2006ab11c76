"""Jobs that can be stopped, on one pool in rounds; and jobs that share their GPUs, as in Muri."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colocate.simulate.reproduce import muri
from colocate.simulate.rounds import (
    FIFO,
    LEAST_HAD,
    LEAST_LEFT,
    LEAST_SERVICE_LEFT,
    MOST_DELAYED,
    SHORTEST,
    Runs,
    ends,
    queue_of,
)

ROUND, RESTART = 10.0, 0.0


def runs(*rows):
    """Of (submit, run, gpus)."""
    submit, run, gpus = (np.array(column, float) for column in zip(*rows, strict=True))
    return Runs(submit, run, run, gpus.astype(np.int64))


@pytest.mark.parametrize(
    ("order", "preempts", "strict", "expected"),
    [
        pytest.param(FIFO, False, True, [100, 140, 150], id="as they came, the large one blocks the small one"),
        pytest.param(FIFO, False, False, [100, 140, 30], id="as they came, who fits beside goes past"),
        pytest.param(SHORTEST, False, True, [100, 140, 30], id="the shortest of those that wait, none is stopped"),
        pytest.param(LEAST_LEFT, True, False, [140, 60, 30], id="who has least left, stopped for it"),
        pytest.param(LEAST_SERVICE_LEFT, True, True, [150, 60, 30], id="by GPU time left, stopped for it"),
    ],
)
def test_who_ends_when(order, preempts, strict, expected):
    jobs = runs((0, 100, 3), (5, 40, 4), (15, 10, 1))
    assert ends(jobs, 4, order, ROUND, RESTART, preempts, strict).tolist() == expected


def test_tiresias_lets_who_has_had_little_go_first():
    jobs = runs((0, 10000, 1), (5000, 100, 1))
    assert ends(jobs, 1, LEAST_HAD, ROUND, RESTART, True, False).tolist() == [10100, 5100]
    assert [queue_of(had) for had in (0, 3249, 3250, 7200, 18000)] == [0, 0, 1, 2, 3]


def test_whoever_goes_on_stands_for_the_restart_first():
    jobs = runs((0, 100, 1), (25, 10, 1))
    assert ends(jobs, 1, LEAST_LEFT, ROUND, 5.0, True, False).tolist() == [130, 45]


worlds = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 200), st.integers(1, 4)), min_size=1, max_size=8).map(
    lambda rows: runs(*sorted(rows))
)


@settings(deadline=None, max_examples=60)
@given(
    worlds, st.sampled_from([FIFO, SHORTEST, LEAST_LEFT, LEAST_SERVICE_LEFT, LEAST_HAD, MOST_DELAYED]), st.booleans()
)
def test_everybody_ends_no_sooner_than_can_be_and_the_pool_is_never_more_than_full(jobs, order, preempts):
    end = ends(jobs, 4, order, ROUND, RESTART, preempts, False)
    assert (end >= jobs.submit + jobs.run - 1e-6).all()
    work, span = float((jobs.run * jobs.gpus).sum()), float(end.max() - jobs.submit.min())
    assert work <= 4 * span + 1e-6, "no more was done than four GPUs can"


@settings(deadline=None, max_examples=60)
@given(worlds)
def test_on_one_gpu_each_least_left_first_has_the_least_mean_where_all_are_there(jobs):
    """Schrage 1968, up to the rounds: all of one GPU, all there from the start."""
    ones = Runs(np.zeros(len(jobs.run)), np.ceil(jobs.run / ROUND) * ROUND, jobs.run, np.ones(len(jobs.run), np.int64))
    best = ends(ones, 1, LEAST_LEFT, ROUND, RESTART, True, False).mean()
    for order in (FIFO, SHORTEST, LEAST_HAD, MOST_DELAYED):
        assert best <= ends(ones, 1, order, ROUND, RESTART, True, False).mean() + 1e-6


kinds = st.builds(
    lambda stages: muri.Kind(1, sum(stages), (*stages, 0.0)), st.tuples(*[st.integers(0, 9).map(float)] * 3)
)


@given(st.lists(kinds, min_size=2, max_size=3))
def test_jobs_share_gpus_in_the_best_order_of_their_stages(group):
    steps = muri.MOST_TOGETHER
    every = [
        sum(max(k.stages[(s + o) % steps] for o, k in zip(offsets, group, strict=True)) for s in range(steps))
        for offsets in itertools.permutations(range(steps), len(group))
    ]
    assert muri.together(tuple(group)) == min(every)


def test_who_computes_and_who_reads_share_their_gpus_and_two_who_compute_do_not():
    computes, reads = muri.Kind(1, 10.0, (10.0, 0.0, 0.0, 0.0)), muri.Kind(1, 10.0, (0.0, 10.0, 0.0, 0.0))
    assert sorted(muri.grouped([computes, reads, computes, reads])) == [(reads, computes)] * 2
    assert muri.grouped([computes, computes]) == [(computes,)] * 2
    assert muri.grouped([computes, muri.Kind(2, 10.0, reads.stages)]) == [
        (computes,),
        (muri.Kind(2, 10.0, reads.stages),),
    ]
