"""What a real card does when it is shared: `python -m benchmarks.gpu.real_card [--scale X] [--out FILE]`, ten minutes.

Every figure that the fake card and the GPU law take for granted is measured here: slices and what a switch costs, how
much queues, how long a frozen or locked process still computes, what freezing and locking cost, what NVML tells and
how late, and what a service feels beside batch under stock time slicing, under a gate and under a dial. The load is
`benchmarks.gpu.load`; the card's settings are left as they are. Needs root (the freezer, checkpoint locks), the driver
and nvidia-ml-py; PyTorch's part is left out where it is not installed, and says so.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import pynvml

from benchmarks.gpu.cuda import CudaError, Driver, Words

KERNEL_MS = {"trainer": 1.0, "asynchronous": 1.0, "blocking": 4.0, "graph": 1.0}
REPEATS = {"trainer": 12, "asynchronous": 5, "blocking": 12, "graph": 8}
SERVICE_KERNELS, SERVICE_RATE = 20, 10.0
"""A request is 20 kernels of a millisecond; ten come in a second."""
LAUNCHES: dict[str, dict[str, str]] = {
    "plain": {}, "blocking": {"CUDA_LAUNCH_BLOCKING": "1"}, "0.25x": {"CUDA_SCALE_LAUNCH_QUEUES": "0.25x"},
}  # fmt: skip
FREEZE_SECONDS = 10.0
HOLD_OFF = 0.010
PERIOD = 0.2
Row = dict[str, Any]


class Freezer:
    """One cgroup whose processes are frozen and thawed, of either version."""

    def __init__(self) -> None:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
        unified = [m[1] for m in mounts if m[2] == "cgroup2"]
        legacy = [m[1] for m in mounts if m[2] == "cgroup" and "freezer" in m[3].split(",")]
        self.version = 2 if unified else 1
        self.path = Path((unified or legacy)[0]) / f"real-card-{os.getpid()}"
        self.path.mkdir()
        self._file = self.path / ("cgroup.freeze" if self.version == 2 else "freezer.state")

    def add(self, pid: int) -> None:
        """Move a process into the cgroup."""
        (self.path / "cgroup.procs").write_text(str(pid))

    def stop(self, _pid: int) -> float:
        """Freeze; the monotonic moment at which the kernel said that all are frozen."""
        until = time.perf_counter() + FREEZE_SECONDS
        while time.perf_counter() < until:
            self._file.write_text("1" if self.version == 2 else "FROZEN")
            if self.version == 2 and "frozen 1" in (self.path / "cgroup.events").read_text():
                return time.perf_counter()
            if self.version == 1 and self._file.read_text().strip() == "FROZEN":
                return time.perf_counter()
        raise RuntimeError(f"not frozen within {FREEZE_SECONDS:g} s: a process is in the driver")

    def go(self, _pid: int) -> None:
        """Thaw."""
        self._file.write_text("0" if self.version == 2 else "THAWED")

    def close(self) -> None:
        """Thaw and remove the cgroup, once its processes have ended."""
        self.go(0)
        for _ in range(100):
            with contextlib.suppress(OSError):
                self.path.rmdir()
                return
            time.sleep(0.05)


class Lock:
    """The checkpoint interface's lock as a gate: the process goes on, its CUDA calls wait."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def stop(self, pid: int) -> float:
        """Lock; the moment at which the call returned."""
        self._driver.lock(pid, 5000)
        return time.perf_counter()

    def go(self, pid: int) -> None:
        """Unlock."""
        self._driver.unlock(pid)


class Gate(Protocol):
    """Stops a process's use of the card and lets it go on."""

    def stop(self, pid: int) -> float: ...
    def go(self, pid: int) -> None: ...


