"""Processes of the demonstration: in their cgroup before they become their command, and started again when they die."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

from colocate.actuate.scratch import ScratchNode
from colocate.errors import ColocateError

ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
RETRY_SECONDS = 0.5
_WAIT = 'read _ || exit 1; exec "$@"'


class Process:
    """A child that becomes its command only when it is in its cgroup."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    @classmethod
    async def start(
        cls,
        node: ScratchNode,
        cgroup: str,
        command: list[str],
        env: dict[str, str],
        *,
        oom_score_adj: int = 0,
        quiet: bool = False,
    ) -> Process:
        """Start the command in this group (a full path); a higher score is killed first for want of memory."""
        process = await asyncio.create_subprocess_exec(
            "/bin/sh", "-c", _WAIT, "sh", *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL if quiet else None,
            env={**os.environ, **ENVIRONMENT, **env},
            limit=1 << 26,
        )  # fmt: skip
        node.enter(process.pid, cgroup)
        if oom_score_adj:
            Path(f"/proc/{process.pid}/oom_score_adj").write_text(str(oom_score_adj))
        started = cls(process)
        await started.say("in")
        return started

    async def say(self, word: str) -> None:
        """A line to its stdin."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n".encode())
        await self.process.stdin.drain()

    async def line(self) -> str:
        """The next line of its stdout; it has 30 s for it."""
        assert self.process.stdout is not None
        return (await asyncio.wait_for(self.process.stdout.readline(), 30)).decode().strip()

    async def end(self, number: int = signal.SIGKILL) -> None:
        """The signal, and wait for its end."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number)  # Process.kill would reap it behind asyncio's back
        if self.process.stdin is not None:
            self.process.stdin.close()  # its own children may hold the other end, and wait() waits for all pipes
        await self.process.wait()


class Kept:
    """A process that is started again whenever it dies, until `end`.

    `died` is told its exit code, `failed` in words why a start went wrong; it is tried again.
    """

    def __init__(
        self,
        start: Callable[[], Awaitable[Process]],
        died: Callable[[int], None],
        failed: Callable[[str], None],
        delay_seconds: float = 0.0,
    ) -> None:
        self._start, self._died, self._failed, self._delay_seconds = start, died, failed, delay_seconds
        self._ending = asyncio.Event()
        self._process: Process | None = None
        self._keeping: asyncio.Task[None] | None = None
        self.deaths = 0

    async def start(self) -> None:
        """Start it for the first time."""
        self._process = await self._start()
        self._keeping = asyncio.create_task(self._keep())

    @property
    def alive(self) -> bool:
        """Whether it runs just now."""
        return self._process is not None and self._process.process.returncode is None

    async def _keep(self) -> None:
        while True:
            assert self._process is not None
            code = await self._process.process.wait()
            if self._ending.is_set():
                return
            self.deaths += 1
            self._died(code)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), self._delay_seconds)
            while not self._ending.is_set():
                try:
                    self._process = await self._start()
                    break
                except (OSError, TimeoutError, ColocateError) as error:  # on a full node: its keeper tries again
                    self._failed(f"could not be started again: {error}")
                    await asyncio.sleep(RETRY_SECONDS)

    async def end(self, number: int = signal.SIGKILL) -> None:
        """End it for good."""
        self._ending.set()
        if self._keeping is None or self._process is None:
            return
        process = self._process
        await process.end(number)
        await asyncio.gather(self._keeping, return_exceptions=True)
        if self._process is not process:  # it was being started at that moment
            await self._process.end(number)
