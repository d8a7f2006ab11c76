"""Elastic training jobs in rounds of a minute, as in the artifact of Pollux (OSDI 2021): Tiresias and Optimus there.

A job has a model whose progress a second follows from its placement, its batch size and the noise of its gradients, all
three interpolated from what the authors measured. Every minute all jobs take a step, then the policy decides; who gets
another placement stands for half a minute. The two policies here use no randomness, so their published completion times
are exact: 16 nodes of 4 GPUs, 12,800 jobs.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from colocate.simulate import traces
from colocate.simulate.reproduce import Cell, needs

SOURCE = "Qiao and others, Pollux, OSDI 2021, artifact, results-jobload (petuum/adaptdl, osdi21-artifact)"
EXACT = "the completion time of each of 6,400 jobs exactly"
TOLERANCE = {"pollux-tiresias": EXACT, "pollux-optimus": EXACT}
FOLDER = "pollux-osdi21"
PROFILES = {
    "placements": ("placement", "local_bsz", "step_time", "sync_time"),
    "scalability": ("num_nodes", "num_replicas", "local_bsz", "step_time", "sync_time"),
    "validation": ("batch_size", "epoch", "progress", "iteration", "grad_sqr", "grad_var"),
}
Rows = Sequence[traces.Row]
Floats = NDArray[np.float64]
NODES, NODE_GPUS, ROUND_SECONDS, RESCALE_SECONDS = 16, 4, 60, 30
MOST_EPOCHS = {"bert": 2, "cifar10": 100, "ncf": 10, "imagenet": 90, "deepspeech2": 80, "yolov3": 50}
MOST_LOCAL_BATCH = {"yolov3": 8}
DEMOTED_GPU_SECONDS = 57_600.0
"""A job that has had so much goes to Tiresias' second queue."""


