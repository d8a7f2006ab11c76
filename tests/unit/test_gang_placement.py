"""The solver: cases of one screen each, and properties against a search of all assignments."""

from __future__ import annotations

from itertools import product
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colocate.objects import (
    Affinity,
    Claim,
    ClaimSource,
    ClaimSpec,
    Condition,
    Container,
    ContainerPort,
    ContainerStatus,
    LabelSelector,
    Node,
    NodeSpec,
    NodeStatus,
    ObjectMeta,
    PersistentVolume,
    Pod,
    PodAffinity,
    PodAffinityTerm,
    PodSpec,
    PodStatus,
    Quantities,
    Resources,
    Taint,
    Toleration,
    TopologySpreadConstraint,
    Volume,
)
from podgroup.solve.place import place
from podgroup.solve.question import Gang, Member, is_simple
from podgroup.solve.sequence import place_in_turn
from podgroup.solve.shortage import shortage
from podgroup.state.allocation import Holding
from podgroup.state.cluster import Cluster
from podgroup.state.ledger import Ledger
from podgroup.state.shape import requests_of, shape_of
from podgroup.state.volumes import BOUND, zones_of

HOST, RACK, ZONE = "kubernetes.io/hostname", "topology.kubernetes.io/rack", "topology.kubernetes.io/zone"
GPU = "nvidia.com/gpu"


def node(name, labels=None, taints=(), unschedulable=False, **offered):
    capacity: Quantities = {
        "pods": "110",
        "cpu": "64",
        "memory": "256Gi",
        **{GPU if k == "gpu" else k: str(v) for k, v in offered.items()},
    }
    return Node(
        metadata=ObjectMeta(name=name, labels={HOST: name, **(labels or {})}),
        spec=NodeSpec(taints=list(taints), unschedulable=unschedulable),
        status=NodeStatus(allocatable=capacity),
    )


def pod(name, labels=None, spec=None, ports=(), **requests):
    asked: Quantities = {GPU if k == "gpu" else k: str(v) for k, v in requests.items()}
    container = Container(resources=Resources(requests=asked), ports=[ContainerPort(host_port=p) for p in ports])
    return Pod(
        metadata=ObjectMeta(name=name, namespace="ns", uid=name, labels=labels or {}),
        spec=PodSpec(containers=[container], **(spec or {})),
    )


def member(one):
    return Member(one.metadata.uid, one.metadata.name, "ns", shape_of(one), one.metadata.labels)


def gang(*pods, quorum=None, **options):
    return Gang(tuple(member(p) for p in pods), len(pods) if quorum is None else quorum, **options)


def ledger(*nodes, held=()):
    made = Ledger()
    for one in nodes:
        made.set_node(one)
    for i, (where, one) in enumerate(held):
        made.hold(Holding(f"held-{i}", f"held-{i}", "ns", where, shape_of(one), one.metadata.labels))
    return made


replace = msgspec.structs.replace


def where(made, asked):
    placed = place(made, asked)
    return None if placed is None else sorted(node for _, node in placed)


def times(count, **requests):
    return [pod(f"m-{i}", **requests) for i in range(count)]


