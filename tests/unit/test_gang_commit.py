"""The commit state machine: each row of the failure table as one look at a plan."""

from __future__ import annotations

import pytest

from colocate.objects import Claim, ContainerStatus, ObjectMeta, OwnerReference, Pod, PodSpec, PodStatus
from podgroup.api import GangPlan, GangPlanSpec, GangPlanStatus, PlannedMember
from podgroup.commit.protocol import (
    VOLUME_SECONDS,
    Bind,
    BindVolumes,
    Delete,
    ReleaseVolumes,
    advance,
    displaced,
    moved,
)
from podgroup.state.gangs import owned
from podgroup.state.storage import Progress, Todo

OWNER = [OwnerReference(kind="Job", name="j", uid="j", controller=True)]


def plan(phase="Binding", count=3, least=3, timeout=60):
    members = [PlannedMember(name=f"p{i}", uid=f"u{i}", node=f"n{i}") for i in range(count)]
    spec = GangPlanSpec(plan_id="x", timeout_seconds=timeout, min_member=least, members=members)
    return GangPlan(metadata=ObjectMeta(name="g", namespace="ns"), spec=spec, status=GangPlanStatus(phase=phase))


def pod(i, node="", phase="Pending", reason="", owned=True, deleting=False, taken=False):
    statuses = [ContainerStatus(name="c")] if taken else []
    return Pod(
        metadata=ObjectMeta(
            name=f"p{i}",
            uid=f"u{i}",
            owner_references=OWNER if owned else [],
            deletion_timestamp="2026-01-01T00:00:00Z" if deleting else None,
        ),
        spec=PodSpec(node_name=node),
        status=PodStatus(phase=phase, reason=reason, container_statuses=statuses),
    )


def waiting(i, **options):
    return pod(i, **options)


def bound(i, **options):
    return pod(i, node=f"n{i}", **options)


def running(i, **options):
    return pod(i, node=f"n{i}", phase="Running", taken=True, **options)


def refused(i, **options):
    return pod(i, node=f"n{i}", phase="Failed", reason="OutOfcpu", **options)


ALIVE = {f"n{i}": True for i in range(4)}


def there(nodes):
    """Which nodes are there, and whether they are ready; None for one that has gone."""
    return {name: ready for name, ready in {**ALIVE, **nodes}.items() if ready is not None}


