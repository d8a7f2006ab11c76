"""The utilization evaluation: what co-location gained, at what cost to services, from records, with intervals.

Records are queried with duckdb over their flat `series`. Arms of a switchback (`colocate evaluate`) are compared pair
by pair of neighbouring windows, the wash-out at the start of each left out; without arms the report draws no verdict.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from colocate.errors import BadInput
from colocate.model.interference import machines_saved
from colocate.model.slack import beyond_buckets, quantile_of
from colocate.model.statistics import Interval, difference_interval, ratio_interval
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
    gpus: dict[str, dict[str, float]] = {}
    """By UUID: mean shares of its time (`busy`, `services`, `batch`), hours seen, and hours that batch had; where it
    tells what it draws, also `joules`, which `services_joules`, `batch_joules` and `idle_joules` sum up to."""
    energy: dict[str, float] = {}
    """Of all GPUs: kWh, those of batch, and grams of CO2 where the grid's intensity was given."""
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


Windows = dict[int, tuple[str, float]]
"""window -> (arm, value)"""


def _windows(connection: Any, expression: str, wash_out: float) -> Windows:
    """One value a window of an evaluation, without the wash-out at its start."""
    rows = connection.execute(
        f"with w as (select *, time - min(time) over (partition by win) as age from tick) "
        f"select win, any_value(arm), {expression} from w where arm <> '' and age >= ? and dt > 0 group by win",
        [wash_out],
    ).fetchall()
    return {int(win): (arm, float(value)) for win, arm, value in rows if value is not None}


def paired(windows: Windows, off: str) -> tuple[list[float], list[float]]:
    """(on, off) of neighbouring windows of different arms: as they were drawn, so that drift hits both alike."""
    on_values, off_values = [], []
    waiting: tuple[int, str, float] | None = None
    for window, (arm, value) in sorted(windows.items()):
        if arm not in ("on", off):
            continue
        if waiting is not None and waiting[1] != arm and window - waiting[0] == 1:
            with_batch, without = (value, waiting[2]) if arm == "on" else (waiting[2], value)
            on_values.append(with_batch)
            off_values.append(without)
            waiting = None
        else:
            waiting = (window, arm, value)
    return on_values, off_values


def _compare(name: str, unit: str, windows: Windows, off: str, kind: str, comparisons: int = 1) -> Compared:
    on, without = paired(windows, off)
    mean_on = sum(on) / len(on) if on else None
    mean_off = sum(without) / len(without) if without else None
    interval: Interval | None = None
    if len(on) >= 2:
        if kind == "difference":
            interval = difference_interval(on, without, comparisons)
        elif min(*on, *without) > 0:
            interval = ratio_interval(on, without, comparisons)
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


def _service_windows(seen: _Seen) -> dict[str, dict[str, Windows]]:
    """service -> figure -> window -> (arm, value): p50, p99 and p99.9 from the histogram's growth within the window.

    A window with too few requests has none; one in which the quantile is beyond all buckets has infinity.
    """
    found: dict[str, dict[str, Windows]] = {}
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
                figures.setdefault(key, {})[window] = (seen.arms[window], value)
    return found


def evaluate(
    path: Path,
    *,
    since_seconds: float | None = None,
    wash_out: float | None = None,
    machines: int = 1,
    carbon_intensity: float | None = None,
) -> Report:
    """The report of the records; `wash_out` is a quarter of a window, at most 5 s, unless given; `carbon_intensity` in
    grams of CO2 a kWh. Raises BadInput.
    """
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
    _of_energy(report, carbon_intensity)
    report.verdict = verdict_of(report)
    return report


def _effective(flat: list[dict[str, Any]]) -> float:
    """Effective machine utilization (Heracles, ISCA 2015) as far as records tell it.

    The services' load as a share of the most that they had in these records, by requests where they are counted and by
    CPU otherwise, plus batch CPU as a share of the node.
    """
    loads, batch, seconds = [], 0.0, 0.0
    for line in flat:
        series = line["series"]
        if series["dt"] <= 0:
            continue
        requests = sum(s.get("requests", 0) for s in series.get("service", {}).values())
        loads.append((requests / series["dt"], series["services"], series["dt"]))
        batch += series["batch"] / series["cores"] * series["dt"]
        seconds += series["dt"]
    if not seconds:
        return 0.0
    column = 0 if sum(r for r, _, _ in loads) > 0 else 1
    ordered = sorted(load[column] for load in loads)
    most = ordered[int(0.99 * (len(ordered) - 1))]  # one odd tick is no peak
    mean = sum(load[column] * load[2] for load in loads) / seconds
    return round((min(mean / most, 1.0) if most > 0 else 0.0) + batch / seconds, 4)


