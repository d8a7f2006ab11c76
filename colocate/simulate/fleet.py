"""Jobs on a fleet of nodes over time: in which order, all members of a gang or pod by pod, and onto which nodes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from colocate.simulate.engine import simulated
from colocate.simulate.outages import NO_OUTAGES, Outages
from colocate.simulate.paces import NO_PACES, Paces
from colocate.simulate.placement import (
    Kinds,
    Nodes,
    new_board,
    typical_shares,
)
from colocate.simulate.running import AGAIN, DONE, Rule, Work, new_play, one_job
from colocate.simulate.scores import FGD, MOST_ALLOCATED, NATIVE, POLICIES, WHOLE

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


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
    """Seconds; NaN of those that never started. Of one that began again, the first time."""
    busy_gpu_seconds: float
    """Of GPUs of jobs that ran, from the first arrival to the last one."""
    held_gpu_seconds: float
    """Of GPUs that jobs held while they waited for the rest of their members, in the same time."""
    decisions: int
    """How often a node was looked for."""
    node: Ints
    """Of each pod, the pods of a job in a row, where it was last; -1: nowhere."""
    end: Floats
    """Seconds; NaN of those that never ended."""
    lost_gpu_seconds: float
    """Of GPUs, for work that was done again and for beginning again."""
    restarts: int
    idle_gpu_seconds: float
    """Of GPUs that nobody had while some job waited, from the first arrival to the last one."""
    cut: bool
    """It ended where failures are not known any more."""
    done_gpu_seconds: float
    """What the work of jobs was worth, from the first arrival to the last one: the GPU-seconds that it would have taken
    each of them alone on the best GPUs."""


def too_large(nodes: Nodes, kinds: Kinds, work: Work) -> int:
    """A job that does not even fit an empty fleet; -1 if all do."""
    most = np.zeros(len(kinds.gpus), np.int64)
    np.maximum.at(most, work.kind, work.least)
    for kind in np.flatnonzero(most):  # where its largest job fits the others do
        alone = Kinds(*(column[kind : kind + 1] for column in kinds))
        one = one_job(int(most[kind]))
        if np.isnan(simulate(nodes, alone, one, DISCIPLINES["packing"], 0).start[0]):
            return int(np.flatnonzero((work.kind == kind) & (work.least == most[kind]))[0])
    return -1


def simulate(
    nodes: Nodes,
    kinds: Kinds,
    work: Work,
    discipline: Discipline,
    seed: int,
    running: Ints | None = None,
    outages: Outages = NO_OUTAGES,
    paces: Paces = NO_PACES,
) -> Run:
    """Until nothing happens any more. The same for the same seed.

    The fleet is empty, but for `running`: the nodes of all pods of the first jobs, which began at the first arrival.
    """
    rng = np.random.default_rng(seed)
    policy = POLICIES.index(discipline.placement)
    shares = typical_shares(work.kind, kinds) if policy == FGD else None
    board = new_board(nodes, kinds, shares, rng)
    there = np.empty(0, np.int64) if running is None else running
    binds = policy in (NATIVE, MOST_ALLOCATED)
    preempts = binds and not discipline.gang and len(np.unique(kinds.priority)) > 1
    rule = Rule(policy, discipline.gang, discipline.strict, discipline.shortest, binds, preempts)
    play = new_play(board, work, rule, outages, paces)
    play.pods.node[: len(there)] = there
    decisions, cut = simulated(play, seed & 0x3FFFFFFF, len(there))
    busy, held, idle, lost = (float(area) / WHOLE for area in play.areas[:DONE])
    restarts, done = int(play.progress[:, AGAIN].sum()), float(play.areas[DONE])
    return Run(play.start, busy, held, decisions, play.pods.node, play.end, lost, restarts, idle, bool(cut), done)
