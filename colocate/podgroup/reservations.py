"""Room that a gang which has started is still owed: its minResources less what its members hold.

Spark starts one driver (minMember 1) and makes its executors afterwards; MPI may make its launcher last. Were their
room given away meanwhile, drivers would hold nodes and wait for each other. A reservation is an amount, not a place:
others may start as long as so much stays free in the whole cluster. It is a lease (volcano#2633: stale groups must not
hold room for ever), respected by gangs that are no more important than its owner.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from colocate.objects import Pod
from colocate.podgroup.cluster import Cluster
from colocate.podgroup.gangs import is_group
from colocate.podgroup.shape import amounts
from colocate.units import parse_time


class Reservation(NamedTuple):
    """What one gang is owed."""

    amounts: Mapping[str, int]
    priority: int
    until: float


def rest_of_min_resources(cluster: Cluster, key: str, pods: Iterable[Pod]) -> dict[str, int]:
    """What a group's minResources asks for beyond these members, in the solver's units; empty if nothing.

    Raises ValueError for a quantity that is none.
    """
    group = cluster.groups.get(key)
    if group is None or not group.spec.min_resources:
        return {}
    rest = amounts(group.spec.min_resources)
    for pod in pods:
        for resource, amount in cluster.shape(pod).requests:
            if resource in rest:
                rest[resource] -= amount
    return {resource: amount for resource, amount in rest.items() if amount > 0}


class Reservations:
    """Those of all gangs."""

    def __init__(self, lease_seconds: float) -> None:
        self._lease_seconds = lease_seconds
        self._of: dict[str, Reservation] = {}

    def refresh(self, cluster: Cluster, key: str, now: float) -> bool:
        """Look at a gang again; whether it is owed less than before."""
        before, after = self._of.pop(key, None), self._owed(cluster, key, now)
        if after is not None:
            self._of[key] = after
        return before is not None and before != after

    def expire(self, now: float) -> bool:
        """Give up what is over; whether something was."""
        over = [key for key, one in self._of.items() if now >= one.until]
        for key in over:
            del self._of[key]
        return bool(over)

    def against(self, key: str, priority: int) -> dict[str, int]:
        """What a gang of this priority must leave free for others."""
        total: dict[str, int] = {}
        for other, one in self._of.items():
            if other != key and one.priority >= priority:
                for resource, amount in one.amounts.items():
                    total[resource] = total.get(resource, 0) + amount
        return total

    @property
    def ends(self) -> list[float]:
        """When each is over."""
        return [one.until for one in self._of.values()]

    def _owed(self, cluster: Cluster, key: str, now: float) -> Reservation | None:
        group = cluster.groups.get(key) if is_group(key) else None
        if group is None or not group.spec.min_resources:
            return None
        pods = cluster.pods_of(key)
        holding = [p for p in pods if p.metadata.uid in cluster.ledger.holdings and not p.deleting]
        if not holding:
            return None  # it has not started, or has ended
        plan = cluster.plans.get(key)
        begun = parse_time(plan.spec.created) if plan is not None and plan.spec.created else None
        if begun is None:
            if not any(p.metadata.uid in cluster.planned for p in holding):
                return None  # somebody else started it
            begun = now
        until = begun + self._lease_seconds
        done = [p for p in pods if p.status.phase == "Succeeded"]
        try:
            rest = rest_of_min_resources(cluster, key, (*holding, *done))
        except ValueError:
            return None  # it was edited since it started, and is told so once it waits
        priority = max(p.spec.priority for p in holding)
        return Reservation(rest, priority, until) if rest and now < until else None
