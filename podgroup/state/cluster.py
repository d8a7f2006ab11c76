"""What is known of the cluster, fed object by object: nodes, pods, groups and plans, and the ledger that follows from
them.

A pod holds room from the moment it is planned until it has ended or is gone: a plan's members hold theirs before they
are bound, so nothing is promised twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from itertools import islice, product
from typing import NamedTuple
from weakref import WeakValueDictionary

import msgspec
import numpy as np

from colocate.objects import CsiNode, DisruptionBudget, LabelSelector, Node, Pod
from podgroup.api import GangPlan, PodGroup
from podgroup.policy import DEFAULT, Policy
from podgroup.state.allocation import Holding
from podgroup.state.gangs import gang_key, is_group
from podgroup.state.large_plans import expand
from podgroup.state.ledger import Ledger
from podgroup.state.node_budgets import NodeSetBudget
from podgroup.state.runners import Runners
from podgroup.state.selectors import matches
from podgroup.state.shape import Shape, resized, selects_namespaces, shape_of
from podgroup.state.storage import Progress, Storage, has_claims
from podgroup.state.supply import Supply, reach
from podgroup.state.volumes import Unbound

OPEN_PHASES = ("Provisioning", "Binding", "Confirming")
HOLDING_PHASES = (*OPEN_PHASES, "RollingBack")
"""Phases of a plan in which its unbound members keep their room: a bind of theirs may still be on its way."""
CARRIED_ON = (*HOLDING_PHASES, "Repairing")
"""Phases of a plan in which the commit protocol has something to do."""
MAX_GAINS = 4096
MOST_COMBINATIONS = 256
"""Of volumes for shared claims, that are looked at when pods are promised their places."""


class _Shaped(NamedTuple):
    """A pod's shape, and what it was worked out from."""

    pod: Pod
    versions: tuple[int, int]
    seen: tuple[object, ...]
    shape: Shape


