"""What the watches tell, brought into the cluster; which gangs must be looked at again is kept in `dirty`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from colocate.kube.client import (
    ATTACHMENTS,
    BUDGETS,
    CLAIMS,
    CSI_DRIVERS,
    CSI_NODES,
    NAMESPACES,
    NODES,
    PODS,
    STORAGE_CAPACITIES,
    STORAGE_CLASSES,
    VOLUMES,
)
from colocate.kube.reflector import Object, either
from colocate.objects import (
    Claim,
    CsiDriver,
    CsiNode,
    CsiStorageCapacity,
    DisruptionBudget,
    Namespace,
    Node,
    ObjectMeta,
    PersistentVolume,
    Pod,
    StorageClass,
    VolumeAttachment,
)
from podgroup.api import PLANS, POWER_BUDGETS, GangPlan, PodGroup, PowerBudget
from podgroup.controller.lost_nodes import LostNodes
from podgroup.dialects.scheduling_sigs import DIALECT
from podgroup.queue.entry import MADE_ANEW_LABEL
from podgroup.queue.queue import Queue
from podgroup.state.cluster import CARRIED_ON, Cluster
from podgroup.state.gangs import gang_key, rejected
from podgroup.state.node_budgets import of_power_budget

_OFFSET = time.time() - time.monotonic()


def now_seconds() -> float:
    """Seconds since the epoch as they were at the start, and the monotonic clock from then on: it never jumps."""
    return _OFFSET + time.monotonic()


class Feed:
    """Handlers of the watches; each is called with the object before and now."""

    def __init__(
        self, cluster: Cluster, queue: Queue, touched: Callable[[str], None], refused: Callable[[str], None]
    ) -> None:
        self._cluster, self._queue, self._touched, self._refused = cluster, queue, touched, refused
        self.dirty: set[str] = set()
        self.lost_nodes = LostNodes(queue.settings)
        """Nodes that have been deleted and not been looked at since."""
        self.lost_members: set[str] = set()
        """Gangs that have lost a member since: the place that is kept is to be written down."""
        self.wake = asyncio.Event()
        self.busy: dict[str, float] = {}
        """uids of pods and keys of plans that a write is under way for -> when it began."""

    def watched(self) -> list[tuple[str, Any, Callable[[Any, Any], None]]]:
        """(collection, kind, handler), in the order in which they must be known."""
        return [
            (NODES, Node, self.on_node),
            (NAMESPACES, Namespace, self.on_namespace),
            (STORAGE_CLASSES, StorageClass, self.on_storage_class),
            (CSI_DRIVERS, CsiDriver, self.on_driver),
            (STORAGE_CAPACITIES, CsiStorageCapacity, self.on_capacity),
            (VOLUMES, PersistentVolume, self.on_volume),
            (CLAIMS, Claim, self.on_claim),
            (CSI_NODES, CsiNode, self.on_csi_node),
            (ATTACHMENTS, VolumeAttachment, self.on_attachment),
            (BUDGETS, DisruptionBudget, self.on_budget),
            (POWER_BUDGETS, PowerBudget, self.on_power_budget),
            (*DIALECT.groups, self.on_written_group),
            (PLANS, GangPlan, self.on_plan),
            (PODS, Pod, self.on_pod),
        ]

    def look_again(self, *keys: str) -> None:
        """These gangs may have changed."""
        self.dirty.update(keys)
        self.wake.set()

    def on_node(self, before: Node | None, now: Node | None) -> None:
        """A node has come, changed or gone."""
        node = either(before, now)
        if now is not None:
            if not self._cluster.set_node(now):
                return
        else:
            self._cluster.remove_node(node.metadata.name)
            self.lost_nodes.gone(node.metadata.name, now_seconds())
        for key, plan in self._cluster.plans.items():
            if plan.status.phase in CARRIED_ON and any(m.node == node.metadata.name for m in plan.spec.members):
                self.dirty.add(key)
        self.wake.set()

    def on_pod(self, before: Pod | None, now: Pod | None) -> None:
        """A pod has come, changed or gone; also from an answer that was faster than the watch."""
        pod = either(before, now)
        uid, key = pod.metadata.uid, gang_key(pod)
        known = self._cluster.pods.get(uid)
        if now is not None and known is not None and older(now.metadata, known.metadata):
            return
        holding = self._cluster.ledger.holdings.get(uid)
        if holding is None and now is not None and now.spec.node_name and not now.terminal:  # somebody else's doing
            self.look_again(*self._cluster.planned_on(now.spec.node_name))
        if known is not None and gang_key(known) != key:
            self._cluster.remove_pod(uid)
            self.dirty.add(gang_key(known))
        if now is not None:
            self._cluster.set_pod(now)
        else:
            self._cluster.remove_pod(uid)
        if now is not None and rejected(now) and known is not None and not known.terminal:
            self._refused(now.status.reason)
        ended = now is not None and now.terminal and not rejected(now)
        failed = ended and pod.status.phase == "Failed" and not pod.deleting
        if holding is not None and (
            now is None or failed or (ended and pod.deleting)
        ):  # told to go, it ends either way
            made_anew = MADE_ANEW_LABEL in pod.metadata.labels
            self._queue.lost(self._cluster, holding, key, now_seconds(), failed or _disrupted(pod), made_anew)
            self.lost_members.add(key)
        if now is None or now.spec.node_name:
            self.busy.pop(uid, None)
        if pod.status.nominated_node_name or (known is not None and known.status.nominated_node_name):
            self._queue.nominated(self._cluster, pod)
        self._touched(key)
        self.look_again(key)

    def on_written_group(self, before: Any, now: Any) -> None:
        """A group has come, changed or gone, in the words of its users."""
        self.on_group(*(None if written is None else DIALECT.group(written) for written in (before, now)))

    def on_group(self, before: PodGroup | None, now: PodGroup | None) -> None:
        """A group has come, changed or gone; a change of its status is our own doing."""
        group = either(before, now)
        key = f"{group.metadata.namespace}/{group.metadata.name}"
        if now is not None:
            self._cluster.groups[key] = now
        else:
            self._cluster.groups.pop(key, None)
        self._touched(key)
        if (
            now is None
            or before is None
            or before.spec != now.spec
            or before.metadata.annotations != now.metadata.annotations
        ):
            self.look_again(key)

    def on_plan(self, before: GangPlan | None, now: GangPlan | None) -> None:
        """A plan has been written, by us or by a former leader."""
        plan = either(before, now)
        key = f"{plan.metadata.namespace}/{plan.metadata.name}"
        known = self._cluster.plans.get(key)
        if now is None:
            if known is None or known.metadata.uid == plan.metadata.uid:
                self._cluster.remove_plan(key)
        elif known is None or older(known.metadata, now.metadata):
            self._cluster.set_plan(key, now)
        self.look_again(key)

    def on_claim(self, before: Claim | None, now: Claim | None) -> None:
        """A claim has been bound, or has gone."""
        claim = either(before, now)
        key, storage = f"{claim.metadata.namespace}/{claim.metadata.name}", self._cluster.storage
        known = storage.claims.get(key)
        if now is not None and known is not None and older(now.metadata, known.metadata):
            return
        if storage.set_claim(key, now):
            self.look_again(*self._cluster.waiting_with(key))

    def on_namespace(self, before: Namespace | None, now: Namespace | None) -> None:
        """A namespace has come, has other labels, or has gone."""
        namespace = either(before, now)
        if self._cluster.set_namespace(namespace.metadata.name, now.metadata.labels if now is not None else None):
            self.look_again(*self._cluster.looking_at_namespaces())

    def on_volume(self, before: PersistentVolume | None, now: PersistentVolume | None) -> None:
        """A volume has come, or has gone."""
        volume = either(before, now)
        name, storage = volume.metadata.name, self._cluster.storage
        known = storage.volumes.get(name)
        if now is not None and known is not None and older(now.metadata, known.metadata):
            return
        if storage.set_volume(name, now):
            self.look_again(*self._cluster.waiting_for_volumes())

    def on_storage_class(self, before: StorageClass | None, now: StorageClass | None) -> None:
        """A StorageClass has come, changed or gone."""
        self._cluster.storage.set_class(_name(before, now), now)
        self.look_again(*self._cluster.waiting_for_volumes())

    def on_driver(self, before: CsiDriver | None, now: CsiDriver | None) -> None:
        """A CSIDriver has come, changed or gone."""
        if before is None or now is None or before.spec != now.spec:
            self._cluster.storage.set_driver(_name(before, now), now)
            self.look_again(*self._cluster.waiting_for_volumes())

    def on_capacity(self, before: CsiStorageCapacity | None, now: CsiStorageCapacity | None) -> None:
        """How much can be stored somewhere has changed."""
        meta = either(before, now).metadata
        self._cluster.storage.set_capacity(f"{meta.namespace}/{meta.name}", now)
        self.look_again(*self._cluster.waiting_for_volumes())

    def on_csi_node(self, before: CsiNode | None, now: CsiNode | None) -> None:
        """The drivers of a node have changed."""
        self._cluster.set_csi_node(_name(before, now), now)
        self.wake.set()

    def on_attachment(self, before: VolumeAttachment | None, now: VolumeAttachment | None) -> None:
        """A volume has been attached to a node, or detached."""
        node = self._cluster.storage.set_attachment(_name(before, now), now)
        self._cluster.set_attachments(node)
        self.wake.set()

    def on_budget(self, before: DisruptionBudget | None, now: DisruptionBudget | None) -> None:
        """A PodDisruptionBudget has changed."""
        budget = either(before, now)
        key = f"{budget.metadata.namespace}/{budget.metadata.name}"
        if now is not None:
            self._cluster.budgets[key] = now
        else:
            self._cluster.budgets.pop(key, None)

    def on_power_budget(self, before: PowerBudget | None, now: PowerBudget | None) -> None:
        """A PowerBudget has come, changed or gone; a change of its status is our own doing."""
        if now is not None and (before is None or before.spec != now.spec):
            self._cluster.set_node_budget(of_power_budget(now))
        elif now is None:
            self._cluster.remove_node_budget(_name(before, now))
        self.wake.set()


def _name(before: Object | None, now: Object | None) -> str:
    return either(before, now).metadata.name


def older(one: ObjectMeta, other: ObjectMeta) -> bool:
    """Whether one version of an object is older than another (resource versions are comparable: KEP-5504)."""
    a, b = one.resource_version, other.resource_version
    return a.isdigit() and b.isdigit() and int(a) < int(b)


def _disrupted(pod: Pod) -> bool:
    """Whether a pod was evicted, preempted or lost with its node (KEP-3329), not just deleted."""
    return any(c.type == "DisruptionTarget" and c.status == "True" for c in pod.status.conditions)
