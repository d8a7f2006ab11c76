"""The same four arms on the kernel model, where cgroups may not be written: the agent's own code, a modelled machine.

A seeded queue: Poisson arrivals on the same day-like curve, one worker per CPU, service times around the wanted one.
Training jobs grow until the node is short of memory; a BestEffort pod has a little to do all the time. Another seed or
service time gives another table. Every page and line that comes of it is marked SIMULATED.
"""

from __future__ import annotations

import asyncio
import math
import random
import signal

import msgspec

from colocate.actuate.journal import Journal
from colocate.actuate.tier import Placement
from colocate.agent.loop import Agent
from colocate.agent.registry import Job as KnownJob
from colocate.cgroup.tree import processes
from colocate.demo.load import Sample, day_rate
from colocate.demo.logs import PERIOD_SECONDS, TURN_SECONDS
from colocate.demo.result import ARMS, Arm, Detail, Event, Result, differs_from_default, summarize
from colocate.demo.scenario import (
    BESTEFFORT_SCORE,
    BURSTABLE_SCORE,
    CHECKPOINT_SECONDS,
    JOB_GROWTH_BYTES,
    JOB_MOST_BYTES,
    MIB,
    NODE_BYTES,
    RESTART_SECONDS,
    SPEC,
    WATCH_SECONDS,
)
from colocate.kernelmodel import ModelKernel
from colocate.kernelmodel.machine import Request, Task
from colocate.model import kernels
from colocate.model.interference import effective_machine_utilization
from colocate.policy.schema import ColocationPolicy, Selector, ServicePolicy
from colocate.snapshot import Latency, Objective

CPUS = 2
LOAD_RATIO = 0.3
SPREAD = 0.4
"""Of the logarithm of service times."""
BOUNDS = (0.001, 0.002, 0.003, 0.004, 0.006, 0.008, 0.012, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5)
SERVICE, UNMANAGED, BESTEFFORT = (
    "/kubepods/burstable/podservice",
    "/kubepods/burstable/podbatch",
    "/kubepods/besteffort",
)
LOGS = f"{BESTEFFORT}/podlogs"
SERVICE_BYTES, LOGS_BYTES, JOB_BYTES = 150 * MIB, 64 * MIB, 60 * MIB


class _MemoryJournal(Journal):
    """A journal that keeps its entries in memory: the model ends with the process."""

    def __init__(self) -> None:
        self.boot_id, self.broken, self.entries = "model", "", []

    def add(self, *entries: object) -> None:
        self.entries.extend(entries)  # type: ignore[arg-type] # the caller's are Entry

    def replace(self, entries: object) -> None:
        self.entries = list(entries)  # type: ignore[call-overload] # the caller's are Entry

    def close(self) -> None:
        """Nothing to close."""


def make_kernel(seed: int) -> ModelKernel:
    """A node with kubelet's tree and a service worker per CPU."""
    kernel = ModelKernel(version=2, cpus=CPUS, memory_bytes=NODE_BYTES, seed=seed)
    kernel.write("unified", "/", "cgroup.subtree_control", "+cpu +cpuset +memory")
    for path in ("/kubepods", "/kubepods/burstable", BESTEFFORT):
        kernel.mkdir("unified", path)
        kernel.write("unified", path, "cgroup.subtree_control", "+cpu +cpuset +memory")
    for path in (SERVICE, UNMANAGED, f"{BESTEFFORT}/podbatch", LOGS):
        kernel.mkdir("unified", path)
    kernel.write("unified", BESTEFFORT, "cpu.weight", "1")
    return kernel


