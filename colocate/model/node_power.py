"""What a node draws by how busy its CPUs are: a monotone curve, learnt from its own meter.

Readings are kept as means of utilization's bins, older ones counting less; where they contradict that more work draws
more, neighbouring bins are pooled (weighted isotonic regression; Fan et al., ISCA 2007, for the shape: steep first,
then flat). Pure.
"""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

from colocate.model.power import falling

Floats = npt.NDArray[np.float64]
GRID = 21
"""Points of a curve: utilization 0, 0.05, ... 1."""
HALF_READINGS = 2000.0
"""A reading counts half once so many more have come to its bin."""
LEAST_READINGS, LEAST_SPAN = 12.0, 0.3
"""Fewer of them in a bin are passed over; a curve that is known on less of 0 to 1 is not known."""


class NodeCurve(msgspec.Struct):
    """Of one node: by bin the weight of its readings, and their means."""

    weights: list[float] = msgspec.field(default_factory=lambda: [0.0] * GRID)
    used: list[float] = msgspec.field(default_factory=lambda: [0.0] * GRID)
    watts: list[float] = msgspec.field(default_factory=lambda: [0.0] * GRID)

    def learn(self, utilization: float, watts: float) -> None:
        """One reading, of a time in which neither changed much."""
        if not (0.0 <= utilization <= 1.0 and 0.0 < watts < 1e6):
            return
        at = round(utilization * (GRID - 1))
        weight = self.weights[at] * 0.5 ** (1.0 / HALF_READINGS) + 1.0
        self.used[at] += (utilization - self.used[at]) / weight
        self.watts[at] += (watts - self.watts[at]) / weight
        self.weights[at] = weight

    def points(self) -> Floats | None:
        """Watts at each point of the grid, shape (GRID,), never falling; None as long as too little is known.

        Beyond what was seen it goes on as it rises on the whole: a node is not cheap for not having been tried.
        """
        weights = np.array(self.weights)
        known = weights >= LEAST_READINGS
        if known.sum() < 3:
            return None
        used, watts = np.array(self.used)[known], np.array(self.watts)[known]
        if used[-1] - used[0] < LEAST_SPAN:
            return None
        rising = falling(watts[::-1], weights[known][::-1])[::-1]
        slope = (rising[-1] - rising[0]) / (used[-1] - used[0])
        grid = np.linspace(0.0, 1.0, GRID)
        found = np.interp(grid, used, rising)
        found = np.where(grid > used[-1], rising[-1] + slope * (grid - used[-1]), found)
        return np.where(grid < used[0], np.maximum(rising[0] - slope * (used[0] - grid), 0.0), found)
