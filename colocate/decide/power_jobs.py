"""Jobs under power caps: whose cap is the strictest on which cards, and what its class's curve says of it.

Of a class that is not known the time is taken to grow as the cap falls (GEOPM's rule where it has no model).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from colocate.decide.caps import Capped, whole_up
from colocate.plan import GpuTarget, PowerCap
from colocate.policy.schema import PowerModel
from colocate.snapshot import NodeSnapshot

Curves = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Of jobs: caps of one card, ascending, and by how much longer each takes; shapes (jobs, POINTS)."""
POINTS = 25
STEP_WATTS = 5.0


class Job(NamedTuple):
    """Whose cap is the strictest on some cards."""

    workload: str
    cards: tuple[str, ...]
    least: float
    watts: float
    """Of each card, as asked for."""
    enough: float
    """Of each card, as they are seen to need at most; infinite where that is not known."""

    def at_least(self, watts: float) -> Job:
        """The same, which may not have less on each card."""
        return self._replace(least=min(max(whole_up(watts, STEP_WATTS), self.least), max(self.watts, self.least)))


def cards_of_one(capped: Capped) -> set[str]:
    """Those of which one workload alone asks for watts."""
    asked = Counter(cap.target.uuid for cap in capped.caps if isinstance(cap.target, GpuTarget))
    return {uuid for uuid, many in asked.items() if many == 1}


def jobs_of(capped: Capped, snapshot: NodeSnapshot, enough: Mapping[str, float]) -> list[Job]:
    """Those of these caps; `enough`: watts that a card is seen to need at most, by its UUID."""
    strictest: dict[str, PowerCap] = {}
    for cap in capped.caps:
        if isinstance(cap.target, GpuTarget) and cap.watts is not None:
            known = strictest.setdefault(cap.target.uuid, cap)
            if known.watts is not None and cap.watts < known.watts:
                strictest[cap.target.uuid] = cap
    cards: dict[str, list[str]] = {}
    for uuid, cap in sorted(strictest.items()):
        cards.setdefault(cap.workload, []).append(uuid)
    return [
        Job(
            workload,
            tuple(uuids),
            max(snapshot.cards[u].least_watts or 0.0 for u in uuids),
            min(strictest[u].watts or 0.0 for u in uuids),
            max(enough.get(u, math.inf) for u in uuids),
        )
        for workload, uuids in sorted(cards.items())
    ]


def curve_of(model: PowerModel) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Its caps, ascending, and the slowdown at each; shapes (points,)."""
    watts, slowdowns = np.array([(p.watts, p.slowdown) for p in model.points], dtype=np.float64).T
    return watts, slowdowns


def curves_of(jobs: list[Job], snapshot: NodeSnapshot, models: tuple[PowerModel, ...]) -> Curves:
    """(jobs, POINTS): caps of one card from the least to what is asked for, and by how much longer each job takes."""
    known = {model.name: model for model in models}
    steps = np.linspace(0.0, 1.0, POINTS)
    caps = np.array([job.least + steps * (max(job.watts, job.least) - job.least) for job in jobs])
    longer = np.zeros_like(caps)
    for row, job in enumerate(jobs):
        workload = snapshot.workloads.get(job.workload)
        model = known.get(workload.power_class) if workload is not None else None
        used = np.minimum(caps[row], max(job.enough, job.least))  # what lies above makes it no faster
        times = used[-1] / used
        if model is not None:
            times = 1.0 + np.interp(used, *curve_of(model))
        longer[row] = times / times[-1] - 1.0
    return caps, longer
