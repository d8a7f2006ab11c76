"""What a job has that runs, and how fast it is: the state of a simulation, and how it begins, grows, shrinks and stops.

Its pace is what a second of its work takes. It changes as members join, and as others come and go on a GPU that they
share: what was done until then is put down, and a new end is queued; the old one is known by its time.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from colocate.simulate.outages import Outages, saved
from colocate.simulate.paces import NO_MODEL, Paces
from colocate.simulate.placement import Board, Kinds, ask_of, give_back, take
from colocate.simulate.scores import MOST_GPUS, WHOLE, kernel

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
NEVER = 1 << 40
BUSY, HELD, IDLE, LOST, DONE = range(5)
USABLE = 2


class Work(NamedTuple):
    """Jobs by their arrival; one array each."""

    submit: Floats
    """Seconds."""
    run: Floats
    """Seconds, once all its members are placed."""
    kind: Ints
    """Of each of its pods."""
    members: Ints
    least: Ints
    """With so many members it runs: as many times slower as fewer are there than all; the others follow."""
    across: Floats
    """(jobs, 2): so many times as long it runs where its members are in more than one rack, and in more than one block
    of racks."""


def one_job(members: int) -> Work:
    """Which comes at once and takes a second."""
    all_of_them = np.full(1, members, np.int64)
    return Work(np.zeros(1), np.ones(1), np.zeros(1, np.int64), all_of_them, all_of_them, np.ones((1, 2)))


# How far a job is, one row each; times in seconds.
#   KEY                  of equal priorities the queue is in its order
#   WORK_LEFT, AGAIN     of its work when it began last, and how often it was stopped
#   BOUND, BEGAN, OVER   when the last of its pods that are placed is bound, when it began last, and will end: infinite
#                        where it stands still, NaN where it does not run
#   PACE, SINCE          what a second of its work takes, where it is now, and from when on
#   WORKED, TOLD         of its work since it began last, until then; and the part of that which is in areas[DONE]
#   SPENT, SPENT_AT      thousandths of GPUs times seconds since it began last, until then
#   PAUSED, STOOD        the same, in which it began again, and in which it stood still for want of memory
#   STALLED              1 where it does, for who was there before leaves it no memory of a GPU
(KEY, WORK_LEFT, AGAIN, BOUND, BEGAN, OVER, PACE, SINCE, WORKED, TOLD, SPENT, SPENT_AT, PAUSED, STOOD,
 STALLED) = range(15)  # fmt: skip


class Rule(NamedTuple):
    """A Discipline, compiled."""

    policy: int
    gang: bool
    strict: bool
    shortest: bool
    binds: bool
    """By kube-scheduler's client, which does not bind as fast as pods can come."""
    preempts: bool
    """A pod that fits nowhere takes the place of less important ones."""


class Pods(NamedTuple):
    """The members of all jobs, those of a job in a row."""

    first: Ints
    """(jobs + 1,)."""
    node: Ints
    mask: Ints
    """Its GPUs there, a bit each."""
    placed: Ints
    """(jobs,) how many of each are."""
    job: Ints
    """Of each. Empty, as the three after it, where nobody slows anybody down."""
    head: Ints
    """(GPUs of all nodes, MOST_GPUS each) the first pod with a part of it; -1: none."""
    after: Ints
    """(pods,) the next on its GPU; -1: none."""
    before: Ints


class Play(NamedTuple):
    """All that a run goes by and changes."""

    board: Board
    pods: Pods
    work: Work
    progress: Floats
    """(jobs, STALLED + 1)."""
    rule: Rule
    outages: Outages
    paces: Paces
    touched: NDArray[np.bool_]
    """(GPUs of all nodes,) of which parts were taken or given back at this moment."""
    those: Ints
    """Their numbers; the first is how many they are."""
    seen: NDArray[np.bool_]
    """(jobs,) that are looked at now."""
    waiting: Ints
    """Jobs in their order; as many as `count` says."""
    too_many: Ints
    """Of each kind, so many pods at once fit nowhere since something was given back last."""
    gpus: Ints
    """Thousandths: busy, held, and of nodes that have not failed."""
    areas: Floats
    """Thousandths of GPUs times seconds: busy, held, idle, lost; and the GPU-seconds that the work is worth that is not
    lost."""
    binder: Floats
    """(1,) seconds: until when its client's tokens are spent."""
    start: Floats
    end: Floats


