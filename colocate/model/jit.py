"""The kernels compiled by numba: one pass over all workloads, no temporaries. `reference` documents each of them.

Compiled code is cached where NUMBA_CACHE_DIR points; the shell sets it before this module is imported.
"""

from __future__ import annotations

import numba
import numpy as np

from colocate.model.reference import Floats


@numba.njit(cache=True, nogil=True)
def histogram_add(weights: Floats, bounds: Floats, values: Floats, seconds: Floats, left: Floats) -> Floats:
    """See reference.histogram_add."""
    result = weights.copy()
    n, b = weights.shape
    for i in range(n):
        if not np.isnan(values[i]) and seconds[i] > 0.0:
            for j in range(b):
                result[i, j] *= left[i]
            result[i, min(np.searchsorted(bounds, values[i]), b - 1)] += seconds[i]
    return result


@numba.njit(cache=True, nogil=True)
def histogram_quantile(weights: Floats, bounds: Floats, q: float) -> Floats:
    """See reference.histogram_quantile."""
    n, b = weights.shape
    result = np.empty(n)
    for i in range(n):
        total = 0.0
        for j in range(b):
            total += weights[i, j]
        result[i] = np.nan
        if total > 0.0:
            wanted = total * q
            running = 0.0
            result[i] = bounds[b - 1]
            for j in range(b):
                running += weights[i, j]
                if running >= wanted:
                    result[i] = bounds[j]
                    break
    return result


@numba.njit(cache=True, nogil=True)
def smooth(previous: Floats, values: Floats, rise: Floats, fall: Floats) -> Floats:
    """See reference.smooth."""
    result = np.empty(values.size)
    for i in range(values.size):
        if np.isnan(values[i]):
            result[i] = previous[i]
        elif np.isnan(previous[i]):
            result[i] = values[i]
        else:
            delta = values[i] - previous[i]
            result[i] = previous[i] + (rise[i] if delta > 0.0 else fall[i]) * delta
    return result


@numba.njit(cache=True, nogil=True)
def season_add(season: Floats, slot: int, values: Floats, kept: float) -> Floats:
    """See reference.season_add."""
    result = season.copy()
    for i in range(values.size):
        old = result[i, slot] * kept
        if np.isnan(values[i]):
            result[i, slot] = old
        else:
            result[i, slot] = values[i] if np.isnan(old) else max(values[i], old)
    return result


@numba.njit(cache=True, nogil=True)
def peak(quantile: Floats, season: Floats, slot: int, ahead: int, smoothed: Floats, margin: float) -> Floats:
    """See reference.peak."""
    n, slots = season.shape
    result = np.empty(n)
    for i in range(n):
        best = -1.0 if np.isnan(quantile[i]) else quantile[i]
        for k in range(ahead + 1):
            value = season[i, (slot + k) % slots]
            if value > best:
                best = value
        if smoothed[i] > best:
            best = smoothed[i]
        result[i] = np.nan if best < 0.0 else best * margin
    return result


@numba.njit(cache=True, nogil=True)
def rates(now: Floats, before: Floats, seconds: Floats) -> Floats:
    """See reference.rates."""
    result = np.empty(now.shape)
    n, k = now.shape
    for i in range(n):
        for j in range(k):
            delta = now[i, j] - before[i, j]
            result[i, j] = delta / seconds[i] if delta >= 0.0 and seconds[i] > 0.0 else np.nan
    return result


def warm() -> None:
    """Compile every kernel, or load it from the cache, now: the first tick need not wait for it."""
    rows, row, values = np.zeros((1, 2)), np.zeros(2), np.zeros(1)
    histogram_add(rows, row, values, values, values)
    histogram_quantile(rows, row, 0.5)
    smooth(values, values, values, values)
    season_add(rows, 0, values, 1.0)
    peak(values, rows, 0, 1, values, 1.0)
    rates(rows, rows, values)
