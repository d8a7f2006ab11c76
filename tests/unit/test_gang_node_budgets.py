"""Budgets of sets of nodes: the solver keeps them, finds what fits within them, and says when one is in the way."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colocate.errors import BadInput
from colocate.objects import LabelRequirement, LabelSelector, Node, Pod, Resources
from podgroup.explain.snapshot import KIND, VERSION, ClusterSnapshot, decide, explain, load, taken_of
from podgroup.queue.entry import Settings
from podgroup.queue.queue import Queue
from podgroup.solve.place import most_that_fit, place
from podgroup.solve.question import Gang, Member
from podgroup.solve.sequence import place_in_turn
from podgroup.state.cluster import Cluster
from podgroup.state.node_budgets import NodeSetBudget
from podgroup.state.shape import Shape, Term
from tests.unit.test_gang_snapshot import NOW, group, node, pod

RACK, ROW, HOST, WATTS = "rack", "row", "kubernetes.io/hostname", "example.com/watts"
replace = msgspec.structs.replace


def powered(name: str, watts: int, cpu: int = 64, **labels: str) -> Node:
    made = node(name, cpu)
    meta = replace(made.metadata, labels={HOST: name, **labels})
    return replace(
        made, metadata=meta, status=replace(made.status, allocatable={**made.status.allocatable, WATTS: watts})
    )


def asking(one: Pod, watts: int) -> Pod:
    (container,) = one.spec.containers
    asked: Resources = replace(container.resources, requests={**container.resources.requests, WATTS: str(watts)})
    return replace(one, spec=replace(one.spec, containers=[replace(container, resources=asked)]))


IDLE = 7


def budget(name: str, amount: int, nodes: int = 0, **labels: str) -> NodeSetBudget:
    """What is set aside for so many nodes that draw IDLE comes to what there is for pods."""
    selector, each = LabelSelector(match_labels=labels), IDLE if nodes else 0
    return NodeSetBudget(name, WATTS, amount + nodes * each, selector, each)


def members(count: int, watts: int, **more: Any) -> tuple[Member, ...]:
    shape = Shape(requests=(("pods", 1), (WATTS, watts)), **more)
    return tuple(Member(f"{watts}-{i}", f"{watts}-{i}", "ns", shape, {"app": "x"}) for i in range(count))


class Machines:
    """Rows of racks of nodes, each with what its budget allows."""

    def __init__(self, rows: list[list[tuple[int, list[int]]]], row_amount: int, whole: int) -> None:
        self.rows, self.row_amount, self.whole = rows, row_amount, whole
        self.cluster = Cluster()
        for i, racks in enumerate(rows):
            for j, (amount, nodes) in enumerate(racks):
                for k, watts in enumerate(nodes):
                    self.cluster.set_node(powered(f"n{i}{j}{k}", watts, rack=f"{i}{j}", row=f"{i}"))
                self.cluster.set_node_budget(budget(f"rack-{i}{j}", amount, len(nodes), rack=f"{i}{j}"))
            self.cluster.set_node_budget(budget(f"row-{i}", row_amount, row=f"{i}"))
        self.cluster.set_node_budget(budget("whole", whole))

    def most(self, each: int, a_node: int) -> int:
        """How many members fit, counted from the racks up."""
        return min(
            self.whole // each,
            sum(
                min(
                    self.row_amount // each,
                    sum(min(amount // each, sum(min(w // each, a_node) for w in nodes)) for amount, nodes in racks),
                )
                for racks in self.rows
            ),
        )

    def kept(self) -> bool:
        return all(left.left >= 0 for left in self.cluster.ledger.left_of({WATTS}))


RACKS = st.tuples(st.integers(0, 9), st.lists(st.integers(0, 6), min_size=1, max_size=3))
MACHINES = st.builds(
    Machines,
    st.lists(st.lists(RACKS, min_size=1, max_size=3), min_size=1, max_size=2),
    st.integers(0, 14),
    st.integers(0, 20),
)


@settings(deadline=None)
@given(MACHINES, st.integers(1, 3), st.integers(1, 14), st.booleans())
def test_as_many_fit_as_nested_budgets_allow(machines: Machines, each: int, count: int, apart: bool) -> None:
    """`apart`: one a node, by anti-affinity; decided member by member."""
    terms = (Term(HOST, LabelSelector(match_labels={"app": "x"}), ("ns",)),) if apart else ()
    gang = Gang(members(count, each, anti_affinity=terms), count)
    ledger, most = machines.cluster.ledger, machines.most(each, 1 if apart else 99)
    placed = place(ledger, gang)
    assert (placed is not None) == (count <= most)
    assert most_that_fit(ledger, gang) == min(count, most)
    with ledger.with_also([one.holding for one in placed or ()]):
        assert machines.kept()


@settings(deadline=None)
@given(MACHINES, st.integers(1, 5), st.integers(1, 5), st.sampled_from(["", RACK, ROW]))
def test_a_gang_of_two_kinds_keeps_them_wherever_it_must_be(machines: Machines, ones: int, twos: int, key: str) -> None:
    gang = Gang((*members(ones, 1), *members(twos, 2)), ones + twos, required_topology=key)
    ledger = machines.cluster.ledger
    placed = place(ledger, gang)
    with ledger.with_also([one.holding for one in placed or ()]):
        assert machines.kept()
    if placed is not None:
        assert len({ledger.label(key).codes[ledger.rows[node]] for _, node in placed} if key else {0}) == 1


@settings(deadline=None)
@given(MACHINES, st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=5))
def test_gangs_in_turn_keep_them_as_one_after_the_other(machines: Machines, sizes: list[tuple[int, int]]) -> None:
    ledger = machines.cluster.ledger
    gangs = [Gang(tuple(m._replace(uid=f"{i}-{m.uid}") for m in members(n, w)), n) for i, (n, w) in enumerate(sizes)]
    together = place_in_turn(ledger, gangs)
    for gang, found in zip(gangs, together, strict=True):
        assert found == place(ledger, gang)
        for one in found or ():
            ledger.hold(one.holding)
    assert machines.kept()


def test_which_nodes_a_budget_is_of() -> None:
    cluster = Cluster()
    cluster.set_node(powered("n0", 9))
    cluster.set_node(powered("n1", 9, rack="a"))
    cluster.set_node(powered("n2", 9, rack="b"))
    requirement = LabelRequirement(key="rack", operator="NotIn", values=["a"])
    selector = LabelSelector(match_expressions=[requirement])
    cluster.set_node_budget(NodeSetBudget(name="b", resource=WATTS, amount="2", node_selector=selector))
    (left,) = cluster.ledger.left_of({WATTS})
    assert left.nodes.tolist() == [True, False, True], "NotIn selects nodes without the label, as everywhere"
    cluster.set_node(powered("n2", 9, rack="a"))
    (left,) = cluster.ledger.left_of({WATTS})
    assert left.nodes.tolist() == [True, False, False], "its label has changed"
    cluster.remove_node_budget("b")
    assert cluster.ledger.left_of({WATTS}) == []


def waiting(nodes: list[Node], there: list[Pod], size: int, watts: int, *budgets: NodeSetBudget) -> ClusterSnapshot:
    pods = [asking(pod(f"g-{i}", "g"), watts) for i in range(size)]
    return ClusterSnapshot(
        taken=NOW,
        kind=KIND,
        version=VERSION,
        nodes=nodes,
        pods=[*there, *pods],
        groups=[group("g", size)],
        node_budgets=list(budgets),
    )


def test_a_gang_that_waits_for_a_budget_is_told_so_and_what_would_do() -> None:
    there = [asking(pod("old", on="n0"), 300)]
    made = waiting(
        [powered("n0", 1000, rack="a"), powered("n1", 1000, rack="a")], there, 4, 250, budget("rack-a", 1120, rack="a")
    )
    found = explain(made, "ns/g")
    assert found is not None
    assert found.verdict.message.startswith(
        "3 of 4 members fit; blocked by budget rack-a (820 of 1120 example.com/watts left)"
    )
    assert found.advice is not None
    changes = [c.change for c in found.advice.counterfactuals]
    assert "the budget rack-a were 1300 of example.com/watts instead of 1120" in changes
    assert "minMember were 3 instead of 4" in changes
    assert "ns/old ends (1 pods)" in changes
    again = load(msgspec.json.encode(made))
    assert decide(again) == decide(made)


def test_a_snapshot_whose_budget_is_no_amount_is_refused() -> None:
    made = waiting([powered("n0", 1000)], [], 1, 1, NodeSetBudget(name="b", resource=WATTS, amount="much"))
    with pytest.raises(BadInput, match=r"nodeBudgets: b: amount: 'much' is not a quantity"):
        load(msgspec.json.encode(made))


class Run:
    """A queue over a cluster with two nodes in one budget."""

    def __init__(self, amount: int, **options: Any) -> None:
        self.cluster, self.queue, self.now = Cluster(), Queue(Settings(**options)), 0.0
        for name in ("n0", "n1"):
            self.cluster.set_node(powered(name, 1000, cpu=4))
        self.cluster.set_node_budget(budget("all", amount))

    def add(self, *pods: Pod) -> None:
        for one in pods:
            self.cluster.set_pod(one)

    def cycle(self, *keys: str) -> list[str]:
        self.now += 1.0
        return [start.key for start in self.queue.cycle(self.cluster, set(keys), self.now).starts]


def test_what_ends_on_one_node_of_a_budget_helps_on_another() -> None:
    run = Run(1000)
    run.add(asking(pod("full", cpu=4, on="n0"), 0), asking(pod("hungry", cpu=0, on="n0"), 700))
    run.add(asking(pod("late", cpu=1), 500))
    assert run.cycle("ns/pod:late") == []
    assert "budget all (300 of 1000" in run.queue.waiting["ns/pod:late"].message
    run.cluster.remove_pod("hungry")
    assert run.cycle() == ["ns/pod:late"], "n0 has no CPU for it, and yet it can start: on n1"
    assert run.cluster.planned["late"] == "n1"


def test_what_the_head_waits_for_is_not_given_to_those_behind_it() -> None:
    run = Run(1000, reserve_after_seconds=0.0)
    run.add(asking(pod("old", on="n0"), 600), asking(pod("head"), 900), asking(pod("small"), 200))
    assert run.cycle("ns/pod:head") == []
    run.now += 10.0
    assert run.cycle("ns/pod:head", "ns/pod:small") == []
    assert run.queue.waiting["ns/pod:small"].reason == "BehindReservation"
    run.cluster.remove_pod("old")
    assert run.cycle()[:1] == ["ns/pod:head"]


def test_a_more_important_gang_takes_a_budget_from_less_important_pods() -> None:
    run = Run(1000)
    run.add(*(asking(pod(f"low{i}", cpu=1, on=f"n{i % 2}"), 300) for i in range(3)))
    vip = asking(pod("vip", priority=9), 600)
    run.add(vip)
    (eviction,) = run.queue.cycle(run.cluster, {"ns/pod:vip"}, 1.0).evictions
    assert len(eviction.preemption.victims) == 2, "100 W are left and 600 W are wanted"


def test_a_snapshot_carries_what_a_cluster_knows() -> None:
    run = Run(1000)
    assert taken_of(run.cluster, Settings(), NOW).node_budgets == [budget("all", 1000)]
