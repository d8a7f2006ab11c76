"""A cluster at one instant, as a file: what a cycle decides on can be decided again elsewhere, byte for byte."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from colocate import __version__
from colocate.errors import BadInput, StateTooNew
from colocate.objects import (
    Claim,
    CsiDriver,
    CsiNode,
    CsiStorageCapacity,
    DisruptionBudget,
    Lean,
    Namespace,
    Node,
    ObjectMeta,
    PersistentVolume,
    Pod,
    PriorityClass,
    StorageClass,
    VolumeAttachment,
)
from colocate.units import parse_time
from podgroup.api import Advice, GangPlan, PlannedMember, PodGroup
from podgroup.explain.advice import advise
from podgroup.explain.losses import EvictedMember, HeldBackMember
from podgroup.policy import policy_named
from podgroup.queue.decisions import Decisions
from podgroup.queue.entry import Settings
from podgroup.queue.memory import QueueMemory
from podgroup.queue.queue import Queue
from podgroup.state.cluster import Cluster
from podgroup.state.gangs import gang_key
from podgroup.state.node_budgets import NodeSetBudget

KIND = "ClusterSnapshot"
DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"
VERSION = 2


Outcome = Literal["Start", "Preempt", "Wait", "Rest"]


class Verdict(Lean, frozen=True):
    """What a cycle decides about one gang."""

    gang: str
    outcome: Outcome
    """Rest: it waits for nothing."""
    reason: str = ""
    message: str = ""
    surplus: int = 0
    """Members beyond those that have no room yet."""
    members: list[PlannedMember] = msgspec.field(default_factory=list)
    """Where each is bound; for Preempt, when the victims have gone."""
    victims: list[str] = msgspec.field(default_factory=list)
    """namespace/name"""


class ClusterSnapshot(Lean, frozen=True):
    """Everything that a cycle looks at."""

    taken: str
    kind: str = ""
    version: int = 0
    colocate: str = __version__
    settings: Settings = Settings()
    nodes: list[Node] = msgspec.field(default_factory=list)
    pods: list[Pod] = msgspec.field(default_factory=list)
    groups: list[PodGroup] = msgspec.field(default_factory=list)
    plans: list[GangPlan] = msgspec.field(default_factory=list)
    claims: list[Claim] = msgspec.field(default_factory=list)
    volumes: list[PersistentVolume] = msgspec.field(default_factory=list)
    storage_classes: list[StorageClass] = msgspec.field(default_factory=list)
    csi_drivers: list[CsiDriver] = msgspec.field(default_factory=list)
    csi_nodes: list[CsiNode] = msgspec.field(default_factory=list)
    storage_capacities: list[CsiStorageCapacity] = msgspec.field(default_factory=list)
    attachments: list[VolumeAttachment] = msgspec.field(default_factory=list)
    namespaces: list[Namespace] = msgspec.field(default_factory=list)
    budgets: list[DisruptionBudget] = msgspec.field(default_factory=list)
    node_budgets: list[NodeSetBudget] = msgspec.field(default_factory=list)
    classes: list[PriorityClass] = msgspec.field(default_factory=list)
    verdicts: list[Verdict] = msgspec.field(default_factory=list)
    """What was decided on it when it was taken."""
    memory: QueueMemory | None = None
    """Of the controller that has decided; without it the queue knows what plans and pods say."""

    @property
    def now(self) -> float:
        """Seconds since the epoch."""
        return self.memory.now if self.memory is not None else parse_time(self.taken)


class Explanation(Lean, frozen=True):
    """Why a gang waits, what would change that, and what the services of its nodes cost it."""

    verdict: Verdict
    position: int
    advice: Advice | None
    held_back: list[HeldBackMember] = msgspec.field(default_factory=list)
    """Members that get less than they could use, for the services of their nodes."""
    evicted: list[EvictedMember] = msgspec.field(default_factory=list)
    """Members that had to go for services, as long as the API server keeps its Events; the last one first."""


def load(content: bytes) -> ClusterSnapshot:
    """Read a snapshot. Raises BadInput, StateTooNew."""
    try:
        snapshot = msgspec.json.decode(content, type=ClusterSnapshot)
    except msgspec.MsgspecError as error:
        raise BadInput(f"this is no cluster snapshot: {error}") from error
    if snapshot.kind != KIND:
        raise BadInput(f"this is no cluster snapshot: its kind is {snapshot.kind!r}, not {KIND!r}")
    if snapshot.version > VERSION:
        raise StateTooNew(f"the snapshot is of version {snapshot.version}; this colocate knows up to {VERSION}")
    if snapshot.version < 1 or not snapshot.settings.schedulers:
        raise BadInput("this is no cluster snapshot: its version or its settings.schedulers is missing; take it again")
    try:
        restore(snapshot)
    except ValueError as error:
        raise BadInput(f"this is no cluster snapshot: {error}") from error
    return snapshot


def restore(snapshot: ClusterSnapshot) -> tuple[Cluster, Queue]:
    """The cluster of a snapshot, and a queue that knows since when each gang has waited."""
    memory, now = snapshot.memory, snapshot.now
    cluster = Cluster(policy_named(snapshot.settings.policy))
    queue = Queue(snapshot.settings, memory.searches if memory is not None else None)
    for node in snapshot.nodes:
        cluster.set_node(node)
    for of_nodes in snapshot.node_budgets:
        try:
            cluster.set_node_budget(of_nodes)
        except ValueError as error:
            raise BadInput(f"nodeBudgets: {of_nodes.name}: amount: {error}") from error
    for namespace in snapshot.namespaces:
        cluster.set_namespace(namespace.metadata.name, namespace.metadata.labels)
    _restore_storage(snapshot, cluster)
    for budget in snapshot.budgets:
        cluster.budgets[f"{budget.metadata.namespace}/{budget.metadata.name}"] = budget
    for group in snapshot.groups:
        cluster.groups[f"{group.metadata.namespace}/{group.metadata.name}"] = group
    for pod in snapshot.pods:
        cluster.set_pod(pod)
    for pod in snapshot.pods:
        if pod.status.nominated_node_name:
            queue.nominated(cluster, pod)
    for plan in snapshot.plans:
        cluster.set_plan(f"{plan.metadata.namespace}/{plan.metadata.name}", plan)
    if memory is not None:
        queue.recall(cluster, memory)
    else:
        queue.remember(cluster, now)
    return cluster, queue


def _restore_storage(snapshot: ClusterSnapshot, cluster: Cluster) -> None:
    storage = cluster.storage
    for made_by in snapshot.storage_classes:
        storage.set_class(made_by.metadata.name, made_by)
    for driver in snapshot.csi_drivers:
        storage.set_driver(driver.metadata.name, driver)
    for capacity in snapshot.storage_capacities:
        storage.set_capacity(f"{capacity.metadata.namespace}/{capacity.metadata.name}", capacity)
    for claim in snapshot.claims:
        storage.set_claim(f"{claim.metadata.namespace}/{claim.metadata.name}", claim)
    for volume in snapshot.volumes:
        storage.set_volume(volume.metadata.name, volume)
    for csi_node in snapshot.csi_nodes:
        cluster.set_csi_node(csi_node.metadata.name, csi_node)
    for attachment in snapshot.attachments:
        cluster.set_attachments(storage.set_attachment(attachment.metadata.name, attachment))


def decide(snapshot: ClusterSnapshot) -> list[Verdict]:
    """What a cycle decides on this snapshot, in the order of the queue."""
    cluster, queue = restore(snapshot)
    return verdicts_of(cluster, queue, queue.cycle(cluster, {*cluster.members, *cluster.groups}, snapshot.now))


def verdicts_of(cluster: Cluster, queue: Queue, decided: Decisions) -> list[Verdict]:
    """What a cycle that has looked at every gang has decided, in the order of the queue."""
    found = {
        start.key: Verdict(
            gang=start.key,
            outcome="Start",
            message=start.note,
            surplus=sum(not p.spec.node_name and not p.terminal for p in cluster.pods_of(start.key))
            - len(start.placed),
            members=[PlannedMember(name=m.name, uid=m.uid, node=node) for m, node in start.placed],
        )
        for start in decided.starts
    }
    for key, memory in queue.waiting.items():
        found[key] = Verdict(gang=key, outcome="Wait", reason=memory.reason, message=memory.message)
    for key, preemption in decided.evictions:
        found[key] = Verdict(
            gang=key,
            outcome="Preempt",
            reason="WaitingForPreemption",
            message=queue.waiting[key].message,
            members=[PlannedMember(name=m.name, uid=m.uid, node=node) for m, node in preemption.placed],
            victims=[f"{p.metadata.namespace}/{p.metadata.name}" for p in preemption.victims],
        )
    return [found[key] for key in queue.order if key in found]


def _with_default_class(claim: Claim, classes: Sequence[StorageClass]) -> Claim:
    """What the DefaultStorageClass admission plugin makes of a claim that names no class."""
    default = [c for c in classes if c.metadata.annotations.get(DEFAULT_CLASS) == "true"]
    if claim.spec.storage_class_name is not None or not default:
        return claim
    newest = max(default, key=lambda c: (c.metadata.creation_timestamp or "", c.metadata.name))
    spec = msgspec.structs.replace(claim.spec, storage_class_name=newest.metadata.name)
    return msgspec.structs.replace(claim, spec=spec)


def taken_of(cluster: Cluster, settings: Settings, taken: str) -> ClusterSnapshot:
    """The cluster as it is known, without what was decided on it."""
    storage = cluster.storage
    return ClusterSnapshot(
        taken=taken,
        kind=KIND,
        version=VERSION,
        settings=settings,
        nodes=cluster.ledger.nodes(),
        pods=list(cluster.pods.values()),
        groups=list(cluster.groups.values()),
        plans=list(cluster.plans.values()),
        claims=list(storage.claims.values()),
        volumes=list(storage.volumes.values()),
        storage_classes=list(storage.classes.values()),
        csi_drivers=list(storage.drivers.values()),
        csi_nodes=storage.csi_nodes(),
        storage_capacities=[capacity for capacity, _ in storage.capacities.values()],
        attachments=storage.attachments(),
        namespaces=[Namespace(metadata=ObjectMeta(name=n, labels=dict(its))) for n, its in cluster.namespaces.items()],
        budgets=list(cluster.budgets.values()),
        node_budgets=cluster.ledger.budgets(),
    )


def what_if(
    snapshot: ClusterSnapshot, pods: list[Pod], groups: list[PodGroup], claims: Sequence[Claim] = ()
) -> list[Verdict]:
    """What the next cycle would decide about these, were they created now. A claim that is there already stays."""
    there = {(c.metadata.namespace, c.metadata.name) for c in snapshot.claims}
    new = [c for c in claims if (c.metadata.namespace, c.metadata.name) not in there]
    new = [_with_default_class(c, snapshot.storage_classes) for c in new]
    more = msgspec.structs.replace(
        snapshot,
        pods=[*snapshot.pods, *pods],
        groups=[*snapshot.groups, *groups],
        claims=[*snapshot.claims, *new],
    )
    asked = {gang_key(p) for p in pods} | {f"{g.metadata.namespace}/{g.metadata.name}" for g in groups}
    found = {verdict.gang: verdict for verdict in decide(more)}
    busy = "what this gang has planned already is being carried out or taken back: ask again"
    return [found.get(key) or Verdict(gang=key, outcome="Wait", reason="Busy", message=busy) for key in sorted(asked)]


def explain(snapshot: ClusterSnapshot, key: str) -> Explanation | None:
    """Why this gang waits; None if it does not."""
    cluster, queue = restore(snapshot)
    now, everybody = snapshot.now, {*cluster.members, *cluster.groups}
    verdicts = {v.gang: v for v in verdicts_of(cluster, queue, queue.cycle(cluster, everybody, now))}
    if key not in verdicts:
        return None
    advice = list(advise(cluster, queue, key, now))
    return Explanation(
        verdict=verdicts[key], position=queue.order.index(key) + 1, advice=advice[-1] if advice else None
    )
