"""Power caps on simulated cards: how long a start waits for its cap, a cut for all of them, and what reading costs.

start: from the agent's wish to a limit that is in force and read back, with the journal on this machine's disk: what a
container's start waits for. cut: eight cards at their greatest limit, and the plan of a budget of a third; from then to
the last that is in force. read: the NVML worker's CPU time while eight cards are read once a second. The simulated
driver looks at its settings every five milliseconds at most while it works; a real one's answers are not in these.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Runs, at_most, cpu_seconds, reference_loop
from colocate.actuate.caps import Caps
from colocate.actuate.driver import Driver
from colocate.actuate.journal import Journal, boot_id
from colocate.cgroup.port import KernelPort
from colocate.fakecard.shared import LIBRARY, attach
from colocate.observe.nvml import Worker
from colocate.plan import GpuTarget, Plan, PowerCap
from colocate.snapshot import NodeSnapshot

CARDS, ROUNDS, STARTS, READ_SECONDS = 8, 5, 40, 20
FOUND = 300.0
MINE = "/"
"""A cgroup that is occupied on every machine."""
NODE = NodeSnapshot(
    sequence=1, time_seconds=1.0, monotonic_seconds=1.0, cgroup_version=2, cpus=(0,), cores=((0,),), memory_bytes=1
)
BARS = {"start": 0.030, "cut": 1.0, "read": 0.003}
"""Seconds at p99, seconds, seconds of CPU a second."""


@contextmanager
def _cards() -> Iterator[tuple[Path, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-P", "-m", "colocate.fakecard.daemon", folder, "--cards", str(CARDS)]
        daemon = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert daemon.stdout is not None
        assert daemon.stdout.readline() == "ready\n"
        try:
            yield Path(folder), attach(Path(folder))
        finally:
            daemon.communicate(timeout=30)  # its standard input closes


def _plan(uuids: list[str], watts: float | None) -> Plan:
    caps = [PowerCap(target=GpuTarget(u), watts=watts, workload="a", path=MINE) for u in uuids]
    return Plan(sequence=1, caps=tuple(caps), power_budget=True)


async def _until(caps: Caps, state: Any, uuids: list[str], watts: float | None) -> float:
    """From a plan for all cards to the last limit in force, seconds; None is what was found."""
    wanted = round(1000 * (FOUND if watts is None else watts))
    began = time.perf_counter()
    while any(state.devices[i].power_enforced_mw != wanted for i in range(CARDS)):
        caps.act(_plan(uuids, watts), NODE)
        await asyncio.sleep(0.001)
    seconds = time.perf_counter() - began
    while caps.limits() if watts is None else len(caps.limits()) < len(uuids):
        await asyncio.sleep(0.001)
    return seconds


async def _start(caps: Caps, state: Any, uuid: str) -> float:
    """A cap for a start, and its end; seconds of the first."""
    began = time.perf_counter()
    caps.set_now(uuid, 180.0, MINE, time.monotonic() + 5.0)
    seconds = time.perf_counter() - began
    await _until(caps, state, [uuid], None)
    return seconds


async def _writes(caps: Caps, state: Any, uuids: list[str]) -> tuple[list[float], float]:
    starts = [await _start(caps, state, uuids[i % CARDS]) for i in range(STARTS + 1)][1:]  # the first starts the worker
    cut = await _until(caps, state, uuids, FOUND / 3)
    await _until(caps, state, uuids, None)
    return starts, cut


def _read(folder: Path) -> float:
    """CPU seconds a second of the worker that reads."""
    worker = Worker(str(folder / LIBRARY))
    worker.ask(ask="read")
    before, began = cpu_seconds(worker.pid), time.monotonic()
    for _ in range(READ_SECONDS):
        time.sleep(1.0)
        worker.ask(ask="read")
    used = (cpu_seconds(worker.pid) - before) / (time.monotonic() - began)
    worker.end()
    return used


def measure(runs: Runs) -> None:
    """The rounds that are missing."""
    for index in range(ROUNDS):
        if runs.has(round=index):
            continue
        with _cards() as (folder, state), tempfile.TemporaryDirectory() as disk:
            uuids = [state.devices[i].uuid.decode() for i in range(CARDS)]
            driver = Driver(str(folder / LIBRARY))
            journal = Journal(Path(disk), boot_id())
            caps = Caps(KernelPort(), journal, driver)
            before = reference_loop()
            starts, cut = asyncio.run(_writes(caps, state, uuids))
            read = _read(folder)
            driver.close()
            journal.close()
        reference = {"reference": round(before, 5), "reference_after": round(reference_loop(), 5)}
        rounded = [round(s, 6) for s in starts]
        runs.add(round=index, starts=rounded, cut=round(cut, 6), read=round(read, 6), **reference)


def run(_full: bool) -> list[str]:
    """Measure what is missing, and judge."""
    runs = Runs("power")
    measure(runs)
    rounds = [r for r in runs.runs if "round" in r]
    starts = np.array([s for r in rounds for s in r["starts"]])
    worst_cut, read = max(r["cut"] for r in rounds), max(r["read"] for r in rounds)
    p50, p99 = np.quantile(starts, [0.5, 0.99])
    return [
        at_most("power, a start waits for its cap, p99", float(p99), BARS["start"], "s"),
        f"          p50 {p50:.4f} s of {len(starts)}",
        at_most("power, a cut of eight cards is in force, the worst of the rounds", worst_cut, BARS["cut"], "s"),
        at_most("power, CPU a second to read eight cards, the worst of the rounds", read, BARS["read"], "cores"),
    ]
