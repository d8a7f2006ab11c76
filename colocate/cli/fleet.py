"""colocate evaluate fleet: what co-location is worth to a simulated fleet, and at what cost to its services."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from colocate.cli.output import DATA_FORMS, check_file, end_status, print_data, print_table, status
from colocate.errors import BadInput
from colocate.model.statistics import Interval, mean_interval, ratio_interval
from colocate.policy.file import load_policy
from colocate.policy.schema import PolicySpec
from colocate.report.charts import Series, line_chart
from colocate.simulate.evaluation import (
    ARMS,
    CORES,
    OURS_ARM,
    POOLS,
    WARM_DAYS,
    Assumptions,
    Bar,
    Result,
    Size,
    beside,
    kept,
    play_all,
    tornado,
)
from colocate.simulate.page import PageTable, write_page
from colocate.simulate.traces import folder

MOST_NODES, MOST_HOURS, MOST_SEEDS = 10_000, 24 * 20, 1000
TORNADO_NODES, TORNADO_HOURS, TORNADO_SEEDS = (100, 20), 6, (1, 2, 3)
SYNTHETIC = (
    "Synthetic: how large services are, their memory, and what batch makes them feel. Nobody has published usage and"
    " latency of services beside batch together. GPUs are used alike under every policy; GPU nodes lend their CPUs."
)


def size_of(text: str, hours: int) -> Size:
    """`500+100`: nodes with CPUs only, and nodes with GPUs. Raises BadInput."""
    cpu, _, gpu = text.partition("+")
    if not cpu.isdecimal() or not (gpu or "0").isdecimal() or not 1 <= int(cpu) + int(gpu or 0) <= MOST_NODES:
        raise BadInput(f"--nodes {text!r}: write CPU nodes + GPU nodes, as 500+100; {MOST_NODES} at most")
    if int(cpu) < 10:
        raise BadInput(f"--nodes {text!r}: fewer than 10 CPU nodes are no fleet with pools")
    if not 1 <= hours <= MOST_HOURS:
        raise BadInput(f"--hours {hours}: 1 to {MOST_HOURS}")
    return Size(int(cpu), int(gpu or 0), hours)


def evaluate(options: argparse.Namespace) -> int:
    """Exit 1 where a bar is not kept. Raises BadInput."""
    size = size_of(options.nodes, options.hours)
    if not 2 <= options.seeds <= MOST_SEEDS:
        raise BadInput(f"--seeds {options.seeds}: 2 to {MOST_SEEDS}, for one says nothing of how sure it is")
    page = check_file("--file", options.file, [options.config] if options.config else []) if options.file else None
    spec = load_policy(Path(options.config)).spec if options.config else PolicySpec()
    where, began = folder(options.traces), time.perf_counter()
    seeds = range(options.seed, options.seed + options.seeds)
    results = play_all(where, size, Assumptions(), seeds, spec, _say, options.workers)
    bars: list[Bar] = []
    if options.tornado:
        small = Size(*TORNADO_NODES, TORNADO_HOURS)
        bars = list(tornado(where, small, TORNADO_SEEDS, spec, _say_tornado, options.workers))
        bars.sort(key=lambda bar: -abs(bar.utilization[1] - bar.utilization[0]))
    end_status()
    judged, data = kept(results), _data(results, size, bars)
    data["kept"] = judged
    if page is not None:
        _write(page, results, data, bars, size)
    if options.output in DATA_FORMS:
        print_data(data, options.output)
    else:
        _print(data, bars, judged)
        simulated = len(ARMS) * options.seeds
        print(f"{simulated} days of {size.nodes} nodes of {CORES:g} CPUs, {size.hours} h each", end="; ")
        print(f"{time.perf_counter() - began:.0f} s. {SYNTHETIC}")
        if page is not None:
            print(f"report: {page.resolve()}")
    return int(not all(judged.values()))


def _say(done: int, of: int) -> None:
    status(f"{done} of {of} draws, under {len(ARMS)} arms each")


def _say_tornado(done: int, of: int) -> None:
    status(f"{done} of {of} assumptions varied")


def _data(results: dict[str, list[Result]], size: Size, bars: list[Bar]) -> dict[str, Any]:
    pools = beside(results, POOLS)
    ours, theirs = ([r.violations for r in results[arm]] for arm in (OURS_ARM, POOLS))
    ratio = ratio_interval(ours, theirs) if min(*ours, *theirs) > 0.0 else None
    return {
        "utilization_points": round(pools.utilization.value, 3),
        "low": round(pools.utilization.low, 3),
        "high": round(pools.utilization.high, 3),
        "violation_ratio": None if ratio is None else round(ratio.value, 4),
        "violation_ratio_low": None if ratio is None else round(ratio.low, 4),
        "violation_ratio_high": None if ratio is None else round(ratio.high, 4),
        "nodes": size._asdict(),
        "seeds": len(results[POOLS]),
        "arms": [_arm(arm, results) for arm in ARMS],
        "tornado": [bar._asdict() for bar in bars],
    }


def _arm(arm: str, results: dict[str, list[Result]]) -> dict[str, Any]:
    mine = results[arm]
    found: dict[str, Any] = {"arm": arm}
    for name in ("utilization", "batch", "violations", "added", "wait_seconds", "tasks_ended", "energy_a_core"):
        found[name] = _rounded(mean_interval([float(getattr(r, name)) for r in mine]), 6)
    if arm != OURS_ARM:
        verdict = beside(results, arm)
        found["ours_less_this"] = {
            "utilization_points": _rounded(verdict.utilization),
            "violation_points": _rounded(verdict.violations),
        }
    return found


def _rounded(interval: Interval, digits: int = 4) -> dict[str, float]:
    return {key: round(value, digits) for key, value in interval._asdict().items()}


ROW = ("", "CPUs used", "by batch", "minutes violated", "by batch alone", "wait", "tasks ended", "energy a core")
TORNADO_ROW = ("assumption", "from", "to", "points of utilization", "points of violated minutes")


def _rows(data: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for arm in data["arms"]:
        used, width = arm["utilization"]["value"], arm["utilization"]["high"] - arm["utilization"]["value"]
        rows.append(
            (
                arm["arm"],
                f"{used:.1%} ± {100 * width:.1f}",
                f"{arm['batch']['value']:.1%}",
                f"{arm['violations']['value']:.3%}",
                f"{arm['added']['value']:.3%}",
                f"{arm['wait_seconds']['value']:,.0f} s",
                f"{arm['tasks_ended']['value']:,.0f}",
                f"{arm['energy_a_core']['value'] / data['arms'][0]['energy_a_core']['value']:.2f}",
            )
        )
    return rows


def _tornado_rows(bars: list[Bar]) -> list[tuple[str, ...]]:
    return [
        (
            bar.name,
            *(f"{value:g}" for value in bar.values),
            f"{bar.utilization[0]:+.1f} to {bar.utilization[1]:+.1f}",
            f"{bar.violations[0]:+.2f} to {bar.violations[1]:+.2f}",
        )
        for bar in bars
    ]


def _sentence(data: dict[str, Any]) -> str:
    text = f"{data['utilization_points']:+.1f} points of utilization over separate pools"
    text += f" [{data['low']:+.1f}, {data['high']:+.1f}]"
    if data["violation_ratio"] is None:
        return f"{text}; some runs had no violated minute, so no ratio of them is told"
    low, high = data["violation_ratio_low"], data["violation_ratio_high"]
    return f"{text}; {data['violation_ratio']:.2f} times as many violated minutes [{low:.2f}, {high:.2f}]"


def _print(data: dict[str, Any], bars: list[Bar], judged: dict[str, bool]) -> None:
    print_table(ROW, _rows(data))
    print(_sentence(data))
    for name, good in judged.items():
        print(f"{'kept  ' if good else 'MISSED'}  {name}")
    if bars:
        print_table(TORNADO_ROW, _tornado_rows(bars))


def _write(page: Path, results: dict[str, list[Result]], data: dict[str, Any], bars: list[Bar], size: Size) -> None:
    charts = []
    for name, column, scale in (("CPUs used", None, size.nodes * CORES / 100), ("minutes violated", 2, 0.01)):
        series = []
        for arm in ARMS:
            lines = np.array([r.told.timeline for r in results[arm]]).mean(axis=0)
            values = (lines[:, 0] + lines[:, 1] if column is None else lines[:, column]) / scale
            hours = values[: len(values) // 60 * 60].reshape(-1, 60).mean(axis=1)
            series.append(Series(arm, [(float(i), float(v)) for i, v in enumerate(hours)]))
        charts.append((line_chart(name, series, "hour", "%"), "means of the hour, over all seeds"))
    tables = [PageTable("Arms", ROW, _rows(data), "energy: against separate pools")]
    if bars:
        note = "ours less separate pools at either end of each assumption, on a smaller fleet"
        tables.append(PageTable("What each assumption is worth", TORNADO_ROW, _tornado_rows(bars), note))
    about = f"{size.cpu_nodes} CPU nodes, {size.gpu_nodes} GPU nodes, {size.hours} h, {data['seeds']} seeds; "
    about += f"the laws had looked at the services for {WARM_DAYS} days. {SYNTHETIC}"
    write_page(page, "The worth of co-location", about, _sentence(data), tables, charts)
