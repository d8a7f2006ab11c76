"""Sia (SOSP 2023): it, Pollux and Gavel on 64 GPUs of three kinds; the order of their completion times.

Six nodes of 4 t4, three of 8 rtx, two of 8 a100. Jobs progress as in Pollux' artifact (`reproduce/pollux`), by what was
measured on each kind of GPU; a job is on one kind at a time, and stands for half a minute when it is moved. Under Sia
and Pollux jobs are elastic and take the batch size with the best goodput; under Gavel they are rigid, as users who have
tuned them would ask ("TJ").

Every policy is told the true goodput, where the published systems learn it from what they see: an order is reproduced,
not a number. Of each trace the first of the published workloads is taken.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from colocate.simulate import traces
from colocate.simulate.reproduce import Cell, genetic, in_order, needs, pollux

SOURCE = "Jayaram Subramanya and others, Sia, SOSP 2023, table 3 (siasosp23/artifacts)"
TOLERANCE = {"sia": "each better than the next, as published: the ratio of mean, p99, makespan"}
FOLDER = "sia-sosp23"
WORKLOADS = ("workload-1",)
HOUR = 3600.0
PUBLISHED = {
    "philly": {"Sia": (0.6, 9.5, 14.2), "Pollux": (1.0, 14.9, 24.5), "Gavel": (1.9, 30.0, 33.8)},
    "saturn": {"Sia": (0.7, 10.9, 14.9), "Pollux": (1.0, 15.0, 25.5), "Gavel": (2.5, 38.7, 43.0)},
}
"""By trace and policy: hours of the mean and of the 99th percentile of completion times, and of the makespan."""
MEASURES = ("mean", "p99", "makespan")
Floats = NDArray[np.float64]


class Kind(NamedTuple):
    """GPUs of one kind."""

    profile: str
    """What its measurements are called."""
    nodes: int
    node_gpus: int

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.nodes * self.node_gpus


KINDS = (Kind("aws", 6, 4), Kind("rtx", 3, 8), Kind("dgx-ext", 2, 8))
"""Slowest first: t4, rtx, a100."""
ALL_GPUS = sum(kind.gpus for kind in KINDS)


class Where(NamedTuple):
    """GPUs of a job: which kind, and how many on which node."""

    kind: int
    nodes: tuple[tuple[int, int], ...]

    @property
    def placement(self) -> tuple[int, ...]:
        """GPUs of each of its nodes."""
        return tuple(count for _, count in self.nodes)


class Goodput:
    """The best progress a second of a model on a kind of GPU, over all batch sizes (Pollux, section 3)."""

    BATCHES = 50

    def __init__(self, application: pollux.Application) -> None:
        self._application = application
        self._steps: dict[tuple[int, ...], tuple[NDArray[np.int64], Floats]] = {}
        self._best: dict[tuple[tuple[int, ...], int], float] = {}
        sizes = sorted(application.validation)
        self._sizes = np.array(sizes, dtype=float)
        self._gradients = [
            np.array([application.validation[size][epoch, 2:] for size in sizes])
            for epoch in range(application.max_epochs)
        ]

    def best(self, placement: tuple[int, ...], epoch: int) -> float:
        """Progress a second; 0: it cannot run there."""
        key = placement, epoch
        if key not in self._best:
            batch, seconds = self._times(placement)
            if not len(batch):
                self._best[key] = 0.0
            else:
                sqr, var = (np.interp(batch, self._sizes, column) for column in self._gradients[epoch].T)
                gain = (var + sqr) / (var / (batch / self._application.init_batch) + sqr)
                self._best[key] = float(np.max(gain / seconds))
        return self._best[key]

    def _times(self, placement: tuple[int, ...]) -> tuple[NDArray[np.int64], Floats]:
        """Batch sizes, and the seconds of a step with each."""
        placement = min(placement[i:] + placement[:i] for i in range(len(placement)))
        if placement not in self._steps:
            app, replicas = self._application, sum(placement)
            least, found = max(app.init_batch, replicas * app.min_local), dict[int, float]()
            most = app.max_batch if least <= app.max_batch else 0
            for target in np.geomspace(least, most, self.BATCHES) if most else ():
                atomic, accumulated = app.batches(round(float(target)), replicas)
                batch = atomic * (accumulated + 1) * replicas
                if atomic < app.min_local or batch < app.init_batch or batch in found:
                    continue
                step, sync = app.step_seconds(placement, atomic)
                seconds = step + (step - sync) * accumulated
                if math.isfinite(seconds) and seconds > 0:
                    found[batch] = seconds
            self._steps[placement] = np.array(list(found), dtype=np.int64), np.array(list(found.values()))
        return self._steps[placement]


class Model:
    """A model on each kind of GPU."""

    def __init__(self, name: str, applications: Sequence[pollux.Application]) -> None:
        self.name, self.applications = name, applications
        self.goodput = [Goodput(application) for application in applications]


class Job(pollux.Job):
    """One of a workload."""

    def __init__(self, name: str, submit: int, model: Model, replicas: int, batch: int, *, elastic: bool) -> None:
        super().__init__(name, submit, model.applications[0], replicas, batch)
        self.model, self.elastic = model, elastic
        self.where: Where | None = None
        self.most, self.moves, self.gpu_seconds = 0, 0, 0.0

    def move(self, where: Where | None) -> None:
        """To other GPUs; none: it stands."""
        self.where = where
        if where is None:
            self.place(())
            return
        self.moves += self.most > 0  # the first time is none
        self.most = max(self.most, sum(where.placement))
        self.application = self.model.applications[where.kind]
        self.place(where.placement)

    def goodput(self) -> float:
        """Progress a second, in this epoch."""
        if not self.elastic or self.where is None:
            return super().goodput()
        return self.model.goodput[self.where.kind].best(self.placement, self.epoch)


class Policy(Protocol):
    """Who is where from now on."""

    seconds: int
    """How long a round is."""
    elastic: bool

    def decide(self, jobs: Sequence[Job], now: float) -> dict[str, Where]:
        """For jobs that are there and not complete, in the order of their arrival; who is not named stands."""
        ...


def simulate(jobs: list[Job], policy: Policy) -> None:
    """Until all are complete."""
    now, waiting, active = 0, sorted(jobs, key=lambda job: job.submit), list[Job]()
    while waiting or active:
        for job in active:
            job.gpu_seconds += policy.seconds * sum(job.placement)
            job.step(now, policy.seconds)
        now += policy.seconds
        while waiting and waiting[0].submit <= now:
            active.append(waiting.pop(0))
        active = [job for job in active if job.completed is None]
        after = policy.decide(active, now)
        for job in active:
            if after.get(job.name) != job.where:
                job.move(after.get(job.name))


def settled(kind: int, wanted: Mapping[str, int], before: Mapping[str, Where]) -> dict[str, Where]:
    """Nodes for so many GPUs of a kind each: powers of two inside a node, whole nodes beyond.

    Who has as many as before stays; where the rest then does not fit, all are placed anew, the largest first, which
    always fits.
    """
    size = KINDS[kind].node_gpus
    stays = {
        name: before[name]
        for name, count in wanted.items()
        if name in before and before[name].kind == kind and sum(before[name].placement) == count
    }
    for kept in (stays, {}):
        free, placed = [size] * KINDS[kind].nodes, dict(kept)
        for where in kept.values():
            for node, count in where.nodes:
                free[node] -= count
        for name in sorted((n for n in wanted if n not in kept), key=lambda n: -wanted[n]):
            count = wanted[name]
            part = min(count, size)
            fits = [node for node in sorted(range(len(free)), key=free.__getitem__) if free[node] >= part]
            if len(fits) < count // part:
                break
            placed[name] = Where(kind, tuple((node, part) for node in sorted(fits[: count // part])))
            for node, _ in placed[name].nodes:
                free[node] -= part
        else:
            return placed
    raise AssertionError("powers of two and whole nodes always fit")


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
            age, stop = now - job.submit, pollux.RESCALE_SECONDS
            moved = max(age - job.moves * stop, 0.0) / (age + stop)
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
        by_name = {job.name: job for job in jobs}
        after: dict[str, Where] = {}
        for number, kind in enumerate(KINDS):
            mine = [name for name, of in chosen.items() if of == number]
            free_gpus = [kind.node_gpus] * kind.nodes
            for name in mine:
                if name in self._before and self._before[name].kind == number:
                    after[name] = self._before[name]
                    for node, count in after[name].nodes:
                        free_gpus[node] -= count
            for name in sorted((n for n in mine if n not in after), key=lambda n: -by_name[n].replicas):
                after[name] = Where(number, tuple(sorted(pollux.spread(free_gpus, by_name[name].replicas))))
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
                whole, rest = divmod(job.replicas, kind.node_gpus)
                atomic, accumulated = app.batches(job.batch, job.replicas)
                step, sync = app.step_seconds((kind.node_gpus,) * whole + ((rest,) if rest else ()), atomic)
                seconds = step + (step - sync) * accumulated
                rates.append(1.0 / seconds if math.isfinite(seconds) else 0.0)
            self._rates[key] = np.array(rates)
        return self._rates[key]


VIRTUAL_GPUS = genetic.NODE_GPUS
"""Pollux knows one kind of node: those of 8 are two to it."""
VIRTUAL = tuple(
    (number, node)
    for number, kind in enumerate(KINDS)
    for node in range(kind.nodes)
    for _ in range(kind.node_gpus // VIRTUAL_GPUS)
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
            share = curves[row, -(-fair // VIRTUAL_GPUS), fair]
            curves[row] /= share if share > 0 else max(curves[row, 1, 1], 1e-9)
        ages = np.array([now - job.submit for job in jobs], dtype=float)
        moves = np.array([job.moves for job in jobs], dtype=float)
        stop = pollux.RESCALE_SECONDS
        moved = np.maximum(ages - moves * stop, 0.0) / (ages + stop)
        most = np.array([min(max(1, 2 * self._most.get(job.name, 0)), ALL_GPUS) for job in jobs], dtype=np.int64)
        seed = int(self._random.integers(1 << 31))
        self._population = genetic.search(kept, base, curves, moved, most, self.POPULATION, self.GENERATIONS, seed)
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
                for gpus in range(nodes, VIRTUAL_GPUS * nodes + 1):
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


POLICIES: dict[str, Callable[[], Policy]] = {"Sia": Sia, "Pollux": Pollux, "Gavel": Gavel}


def read_models(folder: Path) -> dict[str, Model]:
    """By name; epochs and gradients are those of Pollux' artifact. Raises BadInput."""
    parts = []
    for part in ("placements", "scalability"):
        found: dict[tuple[str, str], list[traces.Row]] = defaultdict(list)
        path = folder / FOLDER / f"profile_{part}_by_gpu.csv.gz"
        for row in traces.table(path, ("gpu_type", "application", *pollux.PROFILES[part])):
            found[row.text("gpu_type"), row.text("application")].append(row)
        parts.append(found)
    epochs: dict[str, list[traces.Row]] = defaultdict(list)
    path = folder / pollux.FOLDER / "profile_validation.csv.gz"
    for row in traces.table(path, ("application", *pollux.PROFILES["validation"])):
        epochs[row.text("application")].append(row)
    placements, scalability = parts
    return {
        name: Model(
            name,
            [
                pollux.Application(name, placements[k.profile, name], scalability[k.profile, name], epochs[name])
                for k in KINDS
            ],
        )
        for name in pollux.MOST_EPOCHS
    }


