"""S2.8: jobs with a deadline draw their watts while power is clean, and are done in time all the same."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colocate.decide.allowance import PowerState, allowance
from colocate.decide.caps import power_caps
from colocate.decide.deadlines import MOST_STEP_SECONDS, Progress
from colocate.decide.elastic import AGAIN_SECONDS, Shifted
from colocate.decide.node_budget import Budgeted, Known, budgeted
from colocate.decide.power_jobs import STEP_WATTS
from colocate.model.slots import Schedule, cheapest, envelope
from colocate.observe.signal import SignalFile
from colocate.policy.schema import PowerModel, PowerPoint, PowerPolicy, SignalPolicy, SignalStep
from colocate.snapshot import NodeSnapshot
from tests.unit.test_power_caps import card, node, strictest_of

Floats = st.lists(st.floats(1.0, 500.0), min_size=1, max_size=3)
WATTS, SPEEDS = np.array([100.0, 200.0, 300.0]), np.array([0.5, 0.8, 1.0])
HOUR = 3600.0


def plan(prices: list[float], work: float, most: float = 300.0) -> Schedule | None:
    n = len(prices)
    return cheapest(np.array(prices), np.full(n, HOUR), np.full(n, most), WATTS, SPEEDS, work * HOUR)


@pytest.mark.parametrize(
    ("prices", "work", "watts"),
    [
        pytest.param([400.0, 100.0], 1.5, [100.0, 300.0], id="the least while it is dear, all while it is cheap"),
        pytest.param([100.0, 400.0], 1.5, [300.0, 100.0], id="and the other way round"),
        pytest.param([400.0, 100.0], 2.0, [300.0, 300.0], id="no time to spare: all of it, always"),
        pytest.param([400.0, 400.0], 1.0, [100.0, 100.0], id="where it costs the same, what does most for a watt"),
        pytest.param([100.0, 400.0], 0.5, [100.0], id="it is done before the dear hour"),
        pytest.param([0.0, 100.0], 0.9, [250.0], id="what costs nothing is used"),
        pytest.param([400.0, 100.0], 2.1, None, id="it cannot be done at all"),
    ],
)
def test_s2_8_watts_go_where_they_cost_the_least(prices: list[float], work: float, watts: list[float] | None) -> None:
    found = plan(prices, work)
    assert (None if found is None else found.watts.tolist()) == (None if watts is None else pytest.approx(watts))


def test_s2_8_what_cannot_be_had_later_is_not_planned_with() -> None:
    found = cheapest(np.array([400.0, 100.0]), np.full(2, HOUR), np.array([300.0, 150.0]), WATTS, SPEEDS, 1.5 * HOUR)
    assert found is not None
    assert found.watts == pytest.approx([225.0, 150.0])


def test_the_envelope_leaves_out_what_lies_below_a_straight_line() -> None:
    watts, speeds = envelope(np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.1, 0.2, 0.9, 1.0]))
    assert (watts.tolist(), speeds.tolist()) == ([1.0, 3.0, 4.0], [0.1, 0.9, 1.0])


@given(
    prices=Floats,
    work=st.floats(0.05, 3.0),
    rises=st.lists(st.floats(0.01, 1.0), min_size=3, max_size=3),
)
@settings(max_examples=150, deadline=None)
def test_the_cheapest_plan_does_the_work_and_nothing_on_a_grid_is_cheaper(
    prices: list[float], work: float, rises: list[float]
) -> None:
    speeds = np.cumsum(rises) / sum(rises)
    n = len(prices)
    found = cheapest(np.array(prices), np.full(n, HOUR), np.full(n, 300.0), WATTS, speeds, work * HOUR)
    curve = envelope(WATTS, speeds)
    if found is None:
        assert n * HOUR < work * HOUR * (1 + 1e-6)
        return
    assert float(np.sum(np.interp(found.watts, *curve) * HOUR)) >= work * HOUR * (1 - 1e-6)
    for watts in itertools.product(*[np.linspace(100.0, 300.0, 9)] * n):
        done = np.cumsum(np.interp(watts, *curve) * HOUR)
        for last in np.flatnonzero(done >= work * HOUR * (1 - 1e-9)):
            paid = np.sum((np.array(prices) * watts * HOUR)[: last + 1])
            assert found.cost <= paid * (1 + 1e-6), "plans that do as much by the end of a slot cost as much"


MODEL = PowerModel("a", tuple(PowerPoint(w, s) for w, s in ((100, 1.0), (200, 0.25), (300, 0.0))))
ELASTIC = SignalPolicy("f", elastic=True)
CURVED = PowerPolicy(models=(MODEL,), signal=ELASTIC)


def at(
    now: float, ahead: tuple[tuple[float, float], ...], *, due: float = 2 * HOUR, work: float = 1.5 * HOUR
) -> NodeSnapshot:
    snapshot = node(card("GPU-0", "j1", limit_watts=300.0), card("GPU-1", "j2", limit_watts=300.0), j1=300.0, j2=300.0)
    one = msgspec.structs.replace(snapshot.workloads["j1"], due_seconds=due, work_seconds=work, power_class="a")
    signal = ([price for begin, price in ahead if begin <= now] or [0.0])[-1]
    return msgspec.structs.replace(
        snapshot,
        workloads={**snapshot.workloads, "j1": one},
        monotonic_seconds=now,
        time_seconds=now,
        power_signal=signal,
        power_ahead=tuple(point for point in ahead if point[0] > now or point[1] == signal),
    )


def caps_at(
    snapshot: NodeSnapshot,
    policy: PowerPolicy,
    progress: dict[str, Progress] | None = None,
    before: dict[str, Shifted] | None = None,
) -> Budgeted:
    power = allowance(PowerState(), snapshot, policy)
    return budgeted(power_caps(snapshot), snapshot, policy, power, {}, Known(progress or {}, before or {}))


DEAR, CHEAP = ((0.0, 500.0), (HOUR, 100.0)), ((0.0, 100.0), (HOUR, 500.0))


@pytest.mark.parametrize(
    ("snapshot", "policy", "less"),
    [
        pytest.param(at(0.0, DEAR), PowerPolicy(signal=ELASTIC), True, id="dear now: less, without any budget"),
        pytest.param(at(0.0, CHEAP), PowerPolicy(signal=ELASTIC), False, id="cheap now: all of it"),
        pytest.param(at(0.0, DEAR), PowerPolicy(signal=SignalPolicy("f")), False, id="nobody asked for that"),
        pytest.param(at(0.0, DEAR, work=1.95 * HOUR), PowerPolicy(signal=ELASTIC), False, id="no time to spare"),
        pytest.param(at(0.0, DEAR[:1], work=1.2 * HOUR), CURVED, True, id="nothing is foretold: what does most a watt"),
        pytest.param(
            at(0.0, ((0.0, 100.0), (HOUR, 100.0)), work=1.2 * HOUR),
            CURVED,
            True,
            id="it costs the same always: what does most for a watt",
        ),
    ],
)
def test_s2_8_a_job_with_a_deadline_follows_the_forecast(
    snapshot: NodeSnapshot, policy: PowerPolicy, less: bool
) -> None:
    found = caps_at(snapshot, policy)
    watts = strictest_of(found.capped.caps)
    assert (watts["GPU-0"] or 0.0) < 300.0 if less else watts["GPU-0"] == 300.0
    assert watts["GPU-1"] == 300.0, "who has no deadline is left alone"
    reasons = {v.subject: v.reason for v in found.capped.verdicts}
    assert reasons["GPU-0"] == ("Shifted" if less else "Capped")


def test_s2_8_steps_of_the_signal_and_the_forecast_together() -> None:
    """What a dear hour's budget does not leave is not counted on in it."""
    signal = SignalPolicy("f", (SignalStep(300.0, 250),), elastic=True)
    dear_later = at(0.0, ((0.0, 290.0), (HOUR, 310.0)), work=1.4 * HOUR)
    alone = strictest_of(caps_at(dear_later, PowerPolicy(signal=ELASTIC)).capped.caps)["GPU-0"] or 0.0
    cut = caps_at(dear_later, PowerPolicy(budget=600, signal=signal))
    assert (strictest_of(cut.capped.caps)["GPU-0"] or 0.0) >= alone
    now = caps_at(at(0.0, DEAR), PowerPolicy(budget=600, signal=signal))
    assert sum(w or 0.0 for w in strictest_of(now.capped.caps).values()) <= 250.0


