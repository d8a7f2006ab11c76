"""Jobs on a fleet of nodes over time: in which order, all members of a gang or pod by pod, and onto which nodes.

What happens at once is in the order of kube-scheduler's events: who ends gives back, then who comes is queued, then
those that wait are looked at in their order. Unlike it, a pod that did not fit is looked at again at once when
something ends (its backoff is at most ten seconds), and binding takes no time.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from colocate.simulate.placement import (
    BEST_FIT,
    FGD,
    NATIVE,
    POLICIES,
    RANDOM,
    WHOLE,
    Kinds,
    Nodes,
    State,
    Typical,
    drawn,
    empty,
    feasible_to_find,
    give_back,
    ranked,
    rate,
    take,
    typical_shares,
)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
NEVER = 1 << 40


class Work(NamedTuple):
    """Jobs by their arrival; one array each."""

    submit: Floats
    """Seconds."""
    run: Floats
    """Seconds, once all its members are placed."""
    kind: Ints
    """Of each of its pods."""
    members: Ints


class Discipline(NamedTuple):
    """How jobs are chosen, and where their pods go."""

    about: str
    placement: str
    """One of placement.POLICIES."""
    gang: bool
    """All of a job's pods or none; else each for itself, and what a job holds while it waits for the rest is held."""
    strict: bool = False
    """Nobody is looked at past one that waits."""
    shortest: bool = False
    """Who takes least time is first: by an oracle."""


DISCIPLINES = {
    "native": Discipline(
        "kube-scheduler: pod by pod, in order of arrival, who does not fit is skipped", "native", False
    ),
    "native-packed": Discipline("the same, with MostAllocated for GPUs", "most-allocated", False),
    "coscheduling": Discipline("kube-scheduler's nodes, all members of a job or none", "native", True),
    "fifo": Discipline("strictly in order of arrival, all or none, tightest node", "best-fit", True, strict=True),
    "packing": Discipline("in order of arrival, all or none, tightest node", "best-fit", True),
    "fgd": Discipline("in order of arrival, all or none, least fragmentation", "fgd", True),
    "shortest-first": Discipline(
        "who takes least time first (an oracle), tightest node", "best-fit", True, shortest=True
    ),
}


class Run(NamedTuple):
    """What became of the jobs."""

    start: Floats
    """Seconds; NaN of those that never started."""
    busy_gpu_seconds: float
    """Of GPUs of jobs that ran, from the first arrival to the last one."""
    held_gpu_seconds: float
    """Of GPUs that jobs held while they waited for the rest of their members, in the same time."""
    decisions: int
    """How often a node was looked for."""
    node: Ints
    """Of each pod, the pods of a job in a row; -1: nowhere."""


def too_large(nodes: Nodes, kinds: Kinds, work: Work) -> int:
    """A job that does not even fit an empty fleet; -1 if all do."""
    most = np.zeros(len(kinds.gpus), np.int64)
    np.maximum.at(most, work.kind, work.members)
    for kind in np.flatnonzero(most):  # where its largest job fits the others do
        alone = Kinds(*(column[kind : kind + 1] for column in kinds))
        one = Work(np.zeros(1), np.ones(1), np.zeros(1, np.int64), most[kind : kind + 1])
        if np.isnan(simulate(nodes, alone, one, DISCIPLINES["packing"], 0).start[0]):
            return int(np.flatnonzero((work.kind == kind) & (work.members == most[kind]))[0])
    return -1


