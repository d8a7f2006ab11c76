"""What CPUs draw and may draw at most, from the kernel's powercap zones (RAPL).

/sys/class/powercap/CONTROL:N[:M]/{name,enabled,energy_uj,max_energy_range_uj,constraint_I_*}; sources:
power/powercap/powercap.rst, ABI/testing/sysfs-class-powercap, and drivers/powercap/intel_rapl_common.c for what each
says when it cannot. Zones are known by their `name`, never by their number: on client parts `intel-rapl:1` is the
platform, and the eleventh package is `intel-rapl:a`. A package has its cores and no DRAM; the platform (psys) has
everything, and overlaps all others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from colocate.observe.hsmp import DEVICE, drawn, read_sockets

ROOT = Path("/sys/class/powercap")
CONTROLS = ("intel-rapl", "intel-rapl-mmio")
"""In the order in which they are believed where two have the same zone; the first is AMD's too."""
MOST_WATTS = 4095.875
"""What a RAPL limit can say: fifteen bits of an eighth of a watt."""
TOO_MUCH = 2.0
"""Of what a zone can draw: a counter that says more was set back, and has not wrapped."""


class Limit(NamedTuple):
    """A constraint of a zone."""

    name: str
    """long_term, short_term, peak_power"""
    watts: float | None
    """None: the driver does not say (ENODATA)"""
    window_seconds: float | None
    most_watts: float | None
    """The design power; None where it is not known or reads 0"""


class Zone(NamedTuple):
    """A power zone as it was read."""

    id: str
    """CONTROL:N[:M]"""
    name: str
    """package-0, package-0-die-1, dram, core, uncore, psys"""
    parent: str
    """Id of the zone that it is a part of; empty: none"""
    enabled: bool | None
    """Whether its limits are in force; False too where the BIOS has locked them. None: it cannot say"""
    limits: tuple[Limit, ...]
    """None of a zone that is only measured (AMD)"""
    energy_microjoules: int | None
    range_microjoules: int | None
    problem: str = ""
    """Why its energy is not known"""
    doubles: str = ""
    """Id of the zone that is the same hardware by another interface"""

    @property
    def counts(self) -> bool:
        """Whether it belongs to the sum of a node: packages and their DRAM, each once."""
        return not self.doubles and self.name.partition("-")[0] in ("package", "dram")

    @property
    def most_watts(self) -> float:
        """What it can draw, as far as is known; a limit says nothing of that, as hardware does not meet every one."""
        return min(max((limit.most_watts for limit in self.limits if limit.most_watts), default=MOST_WATTS), MOST_WATTS)


def read_zones(root: Path = ROOT) -> list[Zone]:
    """Every zone, parents before their parts; none where the kernel has no powercap.

    Files are opened anew each time: one that is kept open tells what it told first.
    """
    try:
        found = [p for p in root.iterdir() if _control(p.name) in CONTROLS and ":" in p.name]
    except OSError:
        return []
    found.sort(key=lambda p: (CONTROLS.index(_control(p.name)), *_numbers(p.name)))
    zones: list[Zone] = []
    known: dict[tuple[str, ...], str] = {}
    names: dict[str, tuple[str, ...]] = {}
    for path in found:
        name = _text(path / "name")
        if name is None:
            continue  # it has gone since: the driver is being unloaded
        parent = path.name.rpartition(":")[0]
        parent = parent if ":" in parent else ""
        names[path.name] = (*names.get(parent, ()), name)
        energy, problem = _energy(path / "energy_uj")
        zones.append(
            Zone(
                id=path.name,
                name=name,
                parent=parent,
                enabled={"0": False, "1": True}.get(_text(path / "enabled") or ""),
                limits=_limits(path),
                energy_microjoules=energy,
                range_microjoules=_number(path / "max_energy_range_uj"),
                problem=problem,
                doubles=known.get(names[path.name], ""),
            )
        )
        known.setdefault(names[path.name], path.name)
    return zones


