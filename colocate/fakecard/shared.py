"""What processes and the daemon of a fake card share: a ring of launches each, and the state that NVML shows.

A ring is memory that a process makes, hands to the daemon over its socket, and stores its launches into: no call and no
message is in between, as with a real card's doorbells. So a process that is frozen stops between two stores, and what
it has stored runs on. The layout of the state is state.h's as well.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from pathlib import Path

SOCKET, STATE, LIBRARY, CUDA, FAULTS = "socket", "state", "libnvidia-ml.so.1", "libcuda.so.1", "faults"
MPS_CONTROL = "nvidia-cuda-mps-control"
"""Files in the folder of a card."""
MAGIC = 0x64726163656B6166
MOST_DEVICES, MOST_PROCESSES, MOST_SAMPLES, MOST_LIMITS, MOST_ASKS, MOST_READERS = 8, 64, 512, 32, 64, 32
NO_LIMIT = (1 << 64) - 1

RING_HEADER, ENTRY, SLOTS = 64, struct.Struct("<QII"), 1024
"""An entry: nanoseconds of a kernel, how many kernels, whether they are one graph."""
RING_BYTES = RING_HEADER + SLOTS * ENTRY.size
WORD = struct.Struct("<Q")
HEAD, FINISHED, FAILED, LOCKED = 0, 8, 16, 24
"""Offsets: launches made, by the process; slots that are free again, whether all is lost, and whether nothing may be
launched, by the daemon."""


class ProcessState(ctypes.Structure):
    """One process that has a context."""

    _fields_ = [
        ("pid", ctypes.c_uint32),
        ("mps", ctypes.c_uint32),
        ("memory", ctypes.c_uint64),
        ("busy_ns", ctypes.c_uint64),
    ]


class LimitState(ctypes.Structure):
    """How much memory a cgroup may have of a card: the one part that libnvidia-ml.so.1 writes."""

    _fields_ = [
        ("group", ctypes.c_char * 256),
        ("soft", ctypes.c_uint64),
        ("hard", ctypes.c_uint64),
    ]


class AskState(ctypes.Structure):
    """What libcuda.so.1 asks of the daemon for another process."""

    _fields_ = [
        ("stage", ctypes.c_uint32),
        ("verb", ctypes.c_uint32),
        ("pid", ctypes.c_uint32),
        ("result", ctypes.c_uint32),
        ("timeout_ms", ctypes.c_uint32),
        ("value", ctypes.c_uint32),
    ]


class SampleState(ctypes.Structure):
    """What one process used in one sampling period."""

    _fields_ = [
        ("at_us", ctypes.c_uint64),
        ("pid", ctypes.c_uint32),
        ("percent", ctypes.c_uint32),
    ]


class DeviceState(ctypes.Structure):
    """One card."""

    _fields_ = [
        ("uuid", ctypes.c_char * 96),
        ("name", ctypes.c_char * 96),
        ("memory_total", ctypes.c_uint64),
        ("memory_used", ctypes.c_uint64),
        ("busy_ns", ctypes.c_uint64),
        ("sm_ns", ctypes.c_uint64),
        ("at_ns", ctypes.c_uint64),
        ("percent", ctypes.c_uint32),
        ("mig", ctypes.c_uint32),
        ("process_count", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
        ("sample_count", ctypes.c_uint64),
        ("power_limit_mw", ctypes.c_uint32),
        ("power_enforced_mw", ctypes.c_uint32),
        ("power_least_mw", ctypes.c_uint32),
        ("power_greatest_mw", ctypes.c_uint32),
        ("power_mw", ctypes.c_uint32),
        ("persistence", ctypes.c_uint32),
        ("energy_mj", ctypes.c_uint64),
        ("processes", ProcessState * MOST_PROCESSES),
        ("samples", SampleState * MOST_SAMPLES),
        ("limits", LimitState * MOST_LIMITS),
    ]


class State(ctypes.Structure):
    """All cards of a machine. `sequence` is odd while the daemon writes."""

    _fields_ = [
        ("magic", ctypes.c_uint64),
        ("sequence", ctypes.c_uint64),
        ("driver", ctypes.c_char * 80),
        ("device_count", ctypes.c_uint32),
        ("memory_limits", ctypes.c_uint32),
        ("readers", ctypes.c_uint32 * MOST_READERS),
        ("asks", AskState * MOST_ASKS),
        ("devices", DeviceState * MOST_DEVICES),
    ]


def attach(folder: Path) -> State:
    """The state that a daemon writes, to look at. Raises OSError where there is none."""
    with (folder / STATE).open("r+b") as file:
        return State.from_buffer(mmap.mmap(file.fileno(), ctypes.sizeof(State)))