def new_play(board: Board, work: Work, rule: Rule, outages: Outages, paces: Paces) -> Play:
    """At its beginning, when nobody is there."""
    jobs, nodes = len(work.submit), len(board.version)
    first = np.concatenate(([0], np.cumsum(work.members))).astype(np.int64)
    none, linked = np.full(first[-1], -1, np.int64), len(paces.row) > 0
    job = np.repeat(np.arange(jobs), work.members) if linked else np.empty(0, np.int64)
    slots = nodes * MOST_GPUS if linked else 0
    head = np.full(slots, -1, np.int64)
    chain = np.full(len(job), -1, np.int64)
    placed = np.zeros(jobs, np.int64)
    pods = Pods(first, none, np.zeros(first[-1], np.int64), placed, job, head, chain, chain.copy())
    progress = np.zeros((jobs, STALLED + 1))
    progress[:, KEY] = work.run if rule.shortest else work.submit
    progress[:, WORK_LEFT], progress[:, OVER], progress[:, PACE] = work.run, np.nan, 1.0
    gpus = np.array([0, 0, board.nodes.gpus.sum() * WHOLE], np.int64)
    too_many = np.full(len(board.kinds.gpus), NEVER)
    start, end = np.full(jobs, np.nan), np.full(jobs, np.nan)
    waiting = np.empty(jobs, np.int64)
    areas, binder = np.zeros(DONE + 1), np.full(1, -np.inf)
    marks = np.zeros(slots, np.bool_), np.zeros(slots + 1, np.int64), np.zeros(jobs, np.bool_)
    rest = (paces, *marks, waiting, too_many, gpus, areas, binder, start, end)
    return Play(board, pods, work, progress, rule, outages, *rest)


@kernel()
def put_all_down(play: Play, arrived: int, now: float) -> None:
    """What everybody who runs has done until now."""
    for job in range(arrived):
        if not np.isnan(play.progress[job, OVER]):
            put_down(play, job, now, gpus_of(play, job))


@kernel(inline="always")
def begin(play: Play, ends: list[tuple[float, int]], job: int, now: float) -> None:
    """As many of its members are placed as it needs; it runs once the last is bound."""
    progress, restart = play.progress, 0.0
    runs = max(now, progress[job, BOUND])
    if progress[job, AGAIN] == 0:
        play.start[job] = runs
    else:
        restart = play.outages.restart
    progress[job, STALLED], progress[job, STOOD], progress[job, BEGAN] = False, 0.0, runs
    progress[job, SINCE], progress[job, WORKED], progress[job, TOLD] = runs + restart, 0.0, 0.0
    progress[job, SPENT], progress[job, SPENT_AT], progress[job, PAUSED] = 0.0, runs, restart * gpus_of(play, job)
    play.gpus[BUSY] += gpus_of(play, job)
    _held(play, job, now, gpus_of(play, job))
    _touch(play, job)
    _goes_on(play, ends, job, pace_of(play, job))


@kernel(inline="always")
def _held(play: Play, job: int, now: float, gpus: int) -> None:
    """Until the last of its pods is bound its GPUs do nothing."""
    began, last = play.progress[job, BEGAN], play.work.submit[-1]
    if now < began:
        idle = (min(began, last) - min(now, last)) * gpus
        play.areas[BUSY] -= idle
        play.areas[HELD] += idle