@given(
    prices=st.lists(st.floats(10.0, 900.0), min_size=2, max_size=6),
    spare=st.floats(1.1, 3.0),
)
@settings(max_examples=60, deadline=None)
def test_s2_8_the_deadline_is_kept_and_it_never_costs_more_than_at_once(prices: list[float], spare: float) -> None:
    """Played through in steps, with limits that follow a step late, as they do."""
    work = len(prices) * HOUR / 4
    due, step = spare * work, MOST_STEP_SECONDS
    ahead = tuple((i * HOUR / 4 * spare, price) for i, price in enumerate(prices))
    progress, before, now, cost, limit, done = {"j1": Progress(0.0, 0.0)}, dict[str, Shifted](), 0.0, 0.0, 300.0, 0.0
    policy = CURVED
    while done < work:
        snapshot = at(now, ahead, due=due, work=work)
        cards = {"GPU-0": msgspec.structs.replace(snapshot.cards["GPU-0"], limit_watts=limit)}
        snapshot = msgspec.structs.replace(snapshot, cards={**snapshot.cards, **cards})
        found = caps_at(snapshot, policy, progress, before)
        progress, before = found.progress, found.shifted
        cost += limit * (snapshot.power_signal or 0.0) * step
        done += step / (1.0 + float(np.interp(limit, [100, 200, 300], [1.0, 0.25, 0.0])))
        limit, now = strictest_of(found.capped.caps)["GPU-0"] or 300.0, now + step
        assert now <= due + step, "late"
    at_once = sum(
        300.0 * prices[min(int(t / (HOUR / 4 * spare)), len(prices) - 1)] * step for t in np.arange(0, work, step)
    )
    assert cost <= at_once * 1.03 + 300.0 * max(prices) * 2 * step


