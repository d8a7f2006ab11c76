"""Whose energy the CPUs' meter counted since the agent began: counters that only rise, of the node and each consumer.

Reading the meter, the node's CPU time and every container's is one step, taken beside the tick; of a step in which the
meter cannot be believed nothing is counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from colocate.cgroup.port import FilePort
from colocate.cgroup.tree import Tree
from colocate.model.energy import Curve, split
from colocate.observe import node as node_figures
from colocate.observe.containers import Consumer, read_consumers
from colocate.observe.powercap import Zone, joules
from colocate.units import parse_cpulist

MOST_ENDED, ENDED_SECONDS = 500, 600.0
"""Of those who have ended so many are remembered, and so long: a scraper must have seen their last value."""


class Users(NamedTuple):
    """CPU time since boot, of the whole node and of whoever used it."""

    busy_us: int
    idle_us: int
    consumers: Sequence[Consumer]


def read_users(port: FilePort, tree: Tree) -> Users | None:
    """Of this machine, all its CPUs; None where it does not tell."""
    online = parse_cpulist(port.proc("/sys/devices/system/cpu/online") or "0")
    figures = node_figures.figures(port, "/", online, 0)
    if figures.cpu_busy_us is None or figures.cpu_idle_us is None:
        return None
    return Users(figures.cpu_busy_us, figures.cpu_idle_us, read_consumers(port, tree))


class Reading(NamedTuple):
    """All of one instant, as nearly as can be."""

    monotonic_seconds: float
    zones: Sequence[Zone]
    users: Users


class Drawn(msgspec.Struct, frozen=True):
    """Of one consumer in one kind of zone."""

    microjoules: int = 0
    """Since the agent began. Whole ones, so that no sum of them ever falls by its rounding."""
    watts: float = 0.0
    """In the last step."""
    low: float | None = None
    high: float | None = None
    """Between what its watts are if its share is judged otherwise; None: not known."""

    @property
    def joules(self) -> float:
        """As they are told."""
        return self.microjoules / 1e6

    def still(self) -> Drawn:
        """The same, of one that draws nothing now, as far as is known."""
        return Drawn(self.microjoules)


class Account(NamedTuple):
    """What has been counted so far. By kind of zone: `package`, `dram`."""

    used: float = 0.0
    """Share of all CPU time in the last step."""
    node: Mapping[str, Drawn] = {}
    idle: Mapping[str, Drawn] = {}
    active: Mapping[str, Drawn] = {}
    others: Mapping[str, Drawn] = {}
    """The system's own, who went between two steps, and containers that are no longer told of by themselves."""
    gone: Mapping[tuple[str, str], Mapping[str, int]] = {}
    """Microjoules of those of a pod (its uid, "") or of a job's name ("", its name) that are no longer told of."""
    by: Mapping[str, Mapping[str, Drawn]] = {}
    """By the key of the consumer."""
    who: Mapping[str, Consumer] = {}
    ended: Mapping[str, float] = {}
    """Of those that are no more: since when."""
    paths: Mapping[str, str] = {}
    """By kind of zone: the zone, or that there are several."""

    def silent(self) -> Account:
        """The same counters; what is drawn now is not known."""

        def still(drawn: Mapping[str, Drawn]) -> dict[str, Drawn]:
            return {kind: each.still() for kind, each in drawn.items()}

        by = {key: still(drawn) for key, drawn in self.by.items()}
        return self._replace(
            node=still(self.node), idle=still(self.idle), active=still(self.active), others=still(self.others), by=by
        )


Gone = dict[tuple[str, str], Mapping[str, int]]


