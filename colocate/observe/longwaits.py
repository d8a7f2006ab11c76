"""Time in waits for a CPU that are long enough to be felt; PSI counts every wait, however short.

A service that wakes 10,000 times a second and waits 40 us each time shows 40 % of PSI `some`, and nobody feels it; one
of whose wake-ups a hundredth waits 4 ms shows the same 40 %, and 4 ms is its p99. So, like Borg (Verma et al., EuroSys
2015, section 6.2), waits are told apart by their length.

The kernel credits a thread's run delay (the second field of /proc/<pid>/task/*/schedstat, nanoseconds) with a whole
wait at its end, in one lump. Of the waits that end between two looks `dt` apart only the first can have begun before:
if none is longer than w, the delay grows by dt + w at most. So one that grew by more than 1.5 dt had a wait of more
than dt / 2, and every wait of more than 1.5 dt is seen. We look every 2 ms for 50 ms, about five times a second, at the
threads that waited most. A thread that stays runnable and never runs is waiting still: it counts too.

Measured beside the scheduler's own events (designs/0001-cpu.md); about 6 ms of CPU a second for each service watched,
which is why only those are that wait much by PSI.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from colocate.cgroup.port import FilePort
from colocate.cgroup.tree import main_hierarchy, processes_below

LOOK_SECONDS = 0.002
LEAST_WAIT_SECONDS = 0.001
LATE_LOOK_SECONDS = 0.005
"""A look that comes later than this after the one before tells nothing of waits that are shorter."""
BURST_SECONDS, MOST_BURST_SECONDS = 0.05, 0.15
STALE_SECONDS = 2.0
"""For how long what the last good burst said holds."""
LEAST_REST_SECONDS, MOST_REST_SECONDS = 0.1, 0.2
"""Between two bursts, drawn anew each time, so that no load keeps step."""
CHOOSE_AGAIN_SECONDS = 1.0
KEPT_SECONDS, KNOWN_SECONDS = 30.0, 0.5
MOST_SERVICES, MOST_LOOKED_AT, MOST_THREADS = 4, 16, 256


class Schedstat(NamedTuple):
    """A thread's time on a CPU and on the run queue so far, in nanoseconds, and how often it came to run."""

    ran_ns: int
    waited_ns: int
    times: int


def parse_schedstat(text: bytes | str) -> Schedstat:
    """Of /proc/<pid>/task/<tid>/schedstat (Documentation/scheduler/sched-stats.rst)."""
    ran, waited, times = text.split()[:3]
    return Schedstat(int(ran), int(waited), int(times))


def long_ns(before: Mapping[int, Schedstat], now: Mapping[int, Schedstat], seconds: float) -> int:
    """Nanoseconds waited by threads of which a long wait ended between two looks that are so many seconds apart."""
    least = max(1.5 * seconds, LEAST_WAIT_SECONDS) * 1e9
    grown = (stat.waited_ns - before[thread].waited_ns for thread, stat in now.items() if thread in before)
    return sum(g for g in grown if g > least)


class _Service:
    """One service that is watched."""

    def __init__(self, hierarchy: str, path: str) -> None:
        self.hierarchy, self.path = hierarchy, path
        self.files: dict[int, tuple[int, str]] = {}
        """thread -> its open schedstat, and where its stat is."""
        self.scale = 1.0
        """What all threads waited to what those looked at did."""
        self.told = False
        """Whether the last bursts can be believed."""
        self.chosen_at = float("-inf")
        self.delays: dict[int, int] = {}
        self.waited_us, self.share, self.at = 0.0, 0.0, 0.0

    def close(self) -> None:
        for fd, _ in self.files.values():
            os.close(fd)
        self.files = {}

    def choose(self, port: FilePort, now: float) -> None:
        """The threads to look at: those that waited most since the last choice."""
        self.chosen_at = now
        self.close()
        found: dict[int, str] = {}
        for pid in processes_below(port, self.hierarchy, self.path):
            found |= {int(t): f"/proc/{pid}/task/{t}" for t in port.proc_list(f"/proc/{pid}/task")}
            if len(found) > MOST_THREADS:
                self.told = False
                return
        delays = {}
        for thread, where in found.items():
            with contextlib.suppress(OSError, ValueError), open(f"{where}/schedstat", "rb", buffering=0) as file:
                delays[thread] = parse_schedstat(file.read()).waited_ns
        grown = {t: d - self.delays[t] for t, d in delays.items() if t in self.delays}
        self.delays = delays
        chosen = sorted(delays, key=lambda t: grown.get(t, 0), reverse=True)[:MOST_LOOKED_AT]
        for thread in chosen:
            with contextlib.suppress(OSError):
                fd = os.open(f"{found[thread]}/schedstat", os.O_RDONLY | os.O_CLOEXEC)
                self.files[thread] = (fd, f"{found[thread]}/stat")
        total = sum(grown.values())
        looked_at = sum(grown.get(t, 0) for t in self.files)
        if not grown:
            self.chosen_at = now - CHOOSE_AGAIN_SECONDS  # nothing to choose by yet: again with the next burst
        self.told = looked_at > 0  # nothing was credited: it waits for nothing, or has not stopped waiting
        self.scale = total / looked_at if looked_at > 0 else 1.0

    def look(self) -> dict[int, Schedstat]:
        seen = {}
        for thread, (fd, _) in self.files.items():
            with contextlib.suppress(OSError, ValueError):
                seen[thread] = parse_schedstat(os.pread(fd, 128, 0))
        return seen

    def still_waiting(self, first: Mapping[int, Schedstat], last: Mapping[int, Schedstat]) -> int:
        """How many threads neither ran nor ended a wait between two looks, and are runnable."""
        waiting = 0
        for thread, stat in last.items():
            if first.get(thread) == stat:
                with contextlib.suppress(OSError), open(self.files[thread][1], "rb", buffering=0) as file:
                    waiting += file.read(512).rpartition(b")")[2].split()[:1] == [b"R"]
        return waiting

    def credit(self, until: float, share: float) -> None:
        """The time since the last burst had its share; the time until the next one has this burst's."""
        self.waited_us += self.share * max(until - self.at, 0.0) * 1e6
        self.share, self.at = min(share, 1.0), until


