"""The model of a talk, to compare: "Environmentally Sustainable AI via Power-Aware Batch Scheduling" (KubeCon NA 2023).

S = A (x0 - x)^2 + B (x0 - x) + C with x the cap as a share of the greatest, against the fastest run of all; least
squares with SciPy's SLSQP from [1, 0, 0, 0], falling at each cap, x0 and A not below 0. x0 is redundant, so that where
the search ends depends on the optimizer: the same one is used, and the same numbers come out. What it lacks is kept:
the cap for a slowdown is not held within the sweep, and is no number where the polynomial does not reach it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from colocate.errors import HostUnfit
from colocate.model.power import BadSweepError, Floats
from colocate.power.sweeps import Run


class SeedFit(NamedTuple):
    """What the talk's script finds."""

    coefficients: Floats
    """x0, A, B, C."""
    r2: float
    greatest_watts: float
    problem: str
    """What the optimizer said, if it did not end well."""

    def cap(self, slowdown: float) -> float:
        """Watts; NaN or infinite where the polynomial does not reach this slowdown."""
        x0, a, b, c = self.coefficients
        with np.errstate(all="ignore"):
            return float(self.greatest_watts * (x0 - (-b + np.sqrt(b**2 - 4.0 * a * (c - slowdown))) / (2.0 * a)))


def fit_seed(runs: Sequence[Run]) -> SeedFit:
    """Raises HostUnfit without SciPy, BadSweepError of runs that say nothing."""
    try:
        from scipy.optimize import minimize
    except ImportError as error:
        raise HostUnfit(
            "--model seed needs SciPy, whose optimizer the talk's script uses", "install colocate[power]"
        ) from error
    caps = np.array([run.cap_watts for run in runs])
    if len(set(caps.tolist())) < 2:
        raise BadSweepError(f"there are runs at {len(set(caps.tolist()))} cap(s): a sweep needs two at least")
    seconds = np.array([run.seconds for run in runs])
    x, measured = caps / caps.max(), seconds / seconds.min() - 1.0

    def modelled(p: Floats) -> Floats:
        return np.asarray(p[1] * (p[0] - x) ** 2 + p[2] * (p[0] - x) + p[3])

    found = minimize(
        lambda p: np.sum((measured - modelled(p)) ** 2),
        [1, 0, 0, 0],
        constraints=(
            {"type": "ineq", "fun": lambda p: 2 * p[0] * p[1] - 2 * p[1] * x + p[2]},
            {"type": "ineq", "fun": lambda p: p[0]},
            {"type": "ineq", "fun": lambda p: p[1]},
        ),
    )
    unexplained = float(np.sum((measured - modelled(found.x)) ** 2))
    varied = float(np.sum((measured - measured.mean()) ** 2))
    r2 = 1.0 - unexplained / varied if varied else float(unexplained == 0.0)
    return SeedFit(found.x, r2, float(caps.max()), "" if found.success else str(found.message))
