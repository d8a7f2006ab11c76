"""S2.8: what the power limits of a node may add up to: less by a signal, more where measured draw leaves room."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colocate.decide.allowance import ACT, DWELL_SECONDS, PowerState, allowance
from colocate.errors import ConfigError
from colocate.observe.signal import SignalFile, points_of
from colocate.policy.file import parse_policy
from colocate.policy.schema import API_VERSION, PowerPolicy, SignalPolicy, SignalStep
from colocate.snapshot import Card, NodeSnapshot
from tests.unit.test_power_caps import card, node

PLAIN, BEYOND = PowerPolicy(budget=1000), PowerPolicy(budget=1000, oversubscribe=30.0)
SINCE = PowerState(budget=1000, within=1000.0, watts=1000.0, changed_seconds=0.0)
NOON = 1_769_860_800.0
"""2026-01-31T12:00:00Z"""


def drawing(*watts: float | None, at: float = 100.0, signal: float | None = None) -> NodeSnapshot:
    replace = msgspec.structs.replace
    cards: list[Card] = [
        replace(card(f"GPU-{i}", limit_watts=300.0), watts=w, at_seconds=at, problem="" if w is not None else "silent")
        for i, w in enumerate(watts)
    ]
    return replace(node(*cards), monotonic_seconds=at, power_signal=signal)


@pytest.mark.parametrize(
    ("policy", "state", "snapshot", "watts"),
    [
        pytest.param(PowerPolicy(), SINCE, drawing(500), 0.0, id="no budget"),
        pytest.param(PLAIN, SINCE, drawing(1200), 1000.0, id="nobody allows more: the budget, whatever is drawn"),
        pytest.param(BEYOND, PowerState(), drawing(500), 1050.0, id="a step, at the start too"),
        pytest.param(BEYOND, SINCE, drawing(500), 1050.0, id="room: a step more"),
        pytest.param(
            BEYOND,
            msgspec.structs.replace(SINCE, changed_seconds=100 - DWELL_SECONDS / 2),
            drawing(500),
            1000.0,
            id="room, but it has just changed",
        ),
        pytest.param(
            BEYOND,
            msgspec.structs.replace(SINCE, watts=1290.0),
            drawing(500),
            1300.0,
            id="never beyond what is allowed",
        ),
        pytest.param(
            BEYOND, msgspec.structs.replace(SINCE, watts=1200.0), drawing(950), 1200.0, id="between the bands it stays"
        ),
        pytest.param(
            BEYOND,
            msgspec.structs.replace(SINCE, watts=1200.0, changed_seconds=99.0),
            drawing(991),
            950.0,
            id="nearly all is drawn: down at once, however short ago it rose",
        ),
        pytest.param(BEYOND, SINCE, drawing(995), 1000.0, id="all is drawn, and nobody has more than the budget"),
        pytest.param(
            BEYOND, msgspec.structs.replace(SINCE, watts=950.0), drawing(950), 1000.0, id="back to the budget in time"
        ),
        pytest.param(
            BEYOND, msgspec.structs.replace(SINCE, watts=1200.0), drawing(100, None), 1000.0, id="half are not read"
        ),
        pytest.param(
            BEYOND,
            msgspec.structs.replace(SINCE, watts=1200.0),
            drawing(*[50.0] * 9, None),
            1250.0,
            id="one of ten is not read: it counts with its limit",
        ),
        pytest.param(
            msgspec.structs.replace(BEYOND, budget=600),
            msgspec.structs.replace(SINCE, watts=1200.0),
            drawing(580),
            600.0,
            id="another budget begins with itself",
        ),
    ],
)
def test_s2_8_what_limits_may_add_up_to(
    policy: PowerPolicy, state: PowerState, snapshot: NodeSnapshot, watts: float
) -> None:
    assert allowance(state, snapshot, policy).watts == watts


@settings(deadline=None)
@given(st.lists(st.floats(0.0, 1.5), min_size=1, max_size=60), st.integers(0, 100))
def test_s2_8_a_surge_is_answered_in_the_next_tick(demand: list[float], oversubscribe: int) -> None:
    """Cards draw what they want up to limits that add up to what is allowed; a minute a tick, so that they may rise."""
    policy, state = PowerPolicy(budget=1000, oversubscribe=float(oversubscribe)), PowerState()
    over = 0
    for i, share in enumerate(demand, start=1):
        drawn = min(share * 1000.0, state.watts or 1000.0)
        state = allowance(state, drawing(drawn, at=60.0 * i), policy)
        over = over + 1 if drawn > 1000.0 else 0
        assert over <= 1, "two ticks in a row"
        assert 0.0 < state.watts <= 1000.0 * (1 + oversubscribe / 100) + 1e-6
        if oversubscribe and drawn >= ACT * 1000:
            assert state.watts <= 1000.0


STEPS = SignalPolicy(file="/signal.json", steps=(SignalStep(above=300, budget=800), SignalStep(above=450, budget=500)))


@pytest.mark.parametrize(
    ("signal", "watts", "why"),
    [
        pytest.param(120.0, 1000.0, "", id="clean"),
        pytest.param(300.0, 1000.0, "", id="just not above"),
        pytest.param(301.0, 800.0, "the signal is 301, above 300", id="above the first"),
        pytest.param(500.0, 500.0, "the signal is 500, above 450", id="above the last"),
        pytest.param(None, 1000.0, "", id="not known: the whole budget"),
    ],
)
def test_s2_8_a_signal_lowers_the_budget(signal: float | None, watts: float, why: str) -> None:
    policy = PowerPolicy(budget=1000, signal=STEPS)
    found = allowance(PowerState(), drawing(100, signal=signal), policy)
    assert (found.watts, found.within, found.why) == (watts, watts, why)


def test_s2_8_a_signal_lowers_what_was_promised_beyond_the_budget_too() -> None:
    policy = PowerPolicy(budget=1000, signal=STEPS, oversubscribe=30.0)
    state = PowerState(budget=1000, within=1000.0, watts=1300.0)
    assert allowance(state, drawing(750, signal=310), policy).watts == 800.0


def points(value: str, time: str, *them: tuple[float, str]) -> list[dict[str, Any]]:
    """Of that day."""
    return [{value: v, time: f"2026-01-31T{at}Z"} for v, at in them]


HOURS = ((9.0, "11:00:00.000"), (302.0, "12:00:00.000"), (7.0, "13:00:00.000"))
FORECAST = [{**p, "duration": 5} for p in points("value", "timestamp", (302, "11:59:00"), (8, "12:04:00"))]
EMISSIONS = {"location": "westus", "time": "2026-01-31T11:55:00+00:00", "rating": 302, "duration": "08:00:00"}
KEDA = {"Location": "x", "Time": "2026-01-31T12:00:00Z", "Rating": 302, "Duration": "00:05:00"}
FORMATS: list[Any] = [
    pytest.param(
        {"zone": "DE", **points("carbonIntensity", "datetime", HOURS[1])[0]}, 302, id="Electricity Maps, latest"
    ),
    pytest.param(
        {"zone": "DE", "history": points("carbonIntensity", "datetime", *HOURS[:2])},
        302,
        id="Electricity Maps, history",
    ),
    pytest.param(
        {"forecast": points("carbonIntensity", "datetime", *HOURS[1:])},
        302,
        id="Electricity Maps, a forecast: what is now, not later",
    ),
    pytest.param([EMISSIONS], 302, id="Carbon Aware SDK, emissions"),
    pytest.param(
        [{"generatedAt": "2026-01-31T11:00:00Z", "optimalDataPoint": FORECAST[1], "forecastData": FORECAST}],
        302,
        id="Carbon Aware SDK, forecast",
    ),
    pytest.param([KEDA], 302, id="as KEDA's operator keeps it"),
    pytest.param(points("value", "time", (0.31, "12:00:00")), 0.31, id="a price"),
    pytest.param(302.5, 302.5, id="a number"),
]


@pytest.mark.parametrize(("content", "value"), FORMATS)
def test_s2_8_a_signal_is_read(tmp_path: Path, content: Any, value: float) -> None:
    file = tmp_path / "signal.json"
    file.write_text(json.dumps(content))
    os.utime(file, (NOON, NOON))
    read = SignalFile()
    assert read.value(SignalPolicy(file=str(file), steps=STEPS.steps), NOON + 60, 5.0) == value
    assert not read.problem


@pytest.mark.parametrize(
    ("content", "later", "says"),
    [
        pytest.param("{", 0.0, "is no JSON", id="no JSON"),
        pytest.param("{}", 0.0, "has no point with a time", id="nothing"),
        pytest.param('[{"value": -2e5, "time": "2026-01-31T12:00:00Z"}]', 0.0, "at 2026", id="absurdly negative"),
        pytest.param('[{"value": 1e9, "time": "2026-01-31T12:00:00Z"}]', 0.0, "no carbon intensity", id="absurd"),
        pytest.param('[{"value": 1, "time": "yesterday"}]', 0.0, "is not a time", id="no time"),
        pytest.param('[{"value": 1, "time": "2026-01-31T12:00:00Z"}]', -60.0, "only of later", id="of later"),
        pytest.param('[{"value": 1, "time": "2026-01-31T12:00:00Z"}]', 9e3, "is older", id="old"),
        pytest.param(
            '[{"rating": 1, "time": "2026-01-31T12:00:00Z", "duration": "00:05:00"}]', 400.0, "is older", id="ended"
        ),
        pytest.param("[" * 5000, 0.0, "ecursion", id="deep"),
        pytest.param("[" * 900 + "]" * 900, 0.0, "", id="deep, and valid"),
        pytest.param('{"value": 5, "time": 1' + "0" * 400 + "}", 0.0, "", id="a time beyond all floats"),
        pytest.param('{"value": 5, "time": 1, "duration": 1' + "0" * 400 + "}", 0.0, "", id="so a duration"),
        pytest.param(None, 0.0, "No such file", id="not there"),
    ],
)  # fmt: skip
def test_s2_8_a_signal_that_cannot_be_believed_changes_nothing_and_is_said(
    tmp_path: Path, content: str | None, later: float, says: str
) -> None:
    file = tmp_path / "signal.json"
    if content is not None:
        file.write_text(content)
    read = SignalFile()
    assert read.value(SignalPolicy(file=str(file), steps=STEPS.steps), NOON + later, 5.0) is None
    assert read.problem
    assert says in read.problem


def test_s2_8_a_pipe_is_no_signal_and_holds_nobody_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "signal.json")
    read = SignalFile()
    assert read.value(SignalPolicy(file=str(tmp_path / "signal.json"), steps=STEPS.steps), NOON, 5.0) is None
    assert "is no regular file" in read.problem


def test_s2_8_a_folder_is_no_signal_and_costs_no_descriptors(tmp_path: Path) -> None:
    before, read = len(os.listdir("/proc/self/fd")), SignalFile()
    for look in range(5):
        assert read.value(SignalPolicy(file=str(tmp_path), steps=STEPS.steps), NOON, 20.0 * look) is None
    assert "is no regular file" in read.problem
    assert len(os.listdir("/proc/self/fd")) == before


def test_s2_8_a_file_that_is_replaced_is_read_again(tmp_path: Path) -> None:
    file, read = tmp_path / "signal.json", SignalFile()
    policy = SignalPolicy(file=str(file), steps=STEPS.steps)
    assert read.value(policy, NOON, 0.0) is None
    file.write_text(json.dumps([{"value": 100, "time": "2026-01-31T12:00:00Z"}]))
    assert read.value(policy, NOON, 5.0) is None, "it is looked at every ten seconds"
    assert read.value(policy, NOON, 11.0) == 100.0
    assert not read.problem


KEYS = st.sampled_from(["time", "value", "forecast", "datetime", "rating", "duration", "x"])
LEAVES = st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=9)
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)


@given(JSON)
def test_s2_8_whatever_a_file_has_it_is_a_signal_or_an_error(data: Any) -> None:
    with contextlib.suppress(ValueError):
        assert all(-1e5 <= p.value <= 1e5 and p.seconds > 0 for p in points_of(json.dumps(data).encode(), NOON))


@pytest.mark.parametrize(
    ("power", "says"),
    [
        pytest.param("oversubscribe: 200%", "oversubscribe", id="twice as much more"),
        pytest.param("signal: {file: x, steps: [{above: 1, budget: 1}]}", "is no path", id="a relative file"),
        pytest.param("signal: {file: /x}", "nothing follows", id="no steps"),
        pytest.param("signal: {steps: [{above: 1, budget: 1}]}", "without a file", id="no file"),
        pytest.param("signal: {elastic: true}", "without a file", id="elastic by nothing"),
        pytest.param(
            "signal: {file: /x, steps: [{above: 2, budget: 9}, {above: 1, budget: 5}]}", "watts fall", id="not sorted"
        ),
        pytest.param(
            "signal: {file: /x, steps: [{above: 1, budget: 5}, {above: 2, budget: 9}]}", "watts fall", id="watts rise"
        ),
    ],
)
def test_s2_8_a_policy_that_makes_no_sense_is_refused(power: str, says: str) -> None:
    text = f"apiVersion: {API_VERSION}\nkind: ColocationPolicy\nspec: {{power: {{{power}}}}}\n"
    with pytest.raises(ConfigError, match=says):
        parse_policy(text, "a file")
