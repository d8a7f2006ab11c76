"""The model's files over a machine that is told what happens: for hours of a node in seconds.

`ModelKernel` shares CPUs out among tasks in steps of a millisecond. Here a function of the world says in coarse steps
what everybody uses and feels, given what the cgroups' files allow to batch just then; the files, their rules and their
counters are the same, so that the whole agent runs on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from colocate.cgroup.layout import UNIFIED
from colocate.kernelmodel.port import ModelKernel

STEP_SECONDS = 0.1


class Allowed(NamedTuple):
    """What a cgroup's files allow."""

    cores: float
    cpus: tuple[int, ...]


class FluidKernel(ModelKernel):
    """A kernel whose machine is `happens(now, seconds)`, called for every step."""

    def __init__(self, version: int = 2, cpus: int = 2, memory_bytes: int = 1 << 34, seed: int = 1) -> None:
        super().__init__(version=version, cpus=cpus, memory_bytes=memory_bytes, seed=seed)
        self.happens: Callable[[float, float], None] = lambda _now, _seconds: None

    def advance(self, seconds: float) -> None:
        """Let the world happen."""
        end = self.machine.now + seconds
        while self.machine.now < end - 1e-9:
            step = min(STEP_SECONDS, end - self.machine.now)
            self.happens(self.machine.now, step)
            self.machine.now += step

    def allowed(self, path: str) -> Allowed:
        """The least quota from a cgroup up to the root, and its CPUs; no cores if it is frozen."""
        cpu, cpuset = self.layout.controllers["cpu"], self.layout.controllers["cpuset"]
        group = self.group(cpuset, path)
        cpus = group.effective_cpus() if group is not None else self.machine.cpus
        cores, at = float(len(cpus)), path
        while at != "/":
            limited = self.group(cpu, at)
            if limited is not None and limited.quota_us is not None:
                cores = min(cores, limited.quota_us / limited.period_us)
            at = at.rpartition("/")[0] or "/"
        freezers = [self.group(h, path) for h in (UNIFIED, "freezer") if h in self.roots]
        if any(g is not None and g.frozen_here() for g in freezers):
            cores = 0.0
        return Allowed(cores, cpus)

    def used(self, path: str, core_seconds: float) -> None:
        """CPU time of a cgroup, charged to all above it."""
        self._charge(path, cpu=core_seconds)

    def waited(self, path: str, seconds: float) -> None:
        """Time in which somebody in a cgroup waited for a CPU, itself only: what is above it is told apart."""
        self.usage(path).cpu_pressure += seconds

    def ran(self, busy_core_seconds: float, seconds: float, idle_share: dict[int, float] | None = None) -> None:
        """How busy the CPUs were together, or by CPU how large a share of the time each was idle."""
        each = busy_core_seconds / len(self.machine.cpus)
        for cpu in self.machine.cpus:
            idle = seconds * idle_share[cpu] if idle_share is not None else max(seconds - each, 0.0)
            self.machine.idle_seconds[cpu] += idle
            self.machine.busy_seconds[cpu] += seconds - idle
