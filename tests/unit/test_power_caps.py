"""Power caps: what each card may draw, who is refused, and what a pod is given."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from colocate import units
from colocate.actuate.driver import DriverFailed
from colocate.agent.placement import Placement
from colocate.agent.publisher import pod_of
from colocate.agent.watts import Watts, named
from colocate.agent.watts import given as given_to
from colocate.cgroup.tree import Tree, has_ended, start_time
from colocate.cluster.api import MAX_SLOWDOWN
from colocate.decide.allowance import PowerState, allowance
from colocate.decide.caps import power_caps
from colocate.decide.node_budget import Known
from colocate.decide.node_budget import budgeted as with_budget
from colocate.errors import BadInput, ConfigError
from colocate.nri import Container, Limits, Pod, Refused
from colocate.objects import Container as ContainerObject
from colocate.objects import ObjectMeta, PodSpec, PodStatus, Resources
from colocate.objects import Pod as PodObject
from colocate.observe.pods import Pod as NodePod
from colocate.observe.pods import PodLister
from colocate.policy.schema import ColocationPolicy, PolicySpec, PowerModel, PowerPoint, PowerPolicy, check
from colocate.snapshot import Card, CardUser, NodeSnapshot, Workload
from tests.unit.test_placement import PLAIN, UID, with_cgroup


def card(uuid: str = "GPU-0", *users: str, index: int = 0, **more: Any) -> Card:
    known: dict[str, Any] = {"least_watts": 100.0, "most_watts": 300.0, "set_watts": 300.0, **more}
    return Card(uuid=uuid, index=index, users={user: CardUser() for user in users}, **known)


def node(*cards: Card, **watts: float | None) -> NodeSnapshot:
    """Workloads by name with what they ask for; the first letter says which kind: s(ervice) or j(ob)."""
    workloads = {
        name: Workload(
            id=name, name=name, tier="service" if name[0] == "s" else "batch", path=f"/{name}", power_watts=asked
        )
        for name, asked in watts.items()
    }
    return NodeSnapshot(
        sequence=1, time_seconds=1.0, monotonic_seconds=1.0, cgroup_version=2, cpus=(0,), cores=((0,),), memory_bytes=1,
        workloads=workloads, cards={c.uuid: c for c in cards},
    )  # fmt: skip


def caps(snapshot: NodeSnapshot) -> dict[str, float | None]:
    return strictest_of(power_caps(snapshot).caps)


def strictest_of(found: Any) -> dict[str, float | None]:
    strictest: dict[str, float | None] = {}
    for cap in found:
        known = strictest.setdefault(cap.target.uuid, cap.watts)
        strictest[cap.target.uuid] = None if known is None or cap.watts is None else min(known, cap.watts)
    return strictest


@pytest.mark.parametrize(
    ("snapshot", "expected", "reasons"),
    [
        pytest.param(node(card("GPU-0", "j1"), j1=None), {}, [], id="nobody asks: no card is touched"),
        pytest.param(node(card("GPU-0", "j1"), j1=180.0), {"GPU-0": 180.0}, ["Capped"], id="one job on one card"),
        pytest.param(node(card("GPU-0", "s1"), s1=180.0), {"GPU-0": 180.0}, ["Capped"], id="a service that asks too"),
        pytest.param(
            node(card("GPU-0", "j1"), card("GPU-1", "j1"), j1=401.0),
            {"GPU-0": 200.0, "GPU-1": 200.0}, ["Capped"] * 2, id="on two cards: half each, in whole watts",
        ),
        pytest.param(
            node(card("GPU-0", allotted=("j1",)), j1=180.0), {"GPU-0": 180.0}, ["Capped"], id="given, and not on it yet"
        ),
        pytest.param(
            node(card("GPU-0", "j1", "j2"), j1=250.0, j2=150.0), {"GPU-0": 150.0}, ["Capped"], id="of two the strictest"
        ),
        pytest.param(
            node(card("GPU-0", "j1", "s1"), j1=180.0, s1=None), {"GPU-0": None}, ["Shared"], id="a service asks nothing"
        ),
        pytest.param(
            node(card("GPU-0", "j1", "j2"), j1=180.0, j2=None), {"GPU-0": None}, ["Shared"], id="nor does other batch"
        ),
        pytest.param(
            node(card("GPU-0", "j1", strangers=1), j1=180.0), {"GPU-0": None}, ["Shared"], id="a process of nobody's"
        ),
        pytest.param(node(card("GPU-0", "j1"), j1=60.0), {"GPU-0": 100.0}, ["BelowLeast"], id="less than can be set"),
        pytest.param(node(card("GPU-0", "j1"), j1=900.0), {"GPU-0": 300.0}, ["Capped"], id="more than can be set"),
        pytest.param(node(card("GPU-0", "j1", mig=True), j1=180.0), {}, ["Unsupported"], id="divided by MIG"),
        pytest.param(node(card("GPU-0", "j1", virtual=True), j1=180.0), {}, ["Unsupported"], id="a vGPU"),
        pytest.param(
            node(card("GPU-0", "j1", least_watts=None), j1=180.0), {}, ["Unsupported"], id="no limits on this card"
        ),
    ],
)  # fmt: skip
def test_s2_3_what_each_card_may_draw(snapshot: NodeSnapshot, expected: dict[str, float], reasons: list[str]) -> None:
    assert caps(snapshot) == expected
    assert [v.reason for v in power_caps(snapshot).verdicts] == reasons


ASKS = st.one_of(st.none(), st.floats(1.0, 2000.0))


@given(st.dictionaries(st.sampled_from(["j1", "j2", "j3", "s1"]), ASKS), st.data())
def test_s2_3_nobody_is_slowed_who_did_not_ask_and_nobody_draws_more_than_he_asked_for(
    asks: dict[str, float | None], data: st.DataObject
) -> None:
    on = {uuid: data.draw(st.sets(st.sampled_from(sorted(asks)))) if asks else set() for uuid in ("GPU-0", "GPU-1")}
    snapshot = node(*(card(uuid, *sorted(users)) for uuid, users in on.items()), **asks)
    for uuid, watts in caps(snapshot).items():
        if watts is None:
            continue
        assert all(asks[user] for user in on[uuid])
        assert 100.0 <= watts <= 300.0
        for user in on[uuid]:
            share = (asks[user] or 0.0) / sum(user in users for users in on.values())
            assert watts <= max(share, 100.0)


HARDLY = PowerModel(name="ncf", points=(PowerPoint(watts=100, slowdown=0.02), PowerPoint(watts=300, slowdown=0.0)))
MUCH = PowerModel(
    name="bert",
    points=tuple(PowerPoint(watts=w, slowdown=s) for w, s in ((120, 1.134), (180, 0.317), (240, 0.067), (300, 0.0))),
)


def budgeted(
    snapshot: NodeSnapshot,
    budget: int,
    *models: PowerModel,
    enough: Mapping[str, float] = MappingProxyType({}),
    **classes: str,
) -> tuple[dict[str, Any], Any]:
    """The caps by card, and the verdict about the node."""
    replace = msgspec.structs.replace
    named = {i: replace(w, power_class=classes.get(i, "")) for i, w in snapshot.workloads.items()}
    snapshot = replace(snapshot, workloads=named)
    policy = PowerPolicy(budget=budget, models=models)
    found = with_budget(
        power_caps(snapshot), snapshot, policy, allowance(PowerState(), snapshot, policy), enough, Known()
    ).capped
    about: Any = next((v for v in found.verdicts if v.subject == "node"), None)
    return strictest_of(found.caps), about


TWO = (card("GPU-0", "j1"), card("GPU-1", "j2"))


@pytest.mark.parametrize(
    ("snapshot", "budget", "expected", "reason"),
    [
        pytest.param(node(*TWO, j1=300.0, j2=300.0), 0, {"GPU-0": 300, "GPU-1": 300}, "", id="no budget"),
        pytest.param(
            node(*TWO, j1=300.0, j2=200.0), 600, {"GPU-0": 300, "GPU-1": 200}, "WithinBudget", id="enough for both"
        ),
        pytest.param(
            node(*TWO, j1=300.0, j2=300.0), 400, {"GPU-0": 200, "GPU-1": 200}, "Lowered", id="both give the same"
        ),
        pytest.param(
            node(*TWO, j1=300.0, j2=150.0), 300, {"GPU-0": 200, "GPU-1": 100}, "Lowered", id="both lose as much"
        ),
        pytest.param(
            node(*TWO, j1=300.0, j2=300.0), 150, {"GPU-0": 100, "GPU-1": 100}, "BudgetTooSmall", id="too little"
        ),
        pytest.param(
            node(card("GPU-0", "j1"), card("GPU-1", "s1", limit_watts=300.0), j1=300.0, s1=None), 500,
            {"GPU-0": 200}, "Lowered", id="a service that asks for nothing keeps its limit",
        ),
        pytest.param(
            node(card("GPU-0", "j1"), card("GPU-1", limit_watts=300.0, watts=45.0), j1=300.0), 300,
            {"GPU-0": 255}, "Lowered", id="a card that nobody is on counts with what it draws",
        ),
        pytest.param(
            node(card("GPU-0", "j1"), card("GPU-1", "j1"), card("GPU-2", "j2"), j1=600.0, j2=300.0), 600,
            {"GPU-0": 200, "GPU-1": 200, "GPU-2": 200}, "Lowered", id="the cards of a job have one cap",
        ),
        pytest.param(node(card("GPU-0", "s1", limit_watts=300.0), s1=None), 200, {}, "BudgetTooSmall", id="none asks"),
    ],
)  # fmt: skip
def test_s2_8_a_node_stays_within_its_budget(
    snapshot: NodeSnapshot, budget: int, expected: dict[str, float], reason: str
) -> None:
    found, about = budgeted(snapshot, budget)
    assert found == pytest.approx(expected, abs=1.0)
    assert (about.reason if about is not None else "") == reason


def test_s2_5_who_hardly_feels_a_cap_gives_watts_to_who_does() -> None:
    snapshot = node(*TWO, j1=300.0, j2=300.0)
    alike, told = budgeted(snapshot, 400, MUCH, HARDLY, j1="bert", j2="bert")
    assert alike == pytest.approx({"GPU-0": 200, "GPU-1": 200}, abs=1.0)
    uniform = told.numbers["worst_slowdown"]
    found, told = budgeted(snapshot, 400, MUCH, HARDLY, j1="bert", j2="ncf")
    assert found["GPU-0"] > 280
    assert found["GPU-1"] < 120
    assert told.numbers["worst_slowdown"] < uniform / 5


@given(st.dictionaries(st.sampled_from(["j1", "j2", "j3"]), ASKS, min_size=1), st.integers(1, 1500), st.data())
def test_s2_8_the_sum_stays_within_a_budget_and_nobody_gets_more_than_he_asked_for(
    asks: dict[str, float | None], budget: int, data: st.DataObject
) -> None:
    on = {uuid: data.draw(st.sets(st.sampled_from(sorted(asks)))) for uuid in ("GPU-0", "GPU-1", "GPU-2")}
    cards = [card(uuid, *sorted(users), limit_watts=300.0, watts=45.0) for uuid, users in on.items()]
    snapshot = node(*cards, **asks)
    before, (after, about) = caps(snapshot), budgeted(snapshot, budget, MUCH, HARDLY, j1="bert", j2="ncf")
    assert after.keys() == before.keys()
    for uuid, watts in after.items():
        assert (watts is None) == (before[uuid] is None)
        assert watts is None or 100.0 <= watts <= (before[uuid] or 0.0)
    capped = {uuid for uuid, watts in after.items() if watts is not None}
    total = sum(after[uuid] for uuid in capped) + sum(300.0 if on[u] else 45.0 for u in on if u not in capped)
    assert total <= budget or about.reason == "BudgetTooSmall"


def test_s2_8_nothing_starts_that_the_budget_has_not_left() -> None:
    start = Start(200, budget=300)
    start.cards.caps.held["GPU-1"] = 150.0
    with pytest.raises(Refused, match="the power budget of this node is 300 W now, and 50 W of that are not left"):
        start.make("GPU-0")
    start.cards.caps.held["GPU-1"] = 100.0
    assert start.make("GPU-0") == [("GPU-0", 200.0, POD)]


def test_s2_8_a_container_that_starts_again_does_not_get_back_what_a_budget_has_taken() -> None:
    start = Start(200, budget=300)
    start.cards.caps.held["GPU-0"] = 150.0
    assert start.make("GPU-0") == [("GPU-0", 150.0, POD)]


def test_s2_8_who_starts_at_the_same_time_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is being capped, which takes a while, when the second is asked about."""
    start = Start(200, budget=300)
    caps, set_now = start.cards.caps, start.cards.caps.set_now
    asked: list[str] = []

    def slowly(uuid: str, watts: float, path: str, deadline: float) -> None:
        if not asked:
            asked.append(uuid)
            watch: Any = start.placement._watts
            with pytest.raises(BadInput, match="100 W of that are not left"):
                watch.before_job("other", "/other", 200.0, "GPU-1")
        set_now(uuid, watts, path, deadline)

    monkeypatch.setattr(caps, "set_now", slowly)
    assert start.make("GPU-0") == [("GPU-0", 200.0, POD)]
    assert asked == ["GPU-0"]


