"""What is known of the cluster, fed object by object: nodes, pods, groups and plans, and the ledger that follows from
them.

A pod holds room from the moment it is planned until it has ended or is gone: a plan's members hold theirs before they
are bound, so nothing is promised twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TypeVar
from weakref import WeakValueDictionary

import msgspec

from colocate.objects import Claim, DisruptionBudget, LabelSelector, Node, NodeSelector, PersistentVolume, Pod
from podgroup.api import GangPlan, PodGroup
from podgroup.state.allocation import Holding
from podgroup.state.gangs import gang_key
from podgroup.state.large_plans import expand
from podgroup.state.ledger import Ledger
from podgroup.state.shape import Shape, matches, resized, selects_namespaces, shape_of, zones_of

T = TypeVar("T")
OPEN_PHASES = ("Binding", "Confirming")
HOLDING_PHASES = (*OPEN_PHASES, "RollingBack")
"""Phases of a plan in which its unbound members keep their room: a bind of theirs may still be on its way."""
CARRIED_ON = (*HOLDING_PHASES, "Repairing")
"""Phases of a plan in which the commit protocol has something to do."""
MAX_GAINS = 4096
BOUND = "pv.kubernetes.io/bind-completed"
"""Annotation of a claim whose binding to its volume is complete (volume.IsVolumeBound)."""


class Cluster:
    """The objects as last seen."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.pods: dict[str, Pod] = {}
        self.groups: dict[str, PodGroup] = {}
        self.plans: dict[str, GangPlan] = {}
        self.claims: dict[str, Claim] = {}
        self.volumes: dict[str, PersistentVolume] = {}
        self.budgets: dict[str, DisruptionBudget] = {}
        self.members: dict[str, set[str]] = {}
        """Gang -> uids of its pods."""
        self.planned: dict[str, str] = {}
        """uid -> the node that an open plan, or a bind under way, promises it."""
        self._intended: dict[str, str] = {}
        """uid -> node of the members of open plans, whether their pods are known yet or not."""
        self.priorities: Counter[int] = Counter()
        """Of the pods that are bound: priority -> how many."""
        self.gains: list[str] = []
        """Nodes that have gained room or have changed, one after the other; `gained` counts those that were cut off."""
        self.gained = 0
        self._priority: dict[str, int] = {}
        self._volumes_version = 0
        self._users: dict[str, set[str]] = {}
        """Claim -> uids of the pods on nodes that use it."""
        self._used: dict[str, list[str]] = {}
        """uid -> the claims that it uses."""
        self.namespaces: dict[str, Mapping[str, str]] = {}
        """Name -> labels."""
        self._namespaces_version = 0
        self._shapes: dict[str, tuple[tuple[object, ...], Shape]] = {}
        self._equal: WeakValueDictionary[bytes, Shape] = WeakValueDictionary()

    def set_node(self, node: Node) -> bool:
        """A node as it is now; False if nothing changed that matters here."""
        changed = self.ledger.set_node(node)
        if changed:
            self._gain(node.metadata.name)
        return changed

    def remove_node(self, name: str) -> None:
        """A node that is gone."""
        self.ledger.remove_node(name)

    def set_claim(self, key: str, claim: Claim | None) -> None:
        """A claim as it is now, or that it is gone."""
        _put(self.claims, key, claim)
        self._volumes_version += 1

    def set_volume(self, name: str, volume: PersistentVolume | None) -> None:
        """A volume as it is now, or that it is gone."""
        _put(self.volumes, name, volume)
        self._volumes_version += 1

    def set_namespace(self, name: str, labels: Mapping[str, str] | None) -> bool:
        """A namespace's labels as they are now, None if it is gone; False if nothing changed."""
        if self.namespaces.get(name) == labels:
            return False
        _put(self.namespaces, name, labels)
        self._namespaces_version += 1
        for uid in list(self.ledger.holdings):  # terms of pods that are there may look elsewhere now
            pod = self.pods.get(uid)
            if pod is not None and selects_namespaces(pod):
                self._hold(pod)
        return True

    def looking_at_namespaces(self) -> set[str]:
        """The gangs with unbound pods whose terms select namespaces by their labels."""
        return {
            gang_key(p)
            for p in self.pods.values()
            if p.spec.affinity is not None and not p.spec.node_name and not p.terminal and selects_namespaces(p)
        }

    def waiting_for_volumes(self) -> set[str]:
        """The gangs with unbound pods that use claims."""
        return {gang_key(p) for p in self.pods.values() if p.spec.volumes and not p.spec.node_name and not p.terminal}

    def set_pod(self, pod: Pod) -> None:
        """A pod as it is now."""
        self.pods[pod.metadata.uid] = pod
        self.members.setdefault(gang_key(pod), set()).add(pod.metadata.uid)
        uid = pod.metadata.uid
        if pod.spec.node_name:
            self.planned.pop(uid, None)
        elif uid in self._intended:
            self.planned.setdefault(uid, self._intended[uid])
        self._hold(pod)

    def remove_pod(self, uid: str) -> None:
        """A pod that is gone."""
        pod = self.pods.pop(uid, None)
        if pod is None:
            return
        key = gang_key(pod)
        self.members[key].discard(uid)
        if not self.members[key]:
            del self.members[key]
        self.planned.pop(uid, None)
        self._shapes.pop(uid, None)
        self._release(uid)

    def set_plan(self, key: str, plan: GangPlan) -> None:
        """A plan as it is now: while it is open, its members hold what they are promised."""
        self.remove_plan(key)
        self.plans[key] = plan = expand(plan)
        if plan.status.phase in HOLDING_PHASES:
            for member in plan.spec.members:
                self._intended[member.uid] = member.node
                self.promise(member.uid, member.node)

    def remove_plan(self, key: str) -> None:
        """A plan that is gone: what it promised and is not bound is free."""
        plan = self.plans.pop(key, None)
        for member in plan.spec.members if plan is not None else ():
            self._intended.pop(member.uid, None)
            self.withdraw(member.uid)

    def promise(self, uid: str, node: str) -> None:
        """A pod that is to be bound to a node holds its room there from now on."""
        pod = self.pods.get(uid)
        if pod is not None and not pod.spec.node_name:
            self.planned[uid] = node
            self._hold(pod)

    def withdraw(self, uid: str) -> None:
        """The promise is void."""
        if self.planned.pop(uid, None) is not None and uid in self.pods:
            self._hold(self.pods[uid])

    def release_hold(self, uid: str) -> None:
        """Room that was kept for somebody (holds.py) is free."""
        self._release(uid)

    def pods_of(self, key: str) -> list[Pod]:
        """The members of a gang, whatever their state."""
        return [self.pods[uid] for uid in self.members.get(key, ())]

    def shape(self, pod: Pod) -> Shape:
        """A pod's shape; equal ones are one object while the pod's specification is the same."""
        uid, seen = pod.metadata.uid, (pod.spec, self._seen_beside(pod), resized(pod))
        cached = self._shapes.get(uid)
        if cached is None or cached[0] != seen:
            shape = shape_of(pod, partial(self._where, uid), self._namespaces_of)
            cached = self._shapes[uid] = (seen, self._equal.setdefault(msgspec.json.encode(shape), shape))
        return cached[1]

    def _seen_beside(self, pod: Pod) -> tuple[int, int]:
        """The versions of what a shape depends on that is not in the pod."""
        volumes = self._volumes_version if pod.spec.volumes else 0
        return volumes, self._namespaces_version if pod.spec.affinity is not None and selects_namespaces(pod) else 0

    def _namespaces_of(self, selector: LabelSelector) -> tuple[str, ...]:
        return tuple(name for name, labels in self.namespaces.items() if matches(selector, labels))

    def _where(self, uid: str, namespace: str, name: str) -> tuple[NodeSelector, ...] | str:
        """From where a pod can reach the volume of a claim, or why nobody knows, or why it may not."""
        claim = self.claims.get(f"{namespace}/{name}")
        if claim is None:
            return "the claim does not exist"
        if not claim.spec.volume_name or BOUND not in claim.metadata.annotations:
            return "the claim is not bound to a volume yet"
        if claim.status.phase == "Lost":
            return "the claim has lost its volume"
        if claim.metadata.deletion_timestamp is not None:
            return "the claim is being deleted"
        volume = self.volumes.get(claim.spec.volume_name)
        if volume is None:
            return f"its volume {claim.spec.volume_name} does not exist"
        others = self._users.get(f"{namespace}/{name}", set()) - {uid}
        if "ReadWriteOncePod" in claim.spec.access_modes and others:
            user = self.pods[min(others)].metadata.name
            return f"it is for one pod alone (ReadWriteOncePod), and {user} uses it"
        required = volume.spec.node_affinity.required if volume.spec.node_affinity else None
        return (*([required] if required is not None else []), *zones_of(volume))

    def _hold(self, pod: Pod) -> None:
        uid = pod.metadata.uid
        node = pod.spec.node_name or self.planned.get(uid, "")
        if not node or pod.terminal:
            self._release(uid)
            return
        self._uses(pod)
        if uid not in self.ledger.holdings:
            self.priorities[pod.spec.priority] += 1
            self._priority[uid] = pod.spec.priority
        self.ledger.hold(
            Holding(
                uid=uid,
                name=pod.metadata.name,
                namespace=pod.metadata.namespace,
                node=node,
                shape=self.shape(pod),
                labels=pod.metadata.labels,
                leaving=pod.deleting,
            )
        )

    def _uses(self, pod: Pod) -> None:
        """A pod on a node uses its claims from now on."""
        uid, claims = pod.metadata.uid, [v.persistent_volume_claim for v in pod.spec.volumes]
        keys = [f"{pod.metadata.namespace}/{c.claim_name}" for c in claims if c is not None]
        if keys and uid not in self._used:
            self._used[uid] = keys
            self._volumes_version += 1
            for key in keys:
                self._users.setdefault(key, set()).add(uid)

    def _uses_no_more(self, uid: str) -> None:
        for key in self._used.pop(uid, ()):
            self._volumes_version += 1
            self._users[key].discard(uid)
            if not self._users[key]:
                del self._users[key]

    def _release(self, uid: str) -> None:
        self._uses_no_more(uid)
        holding = self.ledger.release(uid)
        if holding is not None:
            self._gain(holding.node)
        if uid in self._priority:
            priority = self._priority.pop(uid)
            self.priorities[priority] -= 1
            if not self.priorities[priority]:
                del self.priorities[priority]

    def _gain(self, node: str) -> None:
        self.gains.append(node)
        if len(self.gains) > MAX_GAINS:
            del self.gains[: MAX_GAINS // 2]
            self.gained += MAX_GAINS // 2

    @property
    def gain(self) -> int:
        """How often something has become better so far."""
        return self.gained + len(self.gains)

    def gained_since(self, gain: int) -> Iterable[str] | None:
        """The nodes that have become better since; None if that is too long ago to tell."""
        return None if gain < self.gained else self.gains[gain - self.gained :]


def _put(into: dict[str, T], key: str, value: T | None) -> None:
    if value is None:
        into.pop(key, None)
    else:
        into[key] = value
