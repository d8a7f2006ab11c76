"""The demonstration of the law of the cards: the real agent, real processes, a real freeze; simulated cards.

Two cards, each with a service. Card 0 answers short requests one after the other, card 1 long ones, several at once.
They run beside batch that nobody governs (stock time slicing), alone while the agent gets to know them, and beside
batch in the tier; at last a job comes to card 0 that never waits for the card, and is refused with its numbers.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec

from colocate.actuate.journal import Journal, boot_id
from colocate.actuate.scratch import ScratchNode, sweep
from colocate.actuate.statedir import StateDirectory
from colocate.agent.loop import Agent, Tick
from colocate.agent.socket import JobServer
from colocate.calibrate.measure import machine_facts
from colocate.calibration import Calibration
from colocate.cgroup.knobfiles import write_knob
from colocate.cgroup.port import KernelPort
from colocate.cgroup.tree import inodes_of, joined
from colocate.demo.digest import compare, taken
from colocate.demo.gpu.result import Arm, GpuResult, sum_up
from colocate.demo.gpu.service import GAUGES, METRIC, bucket_at
from colocate.demo.gpu.where import RealCard, SimulatedCards, Where, of
from colocate.demo.load import Sample
from colocate.demo.process import Process
from colocate.demo.result import Event, summarize
from colocate.demo.script import serving, sweep_files
from colocate.errors import HostUnfit
from colocate.model.kernels import Kernels
from colocate.plan import Verdict
from colocate.policy.schema import (
    ColocationPolicy,
    GpuPolicy,
    HttpPolicy,
    Metadata,
    PolicySpec,
    Selector,
    ServiceLevelObjective,
    ServicePolicy,
)

FILES = "colocate-gpu-"
SESSION, CARD, CLIENT = "session", "card", "client"
LOOK_SECONDS = 0.2
LEARN_SECONDS = 60.0
"""At most so long the law has to find its mode, before an arm begins all the same."""
READY_SECONDS = 20.0
SETTLE_SECONDS = 3.0


class Role(msgspec.Struct, frozen=True):
    """One card's service and the batch beside it."""

    kind: str
    per_second: float
    target_seconds: float
    batch: tuple[str, ...]


ROLES = {
    "vision": Role("vision", 12.0, bucket_at(0.1), ("blocking", "--kernel-ms", "4")),
    "language": Role("language", 2.0, bucket_at(0.85), ("blocking", "--kernel-ms", "2")),
}
REFUSED = ("async",)
"""Never waits for the card: a thousand kernels of a millisecond are always launched."""


