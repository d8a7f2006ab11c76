"""The process that suspends AMD queues: if it dies, the kernel resumes them, for it is the debugger of their processes.

One JSON line a wish on its standard input, {"pid": 7, "want": "suspended"}: suspended, running, or released. One a
failure on its standard output. A traced process stops for each of its signals, so these are passed on at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
from collections.abc import Callable

from colocate.actuate.kfd import WALL, Ioctl, Ptrace, Session, kernel_ioctl, kernel_ptrace

Say = Callable[[dict[str, object]], None]


class Sessions:
    """All processes that are held, or may be."""

    def __init__(self, ioctl: Ioctl, say: Say, ptrace: Ptrace = kernel_ptrace) -> None:
        self._ioctl, self._say, self._ptrace = ioctl, say, ptrace
        self.open: dict[int, Session] = {}

    def want(self, pid: int, state: str) -> None:
        """Bring a process to this."""
        session = self.open.get(pid)
        try:
            if state == "suspended":
                session = session or Session(pid, self._ioctl, self._ptrace)
                self.open[pid] = session
                session.suspend()
            elif session is not None and state == "running":
                session.resume()
            elif session is not None:
                del self.open[pid]
                session.close()
        except OSError as error:
            self._say({"pid": pid, "error": f"{os.strerror(error.errno or 0)} (errno {error.errno})"})

    def reap(self) -> None:
        """Pass on the signals for which traced processes stopped; forget those that have ended."""
        for pid, session in list(self.open.items()):
            with contextlib.suppress(ChildProcessError, OSError):
                found, status = os.waitpid(pid, os.WNOHANG | WALL)
                if found and os.WIFSTOPPED(status):
                    session.stopped(status)
                elif found:
                    del self.open[pid]

    def close(self) -> None:
        """Put everything back."""
        for pid in list(self.open):
            self.want(pid, "released")


def say(fact: dict[str, object]) -> None:
    """One line."""
    with contextlib.suppress(OSError):
        sys.stdout.write(json.dumps(fact) + "\n")
        sys.stdout.flush()


def main() -> int:
    """Serve until standard input ends."""
    read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    try:
        sessions = Sessions(kernel_ioctl(), say)
    except OSError as error:
        say({"pid": 0, "error": f"/dev/kfd: {error.strerror}"})
        return 1
    rest = b""
    while True:
        ready, _, _ = select.select([0, read], [], [], 1.0)
        if read in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(read, 4096)
        sessions.reap()
        if 0 not in ready:
            continue
        chunk = os.read(0, 1 << 16)
        if not chunk:
            sessions.close()
            return 0
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            wish = json.loads(line)
            sessions.want(wish["pid"], wish["want"])


if __name__ == "__main__":
    sys.exit(main())
