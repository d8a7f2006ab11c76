"""What batch pods are promised of a node: never more than is left, at a risk that is kept, shrinking at once."""

import os

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import publication
from colocate.decide.allocatable import AllocatableState, decide_allocatable, promise
from colocate.decide.reference.koordlet import Demand, batch_allocatable, mid_allocatable
from colocate.model.forecast import ModelState, WorkloadForecast
from colocate.model.needs import SLOT_SECONDS, Needs, look, slots_of
from colocate.model.state import from_builtins, to_builtins
from colocate.policy.schema import BatchResourcesPolicy, PolicySpec
from tests import make

replace = msgspec.structs.replace
GIB = float(1 << 30)


def lived(loads, runtime_slots=12, risk=0.01, per_slot=1):
    """A node's memory after these needs (cores), one a slot, and what was promised to be enough at the end of each."""
    needs, bounds = Needs(), []
    for i, cores in enumerate(loads):
        for j in range(per_slot):
            at = (i + j / per_slot) * SLOT_SECONDS + 1.0
            needs = look(needs, at, SLOT_SECONDS / per_slot, cores, cores * GIB, runtime_slots, risk)
        bounds.append(needs.bound)
    return needs, bounds


def too_low(loads, bounds, runtime_slots=12):
    """The share of the bounds that the need of the slots after them exceeded."""
    judged = [
        max(loads[i + 1 : i + 1 + runtime_slots]) > bound[0] + 1e-3
        for i, bound in enumerate(bounds[:-runtime_slots])
        if bound is not None
    ]
    return sum(judged) / len(judged)


