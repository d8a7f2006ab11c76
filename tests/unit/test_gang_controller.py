"""The glue of the controller, as it is: its writes are caught, and the API server answers every save at once."""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

import msgspec
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from colocate.objects import (
    ClaimSource,
    Condition,
    ContainerStatus,
    ObjectMeta,
    OwnerReference,
    PodStatus,
    StorageClass,
    Volume,
)
from podgroup.api import POD_GROUP_LABEL, PodGroup, PodGroupSpec
from podgroup.controller.loop import Controller
from podgroup.controller.watches import now_seconds
from podgroup.explain.snapshot import ClusterSnapshot, decide, load
from podgroup.queue.entry import Settings
from podgroup.state.volumes import BOUND, DELAYED, SELECTED_NODE
from tests.unit.test_gang_placement import node, pod
from tests.unit.test_gang_volumes import claim, volume

replace = msgspec.structs.replace


class Always:
    def holds(self) -> bool:
        return True


class Caught:
    """A controller without an API server: `writes` are (what, verb, arguments) that it would have made."""

    def __init__(self) -> None:
        self.it = Controller(cast("Any", None), Settings(), cast("Any", Always()))
        self.cluster, self.feed, self.queue = self.it.cluster, self.it.feed, self.it.queue
        self.writes: list[tuple[str, str, dict[str, Any]]] = []
        self.it._hands.spawn = self._catch  # type: ignore[method-assign]

    def _catch(self, what: str, work: Any) -> None:
        self.writes.append((what, work.__name__, dict(work.cr_frame.f_locals)))
        work.close()

    def node(self, name: str, ready: bool = True) -> None:
        made = node(name, cpu=4)
        status = [] if ready else [Condition(type="Ready", status="False")]
        self.feed.on_node(None, replace(made, status=replace(made.status, conditions=status)))

    def group(self, name: str, least: int) -> None:
        meta = ObjectMeta(name=name, namespace="ns", uid=name)
        self.feed.on_group(None, PodGroup(metadata=meta, spec=PodGroupSpec(min_member=least)))

    def pod(
        self,
        name: str,
        gang: str = "",
        cpu: int = 4,
        priority: int = 0,
        on: str = "",
        nominated: str = "",
        labels: dict[str, str] | None = None,
        **spec: Any,
    ) -> None:
        labels = {**({POD_GROUP_LABEL: gang} if gang else {}), **(labels or {})}
        scheduler = "somebody-else" if nominated else "colocate"
        made = pod(
            name,
            labels=labels,
            cpu=cpu,
            spec={"priority": priority, "scheduler_name": scheduler, "node_name": on, **spec},
        )
        status = PodStatus(phase="Running" if on else "Pending", nominated_node_name=nominated)
        owner = [OwnerReference(kind="Job", name=gang or name, uid=gang or name, controller=True)]
        self.feed.on_pod(None, replace(made, status=status, metadata=replace(made.metadata, owner_references=owner)))

    def cycle(self, *keys: str) -> dict[str, dict[str, str]]:
        """Decide and begin: gang -> member -> node."""
        decided = self.queue.cycle(self.cluster, set(keys), now_seconds())
        for start in decided.starts:
            self.it._plans.begin(start)
        self._answer()
        return {s.key: {m.name: where for m, where in s.placed} for s in decided.starts}

    def _answer(self) -> None:
        for what, verb, arguments in self.writes:
            if verb in ("save", "save_fenced", "save_moved"):
                self.cluster.set_plan(what, arguments["plan"])
            for uid in arguments.get("left", ()):
                self.cluster.release_hold(uid)

    def round(self, key: str) -> list[str]:
        """One look at an open plan: what is written for it."""
        self.writes.clear()
        self.it._plans.carry_on([key])
        self._answer()
        return [verb for _, verb, _ in self.writes]

    def failed(self, name: str, told_to_go: bool = False, phase: str = "Failed") -> None:
        before = self.cluster.pods[name]
        asked = "2026-01-01T00:00:00Z" if told_to_go else None
        meta = replace(before.metadata, deletion_timestamp=asked)
        status = PodStatus(phase=phase, container_statuses=[ContainerStatus(name="c")])
        self.feed.on_pod(before, replace(before, status=status, metadata=meta))


def test_a_place_that_was_taken_over_a_nomination_is_bound():
    caught = Caught()
    caught.node("n")
    caught.pod("theirs", nominated="n")
    caught.group("g", 1)
    caught.pod("g-0", "g", priority=100)
    assert caught.cycle("ns/g") == {"ns/g": {"g-0": "n"}}
    assert caught.round("ns/g") == ["bind"]


