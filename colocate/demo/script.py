"""The demonstration on a real kernel: one parent cgroup stands for a node; four ways to run batch beside a service.

Inside the node is kubelet's tree (`kubepods/burstable`, `kubepods/besteffort`), so that the third arm is exactly what
kubelet does and the fourth exactly what the agent does on a Kubernetes node: it is the agent, with its socket, and the
batch work is started by `colocate run`.

Batch is what hurts in real life: hungry for CPU, and for memory until the node is short. Beside it run the service,
which keeps its table in the page cache, and a BestEffort pod that is not ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from colocate.actuate.journal import Journal, boot_id
from colocate.actuate.scratch import ScratchNode, sweep
from colocate.actuate.statedir import StateDirectory
from colocate.agent.loop import Agent, Tick
from colocate.agent.socket import JobServer
from colocate.calibrate.measure import calibrate, machine_facts
from colocate.calibrate.probe import WorkCounter
from colocate.calibration import Calibration
from colocate.cgroup.knobfiles import write_knob
from colocate.cgroup.port import KernelPort
from colocate.cgroup.tree import inodes_of, joined
from colocate.demo.digest import compare, taken
from colocate.demo.inference import METRIC
from colocate.demo.load import Sample
from colocate.demo.logs import PERIOD_SECONDS
from colocate.demo.process import Kept, Process
from colocate.demo.progress import Progress
from colocate.demo.result import ARMS, TITLES, Arm, Result, differs_from_default, summarize
from colocate.demo.scenario import (
    BESTEFFORT_SCORE,
    BURSTABLE_SCORE,
    JOB_GROWTH_BYTES,
    JOB_MOST_BYTES,
    NODE_BYTES,
    RESTART_SECONDS,
    SPEC,
    WATCH_SECONDS,
)
from colocate.demo.service import InferenceService
from colocate.demo.watch import Watch
from colocate.errors import HostUnfit
from colocate.jobs.client import EXIT_EVICTED
from colocate.model.interference import effective_machine_utilization
from colocate.model.kernels import Kernels
from colocate.observe.node import capacity, figures
from colocate.policy.schema import ColocationPolicy, Metadata, Selector, ServiceLevelObjective, ServicePolicy

LOAD_RATIO = 0.2
"""Mean load as a share of the service's peak: what clusters run at."""
WARM_SECONDS = 1.5
PEAK_SECONDS = 3.0
BATCH_ALONE_SECONDS = 4.0
SERVICE_POD = "/kubepods/burstable/podinference"
BESTEFFORT_POD = "/kubepods/besteffort/podlogs"
BATCH_PODS = {"unmanaged": "kubepods/burstable/podbatch", "besteffort": "kubepods/besteffort/podbatch"}
SESSION = "session"
"""Where jobs are started from: a part of the node as a user's session is, with a weight of its own."""
KUBEPODS_WEIGHT, CPU_WEIGHT_MOST = 100, 10_000
"""Of each CPU: kubelet gives `kubepods` 1024 shares for each (cm/helpers_linux.go, MilliCPUToShares); and at most."""
FILES = "colocate-demo-"

Progressed = Callable[[str, float], None]


class Served(Protocol):
    """What runs beside batch until it is ended."""

    async def end(self) -> None:
        """End it."""


class Service(Served, Protocol):
    """What batch must not hurt."""

    @property
    def restarts(self) -> int:
        """How often something of it was started again."""

    async def warm(self) -> None:
        """Have in memory what it needs."""


def sweep_files(disk: Path, prefix: str) -> None:
    """Remove what a demonstration left that was killed: `prefix`, its pid, and anything."""
    for found in disk.glob(f"{prefix}*-*"):
        owner = found.name.removeprefix(prefix).partition("-")[0]
        if owner.isdigit() and not os.path.exists(f"/proc/{owner}") and os.access(found, os.W_OK):
            shutil.rmtree(found, ignore_errors=True)