@kernel()
def pace_of(play: Play, job: int) -> float:
    """Seconds that a second of a job's work takes where its members are; infinite beside who leaves it no memory."""
    pods, nodes, paces = play.pods, play.board.nodes, play.paces
    first, spread, racks, blocks = pods.first[job], False, False, False
    last = first + pods.placed[job]
    for p in range(first + 1, last):
        spread |= pods.node[p] != pods.node[first]
        racks |= nodes.rack[pods.node[p]] != nodes.rack[pods.node[first]]
        blocks |= nodes.block[pods.node[p]] != nodes.block[pods.node[first]]
    found = play.work.across[job, 1 if blocks else 0] if blocks or racks else 1.0
    if paces.row.size == 0 or paces.row[job] == NO_MODEL:
        return found * play.work.members[job] / pods.placed[job] if last < pods.first[job + 1] else found
    row = paces.row[job] + pods.placed[job] - play.work.least[job]
    slowest = 0.0
    for p in range(first, last):
        alone = paces.alone[row, nodes.model[pods.node[p]], int(spread)]
        slowest = max(slowest, alone * _beside(play, job, p))
    return found * slowest


@kernel()
def _beside(play: Play, job: int, p: int) -> float:
    """So many times as long it takes because of those that share its member's GPU; infinite: it has no memory there.

    Who was there before has it, and who has none does not slow down the others.
    """
    pods, progress, paces = play.pods, play.progress, play.paces
    if not _shares(pods, play.board.kinds, play.work.kind[job]):
        return 1.0
    gpu, found = play.board.nodes.model[pods.node[p]], 1.0  # and what each of the others alone would cost
    q = pods.head[_slot(pods, p)]
    while q >= 0:
        other = pods.job[q]
        if (
            q != p
            and paces.row[other] != NO_MODEL
            and not (np.isnan(progress[other, OVER]) or progress[other, STALLED])
        ):
            times = paces.pair[gpu, paces.model[job], paces.model[other]]
            if times < np.inf:
                found += times - 1.0
            elif other == job:  # they take turns
                found += 1.0
            elif (progress[other, BEGAN], other) < (progress[job, BEGAN], job):
                return np.inf
        q = pods.after[q]
    return found


@kernel(inline="always")
def _shares(pods: Pods, kinds: Kinds, k: int) -> bool:
    """Whether a pod of a kind has a part of a GPU, where it matters who has the others."""
    return pods.head.size > 0 and kinds.gpus[k] == 1 and kinds.gpu_milli[k] < WHOLE


@kernel()
def _slot(pods: Pods, p: int) -> int:
    """The number of the GPU that a pod has a part of."""
    gpu = 0
    while not (pods.mask[p] >> gpu) & 1:
        gpu += 1
    return pods.node[p] * MOST_GPUS + gpu  # type: ignore[no-any-return]


@kernel(inline="always")
def _touch(play: Play, job: int) -> None:
    """Who shares a GPU with it may have another pace."""
    if _shares(play.pods, play.board.kinds, play.work.kind[job]):
        _mark(play.pods, play.touched, play.those, job)


@kernel()
def _mark(pods: Pods, touched: NDArray[np.bool_], those: Ints, job: int) -> None:
    """The GPUs that it has parts of."""
    for p in range(pods.first[job], pods.first[job] + pods.placed[job]):
        slot = _slot(pods, p)
        if not touched[slot]:
            touched[slot] = True
            those[0] += 1
            those[those[0]] = slot


@kernel()
def repace(play: Play, ends: list[tuple[float, int]], now: float) -> None:
    """Who shares a GPU of which somebody took or gave back a part goes on at the pace that it has now."""
    pods, progress, those = play.pods, play.progress, play.those
    jobs, at = [0 for _ in range(0)], 1
    while at <= those[0]:
        p, at = pods.head[those[at]], at + 1
        while p >= 0:
            job, p = pods.job[p], pods.after[p]
            if not play.seen[job] and not np.isnan(progress[job, OVER]):
                play.seen[job] = True
                jobs.append(job)
    changes = True
    while changes:  # who has memory depends on those that were there before, and ends with the first
        changes = False
        for i in range(len(jobs)):
            stalled = pace_of(play, jobs[i]) == np.inf
            if stalled != progress[jobs[i], STALLED]:
                progress[jobs[i], STALLED], changes = stalled, True
                _affected(play, jobs, jobs[i])
    for job in jobs:
        play.seen[job] = False
        pace = pace_of(play, job)
        if pace != progress[job, PACE]:
            put_down(play, job, now, gpus_of(play, job))
            _goes_on(play, ends, job, pace)
    for at in range(1, those[0] + 1):
        play.touched[those[at]] = False
    those[0] = 0


