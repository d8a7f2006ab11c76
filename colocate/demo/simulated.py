"""The same four arms on the kernel model, where cgroups may not be written: the agent's own code, a modelled machine.

A seeded queue: Poisson arrivals on the same day-like curve, one worker per CPU, service times around the wanted one.
Another seed or service time gives another table. Every page and line that comes of it is marked SIMULATED.
"""

from __future__ import annotations

import asyncio
import math
import random

from colocate.actuate.journal import Journal
from colocate.agent.loop import Agent
from colocate.cgroup.tree import processes
from colocate.demo.load import Sample, day_rate
from colocate.demo.result import ARMS, Arm, Result, summarize
from colocate.kernelmodel import ModelKernel
from colocate.kernelmodel.machine import Request, Task
from colocate.model import kernels
from colocate.model.interference import effective_machine_utilization
from colocate.policy.schema import ColocationPolicy, CpuPolicy, PolicySpec, Selector, ServicePolicy
from colocate.snapshot import Latency, Objective

CPUS = 2
LOAD_RATIO = 0.3
TICK_SECONDS = 0.5
SPREAD = 0.4
"""Of the logarithm of service times."""
BOUNDS = (0.001, 0.002, 0.003, 0.004, 0.006, 0.008, 0.012, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5)
SERVICE, UNMANAGED, BESTEFFORT = (
    "/kubepods/burstable/podservice",
    "/kubepods/burstable/podbatch",
    "/kubepods/besteffort",
)


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
    kernel = ModelKernel(version=2, cpus=CPUS, memory_bytes=1 << 30, seed=seed)
    kernel.write("unified", "/", "cgroup.subtree_control", "+cpu +cpuset +memory")
    for path in ("/kubepods", "/kubepods/burstable", BESTEFFORT):
        kernel.mkdir("unified", path)
        kernel.write("unified", path, "cgroup.subtree_control", "+cpu +cpuset +memory")
    for path in (SERVICE, UNMANAGED, f"{BESTEFFORT}/podbatch"):
        kernel.mkdir("unified", path)
    kernel.write("unified", BESTEFFORT, "cpu.weight", "1")
    return kernel


class _Load:
    """Arrivals and completions."""

    def __init__(
        self, kernel: ModelKernel, workers: list[Task], rate: float, service_seconds: float, seed: int
    ) -> None:
        self._kernel, self._workers, self._rate, self._service_seconds = kernel, workers, rate, service_seconds
        self._random = random.Random(seed)
        self.start = self._due = kernel.monotonic()
        self.seconds = 1.0
        self.samples: list[Sample] = []
        self.counts = [0] * (len(BOUNDS) + 1)
        self._number = 0
        kernel.machine.finished = self._finished

    def __call__(self, now: float) -> None:
        """Hand over the requests that are due."""
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

    def _finished(self, _task: Task, request: Request, now: float) -> None:
        latency = now - request.due
        self.samples.append(Sample(request.due - self.start, latency, True))
        for i, bound in enumerate(BOUNDS):
            if latency <= bound:
                self.counts[i] += 1
        self.counts[-1] += 1

    def histogram(self, now: float) -> Latency:
        """What the service's own /metrics would say."""
        return Latency(BOUNDS, tuple(float(c) for c in self.counts), round(now, 6))


def _arm(arm: str, seconds: float, seed: int, service_seconds: float, target: float, notes: list[str]) -> tuple:  # type: ignore[type-arg]
    kernel = make_kernel(seed)
    workers = [kernel.spawn("queue", SERVICE, cpu=c, command="service") for c in range(CPUS)]
    load = _Load(kernel, workers, LOAD_RATIO * CPUS / service_seconds, service_seconds, seed)
    load.seconds = seconds
    where = {"unmanaged": UNMANAGED, "besteffort": f"{BESTEFFORT}/podbatch"}.get(arm)
    batch = [kernel.spawn("hog", where, command="training") for _ in range(CPUS)] if where else []
    kernel.actors.append(load)
    if arm == "colocate":
        batch = asyncio.run(_with_agent(kernel, load, seconds, target, notes))
    else:
        kernel.advance(seconds)
    work = sum(t.usage_seconds for t in batch) / seconds
    busy = sum(kernel.machine.busy_seconds.values()) / seconds / CPUS
    return load.samples, work, busy


async def _with_agent(kernel: ModelKernel, load: _Load, seconds: float, target: float, notes: list[str]) -> list[Task]:
    service = ServicePolicy(name="service", selector=Selector(cgroup=SERVICE))
    spec = PolicySpec(tick=TICK_SECONDS, services=(service,), cpu=CpuPolicy(hold_down=2.0))
    agent = Agent(kernel, ColocationPolicy(spec=spec), kernels.load(jit=False), _MemoryJournal(), clock=kernel)
    agent.open()
    placement = agent.tier.ensure_job("training")
    batch = [kernel.spawn("hog", command="training") for _ in range(CPUS)]
    for task in batch:
        agent.tier.move(task.pid, placement)
    assert all(processes(kernel, "unified", placement.path))
    # The model has no HTTP: the reading is put where a scrape would put it, and the policy gets no URL.
    agent.observer.objectives["service"] = Objective(target, 100, 3.0)
    for _ in range(int(seconds / TICK_SECONDS)):
        agent.scraper.readings["service"] = load.histogram(kernel.monotonic())
        tick = await agent.tick()
        verdict = tick.plan.verdicts[0]
        line = f"SIMULATED tick {tick.snapshot.sequence}: {verdict.reason} ({verdict.state}): {verdict.message}"
        if not notes or notes[-1].split("(")[0].split(": ")[-1] != line.split("(")[0].split(": ")[-1]:
            notes.append(line)
        kernel.advance(TICK_SECONDS)
    await agent.close()
    return batch


def simulate(seconds: float, seed: int, service_seconds: float) -> Result:
    """All four arms in the model."""
    result = Result(simulated=True, host_unchanged=True, lever="weight")
    result.machine = {"kernel": f"SIMULATED, seed {seed}", "cpus": str(CPUS)}
    result.service_peak_per_second = round(CPUS / service_seconds, 1)
    result.batch_alone_per_second = float(CPUS)
    target = 0.02
    for arm in ARMS:
        samples, work, busy = _arm(arm, seconds, seed, service_seconds, target, result.decisions)
        figures, detail = summarize(samples, seconds)
        emu = effective_machine_utilization(
            figures["requests_per_second"] or 0.0, result.service_peak_per_second, work, float(CPUS)
        )
        result.arms[arm] = Arm(
            p50_ms=figures["p50_ms"] or 0.0,
            p99_ms=figures["p99_ms"] or 0.0,
            p999_ms=figures["p999_ms"],
            requests_per_second=figures["requests_per_second"] or 0.0,
            batch_work_per_second=round(work, 4),
            cpu_utilization=round(busy, 4),
            effective_machine_utilization=None if emu is None else round(emu, 4),
            requests=int(figures["requests"] or 0),
            failed_requests=int(figures["failed_requests"] or 0),
        )
        result.details[arm] = detail
        if arm == "alone":
            target = 2 * (figures["p99_ms"] or 10.0) / 1e3
            result.target_p99_ms = round(target * 1e3, 2)
    return result
