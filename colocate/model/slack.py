"""How far a service is from its target: from its own latency histogram, else from its pressure and run delay.

slack = (target - p99) / target, Heracles' measure (Lo et al., ISCA 2015): 1 is far, 0 is at the target, negative is a
violation. The quantile is Prometheus' histogram_quantile over the requests of the window.
"""

from __future__ import annotations

from collections.abc import Sequence

from colocate.snapshot import Latency


def trim_window(readings: Sequence[Latency], window_seconds: float) -> tuple[Latency, ...]:
    """The readings that still matter: the newest, and one that is at least a window older as the base.

    A counter reset or a change of the buckets (a restarted service) forgets all older readings.
    """
    kept: list[Latency] = []
    for reading in readings:
        if kept and (
            reading.bounds_seconds != kept[-1].bounds_seconds
            or any(new < old for new, old in zip(reading.counts, kept[-1].counts, strict=True))
        ):
            kept = []
        if not kept or reading.at_seconds > kept[-1].at_seconds:
            kept.append(reading)
    while len(kept) > 2 and kept[-1].at_seconds - kept[1].at_seconds >= window_seconds:
        del kept[0]
    return tuple(kept)


def window_counts(readings: Sequence[Latency]) -> tuple[float, ...]:
    """Requests per bucket (not cumulative) between the oldest and the newest reading; shape (b + 1,)."""
    if len(readings) < 2:
        return ()
    cumulative = [new - old for new, old in zip(readings[-1].counts, readings[0].counts, strict=True)]
    return tuple(c - p for c, p in zip(cumulative, [0.0, *cumulative[:-1]], strict=True))


def quantile_of(bounds_seconds: Sequence[float], counts: Sequence[float], q: float) -> float | None:
    """The quantile, linear within its bucket; the highest bound if it lies above all; None without requests."""
    total = sum(counts)
    if total <= 0:
        return None
    wanted, running, lower = q * total, 0.0, 0.0
    for bound, count in zip(bounds_seconds, counts, strict=False):
        if count > 0 and running + count >= wanted:
            return lower + (bound - lower) * (wanted - running) / count
        running, lower = running + count, bound
    return bounds_seconds[-1]


def beyond_target(bounds_seconds: Sequence[float], counts: Sequence[float], target_seconds: float) -> float:
    """How many of the cumulative counts are requests beyond the target; linear within the bucket in which it lies."""
    below, lower = 0.0, 0.0
    for bound, cumulative in zip(bounds_seconds, counts, strict=False):
        if bound >= target_seconds:
            share = (target_seconds - lower) / (bound - lower) if bound > lower else 1.0
            return counts[-1] - (below + share * (cumulative - below))
        below, lower = cumulative, bound
    return counts[-1] - below


def beyond_buckets(counts: Sequence[float], q: float) -> bool:
    """Whether the quantile lies above the highest finite bound, so that `quantile_of` cannot tell how far."""
    total = sum(counts)
    return total > 0 and sum(counts[:-1]) < q * total


def slack_of_latency(target_seconds: float, p99_seconds: float) -> float:
    """(target - p99) / target, rounded to 4 places."""
    return round((target_seconds - p99_seconds) / target_seconds, 4)


def slack_of_waiting(threshold_ratio: float, waiting_ratio: float) -> float:
    """The same measure for the share of time in which the service waits for a CPU, against its threshold."""
    return round((threshold_ratio - waiting_ratio) / threshold_ratio, 4)
