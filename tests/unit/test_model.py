"""The model: jitted kernels against their numpy twins, histograms, slack, and the forecast's state."""

import itertools
import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from colocate.calibrate.judge import judge
from colocate.errors import StateTooNew
from colocate.model import kernels, reference
from colocate.model.forecast import ModelState, forecast
from colocate.model.histogram import CPU_BOUNDS_CORES, exponential_bounds
from colocate.model.interference import effective_machine_utilization, machines_saved
from colocate.model.slack import quantile_of, slack_of_latency, trim_window, window_counts
from colocate.model.state import from_builtins, to_builtins
from colocate.model.statistics import difference_interval, mean_interval, ratio_interval
from colocate.policy.schema import PolicySpec
from colocate.snapshot import Latency, Objective
from tests import make

JIT = kernels.load(jit=True)
VALUES = st.one_of(st.floats(0, 64, allow_subnormal=False), st.just(math.nan))
ROWS = 7
SECONDS = npst.arrays(np.float64, ROWS, elements=st.floats(0, 100, allow_subnormal=False))
COLUMN = npst.arrays(np.float64, ROWS, elements=VALUES)
BOUNDS = exponential_bounds(0.01, 1.3, 32.0)
WEIGHTS = npst.arrays(np.float64, (ROWS, BOUNDS.size), elements=st.floats(0, 1e3, allow_subnormal=False))
SEASON = npst.arrays(np.float64, (ROWS, 6), elements=VALUES)
SLOT = st.integers(0, 5)


def same(name, *arguments):
    np.testing.assert_array_equal(getattr(JIT, name)(*arguments), getattr(reference, name)(*arguments))


@settings(deadline=None, max_examples=60)
@given(WEIGHTS, COLUMN, SECONDS)
def test_histogram_add_is_the_same_in_both(weights, values, seconds):
    same("histogram_add", weights, BOUNDS, values, seconds, reference.decay(seconds, 3600.0))


@settings(deadline=None, max_examples=60)
@given(WEIGHTS, st.floats(0.01, 1.0))
def test_histogram_quantile_is_the_same_in_both(weights, q):
    same("histogram_quantile", weights, BOUNDS, q)


@settings(deadline=None, max_examples=60)
@given(COLUMN, COLUMN, SECONDS, st.floats(0.5, 10.0), st.floats(0.5, 10.0))
def test_smooth_is_the_same_in_both(previous, values, seconds, rise, fall):
    same("smooth", previous, values, reference.approach(seconds, rise), reference.approach(seconds, fall))


@settings(deadline=None, max_examples=60)
@given(SEASON, SLOT, COLUMN, st.floats(0.5, 1.0))
def test_season_add_is_the_same_in_both(season, slot, values, fade):
    same("season_add", season, slot, values, fade)


@settings(deadline=None, max_examples=60)
@given(COLUMN, SEASON, SLOT, COLUMN)
def test_peak_is_the_same_in_both(quantile, season, slot, smoothed):
    same("peak", quantile, season, slot, 1, smoothed, 1.1)


@settings(deadline=None, max_examples=60)
@given(SEASON, SEASON, npst.arrays(np.float64, ROWS, elements=st.sampled_from([0.0, 0.075, 0.5, 1.0, 10.0, math.nan])))
def test_rates_is_the_same_in_both(now, before, seconds):
    same("rates", now, before, seconds)


@given(st.lists(st.floats(0.02, 900), min_size=1, max_size=50))
def test_a_quantile_is_never_below_the_value_it_stands_for(values):
    weights = np.zeros((1, CPU_BOUNDS_CORES.size))
    for value in values:
        weights = reference.histogram_add(weights, CPU_BOUNDS_CORES, np.array([value]), np.ones(1), np.ones(1))
    found = reference.histogram_quantile(weights, CPU_BOUNDS_CORES, 1.0)[0]
    assert max(values) <= found <= max(values) * 1.06 + 0.011


