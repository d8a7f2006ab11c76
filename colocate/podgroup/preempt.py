"""Who makes room for a more important gang: the fewest gangs broken, surplus members before any quorum, nobody in vain.

Victims are only pods of lower priority that have an owner and whose PodDisruptionBudgets allow it; a gang is broken as
a whole or not at all. Nothing is chosen unless the solver has placed the preemptor without the victims. Source: the
order of reprieves is kube-scheduler's (DefaultPreemption), the two kinds of bundles are Volcano's (gangpreempt).
"""

from __future__ import annotations

from collections.abc import Set
from typing import NamedTuple

from colocate.objects import Pod
from colocate.podgroup.cluster import Cluster
from colocate.podgroup.commit import owned
from colocate.podgroup.fit import Gang, Placed
from colocate.podgroup.gangs import gang_key, is_group
from colocate.podgroup.place import place
from colocate.podgroup.shape import matches

MAX_SINGLE_GANGS = 64


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


def bundles(
    cluster: Cluster, key: str, priority: int, spent: Set[str], wanted: frozenset[str] = frozenset()
) -> list[Bundle]:
    """What may be taken for the gang `key` of this priority, the least important and youngest first.

    Of a gang's surplus, members on the nodes `wanted` are named first. `spent` are the victims that have not gone yet:
    what their budgets allow is used up, whether the budgets' status says so already or not.
    """
    left = {name: budget.status.disruptions_allowed for name, budget in cluster.budgets.items()}
    for uid in sorted(spent & cluster.pods.keys()):
        _allowed(cluster, cluster.pods[uid], left)
    found = []
    for other in sorted({gang_key(cluster.pods[u]) for u in cluster.ledger.holdings if u in cluster.pods} - {key}):
        bound = [p for p in cluster.pods_of(other) if p.spec.node_name and not p.terminal and not p.deleting]
        if not bound or max(p.spec.priority for p in bound) >= priority:
            continue
        bound.sort(key=lambda p: (p.spec.node_name not in wanted, p.spec.priority, _youth(p), p.metadata.name))
        may = [p for p in bound if owned(p) and _allowed(cluster, p, left)]
        group = cluster.groups.get(other)
        done = sum(p.status.phase == "Succeeded" for p in cluster.pods_of(other))
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


def preempt(cluster: Cluster, gang: Gang, key: str, priority: int, spent: Set[str] = frozenset()) -> Preemption | None:
    """Victims for a gang that does not fit; None if no permitted victims make room for its quorum.

    For members beyond the quorum no other gang is broken: they take what is surplus elsewhere, or pods alone.
    """
    if min(cluster.priorities, default=priority) >= priority:
        return None
    leaving = [h.uid for h in cluster.ledger.holdings.values() if h.leaving]
    with cluster.ledger.without(leaving):
        if leaving and place(cluster.ledger, gang):
            return None  # what is leaving already makes room: nobody more need go
    everything = [p for b in bundles(cluster, key, priority, spent) for p in (*b.surplus, *b.whole)]
    ideal = _placed(cluster, gang, everything)
    if not ideal:
        return None
    available = bundles(cluster, key, priority, spent, frozenset(node for _, node in ideal))
    if gang.quorum < len(gang.members):
        mild = [b if not is_group(b.key) else b._replace(whole=[]) for b in available]
        found = _choose(cluster, gang._replace(quorum=len(gang.members)), mild)
        if found is not None:
            return found
    return _choose(cluster, gang, available)


def _choose(cluster: Cluster, gang: Gang, available: list[Bundle]) -> Preemption | None:
    surplus = [p for b in available for p in b.surplus]
    whole = [b for b in available if b.whole]
    if surplus and _fits(cluster, gang, surplus):
        return _spare(cluster, gang, surplus, [])
    for bundle in whole[:MAX_SINGLE_GANGS]:
        if _fits(cluster, gang, [*surplus, *bundle.whole]):
            return _spare(cluster, gang, surplus, [bundle])
    taken: list[Bundle] = []
    for bundle in whole:
        taken.append(bundle)
        if _fits(cluster, gang, [*surplus, *(p for b in taken for p in b.whole)]):
            return _spare(cluster, gang, surplus, taken)
    return None


def _spare(cluster: Cluster, gang: Gang, surplus: list[Pod], taken: list[Bundle]) -> Preemption | None:
    """Give back what is not needed: the most important gangs first, then surplus members."""
    for bundle in sorted(taken, key=lambda b: -b.priority):
        rest = [b for b in taken if b is not bundle]
        if _fits(cluster, gang, [*surplus, *(p for b in rest for p in b.whole)]):
            taken = rest
    keys = {b.key for b in taken}
    broken = [p for b in taken for p in (*b.surplus, *b.whole)]  # a remnant without its quorum is of no use
    surplus = [p for p in surplus if gang_key(p) not in keys]
    for pod in sorted(surplus, key=lambda p: -p.spec.priority):
        rest_of_surplus = [p for p in surplus if p is not pod]
        if _fits(cluster, gang, [*rest_of_surplus, *broken]):
            surplus = rest_of_surplus
    victims = [*surplus, *broken]
    placed = _placed(cluster, gang, victims)
    return Preemption(victims, placed, [b.key for b in taken]) if placed else None


def _fits(cluster: Cluster, gang: Gang, victims: list[Pod]) -> bool:
    return bool(_placed(cluster, gang, victims))


def _placed(cluster: Cluster, gang: Gang, victims: list[Pod]) -> list[Placed] | None:
    with cluster.ledger.without([p.metadata.uid for p in victims]):
        return place(cluster.ledger, gang)
