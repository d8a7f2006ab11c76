"""Pods that run alone are kept in the order in which they would have to go, whatever happens to them."""

from __future__ import annotations

import random

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from colocate.objects import ContainerStatus
from colocate.units import time_text
from podgroup.solve.preempt import preempt
from podgroup.solve.question import Gang, Member
from podgroup.state.cluster import Cluster
from podgroup.state.gangs import gang_key, is_group, owned
from tests.unit.test_gang_snapshot import node, pod

replace = msgspec.structs.replace
STATES = ("pending", "bound", "ended", "leaving", "gone")
EVENTS = st.lists(
    st.tuples(
        st.integers(0, 5), st.sampled_from(STATES), st.integers(-1, 2), st.integers(0, 3), st.booleans(), st.booleans()
    ),
    max_size=40,
)


@given(EVENTS)
def test_runners_are_those_that_could_go_sorted(events: list[tuple[int, str, int, int, bool, bool]]) -> None:
    cluster = Cluster()
    cluster.set_node(node("n", 100))
    for number, state, priority, second, grouped, has_owner in events:
        one = pod(f"p{number}", group="g" if grouped else "", on="" if state == "pending" else "n", priority=priority)
        meta = replace(
            one.metadata,
            creation_timestamp=time_text(1_780_000_000 + second),
            deletion_timestamp=time_text(1_780_000_100) if state == "leaving" else None,
            owner_references=one.metadata.owner_references if has_owner else [],
        )
        phase = "Succeeded" if state == "ended" else one.status.phase
        known = cluster.pods.get(one.metadata.uid)
        if known is not None and (state == "gone" or gang_key(known) != gang_key(one)):
            cluster.remove_pod(one.metadata.uid)
        if state != "gone":
            ended = replace(one.status, phase=phase, container_statuses=[ContainerStatus()] if phase else [])
            cluster.set_pod(replace(one, metadata=meta, status=ended))
        may_go = [
            p
            for p in cluster.pods.values()
            if p.spec.node_name and not p.terminal and not p.deleting and owned(p) and not is_group(gang_key(p))
        ]
        youngest = sorted(may_go, key=gang_key)
        youngest.sort(key=lambda p: p.metadata.creation_timestamp or "", reverse=True)
        assert [uid for *_, uid in cluster.runners.below(3)] == [
            p.metadata.uid for p in sorted(youngest, key=lambda p: p.spec.priority)
        ]
        assert {uid for *_, uid in cluster.runners.below(1)} == {p.metadata.uid for p in may_go if p.spec.priority < 1}
        assert cluster.grouped == {key for key in cluster.members if is_group(key)}


def gang_of(cluster: Cluster, size: int, cpu: int) -> Gang:
    shape = cluster.shape(pod("vip", cpu=cpu, priority=5))
    return Gang(tuple(Member(f"vip-{i}", f"vip-{i}", "ns", shape, {}) for i in range(size)), size)


def test_of_many_that_run_alone_as_many_go_as_are_needed_the_least_important_first() -> None:
    """Three hundred on 30 nodes: more than are looked at in the first round of a search."""
    cluster, generator = Cluster(), random.Random(3)
    for i in range(30):
        cluster.set_node(node(f"n{i:02}", 10))
    for i in range(300):
        cluster.set_pod(pod(f"low{i:03}", on=f"n{i % 30:02}", priority=generator.choice([1, 2])))
    found = preempt(cluster, gang_of(cluster, 20, 10), "ns/vip", 5, 0.0)
    assert found is not None
    assert len(found.placed) == 20
    assert len(found.victims) == 200, "a member needs a whole node"
    assert preempt(cluster, gang_of(cluster, 20, 10), "ns/vip", 1, 0.0) is None, "nobody is less important than that"
    assert preempt(cluster, gang_of(cluster, 31, 10), "ns/vip", 5, 0.0) is None, "not even an empty cluster holds it"
