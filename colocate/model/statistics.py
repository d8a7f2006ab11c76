"""Intervals for comparisons: the percentile bootstrap of paired ratios and of means, seeded, so that it repeats.

Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
SEED = 20261121


class Interval(NamedTuple):
    """A point estimate with its 95 % interval."""

    value: float
    low: float
    high: float

    def below(self, bound: float) -> str:
        """`pass` if the whole interval is at or below the bound, `fail` if wholly above, else `undecided`."""
        if self.high <= bound:
            return "pass"
        return "fail" if self.low > bound else "undecided"

    def above(self, bound: float) -> str:
        """`pass` if the whole interval is at or above the bound, `fail` if wholly below, else `undecided`."""
        if self.low >= bound:
            return "pass"
        return "fail" if self.high < bound else "undecided"


def _resampled(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    generator = np.random.Generator(np.random.PCG64(seed))
    return values[generator.integers(0, values.size, (RESAMPLES, values.size))]


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float], seed: int = SEED) -> Interval:
    """The geometric mean of paired ratios with its interval. Raises ValueError for no or non-positive pairs."""
    a, b = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if a.size == 0 or a.size != b.size or (a <= 0).any() or (b <= 0).any():
        raise ValueError("ratios need pairs of positive numbers")
    logs = np.log(a / b)
    means = np.sort(_resampled(logs, seed).mean(axis=1))
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(np.exp(logs.mean())), float(np.exp(low)), float(np.exp(high)))


def mean_interval(values: Sequence[float], seed: int = SEED) -> Interval:
    """The mean with its bootstrap interval. Raises ValueError without values."""
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("no values")
    means = _resampled(array, seed).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(array.mean()), float(low), float(high))


def difference_interval(on: Sequence[float], off: Sequence[float], seed: int = SEED) -> Interval:
    """mean(on) - mean(off) of two independent samples of windows with its bootstrap interval. Raises ValueError."""
    a, b = np.asarray(on, dtype=np.float64), np.asarray(off, dtype=np.float64)
    if a.size == 0 or b.size == 0:
        raise ValueError("both arms need windows")
    means = _resampled(a, seed).mean(axis=1) - _resampled(b, seed + 1).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(a.mean() - b.mean()), float(low), float(high))


def relative_interval(on: Sequence[float], off: Sequence[float], seed: int = SEED) -> Interval:
    """mean(on) / mean(off) of two independent samples of windows with its bootstrap interval. Raises ValueError."""
    a, b = np.asarray(on, dtype=np.float64), np.asarray(off, dtype=np.float64)
    if a.size == 0 or b.size == 0 or b.mean() <= 0:
        raise ValueError("both arms need windows, and the reference a positive mean")
    denominators = _resampled(b, seed + 1).mean(axis=1)
    numerators = _resampled(a, seed).mean(axis=1)
    kept = denominators > 0
    low, high = np.quantile(numerators[kept] / denominators[kept], [0.025, 0.975])
    return Interval(float(a.mean() / b.mean()), float(low), float(high))
