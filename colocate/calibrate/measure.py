"""Which CPU lever protects a service best on this very kernel: weight 1, the idle class, a quota, or a smaller cpuset.

Kernels differ: on CFS 6.1 both weight 1 and cpu.idle leave a service's p99 as if alone; on one EEVDF kernel cpu.idle
costs a whole tick at p99 and weight 1 does not. So a service-like thread and hogs are run under each lever, the arms
interleaved (ABBA), and a lever replaces weight 1 only if its paired ratio wins outside the 95 % interval.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog

from colocate.actuate.scratch import ScratchNode, sweep
from colocate.actuate.statedir import StateDirectory
from colocate.calibrate.judge import judge
from colocate.calibrate.probe import WorkCounter
from colocate.calibration import Calibration
from colocate.cgroup.knobfiles import write_knob
from colocate.cgroup.port import FilePort
from colocate.cgroup.tree import inodes_of
from colocate.errors import ColocateError, HostUnfit
from colocate.observe.node import capacity, figures
from colocate.policy.schema import ColocationPolicy
from colocate.units import cpu_max, format_cpulist

log = structlog.get_logger()
FILE = "calibration.json"
ROUNDS = 4
ARM_SECONDS = 0.9
PERIOD_SECONDS = 0.008
WORK_SECONDS = 0.002
PROBE_SECONDS = 10.0
MIN_IDLE_RATIO = 0.3
ARMS = ("alone", "weight", "idle", "quota", "cpuset")
PROBE = Path(__file__).with_name("probe.py")


def machine_facts(port: FilePort) -> dict[str, str]:
    """What a calibration belongs to: kernel release, HZ, preemption model, CPU model and count."""
    release = os.uname().release
    facts = {"kernel": release, "cpus": str(os.cpu_count() or 0)}
    config = (port.proc(f"/boot/config-{release}") or "").splitlines()
    facts["hz"] = next((line.partition("=")[2] for line in config if line.startswith("CONFIG_HZ=")), "unknown")
    preempt = port.proc("/sys/kernel/debug/sched/preempt") or os.uname().version
    facts["preemption"] = " ".join(w for w in preempt.split() if "PREEMPT" in w or w.startswith("(")) or "unknown"
    for line in (port.proc("/proc/cpuinfo") or "").splitlines():
        if line.startswith("model name"):
            facts["cpu"] = line.partition(":")[2].strip()
            break
    return facts


def load_calibration(state: StateDirectory, port: FilePort) -> Calibration:
    """The calibration of this very machine, or the default."""
    data = state.load(FILE)
    if data is None:
        return Calibration()
    try:
        found = msgspec.convert({k: v for k, v in data.items() if k != "stateVersion"}, Calibration)
    except msgspec.ValidationError:
        return Calibration()
    return found if found.machine == machine_facts(port) else Calibration()


class _Bench:
    """One scratch node with a service group and a batch group full of hogs."""

    def __init__(self, port: FilePort, node: ScratchNode, directory: Path) -> None:
        self.port, self.node = port, node
        self.service, self.batch = node.make("service"), node.make("batch")
        self.inodes = inodes_of(port, self.batch)
        self.cpus = capacity(port, node.path).cpus
        self._counters: list[WorkCounter] = []
        self._hogs: list[subprocess.Popen[bytes]] = []
        for i in range(len(self.cpus)):
            path = directory / f"hog{i}"
            self._counters.append(WorkCounter(path))
            hog = subprocess.Popen([sys.executable, "-IS", str(PROBE), "hog", str(path)])
            self._hogs.append(hog)
            node.enter(hog.pid, self.batch)

    def set(self, knob: str, value: str) -> None:
        """Write one knob of the batch group, as far as it exists here."""
        write_knob(self.port, self.batch, knob, value, self.inodes)

    def _prepare(self, arm: str) -> None:
        every = format_cpulist(self.cpus)
        with contextlib.suppress(OSError):
            self.set("cpu.idle", "0")
        self.set("cpu.max", cpu_max(None))
        self.set("cpu.weight", "1")
        self.set("cpuset.cpus", every)
        self.set("cgroup.freeze", "1" if arm == "alone" else "0")
        if arm == "idle":
            self.set("cpu.idle", "1")
        elif arm == "quota":
            self.set("cpu.max", cpu_max(len(self.cpus) / 2))
        elif arm == "cpuset":
            self.set("cpuset.cpus", format_cpulist(self.cpus[len(self.cpus) // 2 :]))

    def _work(self) -> int:
        return sum(c.done for c in self._counters)

    def measure(self, arm: str) -> tuple[float, float]:
        """(p99 seconds, batch work a second) of one arm. Raises HostUnfit if the probes do not get the CPU for it."""
        self._prepare(arm)
        probes: list[subprocess.Popen[str]] = []
        try:
            return self._measured(probes)
        except subprocess.TimeoutExpired:
            what = f"the CPUs are too busy to measure: {ARM_SECONDS:g} s took more than {PROBE_SECONDS:g} s"
            raise HostUnfit(what, "calibrate when the machine is idle") from None
        finally:
            for probe in probes:
                probe.kill()
                probe.communicate()

    def _measured(self, probes: list[subprocess.Popen[str]]) -> tuple[float, float]:
        for cpu in (self.cpus[0], self.cpus[-1]):
            command = [sys.executable, "-IS", str(PROBE), "service", str(cpu)]
            command += [str(ARM_SECONDS), str(PERIOD_SECONDS), str(WORK_SECONDS)]
            probe = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self.node.enter(probe.pid, self.service)
            probes.append(probe)
        for probe in probes:
            assert probe.stdout is not None
            if not select.select([probe.stdout], [], [], PROBE_SECONDS)[0]:
                raise subprocess.TimeoutExpired(probe.args, PROBE_SECONDS)
            probe.stdout.readline()
        before, started = self._work(), time.perf_counter()
        for probe in probes:
            assert probe.stdin is not None
            probe.stdin.write("go\n")
            probe.stdin.flush()
        latencies = sorted(float(v) for probe in probes for v in probe.communicate(timeout=PROBE_SECONDS)[0].split())
        work = (self._work() - before) / (time.perf_counter() - started)
        return latencies[int(0.99 * (len(latencies) - 1))], work

    def close(self) -> None:
        """End the hogs."""
        self.set("cgroup.freeze", "0")
        for hog in self._hogs:
            hog.kill()
            hog.wait()


def calibrate(port: FilePort, progress: Callable[[int, int, str], None] | None = None) -> Calibration:
    """Measure, in at most 30 seconds. Raises HostUnfit, PermissionMissing."""
    if port.layout.hierarchy("cpu") is None:
        raise HostUnfit("no cgroup hierarchy offers a CPU controller", "mount cgroup v2, or v1's cpu controller")
    sweep(port)
    results: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="colocate-") as directory, ScratchNode(port, "calibrate") as node:
        # The whole measurement gives way to what runs here: it may cost accuracy, never a service's CPU.
        write_knob(port, node.path, "cpu.weight", "1", inodes_of(port, node.path))
        bench = _Bench(port, node, Path(directory))
        try:
            arms = [a for a in ARMS if _offered(bench, a)]
            total = ROUNDS * len(arms)
            for round_ in range(ROUNDS):
                for arm in arms if round_ % 2 == 0 else arms[::-1]:
                    if progress is not None:
                        progress(sum(map(len, results.values())), total, arm)
                    results.setdefault(arm, []).append(bench.measure(arm))
        finally:
            bench.close()
    return judge(results, machine_facts(port), time.time())


def _offered(bench: _Bench, arm: str) -> bool:
    if arm == "cpuset" and (bench.port.layout.hierarchy("cpuset") is None or len(bench.cpus) < 2):
        return False
    if arm == "idle":
        try:
            bench.set("cpu.idle", "1")
            bench.set("cpu.idle", "0")
        except OSError:
            return False
    return arm != "alone" or bench.port.layout.hierarchy("freeze") is not None


async def idle_ratio(port: FilePort, root: str, seconds: float = 1.0) -> float:
    """How idle the node's CPUs are right now."""
    have = capacity(port, root)
    before = figures(port, root, have.cpus, have.memory_bytes)
    await asyncio.sleep(seconds)
    after = figures(port, root, have.cpus, have.memory_bytes)
    idle = (after.cpu_idle_us or 0) - (before.cpu_idle_us or 0)
    busy = (after.cpu_busy_us or 0) - (before.cpu_busy_us or 0)
    return idle / max(idle + busy, 1)


async def ensure_calibration(state: StateDirectory, port: FilePort, policy: ColocationPolicy) -> Calibration:
    """Once per machine, if the policy allows and the node is idle enough; never in a Kubernetes pod."""
    known = load_calibration(state, port)
    if known.measured_seconds or not policy.spec.calibrate or "KUBERNETES_SERVICE_HOST" in os.environ:
        return known
    idle = await idle_ratio(port, policy.spec.node_root)
    if idle < MIN_IDLE_RATIO:
        log.info("calibration_put_off", idle_ratio=round(idle, 2), needed=MIN_IDLE_RATIO)
        return known
    try:
        found = await asyncio.to_thread(calibrate, port)
    except (ColocateError, OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        log.warning("calibration_failed", error=str(error))
        return known
    state.save(FILE, msgspec.to_builtins(found))
    log.info("calibrated", lever=found.lever, rungs=found.rungs)
    return found
