"""Pollux (OSDI 2021, section 4.2): a genetic search over who has how many GPUs on which of equal nodes.

`state`, `base`: GPUs of a job on a node, shape (jobs, nodes); `base` is how it is. `curves`: a job's speedup by nodes
and GPUs, shape (jobs, nodes + 1, GPUs + 1). `moved`: what a speedup is multiplied by where it is moved. `most`: GPUs
that a job may have.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from colocate.simulate.reproduce.kinds import ALL_GPUS, KINDS, Job, Where
from colocate.simulate.scores import kernel

Floats = NDArray[np.float64]
NODE_GPUS = 4
"""Pollux knows one kind of node: those of 8 are two to it."""
VIRTUAL = tuple(
    (number, node)
    for number, kind in enumerate(KINDS)
    for node in range(kind.nodes)
    for _ in range(kind.node_gpus // NODE_GPUS)
)
"""Of each of its nodes the kind, and which node of that."""


class Pollux:
    """A genetic search for the best power mean (p = -1) of the jobs' speedups over a fair share; at most one
    distributed job on a node; no regard to kinds (Pollux, section 4.2). A job with GPUs of several kinds uses those of
    the kind that it has most of.
    """

    seconds, elastic = 60, True
    POPULATION, GENERATIONS = 100, 10
    """The artifact has 100 generations; the population is kept from round to round."""

    def __init__(self, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)
        self._population = np.zeros((0, 0, len(VIRTUAL)), dtype=np.int64)
        self._names: list[str] = []
        self._curves: dict[tuple[str, int], Floats] = {}
        self._most: dict[str, int] = {}

    def decide(self, jobs: Sequence[Job], now: float) -> dict[str, Where]:
        """See Policy."""
        if not jobs:
            return {}
        jobs = sorted(jobs, key=lambda job: job.gpu_seconds)
        old = {name: row for row, name in enumerate(self._names)}
        kept = np.zeros((len(self._population), len(jobs), len(VIRTUAL)), dtype=np.int64)
        for row, job in enumerate(jobs):
            if job.name in old:
                kept[:, row] = self._population[:, old[job.name]]
        base = kept[0] if len(kept) else np.zeros((len(jobs), len(VIRTUAL)), dtype=np.int64)
        fair = max(1, ALL_GPUS // len(jobs))
        curves = np.array([self._curve(job) for job in jobs])
        for row in range(len(jobs)):
            share = curves[row, -(-fair // NODE_GPUS), fair]
            curves[row] /= share if share > 0 else max(curves[row, 1, 1], 1e-9)
        moved = np.array([job.worth_moving(now) for job in jobs])
        most = np.array([min(max(1, 2 * self._most.get(job.name, 0)), ALL_GPUS) for job in jobs], dtype=np.int64)
        seed = int(self._random.integers(1 << 31))
        self._population = search(kept, base, curves, moved, most, self.POPULATION, self.GENERATIONS, seed)
        self._names = [job.name for job in jobs]
        after = {}
        for job, row in zip(jobs, self._population[0], strict=True):
            self._most[job.name] = max(self._most.get(job.name, 0), int(row.sum()))
            if where := _on_one(row):
                after[job.name] = where
        return after

    def _curve(self, job: Job) -> Floats:
        """Goodput by how many virtual nodes and GPUs, as on the slowest kind; 0: impossible."""
        key = job.model.name, job.epoch
        if key not in self._curves:
            curve = np.zeros((len(VIRTUAL) + 1, ALL_GPUS + 1))
            for nodes in range(1, len(VIRTUAL) + 1):
                for gpus in range(nodes, NODE_GPUS * nodes + 1):
                    each, more = divmod(gpus, nodes)
                    placement = (each,) * (nodes - more) + (each + 1,) * more
                    curve[nodes, gpus] = job.model.goodput[0].best(placement, job.epoch)
            self._curves[key] = curve
        return self._curves[key]


def _on_one(row: NDArray[np.int64]) -> Where | None:
    """GPUs of several kinds: only those of the kind with most."""
    counts: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for (kind, node), count in zip(VIRTUAL, row.tolist(), strict=True):
        if count:
            counts[kind][node] += count
    if not counts:
        return None
    kind = max(counts, key=lambda k: (sum(counts[k].values()), k))
    return Where(kind, tuple(sorted(counts[kind].items())))


@kernel()
def _repair(state, most):  # type: ignore[no-untyped-def]
    """No more than a job may have, one distributed job on a node, no node above its GPUs; random who loses."""
    jobs, nodes = state.shape
    for job in range(jobs):
        total = state[job].sum()
        while total > most[job]:
            node = np.random.randint(nodes)
            if state[job, node] > 0:
                state[job, node] -= 1
                total -= 1
    spread = np.zeros(jobs, np.bool_)
    for job in range(jobs):
        spread[job] = (state[job] > 0).sum() > 1
    for node in range(nodes):
        seen, kept = 0, -1
        for job in range(jobs):
            if spread[job] and state[job, node] > 0:
                seen += 1
                if np.random.randint(seen) == 0:
                    kept = job
        free = NODE_GPUS
        for job in range(jobs):
            if spread[job] and job != kept:
                state[job, node] = 0
            state[job, node] = min(state[job, node], free)
            free -= state[job, node]


@kernel()
def _utility(state, base, curves, moved):  # type: ignore[no-untyped-def]
    """The power mean of the speedups, p = -1."""
    jobs, nodes = state.shape
    total = 0.0
    for job in range(jobs):
        count, gpus, same, had = 0, 0, True, 0
        for node in range(nodes):
            count += state[job, node] > 0
            gpus += state[job, node]
            had += base[job, node]
            same &= state[job, node] == base[job, node]
        speedup = curves[job, count, gpus] if gpus else 0.0
        if not same and had:
            speedup *= moved[job]
        total += 1.0 / max(speedup, 1e-2)
    return jobs / total


@kernel()
def _mutated(state, base, most):  # type: ignore[no-untyped-def]
    """Some jobs as they were, some elements none, some grown into what is free."""
    jobs, nodes = state.shape
    for job in range(jobs):
        if np.random.random() < 0.1:
            state[job] = base[job]
        if np.random.random() < 0.1:
            for node in range(nodes):
                if np.random.random() < 0.1:
                    state[job, node] = 0
    for node in range(nodes):
        free = NODE_GPUS - state[:, node].sum()
        while free > 0 and np.random.random() < 0.5:
            job = np.random.randint(jobs)
            grown = np.random.randint(1, free + 1)
            if state[job].sum() + grown <= most[job]:
                state[job, node] += grown
                free -= grown
    _repair(state, most)


@kernel()
def search(kept, base, curves, moved, most, population, generations, seed):  # type: ignore[no-untyped-def]
    """The population after so many generations, the best first."""
    np.random.seed(seed)
    jobs, nodes = base.shape
    states = np.zeros((2 * population, jobs, nodes), np.int64)
    utilities = np.full(2 * population, -1.0)
    for one in range(population):
        if one < len(kept):
            states[one] = kept[one]
        else:
            states[one] = base
            if one > 0:
                _mutated(states[one], base, most)
        if one > 0:
            _repair(states[one], most)
        utilities[one] = _utility(states[one], base, curves, moved)
    for _ in range(generations):
        for one in range(population, 2 * population):
            first, second = np.random.randint(population), np.random.randint(population)
            cut = np.random.randint(jobs + 1)
            states[one, :cut] = states[first, :cut]
            states[one, cut:] = states[second, cut:]
            _mutated(states[one], base, most)
            utilities[one] = _utility(states[one], base, curves, moved)
        order = np.argsort(-utilities, kind="mergesort")[:population]
        states[:population] = states[order].copy()
        utilities[:population] = utilities[order].copy()
    return states[:population].copy()