CASES = {
    "A1 two members of two GPUs do not fit on one node of two": (
        ledger(node("a", gpu=2)),
        gang(*times(2, gpu=2)),
        None,
    ),
    "A2 one member on each of two nodes of one GPU": (
        ledger(node("a", gpu=1), node("b", gpu=1)),
        gang(*times(2, gpu=1)),
        ["a", "b"],
    ),
    "K1 eight nodes with one free GPU each do not take a pod of eight": (
        ledger(*(node(f"n{i}", gpu=8) for i in range(8)), held=[(f"n{i}", pod("u", gpu=7)) for i in range(8)]),
        gang(pod("p", gpu=8)),
        None,
    ),
    "K6 room for one of two roles is room for neither": (
        ledger(*(node(f"n{i}", gpu=1) for i in range(7)), node("big", gpu=8)),
        gang(pod("a", gpu=8), pod("b", gpu=7)),
        None,
    ),
    "K7 two roles on two nodes": (
        ledger(node("small", gpu=1), node("big", gpu=8)),
        gang(pod("a", gpu=8), pod("b", gpu=1)),
        ["big", "small"],
    ),
    "a small pod takes the fragment, not the whole node": (
        ledger(node("whole", gpu=8), node("rest", gpu=8), held=[("rest", pod("u", gpu=7))]),
        gang(pod("p", gpu=1)),
        ["rest"],
    ),
    "pods without GPUs stay off nodes that have some free": (
        ledger(node("a-gpu", gpu=8), node("plain")),
        gang(pod("p", cpu=1)),
        ["plain"],
    ),
    "a gang goes to as few hosts as it can": (
        ledger(node("a", gpu=4), node("b", gpu=4), node("c", gpu=8)),
        gang(*times(2, gpu=4), preferred_topology=(HOST,)),
        ["c", "c"],
    ),
    "V11 required topology: both in one rack": (
        ledger(
            *(node(f"n{i}", {RACK: f"r{i // 2}"}, cpu=8) for i in range(4)),
            held=[("n0", pod("u", cpu=8)), ("n2", pod("u", cpu=6))],
        ),
        gang(*times(3, cpu=5), required_topology=RACK),
        None,
    ),
    "A10 a required rack is never split": (
        ledger(
            *(node(f"n{i}", {RACK: f"r{i // 2}"}, cpu=8) for i in range(4)),
            held=[("n1", pod("u", cpu=8)), ("n2", pod("u", cpu=8))],
        ),
        gang(*times(2, cpu=8), required_topology=RACK),
        None,
    ),
    "a member that is bound fixes the required rack": (
        ledger(*(node(f"n{i}", {RACK: f"r{i // 2}"}, cpu=8) for i in range(4))),
        gang(*times(1, cpu=8), required_topology=RACK, fixed=("n3",)),
        ["n2"],
    ),
    "the quorum first, the surplus as far as it goes": (
        ledger(node("a", cpu=3)),
        gang(*times(5, cpu=1), quorum=2),
        ["a"] * 3,
    ),
    "a quorum that does not fit is none at all": (ledger(node("a", cpu=3)), gang(*times(5, cpu=1), quorum=4), None),
    "a taint that is not tolerated repels": (
        ledger(node("a", taints=[Taint(key="k", effect="NoSchedule")])),
        gang(pod("p", cpu=1)),
        None,
    ),
    "a preference does not repel": (
        ledger(node("a", taints=[Taint(key="k", effect="PreferNoSchedule")])),
        gang(pod("p", cpu=1)),
        ["a"],
    ),
    "a tolerated taint does not": (
        ledger(node("a", taints=[Taint(key="k", effect="NoSchedule", value="v")])),
        gang(pod("p", spec={"tolerations": [Toleration(key="k", operator="Exists")]}, cpu=1)),
        ["a"],
    ),
    "a cordoned node takes nobody": (ledger(node("a", unschedulable=True)), gang(pod("p", cpu=1)), None),
    "a node selector": (
        ledger(node("a"), node("b", {"disk": "ssd"})),
        gang(pod("p", spec={"node_selector": {"disk": "ssd"}}, cpu=1)),
        ["b"],
    ),
    "one host port is one pod a node": (
        ledger(node("a"), node("b")),
        gang(*(pod(f"p{i}", ports=[80], cpu=1) for i in range(2))),
        ["a", "b"],
    ),
    "a third finds none": (
        ledger(node("a"), node("b")),
        gang(*(pod(f"p{i}", ports=[80], cpu=1) for i in range(3))),
        None,
    ),
    "a resource that no node has": (ledger(node("a")), gang(pod("p", gpu=1)), None),
    "minResources beyond the members must be free too": (
        ledger(node("a", cpu=4)),
        gang(pod("p", cpu=1), min_resources={"cpu": 3000}),
        ["a"],
    ),
    "and if they are not, nobody starts": (
        ledger(node("a", cpu=4)),
        gang(pod("p", cpu=1), min_resources={"cpu": 3001}),
        None,
    ),
}