class _Load:
    """Arrivals and completions, of the service and of the BestEffort pod."""

    def __init__(
        self, kernel: ModelKernel, workers: list[Task], logs: Task, rate: float, service_seconds: float, seed: int
    ) -> None:
        self._kernel, self._workers, self._rate, self._service_seconds = kernel, workers, rate, service_seconds
        self._logs = logs
        self._random = random.Random(seed)
        self.start = self._due = self._turn = kernel.monotonic()
        self.seconds = 1.0
        self.samples: list[Sample] = []
        self.counts = [0] * (len(BOUNDS) + 1)
        self.turns = self.restarts = 0
        self._number = 0
        kernel.machine.finished = self._finished

    def __call__(self, now: float) -> None:
        """Hand over the requests that are due."""
        if now >= self._turn:
            self._turn += PERIOD_SECONDS
            if not self._logs.queue:
                self._logs.queue.append(Request(now, TURN_SECONDS))
        for i, worker in enumerate(self._workers):
            if worker.pid not in self._kernel.machine.tasks:  # kubelet starts it again, and its clients go on
                self.restarts += 1
                again = self._kernel.spawn("queue", SERVICE, cpu=worker.cpu, command="service")
                again.memory_bytes, again.oom_score_adj, again.queue = SERVICE_BYTES, BURSTABLE_SCORE, worker.queue
                self._workers[i] = again
        while True:
            fraction = (self._due - self.start) / self.seconds
            if fraction >= 1 or self._due > now:
                return
            spread = math.exp(self._random.gauss(-SPREAD * SPREAD / 2, SPREAD))
            worker = self._workers[self._number % len(self._workers)]
            if not worker.queue:
                worker.wait_left = -1.0
            worker.queue.append(Request(self._due, self._service_seconds * spread))
            self._number += 1
            self._due += self._random.expovariate(day_rate(self._rate, fraction))

    def _finished(self, task: Task, request: Request, now: float) -> None:
        if task is self._logs:
            self.turns += 1
            return
        latency = now - request.due
        self.samples.append(Sample(request.due - self.start, latency, True))
        for i, bound in enumerate(BOUNDS):
            if latency <= bound:
                self.counts[i] += 1
        self.counts[-1] += 1

    def end(self) -> None:
        """Who still waits for an answer has waited at least so long."""
        for worker in self._workers:
            for request in worker.queue:
                self.samples.append(Sample(request.due - self.start, self._kernel.monotonic() - request.due, True))

    def histogram(self, now: float) -> Latency:
        """What the service's own /metrics would say."""
        return Latency(BOUNDS, tuple(float(c) for c in self.counts), round(now, 6))


class _Jobs:
    """A training job per CPU, as a job controller keeps them: from the last checkpoint, a second after a death."""

    def __init__(
        self, kernel: ModelKernel, detail: Detail, where: str, oom_score_adj: int, agent: Agent | None
    ) -> None:
        self._kernel, self._detail, self._where, self._score, self._agent = kernel, detail, where, oom_score_adj, agent
        self._started = kernel.monotonic()
        self._tasks: list[Task | None] = [None] * CPUS
        self._placements: list[Placement] = []
        self._base, self._done, self._saved = [0.0] * CPUS, [0.0] * CPUS, [0.0] * CPUS
        self._due = [0.0] * CPUS
        self._answers: set[int] = set()
        self.lost, self.deaths = 0.0, 0
        for i in range(CPUS):
            if agent is not None:
                self._placements.append(agent.tier.ensure_job(f"training-{i}"))
            self._start(i)

    def _start(self, i: int) -> None:
        task = self._tasks[i] = self._kernel.spawn("hog", self._where, command=f"training-{i}")
        task.memory_bytes, task.most_bytes = JOB_BYTES, JOB_MOST_BYTES
        task.growth_bytes_per_second, task.oom_score_adj = JOB_GROWTH_BYTES, self._score
        now = self._kernel.monotonic()
        self._base[i], self._due[i] = self._saved[i], now + CHECKPOINT_SECONDS
        if self._agent is not None:
            placement = self._placements[i]
            self._agent.tier.move(task.pid, placement)
            assert processes(self._kernel, "unified", placement.path)
            task.handlers[signal.SIGUSR1] = lambda: self._answers.add(i)
            self._agent.registry.add(
                KnownJob(
                    name=f"training-{i}", path=placement.path, uid=0, pid=task.pid, start_time=task.start_time,
                    started_seconds=now, checkpoint_signal="SIGUSR1",
                )
            )  # fmt: skip

    @property
    def work(self) -> float:
        """CPU seconds that were kept."""
        return sum(self._done)

    def _save(self, i: int, now: float) -> None:
        self._saved[i], self._due[i] = self._done[i], now + CHECKPOINT_SECONDS
        if self._agent is not None and (job := self._agent.registry.jobs.get(f"training-{i}")) is not None:
            task = self._tasks[i]
            job.checkpointed_seconds = now
            job.checkpointed_cpu_us = int(task.usage_seconds * 1e6) if task is not None else 0

    def __call__(self, now: float) -> None:
        """What jobs and their controller do as time goes on."""
        for i, task in enumerate(self._tasks):
            if task is None:
                if now >= self._due[i]:
                    self._start(i)
            elif task.pid not in self._kernel.machine.tasks:
                lost = self._done[i] - self._saved[i]
                self.lost += lost
                self.deaths += 1
                self._done[i], self._tasks[i], self._due[i] = self._saved[i], None, now + RESTART_SECONDS
                job = self._agent.registry.jobs.get(f"training-{i}") if self._agent is not None else None
                how = "evicted" if job is not None and job.evicted else "killed by the kernel"
                text = f"SIMULATED: training-{i} was {how}; it lost {lost:.1f} CPU seconds"
                self._detail.events.append(Event(round(now - self._started, 2), text))
            else:
                self._done[i] = self._base[i] + task.usage_seconds
                if now >= self._due[i] or i in self._answers:
                    self._answers.discard(i)
                    self._save(i, now)


