"""The demonstration's service as kubelet keeps it: one worker per CPU; one that dies is started again at once."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path

from colocate.actuate.scratch import ScratchNode
from colocate.demo.process import Process
from colocate.demo.scenario import BURSTABLE_SCORE
from colocate.errors import HostUnfit


class InferenceService:
    """Its workers share one table of embeddings, mapped from a file, and one histogram."""

    def __init__(
        self, node: ScratchNode, group: str, service_seconds: float, directory: Path, table: Path,
        tell: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._node, self._group, self._service_seconds = node, group, service_seconds
        self._metrics, self._table, self._tell = directory / "metrics", table, tell
        self._metrics.mkdir(exist_ok=True)
        self._workers: list[Process] = []
        self._keeping: list[asyncio.Task[None]] = []
        self._ending = False
        self.urls: list[str] = []
        self.restarts = 0

    async def start(self, cpus: tuple[int, ...]) -> None:
        """Start a worker on each CPU. Raises HostUnfit."""
        for cpu in cpus:
            await self._start(cpu, len(self._workers), 0)
        self._keeping = [asyncio.create_task(self._keep(cpu, i)) for i, cpu in enumerate(cpus)]

    async def _start(self, cpu: int, place: int, port: int) -> None:
        command = [sys.executable, "-P", "-m", "colocate.demo.inference", "--cpu", str(cpu), "--port", str(port)]
        command += ["--service-seconds", str(self._service_seconds), "--table", str(self._table)]
        environment = {"PROMETHEUS_MULTIPROC_DIR": str(self._metrics)}
        worker = await Process.start(self._node, self._group, command, environment, oom_score_adj=BURSTABLE_SCORE)
        self._workers[place : place + 1] = [worker]
        listens = await worker.line()
        if listens.isdigit():
            self.urls[place : place + 1] = [f"http://127.0.0.1:{listens}"]
        elif not port:
            raise HostUnfit("the demonstration service did not start; its error is above")

    async def _keep(self, cpu: int, place: int) -> None:
        while True:
            await self._workers[place].process.wait()
            if self._ending:
                return
            self.restarts += 1
            self._tell("a worker of the service was killed by the kernel, and started again")
            await self._start(cpu, place, int(self.urls[place].rpartition(":")[2]))

    async def end(self) -> None:
        """End all workers."""
        self._ending = True
        for task in self._keeping:
            task.cancel()
        await asyncio.gather(*self._keeping, return_exceptions=True)
        for worker in self._workers:
            await worker.end()