@pytest.mark.parametrize(("made", "asked", "expected"), CASES.values(), ids=CASES.keys())
def test_where_a_gang_goes(made, asked, expected):
    assert where(made, asked) == expected


APP = LabelSelector(match_labels={"app": "x"})


def apart(key, **requests):
    terms = PodAffinity(required=[PodAffinityTerm(topology_key=key, label_selector=APP)])
    return {"labels": {"app": "x"}, "spec": {"affinity": Affinity(pod_anti_affinity=terms)}, **requests}


def together(key, **requests):
    terms = PodAffinity(required=[PodAffinityTerm(topology_key=key, label_selector=APP)])
    return {"labels": {"app": "x"}, "spec": {"affinity": Affinity(pod_affinity=terms)}, **requests}


def spread(key, skew=1, **requests):
    constraint = TopologySpreadConstraint(
        max_skew=skew, topology_key=key, when_unsatisfiable="DoNotSchedule", label_selector=APP
    )
    return {"labels": {"app": "x"}, "spec": {"topology_spread_constraints": [constraint]}, **requests}


ZONES = [node(f"n{i}", {ZONE: f"z{i // 2}"}, cpu=4) for i in range(4)]
BETWEEN = {
    "one a node": (ZONES, times(4, **apart(HOST, cpu=1)), ["n0", "n1", "n2", "n3"]),
    "no fifth": (ZONES, times(5, **apart(HOST, cpu=1)), None),
    "one a zone": (ZONES, times(2, **apart(ZONE, cpu=1)), ["n0", "n2"]),
    "no third": (ZONES, times(3, **apart(ZONE, cpu=1)), None),
    "all in the zone that the first one founds": (ZONES, times(8, **together(ZONE, cpu=1)), ["n0"] * 4 + ["n1"] * 4),
    "not more than that zone takes": (ZONES, times(9, **together(ZONE, cpu=1)), None),
    "spread evenly over zones": (ZONES, times(4, **spread(ZONE, cpu=1)), ["n0", "n0", "n2", "n2"]),
    "skew keeps the last one out": (ZONES[:3], times(10, **spread(ZONE, cpu=1)), None),
}


@pytest.mark.parametrize(("nodes", "pods", "expected"), BETWEEN.values(), ids=BETWEEN.keys())
def test_constraints_between_pods(nodes, pods, expected):
    assert where(ledger(*nodes), gang(*pods)) == expected


@pytest.mark.parametrize(
    ("tolerated", "goes"),
    [
        pytest.param([], None, id="it tolerates nothing"),
        pytest.param([Toleration(key="node.kubernetes.io/not-ready", operator="Exists")], ["n"], id="all effects"),
        pytest.param([Toleration(operator="Exists")], ["n"], id="everything"),
        pytest.param(
            [Toleration(key="node.kubernetes.io/not-ready", operator="Exists", effect="NoExecute")],
            None,
            id="to stay only",
        ),
    ],
)
def test_a_node_that_is_not_ready_is_for_those_who_tolerate_that(tolerated, goes):
    """Source: node-lifecycle-controller's taint; kube-scheduler looks at nothing else."""
    asleep = node("n", taints=[Taint(key="node.kubernetes.io/not-ready", effect="NoSchedule")])
    conditions = [Condition(type="Ready", status="False")]
    asleep = replace(asleep, status=replace(asleep.status, conditions=conditions))
    assert where(ledger(asleep), gang(pod("p", spec={"tolerations": tolerated}, cpu=1))) == goes


