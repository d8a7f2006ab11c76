"""Room that a gang which has started is still owed: its minResources less what its members hold.

Spark starts one driver (minMember 1) and makes its executors afterwards; MPI may make its launcher last. Were their
room given away meanwhile, drivers would hold nodes and wait for each other. What is owed is an amount, not a place:
others may start as long as so much stays free on the nodes that its owner can use. It is a lease from the gang's start
(volcano#2633: stale groups must not hold room for ever), respected by gangs that are no more important; of two that
both have one, the later respects the earlier's, so that they never wait for each other.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from colocate.objects import Pod
from colocate.units import seconds_of
from podgroup.solve.question import Debt
from podgroup.state.cluster import HOLDING_PHASES, Cluster
from podgroup.state.gangs import without_former_runs
from podgroup.state.shape import Shape, amounts


class Owed(NamedTuple):
    """What one gang is owed."""

    amounts: dict[str, int]
    shape: Shape
    """Of one of its members: it says which nodes the gang can use."""
    priority: int
    began: float
    until: float


def unused_min_resources(cluster: Cluster, key: str, shapes: Iterable[Shape]) -> dict[str, int]:
    """What a group's minResources asks for beyond members of these shapes, in the solver's units; empty if nothing.

    Raises ValueError for a quantity that is none.
    """
    group = cluster.groups.get(key)
    if group is None or not group.spec.min_resources:
        return {}
    rest = amounts(group.spec.min_resources)
    for shape in shapes:
        for resource, amount in shape.requests:
            if resource in rest:
                rest[resource] -= amount
    return {resource: amount for resource, amount in rest.items() if amount > 0}


class MinResources:
    """Those of all gangs."""

    def __init__(self, lease_seconds: float) -> None:
        self._lease_seconds = lease_seconds
        self._of: dict[str, Owed] = {}

    def refresh(self, cluster: Cluster, key: str, kept: Iterable[Shape], now: float) -> bool:
        """Look at a gang again; whether it is owed less than before. `kept` is room that is held for its members."""
        before, after = self._of.get(key), self._owed(cluster, key, kept, now)
        if after is not None:
            self._of[key] = after
        else:
            self._of.pop(key, None)
        if before is None or after is None:
            return before is not None
        fell = any(after.amounts.get(resource, 0) < amount for resource, amount in before.amounts.items())
        return fell or after.priority < before.priority

    def concerns(self, cluster: Cluster, key: str) -> bool:
        """Whether a gang is owed something, or might be."""
        group = cluster.groups.get(key)
        return key in self._of or (group is not None and bool(group.spec.min_resources))

    def expire(self, now: float) -> bool:
        """Give up what is over; whether something was."""
        over = [key for key, one in self._of.items() if now >= one.until]
        for key in over:
            del self._of[key]
        return bool(over)

    def against(self, key: str, priority: int, without: str = "") -> tuple[Debt, ...]:
        """What a gang of this priority must leave free for others, or would have to if `without` were not there."""
        own, found = self._of.get(key), []
        for other, one in self._of.items():
            if other in (key, without) or one.priority < priority:
                continue
            if own is not None and (-own.priority, own.began, key) < (-one.priority, one.began, other):
                continue
            found.append(Debt(one.amounts, one.shape))
        return tuple(found)

    @property
    def ends(self) -> list[float]:
        """When each is over."""
        return [one.until for one in self._of.values()]

    def _owed(self, cluster: Cluster, key: str, kept: Iterable[Shape], now: float) -> Owed | None:
        if key not in cluster.groups:
            return None
        pods = cluster.pods_of(key)
        holding = [p for p in pods if p.metadata.uid in cluster.ledger.holdings and not p.deleting]
        done = [p for p in without_former_runs(pods) if p.status.phase == "Succeeded"]
        if not holding and not 0 < len(done) < cluster.groups[key].spec.min_member:
            return None  # it has not started, or has ended; completed stages hand over to the next ones
        began = self._began(cluster, key, holding or done, now)
        if began is None or now >= began + self._lease_seconds:
            return None
        try:
            rest = unused_min_resources(cluster, key, [*kept, *(cluster.shape(p) for p in (*holding, *done))])
        except ValueError:
            return None  # it was edited since it started, and is told so once it waits
        priority = max(p.spec.priority for p in holding or done)
        shape = cluster.shape(min(holding or done, key=lambda p: p.metadata.name))
        return Owed(rest, shape, priority, began, began + self._lease_seconds) if rest else None

    def _began(self, cluster: Cluster, key: str, holding: list[Pod], now: float) -> float | None:
        """When this run of the gang was first planned; None if somebody else started it."""
        plan = cluster.plans.get(key)
        anew = not any(p.spec.node_name for p in holding)
        if anew and (plan is None or plan.status.phase not in HOLDING_PHASES):
            return now  # promised in this cycle; its plan is being written
        return seconds_of(plan.spec.began) if plan is not None else None
