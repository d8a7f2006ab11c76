"""kubelet and systemd as they rewrite the cgroups that they own, on their published schedules.

kubelet: QoS groups every minute and at each new pod (pkg/kubelet/cm/qos_container_manager_linux.go), in random order,
stopping at the first error. systemd: told about a unit's weight, it rewrites the unit's whole CPU controller from its
own model: cpu.idle 0, cpu.weight, cpu.max (src/core/cgroup.c).
"""

from __future__ import annotations

import random
from collections.abc import Callable

from colocate.cgroup.layout import UNIFIED
from colocate.kernelmodel.port import ModelKernel

KUBELET_PERIOD_SECONDS = 60.0


class SystemdActor:
    """The owner of slices: rewrites the CPU controller of a unit that it is told about."""

    def __init__(self, kernel: ModelKernel) -> None:
        self._kernel = kernel

    def set_weight(self, path: str, weight: int) -> None:
        """SetUnitProperties(CPUWeight=...): idle, weight and quota are all rewritten."""
        kernel = self._kernel
        if kernel.layout.version == 2:
            for file, value in (("cpu.idle", "0"), ("cpu.weight", str(weight)), ("cpu.max", "max 100000")):
                kernel.write(UNIFIED, path, file, value)
        else:
            kernel.write("cpu", path, "cpu.shares", str(max(weight * 1024 // 100, 2)))
            kernel.write("cpu", path, "cpu.cfs_quota_us", "-1")


class KubeletActor:
    """The owner of the QoS groups; call it with the time, as the model's actors are."""

    def __init__(self, kernel: ModelKernel, root: str, systemd: SystemdActor | None = None, seed: int = 1) -> None:
        self._kernel, self._root, self._systemd = kernel, root, systemd
        self._random = random.Random(seed)
        self._next = kernel.monotonic() + KUBELET_PERIOD_SECONDS
        self.errors = 0

    def __call__(self, now: float) -> None:
        """Act when the period is over."""
        if now >= self._next:
            self._next = now + KUBELET_PERIOD_SECONDS
            self.update_qos_cgroups()

    def update_qos_cgroups(self) -> None:
        """Write the weights of the QoS groups; the first error ends the round, as in kubelet."""
        base = self._root.rpartition("/")[2].removesuffix(".slice")
        groups = [("besteffort", 1), ("burstable", 20)]
        self._random.shuffle(groups)
        for name, weight in groups:
            child = f"{base}-{name}.slice" if self._systemd else name
            try:
                self._writer(f"{self._root}/{child}")(weight)
            except OSError:
                self.errors += 1
                return

    def _writer(self, path: str) -> Callable[[int], None]:
        kernel = self._kernel
        if self._systemd is not None:
            systemd = self._systemd
            return lambda weight: systemd.set_weight(path, weight)
        if kernel.layout.version == 2:
            return lambda weight: kernel.write(UNIFIED, path, "cpu.weight", str(weight))
        return lambda weight: kernel.write("cpu", path, "cpu.shares", str(max(weight * 1024 // 100, 2)))
