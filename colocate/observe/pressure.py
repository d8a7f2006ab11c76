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

from colocate.cgroup.layout import UNIFIED
from colocate.cgroup.port import KernelPort
from colocate.observe.cgroup import parse_pressure

TRIGGER_WINDOW_US = 500_000


class PressureWatch:
    """Calls `wake(workload_id)` in the loop when `some` memory pressure of a watched cgroup passes the threshold."""

    def __init__(
        self, port: KernelPort, wake: Callable[[str], None], threshold_ratio: float, poll_seconds: float
    ) -> None:
        """Starts the thread; to be made where a loop runs, and closed."""
        self._port, self._wake = port, wake
        self._threshold_ratio, self._poll_seconds = threshold_ratio, poll_seconds
        self._lock = threading.Lock()
        self._watched: dict[str, tuple[str, int]] = {}
        self._triggers: dict[str, int] = {}
        self._totals: dict[tuple[str, int], int] = {}
        """Workload id and inode of those without a trigger -> microseconds; the thread's own."""
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
        return "trigger" if self._watched and not self._untriggered() else "poll"

    def watch(self, cgroups: dict[str, tuple[str, int]]) -> None:
        """Watch exactly these: workload id -> (path, inode in the unified hierarchy)."""
        if cgroups == self._watched:
            return
        with self._lock:
            for id_, known in self._watched.items():
                if cgroups.get(id_) != known:
                    self._close_trigger(id_)
            for id_, (path, _) in cgroups.items():
                if self._watched.get(id_) != cgroups[id_]:
                    self._open_trigger(id_, path)
            self._watched = dict(cgroups)
        os.write(self._tell, b"w")

    def close(self) -> None:
        """End the thread and the triggers."""
        self._closing = True
        os.write(self._tell, b"c")
        self._thread.join()
        for id_ in list(self._triggers):
            self._close_trigger(id_)
        self._epoll.close()
        os.close(self._told)
        os.close(self._tell)

    def _untriggered(self) -> dict[str, tuple[str, int]]:
        with self._lock:
            return {i: where for i, where in self._watched.items() if i not in self._triggers}

    def _open_trigger(self, id_: str, path: str) -> None:
        mount = self._port.layout.mounts.get(UNIFIED)
        if mount is None:
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
        self._epoll.register(fd, select.EPOLLPRI)
        self._triggers[id_] = fd

    def _close_trigger(self, id_: str) -> None:
        fd = self._triggers.pop(id_, None)
        if fd is not None:
            with contextlib.suppress(OSError):
                self._epoll.unregister(fd)
            os.close(fd)

    def _on_trigger(self, fd: int, event: int) -> None:
        with self._lock:
            id_ = next((i for i, kept in self._triggers.items() if kept == fd), None)
            if id_ is not None and event & select.EPOLLERR:  # its cgroup is gone, or made anew: read until next told
                self._close_trigger(id_)
                id_ = None
        if id_ is not None:
            self._call(id_)

    def _call(self, id_: str) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is to be woken
            self._loop.call_soon_threadsafe(self._wake, id_)

    def _look(self, watched: dict[str, tuple[str, int]], elapsed_seconds: float) -> None:
        """One round of reading those without a trigger."""
        before, self._totals = self._totals, {}
        for id_, (path, inode) in watched.items():
            with contextlib.suppress(OSError, ValueError):
                total, _ = parse_pressure(self._port.read(UNIFIED, path, "memory.pressure", inode))
                if total is None:
                    continue
                self._totals[id_, inode] = total
                if total - before.get((id_, inode), total) > self._threshold_ratio * elapsed_seconds * 1e6:
                    self._call(id_)

    def _run(self) -> None:
        last = time.monotonic()
        while not self._closing:
            watched = self._untriggered()
            for fd, event in self._epoll.poll(self._poll_seconds if watched else None):
                if fd == self._told:
                    os.read(fd, 4096)
                else:
                    self._on_trigger(fd, event)
            now = time.monotonic()
            if watched and now - last >= 0.5 * self._poll_seconds:
                self._look(watched, now - last)
                last = now
