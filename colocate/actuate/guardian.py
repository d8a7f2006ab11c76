"""A small process that outlives the agent: when the agent dies without a word, it thaws and puts back what was found.

It holds the read end of a pipe. `done` or `handover` on it means that the agent has ended in order; end of file without
a word means that it was killed. It is started in a session of its own, outside the tier, so that neither Ctrl-C nor a
freeze reaches it. A service manager's ExecStopPost does the same where there is one; this works everywhere.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

WORDS = (b"done", b"handover")


class Guardian:
    """The agent's end of the pipe."""

    def __init__(self, state_dir: Path, lock_dir: Path, node_root: str) -> None:
        self._arguments = [str(state_dir), str(lock_dir), node_root]
        self._process: subprocess.Popen[bytes] | None = None
        self._write = -1

    def ensure(self) -> None:
        """Start the guardian, or start it again if somebody killed it."""
        if self._process is not None and self._process.poll() is None:
            return
        if self._write >= 0:
            os.close(self._write)
        read, self._write = os.pipe2(os.O_CLOEXEC)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "colocate.actuate.guardian", *self._arguments],
            stdin=read,
            stdout=subprocess.DEVNULL,
            stderr=None,
            start_new_session=True,
        )
        os.close(read)

    def dismiss(self, word: bytes = b"done") -> None:
        """Tell it that the agent ends in order."""
        if self._write >= 0:
            with contextlib.suppress(OSError):
                os.write(self._write, word)
            os.close(self._write)
            self._write = -1
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)


def main(state_dir: str, lock_dir: str, node_root: str) -> int:
    """Wait for the end of the agent; undo if it came without a word."""
    said = b""
    while chunk := os.read(0, 64):
        said += chunk
    if said in WORDS:
        return 0
    # Imported only now: until then the guardian should cost next to nothing.
    from colocate.actuate.journal import Journal, boot_id
    from colocate.actuate.restore import restore
    from colocate.actuate.scratch import sweep
    from colocate.actuate.statedir import Lock
    from colocate.cgroupfs import KernelPort
    from colocate.errors import AlreadyRunning

    try:
        state_lock = Lock(Path(state_dir), "state", role="guardian")
    except AlreadyRunning:
        return 0  # a successor is there already and has undone it
    try:
        lock = Lock(Path(lock_dir), node_root, role="guardian")
    except AlreadyRunning:
        state_lock.release()
        return 0
    try:
        port = KernelPort()
        report = restore(port, Journal(Path(state_dir), boot_id()))
        sweep(port)
    finally:
        lock.release()
        state_lock.release()
    return 0 if not report.failed else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4]))
