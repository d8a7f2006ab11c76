"""Whose energy it was: what a meter of the whole node counted, divided among those who ran.

As Kepler does (docs/developer/power-attribution-guide.md): energy is first parted into what the node draws doing
nothing and what its work draws, and the latter goes to each by its share of the CPU time that was used. Where the
node's curve is known, what it draws idle is the curve's first point; else idle counts as much as the CPUs were idle,
which is Kepler's rule. The parts sum up to the meter, always.

CPU time does not tell by how much the node would draw less without somebody: a curve that is not straight lets
reasonable rules differ. Two of them bound a figure here: as the last that came (what would go with it), and as the
first (what it would draw alone). On a concave curve, as CPUs have it, its share lies between them; where the curve
bends otherwise the outermost of the three count. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Curve = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]
"""Utilization, ascending from 0 to 1, and the watts at each; shapes (n,)."""

LEAST_RISE_WATTS = 1e-6
"""A node whose draw rises by less from idle to what it does says nothing of who makes it."""


class Part(NamedTuple):
    """What one consumer drew, in joules, and between what that is if its share is judged otherwise."""

    joules: float
    low: float | None = None
    high: float | None = None
    """None where the node's curve is not known."""


class Split(NamedTuple):
    """A time's energy, in joules: `idle`, `others` and the parts of `by` sum up to what was counted."""

    idle: float
    others: float
    """Who ran and is not among those that were asked about: the system's own, and who has gone since."""
    by: dict[str, Part]

    @property
    def active(self) -> float:
        """What work drew."""
        return self.others + sum(part.joules for part in self.by.values())


def split(counted: float, seconds: float, used: float, shares: Mapping[str, float], curve: Curve | None) -> Split:
    """Divide `counted` joules of `seconds` in which a share `used` of all CPU time was used, 0 to 1.

    `shares` are those of each consumer, of all CPU time too; together they may be a little more than `used`, for they
    are read one after the other.
    """
    used = min(max(used, 0.0), 1.0)
    given = {name: max(share, 0.0) for name, share in shares.items()}
    whole = max(used, sum(given.values()))
    idle = counted * (1.0 - used)
    if curve is not None:
        idle = min(float(np.interp(0.0, *curve)) * seconds, counted)
    active = counted - idle
    if whole <= 0.0:
        return Split(counted, 0.0, dict.fromkeys(given, Part(0.0)))
    by: dict[str, Part] = {}
    for name, share in given.items():
        joules = active * share / whole
        low, high = (None, None) if curve is None else _bounds(joules, active, share, min(whole, 1.0), curve)
        by[name] = Part(joules, low, high)
    others = max(active - sum(part.joules for part in by.values()), 0.0)
    return Split(max(counted - others - sum(part.joules for part in by.values()), 0.0), others, by)


def _bounds(joules: float, active: float, share: float, whole: float, curve: Curve) -> tuple[float, float]:
    """By the curve, on the scale of what was counted: as the last and as the first who came."""
    nothing, at_share, without, all_ = np.interp([0.0, share, max(whole - share, 0.0), whole], *curve)
    rise = all_ - nothing
    if rise <= LEAST_RISE_WATTS:
        return joules, joules
    scale = active / rise
    judged = (joules, float(all_ - without) * scale, float(at_share - nothing) * scale)
    return max(min(judged), 0.0), min(max(judged), active)
