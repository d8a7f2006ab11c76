"""Watts asked for by what they may cost: "at most 5 % slower" is the least cap of a GPU by the class's model."""

from __future__ import annotations

import math

from colocate.policy.schema import PowerModel

ROUND = 1e-9


def watts_for(model: PowerModel, slowdown: float) -> int | None:
    """The least whole watt of one GPU whose slowdown is at most this (0.05 is 5 %), straight lines between its points.

    Never outside of them: the greatest has no more to give. None where even that is slower.
    """
    points = model.points
    if points[-1].slowdown > slowdown + ROUND:
        return None
    after = next(i for i, point in enumerate(points) if point.slowdown <= slowdown + ROUND)
    if after == 0:
        return points[0].watts
    low, high = points[after - 1], points[after]
    share = (low.slowdown - slowdown) / (low.slowdown - high.slowdown)
    return min(math.ceil(low.watts + max(share, 0.0) * (high.watts - low.watts) - 1e-6), high.watts)
