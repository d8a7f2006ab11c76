"""The compiled loop of the fleet simulator: what happens when, to whom. See `fleet` for what it is told and tells.

What happens at once is in the order of kube-scheduler's events: who ends gives back, then who comes is queued, then
those that wait are looked at in their order. Unlike it, a pod that did not fit is looked at again at once when
something ends (its backoff is at most ten seconds).

Where a node fails, each job that runs with a member there loses what it did since its last checkpoint. It goes on with
the members that are left, if these are enough; else it loses all and waits again: a gang at its old place in the queue
(its PodGroup is the same), pods of no gang behind (they are new ones). A job that holds members while it waits for the
rest loses those that are there.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from colocate.simulate.placement import Board, best_node
from colocate.simulate.preemption import Lesser, by_node, nominate
from colocate.simulate.running import (
    AGAIN,
    BEGAN,
    BOUND,
    BUSY,
    HELD,
    IDLE,
    KEY,
    LOST,
    NEVER,
    OVER,
    PAUSED,
    USABLE,
    Play,
    Pods,
    Work,
    begin,
    fall_back,
    gpus_of,
    grow,
    lose,
    put_all_down,
    put_down,
    put_on,
    release,
    repace,
    size_of,
    stop,
    take_back,
)
from colocate.simulate.scores import BEST_FIT, CPU, WHOLE, kernel

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
BINDS_A_SECOND, BINDS_AT_ONCE = 50.0, 100.0
"""kube-scheduler's client (clientConnection: qps, burst): pods beyond these are bound later."""


@kernel()
def simulated(play: Play, lot: int, there: int) -> tuple[int, bool]:
    """How often a node was looked for, and whether it was cut short."""
    pods, work, outages, gpus, areas = play.pods, play.work, play.outages, play.gpus, play.areas
    jobs, count = work.submit.size, 0
    ends = [(0.0, 0) for _ in range(0)]
    arrived, now, cursor, decisions, last, outage = 0, 0.0, 0, 0, work.submit[jobs - 1], 0
    while arrived < jobs and pods.first[arrived] < there:
        _resume(play, ends, arrived)
        arrived += 1
    if play.those[0] > 0:
        repace(play, ends, work.submit[0])
    while arrived < jobs or ends or (count > 0 and outage < outages.at.size):
        then = ends[0][0] if ends else np.inf
        then = min(then, work.submit[arrived]) if arrived < jobs else then
        then = min(then, outages.at[outage]) if outage < outages.at.size else then
        if then > outages.until:
            put_all_down(play, arrived, now)
            return decisions, True
        passed = max(min(then, last) - max(now, work.submit[0]), 0.0)
        areas[BUSY] += gpus[BUSY] * passed
        areas[HELD] += gpus[HELD] * passed
        areas[IDLE] += (gpus[USABLE] - gpus[BUSY] - gpus[HELD]) * passed * _anybody(play, count)
        now, freed = then, False
        while ends and ends[0][0] <= now:
            at, j = heapq.heappop(ends)
            if at == play.progress[j, OVER]:  # else it was stopped before
                count = _remove(play, count, j)
                _end(play, j, now)
                freed = True
        came = count
        while outage < outages.at.size and outages.at[outage] <= now:
            count = _outage(play, ends, outage, now, arrived, count)
            outage += 1
            freed = True
        while arrived < jobs and work.submit[arrived] <= now:
            came = min(came, _insert(play, count, arrived))
            count, arrived = count + 1, arrived + 1
        if freed:
            play.too_many[:] = NEVER
        looked_from = 0 if freed else came  # for who waited before nothing has changed
        if play.rule.strict and not freed and _anybody(play, came):
            looked_from = count
        again = True
        while again:  # where somebody was stopped there may be room for others
            count, cursor, lot, looked, again = _pass(play, ends, looked_from, count, now, cursor, lot)
            decisions += looked
            looked_from = 0
        if play.those[0] > 0:
            repace(play, ends, now)
        _drop_old(play.progress, ends)
    return decisions, count > 0 and outages.until < np.inf


@kernel()
def _drop_old(progress: Floats, ends: list[tuple[float, int]]) -> None:
    """The next end is one: of nobody who was stopped since, or has another pace."""
    while ends and ends[0][0] != progress[ends[0][1], OVER]:
        heapq.heappop(ends)