@pytest.mark.parametrize(
    ("power", "says"),
    [
        pytest.param({"budget": -1}, r"\$.spec.power.budget: -1 W is impossible", id="negative"),
        pytest.param({"offer": 10**6}, r"\$.spec.power.offer: 1e\+06 W is impossible", id="absurd"),
        pytest.param(
            {"models": [{"name": "a", "points": [{"watts": 100, "slowdown": 0.1}]}]},
            r"models\[0\].points: are fewer than two", id="one point",
        ),
        pytest.param(
            {"models": [{"name": "a", "points": [{"watts": 300, "slowdown": 0.0}, {"watts": 100, "slowdown": 0.1}]}]},
            r"models\[0\].points\[1\]: has less watts", id="not sorted",
        ),
        pytest.param(
            {"models": [{"name": "a", "points": [{"watts": 100, "slowdown": 0.0}, {"watts": 300, "slowdown": 0.1}]}]},
            r"models\[0\].points\[1\]: has less watts, or more slowdown", id="slower with more watts",
        ),
        pytest.param({"models": [{"name": "", "points": []}]}, r"models\[0\].name: '' is empty", id="no name"),
    ],
)  # fmt: skip
def test_a_policy_of_power_that_cannot_be_is_refused(power: dict[str, Any], says: str) -> None:
    spec = msgspec.convert({"power": power}, PolicySpec)
    with pytest.raises(ConfigError, match=says):
        check(ColocationPolicy(spec=spec))


