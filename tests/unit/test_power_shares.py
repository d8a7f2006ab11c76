"""S2.8: a budget of several nodes that is cut, and what each of them may draw then."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colocate.cluster.api import PowerNeed, PowerNeeds
from podgroup.controller.power_shares import NEAR, Enforced, to_write, wanted

TWO = {"a": 600, "b": 300}


@pytest.mark.parametrize(
    ("budgets", "expected"),
    [
        pytest.param([], {}, id="none is enforced"),
        pytest.param([Enforced(900, TWO)], {}, id="enough for all"),
        pytest.param([Enforced(600, TWO)], {"a": 400, "b": 200}, id="all keep the same share of what they ask for"),
        pytest.param([Enforced(600, TWO), Enforced(100, {"b": 300})], {"a": 400, "b": 100}, id="the strictest counts"),
        pytest.param([Enforced(0, TWO)], {"a": 1, "b": 1}, id="nothing is left: as little as can be said"),
        pytest.param([Enforced(-50, TWO)], {"a": 1, "b": 1}, id="idle nodes alone draw more than it"),
    ],
)
def test_s2_8_what_nodes_may_have(budgets: list[Enforced], expected: dict[str, int]) -> None:
    assert wanted(budgets, {}) == expected


def needs(asked: int, *least: tuple[float, int]) -> PowerNeeds:
    return PowerNeeds(asked=asked, least=[PowerNeed(slowdown=s, watts=w) for s, w in least])


def as_quadratic(a: float, most: int) -> PowerNeeds:
    """GEOPM's model A (1 - P / most)^2, as an agent would tell of it."""
    grid = [i * i / 400 for i in range(21)]
    return needs(most, *((t, round(most * (1 - (t / a) ** 0.5))) for t in grid if t <= a))


FLAT, FEELS = needs(300, (0.0, 300), (0.01, 100)), needs(300, (0.0, 300), (0.05, 250), (1.0, 150))


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        pytest.param(
            Enforced(400, {"a": 300, "b": 300}, {"a": FLAT, "b": FEELS}), {"a": 109, "b": 290},
            id="who hardly feels it gives",
        ),
        pytest.param(
            Enforced(300, {"a": 300, "b": 300}, {"a": FLAT, "b": FEELS}), {"a": 77, "b": 222},
            id="then both, as much slower",
        ),
        pytest.param(
            Enforced(500, {"a": 300, "b": 300}, {"a": needs(300, (0.0, 120), (1.0, 60))}), {"a": 200, "b": 300},
            id="one needs little of it: what nobody needs is shared",
        ),
        pytest.param(
            Enforced(330, {"a": 300, "b": 300}, {"a": needs(300, (0.0, 120), (1.0, 60))}), {"a": 101, "b": 229},
            id="and less than both need is felt by both",
        ),
        pytest.param(
            Enforced(300, {"a": 600, "b": 300}, {"a": needs(300, (0.0, 10), (1.0, 10))}), {"a": 155, "b": 145},
            id="of pods that its agent does not know yet nothing is assumed",
        ),
        pytest.param(
            Enforced(200, {"a": 100, "b": 300}, {"a": needs(300, (0.0, 300), (1.0, 150))}), {"a": 50, "b": 149},
            id="a part of what it tells of is no pod's",
        ),
        pytest.param(
            Enforced(300, {"a": 300, "b": 300}, {"a": needs(300, (0.5, 10), (0.5, 10))}), {"a": 150, "b": 150},
            id="what says nothing is not believed",
        ),
        pytest.param(
            Enforced(300, {"a": 200, "b": 200}, {"a": as_quadratic(1.0, 200), "b": as_quadratic(1.0, 200)}),
            {"a": 150, "b": 150},
            id="GEOPM's uniform power limit",
        ),
        pytest.param(
            Enforced(300, {"a": 200, "b": 200}, {"a": as_quadratic(1.0, 200), "b": as_quadratic(1.1, 200)}),
            {"a": 148, "b": 151},
            id="GEOPM's non-uniform power limit: nodes that feel it more have more, and all are as slow",
        ),
    ],
)  # fmt: skip
def test_s2_8_nodes_have_what_makes_the_worst_slowdown_least(budget: Enforced, expected: dict[str, int]) -> None:
    found = wanted([budget], {})
    assert found == pytest.approx(expected, abs=1)
    assert sum(found.values()) <= budget.watts


def test_s2_8_needs_that_change_a_little_are_not_written_to_every_node() -> None:
    draw, written, writes = random.Random(1), dict.fromkeys((f"n{i}" for i in range(200)), 0), 0
    for round_ in range(20):
        told = {f"n{i}": needs(300, (0.0, 300), (0.5, 200 + draw.randint(-6, 6))) for i in range(10)}
        changes = to_write([Enforced(45_000, dict.fromkeys(written, 300), told)], written, dict(written), {})
        written |= changes
        writes += len(changes) if round_ > 2 else 0
        assert round_ < 3 or sum(written.values()) <= 45_000
    assert writes <= 60


SLOWER = st.lists(st.integers(0, 300), min_size=3, max_size=3).map(lambda w: sorted(w, reverse=True))


