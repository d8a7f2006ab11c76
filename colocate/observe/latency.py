"""What a service feels: its own latency histogram, scraped from its Prometheus endpoint.

The text format is prometheus.io/docs/instrumenting/exposition_formats; parsing is prometheus-client's. A reading is the
cumulative histogram as it is: deltas, counter resets and quantiles are the model's.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from colocate.config import ServiceLevelObjective
from colocate.observe.http import read_body
from colocate.snapshot import Latency

if TYPE_CHECKING:  # imported with the first scrape: a node without objectives starts 0.1 s sooner and 10 MiB smaller
    import aiohttp

MAX_BODY_BYTES = 8 << 20
STALE_SECONDS = 5.0


class ScrapeFailed(Exception):  # noqa: N818 - an expected event of a loop, shown as a problem
    """The endpoint is down, slow, or does not expose the histogram."""


def parse_histogram(text: str, metric: str, labels: Mapping[str, str], at_seconds: float) -> Latency:
    """The sum of the matching series of one histogram. Raises ScrapeFailed."""
    from prometheus_client.parser import text_string_to_metric_families

    wanted = set(labels.items())
    counts: dict[float, float] = {}
    lines = [line for line in text.splitlines() if metric in line]
    try:
        families = list(text_string_to_metric_families("\n".join(lines) + "\n"))
    except (ValueError, KeyError) as error:
        raise ScrapeFailed(f"not Prometheus text: {error}") from error
    for family in families:
        for sample in family.samples:
            if sample.name == f"{metric}_bucket" and wanted <= set(sample.labels.items()):
                bound = _bound(sample.labels.get("le", ""), metric)
                counts[bound] = counts.get(bound, 0.0) + sample.value
    if math.inf not in counts or len(counts) < 2:
        raise ScrapeFailed(f"no histogram {metric} with labels {dict(labels)} (series {metric}_bucket with le)")
    bounds = sorted(counts)
    cumulative = [0.0, *(counts[b] for b in bounds)]
    if not all(math.isfinite(c) for c in cumulative) or any(b < a for a, b in itertools.pairwise(cumulative)):
        raise ScrapeFailed(f"the buckets of {metric} are not cumulative counts")
    return Latency(tuple(bounds[:-1]), tuple(counts[b] for b in bounds), round(at_seconds, 6))


def _bound(text: str, metric: str) -> float:
    try:
        bound = float(text)
    except ValueError:
        bound = math.nan
    if not bound >= 0:
        raise ScrapeFailed(f"a bucket of {metric} has le={text!r}, which is no upper bound in seconds")
    return bound


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


class LatencyScraper:
    """Keeps the latest reading of each service; one request at a time per service, so a slow one delays no other."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None
        self._running: dict[str, asyncio.Task[None]] = {}
        self.readings: dict[str, Latency] = {}
        self.problems: dict[str, str] = {}

    async def _scrape(self, name: str, slo: ServiceLevelObjective) -> None:
        import aiohttp

        if self._session is None:
            self._session = aiohttp.ClientSession(trust_env=False)
        try:
            timeout = aiohttp.ClientTimeout(total=slo.scrape_timeout)
            async with self._session.get(slo.url, timeout=timeout) as response:
                if response.status != 200:
                    raise ScrapeFailed(f"HTTP status {response.status}")
                body = await read_body(response, MAX_BODY_BYTES)
            reading = parse_histogram(body.decode(errors="replace"), slo.metric, slo.labels, time.monotonic())
            self.readings[name] = reading
            self.problems.pop(name, None)
            if warning := boundary_warning(reading, slo.p99):
                self.problems[name] = warning
        except TimeoutError:
            self.problems[name] = f"{slo.url} did not answer within {slo.scrape_timeout:g} s"
        except (aiohttp.ClientError, OSError, ScrapeFailed) as error:
            # What a stranger's page says may end up on a terminal.
            said = "".join(c if c.isprintable() else "?" for c in str(error)[:300])
            self.problems[name] = f"{slo.url}: {said}"

    async def scrape(self, objectives: Mapping[str, ServiceLevelObjective], wait_seconds: float) -> None:
        """Start a scrape of every service that has none under way and wait a little for the answers."""
        for name, slo in objectives.items():
            task = self._running.get(name)
            if task is None or task.done():
                self._running[name] = asyncio.create_task(self._scrape(name, slo))
        for name in set(self._running) - set(objectives):
            self._running.pop(name).cancel()
            self.readings.pop(name, None)
            self.problems.pop(name, None)
        if self._running:
            await asyncio.wait(self._running.values(), timeout=wait_seconds)
        now = time.monotonic()
        for name, slo in objectives.items():
            reading = self.readings.get(name)
            if reading is not None and now - reading.at_seconds > max(STALE_SECONDS, slo.window):
                del self.readings[name]  # an old quantile is no evidence; the law falls back to waiting

    async def close(self) -> None:
        """Cancel what is under way and close the connections."""
        for task in self._running.values():
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)
        if self._session is not None:
            await self._session.close()