class Bench:
    """The parts, their rows, and the processes that they start."""

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.rows: list[Row] = []
        self.directory = Path(tempfile.mkdtemp(prefix="real-card-", dir="/dev/shm"))
        self.driver = Driver()
        self.freezer = Freezer()
        self.gates: dict[str, Gate] = {"freeze": self.freezer, "lock": Lock(self.driver)}
        pynvml.nvmlInit()
        self.nvml = pynvml.nvmlDeviceGetHandleByIndex(0)
        self.rounds_per_ms = 0.0
        self._count = 0

    def add(self, part: str, **row: Any) -> None:
        """Keep a row, and show it at once."""
        self.rows.append({"part": part, **row})
        print(json.dumps(self.rows[-1]), flush=True)

    def seconds(self, wanted: float) -> float:
        """A duration, scaled."""
        return max(0.5, wanted * self.scale)

    @contextlib.contextmanager
    def load(
        self, role: str, ms: float, *more: object, env: dict[str, str] | None = None
    ) -> Iterator[tuple[int, Words]]:
        """Run a load whose kernels take `ms` when alone, once it is ready; batch runs in the freezer's cgroup."""
        self._count += 1
        path = self.directory / f"words{self._count}"
        words = Words(path)
        rounds = max(1, int(ms * self.rounds_per_ms)) if ms >= 0 else -int(ms)
        command = [sys.executable, "-m", "benchmarks.gpu.load", role, str(path), str(rounds), *map(str, more)]
        process = subprocess.Popen(command, env={**os.environ, **(env or {})})
        try:
            if role in KERNEL_MS:
                self.freezer.add(process.pid)
            self._ready(process, lambda: words[Words.READY] > 0)
            yield process.pid, words
        finally:
            self.freezer.go(process.pid)
            process.kill()
            process.wait()

    @staticmethod
    def _ready(process: subprocess.Popen[bytes], ready: Callable[[], bool], seconds: float = 90.0) -> None:
        until = time.monotonic() + seconds
        while not ready():
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{process.args!r} ended with {process.poll()} or did not get ready")
            time.sleep(0.002)

    def finish(self, words: Words, seconds: float) -> None:
        """Wait until a load that ends by itself has ended."""
        until = time.monotonic() + seconds
        while words[Words.READY] != 2:
            if time.monotonic() > until:
                raise RuntimeError("a load did not end in time")
            time.sleep(0.002)

    # -- parts, in the order in which they run --------------------------------------------------------------------

    def facts(self) -> None:
        """Card, driver, kernel; then how much work a millisecond is."""
        name = pynvml.nvmlDeviceGetName(self.nvml)
        self.add(
            "facts", card=name, driver=pynvml.nvmlSystemGetDriverVersion(), cuda=self.driver.version(),
            kernel=platform.release(), cpus=os.cpu_count(), cgroup=self.freezer.version, scale=self.scale,
        )  # fmt: skip
        for _ in range(2):  # the first raises the clocks
            with self.load("measure", -200_000, self.seconds(2)) as (_, words):
                self.finish(words, 30)
                self.rounds_per_ms = 200_000 * words[Words.LAUNCHED] * 1e6 / words[Words.CYCLES]
        self.add("facts", rounds_per_ms=round(self.rounds_per_ms))

    def share(self) -> None:
        """Kernels a second of one, two and three that always have work."""
        for many in (1, 2, 3):
            with contextlib.ExitStack() as stack:
                loads = [stack.enter_context(self.load("trainer", 1.0))[1] for _ in range(many)]
                time.sleep(0.3)
                before, began = [w[Words.BEATS] for w in loads], time.perf_counter()
                time.sleep(self.seconds(4))
                took = time.perf_counter() - began
                rates = [round((w[Words.BEATS] - b) / took, 1) for w, b in zip(loads, before, strict=True)]
            self.add("share", clients=many, kernels_per_second=rates)

    def slices(self) -> None:
        """Lengths of slices, and what a switch takes: from one context's end to the other's beginning."""
        for many in (2, 3):
            with contextlib.ExitStack() as stack:
                loads = [stack.enter_context(self.load("watch", 0, self.seconds(1.5)))[1] for _ in range(many)]
                for words in loads:
                    self.finish(words, 60)
                seen = [w.gaps() for w in loads]
            on, off, switches = [], [], []
            for first, gaps in seen:
                starts = [first, *(b for _, b in gaps)]
                on += [(a - s) / 1e6 for (a, _), s in zip(gaps[1:], starts[1:], strict=False)]
                off += [(b - a) / 1e6 for a, b in gaps[1:]]
            begins = sorted(b for _, gaps in seen for _, b in gaps)
            for a in (a for _, gaps in seen for a, _ in gaps):
                after = next((b for b in begins if b > a), None)
                if after is not None and after - a < 1e6:
                    switches.append((after - a) / 1e6)
            self.add(
                "slices",
                clients=many,
                gaps=len(off),
                on_ms=_spread(on),
                off_ms=_spread(off),
                switch_ms=_spread(switches),
            )

    def depth(self) -> None:
        """How many launches queue before one waits, by the scale of the launch queue."""
        for queue in ("", "0.25x", "0.5x", "2x", "4x"):
            env = {"CUDA_SCALE_LAUNCH_QUEUES": queue} if queue else {}
            with self.load("asynchronous", 5.0, env=env) as (_, words):
                until = time.monotonic() + 3
                while not words[Words.DEPTH] and time.monotonic() < until:
                    time.sleep(0.01)
                self.add("depth", queues=queue or "default", launches=words[Words.DEPTH])

    def drain(self) -> None:
        """For how long a stopped process still computes, and what stopping and letting go take."""
        for name, gate in self.gates.items():
            for role, ms in KERNEL_MS.items():
                with self.load(role, ms) as (pid, words):
                    time.sleep(1.5)
                    found = [self._stopped(gate, pid, words) for _ in range(max(2, int(REPEATS[role] * self.scale)))]
                self.add(
                    "drain", gate=name, load=role, kernel_ms=ms,
                    stop_ms=_spread([f[0] for f in found]), drain_ms=_spread([f[1] for f in found]),
                    from_asked_ms=_spread([f[0] + f[1] for f in found]), kernels=_spread([f[2] for f in found]),
                    go_ms=_spread([f[3] for f in found]), resumed_ms=_spread([f[4] for f in found]),
                )  # fmt: skip

    def _stopped(self, gate: Gate, pid: int, words: Words) -> tuple[float, float, float, float, float]:
        time.sleep(0.2 + 0.1 * (time.perf_counter_ns() % 1000) / 1000)
        asked = time.perf_counter()
        stopped = gate.stop(pid)
        at, count = stopped, words[Words.BEATS]
        last, latest = count, stopped
        while (now := time.perf_counter()) - latest < 0.08:
            if words[Words.BEATS] != last:
                last, latest = words[Words.BEATS], now
        began = time.perf_counter()
        gate.go(pid)
        gone = time.perf_counter()
        while words[Words.BEATS] == last and time.perf_counter() - gone < 5:
            pass
        resumed = time.perf_counter()
        return (at - asked) * 1e3, (latest - at) * 1e3, last - count, (gone - began) * 1e3, (resumed - began) * 1e3

    def lock_often(self) -> None:
        """Ten locks a second: do they go on working, and how long does each take?"""
        times, failed = [], 0
        with self.load("blocking", 4.0) as (pid, words):
            until = time.monotonic() + self.seconds(25)
            while time.monotonic() < until:
                began = time.perf_counter()
                try:
                    self.driver.lock(pid, 2000)
                    locked = time.perf_counter()
                    self.driver.unlock(pid)
                    times.append((locked - began) * 1e3)
                except CudaError:
                    failed += 1
                time.sleep(0.1)
            before = words[Words.BEATS]
            time.sleep(0.3)
            goes_on, state = words[Words.BEATS] > before, self.driver.state(pid)
        self.add("lock_often", locks=len(times), failed=failed, lock_ms=_spread(times), state=state, goes_on=goes_on)

    def frozen_lock(self) -> None:
        """A frozen process cannot be locked: what the call answers, and whether the process goes on."""
        with self.load("blocking", 4.0) as (pid, words):
            time.sleep(0.5)
            self.freezer.stop(pid)
            answers: list[str] = []
            asking = threading.Thread(target=self._locked, args=(pid, answers), daemon=True)
            began = time.perf_counter()
            asking.start()
            asking.join(3)
            while_frozen = answers[0] if answers else "no answer in 3 s, though its time-out was 0.5 s"
            self.freezer.go(pid)
            asking.join(5)
            took = time.perf_counter() - began
            state = self.driver.state(pid)
            if state == "locked":
                self.driver.unlock(pid)
            before = words[Words.BEATS]
            time.sleep(0.5)
            self.add(
                "frozen_lock",
                while_frozen=while_frozen,
                thawed=answers[0] if answers else "no answer",
                seconds=round(took, 3),
                state=state,
                goes_on=words[Words.BEATS] > before,
            )

    def _locked(self, pid: int, answers: list[str]) -> None:
        try:
            self.driver.lock(pid, 500)
            answers.append("locked")
        except CudaError as error:
            answers.append(str(error))

    def blocking_launches(self) -> None:
        """What CUDA_LAUNCH_BLOCKING=1 and a shorter queue cost, by the length of a kernel."""
        for ms in (0.01, 0.05, 0.2, 1.0):
            rates = {}
            for name, env in LAUNCHES.items():
                with self.load("measure", ms, self.seconds(1.5), env=env) as (_, words):
                    self.finish(words, 30)
                    rates[name] = round(words[Words.LAUNCHED] * 1e9 / words[Words.CYCLES], 1)
            self.add("blocking_launches", kernel_ms=ms, kernels_per_second=rates)

    def torch(self) -> None:
        """The same of training and decoding by PyTorch, and how long its queue drains after a freeze."""
        missing = [m for m in ("torch", "torchvision") if importlib.util.find_spec(m) is None]
        if missing:
            self.add("torch", lacks=missing)
            return
        for name, env, item in (
            ("plain", {}, ""), ("plain, loss read", {}, "item"), ("blocking", {"CUDA_LAUNCH_BLOCKING": "1"}, ""),
        ):  # fmt: skip
            out = self.directory / f"torch{len(self.rows)}"
            command = [sys.executable, "-m", "benchmarks.gpu.torch_load", str(out), str(self.seconds(4)), item]
            process = subprocess.Popen(command, env={**os.environ, **env})
            try:
                self.freezer.add(process.pid)
                self._ready(process, out.exists)
                time.sleep(1.5)
                rates = json.loads(out.read_text())
                stops, drains = [], []
                with self.load("probe", 0) as (_, words):
                    for _ in range(max(2, int(8 * self.scale))):
                        time.sleep(0.6)
                        asked = time.perf_counter()
                        at = self.freezer.stop(process.pid)
                        time.sleep(1.2)
                        stops.append((at - asked) * 1e3)
                        drains.append(max(0.0, words[Words.CYCLES] / 1e9 - at) * 1e3)
                        self.freezer.go(process.pid)
                self.add("torch", launches=name, rates={k: round(v, 2) for k, v in rates.items()},
                         stop_ms=_spread(stops), drain_ms=_spread(drains))  # fmt: skip
            finally:
                self.freezer.go(process.pid)
                process.kill()
                process.wait()

    def sensors(self) -> None:
        """How often NVML's figures change, what a call costs, and how late it says that a frozen process is idle."""
        with self.load("trainer", 1.0) as (pid, _):
            time.sleep(1)
            stamps, costs = self._process_samples(self.seconds(4))
            steps = [(b - a) / 1e3 for a, b in itertools.pairwise(stamps)]
            self.add("sensors", what="process utilization", period_ms=_spread(steps), call_ms=_spread(costs))
            kind, samples = pynvml.nvmlDeviceGetSamples(self.nvml, pynvml.NVML_GPU_UTILIZATION_SAMPLES, 0)
            times = [s.timeStamp for s in samples]
            self.add("sensors", what="utilization samples", kind=kind, kept=len(times),
                     period_ms=_spread([(b - a) / 1e3 for a, b in itertools.pairwise(times)]))  # fmt: skip
            rows = pynvml.nvmlDeviceGetComputeRunningProcesses_v3(self.nvml)
            self.add("sensors", what="processes", pid=pid, seen=[(r.pid, r.usedGpuMemory) for r in rows])
            self._gpm()
            self.freezer.stop(pid)
            stopped, seen = time.perf_counter(), int(time.time() * 1e6)
            last = 0.0
            while time.perf_counter() - stopped < 3:
                with contextlib.suppress(pynvml.NVMLError):
                    found = pynvml.nvmlDeviceGetProcessUtilization(self.nvml, seen - 1_000_000)
                    if any(f.timeStamp > seen and f.smUtil for f in found):
                        last = time.perf_counter() - stopped
                        seen = max(f.timeStamp for f in found)
                time.sleep(0.005)
            self.add("sensors", what="last busy sample after a freeze", seconds=round(last, 3))
            self.freezer.go(pid)

    def _process_samples(self, seconds: float) -> tuple[list[int], list[float]]:
        stamps: list[int] = []
        costs: list[float] = []
        last, until = 0, time.monotonic() + seconds
        while time.monotonic() < until:
            began = time.perf_counter()
            try:
                found = pynvml.nvmlDeviceGetProcessUtilization(self.nvml, last)
            except pynvml.NVMLError:
                found = []
            costs.append((time.perf_counter() - began) * 1e3)
            for stamp in sorted({f.timeStamp for f in found}):
                if stamp > last:
                    stamps.append(stamp)
                    last = stamp
            time.sleep(0.005)
        return stamps, costs

    def _gpm(self) -> None:
        try:
            for ms in (10, 20, 50, 100, 200):
                values, costs = [], []
                first, second = pynvml.nvmlGpmSampleAlloc(), pynvml.nvmlGpmSampleAlloc()
                for _ in range(5):
                    pynvml.nvmlGpmSampleGet(self.nvml, first)
                    time.sleep(ms / 1e3)
                    began = time.perf_counter()
                    pynvml.nvmlGpmSampleGet(self.nvml, second)
                    get = pynvml.c_nvmlGpmMetricsGet_t()
                    get.version, get.numMetrics = pynvml.NVML_GPM_METRICS_GET_VERSION, 1
                    get.sample1, get.sample2 = first, second
                    get.metrics[0].metricId = pynvml.NVML_GPM_METRIC_SM_UTIL
                    pynvml.nvmlGpmMetricsGet(get)
                    costs.append((time.perf_counter() - began) * 1e3)
                    values.append(round(get.metrics[0].value, 1))
                pynvml.nvmlGpmSampleFree(first)
                pynvml.nvmlGpmSampleFree(second)
                self.add("sensors", what="GPM SM utilization", apart_ms=ms, percent=values, call_ms=_spread(costs))
        except pynvml.NVMLError as error:
            self.add("sensors", what="GPM SM utilization", answer=str(error))

    def service(self) -> None:
        """A service of 20 ms requests alone, sliced with batch, and with batch gated by whether it is busy."""
        seconds = self.seconds(20)
        alone = self._served("alone", None, None, seconds)
        for role in ("blocking", "trainer", "asynchronous"):
            for arm in ("slicing", "freeze", "lock"):
                if arm == "lock" and role == "asynchronous":
                    continue  # its drain says enough
                self._served(arm, role, alone, seconds)

    def _served(self, arm: str, role: str | None, alone: list[float] | None, seconds: float) -> list[float]:
        out = self.directory / f"served{len(self.rows)}"
        with contextlib.ExitStack() as stack:
            ms = KERNEL_MS.get(role or "", 1.0)
            batch = stack.enter_context(self.load(role, ms)) if role else None
            service = ("serve", 1.0, SERVICE_KERNELS, SERVICE_RATE, seconds, out)
            _, words = stack.enter_context(self.load(*service))
            before = batch[1][Words.BEATS] if batch else 0
            ended = threading.Event()
            reactions: list[float] = []
            hands = stack.enter_context(ThreadPoolExecutor(1))
            hand = None
            if batch and arm in self.gates:
                hand = hands.submit(_gated, self.gates[arm], batch[0], words, ended, reactions)
            began = time.perf_counter()
            try:
                self.finish(words, seconds * 6 + 30)
            finally:
                ended.set()
            if hand:
                hand.result()  # a gate that failed was none
            took = time.perf_counter() - began
            share = (batch[1][Words.BEATS] - before) * ms / 1e3 / took if batch else 0.0
        found: list[float] = json.loads(out.read_text())
        row = {"p50_ms": _quantile(found, 0.5), "p99_ms": _quantile(found, 0.99), "requests": len(found)}
        ratio = round(_quantile(found, 0.99) / _quantile(alone, 0.99), 3) if alone else None
        self.add(
            "service",
            arm=arm,
            batch=role,
            **row,
            p99_to_alone=ratio,
            batch_share=round(share, 3),
            stop_ms=_spread(reactions),
        )
        return found

    def dial(self) -> None:
        """Requests of 0.5 s one after another while batch runs a share of every 200 ms: how much longer they take."""
        seconds = self.seconds(8)
        alone = 0.0
        for share in (0.0, 0.1, 0.25, 0.5, 0.75, 1.0):
            out = self.directory / f"dial{share}"
            with contextlib.ExitStack() as stack:
                batch = stack.enter_context(self.load("blocking", 4.0)) if share else None
                _, words = stack.enter_context(self.load("serve", 1.0, 500, 0.0, seconds, out))
                before = batch[1][Words.BEATS] if batch else 0
                began = time.perf_counter()
                while words[Words.READY] != 2 and time.perf_counter() - began < seconds * 4 + 10:
                    if not batch or share == 1.0:
                        time.sleep(0.05)
                        continue
                    self.freezer.go(batch[0])
                    time.sleep(PERIOD * share)
                    self.freezer.stop(batch[0])
                    time.sleep(PERIOD * (1 - share))
                took = time.perf_counter() - began
                done = (batch[1][Words.BEATS] - before) * 4.0 / 1e3 / took if batch else 0.0
            mean = statistics.fmean(json.loads(out.read_text()))
            alone = alone or mean
            sigma = (1 - alone / mean) / share if share else None
            self.add(
                "dial",
                share=share,
                slowdown=round(mean / alone, 3),
                sigma=sigma and round(sigma, 3),
                batch_share=round(done, 3),
            )


