"""Wakes the loop when a service stalls on memory: PSI triggers where the kernel allows them, else fast reading.

A trigger with a window below 2 s needs CAP_SYS_RESOURCE (Documentation/accounting/psi.rst); without it the `total=`
field of the few watched files is read every 50-100 ms, which costs under a microsecond each.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import threading
from collections.abc import Callable

from colocate.cgroup.layout import UNIFIED
from colocate.cgroup.port import FilePort
from colocate.observe.cgroup import parse_pressure

TRIGGER_WINDOW_US = 500_000


class PressureWatch:
    """Calls `wake(workload_id)` when `some` memory pressure of a watched cgroup passes the threshold."""

    def __init__(
        self, port: FilePort, wake: Callable[[str], None], threshold_ratio: float, poll_seconds: float
    ) -> None:
        self._port, self._wake = port, wake
        self._threshold_ratio, self._poll_seconds = threshold_ratio, poll_seconds
        self._watched: dict[str, tuple[str, int]] = {}
        self._totals: dict[str, int] = {}
        self._triggers: dict[str, int] = {}
        self._epoll: select.epoll | None = None
        self._thread: threading.Thread | None = None
        self._stop_read = self._stop_write = -1
        self._to_poll = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop
        self.mode = "poll"

    def watch(self, cgroups: dict[str, tuple[str, int]]) -> None:
        """Watch exactly these: workload id -> (path, inode in the unified hierarchy)."""
        for gone in set(self._watched) - set(cgroups):
            self._totals.pop(gone, None)
            self._close_trigger(gone)
        for id_, (path, inode) in cgroups.items():
            if self._watched.get(id_) != (path, inode):
                self._totals.pop(id_, None)
                self._close_trigger(id_)
                self._open_trigger(id_, path)
        self._watched = dict(cgroups)
        if not self._watched.keys() <= self._triggers.keys():
            self._to_poll.set()

    def _open_trigger(self, id_: str, path: str) -> None:
        mount = self._port.layout.mounts.get(UNIFIED)
        if mount is None or mount.startswith("model:"):
            return
        try:
            fd = os.open(f"{mount}{path}/memory.pressure", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return
        stall_us = max(int(self._threshold_ratio * TRIGGER_WINDOW_US), 1000)
        try:
            os.write(fd, f"some {stall_us} {TRIGGER_WINDOW_US}".encode())
        except OSError:
            os.close(fd)
            return
        if self._epoll is None:
            self._start_waiting()
        assert self._epoll is not None
        self._epoll.register(fd, select.EPOLLPRI)
        self._triggers[id_] = fd
        self.mode = "trigger"

    def _close_trigger(self, id_: str) -> None:
        fd = self._triggers.pop(id_, None)
        if fd is not None:
            if self._epoll is not None:
                with contextlib.suppress(OSError):
                    self._epoll.unregister(fd)
            os.close(fd)

    def _start_waiting(self) -> None:
        """A thread waits for triggers: looking at one consumes its event, so an epoll within the loop loses it."""
        self._loop = asyncio.get_running_loop()
        self._epoll = select.epoll()
        self._stop_read, self._stop_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._epoll.register(self._stop_read, select.EPOLLIN)
        self._thread = threading.Thread(target=self._wait, name="colocate-psi", daemon=True)
        self._thread.start()

    def _wait(self) -> None:
        assert self._epoll is not None
        while True:
            for fd, event in self._epoll.poll():
                if fd == self._stop_read:
                    return
                self._loop.call_soon_threadsafe(self._on_trigger, fd, event)

    def _stop_waiting(self) -> None:
        if self._epoll is None or self._thread is None:
            return
        os.write(self._stop_write, b"x")
        self._thread.join()
        self._epoll.close()
        os.close(self._stop_read)
        os.close(self._stop_write)
        self._epoll = None

    def _on_trigger(self, fd: int, event: int) -> None:
        id_ = next((i for i, kept in self._triggers.items() if kept == fd), None)
        if id_ is None:
            return
        if event & select.EPOLLERR:
            self._close_trigger(id_)
            self._to_poll.set()
        else:
            self._wake(id_)

    def look(self, elapsed_seconds: float) -> None:
        """One round of reading those without a trigger."""
        for id_, (path, inode) in self._watched.items():
            if id_ in self._triggers:
                continue
            total, _ = parse_pressure(self._port.read(UNIFIED, path, "memory.pressure", inode))
            if total is None:
                continue
            before = self._totals.get(id_)
            self._totals[id_] = total
            if before is not None and total - before > self._threshold_ratio * elapsed_seconds * 1e6:
                self._wake(id_)

    async def run(self) -> None:
        """Read for ever; ends by cancellation."""
        loop = asyncio.get_running_loop()
        last = loop.time()
        try:
            while True:
                self._to_poll.clear()
                if self._watched.keys() <= self._triggers.keys():
                    await self._to_poll.wait()  # the kernel tells of all of them
                    last = loop.time()
                await asyncio.sleep(self._poll_seconds)
                now = loop.time()
                self.look(now - last)
                last = now
        finally:
            for id_ in list(self._triggers):
                self._close_trigger(id_)
            self._stop_waiting()