@given(st.dictionaries(st.sampled_from("abcde"), SLOWER, min_size=1), st.integers(1, 1600))
def test_s2_8_whatever_agents_say_the_shares_are_within_the_budget_and_nobody_has_more_than_he_asks_for(
    said: dict[str, list[int]], watts: int
) -> None:
    told = {node: needs(300, *zip((0.0, 0.1, 1.0), least, strict=True)) for node, least in said.items()}
    budget = Enforced(watts, dict.fromkeys(said, 300), told)
    found = budget.shares({})
    if 300 * len(said) <= watts:
        assert found == {}
        return
    assert sum(found.values()) <= watts + len(said), "nobody has less than a watt"
    assert all(1 <= share <= 300 for share in found.values())


@pytest.mark.parametrize(
    ("budget", "written", "in_force", "expected"),
    [
        pytest.param(Enforced(600, TWO), {"a": 0, "b": 0}, TWO, {"a": 400, "b": 200}, id="a cut: all falls at once"),
        pytest.param(Enforced(600, TWO), {"a": 300, "b": 300}, {"a": 300, "b": 300}, {"b": 200}, id="first what falls"),
        pytest.param(
            Enforced(600, TWO),
            {"a": 300, "b": 200},
            {"a": 300, "b": 260},
            {"a": 340},
            id="then what there is room for by now",
        ),
        pytest.param(Enforced(600, TWO), {"a": 300, "b": 200}, {"a": 300, "b": 200}, {"a": 400}, id="then what rises"),
        pytest.param(
            Enforced(900, TWO), {"a": 400, "b": 200}, {"a": 400, "b": 200}, {"a": 0, "b": 0}, id="enough for all again"
        ),
        pytest.param(
            Enforced(600, {**TWO, "none": 300}),
            {"a": 300, "b": 150},
            {"a": 300, "b": 150},
            {"none": 150},
            id="a node without an agent draws all that it asks for, so nothing else rises",
        ),
        pytest.param(Enforced(600, {}), {"a": 300}, {"a": 300}, {"a": 0}, id="nobody asks for anything any more"),
    ],
)
def test_s2_8_what_is_written_when(
    budget: Enforced, written: dict[str, int], in_force: dict[str, int], expected: dict[str, int]
) -> None:
    assert to_write([budget], written, in_force, {}) == expected


NODES = st.sampled_from(["a", "b", "c", "d"])
ASKED = st.dictionaries(NODES, st.integers(1, 1000), min_size=1)


@pytest.mark.parametrize(
    ("budget", "written", "in_force", "stuck", "expected"),
    [
        pytest.param(
            Enforced(1000, {"a": 100, "b": 850}),
            {"a": 70, "b": 700},
            {"a": 200, "b": 700},
            {"a": 200},
            {"a": 0, "b": 800},
            id="one draws more than is asked for: the other rises as far as there is room",
        ),
        pytest.param(
            Enforced(1000, {"a": 100, "b": 850}),
            {"a": 70, "b": 700},
            {"a": 1000, "b": 700},
            {},
            {"a": 300},
            id="one draws all of it: there is no room for the other, which does not mean no limit",
        ),
        pytest.param(
            Enforced(1000, {"a": 600, "b": 2000}),
            {"a": 230, "b": 769},
            {"a": 600, "b": 769},
            {"a": 600},
            {"b": 400},
            id="the cards of one take no less: the other pays for it",
        ),
        pytest.param(
            Enforced(1000, {"a": 600, "b": 600}),
            {"a": 400, "b": 400},
            {"b": 400},
            {},
            {"a": 500},
            id="who keeps no limit counts with all that is asked for, so nobody else rises",
        ),
    ],
)
def test_s2_8_nodes_that_do_not_do_as_they_are_told(
    budget: Enforced,
    written: dict[str, int],
    in_force: dict[str, int],
    stuck: dict[str, int],
    expected: dict[str, int],
) -> None:
    assert to_write([budget], written, in_force, stuck) == expected


@given(st.lists(st.tuples(st.integers(1, 3000), ASKED, st.sets(NODES)), min_size=1, max_size=20))
def test_s2_8_on_the_way_what_may_be_drawn_exceeds_a_budget_only_until_what_it_lowered_has_fallen(
    steps: list[tuple[int, dict[str, int], set[str]]],
) -> None:
    """Budgets and pods change; of the nodes some answer at once, others keep their old limits for a while."""
    written = dict.fromkeys("abcd", 0)
    force = dict.fromkeys("abcd", 0)
    for watts, asked, answering in steps:
        budget = Enforced(watts, asked)
        for _ in range(3):
            may = {node: min(asked.get(node, 0), written[node] or 10**9) for node in written}
            force = {node: may[node] if node in answering else force[node] for node in written}
            before = sum(max(force[n], may[n]) for n in asked)
            changes = to_write([budget], written, force, {})
            written |= changes
            after = sum(max(force[n], min(asked[n], written[n] or 10**9)) for n in asked)
            assert after <= max(before, watts) + len(asked), "nothing rises beyond the budget"
        everybody = answering >= asked.keys()
        if everybody:
            for _ in range(3):
                force = {node: min(asked.get(node, 0), written[node] or 10**9) for node in written}
                written |= to_write([budget], written, force, {})
            assert sum(min(asked[n], written[n] or 10**9) for n in asked) <= watts + len(asked)
            shares = wanted([budget], {})
            if sum(shares.values()) <= watts:  # nobody has less than a watt, whatever is left
                settled = {n: w for n, w in written.items() if w}
                assert settled.keys() == shares.keys(), "it settles"
                assert all(abs(settled[n] - w) <= max(NEAR * asked[n], 1) for n, w in shares.items())
