"""What a demonstration found: the figures of each arm, as they are printed, reported, and given out as JSON."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from colocate.demo.load import TIMEOUT_SECONDS, Sample

ARMS = ("alone", "unmanaged", "besteffort", "colocate")
TITLES = {
    "alone": "service alone",
    "unmanaged": "with unmanaged batch",
    "besteffort": "batch as kubelet's BestEffort",
    "colocate": "batch in colocate's tier",
}
P999_REQUESTS = 10_000


class Arm(msgspec.Struct, kw_only=True):
    """One arm. Latencies are milliseconds; utilizations are ratios; `None` is not measurable."""

    p50_ms: float
    p99_ms: float
    p999_ms: float | None
    requests_per_second: float
    batch_work_per_second: float
    cpu_utilization: float
    effective_machine_utilization: float | None
    requests: int = 0
    failed_requests: int = 0
    batch_processes_lost: int = 0


class Detail(msgspec.Struct, kw_only=True):
    """What the charts need of an arm."""

    seconds: list[float] = []
    p99_by_second_ms: list[float] = []
    cdf_ms: list[tuple[float, float]] = []


class Result(msgspec.Struct, kw_only=True):
    """The whole demonstration."""

    simulated: bool
    host_unchanged: bool
    changes: list[str] = []
    machine: dict[str, str] = {}
    target_p99_ms: float = 0.0
    service_peak_per_second: float = 0.0
    batch_alone_per_second: float = 0.0
    arms: dict[str, Arm] = {}
    details: dict[str, Detail] = {}
    decisions: list[str] = []
    lever: str = ""


def quantile(ordered: Sequence[float], q: float) -> float:
    """The nearest-rank quantile of sorted values; 0 without values."""
    if not ordered:
        return 0.0
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)]


def summarize(samples: Sequence[Sample], seconds: float) -> tuple[dict[str, float | int | None], Detail]:
    """Latency figures of an arm and its chart data; a failed request counts as one that took the whole timeout."""
    latencies = sorted(1e3 * (s.latency if s.ok else max(s.latency, TIMEOUT_SECONDS)) for s in samples)
    figures: dict[str, float | int | None] = {
        "p50_ms": round(quantile(latencies, 0.5), 3),
        "p99_ms": round(quantile(latencies, 0.99), 3),
        "p999_ms": round(quantile(latencies, 0.999), 3) if len(latencies) >= P999_REQUESTS else None,
        "requests_per_second": round(sum(s.ok for s in samples) / seconds, 1) if seconds else 0.0,
        "requests": len(samples),
        "failed_requests": sum(not s.ok for s in samples),
    }
    detail = Detail()
    buckets: dict[int, list[float]] = {}
    for sample in samples:
        buckets.setdefault(int(sample.start), []).append(1e3 * sample.latency)
    for second in sorted(buckets):
        detail.seconds.append(float(second))
        detail.p99_by_second_ms.append(round(quantile(sorted(buckets[second]), 0.99), 3))
    step = max(len(latencies) // 200, 1)
    detail.cdf_ms = [
        (round(v, 3), round((i + 1) / len(latencies), 4)) for i, v in enumerate(latencies) if i % step == 0
    ]
    return figures, detail
