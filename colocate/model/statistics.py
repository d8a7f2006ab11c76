"""Intervals for comparisons of pairs: Student's t, which is honest for four of them as for forty.

Windows of a switchback are compared with their neighbours, so that drift hits both alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from colocate.model.special import student_quantile


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


def _student(values: NDArray[np.float64], comparisons: int) -> tuple[float, float]:
    """The mean of a few values and the half width of its 95 % interval; infinite for a single one.

    With several comparisons each interval is wider, so that all of them hold together (Bonferroni).
    """
    if values.size < 2:
        return float(values.mean()), float("inf")
    t = student_quantile(1.0 - 0.025 / comparisons, float(values.size - 1))
    return float(values.mean()), float(t * values.std(ddof=1) / np.sqrt(values.size))


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float], comparisons: int = 1) -> Interval:
    """The geometric mean of paired ratios with its interval. Raises ValueError for no or non-positive pairs.

    Student's t on the logarithms: a bootstrap of four or five pairs would be far too sure of itself.
    """
    a, b = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if a.size == 0 or a.size != b.size or (a <= 0).any() or (b <= 0).any():
        raise ValueError("ratios need pairs of positive numbers")
    middle, half = _student(np.log(a / b), comparisons)
    return Interval(float(np.exp(middle)), float(np.exp(middle - half)), float(np.exp(middle + half)))


def mean_interval(values: Sequence[float], comparisons: int = 1) -> Interval:
    """The mean with its interval by Student's t. Raises ValueError without values."""
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("no values")
    middle, half = _student(array, comparisons)
    return Interval(middle, middle - half, middle + half)


def difference_interval(on: Sequence[float], off: Sequence[float], comparisons: int = 1) -> Interval:
    """The mean of on - off over pairs of windows with its interval. Raises ValueError for no pairs."""
    if len(on) != len(off):
        raise ValueError("differences need pairs")
    return mean_interval([a - b for a, b in zip(on, off, strict=True)], comparisons)
