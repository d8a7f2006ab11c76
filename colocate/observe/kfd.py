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

from colocate.amdgpu import DRM, FIRST_INDEX, KFD, alone, gpus, number_in, properties_in, read_power
from colocate.cgroup.port import FilePort
from colocate.cgroup.tree import start_time


def read_cards(port: FilePort, root: Path = KFD, drm: Path = DRM) -> list[dict[str, Any]]:
    """Each GPU as the NVML worker describes one; none where there is no AMD driver."""
    cards: list[dict[str, Any]] = []
    processes = [p for p in (root / "proc").iterdir() if p.name.isdigit()] if (root / "proc").is_dir() else []
    every = gpus(root, drm)
    for of in every:
        node, gpu, known = of.node, of.id, of.known
        power = read_power(of.hwmon if alone(of, every) else None)
        units = known.get("simd_count", 0) // max(known.get("simd_per_cu", 1), 1)
        total = properties_in(node / "mem_banks" / "0" / "properties").get("size_in_bytes")
        rows, used, occupied = [], 0, 0
        for process in processes:
            memory, busy = number_in(process / f"vram_{gpu}"), number_in(process / f"stats_{gpu}" / "cu_occupancy")
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
                "uuid": of.uuid,
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
                "file": f"/dev/dri/renderD{known['drm_render_minor']}" if known.get("drm_render_minor") else "",
                "power_mw": power.draw_mw,
                "limit_mw": power.limit_mw,
                "set_mw": power.limit_mw,
                "limits_mw": list(power.range_mw) if power.range_mw is not None else None,
                "at": time.monotonic(),
            }
        )
    return cards
