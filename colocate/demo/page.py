"""The demonstration's report page."""

from __future__ import annotations

from pathlib import Path

from colocate import __version__
from colocate.demo.result import ARMS, TITLES, Arm, Event, Result, format_rate
from colocate.report.charts import Chart, Series, bar_chart, line_chart
from colocate.report.html import render, write

MOST_EVENTS = 40


def sentence(result: Result) -> str:
    """What the run showed, and that it is one run."""
    alone, ours, plain = (result.arms[a] for a in ("alone", "colocate", "besteffort"))
    gained = ours.cpu_utilization - alone.cpu_utilization

    def ratio(a: float, b: float) -> str:
        return "n/a" if not b else f"{a / b:.2f}" if a >= 0.1 * b else f"{a / b:.2g}"

    return (
        f"CPU utilization {alone.cpu_utilization:.0%} -> {ours.cpu_utilization:.0%} ({gained * 100:+.0f} points); the "
        f"service's p99 {ratio(ours.p99_ms, alone.p99_ms)} x alone, {ratio(ours.p99_ms, plain.p99_ms)} x BestEffort's; "
        f"batch work {ratio(ours.batch_work_per_second, plain.batch_work_per_second)} x BestEffort's, and "
        f"{_lost(ours):.0%} of it was lost where BestEffort lost {_lost(plain):.0%}. "
        "One run, no interval: `colocate evaluate` measures."
    )


def _lost(arm: Arm) -> float:
    """Of what batch did, the share that was lost with jobs that died."""
    return arm.batch_lost_per_second / max(arm.batch_work_per_second + arm.batch_lost_per_second, 1e-9)


def _episodes(result: Result) -> list[tuple[str, list[tuple[Chart, str]], list[Event]]]:
    """What happened in the arms that differ in who governs batch: charts on one time axis, and numbered events."""
    compared = [a for a in ("besteffort", "colocate") if a in result.details and result.details[a].watched_seconds]
    details = [result.details[a] for a in compared]
    span = (0.0, max((d.watched_seconds[-1] for d in details), default=0.0))
    slowest = max((max(d.p99_by_second_ms, default=0.0) for d in details), default=0.0)
    most = max((max(v, default=0.0) for d in details for v in d.memory_mib.values()), default=0.0)
    episodes: list[tuple[str, list[tuple[Chart, str]], list[Event]]] = []
    for arm, detail in zip(compared, details, strict=True):
        at, events = detail.watched_seconds, detail.events[:MOST_EVENTS]
        marks = [e.seconds for e in events]
        p99 = [Series("service's p99", list(zip(detail.seconds, detail.p99_by_second_ms, strict=True)))]
        memory = [Series(name, list(zip(at, mib, strict=True))) for name, mib in detail.memory_mib.items()]
        shares = [
            Series("batch, cores", list(zip(at, detail.batch_cores, strict=True))),
            Series("service stalled on memory, share of time", list(zip(at, detail.stalled_ratio, strict=True))),
        ]
        slo = ("SLO", result.target_p99_ms) if result.target_p99_ms else None
        charts = [
            (
                line_chart(
                    "p99 by second", p99, "seconds", "ms", log_y=True, marker=slo, events=marks, span=span, top=slowest
                ),
                "From the intended start of each request; logarithmic.",
            ),
            (
                line_chart("Memory", memory, "seconds", "MiB", events=marks, span=span, top=most),
                f"Without page cache that is not in use. The node has {result.node_mib:.0f} MiB.",
            ),
            (line_chart("CPU and stalls", shares, "seconds", "", events=marks, span=span, top=2.0), ""),
        ]
        episodes.append((arm, charts, events))
    return episodes


def write_page(result: Result, path: Path) -> None:
    """Render and write the page. Raises OSError."""
    cdf = line_chart(
        "Latency distribution",
        [Series(TITLES[a], [(ms, 100 * share) for ms, share in result.details[a].cdf_ms]) for a in ARMS],
        "latency (ms, logarithmic)",
        "% of requests",
        log_x=True,
    )
    by_second = line_chart(
        "p99 by second",
        [
            Series(TITLES[a], list(zip(result.details[a].seconds, result.details[a].p99_by_second_ms, strict=True)))
            for a in ARMS
        ],
        "seconds",
        "ms",
        log_y=True,
        marker=("SLO", result.target_p99_ms) if result.target_p99_ms else None,
    )
    alone = result.batch_alone_per_second or 1.0
    work = bar_chart(
        "Work and utilization",
        list(ARMS),
        [
            Series(
                "batch work kept, % of alone",
                [(float(i), 100 * result.arms[a].batch_work_per_second / alone) for i, a in enumerate(ARMS)],
            ),
            Series(
                "lost, % of alone",
                [(float(i), 100 * result.arms[a].batch_lost_per_second / alone) for i, a in enumerate(ARMS)],
            ),
            Series("CPU, %", [(float(i), 100 * result.arms[a].cpu_utilization) for i, a in enumerate(ARMS)]),
        ],
        "%",
    )
    page = render(
        "demo.html",
        result=result,
        episodes=_episodes(result),
        titles=TITLES,
        rate=format_rate,
        sentence=sentence(result),
        version=__version__,
        cdf=cdf,
        by_second=by_second,
        work=work,
    )
    write(page, path)
