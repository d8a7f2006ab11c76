"""Which nodes fit: the question asked of the solver, members in classes of equals, and a trial copy of the ledger.

The filters are those of kube-scheduler: NodeUnschedulable, TaintToleration, NodeAffinity, NodeName, NodePorts,
NodeResourcesFit, InterPodAffinity, PodTopologySpread, VolumeBinding, VolumeZone, VolumeRestrictions, NodeVolumeLimits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import NamedTuple

import msgspec
import numpy as np

from podgroup.state.allocation import Holding
from podgroup.state.ledger import Ints, Ledger, Mask
from podgroup.state.node_budgets import Cap
from podgroup.state.shape import HostPort, Shape, Term
from podgroup.state.supply import Supply

NEVER = np.iinfo(np.int64).max


class Member(NamedTuple):
    """A pod that is to be placed."""

    uid: str
    name: str
    namespace: str
    shape: Shape
    labels: Mapping[str, str]


def asked_by(members: Iterable[Member]) -> dict[str, int]:
    """What members ask for together, by resource."""
    found: dict[str, int] = {}
    for member in members:
        for resource, amount in member.shape.requests:
            found[resource] = found.get(resource, 0) + amount
    return found


class Debt(NamedTuple):
    """What must stay free for another gang, on the nodes that a pod of this shape can use."""

    amounts: Mapping[str, int]
    shape: Shape


class Gang(NamedTuple):
    """What the solver is asked: place at least `quorum` of the members, in their order, and as many more as fit."""

    members: tuple[Member, ...]
    quorum: int
    required_topology: str = ""
    """A node label: all members in one of its domains."""
    preferred_topology: tuple[str, ...] = ()
    """Node labels from the broadest to the narrowest: as few domains as possible."""
    fixed: tuple[str, ...] = ()
    """Nodes of members that are bound already: they fix the required domain."""
    min_resources: Mapping[str, int] = {}
    """What must be free beside the members, over all nodes that they may use (minResources)."""
    leave: tuple[Debt, ...] = ()
    """What must stay free for others (queue/min_resources.py)."""

    def signature(self, keys: Set[str]) -> tuple[object, ...]:
        """Two gangs with equal signatures fit alike, but for the size of their quorum.

        `keys` are the labels at which pods that are there look; nobody looks at a Job's own `controller-uid`.
        """
        shapes = {id(m.shape): m.shape for m in self.members}
        if len(shapes) > 1 or self.fixed or self.min_resources:
            return (self.members[0].uid,)
        member, left = self.members[0], tuple((id(d.shape), tuple(sorted(d.amounts.items()))) for d in self.leave)
        return id(member.shape), looked_at(member, keys), member.namespace, self.required_topology, left


def looked_at(member: Member, keys: Set[str]) -> tuple[tuple[str, str], ...]:
    """The labels of a member that some selector looks at: one of these keys, or its own."""
    own = member.shape.selector_keys
    wanted = keys | own if keys else own
    return tuple((k, member.labels[k]) for k in sorted(wanted) if k in member.labels) if wanted else ()


def changes_on_the_way(shape: Shape) -> bool:
    """Whether a pod changes, by more than the amounts that it takes, where the next of its kind can be."""
    terms = shape.affinity or shape.anti_affinity or shape.spread or shape.host_ports
    return bool(terms or shape.unbound or shape.shared_volumes or shape.alone)


def is_simple(gang: Gang) -> bool:
    """Equal pods, all of which must start, without constraints between pods: what `sequence` knows.

    Their members must also be equal in what selectors look at.
    """
    if not gang.members or gang.quorum < len(gang.members) or gang.fixed or gang.min_resources or gang.leave:
        return False
    shape = gang.members[0].shape
    if shape.unsupported or changes_on_the_way(shape):
        return False
    return all(m.shape is shape for m in gang.members)


class Placed(NamedTuple):
    """One member and its node."""

    member: Member
    node: str

    @property
    def holding(self) -> Holding:
        """As the ledger holds it."""
        m = self.member
        return Holding(m.uid, m.name, m.namespace, self.node, m.shape, m.labels)


class Class(NamedTuple):
    """Members that no filter can tell apart."""

    shape: Shape
    namespace: str
    labels: Mapping[str, str]
    members: tuple[Member, ...]


def classes_of(members: Sequence[Member], ledger: Ledger) -> list[Class]:
    """Group equal members; labels count as far as some selector looks at them."""
    keys = ledger.repelling_keys.union(*(m.shape.selector_keys for m in members))
    encoded: dict[int, bytes] = {}
    found: dict[tuple[object, ...], list[Member]] = {}
    for member in members:
        text = encoded.get(id(member.shape))
        if text is None:
            text = encoded[id(member.shape)] = msgspec.json.encode(member.shape)
        seen = tuple((k, member.labels[k]) for k in sorted(keys) if k in member.labels)
        found.setdefault((text, member.namespace, seen), []).append(member)
    return [Class(m[0].shape, m[0].namespace, m[0].labels, tuple(m)) for m in found.values()]


class Trial:
    """Placing on a copy: what is used, and what this gang itself has put where."""

    def __init__(self, ledger: Ledger, within: Mask, decided: Mapping[str, str] = {}) -> None:
        """`decided`: which volume claims have that several share, "" for one that is made (`volumes.decisions`)."""
        self.ledger, self.within = ledger, within
        self.used = ledger.used.copy()
        self.put: list[tuple[Class, Ints]] = []
        self._taken = {volume for volume in decided.values() if volume}
        """Volumes that it has given away."""
        self._decided = decided

    def mask(self, group: Class) -> Mask:
        """The nodes that pass every filter that does not change while this class is being placed."""
        ledger, shape = self.ledger, group.shape
        if shape.unsupported:
            return np.zeros_like(self.within)
        found = self.within & ledger.standing(shape)
        if shape.unbound:
            found &= self.supply(group, found).mask
        if shape.host_ports:
            found &= ~ledger.ports_taken(shape.host_ports)
        for term, nodes in ledger.repelling_terms(group.namespace, group.labels):
            found &= ~self._domains(term.topology_key, [ledger.rows[n] for n in nodes if n in ledger.rows])
        for other, rows in self.put:
            for term in other.shape.anti_affinity:
                if term.selects(group.namespace, group.labels):
                    found &= ~self._domains(term.topology_key, rows)
            if conflict(shape.host_ports, other.shape.host_ports):
                found[rows] = False
            if not set(shape.alone).isdisjoint(other.shape.alone):
                found[:] = False
        for term in shape.anti_affinity:
            found &= ~self._domains(term.topology_key, np.flatnonzero(self.count(term)))
        return found

    def supply(self, group: Class, within: Mask) -> Supply:
        """The volumes that are left for the claims of a class."""
        decided = dict(self._decided)
        for wanted in group.shape.unbound:
            theirs = self.ledger.storage.decided(wanted.shared) if wanted.shared not in decided else None
            if theirs is not None:
                decided[wanted.shared] = theirs
        return Supply(self.ledger, group.shape.unbound, self._taken, decided, within)

    def _attached_anew(self, group: Class, resource: str) -> Ints:
        """How many shared volumes of a class are not attached to each node yet."""
        found = np.zeros(len(self.ledger.names), dtype=np.int64)
        for volume in group.shape.shared_volumes:
            if volume[0] != resource:
                continue
            anew = np.ones_like(found)
            anew[[self.ledger.rows[n] for n in self.ledger.sharing(volume) if n in self.ledger.rows]] = 0
            for other, rows in self.put:
                if volume in other.shape.shared_volumes:
                    anew[rows] = 0
            found += anew
        return found

    def _domains(self, key: str, rows: Sequence[int] | Ints) -> Mask:
        """All nodes in the topology domains of these."""
        codes = self.ledger.label(key).codes
        taken = np.unique(codes[np.asarray(rows, dtype=np.int64)])
        return np.isin(codes, taken[taken >= 0])

    def count(self, term: Term, leaving: bool = True) -> Ints:
        """Pods that a term selects on each node, those that this trial has put included."""
        counts = self.ledger.counts(term, leaving).copy()
        for other, rows in self.put:
            if term.selects(other.namespace, other.labels):
                np.add.at(counts, rows, 1)
        return counts

    def room(self, group: Class, mask: Mask) -> Ints:
        """How many members of a class each node can take by resources and ports."""
        room = np.where(mask, NEVER, 0)
        for resource, amount in group.shape.requests:
            column = self.ledger.columns.get(resource)
            if column is None:
                return np.zeros_like(room)
            free = self.ledger.allocatable[:, column] - self.used[:, column]
            if group.shape.shared_volumes:
                free = free - self._attached_anew(group, resource)
            room = np.minimum(room, free // amount)
        for resource in {r for r, _ in group.shape.shared_volumes} & self.ledger.columns.keys():
            column, anew = self.ledger.columns[resource], self._attached_anew(group, resource)
            free = self.ledger.allocatable[:, column] - self.used[:, column]
            room = np.where((anew > 0) & (free < anew), 0, room)
        if group.shape.unbound:
            room = np.minimum(room, self.supply(group, mask).most)
        alone = group.shape.host_ports or group.shape.alone
        return np.clip(room, 0, 1 if alone else None)

    def caps(self, group: Class) -> list[Cap]:
        """What budgets of sets of nodes leave for a class."""
        asked = dict(group.shape.requests)
        left = self.ledger.left_of({r for r, amount in asked.items() if amount}, self.used)
        return [budget.cap(asked[budget.resource]) for budget in left]

    def commit(self, group: Class, rows: Ints) -> None:
        """These nodes have taken a member each."""
        for resource, amount in group.shape.requests:
            np.add.at(self.used[:, self.ledger.columns[resource]], rows, amount)
        for resource in {r for r, _ in group.shape.shared_volumes} & self.ledger.columns.keys():
            here = np.unique(rows)
            self.used[here, self.ledger.columns[resource]] += self._attached_anew(group, resource)[here]
        if group.shape.unbound:
            supply = self.supply(group, self.within)
            if supply.scarce:
                for row in rows.tolist():
                    supply.take(row)
                self._taken = supply.taken
        self.put.append((group, rows))


def conflict(ours: Sequence[HostPort], theirs: Sequence[HostPort]) -> bool:
    """Whether some port of one side cannot be on a node with one of the other."""
    return any(a.conflicts(b) for a in ours for b in theirs)