def test_old_samples_fade_by_half_in_a_half_life():
    weights = reference.histogram_add(np.zeros((1, BOUNDS.size)), BOUNDS, np.array([1.0]), np.ones(1), np.ones(1))
    minute = np.array([60.0])
    left = reference.decay(minute, 60.0)
    weights = reference.histogram_add(weights, BOUNDS, np.array([1.0]), minute, left)
    assert weights.sum() == 60.5
    same = reference.histogram_add(weights, BOUNDS, np.array([math.nan]), minute, left)
    assert same.sum() == 60.5, "what is not known changes nothing"


def test_a_counter_that_was_reset_gives_no_rate():
    found = reference.rates(np.array([[5.0], [10.0]]), np.array([[9.0], [4.0]]), np.array([2.0, 2.0]))
    assert math.isnan(found[0, 0])
    assert found[1, 0] == 3.0


def latency(at, *counts):
    return Latency((0.01, 0.02), tuple(float(c) for c in counts), at)


def test_a_window_reaches_back_one_reading_beyond_its_length():
    readings = [latency(t, t, t, t) for t in range(10)]
    assert [r.at_seconds for r in trim_window(readings, 4.0)] == [5, 6, 7, 8, 9]


def test_a_counter_reset_starts_the_window_anew():
    readings = [latency(0, 5, 5, 5), latency(1, 9, 9, 9), latency(2, 1, 1, 1)]
    assert [r.at_seconds for r in trim_window(readings, 10.0)] == [2]


@pytest.mark.parametrize(
    ("counts", "q", "seconds"),
    [
        pytest.param((100, 0, 0), 0.5, 0.005, id="linear within the first bucket"),
        pytest.param((50, 50, 0), 0.99, 0.0198, id="linear within the second"),
        pytest.param((0, 0, 10), 0.99, 0.02, id="above all bounds it is the highest bound"),
    ],
)
def test_quantiles_are_prometheus_quantiles(counts, q, seconds):
    assert quantile_of((0.01, 0.02), counts, q) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("counts", "slack"),
    [
        pytest.param((990, 0, 10), 0.5, id="just within the buckets"),
        pytest.param((900, 0, 100), -1.0, id="nobody knows how far beyond: a violation"),
    ],
)
def test_a_p99_beyond_all_buckets_is_a_violation(counts, slack):
    objective = Objective(0.02, 10, 60.0)
    bounds = (0.01, 0.02)
    state, now = ModelState(), make.snapshot(make.service(objective=objective, latency=Latency(bounds, (0, 0, 0), 1.0)))
    state, _ = forecast(now, state, PolicySpec(), reference)
    cumulative = tuple(itertools.accumulate(map(float, counts)))
    later = make.snapshot(make.service(objective=objective, latency=Latency(bounds, cumulative, 2.0)), at=101.0)
    _, seen = forecast(later, state, PolicySpec(), reference)
    assert seen.workloads["service:web"].slack == pytest.approx(slack)


def test_no_requests_give_no_quantile():
    assert quantile_of((0.01,), (0, 0), 0.99) is None
    assert window_counts([latency(0, 1, 2, 3)]) == ()


def test_slack_is_positive_below_the_target_and_negative_above():
    assert slack_of_latency(0.02, 0.01) == 0.5
    assert slack_of_latency(0.02, 0.03) == -0.5


def test_effective_machine_utilization_is_the_sum_of_both_shares():
    assert effective_machine_utilization(40, 100, 45, 90) == pytest.approx(0.9)
    assert effective_machine_utilization(40, 0, 45, 90) is None
    assert machines_saved(1000, 0.1, 0.4) == pytest.approx(750)


def run_ticks(state, count, kernel=reference, start=0):
    for i in range(start, start + count):
        now = make.snapshot(
            make.service(cpu_usage_us=500_000 * i, cpu_pressure_us=1000 * i, working_set_bytes=100 << 20),
            make.job(cpu_usage_us=1_200_000 * i),
            at=100.0 + i,
            sequence=i,
        )
        state, seen = forecast(now, state, PolicySpec(), kernel)
    return state, seen