def a_week(seed):
    """Cores of a node with days, jumps and noise, a value a slot."""
    random = np.random.default_rng(seed)
    at = np.arange(7 * 288)
    days = 8 + 5 * np.sin(2 * np.pi * at / 288)
    jumps = np.repeat(random.choice([0.0, 0.0, 0.0, 6.0], size=len(at) // 12), 12)
    return np.clip(days + jumps + random.normal(0, 0.8, len(at)), 0.1, 30).round(3).tolist()


@pytest.mark.parametrize("risk", [0.01, 0.05])
def test_the_risk_that_is_promised_is_kept_over_a_week(risk):
    found = []
    for seed in range(3):
        loads = a_week(seed)
        _, bounds = lived(loads, risk=risk)
        found.append(too_low(loads, bounds))
    assert 0.2 * risk < sum(found) / 3 <= 1.2 * risk  # a week has few jumps, and each is exceeded by an hour's bounds


def test_a_load_that_never_changes_is_known_to_the_last_core():
    _, bounds = lived([6.0] * 100)
    assert bounds[-1] == pytest.approx((6.0, 6.0 * GIB))


def test_a_load_that_has_changed_for_good_is_learnt_again():
    """After a step up the first bounds are too low; the share of those that are tends to the risk all the same."""
    loads = [4.0] * 288 + [20.0] * 1500
    _, bounds = lived(loads, risk=0.05)
    assert too_low(loads, bounds) <= 0.05
    assert bounds[-1][0] == pytest.approx(20.0, abs=2.0)


def test_nothing_is_known_before_hours_have_passed():
    _, bounds = lived([6.0] * 60)
    assert bounds[-1] is None


def test_slots_in_which_nobody_looked_say_nothing():
    needs, _ = lived([6.0] * 100)
    resumed = look(needs, 200 * SLOT_SECONDS, 1.0, 6.0, 6.0 * GIB, 12, 0.01)
    assert len(resumed.residuals) == len(needs.residuals) + 1  # of the slot that was under way
    assert np.isnan(resumed.ended[-2]).all()


def test_a_clock_that_goes_back_a_little_stays_in_its_slot():
    needs, _ = lived([6.0] * 100)
    back = look(needs, 98.5 * SLOT_SECONDS, 1.0, 7.0, 6.0 * GIB, 12, 0.01)
    assert back.slot == needs.slot
    assert len(back.ended) == len(needs.ended)


def test_a_clock_that_was_ahead_stops_no_learning():
    needs, _ = lived([6.0] * 100)
    ahead = look(needs, 3 * 365 * 86400.0, 1.0, 40.0, 6.0 * GIB, 12, 0.01)
    for i in range(100, 170):
        ahead = look(ahead, i * SLOT_SECONDS + 1.0, SLOT_SECONDS, 6.0, 6.0 * GIB, 12, 0.01)
    assert ahead.slot == 169
    assert ahead.bound == pytest.approx((6.0, 6.0 * GIB), rel=1e-3)


def test_another_runtime_is_another_question():
    needs, _ = lived([6.0] * 100)
    other = look(needs, 100 * SLOT_SECONDS, 1.0, 6.0, 6.0 * GIB, 24, 0.01)
    assert other.bound is None
    assert len(other.ended) >= len(needs.ended)


@pytest.mark.parametrize(
    ("seconds", "slots"),
    [pytest.param(60, 1, id="at least one"), pytest.param(3600, 12, id="an hour"), pytest.param(1e9, 288, id="a day")],
)
def test_a_runtime_in_slots(seconds, slots):
    assert slots_of(seconds) == slots


def test_it_is_remembered_over_a_restart():
    needs, _ = lived([float(3 + i % 7) for i in range(120)])
    state = ModelState(needs=needs)
    again = from_builtins(msgspec.json.decode(msgspec.json.encode(to_builtins(state))), "model.json").needs
    for field in Needs.__struct_fields__:
        np.testing.assert_array_equal(getattr(again, field), getattr(needs, field), err_msg=field)


@pytest.mark.skipif(
    "COLOCATE_TRACES" not in os.environ, reason="COLOCATE_TRACES, the folder of recorded loads, is unset"
)
def test_the_risk_is_kept_on_machines_of_a_real_cluster():
    """alibaba-v2018-usage, four of its machines; `benchmarks publication` replays all loads."""
    found = [publication.replay(load, 0.05, PolicySpec())["cpu"] for load in publication.alibaba()[:4]]
    assert sum(one.bound_exceeded for one in found) / 4 <= 0.05
    assert sum(one.in_the_way for one in found) <= sum(one.others_in_the_way for one in found)


# the law


@pytest.mark.parametrize(
    ("left", "promised", "may_grow", "now"),
    [
        pytest.param(10.0, 12.0, False, 10.0, id="it shrinks at once"),
        pytest.param(9.99, 10.0, False, 9.5, id="it shrinks to the grid below"),
        pytest.param(-3.0, 2.0, True, 0.0, id="never below nothing"),
        pytest.param(20.0, 10.0, True, 12.0, id="it grows by a step"),
        pytest.param(11.5, 10.0, True, 11.5, id="it grows to what is left"),
        pytest.param(20.0, 10.0, False, 10.0, id="it grew a moment ago"),
        pytest.param(10.6, 10.0, True, 10.0, id="a load that breathes moves nothing"),
    ],
)
def test_what_is_promised(left, promised, may_grow, now):
    assert promise(left, promised, 0.5, 2.0, may_grow) == pytest.approx(now)


@given(st.floats(-10, 100), st.floats(0, 100), st.booleans())
def test_never_more_than_is_left(left, promised, may_grow):
    assert promise(left, promised, 0.64, 1.0, may_grow) <= max(left, 0.0) + 1e-6


def seen(cores, size, at=1000.0, services=(), coming=None, law="calibrated", stale=None, state=None):
    """The verdict's figures on a node of 64 cores and 256 GiB, of which all but batch use so much."""
    snapshot = make.snapshot(
        *services,
        at=at,
        memory_bytes=int(256 * GIB),
        stale_seconds={} if stale is None else {"node": stale},
    )
    forecast = make.forecast(
        {i: WorkloadForecast(usage_cores=0.0) for i in snapshot.workloads},
        node_cores=64.0,
        needs_cores=cores,
        needs_bytes=None if size is None else int(size * GIB),
        coming_cores=None if coming is None else coming[0],
        coming_bytes=None if coming is None else int(coming[1] * GIB),
    )
    spec = PolicySpec(batch_resources=BatchResourcesPolicy(law=law))
    return decide_allocatable(make.view(snapshot, forecast, spec=spec), state or AllocatableState())


def settled(**known):
    """The same once it has grown as far as it will."""
    state, found = AllocatableState(), None
    for i in range(60):
        found = seen(at=1000.0 + 60.0 * i, state=state, **known)
        state = found.state
    return found


def test_node_less_reserve_less_what_services_may_need():
    verdict = settled(cores=10.0, size=40.0, coming=(24.0, 64.0)).verdict
    assert 36_800 - 3 * 640 < verdict.numbers["batch_cpu_milli"] <= 36_800  # 64 - 3.2 - 24, on a grid of 0.64
    assert verdict.reason == "Promised"
    assert "24.00" in verdict.message


def test_a_pod_that_is_new_counts_with_what_it_asks_for():
    """Cases E8: whoever has just come must not be promised away."""
    without = settled(cores=10.0, size=40.0, coming=(24.0, 64.0)).verdict.numbers
    new = make.service("api", asked_cores=8.0, asked_bytes=int(8 * GIB), started_seconds=900.0)
    found = seen(10.0, 40.0, services=[new], coming=(24.0, 64.0), state=AllocatableState(cores=36.48, size=100 * GIB))
    assert found.verdict.numbers["batch_cpu_milli"] <= without["batch_cpu_milli"] - 7000


def test_while_it_is_learnt_requests_count():
    old = make.service("api", asked_cores=20.0, asked_bytes=int(8 * GIB), started_seconds=-1e6)
    verdict = settled(cores=2.0, size=10.0, services=[old]).verdict
    assert verdict.reason == "Learning"
    assert verdict.numbers["batch_cpu_milli"] <= (64 - 3.2 - 20) * 1000


def test_the_first_promise_is_made_at_once_where_the_node_is_known_and_soon_where_it_is_not():
    known = seen(10.0, 40.0, coming=(24.0, 64.0))
    assert known.verdict.numbers["batch_cpu_milli"] > 36_000
    new = seen(10.0, 40.0, at=1000.0)
    assert new.verdict.numbers["batch_cpu_milli"] == 0
    assert seen(10.0, 40.0, at=1005.0, state=new.state).verdict.numbers["batch_cpu_milli"] == 0
    assert seen(10.0, 40.0, at=1011.0, state=new.state).verdict.numbers["batch_cpu_milli"] > 40_000


def test_after_old_readings_it_grows_slowly_again():
    stale = seen(10.0, 40.0, stale=60.0, state=AllocatableState(cores=20.0, size=10 * GIB, grown_seconds=1.0))
    assert seen(10.0, 40.0, at=1020.0, coming=(24.0, 64.0), state=stale.state).state.cores == 0.0


def test_old_readings_hold_it_and_then_take_it_back():
    state = AllocatableState(cores=20.0, size=10 * GIB)
    assert seen(None, None, state=state).state == state
    assert seen(10.0, 40.0, stale=60.0, state=state).verdict.numbers["batch_cpu_milli"] == 0


def test_a_service_that_needs_more_takes_it_back_in_the_same_tick():
    found = seen(50.0, 40.0, coming=(50.0, 64.0), state=AllocatableState(cores=36.48, size=100 * GIB))
    assert found.state.cores <= 64 - 3.2 - 50


def test_koordinators_law_is_selectable():
    verdict = settled(cores=18.0, size=45.0, law="koordinator").verdict
    assert verdict.numbers["batch_cpu_milli"] == pytest.approx((0.6 * 64 - 18) * 1000, abs=2 * 640)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 64), st.floats(0, 256), st.booleans()), min_size=1, max_size=40),
    st.floats(0, 64),
    st.floats(0, 256),
)
def test_never_more_than_the_node_less_the_forecast(readings, cores, size):
    state = AllocatableState(cores=cores, size=size * GIB)
    for i, (needs, held, known) in enumerate(readings):
        coming = (min(needs + 4.0, 64.0), held) if known else None
        state = seen(needs, held, at=1000.0 + 20 * i, coming=coming, state=state).state
        assert state.cores <= max(64 - (coming[0] if coming else needs), 0) + 1e-6
        assert state.size <= max(256 - held, 0) * GIB + 1


