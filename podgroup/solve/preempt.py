"""Who makes room for a more important gang: the fewest gangs broken, surplus members before any quorum, nobody in vain.

Victims are only pods of lower priority that have an owner and whose PodDisruptionBudgets allow it; a gang is broken as
a whole or not at all. Nothing is chosen unless the solver has placed the preemptor without the victims. Source: the
order of reprieves is kube-scheduler's (DefaultPreemption), the two kinds of bundles are Volcano's (gangpreempt).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from copy import copy
from heapq import merge
from typing import NamedTuple

import numpy as np

from colocate.objects import Pod
from colocate.units import seconds_of
from podgroup.solve.place import place
from podgroup.solve.question import Gang, Placed, changes_on_the_way
from podgroup.state.cluster import Cluster
from podgroup.state.gangs import gang_key, is_group, owned, without_former_runs
from podgroup.state.ledger import Ints
from podgroup.state.runners import youngest_first
from podgroup.state.selectors import matches

MAX_SINGLE_GANGS = 64
MAX_QUESTIONS = 128
"""To the solver about what need not go; more victims than that are given back in groups."""
STUCK_SECONDS = 30.0


class Bundle(NamedTuple):
    """What one gang can give: members beyond its quorum one by one, and the rest together."""

    key: str
    priority: int
    surplus: list[Pod]
    whole: list[Pod]
    """Empty where the gang may not be broken."""


class Preemption(NamedTuple):
    """The victims, and where the preemptor goes without them."""

    victims: list[Pod]
    placed: list[Placed]
    broken: list[str]
    """Gangs that lose their quorum."""
    leaving: Sequence[str] = ()
    """uids of pods that are leaving already, where their room is enough."""


class Search(NamedTuple):
    """For whom victims are looked for."""

    key: str
    priority: int
    spent: Set[str]
    """Victims that have not gone yet: what their budgets allow is used up, whether their status says so or not."""
    yielding: Set[str]
    """Gangs that may be broken though they are as important."""

    def budgets(self, cluster: Cluster) -> dict[str, int]:
        """How many pods of each PodDisruptionBudget may go."""
        left = {name: budget.status.disruptions_allowed for name, budget in cluster.budgets.items()}
        for uid in sorted(self.spent & cluster.pods.keys()):
            _allowed(cluster, cluster.pods[uid], left)
        return left


def _of_groups(
    cluster: Cluster, search: Search, left: dict[str, int], wanted: frozenset[str], *, shared: bool
) -> list[Bundle]:
    """What may be taken of each group, in no order; surplus members on the nodes `wanted` first.

    Each pod's budget allows it by itself; with `shared`, those that are named first use it up.
    """
    found = []
    for other in sorted(cluster.grouped - {search.key}):
        bound = [p for p in cluster.pods_of(other) if p.spec.node_name and not p.terminal and not p.deleting]
        limit = search.priority + (other in search.yielding)
        if not bound or max(p.spec.priority for p in bound) >= limit:
            continue
        bound.sort(key=lambda p: (p.spec.node_name not in wanted, p.spec.priority, youngest_first(p), p.metadata.name))
        may = [p for p in bound if owned(p) and _allowed(cluster, p, left if shared else dict(left))]
        group = cluster.groups.get(other)
        done = sum(p.status.phase == "Succeeded" for p in without_former_runs(cluster.pods_of(other)))
        beyond = max(len(bound) + done - group.spec.min_member, 0) if group is not None else 0
        surplus = may[:beyond]
        rest = [p for p in bound if p not in surplus]
        whole = rest if all(p in may for p in rest) else []
        if surplus or whole:
            found.append(Bundle(other, max(p.spec.priority for p in bound), surplus, whole))
    return found


def _alone(cluster: Cluster, search: Search, left: dict[str, int], *, shared: bool) -> Iterator[Bundle]:
    """Pods that run alone, the first to go first."""
    for priority, _, key, uid in cluster.runners.below(search.priority):
        pod = cluster.pods[uid]
        if key != search.key and _allowed(cluster, pod, left if shared else dict(left)):
            yield Bundle(key, priority, [], [pod])


def _order(bundle: Bundle) -> tuple[int, float, str]:
    """The least important and youngest first."""
    first = (bundle.whole or bundle.surplus)[0]
    return (bundle.priority, youngest_first(first), bundle.key)


def _allowed(cluster: Cluster, pod: Pod, left: dict[str, int]) -> bool:
    """Whether every budget of this pod has one left; it is then spent."""
    if not left:
        return True
    meta = pod.metadata
    mine = [
        key
        for key, budget in cluster.budgets.items()
        if budget.metadata.namespace == meta.namespace and matches(budget.spec.selector, meta.labels)
    ]
    if any(left[key] <= 0 for key in mine):
        return False
    for key in mine:
        left[key] -= 1
    return True


def preempt(
    cluster: Cluster,
    gang: Gang,
    key: str,
    priority: int,
    now: float,
    spent: Set[str] = frozenset(),
    yielding: Set[str] = frozenset(),
) -> Preemption | None:
    """Victims for a gang that does not fit, none where others are leaving; None if no permitted ones make room for it.

    For members beyond the quorum no other gang is broken: they take what is surplus elsewhere, or pods alone. Pods of
    the gangs `yielding` may go though they are as important.
    """
    if not any(m.shape.affinity or m.shape.spread for m in gang.members):  # which look at the pods that are there
        with cluster.ledger.empty():
            if not place(cluster.ledger, gang._replace(leave=())):
                return None
    leaving = [
        h.uid
        for h in cluster.ledger.holdings.values()
        if h.leaving and not _stuck(cluster, h.uid, now) and not _comes_again(cluster, h.uid, priority)
    ]
    with cluster.ledger.without(leaving):
        placed = place(cluster.ledger, gang) if leaving else None
    if placed:
        return Preemption([], placed, [], leaving)  # what is leaving already makes room: nobody more need go
    search = Search(key, priority, spent, yielding)
    for shared in (False, True):
        found = _search(cluster, gang, search, shared=shared)
        if found is None or shared or _permitted(cluster, found.victims, search.budgets(cluster)):
            return found
    return None


def _comes_again(cluster: Cluster, uid: str, priority: int) -> bool:
    """Whether the place of a leaving pod is its replacement's: of a gang as important, that needs it for its quorum."""
    pod = cluster.pods.get(uid)
    group = cluster.groups.get(gang_key(pod)) if pod is not None else None
    if pod is None or group is None or pod.spec.priority < priority:
        return False
    there = [p for p in without_former_runs(cluster.pods_of(gang_key(pod))) if not p.deleting]
    satisfied = sum(p.status.phase == "Succeeded" or bool(p.spec.node_name and not p.terminal) for p in there)
    return satisfied < group.spec.min_member


