"""Who makes room for a more important gang: the fewest gangs broken, surplus members before any quorum, nobody in vain.

Victims are only pods of lower priority that have an owner and whose PodDisruptionBudgets allow it; a gang is broken as
a whole or not at all. Nothing is chosen unless the solver has placed the preemptor without the victims. Source: the
order of reprieves is kube-scheduler's (DefaultPreemption), the two kinds of bundles are Volcano's (gangpreempt).
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import NamedTuple

from colocate.objects import Pod
from colocate.units import seconds_of
from podgroup.solve.place import place
from podgroup.solve.question import Gang, Placed
from podgroup.state.cluster import Cluster
from podgroup.state.gangs import gang_key, is_group, owned, without_former_runs
from podgroup.state.shape import matches

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
    key = search.key
    for other in sorted({gang_key(cluster.pods[u]) for u in cluster.ledger.holdings if u in cluster.pods} - {key}):
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
    return sorted(found, key=lambda b: (b.priority, _youth((b.whole or b.surplus)[0]), b.key))


def _allowed(cluster: Cluster, pod: Pod, left: dict[str, int]) -> bool:
    """Whether every budget of this pod has one left; it is then spent."""
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
    everything = [p for b in bundles(cluster, search, shared=shared) for p in (*b.surplus, *b.whole)]
    ideal = _placed(cluster, gang, everything)
    if not ideal:
        return None
    available = bundles(cluster, search, frozenset(node for _, node in ideal), shared=shared)
    if gang.quorum < len(gang.members):
        mild = [b if not is_group(b.key) else b._replace(whole=[]) for b in available]
        found = _choose(cluster, gang._replace(quorum=len(gang.members)), mild)
        if found is not None:
            return found
    return _choose(cluster, gang, available)


def _choose(cluster: Cluster, gang: Gang, available: list[Bundle]) -> Preemption | None:
    surplus = [p for b in available for p in b.surplus]
    whole = [b for b in available if b.whole]
    if surplus and _placed(cluster, gang, surplus):
        return _spare(cluster, gang, surplus, [])
    for bundle in whole[:MAX_SINGLE_GANGS]:
        if _placed(cluster, gang, [*surplus, *bundle.whole]):
            return _spare(cluster, gang, surplus, [bundle])

    def fits(count: int) -> bool:
        return bool(_placed(cluster, gang, [*surplus, *(p for b in whole[:count] for p in b.whole)]))

    if not fits(len(whole)):
        return None
    low, high = 0, len(whole)  # too few, enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return _spare(cluster, gang, surplus, whole[:high])


def _spare(cluster: Cluster, gang: Gang, surplus: list[Pod], taken: list[Bundle]) -> Preemption | None:
    """Give back what is not needed: the most important gangs first, then surplus members."""
    broken = {b.key for b in taken}
    units = [[*b.surplus, *b.whole] for b in sorted(taken, key=lambda b: -b.priority)]  # a remnant is of no use
    units += [[p] for p in sorted(surplus, key=lambda p: -p.spec.priority) if gang_key(p) not in broken]
    needed = _fewer(cluster, gang, units)
    victims = [p for unit in reversed(needed) for p in unit]
    placed = _placed(cluster, gang, victims)
    keys = {gang_key(p) for p in victims}
    return Preemption(victims, placed, [b.key for b in taken if b.key in keys]) if placed else None


def _fewer(cluster: Cluster, gang: Gang, units: list[list[Pod]]) -> list[list[Pod]]:
    """These less what need not go, the first ones given back first; many at once, for each question costs."""
    ideal = _placed(cluster, gang, [p for unit in units for p in unit])
    nodes = {node for _, node in ideal or ()}
    near = [unit for unit in units if any(p.spec.node_name in nodes for p in unit)]
    if len(near) < len(units) and _placed(cluster, gang, [p for unit in near for p in unit]):
        units = near
    step, questions = 1 if len(units) <= MAX_QUESTIONS else len(units) // 2, 0
    while True:
        start = 0
        while start < len(units) and questions < MAX_QUESTIONS:
            rest = [*units[:start], *units[start + step :]]
            questions += 1
            if rest and _placed(cluster, gang, [p for unit in rest for p in unit]):
                units = rest
            else:
                start += step
        if step == 1 or questions >= MAX_QUESTIONS:
            return units
        step = max(step // 2, 1)


def _placed(cluster: Cluster, gang: Gang, victims: list[Pod]) -> list[Placed] | None:
    with cluster.ledger.without([p.metadata.uid for p in victims]):
        return place(cluster.ledger, gang)
