"""What the head of the queue has claimed, and who may start all the same (EASY backfill, Lifka 1995).

The head is the first gang that waits for room, has waited long enough, and could run if all else ended. It does not fit
now. So whatever is free and could hold its members is its own: the places of as many members as fit, in their order,
and what is free on the nodes that lack least for the others. That is worked out anew in each cycle, before anybody
behind it is asked. What ends goes to the head first, and what was backfilled before counts by itself: it is not free.

Who is behind the head may start beside its claim; or within it, if all that starts will have ended before the head can
start, by runtimes that are known, or declared and kept to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from podgroup.solve.place import place
from podgroup.solve.question import Class, Gang, Member, Placed, Trial, asked_by, classes_of
from podgroup.state.allocation import Holding
from podgroup.state.ledger import Ints, Ledger, Mask
from podgroup.state.shape import Shape


class Head(NamedTuple):
    """The first gang that waits for room, and what it has claimed."""

    key: str
    gang: Gang
    claims: tuple[Holding, ...]

    @property
    def held(self) -> list[str]:
        """Under which names the claims are held."""
        return [claim.uid for claim in self.claims]


def claim(ledger: Ledger, key: str, gang: Gang) -> tuple[Head, int]:
    """What a gang that does not fit claims of what is free now, and of how many members the places are among it."""
    wished = gang._replace(quorum=0, preferred_topology=(), min_resources={})
    claims: list[Holding] = []
    placed: list[Placed] = []
    left = list(gang.members[: gang.quorum])

    def take(members: Sequence[Member]) -> None:
        nodes = (*gang.fixed, *(one.node for one in placed))
        with ledger.with_also(claims):
            found = place(ledger, wished._replace(members=tuple(members), fixed=nodes)) or []
        for one in found:
            claims.append(_room(f"claim:{len(claims)}", one.node, dict(one.member.shape.requests)))
            placed.append(one)
            left.remove(one.member)

    take(left)
    for group in classes_of(left, ledger) if left else ():
        take(group.members)
    if not gang.leave:  # parts of members, where nobody else is owed them
        with ledger.with_also(claims):
            parts = [*_parts(ledger, gang, placed, left), *_reserve(ledger, gang), *_of_budgets(ledger, left)]
        claims += [_room(f"claim:{len(claims) + i}", node, amounts) for i, (node, amounts) in enumerate(parts)]
    return Head(key, gang, tuple(claims)), len(placed)


def _room(uid: str, node: str, amounts: Mapping[str, int]) -> Holding:
    return Holding(uid, uid, "", node, Shape(requests=tuple(sorted(amounts.items()))), {})


def _parts(
    ledger: Ledger, gang: Gang, placed: Sequence[Placed], members: Sequence[Member]
) -> Iterator[tuple[str, dict[str, int]]]:
    """For each member that has no place yet what is free on a node that lacks least for it."""
    if not members:
        return
    trial = Trial(ledger, _domain(ledger, gang, placed))
    for group in classes_of(members, ledger):
        rows, free = _closest(trial, group, len(group.members))
        for row in rows.tolist():
            amounts = {r: min(int(free[r][row]), amount) for r, amount in group.shape.requests}
            amounts = {r: amount for r, amount in amounts.items() if amount > 0}
            if amounts:
                yield ledger.names[row], amounts


def _closest(trial: Trial, group: Class, most: int) -> tuple[Ints, dict[str, Ints]]:
    """The nodes that could hold a member of a class were they empty, those that lack least of it first."""
    ledger, free = trial.ledger, dict[str, Ints]()
    possible, lacks = trial.mask(group), np.zeros(len(ledger.names))
    for resource, amount in group.shape.requests:
        column = ledger.columns.get(resource)
        if column is None:
            return np.zeros(0, dtype=np.int64), {}
        free[resource] = np.maximum(ledger.allocatable[:, column] - trial.used[:, column], 0)
        possible &= ledger.allocatable[:, column] >= amount
        lacks = np.maximum(lacks, np.maximum(amount - free[resource], 0) / amount)
    order = np.argsort(lacks, kind="stable")
    return order[possible[order] & (lacks[order] > 0)][:most], free


def _domain(ledger: Ledger, gang: Gang, placed: Sequence[Placed]) -> Mask:
    """The nodes of the one domain in which the gang must be, if some of it is somewhere already."""
    everywhere = np.ones(len(ledger.names), dtype=bool)
    nodes = [n for n in (*gang.fixed, *(one.node for one in placed)) if n in ledger.rows]
    if not gang.required_topology or not nodes:
        return everywhere
    codes = ledger.label(gang.required_topology).codes
    here: Mask = codes == codes[ledger.rows[nodes[0]]]
    return here


def _of_budgets(ledger: Ledger, members: Sequence[Member]) -> Iterator[tuple[str, dict[str, int]]]:
    """What is left of the budgets that members without a place count for, as far as they ask for it."""
    asked = asked_by(members)
    for budget in ledger.left_of(asked):
        left, column = min(max(budget.left, 0), asked[budget.resource]), ledger.columns[budget.resource]
        for row in np.flatnonzero(budget.nodes).tolist():
            free = min(max(int(ledger.allocatable[row, column] - ledger.used[row, column]), 0), left)
            if free > 0:
                yield ledger.names[row], {budget.resource: free}
                left -= free


def _reserve(ledger: Ledger, gang: Gang) -> Iterator[tuple[str, dict[str, int]]]:
    """What is free of what must be free beside the members (minResources)."""
    if not gang.min_resources:
        return
    usable = np.flatnonzero(ledger.standing(gang.members[0].shape))
    for resource, amount in gang.min_resources.items():
        column, left = ledger.columns.get(resource), amount
        for row in usable.tolist() if column is not None else ():
            free = min(max(int(ledger.allocatable[row, column] - ledger.used[row, column]), 0), left)
            if free > 0:
                yield ledger.names[row], {resource: free}
                left -= free
