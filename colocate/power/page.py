"""The page of a sweep: slowdown and energy against the cap."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from colocate import __version__
from colocate.model.power import Floats, Model, Recommendation, predict, saved
from colocate.report.charts import Series, line_chart
from colocate.report.html import render, write


def write_page(model: Model, found: Recommendation | None, slowdown: float | None, path: Path) -> None:
    """Render and write it. Raises OSError."""
    sweep, grid = model.sweep, model.grid
    upper = np.quantile(model.bounds, 0.95, axis=0)

    def line(name: str, caps: Floats, slowdowns: Floats) -> Series:
        return Series(name, [(float(c), 100.0 * float(s)) for c, s in zip(caps, slowdowns, strict=True)])

    slow = [
        line("measured", sweep.caps, sweep.slowdowns),
        line("modelled", grid, predict(model.fit, grid)),
        line("at most, 19 in 20", grid, upper),
    ]
    if slowdown is not None:
        slow.append(Series("target", [(float(grid[0]), 100 * slowdown), (float(grid[-1]), 100 * slowdown)]))
    charts = [line_chart("Slowdown under a cap", slow, "cap (W)", "longer, %")]
    energy = [(float(c), 100 * e) for c in grid if (e := saved(model, float(c))) is not None]
    if energy:
        charts.append(line_chart("Energy of the same work", [Series("saved", energy)], "cap (W)", "saved, %"))
    page = render(
        "power.html", model=model, found=found, slowdown=slowdown, charts=charts, version=__version__, floor=sweep.floor
    )
    write(page, path)
