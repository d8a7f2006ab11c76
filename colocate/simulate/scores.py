"""How good a node is for a pod under each policy, compiled. `placement` keeps what they say.

A node is one row of whole numbers, a pod what it asks for: to pass tuples of arrays here would cost more than to rate
a node does, for each array's references are counted.
"""

from __future__ import annotations

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
CLASSES = 16
# A node: what is free; what pods ask for, as kube-scheduler counts those that ask for nothing; what it has; then what
# is free of each GPU, in thousandths, and how many pods of each class of GPU demand are there.
(CPU, MEMORY, COUNTED_CPU, COUNTED_MEMORY, ALL_CPU, ALL_MEMORY, GPUS, MODEL) = range(8)
LEFT, CLASS = 8, 8 + MOST_GPUS
COLUMNS = CLASS + CLASSES
COUNTED_CPU_MILLI, COUNTED_MEMORY_MIB = 100, 200
"""What kube-scheduler takes a pod to ask for that asks for none (util/pod_resources.go)."""
LARGEST_CPU_MILLI, LARGEST_GPU_MILLI = 128_000.0, 8_000.0
"""Of a node: what best fit and the dot product measure by."""
ABOVE = 1e9
"""Added to scores that would be negative on larger nodes than those: below 0 is what does not fit."""


class Ask(NamedTuple):
    """What a pod asks for."""

    cpu: int
    memory: int
    gpus: int
    milli: int
    """Of each GPU, thousandths."""
    models: int
    """The GPU models that may be, a bit each; 0: any."""


class Typical(NamedTuple):
    """The kinds of pods by which fragmentation is measured."""

    asks: Ints
    """(kinds, 5), each as Ask."""
    shares: Floats
    """How many of all pods are of each."""


@kernel(inline="always")
def rate(nodes: Ints, fragmented: Floats, typical: Typical, policy: int, i: int, ask: Ask) -> tuple[float, int]:
    """A node's score for a pod, below 0 where it does not fit; and the GPU that is meant, where one is.

    `nodes`: (nodes, COLUMNS). `fragmented`: (nodes,) of free GPUs, in thousandths, what a typical pod could not use;
    NaN: not worked out since a change.
    """
    if not fits(nodes, i, ask):
        return -1.0, -1
    if policy == RANDOM:
        return 0.0, -1
    if policy == FGD:
        return _fgd(nodes, fragmented, typical, i, ask)
    return _score(nodes, policy, i, ask), -1


@kernel(inline="always")
def fits(nodes: Ints, i: int, ask: Ask) -> bool:
    """Whether a node has what a pod asks for."""
    if nodes[i, CPU] < ask.cpu or nodes[i, MEMORY] < ask.memory:
        return False
    if ask.gpus == 0:
        return True
    if ask.models != 0 and not (ask.models >> nodes[i, MODEL]) & 1:
        return False
    fit = 0
    for g in range(nodes[i, GPUS]):
        fit += nodes[i, LEFT + g] >= ask.milli
    return fit >= ask.gpus


@kernel()
def _fgd(nodes: Ints, fragmented: Floats, typical: Typical, i: int, ask: Ask) -> tuple[float, int]:
    gpus, cpu, left = nodes[i, GPUS], nodes[i, CPU], nodes[i, LEFT:CLASS]
    if np.isnan(fragmented[i]):
        fragmented[i] = _fragmented(nodes, typical, i, cpu)
    before, cpu = fragmented[i], cpu - ask.cpu
    if ask.gpus != 1 or ask.milli == WHOLE:
        need, taken = ask.gpus, 0
        for g in range(gpus):  # as if it were there, and then back
            if need > 0 and left[g] == WHOLE:
                left[g], taken, need = 0, taken | 1 << g, need - 1
        points = _points(before - _fragmented(nodes, typical, i, cpu))
        for g in range(gpus):
            left[g] += WHOLE * ((taken >> g) & 1)
        return points, -1
    best, device = -1.0, -1
    for g in range(gpus):
        if left[g] < ask.milli:
            continue
        alike = False
        for other in range(g):
            alike |= left[other] == left[g]
        if alike:  # as good as the one before
            continue
        left[g] -= ask.milli
        points = _points(before - _fragmented(nodes, typical, i, cpu))
        left[g] += ask.milli
        if points > best:
            best, device = points, g
    return best, device


@kernel()
def _points(gained: float) -> float:
    return float(np.floor(100.0 / (1.0 + np.exp(-gained / WHOLE))))