@pytest.mark.parametrize(
    ("env", "devices", "expected"),
    [
        pytest.param({"NVIDIA_VISIBLE_DEVICES": "GPU-0,GPU-1"}, (), ("GPU-0", "GPU-1"), id="by a device plugin"),
        pytest.param({"NVIDIA_VISIBLE_DEVICES": "0, 1"}, (), ("0", "1"), id="by index"),
        pytest.param({"NVIDIA_VISIBLE_DEVICES": "all"}, (), (), id="an image's own wish for all is no card of its own"),
        pytest.param({"NVIDIA_VISIBLE_DEVICES": "void"}, ("nvidia.com/gpu=GPU-0",), ("GPU-0",), id="by CDI"),
        pytest.param({}, ("example.com/nic=0",), (), id="another device"),
        pytest.param({}, ("k8s.gpu.nvidia.com/claim=7",), ("7",), id="a claim of DRA is no card's name"),
        pytest.param({"NVIDIA_VISIBLE_DEVICES": "NoDevFiles"}, (), (), id="no device at all"),
        pytest.param({}, (), (), id="none"),
    ],
)
def test_what_a_container_is_given(env: dict[str, str], devices: tuple[str, ...], expected: tuple[str, ...]) -> None:
    assert given_to(container(env, devices)) == expected
    assert named(["GPU-0,GPU-0", "", "-1"]) == ("GPU-0",)


