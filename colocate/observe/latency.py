"""What a service feels: its own latency histogram, scraped from its Prometheus endpoint.

A reading is the cumulative histogram as it is, with its time: deltas, counter resets and quantiles are the model's. A
page is filtered line by line as it arrives and parsed in a thread, so that one of megabytes keeps nobody waiting.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import structlog

from colocate.observe.histogram_page import HistogramReader, ScrapeFailed
from colocate.policy.schema import ServiceLevelObjective
from colocate.snapshot import Latency

if TYPE_CHECKING:  # imported with the first scrape: a node without objectives starts 0.1 s sooner and 10 MiB smaller
    import aiohttp

log = structlog.get_logger()
MAX_WANTED_BYTES = 8 << 20
MAX_PAGE_BYTES = 64 << 20
REFUSED_SECONDS = 60.0
"""How long a page that is too large is let be."""
MIXED_SECONDS = 60.0
"""How long after the last sign of it a page is taken as that of several processes."""


def boundary_warning(latency: Latency, target_seconds: float) -> str:
    """A warning when no bucket boundary is above the target or within 25 % of it: p99 would be a guess; else empty."""
    if latency.bounds_seconds[-1] < target_seconds:
        return (
            f"no bucket boundary above the target {target_seconds:g} s (highest {latency.bounds_seconds[-1]:g} s): add "
            "one, for a p99 beyond all buckets counts as a violation"
        )
    near = min(latency.bounds_seconds, key=lambda b: abs(b - target_seconds))
    if abs(near - target_seconds) <= 0.25 * target_seconds:
        return ""
    return f"no bucket boundary near the target {target_seconds:g} s (nearest {near:g} s): add one, or p99 is a guess"


class _Mixture:
    """Whether successive pages belong to one process: a worker's page after another's has counts that fall and rise."""

    def __init__(self) -> None:
        self._highest: tuple[float, Latency] | None = None
        """The page before the last fall, and when it was read."""
        self._last: tuple[Latency, float | None] | None = None
        self._starts: dict[float, float] = {}
        self.until = float("-inf")

    def add(self, reading: Latency, start: float | None, now: float) -> bool:
        """Take a page in; whether pages are known to be mixed."""
        last = self._last
        self._last = (reading, start)
        if last is not None and last[0].bounds_seconds == reading.bounds_seconds:
            fell = any(b < a for a, b in zip(last[0].counts, reading.counts, strict=True))
            if fell and self._highest is not None and now - self._highest[0] < MIXED_SECONDS:
                self.until = now + MIXED_SECONDS  # it fell again: no process starts anew each moment
            if fell:
                self._highest = (now, last[0])
            elif self._highest is not None and now - self._highest[0] < MIXED_SECONDS:
                before = self._highest[1]
                if before.bounds_seconds == reading.bounds_seconds and reading.counts[-1] >= before.counts[-1] > 0:
                    self.until = now + MIXED_SECONDS  # the former count is back
        if start is not None:
            if (
                last is not None
                and last[1] not in (None, start)
                and now - self._starts.get(start, -1e9) < MIXED_SECONDS
            ):
                self.until = now + MIXED_SECONDS  # a process that had answered before answers again
            self._starts[start] = now
            self._starts = {s: t for s, t in self._starts.items() if now - t < MIXED_SECONDS}
        return now < self.until


class _Source:
    """One service's endpoint."""

    def __init__(self, slo: ServiceLevelObjective) -> None:
        self.slo = slo
        self.reader = HistogramReader(slo.metric, slo.labels, slo.unit, slo.p99)
        self.mixture = _Mixture()
        self.running: asyncio.Task[None] | None = None
        self.not_before = float("-inf")


