"""A day of a node's life in minutes: what an agent holds after an hour it holds after a day, and pods leave nothing.

The agent, its records, journal and model on this machine's own cgroups, by a clock that goes on by a second with each
tick. Each minute a service pod or a BestEffort pod comes and the oldest goes; every ten minutes a batch pod.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from benchmarks.common import Runs, at_most, reference_loop
from colocate.actuate.journal import Journal, boot_id
from colocate.actuate.scratch import ScratchNode, remove_tree, sweep
from colocate.actuate.statedir import StateDirectory
from colocate.agent.loop import Agent
from colocate.agent.numba_cache import load_kernels
from colocate.cgroup.port import KernelPort
from colocate.cgroup.tree import joined
from colocate.policy.schema import ColocationPolicy, PolicySpec
from colocate.report.record import Recorder

TICKS_AN_HOUR, POD_EVERY, BATCH_EVERY = 3600, 60, 600
PODS = {"burstable": 8, "besteffort": 4, "batch": 3}
"""How many of each class live at a time."""
GROWTH_MIB, MORE = 3.0, 0
"""The bars: resident memory, and descriptors or cgroups, more than at the end of `SETTLED_HOURS`."""
SETTLED_HOURS = 4
"""By then the first segment of records has been compressed, whose buffers stay."""


class Clock:
    """Real time at first; a second more with each tick."""

    def __init__(self) -> None:
        self._wall, self._monotonic = time.time(), time.monotonic()

    def time(self) -> float:
        return self._wall

    def monotonic(self) -> float:
        return self._monotonic

    def go_on(self, seconds: float) -> None:
        self._wall += seconds
        self._monotonic += seconds


class Pods:
    """Those of the node, each with a process that sleeps."""

    def __init__(self, port: KernelPort, node: ScratchNode) -> None:
        self._port, self._node = port, node
        self._alive: dict[str, list[tuple[str, subprocess.Popen[bytes]]]] = {of: [] for of in PODS}
        self._numbers = itertools.count()

    def come(self, of: str) -> None:
        number = next(self._numbers)
        pod = f"kubepods/{of}/pod{number:08x}-0000-4000-8000-{random.getrandbits(48):012x}"
        self._node.make_inner(pod)
        path = self._node.make(f"{pod}/{number:064x}")
        process = subprocess.Popen(["sleep", "86400"], stdin=subprocess.DEVNULL)
        self._node.enter(process.pid, path)
        self._alive[of].append((joined(self._node.path, pod), process))
        if len(self._alive[of]) > PODS[of]:
            self._end(*self._alive[of].pop(0))

    def _end(self, path: str, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()
        remove_tree(self._port, path)

    def end(self) -> None:
        for alive in self._alive.values():
            while alive:
                self._end(*alive.pop())


def _held(node: str, state: Path) -> dict[str, float]:
    port = KernelPort()
    status = Path("/proc/self/status").read_text()
    cgroups = sum(len(dirs) for mount in port.layout.mounts.values() for _, dirs, _ in os.walk(mount + node))
    port.close()
    return {
        "rss_mib": int(status.partition("VmRSS:")[2].split()[0]) / 1024,
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": int(status.partition("Threads:")[2].split()[0]),
        "cgroups": cgroups,
        "journal_bytes": sum(f.stat().st_size for f in state.glob("journal*")),
        "records_bytes": sum(f.stat().st_size for f in state.rglob("*") if f.is_file() and "records" in f.parts),
    }


async def live(hours: int, directory: Path) -> list[dict[str, float]]:
    """What was held before the agent's start, at the end of each hour, and after its orderly end.

    Needs a process of its own.
    """
    port, clock = KernelPort(), Clock()
    hourly: list[dict[str, float]] = []
    sweep(port)
    with ScratchNode(port, "bench") as node:
        for inner in ("kubepods", *(f"kubepods/{of}" for of in PODS if of != "batch")):
            node.make_inner(inner)
        state = StateDirectory(directory)
        spec = PolicySpec(node_root=node.path, tick=1.0, calibrate=False)
        hourly.append(_held(node.path, state.path))
        agent = Agent(
            port,
            ColocationPolicy(spec=spec),
            load_kernels(state.path),
            Journal(state.path, boot_id()),
            state=state,
            recorder=Recorder(state.path / "records", spec.records, "numba", threaded=True),
            clock=clock,
        )
        agent.tier.holds_pods = True
        agent.open()
        pods = Pods(port, node)
        try:
            for of, count in PODS.items():
                for _ in range(count):
                    pods.come(of)
            for tick in range(1, hours * TICKS_AN_HOUR + 1):
                if tick % POD_EVERY == 0:
                    pods.come(("burstable", "besteffort")[tick // POD_EVERY % 2])
                if tick % BATCH_EVERY == 0:
                    pods.come("batch")
                await agent.tick()
                clock.go_on(spec.tick)
                if tick % TICKS_AN_HOUR == 0:
                    hourly.append(_held(node.path, state.path))
        finally:
            pods.end()
            await agent.close()
        hourly.append(_held(node.path, state.path))
    return hourly


def in_a_process(hours: int) -> list[dict[str, float]]:
    """`live` in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="colocate-bench-") as directory:
        command = [sys.executable, "-m", "benchmarks.life", str(hours), directory]
        ran = subprocess.run(command, capture_output=True, check=False)
    if ran.returncode:
        raise RuntimeError(ran.stderr.decode(errors="replace")[-4000:])
    return msgspec.json.decode(ran.stdout, type=list[dict[str, float]])


def growth(hourly: list[dict[str, float]]) -> dict[str, float]:
    """By how much what is held at the end of the last hour exceeds that after `SETTLED_HOURS`, or one hour before."""
    first, last = hourly[min(SETTLED_HOURS, len(hourly) - 3)], hourly[-2]
    return {name: last[name] - first[name] for name in first}


def run(_full: bool) -> list[str]:
    """Measure what is missing; the bars."""
    runs = Runs("life")
    if not runs.has(run=0):
        started, reference = time.perf_counter(), reference_loop()
        hourly = in_a_process(24)
        runs.add(run=0, reference_seconds=reference, seconds=time.perf_counter() - started, hourly=hourly)
    (found,) = [r for r in runs.runs if "run" in r]
    hourly = found["hourly"]
    more = growth(hourly)

    end = hourly[-2]
    rest = (
        f"          at its end {end['rss_mib']:.0f} MiB, journal {end['journal_bytes'] / 1024:.0f} KiB, "
        f"records {end['records_bytes'] / (1 << 20):.0f} MiB; the day took {found['seconds']:.0f} s"
    )
    return [
        at_most("a day: resident memory grown since its fourth hour", more["rss_mib"], GROWTH_MIB, "MiB"),
        at_most("a day: descriptors more", more["descriptors"], MORE, ""),
        at_most("a day: cgroups more", more["cgroups"], MORE, ""),
        at_most("a day: cgroups left at its end", hourly[-1]["cgroups"] - hourly[0]["cgroups"], MORE, ""),
        rest,
    ]


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        told = asyncio.run(live(int(sys.argv[1]), Path(sys.argv[2])))
        sys.stdout.buffer.write(msgspec.json.encode(told))
