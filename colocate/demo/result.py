"""What a demonstration found: the figures of each arm, as they are printed, reported, and given out as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from colocate.demo.load import TIMEOUT_SECONDS, Sample
from colocate.policy.schema import PolicySpec

ARMS = ("alone", "unmanaged", "besteffort", "colocate")
TITLES = {
    "alone": "without batch",
    "unmanaged": "with unmanaged batch",
    "besteffort": "batch as kubelet's BestEffort",
    "colocate": "batch in colocate's tier",
}
SHORT_TITLES = {"alone": "no batch", "unmanaged": "unmanaged", "besteffort": "BestEffort", "colocate": "colocate"}
P999_REQUESTS = 10_000


class Arm(msgspec.Struct, kw_only=True):
    """One arm. Latencies are milliseconds; utilizations are ratios; `None` is not measurable."""

    p50_ms: float
    p99_ms: float
    p999_ms: float | None
    requests_per_second: float
    batch_work_per_second: float
    """What was kept: less than was done where a job died."""
    cpu_utilization: float
    effective_machine_utilization: float | None
    requests: int = 0
    failed_requests: int = 0
    service_restarts: int = 0
    stalled_seconds: float | None = None
    """In which some task of the service waited for memory (PSI `some`)."""
    besteffort_work_ratio: float | None = None
    """Of what the BestEffort pod beside had to do."""
    batch_lost_per_second: float = 0.0
    batch_processes_lost: int = 0


class Event(msgspec.Struct, frozen=True):
    """Something that happened in an arm."""

    seconds: float
    text: str
    why: str = ""


class Detail(msgspec.Struct, kw_only=True):
    """What the charts need of an arm."""

    seconds: list[float] = []
    p99_by_second_ms: list[float] = []
    cdf_ms: list[tuple[float, float]] = []
    watched_seconds: list[float] = []
    memory_mib: dict[str, list[float]] = {}
    """Of the service, batch and BestEffort at those times; page cache in use counts."""
    batch_cores: list[float] = []
    stalled_ratio: list[float] = []
    events: list[Event] = []


class InCluster(msgspec.Struct, kw_only=True):
    """What only a demonstration on a Kubernetes node finds."""

    batch_pods_in_tier: int = 0
    """How many batch pods have their processes there."""
    placed_by_nri: bool = False
    """Whether that is all of them: there is no other way in for a pod."""
    published_batch_cpu_milli: int = 0
    """In the node's status, for schedulers, when batch was placed."""
    node_unchanged: bool = False
    """Whether the node's cgroups were as before the installation once all was deleted."""
    node_changes: list[str] = []


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
    node_mib: float = 0.0
    in_cluster: InCluster | None = None
    policy: str = ""
    """What of the policy is not its default."""

    @property
    def title(self) -> str:
        """What was run."""
        node = "small node" if self.in_cluster is None else "small Kubernetes node"
        return f"a service, a BestEffort pod and training jobs on a {node}"


def format_rate(per_second: float) -> str:
    """Samples in thousands, or modelled CPU seconds below ten: as many digits as say something."""
    return f"{per_second:.2f}" if 0 < per_second < 10 else f"{per_second:.0f}"


def differs_from_default(spec: PolicySpec) -> str:
    """The fields of a policy that are not at their default, with their values, as the policy file names them."""

    def differing(found: dict[str, Any], default: dict[str, Any], prefix: str) -> Iterator[str]:
        for name, value in found.items():
            if isinstance(value, dict):
                yield from differing(value, default[name], f"{prefix}{name}.")
            elif value != default[name]:
                yield f"{prefix}{name} {value:g}" if isinstance(value, float) else f"{prefix}{name} {value}"

    return ", ".join(differing(msgspec.to_builtins(spec), msgspec.to_builtins(PolicySpec()), ""))


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