@kernel()
def _pass(
    play: Play, ends: list[tuple[float, int]], looked_from: int, count: int, now: float, cursor: int, lot: int
) -> tuple[int, int, int, int, bool]:
    """Start who can, of those that wait from one on.

    How many wait then, the cursor, the lot, nodes looked for, and whether somebody was stopped for somebody.
    """
    pods, work, rule = play.pods, play.work, play.rule
    waiting, progress, too_many = play.waiting, play.progress, play.too_many
    kind, all_of_them, enough, placed = work.kind, work.members, work.least, pods.placed
    w, kept, decisions, stopped = looked_from, looked_from, 0, False
    while w < count:
        j = waiting[w]
        k, had, runs = kind[j], placed[j], not np.isnan(progress[j, OVER])
        least = enough[j] if rule.gang and not runs else 1
        w += 1
        if least < too_many[k]:  # a call would cost more than that
            cursor, lot, looked = _look(play.board, pods, work, j, rule.policy, least, too_many, cursor, lot)
            decisions += looked
            while rule.preempts and placed[j] < all_of_them[j]:
                node, count, lot = _preempt(play, ends, count, j, now, lot)
                if node < 0:
                    break
                stopped = True
                put_on(play.board, pods, k, j, node, -1, rule.policy, lot)
                decisions += 1
            _has_more(play, ends, j, had, now)
            runs = not np.isnan(progress[j, OVER])
            if placed[j] == all_of_them[j]:
                continue
        nobody_past = rule.strict and not runs
        for later in range(w - 1, count if nobody_past else w):
            waiting[kept] = waiting[later]
            kept += 1
        if nobody_past:
            break
    return kept, cursor, lot, decisions, stopped


@kernel(inline="always")
def _has_more(play: Play, ends: list[tuple[float, int]], job: int, had: int, now: float) -> None:
    """Of so many placed members of a job, some more are by now: it begins, grows, or holds them."""
    runs, more = not np.isnan(play.progress[job, OVER]), play.pods.placed[job] - had
    if play.rule.binds and more > 0:
        play.progress[job, BOUND] = _bound(play, now, more)
    if runs and more > 0:
        grow(play, ends, job, more, now)
    elif not runs and play.pods.placed[job] >= play.work.least[job]:
        play.gpus[HELD] -= 0 if play.rule.gang else size_of(play.board.kinds, play.work.kind[job]) * had
        begin(play, ends, job, now)
    elif not runs and not play.rule.gang:
        play.gpus[HELD] += size_of(play.board.kinds, play.work.kind[job]) * more


@kernel()
def _next(lot: int) -> int:
    return (lot * 1103515245 + 12345) & 0x3FFFFFFF


@kernel()
def _preempt(
    play: Play, ends: list[tuple[float, int]], count: int, job: int, now: float, lot: int
) -> tuple[int, int, int]:
    """Stop who has to make room for a member of a job: the node (-1: none), how many wait then, and the lot."""
    board, pods = play.board, play.pods
    lesser = _lesser(play, job, now)
    if lesser.pod.size == 0:
        return -1, count, lot
    lot = _next(lot)
    start = lot % board.version.size
    node, victims = nominate(board.kinds, board.state, play.work.kind[job], start, lesser)
    for v in victims[::-1]:  # of a job from its last pod on, which the last takes the place of
        j = lesser.job[v]
        if pods.placed[j] == 0:
            continue  # with another victim of the same job
        count = _taken_from(play, ends, count, j, lesser.pod[v], node, now)
    if node >= 0:
        play.too_many[:] = NEVER
    return node, count, lot


@kernel()
def _lesser(play: Play, job: int, now: float) -> Lesser:
    """The placed pods of all jobs of a lower priority."""
    pods, priority, size = play.pods, _priority(play, job), 0
    jobs = [0 for _ in range(0)]
    for j in range(play.work.submit.size):
        if pods.placed[j] > 0 and _priority(play, j) < priority:
            jobs.append(j)
            size += pods.placed[j]
    node, pod, job_of = np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.int64)
    began, at = np.empty(size), 0
    for j in jobs:
        for p in range(pods.first[j], pods.first[j] + pods.placed[j]):
            node[at], pod[at], job_of[at] = pods.node[p], p, j
            began[at] = now if np.isnan(play.progress[j, OVER]) else play.progress[j, BEGAN]
            at += 1
    head, after = by_node(play.board.version.size, node)
    return Lesser(head, after, pod, job_of, play.work.kind[job_of], pods.mask[pod], began)


@kernel()
def _bound(play: Play, now: float, pods: int) -> float:
    """When so many pods more are bound that are placed now: tokens that are refilled (client-go's flowcontrol)."""
    play.binder[0] = max(play.binder[0], now - BINDS_AT_ONCE / BINDS_A_SECOND) + pods / BINDS_A_SECOND
    return max(now, play.binder[0])  # type: ignore[no-any-return]


@kernel(inline="always")
def _end(play: Play, job: int, now: float) -> None:
    put_down(play, job, now, gpus_of(play, job))
    stop(play, job)
    play.end[job] = now
    play.areas[LOST] += play.progress[job, PAUSED]