def test_the_forecast_knows_what_is_used_and_what_will_be():
    _, seen = run_ticks(ModelState(), 20)
    web = seen.workloads["service:web"]
    assert web.usage_cores == 0.5
    assert 0.5 < seen.services_peak_cores <= 0.65
    assert seen.batch_cores == 1.2
    assert web.cpu_waiting_ratio == 0.001
    assert web.slack == pytest.approx(0.995)


def test_a_cgroup_made_anew_under_the_same_name_gives_no_rate():
    state, _ = run_ticks(ModelState(), 3)
    workload = msgspec.structs.replace(make.service(cpu_usage_us=9_000_000), inodes={"unified": 6})
    _, seen = forecast(make.snapshot(workload, at=110.0), state, PolicySpec(), reference)
    assert seen.workloads["service:web"].usage_cores is None


def test_what_the_agent_spends_on_its_own_model_is_no_need_of_the_node():
    """Else a node would promise nothing for minutes because its agent has just started."""
    state, at = ModelState(), 0.0

    def look(busy, warming):
        nonlocal state, at
        at += 1.0
        now = make.snapshot(at=at, cpu_busy_us=int(busy * 1e6), cpu_idle_us=0, warming=warming,
                            memory_available_bytes=1 << 30)  # fmt: skip
        state, seen = forecast(now, state, PolicySpec(), reference)
        return seen

    busy = 0.0
    for _ in range(20):
        busy += 1.9
        assert look(busy, True).needs_cores is None
    for _ in range(3):
        busy += 0.2
        seen = look(busy, False)
    assert seen.needs_cores == pytest.approx(0.2)


def test_state_goes_through_json_to_the_bit():
    state, _ = run_ticks(ModelState(), 8)
    again = from_builtins(to_builtins(state), "model.json")
    a, seen_a = run_ticks(state, 5, start=8)
    b, seen_b = run_ticks(again, 5, start=8)
    assert seen_a == seen_b
    np.testing.assert_array_equal(a.cpu_weights, b.cpu_weights)


def test_the_jitted_model_sees_what_the_numpy_model_sees():
    assert run_ticks(ModelState(), 12, JIT)[1] == run_ticks(ModelState(), 12)[1]


def test_state_of_a_newer_version_is_refused_by_name():
    data = {**to_builtins(ModelState()), "version": 99}
    with pytest.raises(StateTooNew, match=r"model\.json"):
        from_builtins(data, "model.json")


def test_intervals_contain_their_estimate_and_judge_by_their_ends():
    found = ratio_interval([1.0, 1.1, 0.9, 1.0], [2.0, 2.0, 2.0, 2.0])
    assert found.low <= found.value <= found.high
    assert found.below(0.6) == "pass"
    assert found.below(0.3) == "fail"
    assert mean_interval([3.0]).value == 3.0
    assert difference_interval([5.0, 6.0], [1.0, 2.0]).low > 0


@pytest.mark.parametrize("pairs", [([], []), ([1.0], [0.0]), ([1.0], [1.0, 2.0])])
def test_impossible_ratios_are_refused(pairs):
    with pytest.raises(ValueError, match="pairs"):
        ratio_interval(*pairs)


def test_a_round_in_which_batch_did_nothing_is_no_reason_to_fail_and_none_to_change_the_lever():
    rounds = {"weight": [(0.01, 0.0), (0.01, 5.0)], "idle": [(0.001, 5.0), (0.001, 5.0)]}
    found = judge(rounds, {"kernel": "6.1"}, 1.0)
    assert found.lever == "weight"
    assert "work_ratio" not in found.evidence["idle"]


def test_no_tick_compiles_what_was_not_compiled_at_the_start():
    state = ModelState()
    compiled: list[Any] = [JIT.rates, JIT.smooth, JIT.peak, JIT.histogram_add, JIT.histogram_quantile]
    before = [len(f.signatures) for f in compiled]
    for i, count in enumerate((1, 3, 3, 2)):
        workloads = [make.service(f"s{j}", cpu_usage_us=500_000 * i, working_set_bytes=1 << 20) for j in range(count)]
        state, _ = forecast(make.snapshot(*workloads, at=float(i)), state, PolicySpec(), JIT)
    assert [len(f.signatures) for f in compiled] == before == [1] * len(compiled)
