"""Pods onto nodes with shared GPUs, one after the other: filters and scores, compiled.

A node's score for a kind of pod is kept until the node changes. Policies: see POLICIES; `fgd` is the gradient of
fragmentation (Weng and others, USENIX ATC 2023, 4.2), `native` what kube-scheduler 1.36 does by default
(NodeResourcesFit's LeastAllocated and NodeResourcesBalancedAllocation over CPU and memory, whole points, a sample of
the nodes that fit, ties by lot), which looks at no GPU; `most-allocated` scores GPUs as operators configure it.
`native` is compared with the real one in tests/cluster.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
kernel = partial(numba.njit, cache=True, nogil=True, error_model="numpy")
"""A compiled function that lets go of the interpreter, and whose divisions are not checked."""
MOST_GPUS, WHOLE = 8, 1000
"""GPUs of a node, and thousandths of one."""
POLICIES = ("random", "dot-product", "clustering", "packing", "best-fit", "fgd", "native", "most-allocated")
RANDOM, DOT, CLUSTERING, PACKING, BEST_FIT, FGD, NATIVE, MOST_ALLOCATED = range(len(POLICIES))
CLASSES, OFFER = 16, 8
COUNTED_CPU_MILLI, COUNTED_MEMORY_MIB = 100, 200
"""What kube-scheduler takes a pod to ask for that asks for none (util/pod_resources.go)."""
LARGEST_CPU_MILLI, LARGEST_GPU_MILLI = 128_000.0, 8_000.0
"""Of a node: what best fit and the dot product measure by."""
ABOVE = 1e9
"""Added to scores that would be negative on larger nodes than those: below 0 is what does not fit."""


class Nodes(NamedTuple):
    """One array each."""

    cpu_milli: Ints
    memory_mib: Ints
    gpus: Ints
    model: Ints
    """A number below 63."""
    rack: Ints


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
    """What is free of each node."""

    cpu: Ints
    memory: Ints
    left: Ints
    """(nodes, 8), thousandths of each GPU."""
    classes: Ints
    """(nodes, CLASSES), how many pods of each class of GPU demand are there."""
    counted: Ints
    """(nodes, 2), CPU and memory that pods ask for, as kube-scheduler counts those that ask for nothing."""
    fragmented: Floats
    """(nodes,) of free GPUs, in thousandths, what a typical pod could not use; NaN: not worked out since a change."""


class Typical(NamedTuple):
    """The kinds of pods by which fragmentation is measured, and the share of each kind."""

    kinds: Ints
    shares: Floats


class Outcome(NamedTuple):
    """Where each pod went, and what was allocated once it was there."""

    node: Ints
    """-1: nowhere."""
    allocated_milli: Ints
    """Of all GPUs, after each pod."""


def arrays(rows: Iterable[Sequence[int]]) -> Iterator[Ints]:
    """Rows as columns, for Nodes and Kinds."""
    return (np.array(column, np.int64) for column in zip(*rows, strict=True))


def place(nodes: Nodes, kinds: Kinds, pods: Ints, policy: str, seed: int, typical: Floats | None = None) -> Outcome:
    """Place pods, numbers of their kinds, in their order; none departs.

    `typical`: for `fgd`, the share of each kind in the workload, 0 for those that do not count (see `typical_shares`).
    """
    rng = np.random.default_rng(seed)
    count = len(nodes.cpu_milli)
    rank = rng.permutation(count).astype(np.int64)
    lots = rng.integers(0, 1 << 30, size=len(pods))
    shares = np.zeros(len(kinds.cpu_milli)) if typical is None else typical
    state = empty(nodes)
    counted = Typical(np.flatnonzero(shares).astype(np.int64), shares)
    return Outcome(*_place(nodes, kinds, state, counted, pods, POLICIES.index(policy), rank, lots))


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


def empty(nodes: Nodes) -> State:
    """Nodes on which nothing is."""
    count = len(nodes.cpu_milli)
    left = np.zeros((count, MOST_GPUS), np.int64)
    left[np.arange(MOST_GPUS) < nodes.gpus[:, None]] = WHOLE
    classes, counted = np.zeros((count, CLASSES), np.int64), np.zeros((count, 2), np.int64)
    unknown = np.full(count, np.nan)
    return State(nodes.cpu_milli.copy(), nodes.memory_mib.copy(), left, classes, counted, unknown)


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
def _place(
    nodes: Nodes, kinds: Kinds, state: State, typical: Typical, pods: Ints, policy: int, rank: Ints, lots: Ints
) -> tuple[Ints, Ints]:
    n = nodes.cpu_milli.size
    score = np.empty((kinds.gpus.size, n))
    """One row for each kind: the best is the greatest, and -1 fits not. Of equals the node of the least rank."""
    device = np.zeros(score.shape, np.int64)
    current = np.full(kinds.gpus.size, -1, np.int64)
    """Of each row, up to which change it is so."""
    changed, changes = np.empty(pods.size, np.int64), 0
    where, allocated = np.full(pods.size, -1, np.int64), np.zeros(pods.size, np.int64)
    rated = np.full(n, -1, np.int64)
    used, start = 0, 0
    lottery = policy in (NATIVE, RANDOM)
    wanted = feasible_to_find(n) if policy == NATIVE else n
    for p in range(pods.size):
        k = pods[p]
        for step in range(n if current[k] < 0 else changes - current[k]):
            i = step if current[k] < 0 else changed[current[k] + step]
            if rated[i] == p:
                continue  # it has changed more than once
            rated[i] = p
            points, device[k, i] = rate(nodes, kinds, state, typical, policy, i, k)
            score[k, i] = points if lottery else ranked(points, n, rank[i])
        current[k] = changes
        if lottery:
            best, visited = drawn(score[k], start, wanted, lots[p])
            start = (start + visited) % n if policy == NATIVE else 0
        else:
            best = int(np.argmax(score[k]))
        if best >= 0 and score[k, best] >= 0.0:
            where[p] = best
            changed[changes] = best
            changes += 1
            take(kinds, state, nodes.gpus[best], best, k, device[k, best], policy, lots[p])
            used += kinds.gpus[k] * kinds.gpu_milli[k]
        allocated[p] = used
    return where, allocated


@kernel(inline="always")
def ranked(points: float, nodes: int, rank: int) -> float:
    """A score by which of equals the node of the least rank is the greatest; below 0 is what does not fit."""
    return points if points < 0.0 else points * nodes + nodes - rank


@kernel()
def drawn(score: Floats, start: int, wanted: int, lot: int) -> tuple[int, int]:
    """The best of so many nodes that fit, from one on, equals by lot; and how many were visited."""
    best, best_score, ties, feasible = -1, -1.0, 0, 0
    for step in range(score.size):
        i = start + step
        if i >= score.size:
            i -= score.size
        if score[i] < 0.0:
            continue
        feasible += 1
        if score[i] > best_score:
            best, best_score, ties = i, score[i], 1
        elif score[i] == best_score:
            ties += 1
            lot = (lot * 1103515245 + 12345) & 0x3FFFFFFF
            if (lot >> 8) % ties == 0:
                best = i
        if feasible >= wanted:
            return best, step + 1
    return best, score.size


@kernel()
def feasible_to_find(nodes: int) -> int:
    """Of how many nodes that fit kube-scheduler is content (schedule_one.go, numFeasibleNodesToFind)."""
    if nodes < 100:
        return nodes
    return max(nodes * max(50 - nodes // 125, 5) // 100, 100)


@kernel()
def take(kinds: Kinds, state: State, gpus: int, i: int, k: int, device: int, policy: int, lot: int) -> int:
    """Give a pod what it asks for of a node that fits; its GPUs, a bit each."""
    num, milli, mask = kinds.gpus[k], kinds.gpu_milli[k], 0
    state.fragmented[i] = np.nan
    state.cpu[i] -= kinds.cpu_milli[k]
    state.memory[i] -= kinds.memory_mib[k]
    state.classes[i, _class_of(num, milli)] += 1
    _count(kinds, state, i, k, 1)
    if num == 1 and milli < WHOLE:
        at = device if policy == FGD else _device(state.left, i, gpus, milli, policy, lot)
        state.left[i, at] -= milli
        return 1 << at
    for g in range(gpus):
        if num > 0 and state.left[i, g] == WHOLE:
            state.left[i, g] = 0
            mask |= 1 << g
            num -= 1
    return mask


@kernel()
def _count(kinds: Kinds, state: State, i: int, k: int, sign: int) -> None:
    cpu, memory = kinds.cpu_milli[k], kinds.memory_mib[k]
    state.counted[i, 0] += sign * (cpu if cpu > 0 else COUNTED_CPU_MILLI)
    state.counted[i, 1] += sign * (memory if memory > 0 else COUNTED_MEMORY_MIB)


@kernel()
def give_back(kinds: Kinds, state: State, i: int, k: int, mask: int) -> None:
    """What a pod was given."""
    _hand(kinds, state, i, k, mask, 1)


@kernel()
def take_again(kinds: Kinds, state: State, i: int, k: int, mask: int) -> None:
    """What a pod was given, and gave back."""
    _hand(kinds, state, i, k, mask, -1)


@kernel()
def _hand(kinds: Kinds, state: State, i: int, k: int, mask: int, sign: int) -> None:
    state.fragmented[i] = np.nan
    state.cpu[i] += sign * kinds.cpu_milli[k]
    state.memory[i] += sign * kinds.memory_mib[k]
    state.classes[i, _class_of(kinds.gpus[k], kinds.gpu_milli[k])] -= sign
    _count(kinds, state, i, k, -sign)
    for g in range(MOST_GPUS):
        if (mask >> g) & 1:
            state.left[i, g] += sign * kinds.gpu_milli[k]


@kernel()
def _device(left: Ints, i: int, gpus: int, milli: int, policy: int, lot: int) -> int:
    """The GPU for a part of one: the tightest, or any where the policy does not choose."""
    best, least, seen = -1, 1 << 30, 0
    for g in range(gpus):
        if left[i, g] < milli:
            continue
        seen += 1
        if policy in (RANDOM, NATIVE):
            if (lot // 7) % seen == 0:  # each of them with the same chance
                best = g
        elif left[i, g] < least:
            best, least = g, left[i, g]
    return best


@kernel(inline="always")
def rate(nodes: Nodes, kinds: Kinds, state: State, typical: Typical, policy: int, i: int, k: int) -> tuple[float, int]:
    """A node's score for a kind of pod, below 0 where it does not fit; and the GPU that is meant, where one is."""
    if not fits(nodes, kinds, state, i, k):
        return -1.0, -1
    if policy == RANDOM:
        return 0.0, -1
    if policy == FGD:
        return _fgd(nodes, kinds, state, typical, i, k)
    return _score(nodes, kinds, state, policy, i, k), -1


