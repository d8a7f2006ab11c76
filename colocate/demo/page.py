"""The demonstration's report page."""

from __future__ import annotations

from pathlib import Path

from colocate import __version__
from colocate.demo.result import ARMS, TITLES, Result
from colocate.report.charts import Series, bar_chart, line_chart
from colocate.report.html import render, write


def sentence(result: Result) -> str:
    """What the run showed, and that it is one run."""
    alone, ours, plain = (result.arms[a] for a in ("alone", "colocate", "besteffort"))
    gained = ours.cpu_utilization - alone.cpu_utilization

    def ratio(a: float, b: float) -> str:
        return f"{a / b:.2f}" if b else "n/a"

    return (
        f"CPU utilization {alone.cpu_utilization:.0%} -> {ours.cpu_utilization:.0%} ({gained * 100:+.0f} points); the "
        f"service's p99 {ratio(ours.p99_ms, alone.p99_ms)} x alone, {ratio(ours.p99_ms, plain.p99_ms)} x BestEffort's; "
        f"batch work {ratio(ours.batch_work_per_second, plain.batch_work_per_second)} x BestEffort's. "
        "One run, no interval: `colocate evaluate` measures."
    )


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
        marker=("SLO", result.target_p99_ms) if result.target_p99_ms else None,
    )
    alone = result.batch_alone_per_second or 1.0
    work = bar_chart(
        "Work and utilization",
        list(ARMS),
        [
            Series(
                "batch work, % of alone",
                [(float(i), 100 * result.arms[a].batch_work_per_second / alone) for i, a in enumerate(ARMS)],
            ),
            Series("CPU, %", [(float(i), 100 * result.arms[a].cpu_utilization) for i, a in enumerate(ARMS)]),
        ],
        "%",
    )
    page = render(
        "demo.html",
        result=result,
        titles=TITLES,
        sentence=sentence(result),
        version=__version__,
        cdf=cdf,
        by_second=by_second,
        work=work,
    )
    write(page, path)
