"""How many watts a job has in which slot of time, so that its work is done by the last one and costs the least.

What a slot costs is its price times the watts that are drawn in it; what is done in it is the job's speed at those
watts. Every slot up to the one in which the work is done has at least the least watts, for a job that runs cannot have
none. Then the step upwards that costs least for what it brings is taken first, on the upper concave envelope of speed
over watts: for each time at which the work may be done that is the least cost (a linear program's, for the steps of an
envelope bring less and less), and the best of those times counts. Source: CarbonScaler (Hanafy et al., EuroSys 2024),
with watts in place of servers.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Schedule(NamedTuple):
    """What is had in each slot until the work is done, and what that costs."""

    watts: Floats
    """Shape (slots until it is done,)."""
    cost: float
    at_once: float
    """What it costs with the most in every slot."""
    corner: float
    """The point of the envelope at or above what the first slot has: between two of them a job is slower than that."""


def envelope(watts: Floats, speeds: Floats) -> tuple[Floats, Floats]:
    """The points of the upper concave envelope of speed over watts, both ascending."""
    kept: list[int] = []
    for i in range(watts.size):
        while len(kept) > 1:
            a, b = kept[-2], kept[-1]
            over = (speeds[b] - speeds[a]) * (watts[i] - watts[a]) - (speeds[i] - speeds[a]) * (watts[b] - watts[a])
            if over > 0.0:
                break
            kept.pop()
        kept.append(i)
    return watts[kept], speeds[kept]


def cheapest(
    prices: Floats, seconds: Floats, most: Floats, watts: Floats, speeds: Floats, work: float
) -> Schedule | None:
    """The cheapest; None where the work is not done even with the most in every slot.

    `prices`, `seconds`, `most`: (slots,), at least 0, `most` the watts that can be had in each. `watts`, `speeds`:
    (points,), ascending, and the speed of 1 is that at which `work`, in seconds, is told.
    """
    watts, speeds = envelope(watts, speeds)
    slots = prices.size
    least = np.cumsum(speeds[0] * seconds)
    top_watts = np.clip(most, watts[0], watts[-1])
    top = np.interp(top_watts, watts, speeds)
    if float(np.sum(top * seconds)) < work:
        return None
    at_once = _until(prices * top_watts * seconds, top * seconds, work)
    # The steps of all slots, of each as far as it can have them, in the order of what they bring for what they cost.
    low, high = watts[:-1][None, :], np.minimum(watts[1:][None, :], top_watts[:, None])
    grows = np.maximum(high - low, 0.0)
    slope = np.diff(speeds) / np.diff(watts)
    gain, cost = grows * slope * seconds[:, None], grows * (prices * seconds)[:, None]
    of = np.repeat(np.arange(slots), watts.size - 1)
    for_it = np.divide(cost, gain, out=np.full_like(cost, np.inf), where=gain > 0.0).ravel()
    order = np.argsort(for_it, kind="stable")
    order = order[gain.ravel()[order] > 0.0]
    gain, cost, of, grows = gain.ravel()[order], cost.ravel()[order], of[order], grows.ravel()[order]
    base_cost = np.cumsum(prices * watts[0] * seconds)
    best: tuple[float, Floats] | None = None
    for last in range(slots):
        missing = work - least[last]
        if missing <= 0.0:
            alone = _until(prices * watts[0] * seconds, speeds[0] * seconds, work)
            if best is None or alone < best[0]:
                return Schedule(np.full(last + 1, watts[0]), alone, at_once, float(watts[0]))
            break
        here = np.where(of <= last, gain, 0.0)
        before = np.cumsum(here) - here
        part = np.where(here > 0.0, np.clip((missing - before) / np.maximum(here, 1e-300), 0.0, 1.0), 0.0)
        if float(np.sum(part * here)) < missing * (1.0 - 1e-9):
            continue
        found = float(base_cost[last] + np.sum(part * cost))
        if best is None or found < best[0] * (1.0 - 1e-12):
            had = np.full(last + 1, watts[0])
            np.add.at(had, of[of <= last], (part * grows)[of <= last])
            best = found, had
    if best is None:
        return None
    corner = watts[min(int(np.searchsorted(watts, best[1][0] - 1e-6)), watts.size - 1)]
    return Schedule(best[1], best[0], at_once, float(corner))


def _until(costs: Floats, done: Floats, work: float) -> float:
    """What is paid until so much is done, the last slot in part."""
    after = np.cumsum(done)
    last = min(int(np.searchsorted(after, work)), done.size - 1)
    before = float(after[last] - done[last])
    part = min((work - before) / float(done[last]), 1.0) if done[last] > 0.0 else 1.0
    return float(np.sum(costs[:last]) + part * costs[last])
