"""AMD GPUs and who is on them, from sysfs: files of the amdgpu driver that are read in no time, by whoever may.

/sys/class/kfd/kfd/topology/nodes/N/{gpu_id,name,properties,mem_banks/0/properties} and /sys/class/kfd/kfd/proc/PID/
{vram_GPU, stats_GPU/cu_occupancy} (kernel patches f2fa07b3 and 4327bed2). Occupancy is of this very moment: compute
units with waves of the process in flight.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

from colocate.cgroup.port import FilePort
from colocate.cgroup.tree import start_time

ROOT = Path("/sys/class/kfd/kfd")
FIRST_INDEX = 1000
"""So that no AMD GPU has the index of one that NVML tells of."""


def _number(path: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text())
    return None


def _properties(path: Path) -> dict[str, int]:
    found = {}
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            name, _, value = line.partition(" ")
            if value.strip().isdecimal():
                found[name] = int(value)
    return found


def read_cards(port: FilePort, root: Path = ROOT) -> list[dict[str, Any]]:
    """Each GPU as the NVML worker describes one; none where there is no AMD driver."""
    cards: list[dict[str, Any]] = []
    nodes = root / "topology" / "nodes"
    processes = [p for p in (root / "proc").iterdir() if p.name.isdigit()] if (root / "proc").is_dir() else []
    for node in sorted(nodes.iterdir(), key=lambda p: p.name) if nodes.is_dir() else ():
        gpu = _number(node / "gpu_id")
        if not gpu:
            continue  # a CPU
        known = _properties(node / "properties")
        units = known.get("simd_count", 0) // max(known.get("simd_per_cu", 1), 1)
        total = _properties(node / "mem_banks" / "0" / "properties").get("size_in_bytes")
        rows, used, occupied = [], 0, 0
        for process in processes:
            memory, busy = _number(process / f"vram_{gpu}"), _number(process / f"stats_{gpu}" / "cu_occupancy")
            if memory is None and busy is None:
                continue
            if not memory and not busy:
                continue  # each process has files for all GPUs
            percent = min(100 * busy // units, 100) if busy is not None and units else None
            pid = int(process.name)
            rows.append([pid, start_time(port, pid), memory, percent])
            used += memory or 0
            occupied += busy or 0
        name = ""
        with contextlib.suppress(OSError):
            name = (node / "name").read_text().strip()
        cards.append(
            {
                "index": FIRST_INDEX + len(cards),
                "uuid": f"AMD-{known.get('unique_id', gpu):016x}",
                "name": f"AMD {name}".strip(),
                "memory": [total, used] if total else None,
                "percent": min(100 * occupied // units, 100) if units else None,
                "mig": False,
                "virtual": False,
                "mps": False,
                "counted": False,
                "limits": False,
                "processes": rows,
                "error": "",
                "preempts": True,
                "at": time.monotonic(),
            }
        )
    return cards