@pytest.mark.parametrize("points", [((120, 1.13), (210, 0.14), (300, 0.0)), ((100, 1.5), (300, 0.0))], ids=str)
@pytest.mark.parametrize("share", [0.6, 0.7, 0.8])
def test_s2_8_what_a_plan_says_that_it_saves_is_saved_and_its_margin_is_kept(
    points: tuple[tuple[int, float], ...], share: float
) -> None:
    """Of the models that policies have straight lines of: between two points a job is slower than the envelope."""
    model = PowerModel("a", tuple(PowerPoint(*point) for point in points))
    due, policy = 2 * HOUR, PowerPolicy(models=(model,), signal=ELASTIC)
    work = share * due
    progress, before, now, cost, limit, done = {"j1": Progress(0.0, 0.0)}, dict[str, Shifted](), 0.0, 0.0, 300.0, 0.0
    said = 0.0
    while done < work:
        snapshot = at(now, ((0.0, 300.0), (HOUR, 310.0)), due=due, work=work)
        cards = {"GPU-0": msgspec.structs.replace(snapshot.cards["GPU-0"], limit_watts=limit)}
        found = caps_at(msgspec.structs.replace(snapshot, cards={**snapshot.cards, **cards}), policy, progress, before)
        progress, before = found.progress, found.shifted
        said = said or (before["j1"].saved if "j1" in before else 0.0)
        limit = strictest_of(found.capped.caps)["GPU-0"] or 300.0
        cost += limit * (snapshot.power_signal or 0.0) * 10.0
        done += 10.0 / (1.0 + float(np.interp(limit, [w for w, _ in points], [s for _, s in points])))
        now += 10.0
    first = min(work, HOUR)
    at_once = 300.0 * (300.0 * first + 310.0 * (work - first))
    assert now <= due - 0.04 * work
    assert 1.0 - cost / at_once >= said - 0.02


def test_s2_8_a_neighbour_on_the_card_is_not_slowed_for_somebody_elses_hours() -> None:
    snapshot = at(0.0, DEAR)
    both = msgspec.structs.replace(
        snapshot,
        cards={"GPU-0": card("GPU-0", "j1", "j2", limit_watts=300.0)},
    )
    assert strictest_of(caps_at(both, PowerPolicy(signal=ELASTIC)).capped.caps) == {"GPU-0": 300.0}


def test_s2_8_one_job_is_planned_in_a_tick() -> None:
    snapshot = at(0.0, DEAR)
    due = msgspec.structs.replace(snapshot.workloads["j1"], id="j2", name="j2", path="/j2")
    both = msgspec.structs.replace(snapshot, workloads={**snapshot.workloads, "j2": due})
    first = caps_at(both, PowerPolicy(signal=ELASTIC))
    assert set(first.shifted) == {"j1"}
    second = caps_at(both, PowerPolicy(signal=ELASTIC), first.progress, first.shifted)
    assert set(second.shifted) == {"j1", "j2"}


def test_a_dense_forecast_is_seen_as_far_as_a_sparse_one(tmp_path: Path) -> None:
    """And power that one is paid to take costs nothing."""
    file = tmp_path / "f.json"
    points = [{"timestamp": i * 300.0, "value": -5.0 if i == 0 else 100.0} for i in range(7 * 288)]
    file.write_text(json.dumps(points))
    policy, read = SignalPolicy(str(file), elastic=True), SignalFile()
    assert read.value(policy, 10.0, 0.0) == -5.0
    ahead = read.ahead(policy, 10.0)
    assert len(ahead) <= 200
    assert ahead[-1][0] > 6.9 * 86400
    assert ahead[0][0] == 0.0
    assert ahead[0][1] == pytest.approx(100.0 * 10 / 11, rel=0.05)


def test_s2_8_a_plan_stands_for_a_minute_and_moves_in_steps() -> None:
    first = caps_at(at(0.0, DEAR), PowerPolicy(signal=ELASTIC))
    again = caps_at(at(10.0, DEAR), PowerPolicy(signal=ELASTIC), first.progress, first.shifted)
    assert again.shifted == first.shifted
    assert first.shifted["j1"].until_seconds == AGAIN_SECONDS
    assert first.shifted["j1"].watts % STEP_WATTS == 0.0


def test_what_is_foretold_is_read_from_the_file(tmp_path: Path) -> None:
    file = tmp_path / "f.json"
    points = [{"timestamp": 1000.0 + i * HOUR, "value": 100.0 + i} for i in range(-2, 5)]
    file.write_text(json.dumps({"forecastData": points}))
    policy, read = SignalPolicy(str(file), elastic=True), SignalFile()
    now = 1000.0 + HOUR / 2
    assert read.value(policy, now, 0.0) == 100.0
    assert read.ahead(policy, now) == tuple((1000.0 + i * HOUR, 100.0 + i) for i in range(5))
    rigid = SignalPolicy(str(file))
    assert read.value(rigid, now, 0.0) == 100.0
    assert read.ahead(rigid, now) == ()
