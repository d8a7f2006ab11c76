"""The ways in which batch is stopped and let go within milliseconds, each with the kernel's or the driver's means.

A gate is of one workload. What it stops it lets go, and nothing else; what stays stopped if this process dies is in the
journal before.
"""

from __future__ import annotations

import errno
from typing import Protocol

from colocate.actuate.driver import Driver
from colocate.actuate.preemption import Preemption
from colocate.cgroup.knobfiles import read_knob, write_knob
from colocate.cgroup.port import CgroupGone, FilePort
from colocate.cgroup.tree import inodes_of


class Gate(Protocol):
    """Raises OSError where it cannot be carried out, CgroupGone where the workload has ended."""

    @property
    def identity(self) -> object:
        """Of two gates with the same one, the later goes on where the former was."""

    def stopped(self) -> bool:
        """Whether it is, by whomever."""

    def stop(self) -> None:
        """Let it launch nothing from now on."""

    def let_go(self) -> None:
        """Undo that."""

    def extend(self) -> bool:
        """It was stopped: so be what has come to it since. False where it is stopped no more, whoever let it go."""


class FreezeGate:
    """The cgroup freezer: the whole of it stands still.

    From the write on none of its tasks gets to its own code any more: one that runs is interrupted, and one that waits
    for a CPU freezes when it gets it. So nobody waits for the kernel to say that all have (cgroup-v2.rst).
    """

    def __init__(self, port: FilePort, path: str, inodes: dict[str, int]) -> None:
        self._port, self._path, self._inodes = port, path, inodes

    @property
    def identity(self) -> object:
        """The cgroup."""
        return "freeze", self._path, tuple(sorted(self._inodes.items()))

    def stopped(self) -> bool:
        """As the file says."""
        return read_knob(self._port, self._path, "cgroup.freeze", self._inodes) == "1"

    def stop(self) -> None:
        """cgroup.freeze = 1."""
        if not write_knob(self._port, self._path, "cgroup.freeze", "1", self._inodes):
            if inodes_of(self._port, self._path):
                raise OSError(errno.ENOENT, "it is in no hierarchy with a freezer")
            raise CgroupGone(errno.ENOENT, f"{self._path} is gone")

    def let_go(self) -> None:
        """cgroup.freeze = 0."""
        write_knob(self._port, self._path, "cgroup.freeze", "0", self._inodes)

    def extend(self) -> bool:
        """A process that is forked or moved into a frozen cgroup is frozen."""
        return self.stopped()


class LockGate:
    """The driver's checkpoint lock: CUDA calls wait, and the CPU side goes on."""

    def __init__(self, driver: Driver, path: str, processes: dict[int, int]) -> None:
        """`processes`: pid -> start time, of those that are on a card."""
        self._driver, self._path, self._processes = driver, path, processes

    @property
    def identity(self) -> object:
        """The cgroup whose processes they are."""
        return "lock", self._path

    def stopped(self) -> bool:
        """Nobody else locks: a lock that is found is ours."""
        return False

    def stop(self) -> None:
        """Ask for it; from then on nothing new is launched, and what was launched runs on."""
        for pid, started in self._processes.items():
            self._driver.want(pid, started, "locked")

    def let_go(self) -> None:
        """Ask for the end of it."""
        for pid, started in self._processes.items():
            self._driver.want(pid, started, "running")

    def extend(self) -> bool:
        """Those that have come to a card since."""
        self.stop()
        return True


class SuspendGate:
    """AMD: queues are taken off the GPU in the middle of their kernels; the CPU side goes on."""

    def __init__(self, preemption: Preemption, path: str, pids: tuple[int, ...]) -> None:
        self._preemption, self._path, self._pids = preemption, path, pids

    @property
    def identity(self) -> object:
        """The cgroup whose processes they are."""
        return "suspend", self._path

    def stopped(self) -> bool:
        """Nobody else may: who traces a process is its only debugger."""
        return False

    def stop(self) -> None:
        """Ask for it."""
        for pid in self._pids:
            self._preemption.want(pid, "suspended")

    def let_go(self) -> None:
        """Ask for the end of it."""
        for pid in self._pids:
            self._preemption.want(pid, "running")

    def extend(self) -> bool:
        """Processes and queues that are new."""
        self.stop()
        return True