def _stuck(cluster: Cluster, uid: str, now: float) -> bool:
    """Whether a pod should have ended long ago, by its grace period: nobody knows whether it ever will."""
    pod = cluster.pods.get(uid)
    due = seconds_of(pod.metadata.deletion_timestamp) if pod is not None else None
    return due is not None and now > due + STUCK_SECONDS


def _permitted(cluster: Cluster, victims: list[Pod], left: dict[str, int]) -> bool:
    return all(_allowed(cluster, pod, left) for pod in victims)


def _search(cluster: Cluster, gang: Gang, search: Search, *, shared: bool) -> Preemption | None:
    def available(wanted: frozenset[str]) -> tuple[list[Bundle], Iterator[Bundle]]:
        left = search.budgets(cluster)
        groups = sorted(_of_groups(cluster, search, left, wanted, shared=shared), key=_order)
        return groups, merge(groups, _alone(cluster, search, left, shared=shared), key=_order)

    groups, in_order = available(frozenset())
    if any(b.surplus for b in groups):
        ideal = _ideal(cluster, gang, groups, in_order)
        if not ideal:
            return None
        groups, in_order = available(frozenset(node for _, node in ideal))
    asked = Question(cluster, gang)
    found = None
    candidates = Candidates([p for b in groups for p in b.surplus], in_order)
    if gang.quorum < len(gang.members):
        found = _choose(asked.of(gang._replace(quorum=len(gang.members))), candidates, mild=True)
    return found or _choose(asked, candidates)


def _ideal(cluster: Cluster, gang: Gang, groups: list[Bundle], in_order: Iterator[Bundle]) -> list[Placed] | None:
    """Where the gang would go without all that may be taken of groups; or else without all that may be taken."""
    asked = Question(cluster, gang)
    placed = asked.placed([p for b in groups for p in (*b.surplus, *b.whole)])
    return placed or asked.placed([p for b in in_order for p in (*b.surplus, *b.whole)])


class Candidates:
    """Who may be taken, the first to go first; as many are looked at as are asked about."""

    def __init__(self, surplus: list[Pod], in_order: Iterator[Bundle]) -> None:
        self.surplus = surplus
        self._in_order = (b for b in in_order if b.whole)
        self._known: list[Bundle] = []
        self._mild: list[Bundle] = []
        """Of them those that are no groups."""

    def whole(self, count: int, *, mild: bool = False) -> list[Bundle]:
        """The first so many that can be taken as a whole; `mild`: no groups."""
        chosen = self._mild if mild else self._known
        while len(chosen) < count and (more := next(self._in_order, None)) is not None:
            self._known.append(more)
            if not is_group(more.key):
                self._mild.append(more)
        return chosen[:count]


