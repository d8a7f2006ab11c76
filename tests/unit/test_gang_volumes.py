"""Volumes of gangs: which nodes they leave, which are taken, and how far they have come."""

from __future__ import annotations

from itertools import permutations

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from colocate.objects import (
    AttachmentSource,
    Claim,
    ClaimReference,
    ClaimSource,
    ClaimSpec,
    CsiAllocatable,
    CsiNode,
    CsiNodeDriver,
    CsiNodeSpec,
    CsiSource,
    EphemeralSource,
    LabelRequirement,
    NodeSelector,
    NodeSelectorTerm,
    ObjectMeta,
    PersistentVolume,
    PersistentVolumeSpec,
    PersistentVolumeStatus,
    Resources,
    StorageClass,
    Volume,
    VolumeAttachment,
    VolumeAttachmentSpec,
    VolumeNodeAffinity,
)
from podgroup.queue.entry import member_of
from podgroup.solve.place import place
from podgroup.solve.question import Gang
from podgroup.state.cluster import Cluster
from podgroup.state.storage import Progress
from podgroup.state.volumes import BOUND, BOUND_BY_US, DELAYED, NO_PROVISIONER, SELECTED_NODE
from tests.unit.test_gang_placement import HOST, node, pod

replace = msgspec.structs.replace


def cluster(*nodes):
    made = Cluster()
    for name in nodes:
        made.set_node(node(name))
    for name, provisioner in (("local", NO_PROVISIONER), ("made", "disks")):
        its = StorageClass(metadata=ObjectMeta(name=name), provisioner=provisioner, volume_binding_mode=DELAYED)
        made.storage.set_class(name, its)
    return made


def volume(made, name, nodes, size=1, **spec):
    there = LabelRequirement(key=HOST, operator="In", values=list(nodes))
    required = NodeSelector(node_selector_terms=[NodeSelectorTerm(match_expressions=[there])])
    its = PersistentVolumeSpec(
        capacity={"storage": size},
        access_modes=["ReadWriteOnce"],
        storage_class_name="local",
        node_affinity=VolumeNodeAffinity(required=required),
        **spec,
    )
    one = PersistentVolume(
        metadata=ObjectMeta(name=name, resource_version="1"), spec=its, status=PersistentVolumeStatus(phase="Available")
    )
    made.storage.set_volume(name, one)
    return one


def claim(made, name, by="local", size=1, modes=("ReadWriteOnce",), **meta):
    spec = ClaimSpec(access_modes=list(modes), storage_class_name=by, resources=Resources(requests={"storage": size}))
    one = Claim(metadata=ObjectMeta(name=name, namespace="ns", uid=f"uid-{name}", **meta), spec=spec)
    made.storage.set_claim(f"ns/{name}", one)
    return one


def member(made, name, *claims):
    one = pod(
        name,
        cpu=1,
        spec={"volumes": [Volume(name=c, persistent_volume_claim=ClaimSource(claim_name=c)) for c in claims]},
    )
    made.set_pod(one)
    return one


def ask(made, pods, **more):
    return place(made.ledger, Gang(tuple(member_of(made, p) for p in pods), len(pods), **more))


def nodes_of(placed):
    return None if placed is None else sorted(n for _, n in placed)


def own_claims(made, count, **asked):
    """Pods with a claim each."""
    pods = []
    for i in range(count):
        claim(made, f"c{i}", **asked)
        pods.append(member(made, f"p{i}", f"c{i}"))
    return pods


def test_a_volume_on_each_of_two_nodes_takes_one_member_each():
    made = cluster("a", "b", "c")
    volume(made, "on-a", "a")
    volume(made, "on-c", "c")
    assert nodes_of(ask(made, own_claims(made, 2))) == ["a", "c"]


def test_two_volumes_do_not_take_three_members():
    made = cluster("a", "b", "c")
    volume(made, "on-a", "a")
    volume(made, "on-c", "c")
    assert ask(made, own_claims(made, 3)) is None


def test_a_volume_that_several_nodes_reach_is_there_once():
    made = cluster("a", "b")
    volume(made, "anywhere", "ab")
    assert nodes_of(ask(made, own_claims(made, 1))) == ["a"]
    assert ask(made, [*own_claims(made, 2)]) is None