@kernel()
def _affected(play: Play, jobs: list[int], job: int) -> None:
    """Those that share any GPU with a job are looked at, too."""
    pods = play.pods
    for p in range(pods.first[job], pods.first[job] + pods.placed[job]):
        q = pods.head[_slot(pods, p)]
        while q >= 0:
            other, q = pods.job[q], pods.after[q]
            if not play.seen[other] and not np.isnan(play.progress[other, OVER]):
                play.seen[other] = True
                jobs.append(other)


@kernel(inline="always")
def put_down(play: Play, job: int, now: float, gpus: int) -> None:
    """What it has done until now, at the pace and with the GPUs that it had."""
    progress, last = play.progress, play.work.submit[-1]
    since, pace = progress[job, SINCE], progress[job, PACE]
    if now > since:
        progress[job, WORKED] += (now - since) / pace
        told = max(min(now, last) - since, 0.0) / pace
        progress[job, TOLD] += told
        progress[job, STOOD] += gpus * (now - since) if pace == np.inf else 0.0
        play.areas[DONE] += _worth(play, job) * told
        progress[job, SINCE] = now


@kernel(inline="always")
def _worth(play: Play, job: int) -> int:
    """GPUs that a second of its work takes alone, those that it has a part of as if they were its own."""
    return play.board.kinds.gpus[play.work.kind[job]] * play.work.members[job]  # type: ignore[no-any-return]


@kernel(inline="always")
def _goes_on(play: Play, ends: list[tuple[float, int]], job: int, pace: float) -> None:
    """At a pace, from `since` on."""
    progress = play.progress
    left = max(progress[job, WORK_LEFT] - progress[job, WORKED], 0.0)
    progress[job, PACE], progress[job, OVER] = pace, np.inf
    if pace < np.inf:
        progress[job, OVER] = progress[job, SINCE] + left * pace
        heapq.heappush(ends, (progress[job, OVER], job))


@kernel()
def grow(play: Play, ends: list[tuple[float, int]], job: int, more: int, now: float) -> None:
    """More of its members are there: all begin again together, from where they are.

    Who joins is taken to be bound at once.
    """
    progress, added = play.progress, size_of(play.board.kinds, play.work.kind[job]) * more
    then, began = max(now, progress[job, SPENT_AT]), progress[job, BEGAN]
    put_down(play, job, now, gpus_of(play, job) - added)
    progress[job, SPENT] += (gpus_of(play, job) - added) * (then - progress[job, SPENT_AT])
    progress[job, SPENT_AT] = then
    resumes = max(progress[job, SINCE], now + play.outages.restart)
    progress[job, PAUSED] += added * max(progress[job, SINCE] - max(now, began), 0.0)
    progress[job, PAUSED] += (resumes - max(progress[job, SINCE], now)) * gpus_of(play, job)
    progress[job, SINCE] = resumes
    play.gpus[BUSY] += added
    _held(play, job, now, added)
    _touch(play, job)
    _goes_on(play, ends, job, pace_of(play, job))


@kernel(inline="always")
def stop(play: Play, job: int) -> None:
    """It has nothing any more; where its pods were stays known."""
    take_back(play.board, play.pods, play.work.kind[job], job)
    release(play, job)
    play.pods.placed[job] = 0


@kernel(inline="always")
def release(play: Play, job: int) -> None:
    """It does not run any more."""
    _touch(play, job)
    play.progress[job, OVER] = np.nan
    play.gpus[BUSY] -= gpus_of(play, job)


