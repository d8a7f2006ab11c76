"""Jobs that have to be done by a time: how much of their watts they need at least for that, however short a budget is.

A job says how long its work takes with all that it asks for, and by when. What it has done is what it says, or else
the time that it ran, each second counting less by as much as its limit slowed it down; so is the time since it said
so. What is left, over the time that is left, is the speed that it needs, and its class's curve says which watts keep
that (CarbonScaler's deadline, EuroSys 2024, with watts in place of servers: no job has to be able to shrink). A job
that would be late with everything has everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from colocate.snapshot import NodeSnapshot

SPARE = 0.95
"""Of the time that is left so much is planned: a model is not exact, and a limit takes a tick to rise."""
MOST_STEP_SECONDS = 30.0
"""After a longer gap between two ticks nothing is known of what was done in it."""

Floats = NDArray[np.float64]


class Progress(msgspec.Struct, frozen=True):
    """Of one workload."""

    done_seconds: float
    """Of its work, at full watts."""
    at_seconds: float


class Curve(NamedTuple):
    """Of one workload, a card of it."""

    caps: Floats
    """Watts, ascending; the last is what it asks for."""
    longer: Floats
    """By how much more each takes than the last: never rising."""


def progressed(
    known: Mapping[str, Progress], snapshot: NodeSnapshot, curves: Mapping[str, Curve]
) -> dict[str, Progress]:
    """What each that has a deadline has done by now: it runs while it is on a card and nothing of it is frozen."""
    now, found = snapshot.monotonic_seconds, dict[str, Progress]()
    limits = limits_of(snapshot)
    for id_, workload in snapshot.workloads.items():
        if workload.due_seconds is None or workload.work_seconds is None:
            continue
        before, told = known.get(id_), workload.done_ratio
        if told is not None and (before is None or workload.done_at_seconds > before.at_seconds):
            # Of one that is new here nobody has seen what it did since.
            since = workload.done_at_seconds if before is not None else now
            before = Progress(told * workload.work_seconds, since)
        before = before or Progress(0.0, now)
        passed = now - before.at_seconds
        runs = id_ in limits and not workload.frozen and not workload.gang_held and 0.0 < passed <= MOST_STEP_SECONDS
        speed = 1.0
        if id_ in curves and runs:
            speed = 1.0 / (1.0 + float(np.interp(limits[id_], *curves[id_])))
        found[id_] = Progress(round(before.done_seconds + passed * speed * runs, 3), now)
    return found


def limits_of(snapshot: NodeSnapshot) -> dict[str, float]:
    """Of each workload that is on a card, the least limit in force on one of its own."""
    found: dict[str, float] = {}
    for card in snapshot.cards.values():
        for id_ in card.users:
            limit = card.limit_watts if card.limit_watts is not None else np.inf
            found[id_] = min(limit, found.get(id_, np.inf))
    return found


class Floor(NamedTuple):
    """What a workload has to have on each of its cards."""

    watts: float
    late: bool
    """Whether it will not be done in time even so."""


def floors(known: Mapping[str, Progress], snapshot: NodeSnapshot, curves: Mapping[str, Curve]) -> dict[str, Floor]:
    """Of each workload with a deadline and work left, what keeps that."""
    now, found = snapshot.monotonic_seconds, dict[str, Floor]()
    for id_, curve in curves.items():
        workload, done = snapshot.workloads.get(id_), known.get(id_)
        if workload is None or done is None or workload.due_seconds is None or workload.work_seconds is None:
            continue
        left, time_left = workload.work_seconds - done.done_seconds, SPARE * (workload.due_seconds - now)
        if left <= 0.0:
            continue  # it took longer than was said: nothing is known of the rest
        if left >= time_left:
            found[id_] = Floor(float(curve.caps[-1]), left > time_left / SPARE)
            continue
        slowest = time_left / left - 1.0
        at = int(np.argmax(curve.longer <= slowest))  # the least that is not too slow
        watts = float(curve.caps[at])
        if at > 0:
            low, high = curve.longer[at - 1], curve.longer[at]
            share = (low - slowest) / (low - high) if low > high else 1.0
            watts = float(curve.caps[at - 1] + share * (curve.caps[at] - curve.caps[at - 1]))
        found[id_] = Floor(watts, False)
    return found