def test_who_needs_the_large_volume_gets_it():
    made = cluster("a", "b")
    volume(made, "small", "a", size=1)
    volume(made, "large", "a", size=5)
    claim(made, "much", size=3)
    claim(made, "little", size=1)
    little, much = member(made, "little", "little"), member(made, "much", "much")
    assert nodes_of(ask(made, [little, much])) == ["a", "a"]


def test_what_can_be_made_is_made_where_there_is_no_volume():
    made = cluster("a", "b")
    assert len(nodes_of(ask(made, own_claims(made, 5, by="made"))) or []) == 5


def test_members_that_share_a_claim_go_to_where_its_one_volume_is():
    made = cluster("a", "b", "c")
    volume(made, "on-a", "a")
    volume(made, "on-b-and-c", "bc", size=2)
    claim(made, "shared")
    pods = [member(made, f"p{i}", "shared") for i in range(80)]  # more than a node has processors
    assert set(nodes_of(ask(made, pods)) or []) == {"b", "c"}


def test_two_members_with_one_claim_for_one_pod_alone_never_start_together():
    made = cluster("a", "b")
    volume(made, "on-a", "ab", size=2)
    claim(made, "alone", modes=["ReadWriteOncePod"])
    pods = [member(made, f"p{i}", "alone") for i in range(2)]
    assert ask(made, pods) is None
    assert nodes_of(ask(made, pods[:1])) is None, "its volume is for another mode"
    claim(made, "alone", by="made", modes=["ReadWriteOncePod"])
    assert len(nodes_of(ask(made, pods[:1])) or []) == 1
    assert ask(made, pods) is None


def limit(made, name, count):
    driver = CsiNodeDriver(name="disks", allocatable=CsiAllocatable(count=count))
    made.set_csi_node(name, CsiNode(metadata=ObjectMeta(name=name), spec=CsiNodeSpec(drivers=[driver])))


def disk(made, name, handle, *, bound_to):
    spec = PersistentVolumeSpec(csi=CsiSource(driver="disks", volume_handle=handle))
    made.storage.set_volume(name, PersistentVolume(metadata=ObjectMeta(name=name), spec=spec))
    one = claim(made, bound_to, by="made", modes=["ReadWriteMany"], annotations={BOUND: "yes"})
    made.storage.set_claim(f"ns/{bound_to}", replace(one, spec=replace(one.spec, volume_name=name)))


def test_a_node_takes_as_many_disks_as_its_driver_says():
    made = cluster("a", "b")
    limit(made, "a", 2)
    limit(made, "b", 1)
    pods = own_claims(made, 4, by="made")
    assert nodes_of(ask(made, pods[:3])) == ["a", "a", "b"]
    assert ask(made, pods) is None


def test_a_disk_that_pods_of_a_node_share_is_attached_once():
    made = cluster("a", "b")
    limit(made, "a", 1)
    limit(made, "b", 0)
    disk(made, "d", "d", bound_to="shared")
    pods = [member(made, f"p{i}", "shared") for i in range(3)]
    assert nodes_of(ask(made, pods)) == ["a", "a", "a"]
    for one in pods:
        made.promise(one.metadata.uid, "a")
    other = own_claims(made, 1, by="made")
    assert ask(made, other) is None
    for one in pods:
        made.withdraw(one.metadata.uid)
    assert nodes_of(ask(made, other)) == ["a"]


def test_a_disk_that_claims_of_two_namespaces_have_is_attached_once():
    """Two volumes of one handle, as a disk is shared between namespaces."""
    made = cluster("a")
    limit(made, "a", 1)
    disk(made, "d", "same", bound_to="one")
    disk(made, "e", "same", bound_to="two")
    pods = [member(made, "p0", "one"), member(made, "p1", "two")]
    assert nodes_of(ask(made, pods)) == ["a", "a"]
    made.promise("p0", "a")
    assert nodes_of(ask(made, pods[1:])) == ["a"]


def test_a_disk_that_is_attached_and_that_no_pod_uses_counts_until_one_does():
    made = cluster("a")
    limit(made, "a", 1)
    disk(made, "d", "d", bound_to="data")
    spec = VolumeAttachmentSpec(attacher="disks", node_name="a", source=AttachmentSource(persistent_volume_name="d"))
    attached = VolumeAttachment(metadata=ObjectMeta(name="d-to-a"), spec=spec)
    made.set_attachments(made.storage.set_attachment("d-to-a", attached))
    other = own_claims(made, 1, by="made")
    assert ask(made, other) is None
    made.set_attachments(made.storage.set_attachment("d-to-a", None))
    assert nodes_of(ask(made, other)) == ["a"]


