"""Elastic and rigid training jobs on GPUs of several kinds, in rounds: what Sia's evaluation (SOSP 2023) plays.

Six nodes of 4 t4, three of 8 rtx, two of 8 a100. A job is on one kind at a time, and stands for half a minute when it
is moved. An elastic one takes the batch size with the best goodput.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from colocate.simulate import traces
from colocate.simulate.reproduce import pollux

FOLDER = "sia-sosp23"
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
        if placement not in self._steps:
            app, replicas = self._application, sum(placement)
            least, found = max(app.init_batch, replicas * app.min_local), dict[int, float]()
            most = app.max_batch if least <= app.max_batch else 0
            for target in np.geomspace(least, most, self.BATCHES) if most else ():
                atomic, accumulated = app.batches(round(float(target)), replicas)
                batch = atomic * (accumulated + 1) * replicas
                if atomic < app.min_local or batch < app.init_batch or batch in found:
                    continue
                seconds = app.seconds(placement, atomic, accumulated)
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

    def worth_moving(self, now: float) -> float:
        """What a goodput counts, from 0 to 1, for which it would have to be moved (Pollux, 4.2.1; Sia, 3.4)."""
        age, stop = now - self.submit, pollux.RESCALE_SECONDS
        return max(age - self.moves * stop, 0.0) / (age + stop)

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


def staying(kind: int, wanted: Mapping[str, int], before: Mapping[str, Where]) -> dict[str, Where]:
    """Who has as many GPUs of the kind as before."""
    return {
        name: before[name]
        for name, count in wanted.items()
        if name in before and before[name].kind == kind and sum(before[name].placement) == count
    }


def free_beside(kind: int, placed: Mapping[str, Where]) -> list[int]:
    """What others leave of each node."""
    free = [KINDS[kind].node_gpus] * KINDS[kind].nodes
    for where in placed.values():
        for node, count in where.nodes:
            free[node] -= count
    return free


def settled(kind: int, wanted: Mapping[str, int], before: Mapping[str, Where]) -> dict[str, Where]:
    """Nodes for so many GPUs of a kind each: powers of two inside a node, whole nodes beyond.

    Who has as many as before stays; where the rest then does not fit, all are placed anew, the largest first, which
    always fits.
    """
    for kept in (staying(kind, wanted, before), {}):
        free, placed = free_beside(kind, kept), dict(kept)
        for name in sorted((n for n in wanted if n not in kept), key=lambda n: -wanted[n]):
            count = wanted[name]
            part = min(count, KINDS[kind].node_gpus)
            fits = [node for node in sorted(range(len(free)), key=free.__getitem__) if free[node] >= part]
            if len(fits) < count // part:
                break
            placed[name] = Where(kind, tuple((node, part) for node in sorted(fits[: count // part])))
            for node, _ in placed[name].nodes:
                free[node] -= part
        else:
            return placed
    raise AssertionError("powers of two and whole nodes always fit")


def scattered(kind: int, wanted: Mapping[str, int], before: Mapping[str, Where]) -> dict[str, Where]:
    """Nodes for so many GPUs of a kind each: who stays stays, the others have the nodes with most free."""
    placed = staying(kind, wanted, before)
    free = free_beside(kind, placed)
    for name in sorted((n for n in wanted if n not in placed), key=lambda n: -wanted[n]):
        placed[name] = Where(kind, tuple(sorted(pollux.spread(free, wanted[name]))))
    return placed


def read_models(folder: Path) -> dict[str, Model]:
    """By name; epochs and gradients are those of Pollux' artifact. Raises BadInput."""
    placements, scalability = (
        pollux.profile(folder / FOLDER / f"profile_{part}_by_gpu.csv.gz", part, "gpu_type", "application")
        for part in ("placements", "scalability")
    )
    epochs = pollux.profile(folder / pollux.FOLDER / "profile_validation.csv.gz", "validation", "application")
    return {
        name: Model(
            name,
            [
                pollux.Application(name, placements[k.profile, name], scalability[k.profile, name], epochs[(name,)])
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
