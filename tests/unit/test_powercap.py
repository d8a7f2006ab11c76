"""Powercap zones as kernels of different hosts offer them, and energy from counters that wrap or are set back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colocate.cli import watts as command
from colocate.cli.main import main
from colocate.observe.powercap import Limit, Zone, joules, read_zones

PACKAGE_RANGE, DRAM_RANGE = 262143328850, 65712999613
"""Of 61 and 15.3 microjoules a count, 32 bits."""
UNREADABLE = object()
"""As a driver's ENODATA: there, and every read fails."""


def zone(root, zone_id, name, energy=0, limits=(), enabled="1", range_=PACKAGE_RANGE):
    folder = root / zone_id
    folder.mkdir(parents=True)
    files = {"name": name, "enabled": enabled, "energy_uj": energy, "max_energy_range_uj": range_}
    for i, (kind, limit, window, most) in enumerate(limits):
        files |= {f"constraint_{i}_name": kind, f"constraint_{i}_power_limit_uw": limit}
        files |= {f"constraint_{i}_time_window_us": window, f"constraint_{i}_max_power_uw": most}
    for file, value in files.items():
        if value is UNREADABLE:
            (folder / file).mkdir()
        elif value is not None:
            (folder / file).write_text(f"{value}\n")


LONG, SHORT = ("long_term", 270000000, 999424, 270000000), ("short_term", 324000000, 2440, 567000000)
DRAM = ("long_term", 0, 976, UNREADABLE)


def two_sockets(root):
    for n in range(2):
        zone(root, f"intel-rapl:{n}", f"package-{n}", limits=(LONG, SHORT))
        zone(root, f"intel-rapl:{n}:0", "dram", limits=(DRAM,), range_=DRAM_RANGE)
        zone(root, f"intel-rapl-mmio:{n}", f"package-{n}", limits=(LONG, SHORT))
    (root / "intel-rapl").mkdir()
    (root / "dtpm").mkdir()


def client(root):
    zone(root, "intel-rapl:0", "package-0", limits=(LONG,))
    zone(root, "intel-rapl:0:0", "core")
    zone(root, "intel-rapl:0:1", "uncore")
    zone(root, "intel-rapl:1", "psys", limits=(LONG,))


def eleven(root):
    for n in range(11):
        zone(root, f"intel-rapl:{n:x}", f"package-{n // 2}-die-{n % 2}")


def amd(root):
    zone(root, "intel-rapl:0", "package-0", enabled=None)
    zone(root, "intel-rapl:0:0", "core", enabled=None)


HOSTS = {
    "two sockets with DRAM, and the same packages by MMIO": (
        two_sockets,
        ["intel-rapl:0", "intel-rapl:0:0", "intel-rapl:1", "intel-rapl:1:0"],
        {"intel-rapl-mmio:0": "intel-rapl:0", "intel-rapl-mmio:1": "intel-rapl:1"},
    ),
    "a client part, whose second zone is the platform": (client, ["intel-rapl:0"], {}),
    "eleven dies: numbers are hexadecimal, and in order": (eleven, [f"intel-rapl:{n:x}" for n in range(11)], {}),
    "AMD: measured only": (amd, ["intel-rapl:0"], {}),
    "no powercap": (lambda root: None, [], {}),
}


@pytest.mark.parametrize(("make", "counted", "doubles"), HOSTS.values(), ids=HOSTS)
def test_zones_of_hosts(tmp_path, make, counted, doubles):
    make(tmp_path)
    zones = read_zones(tmp_path)
    assert [z.id for z in zones if z.counts] == counted
    assert {z.id: z.doubles for z in zones if z.doubles} == doubles
    assert all(z.parent in {"", *(other.id for other in zones)} for z in zones)


def test_limits_are_read_as_they_are_said(tmp_path):
    two_sockets(tmp_path)
    package, dram = read_zones(tmp_path)[:2]
    assert package.limits == (
        Limit("long_term", 270.0, 0.999424, 270.0),
        Limit("short_term", 324.0, 0.00244, 567.0),
    )
    assert package.enabled
    assert dram.limits == (Limit("long_term", 0.0, 0.000976, None),)  # ENODATA
    assert dram.range_microjoules == DRAM_RANGE
    assert dram.parent == package.id


def reading(microjoules, range_=PACKAGE_RANGE, most=270.0):
    limits = (Limit("long_term", most, 1.0, most),)
    return Zone("intel-rapl:0", "package-0", "", True, limits, microjoules, range_)