@pytest.mark.parametrize("common", ["colocate.io/power", "kubernetes.io/batch-cpu", "hugepages-2Mi"])
def test_what_every_node_has_keeps_no_node_and_hides_no_gpu(common):
    """A pod of CPU alone leaves the node with GPUs alone; one of a GPU goes where the fewest are left over."""

    def powered(name, **offered):
        made = node(name, **offered)
        return replace(made, status=replace(made.status, allocatable={**made.status.allocatable, common: "1000"}))

    def asking(name, **requests):
        made = pod(name, **requests)
        container = made.spec.containers[0]
        asked = replace(container.resources, requests={**container.resources.requests, common: "100"})
        return replace(made, spec=replace(made.spec, containers=[replace(container, resources=asked)]))

    made = ledger(powered("a-gpu", gpu=4, cpu=8), powered("b-gpu", gpu=1, cpu=64), powered("c-cpu", cpu=64))
    assert where(made, gang(pod("cpu", cpu=1))) == ["c-cpu"]
    assert where(made, gang(asking("watts", cpu=1))) == ["c-cpu"]
    assert where(made, gang(asking("gpu", cpu=1, gpu=1))) == ["b-gpu"]


def test_the_search_does_not_forget_that_two_roles_keep_apart():
    term = PodAffinityTerm(topology_key=HOST, label_selector=LabelSelector(match_labels={"role": "b"}))
    affinity = Affinity(pod_anti_affinity=PodAffinity(required=[term]))
    roles = pod("a", labels={"role": "a"}, spec={"affinity": affinity}, cpu=1), pod("b", labels={"role": "b"}, cpu=1)
    assert where(ledger(node("n", cpu=2)), gang(*roles)) is None
    assert where(ledger(node("m", cpu=2), node("n", cpu=2)), gang(*roles)) == ["m", "n"]


@pytest.mark.parametrize("amount", ["1e17", "-1", "10E"])
def test_an_amount_that_no_node_could_have_is_unsupported(amount):
    assert "cpu" in shape_of(pod("p", cpu=amount)).unsupported


def test_a_pod_that_is_there_keeps_others_out_of_its_zone():
    made = ledger(*ZONES, held=[("n0", pod("there", **apart(ZONE)))])
    assert where(made, gang(pod("p", labels={"app": "x"}, cpu=1))) == ["n2"]


def test_a_shortage_is_told_in_numbers():
    made = ledger(*(node(f"n{i}", gpu=8) for i in range(6)), held=[("n0", pod("u", gpu=5))])
    why = shortage(made, gang(*times(8, gpu=8)))
    assert why.text == "5 of 8 members fit; blocked by nvidia.com/gpu; largest free block 5x8"


REQUESTS = {
    "containers add up": ({"containers": [("1", ""), ("2", "")]}, 3000),
    "the largest init container counts if it is more": (
        {"containers": [("1", "")], "init_containers": [("3", ""), ("2", "")]},
        3000,
    ),
    "a sidecar runs beside the containers": ({"containers": [("1", "")], "init_containers": [("2", "Always")]}, 3000),
    "and beside the init containers after it": (
        {"containers": [("1", "")], "init_containers": [("2", "Always"), ("2", "")]},
        4000,
    ),
    "not beside those before it": ({"containers": [("1", "")], "init_containers": [("3", ""), ("2", "Always")]}, 3000),
}


@pytest.mark.parametrize(("lists", "cpu"), REQUESTS.values(), ids=REQUESTS.keys())
def test_what_a_pod_asks_for(lists, cpu):
    made: dict[str, Any] = {
        field: [
            Container(resources=Resources(requests={"cpu": amount}), restart_policy=policy) for amount, policy in items
        ]
        for field, items in lists.items()
    }
    one = Pod(metadata=ObjectMeta(name="p"), spec=PodSpec(**made))
    assert requests_of(one)["cpu"] == cpu