BIND, DELETE = Bind, Delete
ROWS = {
    "what is unbound is bound": (plan(), [bound(0), waiting(1), waiting(2)], {}, "Binding", [(BIND, 1), (BIND, 2)]),
    "all bound: the kubelets are waited for": (plan(), [bound(0), bound(1), bound(2)], {}, "Confirming", []),
    "all taken: the gang runs": (plan("Confirming"), [running(0), running(1), running(2)], {}, "Running", []),
    "a member that completed at once counts": (
        plan("Confirming"),
        [running(0), running(1), pod(2, node="n2", phase="Succeeded")],
        {},
        "Running",
        [],
    ),
    "a kubelet that is slow is waited for": (
        plan("Confirming"),
        [running(0), running(1), bound(2)],
        {},
        "Confirming",
        [],
    ),
    "a member went away before it was bound, and no quorum is left": (
        plan(),
        [bound(0), waiting(1)],
        {},
        "RollingBack",
        [],
    ),
    "a kubelet refused while others are still bound: they are bound all the same": (
        plan(),
        [refused(0), bound(1), waiting(2)],
        {},
        "Binding",
        [(BIND, 2)],
    ),
    "a surplus member went away: the rest is bound": (
        plan(least=2),
        [bound(0), waiting(1)],
        {},
        "Binding",
        [(BIND, 1)],
    ),
    "a node went away between two binds": (
        plan(),
        [bound(0), waiting(1), waiting(2)],
        {"n1": None},
        "RollingBack",
        [],
    ),
    "binding takes too long": (plan(timeout=0), [bound(0), waiting(1), waiting(2)], {}, "RollingBack", []),
    "a kubelet refused: the replacement is awaited": (
        plan("Confirming"),
        [running(0), running(1), refused(2)],
        {},
        "Repairing",
        [],
    ),
    "a refused surplus member is no harm": (
        plan("Confirming", least=2),
        [running(0), running(1), refused(2)],
        {},
        "Running",
        [],
    ),
    "a node died before its kubelet answered: the pod is deleted at once": (
        plan("Repairing"),
        [running(0), running(1), bound(2)],
        {"n2": False},
        "Repairing",
        [(DELETE, 2)],
    ),
    "no replacement in time: all is taken back": (
        plan("Repairing", timeout=0),
        [running(0), running(1), refused(2)],
        {},
        "RollingBack",
        [],
    ),
    "a surplus member that is slow does not end a quorum that runs": (
        plan("Confirming", least=2, timeout=0),
        [running(0), running(1), bound(2)],
        {},
        "Running",
        [],
    ),
    "a surplus member that cannot be bound is dropped": (
        plan(least=2, timeout=0),
        [bound(0), bound(1), waiting(2)],
        {},
        "Binding",
        [],
    ),
    "what is leaving a dead node is as good as gone": (
        plan("RollingBack"),
        [running(0, deleting=True)],
        {"n0": False},
        "Waiting",
        [],
    ),
    "taking back deletes the unstarted first": (
        plan("RollingBack"),
        [running(0), bound(1)],
        {},
        "RollingBack",
        [(DELETE, 1), (DELETE, 0)],
    ),
    "what is being deleted is not deleted again": (
        plan("RollingBack"),
        [running(0, deleting=True)],
        {},
        "RollingBack",
        [],
    ),
    "a node that is not ready for a moment is waited for": (
        plan(),
        [bound(0), waiting(1), waiting(2)],
        {"n1": False},
        "Binding",
        [(BIND, 2)],
    ),
    "all gone: the gang waits again": (plan("RollingBack"), [], {}, "Waiting", []),
    "a pod without an owner is never deleted": (plan("RollingBack"), [running(0, owned=False)], {}, "Waiting", []),
    "a plan at rest asks for nothing": (plan("Running"), [running(0)], {}, "Running", []),
}


@pytest.mark.parametrize(("before", "pods", "nodes", "phase", "steps"), ROWS.values(), ids=ROWS.keys())
def test_one_look(before, pods, nodes, phase, steps):
    after = advance(before, {p.metadata.uid: p for p in pods}, there(nodes), 0, elapsed_seconds=1.0)
    assert after.plan.status.phase == phase
    if after.plan is before:
        assert [(type(s), int(s.pod.metadata.name[1:])) for s in after.steps] == steps
    else:
        assert steps == []


@pytest.mark.parametrize(
    ("least", "phase", "members"),
    [
        pytest.param(3, "RollingBack", 3, id="of a quorum: all is taken back"),
        pytest.param(2, "Binding", 2, id="of the surplus: it goes without"),
    ],
)
def test_a_member_whose_room_others_have_taken(least, phase, members):
    before, pods = plan(least=least), {p.metadata.uid: p for p in [bound(0), waiting(1), waiting(2)]}
    assert [p.metadata.name for p in displaced(before, pods, ALIVE, {"n2"})] == ["p2"]
    after = advance(before, pods, ALIVE, 0, 1.0, overfull={"n2"}).plan
    assert (after.status.phase, len(after.spec.members)) == (phase, members)


def test_members_that_can_be_elsewhere_are_moved_there():
    before, pods = plan(), {p.metadata.uid: p for p in [bound(0), waiting(1), waiting(2)]}
    gone = displaced(before, pods, there({"n1": None, "n2": False}), set())
    assert [p.metadata.name for p in gone] == ["p1", "p2"]
    after = moved(before, {"u1": "n3", "u2": "n3"})
    assert [m.node for m in after.spec.members] == ["n0", "n3", "n3"]
    assert displaced(after, pods, ALIVE, set()) == []


