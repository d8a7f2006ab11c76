"""How a planned gang is bound: all of it, or it is taken back. A pure state machine over the plan and the pods as they
are.

    Waiting -> Provisioning -> Binding -> Confirming -> Running
                    |             |            |  ^
                    |             |            v  |
                    |             |        Repairing      a member was refused or lost: its replacement is awaited
                    v             v            v
                 RollingBack -> Waiting (backing off, with the reason)

Only a gang with claims whose volumes are found or made once its pods have nodes (WaitForFirstConsumer) is Provisioning:
nobody is bound before all have their volumes.

The plan is persisted before its first bind, and nothing else is: every state follows from the plan and from what the
API server says of the pods, so a controller that was killed at any write goes on where it was. Binds are compare-and-
swap (`pods/binding` with uid and resourceVersion), so repeating one is harmless.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from types import MappingProxyType
from typing import NamedTuple

import msgspec

from colocate.objects import Pod
from podgroup.api import GangPlan, GangPlanStatus, PlannedMember, PlanPhase
from podgroup.state.gangs import accepted, owned, rejected
from podgroup.state.storage import Progress


class Bind(NamedTuple):
    """Bind this pod to this node."""

    pod: Pod
    node: str


class Delete(NamedTuple):
    """Delete this pod, which has an owner that makes it anew."""

    pod: Pod
    reason: str


class BindVolumes(NamedTuple):
    """Write what is still to be written for the volumes of this pod, which is planned on this node."""

    pod: Pod
    node: str


class ReleaseVolumes(NamedTuple):
    """Take back what was written for volumes that there are none of yet."""

    pod: Pod


Step = Bind | Delete | BindVolumes | ReleaseVolumes
VOLUME_SECONDS = 600.0
"""For so long volumes may take (kube-scheduler's default bindTimeoutSeconds)."""


class Next(NamedTuple):
    """What to do now, and the plan as it is from now on (the same object if nothing has changed)."""

    plan: GangPlan
    steps: list[Step]


class _Seen(NamedTuple):
    """The members of a plan, each in one place."""

    unbound: list[tuple[PlannedMember, Pod]]
    bound: list[tuple[PlannedMember, Pod]]
    """On a node, and the kubelet has not said yes or no."""
    accepted: list[tuple[PlannedMember, Pod]]
    refused: list[tuple[PlannedMember, Pod]]
    gone: list[PlannedMember]


def _look(plan: GangPlan, pods: Mapping[str, Pod]) -> _Seen:
    seen = _Seen([], [], [], [], [])
    for member in plan.spec.members:
        pod = pods.get(member.uid)
        if pod is None or (pod.deleting and not accepted(pod)):
            seen.gone.append(member)
        elif rejected(pod):
            seen.refused.append((member, pod))
        elif accepted(pod) or pod.terminal:
            seen.accepted.append((member, pod))
        elif pod.spec.node_name:
            seen.bound.append((member, pod))
        else:
            seen.unbound.append((member, pod))
    return seen


def advance(
    plan: GangPlan,
    pods: Mapping[str, Pod],
    alive_nodes: Mapping[str, bool],
    beside: int,
    elapsed_seconds: float,
    volumes: Mapping[str, Progress] = MappingProxyType({}),
    overfull: Set[str] = frozenset(),
) -> Next:
    """One look at an open plan.

    `alive_nodes` says which nodes are there, and whether they are ready; `beside` counts satisfied members that are not
    part of the plan; `elapsed_seconds` is the time since the plan was made; `volumes` says by uid how far the volumes
    of unbound members have come; on the nodes that are `overfull` others have taken the room of unbound members.
    """
    seen = _look(plan, pods)
    phase = plan.status.phase
    if phase == "RollingBack":
        return _roll_back(plan, seen, alive_nodes, volumes)
    if phase == "Provisioning":
        return _provision(plan, seen, alive_nodes, beside, elapsed_seconds, volumes, overfull)
    if phase not in ("Binding", "Confirming", "Repairing"):
        return Next(plan, [])
    least, here = plan.spec.min_member - beside, len(seen.bound) + len(seen.accepted)
    stranded = [(m, p) for m, p in seen.bound if not alive_nodes.get(p.spec.node_name)]
    late = elapsed_seconds >= plan.spec.timeout_seconds
    if phase == "Binding":
        hopeless = _hopeless(plan, seen, alive_nodes, overfull, least)
        if hopeless is not None:
            return hopeless
        if late and seen.unbound and here >= least:
            return Next(_without(plan, [m for m, _ in seen.unbound]), [])  # the surplus need not hold up the quorum
        if late and seen.unbound:
            text = f"{len(seen.unbound)} of {len(plan.spec.members)} members could not be bound in time"
            return _begin_roll_back(plan, "BindTimeout", text)
        if seen.unbound:
            return Next(plan, [Bind(pod, member.node) for member, pod in seen.unbound if alive_nodes.get(member.node)])
        return Next(_in(plan, "Confirming", "Bound", "every member is bound; waiting for the kubelets"), [])
    steps: list[Step] = [Delete(p, f"node {p.spec.node_name} went away") for _, p in stranded if owned(p)]
    if len(seen.accepted) >= least and (late or not (seen.bound or seen.unbound)):
        slow = f"; {len(seen.bound)} more are slow" if seen.bound else ""
        run = len(seen.accepted) + beside
        text = f"{run} member{'s have' if run != 1 else ' has'} started{slow}"
        return Next(_in(plan, "Running", "Started", text), [])
    if late:
        text = f"{len(seen.accepted)} of {plan.spec.min_member} members were taken by their kubelets in time"
        return _begin_roll_back(plan, "ConfirmTimeout", text)
    if here - len(stranded) < least and phase != "Repairing":
        names = [m.name for m, _ in seen.refused] or [m.name for m, _ in stranded] or [m.name for m in seen.gone]
        why = f": {seen.refused[0][1].status.reason}" if seen.refused else ""
        repair = _in(
            plan, "Repairing", "MemberLost", f"{', '.join(names)} did not start{why}; waiting for the replacement"
        )
        return Next(repair, steps)
    return Next(plan, steps)


def displaced(
    plan: GangPlan, pods: Mapping[str, Pod], alive_nodes: Mapping[str, bool], overfull: Set[str]
) -> list[Pod]:
    """The members that cannot be bound where the plan has them: another place may do, before anything is taken back."""
    if plan.status.phase not in ("Provisioning", "Binding"):
        return []
    if not overfull and all(alive_nodes.get(m.node) for m in plan.spec.members):
        return []
    return [p for m, p in _look(plan, pods).unbound if m.node in overfull or not alive_nodes.get(m.node)]


def moved(plan: GangPlan, nodes: Mapping[str, str]) -> GangPlan:
    """The plan with these members (by uid) on other nodes."""
    members = [
        msgspec.structs.replace(m, node=nodes[m.uid], volumes={}) if m.uid in nodes else m for m in plan.spec.members
    ]
    return msgspec.structs.replace(plan, spec=msgspec.structs.replace(plan.spec, members=members))


def _hopeless(
    plan: GangPlan, seen: _Seen, alive_nodes: Mapping[str, bool], overfull: Set[str], least: int
) -> Next | None:
    """The end of a plan that cannot be bound as it was made, and whose members have no other places.

    A node that is not ready may be again: it is waited for.
    """
    if len(seen.bound) + len(seen.accepted) + len(seen.unbound) + len(seen.refused) < least:
        gone = ", ".join(m.name for m in seen.gone)
        return _begin_roll_back(plan, "MemberLost", f"{gone} went away before the gang was bound")
    lost = [m for m, _ in seen.unbound if m.node not in alive_nodes]
    if lost:
        text = f"node {lost[0].node} went away before {lost[0].name} was bound to it"
        return _begin_roll_back(plan, "NodeLost", text)
    taken = [m for m, _ in seen.unbound if m.node in overfull]
    if taken and len(plan.spec.members) - len(seen.gone) - len(taken) >= max(least, 1):
        return Next(_without(plan, taken), [])  # the surplus need not hold up the quorum
    if taken:
        text = f"the room on node {taken[0].node} was taken by others before {taken[0].name} was bound to it"
        return _begin_roll_back(plan, "RoomTaken", text)
    return None


def _provision(
    plan: GangPlan,
    seen: _Seen,
    alive_nodes: Mapping[str, bool],
    beside: int,
    elapsed_seconds: float,
    volumes: Mapping[str, Progress],
    overfull: Set[str],
) -> Next:
    least = plan.spec.min_member - beside
    hopeless = _hopeless(plan, seen, alive_nodes, overfull, least)
    if hopeless is not None:
        return hopeless
    state = {m.uid: volumes.get(m.uid, Progress()) for m, _ in seen.unbound}
    failed = [m for m, _ in seen.unbound if state[m.uid].state == "Failed"]
    waits = [m for m, _ in seen.unbound if state[m.uid].state == "Open"]
    late = elapsed_seconds >= VOLUME_SECONDS
    dropped = failed + (waits if late else [])
    if dropped:
        if len(plan.spec.members) - len(seen.gone) - len(dropped) >= max(least, 1):
            return Next(_without(plan, dropped), [])  # the surplus need not hold up the quorum
        text = state[dropped[0].uid].text + ("" if failed else f" for {elapsed_seconds:.0f} s")
        return _begin_roll_back(plan, "VolumeFailed" if failed else "VolumeTimeout", f"{dropped[0].name}: {text}")
    if not waits:
        return Next(_in(plan, "Binding", "Binding", f"binding {len(seen.unbound)} members"), [])
    return Next(plan, [BindVolumes(p, m.node) for m, p in seen.unbound if state[m.uid].todo])


def _without(plan: GangPlan, dropped: list[PlannedMember]) -> GangPlan:
    members = [m for m in plan.spec.members if m not in dropped]
    return msgspec.structs.replace(plan, spec=msgspec.structs.replace(plan.spec, members=members))


def take_back(plan: GangPlan) -> GangPlan:
    """A plan that came late: the room that it is made for may have been given to others since."""
    return _begin_roll_back(plan, "PlanTooLate", "it was written after its time: nothing of it was bound").plan


def _begin_roll_back(plan: GangPlan, reason: str, message: str) -> Next:
    return Next(_in(plan, "RollingBack", reason, message), [])


def _roll_back(plan: GangPlan, seen: _Seen, alive_nodes: Mapping[str, bool], volumes: Mapping[str, Progress]) -> Next:
    """Delete what is bound, unstarted members first; pods without an owner would be lost for ever and are left.

    What is leaving a dead node is as good as gone: no kubelet will ever say so. Volumes that there are already stay:
    they are their claims'.
    """
    asked = [ReleaseVolumes(p) for m, p in seen.unbound if volumes.get(m.uid, Progress()).written]
    bound = [p for _, p in (*seen.bound, *seen.accepted) if not p.terminal]
    there = [p for p in bound if not (p.deleting and not alive_nodes.get(p.spec.node_name))]
    steps: list[Step] = [Delete(p, plan.status.reason) for p in there if owned(p) and not p.deleting]
    if asked or any(owned(p) for p in there):
        return Next(plan, [*steps, *asked])
    left = [p.metadata.name for p in there]
    text = f"{plan.status.message}; taken back"
    if left:
        text += f", but for {', '.join(left)}: a pod without an owner is never deleted"
    emptied = msgspec.structs.replace(plan.spec, plan_id="", note="", began=None, members=[])
    waiting = _in(plan, "Waiting", plan.status.reason, text)
    return Next(msgspec.structs.replace(waiting, spec=emptied), [])


def _in(plan: GangPlan, phase: PlanPhase, reason: str, message: str) -> GangPlan:
    text = f"{message}; {plan.spec.note}" if plan.spec.note else message
    status: GangPlanStatus = msgspec.structs.replace(plan.status, phase=phase, reason=reason, message=text)
    return msgspec.structs.replace(plan, status=status)
