"""One gang as the queue sees it: who is there, what is missing, and what the solver is asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import NamedTuple

import msgspec
import numpy as np

from colocate.objects import Pod
from colocate.units import seconds_of
from podgroup.api import GangPlan, PodGroup
from podgroup.policy import DEFAULT, Gangs
from podgroup.queue.min_resources import unused_min_resources
from podgroup.solve.question import Debt, Gang, Member
from podgroup.state.cluster import CARRIED_ON, HOLDING_PHASES, Cluster
from podgroup.state.gangs import Members, is_group, sort_members
from podgroup.state.shape import amounts

REQUIRED_TOPOLOGY = "colocate.io/required-topology"
PREFERRED_TOPOLOGY = "colocate.io/preferred-topology"
CREATION_DEPENDENCY = "colocate.io/creation-dependency"
STAGED_OWNERS = frozenset({"MPIJob", "RayCluster"})
STAGED_LABELS = {
    "jobset.sigs.k8s.io/jobset-name": "",
    "leaderworkerset.sigs.k8s.io/name": "",
    "ray.io/originated-from-crd": "RayJob",
}
"""Operators that make some members only after others are ready: by a label that they put on every pod, with its value
("": any), or else by the owner of their pods. The pods of a JobSet are a Job's, those of a LeaderWorkerSet a
StatefulSet's; a RayCluster may be a RayJob's, and only newer operators say so."""
MADE_ANEW_LABEL = "leaderworkerset.sigs.k8s.io/name"
"""On the pods of an operator that deletes all members and makes them anew when one has gone; it cannot suspend."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator chooses."""

    schedulers: tuple[str, ...] = ("colocate",)
    """The `schedulerName`s that we answer to."""
    policy: str = DEFAULT.id
    """The id of the order of gangs and nodes (policy.py)."""
    topology: tuple[str, ...] = ("topology.kubernetes.io/zone", "topology.kubernetes.io/rack", "kubernetes.io/hostname")
    """Node labels from the broadest to the narrowest: gangs go into as few domains as they can."""
    timeout_seconds: int = 60
    """From the first bind to the last acceptance, where a PodGroup says nothing or 0."""
    creation_grace_seconds: float = 30.0
    """A group whose owner makes no more members for so long, though it has not reached its quorum, waits for its own
    start: what is there is started, with the room of the rest reserved."""
    slot_seconds: float = 60.0
    """For how long the place of a lost member is held for its replacement."""
    node_loss_grace_seconds: float = 40.0
    """For how long a node's object must have been gone before its members are given up, as PodGC waits."""
    most_lost_nodes_ratio: float = 0.34
    """If more of the nodes have vanished together, nothing is given up: that is no loss of nodes."""
    most_lost_gangs: int = 10
    """So many gangs at most lose members to vanished nodes within one grace period."""
    reserve_after_seconds: float = 60.0
    reservation_seconds: float = 600.0
    """The head's claim lasts so long after it last grew; as long again it has none. What a gang that has started is
    still owed of its minResources is kept as long."""


Order = tuple[int, bool, bool, float, str, str]
"""Priority; within it quorums before members that are only wished for, repairs first; then what the policy says, age,
and name."""


class Entry(NamedTuple):
    """One gang in the queue."""

    key: str
    members: Members
    group: PodGroup | None
    broken: bool
    """It runs with less than the quorum with which it started."""
    need: int
    priority: int
    owed: bool
    """It has not yet what minResources speaks of (a driver's executors): more members are no mere wish."""
    order: Order


def entry_of(cluster: Cluster, key: str, settings: Settings) -> Entry | None:
    """A gang's entry; None if it waits for nothing, or what it waits for is under way already."""
    uids = cluster.members.get(key, set())
    plan = cluster.plans.get(key)
    under_way = plan is not None and plan.status.phase in HOLDING_PHASES
    if under_way or any(uid in cluster.planned for uid in uids):
        return None
    pods, group = cluster.pods_of(key), cluster.groups.get(key)
    members = sort_members(pods, settings.schedulers)
    ours = bool(members.pending or members.gated)
    if not ours and (group is None or not pods or members.satisfied or members.foreign):
        return None  # of a group without pods nobody knows whose it is
    need = max((group.spec.min_member if group is not None else 1) - members.satisfied, 0)
    first = min((p.metadata.creation_timestamp or "" for p in pods), default="")
    created = (group.metadata.creation_timestamp or "") if group is not None else first
    broken, priority = _broken(members, group, plan), members.priority
    owed = _is_owed(cluster, key, members, group)
    wished = _wished_order(cluster, members, need, created)
    order = (-priority, need == 0 and not owed, not broken, wished, created, key)
    return Entry(key, members, group, broken, need, priority, owed, order)


