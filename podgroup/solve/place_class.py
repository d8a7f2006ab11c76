"""One class of equal members onto the nodes: all of it or not at all.

Constraints between pods that each member changes for the next (anti-affinity, affinity, topology spread) are looked at
member by member, all nodes at once; without them the nodes are filled in one go.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec
import numpy as np

from colocate.objects import TopologySpreadConstraint
from podgroup.policy import Floats, Nodes
from podgroup.solve.question import Class, Trial
from podgroup.state.ledger import Ints, Ledger, Mask
from podgroup.state.node_budgets import capped
from podgroup.state.node_power import watts_more
from podgroup.state.selectors import selector_keys
from podgroup.state.shape import Term, all_of
from podgroup.state.supply import Supply
from podgroup.state.volumes import ATTACHABLE

COMMON = frozenset(
    {"cpu", "memory", "pods", "ephemeral-storage"}
    | {"kubernetes.io/batch-cpu", "kubernetes.io/batch-memory", "colocate.io/power", "intel.com/power"}
)
"""What every node has some of, watts and what is left to batch included: no reason to keep a node for anybody."""
CPU = ("cpu", "kubernetes.io/batch-cpu")
"""Both are counted in thousandths of a CPU."""


def is_extended(resource: str) -> bool:
    """Whether a resource is one that few nodes have: a node that has some is kept for those that ask for it."""
    return resource not in COMMON and not resource.startswith((ATTACHABLE, "hugepages-"))


def scarcest(ledger: Ledger, group: Class) -> tuple[str, int] | None:
    """The extended resource of which a class takes the largest share, and how much of it; None if it takes none."""
    scarce = [(name, amount) for name, amount in group.shape.requests if is_extended(name)]
    if not scarce:
        return None
    total = {name: max(int(ledger.allocatable[:, ledger.columns[name]].sum()), 1) for name, _ in scarce}
    return max(scarce, key=lambda r: (r[1] / total[r[0]], r))


def _nodes(trial: Trial, group: Class, room: Ints) -> Nodes:
    """All nodes, as a policy looks at them before a class is put on them."""
    ledger = trial.ledger
    asks, scarce = np.zeros(len(ledger.columns), dtype=np.int64), scarcest(ledger, group)
    for resource, amount in group.shape.requests:
        if resource in ledger.columns:
            asks[ledger.columns[resource]] = amount
    return Nodes(
        free=ledger.allocatable - trial.used,
        allocatable=ledger.allocatable,
        room=room,
        asks=asks,
        scarce=ledger.columns[scarce[0]] if scarce is not None else -1,
        extended=np.array([c for name, c in ledger.columns.items() if is_extended(name)], dtype=np.int64),
        columns=ledger.columns,
        more_watts=more_watts(ledger, group, room, trial.used) if ledger.policy.reads_power else None,
    )


def spread_out(room: Ints, order: Ints, wanted: int, kept: Mask, *, tightest: bool = True) -> Ints | None:
    """The rows of `wanted` members: nodes filled in order, the last part on the tightest node that takes it whole, or
    on the first.

    None of those `kept` for others, while another one would do.
    """
    order = order[room[order] > 0]
    filled = np.cumsum(np.minimum(room[order], wanted))
    if not len(filled) or filled[-1] < wanted:
        return None
    last = int(np.searchsorted(filled, wanted))
    rest = wanted - (int(filled[last - 1]) if last else 0)
    left = order[last:]
    enough = left[room[left] >= rest]
    enough = enough[~kept[enough]] if not kept[enough].all() else enough
    chosen = enough[np.argmin(room[enough]) if tightest else 0]
    return np.concatenate([np.repeat(order[:last], room[order[:last]]), np.full(rest, chosen)])


class _Changing(NamedTuple):
    """Constraints that each member of a class changes for the next."""

    apart: list[Ints]
    """Self-repelling terms: the domain code of each node; one member a domain."""
    together: list[tuple[Ints, Mask]]
    """Affinity terms: the domain codes, and which domains hold a matching pod; all False while nobody is there."""
    spread: list[_Spread]
    volumes: Supply | None
    """Where those that come first may take what others could have had."""
    budgets: list[tuple[Mask, Ints]]
    """Sets of nodes, and how many members more each may take: an array of one, counted down."""


class _Spread(NamedTuple):
    """One DoNotSchedule constraint."""

    codes: Ints
    counts: Ints
    eligible: Mask
    max_skew: int
    floor_is_zero: bool
    counts_self: bool
    """Whether the pod itself would be one more in its domain."""
    counted: bool
    """Whether it is one more for those that come after it: an empty selector selects it, but counts nobody."""


def _changing(trial: Trial, group: Class, mask: Mask, supply: Supply | None) -> tuple[_Changing, Mask]:
    """What must be looked at member by member, and the mask less what can be said beforehand."""
    ledger, shape = trial.ledger, group.shape
    if supply is not None:
        mask = mask & supply.mask
    budgets = [(cap.nodes, np.array([cap.most])) for cap in trial.caps(group)]
    changing = _Changing([], [], [], supply if supply is not None and supply.scarce else None, budgets)
    for term in shape.anti_affinity:
        if term.selects(group.namespace, group.labels):
            changing.apart.append(ledger.label(term.topology_key).codes)
    if shape.affinity:
        # Source: interpodaffinity; a pod counts for any term only if it matches all of them.
        beside = all_of(shape.affinity)
        rows = np.flatnonzero(trial.count(beside))
        for term in shape.affinity:
            column = ledger.label(term.topology_key)
            mask = mask & (column.codes >= 0)
            there = np.zeros(len(column.code_of), dtype=bool)
            there[column.codes[rows][column.codes[rows] >= 0]] = True
            changing.together.append((column.codes, there))
        empty = [not there.any() for _, there in changing.together]
        if any(empty) and not (all(empty) and beside.selects(group.namespace, group.labels)):
            mask = np.zeros_like(mask)
    for constraint in shape.spread:
        spread, mask = _spread(trial, group, constraint, mask)
        changing.spread.append(spread)
    return changing, mask


def _spread(trial: Trial, group: Class, constraint: TopologySpreadConstraint, mask: Mask) -> tuple[_Spread, Mask]:
    ledger, shape = trial.ledger, group.shape
    column = ledger.label(constraint.topology_key)
    mask = mask & (column.codes >= 0)
    honoured = column.codes >= 0
    for other in shape.spread:  # a node that lacks the key of one counts for none
        honoured = honoured & (ledger.label(other.topology_key).codes >= 0)
    if constraint.node_affinity_policy == "Honor":
        honoured = honoured & ledger.chosen(shape)
    if constraint.node_taints_policy == "Honor":
        honoured = honoured & ledger.tolerated(shape.tolerations)
    selector = constraint.label_selector
    if selector is not None and constraint.match_label_keys:
        own = {k: group.labels[k] for k in constraint.match_label_keys if k in group.labels}
        selector = msgspec.structs.replace(selector, match_labels={**selector.match_labels, **own})
    term = Term(constraint.topology_key, selector, (group.namespace,))
    counts = np.zeros(len(column.code_of), dtype=np.int64)
    counted = selector is not None and bool(selector_keys(selector))  # podtopologyspread.countPodsMatchSelector
    if counted:
        np.add.at(counts, column.codes[honoured], trial.count(term, leaving=False)[honoured])
    eligible = np.zeros(len(column.code_of), dtype=bool)
    eligible[column.codes[honoured]] = True
    few = constraint.min_domains is not None and int(eligible.sum()) < constraint.min_domains
    counts_self = term.selects(group.namespace, group.labels)
    counted = counted and counts_self
    return _Spread(column.codes, counts, eligible, constraint.max_skew, few, counts_self, counted), mask


def _good(room: Ints, changing: _Changing) -> tuple[Mask, Ints]:
    """The nodes that the next member may go to, and how many there are already whom it must spread from."""
    good, skew = room > 0, np.zeros(len(room), dtype=np.int64)
    for codes, there in changing.together:
        if there.any():
            good &= there[codes]
    for s in changing.spread:
        least = 0 if s.floor_is_zero or not s.eligible.any() else int(s.counts[s.eligible].min())
        now = s.counts[s.codes]
        good &= now + s.counts_self - least <= s.max_skew
        skew += now
    if changing.volumes is not None:
        good &= changing.volumes.mask
    for nodes, left in changing.budgets:
        if left[0] <= 0:
            good &= ~nodes
    return good, skew


def feasible(trial: Trial, group: Class) -> Mask:
    """The nodes on any of which one member of a class could be: what kube-scheduler's filters leave of them."""
    supply = trial.supply(group, trial.within) if group.shape.unbound else None
    changing, mask = _changing(trial, group, trial.mask(group), supply)
    return _good(trial.room(group, mask), changing)[0] if mask.any() else mask


