"""Pods onto nodes with shared GPUs, one after the other: filters and scores, compiled.

A node's score for a kind of pod is kept until the node changes. Policies: see `scores.POLICIES`; `fgd` is the gradient
of fragmentation (Weng and others, USENIX ATC 2023, 4.2), `native` what kube-scheduler 1.36 does by default
(NodeResourcesFit's LeastAllocated and NodeResourcesBalancedAllocation over CPU and memory, whole points, a sample of
the nodes that fit, ties by lot), which looks at no GPU; `most-allocated` scores GPUs as operators configure it.
`native` is compared with the real one in tests/cluster.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from colocate.simulate.scores import (
    ALL_CPU,
    ALL_MEMORY,
    BEST_FIT,
    CLASS,
    COLUMNS,
    COUNTED_CPU,
    COUNTED_CPU_MILLI,
    COUNTED_MEMORY,
    COUNTED_MEMORY_MIB,
    CPU,
    FGD,
    GPUS,
    LEFT,
    MEMORY,
    MODEL,
    MOST_GPUS,
    NATIVE,
    POLICIES,
    RANDOM,
    WHOLE,
    Ask,
    Floats,
    Ints,
    Typical,
    class_of,
    device_for,
    fits,
    kernel,
    rate,
)

OFFER = 8


class Nodes(NamedTuple):
    """One array each."""

    cpu_milli: Ints
    memory_mib: Ints
    gpus: Ints
    model: Ints
    """A number below 63."""
    rack: Ints
    block: Ints
    """Of racks: what is below one switch of aggregation."""


class Kinds(NamedTuple):
    """Pods that ask for the same, one array each."""

    cpu_milli: Ints
    memory_mib: Ints
    gpus: Ints
    gpu_milli: Ints
    """Of each GPU."""
    models: Ints
    """The GPU models that may be, a bit each; 0: any."""
    priority: Ints
    """The greater goes first."""


class State(NamedTuple):
    """The nodes, and what is free of them."""

    nodes: Ints
    """(nodes, COLUMNS), see `scores`."""
    fragmented: Floats
    """(nodes,) of free GPUs, in thousandths, what a typical pod could not use; NaN: not worked out since a change."""


class Board(NamedTuple):
    """The fleet, and what is known of where a pod of each kind would go best: scores hold until a node changes."""

    nodes: Nodes
    kinds: Kinds
    state: State
    typical: Typical
    version: Ints
    """(nodes,) how often each has changed."""
    known: Ints
    """(kinds, nodes) of which version of the node the score is."""
    score: Floats
    device: Ints
    rank: Ints
    """(nodes,) of equals the least is taken."""


class Outcome(NamedTuple):
    """Where each pod went, and what was allocated once it was there."""

    node: Ints
    """-1: nowhere."""
    allocated_milli: Ints
    """Of all GPUs, after each pod."""


def arrays(rows: Iterable[Sequence[int]]) -> Iterator[Ints]:
    """Rows as columns, for Nodes and Kinds."""
    return (np.array(column, np.int64) for column in zip(*rows, strict=True))


def place(nodes: Nodes, kinds: Kinds, pods: Ints, policy: str, seed: int, shares: Floats | None = None) -> Outcome:
    """Place pods, numbers of their kinds, in their order; none departs.

    `shares`: for `fgd`, of each kind in the workload, 0 for those that do not count (see `typical_shares`).
    """
    rng = np.random.default_rng(seed)
    board = new_board(nodes, kinds, shares, rng)
    lots = rng.integers(0, 1 << 30, size=len(pods))
    return Outcome(*_place(board, pods, POLICIES.index(policy), lots))


def arrivals(kinds: Kinds, kind_of: Ints, gpu_milli: float, seed: int) -> Ints:
    """The kinds of pods in the order in which they come: a list shuffled, and drawn from until it asks for so much."""
    rng = np.random.default_rng(seed)
    asks = kinds.gpus * kinds.gpu_milli
    order = list(kind_of[rng.permutation(len(kind_of))])
    total = int(asks[order].sum())
    while True:
        another = kind_of[rng.integers(len(kind_of))]
        if total + asks[another] > gpu_milli:
            break
        order.append(another)
        total += int(asks[another])
    while total > gpu_milli:
        total -= int(asks[order.pop(int(rng.integers(len(order))))])
    return np.array(order, np.int64)


def new_board(nodes: Nodes, kinds: Kinds, shares: Floats | None, rng: np.random.Generator) -> Board:
    """An empty fleet of which nothing is known yet; `shares` as `place` has them."""
    rows = (len(kinds.cpu_milli), len(nodes.cpu_milli))
    rank = rng.permutation(rows[1]).astype(np.int64)
    known, score, device = np.full(rows, -1, np.int64), np.empty(rows), np.zeros(rows, np.int64)
    version = np.zeros(rows[1], np.int64)
    return Board(nodes, kinds, empty(nodes), _typical(kinds, shares), version, known, score, device, rank)


def _typical(kinds: Kinds, shares: Floats | None) -> Typical:
    counted = np.empty(0, np.int64) if shares is None else np.flatnonzero(shares)
    asks = np.stack([column[counted] for column in kinds[: len(Ask._fields)]], axis=1)
    return Typical(asks, np.empty(0) if shares is None else shares[counted])


def empty(nodes: Nodes) -> State:
    """Nodes on which nothing is."""
    table = np.zeros((len(nodes.cpu_milli), COLUMNS), np.int64)
    table[:, CPU] = table[:, ALL_CPU] = nodes.cpu_milli
    table[:, MEMORY] = table[:, ALL_MEMORY] = nodes.memory_mib
    table[:, GPUS], table[:, MODEL] = nodes.gpus, nodes.model
    table[:, LEFT:CLASS] = WHOLE * (np.arange(MOST_GPUS) < nodes.gpus[:, None])
    return State(table, np.full(len(table), np.nan))


def typical_shares(kind_of: Ints, kinds: Kinds, cover: float = 0.95) -> Floats:
    """The share of the most frequent kinds of pods, by CPU and GPU, that make up so much of a workload."""
    asks = np.stack([kinds.cpu_milli, kinds.gpus, kinds.gpu_milli, kinds.models], axis=1)
    distinct, inverse = np.unique(asks, axis=0, return_inverse=True)
    count = np.bincount(inverse.ravel()[kind_of], minlength=len(distinct))
    order = np.argsort(-count, kind="stable")
    upto = int(np.searchsorted(np.cumsum(count[order]), cover * count.sum())) + 1
    shares = np.zeros(len(kinds.cpu_milli))
    for i in order[:upto]:
        shares[int(np.flatnonzero(inverse.ravel() == i)[0])] = count[i] / count[order[:upto]].sum()
    return shares


@kernel()
def ask_of(kinds: Kinds, k: int) -> Ask:
    """What a pod of a kind asks for."""
    return Ask(kinds.cpu_milli[k], kinds.memory_mib[k], kinds.gpus[k], kinds.gpu_milli[k], kinds.models[k])


@kernel()
def _place(board: Board, pods: Ints, policy: int, lots: Ints) -> tuple[Ints, Ints]:
    used, cursor = 0, 0
    where, allocated = np.full(pods.size, -1, np.int64), np.zeros(pods.size, np.int64)
    for p in range(pods.size):
        k = pods[p]
        best, cursor = best_node(board, policy, k, cursor, lots[p])
        if best >= 0:
            ask = ask_of(board.kinds, k)
            where[p] = best
            take(board.state, best, ask, board.device[k, best], policy, lots[p])
            board.version[best] += 1
            used += ask.gpus * ask.milli
        allocated[p] = used
    return where, allocated


@kernel()
def best_node(board: Board, policy: int, k: int, cursor: int, lot: int) -> tuple[int, int]:
    """The node for a pod of a kind, -1 where none fits; and where the next search begins."""
    nodes, fragmented, typical, rank = board.state.nodes, board.state.fragmented, board.typical, board.rank
    version, known, score, device = board.version, board.known[k], board.score[k], board.device[k]
    n, ask = version.size, ask_of(board.kinds, k)
    if policy not in (NATIVE, RANDOM):
        for i in range(n):
            if known[i] != version[i]:
                known[i] = version[i]
                points, device[i] = rate(nodes, fragmented, typical, policy, i, ask)
                score[i] = points if points < 0.0 else points * n + n - rank[i]
        best = int(np.argmax(score))
        return (best if score[best] >= 0.0 else -1), cursor
    start, wanted = (cursor, feasible_to_find(n)) if policy == NATIVE else (0, n)
    most, ties, feasible, step = -1.0, 0, 0, 0
    while step < n and feasible < wanted:  # who is not looked at is not rated
        i = start + step if start + step < n else start + step - n
        step += 1
        if known[i] != version[i]:
            known[i] = version[i]
            score[i], device[i] = rate(nodes, fragmented, typical, policy, i, ask)
        points = score[i]
        ties = ties * (points <= most) + (points >= max(most, 0.0))
        most = max(most, points)
        feasible += points >= 0.0
    cursor = (start + step) % n if policy == NATIVE else 0
    left = (lot >> 8) % ties if ties > 0 else 0
    for at in range(step if ties > 0 else 0):  # of equals one by lot
        i = start + at if start + at < n else start + at - n
        if score[i] == most:
            if left == 0:
                return i, cursor
            left -= 1
    return -1, cursor


@kernel()
def feasible_to_find(nodes: int) -> int:
    """Of how many nodes that fit kube-scheduler is content (schedule_one.go, numFeasibleNodesToFind)."""
    if nodes < 100:
        return nodes
    return max(nodes * max(50 - nodes // 125, 5) // 100, 100)


@kernel()
def take(state: State, i: int, ask: Ask, device: int, policy: int, lot: int) -> int:
    """Give a pod what it asks for of a node that fits; its GPUs, a bit each."""
    num, mask = ask.gpus, 0
    if num == 1 and ask.milli < WHOLE:
        mask = 1 << (device if policy == FGD else device_for(state.nodes, i, ask.milli, policy, lot))
    else:
        for g in range(state.nodes[i, GPUS]):
            if num > 0 and state.nodes[i, LEFT + g] == WHOLE:
                mask |= 1 << g
                num -= 1
    _hand(state, i, ask, mask, -1)
    return mask


@kernel()
def give_back(state: State, i: int, ask: Ask, mask: int) -> None:
    """What a pod was given."""
    _hand(state, i, ask, mask, 1)


@kernel()
def take_again(state: State, i: int, ask: Ask, mask: int) -> None:
    """What a pod was given, and gave back."""
    _hand(state, i, ask, mask, -1)


@kernel()
def _hand(state: State, i: int, ask: Ask, mask: int, sign: int) -> None:
    node = state.nodes[i]
    state.fragmented[i] = np.nan
    node[CPU] += sign * ask.cpu
    node[MEMORY] += sign * ask.memory
    node[COUNTED_CPU] -= sign * (ask.cpu if ask.cpu > 0 else COUNTED_CPU_MILLI)
    node[COUNTED_MEMORY] -= sign * (ask.memory if ask.memory > 0 else COUNTED_MEMORY_MIB)
    node[CLASS + class_of(ask)] -= sign
    for g in range(MOST_GPUS):
        if (mask >> g) & 1:
            node[LEFT + g] += sign * ask.milli


@kernel()
def offers(state: State, ask: Ask, seen: NDArray[np.float32]) -> None:
    """What a pod would make of each node, a row each of OFFER numbers from 0 to 1; 0 where it does not fit.

    1; what is taken of the CPUs, of the memory and of the GPUs with it; what is left on the GPU that it would share; of
    eight GPUs those that would stay whole; the node's GPUs over eight; what the pod asks for of them.
    """
    nodes, asked = state.nodes, ask.gpus * ask.milli
    seen[:] = 0.0
    for i in range(len(nodes)):
        if not fits(nodes, i, ask):
            continue
        free, whole, gpus = 0, 0, nodes[i, GPUS]
        for g in range(gpus):
            free += nodes[i, LEFT + g]
            whole += nodes[i, LEFT + g] == WHOLE
        shared = 0
        if ask.gpus == 1 and ask.milli < WHOLE:
            at = device_for(nodes, i, ask.milli, BEST_FIT, 0)
            shared = nodes[i, LEFT + at] - ask.milli
            whole -= nodes[i, LEFT + at] == WHOLE
        else:
            whole -= ask.gpus
        seen[i, 0] = 1.0
        seen[i, 1] = 1.0 - (nodes[i, CPU] - ask.cpu) / max(nodes[i, ALL_CPU], 1)
        seen[i, 2] = 1.0 - (nodes[i, MEMORY] - ask.memory) / max(nodes[i, ALL_MEMORY], 1)
        seen[i, 3] = 1.0 - (free - asked) / max(gpus * WHOLE, 1) if gpus > 0 else 0.0
        seen[i, 4] = shared / WHOLE
        seen[i, 5] = whole / MOST_GPUS
        seen[i, 6] = gpus / MOST_GPUS
        seen[i, 7] = asked / (MOST_GPUS * WHOLE)