def simulate(
    nodes: Nodes, kinds: Kinds, work: Work, discipline: Discipline, seed: int, running: Ints | None = None
) -> Run:
    """Until nothing happens any more. The same for the same seed.

    The fleet is empty, but for `running`: the nodes of all pods of the first jobs, which began at the first arrival.
    """
    rng = np.random.default_rng(seed)
    policy, count = POLICIES.index(discipline.placement), len(nodes.cpu_milli)
    shares = typical_shares(work.kind, kinds) if policy == FGD else np.zeros(len(kinds.cpu_milli))
    rows = (len(kinds.cpu_milli), count)
    board = Board(
        nodes,
        kinds,
        empty(nodes),
        Typical(np.flatnonzero(shares).astype(np.int64), shares),
        np.zeros(count, np.int64),
        np.full(rows, -1, np.int64),
        np.empty(rows),
        np.zeros(rows, np.int64),
        rng.permutation(count).astype(np.int64),
    )
    first = np.concatenate(([0], np.cumsum(work.members))).astype(np.int64)
    pods = Pods(first, np.full(first[-1], -1, np.int64), np.zeros(first[-1], np.int64), np.zeros(len(first), np.int64))
    there = np.empty(0, np.int64) if running is None else running
    pods.node[: len(there)] = there
    key = work.run if discipline.shortest else work.submit
    found = _simulate(board, pods, work, key, policy, discipline.gang, discipline.strict, seed & 0x3FFFFFFF, len(there))
    return Run(*found, pods.node)


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


class Pods(NamedTuple):
    """The members of all jobs, those of a job in a row."""

    first: Ints
    """(jobs + 1,)."""
    node: Ints
    mask: Ints
    """Its GPUs there, a bit each."""
    placed: Ints
    """(jobs + 1,) how many of each job are."""


@numba.njit(cache=True, nogil=True)
def _simulate(
    board: Board, pods: Pods, work: Work, key: Floats, policy: int, gang: bool, strict: bool, lot: int, there: int
) -> tuple[Floats, float, float, int]:
    jobs = work.submit.size
    start = np.full(jobs, np.nan)
    waiting, count = np.empty(jobs, np.int64), 0
    too_many = np.full(board.kinds.gpus.size, NEVER)
    """Of each kind, so many pods at once fit nowhere since something was given back last."""
    ends = [(0.0, 0) for _ in range(0)]
    arrived, now, busy, held, busy_area, held_area = 0, 0.0, 0, 0, 0.0, 0.0
    cursor, decisions, last = 0, 0, work.submit[jobs - 1]
    while arrived < jobs and pods.first[arrived] < there:
        _resume(board, pods, work.kind[arrived], arrived)
        start[arrived] = work.submit[0]
        heapq.heappush(ends, (work.submit[0] + work.run[arrived], arrived))
        busy += _size(board.kinds, work.kind[arrived]) * work.members[arrived]
        arrived += 1
    while arrived < jobs or ends:
        then = ends[0][0] if ends else np.inf
        if arrived < jobs:
            then = min(then, work.submit[arrived])
        passed = max(min(then, last) - max(now, work.submit[0]), 0.0)
        busy_area, held_area, now = busy_area + busy * passed, held_area + held * passed, then
        freed = False
        while ends and ends[0][0] <= now:
            _, j = heapq.heappop(ends)
            _take_back(board, pods, work.kind[j], j)
            busy -= _size(board.kinds, work.kind[j]) * work.members[j]
            freed = True
        came, before = count, count
        while arrived < jobs and work.submit[arrived] <= now:
            came = min(came, _insert(waiting, count, arrived, key))
            count, arrived = count + 1, arrived + 1
        if freed:
            too_many[:] = NEVER
        begin = 0 if freed else came  # for who waited before nothing has changed
        if strict and not freed and before > 0:
            begin = count
        kept = begin
        for w in range(begin, count):
            j = waiting[w]
            had = pods.placed[j]
            if (work.members[j] if gang else 1) < too_many[work.kind[j]]:  # a call would cost more than that
                cursor, lot, looked = _look(board, pods, work, j, policy, gang, too_many, cursor, lot)
                decisions += looked
            size = _size(board.kinds, work.kind[j])
            if not gang:
                held += size * (pods.placed[j] - had)
            if pods.placed[j] == work.members[j]:
                start[j] = now
                heapq.heappush(ends, (now + work.run[j], j))
                busy += size * work.members[j]
                held -= 0 if gang else size * work.members[j]
                continue
            left = count if strict else w + 1  # nobody is looked at past one that waits
            for later in range(w, left):
                waiting[kept] = waiting[later]
                kept += 1
            if strict:
                break
        count = kept
    return start, busy_area / WHOLE, held_area / WHOLE, decisions


