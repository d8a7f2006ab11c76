"""The kernels in numpy: the oracle of the jitted ones and the lean mode. Same names, same signatures, same results.

Arrays are float64; `n` workloads, `b` histogram buckets, `s` slots of the day. NaN in `values` means no reading.
Nothing is changed in place.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def decay(seconds: Floats, half_life: float) -> Floats:
    """What is left of a weight after so many seconds, shape (n,): 2^(-seconds / half_life)."""
    return np.exp2(-seconds / half_life)


def approach(seconds: Floats, constant: float) -> Floats:
    """How far a smoothed value goes towards a new one in so many seconds, shape (n,): 1 - e^(-seconds / constant)."""
    return 1.0 - np.exp(-seconds / constant)


def histogram_add(weights: Floats, bounds: Floats, values: Floats, seconds: Floats, left: Floats) -> Floats:
    """Decaying histograms of time after one more sample each: shape (n, b); `seconds` (n,) is what a sample stands for.

    Old weight is multiplied by `left` (`decay`), the sample has the weight of its seconds in the first bucket whose
    upper bound is not below it (VPA's decaying exponential histogram, vertical-pod-autoscaler/pkg/recommender). A row
    without a value, or without time, is left as it is.
    """
    rows = np.flatnonzero(~np.isnan(values) & (seconds > 0.0))
    result = weights.copy()
    result[rows] *= left[rows, None]
    columns = np.minimum(np.searchsorted(bounds, values[rows]), bounds.size - 1)
    result[rows, columns] += seconds[rows]
    return result


def histogram_quantile(weights: Floats, bounds: Floats, q: float) -> Floats:
    """The upper bound of the bucket in which the quantile lies, shape (n,); NaN for an empty histogram."""
    sums = np.cumsum(weights, axis=1)
    totals = sums[:, -1]
    columns = np.minimum((sums < (totals * q)[:, None]).sum(axis=1), bounds.size - 1)
    return np.where(totals > 0.0, bounds[columns], np.nan)


def smooth(previous: Floats, values: Floats, rise: Floats, fall: Floats) -> Floats:
    """Exponential smoothing that may rise faster than it falls, shape (n,); NaN where neither is known.

    `rise` and `fall` (n,) are how far it goes either way (`approach`).
    """
    delta = values - previous
    share = np.where(delta > 0.0, rise, fall)
    return np.where(np.isnan(values), previous, np.where(np.isnan(previous), values, previous + share * delta))


def season_add(season: Floats, slot: int, values: Floats, kept: float) -> Floats:
    """The peak of each slot of the day, shape (n, s): the larger of the value and `kept` times the old peak."""
    result = season.copy()
    old = result[:, slot] * kept
    largest = np.where(old > values, old, values)
    result[:, slot] = np.where(np.isnan(values), old, np.where(np.isnan(old), values, largest))
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


def rates(now: Floats, before: Floats, seconds: Floats) -> Floats:
    """Growth a second of k cumulative counters, shape (n, k), in `seconds`, shape (n,).

    NaN where a reading is missing or old, or was reset.
    """
    delta = now - before
    known = (delta >= 0.0) & (seconds > 0.0)[:, None]
    return np.where(known, delta / np.where(known, seconds[:, None], 1.0), np.nan)
