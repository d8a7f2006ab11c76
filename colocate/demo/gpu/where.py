"""On which cards the demonstration runs: simulated ones, or a real one that is named by its UUID."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

from colocate.demo.process import Process
from colocate.errors import BadInput, HostUnfit
from colocate.fakecard.shared import LIBRARY, attach
from colocate.observe.nvml import NvmlSilent, Worker

Start = Callable[..., Awaitable[Process]]
READY_SECONDS = 20.0
SAMPLE_SECONDS = 0.2
"""NVML's sampling period (measured: benchmarks/gpu)."""


class Where(Protocol):
    """Cards, whoever is on them, and how long kernels of each process ran."""

    simulated: bool
    names: tuple[str, ...]
    """What each card is, by index."""
    library: str
    """Of NVML, for the agent; empty: the system's."""
    busy: dict[tuple[int, int], float]
    """(card, pid) -> seconds."""

    async def begin(self, start: Start, group: str, /) -> None:
        """Have the cards there. Raises HostUnfit, BadInput."""

    def service(self, card: int, kind: str, /) -> list[str]:
        """The module and arguments of a service on a card."""

    def batch(self, card: int, program: tuple[str, ...], /) -> list[str]:
        """The same of a batch job."""

    def index(self, uuid: str) -> int | None:
        """Which of the cards has this UUID; None: none."""

    def look(self) -> None:
        """Add up what ran since the last look."""

    async def end(self) -> None:
        """Leave nothing."""


def of(busy: dict[tuple[int, int], float], card: int, besides: int = 0) -> float:
    """Seconds of a card that all processes had, but for one."""
    return sum(seconds for (index, pid), seconds in busy.items() if index == card and pid != besides)


class SimulatedCards:
    """A fake card for each service."""

    simulated = True

    def __init__(self, folder: Path, count: int) -> None:
        self._folder, self._count = folder, count
        self.names = ("a simulated H100",) * count
        self.library = str(folder / LIBRARY)
        self.busy: dict[tuple[int, int], float] = {}
        self._last: dict[int, int] = {}
        self._card: Process | None = None

    async def begin(self, start: Start, group: str) -> None:
        """Start the daemon."""
        arguments = [str(self._folder), "--cards", str(self._count)]
        self._card = await start(group, "colocate.fakecard.daemon", *arguments)
        if await self._card.line() != "ready":
            await self._card.end()
            raise HostUnfit("the simulated card did not start; its error is above", "install a C compiler: gcc")
        self._state = attach(self._folder)

    def service(self, card: int, kind: str) -> list[str]:
        """On a fake card."""
        return ["colocate.demo.gpu.service", str(self._folder), "--card", str(card), "--kind", kind]

    def batch(self, card: int, program: tuple[str, ...]) -> list[str]:
        """On a fake card."""
        return ["colocate.fakecard.client", str(self._folder), *program, "--card", str(card)]

    def index(self, uuid: str) -> int | None:
        """As the daemon has them."""
        known = [device.uuid.decode() for device in self._state.devices[: self._count]]
        return known.index(uuid) if uuid in known else None

    def look(self) -> None:
        """From the state of the fake cards."""
        for index in range(self._state.device_count):
            device = self._state.devices[index]
            for process in device.processes[: device.process_count]:
                before = self._last.get(process.pid, 0)
                self._last[process.pid] = process.busy_ns
                used = max(process.busy_ns - before, 0) / 1e9
                self.busy[index, process.pid] = self.busy.get((index, process.pid), 0.0) + used

    async def end(self) -> None:
        """End the daemon."""
        if self._card is not None:
            await self._card.end()


class RealCard:
    """One card of this machine, by the CUDA driver and NVML."""

    simulated = False

    def __init__(self, uuid: str, library: str = "") -> None:
        self._uuid, self.library = uuid, library
        self.names: tuple[str, ...] = ()
        self.busy: dict[tuple[int, int], float] = {}
        self._worker = Worker(library)
        self._since = time.time()

    async def begin(self, _start: Start, _group: str) -> None:
        """See that it is there, and that nobody is on it. Raises BadInput, HostUnfit."""
        try:
            cards = {c["uuid"]: c for c in self._worker.ask(READY_SECONDS, ask="read")["cards"] if not c["error"]}
        except NvmlSilent as error:
            raise HostUnfit(f"--card: the GPUs cannot be read: {error}", "install NVIDIA's driver") from error
        card = cards.get(self._uuid)
        if card is None:
            known = ", ".join(cards) or "none"
            raise BadInput(f"--card: there is no {self._uuid}; there is {known}: name one of them")
        if card["mig"]:
            raise BadInput(f"--card: {self._uuid} is divided by MIG: name a card that is not")
        if card["processes"]:
            pids = ", ".join(str(p[0]) for p in card["processes"])
            raise BadInput(f"--card: processes are on {self._uuid} ({pids}), and would be in the way: end them")
        self.names = (card["name"],)

    def service(self, _card: int, kind: str) -> list[str]:
        """On the real card."""
        return ["colocate.demo.gpu.service", "--uuid", self._uuid, "--kind", kind]

    def batch(self, _card: int, program: tuple[str, ...]) -> list[str]:
        """On the real card."""
        return ["colocate.demo.gpu.batch", self._uuid, *program]

    def index(self, uuid: str) -> int | None:
        """There is one."""
        return 0 if uuid == self._uuid else None

    def look(self) -> None:
        """By NVML's samples of processes: each says what it ran of one sampling period."""
        with contextlib.suppress(NvmlSilent):
            for pid, at, percent in self._worker.ask(ask="samples", uuid=self._uuid, pids=[], since=self._since)[
                "samples"
            ]:
                self.busy[0, pid] = self.busy.get((0, pid), 0.0) + percent / 100.0 * SAMPLE_SECONDS
                self._since = max(self._since, at)

    async def end(self) -> None:
        """Let go of the driver."""
        self._worker.end()