@kernel()
def fall_back(play: Play, job: int, now: float) -> None:
    """To its last checkpoint, and into the queue: a gang at its old place, pods of no gang as the new ones they are."""
    progress, gpus = play.progress, gpus_of(play, job)
    put_down(play, job, now, gpus)
    worked = progress[job, WORKED]
    kept = saved(play.outages, worked, progress[job, WORK_LEFT])
    later = max(progress[job, SINCE] - max(now, progress[job, BEGAN]), 0.0)
    # Of all that its GPUs spent on the work, the part that is kept.
    lost = progress[job, SPENT] + gpus * max(now - progress[job, SPENT_AT], 0.0) - progress[job, STOOD]
    lost -= kept / worked * (lost - (progress[job, PAUSED] - gpus * later)) if kept > 0.0 else 0.0
    play.areas[DONE] -= _worth(play, job) * max(progress[job, TOLD] - kept, 0.0)
    progress[job, WORK_LEFT] -= kept
    _held(play, job, now, -gpus)
    if now < progress[job, BEGAN] and progress[job, AGAIN] == 0:
        play.start[job] = np.nan
    else:
        progress[job, AGAIN] += 1
    if play.rule.shortest:
        progress[job, KEY] = progress[job, WORK_LEFT]
    elif not play.rule.gang:
        progress[job, KEY] = now
    play.areas[LOST] += lost


@kernel()
def lose(board: Board, pods: Pods, k: int, job: int, pod: int, node: int) -> int:
    """A job gives up its members there, or one of them; how many they are. Its last ones take their places."""
    p, lost = pods.first[job], 0
    while p < pods.first[job] + pods.placed[job]:
        if pods.node[p] != node or pod not in (-1, p):
            p += 1
            continue
        give_back(board.state, node, ask_of(board.kinds, k), pods.mask[p])
        _unlink(board, pods, k, p)
        pods.placed[job] -= 1
        last = pods.first[job] + pods.placed[job]
        if last > p:
            _unlink(board, pods, k, last)
            pods.node[p], pods.mask[p] = pods.node[last], pods.mask[last]
            _link(board, pods, k, p)
        pods.node[last] = -1
        lost += 1
        if pod >= 0:
            break  # another may be in its place now
    return lost


@kernel()
def size_of(kinds: Kinds, k: int) -> int:
    """Thousandths of GPUs that a pod of a kind asks for."""
    return kinds.gpus[k] * kinds.gpu_milli[k]  # type: ignore[no-any-return]


@kernel(inline="always")
def gpus_of(play: Play, job: int) -> int:
    """Of its members that are placed, in thousandths."""
    return size_of(play.board.kinds, play.work.kind[job]) * play.pods.placed[job]  # type: ignore[no-any-return]


@kernel()
def _link(board: Board, pods: Pods, k: int, p: int) -> None:
    """A pod has a part of a GPU."""
    if _shares(pods, board.kinds, k):
        slot = _slot(pods, p)
        head = pods.head[slot]
        pods.after[p], pods.before[p], pods.head[slot] = head, -1, p
        if head >= 0:
            pods.before[head] = p


@kernel()
def _unlink(board: Board, pods: Pods, k: int, p: int) -> None:
    """It has it no more."""
    if _shares(pods, board.kinds, k):
        if pods.before[p] >= 0:
            pods.after[pods.before[p]] = pods.after[p]
        else:
            pods.head[_slot(pods, p)] = pods.after[p]
        if pods.after[p] >= 0:
            pods.before[pods.after[p]] = pods.before[p]


@kernel()
def take_back(board: Board, pods: Pods, k: int, job: int) -> None:
    """What the placed members of a job have."""
    for p in range(pods.first[job], pods.first[job] + pods.placed[job]):
        give_back(board.state, pods.node[p], ask_of(board.kinds, k), pods.mask[p])
        _unlink(board, pods, k, p)
        board.version[pods.node[p]] += 1


@kernel()
def put_on(board: Board, pods: Pods, k: int, job: int, node: int, device: int, policy: int, lot: int) -> None:
    """The next member of a job onto a node."""
    p = pods.first[job] + pods.placed[job]
    pods.node[p] = node
    pods.mask[p] = take(board.state, node, ask_of(board.kinds, k), device, policy, lot)
    _link(board, pods, k, p)
    board.version[node] += 1
    pods.placed[job] += 1