class LatencyScraper:
    """Keeps the latest reading of each service; one request at a time per service, so a slow one delays no other."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None
        self._sources: dict[str, _Source] = {}
        self.readings: dict[str, Latency] = {}
        self.problems: dict[str, str] = {}

    async def _fetch(self, source: _Source) -> bytes:
        """The wanted lines of the page. Raises ScrapeFailed if it is too large."""
        import aiohttp

        if self._session is None:
            self._session = aiohttp.ClientSession(trust_env=False)
        timeout = aiohttp.ClientTimeout(total=source.slo.scrape_timeout)
        async with self._session.get(source.slo.url, timeout=timeout) as response:
            if response.status != 200:
                raise ScrapeFailed(f"HTTP status {response.status}")
            wanted, left, total, kept = [], b"", 0, 0
            async for chunk in response.content.iter_any():
                total += len(chunk)
                *lines, left = (left + chunk).split(b"\n")
                found = [line for line in lines if line.startswith(source.reader.prefixes)]
                wanted += found
                kept += sum(map(len, found))
                if total > MAX_PAGE_BYTES or kept > MAX_WANTED_BYTES or len(left) > MAX_WANTED_BYTES:
                    source.not_before = time.monotonic() + REFUSED_SECONDS
                    raise ScrapeFailed(
                        f"more than {MAX_WANTED_BYTES >> 20} MiB of text for {source.slo.metric}: choose series by "
                        f"`labels`; it is asked again in {REFUSED_SECONDS:g} s"
                    )
            return b"\n".join([*wanted, left])

    async def _scrape(self, name: str, source: _Source) -> None:
        import aiohttp

        slo = source.slo
        try:
            page = await self._fetch(source)
            at = time.monotonic()
            reading, start = await asyncio.to_thread(source.reader.read, page, at)
            if source.mixture.add(reading, start, at):
                self.readings.pop(name, None)  # evidence that is known to be mixed is worse than none
                raise ScrapeFailed(
                    "successive pages do not belong to one process (counts fall and come back): expose all workers "
                    "together; until then waiting is the evidence"
                )
            self.readings[name] = reading
            self.problems.pop(name, None)
            if warning := boundary_warning(reading, slo.p99):
                self.problems[name] = warning
        except TimeoutError:
            self.problems[name] = f"{slo.url} did not answer within {slo.scrape_timeout:g} s"
        except (aiohttp.ClientError, OSError, ScrapeFailed) as error:
            self.problems[name] = f"{slo.url}: {_printable(error)}"
        except Exception as error:
            # A stranger's page may bring down a parser, never the objective without a word.
            self.problems[name] = f"{slo.url}: {type(error).__name__}: {_printable(error)}"
            log.exception("scrape_failed", service=name)

    async def scrape(self, objectives: Mapping[str, ServiceLevelObjective], wait_seconds: float) -> None:
        """Start a scrape of every service that has none under way and wait a little for the answers."""
        now = time.monotonic()
        for name, slo in objectives.items():
            source = self._sources.get(name)
            if source is None or source.slo != slo:
                self._forget(name)
                source = self._sources[name] = _Source(slo)
            if (source.running is None or source.running.done()) and now >= source.not_before:
                source.running = asyncio.create_task(self._scrape(name, source))
        for name in set(self._sources) - set(objectives):
            self._forget(name)
        running = [s.running for s in self._sources.values() if s.running is not None and not s.running.done()]
        if running and wait_seconds > 0:
            await asyncio.wait(running, timeout=wait_seconds)

    def _forget(self, name: str) -> None:
        source = self._sources.pop(name, None)
        if source is not None and source.running is not None:
            source.running.cancel()
        self.readings.pop(name, None)
        self.problems.pop(name, None)

    async def close(self) -> None:
        """Cancel what is under way and close the connections."""
        running = [s.running for s in self._sources.values() if s.running is not None]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        if self._session is not None:
            await self._session.close()


def _printable(error: Exception) -> str:
    """What a stranger's page says may end up on a terminal."""
    return "".join(c if c.isprintable() else "?" for c in str(error)[:300])