class _Watch:
    """The memory of each group, batch's cores and the service's stalls, for the charts."""

    def __init__(self, kernel: ModelKernel, detail: Detail, paths: dict[str, str]) -> None:
        self._kernel, self._detail, self._paths = kernel, detail, paths
        self._started = self._due = kernel.monotonic()
        self._before = (0.0, 0.0)
        detail.memory_mib = {name: [] for name in paths}

    @property
    def stalled(self) -> float:
        """Seconds in which the service waited for memory."""
        return self._kernel.usage(SERVICE).memory_pressure

    def __call__(self, now: float) -> None:
        """Look when it is time."""
        if now < self._due:
            return
        self._due += WATCH_SECONDS
        detail, kernel = self._detail, self._kernel
        detail.watched_seconds.append(round(now - self._started, 2))
        for name, path in self._paths.items():
            detail.memory_mib[name].append(round(kernel.memory_usage("unified", path) / MIB, 1))
        cpu = kernel.usage(self._paths["batch"]).cpu if "batch" in self._paths else 0.0
        detail.batch_cores.append(round((cpu - self._before[0]) / WATCH_SECONDS, 3))
        detail.stalled_ratio.append(round((self.stalled - self._before[1]) / WATCH_SECONDS, 3))
        self._before = (cpu, self.stalled)


