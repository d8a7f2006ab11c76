"""What the agent costs: CPU a second and memory with 110 pods of 3 containers at 1 Hz, the first tick, 10,000 cgroups.

CPU time and memory are absolute; the first tick is wall clock and stands beside the reference loop.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common import Runs, bar, cpu_seconds, memory_mib, reference_loop
from colocate.actuate.journal import Journal, boot_id
from colocate.actuate.scratch import ScratchNode, sweep
from colocate.actuate.statedir import default_state_dir
from colocate.actuate.writer import NO_CARE, Care, Drift
from colocate.agent.loop import Agent
from colocate.agent.numba_cache import load_kernels
from colocate.cgroup.port import KernelPort
from colocate.jobs.client import Connection
from colocate.model import reference
from colocate.plan import Outcome, Plan
from colocate.policy.schema import BatchPolicy, ColocationPolicy, PolicySpec, Selector
from colocate.report.record import Recorder
from colocate.snapshot import NodeSnapshot

ROUNDS = 3
SECONDS = 20
MODES = ("on", "off")
BARS = {"cpu_ms": 15.0, "tick_cpu_ms": 10.0, "rss_on": 160.0, "rss_off": 90.0, "first_tick": 1.0, "verify_ms": 2.0}


@contextmanager
def _agent(node: ScratchNode, jit: str, directory: Path) -> Iterator[tuple[subprocess.Popen[bytes], float]]:
    config = directory / "policy.yaml"
    config.write_text(f"spec: {{nodeRoot: {node.path}, calibrate: false, http: {{enabled: false}}}}")
    environment = {
        **os.environ,
        "COLOCATE_JIT": jit,
        "COLOCATE_STATE_DIR": str(directory / "state"),
        "COLOCATE_RUNTIME_DIR": str(directory / "run"),
    }
    shutil.rmtree(directory / "state" / "records", ignore_errors=True)
    started = time.perf_counter()
    command = [sys.executable, "-m", "colocate.cli.main", "agent", "--config", str(config)]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stderr=log)
    records = directory / "state" / "records"
    try:
        while not list(records.glob("*.jsonl")) or not any(f.stat().st_size for f in records.glob("*.jsonl")):
            if process.poll() is not None or time.perf_counter() - started > 60:
                raise RuntimeError((directory / "log").read_text())
            time.sleep(0.005)
        yield process, time.perf_counter() - started
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def _pods(node: ScratchNode, pods: int, containers: int) -> None:
    for inner in ("kubepods", "kubepods/burstable", "kubepods/besteffort"):
        node.make_inner(inner)
    for i in range(pods):
        pod = f"kubepods/burstable/pod{i:08d}-0000-0000-0000-000000000000"
        node.make_inner(pod)
        for c in range(containers):
            node.make(f"{pod}/c{c}")


def _measure(node: ScratchNode, jit: str, seconds: float) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        with _agent(node, jit, directory):
            pass  # fills the compiled cache
        with _agent(node, jit, directory) as (process, first_tick):
            time.sleep(3)
            before, started = cpu_seconds(process.pid), time.perf_counter()
            time.sleep(seconds)
            cpu = (cpu_seconds(process.pid) - before) / (time.perf_counter() - started)
            rss = memory_mib(process.pid)
            records = sum(f.stat().st_size for f in (directory / "state" / "records").iterdir())
            connection = Connection(directory / "run" / "agent.sock")
            tick = connection.ask(op="explain")["tick_seconds"]
            connection.close()
    return {
        "cpu_ms": 1e3 * cpu,
        "rss_mib": rss,
        "first_tick": first_tick,
        "tick_ms": 1e3 * tick,
        "record_bytes": float(records),
    }


async def _unchanged_ticks(port: KernelPort, node: ScratchNode, directory: Path, ticks: int = 40) -> float:
    """Milliseconds of CPU that journal and verification take of a tick in which nothing changes.

    Beside the 330 containers there are 20 groups of batch governed in place, which is what is journaled, and 20 jobs.
    """
    for i in range(20):
        node.make_inner("nightly")
        node.make(f"nightly/{i}")
    batch = (BatchPolicy(name="nightly", selector=Selector(cgroup="/nightly/*")),)
    policy = ColocationPolicy(spec=PolicySpec(node_root=node.path, batch=batch))
    agent = Agent(port, policy, reference, Journal(directory, boot_id()))
    agent.open()
    for i in range(20):
        agent.tier.ensure_job(f"job-{i}")
    spent = 0.0
    drifts, apply = agent.writer.drifts, agent.writer.apply

    def timed_drifts(*arguments: Any, **named: Any) -> list[Drift]:
        nonlocal spent
        started = time.process_time()
        found = drifts(*arguments, **named)
        spent += time.process_time() - started
        return found

    async def timed_apply(plan: Plan, snapshot: NodeSnapshot, care: Care = NO_CARE) -> list[Outcome]:
        nonlocal spent
        started = time.process_time()
        outcomes = await apply(plan, snapshot, care)
        spent += time.process_time() - started
        return outcomes

    for _ in range(5):
        await agent.tick()
    agent.writer.drifts, agent.writer.apply = timed_drifts, timed_apply  # type: ignore[method-assign]
    for _ in range(ticks):
        await agent.tick()
        await asyncio.sleep(0.02)
    await agent.close()
    return 1e3 * spent / ticks


async def _tick_cpu(port: KernelPort, node: ScratchNode, directory: Path, ticks: int = 20) -> float:
    """Milliseconds of CPU of the median tick, one a second, records included."""
    policy = ColocationPolicy(spec=PolicySpec(node_root=node.path))
    recorder = Recorder(directory / "records", policy.spec.records, "none")
    kernels = load_kernels(default_state_dir())
    agent = Agent(port, policy, kernels, Journal(directory, boot_id()), recorder=recorder)
    agent.open()
    spent = []
    for _ in range(ticks):
        started = time.process_time()
        await agent.tick()
        spent.append(time.process_time() - started)
        await asyncio.sleep(policy.spec.tick)
    await agent.close()
    return 1e3 * sorted(spent)[ticks // 2]


def run(full: bool) -> list[str]:
    """Run what is missing; the summary."""
    runs, port = Runs("agent"), KernelPort()
    sweep(port)
    with ScratchNode(port, "bench") as node:
        _pods(node, 110, 3)
        for round_ in range(ROUNDS):
            for jit in MODES if round_ % 2 == 0 else MODES[::-1]:
                if not runs.has(kind="330 containers", jit=jit, round=round_):
                    found = _measure(node, jit, SECONDS)
                    runs.add(kind="330 containers", jit=jit, round=round_, reference=reference_loop(), **found)
            if not runs.has(kind="journal and verify", round=round_):
                with tempfile.TemporaryDirectory() as name:
                    found_ms = asyncio.run(_unchanged_ticks(port, node, Path(name)))
                runs.add(kind="journal and verify", round=round_, reference=reference_loop(), verify_ms=found_ms)
            if not runs.has(kind="tick", round=round_):
                with tempfile.TemporaryDirectory() as name:
                    found_ms = asyncio.run(_tick_cpu(port, node, Path(name)))
                runs.add(kind="tick", round=round_, reference=reference_loop(), tick_cpu_ms=found_ms)
    count = 10_000 if full else 2_000
    if not runs.has(kind=f"{count} cgroups"):
        with ScratchNode(port, "bench") as node:
            _pods(node, count // 4, 3)
            found = _measure(node, "on", 10)
            runs.add(kind=f"{count} cgroups", jit="on", round=0, reference=reference_loop(), **found)
    return summary(runs, count)


def _worst(runs: Runs, field: str, **key: object) -> float:
    return float(max(r[field] for r in runs.runs if all(r.get(k) == v for k, v in key.items())))


def summary(runs: Runs, count: int) -> list[str]:
    """Each figure is the worst of all rounds, against its bar."""
    lines = []
    kind = "330 containers"
    for jit in MODES:
        name = "numba" if jit == "on" else "lean"
        cpu, rss = _worst(runs, "cpu_ms", kind=kind, jit=jit), _worst(runs, "rss_mib", kind=kind, jit=jit)
        first = _worst(runs, "first_tick", kind=kind, jit=jit)
        bound = BARS[f"rss_{jit}"]
        lines.append(bar(f"agent, {name}: CPU a second", _judge(cpu, BARS["cpu_ms"]), cpu, BARS["cpu_ms"], "ms"))
        lines.append(bar(f"agent, {name}: resident memory", _judge(rss, bound), rss, bound, "MiB"))
        judged = _judge(first, BARS["first_tick"])
        lines.append(bar(f"agent, {name}: start to first tick", judged, first, BARS["first_tick"], "s"))
    tick = _worst(runs, "tick_cpu_ms", kind="tick")
    bound = BARS["tick_cpu_ms"]
    lines.append(bar("agent, numba: CPU of the median tick", _judge(tick, bound), tick, bound, "ms"))
    verify = _worst(runs, "verify_ms", kind="journal and verify")
    name = "agent: journal and verify in a tick without changes"
    lines.append(bar(name, _judge(verify, BARS["verify_ms"]), verify, BARS["verify_ms"], "ms"))
    many = next(r for r in runs.runs if r.get("kind") == f"{count} cgroups")
    lines.append(f"reported  agent, {count} cgroups: {many['cpu_ms']:.0f} ms CPU a second, {many['rss_mib']:.0f} MiB")
    return lines


def _judge(value: float, bound: float) -> str:
    return "pass" if value <= bound else "fail"
