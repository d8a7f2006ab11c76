"""What the node's workloads do now and will need soon: `forecast(snapshot, state, spec, kernels) -> (state, Forecast)`.

A workload's peak is the largest of its p95 over a decaying histogram (half-life 12 h for CPU, 24 h for memory, as
VPA and koordlet keep), the peak of this and the next half hour on earlier days, and its smoothed use now, plus 10 %.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from colocate.config import PolicySpec
from colocate.model.histogram import (
    CPU_BOUNDS_CORES,
    CPU_HALF_LIFE_SECONDS,
    MEMORY_BOUNDS_BYTES,
    MEMORY_HALF_LIFE_SECONDS,
)
from colocate.model.kernels import Kernels
from colocate.model.reference import Floats
from colocate.model.slack import (
    beyond_buckets,
    quantile_of,
    slack_of_latency,
    slack_of_waiting,
    trim_window,
    window_counts,
)
from colocate.snapshot import Latency, NodeSnapshot, Workload

SLOTS = 48
AHEAD = 1
MARGIN = 1.1
SEASON_FADE = 0.999
MODEL_VERSION = 1
BEYOND_BUCKETS_SLACK = -1.0
"""Of a p99 above every bucket: nobody knows how far, so it counts as twice its target."""


class WorkloadForecast(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One workload now and soon. Ratios are shares of time since the last snapshot."""

    usage_cores: float | None = None
    peak_cores: float | None = None
    working_set_bytes: int | None = None
    peak_working_set_bytes: int | None = None
    cpu_waiting_ratio: float | None = None
    memory_pressure_ratio: float | None = None
    memory_full_ratio: float | None = None
    throttled_ratio: float | None = None
    p99_seconds: float | None = None
    window_requests: int = 0
    new_requests: int = 0
    slack: float | None = None
    evidence: str = ""
    """`latency` (the service's own histogram) or `waiting` (pressure and run delay)."""