def _gated(gate: Gate, pid: int, words: Words, ended: threading.Event, reactions: list[float]) -> None:
    """Stop batch while the service is busy; let it go when the service has been idle for the hold-off."""
    stopped, idle_since = False, 0.0
    while not ended.is_set():
        now = time.perf_counter()
        if words[Words.BUSY]:
            idle_since = now
            if not stopped:
                reactions.append((gate.stop(pid) - now) * 1e3)
                stopped = True
        elif stopped and now - idle_since >= HOLD_OFF:
            gate.go(pid)
            stopped = False
        time.sleep(0.0005)
    if stopped:
        gate.go(pid)


def _quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(q * len(ordered)))] * 1e3, 3)


def _spread(values: list[float]) -> list[float]:
    """Smallest, median, 95th percentile and largest, or nothing."""
    if not values:
        return []
    ordered = sorted(values)
    n = len(ordered)
    return [round(ordered[i], 3) for i in (0, n // 2, min(n - 1, int(0.95 * n)), n - 1)]


PARTS = (
    "facts", "share", "slices", "depth", "drain", "lock_often", "sensors", "service", "dial", "blocking_launches",
    "torch", "frozen_lock",
)  # fmt: skip
"""The last may leave a process that cannot be ended."""


def main(arguments: list[str]) -> int:
    """Measure every part; one that fails is said and costs no other; 1 when one failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.real_card", description=__doc__.split("\n")[0])
    parser.add_argument("--scale", type=float, default=1.0, help="durations and repeats as a share of the full ones")
    parser.add_argument("--out", type=Path, help="append the rows to this file, as JSON lines")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated; facts is always first")
    given = parser.parse_args(arguments)
    bench, failed = Bench(given.scale), 0
    try:
        for part in dict.fromkeys(("facts", *given.parts.split(","))):
            began = time.monotonic()
            try:
                getattr(bench, part)()
            except Exception as error:  # noqa: BLE001  the other parts are measured nevertheless
                failed += 1
                traceback.print_exc()
                bench.add(part, failed=f"{type(error).__name__}: {error}")
            print(f"{part}: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
    finally:
        bench.freezer.close()
        shutil.rmtree(bench.directory, ignore_errors=True)
        if given.out:
            with given.out.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in bench.rows)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
