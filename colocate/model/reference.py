"""The kernels in numpy: the oracle of the jitted ones and the lean mode. Same names, same signatures, same results.

Arrays are float64; `n` workloads, `b` histogram buckets, `s` slots of the day. NaN in `values` means no reading.
Nothing is changed in place.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def histogram_add(weights: Floats, bounds: Floats, values: Floats, decay: float) -> Floats:
    """Decaying histograms after one more sample each: shape (n, b).

    Old weight is multiplied by `decay` = 2^(-dt / half-life), the sample has weight 1 in the first bucket whose upper
    bound is not below it (VPA's decaying exponential histogram, vertical-pod-autoscaler/pkg/recommender/util).
    """
    result = weights * decay
    rows = np.flatnonzero(~np.isnan(values))
    columns = np.minimum(np.searchsorted(bounds, values[rows]), bounds.size - 1)
    result[rows, columns] += 1.0
    return result


def histogram_quantile(weights: Floats, bounds: Floats, q: float) -> Floats:
    """The upper bound of the bucket in which the quantile lies, shape (n,); NaN for an empty histogram."""
    sums = np.cumsum(weights, axis=1)
    totals = sums[:, -1]
    columns = np.minimum((sums < (totals * q)[:, None]).sum(axis=1), bounds.size - 1)
    return np.where(totals > 0.0, bounds[columns], np.nan)


def smooth(previous: Floats, values: Floats, alpha_up: float, alpha_down: float) -> Floats:
    """Exponential smoothing that may rise faster than it falls, shape (n,); NaN where neither is known."""
    delta = values - previous
    moved = previous + np.where(delta > 0.0, alpha_up, alpha_down) * delta
    return np.where(np.isnan(values), previous, np.where(np.isnan(previous), values, moved))


def season_add(season: Floats, slot: int, values: Floats, fade: float) -> Floats:
    """The peak of each slot of the day, shape (n, s): the larger of the value and the faded old peak."""
    result = season.copy()
    old = result[:, slot] * fade
    kept = np.where(old > values, old, values)
    result[:, slot] = np.where(np.isnan(values), result[:, slot], np.where(np.isnan(old), values, kept))
    return result


def peak(quantile: Floats, season: Floats, slot: int, ahead: int, smoothed: Floats, margin: float) -> Floats:
    """The forecast peak, shape (n,): the largest of quantile, next slots' peaks and smoothed value, times the margin.

    A figure that is not known does not take part; NaN where none is.
    """
    best = np.where(np.isnan(quantile), -1.0, quantile)
    slots = season.shape[1]
    for i in range(ahead + 1):
        column = season[:, (slot + i) % slots]
        best = np.where(column > best, column, best)
    best = np.where(smoothed > best, smoothed, best)
    return np.where(best < 0.0, np.nan, best * margin)


def rates(now: Floats, before: Floats, seconds: float) -> Floats:
    """Growth a second of cumulative counters, shape (n,); NaN where a reading is missing or the counter was reset."""
    delta = now - before
    return np.where(delta >= 0.0, delta / seconds, np.nan)
