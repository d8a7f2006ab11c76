"""What the node draws by how busy its CPUs are, for whoever places work where that costs the least watts.

The CPU packages' own meter (RAPL) is read beside the tick, where there is one; what was learnt outlives a restart. An
operator's curve counts instead, where the policy has one. Whose energy it was is counted too, where the policy says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import structlog

from colocate.actuate.statedir import POWER_FILE, StateDirectory
from colocate.actuate.workers import Workers
from colocate.cluster.api import CurvePoint, NodePower
from colocate.model.energy import Curve
from colocate.model.node_power import GRID, NodeCurve
from colocate.observe.energy import Energy, Reading, Users
from colocate.observe.powercap import Zone, counted, read_zones, watts
from colocate.policy.schema import PowerPolicy
from colocate.snapshot import NodeSnapshot

log = structlog.get_logger()
READ_SECONDS = 5.0
"""Between two readings of the meter: one reading is of so long."""
MEAN_SECONDS = 60.0
"""What is told of utilization is a mean of about so long."""
STEADY = 0.1
"""A time in which utilization moved by more is of no one utilization."""
SAVE_SECONDS = 300.0
HOT, CURVE_WATTS, CURVE_RATIO = 0.05, 3.0, 0.03
"""Changes of utilization, and of a curve's watts, that are worth telling."""
LOOK_AGAIN_SECONDS = 300.0
"""Where there was no meter one is looked for again: a module may be loaded, a policy may name another place."""


class PowerWatch:
    """One node's, as long as its agent runs."""

    def __init__(
        self,
        policy: Callable[[], PowerPolicy],
        state: StateDirectory | None,
        read: Callable[[Path], list[Zone]] = read_zones,
        users: Callable[[], Users | None] = lambda: None,
    ) -> None:
        self._policy, self._state, self._read, self._users = policy, state, read, users
        self.curve = NodeCurve()
        self.energy = Energy()
        self.wanted = False
        """Whether somebody is told of the curve: else the meter is read for the policy's sake alone."""
        data = state.load(POWER_FILE) if state is not None else None
        if data is not None:
            try:
                self.curve = _curve_of(data)
            except (msgspec.MsgspecError, ValueError):
                state.set_aside(POWER_FILE)  # type: ignore[union-attr]
        self._workers: Workers[None] = Workers()
        self._before: NodeSnapshot | None = None
        self._mean: float | None = None
        self._spread: list[float] = []
        """Utilizations since the last reading."""
        self._zones: list[Zone] = []
        self._read_at = self._saved_at = float("-inf")
        self._none: tuple[str, float] | None = None
        """Where there was no meter, and when."""

    async def settle(self) -> None:
        """Wait for the reading that is under way."""
        await self._workers.settle(READ_SECONDS)

    def look(self, snapshot: NodeSnapshot) -> None:
        """What the node used since the tick before; its meter is read beside."""
        self._workers.arrived()
        if not self.wanted and not self._policy().attribution:
            if not self._workers.busy("meter"):  # which is nobody's concern any more: it begins anew
                self.energy.forget()
                self._zones, self._before, self._read_at = [], None, float("-inf")
            return
        before, self._before = self._before, snapshot
        used = utilization(before, snapshot) if before is not None else None
        if used is None or before is None:
            return
        seconds = snapshot.monotonic_seconds - before.monotonic_seconds
        self._mean = (
            used if self._mean is None else self._mean + (used - self._mean) * -math.expm1(-seconds / MEAN_SECONDS)
        )
        now = snapshot.monotonic_seconds
        if self._gone(now):
            self._spread.clear()
            return
        self._spread.append(used)
        if now - self._read_at < READ_SECONDS or self._workers.busy("meter"):
            return
        spread, self._spread = self._spread, []
        passed, self._read_at = now - self._read_at, now
        self._workers.submit("meter", partial(self._learn, spread, passed, now))

    def _gone(self, now: float) -> bool:
        """Whether there was no meter there lately."""
        return (
            self._none is not None
            and self._none[0] == self._policy().powercap
            and now - self._none[1] < LOOK_AGAIN_SECONDS
        )

    def _learn(self, spread: list[float], seconds: float, now: float) -> None:
        """Whatever a meter says, protection goes on."""
        try:
            self._read_meter(spread, seconds, now)
        except Exception as error:
            self._none = self._policy().powercap, now
            log.exception("meter_not_read", error=str(error), effect="what the node draws is not learnt")

    def _read_meter(self, spread: list[float], seconds: float, now: float) -> None:
        where = self._policy().powercap
        zones, before = self._read(Path(where)), self._zones
        self._zones = zones
        there = any(zone.counts and zone.energy_microjoules is not None for zone in zones)
        self._none = None if there else (where, now)
        self._attribute(zones, now)
        if not before or max(spread) - min(spread) > STEADY:
            return
        drawn = counted(zones, watts(before, zones, seconds))
        if drawn is not None:
            self.curve.learn(sum(spread) / len(spread), drawn)
        if self._state is not None and now - self._saved_at >= SAVE_SECONDS:
            self._saved_at = now
            self._state.save(POWER_FILE, msgspec.to_builtins(self.curve))

    def _attribute(self, zones: list[Zone], now: float) -> None:
        users = self._users() if self._policy().attribution else None
        if users is None:
            self.energy.forget()
            return
        self.energy.add(Reading(now, zones, users), self._known_curve())

    def _known_curve(self) -> Curve | None:
        given = self._policy().curve
        if given:
            return np.array([p.utilization for p in given]), np.array([float(p.watts) for p in given])
        learnt = self.curve.points()
        return None if learnt is None else (np.linspace(0.0, 1.0, GRID), learnt)

    def told(self) -> NodePower | None:
        """What schedulers may know; None as long as no curve is known."""
        given = self._policy().curve
        if self._mean is None:
            return None
        used = round(self._mean, 2)
        if given:
            points = [CurvePoint(utilization=p.utilization, watts=p.watts) for p in given]
            return NodePower(utilization=used, curve=points)
        learnt = self.curve.points()
        if learnt is None:
            return None
        points = [CurvePoint(utilization=i / (GRID - 1), watts=round(float(w))) for i, w in enumerate(learnt)]
        return NodePower(utilization=used, curve=points, measured=True)


def utilization(before: NodeSnapshot, now: NodeSnapshot) -> float | None:
    """The share of all CPUs' time that was not idle between two snapshots, 0 to 1; None where it is not known."""
    readings = (before.cpu_busy_us, now.cpu_busy_us, before.cpu_idle_us, now.cpu_idle_us)
    if None in readings:
        return None
    busy_before, busy, idle_before, idle = (float(each or 0) for each in readings)
    used, unused = busy - busy_before, idle - idle_before
    return used / (used + unused) if used >= 0 and unused >= 0 and used + unused > 0 else None


def differs(before: NodePower | None, now: NodePower | None) -> bool:
    """Whether a change is worth telling."""
    if before is None or now is None:
        return before is not now
    if abs(before.utilization - now.utilization) >= HOT or before.measured != now.measured:
        return True
    if [p.utilization for p in before.curve] != [p.utilization for p in now.curve]:
        return True
    pairs = zip(before.curve, now.curve, strict=True)
    return any(abs(a.watts - b.watts) > max(CURVE_WATTS, CURVE_RATIO * a.watts) for a, b in pairs)


def _curve_of(data: dict[str, Any]) -> NodeCurve:
    curve = msgspec.convert(data, NodeCurve)
    if {len(curve.weights), len(curve.used), len(curve.watts)} != {GRID}:
        raise ValueError("another grid")
    return curve
