"""Whose energy the CPUs' meter counted since the agent began: counters that only rise, of the node and each consumer.

Reading the meter, the node's CPU time and every container's is one step, taken beside the tick; of a step in which the
meter cannot be believed nothing is counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from colocate.model.energy import Curve, split
from colocate.observe.containers import Consumer
from colocate.observe.powercap import Zone, joules

MOST_ENDED, ENDED_SECONDS = 500, 600.0
"""Of those who have ended so many are remembered, and so long: a scraper must have seen their last value."""


class Reading(NamedTuple):
    """All of one instant, as nearly as can be."""

    monotonic_seconds: float
    zones: Sequence[Zone]
    busy_us: int
    idle_us: int
    """CPU time of the whole node since boot."""
    consumers: Sequence[Consumer]


class Drawn(msgspec.Struct, frozen=True):
    """Of one consumer in one kind of zone."""

    joules: float = 0.0
    """Since the agent began."""
    watts: float = 0.0
    """In the last step."""
    low: float | None = None
    high: float | None = None
    """Between what its watts are if its share is judged otherwise; None: not known."""


class Account(NamedTuple):
    """What has been counted so far. By kind of zone: `package`, `dram`."""

    seconds: float = 0.0
    """How long the last step was; 0: there was none yet."""
    used: float = 0.0
    """Share of all CPU time in it."""
    node: Mapping[str, Drawn] = {}
    idle: Mapping[str, Drawn] = {}
    others: Mapping[str, Drawn] = {}
    """The system's own, and who went between two steps."""
    by: Mapping[str, Mapping[str, Drawn]] = {}
    """By the key of the consumer."""
    who: Mapping[str, Consumer] = {}
    ended: Mapping[str, float] = {}
    """Of those that are no more: since when."""
    paths: Mapping[str, str] = {}
    """By kind of zone: the zone, or that there are several."""


class Energy:
    """Keeps the account; its parts sum up to the meter's."""

    def __init__(self) -> None:
        self.account = Account()
        """Replaced as a whole, so that another thread may look at it."""
        self._before: Reading | None = None

    def forget(self) -> None:
        """Nobody wants it any more: the next reading is the first, and what was counted stays."""
        self._before = None

    def add(self, now: Reading, curve: Curve | None) -> None:
        """Count what was drawn since the reading before."""
        before, self._before = self._before, now
        if before is None:
            return
        seconds = now.monotonic_seconds - before.monotonic_seconds
        counted = _by_kind(before.zones, now.zones, seconds)
        busy, idle = now.busy_us - before.busy_us, now.idle_us - before.idle_us
        if not counted or min(busy, idle) < 0 or busy + idle <= 0:
            return
        earlier = {one.key: one.cpu_us for one in before.consumers}
        shares = {one.key: max(one.cpu_us - earlier.get(one.key, 0), 0) / (busy + idle) for one in now.consumers}
        used, whole = busy / (busy + idle), sum(counted.values())
        parts = split(whole, seconds, used, shares, curve)
        last = self.account
        node, idle_by, others = dict(last.node), dict(last.idle), dict(last.others)
        by = {key: dict(kinds) for key, kinds in last.by.items()}
        for kind, energy in counted.items():
            share = energy / whole if whole > 0 else 0.0
            node[kind] = _more(node.get(kind), energy, seconds)
            idle_by[kind] = _more(idle_by.get(kind), parts.idle * share, seconds)
            others[kind] = _more(others.get(kind), parts.others * share, seconds)
            for key, part in parts.by.items():
                of = by.setdefault(key, {})
                bounds = [None if each is None else each * share / seconds for each in (part.low, part.high)]
                of[kind] = _more(of.get(kind), part.joules * share, seconds, *bounds)
        who = dict(last.who) | {one.key: one for one in now.consumers}
        ended = _ended(last.ended, who, shares, now.monotonic_seconds)
        for key in [key for key in who if key not in shares]:
            if key not in ended:
                who.pop(key)
                by.pop(key, None)
            else:
                by[key] = {kind: Drawn(joules=drawn.joules) for kind, drawn in by.get(key, {}).items()}
        paths = _paths(now.zones)
        self.account = Account(seconds, used, node, idle_by, others, by, who, ended, paths)


def _by_kind(before: Sequence[Zone], now: Sequence[Zone], seconds: float) -> dict[str, float]:
    """Joules of packages and of their DRAM; none where one of them is not known."""
    earlier = {zone.id: zone for zone in before}
    found: dict[str, float] = {}
    for zone in now:
        if not zone.counts:
            continue
        used = joules(earlier[zone.id], zone, seconds) if zone.id in earlier else None
        if used is None:
            return {}
        found[_kind(zone)] = found.get(_kind(zone), 0.0) + used
    return found


def _kind(zone: Zone) -> str:
    return zone.name.partition("-")[0]


def _paths(zones: Sequence[Zone]) -> dict[str, str]:
    """Kepler's label: a zone's own path, or that it stands for several."""
    found: dict[str, str] = {}
    for zone in zones:
        if zone.counts:
            kind = _kind(zone)
            found[kind] = f"aggregated-{kind}" if kind in found else zone.id
    return found


def _more(
    before: Drawn | None, energy: float, seconds: float, low: float | None = None, high: float | None = None
) -> Drawn:
    return Drawn((before.joules if before is not None else 0.0) + energy, energy / seconds, low, high)


def _ended(
    known: Mapping[str, float], who: Mapping[str, Consumer], now: Mapping[str, float], at: float
) -> dict[str, float]:
    """Since when those who are no more have been so: the latest, and not for ever; but a pod that runs keeps what its
    former containers drew."""
    alive = {who[key].pod_uid for key in now if who[key].pod_uid}
    found = {key: known.get(key, at) for key in who if key not in now}
    latest = sorted(found, key=lambda key: -found[key])[:MOST_ENDED]
    return {key: found[key] for key in latest if at - found[key] < ENDED_SECONDS or who[key].pod_uid in alive}
