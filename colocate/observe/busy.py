"""Whether a service has a request just now, seen within milliseconds: by its CPU use, or by its own gauges.

A service that waits for its card with the CPU spinning (CUDA's default) uses CPU whenever it works, and hardly any
else: one read of its cgroup's counter every few milliseconds tells. The kernel adds up what a running task uses with
its clock only (4 ms); that a thread of the service has just been put onto a CPU it tells at once, in the third number
of /proc/<pid>/task/<tid>/schedstat (Documentation/scheduler/sched-stats.rst), which is believed of a service whose
threads hardly wake for anything but requests. One that sleeps meanwhile, or spins while it has
nothing to do, is not seen so; its gauges of requests (`slo.gauges`) are, fifty times a second. What a service is like
is found out by looking for some seconds (`Sensor.verdict`).
"""

from __future__ import annotations

import contextlib
import http.client
import math
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

from colocate.cgroup.port import FilePort, KernelPort
from colocate.cgroup.tree import processes_anywhere
from colocate.snapshot import Workload

LOOK_SECONDS = 0.0045
KEPT_LOOKS, LEAST_LOOKS = 4000, 400
"""Twenty seconds, and two."""
SPINS_CORES = 0.2
"""A service that uses more than this in the quietest fifth of the time is busy without requests."""
RATIO = 3.0
LEAST_CORES = 0.02
SEES_RATIO = 0.8
"""CPU use that shows less of the time that gauges do is not the sensor."""
GAUGE_SECONDS, GAUGE_CHECK_SECONDS = 0.02, 2.0
"""How often gauges are read where they are the sensor, and where they only check one."""
GAUGE_TIMEOUT_SECONDS = 0.5
GAUGE_BYTES = 4 << 20
KEPT_AGES, STALE_GAUGES = 200, 3.0
"""An answer that is so many times older than usual is none."""
BY_SECONDS = 0.1
MOST_THREADS = 16
"""Of a service, whose wakings are looked at."""
WAKES_FOR_NOTHING_SECOND = 2.0
"""So often a second may its threads wake for something that is no request."""
LEAST_WAKES = 5
FOLLOWS_SECONDS = 0.015
"""CPU use shows by then what a thread woke for."""
SHARE_SECONDS = 60.0
"""How long the share of busy time remembers."""


class Verdict(NamedTuple):
    """By what a service is seen, or why by nothing, and how much of the time it was busy so."""

    sensor: str
    problem: str
    busy_ratio: float | None
    known: bool = True
    """False: it has been looked at for too short a time."""