def container(env: dict[str, str], devices: tuple[str, ...] = ()) -> Container:
    path = f"/kubepods/pod{UID}/c1"
    return Container("c1", "sandbox", "main", False, {}, {}, path, 0, Limits(), env, devices)


class FakeCaps:
    """A driver that takes every limit, or says why not."""

    def __init__(self, why: str) -> None:
        self.why = why
        self.set: list[Any] = []
        self.held: dict[str, float] = {}

    def limits(self) -> dict[str, float]:
        return self.held

    def ended(self, path: str) -> None:
        """Nobody comes there any more."""

    def take_back(self, _deadline: float) -> None:
        """Nothing is lent."""

    def set_now(self, uuid: str, watts: float, path: str, _deadline: float) -> None:
        if self.why == "crash":
            raise RuntimeError(self.why)
        if self.why:
            raise DriverFailed(self.why)
        self.set.append((uuid, watts, path))


class FakeCards(NamedTuple):
    """What is known of the cards of a node."""

    caps: FakeCaps
    allotted: dict[str, tuple[str, ...]]


def start_now(
    placement: Placement,
    annotations: dict[str, str],
    visible: str,
    devices: tuple[str, ...] = (),
    files: tuple[str, ...] = (),
) -> list[Any]:
    """As the runtime does."""
    pod = Pod("sandbox", "train", UID, "ml", {}, annotations, "")
    made: Any = placement.create_container(
        pod, container({"NVIDIA_VISIBLE_DEVICES": visible}, devices)._replace(files=files)
    )

    async def answered() -> None:
        await made

    if made is not None:
        asyncio.run(answered())
    return []