@kernel(inline="always")
def fits(nodes: Nodes, kinds: Kinds, state: State, i: int, k: int) -> bool:
    """Whether a node has what a kind of pod asks for."""
    if state.cpu[i] < kinds.cpu_milli[k] or state.memory[i] < kinds.memory_mib[k]:
        return False
    if kinds.gpus[k] == 0:
        return True
    if kinds.models[k] != 0 and not (kinds.models[k] >> nodes.model[i]) & 1:
        return False
    fit = 0
    for g in range(nodes.gpus[i]):
        fit += state.left[i, g] >= kinds.gpu_milli[k]
    return fit >= kinds.gpus[k]  # type: ignore[no-any-return]


@kernel(inline="always")
def _fgd(nodes: Nodes, kinds: Kinds, state: State, typical: Typical, i: int, k: int) -> tuple[float, int]:
    gpus, num, milli, left = nodes.gpus[i], kinds.gpus[k], kinds.gpu_milli[k], state.left
    cpu = state.cpu[i]
    if np.isnan(state.fragmented[i]):
        state.fragmented[i] = _fragmented(nodes, kinds, typical, left, i, cpu)
    before, cpu = state.fragmented[i], cpu - kinds.cpu_milli[k]
    if num != 1 or milli == WHOLE:
        need, taken = num, 0
        for g in range(gpus):  # as if it were there, and then back
            if need > 0 and left[i, g] == WHOLE:
                left[i, g], taken, need = 0, taken | 1 << g, need - 1
        points = _points(before - _fragmented(nodes, kinds, typical, left, i, cpu))
        for g in range(gpus):
            left[i, g] += WHOLE * ((taken >> g) & 1)
        return points, -1
    best, device = -1.0, -1
    for g in range(gpus):
        if left[i, g] < milli:
            continue
        alike = False
        for other in range(g):
            alike |= left[i, other] == left[i, g]
        if alike:  # as good as the one before
            continue
        left[i, g] -= milli
        points = _points(before - _fragmented(nodes, kinds, typical, left, i, cpu))
        left[i, g] += milli
        if points > best:
            best, device = points, g
    return best, device