class Sensor:
    """One service: what its CPU use is like with and without requests."""

    def __init__(self) -> None:
        self._looks: deque[float] = deque(maxlen=KEPT_LOOKS)
        self._last: tuple[float, int] | None = None
        self._threshold: float | None = None
        self._until_judged = LEAST_LOOKS
        self._problem, self._judged = "its CPU use is being looked at", False
        self._shares: dict[str, tuple[float, float]] = {}
        """Busy share by CPU and by gauges: the sum, and of how much time, the old decaying."""
        self.cpu_busy = True
        self.gauge: float | None = None
        self.gauge_at = float("-inf")
        self.gauge_problem = ""
        self.gauge_age = 0.0
        """How old an answer is when the next one comes, the 95th percentile. Seconds."""
        self._ages: deque[float] = deque(maxlen=KEPT_AGES)
        self._wakes: int | None = None
        self._woke_at: float | None = None
        """When a thread woke, as long as it is not known for what."""
        self._for_work, self._for_nothing, self._quiet_seconds = 0.0, 0.0, 0.0
        """Wakings that CPU use followed, and others; in how much time without use. The old count less."""
        self._woken_looked_at = float("-inf")
        self.awake = False
        """Whether a thread has just woken, of a service of which that says something."""

    def woken(self, now: float, wakes: int | None) -> None:
        """How often its threads have been put onto a CPU, all together; after `look`. None: not known."""
        before, self._wakes = self._wakes, wakes
        passed, self._woken_looked_at = now - self._woken_looked_at, now
        self.awake = False
        if before is None or wakes is None or not 0.0 < passed < 1.0 or self._threshold is None:
            self._woke_at = None
            return
        left = 1.0 - passed / SHARE_SECONDS
        self._for_work *= left
        self._for_nothing *= left
        self._quiet_seconds *= left
        woke = wakes != before
        if self.cpu_busy:
            self._for_work += self._woke_at is not None or woke
            self._woke_at = None
            return
        self._quiet_seconds += passed
        if self._woke_at is not None and now - self._woke_at > FOLLOWS_SECONDS:
            self._for_nothing += 1
            self._woke_at = None
        if woke and self._woke_at is None:
            self._woke_at = now
        seldom = self._for_nothing <= WAKES_FOR_NOTHING_SECOND * max(self._quiet_seconds, 1.0)
        self.awake = self._woke_at is not None and seldom and self._for_work >= LEAST_WAKES

    def look(self, now: float, usage_us: int) -> None:
        """One reading of its CPU counter."""
        last, self._last = self._last, (now, usage_us)
        if last is None or now <= last[0] or usage_us < last[1]:
            return
        cores = (usage_us - last[1]) * 1e-6 / (now - last[0])
        self._looks.append(cores)
        self._until_judged -= 1
        if self._until_judged <= 0:
            self._judge()
        self.cpu_busy = self._threshold is None or cores > self._threshold
        if self._threshold is not None:
            self._share("cpu", self.cpu_busy, now - last[0])

    def _share(self, by: str, busy: bool, seconds: float) -> None:
        total, span = self._shares.get(by, (0.0, 0.0))
        left = max(1.0 - seconds / SHARE_SECONDS, 0.0)
        self._shares[by] = total * left + busy * seconds, span * left + seconds

    def _ratio(self, by: str) -> float | None:
        total, span = self._shares.get(by, (0.0, 0.0))
        return total / span if span > 1.0 else None

    def _judge(self) -> None:
        self._until_judged, self._judged = LEAST_LOOKS, True
        ordered = sorted(self._looks)
        quiet, loud = ordered[len(ordered) // 5], ordered[int(0.99 * len(ordered))]
        self._threshold = None
        if quiet > SPINS_CORES:
            self._problem = f"it uses {quiet:.2f} cores in the quietest fifth of the time: it spins, or is hardly idle"
        elif loud > LEAST_CORES and loud < RATIO * quiet:
            self._problem = f"its CPU use is hardly more with requests ({loud:.2f} cores) than without ({quiet:.2f})"
        else:
            self._problem, self._threshold = "", max(LEAST_CORES, math.sqrt(quiet * loud))

    def heard(self, value: float | None, at: float, answered: float, problem: str) -> None:
        """What its gauges said, asked and answered at these times."""
        if value is not None and self.gauge is not None and at - self.gauge_at < GAUGE_CHECK_SECONDS / 2:
            self._ages.append(answered - self.gauge_at)  # until then the answer before was all that was known
            ordered = sorted(self._ages)
            self.gauge_age = ordered[int(0.95 * len(ordered))]
        if value is not None and self.gauge is not None:
            self._share("gauge", value > 0.0, min(at - self.gauge_at, GAUGE_CHECK_SECONDS))
        self.gauge, self.gauge_at, self.gauge_problem = value, at, problem

    def verdict(self, *, has_gauges: bool) -> Verdict:
        """By what it is seen now."""
        by_cpu, by_gauge = self._ratio("cpu"), self._ratio("gauge")
        works = has_gauges and self.gauge is not None
        if not self._judged or (works and by_gauge is None):
            return Verdict("", self._problem or "its gauges are being looked at", None, known=False)
        if self._threshold is not None and by_cpu is not None:
            if not works or by_gauge is None or by_cpu >= SEES_RATIO * by_gauge:
                return Verdict("cpu", "", by_cpu)
            missed = f"its CPU use shows work in {by_cpu:.0%} of the time, its gauges {by_gauge:.0%}"
            return Verdict("gauge", missed, by_gauge)
        if works:
            return Verdict("gauge", self._problem, by_gauge)
        return Verdict("", self.gauge_problem or self._problem, None)


class Watched(NamedTuple):
    """Where a service is looked at."""

    path: str
    inodes: dict[str, int]
    url: str = ""
    gauges: tuple[str, ...] = ()


class _Threads:
    """The threads of one service: how often they have been put onto a CPU."""

    def __init__(self) -> None:
        self._files: dict[tuple[int, int], int] = {}
        """(pid, thread) -> descriptor of its schedstat."""
        self._counts: dict[tuple[int, int], int] = {}
        self._gone = 0
        """Of threads that have ended: the sum may not fall."""

    def watch(self, pids: Iterable[int]) -> None:
        """Look at the threads that these processes have now; at none of a service that has too many."""
        there = []
        for pid in pids:
            with contextlib.suppress(OSError):
                there += [(pid, int(name)) for name in os.listdir(f"/proc/{pid}/task")]
            if len(there) > MOST_THREADS:
                there = []
                break
        for key in set(self._files) - set(there):
            self._drop(key)
        for pid, thread in set(there) - set(self._files):
            with contextlib.suppress(OSError):
                path = f"/proc/{pid}/task/{thread}/schedstat"
                self._files[pid, thread] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                self._gone -= self._read(pid, thread)  # what it did before is no waking of now

    def _drop(self, key: tuple[int, int]) -> None:
        os.close(self._files.pop(key))
        self._gone += self._counts.pop(key, 0)

    def _read(self, pid: int, thread: int) -> int:
        count = int(os.pread(self._files[pid, thread], 64, 0).rpartition(b" ")[2])
        self._counts[pid, thread] = count
        return count

    def total(self) -> int | None:
        """None where none is looked at."""
        for pid, thread in list(self._files):
            try:
                self._read(pid, thread)
            except (OSError, IndexError, ValueError):
                self._drop((pid, thread))
        return sum(self._counts.values()) + self._gone if self._files else None

    def close(self) -> None:
        """Look at none any more."""
        self.watch(())


class _Gauges(threading.Thread):
    """Reads the gauges of one service: one that answers slowly delays nobody else's."""

    def __init__(self, what: Watched, sensor: Sensor) -> None:
        super().__init__(name="gauges", daemon=True)
        self._what, self._sensor = what, sensor
        self._ended = threading.Event()
        self._link: http.client.HTTPConnection | None = None
        parts = urlsplit(what.url)
        self._secure, self._host, self._path = parts.scheme == "https", parts.netloc, parts.path or "/"

    def run(self) -> None:
        """Until it is ended."""
        while not self._ended.is_set():
            at = time.monotonic()
            value, problem = self._ask()
            self._sensor.heard(value, at, time.monotonic(), problem)
            seldom = value is None or self._sensor.verdict(has_gauges=True).sensor == "cpu"
            every = GAUGE_CHECK_SECONDS if seldom else GAUGE_SECONDS
            self._ended.wait(max(at + every - time.monotonic(), 0.001))
        if self._link is not None:
            self._link.close()

    def _ask(self) -> tuple[float | None, str]:
        try:
            if self._link is None:
                make = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
                self._link = make(self._host, timeout=GAUGE_TIMEOUT_SECONDS)
            self._link.request("GET", self._path)
            answer = self._link.getresponse()
            page = answer.read(GAUGE_BYTES)
            if answer.status != 200:
                return None, f"{self._what.url}: HTTP status {answer.status}"
        except (OSError, http.client.HTTPException) as error:
            if self._link is not None:
                self._link.close()
            self._link = None
            return None, f"{self._what.url}: {error or type(error).__name__}"
        return gauge_sum(page, self._what.gauges)

    def end(self) -> None:
        """After what is under way."""
        self._ended.set()


class Busy:
    """All services that are on cards with batch. `look` is the hand's, every five milliseconds."""

    def __init__(self, port: FilePort) -> None:
        self._port = port
        self._watched: dict[str, tuple[Watched, Sensor, _Gauges | None]] = {}
        self._hierarchy, self._file = _usage_file(port)
        self._by: dict[str, tuple[float, str]] = {}
        """By which sensor each is seen, and until when that is taken as known."""
        self._threads: dict[str, _Threads] = {}
        self._lock = threading.Lock()
        """Of the descriptors: one thread changes them, another one reads."""

    def watch(self, services: Mapping[str, Watched]) -> None:
        """From now on look at these, and no others."""
        before, after = self._watched, dict[str, tuple[Watched, Sensor, _Gauges | None]]()
        for id_, what in services.items():
            known = before.get(id_)
            if known is not None and known[0] == what:
                after[id_] = known
                continue
            sensor = Sensor()
            gauges = _Gauges(what, sensor) if what.gauges else None
            after[id_] = what, sensor, gauges
            if gauges is not None:
                gauges.start()
        self._watched = after
        self._by = {id_: by for id_, by in self._by.items() if after.get(id_) == before.get(id_)}
        with self._lock:
            for id_ in set(self._threads) - set(after):
                self._threads.pop(id_).close()
            for id_, (what, _, _) in after.items() if isinstance(self._port, KernelPort) else ():
                pids = processes_anywhere(self._port, what.path)
                self._threads.setdefault(id_, _Threads()).watch(sorted(pids))
        for id_, (_, _, gauges) in before.items():
            if gauges is not None and (id_ not in after or after[id_][2] is not gauges):
                gauges.end()

    def look(self, now: float) -> None:
        """Read the CPU counters, and who has woken."""
        for id_, (what, sensor, _) in self._watched.items():
            text = self._port.read(self._hierarchy, what.path, self._file, what.inodes.get(self._hierarchy))
            if text is not None:
                sensor.look(now, _usage_us(self._file, text))
            with self._lock:
                threads = self._threads.get(id_)
                sensor.woken(now, threads.total() if threads is not None else None)

    def busy(self, id_: str, now: float) -> bool:
        """Whether a service has a request, as far as is known; it has if nothing is."""
        known = self._watched.get(id_)
        if known is None:
            return True
        what, sensor, _ = known
        until, seen = self._by.get(id_, (0.0, ""))
        if now >= until:
            seen = sensor.verdict(has_gauges=bool(what.gauges)).sensor
            self._by[id_] = now + BY_SECONDS, seen
        if seen == "gauge":
            return sensor.gauge != 0.0 or now - sensor.gauge_at > STALE_GAUGES * max(sensor.gauge_age, GAUGE_SECONDS)
        return sensor.cpu_busy or sensor.awake if seen == "cpu" else True

    def verdicts(self) -> dict[str, Verdict]:
        """Of each service."""
        return {i: s.verdict(has_gauges=bool(w.gauges)) for i, (w, s, _) in self._watched.items()}

    def slowest_seconds(self, services: Iterable[str]) -> float:
        """How old what is known of these services may be, by the sensors in use."""
        ages = [LOOK_SECONDS]
        for what, sensor, _ in (self._watched[s] for s in services if s in self._watched):
            if sensor.verdict(has_gauges=bool(what.gauges)).sensor == "gauge":
                ages.append(max(sensor.gauge_age, GAUGE_SECONDS))
        return max(ages)

    def close(self) -> None:
        """Look at nothing any more."""
        self.watch({})


def gauge_sum(page: bytes, names: tuple[str, ...]) -> tuple[float | None, str]:
    """The sum of all series of these gauges on a page; None, and why, where one has no series."""
    total = 0.0
    for name in names:
        wanted, found = name.encode(), False
        at = page.find(wanted)
        while at >= 0:
            end = at + len(wanted)
            if (at == 0 or page[at - 1 : at] == b"\n") and page[end : end + 1] in (b"{", b" "):
                line = page[end : page.find(b"\n", end) if b"\n" in page[end:] else len(page)]
                try:
                    total, found = total + float(line.rpartition(b"}")[2].split()[0]), True
                except (ValueError, IndexError):
                    return None, f"{name} is no number"
            at = page.find(wanted, end)
        if not found:
            return None, f"the page has no series of {name}"
    return total, ""


def watched(workload: Workload, url: str, gauges: tuple[str, ...]) -> Watched:
    """Where a service of the snapshot is looked at."""
    return Watched(workload.path, dict(workload.inodes), url, gauges)


def _usage_file(port: FilePort) -> tuple[str, str]:
    if (hierarchy := port.layout.hierarchy("cpuacct")) is not None and port.layout.version == 1:
        return hierarchy, "cpuacct.usage"
    return port.layout.hierarchy("cpu") or "unified", "cpu.stat"


def _usage_us(file: str, text: str) -> int:
    if file == "cpuacct.usage":
        return int(text) // 1000
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith("usage_usec")), 0)
