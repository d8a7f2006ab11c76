"""Charts as inline SVG: lines, bars and steps, with axes, drawn in the page's own colours for light and dark.

Every chart comes with its table and its CSV, so that no figure is only a picture.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 14, 40
COLOURS = 9
"""Of the page; then they begin anew."""


class Series(NamedTuple):
    """One line or one set of bars."""

    name: str
    points: Sequence[tuple[float, float]]


class Chart(NamedTuple):
    """A drawn chart with its data."""

    title: str
    svg: Markup
    columns: list[str]
    rows: list[list[str]]
    csv: str


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover a range."""
    if high <= low:
        high = low + 1
    raw = (high - low) / count
    magnitude = 10 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw)
    first = math.floor(low / step)
    return [round((first + i) * step, 10) for i in range(math.ceil(high / step) - first + 1)]


def _number(value: float) -> str:
    return f"{value:g}" if abs(value) < 1e4 else f"{value / 1000:g}k"


Scale = Callable[[float], float]


def _text(kind: str, x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(kind: str, y: float) -> str:
    return f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'


def _horizontal(x_ticks: list[float], log_x: bool) -> Scale:
    def x(value: float) -> float:
        low, high = x_ticks[0], x_ticks[-1]
        if log_x:
            value, low, high = math.log10(max(value, low)), math.log10(low), math.log10(high)
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - low) / ((high - low) or 1)

    return x


def _decades(least: float, most: float) -> list[float]:
    """Powers of ten that cover a range."""
    low = math.floor(math.log10(max(least, 1e-3)))
    high = max(math.ceil(math.log10(max(most, 1e-3))), low + 1)
    return [10.0**i for i in range(low, high + 1)]


def _vertical(y_ticks: list[float], log_y: bool = False) -> Scale:
    low, high = y_ticks[0], y_ticks[-1]
    if log_y:
        span = math.log10(high / low)
        return lambda value: HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * math.log10(max(value, low) / low) / span
    return lambda value: HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / ((high - low) or 1)


def _y_axis(y_ticks: list[float], y: Scale, label: str) -> list[str]:
    parts = [_text("label", LEFT, TOP - 3, label, "start")]
    for tick in y_ticks:
        parts += [_line("grid", y(tick)), _text("tick", LEFT - 6, y(tick) + 4, _number(tick), "end")]
    return parts


def _svg(title: str, body: str) -> Markup:
    return Markup(
        f'<svg role="img" aria-label="{escape(title)}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'xmlns="http://www.w3.org/2000/svg">{body}</svg>'
    )


def to_csv(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as CSV text."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return out.getvalue()


def line_chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    marker: tuple[str, float] | None = None,
    events: Sequence[float] = (),
    span: tuple[float, float] | None = None,
    top: float = 0.0,
) -> Chart:
    """Lines over a common axis; `marker` is a horizontal line with its name (a target, say).

    `events` are numbered vertical lines at these x. Charts of one `span` and `top` can be compared by eye.
    """
    xs = [*(px for s in series for px, _ in s.points), *events, *(span or ())] or [0.0, 1.0]
    ys = [*(py for s in series for _, py in s.points), top]
    x_ticks = _decades(min(xs), max(xs)) if log_x else ticks(min(xs), max(xs))
    most = max(*ys, marker[1] if marker else 0.0)
    y_ticks = _decades(min((v for v in ys if v > 0), default=1.0), most) if log_y else ticks(0.0, most)
    x, y = _horizontal(x_ticks, log_x), _vertical(y_ticks, log_y)
    body = _y_axis(y_ticks, y, y_label)
    body += [_text("tick", x(tick), HEIGHT - BOTTOM + 16, _number(tick)) for tick in x_ticks]
    body.append(_text("label", (LEFT + WIDTH) / 2, HEIGHT - 6, x_label))
    if marker is not None:
        body += [_line("marker", y(marker[1])), _text("tick", WIDTH - RIGHT, y(marker[1]) - 4, marker[0], "end")]
    for number, event in enumerate(events, 1):
        at = f'x1="{x(event):.1f}" x2="{x(event):.1f}" y1="{TOP + 10 * (number % 3)}" y2="{HEIGHT - BOTTOM}"'
        body += [f'<line class="event" {at}/>', _text("tick", x(event), TOP + 10 * (number % 3), str(number), "start")]
    for i, one in enumerate(series):
        path = " ".join(f"{x(px):.1f},{y(py):.1f}" for px, py in one.points)
        body.append(f'<polyline class="s{i % COLOURS}" points="{path}"/>')
    columns = [x_label, *(s.name for s in series)]
    merged: dict[float, list[str]] = {}
    for i, one in enumerate(series):
        for px, py in one.points:
            merged.setdefault(px, [""] * len(series))[i] = f"{py:g}"
    rows = [[f"{px:g}", *values] for px, values in sorted(merged.items())]
    return Chart(title, _svg(title, "".join(body)), columns, rows, to_csv(columns, rows))


def bar_chart(title: str, groups: Sequence[str], series: Sequence[Series], y_label: str) -> Chart:
    """Grouped bars; a series' points are (group index, value)."""
    values = [v for s in series for _, v in s.points] or [1.0]
    y_ticks = ticks(0.0, max(*values, 1e-9))
    y = _vertical(y_ticks)
    body = _y_axis(y_ticks, y, y_label)
    slot = (WIDTH - LEFT - RIGHT) / max(len(groups), 1)
    width = slot * 0.7 / max(len(series), 1)
    for g, name in enumerate(groups):
        body.append(_text("tick", LEFT + slot * (g + 0.5), HEIGHT - BOTTOM + 16, name))
        for i, one in enumerate(series):
            value = dict(one.points).get(float(g))
            if value is None:
                continue
            left, height = LEFT + slot * (g + 0.15) + width * i, max(y(0.0) - y(value), 0.0)
            sides = f'width="{width:.1f}" height="{height:.1f}"'
            body.append(f'<rect class="f{i % COLOURS}" x="{left:.1f}" y="{y(value):.1f}" {sides}/>')
            body.append(_text("value", left + width / 2, y(value) - 3, f"{value:.3g}"))
    columns = ["", *(s.name for s in series)]
    rows = [
        [name, *(f"{dict(s.points)[float(g)]:g}" if float(g) in dict(s.points) else "" for s in series)]
        for g, name in enumerate(groups)
    ]
    return Chart(title, _svg(title, "".join(body)), columns, rows, to_csv(columns, rows))
