"""The demonstration on a real kernel: one parent cgroup stands for a node; four ways to run batch beside a service.

Inside the node is kubelet's tree (`kubepods/burstable`, `kubepods/besteffort`), so that the third arm is exactly what
kubelet does and the fourth exactly what the agent does on a Kubernetes node: it is the agent, with its socket, and the
batch work is started by `colocate run`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec

from colocate.actuate.journal import Journal, boot_id
from colocate.actuate.scratch import ScratchNode, sweep
from colocate.actuate.statedir import StateDirectory
from colocate.agent.loop import Agent, Tick
from colocate.agent.socket import JobServer
from colocate.calibrate.measure import calibrate, machine_facts
from colocate.calibrate.probe import WorkCounter
from colocate.calibration import Calibration
from colocate.cgroup.port import KernelPort
from colocate.cgroup.tree import inodes_of, joined
from colocate.cgroup.v1 import write_knob
from colocate.demo.digest import Digest, compare
from colocate.demo.inference import METRIC
from colocate.demo.load import Sample
from colocate.demo.result import ARMS, TITLES, Arm, Result, summarize
from colocate.errors import HostUnfit
from colocate.model.interference import effective_machine_utilization
from colocate.model.kernels import Kernels
from colocate.observe.node import capacity, figures
from colocate.policy.schema import (
    ColocationPolicy,
    CpuPolicy,
    Metadata,
    PolicySpec,
    Selector,
    ServiceLevelObjective,
    ServicePolicy,
)

NODE_BYTES = 1 << 30
LOAD_RATIO = 0.2
"""Mean load as a share of the service's peak: what clusters run at."""
WARM_SECONDS = 1.5
PEAK_SECONDS = 3.0
BATCH_ALONE_SECONDS = 4.0
SERVICE_POD = "/kubepods/burstable/podinference"
ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_WAIT = 'read _ || exit 1; exec "$@"'

Progress = Callable[[str, float], None]