@contextlib.asynccontextmanager
async def serving(agent: Agent, socket: Path, patience_seconds: float = math.inf) -> AsyncIterator[JobServer]:
    """An agent that was opened runs, and takes jobs; it ends once they have, or so long after the block."""
    server, stop = JobServer(agent, socket), asyncio.Event()
    await server.start()
    running = asyncio.create_task(agent.run(stop))
    try:
        yield server
    finally:
        deadline = time.monotonic() + patience_seconds
        while server.busy and not running.done() and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        stop.set()
        try:
            await running
        finally:
            await server.close()
            await agent.close()


class Demo:
    """One run of the demonstration."""

    logs_beside = True
    """Whether the BestEffort pod is there."""

    def __init__(
        self, port: KernelPort, seconds: float, seed: int, service_seconds: float, progress: Progressed
    ) -> None:
        self._port, self._seconds, self._seed, self._service_seconds = port, seconds, seed, service_seconds
        self._progress = progress
        self._node: ScratchNode
        self._directory: Path
        self._cpus: tuple[int, ...] = ()
        self._urls: list[str] = []
        self._service: Service | None = None
        self._trainings: list[Progress] = []
        self._result = Result(
            simulated=False, host_unchanged=False, node_mib=NODE_BYTES / (1 << 20), policy=differs_from_default(SPEC)
        )
        self._seen: list[str] = []
        self._target_seconds = 0.02
        self._window: Watch | None = None
        self._batch_groups: list[str] = []
        """Where batch is in this arm."""
        self._kept: list[Kept] = []

    async def run(self, calibration: Calibration | None, kernels: Kernels) -> Result:
        """All phases. Raises PermissionMissing, HostUnfit."""
        self._kernels = kernels
        sweep(self._port)
        before = await taken(self._port.layout.mounts)
        # /tmp may be memory, which nothing can reclaim
        disk = Path(
            "/var/tmp" if "TMPDIR" not in os.environ and os.access("/var/tmp", os.W_OK) else tempfile.gettempdir()
        )
        sweep_files(disk, FILES)
        with tempfile.TemporaryDirectory(prefix=f"{FILES}{os.getpid()}-", dir=disk) as directory:
            self._directory = Path(directory)
            async with self._scratch():
                await self._phases(calibration)
        changes = compare(before, await taken(self._port.layout.mounts))
        self._result.changes, self._result.host_unchanged = changes, not changes
        self._result.machine = machine_facts(self._port)
        return self._result

    @contextlib.asynccontextmanager
    async def _scratch(self) -> AsyncIterator[None]:
        """The node, for as long as the block runs."""
        with ScratchNode(self._port, "demo", NODE_BYTES) as self._node:
            yield

    @property
    def _work_folder(self) -> Path:
        """Where training jobs count what they do."""
        return self._directory

    async def _phases(self, calibration: Calibration | None) -> None:
        self._cpus = capacity(self._port, self._node.path).cpus
        self._make_groups()
        for i in range(len(self._cpus)):
            self._trainings.append(Progress(self._work_folder / f"training-{i}"))
        if calibration is None:
            calibration = await self._calibrate()
        self._result.lever = calibration.lever
        serving: list[Served] = []
        try:
            await self._serve(serving)
            if self.logs_beside:
                serving.append(await self._ship_logs())
            await self._references()
            await self._arms(calibration)
        finally:
            for process in serving:
                await process.end()

    def _make_groups(self) -> None:
        """kubelet's tree, and a pod in it for each part."""
        node = self._node
        for inner in ("kubepods", "kubepods/burstable", "kubepods/besteffort"):
            node.make_inner(inner)
        for leaf in ("client", SESSION, SERVICE_POD, *BATCH_PODS.values(), BESTEFFORT_POD):
            node.make(leaf)
        self._knob("kubepods", "cpu.weight", str(min(KUBEPODS_WEIGHT * len(self._cpus), CPU_WEIGHT_MOST)))
        self._knob("kubepods/besteffort", "cpu.weight", "1")
        self._knob("client", "cpu.weight", "10000")

    async def _calibrate(self) -> Calibration:
        stop = threading.Event()

        def progress(done: int, total: int, arm: str) -> None:
            if stop.is_set():
                raise InterruptedError  # the thread ends at its next arm, and takes its scratch node away
            self._progress(f"calibrating: {arm}", 0.2 * done / total)

        try:
            return await asyncio.to_thread(calibrate, self._port, progress)
        except HostUnfit as error:
            self._result.decisions.append(f"not calibrated, so the lever is weight: {error}")
            return Calibration()
        finally:
            stop.set()

    async def _arms(self, calibration: Calibration) -> None:
        for i, arm in enumerate(ARMS):
            self._progress(TITLES[arm], 0.3 + 0.7 * i / len(ARMS))
            await self._arm(arm, calibration)

    def _knob(self, group: str, knob: str, value: str) -> None:
        path = joined(self._node.path, group)
        write_knob(self._port, path, knob, value, inodes_of(self._port, path))

    async def _serve(self, serving: list[Served]) -> None:
        """Start the service; what has to be ended later is appended."""
        group = joined(self._node.path, SERVICE_POD)
        service = InferenceService(self._node, group, self._service_seconds, self._directory, self._happened)
        self._service = service
        serving.append(service)
        await service.start(self._cpus)
        self._urls = service.urls

    async def _ship_logs(self) -> Served:
        path = self._directory / "logs"
        self._logs = WorkCounter(path)
        command = [sys.executable, "-P", "-m", "colocate.demo.logs", str(path)]
        group = joined(self._node.path, BESTEFFORT_POD)

        async def start() -> Process:
            return await Process.start(self._node, group, command, {}, oom_score_adj=BESTEFFORT_SCORE)

        words = "the BestEffort pod was killed by the kernel, and is started again"
        pod = Kept(start, lambda _: self._happened(words), self._happened)
        await pod.start()
        return pod

    def _job_died(self, progress: Progress, code: int) -> None:
        lost = progress.died()
        how = "evicted" if code == EXIT_EVICTED else "killed by the kernel" if code in (-9, 137) else f"ended, {code}"
        self._happened(f"{progress.path.name} was {how}; it lost {lost} samples")

    def _happened(self, text: str, why: str = "") -> None:
        if self._window is not None:
            self._window.note(text, why)

    async def _load(self, rate: float | None, seconds: float) -> list[Sample]:
        """Requests at this mean rate, or as fast as the service answers."""
        options = ["--seconds", str(seconds), "--seed", str(self._seed)]
        command = [sys.executable, "-P", "-m", "colocate.demo.load", *options]
        command += ["--closed", str(4 * len(self._cpus))] if rate is None else ["--rate", str(rate)]
        command += self._urls
        load = await Process.start(self._node, joined(self._node.path, "client"), command, {})
        try:
            await asyncio.sleep(0.8)  # imports are done before the clock starts
            await load.say("go")
            assert load.process.stdout is not None
            return msgspec.json.decode(await load.process.stdout.read(), type=list[Sample])
        finally:
            await load.end()

    def _work(self) -> int:
        return sum(p.done.done for p in self._trainings)

    def _training(self, i: int) -> list[str]:
        command = [sys.executable, "-P", "-m", "colocate.demo.training", "--progress", str(self._trainings[i].path)]
        return [*command, *self._growing(JOB_GROWTH_BYTES, JOB_MOST_BYTES)]

    def _growing(self, bytes_per_second: int, most_bytes: int) -> list[str]:
        """Options of a training job whose memory grows so fast, at the speed of one alone; not before that is known."""
        alone = self._result.batch_alone_per_second / len(self._trainings)
        return ["--sample-bytes", str(bytes_per_second / alone if alone else 0.0), "--most-bytes", str(most_bytes)]

    @contextlib.asynccontextmanager
    async def _jobs(
        self, start: Callable[[int], Awaitable[Process]], end_by: int = signal.SIGKILL
    ) -> AsyncIterator[list[Kept]]:
        """One job per CPU, started by `start`; all of them begin from nothing."""
        jobs = []
        for i, progress in enumerate(self._trainings):
            progress.reset()  # each job counts from zero, so what an earlier one left would be work undone
            died = functools.partial(self._job_died, progress)
            jobs.append(Kept(functools.partial(start, i), died, self._happened, RESTART_SECONDS))
        try:
            for job in jobs:
                await job.start()
            self._kept = jobs
            yield jobs
        finally:
            self._kept, self._batch_groups = [], []
            for job in jobs:
                await job.end(end_by)

    @contextlib.asynccontextmanager
    async def _batch_in(self, arm: str) -> AsyncIterator[None]:
        """Training jobs where they are in this arm."""
        group = BATCH_PODS[arm]
        path = joined(self._node.path, group)
        self._batch_groups = [path]
        score = BESTEFFORT_SCORE if "besteffort" in group else BURSTABLE_SCORE

        async def start(i: int) -> Process:
            return await Process.start(self._node, path, self._training(i), {}, oom_score_adj=score)

        async with self._jobs(start):
            yield

    async def _references(self) -> None:
        """The service's peak and the batch work of an otherwise empty node."""
        self._progress("the service's peak", 0.2)
        samples = await self._load(None, PEAK_SECONDS)
        self._result.service_peak_per_second = round(sum(s.ok for s in samples) / PEAK_SECONDS, 1)
        self._progress("batch alone", 0.25)
        async with self._batch_in("besteffort"):
            await asyncio.sleep(WARM_SECONDS)
            before, started = self._work(), time.perf_counter()
            await asyncio.sleep(BATCH_ALONE_SECONDS)
            rate = (self._work() - before) / (time.perf_counter() - started)
        self._result.batch_alone_per_second = round(rate, 1)

    async def _arm(self, arm: str, calibration: Calibration) -> None:
        if self._service is not None:
            await self._service.warm()  # an arm inherits nothing
        if arm == "alone":
            await self._measure(arm)
            alone = self._result.arms["alone"].p99_ms / 1e3
            self._target_seconds = max(2 * alone, alone + 0.004)
            self._result.target_p99_ms = round(self._target_seconds * 1e3, 2)
        elif arm == "colocate":
            await self._colocate(calibration)
        else:
            async with self._batch_in(arm):
                await self._measure(arm)

    def _counted(self) -> tuple[int, int, int, int, int]:
        """Batch work done and lost, restarts of the service, turns of the BestEffort pod, deaths of batch."""
        restarts = self._service.restarts if self._service is not None else 0
        turns = self._logs.done if self.logs_beside else 0
        lost = sum(p.lost.done for p in self._trainings)
        return self._work(), lost, restarts, turns, self._deaths_of_batch()

    def _deaths_of_batch(self) -> int:
        return sum(job.deaths for job in self._kept)

    def _groups(self) -> dict[str, Sequence[str]]:
        """Whom to watch, and where they are."""
        groups = {"service": [SERVICE_POD], "BestEffort pod": [BESTEFFORT_POD]}
        return {name: [joined(self._node.path, path) for path in paths] for name, paths in groups.items()}

    async def _measure(self, arm: str) -> None:
        await asyncio.sleep(WARM_SECONDS)
        have = capacity(self._port, self._node.path)
        load = asyncio.create_task(self._load(LOAD_RATIO * self._result.service_peak_per_second, self._seconds))
        await asyncio.sleep(0.8)
        paths = self._groups()
        if self._batch_groups:
            paths["batch"] = self._batch_groups
        before, counted = figures(self._port, "/", have.cpus, 0), self._counted()
        async with Watch(self._port, paths, WATCH_SECONDS) as self._window:
            started = time.perf_counter()
            samples = await load
            elapsed = time.perf_counter() - started
        watched, self._window = self._window, None
        after = figures(self._port, "/", have.cpus, 0)
        work, lost, restarts, turns, deaths = (b - a for a, b in zip(counted, self._counted(), strict=True))
        done = max(work, 0) / elapsed
        busy = (after.cpu_busy_us or 0) - (before.cpu_busy_us or 0)
        idle = (after.cpu_idle_us or 0) - (before.cpu_idle_us or 0)
        kept_up = round(min(turns * PERIOD_SECONDS / elapsed, 1), 4) if self.logs_beside else None
        found, detail = summarize(samples, self._seconds)
        watched.fill(detail)
        served = found["requests_per_second"] or 0.0
        emu = effective_machine_utilization(
            served, self._result.service_peak_per_second, done, self._result.batch_alone_per_second
        )
        self._result.arms[arm] = msgspec.convert(
            {
                **found,
                "batch_work_per_second": round(done, 1),
                "cpu_utilization": round(busy / max(busy + idle, 1), 4),
                "effective_machine_utilization": None if emu is None else round(emu, 4),
                "service_restarts": restarts,
                "stalled_seconds": watched.stalled_seconds,
                "besteffort_work_ratio": kept_up,
                "batch_lost_per_second": round(lost / elapsed, 1),
                "batch_processes_lost": deaths,
            },
            Arm,
        )
        self._result.details[arm] = detail

    def _slo(self) -> ServiceLevelObjective | None:
        url = f"{self._urls[0]}/metrics"
        return ServiceLevelObjective(p99=self._target_seconds, url=url, metric=METRIC, window=3.0)

    def _policy(self) -> ColocationPolicy:
        service = ServicePolicy(name="inference", selector=Selector(cgroup=SERVICE_POD), slo=self._slo())
        spec = msgspec.structs.replace(SPEC, node_root=self._node.path, services=(service,))
        return ColocationPolicy(metadata=Metadata(name="demo"), spec=spec)

    def _decided(self, tick: Tick) -> None:
        """What is new of what was decided, for the report; the CPU law's word at least every ten ticks."""
        for verdict in tick.plan.verdicts:
            text = f"{verdict.law}: {verdict.reason} ({verdict.state})"
            sometimes = verdict.law == "cpu" and tick.snapshot.sequence % 10 == 0
            if text not in self._seen[-8:] or sometimes:
                self._seen.append(text)
                self._result.decisions.append(f"tick {tick.snapshot.sequence}: {text}: {verdict.message}")
            if self._last_said.get(verdict.law) != (verdict.reason, verdict.state):
                self._last_said[verdict.law] = (verdict.reason, verdict.state)
                self._happened(f"{verdict.law}: {verdict.reason} ({verdict.state})", verdict.message)

    async def _colocate(self, calibration: Calibration) -> None:
        state = StateDirectory(Path(tempfile.mkdtemp(prefix="state-", dir=self._directory)))  # arms learn by themselves
        agent = Agent(
            self._port,
            self._policy(),
            self._kernels,
            Journal(state.path, boot_id()),
            state=state,
            calibration=calibration,
        )
        agent.open()
        self._batch_groups = [agent.observer.tree.tier_path]
        self._last_said: dict[str, tuple[str, str]] = {}
        agent.on_tick.append(self._decided)

        async def start(i: int) -> Process:
            command = [sys.executable, "-P", "-m", "colocate.cli.main", "run", "--name", self._trainings[i].path.name]
            command += ["--checkpoint-signal", "SIGUSR1", "--socket", str(server.path), "--", *self._training(i)]
            return await Process.start(self._node, joined(self._node.path, SESSION), command, {}, quiet=True)

        async with serving(agent, self._directory / "agent.sock") as server, self._jobs(start, signal.SIGTERM) as jobs:
            while len(agent.registry.jobs) < len(jobs) and all(j.alive for j in jobs):
                await asyncio.sleep(0.02)  # starting them is not what is measured
            await self._measure("colocate")