class Forecast(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """The node now and soon."""

    interval_seconds: float
    workloads: dict[str, WorkloadForecast] = {}
    node_cores: float = 0.0
    services_cores: float = 0.0
    services_peak_cores: float = 0.0
    services_peak_bytes: int = 0
    besteffort_cores: float = 0.0
    besteffort_waiting_ratio: float = 0.0
    batch_cores: float = 0.0
    system_cores: float = 0.0
    idle_cores: float | None = None
    idle_cpus: tuple[int, ...] = ()
    """CPUs that were idle for more than half of the interval."""


class ModelState(msgspec.Struct, frozen=True, kw_only=True):
    """What the model remembers; rows of the arrays belong to `ids`."""

    ids: tuple[str, ...] = ()
    cpu_weights: Floats = msgspec.field(default_factory=lambda: np.zeros((0, CPU_BOUNDS_CORES.size)))
    memory_weights: Floats = msgspec.field(default_factory=lambda: np.zeros((0, MEMORY_BOUNDS_BYTES.size)))
    season_cores: Floats = msgspec.field(default_factory=lambda: np.zeros((0, SLOTS)))
    smooth_cores: Floats = msgspec.field(default_factory=lambda: np.zeros(0))
    smooth_waiting: Floats = msgspec.field(default_factory=lambda: np.zeros(0))
    previous: NodeSnapshot | None = None
    windows: dict[str, tuple[Latency, ...]] = {}


def _aligned(state: ModelState, ids: tuple[str, ...]) -> ModelState:
    """The same state with exactly these rows: known ones kept, new ones empty."""
    if ids == state.ids:
        return state
    row = {id_: i for i, id_ in enumerate(state.ids)}
    old = np.array([row.get(id_, -1) for id_ in ids], dtype=np.int64)
    known = old >= 0

    def take(array: Floats, fill: float) -> Floats:
        result = np.full((len(ids), *array.shape[1:]), fill)
        result[known] = array[old[known]]
        return result

    return ModelState(
        ids=ids,
        cpu_weights=take(state.cpu_weights, 0.0),
        memory_weights=take(state.memory_weights, 0.0),
        season_cores=take(state.season_cores, np.nan),
        smooth_cores=take(state.smooth_cores, np.nan),
        smooth_waiting=take(state.smooth_waiting, np.nan),
        previous=state.previous,
        windows=state.windows,
    )


def _column(workloads: list[Workload | None], field: str) -> Floats:
    values = [getattr(w, field) if w is not None else None for w in workloads]
    return np.array([np.nan if v is None else v for v in values], dtype=np.float64)


def _latency(state: ModelState, workload: Workload) -> tuple[tuple[Latency, ...], dict[str, Any]]:
    """The new window of readings and the figures they give."""
    old = state.windows.get(workload.id, ())
    if workload.latency is None or workload.objective is None:
        return (), {}
    window = trim_window((*old, workload.latency), workload.objective.window_seconds)
    counts = window_counts(window)
    total = int(sum(counts))
    figures: dict[str, Any] = {"window_requests": total}
    if old and old[-1].at_seconds < workload.latency.at_seconds:
        figures["new_requests"] = max(int(workload.latency.counts[-1] - old[-1].counts[-1]), 0)
    if total >= workload.objective.minimum_samples:
        p99 = quantile_of(workload.latency.bounds_seconds, counts, 0.99)
        if p99 is not None:
            figures["p99_seconds"] = round(p99, 6)
            slack = slack_of_latency(workload.objective.p99_seconds, p99)
            figures["slack"] = min(slack, BEYOND_BUCKETS_SLACK) if beyond_buckets(counts, 0.99) else slack
            figures["evidence"] = "latency"
    return window, figures


def _numbers(values: Floats, digits: int) -> list[float | None]:
    """The values as plain rounded numbers, None for NaN: one pass, for a number at a time costs ten times as much."""
    return [None if v != v else v for v in np.round(values, digits).tolist()]


def forecast(
    snapshot: NodeSnapshot, state: ModelState, spec: PolicySpec, kernels: Kernels
) -> tuple[ModelState, Forecast]:
    """The next model state and the forecast for this snapshot."""
    previous = state.previous
    seconds = snapshot.monotonic_seconds - previous.monotonic_seconds if previous else 0.0
    ids = tuple(sorted(snapshot.workloads))
    state = _aligned(state, ids)
    now = [snapshot.workloads[i] for i in ids]
    before: list[Workload | None] = []
    for workload in now:
        old = previous.workloads.get(workload.id) if previous else None
        before.append(old if old is not None and old.inodes == workload.inodes else None)
    elapsed = seconds if seconds > 0 else np.nan

    def rate(field: str) -> Floats:
        return kernels.rates(_column(list(now), field), _column(before, field), elapsed) / 1e6

    cores = rate("cpu_usage_us")
    run_delay, pressure = rate("run_delay_us"), rate("cpu_pressure_us")
    waiting = np.minimum(np.fmax(run_delay, pressure), 1.0)
    memory_some, memory_full = rate("memory_pressure_us"), rate("memory_pressure_full_us")
    throttled = rate("throttled_us")
    working_set = _column(list(now), "working_set_bytes")
    slot = int(snapshot.time_seconds % 86400 / 86400 * SLOTS)
    step = seconds if seconds > 0 else 0.0
    cpu_weights = kernels.histogram_add(
        state.cpu_weights, CPU_BOUNDS_CORES, cores, float(2.0 ** (-step / CPU_HALF_LIFE_SECONDS))
    )
    memory_weights = kernels.histogram_add(
        state.memory_weights, MEMORY_BOUNDS_BYTES, working_set, float(2.0 ** (-step / MEMORY_HALF_LIFE_SECONDS))
    )
    smooth_cores = kernels.smooth(state.smooth_cores, cores, 0.6, 0.2)
    smooth_waiting = kernels.smooth(state.smooth_waiting, waiting, 0.5, 0.5)
    season = kernels.season_add(state.season_cores, slot, smooth_cores, SEASON_FADE)
    p95 = kernels.histogram_quantile(cpu_weights, CPU_BOUNDS_CORES, 0.95)
    peak_cores = kernels.peak(p95, season, slot, AHEAD, smooth_cores, MARGIN)
    p98 = kernels.histogram_quantile(memory_weights, MEMORY_BOUNDS_BYTES, 0.98)
    peak_bytes = np.fmax(p98, working_set) * MARGIN

    rows = zip(
        now,
        *(_numbers(a, 4) for a in (cores, peak_cores, smooth_waiting, memory_some, memory_full, throttled)),
        _numbers(peak_bytes, 0),
        strict=True,
    )
    result: dict[str, WorkloadForecast] = {}
    windows: dict[str, tuple[Latency, ...]] = {}
    for workload, used, peak, waits, some, full, held, most in rows:
        figures: dict[str, Any] = {}
        if workload.tier == "service":
            windows[workload.id], figures = _latency(state, workload)
            if "slack" not in figures and waits is not None:
                figures["slack"] = slack_of_waiting(spec.cpu.pressure / 100, waits)
                figures["evidence"] = "waiting"
        result[workload.id] = WorkloadForecast(
            usage_cores=used,
            peak_cores=peak,
            working_set_bytes=workload.working_set_bytes,
            peak_working_set_bytes=None if most is None else int(most),
            cpu_waiting_ratio=waits,
            memory_pressure_ratio=some,
            memory_full_ratio=full,
            throttled_ratio=held,
            **figures,
        )
    state = ModelState(
        ids=ids,
        cpu_weights=cpu_weights,
        memory_weights=memory_weights,
        season_cores=season,
        smooth_cores=smooth_cores,
        smooth_waiting=smooth_waiting,
        previous=snapshot,
        windows={k: v for k, v in windows.items() if v},
    )
    return state, _node(snapshot, previous, result, elapsed)


def _node(
    snapshot: NodeSnapshot, previous: NodeSnapshot | None, workloads: dict[str, WorkloadForecast], seconds: float
) -> Forecast:
    def total(tier: str, field: str) -> float:
        values = [getattr(workloads[w.id], field) for w in snapshot.workloads.values() if w.tier == tier]
        return float(sum(v for v in values if v is not None))

    busy: float | None = None
    idle: float | None = None
    if previous and snapshot.cpu_busy_us is not None and previous.cpu_busy_us is not None and seconds > 0:
        busy = (snapshot.cpu_busy_us - previous.cpu_busy_us) / 1e6 / seconds
        idle_us = (snapshot.cpu_idle_us or 0) - (previous.cpu_idle_us or 0)
        idle = min(max(idle_us / 1e6 / seconds, 0.0), float(len(snapshot.cpus)))
    batch = total("batch", "usage_cores")
    if snapshot.tier and previous and previous.tier and snapshot.tier.cpu_usage_us is not None and seconds > 0:
        used = snapshot.tier.cpu_usage_us - (previous.tier.cpu_usage_us or 0)
        batch = max(used / 1e6 / seconds, batch) if used >= 0 else batch
    idle_cpus = tuple(
        int(cpu)
        for cpu, us in sorted(snapshot.cpu_idle_each_us.items(), key=lambda item: int(item[0]))
        if previous and cpu in previous.cpu_idle_each_us and us - previous.cpu_idle_each_us[cpu] > 0.5e6 * seconds
    )
    services, besteffort = total("service", "usage_cores"), total("besteffort", "usage_cores")
    waiting = [workloads[w.id].cpu_waiting_ratio or 0.0 for w in snapshot.workloads.values() if w.tier == "besteffort"]
    return Forecast(
        interval_seconds=0.0 if np.isnan(seconds) else round(seconds, 6),
        workloads=workloads,
        node_cores=float(len(snapshot.cpus)),
        services_cores=round(services, 4),
        services_peak_cores=round(total("service", "peak_cores"), 4),
        services_peak_bytes=int(total("service", "peak_working_set_bytes")),
        besteffort_cores=round(besteffort, 4),
        besteffort_waiting_ratio=round(max(waiting, default=0.0), 4),
        batch_cores=round(batch, 4),
        system_cores=0.0 if busy is None else round(max(busy - services - besteffort - batch, 0.0), 4),
        idle_cores=None if idle is None else round(idle, 4),
        idle_cpus=idle_cpus,
    )