@pytest.mark.parametrize(
    "of_the_other",
    [
        pytest.param(None, id="a claim that is gone"),
        pytest.param({"volume_name": "gone"}, id="a claim whose volume is gone"),
        pytest.param({"volume_name": ""}, id="a claim that is not bound"),
    ],
)
def test_what_a_running_pod_has_attached_counts_whatever_became_of_its_other_claims(of_the_other):
    """Found against kube-scheduler, which counts claim by claim."""
    made = cluster("a")
    limit(made, "a", 1)
    if of_the_other is not None:
        one = claim(made, "other", by="unknown", annotations={BOUND: "yes"})
        made.storage.set_claim("ns/other", replace(one, spec=replace(one.spec, **of_the_other)))
    disk(made, "d", "d", bound_to="data")
    running = member(made, "running", "other", "data")
    made.promise(running.metadata.uid, "a")
    other = own_claims(made, 1, by="made")
    assert ask(made, other) is None
    made.withdraw(running.metadata.uid)
    assert nodes_of(ask(made, other)) == ["a"]


def bound(made, name, to):
    one = made.storage.claims[f"ns/{name}"]
    meta = replace(one.metadata, annotations={**one.metadata.annotations, BOUND: "yes"})
    made.storage.set_claim(f"ns/{name}", replace(one, metadata=meta, spec=replace(one.spec, volume_name=to)))


def annotated(made, name, **annotations):
    one = made.storage.claims[f"ns/{name}"]
    made.storage.set_claim(f"ns/{name}", replace(one, metadata=replace(one.metadata, annotations=annotations)))


def kept(made, name, for_claim, **meta):
    one = made.storage.volumes[name]
    whose = ClaimReference(namespace="ns", name=for_claim, uid=f"uid-{for_claim}")
    more = replace(one.metadata, annotations={BOUND_BY_US: "yes"}, **meta)
    made.storage.set_volume(name, replace(one, metadata=more, spec=replace(one.spec, claim_ref=whose)))


def told(progress):
    return progress.state, [t.volume.metadata.name if t.volume else "" for t in progress.todo], len(progress.written)


def test_how_a_volume_that_is_there_is_bound():
    made = cluster("a")
    volume(made, "on-a", "a")
    own_claims(made, 1)
    made.promise("p0", "a")
    assert told(made.volumes_of("p0")) == ("Open", ["on-a"], 0)
    kept(made, "on-a", "c0")
    made.storage.asked("p0", "ns/c0")
    assert told(made.volumes_of("p0")) == ("Open", [], 1)
    bound(made, "c0", "on-a")
    assert made.volumes_of("p0") == Progress()
    volume(made, "on-a", "b")
    assert "cannot be used on a" in made.volumes_of("p0").text


def test_how_a_volume_is_made():
    made = cluster("a")
    own_claims(made, 1, by="made")
    made.promise("p0", "a")
    assert told(made.volumes_of("p0")) == ("Open", [""], 0)
    annotated(made, "c0", **{SELECTED_NODE: "a"})
    made.storage.asked("p0", "ns/c0")
    assert told(made.volumes_of("p0")) == ("Open", [], 1)
    annotated(made, "c0")
    assert made.volumes_of("p0").text == "no volume could be made for claim c0 on a"
    made.withdraw("p0")
    made.promise("p0", "a")
    assert told(made.volumes_of("p0")) == ("Open", [""], 0), "another try begins anew"


FAILURES = {
    "somebody else has got the volume": (lambda made: kept(made, "on-a", "other"), "could not be bound to claim c0"),
    "the volume has gone": (lambda made: made.storage.set_volume("on-a", None), "could not be bound to claim c0"),
    "the claim has gone": (lambda made: made.storage.set_claim("ns/c0", None), "claim c0 has gone"),
}


@pytest.mark.parametrize(("happens", "text"), FAILURES.values(), ids=FAILURES.keys())
def test_a_volume_that_will_not_come_is_said(happens, text):
    made = cluster("a")
    volume(made, "on-a", "a")
    own_claims(made, 1)
    made.promise("p0", "a")
    happens(made)
    assert made.volumes_of("p0").state == "Failed"
    assert text in made.volumes_of("p0").text