class Start:
    """A pod's container, about to be made on a node of two cards."""

    def __init__(self, watts: int | None = None, gpus: int = 0, **more: Any) -> None:
        self.cards = FakeCards(FakeCaps(more.pop("why", "")), {})
        self.lister, self.annotations = PodLister(), more.pop("annotations", {})
        self.lister.expected = more.pop("expected", False)
        if more.pop("known", True):
            self.lister.pods[UID] = NodePod(UID, "train", "ml", {}, power_watts=watts, cards=gpus)
        cards = more.pop("cards", (card("GPU-0"), card("GPU-1", index=1)))
        snapshot = node(*cards, **more.pop("there", {})) if more.pop("read", True) else None
        port = with_cgroup(2, more.pop("path", f"/kubepods/pod{UID}"))
        held: Any = self.cards if more.pop("driver", True) else None
        offers = more.pop("offers", False)
        power = PowerPolicy(offer=500 if offers else 0, budget=more.pop("budget", 0))
        watch = Watts(port, lambda: PLAIN, self.lister, lambda: (held, snapshot), lambda: power, lambda: power.budget)
        shadow = more.pop("shadow", False)
        self.placement = Placement(port, lambda: PLAIN, self.lister, lambda: None, shadow=shadow, watts=watch)
        assert not more, more

    def make(self, visible: str = "GPU-0", devices: tuple[str, ...] = (), files: tuple[str, ...] = ()) -> list[Any]:
        return start_now(self.placement, self.annotations, visible, devices, files) or self.cards.caps.set


POD = f"/kubepods/pod{UID}"
AMD = tuple(card(f"AMD-{i}", index=1000 + i, file=f"/dev/dri/renderD{128 + i}") for i in range(2))