def read_jobs(folder: Path, models: Mapping[str, Model], workload: tuple[str, str], *, elastic: bool) -> list[Job]:
    """Of one workload of a set. Raises BadInput."""
    columns = ("set", "workload", "name", "time", "application", "num_replicas", "batch_size")
    return [
        Job(
            row.text("name"),
            row.whole("time"),
            models[row.text("application")],
            row.whole("num_replicas", least=1),
            row.whole("batch_size", least=1),
            elastic=elastic,
        )
        for row in traces.table(folder / FOLDER / "workloads.csv.gz", columns)
        if (row.text("set"), row.text("workload")) == workload
    ]


def hours(jobs: Sequence[Job]) -> tuple[float, float, float]:
    """Mean and 99th percentile of completion times, makespan."""
    took = np.array([(job.completed or math.nan) - job.submit for job in jobs])
    end = max(job.completed or math.nan for job in jobs) - min(job.submit for job in jobs)
    return float(took.mean()) / HOUR, float(np.percentile(took, 99)) / HOUR, end / HOUR


def cells(name: str, folder: Path, say: Callable[[str], None]) -> Iterator[Cell]:
    """For each trace and measure, of two neighbours in the published order the ratio. Raises BadInput."""
    needs(name, "scipy")
    models = read_models(folder)
    for trace, published in PUBLISHED.items():
        found = {}
        for policy, make in POLICIES.items():
            each = []
            for workload in WORKLOADS:
                say(f"{trace}, {workload}, {policy}")
                one = make()
                jobs = read_jobs(folder, models, (trace, workload), elastic=one.elastic)
                simulate(jobs, one)
                each.append(hours(jobs))
            found[policy] = np.mean(each, axis=0)
        for index, measure in enumerate(MEASURES):
            ours = {policy: float(values[index]) * HOUR for policy, values in found.items()}
            theirs = {policy: values[index] * HOUR for policy, values in published.items()}
            for cell in in_order(theirs, ours):
                yield cell._replace(name=f"{trace}, {measure}: {cell.name}")
