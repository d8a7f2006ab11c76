"""What the node's workloads do now and will need soon: `forecast(snapshot, state, spec, kernels) -> (state, Forecast)`.

A workload's peak is the largest of its p95 over a decaying histogram (half-life 12 h for CPU, 24 h for memory, as
VPA and koordlet keep), the peak of this and the next half hour on earlier days, and its smoothed use now, plus 10 %.
Nothing counts ticks: every rate, weight and time constant is in the seconds between two readings.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from colocate.model.histogram import (
    CPU_BOUNDS_CORES,
    CPU_HALF_LIFE_SECONDS,
    MEMORY_BOUNDS_BYTES,
    MEMORY_HALF_LIFE_SECONDS,
)
from colocate.model.kernels import Kernels
from colocate.model.needs import Needs, look, slots_of
from colocate.model.reference import Floats, approach, decay
from colocate.model.slack import (
    beyond_buckets,
    beyond_target,
    quantile_of,
    slack_of_latency,
    slack_of_waiting,
    trim_window,
    window_counts,
)
from colocate.policy.schema import PolicySpec
from colocate.snapshot import Latency, NodeSnapshot, Workload

SLOTS = 48
AHEAD = 1
MARGIN = 1.1
SEASON_KEPT_A_DAY = 0.7
RISE_SECONDS, FALL_SECONDS = 1.1, 4.5
"""Time constants of the smoothed use: it rises with the load and falls behind it."""
SILENT_SECONDS = 5.0
MODEL_VERSION = 4
BEYOND_BUCKETS_SLACK = -1.0
"""Of a p99 above every bucket: nobody knows how far, so it counts as twice its target."""
COUNTERS = (
    "cpu_usage_us", "cpu_pressure_us", "waited_us", "throttled_us", "memory_pressure_us", "memory_pressure_full_us",
    "memory_limit_hits", "long_waits_us",
)  # fmt: skip
TOTALS = ("waited_seconds", "used_seconds", "requests", "over_requests", "long_waits_seconds", "looked_at_seconds",
          "looked_at_last")  # fmt: skip


class WorkloadForecast(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One workload now and soon. Ratios are shares of the time since its last reading; None without a new one.

    The totals grow for as long as the model knows the workload, whatever its own counters do; a difference of two is
    what happened between two readings.
    """

    at_seconds: float = 0.0
    usage_cores: float | None = None
    peak_cores: float | None = None
    working_set_bytes: int | None = None
    peak_working_set_bytes: int | None = None
    cpu_waiting_ratio: float | None = None
    """It waited for a CPU, what its own limit throttled taken out; of one that is looked at closely, in long waits."""
    cpu_pressure_ratio: float | None = None
    """The same with every wait, however short."""
    memory_pressure_ratio: float | None = None
    memory_full_ratio: float | None = None
    throttled_ratio: float | None = None
    at_own_limit: bool = False
    """It met its own memory limit since its last reading."""
    waited_seconds: float = 0.0
    """By every wait, however short."""
    long_waits_seconds: float = 0.0
    """Of the time in which its waits were told apart by their length, ..."""
    looked_at_seconds: float = 0.0
    """... which is so long so far."""
    looked_at_last: float = 0.0
    """The last reading at which they were told apart."""
    used_seconds: float = 0.0
    requests: float = 0.0
    over_requests: float = 0.0
    """Of them, beyond the target."""
    p99_seconds: float | None = None
    window_requests: int = 0
    new_requests: int = 0
    latency_at_seconds: float = 0.0
    slack: float | None = None
    evidence: str = ""
    """`latency` (the service's own histogram) or `waiting` (pressure and run delay)."""
    silent: int = 0
    """1: its histogram went silent while it had requests; 2: nor was it within its target then."""


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
    needs_cores: float | None = None
    """What all but batch use now, smoothed over seconds; None where that is not known."""
    needs_bytes: int | None = None
    coming_cores: float | None = None
    """What they stay within while a batch pod runs, at the policy's risk (needs.py); None until that is learnt."""
    coming_bytes: int | None = None
    stranger: str = ""
    """The cgroup outside of services and batch that uses most CPU, and how much."""
    stranger_cores: float = 0.0