def test_overhead_limits_and_whole_pod_resources():
    whole = PodSpec(
        containers=[Container(resources=Resources(limits={"memory": "1Gi", "cpu": "100m"}))],
        resources=Resources(requests={"cpu": "2"}),
        overhead={"memory": "10Mi", "cpu": "250m"},
    )
    assert requests_of(Pod(metadata=ObjectMeta(name="p"), spec=whole)) == {
        "cpu": 2250,
        "memory": (1 << 30) + (10 << 20),
        "pods": 1,
    }


def test_a_pod_that_is_being_made_smaller_holds_what_its_kubelet_has_set_aside():
    """KEP-1287"""
    asks = PodSpec(containers=[Container(name="c", resources=Resources(requests={"cpu": "1", "memory": "2Gi"}))])
    status = PodStatus(
        container_statuses=[ContainerStatus(name="c", allocated_resources={"cpu": "3", "memory": "1Gi"})]
    )
    one = Pod(metadata=ObjectMeta(name="p"), spec=asks, status=status)
    assert requests_of(one) == {"cpu": 3000, "memory": 2 << 30, "pods": 1}


def test_what_all_containers_ask_for_is_an_amount_that_a_node_could_have():
    huge = [Container(resources=Resources(requests={"memory": "8Pi"})) for _ in range(1100)]
    one = Pod(metadata=ObjectMeta(name="p"), spec=PodSpec(node_name="a", containers=huge))
    assert "not an amount that a node could have" in shape_of(one).unsupported
    assert shape_of(one).requests == (("pods", 1),)


def test_an_unknown_constraint_is_no_guess():
    one = pod("p", spec={"tolerations": [Toleration(key="k", operator="Gt")]}, cpu=1)
    assert shape_of(one).unsupported == "toleration operator Gt"
    assert where(ledger(node("a")), gang(one)) is None


sizes = st.lists(st.integers(0, 4), min_size=1, max_size=4)


@given(free=sizes, asked=st.integers(1, 3), count=st.integers(1, 6), quorum=st.integers(0, 6))
def test_a_homogeneous_gang_is_placed_exactly_when_it_can_be(free, asked, count, quorum):
    made = ledger(*(node(f"n{i}", cpu=c) for i, c in enumerate(free)))
    quorum = min(quorum, count)
    placed = place(made, gang(*times(count, cpu=asked), quorum=quorum))
    room = sum(c // asked for c in free)
    assert (placed is not None) == (room >= quorum)
    if placed is not None:
        assert len(placed) == min(count, room)
        check_sound(made, placed)


def check_sound(made, placed):
    used: dict[tuple[str, str], int] = {}
    for one, name in placed:
        for resource, amount in one.shape.requests:
            used[name, resource] = used.get((name, resource), 0) + amount
    for (name, resource), amount in used.items():
        assert amount <= made.free[made.rows[name], made.columns[resource]]


@given(free=sizes, asks=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_roles_are_placed_when_a_search_of_all_assignments_finds_a_place(free, asks):
    made = ledger(*(node(f"n{i}", cpu=c) for i, c in enumerate(free)))
    placed = place(made, gang(*(pod(f"m{i}", cpu=a) for i, a in enumerate(asks))))
    possible = any(
        all(sum(a for a, n in zip(asks, nodes, strict=True) if n == i) <= c for i, c in enumerate(free))
        for nodes in product(range(len(free)), repeat=len(asks))
    )
    if placed is not None:
        check_sound(made, placed)
    assert (placed is not None) == possible


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 3), st.booleans()), max_size=30))
def test_a_ledger_kept_up_to_date_equals_one_made_anew(changes):
    kept, there = Ledger(), {}
    for i, (name, cpu, add) in enumerate(changes):
        if add:
            kept.set_node(node(name, cpu=8))
            there[f"u{i}"] = Holding(f"u{i}", "p", "ns", name, shape_of(pod("p", cpu=cpu)), {})
            kept.hold(there[f"u{i}"])
        elif there:
            kept.release(there.pop(min(there)).uid)
        if cpu == 3 and not add:
            kept.remove_node(name)
    anew = Ledger()
    for one in kept.nodes():
        anew.set_node(one)
    for holding in there.values():
        anew.hold(holding)
    assert kept.names == anew.names
    assert (kept.used == anew.used).all()
    assert (kept.allocatable == anew.allocatable).all()