# cases E and F, transcribed from Koordinator's own tests (research: batchresource and midresource plugins)

CPU = [Demand(20_000, 11_000), Demand(20_000, 22_000)]
MEMORY = [Demand(20, 11), Demand(40, 22)]


@pytest.mark.parametrize(
    ("case", "amount"),
    [
        pytest.param({"capacity": 100_000, "reclaim_percent": 65, "system_used": 7000, "pods": CPU}, 25_000, id="E1"),
        pytest.param({"capacity": 120, "reclaim_percent": 65, "system_used": 12, "pods": MEMORY}, 33, id="E1 memory"),
        pytest.param({"capacity": 100_000, "reclaim_percent": 70, "system_used": 7000, "pods": CPU}, 30_000, id="E2"),
        pytest.param(
            {"capacity": 120, "reclaim_percent": 80, "system_used": 12, "pods": MEMORY, "policy": "request"}, 36,
            id="E2 memory, by request",
        ),
        pytest.param(
            {"capacity": 100_000, "reclaim_percent": 70, "system_used": 7000, "pods": CPU,
             "policy": "maxUsageRequest"}, 21_000, id="E3",
        ),
        pytest.param(
            {"capacity": 100_000, "reclaim_percent": 150, "system_used": 7000, "pods": [Demand(0, 42_000)]},
            101_000, id="E4 a negative margin is allowed there",
        ),
        pytest.param(
            {"capacity": 100_000, "reclaim_percent": 150, "system_used": 7000, "pods": [], "threshold_percent": 100},
            100_000, id="E5",
        ),
        pytest.param(
            {"capacity": 100_000, "reclaim_percent": 65, "system_used": 7000,
             "pods": [Demand(5000, 5000), Demand(6000, 6000), Demand(22_000, 22_000)]}, 25_000, id="E6 mid counts",
        ),
    ],
)  # fmt: skip
def test_koordinators_batch_resources(case, amount):
    assert batch_allocatable(**case) == amount