@kernel()
def _points(gained: float) -> float:
    return float(np.floor(100.0 / (1.0 + np.exp(-gained / WHOLE))))


@kernel()
def _fragmented(nodes: Nodes, kinds: Kinds, typical: Typical, left: Ints, i: int, cpu: int) -> float:
    """What of a node's free GPUs, in thousandths, a typical pod could not use; `cpu` is what is free of its CPUs."""
    gpus, model, total = nodes.gpus[i], nodes.model[i], 0
    for g in range(gpus):
        total += left[i, g]
    found = 0.0
    for t in range(typical.kinds.size):
        k = typical.kinds[t]
        fits, small = 0, 0
        for g in range(gpus):
            free = left[i, g]
            fits += free >= kinds.gpu_milli[k]
            small += free * (free < kinds.gpu_milli[k])
        allowed = kinds.models[k] == 0 or (kinds.models[k] >> model) & 1
        useless = kinds.gpus[k] == 0 or not allowed or cpu < kinds.cpu_milli[k] or fits < kinds.gpus[k]
        found += typical.shares[k] * (total if useless else small)
    return found


@kernel()
def _class_of(num: int, milli: int) -> int:
    """Of GPU demand: none, a part of one, or how many."""
    return 0 if num == 0 else 1 if milli < WHOLE else 1 + num