def _one_by_one(room: Ints, order: Ints, wanted: int, changing: _Changing) -> Ints | None:
    """Member by member; each takes the first node in order, in the emptiest domain first where it must spread."""
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    room = room.copy()
    taken: list[int] = []
    while len(taken) < wanted:
        good, skew = _good(room, changing)
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
            s.counts[s.codes[row]] += s.counted
        if changing.volumes is not None:
            changing.volumes.take(row)
        for nodes, left in changing.budgets:
            left[0] -= nodes[row]
    return np.array(taken, dtype=np.int64)


def _one_node_each(codes: Ints) -> bool:
    return bool(len(codes) and (codes >= 0).all() and np.bincount(codes).max() == 1)


def more_watts(ledger: Ledger, group: Class, room: Ints, used: Ints) -> Floats:
    """What each member adds to its node's draw where as many of the class come as can, shape (nodes,).

    `used` is what is held, nodes x resources.
    """
    asked = dict(group.shape.requests)
    milli, columns = sum(asked.get(name, 0) for name in CPU), [ledger.columns[n] for n in CPU if n in ledger.columns]
    members = np.clip(room, 1, max(len(group.members), 1))
    cores = np.maximum(ledger.allocatable[:, ledger.columns["cpu"]], 1)
    found: Floats = watts_more(ledger.nodes(), used[:, columns].sum(axis=1), members * milli, cores) / members
    return found


