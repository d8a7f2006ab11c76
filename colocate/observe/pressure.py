"""Wakes the loop when a service stalls on memory: PSI triggers where the kernel allows them, else fast reading.

A trigger with a window below 2 s needs CAP_SYS_RESOURCE (Documentation/accounting/psi.rst); without it the `total=`
field of the few watched files is read every 50-100 ms. Both in a thread of its own: a look at a trigger consumes its
event, so that an epoll within the loop's would lose it, and a thread that wakes costs half of what a loop does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import threading
import time
from collections.abc import Callable

from colocate.cgroup.layout import UNIFIED, Layout

TRIGGER_WINDOW_US = 500_000


class PressureWatch:
    """Calls `wake(workload_id)` in the loop when `some` memory pressure of a watched cgroup passes the threshold."""

    def __init__(
        self, layout: Layout, wake: Callable[[str], None], threshold_ratio: float, poll_seconds: float
    ) -> None:
        """Starts the thread; to be made where a loop runs, and closed."""
        self._mount, self._wake = layout.mounts.get(UNIFIED), wake
        self._threshold_ratio, self._poll_seconds = threshold_ratio, poll_seconds
        self._lock = threading.Lock()
        self._watched: dict[str, tuple[str, int]] = {}
        self._triggers: dict[str, int] = {}
        """Workload id -> descriptor."""
        self._read: dict[str, int] = {}
        """The same of files that are read because no trigger is allowed."""
        self._totals: dict[int, int] = {}
        """Descriptor -> microseconds, as last read."""
        self._loop = asyncio.get_running_loop()
        self._epoll = select.epoll()
        self._told, self._tell = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._epoll.register(self._told, select.EPOLLIN)
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="colocate-psi", daemon=True)
        self._thread.start()

    @property
    def mode(self) -> str:
        """`trigger` where the kernel tells of all of them, else `poll`."""
        return "trigger" if self._triggers and not self._read else "poll"

    def watch(self, cgroups: dict[str, tuple[str, int]]) -> None:
        """Watch exactly these: workload id -> (path, inode in the unified hierarchy)."""
        if cgroups == self._watched:
            return
        with self._lock:
            for id_, known in self._watched.items():
                if cgroups.get(id_) != known:
                    self._close(id_)
            for id_, (path, _) in cgroups.items():
                if self._watched.get(id_) != cgroups[id_]:
                    self._open(id_, f"{self._mount}{path}/memory.pressure")
            opened = self._triggers.keys() | self._read.keys()  # who could not be opened is tried again
            self._watched = {id_: where for id_, where in cgroups.items() if id_ in opened}
        os.write(self._tell, b"w")

    def close(self) -> None:
        """End the thread and let everything go."""
        self._closing = True
        os.write(self._tell, b"c")
        self._thread.join()
        for id_ in list(self._watched):
            self._close(id_)
        self._epoll.close()
        os.close(self._told)
        os.close(self._tell)

    def _open(self, id_: str, file: str) -> None:
        with contextlib.suppress(OSError):
            fd = os.open(file, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            stall_us = max(int(self._threshold_ratio * TRIGGER_WINDOW_US), 1000)
            try:
                os.write(fd, f"some {stall_us} {TRIGGER_WINDOW_US}".encode())
            except OSError:
                os.close(fd)
            else:
                self._epoll.register(fd, select.EPOLLPRI)
                self._triggers[id_] = fd
                return
        with contextlib.suppress(OSError):
            self._read[id_] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)

    def _close(self, id_: str) -> None:
        if (fd := self._triggers.pop(id_, None)) is not None:
            with contextlib.suppress(OSError):
                self._epoll.unregister(fd)
            os.close(fd)
        if (fd := self._read.pop(id_, None)) is not None:
            self._totals.pop(fd, None)
            os.close(fd)

    def _on_trigger(self, fd: int, event: int) -> None:
        with self._lock:
            id_ = next((i for i, kept in self._triggers.items() if kept == fd), None)
            if id_ is not None and event & select.EPOLLERR:  # its cgroup is gone, or made anew
                self._close(id_)
                self._watched.pop(id_, None)
                id_ = None
        if id_ is not None:
            self._call(id_)

    def _call(self, id_: str) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is to be woken
            self._loop.call_soon_threadsafe(self._wake, id_)

    def _look(self, elapsed_seconds: float) -> None:
        """One round of reading those without a trigger. Short, for it is run a dozen times a second."""
        with self._lock:
            for id_, fd in self._read.items():
                with contextlib.suppress(OSError, ValueError):  # gone
                    line = os.pread(fd, 128, 0)
                    total = int(line[line.index(b"total=") + 6 : line.index(b"\n")])
                    if total - self._totals.get(fd, total) > self._threshold_ratio * elapsed_seconds * 1e6:
                        self._call(id_)
                    self._totals[fd] = total

    def _run(self) -> None:
        last = time.monotonic()
        while not self._closing:
            for fd, event in self._epoll.poll(self._poll_seconds if self._read else None):
                if fd == self._told:
                    os.read(fd, 4096)
                else:
                    self._on_trigger(fd, event)
            now = time.monotonic()
            if now - last >= 0.5 * self._poll_seconds:
                self._look(now - last)
                last = now
