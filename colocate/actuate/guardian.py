"""A small process that outlives the agent: when the agent dies without a word, it thaws and puts back what was found.

It holds the read end of a pipe. `done` or `handover` on it means that the agent has ended in order; end of file without
a word means that it was killed. Each tick sends a heartbeat with the time that may pass until the next: an agent that
hangs (SIGSTOP, a stuck disk) for longer is not undone, for it may come back, but nothing stays frozen or at its floor:
everything is thawed and opened, and asserted again when the agent goes on. Where jobs go on without an agent it stays
until the last one has ended, and takes their directories away, unless a successor owns them by then. It is started in a
session of its own, outside the tier, so that neither Ctrl-C nor a freeze reaches it.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from colocate.cgroup.layout import HOST_CGROUP

if TYPE_CHECKING:
    from colocate.actuate.restore import Report

WORDS = ("done", "handover")
OCCUPIED = "occupied"
"""The agent has ended in order, but jobs go on in the tier."""
LAST_WORDS = "guardian.log"
LOOK_AGAIN_SECONDS = 1.0
TRY_AGAIN_SECONDS, MOST_TRIES = 5.0, 60
"""What could not be undone, a limit of a driver that hung, say, is tried again."""


class Guardian:
    """The agent's end of the pipe."""

    def __init__(self, state_dir: Path, lock_dir: Path, node_root: str) -> None:
        self._arguments = [str(state_dir.absolute()), str(lock_dir.absolute()), node_root]
        self._process: subprocess.Popen[bytes] | None = None
        self._write = -1

    def ensure(self) -> None:
        """Start the guardian, or start it again if somebody killed it."""
        if self._process is not None and self._process.poll() is None:
            return
        if self._write >= 0:
            os.close(self._write)
        read, self._write = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._write, False)
        self._process = subprocess.Popen(
            # -P and "/": it runs as root, and must not import what somebody left in the directory we were started in.
            [sys.executable, "-P", "-m", "colocate.actuate.guardian", *self._arguments],
            cwd="/",
            stdin=read,
            stdout=subprocess.DEVNULL,
            stderr=None,
            start_new_session=True,
        )
        os.close(read)

    def beat(self, seconds: float) -> None:
        """Tell it that the agent is alive, and for how long it may be silent now."""
        if self._write >= 0:
            with contextlib.suppress(OSError):  # full: it has not read for a long time, and needs no more
                os.write(self._write, f"beat {seconds:g}\n".encode())

    def dismiss(self, word: str = "done") -> None:
        """Tell it that the agent ends in order."""
        if self._write >= 0:
            with contextlib.suppress(OSError):
                os.write(self._write, f"{word}\n".encode())
            os.close(self._write)
            self._write = -1
        if self._process is not None and word == OCCUPIED:
            self._process.returncode = 0  # it outlives us on purpose: subprocess need not warn of it
        elif self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)


def main(state_dir: str, lock_dir: str, node_root: str) -> int:
    """Wait for the end of the agent; undo if it came without a word."""
    agent = os.getppid()
    if HOST_CGROUP in os.environ:
        _leave_the_container()
    if _listen(Path(state_dir)) in WORDS:
        return 0
    tries = MOST_TRIES
    while True:
        report = undo(Path(state_dir), Path(lock_dir), node_root, agent)
        if report is None:
            return 0
        if report.failed:
            tries -= 1
            with contextlib.suppress(OSError):
                Path(state_dir, LAST_WORDS).write_text("not undone yet:\n" + "\n".join(report.failed) + "\n")
        if not report.waits and (not report.failed or not tries):
            return 1 if report.failed else 0
        _wait_until_empty(report.waits, TRY_AGAIN_SECONDS if report.failed and tries > 0 else None)


def _leave_the_container() -> None:
    """Into the host's root cgroups: what is in the container's own is killed with it, and its files go with it too."""
    from colocate.actuate import journal, restore, scratch, statedir  # noqa: F401 - while they are there
    from colocate.cgroup.port import KernelPort

    port = KernelPort()
    for hierarchy in port.layout.mounts:
        try:
            port.write(hierarchy, "/", "cgroup.procs", str(os.getpid()))
        except OSError as error:  # cgroup v2's nsdelegate; its container's next agent undoes then
            print(f"colocate: the guardian stays in its container's cgroup ({hierarchy}: {error})", file=sys.stderr)
    port.close()


def _listen(state_dir: Path) -> str:
    """The agent's last word; empty if it was killed. Meanwhile nothing stays held by an agent that hangs."""
    said, patience, rest = "", None, ""
    while True:
        ready, _, _ = select.select([0], [], [], patience)
        if not ready:
            release(state_dir)
            patience = None  # once for each time that it hangs
            continue
        chunk = os.read(0, 4096)
        if not chunk:
            return said
        *lines, rest = (rest + chunk.decode()).split("\n")
        for line in lines:
            if line.startswith("beat "):
                patience = float(line.split()[1])
            else:
                said = line


def release(state_dir: Path) -> None:
    """Thaw and open what a hung agent holds; its journal stays as it is, for it may come back."""
    from colocate.actuate.journal import Journal, boot_id
    from colocate.actuate.restore import let_go
    from colocate.cgroup.port import KernelPort

    port = KernelPort()
    journal = Journal(state_dir, boot_id())  # read only: it is opened for writing with the first entry
    let_go(port, journal)
    port.close()


def undo(state_dir: Path, lock_dir: Path, node_root: str, agent: int) -> Report | None:
    """Undo what the journal knows, as soon as the agent has let go of its locks; None if a successor is there."""
    # Imported only now: until then the guardian should cost next to nothing.
    from colocate.actuate.journal import Journal, boot_id
    from colocate.actuate.restore import restore
    from colocate.actuate.scratch import sweep
    from colocate.actuate.statedir import Lock
    from colocate.cgroup.port import KernelPort
    from colocate.errors import AlreadyRunning

    locks: list[Lock] = []
    while len(locks) < 2:
        try:
            locks.append(Lock(state_dir, "state", role="guardian"))
            locks.append(Lock(lock_dir, node_root, role="guardian"))
        except AlreadyRunning as error:
            for lock in locks:
                lock.release()
            locks.clear()
            if error.pid not in (agent, 0):
                return None
            time.sleep(LOOK_AGAIN_SECONDS)  # it is still saving what it has learnt
    try:
        port, journal = KernelPort(), Journal(state_dir, boot_id())
        report = restore(port, journal)
        journal.close()
        sweep(port)
        port.close()
    finally:
        for lock in locks:
            lock.release()
    return report


def _wait_until_empty(paths: list[str], seconds: float | None) -> None:
    """Wait until one of these cgroups is empty, or for so long; whoever reads the dead agent's stderr need not wait
    with us."""
    from colocate.cgroup.port import KernelPort
    from colocate.cgroup.tree import processes_anywhere

    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
    port = KernelPort()
    until = None if seconds is None else time.monotonic() + seconds
    time.sleep(LOOK_AGAIN_SECONDS)
    while all(processes_anywhere(port, path) for path in paths) and (until is None or time.monotonic() < until):
        time.sleep(LOOK_AGAIN_SECONDS)
    port.close()


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:4]))
    except Exception:  # nobody reads its stderr any more
        with contextlib.suppress(OSError):
            Path(sys.argv[1], LAST_WORDS).write_text(traceback.format_exc())
        raise
