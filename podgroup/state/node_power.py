"""By how much more a node would draw for the pods that it gets: its curve at how busy it is, measured, not requested.

All that is annotations that `colocate publish` keeps, or whoever else knows it. What was placed since they were written
counts with its requests.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from colocate.cluster.api import CPU_REQUESTED, CPU_UTILIZATION, POWER_CURVE
from colocate.objects import Node

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
GRID = 41
_UNKNOWN = (np.nan,) * GRID


@lru_cache(maxsize=1 << 15)
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


def watts_more(nodes: Iterable[Node], requested: Ints, asked: Floats | Ints, cores: Ints) -> Floats:
    """By how much more each would draw if so much more were `asked` of it, all of it used, shape (nodes,).

    All in thousandths of a CPU: `requested` is what is held there by now, of which what was requested when the node was
    measured is in its utilization already; `cores` is what it has. Infinite where nothing is known of a node.
    """
    said = [n.metadata.annotations for n in nodes]
    curves = np.array([curve_of(a.get(POWER_CURVE, "")) for a in said]).reshape(-1, GRID)
    measured = np.array([utilization_of(a.get(CPU_UTILIZATION, "")) for a in said])
    then = np.array([requested_of(a.get(CPU_REQUESTED, "")) for a in said])
    since = np.where(np.isnan(then), 0.0, np.maximum(requested - then, 0.0))
    used = measured + since / cores
    found = _at(curves, used + asked / cores) - _at(curves, used)
    return np.where(np.isnan(found), np.inf, found)


def _at(curves: Floats, used: Floats) -> Floats:
    """Of each row its value there; beyond 1 it rises on as on the whole, or full nodes would be the cheapest."""
    beyond = np.maximum(np.where(np.isnan(used), 0.0, used) - 1.0, 0.0) * (curves[:, -1] - curves[:, 0])
    place = np.clip(np.where(np.isnan(used), 0.0, used), 0.0, 1.0) * (GRID - 1)
    low = np.minimum(place.astype(np.int64), GRID - 2)
    rows = np.arange(len(curves))
    below, above = curves[rows, low], curves[rows, low + 1]
    found: Floats = np.where(np.isnan(used), np.nan, below + (above - below) * (place - low) + beyond)
    return found