def test_a_nomination_beside_victims_that_still_run_takes_nothing_back():
    caught = Caught()
    caught.node("n")
    caught.pod("victim", cpu=2, on="n")
    caught.group("g", 1)
    caught.pod("g-0", "g", cpu=2)
    caught.cycle("ns/g")
    caught.pod("theirs", cpu=2, nominated="n")
    assert caught.round("ns/g") == ["bind"]


def test_the_slot_that_a_replacement_uses_is_the_one_that_is_given_up():
    caught = Caught()
    for name in ("a", "b", "c", "d"):
        caught.node(name)
    caught.group("g", 3)
    for name, on in (("g-0", "c"), ("g-1", "d"), ("g-2", "a"), ("g-3", "b")):
        caught.pod(name, "g", on=on)
    caught.failed("g-3")
    caught.failed("g-2")
    caught.pod("g-4", "g")
    (started,) = caught.cycle("ns/g").values()
    assert caught.round("ns/g") == ["bind"]
    kept = [place.node for place in caught.queue.holds.places(caught.cluster, "ns/g")]
    assert kept == [] or kept == [{"a": "b", "b": "a"}[started["g-4"]]]


@pytest.mark.parametrize(
    ("told_to_go", "starts"),
    [
        pytest.param(True, True, id="its owner suspended it, so its pods fail on their way out: the room is free"),
        pytest.param(False, False, id="one failed by itself: its owner may make all anew, and their places are kept"),
    ],
)
def test_a_gang_whose_pods_have_all_gone_keeps_its_places_only_if_one_failed(told_to_go: bool, starts: bool):
    caught = Caught()
    for name in ("a", "b"):
        caught.node(name)
    caught.group("g", 2)
    caught.pod("g-0", "g", on="a")
    caught.pod("g-1", "g", on="b")
    caught.failed("g-0", told_to_go)
    caught.failed("g-1", told_to_go=True)
    for name in ("g-0", "g-1"):
        caught.feed.on_pod(caught.cluster.pods[name], None)
    caught.group("h", 2)
    caught.pod("h-0", "h")
    caught.pod("h-1", "h")
    assert bool(caught.cycle("ns/h")) is starts


@pytest.mark.parametrize("phase", ["Failed", "Succeeded"])
def test_a_set_that_makes_its_pods_anew_keeps_their_places_however_they_end(phase: str):
    """A server may end well on SIGTERM (LeaderWorkerSet's RecreateGroupOnPodRestart)."""
    caught = Caught()
    for name in ("a", "b"):
        caught.node(name)
    caught.group("g", 2)
    for name, on in (("g-0", "a"), ("g-1", "b")):
        caught.pod(name, "g", on=on, labels={"leaderworkerset.sigs.k8s.io/name": "g"})
    for name in ("g-0", "g-1"):
        caught.failed(name, told_to_go=True, phase=phase)
    for name in ("g-0", "g-1"):
        caught.feed.on_pod(caught.cluster.pods[name], None)
    caught.group("h", 1)
    caught.pod("h-0", "h")
    assert not caught.cycle("ns/h")


def test_the_new_place_of_a_moved_member_is_its_own_at_once():
    caught = Caught()
    caught.node("a")
    caught.group("g", 1)
    caught.pod("g-0", "g")
    assert caught.cycle("ns/g") == {"ns/g": {"g-0": "a"}}
    caught.node("b")
    caught.node("a", ready=False)
    caught.group("h", 1)
    caught.pod("h-0", "h")
    caught.writes.clear()
    caught.it._plans.carry_on(["ns/g"])
    assert [verb for _, verb, _ in caught.writes] == ["save_moved"]
    assert caught.queue.cycle(caught.cluster, {"ns/h"}, now_seconds()).starts == []
    caught._answer()
    assert caught.round("ns/g") == ["bind"]


