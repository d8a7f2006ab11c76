"""The agent's end of the process that suspends AMD queues (`kfd_worker.py`)."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
from typing import Literal

import structlog

from colocate.cgroup.child import end_child, start_child

log = structlog.get_logger()
Queues = Literal["suspended", "running", "released"]
END_SECONDS = 2.0


class Preemption:
    """Suspends and resumes the queues of processes; nothing here waits. From any thread."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._wanted: dict[int, Queues] = {}
        self.refused: dict[int, str] = {}
        """Processes of which it cannot be done, and why; 0: of all."""
        self._lock = threading.Lock()

    def want(self, pid: int, state: Queues) -> None:
        """Have the queues of a process be this. What is suspended already takes in its new queues."""
        with self._lock:
            if state != "suspended" and self._wanted.get(pid, "released") == state:
                return
            if state == "released":
                self._wanted.pop(pid, None)
            else:
                self._wanted[pid] = state
            self._send(pid=pid, want=state)

    def held(self) -> set[int]:
        """Processes that are suspended, or may be within a moment."""
        with self._lock:
            return set(self._wanted)

    def may(self, pid: int) -> bool:
        """Whether nothing is known against it."""
        return pid not in self.refused and 0 not in self.refused

    def _send(self, **wish: object) -> None:
        if self._process is None or self._process.poll() is not None:
            self._process = start_child("colocate.actuate.kfd_worker")
            threading.Thread(target=self._listen, args=(self._process,), name="kfd", daemon=True).start()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended, and the kernel has resumed all: the next wish starts another
            self._process.stdin.write(json.dumps(wish).encode() + b"\n")
            self._process.stdin.flush()

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            fact = json.loads(line)
            self.refused[fact["pid"]] = fact["error"]
            log.warning("queues_not_suspended", pid=fact["pid"], why=fact["error"], effect="the freezer is used")
        process.wait()
        with self._lock:
            if process is self._process:
                self._wanted.clear()

    def close(self) -> None:
        """Put everything back, and end."""
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            end_child(process, END_SECONDS)  # the kernel puts back what one that is killed held
