"""S2.2, S2.3, S2.8: the seventeen cases of GEOPM's OpenPBS hook (TestPowerLimitHook), as they are here.

Its prologue is what comes before a container or job starts, its epilogue what comes after its last process, its queue
hook what a gang's watts are counted as. Where a case is otherwise here its id says so.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from colocate.actuate.journal import read_entries
from colocate.decide.outcome import watts_for
from colocate.nri import Refused
from colocate.objects import LabelSelector
from colocate.policy.schema import PowerModel, PowerPoint
from podgroup.controller.power_shares import Enforced, wanted
from podgroup.explain.snapshot import KIND, VERSION, ClusterSnapshot, Verdict, decide
from podgroup.state.node_budgets import NodeSetBudget
from tests.unit.test_cap_crashes import FOUND, Machine
from tests.unit.test_gang_node_budgets import WATTS, asking, powered
from tests.unit.test_gang_snapshot import NOW, group, pod
from tests.unit.test_power_caps import Start
from tests.unit.test_power_shares import as_quadratic


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def saved(machine: Machine) -> list[str]:
    return [e.found for e in machine.journal.entries if e.kind == "cap"]


# prologue


def test_what_is_asked_for_is_set_and_what_was_found_is_saved_first(machine: Machine) -> None:
    machine.step("start", "a", 240)
    assert machine.limit == 240_000
    assert saved(machine) == [str(FOUND)]


def test_what_is_no_number_is_refused_and_nothing_is_set_or_saved() -> None:
    start = Start(known=False, annotations={"colocate.io/power": "not a number"})
    with pytest.raises(Refused, match="write whole watts"):
        start.make()
    assert start.cards.caps.set == []


def test_who_asks_for_nothing_is_let_start_and_nothing_is_set() -> None:
    assert Start(None).make() == []


def test_what_an_epilogue_that_did_not_run_has_left_is_put_back_by_the_next_start(machine: Machine) -> None:
    machine.step("start", "a", 180)
    machine.running.clear()  # its job has ended, and so has the agent
    machine.begin()
    assert machine.limit == FOUND
    assert saved(machine) == []


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        pytest.param(1.0, {"a": 150, "b": 150}, id="uniform: nodes of one model have the same"),
        pytest.param(1.1, {"a": 148, "b": 151}, id="non-uniform: of two models they are as slow, and all is given"),
    ],
)
def test_a_budget_among_nodes(second: float, expected: dict[str, int]) -> None:
    needs = {"a": as_quadratic(1.0, 200), "b": as_quadratic(second, 200)}
    found = wanted([Enforced(300, {"a": 200, "b": 200}, needs)], {})
    assert found == pytest.approx(expected, abs=1)
    assert 298 <= sum(found.values()) <= 300
    slowdowns = [a * (1 - found[node] / 200) ** 2 for a, node in ((1.0, "a"), (second, "b"))]
    assert slowdowns[0] == pytest.approx(slowdowns[1], abs=0.004)


# epilogue


def test_where_nothing_was_set_nothing_is_put_back(machine: Machine) -> None:
    machine.step("end", "a")
    machine.step("tick")
    assert (machine.writes, machine.limit) == (0, FOUND)


def test_what_was_found_is_put_back_and_forgotten(machine: Machine) -> None:
    for step in (("start", "a", 240), ("end", "a"), ("tick",)):
        machine.step(*step)
    assert machine.limit == FOUND
    assert saved(machine) == []


def test_a_saved_file_that_is_none_sets_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = tmp_path / "journal"
    journal.write_text('00000000 {"kind": "cap", "file": "GPU-0", "found": "1", "wanted": "1"}\n')
    assert read_entries(journal)[0] == []
    machine = Machine(tmp_path, monkeypatch)
    assert (machine.writes, machine.limit) == (0, FOUND)


# the two events, and any other


def test_a_start_sets_and_puts_nothing_back(machine: Machine) -> None:
    machine.step("start", "a", 240)
    machine.step("start", "b", 150)
    assert machine.limit == 150_000, "of two the strictest counts: a prologue of a second job would have set its own"


def test_an_end_puts_back_and_sets_nothing_else(machine: Machine) -> None:
    for step in (("start", "a", 240), ("start", "b", 150), ("end", "b"), ("tick",)):
        machine.step(*step)
    assert machine.limit == 240_000, "what the other asked for is still in force"


def test_any_other_event_changes_nothing(machine: Machine) -> None:
    machine.step("start", "a", 240)
    before = machine.writes
    machine.step("tick")
    assert (machine.writes, machine.limit) == (before, 240_000)


# what is asked for when a job is queued


def queued(each: int, budget: int | None) -> Verdict:
    """A gang of two on two nodes that take 1000 W each."""
    members = [pod(f"m-{i}", "g") for i in range(2)]
    members = [asking(member, each) if each else member for member in members]
    nodes = [powered(f"n{i}", 1000) for i in range(2)]
    budgets = [] if budget is None else [NodeSetBudget("whole", WATTS, budget, LabelSelector(), 0)]
    snapshot = ClusterSnapshot(
        taken=NOW, kind=KIND, version=VERSION, nodes=nodes, pods=members, groups=[group("g", 2)], node_budgets=budgets
    )
    (verdict,) = decide(snapshot)
    return verdict


@pytest.mark.parametrize(
    ("each", "budget", "outcome"),
    [
        pytest.param(1000, 2000, "Start", id="what is asked for of a node counts for each of the job's"),
        pytest.param(0, 2000, "Start", id="no watts, and the budget is high"),
        pytest.param(
            0,
            1000,
            "Start",
            id="no watts, and the budget is low: nothing is counted, so nothing is stuck (GEOPM asks for all)",
        ),
        pytest.param(0, None, "Start", id="no watts, and no budget"),
        pytest.param(1000, 1999, "Wait", id="one watt is not left: it waits, and says so"),
    ],
)
def test_what_a_gang_is_counted_as(each: int, budget: int | None, outcome: str) -> None:
    found = queued(each, budget)
    assert found.outcome == outcome
    assert ("budget whole" in found.message) == (outcome == "Wait")


def test_what_it_may_lose_becomes_watts_by_its_classs_model() -> None:
    points = tuple(PowerPoint(watts=500 + 10 * i, slowdown=3 * (1 - (500 + 10 * i) / 1000) ** 2) for i in range(51))
    assert watts_for(PowerModel(name="test-type", points=points), 0.75) == 500
