"""kubelet's plain BestEffort: the least weight and nothing else (pkg/kubelet/cm/qos_container_manager_linux.go)."""

from __future__ import annotations

BESTEFFORT_SHARES = 2
BESTEFFORT_WEIGHT = 1


def besteffort_knobs() -> dict[str, str]:
    """What kubelet writes to its BestEffort group, every minute and at each new pod, in the v2 vocabulary."""
    return {"cpu.weight": str(BESTEFFORT_WEIGHT)}