def _hours(connection: Any, flat: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Per hour: who used the node, how long services were past their target, how long they waited, evictions."""
    hourly = connection.execute(
        "select floor(time/3600)*3600, sum(services*dt)/sum(cores*dt), sum(besteffort*dt)/sum(cores*dt), "
        "sum(batch*dt)/sum(cores*dt) from tick where dt > 0 group by 1 order by 1"
    ).fetchall()
    names = ("time", "services", "besteffort", "batch")
    hours = {h[0]: dict(zip(names, (round(v, 4) for v in h), strict=True)) for h in hourly}
    for line in flat:
        hour, series = hours.get(line["time"] // 3600 * 3600), line["series"]
        if hour is None:
            continue
        felt = series.get("service", {}).values()
        past = any(s.get("slack", 1.0) < 0 for s in felt)
        hour["past_target_seconds"] = round(hour.get("past_target_seconds", 0.0) + past * series["dt"], 1)
        waited = max((s.get("waiting", 0.0) for s in felt), default=0.0)
        hour["waited_seconds"] = round(hour.get("waited_seconds", 0.0) + waited * series["dt"], 1)
        told = sum(
            o["knob"] == "signal" and o["status"] == "applied" and o["reason"] != "CheckpointSignal"
            for o in line.get("outcomes", [])
        )
        hour["evictions"] = hour.get("evictions", 0.0) + told
    return list(hours.values())


def _describe(connection: Any, flat: list[dict[str, Any]], seen: _Seen, report: Report) -> None:
    row = connection.execute(
        "select sum(services*dt)/sum(cores*dt), sum(besteffort*dt)/sum(cores*dt), sum(batch*dt)/sum(cores*dt), "
        "sum(system*dt)/sum(cores*dt), sum(services_peak*dt)/sum(cores*dt), sum(frozen*dt), "
        "sum((services > peak_before)::int), sum((services_peak+batch)*dt)/sum(cores*dt) "
        "from (select *, lag(services_peak) over (order by time) as peak_before from tick) where dt > 0"
    ).fetchone()
    keys = ("services", "besteffort", "batch", "system", "services_peak")
    report.utilization = {k: round(v or 0.0, 4) for k, v in zip(keys, row, strict=False)}
    report.utilization["allocated"] = round(row[7] or 0.0, 4)
    report.utilization["effective"] = _effective(flat)
    report.costs = {
        "frozen_seconds": round(row[5] or 0.0, 1),
        "evictions": float(seen.evictions),
        "forecast_violations": float(row[6] or 0),
        "throttled_seconds": round(seen.throttled_us / 1e6, 2),
        "lost_core_seconds": round(seen.lost_core_seconds, 1),
    }
    report.hours = _hours(connection, flat)
    step = max(len(flat) // 240, 1)
    for line in flat[::step]:
        series = line["series"]
        report.points.append({k: series[k] for k in ("services", "besteffort", "batch", "system")})
        report.points[-1]["time"] = line["time"] - report.start_seconds
    for line in flat:
        for name, values in line["series"].get("service", {}).items():
            entry = report.services.setdefault(name, {"requests": 0.0, "worst_slack": 1.0, "stall": 0.0, "waited": 0.0})
            entry["waited"] += values.get("waiting", 0.0) * line["series"]["dt"]
            entry["requests"] += values.get("requests", 0)
            entry["worst_slack"] = min(entry["worst_slack"], values.get("slack", 1.0))
            entry["stall"] += values.get("stall", 0.0) * line["series"]["dt"]
        for name, used in line["series"].get("job", {}).items():
            job = report.jobs.setdefault(name, {"core_seconds": 0.0})
            job["core_seconds"] = round(job["core_seconds"] + used * line["series"]["dt"], 3)
        for uuid, shares in line["series"].get("gpu", {}).items():
            card = report.gpus.setdefault(uuid, dict.fromkeys(("busy", "services", "batch", "hours"), 0.0))
            card["hours"] += line["series"]["dt"] / 3600
            for kind in ("busy", "services", "batch"):
                card[kind] += shares.get(kind, 0.0) * line["series"]["dt"] / 3600
            if "watts" in shares:
                add_energy(card, shares, line["series"]["dt"])
        for outcome in line.get("outcomes", []):
            report.reasons[outcome["reason"]] = report.reasons.get(outcome["reason"], 0) + 1
    _of_gpus(report)


def _switchback(connection: Any, seen: _Seen, report: Report, off: str, wash_out: float) -> None:
    busy = "sum((services+besteffort+batch+system)*dt)/sum(cores*dt)*100"
    utilization = _windows(connection, busy, wash_out)
    report.compared.append(_compare("CPU utilization", "%", utilization, off, "difference"))
    batch = _windows(connection, "sum(batch*dt)/sum(dt)", wash_out)
    report.compared.append(_compare("batch work", "cores", batch, off, "difference"))
    services = _service_windows(seen)
    for name, figures in services.items():
        for key, values in {"p99": {}, **figures}.items():
            if not values or any(math.isinf(v) for _, v in values.values()):  # the verdict must not speak for it
                report.compared.append(Compared(f"{name} {key}", "ms", None, None, None, None, None, "ratio"))
                continue
            # One verdict over all services: each interval is as much wider as there are services.
            report.compared.append(_compare(f"{name} {key}", "ms", values, off, "ratio", len(services)))
    on, without = paired(utilization, off)
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
    fewest = min(report.arms.get("on", 0), report.arms.get(report.off, 0))  # pairs, at most
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


def add_energy(card: dict[str, float], shares: Mapping[str, float], seconds: float) -> None:
    """What a card drew, by whose kernels ran: what is left of the time is nobody's. The parts sum up to the meter's."""
    joules = shares["watts"] * seconds
    ran = {kind: max(shares.get(kind, 0.0), 0.0) for kind in ("services", "batch")}
    whole = max(sum(ran.values()), 1.0)  # samples of several processes may add up to more than all of the time
    parts = {kind: joules * share / whole for kind, share in ran.items()}
    parts["idle"] = joules - sum(parts.values())
    for name, part in (("joules", joules), *((f"{kind}_joules", part) for kind, part in parts.items())):
        card[name] = card.get(name, 0.0) + part


def _of_energy(report: Report, carbon_intensity: float | None) -> None:
    """kWh of all GPUs, and what they emit at so many grams of CO2 a kWh."""
    kwh = {
        name: sum(card.get(key, 0.0) for card in report.gpus.values()) / 3.6e6
        for name, key in (("gpu_kwh", "joules"), ("batch_kwh", "batch_joules"), ("idle_kwh", "idle_joules"))
    }
    if kwh["gpu_kwh"]:
        report.energy = {name: round(value, 6) for name, value in kwh.items()}
        if carbon_intensity is not None:
            report.energy["grams_co2"] = round(kwh["gpu_kwh"] * carbon_intensity, 3)
            report.energy["batch_grams_co2"] = round(kwh["batch_kwh"] * carbon_intensity, 3)


def _of_gpus(report: Report) -> None:
    """From hours to shares, and what batch had in hours."""
    for card in report.gpus.values():
        card["batch_hours"] = round(card["batch"], 4)
        for kind in ("busy", "services", "batch"):
            card[kind] = round(card[kind] / card["hours"], 4) if card["hours"] else 0.0
        card["hours"] = round(card["hours"], 4)
        card |= {key: round(value, 3) for key, value in card.items() if key.endswith("joules")}


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
    for uuid, card in report.gpus.items():
        rows += [[f"{uuid} {k}", "ratio", text(card[k]), "", "mean", "", "", ""] for k in ("busy", "services", "batch")]
        rows.append([f"{uuid} batch", "hours", text(card["batch_hours"]), "", "sum", "", "", ""])
        kinds = [kind for kind in ("", "services_", "batch_", "idle_") if f"{kind}joules" in card]
        rows += [[f"{uuid} {k}energy", "J", text(card[f"{k}joules"]), "", "sum", "", "", ""] for k in kinds]
    units = {"kwh": "kWh", "co2": "g"}
    rows += [[k, units[k.rpartition("_")[2]], text(v), "", "sum", "", "", ""] for k, v in report.energy.items()]
    return columns, rows