def _arm(arm: str, seconds: float, seed: int, service_seconds: float, result: Result) -> None:
    kernel = make_kernel(seed)
    workers = [kernel.spawn("queue", SERVICE, cpu=c, command="service") for c in range(CPUS)]
    logs = kernel.spawn("queue", LOGS, command="logs")
    for worker in workers:
        worker.memory_bytes, worker.oom_score_adj = SERVICE_BYTES, BURSTABLE_SCORE
    logs.memory_bytes, logs.oom_score_adj = LOGS_BYTES, BESTEFFORT_SCORE
    load = _Load(kernel, workers, logs, LOAD_RATIO * CPUS / service_seconds, service_seconds, seed)
    load.seconds = seconds
    kernel.actors.append(load)
    detail, jobs = Detail(), None
    paths = {"service": SERVICE, "BestEffort pod": LOGS}
    if arm == "colocate":
        jobs, watch = asyncio.run(_with_agent(kernel, load, detail, paths, seconds, result))
    else:
        where = {"unmanaged": UNMANAGED, "besteffort": f"{BESTEFFORT}/podbatch"}.get(arm)
        if where is not None:
            jobs = _Jobs(kernel, detail, where, BESTEFFORT_SCORE if arm == "besteffort" else BURSTABLE_SCORE, None)
            kernel.actors.append(jobs)
            paths["batch"] = where
        watch = _Watch(kernel, detail, paths)
        kernel.actors.append(watch)
        kernel.advance(seconds)
    load.end()
    figures, charts = summarize(load.samples, seconds)
    detail.seconds, detail.p99_by_second_ms, detail.cdf_ms = charts.seconds, charts.p99_by_second_ms, charts.cdf_ms
    work = jobs.work / seconds if jobs is not None else 0.0
    served = figures["requests_per_second"] or 0.0
    emu = effective_machine_utilization(served, result.service_peak_per_second, work, float(CPUS))
    result.details[arm] = detail
    result.arms[arm] = msgspec.convert(
        {
            **figures,
            "batch_work_per_second": round(work, 4),
            "batch_lost_per_second": round(jobs.lost / seconds, 4) if jobs is not None else 0.0,
            "batch_processes_lost": jobs.deaths if jobs is not None else 0,
            "cpu_utilization": round(sum(kernel.machine.busy_seconds.values()) / seconds / CPUS, 4),
            "effective_machine_utilization": None if emu is None else round(emu, 4),
            "stalled_seconds": round(watch.stalled, 3),
            "besteffort_work_ratio": round(min(load.turns * PERIOD_SECONDS / seconds, 1.0), 4),
            "service_restarts": load.restarts,
        },
        Arm,
    )


async def _with_agent(
    kernel: ModelKernel, load: _Load, detail: Detail, paths: dict[str, str], seconds: float, result: Result
) -> tuple[_Jobs, _Watch]:
    service = ServicePolicy(name="service", selector=Selector(cgroup=SERVICE))
    spec = msgspec.structs.replace(SPEC, services=(service,))
    agent = Agent(kernel, ColocationPolicy(spec=spec), kernels.load(jit=False), _MemoryJournal(), clock=kernel)
    agent.open()
    jobs = _Jobs(kernel, detail, "/", BESTEFFORT_SCORE, agent)
    watch = _Watch(kernel, detail, {**paths, "batch": agent.observer.tree.tier_path})
    kernel.actors += [jobs, watch]
    # The model has no HTTP: the reading is put where a scrape would put it, and the policy gets no URL.
    agent.observer.objectives["service"] = Objective(result.target_p99_ms / 1e3, 100, 3.0)
    started = kernel.monotonic()
    said: dict[str, tuple[str, str]] = {}
    while kernel.monotonic() < started + seconds:
        agent.scraper.readings["service"] = load.histogram(kernel.monotonic())
        tick = await agent.tick()
        await agent.writer.settle()  # the model's time stands still while workers write
        for verdict in tick.plan.verdicts:
            if said.get(verdict.law) != (verdict.reason, verdict.state):
                said[verdict.law] = (verdict.reason, verdict.state)
                words = f"SIMULATED: {verdict.law}: {verdict.reason} ({verdict.state})"
                detail.events.append(Event(round(kernel.monotonic() - started, 2), words, verdict.message))
                result.decisions.append(f"SIMULATED tick {tick.snapshot.sequence}: {words}: {verdict.message}")
        again = tick.plan.look_again_seconds
        kernel.advance(min(SPEC.tick, max(again, 0.1)) if again is not None else SPEC.tick)
    await agent.close()
    return jobs, watch


def simulate(seconds: float, seed: int, service_seconds: float) -> Result:
    """All four arms in the model."""
    result = Result(
        simulated=True,
        host_unchanged=True,
        lever="weight",
        node_mib=NODE_BYTES / MIB,
        policy=differs_from_default(SPEC),
    )
    result.machine = {"kernel": f"SIMULATED, seed {seed}", "cpus": str(CPUS)}
    result.service_peak_per_second = round(CPUS / service_seconds, 1)
    result.batch_alone_per_second = float(CPUS)
    for arm in ARMS:
        _arm(arm, seconds, seed, service_seconds, result)
        if arm == "alone":
            result.target_p99_ms = round(2 * (result.arms[arm].p99_ms or 10.0), 2)
    return result