class Question:
    """Where a gang could go without some of these pods; asked many times, so what does not change is kept.

    Where only amounts matter (no terms or ports look at who is there), nobody is taken out of the ledger for it.
    """

    def __init__(self, cluster: Cluster, gang: Gang) -> None:
        self._cluster, self.gang = cluster, gang
        self._numeric = self._only_amounts_matter()
        self._index: dict[str, int] = {}
        self._rows: list[int] = []
        self._kinds: list[int] = []
        self._kind_of: dict[int, int] = {}
        self._asks: list[Ints] = []
        """Of each kind of pod that was asked about."""

    def of(self, gang: Gang) -> Question:
        """The same about another quorum of the same members."""
        other = copy(self)
        other.gang = gang
        return other

    def placed(self, victims: Sequence[Pod]) -> list[Placed] | None:
        """Where the gang goes without these; None or nothing if it does not fit."""
        ledger = self._cluster.ledger
        if not self._numeric:
            with ledger.without([p.metadata.uid for p in victims]):
                return place(ledger, self.gang)
        chosen = [self._known(p.metadata.uid) for p in victims]
        used = ledger.used.copy()
        rows = np.array([self._rows[i] for i in chosen], dtype=np.int64)
        kinds = np.array([self._kinds[i] for i in chosen], dtype=np.int64)
        here = rows >= 0
        if here.any():
            np.subtract.at(used, rows[here], np.array(self._asks)[kinds[here]])
        with ledger.using(used):
            return place(ledger, self.gang)

    def _known(self, uid: str) -> int:
        """The number of a pod, whose node and kind are looked up once."""
        number = self._index.get(uid)
        if number is None:
            ledger = self._cluster.ledger
            held = ledger.holdings[uid]
            kind = self._kind_of.get(id(held.shape))
            if kind is None:
                kind = self._kind_of[id(held.shape)] = len(self._asks)
                asks = np.zeros(len(ledger.columns), dtype=np.int64)
                for resource, amount in held.shape.requests:
                    asks[ledger.columns[resource]] = amount
                self._asks.append(asks)
            number = self._index[uid] = len(self._rows)
            self._rows.append(ledger.rows.get(held.node, -1))
            self._kinds.append(kind)
        return number

    def _only_amounts_matter(self) -> bool:
        gang, ledger = self.gang, self._cluster.ledger
        for shape in {id(m.shape): m.shape for m in gang.members}.values():
            if changes_on_the_way(shape):
                return False
        return not any(ledger.repelling_terms(m.namespace, m.labels) for m in gang.members)


def _choose(asked: Question, candidates: Candidates, *, mild: bool = False) -> Preemption | None:
    surplus = candidates.surplus
    if surplus and asked.placed(surplus):
        return _spare(asked, surplus, [])
    for bundle in candidates.whole(MAX_SINGLE_GANGS, mild=mild):
        if asked.placed([*surplus, *bundle.whole]):
            return _spare(asked, surplus, [bundle])

    def fits(count: int) -> bool:
        return bool(asked.placed([*surplus, *(p for b in candidates.whole(count, mild=mild) for p in b.whole)]))

    low, high = 0, MAX_SINGLE_GANGS  # too few, enough
    while not fits(high):
        if len(candidates.whole(high + 1, mild=mild)) <= high:
            return None
        low, high = high, 4 * high
    high = len(candidates.whole(high, mild=mild))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return _spare(asked, surplus, candidates.whole(high, mild=mild))


def _spare(asked: Question, surplus: list[Pod], taken: list[Bundle]) -> Preemption | None:
    """Give back what is not needed: the most important gangs first, then surplus members."""
    broken = {b.key for b in taken}
    units = [[*b.surplus, *b.whole] for b in sorted(taken, key=lambda b: -b.priority)]  # a remnant is of no use
    units += [[p] for p in sorted(surplus, key=lambda p: -p.spec.priority) if gang_key(p) not in broken]
    needed = _fewer(asked, units)
    victims = [p for unit in reversed(needed) for p in unit]
    placed = asked.placed(victims)
    keys = {gang_key(p) for p in victims}
    return Preemption(victims, placed, [b.key for b in taken if b.key in keys]) if placed else None


def _fewer(asked: Question, units: list[list[Pod]]) -> list[list[Pod]]:
    """These less what need not go, the first ones given back first; many at once, for each question costs."""
    ideal = asked.placed([p for unit in units for p in unit])
    nodes = {node for _, node in ideal or ()}
    near = [unit for unit in units if any(p.spec.node_name in nodes for p in unit)]
    if len(near) < len(units) and asked.placed([p for unit in near for p in unit]):
        units = near
    step, questions = 1 if len(units) <= MAX_QUESTIONS else len(units) // 2, 0
    while True:
        start = 0
        while start < len(units) and questions < MAX_QUESTIONS:
            rest = [*units[:start], *units[start + step :]]
            questions += 1
            if rest and asked.placed([p for unit in rest for p in unit]):
                units = rest
            else:
                start += step
        if step == 1 or questions >= MAX_QUESTIONS:
            return units
        step = max(step // 2, 1)
