"""The report page of the demonstration of the cards."""

from __future__ import annotations

from pathlib import Path

from colocate import __version__
from colocate.demo.gpu.result import TITLES, GpuResult, legend, refusal, sentence
from colocate.report.charts import Chart, Series, bar_chart, line_chart
from colocate.report.html import render, write


def write_page(result: GpuResult, path: Path) -> None:
    """Render and write the page. Raises OSError."""
    services: dict[str, list[Chart]] = {}
    for service in dict.fromkeys(a.service for a in result.arms.values()):
        arms = result.of(service)
        curves = [
            Series(TITLES[arm], [(ms, 100 * share) for ms, share in result.details[f"{arm} {service}"].cdf_ms])
            for arm in arms
        ]
        bars = [
            Series("p99, % of alone", [(float(i), 100 * (a.p99_to_alone or 0)) for i, a in enumerate(arms.values())]),
            Series("batch, % of the card", [(float(i), 100 * a.batch_share) for i, a in enumerate(arms.values())]),
        ]
        services[service] = [
            line_chart("Latency distribution", curves, "latency (ms, logarithmic)", "% of requests", log_x=True),
            bar_chart("What it costs, and what batch has of it", list(arms), bars, "%"),
        ]
    page = render(
        "gpu.html",
        result=result,
        titles=TITLES,
        mark=result.mark,
        services=services,
        sentence=sentence(result),
        legend=legend(result),
        refusal=refusal(result),
        version=__version__,
    )
    write(page, path)