def _rows(*shape: int, fill: float = np.nan) -> Any:
    return msgspec.field(default_factory=lambda: np.full((0, *shape), fill))


class NodeBefore(msgspec.Struct, frozen=True, kw_only=True):
    """The node's counters at its last reading."""

    at_seconds: float
    busy_us: int | None = None
    idle_us: int | None = None
    idle_each_us: dict[str, int] = {}
    strangers_us: dict[str, int] = {}
    tier_us: int | None = None
    tier_at_seconds: float = 0.0


class ModelState(msgspec.Struct, frozen=True, kw_only=True):
    """What the model remembers; rows of the arrays belong to `ids`."""

    ids: tuple[str, ...] = ()
    inodes: tuple[int, ...] = ()
    """Of each workload's directory: another one is another workload."""
    counters: Floats = _rows(len(COUNTERS))
    at_seconds: Floats = _rows()
    totals: Floats = _rows(len(TOTALS), fill=0.0)
    cpu_weights: Floats = _rows(CPU_BOUNDS_CORES.size, fill=0.0)
    memory_weights: Floats = _rows(MEMORY_BOUNDS_BYTES.size, fill=0.0)
    season_cores: Floats = _rows(SLOTS)
    smooth_cores: Floats = _rows()
    slot: int = -1
    node: NodeBefore | None = None
    windows: dict[str, tuple[Latency, ...]] = {}
    needs: Needs = msgspec.field(default_factory=Needs)
    snapshot_seconds: float | None = None


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

    return msgspec.structs.replace(
        state,
        ids=ids,
        inodes=tuple(state.inodes[i] if i >= 0 else 0 for i in old),
        counters=take(state.counters, np.nan),
        at_seconds=take(state.at_seconds, np.nan),
        totals=take(state.totals, 0.0),
        cpu_weights=take(state.cpu_weights, 0.0),
        memory_weights=take(state.memory_weights, 0.0),
        season_cores=take(state.season_cores, np.nan),
        smooth_cores=take(state.smooth_cores, np.nan),
    )


def _inode(workload: Workload) -> int:
    return min(workload.inodes.values(), default=0)


def _latency(
    old: tuple[Latency, ...], workload: Workload, totals: Floats, now: float
) -> tuple[tuple[Latency, ...], dict[str, Any]]:
    """The new window of readings and the figures they give; the totals of requests are moved on in place."""
    reading, objective = workload.latency, workload.objective
    if reading is None or objective is None:
        return (), {}
    window = trim_window((*old, reading), objective.window_seconds)
    figures: dict[str, Any] = {"latency_at_seconds": reading.at_seconds}
    if len(window) > 1 and old and old[-1].at_seconds < reading.at_seconds:
        before = window[-2]
        figures["new_requests"] = max(int(reading.counts[-1] - before.counts[-1]), 0)
        totals[2] += reading.counts[-1] - before.counts[-1]
        target = objective.p99_seconds
        beyond = [beyond_target(r.bounds_seconds, r.counts, target) for r in (before, reading)]
        totals[3] += max(beyond[1] - beyond[0], 0.0)
    counts = window_counts(window)
    total = int(sum(counts))
    figures["window_requests"] = total
    p99 = quantile_of(reading.bounds_seconds, counts, 0.99) if counts else None
    if p99 is not None:
        slack = slack_of_latency(objective.p99_seconds, p99)
        slack = min(slack, BEYOND_BUCKETS_SLACK) if beyond_buckets(counts, 0.99) else slack
        if total >= objective.minimum_samples:
            figures |= {"p99_seconds": round(p99, 6), "slack": slack}
        if now - reading.at_seconds > max(SILENT_SECONDS, objective.window_seconds) and total > 0:
            figures["silent"] = 2 if slack < 0 else 1
    if "silent" not in figures:
        figures["evidence"] = "latency"
    return window, figures


