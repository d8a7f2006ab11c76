"""One node with a service and batch, whose batch is granted cores step by step: the world of `Colocate/Node-v0`.

What a service feels is `colocation`'s; each node has a stream of random numbers of its own (SplitMix64), so that it
does the same alone and among others. A step is a second.

Shapes: n nodes; `state` is (n, STATE).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from colocate.simulate.colocation import KEPT, SLOT_SECONDS, WAITS_NOISE, felt_of

Floats = NDArray[np.float64]
Seen = NDArray[np.float32]
LOOK = 9
# What is remembered of a node.
(SECOND, DRIFT, WAITS, BURST, BURST_UNTIL, WANTS, WANTS_UNTIL, OWN, SHARED, SCHEDULER, ROW, USED, BATCH, GRANT, FELT,
 SLOW, HIGHEST, STATE) = range(18)  # fmt: skip
# What is the same of all nodes.
SATURATES, NOISE, BURSTS, YIELDS, SLO, PRICE, FACTS = range(7)
SLOW_SECONDS, HIGHEST_SECONDS = 60.0, 300.0
WANTS_SECONDS = 600.0
"""Batch wants another share of the node so often, in the mean."""


class Node(NamedTuple):
    """A world, but for what is drawn."""

    demand: Floats
    """(rows, slots of five minutes): services' use, as a share of the node; a day or longer, begun at midnight."""
    facts: Floats
    """FACTS numbers."""


@numba.njit(cache=True, nogil=True)
def _uniform(streams: NDArray[np.uint64], i: int) -> float:
    """SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): of 0 to 1."""
    streams[i] += np.uint64(0x9E3779B97F4A7C15)
    z = streams[i]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return float(z >> np.uint64(11)) / 9007199254740992.0


@numba.njit(cache=True, nogil=True)
def _normals(streams: NDArray[np.uint64], i: int) -> tuple[float, float]:
    """Two (Box and Muller 1958)."""
    far, turn = math.sqrt(-2.0 * math.log(1.0 - _uniform(streams, i))), 2.0 * math.pi * _uniform(streams, i)
    return far * math.cos(turn), far * math.sin(turn)


@numba.njit(cache=True, nogil=True)
def begin(node: Node, state: Floats, streams: NDArray[np.uint64], i: int, shared: float, scheduler: float) -> None:
    """Another service on another day, from a second that is drawn; medians of what batch makes it feel."""
    state[i] = 0.0
    rows, slots = node.demand.shape
    state[i, ROW] = math.floor(_uniform(streams, i) * rows)
    state[i, SECOND] = math.floor(_uniform(streams, i) * (slots - 1) * SLOT_SECONDS)
    state[i, OWN] = 0.02 + 0.08 * _uniform(streams, i)
    one, other = _normals(streams, i)
    state[i, SHARED] = min(shared * math.exp(one), 0.7)
    state[i, SCHEDULER] = min(scheduler * math.exp(0.7 * other), 0.9)
    state[i, SLOW] = state[i, FELT] = state[i, OWN]
    _wants(state, streams, i)


@numba.njit(cache=True, nogil=True)
def _wants(state: Floats, streams: NDArray[np.uint64], i: int) -> None:
    state[i, WANTS] = _uniform(streams, i)
    state[i, WANTS_UNTIL] = state[i, SECOND] - WANTS_SECONDS * math.log(1.0 - _uniform(streams, i))


@numba.njit(cache=True, nogil=True)
def step(node: Node, state: Floats, streams: NDArray[np.uint64], i: int, grant: float) -> tuple[float, float, float]:
    """A second with a share of the node granted to batch: the reward, what batch had, and what was felt too much."""
    facts, row = node.facts, state[i]
    fresh = math.sqrt(1.0 - KEPT * KEPT)
    row[SECOND] += 1.0
    one, other = _normals(streams, i)
    row[DRIFT] = KEPT * row[DRIFT] + facts[NOISE] * fresh * one
    row[WAITS] = KEPT * row[WAITS] + WAITS_NOISE * fresh * other
    lot = _uniform(streams, i)
    if lot < facts[BURSTS] / 86400.0 and row[SECOND] >= row[BURST_UNTIL]:
        row[BURST] = 0.1 + 0.4 * _uniform(streams, i)
        row[BURST_UNTIL] = row[SECOND] + 60.0 + 120.0 * _uniform(streams, i)
    if row[SECOND] >= row[WANTS_UNTIL]:
        _wants(state, streams, i)
    curve, at = node.demand[int(row[ROW])], row[SECOND] / SLOT_SECONDS
    slot = int(at) % (curve.size - 1)  # the last is where the first begins anew
    wished = curve[slot] + (at - math.floor(at)) * (curve[slot + 1] - curve[slot])
    demand = wished * math.exp(row[DRIFT] - facts[NOISE] ** 2 / 2.0)
    used = min(demand, 1.0)
    batch = max(min(row[WANTS], grant, 1.0 - used), 0.0)
    over = max(demand - 1.0, 0.0) + (row[BURST] if row[SECOND] < row[BURST_UNTIL] else 0.0)
    alone, beside = felt_of(row[OWN], row[SHARED], row[SCHEDULER], facts[SATURATES], facts[YIELDS], used, batch, over)
    felt = min(max(alone + beside + row[WAITS], 0.0), 1.0)
    too_much = max(felt - row[OWN] - facts[SLO], 0.0)
    row[USED], row[BATCH], row[GRANT], row[FELT] = used, batch, grant, felt
    row[SLOW] += (felt - row[SLOW]) / SLOW_SECONDS
    row[HIGHEST] = max(used, row[HIGHEST] * (1.0 - 1.0 / HIGHEST_SECONDS))
    return batch - facts[PRICE] * too_much, batch, too_much


@numba.njit(cache=True, nogil=True)
def look(state: Floats, i: int, seen: Seen) -> None:
    """LOOK numbers of 0 to 1 (see environments.NodeEnv)."""
    row, day = state[i], 2.0 * math.pi * state[i, SECOND] / 86400.0
    seen[i, 0], seen[i, 1], seen[i, 2], seen[i, 3] = row[USED], row[HIGHEST], row[BATCH], row[GRANT]
    seen[i, 4], seen[i, 5], seen[i, 6] = row[FELT], row[SLOW], row[WANTS]
    seen[i, 7], seen[i, 8] = 0.5 + 0.5 * math.sin(day), 0.5 + 0.5 * math.cos(day)


@numba.njit(cache=True, nogil=True)
def step_all(
    node: Node, state: Floats, streams: NDArray[np.uint64], grants: Floats, rewards: Floats, told: Floats, seen: Seen
) -> None:
    """A second of all nodes; one whose grant is below 0 stands."""
    for i in range(state.shape[0]):
        if grants[i] >= 0.0:
            rewards[i], told[i, 0], told[i, 1] = step(node, state, streams, i, grants[i])
            look(state, i, seen)
