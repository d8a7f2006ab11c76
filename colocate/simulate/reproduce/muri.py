"""Muri (SIGCOMM 2022): six policies on its testbed of 64 GPUs, 400 jobs; the order of their mean completion times.

Four order jobs that have their GPUs alone (`simulate/rounds`). Muri lets up to four jobs with as many GPUs each share
them, one computing while another reads and a third communicates: by what a job's iteration takes of each resource, an
iteration of a group takes

    T = sum over steps s of the longest of its jobs' stages (s + offset of the job), in the best order of offsets,

and groups are maximum-weight matchings (Blossom) in two rounds, of pairs, then of pairs of pairs, by how much of the
resources they keep busy. Muri-S takes jobs by what service they have left, Muri-L by what they have had.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from colocate.errors import BadInput
from colocate.simulate import rounds, traces
from colocate.simulate.reproduce import Cell, in_order, needs

SOURCE = "Zhao and others, Muri, SIGCOMM 2022, results per job of its testbed (Rivendile/Muri)"
TOLERANCE = {"muri": "each faster than the next, as published: the ratio of their mean completion times"}
FOLDER, GPUS, ROUND_SECONDS, RESTART_SECONDS = "muri-sigcomm22", 64, 360.0, 60.0
MOST_TOGETHER = 4
WORTH_IT = 0.9
"""An iteration of two groups together takes at most so much of what theirs take one after the other; else the mean
completion time would only grow."""
ORDERS = {
    "SRSF": rounds.LEAST_SERVICE_LEFT,
    "SRTF": rounds.LEAST_LEFT,
    "tiresias": rounds.LEAST_HAD,
    "themis": rounds.MOST_DELAYED,
}
SHARING = {"Muri-S": rounds.LEAST_SERVICE_LEFT, "Muri-L": rounds.LEAST_HAD}
COLUMNS = ("job_id", "num_gpu", "submit_time", "iterations", "iteration_time")
STAGES = ("resource_time_0", "resource_time_1", "resource_time_2")


class Kind(NamedTuple):
    """Jobs that take the same of everything, milliseconds an iteration."""

    gpus: int
    alone: float
    stages: tuple[float, ...]
    """GPU, CPU and storage, network; none: a fourth step, in which nothing of it is used."""


Group = tuple[Kind, ...]


@cache
def together(group: Group) -> float:
    """Milliseconds of an iteration of all jobs of a group."""
    steps = MOST_TOGETHER
    if len(group) == 1:
        return group[0].alone
    best = math.inf
    for offsets in itertools.permutations(range(1, steps), len(group) - 1):
        shifted = [(0, group[0]), *zip(offsets, group[1:], strict=True)]
        best = min(best, sum(max(kind.stages[(s + o) % steps] for o, kind in shifted) for s in range(steps)))
    return best


def efficiency(group: Group) -> float:
    """How many resources are busy in the mean, while a group iterates."""
    return sum(sum(kind.stages) for kind in group) / together(group)


def joined(one: Group, other: Group) -> Group:
    """Both, in an order by which equal groups are equal."""
    return tuple(sorted(one + other))


@lru_cache(maxsize=4096)
def _paired(groups: tuple[Group, ...]) -> tuple[Group, ...]:
    """Groups joined two by two to the most efficiency in all; who gains nothing stays as it was."""
    import networkx as nx

    graph = nx.Graph()
    for a, b in itertools.combinations(range(len(groups)), 2):
        both = joined(groups[a], groups[b])
        if len(both) <= MOST_TOGETHER and together(both) <= WORTH_IT * (together(groups[a]) + together(groups[b])):
            graph.add_edge(a, b, weight=efficiency(both))
    pairs = nx.max_weight_matching(graph)
    alone = set(range(len(groups))) - {i for pair in pairs for i in pair}
    found = [joined(groups[a], groups[b]) for a, b in pairs] + [groups[i] for i in alone]
    return tuple(sorted(found))


def grouped(kinds: Sequence[Kind]) -> list[Group]:
    """Which jobs share their GPUs: groups of up to four with as many each."""
    found: list[Group] = []
    for gpus in sorted({kind.gpus for kind in kinds}):
        found += _paired(_paired(tuple(sorted((kind,) for kind in kinds if kind.gpus == gpus))))
    return found


def shared(jobs: rounds.Runs, kinds: Sequence[Kind], order: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """When each job ends, where they share GPUs as soon as these do not suffice."""
    end, left, now = np.full(len(kinds), np.nan), jobs.run.copy(), 0.0
    delay, before = np.zeros(len(kinds)), dict[int, tuple[int, ...]]()
    waiting = list(range(len(kinds)))
    while waiting:
        active = [j for j in waiting if jobs.submit[j] <= now]
        if not active:
            now = math.ceil(min(jobs.submit[j] for j in waiting) / ROUND_SECONDS) * ROUND_SECONDS
            continue
        active.sort(key=lambda j: (rounds.key_of(order, jobs, j, float(left[j]), now), j))
        teams = _teams(jobs, kinds, active)
        free, following = GPUS, dict[int, tuple[int, ...]]()
        for team in teams:
            if jobs.gpus[team[0]] <= free:
                free -= int(jobs.gpus[team[0]])
                following |= dict.fromkeys(team, team)
        for j, team in following.items():
            if before.get(j) != team:
                delay[j] = RESTART_SECONDS
            pace = min(kinds[j].alone / together(tuple(sorted(kinds[k] for k in team))), 1.0)
            waits = min(delay[j], ROUND_SECONDS)
            delay[j] -= waits
            worked = (ROUND_SECONDS - waits) * pace
            if left[j] <= worked:
                end[j] = now + waits + left[j] / pace
            left[j] -= worked
        waiting = [j for j in waiting if math.isnan(end[j])]
        now, before = now + ROUND_SECONDS, following
    return end


def _teams(jobs: rounds.Runs, kinds: Sequence[Kind], active: Sequence[int]) -> list[tuple[int, ...]]:
    """Jobs that run together, whose first member has most claim first."""
    if sum(int(jobs.gpus[j]) for j in active) <= GPUS:
        return [(j,) for j in active]
    chosen, wanted = [], 0
    for j in active:
        if wanted + jobs.gpus[j] <= MOST_TOGETHER * GPUS:
            chosen.append(j)
            wanted += int(jobs.gpus[j])
    by_kind: dict[Kind, list[int]] = {}
    for j in chosen:
        by_kind.setdefault(kinds[j], []).append(j)
    rank = {j: i for i, j in enumerate(chosen)}
    teams = [tuple(sorted(by_kind[kind].pop(0) for kind in group)) for group in grouped([kinds[j] for j in chosen])]
    return sorted(teams, key=lambda team: min(rank[j] for j in team))


def cells(name: str, folder: Path, say: Callable[[str], None]) -> Iterator[Cell]:
    """Five. Raises BadInput."""
    needs(name, "networkx")
    there = folder / FOLDER
    published: dict[str, list[float]] = {}
    for row in traces.table(there / "testbed_job_results.csv.gz", ("policy", "JCT")):
        published.setdefault(row.text("policy"), []).append(row.number("JCT", least=0.0))
    read = []
    for row in traces.table(there / "testbed_trace400.csv.gz", (*COLUMNS, *STAGES)):
        alone, gpus = row.number("iteration_time", least=1e-3), row.whole("num_gpu", least=1, most=GPUS)
        seconds = row.number("iterations", least=1) * alone / 1e3
        kind = Kind(gpus, alone, (*(row.number(stage, least=0.0) for stage in STAGES), 0.0))
        read.append((row.number("submit_time", least=0.0) / 1e3, seconds, kind))
    read.sort(key=lambda job: job[0])
    kinds = [kind for _, _, kind in read]
    run = np.array([seconds for _, seconds, _ in read])
    jobs = rounds.Runs(np.array([s for s, _, _ in read]), run, run, np.array([k.gpus for k in kinds], np.int64))
    ours, known = {}, {*ORDERS, *SHARING}
    if unknown := published.keys() - known:
        raise BadInput(
            f"{there / 'testbed_job_results.csv.gz'}, policy: {min(unknown)!r} is none of {', '.join(sorted(known))}"
        )
    for policy in published:
        say(policy)
        if policy in SHARING:
            end = shared(jobs, kinds, SHARING[policy])
        else:
            end = rounds.ends(jobs, GPUS, ORDERS[policy], ROUND_SECONDS, RESTART_SECONDS, True, False)
        ours[policy] = float(np.mean(end - jobs.submit))
    means = {policy: float(np.mean(values)) for policy, values in published.items()}
    yield from in_order(means, ours)