@pytest.mark.parametrize(
    ("watts", "gpus", "files", "expected"),
    [
        pytest.param(
            180, 1, ("/dev/kfd", "/dev/dri/renderD129"), [("AMD-1", 180.0, POD)], id="as AMD's device plugin gives them"
        ),
        pytest.param(
            400, 2, ("/dev/kfd", "/dev/dri/renderD128", "/dev/dri/renderD129"),
            [("AMD-0", 200.0, POD), ("AMD-1", 200.0, POD)],
            id="two",
        ),
        pytest.param(
            180, 1, ("/dev/kfd", "/dev/kmsg", "/dev/dri/renderD128", "/dev/dri/renderD129"), [],
            id="a privileged one has all: that says nothing",
        ),
        pytest.param(180, 1, ("/dev/dri/renderD128",), [], id="a file for drawing alone"),
        pytest.param(180, 1, ("/dev/kfd", "/dev/dri/renderD140"), [], id="of no card that is known"),
        pytest.param(None, 1, ("/dev/kfd", "/dev/dri/renderD128"), [], id="who asks for no watts"),
    ],
)  # fmt: skip
def test_s2_3_a_container_is_given_amds_cards_by_their_device_files(
    watts: int | None, gpus: int, files: tuple[str, ...], expected: list[Any]
) -> None:
    start = Start(watts, gpus, cards=AMD)
    assert start.make("", files=files) == expected
    if watts:
        assert list(start.cards.allotted.get(f"pod:{UID}", ())) == [uuid for uuid, _, _ in expected]


def test_s2_3_a_privileged_container_waits_for_nothing_of_ours() -> None:
    files = ("/dev/mem", "/dev/kfd", "/dev/dri/renderD128")
    assert Start(known=False, expected=True, offers=True, cards=AMD).make("", files=files) == []
    with pytest.raises(Refused, match="may ask for watts"):
        Start(known=False, expected=True, offers=True, cards=AMD).make("", files=files[1:])


@pytest.mark.parametrize(
    ("start", "visible", "expected"),
    [
        pytest.param(Start(None), "GPU-0", [], id="a pod that asks for nothing is not touched"),
        pytest.param(
            Start(180, annotations={MAX_SLOWDOWN: "5%"}), "GPU-0", [("GPU-0", 180.0, POD)],
            id="what it may lose has become watts",
        ),
        pytest.param(Start(None, annotations={MAX_SLOWDOWN: "5%"}), "", [], id="it says so, and has no card"),
        pytest.param(Start(180), "GPU-0", [("GPU-0", 180.0, POD)], id="its card by UUID"),
        pytest.param(Start(180), "1", [("GPU-1", 180.0, POD)], id="its card by index"),
        pytest.param(Start(400), "GPU-0,GPU-1", [("GPU-0", 200.0, POD), ("GPU-1", 200.0, POD)], id="two cards"),
        pytest.param(Start(400, 2), "GPU-0", [("GPU-0", 200.0, POD)], id="another container has the other card"),
        pytest.param(Start(180), "all", [], id="no card of its own"),
        pytest.param(Start(180, shadow=True), "GPU-0", [], id="in shadow nothing is written"),
        pytest.param(
            Start(known=False, annotations={"colocate.io/power": "180"}), "GPU-0", [("GPU-0", 180.0, POD)],
            id="where the API server has not told of it yet its annotation says it",
        ),
        pytest.param(
            Start(250, cards=(card("GPU-0", "j1"),), there={"j1": 150.0}), "GPU-0", [("GPU-0", 250.0, POD)],
            id="somebody is on it who asks for less: his counts, as long as he is there",
        ),
    ],
)  # fmt: skip
def test_s2_3_before_a_container_is_made_its_cards_are_capped(start: Start, visible: str, expected: list[Any]) -> None:
    assert start.make(visible) == expected