@kernel()
def _fragmented(nodes: Ints, typical: Typical, i: int, cpu: int) -> float:
    """What of a node's free GPUs, in thousandths, a typical pod could not use; `cpu` is what is free of its CPUs."""
    asks, shares = typical.asks, typical.shares
    gpus, model, total = nodes[i, GPUS], nodes[i, MODEL], 0
    for g in range(gpus):
        total += nodes[i, LEFT + g]
    found = 0.0
    for t in range(shares.size):
        wanted, num, milli, models = asks[t, 0], asks[t, 2], asks[t, 3], asks[t, 4]
        enough, small = 0, 0
        for g in range(gpus):
            free = nodes[i, LEFT + g]
            enough += free >= milli
            small += free * (free < milli)
        allowed = models == 0 or (models >> model) & 1
        useless = num == 0 or not allowed or cpu < wanted or enough < num
        found += shares[t] * (total if useless else small)
    return found


@kernel()
def class_of(ask: Ask) -> int:
    """Of GPU demand: none, a part of one, or how many."""
    return 0 if ask.gpus == 0 else 1 if ask.milli < WHOLE else 1 + ask.gpus


@kernel()
def _packing(nodes: Ints, i: int, idle: int, ask: Ask) -> float:
    """GPUs in use before idle ones of a node in use before idle nodes."""
    gpus = nodes[i, GPUS]
    if idle == gpus:
        return float(max(100 // 3 - idle, idle))
    chosen, opened, spare = 0, 0, 0
    for _ in range(ask.gpus):  # the tightest of those that are left
        best = -1
        for g in range(gpus):
            left = nodes[i, LEFT + g]
            if not (chosen >> g) & 1 and left >= ask.milli and (best < 0 or left < nodes[i, LEFT + best]):
                best = g
        if best < 0:
            break
        chosen |= 1 << best
        opened += nodes[i, LEFT + best] == WHOLE
        spare += nodes[i, LEFT + best] * 100 // WHOLE
    if opened > 0:
        return float(max(100 // 2 - opened, 100 // 3))
    return float(max(100 - spare // 10, 100 // 2))


@kernel()
def _clustering(nodes: Ints, i: int, mine: int, free: int) -> float:
    """Pods of one class of GPU demand together: alone, among others, on an idle node, among others only."""
    others = 0
    for k in range(1, CLASSES):
        others += k != mine and nodes[i, CLASS + k] > 0
    tier = (75 if others == 0 else 50) if nodes[i, CLASS + mine] > 0 else (25 if others == 0 else 0)
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
def _score(nodes: Ints, policy: int, i: int, ask: Ask) -> float:
    if policy == NATIVE:  # looks at no GPU
        every = (nodes[i, ALL_CPU], nodes[i, ALL_MEMORY])
        used = (every[0] - nodes[i, CPU], every[1] - nodes[i, MEMORY])
        counted = (nodes[i, COUNTED_CPU], nodes[i, COUNTED_MEMORY])
        least, balanced = native_points((ask.cpu, ask.memory), used, counted, every)
        return float(least + balanced)
    gpus, free, idle = nodes[i, GPUS], 0, 0
    for g in range(gpus):
        free += nodes[i, LEFT + g]
        idle += nodes[i, LEFT + g] == WHOLE
    asked = ask.gpus * ask.milli
    if policy == BEST_FIT:
        slack = 0.5 * (nodes[i, CPU] - ask.cpu) / LARGEST_CPU_MILLI + 0.5 * (free - asked) / LARGEST_GPU_MILLI
        return float(np.floor(1e6 * (1.0 - slack))) + ABOVE
    if policy == DOT:
        cpus = nodes[i, CPU] / LARGEST_CPU_MILLI * ask.cpu / LARGEST_CPU_MILLI
        gpu = free / LARGEST_GPU_MILLI * asked / LARGEST_GPU_MILLI
        return float(np.floor(100.0 * (1.0 - (cpus + gpu) / 2.0))) + ABOVE
    if policy == MOST_ALLOCATED:
        return float((gpus * WHOLE - free + asked) * 100 // max(gpus * WHOLE, 1))
    if policy == PACKING:
        return _packing(nodes, i, idle, ask) if ask.gpus > 0 else 0.0
    return _clustering(nodes, i, class_of(ask), free) if ask.gpus > 0 else 0.0


@kernel()
def device_for(nodes: Ints, i: int, milli: int, policy: int, lot: int) -> int:
    """The GPU of a node for a part of one: the tightest, or any where the policy does not choose."""
    best, least, seen = -1, 1 << 30, 0
    for g in range(nodes[i, GPUS]):
        left = nodes[i, LEFT + g]
        if left < milli:
            continue
        seen += 1
        if policy in (RANDOM, NATIVE):
            if (lot // 7) % seen == 0:  # each of them with the same chance
                best = g
        elif left < least:
            best, least = g, left
    return best
