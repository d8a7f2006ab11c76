"""S2.8: under-utilized cards: watts that one has not drawn for a minute go to another, and come back in a tick."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colocate.decide.allowance import PowerState, allowance
from colocate.decide.caps import power_caps
from colocate.decide.node_budget import Known
from colocate.decide.node_budget import budgeted as with_budget
from colocate.decide.unused import MARGIN, NEAR, WINDOW_SECONDS, Drew, needs, watched
from colocate.policy.schema import PowerPolicy
from colocate.snapshot import Card, NodeSnapshot
from tests.unit.test_power_caps import card, node, strictest_of

POLICY = PowerPolicy(budget=400)


def two(at: float, first: Card, second: Card) -> NodeSnapshot:
    return msgspec.structs.replace(node(first, second, j1=300.0, j2=300.0), monotonic_seconds=at)


def drawing(uuid: str, user: str, watts: float | None, at: float, limit: float = 300.0) -> Card:
    return card(uuid, user, watts=watts, at_seconds=at, limit_watts=limit)


def after(seconds: int, *watts: float | None, limit: float = 300.0, user: str = "j1") -> dict[str, Drew]:
    """A card that draws these, each for as long as the others."""
    known: dict[str, Drew] = {}
    for second in range(seconds):
        drawn = watts[second * len(watts) // seconds]
        snapshot = two(float(second), drawing("GPU-0", user, drawn, second, limit), card("GPU-1"))
        known = watched(known, snapshot)
    return known


@pytest.mark.parametrize(
    ("known", "now", "enough"),
    [
        pytest.param(after(70, 80.0), 70.0, 100.0, id="a minute of 80 W: a quarter more is enough"),
        pytest.param(after(50, 80.0), 50.0, None, id="less than a minute says nothing"),
        pytest.param(after(90, 80.0, 160.0, 80.0), 90.0, 200.0, id="the most of the last minute counts"),
        pytest.param(after(200, 160.0, 80.0), 200.0, 100.0, id="what was before does not"),
        pytest.param(after(70, 80.0, limit=90.0), 70.0, None, id="near its limit it might draw more"),
        pytest.param(after(70, 80.0, None, 80.0), 70.0, None, id="a gap begins anew"),
    ],
)
def test_s2_8_what_is_enough_for_a_card(known: dict[str, Drew], now: float, enough: float | None) -> None:
    found = needs(known, now).get("GPU-0")
    assert found == (None if enough is None else pytest.approx(enough))


def test_s2_8_who_comes_to_a_card_has_its_own_needs() -> None:
    known = after(70, 40.0)
    assert needs(known, 70.0)
    both = card("GPU-0", "j1", "j2", watts=40.0, at_seconds=70.0, limit_watts=300.0)
    assert not needs(watched(known, two(70.0, both, card("GPU-1"))), 70.0)
    given_ = card("GPU-0", "j1", watts=40.0, at_seconds=70.0, limit_watts=300.0, allotted=("j2",))
    assert not needs(watched(known, two(70.0, given_, card("GPU-1"))), 70.0)
    assert not watched(known, two(70.0, card("GPU-0", watts=40.0, at_seconds=70.0), card("GPU-1"))), "nobody is on it"


def test_s2_8_a_limit_that_was_enough_is_not_near() -> None:
    assert 1.0 / MARGIN < NEAR, "else what a card is left would be taken for what holds it back"


class Cards:
    """Two cards of jobs that want what they want, limited as the agent has it, a tick a second."""

    def __init__(self) -> None:
        self.limits, self.now = {"GPU-0": 200.0, "GPU-1": 200.0}, 0.0
        self._known: dict[str, Drew] = {}

    def tick(self, first: float, second: float) -> dict[str, float]:
        """What they draw; who is to have less has it before another has more."""
        self.now += 1.0
        drawn = {u: min(want, self.limits[u]) for u, want in zip(("GPU-0", "GPU-1"), (first, second), strict=True)}
        on = [drawing(u, j, drawn[u], self.now, self.limits[u]) for u, j in (("GPU-0", "j1"), ("GPU-1", "j2"))]
        snapshot = two(self.now, *on)
        self._known = watched(self._known, snapshot)
        state = allowance(PowerState(), snapshot, POLICY)
        found = with_budget(power_caps(snapshot), snapshot, POLICY, state, needs(self._known, self.now), Known()).capped
        wanted = {u: w for u, w in strictest_of(found.caps).items() if w is not None}
        falls = {u: w for u, w in wanted.items() if w < self.limits[u]}
        self.limits |= falls or wanted
        return drawn


def test_s2_8_what_one_does_not_draw_another_has_and_gives_back_within_two_ticks() -> None:
    cards = Cards()
    for _ in range(round(WINDOW_SECONDS) + 5):
        cards.tick(90.0, 300.0)
    assert cards.limits["GPU-0"] >= 90.0 * 1.1
    assert cards.limits["GPU-1"] >= 280.0
    for _ in range(4):
        cards.tick(300.0, 300.0)
    assert cards.limits == {"GPU-0": 200.0, "GPU-1": 200.0}
    for _ in range(round(WINDOW_SECONDS) - 5):
        cards.tick(60.0, 300.0)
        assert cards.limits == {"GPU-0": 200.0, "GPU-1": 200.0}, "for a minute nothing swings"


@settings(deadline=None, max_examples=12)
@given(st.lists(st.tuples(st.floats(20.0, 300.0), st.floats(20.0, 300.0), st.integers(1, 90)), min_size=1, max_size=6))
def test_s2_8_the_sum_stays_within_the_budget_and_who_wants_more_than_it_is_left_gets_its_half(
    phases: list[tuple[float, float, int]],
) -> None:
    cards = Cards()
    for first, second, seconds in phases:
        for second_of_phase in range(seconds):
            cards.tick(first, second)
            assert sum(cards.limits.values()) <= 400.0
            if second_of_phase >= 4:
                for uuid, want in (("GPU-0", first), ("GPU-1", second)):
                    assert cards.limits[uuid] >= min(want, 200.0) * 0.85, "what it wants, or its half, but for a hair"
