"""Quantities, CPU lists, and the two shares-to-weight formulas (case L of the field study)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colocate import units


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        pytest.param("20ms", 0.02, id="milliseconds"),
        pytest.param("1m30s", 90.0, id="a sum of units"),
        pytest.param("1.5s", 1.5, id="a fraction"),
        pytest.param(3, 3.0, id="a bare number is seconds"),
    ],
)
def test_durations_are_read_as_go_writes_them(text, seconds):
    assert units.parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "20", "20 parsecs", "ms", "-1s", "1s2", "99999999999s"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ValueError, match="duration"):
        units.parse_duration(text)


@pytest.mark.parametrize(
    ("text", "value"), [("512Mi", 512 << 20), ("2G", 2 * 10**9), ("1500", 1500), ("1.5Gi", 3 << 29)]
)
def test_bytes_are_read_as_kubernetes_writes_them(text, value):
    assert units.parse_bytes(text) == value


@pytest.mark.parametrize(("text", "value"), [("500m", 0.5), ("2", 2.0), (0.25, 0.25)])
def test_cores_are_read_as_kubernetes_writes_them(text, value):
    assert units.parse_cores(text) == value


def test_an_exponent_that_would_take_for_ever_is_refused():
    with pytest.raises(ValueError, match="not a quantity"):
        units.parse_quantity("1e999999999")


@pytest.mark.parametrize(
    ("parse", "text"),
    [(units.parse_bytes, "12Q"), (units.parse_cores, "-1"), (units.parse_percent, "101"), (units.parse_percent, "x")],
)
def test_impossible_quantities_are_refused(parse, text):
    with pytest.raises(ValueError, match="not a"):
        parse(text)


@pytest.mark.parametrize(
    ("shares", "weight"),
    [
        pytest.param(2, 1, id="the least"),
        pytest.param(1024, 100, id="the default"),
        pytest.param(262144, 10000, id="the most"),
    ],
)
def test_a_weight_of_shares(shares, weight):
    assert units.weight_of_shares(shares) == weight


def test_a_weight_reads_back_from_shares_as_it_was_written():
    assert all(units.weight_of_shares(units.shares_of_weight(weight)) == weight for weight in range(1, 10_001))


@given(st.sets(st.integers(0, 300), min_size=1))
def test_a_cpu_list_reads_back_as_it_was_written(cpus):
    assert set(units.parse_cpulist(units.format_cpulist(cpus))) == cpus


@given(st.floats(0.0, 512.0))
def test_a_grant_is_never_below_the_kernels_least_quota(cores):
    quota, period = units.cpu_max(cores).split()
    assert int(quota) >= units.CPU_QUOTA_MIN_US
    assert int(period) == units.CPU_PERIOD_US


def test_no_grant_is_no_quota():
    assert units.cores_of_cpu_max(units.cpu_max(None)) is None