class Application:
    """What was measured of one model: step times by placement, progress and gradients by batch size."""

    def __init__(self, name: str, placements: Rows, scalability: Rows, validation: Rows) -> None:
        self.max_epochs = MOST_EPOCHS[name]
        self.name = name
        self._by_placement: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
        groups: dict[tuple[int, int, int], list[tuple[float, float]]] = defaultdict(list)
        for row in placements:
            where, local = row.text("placement"), row.whole("local_bsz")
            step, sync = row.number("step_time"), row.number("sync_time")
            self._by_placement[where].append((local, step, sync))
            groups[len(where), sum(map(int, where)), local].append((step, sync))
        sizes = [row.whole("local_bsz") for row in placements]
        self.min_local, self.max_local = min(sizes), MOST_LOCAL_BATCH.get(name, max(sizes))
        points = [(*key, *np.mean(values, axis=0)) for key, values in sorted(groups.items())]
        points += [tuple(row.number(c) for c in PROFILES["scalability"]) for row in scalability]
        self._points = np.array(points)
        self._between: Any = None
        self.validation: dict[int, Floats] = {}
        for size in sorted({row.whole("batch_size") for row in validation}):
            rows = [row for row in validation if row.whole("batch_size") == size]
            self.validation[size] = np.array([[row.number(n) for n in PROFILES["validation"][2:]] for row in rows])
        self.init_batch, self.max_batch = min(self.validation), max(self.validation)
        self._steps: dict[tuple[tuple[int, ...], int], tuple[float, float]] = {}
        shortest = min(len(v) for v in self.validation.values())
        self._ends = [min(float(v[e, 0]) for v in self.validation.values() if e < len(v)) for e in range(shortest)]

    def ends(self, epoch: int) -> float:
        """The progress at which the epoch is over that begins after so many."""
        return self._ends[epoch]

    @property
    def last_epoch(self) -> int:
        """A job is complete once it is past it."""
        return self.max_epochs - 1

    def step_seconds(self, placement: tuple[int, ...], local: int) -> tuple[float, float]:
        """(a step, its synchronization) on GPUs of each node, with a batch of so many a GPU."""
        placement = min(placement[i:] + placement[:i] for i in range(len(placement)))
        key = (placement, local)
        if key not in self._steps:
            self._steps[key] = self._look_up(placement, local)
        return self._steps[key]

    def seconds(self, placement: tuple[int, ...], local: int, accumulated: int) -> float:
        """An update of the model, with so many steps before it that are not synchronized."""
        step, sync = self.step_seconds(placement, local)
        return step + (step - sync) * accumulated

    def _look_up(self, placement: tuple[int, ...], local: int) -> tuple[float, float]:
        known = self._by_placement.get("".join(map(str, placement)))
        if known is not None:
            xs, steps, syncs = (np.array(v) for v in zip(*known, strict=True))
            low = int(np.clip(np.searchsorted(xs, local), 1, len(xs) - 1)) - 1
            share = (local - xs[low]) / (xs[low + 1] - xs[low])
            return tuple(float(v[low] + share * (v[low + 1] - v[low])) for v in (steps, syncs))  # type: ignore[return-value]
        if self._between is None:
            from scipy.interpolate import LinearNDInterpolator

            self._between = LinearNDInterpolator(self._points[:, :3], self._points[:, 3:])
        step, sync = self._between([min(len(placement), NODES), sum(placement), local])[0]
        return float(step), float(sync)

    def gradients(self, batch: int, epoch: int) -> tuple[float, float]:
        """(squared, variance) of the gradients in an epoch; linear between the batch sizes that were measured."""
        if batch in self.validation:
            return float(self.validation[batch][epoch, 2]), float(self.validation[batch][epoch, 3])
        low = max(b for b in self.validation if b < batch)
        high = min(b for b in self.validation if b > batch)
        share = (batch - low) / (high - low)
        a, b = self.validation[low][epoch, 2:], self.validation[high][epoch, 2:]
        sqr, var = a + share * (b - a)
        return float(sqr), float(var)

    def iterations(self, batch: int, epoch: int) -> float:
        """Steps with a batch size until the end of an epoch."""
        return float(self.validation[batch][epoch, 1])

    def batches(self, target: int, replicas: int) -> tuple[int, int]:
        """(a GPU's batch, steps that are accumulated before it is applied) for a target over so many GPUs."""
        local = math.ceil(target / replicas - 1e-8)
        accumulated = math.ceil(local / self.max_local - 1e-8) - 1
        if replicas == 1 and target > self.init_batch:
            accumulated = max(1, accumulated)
        atomic = math.ceil(local / (accumulated + 1) - 1e-8)
        return min(atomic, self.max_batch // (replicas * (accumulated + 1))), accumulated


class Job:
    """One of a workload."""

    def __init__(self, name: str, submit: int, application: Application, replicas: int, batch: int) -> None:
        self.name, self.submit, self.application, self.replicas, self.batch = name, submit, application, replicas, batch
        self.placement: tuple[int, ...] = ()
        self.completed: float | None = None
        self.epoch, self.progress, self.rescale = 0, 0.0, 0.0
        self._atomic = self._accumulated = 0
        self._goodput: tuple[int, float] = (-1, 0.0)

    def place(self, placement: tuple[int, ...]) -> None:
        """GPUs of each of its nodes; none: it stands."""
        self.placement = placement
        if placement:
            self._atomic, self._accumulated = self.application.batches(self.batch, sum(placement))
            self.rescale = RESCALE_SECONDS
            self._goodput = (-1, 0.0)

    def goodput(self) -> float:
        """Progress a second, in this epoch."""
        if self._goodput[0] != self.epoch:
            app, count = self.application, sum(self.placement) * (self._accumulated + 1)
            seconds = app.seconds(self.placement, self._atomic, self._accumulated)
            sqr, var = app.gradients(count * self._atomic, self.epoch)
            scale = count * self._atomic / app.init_batch
            gain = (var + sqr) / (var / scale + sqr)
            self._goodput = self.epoch, gain / seconds
        return self._goodput[1]

    def step(self, now: float, seconds: float) -> None:
        """Work for so long from `now` on."""
        if not self.placement:
            return
        delay = min(self.rescale, seconds)
        self.rescale -= delay
        now, seconds = now + delay, seconds - delay
        while seconds > 0 and self.completed is None:
            goodput, end = self.goodput(), self.application.ends(self.epoch)
            if self.progress + goodput * seconds < end:
                self.progress += goodput * seconds
                return
            self.epoch += 1
            took = round((end - self.progress) / goodput)
            now, seconds = now + took, seconds - took
            self.progress = end
            if self.epoch > self.application.last_epoch:
                self.completed = now


class Tiresias:
    """Two queues by attained service: who has had little goes first; the head of the line does not block."""

    def __init__(self) -> None:
        self._first: list[Job] = []
        self._second: list[Job] = []
        self._executed: dict[str, float] = {}
        self._running: dict[str, list[int]] = {}
        self._at = 0.0

    def decide(self, jobs: list[Job], now: float) -> dict[str, list[int]]:
        """The node of each GPU of each job."""
        there = {job.name for job in jobs}
        for name in self._running:
            if name in there:
                self._executed[name] += now - self._at
        self._at = now
        self._first = [j for j in self._first if j.name in there]
        self._second = [j for j in self._second if j.name in there]
        for job in jobs:
            if job.name not in self._executed:
                self._executed[job.name] = 0.0
                self._first.append(job)
        spent = [j for j in self._first if self._executed[j.name] * j.replicas >= DEMOTED_GPU_SECONDS]
        self._first = [j for j in self._first if j not in spent]
        self._second += spent
        free, chosen = NODES * NODE_GPUS, list[Job]()
        for job in [*self._first, *self._second]:
            if job.replicas <= free:
                chosen.append(job)
                free -= job.replicas
        names = {job.name for job in chosen}
        kept = {name: nodes for name, nodes in self._running.items() if name in names and name in there}
        self._running = packed(kept, ((j.name, j.replicas) for j in chosen if j.name not in kept))
        return self._running


def packed(kept: dict[str, list[int]], new: Iterable[tuple[str, int]]) -> dict[str, list[int]]:
    """Place more beside those that stay: each on the nodes with the most free GPUs, one node after the other."""
    free = [NODE_GPUS] * NODES
    for nodes in kept.values():
        for node in nodes:
            free[node] -= 1
    placed = dict(kept)
    for name, count in new:
        placed[name] = [node for node, taken in spread(free, count) for _ in range(taken)]
    return placed


def spread(free: list[int], count: int) -> Iterator[tuple[int, int]]:
    """(a node, GPUs taken from it) until there are so many: of what is free, the node with most first."""
    while count:
        best = free.index(max(free))
        taken = min(free[best], count)
        yield best, taken
        free[best] -= taken
        count -= taken


def fewest_nodes(gpus: int, node_gpus: int) -> tuple[int, ...]:
    """GPUs of each of as few nodes as possible."""
    whole, rest = divmod(gpus, node_gpus)
    return (node_gpus,) * whole + ((rest,) if rest else ())


class Optimus:
    """One GPU more to whoever gains most time by it, by an oracle of step times."""

    def __init__(self) -> None:
        self._before: dict[str, list[int]] = {}
        self._seconds: dict[tuple[str, int, int], float] = {}

    def decide(self, jobs: list[Job], now: float) -> dict[str, list[int]]:
        """See Tiresias."""
        del now
        free, counts = NODES * NODE_GPUS, dict[str, int]()
        for job in jobs:
            if free:
                counts[job.name] = 1
                free -= 1
        gains = {j.name: self._gain(j, 1, free) for j in jobs if j.name in counts}
        by_name = {j.name: j for j in jobs}
        while free and gains:
            best = max(gains, key=gains.__getitem__)
            if gains[best] <= 0.0:
                break
            counts[best] += 1
            free -= 1
            gains[best] = self._gain(by_name[best], counts[best], free)
        kept = {n: nodes for n, nodes in self._before.items() if len(nodes) == counts.get(n)}
        new = sorted(((n, c) for n, c in counts.items() if n not in kept), key=lambda item: item[1])
        self._before = packed(kept, new)
        return self._before

    def _gain(self, job: Job, replicas: int, free: int) -> float:
        app = job.application
        most = 1 if app.name == "ncf" else job.batch // app.min_local
        if not free or replicas + 1 > most:
            return 0.0
        left = app.iterations(job.batch, app.last_epoch) - app.iterations(job.batch, job.epoch)
        return (self._step(job, replicas) - self._step(job, replicas + 1)) * (left if left > 0 else 1.0)

    def _step(self, job: Job, replicas: int) -> float:
        key = (job.application.name, job.batch, replicas)
        if key not in self._seconds:
            self._seconds[key] = job.application.seconds(
                fewest_nodes(replicas, NODE_GPUS), *job.application.batches(job.batch, replicas)
            )
        return self._seconds[key]


def simulate(jobs: list[Job], policy: Tiresias | Optimus) -> None:
    """Until all are complete."""
    now, before = 0, dict[str, list[int]]()
    waiting = sorted(jobs, key=lambda j: j.submit)
    active: list[Job] = []
    while waiting or active:
        for job in active:
            job.step(now, ROUND_SECONDS)
        now += ROUND_SECONDS
        while waiting and waiting[0].submit <= now:
            active.append(waiting.pop(0))
        active = [j for j in active if j.completed is None]
        after = {name: list(nodes) for name, nodes in policy.decide(active, now).items()}
        for job in active:
            nodes = after.get(job.name, [])
            if nodes != before.get(job.name, []):
                job.place(tuple(len(list(group)) for group in _runs(nodes)))
        before = after


def _runs(nodes: list[int]) -> Iterator[list[int]]:
    run: list[int] = []
    for node in nodes:
        if run and run[-1] != node:
            yield run
            run = []
        run.append(node)
    if run:
        yield run


def profile(file: Path, part: str, *of: str) -> dict[tuple[str, ...], list[traces.Row]]:
    """The rows of a part of PROFILES, by their columns `of`. Raises BadInput."""
    found: dict[tuple[str, ...], list[traces.Row]] = defaultdict(list)
    for row in traces.table(file, (*of, *PROFILES[part])):
        found[tuple(row.text(column) for column in of)].append(row)
    return found


def read_applications(there: Path) -> dict[str, Application]:
    """The six models, by name. Raises BadInput."""
    parts = [profile(there / f"profile_{part}.csv.gz", part, "application") for part in PROFILES]
    return {name: Application(name, *(part[(name,)] for part in parts)) for name in MOST_EPOCHS}


def cells(name: str, folder: Path, say: Callable[[str], None]) -> Iterator[Cell]:
    """Thirty-two workloads of one policy; a cell passes where each of its jobs is complete to the second. BadInput."""
    there, policy = folder / FOLDER, name.removeprefix("pollux-")
    needs(name, "scipy")
    applications = read_applications(there)
    expected: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for row in traces.table(there / "expected_jct_per_job.csv.gz", ("policy", "load", "workload", "job", "jct_s")):
        if row.text("policy") == policy:
            expected[row.text("load"), row.text("workload")][row.text("job")] = row.number("jct_s")
    workloads: dict[tuple[str, str], list[Job]] = defaultdict(list)
    columns = ("load", "workload", "name", "time", "application", "num_replicas", "batch_size")
    for row in traces.table(there / "workloads.csv.gz", columns):
        key = row.text("load"), row.text("workload")
        if key in expected:
            application = applications[row.text("application")]
            replicas, batch = row.whole("num_replicas", least=1), row.whole("batch_size", least=1)
            workloads[key].append(Job(row.text("name"), row.whole("time"), application, replicas, batch))
    for (load, workload), jobs in workloads.items():
        say(f"load {load}, {workload}")
        simulate(jobs, Tiresias() if policy == "tiresias" else Optimus())
        published = expected[load, workload]
        ours = {job.name: (job.completed or math.nan) - job.submit for job in jobs}
        same = sum(ours[job] == seconds for job, seconds in published.items())
        mean, our_mean = (float(np.mean(list(values.values()))) for values in (published, ours))
        passed = same == len(published) == len(ours)
        yield Cell(f"load {load} {workload}", mean, our_mean, passed, f"{same} of {len(published)} jobs to the second")