def _wished_order(cluster: Cluster, members: Members, need: int, created: str) -> float:
    """What the policy says of one gang."""
    policy, ledger = cluster.ledger.policy, cluster.ledger
    if policy.order is None:
        return 0.0
    requests = np.zeros((1, len(ledger.columns)), dtype=np.int64)
    for pod in members.pending:
        for resource, amount in cluster.shape(pod).requests:
            if resource in ledger.columns:
                requests[0, ledger.columns[resource]] += amount
    gangs = Gangs(
        created=np.array([seconds_of(created) or 0.0]),
        members=np.array([len(members.pending)]),
        quorum=np.array([need]),
        requests=requests,
        columns=ledger.columns,
    )
    return float(policy.order(gangs)[0])


def _is_owed(cluster: Cluster, key: str, members: Members, group: PodGroup | None) -> bool:
    if group is None or not group.spec.min_resources:
        return False
    there = [cluster.shape(p) for p in (*members.bound, *members.succeeded)]
    try:
        return bool(unused_min_resources(cluster, key, there))
    except ValueError:
        return False  # which it is told, once it is asked about


def _broken(members: Members, group: PodGroup | None, plan: GangPlan | None) -> bool:
    """Whether a gang that runs lacks members that it had: who asks for more than he started with lacks nothing."""
    least = group.spec.min_member if group is not None else 1
    if plan is not None and plan.spec.began:
        least = min(least, plan.spec.min_member)
    return bool(members.bound) and members.satisfied < least


def not_ready(cluster: Cluster, entry: Entry, settings: Settings, still_seconds: float) -> tuple[str, str] | None:
    """Why a gang cannot be tried yet, whatever room there is: reason and message.

    `still_seconds` is for how long no member has been added.
    """
    members, group = entry.members, entry.group
    invalid = _invalid(entry)
    if invalid is not None:
        return invalid
    if members.foreign:
        other = members.foreign[0]
        message = f"{other.metadata.name} has schedulerName {other.spec.scheduler_name}"
        return "SchedulerNameMismatch", f"{message}: all members need {', '.join(sorted(settings.schedulers))}"
    for pod in members.pending:
        shape = cluster.shape(pod)
        if shape.unsupported:
            return "UnsupportedConstraint", f"UnsupportedConstraint: {shape.unsupported} (pod {pod.metadata.name})"
    if len(members.pending) >= entry.need and members.pending:
        return None
    if members.gated and members.created >= members.satisfied + entry.need:
        gates = sorted({g.name for p in members.gated for g in p.spec.scheduling_gates})
        return "SchedulingGated", f"{len(members.gated)} members are held by scheduling gates: {', '.join(gates)}"
    settled, plan = still_seconds >= settings.creation_grace_seconds, cluster.plans.get(entry.key)
    runs = bool(members.bound) and plan is not None and bool(plan.spec.began) and plan.status.phase not in CARRIED_ON
    if members.pending and not members.gated and settled and (runs or _waits_for_itself(entry)):
        return None  # its quorum counts for a start; once it has started, later members follow what is there
    least = group.spec.min_member if group is not None else 1
    message = f"{members.created} of {least} members exist"
    if members.failed:
        message += f"; {members.failed[0].metadata.name} failed and was not replaced"
    elif group is not None and members.pending and not _waits_for_itself(entry):
        message += f' (made only after these run? then annotate the PodGroup with {CREATION_DEPENDENCY}: "true")'
    return "NotEnoughMembers", message


def _invalid(entry: Entry) -> tuple[str, str] | None:
    group = entry.group
    if group is None:
        missing = f"there is no PodGroup {entry.key.partition('/')[2]} in this namespace"
        return ("PodGroupNotFound", missing) if is_group(entry.key) else None
    if group.spec.min_member < 1:
        return "InvalidPodGroup", f"spec.minMember is {group.spec.min_member}: it must be at least 1"
    if (group.spec.schedule_timeout_seconds or 0) < 0:
        wrong = group.spec.schedule_timeout_seconds
        return "InvalidPodGroup", f"spec.scheduleTimeoutSeconds is {wrong}: it must be at least 0"
    try:
        amounts(group.spec.min_resources)
    except ValueError as error:
        return "InvalidPodGroup", f"spec.minResources: {error}"
    return None