def test_a_move_that_comes_to_nothing_leaves_promises_as_the_plan_has_them():
    """The fence of one of two members finds that it had been bound after all."""
    caught = Caught()
    for name in ("a", "b"):
        caught.node(name)
    caught.group("g", 2)
    for i in range(2):
        caught.pod(f"g-{i}", "g")
    caught.cycle("ns/g")
    plan = caught.cluster.plans["ns/g"]
    for name in ("c", "d"):
        caught.node(name)
    for name in ("a", "b"):
        caught.node(name, ready=False)
    caught.writes.clear()
    caught.it._plans.carry_on(["ns/g"])
    ((_, verb, arguments),) = caught.writes
    assert verb == "save_moved"

    async def landed() -> None:
        hands = caught.it._hands
        first = caught.cluster.pods["g-0"]
        bound = replace(first, spec=replace(first.spec, node_name=plan.spec.members[0].node))

        async def fence(pod: Any, since: Any = None) -> Any:
            if pod.metadata.uid == "g-0":
                caught.feed.on_pod(first, bound)
                return bound
            return pod

        hands.fence = fence  # type: ignore[method-assign]
        await hands.save_moved("ns/g", arguments["plan"], arguments["members"], arguments["left"])

    asyncio.run(landed())
    assert caught.cluster.planned == {"g-1": plan.spec.members[1].node}
    assert not [uid for uid in caught.cluster.ledger.holdings if uid.startswith("left:")]
    assert caught.round("ns/g") == ["save_moved"], "and it is tried again"


def test_what_vanished_in_the_round_of_a_snapshot_is_forgotten():
    caught = Caught()
    caught.node("n")
    caught.pod("busy", on="n")
    caught.pod("alone")
    caught.cycle("ns/pod:alone", "ns/pod:busy")
    caught.feed.on_pod(caught.cluster.pods["alone"], None)
    wanted: asyncio.Future[ClusterSnapshot] = asyncio.new_event_loop().create_future()
    caught.it._decide_for(wanted, caught.it._due(), now_seconds())
    wanted.get_loop().close()
    assert "ns/pod:alone" not in caught.queue.waiting
    caught.feed.on_pod(caught.cluster.pods["busy"], None)
    assert caught.cycle("ns/pod:busy") == {}


def with_claim(caught: Caught, name: str, gang: str = "") -> None:
    its = StorageClass(metadata=ObjectMeta(name="made"), provisioner="disks", volume_binding_mode=DELAYED)
    caught.cluster.storage.set_class("made", its)
    claim(caught.cluster, f"c-{name}", by="made")
    volumes = [Volume(name="v", persistent_volume_claim=ClaimSource(claim_name=f"c-{name}"))]
    caught.pod(name, gang, cpu=1, volumes=volumes)


def test_a_pod_alone_whose_volume_never_comes_gives_its_room_up_in_a_silent_cluster():
    caught = Caught()
    caught.node("a")
    with_claim(caught, "solo")
    caught.cycle("ns/pod:solo")
    asked = caught.cluster.storage.claims["ns/c-solo"]
    annotated = replace(asked.metadata, annotations={SELECTED_NODE: "a"})
    caught.cluster.storage.set_claim("ns/c-solo", replace(asked, metadata=annotated))
    caught.it._plans._alone.since["solo"] = now_seconds() - 700

    async def silence() -> None:
        until = time.monotonic() + 5
        while not caught.writes and time.monotonic() < until:
            await caught.it._decide()

    caught.feed.dirty.clear()
    caught.feed.wake.clear()
    caught.writes.clear()
    asyncio.run(silence())
    assert [verb for _, verb, _ in caught.writes] == ["release_volumes"]


def test_of_a_member_that_is_dropped_only_its_own_claims_are_asked_for_no_more():
    caught = Caught()
    caught.node("a")
    its = StorageClass(metadata=ObjectMeta(name="made"), provisioner="disks", volume_binding_mode=DELAYED)
    caught.cluster.storage.set_class("made", its)
    for name in ("shared", "own"):
        claim(caught.cluster, name, by="made")
    caught.group("g", 1)
    for name, claims in (("g-0", ["shared"]), ("g-1", ["shared", "own"])):
        volumes = [Volume(name=c, persistent_volume_claim=ClaimSource(claim_name=c)) for c in claims]
        caught.pod(name, "g", cpu=1, volumes=volumes)
    caught.cycle("ns/g")
    for name in ("shared", "own"):
        asked = caught.cluster.storage.claims[f"ns/{name}"]
        annotated = replace(asked.metadata, annotations={SELECTED_NODE: "a"})
        caught.cluster.storage.set_claim(f"ns/{name}", replace(asked, metadata=annotated))
        for uid in ("g-0", "g-1"):
            caught.cluster.storage.asked(uid, f"ns/{name}")
    caught.it._plans._began[caught.cluster.plans["ns/g"].spec.plan_id] = now_seconds() - 700
    gone = caught.cluster.storage.claims["ns/shared"]
    bound_now = replace(gone.metadata, annotations={**gone.metadata.annotations, BOUND: "yes"})
    volume(caught.cluster, "made-for-it", "a")
    caught.cluster.storage.set_claim(
        "ns/shared", replace(gone, metadata=bound_now, spec=replace(gone.spec, volume_name="made-for-it"))
    )
    assert sorted(caught.round("ns/g")) == ["release_volumes", "save"]
    (arguments,) = [arguments for _, verb, arguments in caught.writes if verb == "release_volumes"]
    assert [todo.claim.metadata.name for todo in arguments["written"]] == ["own"]
    assert [m.name for m in caught.cluster.plans["ns/g"].spec.members] == ["g-0"]


