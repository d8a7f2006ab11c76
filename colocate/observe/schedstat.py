"""Time in which somebody waited for a CPU, from the run delays of single threads: PSI's `some`, without PSI.

The second field of /proc/<pid>/task/*/schedstat is nanoseconds on the run queue (Documentation/scheduler/
sched-stats.rst). A sum over threads is no share of time, and falls when a thread ends. So each thread's growth since
the last look is a share of that time, and the share in which at least one waited is 1 - product(1 - share), as if they
waited independently. Reading is O(threads), so it is done for few; PSI covers the others at the cost of one read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from colocate.cgroup.port import FilePort

MAX_THREADS = 128


class Schedstat(NamedTuple):
    """A thread's time on a CPU and on the run queue so far, in nanoseconds, and how often it came to run."""

    ran_ns: int
    waited_ns: int
    times: int


def parse_schedstat(text: bytes | str) -> Schedstat:
    """Of /proc/<pid>/task/<tid>/schedstat (Documentation/scheduler/sched-stats.rst)."""
    ran, waited, times = text.split()[:3]
    return Schedstat(int(ran), int(waited), int(times))


def run_delays_us(port: FilePort, pids: Iterable[int]) -> dict[int, int] | None:
    """thread -> microseconds that it has waited so far; None without schedstat or with too many threads."""
    found: dict[int, int] = {}
    for pid in pids:
        for thread in port.proc_list(f"/proc/{pid}/task"):
            if len(found) >= MAX_THREADS:
                return None
            text = port.proc(f"/proc/{pid}/task/{thread}/schedstat")
            if text:
                found[int(thread)] = parse_schedstat(text).waited_ns // 1000
    return found or None


class RunDelays:
    """Keeps each workload's threads between two looks, and the time waited so far."""

    def __init__(self) -> None:
        self._threads: dict[str, tuple[float, dict[int, int]]] = {}
        self._waited_us: dict[str, float] = {}

    def waited_us(self, port: FilePort, id_: str, pids: Iterable[int], at_seconds: float) -> int | None:
        """Microseconds in which at least one thread waited, since the first look; None if it cannot be known."""
        now = run_delays_us(port, pids)
        if now is None:
            self._threads.pop(id_, None)
            return None
        last, before = self._threads.get(id_, (at_seconds, {}))
        elapsed_us = (at_seconds - last) * 1e6
        if elapsed_us > 0:
            nobody = 1.0
            for thread, delay in now.items():
                grown = delay - before.get(thread, delay)  # a new thread, or a number given anew: from now on
                nobody *= 1.0 - min(max(grown / elapsed_us, 0.0), 1.0)
            self._waited_us[id_] = self._waited_us.get(id_, 0.0) + (1.0 - nobody) * elapsed_us
        self._threads[id_] = (at_seconds, now)
        return int(self._waited_us.get(id_, 0.0))

    def forget_others(self, ids: Iterable[str]) -> None:
        """Only these workloads are left."""
        kept = set(ids)
        self._threads = {i: t for i, t in self._threads.items() if i in kept}
        self._waited_us = {i: w for i, w in self._waited_us.items() if i in kept}