def _waits_for_itself(entry: Entry) -> bool:
    """Whether the owner may make the missing members only after these run (mpi-operator#608).

    Of owners that are known to, or where the PodGroup says so. What has completed is an earlier stage of the same run:
    members of former runs are not counted.
    """
    members, group = entry.members, entry.group
    if group is None:
        return False
    if group.metadata.annotations.get(CREATION_DEPENDENCY) == "true":
        return True
    return any(_is_staged(p) for p in members.pending)


def _is_staged(pod: Pod) -> bool:
    labels = pod.metadata.labels
    said = [value in ("", labels[key]) for key, value in STAGED_LABELS.items() if key in labels]
    return any(said) if said else any(owner.kind in STAGED_OWNERS for owner in pod.metadata.owner_references)


def question(cluster: Cluster, entry: Entry, settings: Settings, owed_to_others: tuple[Debt, ...]) -> tuple[Gang, str]:
    """What the solver is asked for this entry, and what to say about it."""
    members, group, note = entry.members, entry.group, ""
    quorum = min(entry.need, len(members.pending))
    if quorum < entry.need:
        missing = entry.need - quorum
        note = f"CreationDependency: {missing} members are made only after the others run; their room is reserved"
        if members.bound and not _waits_for_itself(entry):
            note = f"{missing} members are not there; those that are go on"
    annotations = group.metadata.annotations if group is not None else {}
    counted = [cluster.shape(p) for p in members.counted] if group is not None and group.spec.min_resources else []
    unused = unused_min_resources(cluster, entry.key, counted) if entry.need else {}
    gang = Gang(
        members=tuple(member_of(cluster, p) for p in members.pending),
        quorum=quorum,
        required_topology=annotations.get(REQUIRED_TOPOLOGY, ""),
        preferred_topology=_preferred(annotations, settings),
        fixed=tuple(p.spec.node_name for p in members.bound),
        min_resources=unused,
        leave=of_interest(owed_to_others, _taken(cluster, members.pending, unused)) if owed_to_others else (),
    )
    return gang, note


def elsewhere(
    cluster: Cluster, key: str, pods: Sequence[Pod], settings: Settings, owed_to_others: tuple[Debt, ...]
) -> Gang:
    """What the solver is asked for planned members that must go elsewhere, the others staying where they are."""
    group, uids = cluster.groups.get(key), {p.metadata.uid for p in pods}
    annotations = group.metadata.annotations if group is not None else {}
    others = [p for p in cluster.pods_of(key) if p.metadata.uid not in uids and not p.terminal]
    there = (p.spec.node_name or cluster.planned.get(p.metadata.uid, "") for p in others)
    return Gang(
        members=tuple(member_of(cluster, p) for p in pods),
        quorum=len(pods),
        required_topology=annotations.get(REQUIRED_TOPOLOGY, ""),
        preferred_topology=_preferred(annotations, settings),
        fixed=tuple(filter(None, there)),
        leave=of_interest(owed_to_others, _taken(cluster, pods, {})) if owed_to_others else (),
    )


def _preferred(annotations: Mapping[str, str], settings: Settings) -> tuple[str, ...]:
    """As few domains of which labels as possible: what the PodGroup says, or the operator."""
    said = annotations.get(PREFERRED_TOPOLOGY)
    return (said,) if said else settings.topology


def _taken(cluster: Cluster, pods: Iterable[Pod], unused: Mapping[str, int]) -> set[str]:
    """The resources that these pods and what is reserved beside them take."""
    return set(unused).union(*({r for r, _ in cluster.shape(p).requests} for p in pods))


def of_interest(owed: tuple[Debt, ...], resources: Set[str]) -> tuple[Debt, ...]:
    """The part of what others are owed that a gang which takes these resources could take from them."""
    parts = (d._replace(amounts={r: amount for r, amount in d.amounts.items() if r in resources}) for d in owed)
    return tuple(d for d in parts if d.amounts)


def member_of(cluster: Cluster, pod: Pod) -> Member:
    """A pod as the solver sees it."""
    meta = pod.metadata
    return Member(meta.uid, meta.name, meta.namespace, cluster.shape(pod), meta.labels)