class GpuDemo:
    """One run."""

    def __init__(
        self,
        port: KernelPort,
        seconds: float,
        seed: int,
        progress: Callable[[str, float], None],
        real: RealCard | None = None,
    ) -> None:
        """`real`: run on this card, and with the service of short requests alone."""
        self._port, self._seconds, self._seed, self._progress, self._real = port, seconds, seed, progress, real
        self._roles = ROLES if real is None else {"vision": ROLES["vision"]}
        self._result = GpuResult()
        self._services: dict[str, Process] = {}
        self._urls: dict[str, str] = {}
        self._verdicts: dict[int, Verdict] = {}
        self._began = time.monotonic()
        self._node: ScratchNode
        self._folder: Path

    async def run(self, kernels: Kernels) -> GpuResult:
        """All arms. Raises PermissionMissing, HostUnfit."""
        self._kernels = kernels
        sweep(self._port)
        sweep_files(Path(tempfile.gettempdir()), FILES)
        before = await taken(self._port.layout.mounts)
        with tempfile.TemporaryDirectory(prefix=f"{FILES}{os.getpid()}-") as directory:
            self._folder = Path(directory)
            with ScratchNode(self._port, "demo") as self._node:
                self._make_groups()
                self._where: Where = self._real or SimulatedCards(self._folder, len(self._roles))
                self._environment = {}
                if self._real is not None and self._where.library:  # CUDA's library is beside NVML's
                    self._environment["LD_LIBRARY_PATH"] = str(Path(self._where.library).parent)
                try:
                    await self._where.begin(self._start, CARD)
                    self._result.simulated_card, self._result.cards = self._where.simulated, list(self._where.names)
                    await self._serve()
                    await self._arms()
                finally:
                    for process in self._services.values():
                        await process.end()
                    await self._where.end()
        changes = compare(before, await taken(self._port.layout.mounts))
        self._result.changes, self._result.host_unchanged = changes, not changes
        self._result.machine = machine_facts(self._port)
        return self._result

    def _make_groups(self) -> None:
        for inner in ("kubepods", "kubepods/burstable", "kubepods/besteffort"):
            self._node.make_inner(inner)
        pods = (*(f"kubepods/burstable/pod{name}" for name in self._roles), "kubepods/besteffort/podbatch")
        for leaf in (SESSION, CARD, CLIENT, *pods):
            self._node.make(leaf)
        for group in (CARD, CLIENT):  # neither is a part of what is tried
            path = joined(self._node.path, group)
            write_knob(self._port, path, "cpu.weight", "10000", inodes_of(self._port, path))

    async def _start(self, group: str, *command: str, quiet: bool = False) -> Process:
        path = joined(self._node.path, group)
        program = [sys.executable, "-P", "-m", *command]
        return await Process.start(self._node, path, program, self._environment, quiet=quiet)

    async def _serve(self) -> None:
        for index, (name, role) in enumerate(self._roles.items()):
            service = await self._start(f"kubepods/burstable/pod{name}", *self._where.service(index, role.kind))
            self._services[name] = service
            port = await service.line()
            if not port.isdigit():
                raise HostUnfit("the demonstration's service did not start; its error is above")
            self._urls[name] = f"http://127.0.0.1:{port}"

    async def _arms(self) -> None:
        self._progress("stock time slicing", 0.05)
        batch = [await self._plain(index, role) for index, role in enumerate(self._roles.values())]
        try:
            await self._measure("timeslicing", self._seconds)
        finally:
            for job in batch:
                await job.end()
        async with self._agent() as (agent, server):
            self._progress("without batch", 0.2)
            slowest = min(role.per_second for role in self._roles.values())
            await self._measure("alone", max(2.0 * self._seconds, 1.2 * 100 / slowest))
            jobs = [
                await self._job(server, index, role.batch, name)
                for index, (name, role) in enumerate(self._roles.items())
            ]
            self._progress("the agent gets to know the jobs", 0.5)
            async with self._loads(LEARN_SECONDS):
                wanted = dict(enumerate(["gate", "dial"][: len(self._roles)]))
                await self._until(lambda: self._modes() == wanted, LEARN_SECONDS)
            self._progress("batch governed by colocate", 0.65)
            await self._measure("governed", 2.0 * self._seconds)
            for job in jobs:
                await job.end(signal.SIGTERM)
            self._progress("a job that never waits", 0.9)
            refused = await self._job(server, 0, REFUSED, "refused")
            async with self._loads(LEARN_SECONDS):
                await self._until(lambda: self._reason(0) == "CannotProtect", LEARN_SECONDS)
                first = self._refused()
                await asyncio.sleep(SETTLE_SECONDS)
            self._result.refused = self._refused() or first  # its numbers settle; on a busy machine it may be let run
            await self._measure("off", self._seconds)
            await refused.end(signal.SIGTERM)
            self._result.reaction_p95_ms = self._reaction(agent)
        sum_up(self._result, self._alone_busy)

    async def _plain(self, index: int, role: Role) -> Process:
        """Batch that nobody governs, as kubelet would start it."""
        job = await self._start("kubepods/besteffort/podbatch", *self._where.batch(index, role.batch))
        await job.line()
        return job

    async def _job(self, server: JobServer, index: int, batch: tuple[str, ...], name: str) -> Process:
        program = [sys.executable, "-P", "-m", *self._where.batch(index, batch)]
        run = ["run", "--name", f"{name}-batch", "--socket", str(server.path), "--", *program]
        return await self._start(SESSION, "colocate.cli.main", *run, quiet=True)

    @contextlib.asynccontextmanager
    async def _agent(self) -> AsyncIterator[tuple[Agent, JobServer]]:
        state = StateDirectory(Path(tempfile.mkdtemp(prefix="state-", dir=self._folder)))
        agent = Agent(
            self._port, self._policy(), self._kernels, Journal(state.path, boot_id()), state=state,
            calibration=Calibration(),
        )  # fmt: skip
        agent.open()
        agent.on_tick.append(self._decided)
        async with serving(agent, self._folder / "agent.sock", READY_SECONDS) as server:
            yield agent, server

    def _policy(self) -> ColocationPolicy:
        services = tuple(
            ServicePolicy(
                name=name,
                selector=Selector(cgroup=f"/kubepods/burstable/pod{name}"),
                slo=ServiceLevelObjective(
                    p99=role.target_seconds, url=f"{self._urls[name]}/metrics", metric=METRIC, gauges=GAUGES
                ),
            )
            for name, role in self._roles.items()
        )
        gpu = GpuPolicy(nvml_library=self._where.library)
        spec = PolicySpec(node_root=self._node.path, services=services, gpu=gpu, http=HttpPolicy(enabled=False))
        return ColocationPolicy(metadata=Metadata(name="demo"), spec=spec)

    def _decided(self, tick: Tick) -> None:
        for card in tick.snapshot.cards.values():
            index = self._where.index(card.uuid)
            if index is None:
                continue
            for verdict in tick.plan.verdicts:
                if verdict.law != "gpu" or verdict.subject != card.uuid:
                    continue
                before = self._verdicts.get(index)
                self._verdicts[index] = verdict
                if before is None or (before.reason, before.state) != (verdict.reason, verdict.state):
                    at = round(time.monotonic() - self._began, 1)
                    said = f"card {index}: {verdict.reason} ({verdict.state})"
                    self._result.decisions.append(Event(at, said, verdict.message))

    def _modes(self) -> dict[int, str]:
        return {index: verdict.state for index, verdict in self._verdicts.items()}

    def _reason(self, card: int) -> str:
        return self._verdicts[card].reason if card in self._verdicts else ""

    async def _until(self, reached: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not reached() and time.monotonic() < deadline:
            await asyncio.sleep(0.1)

    @contextlib.asynccontextmanager
    async def _loads(self, seconds: float, samples: dict[str, list[Sample]] | None = None) -> AsyncIterator[None]:
        """Both services are asked, until the block ends; `samples` has their answers if they were asked for so long."""
        loads = {}
        for name, role in self._roles.items():
            options = ["--seconds", str(seconds), "--seed", str(self._seed), "--rate", str(role.per_second), "--steady"]
            loads[name] = await self._start(CLIENT, "colocate.demo.load", *options, self._urls[name])
        await asyncio.sleep(0.8)  # imports are done before the clock starts
        try:
            for load in loads.values():
                await load.say("go")
            yield
            if samples is not None:
                for name, load in loads.items():
                    assert load.process.stdout is not None
                    samples[name] = msgspec.json.decode(await load.process.stdout.read(), type=list[Sample])
        finally:
            for load in loads.values():
                await load.end()

    async def _measure(self, arm: str, seconds: float) -> None:
        samples: dict[str, list[Sample]] = {}
        self._where.look()
        busy = self._where.busy
        before = {i: of(busy, i, s.process.pid) for i, s in enumerate(self._services.values())}
        own = {i: of(busy, i) for i in before}
        async with self._loads(seconds, samples):
            began = time.monotonic()
            while time.monotonic() - began < seconds:
                await asyncio.sleep(LOOK_SECONDS)
                self._where.look()
            elapsed = time.monotonic() - began
            after = {i: of(busy, i, s.process.pid) for i, s in enumerate(self._services.values())}
        self._result.seconds[arm] = round(elapsed, 1)
        for index, (name, role) in enumerate(self._roles.items()):
            found, detail = summarize(samples[name], seconds)
            share = (after[index] - before[index]) / elapsed
            total = of(busy, index) - own[index]
            shown = arm if arm != "governed" else "gate" if name == "vision" else "dial"
            if index and shown == "off":
                continue  # nothing of it is on that card
            verdict = self._verdicts.get(index)
            figures = {figure: found[figure] for figure in ("p50_ms", "p99_ms", "requests")} | {
                "service": name,
                "target_ms": round(role.target_seconds * 1e3, 1),
                "batch_share": round(share, 4),
                "verdict": f"{verdict.reason}: {verdict.message}" if verdict and arm in ("governed", "off") else "",
            }
            entry = msgspec.convert(figures, Arm)
            (self._result.beside if index and shown != "dial" else self._result.arms)[shown] = entry
            self._result.details[f"{shown} {name}"] = detail
            if shown == "alone" and not index:
                self._alone_busy = (total - (after[index] - before[index])) / elapsed

    def _refused(self) -> dict[str, Any]:
        verdict = self._verdicts.get(0)
        if verdict is None or verdict.reason != "CannotProtect":
            return {}
        return {"job": "refused-batch", "reason": verdict.reason, "message": verdict.message, **verdict.numbers}

    def _reaction(self, agent: Agent) -> float | None:
        cards = agent.last.snapshot.cards.values() if agent.last is not None else ()
        found = [c.reaction_seconds for c in cards if c.reaction_seconds is not None]
        return round(max(found) * 1e3, 2) if found else None
