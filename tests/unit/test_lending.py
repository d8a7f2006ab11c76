"""Cards that services lend: which, to whom, and what a pod is refused without one."""

from __future__ import annotations

import msgspec
import pytest

from colocate.agent.lending import Lending
from colocate.cluster.api import BATCH_CPU, BATCH_MEMORY, GPU_BORROW, POWER, POWER_PUBLISHED, NodeColocationStatus
from colocate.cluster.publication import wanted, watts_are_ours
from colocate.decide.lending import lendable
from colocate.objects import Node, NodeStatus, ObjectMeta
from colocate.policy.schema import GpuPolicy, PolicySpec
from colocate.snapshot import Card, CardUser
from tests import make

GIB = 1 << 30
SPEC = PolicySpec(gpu=GpuPolicy(borrow=True))


def card(uuid="GPU-0", index=0, used=10 * GIB, total=24 * GIB, users=("web",), **more):
    there = {user if ":" in user else f"service:{user}": CardUser(memory_bytes=used) for user in users}
    return Card(uuid=uuid, index=index, memory_bytes=total, users=there, **more)


def node(*cards, lends=True):
    web = make.service("web", lends_gpu=lends)
    api, train = make.service("api"), make.job("train")
    return make.snapshot(web, api, train, cards={c.uuid: c for c in cards})


@pytest.mark.parametrize(
    ("cards", "lends", "expected"),
    [
        pytest.param([card()], True, ("GPU-0",), id="its service lends it, and there is room"),
        pytest.param([card()], False, (), id="its service does not"),
        pytest.param([card(users=())], True, (), id="nobody's card is nobody's to lend: it is the device plugin's"),
        pytest.param([card(users=("web", "api"))], True, (), id="another service is on it that does not lend"),
        pytest.param([card(users=("web", "job:train"))], True, ("GPU-0",), id="batch on it changes nothing of that"),
        pytest.param([card(used=23 * GIB)], True, (), id="there is no memory for anybody else"),
        pytest.param([card(used=None)], True, (), id="what it uses is not told"),
        pytest.param([card(strangers=1)], True, (), id="processes of nobody's are on it"),
        pytest.param([card(mig=True)], True, (), id="it is divided"),
        pytest.param([card("GPU-1", 1), card()], True, ("GPU-0", "GPU-1"), id="two, in their order"),
    ],
)
def test_which_cards_are_lent(cards, lends, expected):
    assert lendable(node(*cards, lends=lends), SPEC) == expected


def test_each_pod_gets_a_card_of_its_own_and_all_of_its_containers_the_same():
    pods = {"a", "b"}
    lending = Lending(lambda: (node(card(), card("GPU-1", 1)), SPEC), lambda: pods)
    assert [lending.lend(uid) for uid in ("a", "b", "a", "c")] == [
        "nvidia.com/gpu=GPU-0",
        "nvidia.com/gpu=GPU-1",
        "nvidia.com/gpu=GPU-0",
        "",
    ]
    pods.remove("a")
    assert lending.lend("c") == "nvidia.com/gpu=GPU-0", "of a pod that has gone"


def test_who_borrowed_of_an_agent_before_is_seen_on_the_card():
    snapshot = node(card(users=("web", "job:train")), card("GPU-1", 1))
    assert Lending(lambda: (snapshot, SPEC), lambda: {"a"}).lend("a") == "nvidia.com/gpu=GPU-1"
    off = msgspec.structs.replace(SPEC, gpu=GpuPolicy())
    assert Lending(lambda: (snapshot, off), lambda: {"a"}).lend("a") == ""


@pytest.mark.parametrize(
    ("offered", "annotations", "promised", "expected"),
    [
        pytest.param(None, {}, "500", True, id="nobody has offered any"),
        pytest.param("0", {}, "500", True, id="what kubelet leaves when it registers anew"),
        pytest.param("3000", {}, "500", False, id="set by hand"),
        pytest.param("3000", {}, None, False, id="set by hand, and our agent offers none"),
        pytest.param("500", {POWER_PUBLISHED: "true"}, None, True, id="ours, to be taken away"),
        pytest.param("500", {POWER_PUBLISHED: "true"}, "600", True, id="ours, to be changed"),
        pytest.param(None, {}, None, False, id="none, and none is offered"),
    ],
)
def test_whose_watts_of_a_node_are(offered, annotations, promised, expected):
    there = {POWER: offered} if offered is not None else {}
    node = Node(metadata=ObjectMeta(name="n", annotations=annotations), status=NodeStatus(allocatable=there))
    assert watts_are_ours(node, {POWER: promised}) is expected


@pytest.mark.parametrize(("resource", "most"), [(GPU_BORROW, "64"), (POWER, "100000")])
@pytest.mark.parametrize(
    ("promised", "silent", "expected"),
    [
        pytest.param("2", 0.0, "2", id="as its agent says"),
        pytest.param("1000000", 0.0, "most", id="no node has so much"),
        pytest.param("2", 1000.0, "0", id="nobody tells any more"),
        pytest.param(None, 0.0, None, id="not offered: it is not there"),
        pytest.param(None, 1000.0, None, id="nor where nobody tells"),
    ],
)
def test_what_a_nodes_status_says_of_it(promised, silent, expected, resource, most):
    told = {resource: promised} if promised is not None else {}
    status = NodeColocationStatus(promised={BATCH_CPU: "0", BATCH_MEMORY: "0", **told}, reason="Promised")
    found = wanted(status, {"cpu": "8", "memory": "8Gi"}, silent)[resource]
    assert found == (most if expected == "most" else expected)
