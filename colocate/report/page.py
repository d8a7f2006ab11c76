"""The utilization evaluation report as one page."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

from colocate import __version__
from colocate.report.charts import Series, bar_chart, line_chart
from colocate.report.evaluate import Report
from colocate.report.html import render, write


def _when(seconds: float) -> str:
    return dt.datetime.fromtimestamp(seconds, dt.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def write_report(report: Report, path: Path) -> None:
    """Render and write the page. Raises OSError."""
    kinds = ("services", "besteffort", "batch", "system")
    use = line_chart(
        "CPU use",
        [Series(k, [(p["time"], p[k]) for p in report.points]) for k in kinds],
        "seconds since the start",
        "cores",
        marker=("node", report.node_cores),
    )
    hours = bar_chart(
        "Utilization by hour",
        [dt.datetime.fromtimestamp(h["time"], dt.UTC).strftime("%d. %Hh") for h in report.hours[-24:]],
        [Series(k, [(float(i), 100 * h[k]) for i, h in enumerate(report.hours[-24:])]) for k in kinds[:3]],
        "% of the node",
    )
    jobs = sorted(report.jobs.items(), key=lambda j: -j[1]["core_seconds"])[:12]
    work = bar_chart(
        "Batch work by job",
        [name[:12] for name, _ in jobs],
        [Series("core seconds", [(float(i), j["core_seconds"]) for i, (_, j) in enumerate(jobs)])],
        "core seconds",
    )
    page = render(
        "report.html",
        report=report,
        version=__version__,
        start=_when(report.start_seconds),
        end=_when(report.end_seconds),
        charts=[use, hours, work],
    )
    write(page, path)