class Process:
    """A process that becomes its command only when it is in its cgroup."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    @classmethod
    async def start(cls, node: ScratchNode, cgroup: str, command: list[str], env: dict[str, str]) -> Process:
        """Start the command in this group (a full path)."""
        process = await asyncio.create_subprocess_exec(
            "/bin/sh", "-c", _WAIT, "sh", *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, **ENVIRONMENT, **env},
            limit=1 << 26,
        )  # fmt: skip
        node.enter(process.pid, cgroup)
        started = cls(process)
        await started.say("in")
        return started

    async def say(self, word: str) -> None:
        """A line to its stdin."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n".encode())
        await self.process.stdin.drain()

    async def line(self) -> str:
        """The next line of its stdout; it has 30 s for it."""
        assert self.process.stdout is not None
        return (await asyncio.wait_for(self.process.stdout.readline(), 30)).decode().strip()

    async def end(self) -> None:
        """SIGKILL, and wait for it."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGKILL)  # Process.kill would reap it behind asyncio's back
        if self.process.stdin is not None:
            self.process.stdin.close()  # its own children may hold the other end, and wait() waits for all pipes
        await self.process.wait()


class Demo:
    """One run of the demonstration."""

    def __init__(self, port: KernelPort, seconds: float, seed: int, service_seconds: float, progress: Progress) -> None:
        self._port, self._seconds, self._seed, self._service_seconds = port, seconds, seed, service_seconds
        self._progress = progress
        self._node: ScratchNode
        self._directory: Path
        self._cpus: tuple[int, ...] = ()
        self._urls: list[str] = []
        self._counters: list[WorkCounter] = []
        self._progress_files: list[Path] = []
        self._result = Result(simulated=False, host_unchanged=False)
        self._seen: list[str] = []
        self._target_seconds = 0.02

    async def run(self, calibration: Calibration | None, kernels: Kernels) -> Result:
        """All phases. Raises PermissionMissing, HostUnfit."""
        self._kernels = kernels
        sweep(self._port)
        before = await self._digest()
        with tempfile.TemporaryDirectory(prefix="colocate-demo-") as directory:
            self._directory = Path(directory)
            with ScratchNode(self._port, "demo", NODE_BYTES) as self._node:
                await self._phases(calibration)
        changes = compare(before, await self._digest())
        self._result.changes, self._result.host_unchanged = changes, not changes
        self._result.machine = machine_facts(self._port)
        return self._result

    async def _digest(self) -> Digest:
        mounts = msgspec.json.encode(self._port.layout.mounts).decode()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "colocate.demo.digest", mounts, stdout=asyncio.subprocess.PIPE
        )
        out, _ = await process.communicate()
        return msgspec.json.decode(out, type=Digest)

    async def _phases(self, calibration: Calibration | None) -> None:
        node = self._node
        self._cpus = capacity(self._port, node.path).cpus
        for inner in ("kubepods", "kubepods/burstable", "kubepods/besteffort"):
            node.make_inner(inner)
        for leaf in ("client", SERVICE_POD, "kubepods/burstable/podbatch", "kubepods/besteffort/podbatch"):
            node.make(leaf)
        self._knob("kubepods/besteffort", "cpu.weight", "1")
        self._knob("client", "cpu.weight", "10000")
        for i in range(len(self._cpus)):
            path = self._directory / f"progress{i}"
            self._progress_files.append(path)
            self._counters.append(WorkCounter(path))
        if calibration is None:
            calibration = await self._calibrate()
        self._result.lever = calibration.lever
        serving: list[Process] = []
        try:
            await self._serve(serving)
            await self._references()
            await self._arms(calibration)
        finally:
            for process in serving:
                await process.end()

    async def _calibrate(self) -> Calibration:
        stop = threading.Event()

        def progress(done: int, total: int, arm: str) -> None:
            if stop.is_set():
                raise InterruptedError  # the thread ends at its next arm, and takes its scratch node away
            self._progress(f"calibrating: {arm}", 0.2 * done / total)

        try:
            return await asyncio.to_thread(calibrate, self._port, progress)
        finally:
            stop.set()

    async def _arms(self, calibration: Calibration) -> None:
        for i, arm in enumerate(ARMS):
            self._progress(TITLES[arm], 0.3 + 0.7 * i / len(ARMS))
            await self._arm(arm, calibration)

    def _knob(self, group: str, knob: str, value: str) -> None:
        path = joined(self._node.path, group)
        write_knob(self._port, path, knob, value, inodes_of(self._port, path))

    async def _serve(self, serving: list[Process]) -> None:
        """Start the service; its processes are appended as they start."""
        for cpu in self._cpus:
            serving += [await self._worker(cpu)]

    async def _worker(self, cpu: int) -> Process:
        shared = self._directory / "metrics"
        shared.mkdir(exist_ok=True)
        command = [sys.executable, "-P", "-m", "colocate.demo.inference", "--cpu", str(cpu)]
        command += ["--service-seconds", str(self._service_seconds)]
        group = joined(self._node.path, SERVICE_POD)
        worker = await Process.start(self._node, group, command, {"PROMETHEUS_MULTIPROC_DIR": str(shared)})
        port = await worker.line()
        if not port.isdigit():
            raise HostUnfit("the demonstration service did not start; its error is above")
        self._urls.append(f"http://127.0.0.1:{port}")
        return worker

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

    def _reset_work(self) -> None:
        """Each job counts from zero, so what an earlier one left would be work undone."""
        for counter in self._counters:
            counter.done = 0

    def _work(self) -> int:
        return sum(c.done for c in self._counters)

    def _training(self, i: int) -> list[str]:
        return [sys.executable, "-P", "-m", "colocate.demo.training", "--progress", str(self._progress_files[i])]

    @contextlib.asynccontextmanager
    async def _batch_in(self, group: str) -> AsyncIterator[list[Process]]:
        path = joined(self._node.path, group)
        self._reset_work()
        jobs = [await Process.start(self._node, path, self._training(i), {}) for i in range(len(self._cpus))]
        try:
            yield jobs
        finally:
            for job in jobs:
                await job.end()

    async def _references(self) -> None:
        """The service's peak and the batch work of an otherwise empty node."""
        self._progress("the service's peak", 0.2)
        samples = await self._load(None, PEAK_SECONDS)
        self._result.service_peak_per_second = round(sum(s.ok for s in samples) / PEAK_SECONDS, 1)
        self._progress("batch alone", 0.25)
        async with self._batch_in("kubepods/besteffort/podbatch"):
            await asyncio.sleep(WARM_SECONDS)
            before, started = self._work(), time.perf_counter()
            await asyncio.sleep(BATCH_ALONE_SECONDS)
            rate = (self._work() - before) / (time.perf_counter() - started)
        self._result.batch_alone_per_second = round(rate, 1)

    async def _arm(self, arm: str, calibration: Calibration) -> None:
        if arm == "alone":
            await self._measure(arm, [])
            alone = self._result.arms["alone"].p99_ms / 1e3
            self._target_seconds = max(2 * alone, alone + 0.004)
            self._result.target_p99_ms = round(self._target_seconds * 1e3, 2)
        elif arm == "colocate":
            await self._colocate(calibration)
        else:
            group = "kubepods/burstable/podbatch" if arm == "unmanaged" else "kubepods/besteffort/podbatch"
            async with self._batch_in(group) as jobs:
                await self._measure(arm, jobs)

    async def _measure(self, arm: str, jobs: list[Process]) -> None:
        await asyncio.sleep(WARM_SECONDS)
        have = capacity(self._port, self._node.path)
        load = asyncio.create_task(self._load(LOAD_RATIO * self._result.service_peak_per_second, self._seconds))
        await asyncio.sleep(0.8)
        work, before = self._work(), figures(self._port, "/", have.cpus, have.memory_bytes)
        started = time.perf_counter()
        samples = await load
        elapsed = time.perf_counter() - started
        after = figures(self._port, "/", have.cpus, have.memory_bytes)
        done = (self._work() - work) / elapsed
        busy = (after.cpu_busy_us or 0) - (before.cpu_busy_us or 0)
        idle = (after.cpu_idle_us or 0) - (before.cpu_idle_us or 0)
        found, detail = summarize(samples, self._seconds)
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
                "batch_processes_lost": sum(j.process.returncode is not None for j in jobs),
            },
            Arm,
        )
        self._result.details[arm] = detail

    def _slo(self) -> ServiceLevelObjective | None:
        url = f"{self._urls[0]}/metrics"
        return ServiceLevelObjective(p99=self._target_seconds, url=url, metric=METRIC, window=3.0)

    def _policy(self) -> ColocationPolicy:
        service = ServicePolicy(name="inference", selector=Selector(cgroup=SERVICE_POD), slo=self._slo())
        spec = PolicySpec(
            node_root=self._node.path,
            tick=0.5,
            services=(service,),
            cpu=CpuPolicy(hold_down=2.0),
        )
        return ColocationPolicy(metadata=Metadata(name="demo"), spec=spec)

    def _decided(self, tick: Tick) -> None:
        """What is new of what was decided, for the report; the CPU law's word at least every ten ticks."""
        for verdict in tick.plan.verdicts:
            text = f"{verdict.law}: {verdict.reason} ({verdict.state})"
            sometimes = verdict.law == "cpu" and tick.snapshot.sequence % 10 == 0
            if text not in self._seen[-8:] or sometimes:
                self._seen.append(text)
                self._result.decisions.append(f"tick {tick.snapshot.sequence}: {text}: {verdict.message}")

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
        agent.on_tick.append(self._decided)
        server = JobServer(agent, self._directory / "agent.sock")
        stop = asyncio.Event()
        await server.start()
        running = asyncio.create_task(agent.run(stop))
        jobs: list[Process] = []
        self._reset_work()
        try:
            for i in range(len(self._cpus)):
                command = [sys.executable, "-P", "-m", "colocate.cli.main", "run", "--name", f"training-{i}"]
                command += ["--checkpoint-signal", "SIGUSR1", "--socket", str(server.path), "--", *self._training(i)]
                process = await asyncio.create_subprocess_exec(
                    *command, stdin=subprocess.DEVNULL, env={**os.environ, **ENVIRONMENT}
                )
                jobs.append(Process(process))
            while len(agent.registry.jobs) < len(jobs) and all(j.process.returncode is None for j in jobs):
                await asyncio.sleep(0.02)  # starting them is not what is measured
            await self._measure("colocate", jobs)
        finally:
            for job in jobs:
                if job.process.returncode is None:
                    os.kill(job.process.pid, signal.SIGTERM)
                await job.process.wait()
            while server.busy and not running.done():
                await asyncio.sleep(0.05)
            stop.set()
            try:
                await running
            finally:
                await server.close()
                await agent.close()
