"""What AMD's sockets draw and may draw, by the files of its HSMP driver or by its device; both as the kernel says."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from colocate.cli.main import main
from colocate.observe.hsmp import COMMAND, MESSAGE, Socket, read_sockets
from colocate.observe.powercap import CpuMeter


def hwmon(root: Path, *sockets: dict[str, int]) -> Path:
    """Beside another sensor, and not in the order of their numbers as text."""
    (root / "hwmon0").mkdir(parents=True)
    (root / "hwmon0" / "name").write_text("k10temp\n")
    for i, files in enumerate(sockets):
        folder = root / f"hwmon{i + 1}"
        folder.mkdir()
        (folder / "name").write_text("amd_hsmp_hwmon\n")
        for name, value in files.items():
            (folder / f"power1_{name}").write_text(f"{value}\n")
    return root


FULL = {"input": 45_000_000, "cap": 400_000_000, "cap_max": 500_000_000}


@pytest.mark.parametrize(
    ("sockets", "expected"),
    [
        pytest.param([FULL, {**FULL, "input": 60_500_000}], [(45.0, 400.0, 500.0), (60.5, 400.0, 500.0)], id="two"),
        pytest.param([{"input": 45_000_000}], [(45.0, None, None)], id="one that tells no limit"),
        pytest.param([], [], id="no such driver"),
    ],
)
def test_sockets_by_the_drivers_files(
    tmp_path: Path, sockets: list[dict[str, int]], expected: list[tuple[float | None, ...]]
) -> None:
    found = read_sockets(hwmon(tmp_path / "hwmon", *sockets), tmp_path / "hsmp")
    assert [(s.watts, s.limit_watts, s.most_watts) for s in found] == expected
    assert [s.number for s in found] == list(range(len(expected)))


class Firmware:
    """Answers as the kernel does: the words of the answer are in the message itself."""

    def __init__(self, sockets: int, broken: int = 0) -> None:
        self.sockets, self.broken = sockets, broken

    def __call__(self, descriptor: int, command: int, buffer: bytearray) -> int:
        assert command == 0xC02CF800, "_IOWR(0xF8, 0, struct hsmp_message) of 44 bytes"
        assert os.readlink(f"/proc/self/fd/{descriptor}")
        message, arguments, words, *_, socket = MESSAGE.unpack(buffer)
        assert (arguments, words) == (0, 1)
        if self.broken:
            raise OSError(self.broken, os.strerror(self.broken))
        if socket >= self.sockets:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        answer = {4: 45_000 + 1000 * socket, 6: 400_000, 7: 500_000}[message]
        buffer[:] = MESSAGE.pack(message, arguments, words, answer, *(0,) * 7, socket)
        return 0


def test_sockets_by_the_device(tmp_path: Path) -> None:
    device = tmp_path / "hsmp"
    device.write_text("")
    found = read_sockets(tmp_path / "none", device, Firmware(2))
    assert found == [Socket(0, 45.0, 400.0, 500.0), Socket(1, 46.0, 400.0, 500.0)]
    assert MESSAGE.size == 44
    assert COMMAND == 0xC02CF800


@pytest.mark.parametrize("broken", [errno.ETIMEDOUT, errno.ENODEV, errno.ENOMSG])
def test_a_device_that_does_not_answer_is_said(tmp_path: Path, broken: int) -> None:
    device = tmp_path / "hsmp"
    device.write_text("")
    (found,) = read_sockets(tmp_path / "none", device, Firmware(2, broken))
    assert found.watts is None
    assert os.strerror(broken) in found.problem


def test_the_budget_of_the_cpus_goes_by_it_where_there_are_no_zones(tmp_path: Path) -> None:
    hwmon(tmp_path / "hwmon", FULL, FULL)
    meter = CpuMeter(tmp_path / "hsmp")
    assert meter.watts(tmp_path / "powercap", 1.0) == 90.0
    assert not meter.problem
    (tmp_path / "hwmon" / "hwmon2" / "power1_input").unlink()
    assert meter.watts(tmp_path / "powercap", 2.0) is None
    assert "amd_hsmp" in meter.problem


def test_power_status_shows_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hwmon(tmp_path / "class" / "hwmon", FULL)
    assert main(["power", "status", "--sysfs", str(tmp_path), "-o", "json"]) == 0
    (socket,) = json.loads(capsys.readouterr().out)["sockets"]
    assert socket["watts"] == 45.0
    assert main(["power", "status", "--sysfs", str(tmp_path)]) == 0
    assert "hsmp:0" in capsys.readouterr().out
