"""What would have to be different for a gang to start now; each change is proven, by placing the gang with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec

from colocate.objects import Node, ObjectMeta, Taint, Toleration
from podgroup.api import Counterfactual
from podgroup.solve.place import most_that_fit, place
from podgroup.solve.place_class import scarcest
from podgroup.solve.question import Debt, Gang, Member, asked_by
from podgroup.solve.shortage import amount_text, most_lacking
from podgroup.state.cluster import Cluster
from podgroup.state.gangs import gang_key
from podgroup.state.ledger import REPELLING, UNSCHEDULABLE, Ledger
from podgroup.state.shape import Shape

MAX_TRIED = 64
MAX_FOUND = 5
MAX_NODES = 64
SYSTEM = "node.kubernetes.io/"
"""Taints of this prefix say how a node is; to tolerate them is no mend."""
replace = msgspec.structs.replace


Step = Iterator[str | None]
"""One question to the solver at a time, the cluster as before after each: a change that is proven, or None."""


def counterfactuals(
    cluster: Cluster, key: str, gang: Gang, satisfied: int, owed_without: Callable[[str], tuple[Debt, ...]]
) -> Iterator[Counterfactual | None]:
    """The cheapest changes with which the gang starts, at most `MAX_FOUND`, found step by step.

    `satisfied` members of the quorum run or have completed; `owed_without(key)` is what must be left to others if that
    gang has ended.
    """
    group = cluster.groups.get(key)
    asked = group.spec.min_member if group is not None else satisfied + gang.quorum
    found = 0
    for changes in (
        _smaller(cluster.ledger, gang, satisfied, asked),
        _uncordoned(cluster.ledger, gang),
        _tolerated(cluster.ledger, gang),
        _anywhere(cluster.ledger, gang),
        _without_others(cluster, key, gang, owed_without),
        _larger_budget(cluster.ledger, gang),
        _more_nodes(cluster.ledger, gang),
    ):
        for change in changes:
            yield Counterfactual(change=change) if change is not None else None
            found += change is not None
            if found == MAX_FOUND:
                return


def _smaller(ledger: Ledger, gang: Gang, satisfied: int, asked: int) -> Step:
    fit = most_that_fit(ledger, gang)
    if 0 < fit < gang.quorum and place(ledger, gang._replace(quorum=fit, min_resources={})) is not None:
        yield f"minMember were {satisfied + fit} instead of {asked}"


def _uncordoned(ledger: Ledger, gang: Gang) -> Step:
    cordoned = [node for node in ledger.nodes() if node.spec.unschedulable][:MAX_TRIED]
    for node in cordoned:
        taints = [t for t in node.spec.taints if t.key != UNSCHEDULABLE.key]
        with ledger.as_if(replace(node, spec=replace(node.spec, unschedulable=False, taints=taints))):
            placed = place(ledger, gang)
        yield f"node {node.metadata.name} is uncordoned" if placed is not None else None


def _tolerated(ledger: Ledger, gang: Gang) -> Step:
    taints: dict[Taint, None] = {}
    for node in ledger.nodes():
        taints.update(
            dict.fromkeys(t for t in node.spec.taints if t.effect in REPELLING and not t.key.startswith(SYSTEM))
        )
    for taint in list(taints)[:MAX_TRIED]:
        toleration = Toleration(key=taint.key, operator="Equal", value=taint.value, effect=taint.effect)
        members = tuple(_tolerating(m, toleration) for m in gang.members)
        placed = place(ledger, gang._replace(members=members))
        value = f"={taint.value}" if taint.value else ""
        yield f"its pods tolerate the taint {taint.key}{value}:{taint.effect}" if placed is not None else None


def _tolerating(member: Member, toleration: Toleration) -> Member:
    shape: Shape = replace(member.shape, tolerations=(*member.shape.tolerations, toleration))
    return member._replace(shape=shape)


def _anywhere(ledger: Ledger, gang: Gang) -> Step:
    if gang.required_topology and place(ledger, gang._replace(required_topology="")) is not None:
        yield f"it is not required to be within one {gang.required_topology}"


def _without_others(cluster: Cluster, key: str, gang: Gang, owed_without: Callable[[str], tuple[Debt, ...]]) -> Step:
    """One other gang has ended; those with the fewest pods first."""
    gangs: dict[str, list[str]] = {}
    for uid in cluster.ledger.holdings:
        other = gang_key(cluster.pods[uid]) if uid in cluster.pods else key
        if other != key:
            gangs.setdefault(other, []).append(uid)
    for other, uids in sorted(gangs.items(), key=lambda g: (len(g[1]), g[0]))[:MAX_TRIED]:
        with cluster.ledger.without(uids):
            placed = place(cluster.ledger, gang._replace(leave=owed_without(other)))
        yield f"{other.replace('pod:', '')} ends ({len(uids)} pods)" if placed is not None else None


def _more_nodes(ledger: Ledger, gang: Gang) -> Step:
    """As many more nodes as it takes, empty ones like the one with the most of what a class of members lacks most."""
    candidates = [n for n in ledger.nodes() if not n.spec.unschedulable and not n.spec.taints]
    models: dict[str, Node] = {}
    for group in most_lacking(ledger, gang) if candidates else ():
        scarce = [r for r, _ in group.shape.requests if r in ledger.columns]
        rare = scarcest(ledger, group)
        scarce.sort(key=lambda r: rare is None or r != rare[0])
        like = max(candidates, key=lambda n: _offered(ledger, n, scarce))
        models.setdefault(like.metadata.name, like)
    for like in models.values():
        too_few, enough = 0, 1
        while enough <= MAX_NODES and not _fits_beside(ledger, gang, like, enough):
            too_few, enough = enough, 2 * enough
            yield None
        if enough > MAX_NODES:
            continue
        while enough - too_few > 1:
            middle = (too_few + enough) // 2
            too_few, enough = (too_few, middle) if _fits_beside(ledger, gang, like, middle) else (middle, enough)
            yield None
        yield f"{enough} more node{'s' if enough > 1 else ''} like {like.metadata.name}"
        return


def _larger_budget(ledger: Ledger, gang: Gang) -> Step:
    """A budget of a set of nodes is as much larger as it takes."""
    asked = asked_by(gang.members[: gang.quorum])
    for budget in ledger.left_of(asked):
        spent, resource = budget.amount - budget.left, budget.resource
        with ledger.as_if_budget(budget.name, max(spent, 0) + asked[resource]):
            placed = place(ledger, gang._replace(members=gang.members[: gang.quorum]))
        if placed is None:
            yield None
            continue
        there = [m for m, node in placed if budget.nodes[ledger.rows[node]]]
        amount = spent + asked_by(there).get(resource, 0)
        if amount > budget.amount:
            text, now = amount_text(resource, amount), amount_text(resource, budget.amount)
            yield f"the budget {budget.name} were {text} of {resource} instead of {now}"


def _offered(ledger: Ledger, node: Node, resources: list[str]) -> list[int]:
    return [int(ledger.allocatable[ledger.rows[node.metadata.name], ledger.columns[r]]) for r in resources]


def _fits_beside(ledger: Ledger, gang: Gang, like: Node, count: int) -> bool:
    named = [f"{like.metadata.name}-more-{i}" for i in range(count)]
    labels = [{k: name if v == like.metadata.name else v for k, v in like.metadata.labels.items()} for name in named]
    metas = [ObjectMeta(name=name, labels=its) for name, its in zip(named, labels, strict=True)]
    with ledger.as_if(*(Node(metadata=meta, spec=like.spec, status=like.status) for meta in metas)):
        return place(ledger, gang) is not None