@kernel()
def _outage(play: Play, ends: list[tuple[float, int]], outage: int, now: float, arrived: int, count: int) -> int:
    """A node fails, or is back; how many jobs wait then."""
    board, i = play.board, play.outages.node[outage]
    board.version[i] += 1
    sign = 1
    if play.outages.down[outage]:
        sign = -1
        for j in range(arrived):
            if _on(play.pods, j, i) > 0:
                count = _taken_from(play, ends, count, j, -1, i, now)
    board.state.nodes[i, CPU] += sign * NEVER
    play.gpus[USABLE] += sign * board.nodes.gpus[i] * WHOLE
    return count


@kernel()
def _taken_from(
    play: Play, ends: list[tuple[float, int]], count: int, job: int, pod: int, node: int, now: float
) -> int:
    """A job loses a pod, or (-1) all that it has on a node; how many wait then.

    Who runs goes on with the members that are left, if these are enough, else it is stopped; who waits for the rest of
    its members waits for these too.
    """
    board, pods, k, again = play.board, play.pods, play.work.kind[job], play.progress[job, AGAIN]
    count = _remove(play, count, job)
    if np.isnan(play.progress[job, OVER]):
        play.gpus[HELD] -= size_of(board.kinds, k) * lose(board, pods, k, job, pod, node)
        play.progress[job, KEY] = now
    elif pods.placed[job] - (1 if pod >= 0 else _on(pods, job, node)) >= play.work.least[job]:
        at_once = now == play.progress[job, BEGAN] and again > 0  # as another a moment ago
        fall_back(play, job, now)
        play.progress[job, AGAIN] -= at_once
        release(play, job)
        lose(board, pods, k, job, pod, node)
        begin(play, ends, job, now)
    else:
        fall_back(play, job, now)
        stop(play, job)
    _insert(play, count, job)
    return count + 1


@kernel()
def _on(pods: Pods, job: int, node: int) -> int:
    """How many of its members are there."""
    found = 0
    for p in range(pods.first[job], pods.first[job] + pods.placed[job]):
        found += pods.node[p] == node
    return found


@kernel(inline="always")
def _remove(play: Play, count: int, job: int) -> int:
    """A job out of the queue, where it is as long as it lacks members; how many wait then."""
    left = count
    if play.pods.placed[job] < play.work.members[job]:
        left = 0
        for w in range(count):
            if play.waiting[w] != job:
                play.waiting[left] = play.waiting[w]
                left += 1
    return left


@kernel()
def _insert(play: Play, count: int, job: int) -> int:
    """Queue a job behind all that go first; its place."""
    waiting, at = play.waiting, count
    while at > 0 and _first(play, job, waiting[at - 1]):
        waiting[at] = waiting[at - 1]
        at -= 1
    waiting[at] = job
    return at


@kernel(inline="always")
def _anybody(play: Play, count: int) -> bool:
    """Whether one of so many that wait does not run yet."""
    w = 0
    while w < count and not np.isnan(play.progress[play.waiting[w], OVER]):
        w += 1
    return w < count


@kernel(inline="always")
def _first(play: Play, one: int, other: int) -> bool:
    """Whether a job goes before another: of a higher priority, else of a lesser key, else who came first."""
    mine, its = _priority(play, one), _priority(play, other)
    if mine != its:
        return mine > its
    if play.progress[one, KEY] != play.progress[other, KEY]:
        return play.progress[one, KEY] < play.progress[other, KEY]  # type: ignore[no-any-return]
    return one < other


@kernel(inline="always")
def _priority(play: Play, job: int) -> int:
    return play.board.kinds.priority[play.work.kind[job]]  # type: ignore[no-any-return]


@kernel()
def _resume(play: Play, ends: list[tuple[float, int]], job: int) -> None:
    """A job whose pods are on their nodes already."""
    pods = play.pods
    for p in range(pods.first[job], pods.first[job + 1]):
        put_on(play.board, pods, play.work.kind[job], job, pods.node[p], 0, BEST_FIT, 0)
    begin(play, ends, job, play.work.submit[0])


@kernel()
def _look(
    board: Board, pods: Pods, work: Work, j: int, policy: int, least: int, too_many: Ints, cursor: int, lot: int
) -> tuple[int, int, int]:
    """Place what a job still lacks, as far as that goes; the cursor, the lot, and how often a node was looked for.

    Of fewer than `least` at once none is.
    """
    k, looked, had = work.kind[j], 0, pods.placed[j]
    while pods.placed[j] < work.members[j]:
        asked = least if pods.placed[j] - had < least else 1
        if asked >= too_many[k]:
            break
        looked += 1
        lot = _next(lot)
        best, cursor = best_node(board, policy, k, cursor, lot)
        if best < 0:
            too_many[k] = asked
            if asked > 1:  # all of them or none
                take_back(board, pods, k, j)
                pods.node[pods.first[j] : pods.first[j] + pods.placed[j]] = -1
                pods.placed[j] = 0
            break
        put_on(board, pods, k, j, best, board.device[k, best], policy, lot)
    return cursor, lot, looked