@pytest.mark.parametrize("policy", ["usage", "maxUsageRequest"])
def test_koordinators_law_here_does_not_forget_a_pod_without_a_reading(policy):
    """E8, which Koordinator itself fails under maxUsageRequest."""
    known = {"capacity": 100_000, "reclaim_percent": 65, "system_used": 7000, "policy": policy}
    fewer = batch_allocatable(pods=[*CPU, Demand(3000, None)], **known)
    assert batch_allocatable(pods=CPU, **known) - fewer == 3000


@pytest.mark.parametrize(
    ("case", "amount"),
    [
        pytest.param({"capacity": 100_000, "reclaimable": 10_000, "used": 20_000, "requested": 20}, 10_000, id="F1"),
        pytest.param(
            {"capacity": 210, "reclaimable": 30, "used": 45, "requested": 40, "unallocated_percent": 10,
             "threshold_percent": 20}, 42, id="F2 capped by the threshold",
        ),
        pytest.param(
            {"capacity": 210, "reclaimable": 15, "used": 45, "requested": 40, "static_percent": 10}, 21, id="F3 static",
        ),
        pytest.param(
            {"capacity": 210, "reclaimable": 15, "used": 45, "requested": 40, "static_percent": 100,
             "threshold_percent": 20}, 42, id="F4 static, capped",
        ),
        pytest.param({"capacity": 100, "reclaimable": 10, "used": 100, "requested": 20}, 0, id="F5 nothing is unused"),
    ],
)  # fmt: skip
def test_koordinators_mid_resources(case, amount):
    assert mid_allocatable(**case) == amount