class Cluster:
    """The objects as last seen."""

    def __init__(self, policy: Policy = DEFAULT) -> None:
        self.storage = Storage()
        self.ledger = Ledger(self.storage, policy)
        self.pods: dict[str, Pod] = {}
        self.groups: dict[str, PodGroup] = {}
        self.plans: dict[str, GangPlan] = {}
        self.budgets: dict[str, DisruptionBudget] = {}
        self.members: dict[str, set[str]] = {}
        """Gang -> uids of its pods."""
        self.grouped: set[str] = set()
        """Those gangs that are groups: few beside the pods that are alone."""
        self.runners = Runners()
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
        self._planned_on: dict[str, set[str]] = {}
        """Node -> uids of the pods that are planned on it."""
        self._deciding: dict[str, str] = {}
        """Claims that several share -> the volumes of those that are just being promised their places together."""
        self.namespaces: dict[str, Mapping[str, str]] = {}
        """Name -> labels."""
        self._namespaces_version = 0
        self._shapes: dict[str, _Shaped] = {}
        self._equal: WeakValueDictionary[bytes, Shape] = WeakValueDictionary()
        self._of_spec: WeakValueDictionary[bytes, Shape] = WeakValueDictionary()
        """Namespace and specification, as text -> shape."""

    def set_node(self, node: Node) -> bool:
        """A node as it is now; False if nothing changed that matters here."""
        changed = self.ledger.set_node(node)
        if changed:
            self._gain(node.metadata.name)
        return changed

    def remove_node(self, name: str) -> None:
        """A node that is gone."""
        self.ledger.remove_node(name)

    def set_node_budget(self, budget: NodeSetBudget) -> None:
        """A budget of a set of nodes as it is now. Raises ValueError for an amount that is none."""
        self.ledger.set_budget(budget)
        self._gain_everywhere()

    def remove_node_budget(self, name: str) -> None:
        """A budget that is gone."""
        self.ledger.remove_budget(name)
        self._gain_everywhere()

    def set_namespace(self, name: str, labels: Mapping[str, str] | None) -> bool:
        """A namespace's labels as they are now, None if it is gone; False if nothing changed."""
        if self.namespaces.get(name) == labels:
            return False
        self.namespaces.pop(name, None)
        if labels is not None:
            self.namespaces[name] = labels
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

    def waiting_with(self, claim: str) -> set[str]:
        """The gangs with unbound pods that use a claim."""
        pods = (self.pods[uid] for uid in self.storage.wanting(claim) if uid in self.pods)
        return {gang_key(p) for p in pods if not p.spec.node_name}

    def waiting_for_volumes(self) -> set[str]:
        """The gangs with unbound pods that use claims."""
        pods = (self.pods[uid] for uid in self.storage.users() if uid in self.pods)
        return {gang_key(p) for p in pods if not p.spec.node_name}

    def set_pod(self, pod: Pod) -> None:
        """A pod as it is now."""
        self.pods[pod.metadata.uid] = pod
        if has_claims(pod):
            uid = pod.metadata.uid
            self._hold_again(self.storage.gone(uid) if pod.terminal else self.storage.living(pod))
        uid, key = pod.metadata.uid, gang_key(pod)
        self.members.setdefault(key, set()).add(uid)
        if is_group(key):
            self.grouped.add(key)
        self.runners.set(pod)
        if pod.spec.node_name:
            self._unplan(uid)
        elif uid in self._intended and uid not in self.planned:
            self._plan(uid, self._intended[uid])
        self._hold(pod)

    def _plan(self, uid: str, node: str) -> None:
        self._unplan(uid)
        self.planned[uid] = node
        self._planned_on.setdefault(node, set()).add(uid)

    def _unplan(self, uid: str) -> bool:
        node = self.planned.pop(uid, None)
        if node is None:
            return False
        self._planned_on[node].discard(uid)
        if not self._planned_on[node]:
            del self._planned_on[node]
        return True

    def remove_pod(self, uid: str) -> None:
        """A pod that is gone."""
        pod = self.pods.pop(uid, None)
        if pod is None:
            return
        key = gang_key(pod)
        self.members[key].discard(uid)
        if not self.members[key]:
            del self.members[key]
            self.grouped.discard(key)
        self.runners.drop(uid)
        self._unplan(uid)
        self._shapes.pop(uid, None)
        self._release(uid)
        self._hold_again(self.storage.gone(uid))

    def set_plan(self, key: str, plan: GangPlan) -> None:
        """A plan as it is now: while it is open, its members hold what they are promised."""
        before, plan = self.plans.get(key), expand(plan)
        members = plan.spec.members if plan.status.phase in HOLDING_PHASES else []
        wanted = {m.uid: m.node for m in members}
        for member in before.spec.members if before is not None else ():
            if wanted.get(member.uid) != member.node:
                self._intended.pop(member.uid, None)
                self.withdraw(member.uid)
        self.plans[key] = plan
        for member in members:
            uid, node = member.uid, member.node
            if self._intended.get(uid) != node or self.planned.get(uid) != node:
                self._intended[uid] = node
                self.storage.remember(uid, member.volumes)
                self.promise(uid, node)

    def remove_plan(self, key: str) -> None:
        """A plan that is gone: what it promised and is not bound is free."""
        plan = self.plans.pop(key, None)
        for member in plan.spec.members if plan is not None else ():
            self._intended.pop(member.uid, None)
            self.withdraw(member.uid)

    def promise(self, uid: str, node: str) -> None:
        """A pod that is to be bound to a node holds its room there from now on."""
        self.promise_all([(uid, node)])

    def promise_all(self, placed: Iterable[tuple[str, str]]) -> None:
        """(uid, node) of pods that are to be bound together: a volume that some of them share is one that all reach."""
        there = [(uid, node) for uid, node in placed if uid in self.pods and not self.pods[uid].spec.node_name]
        for uid, node in there:
            self._plan(uid, node)
        self._deciding = self._shared_volumes(there)
        for uid, _ in there:
            self._hold(self.pods[uid])
        self._deciding = {}

    def _shared_volumes(self, there: Sequence[tuple[str, str]]) -> dict[str, str]:
        """For claims that several of these share and that have no volume yet: those with which all find theirs."""
        with_claims = [(self.pods[uid], node) for uid, node in there if has_claims(self.pods[uid])]
        asked = [(node, self.storage.open_claims(pod)) for pod, node in with_claims if node in self.ledger.rows]
        wanting: dict[str, list[int]] = {}
        for node, claims in asked:
            for key, wanted in claims:
                if wanted.shared and self.storage.decided(key) is None:
                    wanting.setdefault(key, []).append(self.ledger.rows[node])
        wanted_by = {key: wanted for _, claims in asked for key, wanted in claims if key in wanting}
        options = [
            [v for v in (o.metadata.name for o in self.storage.available(wanted_by[key])) if self._reached(v, rows)]
            + [""]
            for key, rows in wanting.items()
        ]
        for names in islice(product(*options), MOST_COMBINATIONS) if wanting else ():
            taken = {name for name in names if name}
            if len(taken) == sum(map(bool, names)) and self._find_theirs(asked, dict(zip(wanting, names, strict=True))):
                return dict(zip(wanting, names, strict=True))
        return {}

    def _reached(self, volume: str, rows: list[int]) -> bool:
        return bool(reach(self.ledger, volume)[rows].all())

    def _find_theirs(self, asked: Sequence[tuple[str, list[tuple[str, Unbound]]]], decided: dict[str, str]) -> bool:
        """Whether pods with these claims, one after the other, find volumes on their nodes."""
        taken = set(decided.values())
        for node, claims in asked:
            known = {k: d for k, w in claims if w.shared and (d := self.storage.decided(k)) is not None}
            picks = self._picks(node, claims, {**known, **decided}, taken)
            if picks is None:
                return False
            taken |= {name for name, (_, wanted) in zip(picks, claims, strict=True) if not wanted.shared}
        return True

    def _picks(
        self, node: str, claims: list[tuple[str, Unbound]], decided: dict[str, str], taken: Set[str]
    ) -> list[str] | None:
        """The volumes of claims on a node, as `Supply.pick` says."""
        within = np.zeros(len(self.ledger.names), dtype=bool)
        within[self.ledger.rows[node]] = True
        return Supply(self.ledger, [w for _, w in claims], taken, decided, within).pick(self.ledger.rows[node])

    def withdraw(self, uid: str) -> None:
        """The promise is void."""
        if self._unplan(uid) and uid in self.pods:
            self._hold(self.pods[uid])

    def release_hold(self, uid: str) -> None:
        """Room that was kept for somebody (queue/kept_room.py) is free."""
        self._release(uid)

    def pods_of(self, key: str) -> list[Pod]:
        """The members of a gang, whatever their state."""
        return [self.pods[uid] for uid in self.members.get(key, ())]

    def shape(self, pod: Pod) -> Shape:
        """A pod's shape; equal ones are one object while the pod's specification is the same."""
        uid, versions = pod.metadata.uid, (self.storage.version, self._namespaces_version)
        cached = self._shapes.get(uid)
        if cached is not None and cached.pod is pod and cached.versions == versions:
            return cached.shape
        seen = (pod.spec, self._seen_beside(pod), resized(pod))
        shape = cached.shape if cached is not None and cached.seen == seen else self._shape_anew(pod)
        self._shapes[uid] = _Shaped(pod, versions, seen, shape)
        return shape

    def _shape_anew(self, pod: Pod) -> Shape:
        looks_beside = has_claims(pod) or (pod.spec.affinity is not None and selects_namespaces(pod)) or resized(pod)
        text, shape = b"", None
        if not looks_beside:  # its namespace and specification decide, which pods of one template have in common
            same = msgspec.structs.replace(pod.spec, node_name="")
            text = msgspec.json.encode((pod.metadata.namespace, same))
            shape = self._of_spec.get(text)
        if shape is None:
            needs = self.storage.needs(pod) if has_claims(pod) else None
            shape = shape_of(pod, needs, self._namespaces_of)
            shape = self._equal.setdefault(msgspec.json.encode(shape), shape)
            if text:
                self._of_spec[text] = shape
        return shape

    def _seen_beside(self, pod: Pod) -> tuple[int, int]:
        """The versions of what a shape depends on that is not in the pod."""
        volumes = self.storage.version if has_claims(pod) else 0
        return volumes, self._namespaces_version if pod.spec.affinity is not None and selects_namespaces(pod) else 0

    def _namespaces_of(self, selector: LabelSelector) -> tuple[str, ...]:
        return tuple(name for name, labels in self.namespaces.items() if matches(selector, labels))

    def set_csi_node(self, name: str, node: CsiNode | None) -> None:
        """The drivers of a node as they are now, or that it is gone."""
        if self.storage.set_csi_node(name, node):
            self._hold_again(self.storage.on_nodes())
        self.set_attachments(name)

    def set_attachments(self, node: str) -> None:
        """The limits of a node, or what is attached to it, may have changed."""
        if self.ledger.set_limits(node, self.storage.limits(node)):
            self._gain(node)

    def volumes_of(self, uid: str) -> Progress:
        """How far the volumes of a pod that is planned on a node have come."""
        pod, node = self.pods.get(uid), self.planned.get(uid)
        if pod is None or node is None or not has_claims(pod):
            return Progress()
        if self.storage.chosen.get(uid, {}) is None:  # there was none: there may be by now
            del self.storage.chosen[uid]
            self._choose_volumes(pod, node)
        row, volumes = self.ledger.rows.get(node), self.storage.volumes
        reached = {name for name in self.storage.bound_to(pod) if row is not None and reach(self.ledger, name)[row]}
        return self.storage.progress(pod, node, reached & volumes.keys())

    def overfull(self, members: Mapping[str, str]) -> set[str]:
        """Of the nodes of these planned members (uid -> node), those with too little of what they ask for."""
        found: set[str] = set()
        rows = [row for node in set(members.values()) if (row := self.ledger.rows.get(node)) is not None]
        if not (self.ledger.used[rows] > self.ledger.allocatable[rows]).any():
            return found  # nearly always
        for uid, node in members.items():
            row, pod = self.ledger.rows.get(node), self.pods.get(uid)
            if row is None or pod is None or node in found:
                continue
            free = self.ledger.allocatable[row] - self.ledger.used[row]
            columns = [self.ledger.columns[r] for r, _ in self.shape(pod).requests if r in self.ledger.columns]
            if (free[columns] < 0).any():
                for holding in self.ledger.on(node):
                    for resource, amount in holding.shape.requests if holding.kept else ():
                        free[self.ledger.columns[resource]] += amount  # kept for somebody who is not there yet
                if (free[columns] < 0).any():
                    found.add(node)
        return found

    def planned_on(self, node: str) -> set[str]:
        """The gangs with members that are planned on a node and not bound yet."""
        return {gang_key(self.pods[uid]) for uid in self._planned_on.get(node, ()) if uid in self.pods}

    def _choose_volumes(self, pod: Pod, node: str) -> None:
        """A pod that is planned on a node takes its volumes there."""
        uid, claims = pod.metadata.uid, self.storage.open_claims(pod)
        if not claims or uid in self.storage.chosen or node not in self.ledger.rows:
            return
        if self.storage.recall(uid, [key for key, _ in claims]):
            return
        row = self.ledger.rows[node]
        shared = {key: self._shared_volume(key, w, row, uid) for key, w in claims if w.shared}
        decided = self._deciding | {key: name for key, name in shared.items() if name is not None}
        picks = self._picks(node, claims, decided, set(self._deciding.values()))
        keys = [key for key, _ in claims]
        self.storage.choose(uid, None if picks is None else dict(zip(keys, picks, strict=True)))

    def _hold(self, pod: Pod) -> None:
        uid = pod.metadata.uid
        node = pod.spec.node_name or self.planned.get(uid, "")
        if not node or pod.terminal:
            self._release(uid)
            return
        if has_claims(pod):
            if self.storage.on_node(uid, node):
                self.set_attachments(node)
            if not pod.spec.node_name:
                self._choose_volumes(pod, node)
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

    def _shared_volume(self, key: str, wanted: Unbound, row: int, uid: str) -> str | None:
        """The volume of a claim that others have been planned with: another one, if theirs cannot be reached."""
        theirs = self.storage.decided(key, uid)
        if not theirs or reach(self.ledger, theirs)[row]:
            return theirs
        rows = [row, *(self.ledger.rows[n] for n in self.storage.planned_with(key) if n in self.ledger.rows)]
        free = self.storage.available(wanted)
        other = next((v.metadata.name for v in free if self._reached(v.metadata.name, rows)), theirs)
        self.storage.decide(key, other)
        return other

    def _hold_again(self, uids: Iterable[str]) -> None:
        """What these hold depends on who else uses their claims."""
        for uid in uids:
            if uid in self.ledger.holdings and uid in self.pods:
                self._hold(self.pods[uid])

    def _release(self, uid: str) -> None:
        holding = self.ledger.release(uid)
        freed = bool(any((self.storage.chosen.get(uid) or {}).values()))
        if self.storage.left(uid) and holding is not None:
            self.set_attachments(holding.node)
        if freed:  # a volume may be for other nodes too
            self._gain_everywhere()
        if holding is not None:
            self._gain(holding.node)
        if uid in self._priority:
            priority = self._priority.pop(uid)
            self.priorities[priority] -= 1
            if not self.priorities[priority]:
                del self.priorities[priority]

    def _gain_everywhere(self) -> None:
        self.gained += len(self.gains) + 1
        self.gains.clear()

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