def _numbers(values: Floats, digits: int) -> list[float | None]:
    """The values as plain rounded numbers, None for NaN: one pass, for a number at a time costs ten times as much."""
    return [None if v != v else v for v in np.round(values, digits).tolist()]


def _counters(workloads: list[Workload]) -> Floats:
    values = [[getattr(w, field) for field in COUNTERS] for w in workloads]
    return np.array([[np.nan if v is None else v for v in row] for row in values], dtype=np.float64).reshape(
        len(workloads), len(COUNTERS)
    )


def waiting_ratios(pressure: Floats, waited: Floats, throttled: Floats) -> Floats:
    """The share of time in which a workload waited for a CPU that others had, shape (n,).

    PSI `some` (else the same from run delays) counts the time in which its own limit throttled it; that is taken out.
    """
    waiting = np.where(np.isnan(pressure), waited, pressure)
    ratios: Floats = np.clip(waiting - np.where(np.isnan(throttled), 0.0, throttled), 0.0, 1.0)
    return ratios


def felt_ratios(waiting: Floats, in_long_waits: Floats) -> Floats:
    """What of its waiting a workload feels, shape (n,): the long waits where they are known, never more than all."""
    return np.where(np.isnan(in_long_waits), waiting, np.minimum(waiting, in_long_waits))