def test_what_a_planned_pod_is_to_have_nobody_else_is_promised():
    made = cluster("a")
    volume(made, "on-a", "a")
    first, second = own_claims(made, 2)
    made.promise(first.metadata.uid, "a")
    assert ask(made, [second]) is None
    made.withdraw(first.metadata.uid)
    assert nodes_of(ask(made, [second])) == ["a"]


NOT_YET = "the claim is not bound to a volume yet"
REFUSED = {
    "a claim of a class that is not there": ({"by": "other"}, f"{NOT_YET} (there is no StorageClass other)"),
    "a claim without a class": ({"by": ""}, NOT_YET),
    "a claim that is being deleted": ({"deletion_timestamp": "2026-01-01T00:00:00Z"}, "the claim is being deleted"),
}


@pytest.mark.parametrize(("asked", "text"), REFUSED.values(), ids=REFUSED.keys())
def test_a_claim_that_cannot_be_waited_for_is_refused_by_name(asked, text):
    made = cluster("a")
    (one,) = own_claims(made, 1, **asked)
    assert made.shape(one).unsupported == f"volume claim c0: {text}"


def test_an_ephemeral_volume_has_the_claim_that_was_made_for_its_pod():
    made = cluster("a")
    one = pod("p", cpu=1, spec={"volumes": [Volume(name="scratch", ephemeral=EphemeralSource())]})
    made.set_pod(one)
    assert made.shape(one).unsupported == "volume claim p-scratch: the claim does not exist"
    claim(made, "p-scratch", by="made")
    assert "was not made for this pod" in made.shape(one).unsupported


sizes = st.integers(1, 3)


@st.composite
def stores(draw):
    """A few nodes, volumes on some of them, and pods with one or two claims."""
    names = "abc"[: draw(st.integers(1, 3))]
    made = cluster(*names)
    for i in range(draw(st.integers(0, 4))):
        reached = draw(st.sets(st.sampled_from(names), min_size=1))
        volume(made, f"v{i}", sorted(reached), size=draw(sizes))
    for i in range(draw(st.integers(0, 2))):
        limit(made, names[i % len(names)], draw(st.integers(0, 3)))
    return made, names


@given(stores(), st.integers(1, 4), sizes, st.sampled_from(["local", "local", "made"]))
@settings(max_examples=200, deadline=None)
def test_equal_members_are_placed_whenever_a_search_of_all_finds_volumes(store, count, size, by):
    made, names = store
    pods = own_claims(made, count, size=size, by=by)
    placed = ask(made, pods)
    if by == "made":
        room = sum(made.storage.limits(n).get("attachable-volumes-csi-disks", count) for n in names)
        assert (placed is not None) == (room >= count)
        return
    free = [v for v in made.storage.volumes.values() if v.spec.capacity["storage"] >= size]
    assert (placed is not None) == (len(free) >= count), "each volume is on some node, and nodes have room"


claims_of_a_pod = st.lists(st.tuples(sizes, st.sampled_from(["local", "made", "shared"])), max_size=2)


def _two_pods_of_a_disk():
    """The smaller disk is reached by one node, the larger one by both: who comes first must not take the larger."""
    made = cluster("a", "b")
    volume(made, "v0", "a", size=1)
    volume(made, "v1", "ab", size=2)
    return made, "ab"


def _a_disk_each(count, **labels):
    made = cluster()
    for i in range(count):
        name = f"n{i:02}"
        made.set_node(node(name, labels={HOST: name, **{k: v for k, v in labels.items() if i >= count - 8}}))
        volume(made, f"v{i:02}", [name])
    return made


def test_a_shared_volume_is_looked_for_where_its_pods_may_be():
    """Forty nodes with a disk each, the last eight of them chosen by the pods."""
    made = _a_disk_each(40, pool="gpu")
    claim(made, "shared")
    pods = [member(made, f"p{i}", "shared") for i in range(2)]
    chosen = [replace(p, spec=replace(p.spec, node_selector={"pool": "gpu"})) for p in pods]
    for one in chosen:
        made.set_pod(one)
    assert nodes_of(ask(made, chosen)) == ["n32", "n32"]


def test_two_shared_volumes_do_not_wait_for_each_others_alternatives():
    """Forty nodes with a disk each, the first one full; two pairs of pods with a claim each pair."""
    made = _a_disk_each(40)
    made.set_pod(pod("full", cpu=64, spec={"node_name": "n00"}))
    for name in ("s", "t"):
        claim(made, name)
    pods = [member(made, f"{name}{i}", name) for name in ("s", "t") for i in range(2)]
    assert nodes_of(ask(made, pods)) == ["n01", "n01", "n02", "n02"]