def test_a_successor_reads_in_the_plan_which_volume_each_member_is_to_have():
    """By name the pods come in another order than volumes were given in, and the first would take the other's."""
    caught = Caught()
    caught.node("a")
    its = StorageClass(
        metadata=ObjectMeta(name="local"), provisioner="kubernetes.io/no-provisioner", volume_binding_mode=DELAYED
    )
    storage = caught.cluster.storage
    storage.set_class("local", its)
    volume(caught.cluster, "small-for-both", "a", size=1)
    one = storage.volumes["small-for-both"]
    modes = ["ReadWriteOnce", "ReadWriteMany"]
    storage.set_volume("small-for-both", replace(one, spec=replace(one.spec, access_modes=modes)))
    volume(caught.cluster, "large", "a", size=5)
    caught.group("g", 2)
    for name, its_modes in (("g-0", ["ReadWriteOnce"]), ("g-1", ["ReadWriteMany"])):
        claim(caught.cluster, f"c-{name}", modes=its_modes)
        volumes = [Volume(name="v", persistent_volume_claim=ClaimSource(claim_name=f"c-{name}"))]
        caught.pod(name, "g", cpu=1 if name == "g-0" else 2, volumes=volumes)
    caught.cycle("ns/g")
    chosen = {"g-0": {"ns/c-g-0": "large"}, "g-1": {"ns/c-g-1": "small-for-both"}}
    assert storage.chosen == chosen
    plan, pods = caught.cluster.plans["ns/g"], list(caught.cluster.pods.values())
    for one_pod in pods:
        caught.cluster.remove_pod(one_pod.metadata.uid)
    caught.cluster.remove_plan("ns/g")
    caught.cluster.set_plan("ns/g", plan)
    for one_pod in sorted(pods, key=lambda p: p.metadata.name):
        caught.cluster.set_pod(one_pod)
    assert storage.chosen == chosen
    assert {uid: caught.cluster.volumes_of(uid).state for uid in chosen} == {"g-0": "Open", "g-1": "Open"}


def test_an_event_of_a_volume_concerns_only_those_that_have_claims():
    caught = Caught()
    caught.node("a")
    token = [Volume(name="kube-api-access")]
    caught.pod("plain", cpu=8, volumes=token)
    with_claim(caught, "solo")
    before = caught.cluster.shape(caught.cluster.pods["plain"])
    caught.feed.dirty.clear()
    one = volume(caught.cluster, "v", "a")
    caught.cluster.storage.set_volume("v", None)
    caught.feed.on_volume(None, one)
    assert caught.feed.dirty == {"ns/pod:solo"}
    caught.feed.dirty.clear()
    caught.feed.on_volume(one, replace(one, metadata=replace(one.metadata, resource_version="2")))
    assert caught.feed.dirty == set(), "nothing has changed"
    assert caught.cluster.shape(caught.cluster.pods["plain"]) is before


def test_a_free_volume_helps_on_all_nodes_that_reach_it():
    caught = Caught()
    for name in ("a", "b"):
        caught.node(name)
    its = StorageClass(
        metadata=ObjectMeta(name="local"), provisioner="kubernetes.io/no-provisioner", volume_binding_mode=DELAYED
    )
    caught.cluster.storage.set_class("local", its)
    volume(caught.cluster, "v", "ab")
    for name in ("first", "second"):
        claim(caught.cluster, f"c-{name}")
        volumes = [Volume(name="v", persistent_volume_claim=ClaimSource(claim_name=f"c-{name}"))]
        caught.pod(name, cpu=4, volumes=volumes)
    caught.pod("on-a", cpu=4, on="a")
    assert caught.cycle("ns/pod:first", "ns/pod:second") == {"ns/pod:first": {"first": "b"}}
    gone = caught.cluster.pods["on-a"]
    caught.feed.on_pod(gone, None)
    caught.pod("on-b", cpu=4, on="b")
    caught.cluster.withdraw("first")
    caught.feed.on_pod(caught.cluster.pods["first"], None)
    assert caught.cycle() == {"ns/pod:second": {"second": "a"}}