@kernel()
def _packing(left: Ints, i: int, gpus: int, idle: int, num: int, milli: int) -> float:
    """GPUs in use before idle ones of a node in use before idle nodes."""
    if idle == gpus:
        return float(max(100 // 3 - idle, idle))
    chosen, opened, spare = 0, 0, 0
    for _ in range(num):  # the tightest of those that are left
        best = -1
        for g in range(gpus):
            if not (chosen >> g) & 1 and left[i, g] >= milli and (best < 0 or left[i, g] < left[i, best]):
                best = g
        if best < 0:
            break
        chosen |= 1 << best
        opened += left[i, best] == WHOLE
        spare += left[i, best] * 100 // WHOLE
    if opened > 0:
        return float(max(100 // 2 - opened, 100 // 3))
    return float(max(100 - spare // 10, 100 // 2))


@kernel()
def _clustering(classes: Ints, i: int, mine: int, free: int) -> float:
    """Pods of one class of GPU demand together: alone, among others, on an idle node, among others only."""
    others = 0
    for k in range(1, CLASSES):
        others += k != mine and classes[i, k] > 0
    tier = (75 if others == 0 else 50) if classes[i, mine] > 0 else (25 if others == 0 else 0)
    return float(25 * (int(LARGEST_GPU_MILLI) - free) // int(LARGEST_GPU_MILLI) + tier)


@kernel()
def native_points(
    pod: tuple[int, int], used: tuple[int, int], counted: tuple[int, int], every: tuple[int, int]
) -> tuple[int, int]:
    """LeastAllocated and BalancedAllocation of a node for a pod, whole points as kube-scheduler has them.

    All are (CPU, memory): what the pod asks for, what the pods there ask for, the same as it is counted by the first
    score, and all of the node. The second one is of the change: 75 points where the pod leaves the balance as it is.
    """
    least, weights = 0, 0
    for asked, there, whole, none in (
        (pod[0], counted[0], every[0], COUNTED_CPU_MILLI),
        (pod[1], counted[1], every[1], COUNTED_MEMORY_MIB),
    ):
        with_it = there + (asked if asked > 0 else none)
        if whole > 0:
            weights += 1
            least += (whole - with_it) * 100 // whole if with_it <= whole else 0
    balanced = 0
    if pod[0] > 0 or pod[1] > 0:
        after = _balance((used[0] + pod[0], used[1] + pod[1]), every)
        balanced = 50 + (50 + after - _balance(used, every)) // 2
    return (least // weights if weights > 0 else 0), balanced


@kernel()
def _balance(used: tuple[int, int], every: tuple[int, int]) -> int:
    """100 less half of how far the shares of CPU and memory are apart; 100 of a node that has but one of them."""
    if every[0] <= 0 or every[1] <= 0:
        return 100
    apart = abs(min(used[0] / every[0], 1.0) - min(used[1] / every[1], 1.0)) / 2.0
    return int((1.0 - apart) * 100.0)


@kernel(inline="always")
def _score(nodes: Nodes, kinds: Kinds, state: State, policy: int, i: int, k: int) -> float:
    gpus, num, milli = nodes.gpus[i], kinds.gpus[k], kinds.gpu_milli[k]
    c, free, idle = kinds.cpu_milli[k], 0, 0
    for g in range(gpus):
        free += state.left[i, g]
        idle += state.left[i, g] == WHOLE
    asked = num * milli
    if policy == BEST_FIT:
        slack = 0.5 * (state.cpu[i] - c) / LARGEST_CPU_MILLI + 0.5 * (free - asked) / LARGEST_GPU_MILLI
        return float(np.floor(1e6 * (1.0 - slack))) + ABOVE
    if policy == DOT:
        cpus = state.cpu[i] / LARGEST_CPU_MILLI * c / LARGEST_CPU_MILLI
        gpu = free / LARGEST_GPU_MILLI * asked / LARGEST_GPU_MILLI
        return float(np.floor(100.0 * (1.0 - (cpus + gpu) / 2.0))) + ABOVE
    if policy == MOST_ALLOCATED:
        return float((gpus * WHOLE - free + asked) * 100 // max(gpus * WHOLE, 1))
    if policy == PACKING:
        return _packing(state.left, i, gpus, idle, num, milli) if num > 0 else 0.0
    if policy == CLUSTERING:
        return _clustering(state.classes, i, _class_of(num, milli), free) if num > 0 else 0.0
    every = (nodes.cpu_milli[i], nodes.memory_mib[i])
    used = (every[0] - state.cpu[i], every[1] - state.memory[i])
    counted = (state.counted[i, 0], state.counted[i, 1])
    least, balanced = native_points((c, kinds.memory_mib[k]), used, counted, every)
    return float(least + balanced)


@kernel()
def offers(nodes: Nodes, kinds: Kinds, state: State, k: int, seen: NDArray[np.float32]) -> None:
    """What a pod of a kind would make of each node, a row each of OFFER numbers from 0 to 1; 0 where it does not fit.

    1; what is taken of the CPUs, of the memory and of the GPUs with it; what is left on the GPU that it would share; of
    eight GPUs those that would stay whole; the node's GPUs over eight; what the pod asks for of them.
    """
    asked = kinds.gpus[k] * kinds.gpu_milli[k]
    seen[:] = 0.0
    for i in range(nodes.gpus.size):
        if not fits(nodes, kinds, state, i, k):
            continue
        free, whole, gpus = 0, 0, nodes.gpus[i]
        for g in range(gpus):
            free += state.left[i, g]
            whole += state.left[i, g] == WHOLE
        shared = 0
        if kinds.gpus[k] == 1 and kinds.gpu_milli[k] < WHOLE:
            at = _device(state.left, i, gpus, kinds.gpu_milli[k], BEST_FIT, 0)
            shared = state.left[i, at] - kinds.gpu_milli[k]
            whole -= state.left[i, at] == WHOLE
        else:
            whole -= kinds.gpus[k]
        seen[i, 0] = 1.0
        seen[i, 1] = 1.0 - (state.cpu[i] - kinds.cpu_milli[k]) / max(nodes.cpu_milli[i], 1)
        seen[i, 2] = 1.0 - (state.memory[i] - kinds.memory_mib[k]) / max(nodes.memory_mib[i], 1)
        seen[i, 3] = 1.0 - (free - asked) / max(gpus * WHOLE, 1) if gpus > 0 else 0.0
        seen[i, 4] = shared / WHOLE
        seen[i, 5] = whole / MOST_GPUS
        seen[i, 6] = gpus / MOST_GPUS
        seen[i, 7] = asked / (MOST_GPUS * WHOLE)
