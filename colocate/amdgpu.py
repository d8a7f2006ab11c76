"""AMD GPUs as their driver's files describe them: the topology, and the power of each board.

/sys/class/kfd/kfd/topology/nodes/N/{gpu_id,properties}; `drm_render_minor` leads to the board's hwmon,
/sys/class/drm/renderD<minor>/device/hwmon/hwmonN/{name,power1_average,power1_input,power1_cap,power1_cap_min,
power1_cap_max,power1_cap_default}, microwatts (kernel: Documentation/gpu/amdgpu/thermal.rst, pm/amdgpu_pm.c). The
driver keeps whole watts, and refuses what lies outside of its range. Some drop a limit that is too low without an error
(LACT#207), so what was set is read back. A partitioned board has one limit for all its parts.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import NamedTuple

KFD = Path("/sys/class/kfd/kfd")
PREFIX = "AMD-"
"""Of their UUIDs."""
FIRST_INDEX = 1000
"""So that no AMD GPU has the index of one that NVML tells of."""
DRM = Path("/sys/class/drm")
SETTLED_SECONDS = 0.05
"""After so long a limit that the firmware does not hold has been dropped."""
LEAST_OF_DEFAULT = 0.5
"""Where a driver names no least limit: half of its own, as GEOPM's sweeps begin (below it the limit may be dropped)."""


class Power(NamedTuple):
    """Of one board, in milliwatts as NVML has them; None is not told."""

    draw_mw: int | None
    limit_mw: int | None
    range_mw: tuple[int, int] | None


def folder_of(minor: int, drm: Path = DRM) -> Path | None:
    """The hwmon folder of the board with this render minor; None where it has none."""
    with contextlib.suppress(OSError):
        for folder in sorted((drm / f"renderD{minor}" / "device" / "hwmon").iterdir()):
            with contextlib.suppress(OSError):
                if (folder / "name").read_text().strip() == "amdgpu":
                    return folder.resolve()
    return None


def read_power(folder: Path | None) -> Power:
    """Everything at once; a file that is not there, or says nothing now, is None."""
    if folder is None:
        return Power(None, None, None)
    draw = _milliwatts(folder / "power1_average")
    draw = _milliwatts(folder / "power1_input") if draw is None else draw
    limit, most = _milliwatts(folder / "power1_cap"), _milliwatts(folder / "power1_cap_max")
    least, usual = _milliwatts(folder / "power1_cap_min"), _milliwatts(folder / "power1_cap_default")
    if not least and (usual or most):
        least = round(LEAST_OF_DEFAULT * (usual or most or 0) / 1000) * 1000
    if limit is None or least is None or most is None:
        return Power(draw, limit, None)
    least, most = -(-least // 1000) * 1000, most // 1000 * 1000  # whole watts are all that it keeps
    return Power(draw, limit, (least, most) if least <= most else None)


def set_limit(folder: Path, milliwatts: int) -> int:
    """Set it; what is read back a moment later. Raises OSError, where the driver refuses it, and ValueError where it
    says nothing."""
    (folder / "power1_cap").write_text(str(milliwatts * 1000))
    time.sleep(SETTLED_SECONDS)
    found = _milliwatts(folder / "power1_cap")
    if found is None:
        raise ValueError("its limit cannot be read back")
    return found


def _milliwatts(path: Path) -> int | None:
    microwatts = number_in(path)
    return None if microwatts is None else microwatts // 1000


def number_in(path: Path) -> int | None:
    """A file's only number; None where it says none."""
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text())
    return None


def properties_in(path: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    found = {}
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            name, _, value = line.partition(" ")
            if value.strip().isdecimal():
                found[name] = int(value)
    return found


class Gpu(NamedTuple):
    """A node of the topology that is no CPU."""

    node: Path
    id: int
    known: dict[str, int]
    hwmon: Path | None

    @property
    def uuid(self) -> str:
        """As the agent knows it."""
        return f"{PREFIX}{self.known.get('unique_id') or self.id:016x}"

    @property
    def board(self) -> tuple[object, ...]:
        """The same for all parts of a board, which the kernel tells apart in the upper bits of `location_id`; their own
        devices have no hwmon but for the first part's."""
        location = self.known.get("location_id", 0) & 0x0FFFFFFF
        return (self.known.get("domain", 0), location) if location else (self.hwmon,)


def gpus(root: Path = KFD, drm: Path = DRM) -> list[Gpu]:
    """In the kernel's order, which is ROCr's."""
    nodes, found = root / "topology" / "nodes", []
    numbered = [p for p in nodes.iterdir() if p.name.isdigit()] if nodes.is_dir() else []
    for node in sorted(numbered, key=lambda p: int(p.name)):
        gpu = number_in(node / "gpu_id")
        if gpu:
            known = properties_in(node / "properties")
            minor = known.get("drm_render_minor", 0)
            found.append(Gpu(node, gpu, known, folder_of(minor, drm) if minor else None))
    return found


def alone(gpu: Gpu, every: list[Gpu]) -> bool:
    """Whether it has a board, and no other a part of that."""
    mine = (gpu.board, gpu.uuid, gpu.hwmon)
    others = [other for other in every if other.node != gpu.node]
    shared = any(a == b for other in others for a, b in zip((other.board, other.uuid, other.hwmon), mine, strict=True))
    return gpu.hwmon is not None and not shared


def power_folder(uuid: str, root: Path = KFD, drm: Path = DRM) -> Path | None:
    """Where the power limit of a GPU is, if it is of this one alone: the parts of a board have one together."""
    every = gpus(root, drm)
    gpu = next((each for each in every if each.uuid == uuid), None)
    return gpu.hwmon if gpu is not None and alone(gpu, every) else None


def shown(rocr: str | None, hip: str | None) -> str | None:
    """ROCR_VISIBLE_DEVICES and HIP_VISIBLE_DEVICES, which counts among what the former shows, as UUIDs and indices of
    ours; None where neither is set. What is none of that stays as it is written: it is no GPU."""
    if rocr is None and hip is None:
        return None
    if rocr is None or hip is None:
        return ",".join(map(_ours, _words(rocr if hip is None else hip)))
    every, chosen = list(map(_ours, _words(rocr))), _words(hip)
    among = {str(i): name for i, name in enumerate(every)}
    return ",".join(among.get(each, _ours(each) if each.startswith("GPU-") else f"HIP:{each}") for each in chosen)


def _words(text: str | None) -> list[str]:
    return [each.strip() for each in (text or "").split(",") if each.strip()]


def _ours(name: str) -> str:
    if name.isdecimal():
        return str(FIRST_INDEX + int(name))
    return f"{PREFIX}{name.removeprefix('GPU-').lower()}" if name.startswith("GPU-") else name
