"""What is known of one node at one instant: frozen nouns, made by `observe`, read by `model` and `decide`.

Counters are cumulative as the kernel gives them; rates are the model's. Each section and each workload carries the time
at which it was read: a reading that failed is shown again with its old time, and gives no rate. `None` means that the
kernel does not offer the figure. A workload is known by its id and by the inode of its directory in each hierarchy,
never by its path alone.
"""

from __future__ import annotations

import functools
from typing import Literal

import msgspec

Tier = Literal["service", "besteffort", "batch", "tier"]


class Latency(msgspec.Struct, frozen=True, omit_defaults=True):
    """A service's own cumulative Prometheus histogram."""

    bounds_seconds: tuple[float, ...]
    """Upper bounds without +Inf, ascending; shape (b,)."""
    counts: tuple[float, ...]
    """Cumulative counts, the last one is +Inf; shape (b + 1,)."""
    at_seconds: float
    """Monotonic time of the reading."""


class Objective(msgspec.Struct, frozen=True, omit_defaults=True):
    """The part of an SLO that the laws need."""

    p99_seconds: float
    minimum_samples: int = 100
    window_seconds: float = 5.0


class Workload(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One cgroup that the laws know: a service, a BestEffort group, a batch job, or the tier itself."""

    id: str
    name: str
    tier: Tier
    path: str
    inodes: dict[str, int] = {}
    at_seconds: float = 0.0
    """Monotonic time at which its figures were read; 0: with the snapshot."""
    cpu_usage_us: int | None = None
    throttled_us: int | None = None
    """By its own CPU limit."""
    cpu_pressure_us: int | None = None
    """`some total=` of cpu.pressure."""
    memory_pressure_us: int | None = None
    memory_pressure_full_us: int | None = None
    waited_us: int | None = None
    """Time in which at least one of its threads waited for a CPU, from their run delays: PSI's unit, without PSI."""
    long_waits_us: int | None = None
    """Of waits of over a millisecond or two, of all its threads; only while it is looked at so closely."""
    memory_bytes: int | None = None
    working_set_bytes: int | None = None
    """Usage less inactive file pages, as kubelet computes it; but a service's mapped ones count."""
    mapped_bytes: int = 0
    """Of a service's working set: mapped file pages that the kernel holds for inactive, and for available."""
    memory_limit_hits: int | None = None
    """How often it met its own memory limit (memory.events high + max; v1: memory.failcnt)."""
    processes: int | None = None
    frozen: bool = False
    knobs: dict[str, str] = {}
    """Values on disk of the knobs that our laws write, in the v2 vocabulary."""
    found: dict[str, str] = {}
    """Of batch in place: the values that its owner gave, before ours. No law gives it more."""
    objective: Objective | None = None
    latency: Latency | None = None
    priority: int = 0
    gang: str = ""
    in_place: bool = False
    """Governed where it is: the directory was there before us."""
    checkpoint_signal: str = ""
    started_seconds: float = 0.0
    """Monotonic, as `checkpointed_seconds` is."""
    checkpointed_seconds: float | None = None
    checkpointed_cpu_us: int = 0
    """Its CPU time at its last checkpoint."""
    pod: str = ""
    """Of a batch pod that the API server can be asked to evict: `namespace/name`."""
    leaving: bool = False
    """Whether the end of that pod has begun."""
    weight: int | None = None
    """Of such a pod among all in the tier, by what it requests; None where nobody has said that."""
    asked_cores: float | None = None
    """Of a service's pod: the sum of its requests; None where nobody has said them."""
    asked_bytes: int | None = None
    requested_cores: float | None = None
    max_runtime_seconds: float | None = None


class NodeSnapshot(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True, dict=True):
    """Everything known of one node at one instant. `monotonic_seconds` orders, `time_seconds` dates."""

    sequence: int
    time_seconds: float
    monotonic_seconds: float
    cgroup_version: int
    cpus: tuple[int, ...]
    cores: tuple[tuple[int, ...], ...]
    """CPUs that share a physical core, ordered."""
    memory_bytes: int
    memory_available_bytes: int | None = None
    swap_free_bytes: int = 0
    node_at_seconds: float = 0.0
    """Monotonic time of the node's own figures; 0: with the snapshot."""
    cpu_busy_us: int | None = None
    """Of the node's CPUs together: all but idle and iowait."""
    cpu_idle_us: int | None = None
    cpu_idle_each_us: dict[str, int] = {}
    """Idle time of each CPU (keyed by its number as text, as in JSON), to see on which CPUs somebody waits in vain."""
    reserved_cpus: tuple[int, ...] = ()
    """CPUs that belong to one workload alone (a Guaranteed pod's exclusive ones, isolated ones): never batch's."""
    strangers_us: dict[str, int] = {}
    """CPU time of cgroups that are neither a service's, BestEffort's, batch's nor above one: who else may disturb."""
    workloads: dict[str, Workload] = {}
    tier: Workload | None = None
    stale_seconds: dict[str, float] = {}
    """Sections whose collector failed, with the age of what is shown in its place."""
    warming: bool = False
    """The agent compiles its model just now: what the node uses meanwhile is not what it will need."""
    capabilities: tuple[str, ...] = ()
    """Of `psi freeze kill memory.high memory.reclaim memory.max cpuset`: what this kernel offers."""

    def of(self, tier: Tier) -> list[Workload]:
        """The workloads of one tier, in the order of their ids."""
        return list(self._by_tier.get(tier, ()))

    @functools.cached_property
    def _by_tier(self) -> dict[Tier, list[Workload]]:
        found: dict[Tier, list[Workload]] = {}
        for _, workload in sorted(self.workloads.items()):
            found.setdefault(workload.tier, []).append(workload)
        return found