class LongWaits:
    """Watches a few services from a thread of its own, so that the loop's ticks do not make its looks late."""

    def __init__(self, port: FilePort, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._port, self._monotonic = port, monotonic
        self._services: dict[str, _Service] = {}
        self._wanted: dict[str, str] = {}
        self._much_at: dict[str, float] = {}
        self._lock = threading.Lock()
        self._changed = threading.Event()
        self._stop = False
        self._random = random.Random(os.getpid())
        self._thread: threading.Thread | None = None

    def watch(self, services: Mapping[str, tuple[str, float]], beyond_ratio: float, now: float) -> bool:
        """Watch those services that wait much: id -> (cgroup path, share of time by PSI). At most four of them.

        Much is more than `beyond_ratio`; and for a while after that, so that a pause ends no answer. Returns whether
        one is new: `KNOWN_SECONDS` later there is something to read.
        """
        self._much_at = {i: at for i, at in self._much_at.items() if i in services and now - at < KEPT_SECONDS}
        self._much_at |= {i: now for i, (_, ratio) in services.items() if ratio > beyond_ratio}
        ordered = sorted(self._much_at, key=lambda i: (i not in self._wanted, -services[i][1], i))
        wanted = {i: services[i][0] for i in ordered[:MOST_SERVICES]}
        new = not wanted.keys() <= self._wanted.keys()
        if wanted == self._wanted:
            return new
        with self._lock:
            self._wanted = wanted
        self._changed.set()
        if self._thread is None and wanted:
            self._thread = threading.Thread(target=self._run, name="colocate-waits", daemon=True)
            self._thread.start()
        return new

    def waited_us(self, id_: str, at_seconds: float) -> int | None:
        """Microseconds of long waits so far, growing only; None for who is not watched or cannot be told about."""
        with self._lock:
            service = self._services.get(id_)
            if service is None or not service.told or service.at == 0.0:
                return None
            return int(service.waited_us + service.share * max(at_seconds - service.at, 0.0) * 1e6)

    def close(self) -> None:
        """End the thread."""
        self._stop = True
        self._changed.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while not self._stop:
            self._follow()
            if not self._services:
                self._changed.wait()
                self._changed.clear()
                continue
            self._burst()
            self._changed.wait(self._random.uniform(LEAST_REST_SECONDS, MOST_REST_SECONDS))
            self._changed.clear()
        for service in self._services.values():
            service.close()

    def _follow(self) -> None:
        """Take on who is wanted now, and let the others go."""
        with self._lock:
            for id_ in [i for i, s in self._services.items() if self._wanted.get(i) != s.path]:
                self._services.pop(id_).close()
            for id_, path in self._wanted.items():
                if id_ not in self._services:
                    self._services[id_] = _Service(main_hierarchy(self._port), path)

    def _burst(self) -> None:
        """Look again and again for a while, and credit what was seen."""
        services, now = list(self._services.values()), self._monotonic()
        for service in services:
            if not 0 <= now - service.chosen_at < CHOOSE_AGAIN_SECONDS:
                service.choose(self._port, now)
        first = [s.look() for s in services]
        before, at = first, self._monotonic()
        begun, seen, total = at, 0.0, [0] * len(services)
        while seen < BURST_SECONDS and at - begun < MOST_BURST_SECONDS and not self._stop:
            time.sleep(LOOK_SECONDS)
            looks, now = [s.look() for s in services], self._monotonic()
            if now - at <= LATE_LOOK_SECONDS:
                seen += now - at
                for i, (old, new) in enumerate(zip(before, looks, strict=True)):
                    total[i] += long_ns(old, new, now - at)
            before, at = looks, now
        with self._lock:
            for i, service in enumerate(services):
                if seen >= 0.5 * BURST_SECONDS:
                    share = service.scale * total[i] / 1e9 / seen
                    service.credit(at, share + float(service.still_waiting(first[i], before[i])))
                elif at - service.at > STALE_SECONDS:
                    service.told = False