@pytest.mark.parametrize(
    ("start", "visible", "says"),
    [
        pytest.param(Start(180), "GPU-9", "is given GPU-9: it is not read", id="a card that is not known"),
        pytest.param(Start(180), "MIG-1", "a part of a card has no limit of its own", id="a slice of MIG"),
        pytest.param(Start(180, read=False), "GPU-0", "are not read", id="no card has been read yet"),
        pytest.param(Start(180, driver=False), "GPU-0", "are not read", id="no driver"),
        pytest.param(
            Start(None, annotations={MAX_SLOWDOWN: "5%"}), "GPU-0", "asks for no watts", id="an outcome alone"
        ),
        pytest.param(Start(60), "GPU-0", "takes 100 W to 300 W", id="less than can be set"),
        pytest.param(Start(180, why="NO_PERMISSION"), "GPU-0", "180 W: NO_PERMISSION", id="the driver refuses"),
        pytest.param(Start(180, path="/kubepods"), "GPU-0", "its cgroup is not found", id="no cgroup"),
        pytest.param(
            Start(180, cards=(card("GPU-0", "s1"),), there={"s1": None}), "GPU-0", "s1 is on it too",
            id="a service is on it that asks for nothing",
        ),
        pytest.param(
            Start(known=False, expected=True, offers=True), "GPU-0", "is not known yet", id="who may ask for watts"
        ),
        pytest.param(
            Start(known=False, annotations={"colocate.io/power": "-5"}), "GPU-0", "write whole watts", id="negative"
        ),
        pytest.param(
            Start(known=False, annotations={"colocate.io/power": "\u00b2"}), "GPU-0", "write whole watts", id="no digit"
        ),
        pytest.param(Start(180, why="crash"), "GPU-0", "RuntimeError: crash", id="a mistake of ours"),
        pytest.param(
            Start(known=False, annotations={"colocate.io/power": "1.5"}), "GPU-0", "write whole watts", id="a part"
        ),
    ],
)  # fmt: skip
def test_s2_3_who_cannot_be_capped_is_not_made(start: Start, visible: str, says: str) -> None:
    with pytest.raises(Refused, match=says):
        start.make(visible)
    assert start.cards.caps.set == []


def test_s2_3_one_card_of_two_that_cannot_be_capped_leaves_the_other_as_it_is() -> None:
    start = Start(300, cards=(card("GPU-0"), card("GPU-1", "s1", index=1)), there={"s1": None})
    with pytest.raises(Refused, match="GPU 1"):
        start.make("GPU-0,GPU-1")
    assert start.cards.caps.set == []


def test_s2_3_the_second_container_of_a_pod_takes_from_the_first_what_was_too_much() -> None:
    start = Start(400)
    assert start.make("GPU-0") == [("GPU-0", 300.0, POD)]
    assert start.make("GPU-1")[1:] == [("GPU-0", 200.0, POD), ("GPU-1", 200.0, POD)]


def test_s2_3_who_was_there_before_the_agent_is_known_by_his_containers() -> None:
    start = Start(180)
    pod = Pod("sandbox", "train", UID, "ml", {}, {}, "")
    start.placement.synchronize([pod], [container({"NVIDIA_VISIBLE_DEVICES": "GPU-1"})])
    assert start.cards.allotted == {f"pod:{UID}": ("GPU-1",)}
    start.placement.pod_removed(pod)
    assert start.cards.allotted, "its cgroup is there: only a former sandbox of it has gone"
    gone = Start(180, path="/kubepods")
    gone.placement.synchronize([pod], [container({"NVIDIA_VISIBLE_DEVICES": "GPU-1"})])
    gone.placement.pod_removed(pod)
    assert gone.cards.allotted == {}


def asks(name: str, *, restarts: str = "", **requests: str) -> ContainerObject:
    wanted: Any = {k.replace("__", "/").replace("_", "."): v for k, v in requests.items()}
    return ContainerObject(name=name, resources=Resources(requests=wanted), restart_policy=restarts)


