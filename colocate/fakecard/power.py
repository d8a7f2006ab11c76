"""What a card draws, and how much slower it is under a power cap: curves as they were published, as facts.

A curve is (cap as a share of the greatest, by how much longer the same work takes). Between its points it is straight;
below its first one hardware seldom follows: the cap is not met, and nothing gets slower any more (an A40 drew up to
1.21 of a cap of 100 W).
Sources: the Zeus sweeps (ml-energy/zeus, NSDI 2023; time of an epoch by power limit, the largest batch); README.md.
"""

from __future__ import annotations

from typing import NamedTuple

Curve = tuple[tuple[float, float], ...]
V100_BERT: Curve = ((0.4, 1.134), (0.5, 0.669), (0.6, 0.317), (0.7, 0.135), (0.8, 0.067), (0.9, 0.024), (1.0, 0.0))
"""bert on squad, batch of 56; the cap binds everywhere."""
V100_SHUFFLENET: Curve = (
    (0.4, 0.518),
    (0.5, 0.233),
    (0.6, 0.114),
    (0.7, 0.074),
    (0.8, 0.039),
    (0.9, 0.014),
    (1.0, 0.0),
)
"""shufflenetv2 on cifar100, batch of 4096."""
V100_NCF: Curve = ((0.4, 0.021), (0.5, 0.016), (0.6, 0.005), (0.7, 0.0), (1.0, 0.0))
"""ncf on ml-1m: nearly nothing."""
CURVES = {"bert": V100_BERT, "shufflenet": V100_SHUFFLENET, "ncf": V100_NCF}


class PowerSpec(NamedTuple):
    """What a card may draw, in watts."""

    idle: float = 45.0
    natural: float = 280.0
    """What kernels draw that nothing keeps from it; less where they fill a part of the SMs."""
    least: float = 100.0
    greatest: float = 300.0
    """The least and the greatest limit that its driver takes; the greatest is the default too."""
    floor: float = 110.0
    """What it draws at least while kernels run, whatever its limit."""
    curve: Curve = V100_BERT


def slowdown(curve: Curve, share: float) -> float:
    """By how much longer work takes at this share of the greatest cap."""
    before = curve[0]
    if share <= before[0]:
        return before[1]
    for point in curve[1:]:
        if share <= point[0]:
            part = (share - before[0]) / (point[0] - before[0])
            return before[1] + part * (point[1] - before[1])
        before = point
    return curve[-1][1]


def draw(spec: PowerSpec, limit: float, share: float) -> float:
    """Watts while kernels run that fill this share of the SMs."""
    wanted = spec.idle + (spec.natural - spec.idle) * min(share, 1.0)
    return min(wanted, max(limit, spec.floor))
