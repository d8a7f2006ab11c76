"""Time in waits for a CPU that are long enough to be felt; PSI counts every wait, however short.

A service that wakes 10,000 times a second and waits 40 us each time shows 40 % of PSI `some`, and nobody feels it; one
of whose wake-ups a hundredth waits 4 ms shows the same 40 %, and 4 ms is its p99. So, like Borg (Verma et al., EuroSys
2015, section 6.2), waits are told apart by their length.

The kernel credits a thread's run delay (the second field of /proc/<pid>/task/*/schedstat, nanoseconds) with a whole
wait at its end, in one lump, and counts how often it came to run (the third). We look every 2 ms for 50 ms, about five
times a second, at the threads that waited most. Waits that ended between two looks are long if they were a millisecond
or more on the average; and of the waits that end between two looks `dt` apart only the first can have begun before, so
that a delay which grew by more than 1.5 dt had a wait of more than dt / 2. A thread that stays runnable and never runs
is waiting still: it counts too.

What cannot be told counts in full: what threads waited that are not looked at, and what PSI saw waiting that no thread
was credited with (threads that came and went, or have not stopped waiting). Measured beside the scheduler's own events
(designs/0001-cpu.md); about 6 ms of CPU a second for each service watched, which is why only those are that wait much.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable, Mapping

import structlog

from colocate.cgroup.layout import UNIFIED
from colocate.cgroup.port import FilePort
from colocate.cgroup.tree import main_hierarchy, processes_below
from colocate.observe.cgroup import parse_pressure
from colocate.observe.schedstat import Schedstat, parse_schedstat

LOOK_SECONDS = 0.002
LONG_SECONDS = 0.001
LATE_LOOK_SECONDS = 0.005
"""A look that comes later than this after the one before can prove long waits; that there were none it cannot."""
BURST_SECONDS, MOST_BURST_SECONDS = 0.05, 0.15
STALE_SECONDS = 2.0
LEAST_REST_SECONDS, MOST_REST_SECONDS = 0.1, 0.2
"""Between two bursts, drawn anew each time, so that no load keeps step."""
CHOOSE_AGAIN_SECONDS = 1.0
MOST_PSI_TO_DELAYS = 2
"""PSI counts up to 1.6 times what the threads are credited with (two that wake each other on one CPU): it is no proof
that somebody waits whom nobody sees."""
KEPT_SECONDS, KNOWN_SECONDS = 30.0, 0.5
MOST_SERVICES, MOST_LOOKED_AT, MOST_THREADS = 4, 16, 256
log = structlog.get_logger()


def long_ns(before: Mapping[int, Schedstat], now: Mapping[int, Schedstat], seconds: float) -> int:
    """Nanoseconds waited by threads of which a long wait ended between two looks that are so many seconds apart."""
    found = 0
    for thread, stat in now.items():
        former = before.get(thread)
        if former is not None:
            grown, times = stat.waited_ns - former.waited_ns, max(stat.times - former.times, 1)
            if grown >= LONG_SECONDS * 1e9 * times or grown > max(1.5 * seconds, LONG_SECONDS) * 1e9:
                found += grown
    return found


class _Service:
    """One service that is watched."""

    def __init__(self, hierarchy: str, path: str) -> None:
        self.hierarchy, self.path = hierarchy, path
        self.files: dict[int, tuple[int, str]] = {}
        """thread -> its open schedstat, and where its stat is."""
        self.unknown = 0.0
        """The share of time in which it waited, as far as nobody looks."""
        self.told = False
        """Whether the last burst can be believed."""
        self.chosen_at = self.read_at = float("-inf")
        self.delays: dict[int, int] | None = None
        self.pressure_us = 0
        self.waited_us, self.share, self.at = 0.0, 0.0, 0.0

    def close(self) -> None:
        for fd, _ in self.files.values():
            os.close(fd)
        self.files = {}

    def choose(self, port: FilePort, now: float) -> None:
        """The threads to look at: those that waited most since the last choice; and what the others did."""
        elapsed, self.chosen_at, self.read_at = now - self.read_at, now, now
        self.close()
        found: dict[int, str] = {}
        for pid in processes_below(port, self.hierarchy, self.path):
            found |= {int(t): f"/proc/{pid}/task/{t}" for t in port.proc_list(f"/proc/{pid}/task")}
            if len(found) > MOST_THREADS:
                self.told, self.delays = False, None
                return
        some, _ = parse_pressure(port.read(UNIFIED, self.path, "cpu.pressure"))
        delays: dict[int, int] = {}
        for thread, where in found.items():
            with contextlib.suppress(OSError, ValueError), open(f"{where}/schedstat", "rb", buffering=0) as file:
                delays[thread] = parse_schedstat(file.read()).waited_ns
        former, before_us = self.delays, self.pressure_us
        self.delays, self.pressure_us = delays, some or 0
        grown = {t: max(d - former[t], 0) for t, d in delays.items() if t in former} if former is not None else {}
        for thread in sorted(delays, key=lambda t: grown.get(t, 0), reverse=True)[:MOST_LOOKED_AT]:
            with contextlib.suppress(OSError):
                fd = os.open(f"{found[thread]}/schedstat", os.O_RDONLY | os.O_CLOEXEC)
                self.files[thread] = (fd, f"{found[thread]}/stat")
        if former is None:
            self.chosen_at = now - CHOOSE_AGAIN_SECONDS  # nothing to choose by yet: again with the next burst
            self.told = False
            return
        total = sum(grown.values())
        not_looked_at = total - sum(grown.get(t, 0) for t in self.files)
        of_nobody = max((self.pressure_us - before_us) * 1000 - MOST_PSI_TO_DELAYS * total, 0)
        self.unknown = (not_looked_at + of_nobody) / 1e9 / max(elapsed, LOOK_SECONDS)
        self.told = True

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
            thread = threading.Thread(target=self._run, name="colocate-waits", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # no more threads for us: then every wait counts
                log.warning("long_waits_unknown", error=str(error))
                return False
            self._thread = thread
        return new

    def waited_us(self, id_: str, at_seconds: float) -> int | None:
        """Microseconds of long waits so far, growing only; None for who is not watched or cannot be told about."""
        with self._lock:
            service = self._services.get(id_)
            if service is None or not service.told or at_seconds - service.at > STALE_SECONDS:
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
            try:
                self._follow()
                if self._services:
                    self._burst()
                    self._changed.wait(self._random.uniform(LEAST_REST_SECONDS, MOST_REST_SECONDS))
                else:
                    self._changed.wait()
            except (OSError, ValueError) as error:  # too many open files, say: then every wait counts
                log.warning("long_waits_unknown", error=str(error))
                with self._lock:
                    for service in self._services.values():
                        service.told = False
                self._changed.wait(CHOOSE_AGAIN_SECONDS)
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
        started = begun = self._monotonic()
        first = before = [s.look() for s in services]
        total, seen = [0] * len(services), [0.0] * len(services)
        while min(seen) < BURST_SECONDS and started - begun < MOST_BURST_SECONDS and not self._stop:
            time.sleep(LOOK_SECONDS)
            former, started = started, self._monotonic()
            looks = [s.look() for s in services]
            apart = self._monotonic() - former
            for i, (old, new) in enumerate(zip(before, looks, strict=True)):
                found = long_ns(old, new, apart)
                if found or apart <= LATE_LOOK_SECONDS:
                    total[i], seen[i] = total[i] + found, seen[i] + apart
            before = looks
        with self._lock:
            for i, service in enumerate(services):
                service.told = service.told and seen[i] >= 0.5 * BURST_SECONDS
                if seen[i] > 0.0:
                    waiting = float(service.still_waiting(first[i], before[i]))
                    service.credit(started, total[i] / 1e9 / seen[i] + waiting + service.unknown)
