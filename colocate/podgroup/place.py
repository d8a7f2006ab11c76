"""Where a gang can go: all of its quorum or nothing, decided for classes of equal members with array operations.

A member's filters are those of kube-scheduler (NodeUnschedulable, TaintToleration, NodeAffinity, NodeName, NodePorts,
NodeResourcesFit, PodTopologySpread, InterPodAffinity, VolumeBinding of bound volumes). Among the nodes that fit, a
gang of GPUs goes where it leaves the least fragments, and every gang into as few topology domains as it can.

Homogeneous gangs are decided exactly. Several classes that compete for the same nodes are packed greedily in up to
`MAX_ORDERS` orders, then by a bounded search (search.py); a larger gang whose packing neither finds waits, and is tried
again with each change of the cluster.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, permutations
from typing import NamedTuple

import msgspec
import numpy as np

from colocate.objects import TopologySpreadConstraint
from colocate.podgroup.ledger import Ints, Ledger, Mask
from colocate.podgroup.search import pack
from colocate.podgroup.shape import HostPort, Shape, Term

COMMON = frozenset({"cpu", "memory", "pods", "ephemeral-storage"})
MAX_ORDERS = 24
MAX_PREFERRED_DOMAINS = 4
NEVER = np.iinfo(np.int64).max


class Member(NamedTuple):
    """A pod that is to be placed."""

    uid: str
    name: str
    namespace: str
    shape: Shape
    labels: Mapping[str, str]


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
    reserve: Mapping[str, int] = {}
    """What must be free beside the members, over all nodes that they may use (minResources)."""


class Placed(NamedTuple):
    """One member and its node."""

    member: Member
    node: str


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

    def __init__(self, ledger: Ledger, within: Mask) -> None:
        self.ledger, self.within = ledger, within
        self.used = ledger.used.copy()
        self.put: list[tuple[Class, Ints]] = []

    def mask(self, group: Class) -> Mask:
        """The nodes that pass every filter that does not change while this class is being placed."""
        ledger, shape = self.ledger, group.shape
        found = self.within & ledger.ready & ledger.tolerated(shape.tolerations)
        if shape.unsupported:
            return np.zeros_like(found)
        for key, value in shape.node_selector.items():
            found &= ledger.label(key).holds("In", [value])
        for selector in filter(None, (shape.node_affinity, *shape.volume_affinity)):
            found &= ledger.selected(selector)
        if shape.host_ports:
            found &= ~ledger.ports_taken(shape.host_ports)
        for term, nodes in ledger.repelling_terms(group.namespace, group.labels):
            found &= ~self._domains(term.topology_key, [ledger.rows[n] for n in nodes if n in ledger.rows])
        for other, rows in self.put:
            for term in other.shape.anti_affinity:
                if term.selects(group.namespace, group.labels):
                    found &= ~self._domains(term.topology_key, rows)
            if _conflict(shape.host_ports, other.shape.host_ports):
                found[rows] = False
        for term in shape.anti_affinity:
            found &= ~self._domains(term.topology_key, np.flatnonzero(self.count(term)))
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
            room = np.minimum(room, free // amount)
        return np.clip(room, 0, 1 if group.shape.host_ports else None)

    def commit(self, group: Class, rows: Ints) -> None:
        """These nodes have taken a member each."""
        for resource, amount in group.shape.requests:
            np.add.at(self.used[:, self.ledger.columns[resource]], rows, amount)
        self.put.append((group, rows))


def _conflict(ours: Sequence[HostPort], theirs: Sequence[HostPort]) -> bool:
    return any(a.conflicts(b) for a in ours for b in theirs)


def preference(trial: Trial, group: Class, room: Ints) -> Ints:
    """The rows in the order in which they should be filled.

    With an extended resource: those that this class fills up with the least left over, and of them the fullest.
    Without: nodes without extended resources before those that have some free, and of them the fullest.
    """
    ledger = trial.ledger
    free = ledger.allocatable - trial.used
    scarce = [(name, amount) for name, amount in group.shape.requests if name not in COMMON]
    if scarce:
        name, amount = max(
            scarce, key=lambda r: (r[1] / max(int(ledger.allocatable[:, ledger.columns[r[0]]].sum()), 1), r)
        )
        column = free[:, ledger.columns[name]]
        return np.lexsort((column, column - room * amount))
    extended = [c for name, c in ledger.columns.items() if name not in COMMON]
    stranded = (free[:, extended] > 0).any(axis=1) if extended else np.zeros(len(room), dtype=bool)
    return np.lexsort((free[:, ledger.columns["memory"]], free[:, ledger.columns["cpu"]], stranded))


def spread_out(room: Ints, order: Ints, wanted: int) -> Ints | None:
    """The rows of `wanted` members: nodes filled in order, the last part on the tightest node that takes it whole."""
    order = order[room[order] > 0]
    filled = np.cumsum(np.minimum(room[order], wanted))
    if not len(filled) or filled[-1] < wanted:
        return None
    last = int(np.searchsorted(filled, wanted))
    rest = wanted - (int(filled[last - 1]) if last else 0)
    left = order[last:]
    enough = left[room[left] >= rest]
    tightest = enough[np.argmin(room[enough])]
    return np.concatenate([np.repeat(order[:last], room[order[:last]]), np.full(rest, tightest)])


class _Changing(NamedTuple):
    """Constraints that each member of a class changes for the next."""

    apart: list[Ints]
    """Self-repelling terms: the domain code of each node; one member a domain."""
    together: list[tuple[Ints, Mask]]
    """Affinity terms: the domain codes, and which domains hold a matching pod; all False while nobody is there."""
    spread: list[_Spread]


class _Spread(NamedTuple):
    """One DoNotSchedule constraint."""

    codes: Ints
    counts: Ints
    eligible: Mask
    max_skew: int
    floor_is_zero: bool
    counts_self: bool


def _changing(trial: Trial, group: Class, mask: Mask) -> tuple[_Changing, Mask]:
    """What must be looked at member by member, and the mask less what can be said beforehand."""
    ledger, shape = trial.ledger, group.shape
    changing = _Changing([], [], [])
    for term in shape.anti_affinity:
        if term.selects(group.namespace, group.labels):
            changing.apart.append(ledger.label(term.topology_key).codes)
    for term in shape.affinity:
        column = ledger.label(term.topology_key)
        mask = mask & (column.codes >= 0)
        there = np.zeros(len(column.code_of), dtype=bool)
        rows = np.flatnonzero(trial.count(term))
        there[column.codes[rows][column.codes[rows] >= 0]] = True
        if not there.any() and not term.selects(group.namespace, group.labels):
            mask = np.zeros_like(mask)
        changing.together.append((column.codes, there))
    for constraint in shape.spread:
        spread, mask = _spread(trial, group, constraint, mask)
        changing.spread.append(spread)
    return changing, mask


def _spread(trial: Trial, group: Class, constraint: TopologySpreadConstraint, mask: Mask) -> tuple[_Spread, Mask]:
    ledger, shape = trial.ledger, group.shape
    column = ledger.label(constraint.topology_key)
    mask = mask & (column.codes >= 0)
    honoured = column.codes >= 0
    if constraint.node_affinity_policy == "Honor":
        for key, value in shape.node_selector.items():
            honoured = honoured & ledger.label(key).holds("In", [value])
        if shape.node_affinity is not None:
            honoured = honoured & ledger.selected(shape.node_affinity)
    if constraint.node_taints_policy == "Honor":
        honoured = honoured & ledger.tolerated(shape.tolerations)
    selector = constraint.label_selector
    if selector is not None and constraint.match_label_keys:
        own = {k: group.labels[k] for k in constraint.match_label_keys if k in group.labels}
        selector = msgspec.structs.replace(selector, match_labels={**selector.match_labels, **own})
    term = Term(constraint.topology_key, selector, (group.namespace,))
    counts = np.zeros(len(column.code_of), dtype=np.int64)
    np.add.at(counts, column.codes[honoured], trial.count(term, leaving=False)[honoured])
    eligible = np.zeros(len(column.code_of), dtype=bool)
    eligible[column.codes[honoured]] = True
    few = constraint.min_domains is not None and int(eligible.sum()) < constraint.min_domains
    counts_self = term.selects(group.namespace, group.labels)
    return _Spread(column.codes, counts, eligible, constraint.max_skew, few, counts_self), mask


def _one_by_one(room: Ints, order: Ints, wanted: int, changing: _Changing) -> Ints | None:
    """Member by member; each takes the first node in order, in the emptiest domain first where it must spread."""
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    room = room.copy()
    taken: list[int] = []
    while len(taken) < wanted:
        good, skew = room > 0, np.zeros(len(room), dtype=np.int64)
        for codes, there in changing.together:
            if there.any():
                good &= there[codes]
        for s in changing.spread:
            least = 0 if s.floor_is_zero or not s.eligible.any() else int(s.counts[s.eligible].min())
            now = s.counts[s.codes]
            good &= now + s.counts_self - least <= s.max_skew
            skew += now
        rows = np.flatnonzero(good)
        if not len(rows):
            return None
        row = int(rows[np.lexsort((rank[rows], skew[rows]))[0]])
        taken.append(row)
        room[row] -= 1
        for codes in changing.apart:
            if codes[row] >= 0:
                room[codes == codes[row]] = 0
        for codes, there in changing.together:
            there[codes[row]] = True
        for s in changing.spread:
            s.counts[s.codes[row]] += s.counts_self
    return np.array(taken, dtype=np.int64)


def _one_node_each(codes: Ints) -> bool:
    return bool(len(codes) and (codes >= 0).all() and np.bincount(codes).max() == 1)


def _place_class(trial: Trial, group: Class) -> Ints | None:
    mask = trial.mask(group)
    changing, mask = _changing(trial, group, mask)
    wanted = len(group.members)
    room = trial.room(group, mask)
    apart = [codes for codes in changing.apart if not _one_node_each(codes)]
    if len(apart) < len(changing.apart):
        room = np.minimum(room, 1)  # a label of the hostname kind: nothing changes for the other nodes
        changing = changing._replace(apart=apart)
    if int(np.minimum(room, wanted).sum()) < wanted:
        return None
    order = preference(trial, group, room)
    if not any(changing):
        return spread_out(room, order, wanted)
    first = [codes for codes, there in changing.together if not there.any()]
    if not first:
        return _one_by_one(room, order, wanted, changing)
    # Nobody is there yet whom they want to be beside: they found a domain of their own, the tightest that takes all.
    totals = np.bincount(first[0][room > 0], weights=np.minimum(room, wanted)[room > 0])
    for domain in np.argsort(totals, kind="stable"):
        if totals[domain] >= wanted:
            again, _ = _changing(trial, group, mask)
            rows = _one_by_one(np.where(first[0] == domain, room, 0), order, wanted, again)
            if rows is not None:
                return rows
    return None


def _orders(classes: list[Class], ledger: Ledger) -> Iterator[Sequence[Class]]:
    """The hardest classes first, then the other orders."""
    total = np.maximum(ledger.allocatable.sum(axis=0), 1)

    def weight(group: Class) -> float:
        parts = [a / int(total[ledger.columns[r]]) for r, a in group.shape.requests if r in ledger.columns]
        return -max(parts, default=1.0)

    ranked = sorted(classes, key=weight)
    return islice(permutations(ranked), MAX_ORDERS)


def _within(
    ledger: Ledger, classes: list[Class], within: Mask, reserve: Mapping[str, int], reserve_within: Mask
) -> list[Placed] | None:
    for order in _orders(classes, ledger):
        trial = Trial(ledger, within)
        for group in order:
            rows = _place_class(trial, group)
            if rows is None:
                break
            trial.commit(group, rows)
        else:
            if _reserve_left(trial, reserve, reserve_within):
                return [
                    Placed(member, ledger.names[row])
                    for group, rows in trial.put
                    for member, row in zip(group.members, rows.tolist(), strict=True)
                ]
        if len(classes) == 1 or _hopeless(ledger, classes, within):
            return None
    return _searched(Trial(ledger, within), classes, reserve, reserve_within)


def _searched(trial: Trial, classes: list[Class], reserve: Mapping[str, int], within: Mask) -> list[Placed] | None:
    """A packing of a small gang that no order of its classes finds; only for filters that do not change on the way."""
    members = [(group, m) for group in classes for m in group.members]
    masks = {id(group): trial.mask(group) for group in classes}
    if any(any(_changing(trial, g, masks[id(g)])[0]) or g.shape.host_ports for g in classes):
        return None
    rows = np.flatnonzero(np.any([trial.room(g, masks[id(g)]) > 0 for g in classes], axis=0))
    columns = sorted({trial.ledger.columns[r] for g in classes for r, _ in g.shape.requests})
    free = (trial.ledger.allocatable - trial.used)[np.ix_(rows, np.array(columns, dtype=np.int64))]
    asks = [[dict(g.shape.requests).get(r, 0) for r, c in _by_column(trial.ledger) if c in columns] for g, _ in members]
    found = pack(free.tolist(), asks, [masks[id(g)][rows].tolist() for g, _ in members])
    if found is None:
        return None
    for (group, _), node in zip(members, found, strict=True):
        trial.commit(group, rows[[node]])
    if not _reserve_left(trial, reserve, within):
        return None
    return [Placed(m, trial.ledger.names[int(rows[node])]) for (_, m), node in zip(members, found, strict=True)]


def _by_column(ledger: Ledger) -> list[tuple[str, int]]:
    return sorted(ledger.columns.items(), key=lambda item: item[1])


def _reserve_left(trial: Trial, reserve: Mapping[str, int], within: Mask) -> bool:
    usable = within & trial.ledger.ready
    for resource, amount in reserve.items():
        column = trial.ledger.columns.get(resource)
        if column is None:
            return amount <= 0
        free = (trial.ledger.allocatable[:, column] - trial.used[:, column])[usable]
        if int(np.maximum(free, 0).sum()) < amount:
            return False
    return True


def _hopeless(ledger: Ledger, classes: list[Class], within: Mask) -> bool:
    """Whether some class does not even fit alone: no order can help then."""
    return any(_place_class(Trial(ledger, within), group) is None for group in classes if not group.shape.affinity)


def _domains_that_may_do(ledger: Ledger, classes: list[Class], key: str, within: Mask) -> list[Mask]:
    """The domains of a label with room for each class alone, the tightest first."""
    column = ledger.label(key)
    size = len(column.code_of)
    enough, total = np.ones(size, dtype=bool), np.zeros(size)
    trial = Trial(ledger, within & (column.codes >= 0))
    for group in classes:
        room = trial.room(group, trial.mask(group))
        here = column.codes >= 0
        by_domain = np.bincount(column.codes[here], weights=room[here].astype(float), minlength=size)
        enough &= by_domain >= len(group.members)
        total += by_domain
    names = column.values
    good = sorted(np.flatnonzero(enough).tolist(), key=lambda code: (total[code], names[code]))
    return [within & (column.codes == code) for code in good]


def _place_exactly(ledger: Ledger, gang: Gang, members: Sequence[Member]) -> list[Placed] | None:
    classes = classes_of(members, ledger)
    everywhere = np.ones(len(ledger.names), dtype=bool)
    if gang.required_topology:
        column = ledger.label(gang.required_topology)
        everywhere = column.codes >= 0
        bound = {int(column.codes[ledger.rows[n]]) for n in gang.fixed if n in ledger.rows}
        if bound:
            everywhere = np.isin(column.codes, [b for b in bound if b >= 0]) if len(bound) == 1 else ~everywhere & False
        domains = _domains_that_may_do(ledger, classes, gang.required_topology, everywhere)
    else:
        domains = [everywhere]
    for domain in domains:
        for key in reversed(gang.preferred_topology):
            for narrower in _domains_that_may_do(ledger, classes, key, domain)[:MAX_PREFERRED_DOMAINS]:
                placed = _within(ledger, classes, narrower, gang.reserve, domain)
                if placed is not None:
                    return placed
        placed = _within(ledger, classes, domain, gang.reserve, domain)
        if placed is not None:
            return placed
    return None


def place(ledger: Ledger, gang: Gang) -> list[Placed] | None:
    """A node for at least `quorum` of the members, and for as many more as fit; None if the quorum does not fit.

    Members beyond the quorum are taken in their order. The ledger is not changed.
    """
    if len(gang.members) < gang.quorum:
        return None
    placed = _place_exactly(ledger, gang, gang.members)
    if placed is not None or len(gang.members) == gang.quorum:
        return placed
    low, best = gang.quorum, _place_exactly(ledger, gang, gang.members[: gang.quorum])
    if best is None:
        return None
    high = len(gang.members)
    while high - low > 1:
        middle = (low + high) // 2
        placed = _place_exactly(ledger, gang, gang.members[:middle])
        if placed is None:
            high = middle
        else:
            low, best = middle, placed
    return best


def most_that_fit(ledger: Ledger, gang: Gang) -> int:
    """How many members fit at once, in their order: what an explanation says of a gang that does not."""
    return len(place(ledger, gang._replace(quorum=0, reserve={})) or [])
