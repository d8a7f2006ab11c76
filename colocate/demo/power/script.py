"""The demonstration of power: gangs under a budget, a sweep, a cut, a crash; real agent and jobs, simulated cards.

The gangs are asked of the solver that the controller has (`colocate what-if`). Those that start run as jobs on this
machine: four cards, two for each gang, of which one feels a cap and the other hardly does. Everything is done by the
commands that an operator has; the agent is killed in the end while the jobs run.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from colocate.actuate.scratch import ScratchNode, sweep
from colocate.calibrate.measure import machine_facts
from colocate.cgroup.port import KernelPort
from colocate.cgroup.tree import joined, processes_anywhere
from colocate.demo.digest import compare, taken
from colocate.demo.power.package import IDLE_WATTS, Package, UsedIn
from colocate.demo.power.result import Cut, PowerResult
from colocate.demo.process import Process
from colocate.demo.script import sweep_files
from colocate.errors import ColocateError, HostUnfit
from colocate.fakecard.power import CURVES, slowdown
from colocate.fakecard.shared import LIBRARY, attach

FILES = "colocate-power-"
SESSION, CARD = "session", "card"
GREATEST = 300
GANGS = {"bert": (0, 1), "ncf": (2, 3)}
"""Gang -> the cards of its members; each is a class of jobs that feel a cap alike."""
NODES, NODE_WATTS, CLUSTER_WATTS = 3, 600, 1300
BUDGET, CUT_TO = 1200, 840
CPU_LEFT, CPU_SECONDS, CPU_SETTLES_SECONDS = 0.6, 3.0, 24.0
"""Of what batch draws beyond idle so much is left; how long the meter is read, and what batch may take to give way."""
SLOWDOWN, CAPS, CHOSEN_REPEATS = 0.15, "120:300:45", 2
WAIT_SECONDS, LOOK_SECONDS, SAMPLES = 30.0, 0.005, 400
WORK = """
import sys
from colocate.fakecard.client import Device
device = Device(sys.argv[1], int(sys.argv[2]), kind="bert")
for _ in range(6):
    device.launch(50, 5e6)
    device.sync()
"""
MEMBER = """
import sys
from colocate.fakecard.client import Device
device = Device(sys.argv[1], int(sys.argv[2]), kind=sys.argv[3])
while True:
    device.launch(10, 5e6)
    device.sync()
