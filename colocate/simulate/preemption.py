"""kube-scheduler's preemption: whose pods a pod of a higher priority takes the place of, and on which node.

As its plugin DefaultPreemption does it (pkg/scheduler/framework/preemption, 1.36), pod by pod and without budgets of
disruption: of nodes from one on, until a tenth of all (at least a hundred) would do; on each all pods of lower priority
are taken away, and given back where the pod fits all the same, the most important first. The node with the least
important victims is chosen.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from colocate.simulate.placement import Kinds, State, ask_of, give_back, take_again
from colocate.simulate.scores import fits, kernel

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
LEAST_CANDIDATES, CANDIDATES_PERCENT = 100, 10
FAR = 1 << 31
"""Added to each priority before they are summed, so that negative ones do not make many victims look few."""


class Lesser(NamedTuple):
    """The pods of a lower priority than somebody's, by node; one array each."""

    head: Ints
    """(nodes,) the first of each, -1: none."""
    after: Ints
    """(pods,) the next on its node, -1: none."""
    pod: Ints
    """Its place among the pods of all jobs."""
    job: Ints
    kind: Ints
    mask: Ints
    """Its GPUs, a bit each."""
    began: Floats
    """Seconds; the earlier is the more important of equals."""


@kernel()
def by_node(nodes: int, node: Ints) -> tuple[Ints, Ints]:
    """Of pods on these nodes `head` and `after` of Lesser."""
    head, after = np.full(nodes, -1), np.empty(node.size, np.int64)
    for at in range(node.size):
        after[at], head[node[at]] = head[node[at]], at
    return head, after


@kernel()
def nominate(kinds: Kinds, state: State, k: int, start: int, lesser: Lesser) -> tuple[int, Ints]:
    """The node for a pod of a kind that fits nowhere, and its victims, by their numbers in `lesser`; -1: none."""
    count, found, best = lesser.head.size, 0, -1
    wanted = max(count * CANDIDATES_PERCENT // 100, LEAST_CANDIDATES)
    chosen, least = np.empty(0, np.int64), (0, 0, 0.0)
    for step in range(count):
        i = (start + step) % count
        if lesser.head[i] < 0:
            continue
        victims = _victims(kinds, state, k, i, lesser)
        if victims.size == 0:
            continue
        found += 1
        highest, total, latest = kinds.priority[lesser.kind[victims[0]]], 0, np.inf
        for v in victims:
            total += kinds.priority[lesser.kind[v]] + FAR
            if kinds.priority[lesser.kind[v]] == highest:
                latest = min(latest, lesser.began[v])
        rank = (highest, total, -latest)
        if best < 0 or rank < least:
            best, least, chosen = i, rank, victims
        if found >= wanted:
            break
    return best, chosen


@kernel()
def _victims(kinds: Kinds, state: State, k: int, i: int, lesser: Lesser) -> Ints:
    """Those of a node that have to go, the most important first; none where that would not help."""
    size, v, ask = 0, lesser.head[i], ask_of(kinds, k)
    while v >= 0:
        size, v = size + 1, lesser.after[v]
    order, v = np.empty(size, np.int64), lesser.head[i]
    for at in range(size):
        give_back(state, i, ask_of(kinds, lesser.kind[v]), lesser.mask[v])
        slot = at
        while slot > 0 and _before(kinds, lesser, v, order[slot - 1]):
            order[slot] = order[slot - 1]
            slot -= 1
        order[slot], v = v, lesser.after[v]
    helps, gone = fits(state.nodes, i, ask), 0
    for at in range(size):
        v = order[at]
        take_again(state, i, ask_of(kinds, lesser.kind[v]), lesser.mask[v])
        if helps and not fits(state.nodes, i, ask):
            give_back(state, i, ask_of(kinds, lesser.kind[v]), lesser.mask[v])
            order[gone], gone = v, gone + 1
    for at in range(gone):  # nobody has gone yet
        take_again(state, i, ask_of(kinds, lesser.kind[order[at]]), lesser.mask[order[at]])
    return order[:gone]


@kernel()
def _before(kinds: Kinds, lesser: Lesser, one: int, other: int) -> bool:
    """Whether one pod is more important than another."""
    mine, its = kinds.priority[lesser.kind[one]], kinds.priority[lesser.kind[other]]
    if mine != its:
        return mine > its  # type: ignore[no-any-return]
    if lesser.began[one] != lesser.began[other]:
        return lesser.began[one] < lesser.began[other]  # type: ignore[no-any-return]
    return lesser.pod[one] < lesser.pod[other]  # type: ignore[no-any-return]