class Energy:
    """Keeps the account; its parts sum up to the meter's."""

    def __init__(self) -> None:
        self.account = Account()
        """Replaced as a whole, so that another thread may look at it."""
        self._before: Reading | None = None

    def forget(self) -> None:
        """Nobody wants it any more: the next reading is the first, and what was counted stays."""
        if self._before is not None:
            self._before = None
            self.account = self.account.silent()

    def add(self, now: Reading, curve: Curve | None) -> None:
        """Count what was drawn since the reading before."""
        before, self._before = self._before, now
        if before is None or not self._count(before, now, curve):
            self.account = self.account.silent()

    def _count(self, before: Reading, now: Reading, curve: Curve | None) -> bool:
        """Whether the meter could be believed."""
        seconds = now.monotonic_seconds - before.monotonic_seconds
        counted = _by_kind(before.zones, now.zones, seconds)
        then, users = before.users, now.users
        busy, idle = users.busy_us - then.busy_us, users.idle_us - then.idle_us
        if not counted or min(busy, idle) < 0 or busy + idle <= 0:
            return False
        last = self.account
        earlier = {key: one.cpu_us for key, one in last.who.items()}
        earlier |= {one.key: one.cpu_us for one in then.consumers}
        shares = {one.key: max(one.cpu_us - earlier.get(one.key, 0), 0) / (busy + idle) for one in users.consumers}
        used, whole = busy / (busy + idle), sum(counted.values())
        parts = split(whole, seconds, used, shares, curve)
        node, idle_by, others, active = dict(last.node), dict(last.idle), dict(last.others), dict(last.active)
        by = {key: dict(kinds) for key, kinds in last.by.items()}
        for kind, energy in counted.items():
            share, total = energy / whole if whole > 0 else 0.0, round(1e6 * energy)
            worked = 0
            for key, part in parts.by.items():
                of, micro = by.setdefault(key, {}), int(1e6 * part.joules * share)
                bounds = [None if each is None else each * share / seconds for each in (part.low, part.high)]
                of[kind] = more(of.get(kind), micro, seconds, *bounds)
                worked += micro
            rest = min(int(1e6 * parts.others * share), total - worked)
            for of, micro in ((node, total), (idle_by, total - worked - rest), (active, worked + rest), (others, rest)):
                of[kind] = more(of.get(kind), micro, seconds)
        who = dict(last.who) | {one.key: one for one in users.consumers}
        ended = ended_of(last.ended, who, shares, now.monotonic_seconds)
        gone = dict(last.gone)
        for key in [key for key in who if key not in shares]:
            by[key] = {kind: drawn.still() for kind, drawn in by.get(key, {}).items()}
            if key not in ended:
                forget(who.pop(key), by.pop(key), gone, others)
        tidy(gone, who, others)
        self.account = Account(used, node, idle_by, active, others, gone, by, who, ended, _paths(now.zones))
        return True


def forget(one: Consumer, drawn: Mapping[str, Drawn], gone: Gone, others: dict[str, Drawn]) -> None:
    """Its pod, or the next job of its name, goes on from what it drew: a counter must not fall."""
    about = (one.pod_uid, one.job)
    before = gone.get(about, {})
    gone[about] = {kind: before.get(kind, 0) + each.microjoules for kind, each in drawn.items()}
    if not one.job:
        _to_others(drawn, others)  # of a pod's containers the sum over containers has it no more


def _to_others(drawn: Mapping[str, Drawn], others: dict[str, Drawn]) -> None:
    for kind, each in drawn.items():
        known = others.get(kind, Drawn())
        others[kind] = msgspec.structs.replace(known, microjoules=known.microjoules + each.microjoules)


def tidy(gone: Gone, who: Mapping[str, Consumer], others: dict[str, Drawn]) -> None:
    """Of pods that are no more nothing is kept, and of jobs' names not all."""
    uids = {one.pod_uid for one in who.values()}
    for about in [about for about in gone if about[0] and about[0] not in uids]:
        del gone[about]
    jobs = [about for about in gone if about[1]]
    for about in jobs[: max(len(jobs) - MOST_ENDED, 0)]:
        _to_others({kind: Drawn(micro) for kind, micro in gone.pop(about).items()}, others)


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


def more(
    before: Drawn | None, microjoules: int, seconds: float, low: float | None = None, high: float | None = None
) -> Drawn:
    """What was drawn before, and in a step that is over."""
    known = before.microjoules if before is not None else 0
    return Drawn(known + microjoules, microjoules / 1e6 / seconds, low, high)


def ended_of(
    known: Mapping[str, float], who: Mapping[str, Consumer], now: Mapping[str, float], at: float
) -> dict[str, float]:
    """Since when those who are no more have been so: the latest, and not for ever; but a pod that runs keeps what its
    former containers drew."""
    alive = {who[key].pod_uid for key in now if who[key].pod_uid}
    found = {key: known.get(key, at) for key in who if key not in now}
    latest = sorted(found, key=lambda key: -found[key])[:MOST_ENDED]
    return {key: found[key] for key in latest if at - found[key] < ENDED_SECONDS or who[key].pod_uid in alive}