def racks_of(made, asked):
    placed = place(made, asked)
    assert placed is not None
    return sorted({made.node(node).metadata.labels[RACK] for _, node in placed})


@pytest.mark.parametrize(
    ("size", "racks"),
    [
        pytest.param(8, 1, id="one rack holds eight"),
        pytest.param(12, 2, id="twelve need two of eight racks"),
        pytest.param(17, 3, id="seventeen need three"),
        pytest.param(64, 8, id="all of them"),
    ],
)
def test_a_gang_that_no_rack_holds_goes_into_the_fewest(size, racks):
    made = ledger(*(node(f"n{i:02}", {RACK: f"r{i % 8}"}, gpu=8) for i in range(64)))
    asked = gang(*times(size, gpu=8), preferred_topology=(ZONE, RACK, HOST))
    assert len(racks_of(made, asked)) == racks


def test_within_the_zone_that_holds_it_a_gang_goes_into_the_fewest_racks_and_the_last_is_the_tightest():
    sizes = {"z0": [2, 2, 2, 2, 2], "z1": [4, 3, 2, 1, 1]}
    nodes = [
        node(f"{zone}-{rack}-{i}", {ZONE: zone, RACK: f"{zone}-{rack}"}, gpu=8)
        for zone, racks in sizes.items()
        for rack, size in enumerate(racks)
        for i in range(size)
    ]
    asked = gang(*times(5, gpu=8), preferred_topology=(ZONE, RACK, HOST))
    made = ledger(*nodes)
    found = racks_of(made, asked)
    assert len({rack.partition("-")[0] for rack in found}) == 1
    assert len(found) == (3 if found[0].startswith("z0") else 2)


@given(rooms=st.lists(st.integers(0, 4), min_size=1, max_size=6), size=st.integers(2, 12))
def test_of_a_homogeneous_gang_no_fewer_racks_would_do(rooms, size):
    made = ledger(*(node(f"n{r}-{i}", {RACK: f"r{r}"}, gpu=1) for r, room in enumerate(rooms) for i in range(room)))
    placed = place(made, gang(*times(size, gpu=1), preferred_topology=(ZONE, RACK, HOST)))
    if sum(rooms) < size:
        assert placed is None
        return
    ordered, least, held = sorted(rooms, reverse=True), 0, 0
    while held < size:
        held, least = held + ordered[least], least + 1
    assert len(racks_of(made, gang(*times(size, gpu=1), preferred_topology=(ZONE, RACK, HOST)))) == least


def between(key, app):
    return PodAffinityTerm(topology_key=key, label_selector=LabelSelector(match_labels={"app": app}))


def spread_by(key, selector=LabelSelector(match_labels={"app": "x"})):  # noqa: B008
    return TopologySpreadConstraint(
        max_skew=1, topology_key=key, when_unsatisfiable="DoNotSchedule", label_selector=selector
    )


def beside(*apps):
    return {"affinity": Affinity(pod_affinity=PodAffinity(required=[between(ZONE, app) for app in apps]))}


