"""The demonstration's service as kubelet keeps it: one worker per CPU; one that dies is started again at once."""

from __future__ import annotations

import asyncio
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import aiohttp

from colocate.actuate.scratch import ScratchNode
from colocate.demo.process import Kept, Process
from colocate.demo.scenario import BURSTABLE_SCORE
from colocate.errors import HostUnfit

WARM_ATTEMPTS = 40


async def warm(url: str) -> None:
    """Have the table of the service in memory. Raises HostUnfit."""
    for _ in range(WARM_ATTEMPTS):  # a worker may just be started again
        try:
            async with aiohttp.ClientSession() as session, session.post(f"{url}/warm") as response:
                response.raise_for_status()
                return
        except aiohttp.ClientError:
            await asyncio.sleep(0.5)
    raise HostUnfit("the demonstration service does not answer any more")


class InferenceService:
    """Its workers share one table of embeddings, mapped from a file, and one histogram."""

    def __init__(
        self, node: ScratchNode, group: str, service_seconds: float, directory: Path, tell: Callable[[str], None]
    ) -> None:
        self._node, self._group, self._service_seconds = node, group, service_seconds
        self._metrics, self._table, self._tell = directory / "metrics", directory / "table", tell
        self._metrics.mkdir(exist_ok=True)
        self._workers: list[Kept] = []
        self._ports: dict[int, str] = {}

    async def start(self, cpus: tuple[int, ...]) -> None:
        """Start a worker on each CPU. Raises HostUnfit."""
        for cpu in cpus:
            worker = Kept(functools.partial(self._start, cpu), self._died, self._tell)
            self._workers.append(worker)
            await worker.start()

    @property
    def urls(self) -> list[str]:
        """Where its workers listen."""
        return [f"http://127.0.0.1:{port}" for port in self._ports.values()]

    @property
    def restarts(self) -> int:
        """How often a worker died."""
        return sum(w.deaths for w in self._workers)

    def _died(self, _code: int) -> None:
        self._tell("a worker of the service was killed by the kernel, and is started again")

    async def _start(self, cpu: int) -> Process:
        command = [sys.executable, "-P", "-m", "colocate.demo.inference", "--cpu", str(cpu)]
        command += ["--service-seconds", str(self._service_seconds), "--table", str(self._table)]
        command += ["--port", self._ports.get(cpu, "0")]
        environment = {"PROMETHEUS_MULTIPROC_DIR": str(self._metrics)}
        worker = await Process.start(self._node, self._group, command, environment, oom_score_adj=BURSTABLE_SCORE)
        listens = await worker.line()
        if not listens.isdigit():
            await worker.end()
            raise HostUnfit("the demonstration service did not start; its error is above")
        self._ports[cpu] = listens
        return worker

    async def warm(self) -> None:
        """Have the table in memory again, whatever went before. Raises HostUnfit."""
        await warm(self.urls[0])

    async def end(self) -> None:
        """End all workers."""
        for worker in self._workers:
            await worker.end()
