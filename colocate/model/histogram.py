"""The buckets of the decaying histograms, spaced as VPA spaces them: the first one wide, each next 5 % wider."""

from __future__ import annotations

import numpy as np

from colocate.model.reference import Floats


def exponential_bounds(first: float, ratio: float, largest: float) -> Floats:
    """Upper bounds of buckets of widths first, first * ratio, first * ratio^2 ... until `largest` is covered."""
    count = int(np.ceil(np.log(largest * (ratio - 1) / first + 1) / np.log(ratio))) + 1
    return np.round(first * (ratio ** np.arange(1, count + 1) - 1) / (ratio - 1), 9)


CPU_BOUNDS_CORES = exponential_bounds(0.01, 1.05, 1024.0)
MEMORY_BOUNDS_BYTES = np.ceil(exponential_bounds(float(1 << 20), 1.08, float(1 << 42)))
CPU_HALF_LIFE_SECONDS = 12 * 3600.0
MEMORY_HALF_LIFE_SECONDS = 24 * 3600.0
