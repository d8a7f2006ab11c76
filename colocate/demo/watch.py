"""What happened in an arm, on one time axis: the memory of each group, batch's cores, stalls, and events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from types import TracebackType

from colocate.cgroup.port import FilePort
from colocate.cgroup.tree import inodes_of
from colocate.demo.result import Detail, Event
from colocate.observe.cgroup import read_workload
from colocate.snapshot import Tier, Workload

MIB = 1 << 20


class Watch:
    """Reads groups of cgroups (name -> their full paths) every `every` seconds while it is open."""

    def __init__(self, port: FilePort, paths: dict[str, Sequence[str]], every: float) -> None:
        self._port, self._paths, self._every = port, paths, every
        self._started = 0.0
        self._seen: list[tuple[float, dict[str, list[Workload]]]] = []
        self._events: list[Event] = []

    async def __aenter__(self) -> Watch:
        """Begin."""
        self._started = time.monotonic()
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """End, with a last look."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._look()

    async def _run(self) -> None:
        while True:
            self._look()
            await asyncio.sleep(self._every)

    def _look(self) -> None:
        now = time.monotonic() - self._started
        found: dict[str, list[Workload]] = {}
        for name, paths in self._paths.items():
            tier: Tier = "service" if name == "service" else "batch"
            read = (
                read_workload(self._port, id_=name, name=name, tier=tier, path=p, inodes=inodes_of(self._port, p))
                for p in paths
            )
            found[name] = [w for w in read if w is not None]
        self._seen.append((round(now, 2), found))

    def note(self, text: str, why: str = "") -> None:
        """Something happened just now."""
        self._events.append(Event(round(time.monotonic() - self._started, 2), text, why))

    def _totals(self, name: str, field: str) -> list[tuple[float, int]]:
        """When, and the sum over the groups; what none of them tells is left out."""
        read = ((at, [getattr(w, field) for w in found.get(name, ())]) for at, found in self._seen)
        known = ((at, [v for v in values if v is not None]) for at, values in read)
        return [(at, sum(values)) for at, values in known if values]

    @property
    def stalled_seconds(self) -> float | None:
        """In which some task of the service waited for memory; None where the kernel does not tell."""
        totals = self._totals("service", "memory_pressure_us")
        return round((totals[-1][1] - totals[0][1]) / 1e6, 3) if totals else None

    def _rates(self, name: str, field: str) -> list[float]:
        """Of a total of microseconds: what it grew by a second up to each look; 0 where it is not known."""
        totals = dict(self._totals(name, field))
        rates, before = [], None
        for at, _ in self._seen:
            now = totals.get(at)
            rate = 0.0
            if before is not None and now is not None and at > before[0]:
                rate = max(now - before[1], 0) / 1e6 / (at - before[0])
            rates.append(round(rate, 3))
            before = (at, now) if now is not None else before
        return rates

    def fill(self, detail: Detail) -> None:
        """What the charts need."""
        detail.watched_seconds = [at for at, _ in self._seen]
        for name in self._paths:
            used = ((w.working_set_bytes or 0 for w in found.get(name, ())) for _, found in self._seen)
            detail.memory_mib[name] = [round(sum(of_each) / MIB, 1) for of_each in used]
        detail.batch_cores = self._rates("batch", "cpu_usage_us")
        detail.stalled_ratio = self._rates("service", "memory_pressure_us")
        detail.events = self._events
