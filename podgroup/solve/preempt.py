"""Who makes room for a more important gang: the fewest gangs broken, surplus members before any quorum, nobody in vain.

Victims are only pods of lower priority that have an owner and whose PodDisruptionBudgets allow it; a gang is broken as
a whole or not at all. Nothing is chosen unless the solver has placed the preemptor without the victims. Source: the
order of reprieves is kube-scheduler's (DefaultPreemption), the two kinds of bundles are Volcano's (gangpreempt).
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from copy import copy
from typing import NamedTuple

import numpy as np

from colocate.objects import Pod
from colocate.units import seconds_of
from podgroup.solve.place import place
from podgroup.solve.question import Gang, Placed, changes_on_the_way
from podgroup.state.cluster import Cluster
from podgroup.state.gangs import gang_key, is_group, owned, without_former_runs
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


def bundles(
    cluster: Cluster, search: Search, wanted: frozenset[str] = frozenset(), *, shared: bool = False
) -> list[Bundle]:
    """What may be taken, the least important and youngest first.

    Of a gang's surplus, members on the nodes `wanted` are named first. Each pod's budget allows it by itself; with
    `shared`, those that are named first use it up.
    """
    left, found = search.budgets(cluster), []
    for other, uids in sorted(cluster.members.items()) if left else cluster.members.items():
        if other == search.key:
            continue
        if len(uids) == 1 and not is_group(other):  # most of what runs, and nothing of it is surplus
            (one,) = (cluster.pods[uid] for uid in uids)
            there = one.spec.node_name and not one.terminal and not one.deleting
            less = there and one.spec.priority < search.priority + (other in search.yielding)
            if less and owned(one) and _allowed(cluster, one, left if shared else dict(left)):
                found.append(Bundle(other, one.spec.priority, [], [one]))
            continue
        bound = [p for p in cluster.pods_of(other) if p.spec.node_name and not p.terminal and not p.deleting]
        limit = search.priority + (other in search.yielding)
        if not bound or max(p.spec.priority for p in bound) >= limit:
            continue
        bound.sort(key=lambda p: (p.spec.node_name not in wanted, p.spec.priority, _youth(p), p.metadata.name))
        may = [p for p in bound if owned(p) and _allowed(cluster, p, left if shared else dict(left))]
        group = cluster.groups.get(other)
        done = sum(p.status.phase == "Succeeded" for p in without_former_runs(cluster.pods_of(other)))
        beyond = max(len(bound) + done - group.spec.min_member, 0) if group is not None else 0
        surplus = may[:beyond]
        rest = [p for p in bound if p not in surplus]
        whole = rest if all(p in may for p in rest) else []
        if surplus or whole:
            found.append(Bundle(other, max(p.spec.priority for p in bound), surplus, whole))
    found.sort(key=lambda b: b.key)
    found.sort(key=lambda b: (b.whole or b.surplus)[0].metadata.creation_timestamp or "", reverse=True)  # stable
    return sorted(found, key=lambda b: b.priority)


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


def _youth(pod: Pod) -> tuple[int, ...]:
    """Younger pods first."""
    return tuple(-ord(c) for c in pod.metadata.creation_timestamp or "")


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
    available = bundles(cluster, search, shared=shared)
    everything = [p for b in available for p in (*b.surplus, *b.whole)]
    asked = Question(cluster, gang, everything)
    ideal = asked.placed(everything)
    if not ideal:
        return None
    if any(b.surplus for b in available):
        available = bundles(cluster, search, frozenset(node for _, node in ideal), shared=shared)
        asked = Question(cluster, gang, [p for b in available for p in (*b.surplus, *b.whole)])
    if gang.quorum < len(gang.members):
        mild = [b if not is_group(b.key) else b._replace(whole=[]) for b in available]
        found = _choose(asked.of(gang._replace(quorum=len(gang.members))), mild)
        if found is not None:
            return found
    return _choose(asked, available)


class Question:
    """Where a gang could go without some of these pods; asked many times, so what does not change is kept.

    Where only amounts matter (no terms or ports look at who is there), nobody is taken out of the ledger for it.
    """

    def __init__(self, cluster: Cluster, gang: Gang, pods: Sequence[Pod]) -> None:
        self._cluster, self.gang = cluster, gang
        self._numeric = self._only_amounts_matter()
        ledger, kinds = cluster.ledger, dict[int, int]()
        self._index = {p.metadata.uid: i for i, p in enumerate(pods)} if self._numeric else {}
        held = [ledger.holdings[uid] for uid in self._index]
        self._rows = np.array([ledger.rows.get(h.node, -1) for h in held], dtype=np.int64)
        shapes = [h.shape for h in held]
        self._kinds = np.array([kinds.setdefault(id(s), len(kinds)) for s in shapes], dtype=np.int64)
        self._asks = np.zeros((len(kinds), len(ledger.columns)), dtype=np.int64)
        for shape in {id(s): s for s in shapes}.values():
            for resource, amount in shape.requests:
                self._asks[kinds[id(shape)], ledger.columns[resource]] = amount

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
        chosen = np.array([self._index[p.metadata.uid] for p in victims], dtype=np.int64)
        chosen = chosen[self._rows[chosen] >= 0]
        used = ledger.used.copy()
        np.subtract.at(used, self._rows[chosen], self._asks[self._kinds[chosen]])
        with ledger.using(used):
            return place(ledger, self.gang)

    def _only_amounts_matter(self) -> bool:
        gang, ledger = self.gang, self._cluster.ledger
        for shape in {id(m.shape): m.shape for m in gang.members}.values():
            if changes_on_the_way(shape):
                return False
        return not any(ledger.repelling_terms(m.namespace, m.labels) for m in gang.members)


def _choose(asked: Question, available: list[Bundle]) -> Preemption | None:
    surplus = [p for b in available for p in b.surplus]
    whole = [b for b in available if b.whole]
    if surplus and asked.placed(surplus):
        return _spare(asked, surplus, [])
    for bundle in whole[:MAX_SINGLE_GANGS]:
        if asked.placed([*surplus, *bundle.whole]):
            return _spare(asked, surplus, [bundle])

    def fits(count: int) -> bool:
        return bool(asked.placed([*surplus, *(p for b in whole[:count] for p in b.whole)]))

    if not fits(len(whole)):
        return None
    low, high = 0, len(whole)  # too few, enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return _spare(asked, surplus, whole[:high])


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
