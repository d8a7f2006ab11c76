"""The page of the demonstration of power."""

from __future__ import annotations

from pathlib import Path

from colocate import __version__
from colocate.demo.power.result import MARK, PowerResult, rows, sentence
from colocate.report.charts import Series, line_chart
from colocate.report.html import render, write


def write_page(result: PowerResult, path: Path) -> None:
    """Render and write it. Raises OSError."""
    best = min((seconds for _, seconds, _ in result.sweep), default=1.0)
    points = sorted((float(cap), 100.0 * (seconds / best - 1.0)) for cap, seconds, _ in result.sweep)
    chart = line_chart("Slowdown under a cap", [Series("measured", points)], "cap (W)", "longer, %")
    lines, said = rows(result), sentence(result)
    page = render(
        "power_demo.html", result=result, rows=lines, sentence=said, chart=chart, mark=MARK, version=__version__
    )
    write(page, path)