def forecast(
    snapshot: NodeSnapshot, state: ModelState, spec: PolicySpec, kernels: Kernels
) -> tuple[ModelState, Forecast]:
    """The next model state and the forecast for this snapshot."""
    ids = tuple(sorted(snapshot.workloads))
    state = _aligned(state, ids)
    now = [snapshot.workloads[i] for i in ids]
    inodes = tuple(_inode(w) for w in now)
    at = np.array([w.at_seconds or snapshot.monotonic_seconds for w in now])
    same = np.array([old in (0, new) for old, new in zip(state.inodes, inodes, strict=True)], dtype=bool)
    elapsed = np.where(same, at - state.at_seconds, np.nan)
    elapsed = np.where(elapsed > 0.0, elapsed, np.nan)  # read again without a new reading: no rate
    counters = _counters(now)
    rates = kernels.rates(counters, state.counters, elapsed)
    cores, pressure, waited, throttled, some, full, _, in_long_waits = np.ascontiguousarray(rates.T) / 1e6
    hits = rates[:, COUNTERS.index("memory_limit_hits")]
    all_waiting, looked_at = waiting_ratios(pressure, waited, throttled), ~np.isnan(in_long_waits)
    waiting = felt_ratios(all_waiting, in_long_waits)
    told_apart = looked_at & ~np.isnan(waiting)
    seconds = np.where(np.isnan(elapsed), 0.0, elapsed)
    totals = state.totals.copy()
    totals[:, 0] += np.where(np.isnan(all_waiting), 0.0, all_waiting) * seconds
    totals[:, 4] += np.where(told_apart, waiting, 0.0) * seconds
    totals[:, 5] += np.where(told_apart, seconds, 0.0)
    totals[:, 6] = np.where(told_apart, at, totals[:, 6])
    totals[:, 1] += np.where(np.isnan(cores), 0.0, cores) * seconds
    working_set = np.array([np.nan if w.working_set_bytes is None else float(w.working_set_bytes) for w in now])
    slot = int(snapshot.time_seconds % 86400 / 86400 * SLOTS)
    entered = slot != state.slot
    left = decay(seconds, CPU_HALF_LIFE_SECONDS)
    cpu_weights = kernels.histogram_add(state.cpu_weights, CPU_BOUNDS_CORES, cores, seconds, left)
    left = decay(seconds, MEMORY_HALF_LIFE_SECONDS)
    memory_weights = kernels.histogram_add(state.memory_weights, MEMORY_BOUNDS_BYTES, working_set, seconds, left)
    rise, fall = approach(seconds, RISE_SECONDS), approach(seconds, FALL_SECONDS)
    smooth_cores = kernels.smooth(state.smooth_cores, cores, rise, fall)
    season = kernels.season_add(state.season_cores, slot, smooth_cores, SEASON_KEPT_A_DAY if entered else 1.0)
    p95 = kernels.histogram_quantile(cpu_weights, CPU_BOUNDS_CORES, 0.95)
    peak_cores = kernels.peak(p95, season, slot, AHEAD, smooth_cores, MARGIN)
    p98 = kernels.histogram_quantile(memory_weights, MEMORY_BOUNDS_BYTES, 0.98)
    peak_bytes = np.fmax(p98, working_set) * MARGIN

    windows: dict[str, tuple[Latency, ...]] = {}
    latencies: list[dict[str, Any]] = []
    for i, workload in enumerate(now):
        figures: dict[str, Any] = {}
        if workload.tier == "service" and workload.objective is not None:
            old = state.windows.get(workload.id, ())
            windows[workload.id], figures = _latency(old, workload, totals[i], snapshot.monotonic_seconds)
        latencies.append(figures)
    rows = zip(
        now,
        *(_numbers(a, 4) for a in (cores, peak_cores, waiting, all_waiting, some, full, throttled)),
        _numbers(peak_bytes, 0),
        (hits > 0.0).tolist(),
        np.round(totals, 6).tolist(),
        at.tolist(),
        looked_at.tolist(),
        latencies,
        strict=True,
    )
    result: dict[str, WorkloadForecast] = {}
    for (
        workload,
        used,
        peak,
        waits,
        all_waits,
        some_stall,
        all_stall,
        held,
        most,
        limit,
        total,
        read,
        close,
        more,
    ) in rows:
        if workload.tier == "service" and "evidence" not in more and waits is not None:
            threshold = spec.cpu.pressure / 100
            if close or waits <= 0.5 * threshold:  # else nobody knows what of it is felt
                more.setdefault("slack", slack_of_waiting(threshold, waits))
            more["evidence"] = "waiting"
        result[workload.id] = WorkloadForecast(
            at_seconds=read,
            usage_cores=used,
            peak_cores=peak,
            working_set_bytes=workload.working_set_bytes,
            peak_working_set_bytes=None if most is None else int(most),
            cpu_waiting_ratio=waits,
            cpu_pressure_ratio=all_waits,
            memory_pressure_ratio=some_stall,
            memory_full_ratio=all_stall,
            throttled_ratio=held,
            at_own_limit=limit,
            waited_seconds=total[0],
            long_waits_seconds=total[4],
            looked_at_seconds=total[5],
            looked_at_last=total[6],
            used_seconds=total[1],
            requests=total[2],
            over_requests=total[3],
            **more,
        )
    node = _node(snapshot, state.node, result)
    needs = _needs(snapshot, node, state.needs, spec)
    state = ModelState(
        ids=ids,
        inodes=inodes,
        counters=counters,
        at_seconds=at,
        totals=totals,
        cpu_weights=cpu_weights,
        memory_weights=memory_weights,
        season_cores=season,
        smooth_cores=smooth_cores,
        slot=slot,
        node=_node_now(snapshot),
        windows={k: v for k, v in windows.items() if v},
        needs=needs,
        snapshot_seconds=snapshot.monotonic_seconds,
    )
    if node.needs_cores is not None and node.needs_bytes is not None:
        node = msgspec.structs.replace(node, needs_cores=needs.now[0])
    coming = needs.bound
    if coming is not None:
        node = msgspec.structs.replace(node, coming_cores=round(coming[0], 4), coming_bytes=int(coming[1]))
    return state, node


def _needs(snapshot: NodeSnapshot, node: Forecast, before: Needs, spec: PolicySpec) -> Needs:
    """What all but batch need, remembered; a reading in which something is missing says nothing."""
    if node.needs_cores is None or node.needs_bytes is None:
        return before
    promised = spec.batch_resources
    return look(
        before,
        snapshot.time_seconds,
        node.interval_seconds,
        node.needs_cores,
        float(node.needs_bytes),
        slots_of(promised.runtime),
        promised.risk / 100,
    )


