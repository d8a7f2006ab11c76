"""S2.8: a budget of several nodes that is cut, and what each of them may draw then."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podgroup.controller.power_shares import Enforced, to_write, wanted

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
                assert {n: w for n, w in written.items() if w} == shares, "it settles"
