"""The cases of scheduler-plugins' PodGroup status controller (S), and who is who among the members."""

from __future__ import annotations

import msgspec
import pytest

from colocate.objects import Named, ObjectMeta, OwnerReference, Pod, PodSpec, PodStatus
from podgroup.api import GangPlan, GangPlanSpec, PlannedMember, PodGroup, PodGroupSpec
from podgroup.dialects.scheduling_sigs import DIALECT
from podgroup.state.gangs import sort_members
from podgroup.state.large_plans import compact, expand
from tools import crds


def pods(**counts):
    """Pods by phase."""
    return [
        Pod(metadata=ObjectMeta(name=f"{phase}-{i}", uid=f"{phase}-{i}", namespace="ns"), status=PodStatus(phase=phase))
        for phase, count in counts.items()
        for i in range(count)
    ]


CASES = {
    "S1 three run": (pods(Running=3), "Running"),
    "S2 three have succeeded": (pods(Succeeded=3), "Finished"),
    "S3 one has succeeded, two run": (pods(Succeeded=1, Running=2), "Running"),
    "S4 one has failed, two run": (pods(Failed=1, Running=2), "Failed"),
    "S5 there are none": (pods(), "Pending"),
    "S6 there are two": (pods(Pending=2), "Pending"),
    "S7 a running group has lost one": (pods(Running=2), "Pending"),
    "all exist and none runs": (pods(Pending=3), "Scheduling"),
    "a replacement of the failed one runs": (pods(Failed=1, Running=3), "Running"),
}


@pytest.mark.parametrize(("there", "phase"), CASES.values(), ids=CASES.keys())
def test_phases_of_a_group_of_three(there, phase):
    group = PodGroup(metadata=ObjectMeta(name="g", namespace="ns"), spec=PodGroupSpec(min_member=3))
    status = DIALECT.status(group, there)
    assert status.phase == phase
    assert status.running == sum(p.status.phase == "Running" for p in there)


def test_s8_a_group_of_two_owners_names_both():
    there = [
        Pod(metadata=ObjectMeta(name=n, namespace="ns", owner_references=[OwnerReference(name=n)])) for n in ("b", "a")
    ]
    assert DIALECT.status(PodGroup(metadata=ObjectMeta(name="g")), there).occupied_by == "ns/a,ns/b"


def test_members_are_told_apart_and_ordered():
    def one(name, phase="Pending", **spec):
        return Pod(
            metadata=ObjectMeta(name=name),
            spec=PodSpec(scheduler_name="colocate", **spec),
            status=PodStatus(phase=phase),
        )

    there = [
        one("w-10"),
        one("w-9"),
        one("first", priority=5),
        one("on", node_name="n"),
        one("gated", scheduling_gates=[Named(name="g")]),
        one("done", "Succeeded", node_name="n"),
        Pod(metadata=ObjectMeta(name="other")),
    ]
    members = sort_members(there, ("colocate",))
    assert [p.metadata.name for p in members.pending] == ["first", "w-9", "w-10"]
    assert (members.satisfied, members.created) == (2, 6)
    assert [p.metadata.name for p in members.foreign] == ["other"]


@pytest.mark.parametrize("file", sorted(crds.generate()))
def test_the_manifests_are_what_the_structs_say(file):
    assert (crds.TARGET / file).read_text() == crds.generate()[file], "python -m tools.crds"


def names(count):
    return [f"training-job-with-a-long-name-worker-group-a-{i:05}-x7k2p" for i in range(count)]


@pytest.mark.parametrize(
    ("count", "stored_mib"),
    [
        pytest.param(3, 0.01, id="a small plan is stored as it is"),
        pytest.param(10_000, 1.0, id="a large one is less than etcd's 1.5 MiB"),
    ],
)
def test_a_plan_is_the_same_again_after_it_was_stored(count, stored_mib):
    """10,000 members with names as clouds make them: 1.6 MiB if each were written out."""
    members = [
        PlannedMember(
            name=name,
            uid=f"0c0ffee0-0000-4000-8000-{i:012}",
            node=f"ip-10-123-{i // 250 % 20:03}-{i % 250:03}.eu-central-1.compute.internal",
        )
        for i, name in enumerate(names(count))
    ]
    plan = GangPlan(metadata=ObjectMeta(name="g"), spec=GangPlanSpec(plan_id="x", members=members))
    stored = msgspec.json.encode(compact(plan))
    assert len(stored) < stored_mib * (1 << 20)
    assert expand(msgspec.json.decode(stored, type=GangPlan)) == plan