def _node_now(snapshot: NodeSnapshot) -> NodeBefore:
    tier = snapshot.tier
    return NodeBefore(
        at_seconds=snapshot.node_at_seconds or snapshot.monotonic_seconds,
        busy_us=snapshot.cpu_busy_us,
        idle_us=snapshot.cpu_idle_us,
        idle_each_us=snapshot.cpu_idle_each_us,
        strangers_us=snapshot.strangers_us,
        tier_us=None if tier is None else tier.cpu_usage_us,
        tier_at_seconds=0.0 if tier is None else tier.at_seconds or snapshot.monotonic_seconds,
    )


def _stranger(snapshot: NodeSnapshot, before: NodeBefore | None, seconds: float) -> tuple[str, float]:
    """The cgroup of nobody that we know which used most CPU, with its cores."""
    if before is None or seconds <= 0:
        return "", 0.0
    used = {p: us - before.strangers_us[p] for p, us in snapshot.strangers_us.items() if p in before.strangers_us}
    path = max(used, key=lambda p: (used[p], p), default="")
    return path, round(max(used.get(path, 0), 0) / 1e6 / seconds, 4)


def _node(snapshot: NodeSnapshot, before: NodeBefore | None, workloads: dict[str, WorkloadForecast]) -> Forecast:
    def total(tier: str, field: str) -> float:
        values = [getattr(workloads[w.id], field) for w in snapshot.workloads.values() if w.tier == tier]
        return float(sum(v for v in values if v is not None))

    at = snapshot.node_at_seconds or snapshot.monotonic_seconds
    seconds = max(at - before.at_seconds, 0.0) if before is not None else 0.0
    busy: float | None = None
    idle: float | None = None
    idle_cpus: tuple[int, ...] = ()
    if before is not None and snapshot.cpu_busy_us is not None and before.busy_us is not None and seconds > 0:
        busy = (snapshot.cpu_busy_us - before.busy_us) / 1e6 / seconds
        idle_us = (snapshot.cpu_idle_us or 0) - (before.idle_us or 0)
        idle = min(max(idle_us / 1e6 / seconds, 0.0), float(len(snapshot.cpus)))
        idle_cpus = tuple(
            sorted(
                int(cpu)
                for cpu, us in snapshot.cpu_idle_each_us.items()
                if cpu in before.idle_each_us and us - before.idle_each_us[cpu] > 0.5e6 * seconds
            )
        )
    batch, tier = total("batch", "usage_cores"), snapshot.tier
    if before is not None and tier is not None and tier.cpu_usage_us is not None and before.tier_us is not None:
        lasted = (tier.at_seconds or snapshot.monotonic_seconds) - before.tier_at_seconds
        in_place = sum(workloads[w.id].usage_cores or 0.0 for w in snapshot.of("batch") if w.in_place)
        used = tier.cpu_usage_us - before.tier_us
        batch = max(used / 1e6 / lasted + in_place, batch) if used >= 0 and lasted > 0 else batch
    services, besteffort = total("service", "usage_cores"), total("besteffort", "usage_cores")
    waiting = [workloads[w.id].cpu_waiting_ratio or 0.0 for w in snapshot.workloads.values() if w.tier == "besteffort"]
    needs_bytes: int | None = None
    if snapshot.memory_available_bytes is not None:
        held = max(total("batch", "working_set_bytes"), float(tier.working_set_bytes or 0) if tier is not None else 0.0)
        mapped = sum(w.mapped_bytes for w in snapshot.workloads.values() if w.tier == "service")
        needs_bytes = max(snapshot.memory_bytes - snapshot.memory_available_bytes + mapped - int(held), 0)
    stranger, stranger_cores = _stranger(snapshot, before, seconds)
    return Forecast(
        interval_seconds=round(seconds, 6),
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
        needs_cores=None if busy is None or snapshot.warming else round(max(busy - batch, 0.0), 4),
        needs_bytes=needs_bytes,
        stranger=stranger,
        stranger_cores=stranger_cores,
    )
