"""What AMD EPYC sockets draw and may draw, as their management firmware says (HSMP).

By its driver's hwmon files (Linux 6.16: drivers/platform/x86/amd/hsmp/hwmon.c: `amd_hsmp_hwmon`, one a socket,
power1_{input,cap,cap_max} in microwatts), else by /dev/hsmp (arch/x86/include/uapi/asm/amd_hsmp.h: milliwatts), which
answers what only asks on a descriptor that is open for reading. Nothing is set by it: a socket's limit would slow the
services on it as much (docs/power.md, a budget of the CPUs).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from colocate.amdgpu import number_in

HWMON, DEVICE = Path("/sys/class/hwmon"), Path("/dev/hsmp")
DRIVER = "amd_hsmp_hwmon"
GET_POWER, GET_LIMIT, GET_MOST = 4, 6, 7
MESSAGE = struct.Struct("<IHH8IHxx")
"""Message, arguments, words of the answer, eight words, socket; packed to four bytes."""
COMMAND = 0xC0000000 | MESSAGE.size << 16 | 0xF8 << 8
"""_IOWR(0xF8, 0, struct hsmp_message)"""
MOST_SOCKETS = 8


class Socket(NamedTuple):
    """One of the node's, in watts; None is not told."""

    number: int
    watts: float | None
    limit_watts: float | None
    most_watts: float | None
    problem: str = ""
    """Why it is not told."""


Ask = Callable[[int, int, bytearray], object]


def read_sockets(hwmon: Path = HWMON, device: Path = DEVICE, ask: Ask = fcntl.ioctl) -> list[Socket]:
    """Every socket that tells; none where there is no such driver."""
    found: list[Socket] = []
    with contextlib.suppress(OSError):
        for folder in sorted(hwmon.iterdir(), key=lambda path: path.resolve().as_posix()):
            with contextlib.suppress(OSError, UnicodeDecodeError):
                if (folder / "name").read_text().strip() == DRIVER:
                    draws, limit, most = (_watts(folder / f"power1_{name}") for name in ("input", "cap", "cap_max"))
                    found.append(Socket(len(found), draws, limit, most))
    return found or _by_device(device, ask)


def _watts(path: Path) -> float | None:
    microwatts = number_in(path)
    return None if microwatts is None else microwatts / 1e6


def _by_device(device: Path, ask: Ask) -> list[Socket]:
    try:
        descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return []
    except OSError as error:
        return [Socket(0, None, None, None, f"{device}: {error.strerror}")]
    try:
        found = []
        for index in range(MOST_SOCKETS):
            try:
                draws, limit, most = (_asked(descriptor, index, m, ask) for m in (GET_POWER, GET_LIMIT, GET_MOST))
            except OSError as error:
                if error.errno in (errno.ENODEV, errno.EINVAL) and index:
                    break  # there are no more
                found.append(Socket(index, None, None, None, f"{device}: {error.strerror}"))
                break
            found.append(Socket(index, draws, limit, most))
        return found
    finally:
        os.close(descriptor)


def _asked(descriptor: int, index: int, message: int, ask: Ask) -> float:
    buffer = bytearray(MESSAGE.pack(message, 0, 1, *(0,) * 8, index))
    ask(descriptor, COMMAND, buffer)
    return float(MESSAGE.unpack(buffer)[3]) / 1e3


def drawn(sockets: list[Socket]) -> float | None:
    """What all draw together; None where one does not tell."""
    known = [socket.watts for socket in sockets]
    return sum(w for w in known if w is not None) if known and None not in known else None
