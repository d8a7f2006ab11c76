"""By how much more a node would draw for the pods that it gets: its curve at how busy it is, measured, not requested.

All that is annotations that `colocate publish` keeps, or whoever else knows it. What was placed since they were written
counts with its requests.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from colocate.cluster.api import CPU_REQUESTED, CPU_UTILIZATION, POWER_CURVE
from colocate.objects import Node
from podgroup.jit import njit

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
GRID, MOST_KEPT = 41, 1 << 15
_UNKNOWN = (np.nan,) * GRID


def curve_of(text: str) -> tuple[float, ...]:
    """`UTILIZATION:WATTS ...` at GRID points from 0 to 1; NaN of what is no curve."""
    try:
        points = np.array([[float(number) for number in each.split(":")] for each in text.split()])
    except ValueError:
        return _UNKNOWN
    if points.ndim != 2 or points.shape[1] != 2 or len(points) < 2 or not np.isfinite(points).all():
        return _UNKNOWN
    used, watts = points.T
    if (np.diff(used) <= 0).any() or (np.diff(watts) < 0).any() or used[0] < 0 or used[-1] > 1:
        return _UNKNOWN
    grid = np.linspace(0.0, 1.0, GRID)
    slope = (watts[-1] - watts[0]) / (used[-1] - used[0])  # beyond what is said it goes on as it does on the whole
    found = np.interp(grid, used, watts) + slope * np.maximum(grid - used[-1], 0.0)
    return tuple(found - slope * np.maximum(used[0] - grid, 0.0))


def utilization_of(text: str) -> float:
    """0 to 1; NaN of what is none."""
    try:
        found = float(text)
    except ValueError:
        return float("nan")
    return found if 0.0 <= found <= 1.0 else float("nan")


def requested_of(text: str) -> float:
    """Thousandths of a CPU; NaN of what is none."""
    return float(text) if text.isdecimal() and len(text) < 12 else float("nan")


class _Said:
    """What each node's annotations say, read once as long as they are the same object; every curve is a row of one
    table."""

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}
        self._known: dict[str, tuple[dict[str, str], int, float, float]] = {}
        self.table: Floats = np.full((64, GRID), np.nan)

    def of(self, nodes: Iterable[Node]) -> tuple[Ints, Floats, Floats]:
        """Of each node its row, its utilization, and what was requested when that was measured; shapes (nodes,)."""
        if max(len(self._rows), len(self._known)) > MOST_KEPT:  # nodes that learn say new ones, and nodes go
            self._rows.clear()
            self._known.clear()
        known, rows, used, then = self._known, list[int](), list[float](), list[float]()
        for node in nodes:
            meta = node.metadata
            found = known.get(meta.name)
            if found is None or found[0] is not meta.annotations:
                found = known[meta.name] = self._read(meta.annotations)
            rows.append(found[1])
            used.append(found[2])
            then.append(found[3])
        return np.array(rows, dtype=np.int64), np.array(used), np.array(then)

    def _read(self, said: dict[str, str]) -> tuple[dict[str, str], int, float, float]:
        row = self._row(said.get(POWER_CURVE, ""))
        return said, row, utilization_of(said.get(CPU_UTILIZATION, "")), requested_of(said.get(CPU_REQUESTED, ""))

    def _row(self, text: str) -> int:
        found = self._rows.get(text)
        if found is None:
            found = self._rows[text] = len(self._rows)
            if found == len(self.table):
                self.table = np.concatenate((self.table, np.full_like(self.table, np.nan)))
            self.table[found] = curve_of(text)
        return found


_said = _Said()


def watts_more(nodes: Iterable[Node], requested: Ints, asked: Floats | Ints, cores: Ints) -> Floats:
    """By how much more each would draw if so much more were `asked` of it, all of it used, shape (nodes,).

    All in thousandths of a CPU: `requested` is what is held there by now, of which what was requested when the node was
    measured is in its utilization already; `cores` is what it has. Infinite where nothing is known of a node.
    """
    rows, measured, then = _said.of(nodes)
    since = np.where(np.isnan(then), 0.0, np.maximum(requested - then, 0.0))
    used = measured + since / cores
    return np.asarray(rise(_said.table, rows, used, used + asked / cores))


@njit
def rise(table: Floats, rows: Ints, low: Floats, high: Floats) -> Floats:
    """By how much each node's curve, a row of the table, rises from one utilization to another; infinite where it is
    not known. Beyond 1 it rises on as on the whole, or full nodes would be the cheapest."""
    points = table.shape[1]
    found = np.full(len(rows), np.inf)
    for i in range(len(rows)):
        curve = table[rows[i]]
        if np.isnan(curve[0]) or np.isnan(low[i]) or np.isnan(high[i]):
            continue
        ends = np.zeros(2)
        for end, used in enumerate((low[i], high[i])):
            place = min(max(used, 0.0), 1.0) * (points - 1)
            at = min(int(place), points - 2)
            beyond = max(used - 1.0, 0.0) * (curve[-1] - curve[0])
            ends[end] = curve[at] + (curve[at + 1] - curve[at]) * (place - at) + beyond
        found[i] = ends[1] - ends[0]
    return found