TODO = Todo(Claim(metadata=ObjectMeta(name="c")), None)
ASK, WAIT = Progress("Open", "waiting", todo=(TODO,)), Progress("Open", "waiting for c", written=(TODO,))
FAILED = Progress("Failed", "no volume could be made for c", written=(TODO,))
THREE = [waiting(0), waiting(1), waiting(2)]
PROVISIONING = {
    "what is to be written for volumes is written": (
        3,
        THREE,
        [ASK, WAIT, Progress()],
        1,
        "Provisioning",
        [(BindVolumes, 0)],
    ),
    "nobody is bound before all have theirs": (3, THREE, [WAIT, Progress(), Progress()], 1, "Provisioning", []),
    "all have theirs: they are bound": (3, THREE, [Progress()] * 3, 1, "Binding", []),
    "one that cannot be had takes all back": (3, THREE, [WAIT, FAILED, Progress()], 1, "RollingBack", []),
    "the surplus need not hold up the quorum": (2, THREE, [WAIT, FAILED, Progress()], 1, "Provisioning", []),
    "not for ever": (3, THREE, [WAIT, Progress(), Progress()], VOLUME_SECONDS, "RollingBack", []),
    "a late surplus goes without": (2, THREE, [WAIT, Progress(), Progress()], VOLUME_SECONDS, "Provisioning", []),
    "a member that has gone": (3, THREE[:2], [WAIT, WAIT], 1, "RollingBack", []),
}


@pytest.mark.parametrize(
    ("least", "pods", "volumes", "elapsed", "phase", "steps"), PROVISIONING.values(), ids=PROVISIONING.keys()
)
def test_one_look_while_volumes_are_awaited(least, pods, volumes, elapsed, phase, steps):
    before = plan("Provisioning", least=least)
    known = {p.metadata.uid: v for p, v in zip(pods, volumes, strict=True)}
    after = advance(before, {p.metadata.uid: p for p in pods}, ALIVE, 0, elapsed, known)
    assert after.plan.status.phase == phase
    assert [(type(s), int(s.pod.metadata.name[1:])) for s in after.steps] == steps


def test_what_was_written_for_volumes_is_taken_back_before_the_room_is_given_up():
    before, pods = plan("RollingBack"), {p.metadata.uid: p for p in THREE}
    after = advance(before, pods, ALIVE, 0, 1.0, {"u0": FAILED, "u1": WAIT})
    assert after.plan is before
    assert [(type(s), s.pod.metadata.name) for s in after.steps] == [(ReleaseVolumes, "p0"), (ReleaseVolumes, "p1")]
    assert advance(before, pods, ALIVE, 0, 1.0).plan.status.phase == "Waiting"


def test_members_outside_the_plan_count_for_the_quorum():
    before = plan(count=1, least=3)
    after = advance(before, {"u0": waiting(0)}, ALIVE, 2, 1.0)
    assert [type(s) for s in after.steps] == [Bind]


@pytest.mark.parametrize(
    ("controller", "kind", "expected"),
    [
        pytest.param(True, "Job", True, id="a controller"),
        pytest.param(False, "PodGroup", False, id="an owner for garbage collection makes nothing anew"),
        pytest.param(True, "DaemonSet", False, id="a DaemonSet's come back in place"),
    ],
)
def test_who_makes_a_pod_anew(controller, kind, expected):
    owner = OwnerReference(kind=kind, name="o", uid="o", controller=controller)
    assert owned(Pod(metadata=ObjectMeta(name="p", owner_references=[owner]))) is expected


def test_what_is_left_of_a_gang_that_was_taken_back_is_named():
    after = advance(plan("RollingBack"), {"u0": running(0, owned=False)}, ALIVE, 0, 1.0)
    assert "but for p0: a pod without an owner is never deleted" in after.plan.status.message
    assert after.plan.spec.members == []
