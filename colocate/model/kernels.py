"""The signature table of the model's kernels; the shell chooses which module fills it."""

from __future__ import annotations

from typing import Protocol

from colocate.model import reference
from colocate.model.reference import Floats


class Kernels(Protocol):
    """What `reference` and `jit` both offer."""

    def histogram_add(self, weights: Floats, bounds: Floats, values: Floats, seconds: Floats, left: Floats) -> Floats:
        """See reference.histogram_add."""

    def histogram_quantile(self, weights: Floats, bounds: Floats, q: float) -> Floats:
        """See reference.histogram_quantile."""

    def smooth(self, previous: Floats, values: Floats, rise: Floats, fall: Floats) -> Floats:
        """See reference.smooth."""

    def season_add(self, season: Floats, slot: int, values: Floats, kept: float) -> Floats:
        """See reference.season_add."""

    def peak(self, quantile: Floats, season: Floats, slot: int, ahead: int, smoothed: Floats, margin: float) -> Floats:
        """See reference.peak."""

    def rates(self, now: Floats, before: Floats, seconds: Floats) -> Floats:
        """See reference.rates."""


def load(jit: bool) -> Kernels:
    """The compiled kernels, ready to run, or their numpy twins; numba is imported only for the former."""
    if not jit:
        return reference
    from colocate.model import jit as compiled

    compiled.warm()
    return compiled
