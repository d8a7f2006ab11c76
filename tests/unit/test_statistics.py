"""Intervals of pairs: honest when there are few, and when several services are judged together."""

import numpy as np
import pytest

from colocate.model.special import student_quantile
from colocate.model.statistics import difference_interval, ratio_interval
from colocate.report.evaluate import paired

RUNS = 2000


@pytest.mark.parametrize("pairs", [4, 6, 10])
def test_no_effect_is_called_one_in_at_most_five_of_a_hundred_runs(pairs):
    generator, wrong = np.random.default_rng(pairs), 0
    for _ in range(RUNS):
        drift = generator.normal(0, 3, pairs)  # of the hour, which both windows of a pair share
        on, off = drift + generator.normal(0, 1, pairs), drift + generator.normal(0, 1, pairs)
        found = difference_interval(list(on), list(off))
        wrong += not found.low <= 0 <= found.high
    assert wrong / RUNS <= 0.06  # 0.05, and what 2,000 runs leave to chance


def test_one_verdict_over_many_services_is_wrong_no_more_often():
    generator, wrong, services = np.random.default_rng(5), 0, 8
    for _ in range(RUNS // 2):
        logs = generator.normal(0, 0.3, (services, 4))
        found = [ratio_interval(list(np.exp(row)), [1.0] * 4, services) for row in logs]
        wrong += any(f.low > 1 or f.high < 1 for f in found)
    assert wrong / (RUNS // 2) <= 0.065


@pytest.mark.parametrize(
    ("probability", "freedom", "value"),
    [(0.975, 1, 12.706), (0.975, 3, 3.182), (0.975, 29, 2.045), (0.995, 9, 3.250), (0.975, 1e6, 1.960)],
)
def test_students_quantiles_are_those_of_the_tables(probability, freedom, value):
    assert student_quantile(probability, freedom) == pytest.approx(value, abs=1e-3)


@pytest.mark.parametrize(
    ("arms", "pairs"),
    [
        pytest.param("on off off on", ([1.0, 4.0], [2.0, 3.0]), id="pairs as they were drawn"),
        pytest.param("on on off on", ([2.0], [3.0]), id="a window without a neighbour of the other arm is left out"),
        pytest.param("on lost off on", ([4.0], [3.0]), id="a lost window pairs nobody across its gap"),
    ],
)
def test_windows_are_compared_with_their_neighbours(arms, pairs):
    windows = {i: (arm, float(i + 1)) for i, arm in enumerate(arms.split()) if arm != "lost"}
    assert paired(windows, "off") == pairs