CONSTRAINTS = {
    "affinity to two kinds is not met by a pod of each kind": (
        ledger(node("a", {ZONE: "z"}), held=[("a", pod("x", {"app": "x"})), ("a", pod("y", {"app": "y"}))]),
        gang(pod("p", spec=beside("x", "y"))),
        None,
    ),
    "affinity to one kind is": (
        ledger(node("a", {ZONE: "z"}), held=[("a", pod("x", {"app": "x"})), ("a", pod("y", {"app": "y"}))]),
        gang(pod("p", spec=beside("x"))),
        ["a"],
    ),
    "a node that lacks the key of one spread constraint counts for none": (
        ledger(
            node("a", {ZONE: "z1", RACK: "r"}),
            node("b", {ZONE: "z2"}),
            held=[("a", pod("q", {"app": "x"}))],
        ),
        gang(
            pod("p", {"app": "x"}, spec={"topology_spread_constraints": [spread_by(ZONE), spread_by(RACK)]}),
        ),
        ["a"],
    ),
    "an empty selector of a spread constraint counts nobody but the pod itself": (
        ledger(
            node("a", {ZONE: "z1"}),
            held=[("a", pod("q", {"app": "x"})), ("a", pod("r", {"app": "x"}))],
        ),
        gang(pod("p", spec={"topology_spread_constraints": [spread_by(ZONE, LabelSelector())]})),
        ["a"],
    ),
}


@pytest.mark.parametrize(("made", "asked", "expected"), CONSTRAINTS.values(), ids=CONSTRAINTS.keys())
def test_several_constraints_hold_together_as_upstream(made, asked, expected):
    assert where(made, asked) == expected


@pytest.mark.parametrize(
    ("in_force", "reason", "cpu"),
    [
        pytest.param("4", "", 4000, id="more is in force than is asked for"),
        pytest.param("1", "", 2000, id="more is asked for than is in force"),
        pytest.param("1", "Infeasible", 1000, id="what is refused for good is not accounted for"),
        pytest.param("1", "Deferred", 2000, id="what may still come is"),
    ],
)
@pytest.mark.parametrize("sidecar", [False, True])
def test_a_pod_is_accounted_for_what_is_in_force_while_it_is_resized(sidecar, in_force, reason, cpu):
    """KEP-1287: the most of what is asked for, set aside and in force."""
    asks = Container(name="c", resources=Resources(requests={"cpu": "2"}), restart_policy="Always" if sidecar else "")
    status = [ContainerStatus(name="c", resources=Resources(requests={"cpu": in_force}))]
    conditions = [Condition(type="PodResizePending", status="True", reason=reason)] if reason else []
    spec = PodSpec(init_containers=[asks]) if sidecar else PodSpec(containers=[asks])
    told = PodStatus(init_container_statuses=status) if sidecar else PodStatus(container_statuses=status)
    one = Pod(metadata=ObjectMeta(name="p"), spec=spec, status=msgspec.structs.replace(told, conditions=conditions))
    assert dict(shape_of(one).requests)["cpu"] == cpu


@pytest.mark.parametrize(
    ("labels", "nodes"),
    [
        pytest.param({ZONE: "z1"}, ["here", "unlabelled"], id="in its zone, or where there are none"),
        pytest.param({ZONE: "z1__z2"}, ["here", "there", "unlabelled"], id="in one of its zones"),
        pytest.param({"failure-domain.beta.kubernetes.io/zone": "z2"}, ["there", "unlabelled"], id="by its old name"),
        pytest.param({}, ["here", "there", "unlabelled"], id="anywhere"),
    ],
)
def test_a_volume_is_used_where_its_labels_say_that_it_is(labels, nodes):
    made = ledger(node("here", {ZONE: "z1"}), node("there", {ZONE: "z2"}), node("unlabelled"))
    volume = PersistentVolume(metadata=ObjectMeta(name="v", labels=labels))
    found = np.ones(3, dtype=bool)
    for selector in zones_of(volume):
        found &= made.selected(selector)
    assert [n for n, good in zip(made.names, found, strict=True) if good] == nodes


