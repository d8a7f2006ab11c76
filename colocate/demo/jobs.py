"""Batch jobs as a job controller keeps them: what dies is started again, from its last checkpoint.

What a job had done since that checkpoint is lost with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

from colocate.calibrate.probe import WorkCounter
from colocate.demo.process import Process
from colocate.demo.scenario import RESTART_SECONDS
from colocate.jobs.client import EXIT_EVICTED


class Progress:
    """What a job has done, and what of it is saved, as the job itself counts them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done, self.saved = WorkCounter(path), WorkCounter(f"{path}.saved")
        self.lost = 0
        """By all who died so far."""

    def reset(self) -> None:
        """A job that starts from nothing."""
        self.done.done = self.saved.done = self.lost = 0
        self.checkpoint.unlink(missing_ok=True)

    @property
    def checkpoint(self) -> Path:
        """Where the job writes its state."""
        return Path(f"{self.path}.npz")

    def died(self) -> int:
        """Account for a death; the work lost by it."""
        lost = max(self.done.done - self.saved.done, 0)
        self.lost += lost
        self.done.done = self.saved.done
        return lost


class Job:
    """One job, kept running until `end`."""

    def __init__(
        self, progress: Progress, start: Callable[[], Awaitable[Process]], tell: Callable[[str], None]
    ) -> None:
        self._progress, self._start, self._tell = progress, start, tell
        self._ending = asyncio.Event()
        self._process: Process | None = None
        self._keeping: asyncio.Task[None] | None = None
        self.deaths = 0

    async def start(self) -> None:
        """Start it, and again whenever it dies."""
        self._process = await self._start()
        self._keeping = asyncio.create_task(self._keep())

    @property
    def alive(self) -> bool:
        """Whether it runs just now."""
        return self._process is not None and self._process.process.returncode is None

    async def _keep(self) -> None:
        while not self._ending.is_set():
            assert self._process is not None
            code = await self._process.process.wait()
            if self._ending.is_set():
                return
            lost = self._progress.died()
            self.deaths += 1
            how = (
                "evicted" if code == EXIT_EVICTED else "killed by the kernel" if code in (-9, 137) else f"ended, {code}"
            )
            self._tell(f"{self._progress.path.name} was {how}; it lost {lost} samples")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), RESTART_SECONDS)
            if not self._ending.is_set():
                self._process = await self._start()

    async def end(self, number: int = signal.SIGKILL) -> None:
        """End it for good."""
        self._ending.set()
        if self._keeping is not None and self._process is not None:
            starting = self._process
            await starting.end(number)
            await asyncio.gather(self._keeping, return_exceptions=True)
            if self._process is not starting:  # it was being started at that moment
                await self._process.end(number)