def most_on_a_node(ledger: Ledger, group: Class) -> int:
    """How many members of a class a node takes at most, whatever its room: one of those that repel each other there."""
    for term in group.shape.anti_affinity:
        if term.selects(group.namespace, group.labels) and _one_node_each(ledger.label(term.topology_key).codes):
            return 1
    return len(group.members)


def place_class(trial: Trial, group: Class) -> Ints | None:
    """The rows of all members of a class; None if not all fit. The trial is not changed."""
    if group.shape.alone and len(group.members) > 1:
        return None
    mask, wanted = trial.mask(group), len(group.members)
    supply = trial.supply(group, mask) if group.shape.unbound else None
    changing, mask = _changing(trial, group, mask, supply)
    room = trial.room(group, mask)
    apart = [codes for codes in changing.apart if not _one_node_each(codes)]
    if len(apart) < len(changing.apart):
        room = np.minimum(room, 1)  # a label of the hostname kind: nothing changes for the other nodes
        changing = changing._replace(apart=apart)
    if int(np.minimum(room, wanted).sum()) < wanted:
        return None
    nodes = _nodes(trial, group, room)
    order = trial.ledger.policy.rows(nodes)
    if not any(changing._replace(budgets=[])):
        room, by_watts = capped(room, trial.caps(group), order), nodes.more_watts is not None
        return spread_out(room, order, wanted, nodes.kept_for_others, tightest=not by_watts)
    first = [codes for codes, there in changing.together if not there.any()]
    if not first:
        return _one_by_one(room, order, wanted, changing)
    # Nobody is there yet whom they want to be beside: they found a domain of their own, the tightest that takes all.
    totals = np.bincount(first[0][room > 0], weights=np.minimum(room, wanted)[room > 0])
    for domain in np.argsort(totals, kind="stable"):
        if totals[domain] >= wanted:
            again, _ = _changing(trial, group, mask, supply.copy() if supply is not None else None)
            rows = _one_by_one(np.where(first[0] == domain, room, 0), order, wanted, again)
            if rows is not None:
                return rows
    return None
