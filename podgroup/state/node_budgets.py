"""What pods may use of a resource on a set of nodes together: watts of a rack, a quota of the whole cluster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from colocate.objects import LabelSelector, Lean
from podgroup.api import PowerBudget

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class NodeSetBudget(Lean, frozen=True):
    """At most `amount` of a resource is asked for by the pods on the nodes that a selector selects."""

    name: str
    resource: str
    amount: str | int | float
    """In the resource's own unit, as a pod writes it."""
    node_selector: LabelSelector = LabelSelector()
    """Of the labels of nodes; an empty one selects all."""
    each_node: int = 0
    """So much is set aside for each of these nodes."""


def of_power_budget(budget: PowerBudget) -> NodeSetBudget:
    """What it means for the solver."""
    spec = budget.spec
    return NodeSetBudget(budget.metadata.name, spec.resource, spec.watts, spec.node_selector, spec.idle_watts)


class Left(NamedTuple):
    """What is left of a budget."""

    name: str
    resource: str
    nodes: Mask
    amount: int
    left: int
    """Of what is not set aside for the nodes; below 0 where what runs asks for more than it."""

    def cap(self, each: int) -> Cap:
        """For members of which each asks for so much."""
        return Cap(self.name, self.nodes, max(self.left, 0) // each)


class Cap(NamedTuple):
    """A budget as the members of one class meet it."""

    name: str
    nodes: Mask
    most: int
    """So many members more may be on those nodes together."""


def capped(room: Ints, caps: Sequence[Cap], order: Ints) -> Ints:
    """How many members each node takes so that no budget is exceeded, however many of them are taken.

    `order` says which nodes have their part first. The sum is the largest possible where budgets are nested or apart,
    as racks in a row are; where they overlap otherwise it may be less, and is never more than is allowed.
    """
    for cap in sorted(caps, key=lambda c: int(c.nodes.sum())):
        rows = order[cap.nodes[order]]
        before = np.cumsum(room[rows]) - room[rows]
        room = room.copy()
        room[rows] = np.clip(cap.most - before, 0, room[rows])
    return room