@numba.njit(cache=True, nogil=True)
def _size(kinds: Kinds, k: int) -> int:
    return kinds.gpus[k] * kinds.gpu_milli[k]  # type: ignore[no-any-return]


@numba.njit(cache=True, nogil=True)
def _insert(waiting: Ints, count: int, job: int, key: Floats) -> int:
    """Queue a job behind all of no greater key; its place."""
    at = count
    while at > 0 and key[waiting[at - 1]] > key[job]:
        waiting[at] = waiting[at - 1]
        at -= 1
    waiting[at] = job
    return at


@numba.njit(cache=True, nogil=True)
def _resume(board: Board, pods: Pods, k: int, job: int) -> None:
    """A job whose pods are on their nodes already."""
    for p in range(pods.first[job], pods.first[job + 1]):
        i = pods.node[p]
        pods.mask[p] = take(board.kinds, board.state, board.nodes.gpus[i], i, k, 0, BEST_FIT, 0)
        board.version[i] += 1
        pods.placed[job] += 1


@numba.njit(cache=True, nogil=True)
def _take_back(board: Board, pods: Pods, k: int, job: int) -> None:
    """What the placed members of a job have."""
    for p in range(pods.first[job], pods.first[job] + pods.placed[job]):
        give_back(board.kinds, board.state, pods.node[p], k, pods.mask[p])
        board.version[pods.node[p]] += 1


@numba.njit(cache=True, nogil=True)
def _look(
    board: Board, pods: Pods, work: Work, j: int, policy: int, gang: bool, too_many: Ints, cursor: int, lot: int
) -> tuple[int, int, int]:
    """Place what a job still lacks, as far as that goes; the cursor, the lot, and how often a node was looked for."""
    k, wanted, looked = work.kind[j], work.members[j], 0
    asked = wanted if gang else 1
    while pods.placed[j] < wanted and asked < too_many[k]:
        looked += 1
        lot = (lot * 1103515245 + 12345) & 0x3FFFFFFF
        best, visited = _best(board, policy, k, cursor, lot)
        cursor = (cursor + visited) % board.version.size
        if best < 0:
            too_many[k] = asked
            if gang:  # all or none
                _take_back(board, pods, k, j)
                pods.node[pods.first[j] : pods.first[j] + pods.placed[j]] = -1
                pods.placed[j] = 0
            break
        p, gpus = pods.first[j] + pods.placed[j], board.nodes.gpus[best]
        pods.node[p] = best
        pods.mask[p] = take(board.kinds, board.state, gpus, best, k, board.device[k, best], policy, lot)
        board.version[best] += 1
        pods.placed[j] += 1
    return cursor, lot, looked


@numba.njit(cache=True, nogil=True)
def _best(board: Board, policy: int, k: int, cursor: int, lot: int) -> tuple[int, int]:
    """The node for a pod of a kind, below 0 where none fits; and how far the next search begins from here."""
    n, score = board.version.size, board.score[k]
    lottery = policy in (NATIVE, RANDOM)
    for i in range(n):
        if board.known[k, i] != board.version[i]:
            board.known[k, i] = board.version[i]
            points, board.device[k, i] = rate(board.nodes, board.kinds, board.state, board.typical, policy, i, k)
            score[i] = points if lottery else ranked(points, n, board.rank[i])
    if lottery:
        best, visited = drawn(score, cursor, feasible_to_find(n) if policy == NATIVE else n, lot)
        return best, visited if policy == NATIVE else 0
    best = int(np.argmax(score))
    return (best if score[best] >= 0.0 else -1), 0