def test_a_shared_volume_is_promised_that_all_of_its_pods_reach():
    """The first pod reaches the smaller disk too; the other one that shares the claim has no room where that is."""
    made, _ = _two_pods_of_a_disk()
    claim(made, "shared")
    claim(made, "own")
    pods = [member(made, f"p{i}", c) for i, c in enumerate(("shared", "own", "shared"))]
    asked = [
        replace(p, spec=pod("x", cpu=c, spec={"volumes": p.spec.volumes}).spec)
        for p, c in zip(pods, (40, 20, 10), strict=True)
    ]
    for one in asked:
        made.set_pod(one)
    placed = ask(made, asked)
    assert nodes_of(placed) == ["a", "a", "b"]
    made.promise_all((one.uid, name) for one, name in placed)
    assert {made.volumes_of(p.metadata.uid).state for p in asked} == {"Open"}
    assert made.storage.chosen["p0"] == made.storage.chosen["p2"] == {"ns/shared": "v1"}


@given(stores(), st.lists(claims_of_a_pod, min_size=1, max_size=4))
@example(_two_pods_of_a_disk(), [[(1, "shared")], [(1, "shared"), (2, "local")]])
@settings(max_examples=300, deadline=None)
def test_whoever_is_placed_finds_its_volumes_when_it_is_promised_its_place(store, wanted):
    made, _ = store
    claim(made, "shared", size=1)
    pods = []
    for i, claims in enumerate(wanted):
        own = [f"c{i}-{j}" for j in range(len(claims))]
        for name, (size, by) in zip(own, claims, strict=True):
            claim(made, name, size=size, by="local" if by == "shared" else by)
        shared = ["shared" if by == "shared" else name for name, (_, by) in zip(own, claims, strict=True)]
        pods.append(member(made, f"p{i}", *dict.fromkeys(shared)))
    placed = ask(made, pods)
    taken = []
    made.promise_all((one.uid, name) for one, name in placed or ())
    for one, name in placed or ():
        progress = made.volumes_of(one.uid)
        assert progress.state != "Failed", progress.text
        for todo in progress.todo:
            if todo.volume is not None:
                assert made.ledger.selected(todo.volume.spec.node_affinity.required)[made.ledger.rows[name]]
                taken.append((todo.volume.metadata.name, todo.claim.metadata.name))
    assert len({v for v, _ in taken}) == len(set(taken)), "a volume is given to one claim"
    if placed is None and len(pods) <= 3:
        assert not any(_fits(made, order) for order in permutations(pods)), "each after the other they would fit"


def _fits(made, order):
    """Whether they are placed one after the other, each where the solver puts it alone."""
    put = []
    try:
        for one in order:
            placed = ask(made, [one])
            if placed is None:
                return False
            made.promise(one.metadata.uid, placed[0].node)
            put.append(one.metadata.uid)
        return True
    finally:
        for uid in put:
            made.withdraw(uid)


def test_the_ledger_is_as_before_when_all_have_gone():
    made = cluster("a", "b")
    limit(made, "a", 1)
    disk(made, "d", "d", bound_to="shared")
    before = made.ledger.used.copy()
    pods = [member(made, f"p{i}", "shared") for i in range(3)]
    for one in pods:
        made.promise(one.metadata.uid, "a")
    assert made.ledger.used[0].max() > 0
    for one in pods:
        made.remove_pod(one.metadata.uid)
    assert np.array_equal(made.ledger.used[:, : before.shape[1]], before)
    assert made.ledger.used.sum() == 0


def test_a_node_without_drivers_is_as_kubelet_writes_it() -> None:
    """`drivers: null`, where the last one has gone: what it could attach counts no more."""
    cluster, meta = Cluster(), ObjectMeta(name="n0")
    driver = CsiNodeDriver(name="d", allocatable=CsiAllocatable(count=3))
    cluster.set_csi_node("n0", CsiNode(metadata=meta, spec=CsiNodeSpec(drivers=[driver])))
    assert cluster.storage.limits("n0")
    written = b'{"metadata": {"name": "n0"}, "spec": {"drivers": null}}'
    cluster.set_csi_node("n0", msgspec.json.decode(written, type=CsiNode))
    assert not cluster.storage.limits("n0")
