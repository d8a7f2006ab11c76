"""The genetic search of Pollux (OSDI 2021, section 4.2) over who has how many GPUs on which of equal nodes.

`state`, `base`: GPUs of a job on a node, shape (jobs, nodes); `base` is how it is. `curves`: a job's speedup by nodes
and GPUs, shape (jobs, nodes + 1, GPUs + 1). `moved`: what a speedup is multiplied by where it is moved. `most`: GPUs
that a job may have.
"""

from __future__ import annotations

import numba
import numpy as np

NODE_GPUS = 4


@numba.njit(cache=True, nogil=True)
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


@numba.njit(cache=True, nogil=True)
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


@numba.njit(cache=True, nogil=True)
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


@numba.njit(cache=True, nogil=True)
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
