"""Sia (SOSP 2023): it, Pollux and Gavel on 64 GPUs of three kinds; the order of their completion times.

Jobs progress as in Pollux' artifact (`reproduce/pollux`), by what was measured on each kind of GPU. Under Sia and
Pollux they are elastic; under Gavel they are rigid, as users who have tuned them would ask ("TJ").

Every policy is told the true goodput, where the published systems learn it from what they see: an order is reproduced,
not a number. Of each trace the first of the published workloads is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from colocate.simulate.reproduce import Cell, in_order, needs, pollux
from colocate.simulate.reproduce.genetic import Pollux
from colocate.simulate.reproduce.kinds import (
    ALL_GPUS,
    KINDS,
    Floats,
    Job,
    Policy,
    Where,
    read_jobs,
    read_models,
    scattered,
    settled,
    simulate,
)

SOURCE = "Jayaram Subramanya and others, Sia, SOSP 2023, table 3 (siasosp23/artifacts)"
TOLERANCE = {"sia": "each better than the next, as published: the ratio of mean, p99, makespan"}
WORKLOAD = "workload-1"
HOUR = 3600.0
PUBLISHED = {
    "philly": {"Sia": (0.6, 9.5, 14.2), "Pollux": (1.0, 14.9, 24.5), "Gavel": (1.9, 30.0, 33.8)},
    "saturn": {"Sia": (0.7, 10.9, 14.9), "Pollux": (1.0, 15.0, 25.5), "Gavel": (2.5, 38.7, 43.0)},
}
"""By trace and policy: hours of the mean and of the 99th percentile of completion times, and of the makespan."""
MEASURES = ("mean", "p99", "makespan")


class Sia:
    """An integer program over configurations: min sum_ij A_ij (r_ij G_ij)^p + λ (1 - |A_i|), p = -0.5, λ = 1.1.

    G is a job's goodput by configuration, relative to its worst; r = (age - moves · S) / (age + S), where it would be
    moved; a job at most doubles its GPUs in a round (Sia, section 3.4).
    """

    seconds, elastic = 60, True
    POWER, LEFT_OUT = -0.5, 1.1

    def __init__(self) -> None:
        self._before: dict[str, Where] = {}
        self._configurations = [
            (number, count, (min(count, kind.node_gpus),) * max(1, count // kind.node_gpus))
            for number, kind in enumerate(KINDS)
            for count in sorted(
                {2**i for i in range(10) if 2**i < kind.node_gpus}
                | {kind.node_gpus * n for n in range(1, kind.nodes + 1)}
            )
        ]

    def decide(self, jobs: Sequence[Job], now: float) -> dict[str, Where]:
        """See Policy."""
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import coo_array

        choices: list[tuple[int, int, int]] = []
        costs: list[float] = []
        for row, job in enumerate(jobs):
            curve = [job.model.goodput[kind].best(placement, job.epoch) for kind, _, placement in self._configurations]
            worst = min((g for g in curve if g > 0), default=1.0)
            moved = job.worth_moving(now)
            for (kind, count, _), good in zip(self._configurations, curve, strict=True):
                if good <= 0 or count > max(1, 2 * job.most):
                    continue
                stays = job.where is not None and job.where.kind == kind and sum(job.placement) == count
                factor = 1.0 if stays or job.where is None else max(moved, 1e-3)
                choices.append((row, kind, count))
                costs.append((factor * good / worst) ** self.POWER - self.LEFT_OUT)
        wanted: list[dict[str, int]] = [{} for _ in KINDS]
        if choices:
            number = np.arange(len(choices))
            rows = np.array([row for row, _, _ in choices])
            kinds = np.array([len(jobs) + kind for _, kind, _ in choices])
            counts = np.array([count for _, _, count in choices], dtype=float)
            matrix = coo_array(
                (
                    np.concatenate([np.ones(len(choices)), counts]),
                    (np.concatenate([rows, kinds]), np.concatenate([number, number])),
                ),
                shape=(len(jobs) + len(KINDS), len(choices)),
            )
            most = np.concatenate([np.ones(len(jobs)), [float(kind.gpus) for kind in KINDS]])
            found = milp(
                np.array(costs),
                integrality=np.ones(len(choices)),
                bounds=Bounds(0, 1),
                constraints=LinearConstraint(matrix.tocsr(), ub=most),
                options={"mip_rel_gap": 1e-3},
            )
            for (row, kind, count), chosen in zip(choices, found.x, strict=True):
                if chosen > 0.5:
                    wanted[kind][jobs[row].name] = count
        self._before = {n: w for kind, each in enumerate(wanted) for n, w in settled(kind, each, self._before).items()}
        return self._before


class Gavel:
    """Max-min fairness over kinds of GPUs, by shares of time that rounds keep to (Gavel, sections 4 and 5)."""

    seconds, elastic = 360, False

    def __init__(self) -> None:
        self._shares: dict[str, Floats] = {}
        self._had: dict[str, Floats] = {}
        self._since = 0.0
        self._before: dict[str, Where] = {}
        self._rates: dict[str, Floats] = {}

    def decide(self, jobs: Sequence[Job], now: float) -> dict[str, Where]:
        """See Policy."""
        for name, where in self._before.items():
            self._had[name][where.kind] += self.seconds
        if {job.name for job in jobs} != set(self._shares):
            self._shares = self._share(jobs)
            self._had = {job.name: np.zeros(len(KINDS)) for job in jobs}
            self._since = now
        ranks = self._ranks(jobs, now - self._since)
        chosen: dict[str, int] = {}
        for number in reversed(range(len(KINDS))):
            free = KINDS[number].gpus
            for _, job in sorted(ranks[number], key=lambda rank: rank[0]):
                if job.name not in chosen and job.replicas <= free:
                    chosen[job.name] = number
                    free -= job.replicas
        replicas = {job.name: job.replicas for job in jobs}
        after: dict[str, Where] = {}
        for number in range(len(KINDS)):
            mine = {name: replicas[name] for name, of in chosen.items() if of == number}
            after |= scattered(number, mine, self._before)
        self._before = after
        return after

    def _ranks(self, jobs: Sequence[Job], total: float) -> list[list[tuple[tuple[float, float, float], Job]]]:
        """By kind, who has a share of it: furthest behind it first."""
        ranks: list[list[tuple[tuple[float, float, float], Job]]] = [[] for _ in KINDS]
        for job in jobs:
            for kind, share in enumerate(self._shares[job.name].tolist()):
                if share > 1e-6:
                    had = float(self._had[job.name][kind])
                    priority = share * total / had if had > 0 else math.inf
                    ranks[kind].append(((-priority, had - share * total, -share), job))
        return ranks

    def _share(self, jobs: Sequence[Job]) -> dict[str, Floats]:
        """Of each job's time on each kind: max over x of the least of a job's throughput, relative to equal shares."""
        from scipy.optimize import linprog

        if not jobs:
            return {}
        many, kinds = len(jobs), len(KINDS)
        equal = np.array([kind.gpus for kind in KINDS]) / ALL_GPUS
        costs = np.zeros(many * kinds + 1)
        costs[-1] = -1.0
        matrix, most = [], []
        for row, job in enumerate(jobs):
            rates = self._rates_of(job)
            line = np.zeros(len(costs))
            line[row * kinds : (row + 1) * kinds] = -rates * job.replicas / float(equal @ rates)
            line[-1] = 1.0
            matrix.append(line)
            most.append(0.0)
            line = np.zeros(len(costs))
            line[row * kinds : (row + 1) * kinds] = 1.0
            matrix.append(line)
            most.append(1.0)
        for kind in range(kinds):
            line = np.zeros(len(costs))
            line[kind:-1:kinds] = [job.replicas for job in jobs]
            matrix.append(line)
            most.append(float(KINDS[kind].gpus))
        found = linprog(costs, A_ub=np.array(matrix), b_ub=np.array(most), bounds=(0, None))
        return {job.name: found.x[i * kinds : (i + 1) * kinds] for i, job in enumerate(jobs)}

    def _rates_of(self, job: Job) -> Floats:
        """Steps a second on each kind, packed."""
        key = f"{job.model.name} {job.replicas} {job.batch}"
        if key not in self._rates:
            rates = []
            for kind, app in zip(KINDS, job.model.applications, strict=True):
                placement = pollux.fewest_nodes(job.replicas, kind.node_gpus)
                seconds = app.seconds(placement, *app.batches(job.batch, job.replicas))
                rates.append(1.0 / seconds if math.isfinite(seconds) else 0.0)
            self._rates[key] = np.array(rates)
        return self._rates[key]


POLICIES: dict[str, Callable[[], Policy]] = {"Sia": Sia, "Pollux": Pollux, "Gavel": Gavel}


def figures(jobs: Sequence[Job]) -> tuple[float, float, float]:
    """Mean and 99th percentile of completion times, makespan; seconds."""
    took = np.array([(job.completed or math.nan) - job.submit for job in jobs])
    end = max(job.completed or math.nan for job in jobs) - min(job.submit for job in jobs)
    return float(took.mean()), float(np.percentile(took, 99)), end


def cells(name: str, folder: Path, say: Callable[[str], None]) -> Iterator[Cell]:
    """For each trace and measure, of two neighbours in the published order the ratio. Raises BadInput."""
    needs(name, "scipy")
    models = read_models(folder)
    for trace, published in PUBLISHED.items():
        found = {}
        for policy, make in POLICIES.items():
            say(f"{trace}, {policy}")
            one = make()
            jobs = read_jobs(folder, models, (trace, WORKLOAD), elastic=one.elastic)
            simulate(jobs, one)
            found[policy] = figures(jobs)
        for index, measure in enumerate(MEASURES):
            ours = {policy: values[index] for policy, values in found.items()}
            theirs = {policy: values[index] * HOUR for policy, values in published.items()}
            for cell in in_order(theirs, ours):
                yield cell._replace(name=f"{trace}, {measure}: {cell.name}")
