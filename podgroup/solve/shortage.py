"""Why a gang does not fit, in numbers: how many members would, what stops the rest, and the largest free block."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from colocate.cluster.api import POWER_RESOURCES
from podgroup.solve.place import most_that_fit
from podgroup.solve.question import Class, Gang, Trial, asked_by, classes_of
from podgroup.state.ledger import Ints, Ledger, Mask
from podgroup.state.node_budgets import capped

MAX_REASONS = 3


class Shortage(NamedTuple):
    """What a gang that does not fit is told."""

    fit: int
    quorum: int
    blocked_by: str
    """The resource, or the filter, without which the most members more would fit; empty if it is no single one."""
    block: tuple[int, int]
    """(nodes, units on each) of the free block with the most units of that resource."""
    refused: tuple[tuple[str, int], ...]
    """(why, nodes) of the nodes that filters rule out."""

    @property
    def text(self) -> str:
        """One line."""
        parts = [f"{self.fit} of {self.quorum} members fit"]
        if self.blocked_by:
            parts.append(f"blocked by {self.blocked_by}")
        if self.block[0]:
            parts.append(f"largest free block {self.block[0]}x{amount_text(self.blocked_by, self.block[1])}")
        parts += [f"{nodes} node{'s' if nodes > 1 else ''}: {why}" for why, nodes in self.refused[:MAX_REASONS]]
        return "; ".join(parts)


def amount_text(resource: str, amount: int) -> str:
    """An amount of a resource as its users write it."""
    if resource == "cpu":
        return f"{amount / 1000:g}"
    if resource in POWER_RESOURCES:
        return f"{amount} W"
    return f"{amount / (1 << 30):.1f}Gi" if resource in ("memory", "ephemeral-storage") else str(amount)


def shortage(ledger: Ledger, gang: Gang) -> Shortage:
    """Why `place` found nothing."""
    fit = most_that_fit(ledger, gang)
    trial = Trial(ledger, np.ones(len(ledger.names), dtype=bool))
    group = most_lacking(ledger, gang)[0]
    mask = trial.mask(group)
    resource = _scarcest(trial, group, mask)
    blocked = resource
    if not resource and gang.required_topology:
        blocked = f"required topology {gang.required_topology}"
    elif not resource and gang.min_resources and (short := _short_of(ledger, gang)):
        blocked = f"minResources ({short})"
    elif not resource and gang.leave and (gang.min_resources or fit < gang.quorum):
        blocked = "what others are owed of their minResources"
    elif not resource and gang.min_resources:
        blocked = "minResources (enough is free, but not where its members fit)"
    elif not resource and fit < gang.quorum:
        blocked = _over_budget(trial, group, mask)
    block = _largest_block(ledger, mask, resource) if resource in ledger.columns else (0, 0)
    return Shortage(min(fit, gang.quorum), gang.quorum, blocked, block, tuple(_refusals(ledger, group)))


def most_lacking(ledger: Ledger, gang: Gang) -> list[Class]:
    """Its classes of equal members, those first of which the most do not fit even alone."""
    trial = Trial(ledger, np.ones(len(ledger.names), dtype=bool))
    return sorted(classes_of(gang.members, ledger), key=lambda c: (-_lacking(trial, c), -len(c.members)))


def _short_of(ledger: Ledger, gang: Gang) -> str:
    """Of which resource it asks for more than is free on the nodes that it may use, in words; empty if of none."""
    mask, found = ledger.standing(gang.members[0].shape), []
    members = asked_by(gang.members[: gang.quorum])
    asked = {resource: amount + members.get(resource, 0) for resource, amount in gang.min_resources.items()}
    for resource in gang.min_resources:
        column = ledger.columns.get(resource)
        free = np.maximum(ledger.free[:, column], 0)[mask].sum() if column is not None else 0
        found.append((int(free) / max(asked[resource], 1), resource, int(free)))
    share, resource, free = min(found)
    if share >= 1:
        return ""
    return f"{amount_text(resource, asked[resource])} of {resource}, {amount_text(resource, free)} free"


def _over_budget(trial: Trial, group: Class, mask: Mask) -> str:
    """The budget of a set of nodes that leaves the least for a class, in words; empty if none is in its way."""
    wanted, caps = len(group.members), trial.caps(group)
    room = np.minimum(trial.room(group, mask), wanted)
    if not caps or int(capped(room, caps, np.arange(len(room))).sum()) >= wanted:
        return ""
    least = min(caps, key=lambda cap: (cap.most, cap.name))
    left = next(one for one in trial.ledger.left_of(dict(group.shape.requests), trial.used) if one.name == least.name)
    of = f"{amount_text(left.resource, max(left.left, 0))} of {amount_text(left.resource, left.amount)}"
    return f"budget {left.name} ({of} {left.resource} left)"


def _lacking(trial: Trial, group: Class) -> int:
    """How many members of a class do not fit even alone."""
    wanted = len(group.members)
    return wanted - int(np.minimum(trial.room(group, trial.mask(group)), wanted).sum())


def _scarcest(trial: Trial, group: Class, mask: Mask) -> str:
    """The resource without which the most members more would fit."""
    wanted = len(group.members)
    now = int(np.minimum(trial.room(group, mask), wanted).sum())
    if now >= wanted or not mask.any():
        return ""
    gains = []
    for resource, _ in group.shape.requests:
        others = tuple(r for r in group.shape.requests if r[0] != resource)
        if resource not in trial.ledger.columns:
            return f"{resource}, which no node has"
        without = group._replace(shape=type(group.shape)(requests=others, host_ports=group.shape.host_ports))
        gains.append((int(np.minimum(trial.room(without, mask), wanted).sum()) - now, resource))
    gain, resource = max(gains, key=lambda g: (g[0], g[1]))
    return resource if gain > 0 else ""


def _largest_block(ledger: Ledger, mask: Mask, resource: str) -> tuple[int, int]:
    column = ledger.columns[resource]
    free = np.sort((ledger.allocatable[:, column] - ledger.used[:, column])[mask])[::-1]
    free = free[free > 0]
    if not len(free):
        return 0, 0
    best = int(np.argmax(free * np.arange(1, len(free) + 1)))
    return best + 1, int(free[best])


def _refusals(ledger: Ledger, group: Class) -> list[tuple[str, int]]:
    """How many nodes each filter rules out that none before it did."""
    shape = group.shape
    selected = ledger.chosen(shape)
    for selector in shape.volume_affinity:
        selected &= ledger.selected(selector)
    repelled = np.zeros(len(ledger.names), dtype=bool)
    trial = Trial(ledger, np.ones(len(ledger.names), dtype=bool))
    whole = trial.mask(group)
    filters: list[tuple[str, Mask]] = [
        ("not ready", ~ledger.awake(shape.tolerations)),
        ("untolerated taint or cordoned", ~ledger.tolerated(shape.tolerations)),
        ("node selector, affinity or volume", ~selected),
        ("host port taken", ledger.ports_taken(shape.host_ports)),
        ("pod anti-affinity", ~whole),
    ]
    found = []
    for why, ruled_out in filters:
        fresh: Ints = np.flatnonzero(ruled_out & ~repelled)
        repelled |= ruled_out
        if len(fresh):
            found.append((why, len(fresh)))
    return found
