"""Intervals for comparisons: Student's t for a few paired rounds, the percentile bootstrap for many windows.

The bootstrap is seeded, so that it repeats (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).
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


_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.16, 2.145, 2.131,
          2.12, 2.11, 2.101, 2.093, 2.086, 2.08, 2.074, 2.069, 2.064, 2.06, 2.056, 2.052, 2.048, 2.045)  # fmt: skip
"""The 97.5 % quantile of Student's t with 1, 2, 3 ... degrees of freedom; 1.96 beyond."""


def _student(values: NDArray[np.float64]) -> tuple[float, float]:
    """The mean of a few values and the half width of its 95 % interval; infinite for a single one."""
    if values.size < 2:
        return float(values.mean()), float("inf")
    freedom = values.size - 1
    t = _T_975[freedom - 1] if freedom <= len(_T_975) else 1.96
    return float(values.mean()), float(t * values.std(ddof=1) / np.sqrt(values.size))


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float]) -> Interval:
    """The geometric mean of paired ratios with its interval. Raises ValueError for no or non-positive pairs.

    Student's t on the logarithms: a bootstrap of four or five rounds would be far too sure of itself.
    """
    a, b = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if a.size == 0 or a.size != b.size or (a <= 0).any() or (b <= 0).any():
        raise ValueError("ratios need pairs of positive numbers")
    middle, half = _student(np.log(a / b))
    return Interval(float(np.exp(middle)), float(np.exp(middle - half)), float(np.exp(middle + half)))


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean with its interval by Student's t. Raises ValueError without values."""
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("no values")
    middle, half = _student(array)
    return Interval(middle, middle - half, middle + half)


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
