"""The page of a simulation: tables, and charts with their data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from colocate import __version__
from colocate.report.charts import Chart
from colocate.report.html import render, write


class PageTable(NamedTuple):
    """A table of the page."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def write_page(
    path: Path, title: str, about: str, verdict: str, tables: Sequence[PageTable], charts: Sequence[tuple[Chart, str]]
) -> None:
    """Render and write it; each chart with a note of what it shows. Raises OSError."""
    drawn, notes = [chart for chart, _ in charts], [note for _, note in charts]
    page = render(
        "simulation.html",
        title=title,
        about=about,
        verdict=verdict,
        tables=tables,
        charts=drawn,
        notes=notes,
        version=__version__,
    )
    write(page, path)
