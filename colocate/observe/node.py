"""The node's own figures: CPUs, cores, memory, and how busy it is.

The node is the machine, or the cgroup that the policy names (`nodeRoot`), whose cpuset and memory limit then count.
Sources: /proc/stat (proc(5)), /proc/meminfo, /sys/devices/system/cpu/cpu*/topology/thread_siblings_list.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from colocate.cgroup.layout import UNIFIED
from colocate.cgroup.port import FilePort
from colocate.observe.cgroup import parse_flat_keyed
from colocate.units import parse_cpulist

TICK_US = 10_000
"""/proc/stat counts in USER_HZ, which is 100 on every architecture we run on."""
AMD_FILE = "/dev/kfd"
DRIVER_FILES = ("/proc/driver/nvidia/version", "/dev/nvidiactl")
"""Of NVIDIA's driver: without them there is no card here."""


def has_nvidia() -> bool:
    """Whether NVIDIA's driver is there."""
    return any(map(os.path.exists, DRIVER_FILES))


def has_amd() -> bool:
    """Whether AMD's compute driver is."""
    return os.path.exists(AMD_FILE)


class Capacity(NamedTuple):
    """What the node has."""

    cpus: tuple[int, ...]
    cores: tuple[tuple[int, ...], ...]
    memory_bytes: int


class NodeFigures(NamedTuple):
    """What the node does."""

    cpu_busy_us: int | None
    cpu_idle_us: int | None
    memory_available_bytes: int | None
    swap_free_bytes: int
    cpu_idle_each_us: dict[str, int]


def _meminfo(port: FilePort) -> dict[str, int]:
    figures = {}
    for line in (port.proc("/proc/meminfo") or "").splitlines():
        key, _, rest = line.partition(":")
        figures[key] = int(rest.split()[0]) * 1024
    return figures


def _cpuset(port: FilePort, root: str) -> tuple[int, ...]:
    hierarchy = port.layout.hierarchy("cpuset")
    if hierarchy is not None:
        for file in ("cpuset.cpus.effective", "cpuset.effective_cpus"):
            text = port.read(hierarchy, root, file)
            if text and text.strip():
                return parse_cpulist(text)
    return parse_cpulist(port.proc("/sys/devices/system/cpu/online") or "0")


def _memory_limit(port: FilePort, root: str) -> int | None:
    hierarchy = port.layout.hierarchy("memory")
    if hierarchy is None or root == "/":
        return None
    text = port.read(hierarchy, root, "memory.max" if hierarchy == UNIFIED else "memory.limit_in_bytes")
    return int(text) if text and text.strip().isdigit() else None


def capacity(port: FilePort, root: str) -> Capacity:
    """The node's CPUs, its physical cores and its memory."""
    cpus = _cpuset(port, root)
    cores: dict[tuple[int, ...], None] = {}
    for cpu in cpus:
        text = port.proc(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores[tuple(c for c in parse_cpulist(text or str(cpu)) if c in cpus) or (cpu,)] = None
    total = _meminfo(port).get("MemTotal", 0)
    return Capacity(cpus, tuple(cores), min(total, _memory_limit(port, root) or total) or total)


def figures(port: FilePort, root: str, cpus: tuple[int, ...], memory_bytes: int) -> NodeFigures:
    """Busy and idle time of the node's CPUs and the memory that is left."""
    busy = 0
    idle: dict[str, int] = {}
    wanted = {f"cpu{c}": str(c) for c in cpus}
    text = port.proc("/proc/stat")
    for line in (text or "").splitlines():
        name, *fields = line.split()
        if name in wanted:
            ticks = [int(f) for f in fields[:8]]
            idle[wanted[name]] = (ticks[3] + ticks[4]) * TICK_US
            busy += (sum(ticks[:3]) + ticks[5] + ticks[6] + ticks[7]) * TICK_US
        elif not name.startswith("cpu"):
            break
    memory = _meminfo(port)
    available = memory.get("MemAvailable")
    hierarchy = port.layout.hierarchy("memory")
    if hierarchy is not None and _memory_limit(port, root) is not None:
        v2 = hierarchy == UNIFIED
        usage = port.read(hierarchy, root, "memory.current" if v2 else "memory.usage_in_bytes")
        stat = port.read(hierarchy, root, "memory.stat")
        (inactive,) = parse_flat_keyed(stat, "inactive_file" if v2 else "total_inactive_file")
        left = memory_bytes - int(usage or 0) + (inactive or 0)
        available = left if available is None else min(left, available)
    have = bool(idle)
    total = sum(idle.values()) if have else None
    return NodeFigures(busy if have else None, total, available, memory.get("SwapFree", 0), idle)