"""
Progress = Callable[[str, float], None]


class PowerDemo:
    """One run of it."""

    def __init__(self, port: KernelPort, progress: Progress) -> None:
        self._port, self._progress, self._result = port, progress, PowerResult()
        self._folder: Path
        self._node: ScratchNode
        self._state: Any = None
        self._package: Package

    async def run(self) -> PowerResult:
        """All of it. Raises PermissionMissing, HostUnfit, ColocateError."""
        began = time.monotonic()
        sweep(self._port)
        sweep_files(Path(tempfile.gettempdir()), FILES)
        before = await taken(self._port.layout.mounts)
        with tempfile.TemporaryDirectory(prefix=f"{FILES}{os.getpid()}-") as directory:
            self._folder = Path(directory)
            with ScratchNode(self._port, "demo") as self._node:
                for leaf in (SESSION, CARD):
                    self._node.make(leaf)
                cards = await self._start(CARD, "-m", "colocate.fakecard.daemon", directory, "--cards", "4")
                try:
                    if await cards.line() != "ready":
                        raise HostUnfit("the simulated cards did not start; the error is above", "install gcc")
                    self._state = attach(self._folder)
                    self._package = Package(self._folder / "powercap", UsedIn(self._port, self._tier))
                    try:
                        await self._play()
                    finally:
                        self._package.close()
                finally:
                    await cards.end()
        changes = compare(before, await taken(self._port.layout.mounts))
        self._result.changes, self._result.host_unchanged = changes, not changes
        self._result.machine, self._result.seconds = machine_facts(self._port), round(time.monotonic() - began, 1)
        return self._result

    async def _play(self) -> None:
        self._progress("gangs under a budget of the cluster", 0.0)
        starting = await self._gangs()
        self._write_policy(BUDGET)
        agent = await self._start(SESSION, "-m", "colocate.cli.main", "agent", "--config", str(self._policy))
        jobs: list[Process] = []
        try:
            await self._until(self._answers, "the agent knows its cards")
            await self._sweep()
            self._progress("the gangs that start, at their caps", 0.6)
            jobs = [await self._member(gang, card) for gang in starting for card in GANGS[gang]]
            await self._until(lambda: self._there(len(jobs)), "the jobs run")
            self._progress("the budget of the node is cut", 0.7)
            await self._cut()
            self._progress("the budget of the CPUs", 0.78)
            await self._cpus()
            self._progress("the agent is killed", 0.85)
            held = self._limits()
            agent.process.send_signal(signal.SIGKILL)
            await agent.process.wait()
            await asyncio.sleep(1.5)
            self._result.kept_without_agent = self._limits() == held
            self._progress("the jobs end", 0.9)
            for pid in processes_anywhere(self._port, self._tier):
                self._port.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ColocateError):
                await self._until(lambda: self._limits() == [GREATEST] * 4, "the limits that were found are back")
            self._result.restored = self._limits() == [GREATEST] * 4
        finally:
            for process in (*jobs, agent):
                await process.end(signal.SIGTERM)
            await self._until(lambda: not self._tier_is_there(), "the guardian has undone the rest")

    # its parts

    async def _gangs(self) -> list[str]:
        """Ask the solver for three gangs where there are watts for two; those that start."""
        nodes = [
            {
                "metadata": {"name": f"n{i}", "labels": {"kubernetes.io/hostname": f"n{i}"}},
                "spec": {},
                "status": {
                    "allocatable": {"pods": "110", "cpu": "16", "memory": "64Gi", "colocate.io/power": str(NODE_WATTS)},
                    "conditions": [{"type": "Ready", "status": "True"}],
                },
            }
            for i in range(NODES)
        ]
        budget = {"name": "cluster", "resource": "colocate.io/power", "amount": CLUSTER_WATTS}
        snapshot = {
            "taken": "2026-01-01T00:00:00Z", "kind": "ClusterSnapshot", "version": 2,
            "settings": {"schedulers": ["colocate"]}, "nodes": nodes, "nodeBudgets": [budget],
        }  # fmt: skip
        asked = {"requests": {"colocate.io/power": str(GREATEST)}, "limits": {"colocate.io/power": str(GREATEST)}}
        manifests: list[dict[str, Any]] = []
        for gang in (*GANGS, "other"):
            group = {"apiVersion": "scheduling.x-k8s.io/v1alpha1", "kind": "PodGroup", "metadata": {"name": gang}}
            manifests.append({**group, "spec": {"minMember": 2}})
            for i in range(2):
                meta = {"name": f"{gang}-{i}", "labels": {"scheduling.x-k8s.io/pod-group": gang}}
                spec = {"schedulerName": "colocate", "containers": [{"name": "c", "image": "i", "resources": asked}]}
                manifests.append({"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec})
        (self._folder / "cluster.json").write_text(json.dumps(snapshot))
        (self._folder / "gangs.yaml").write_text(yaml.safe_dump_all(manifests))
        files = ("-f", str(self._folder / "gangs.yaml"), "--snapshot", str(self._folder / "cluster.json"))
        verdicts = json.loads(await self._command("what-if", *files, "-o", "json", codes=(0, 1)))
        starting = [v["gang"].partition("/")[2] for v in verdicts if v["outcome"] == "Start"]
        waiting = {v["gang"].partition("/")[2]: v.get("message", "") for v in verdicts if v["outcome"] != "Start"}
        self._result.gangs_started, self._result.gangs_waiting = len(starting), waiting
        return [gang for gang in starting if gang in GANGS]

    async def _sweep(self) -> None:
        """A sweep, the cap that it recommends, and what that cap does."""
        self._progress("a sweep of caps", 0.1)
        said = await self._run_sweep("sweep.csv", CAPS, "--slowdown", str(SLOWDOWN))
        self._result.sweep = sorted(_runs(self._folder / "sweep.csv"))
        self._result.asked_slowdown = SLOWDOWN
        self._result.recommended_cap_watts = said["recommended_cap_watts"]
        self._result.predicted_slowdown = said["predicted_slowdown"]
        self._result.energy_saved_ratio = said["energy_saved_ratio"]
        self._progress("the cap that it recommends", 0.45)
        chosen = round(said["recommended_cap_watts"])
        if chosen < GREATEST:
            await self._run_sweep("chosen.csv", f"{chosen},{GREATEST}", "--repeats", str(CHOSEN_REPEATS))
            runs = _runs(self._folder / "chosen.csv")
            under, full = (_mean([s for cap, s, _ in runs if cap == wanted]) for wanted in (chosen, GREATEST))
            self._result.measured_slowdown = under / full - 1.0

    async def _run_sweep(self, file: str, caps: str, *options: str) -> Any:
        path, library = str(self._folder / file), str(self._folder / LIBRARY)
        command = ["power", "sweep", "--caps", caps, "--file", path, "--nvml-library", library, *options, "-o", "json"]
        work = ["--", sys.executable, "-P", "-c", WORK, str(self._folder), "0"]
        return json.loads(await self._command(*command, *work, visible=0, codes=(0, 1)))

    async def _member(self, gang: str, card: int) -> Process:
        command = ["run", "--name", f"{gang}-{card}", "--power-cap", str(GREATEST), "--power-class", gang, "--"]
        work = [sys.executable, "-P", "-c", MEMBER, str(self._folder), str(card), gang]
        return await self._start(SESSION, "-m", "colocate.cli.main", *command, *work, visible=card)

    async def _cut(self) -> None:
        self._result.budget_watts, self._result.cut_to_watts = BUDGET, CUT_TO
        self._write_policy(CUT_TO)
        await self._until(lambda: sum(self._limits()) <= CUT_TO, "the caps are lowered")
        for _ in range(SAMPLES):
            self._result.samples += 1
            self._result.budget_exceeded_samples += sum(self._limits()) > CUT_TO
            await asyncio.sleep(LOOK_SECONDS)
        limits = self._limits()
        self._result.cuts = [
            Cut(job=f"{gang}-{card}", asked_watts=GREATEST, cap_watts=limits[card])
            for gang, cards in GANGS.items()
            for card in cards
        ]
        told = json.loads(await self._command("power", "budget", "-o", "json"))
        self._result.worst_slowdown = (told["node"] or {}).get("numbers", {}).get("worst_slowdown", 0.0)
        alike = CUT_TO / 4 / GREATEST
        self._result.equal_slowdown = max(slowdown(CURVES[gang], alike) for gang in GANGS)

    async def _cpus(self) -> None:
        """A job that takes every CPU, and a budget of the package that it is held to by bandwidth."""
        spins = " ".join(["while :; do :; done &"] * (os.cpu_count() or 1)) + " wait"
        command = ["run", "--name", "spin", "--", "sh", "-c", spins]
        spinner = await self._start(SESSION, "-m", "colocate.cli.main", *command)
        try:
            await self._until(lambda: bool(processes_anywhere(self._port, joined(self._tier, "spin"))), "it spins")
            self._result.cpu_watts = await self._drawn()
            self._result.cpu_budget_watts = round(IDLE_WATTS + CPU_LEFT * (self._result.cpu_watts - IDLE_WATTS))
            self._write_policy(CUT_TO, self._result.cpu_budget_watts)
            await asyncio.sleep(CPU_SETTLES_SECONDS)
            self._result.cpu_watts_within = await self._drawn()
        finally:
            for pid in processes_anywhere(self._port, joined(self._tier, "spin")):
                self._port.kill(pid, signal.SIGKILL)
            await spinner.end(signal.SIGTERM)

    async def _drawn(self) -> float:
        """Watts of the package from now on."""
        before, began = self._package.joules, time.monotonic()
        await asyncio.sleep(CPU_SECONDS)
        return round((self._package.joules - before) / (time.monotonic() - began), 2)

    # what it is done with

    def _write_policy(self, budget: int, cpu_budget: int = 0) -> None:
        models = [
            {"name": n, "points": [{"watts": round(share * GREATEST), "slowdown": s} for share, s in CURVES[n]]}
            for n in GANGS
        ]
        power = {
            "budget": budget,
            "models": models,
            "cpuBudget": cpu_budget,
            "powercap": str(self._folder / "powercap"),
        }
        spec = {
            "nodeRoot": self._node.path, "tick": "250ms", "calibrate": False, "http": {"enabled": False},
            "gpu": {"nvmlLibrary": str(self._folder / LIBRARY)}, "power": power,
        }  # fmt: skip
        policy = {"apiVersion": "colocate.io/v1alpha1", "kind": "ColocationPolicy", "metadata": {"name": "demo"}}
        self._policy.write_text(yaml.safe_dump({**policy, "spec": spec}))

    @property
    def _policy(self) -> Path:
        return self._folder / "policy.yaml"

    @property
    def _tier(self) -> str:
        return joined(self._node.path, "colocate-batch")

    def _tier_is_there(self) -> bool:
        return any(self._port.inode(h, self._tier) is not None for h in self._port.layout.mounts)

    def _limits(self) -> list[int]:
        """Watts in force on each card."""
        return [self._state.devices[i].power_enforced_mw // 1000 for i in range(4)]

    def _there(self, jobs: int) -> bool:
        return bool(sum(self._state.devices[i].process_count for i in range(4)) == jobs)

    def _environment(self, visible: int | None) -> dict[str, str]:
        folders = {name: str(self._folder / name.lower()) for name in ("COLOCATE_STATE_DIR", "COLOCATE_RUNTIME_DIR")}
        shown = "" if visible is None else self._state.devices[visible].uuid.decode()
        return {**folders, "COLOCATE_JIT": "off", **({"CUDA_VISIBLE_DEVICES": shown} if shown else {})}

    async def _start(self, group: str, *command: str, visible: int | None = None) -> Process:
        path = joined(self._node.path, group)
        return await Process.start(
            self._node, path, [sys.executable, "-P", *command], self._environment(visible), quiet=group == SESSION
        )

    async def _command(self, *command: str, visible: int | None = None, codes: tuple[int, ...] = (0,)) -> str:
        """What one of our own commands prints. Raises ColocateError."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "colocate.cli.main", *command),
            env={**os.environ, **self._environment(visible)},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, said = await process.communicate()
        if process.returncode not in codes or not out:
            raise ColocateError(f"colocate {' '.join(command[:3])} ended with {process.returncode}: {said.decode()}")
        return out.decode()

    def _answers(self) -> bool:
        socket = Path(self._environment(None)["COLOCATE_RUNTIME_DIR"]) / "agent.sock"
        return socket.exists()

    async def _until(self, reached: Callable[[], bool], what: str) -> None:
        """Raises ColocateError where that is not so in time."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not reached():
            if time.monotonic() >= deadline:
                raise ColocateError(f"the demonstration waited {WAIT_SECONDS:g} s in vain: {what}")
            await asyncio.sleep(0.05)


def _runs(file: Path) -> list[tuple[int, float, float]]:
    lines = [line.split(",") for line in file.read_text().splitlines()[1:]]
    return [(int(cap), float(seconds), float(watts)) for cap, seconds, watts in lines]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