@pytest.mark.parametrize("shared", [1, 2, 3, 4])
def test_claims_that_are_shared_are_tried_in_a_bounded_number_of_ways(shared: int) -> None:
    caught = Caught()
    for i in range(6):
        caught.node(f"n{i}")
    its = StorageClass(
        metadata=ObjectMeta(name="local"), provisioner="kubernetes.io/no-provisioner", volume_binding_mode=DELAYED
    )
    caught.cluster.storage.set_class("local", its)
    for i in range(16):
        volume(caught.cluster, f"v{i:02}", ["n0", "n1", "n2"] if i % 2 else ["n3", "n4", "n5"])
    caught.group("g", 4)
    for i in range(shared):
        claim(caught.cluster, f"shared-{i}")
    for i in range(4):
        volumes = [
            Volume(name=f"v{j}", persistent_volume_claim=ClaimSource(claim_name=f"shared-{j}")) for j in range(shared)
        ]
        caught.pod(f"g-{i}", "g", volumes=volumes)
    asked = caught.cluster.ledger.storage
    calls = 0
    available = asked.available

    def counted(wanted: Any) -> Any:
        nonlocal calls
        calls += 1
        return available(wanted)

    asked.available = counted  # type: ignore[method-assign]
    assert caught.cycle("ns/g") == {}, "three nodes reach each volume, and four are needed"
    assert calls < 5000


def test_indexes_of_storage_are_as_before_when_all_has_gone():
    caught = Caught()
    storage = caught.cluster.storage
    sizes = {name: len(value) for name, value in vars(storage).items() if isinstance(value, dict)}
    for i in range(3):
        one = volume(caught.cluster, f"v{i}", "a")
        storage.set_volume(f"v{i}", replace(one, spec=replace(one.spec, claim_ref=None)))
        made = claim(caught.cluster, f"c{i}", by="local")
        storage.set_claim(f"ns/c{i}", replace(made, spec=replace(made.spec, volume_name=f"v{i}")))
    for i in range(3):
        storage.set_claim(f"ns/c{i}", None)
        storage.set_volume(f"v{i}", None)
    left = {name: len(value) for name, value in vars(storage).items() if isinstance(value, dict)}
    left["_free"] = sum(map(len, storage._free.values()))
    assert left == sizes


sizes = st.integers(1, 3)
running = st.tuples(sizes, sizes, st.sampled_from([0, 10]), st.sampled_from("abc"))
"""Members, quorum, priority, and the node that the first of them is on."""


@given(
    st.lists(running, max_size=3),
    st.lists(st.tuples(sizes, sizes, st.sampled_from([0, 10, 20])), min_size=1, max_size=4),
    st.sets(st.integers(0, 2)),
    st.integers(0, 2),
    st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_what_a_controller_decided_is_decided_again_from_its_snapshot(there, waits, fails, cycles, nominated):
    """With slots of lost members, places that victims are leaving, promises, and another scheduler's nomination."""
    caught = Caught()
    for name in "abc":
        caught.node(name)
    for i, (size, least, priority, on) in enumerate(there):
        caught.group(f"r{i}", min(size, least))
        for j in range(size):
            caught.pod(f"r{i}-{j}", f"r{i}", cpu=1, priority=priority, on="abc"[("abc".index(on) + j) % 3])
    for i in fails & set(range(len(there))):
        caught.failed(f"r{i}-0")
    for i, (size, least, priority) in enumerate(waits):
        caught.group(f"w{i}", min(size, least))
        for j in range(size):
            caught.pod(f"w{i}-{j}", f"w{i}", cpu=2, priority=priority)
    if nominated:
        caught.pod("theirs", cpu=2, nominated="a")
    caught.pod("alone", cpu=1)
    everybody = {*caught.cluster.members, *caught.cluster.groups}
    for _ in range(cycles):
        caught.cycle(*everybody)
    wanted: asyncio.Future[ClusterSnapshot] = asyncio.new_event_loop().create_future()
    caught.it._decide_for(wanted, set(), now_seconds())
    taken = wanted.result()
    wanted.get_loop().close()
    for verdict in taken.verdicts:
        event(f"{verdict.outcome} {verdict.reason}")
    event(f"kept {sorted({k.kind for k in (taken.memory.kept if taken.memory else [])})}")
    again = load(msgspec.json.encode(taken))
    assert msgspec.json.encode(decide(again)) == msgspec.json.encode(taken.verdicts)