def test_a_claim_for_one_pod_alone_is_refused_to_a_second_one_by_name():
    made = Cluster()
    made.set_node(node("n"))
    claim = Claim(
        metadata=ObjectMeta(name="data", annotations={BOUND: "yes"}),
        spec=ClaimSpec(volume_name="v", access_modes=["ReadWriteOncePod"]),
    )
    made.storage.set_claim("ns/data", claim)
    made.storage.set_volume("v", PersistentVolume(metadata=ObjectMeta(name="v")))
    volumes = [Volume(persistent_volume_claim=ClaimSource(claim_name="data"))]
    first, second = (pod(name, spec={"volumes": volumes}) for name in ("first", "second"))
    made.set_pod(first)
    made.set_pod(second)
    assert made.shape(second).unsupported == ""
    made.promise("first", "n")
    assert "ReadWriteOncePod), and first uses it" in made.shape(second).unsupported
    assert made.shape(first).unsupported == ""
    made.remove_pod("first")
    assert made.shape(second).unsupported == ""


def test_terms_select_namespaces_by_the_labels_that_these_have_today():
    made = Cluster()
    made.set_node(node("n", {ZONE: "z"}))
    term = PodAffinityTerm(
        topology_key=ZONE,
        label_selector=LabelSelector(match_labels={"app": "x"}),
        namespace_selector=LabelSelector(match_labels={"team": "a"}),
    )
    apart = pod("apart", spec={"affinity": Affinity(pod_anti_affinity=PodAffinity(required=[term]))})
    made.set_pod(apart)
    made.promise("apart", "n")
    other = pod("other", {"app": "x"})

    def repelled():
        return bool(made.ledger.repelling_terms("ns", other.metadata.labels))

    assert not repelled()
    assert made.set_namespace("ns", {"team": "a"})
    assert repelled()
    assert not made.set_namespace("ns", {"team": "a"})
    made.set_namespace("ns", {"team": "b"})
    assert not repelled()
    made.set_namespace("ns", None)
    assert not repelled()


RACKS = st.sampled_from(["", "r1", "r2", "r3"])
ROOM = st.tuples(st.integers(0, 6), st.integers(0, 4), RACKS, st.sampled_from(["z1", "z2"]))
SIMPLE = st.tuples(
    st.integers(1, 6), st.integers(0, 3), st.integers(0, 2), st.sampled_from(["", RACK, ZONE]), st.booleans()
)


@settings(deadline=None)
@given(rooms=st.lists(ROOM, min_size=1, max_size=8), asked=st.lists(SIMPLE, min_size=1, max_size=8))
def test_gangs_in_turn_go_where_the_solver_puts_them_one_after_the_other(rooms, asked):
    """The compiled solver of simple gangs beside `place`: nodes (CPU, GPU, rack, zone), gangs (size, CPU, GPU, ...)."""
    nodes = [
        node(f"n{i}", {ZONE: zone, **({RACK: rack} if rack else {})}, cpu=cpu, **({"gpu": gpu} if gpu else {}))
        for i, (cpu, gpu, rack, zone) in enumerate(rooms)
    ]
    made = ledger(*nodes)
    gangs = []
    for i, (size, cpu, gpu, required, preferred) in enumerate(asked):
        requests = {k: v for k, v in (("cpu", cpu), ("gpu", gpu)) if v}
        one = shape_of(pod(f"g{i}", **requests))
        members = tuple(Member(f"g{i}-{j}", f"g{i}-{j}", "ns", one, {}) for j in range(size))
        keys = (ZONE, RACK, HOST) if preferred else ()
        gangs.append(Gang(members, size, required_topology=required, preferred_topology=keys))
    assert all(is_simple(g) for g in gangs)
    together = place_in_turn(made, gangs)
    for one_gang, found in zip(gangs, together, strict=True):
        expected = place(made, one_gang)
        assert sorted(found or ()) == sorted(expected or ())
        assert (found is None) == (expected is None)
        for placed in expected or ():
            made.hold(placed.holding)