ENERGY = {
    "it went on": (reading(1_000_000), reading(36_000_000), 1.0, 35.0),
    "it wrapped": (reading(PACKAGE_RANGE - 5_000_000), reading(30_000_000), 1.0, 35.0),
    "it was set back, which would be more than it can draw": (reading(90_000_000_000), reading(1_000_000), 1.0, None),
    "it jumped": (reading(0), reading(90_000_000_000), 1.0, None),
    "a range of 0 tells of no wrap": (reading(9_000_000, 0), reading(1_000_000, 0), 1.0, None),
    "a range that cannot be read tells of no wrap": (reading(9_000_000, None), reading(1_000_000, None), 1.0, None),
    "not readable before": (reading(None), reading(1_000_000), 1.0, None),
    "not readable now": (reading(1_000_000), reading(None), 1.0, None),
    "no time between": (reading(1_000_000), reading(1_000_000), 0.0, None),
}


@pytest.mark.parametrize(("before", "now", "seconds", "expected"), ENERGY.values(), ids=ENERGY)
def test_energy_between_two_readings(before, now, seconds, expected):
    assert joules(before, now, seconds) == (None if expected is None else pytest.approx(expected))


@given(st.integers(0, PACKAGE_RANGE - 1), st.floats(0.0, 270.0), st.floats(0.1, 600.0))
def test_energy_is_right_wherever_the_counter_stands(start, power, seconds):
    used = int(power * seconds * 1e6)
    found = joules(reading(start), reading((start + used) % PACKAGE_RANGE), seconds)
    assert found == pytest.approx(used / 1e6)


@pytest.fixture
def clock(monkeypatch):
    """A second passes, and each zone draws what is said for it, by id."""
    drawn: dict[Path, float] = {}
    now = [100.0]

    class Clock:
        @staticmethod
        def monotonic():
            return now[0]

        @staticmethod
        def sleep(seconds):
            now[0] += seconds
            for folder, power in drawn.items():
                file = folder / "energy_uj"
                file.write_text(f"{int(file.read_text()) + int(power * seconds * 1e6)}\n")

    monkeypatch.setattr(command, "time", Clock)
    monkeypatch.setattr("colocate.observe.node.DRIVER_FILES", ())
    return drawn


def test_status_says_what_the_node_draws(tmp_path, clock, capsys):
    root = tmp_path / "class" / "powercap"
    two_sockets(root)
    drawn = {"intel-rapl:0": 81.5, "intel-rapl:0:0": 11.0, "intel-rapl:1": 60.0, "intel-rapl:1:0": 9.5}
    clock |= {root / zone_id: power for zone_id, power in drawn.items()}
    clock[root / "intel-rapl-mmio:0"] = 81.5
    assert main(["power", "status", "--sysfs", str(tmp_path), "-o", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cpu_watts"] == pytest.approx(162.0)
    assert {z["id"]: z["watts"] for z in found["zones"] if z["id"] in drawn} == drawn
    assert main(["power", "status", "--sysfs", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "packages and their DRAM: 162.0 W" in text
    assert "the same as intel-rapl:0" in text
    assert "270/0.999s, 324/0.00244s" in text
    assert "none/0.000976s" in text


def test_status_says_what_it_cannot_tell(tmp_path, clock, capsys):
    root = tmp_path / "class" / "powercap"
    zone(root, "intel-rapl:0", "package-0", limits=(LONG,), enabled="0")
    zone(root, "intel-rapl:1", "package-1", energy=UNREADABLE)
    assert main(["power", "status", "--sysfs", str(tmp_path), "-o", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cpu_watts"] is None  # a part of a sum is no sum
    assert [z["note"] for z in found["zones"]] == [
        "its limits are off, or locked by the firmware",
        "its energy cannot be read; measured only",
    ]


def test_an_ordinary_user_is_told_who_may_read_energy(tmp_path, monkeypatch):
    zone(tmp_path, "intel-rapl:0", "package-0")
    read = Path.read_text

    def refusing(path):
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_text", refusing)  # root may read everything
    assert [z.problem for z in read_zones(tmp_path)] == ["only root may read its energy"]


BAD = {
    "nothing here tells of power": (["status", "--sysfs", "/nowhere"], 1, "modprobe intel_rapl_msr"),
    "too short a time": (["status", "--seconds", "1ms"], 2, "--seconds: at least 0.05"),
}


@pytest.mark.parametrize(("arguments", "code", "said"), BAD.values(), ids=BAD)
def test_what_cannot_be_done_is_said(arguments, code, said, clock, capsys):
    assert main(["power", *arguments]) == code
    assert said in capsys.readouterr().err
