"""The utilization evaluation: what co-location gained, at what cost to services, from records, with intervals.

Records are queried with duckdb over their flat `series`. Arms of a switchback (`colocate evaluate`) are compared window
by window, the wash-out at the start of each window left out; without arms the report describes and draws no verdict.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec

from colocate.errors import BadInput
from colocate.model.interference import machines_saved
from colocate.model.slack import beyond_buckets, quantile_of
from colocate.model.statistics import Interval, difference_interval, relative_interval
from colocate.report.record import read_full, read_lines, segments

MIN_WINDOWS = 4
P999_REQUESTS = 10_000
OFF = ("off-frozen", "off-unmanaged")


class Compared(msgspec.Struct, frozen=True):
    """on against off: means of windows, and the difference or ratio with its 95 % interval."""

    name: str
    unit: str
    on: float | None
    off: float | None
    change: float | None
    low: float | None
    high: float | None
    kind: str
    """`difference` (on - off) or `ratio` (on / off)."""


class Report(msgspec.Struct, kw_only=True):
    """Everything that a page, JSON or CSV shows."""

    verdict: str
    supported: bool
    """Whether the data support a verdict at all."""
    start_seconds: float
    end_seconds: float
    ticks: int
    node_cores: float
    arms: dict[str, int] = {}
    """Number of windows of each arm."""
    off: str = ""
    compared: list[Compared] = []
    utilization: dict[str, float] = {}
    services: dict[str, dict[str, float]] = {}
    jobs: dict[str, dict[str, float]] = {}
    hours: list[dict[str, float]] = []
    costs: dict[str, float] = {}
    reasons: dict[str, int] = {}
    machines: int = 1
    machines_saved: float | None = None
    points: list[dict[str, float]] = []


def _load(path: Path, since_seconds: float | None) -> tuple[Any, list[dict[str, Any]]]:
    """A duckdb connection with the table `tick`, and the lines themselves. Raises BadInput."""
    import duckdb

    kept = ("time", "arm", "window", "series", "outcomes")  # a day of whole lines would not fit into memory
    lines = [{k: line[k] for k in kept if k in line} for file in segments(path) for line in read_lines(file)]
    if not lines:
        raise BadInput(f"{path} has no complete line of a record (yet)")
    newest = lines[-1]["time"]
    if since_seconds is not None:
        lines = [line for line in lines if line["time"] >= newest - since_seconds]
    connection = duckdb.connect()
    connection.execute(
        "create table tick(time double, arm varchar, win integer, dt double, cores double, services double, "
        "services_peak double, besteffort double, batch double, system double, frozen integer)"
    )
    rows: list[tuple[Any, ...]] = []
    window, last = -1, None
    for line in lines:
        arm, series = line.get("arm", ""), line["series"]
        if (arm, line.get("window")) != last:
            window, last = window + 1, (arm, line.get("window"))
        line["win"] = window
        rows.append(
            (line["time"], arm, window, series["dt"], series["cores"], series["services"], series["services_peak"],
             series["besteffort"], series["batch"], series["system"], series["frozen"])
        )  # fmt: skip
    connection.executemany("insert into tick values (?,?,?,?,?,?,?,?,?,?,?)", rows)
    return connection, lines


def _windows(connection: Any, expression: str, arm_filter: str, wash_out: float) -> list[float]:
    """One value a window, without the wash-out at its start."""
    rows = connection.execute(
        f"with w as (select *, time - min(time) over (partition by win) as age from tick) "
        f"select {expression} from w where {arm_filter} and age >= ? and dt > 0 group by win order by win",
        [wash_out],
    ).fetchall()
    return [float(r[0]) for r in rows if r[0] is not None]


def _compare(name: str, unit: str, on: list[float], off: list[float], kind: str) -> Compared:
    mean_on = sum(on) / len(on) if on else None
    mean_off = sum(off) / len(off) if off else None
    interval: Interval | None = None
    if len(on) >= 2 and len(off) >= 2:
        if kind == "difference":
            interval = difference_interval(on, off)
        elif mean_off:
            interval = relative_interval(on, off)
    if interval is None:
        return Compared(name, unit, mean_on, mean_off, None, None, None, kind)
    return Compared(name, unit, mean_on, mean_off, interval.value, interval.low, interval.high, kind)


class _Seen:
    """What only whole snapshots tell, gathered in one pass over them."""

    def __init__(self, wash_out: float) -> None:
        self._wash_out = wash_out
        self._starts: dict[int, float] = {}
        self.arms: dict[int, str] = {}
        self.first: dict[tuple[int, str], Any] = {}
        """(window, service) -> its histogram after the wash-out"""
        self.latest: dict[tuple[int, str], Any] = {}
        self.throttled_us = 0
        self._throttled_before: int | None = None
        self.evictions = 0
        self.lost_core_seconds = 0.0
        self._saved_us: dict[str, int] = {}
        """job -> its CPU time at its last checkpoint"""

    def add(self, line: dict[str, Any]) -> None:
        """One tick."""
        window, snapshot = line["win"], line["snapshot"]
        self._starts.setdefault(window, line["time"])
        self.arms[window] = line.get("arm", "")
        throttled = snapshot.get("tier", {}).get("throttled_us")
        if throttled is not None:
            before = self._throttled_before
            self.throttled_us += throttled - before if before is not None and throttled >= before else 0
            self._throttled_before = throttled
        for outcome in line.get("outcomes", []):
            if outcome["knob"] == "signal" and outcome["status"] == "applied":
                self._signalled(snapshot.get("workloads", {}).get(outcome["workload"], {}), outcome["reason"])
        if line["time"] - self._starts[window] < self._wash_out:
            return
        for workload in snapshot.get("workloads", {}).values():
            reading = workload.get("latency")
            if workload["tier"] == "service" and reading is not None:
                self.first.setdefault((window, workload["name"]), reading)
                self.latest[window, workload["name"]] = reading

    def _signalled(self, job: dict[str, Any], reason: str) -> None:
        """What an evicted job loses is the CPU time that it has used since its last checkpoint, or since its start."""
        used = job.get("cpu_usage_us", 0)
        if reason == "CheckpointSignal":
            self._saved_us[job.get("id", "")] = used
        else:
            self.evictions += 1
            self.lost_core_seconds += max(used - self._saved_us.pop(job.get("id", ""), 0), 0) / 1e6


def _service_windows(seen: _Seen) -> dict[str, dict[str, list[tuple[str, float]]]]:
    """service -> figure -> (arm, value) a window: p50, p99 and p99.9 from the histogram's growth within the window.

    A window with too few requests has none; one in which the quantile is beyond all buckets has infinity.
    """
    found: dict[str, dict[str, list[tuple[str, float]]]] = {}
    for (window, name), end in seen.latest.items():
        figures = found.setdefault(name, {})
        begin = seen.first[window, name]
        if begin["bounds_seconds"] != end["bounds_seconds"]:
            continue
        cumulative = [b - a for a, b in zip(begin["counts"], end["counts"], strict=True)]
        if min(cumulative) < 0 or cumulative[-1] < 100:
            continue
        counts = [c - p for c, p in zip(cumulative, [0.0, *cumulative[:-1]], strict=True)]
        for key, q, least in (("p50", 0.5, 100), ("p99", 0.99, 100), ("p99.9", 0.999, P999_REQUESTS)):
            value = quantile_of(end["bounds_seconds"], counts, q)
            if value is not None and cumulative[-1] >= least:
                value = math.inf if beyond_buckets(counts, q) else 1e3 * value
                figures.setdefault(key, []).append((seen.arms[window], value))
    return found


def evaluate(
    path: Path, *, since_seconds: float | None = None, wash_out: float | None = None, machines: int = 1
) -> Report:
    """The report of the records; `wash_out` is a quarter of a window, at most 5 s, unless given. Raises BadInput."""
    connection, flat = _load(path, since_seconds)
    if wash_out is None:
        (length,) = connection.execute(
            "select median(l) from (select max(time) - min(time) as l from tick where arm <> '' group by win)"
        ).fetchone()
        wash_out = min(5.0, (length or 0.0) / 4)
    start, end = flat[0]["time"], flat[-1]["time"]
    windows = {line["time"]: line["win"] for line in flat}
    seen = _Seen(wash_out)
    for line in read_full(path):
        if line["time"] in windows:
            seen.add({**line, "win": windows[line["time"]]})
    counts = dict(connection.execute("select arm, count(distinct win) from tick group by arm").fetchall())
    off = next((a for a in OFF if a in counts), "")
    (cores,) = connection.execute("select avg(cores) from tick").fetchone()
    report = Report(
        verdict="",
        supported=False,
        start_seconds=start,
        end_seconds=end,
        ticks=len(flat),
        node_cores=round(cores, 3),
        arms={k or "observed": v for k, v in counts.items()},
        off=off,
        machines=machines,
    )
    _describe(connection, flat, seen, report)
    if off:
        _switchback(connection, seen, report, off, wash_out)
    report.verdict = verdict_of(report)
    return report


def _describe(connection: Any, flat: list[dict[str, Any]], seen: _Seen, report: Report) -> None:
    row = connection.execute(
        "select sum(services*dt)/sum(cores*dt), sum(besteffort*dt)/sum(cores*dt), sum(batch*dt)/sum(cores*dt), "
        "sum(system*dt)/sum(cores*dt), sum(services_peak*dt)/sum(cores*dt), sum(frozen*dt), "
        "sum((services > services_peak)::int) from tick where dt > 0"
    ).fetchone()
    keys = ("services", "besteffort", "batch", "system", "services_peak")
    report.utilization = {k: round(v or 0.0, 4) for k, v in zip(keys, row, strict=False)}
    report.costs = {
        "frozen_seconds": round(row[5] or 0.0, 1),
        "evictions": float(seen.evictions),
        "forecast_violations": float(row[6] or 0),
        "throttled_seconds": round(seen.throttled_us / 1e6, 2),
        "lost_core_seconds": round(seen.lost_core_seconds, 1),
    }
    hourly = connection.execute(
        "select floor(time/3600)*3600, sum(services*dt)/sum(cores*dt), sum(besteffort*dt)/sum(cores*dt), "
        "sum(batch*dt)/sum(cores*dt) from tick where dt > 0 group by 1 order by 1"
    ).fetchall()
    report.hours = [
        dict(zip(("time", "services", "besteffort", "batch"), (round(v, 4) for v in h), strict=True)) for h in hourly
    ]
    step = max(len(flat) // 240, 1)
    for line in flat[::step]:
        series = line["series"]
        report.points.append({k: series[k] for k in ("services", "besteffort", "batch", "system")})
        report.points[-1]["time"] = line["time"] - report.start_seconds
    for line in flat:
        for name, values in line["series"].get("service", {}).items():
            entry = report.services.setdefault(name, {"requests": 0.0, "worst_slack": 1.0, "stall": 0.0})
            entry["requests"] += values.get("requests", 0)
            entry["worst_slack"] = min(entry["worst_slack"], values.get("slack", 1.0))
            entry["stall"] += values.get("stall", 0.0) * line["series"]["dt"]
        for name, used in line["series"].get("job", {}).items():
            job = report.jobs.setdefault(name, {"core_seconds": 0.0})
            job["core_seconds"] = round(job["core_seconds"] + used * line["series"]["dt"], 3)
        for outcome in line.get("outcomes", []):
            report.reasons[outcome["reason"]] = report.reasons.get(outcome["reason"], 0) + 1


def _switchback(connection: Any, seen: _Seen, report: Report, off: str, wash_out: float) -> None:
    on_filter, off_filter = "arm = 'on'", f"arm = '{off}'"

    def both(expression: str) -> tuple[list[float], list[float]]:
        return (
            _windows(connection, expression, on_filter, wash_out),
            _windows(connection, expression, off_filter, wash_out),
        )

    busy = "sum((services+besteffort+batch+system)*dt)/sum(cores*dt)*100"
    on, without = both(busy)
    report.compared.append(_compare("CPU utilization", "%", on, without, "difference"))
    on_batch, off_batch = both("sum(batch*dt)/sum(dt)")
    report.compared.append(_compare("batch work", "cores", on_batch, off_batch, "difference"))
    for name, figures in _service_windows(seen).items():
        for key, values in {"p99": [], **figures}.items():
            if not values or any(math.isinf(v) for _, v in values):  # the verdict must not speak for it
                report.compared.append(Compared(f"{name} {key}", "ms", None, None, None, None, None, "ratio"))
                continue
            with_batch = [v for arm, v in values if arm == "on"]
            alone = [v for arm, v in values if arm == off]
            report.compared.append(_compare(f"{name} {key}", "ms", with_batch, alone, "ratio"))
    if on and without and off == "off-frozen":
        before, after = sum(without) / len(without) / 100, sum(on) / len(on) / 100
        saved = machines_saved(report.machines, before, after)
        report.machines_saved = None if saved is None else round(saved, 3)


def verdict_of(report: Report) -> str:
    """One sentence; it says so when the data do not support one. Sets `supported`."""
    if not report.off:
        return (
            f"No on/off windows in these records, so nothing can be said of gain or cost: batch used "
            f"{report.utilization['batch']:.1%} of the node. Measure with `colocate evaluate`."
        )
    fewest = min(report.arms.get("on", 0), report.arms.get(report.off, 0))
    by_name = {c.name: c for c in report.compared}
    gain = by_name.get("CPU utilization")
    tails = [c for c in report.compared if c.name.endswith(" p99")]
    if fewest >= MIN_WINDOWS and (gain is None or gain.change is None):
        return "Nothing of the windows is left after the wash-out: the data do not support a verdict."
    if gain is None or gain.change is None or gain.low is None or gain.high is None or fewest < MIN_WINDOWS:
        return (
            f"Only {fewest} window(s) of one arm: the data do not support a verdict (at least {MIN_WINDOWS} of each "
            "are needed)."
        )
    report.supported = True
    used = f"CPU utilization {gain.change:+.1f} points [{gain.low:+.1f}, {gain.high:+.1f}]"
    if not tails:
        return f"{used}; no service has a latency histogram, so the cost to services is unknown."
    judged = [(c.low, c.high, c) for c in tails if c.low is not None and c.high is not None and not math.isnan(c.low)]
    for _, _, hurt in sorted((j for j in judged if j[0] > 1.0), key=lambda j: -j[0])[:1]:
        return f"{used}, at a cost: {_words(hurt)} of what it is without ({report.off})."
    unjudged = [c.name for c in tails if c not in [j[2] for j in judged]]
    if unjudged:
        why = "too few requests, or none within its histogram's buckets, to judge"
        return f"{used}; {why} {unjudged[0]}: the data do not support a verdict on services."
    _, high, worst = max(judged, key=lambda j: j[1])
    if high <= 1.05:
        return f"{used}, without the services noticing: {_words(worst)} of what it is without ({report.off})."
    return (
        f"{used}; the data do not show whether services notice: {_words(worst)} of what it is without ({report.off})."
    )


def _words(compared: Compared) -> str:
    return f"{compared.name} {compared.change:.2f} x [{compared.low:.2f}, {compared.high:.2f}]"


def to_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """The comparison as a table for CSV."""
    columns = ["figure", "unit", "on", "off", "kind", "change", "low", "high"]

    def text(value: float | None) -> str:
        return "" if value is None else f"{value:.6g}"

    rows = [
        [c.name, c.unit, text(c.on), text(c.off), c.kind, text(c.change), text(c.low), text(c.high)]
        for c in report.compared
    ]
    rows += [[f"utilization {k}", "ratio", text(v), "", "mean", "", "", ""] for k, v in report.utilization.items()]
    rows += [[k.replace("_", " "), "", text(v), "", "sum", "", "", ""] for k, v in report.costs.items()]
    return columns, rows