@pytest.mark.parametrize(
    ("containers", "init", "expected"),
    [
        pytest.param([asks("a", cpu="1")], [], (None, 0), id="nothing"),
        pytest.param([asks("a", colocate_io__power="300", nvidia_com__gpu="2")], [], (300, 2), id="watts and GPUs"),
        pytest.param(
            [asks("app", nvidia_com__gpu="1"), asks("geopm", intel_com__power="250")], [], (250, 1),
            id="the talk's sidecar: it alone asks for the watts of the pod",
        ),
        pytest.param(
            [asks("app")], [asks("mpi-prefix", intel_com__power="250", restarts="Always")], (250, 0),
            id="the talk's sidecar among the first containers",
        ),
        pytest.param(
            [asks("app", colocate_io__power="100")], [asks("first", colocate_io__power="250")], (250, 0),
            id="what comes first and ends counts where it is more",
        ),
    ],
)  # fmt: skip
def test_s2_1_what_a_pod_asks_for(containers: Any, init: Any, expected: tuple[int | None, int]) -> None:
    meta = ObjectMeta(name="p", namespace="ns", uid=UID, creation_timestamp="2026-01-01T00:00:00Z")
    spec = PodSpec(containers=containers, init_containers=init)
    found: Any = pod_of(PodObject(metadata=meta, spec=spec, status=PodStatus(phase="Pending")), 1000.0)
    assert (found.power_watts, found.cards) == expected
    for known in (found.as_batch, found.asks):
        assert known.get("power_watts") == expected[0]


@pytest.mark.parametrize(("text", "watts"), [("300", 300), ("300W", 300), ("1 W", 1), ("100000", 100_000)])
def test_watts_are_whole(text: str, watts: int) -> None:
    assert units.parse_watts(text) == watts


@pytest.mark.parametrize("text", ["", "0", "-5", "1.5", "1e3", "300 kW", "100001", "٣"])
def test_what_are_no_watts(text: str) -> None:
    with pytest.raises(ValueError, match="write whole watts from 1 to 100000"):
        units.parse_watts(text)


@pytest.mark.parametrize(
    ("stat", "started", "ended"),
    [
        pytest.param("7 (a b) c) S 1 " + "0 " * 17 + "4242 0", 4242, False, id="it runs, whatever its name"),
        pytest.param("7 (x) Z 1 " + "0 " * 17 + "4242 0", 4242, True, id="nobody has waited for it yet"),
        pytest.param("", None, True, id="it is not there"),
    ],
)
def test_who_a_process_is_and_whether_it_has_ended(stat: str, started: int | None, ended: bool) -> None:
    class Port:
        def proc(self, _path: str) -> str:
            return stat

    port: Any = Port()
    assert (start_time(port, 7), has_ended(port, 7)) == (started, ended)


def test_a_tree_without_kubelet_has_no_pod_to_cap() -> None:
    start = Start(180)
    tree = Tree("/", None, systemd_driver=False, tier_path="/colocate-batch")
    cards: Any = start.cards
    known = (cards, node(card("GPU-0")))
    watch = Watts(with_cgroup(2, "/"), lambda: tree, start.lister, lambda: known, PowerPolicy, lambda: 0)
    placement = Placement(with_cgroup(2, "/"), lambda: tree, start.lister, lambda: None, shadow=False, watts=watch)
    with pytest.raises(Refused, match="its cgroup is not found"):
        start_now(placement, {}, "GPU-0")


@pytest.mark.parametrize(
    ("share", "budget", "expected", "reason"),
    [
        pytest.param(600, 0, {"GPU-0": 300, "GPU-1": 300}, "WithinBudget", id="enough is left to this node"),
        pytest.param(400, 0, {"GPU-0": 200, "GPU-1": 200}, "Lowered", id="a rack was cut; the node has no budget"),
        pytest.param(400, 500, {"GPU-0": 200, "GPU-1": 200}, "Lowered", id="a rack was cut below the node's budget"),
        pytest.param(560, 500, {"GPU-0": 227, "GPU-1": 227}, "Lowered", id="the node's own budget is the stricter"),
    ],
)
def test_s2_8_what_a_budget_of_several_nodes_leaves_to_this_one(
    share: int, budget: int, expected: dict[str, float], reason: str
) -> None:
    """45 W of an idle card count against the node's own budget, and not against what is left to who asks for watts."""
    idle = card("GPU-2", limit_watts=300.0, watts=45.0)
    snapshot = msgspec.structs.replace(node(*TWO, idle, j1=300.0, j2=300.0), power_share=share)
    found, about = budgeted(snapshot, budget)
    assert {u: w for u, w in found.items() if u != "GPU-2"} == pytest.approx(expected, abs=1.0)
    assert about.reason == reason