def joules(before: Zone, now: Zone, seconds: float) -> float | None:
    """What a zone drew between two readings; None where it cannot be told.

    A counter that went down has wrapped, or was set back by suspend or a reloaded driver: then the energy would be more
    than the zone can draw. A range that is not known (0) tells of no wrap.
    """
    if before.energy_microjoules is None or now.energy_microjoules is None or before.id != now.id or seconds <= 0:
        return None
    used = now.energy_microjoules - before.energy_microjoules
    if used < 0:
        if not now.range_microjoules:
            return None
        used += now.range_microjoules
    found = used / 1e6
    return found if 0 <= found <= TOO_MUCH * now.most_watts * seconds else None


def watts(before: Sequence[Zone], now: Sequence[Zone], seconds: float) -> dict[str, float | None]:
    """By zone id, its mean power between two readings."""
    earlier = {zone.id: zone for zone in before}
    found = {z.id: joules(earlier[z.id], z, seconds) if z.id in earlier else None for z in now}
    return {zone: None if energy is None else energy / seconds for zone, energy in found.items()}


def counted(zones: Sequence[Zone], drawn: Mapping[str, float | None]) -> float | None:
    """What the zones that count draw together, by what each draws; None where none counts, or one is not known."""
    known = [drawn[zone.id] for zone in zones if zone.counts]
    return sum(w for w in known if w is not None) if known and None not in known else None


class CpuMeter:
    """What the packages and their DRAM draw, from one reading to the next; without zones, what AMD's firmware says that
    its sockets draw."""

    def __init__(self, hsmp: Path = DEVICE) -> None:
        self.problem, self._hsmp = "", hsmp
        self._zones: list[Zone] = []
        self._at = 0.0

    def forget(self) -> None:
        """The next reading is the first."""
        self._zones, self.problem = [], ""

    def watts(self, root: Path, monotonic_seconds: float) -> float | None:
        """Since the call before; None at the first, and where `problem` says why."""
        zones, seconds = read_zones(root), monotonic_seconds - self._at
        before, self._zones, self._at = self._zones, zones, monotonic_seconds
        self.problem = next((f"{zone.id}: {zone.problem}" for zone in zones if zone.counts and zone.problem), "")
        if not any(zone.counts for zone in zones):
            sockets = read_sockets(root.parent / "hwmon", self._hsmp)
            if (found := drawn(sockets)) is not None:
                return found
            told = next((f"; {socket.problem}" for socket in sockets if socket.problem), "")
            why = "modprobe intel_rapl_msr, or amd_hsmp on EPYC; virtual machines have none"
            self.problem = f"{root} has no zone of a package ({why}){told}"
        if self.problem or not before:
            return None
        return counted(zones, watts(before, zones, seconds))


def _limits(path: Path) -> tuple[Limit, ...]:
    found: list[Limit] = []
    while (name := _text(path / f"constraint_{len(found)}_name")) is not None:
        prefix = f"constraint_{len(found)}"
        limit, most = _number(path / f"{prefix}_power_limit_uw"), _number(path / f"{prefix}_max_power_uw")
        window = _number(path / f"{prefix}_time_window_us")
        found.append(
            Limit(
                name=name,
                watts=None if limit is None else limit / 1e6,
                window_seconds=None if window is None else window / 1e6,
                most_watts=most / 1e6 if most else None,
            )
        )
    return tuple(found)


def _energy(path: Path) -> tuple[int | None, str]:
    try:
        return int(path.read_text()), ""
    except PermissionError:
        return None, "only root may read its energy"
    except (OSError, ValueError):
        return None, "its energy cannot be read"


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text and text.isdecimal() else None


def _control(name: str) -> str:
    return name.partition(":")[0]


def _numbers(name: str) -> list[int]:
    return [int(part, 16) if all(c in "0123456789abcdef" for c in part) and part else 0 for part in name.split(":")[1:]]
