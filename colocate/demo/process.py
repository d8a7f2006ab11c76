"""A process that becomes its command only when it is in its cgroup."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

from colocate.actuate.scratch import ScratchNode

ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_WAIT = 'read _ || exit 1; exec "$@"'


class Process:
    """A child of the demonstration."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    @classmethod
    async def start(
        cls, node: ScratchNode, cgroup: str, command: list[str], env: dict[str, str], *, oom_score_adj: int = 0
    ) -> Process:
        """Start the command in this group (a full path); a higher score is killed first for want of memory."""
        process = await asyncio.create_subprocess_exec(
            "/bin/sh", "-c", _WAIT, "sh", *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
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
