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
    gang_held: str = ""
    """Which member of it is frozen on another node, and why; empty: none that is known of."""
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
    lends_gpu: bool = False
    """Of a service: batch pods may be given its cards."""
    gpu_memory_bytes: int | None = None
    """Of batch: what it says that it will use of a card."""
    power_watts: float | None = None
    """What it asks for that its devices draw at most, all together."""
    power_cards: int = 0
    """How many GPUs it asks for, where that is known: it may not be on all of them yet."""
    power_class: str = ""
    """Of jobs that feel a cap alike: by what curve that is, the policy says."""
    max_slowdown: float | None = None
    """By how much longer its work may take for a cap, at most; None: that was not said."""
    due_seconds: float | None = None
    """By when its work is to be done, monotonic; None: it has no deadline."""
    work_seconds: float | None = None
    """How long that takes with all the watts that it asks for."""
    done_ratio: float | None = None
    """How much of its work it said last that it has done."""
    done_at_seconds: float = 0.0
    """When that was, monotonic."""
    requested_cores: float | None = None
    max_runtime_seconds: float | None = None


class CardUser(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One workload's processes on a card."""

    processes: int = 1
    memory_bytes: int | None = None
    percent: int | None = None
    """Share of the last sampling period in which kernels of its ran (NVML's process utilization); None: not told."""
    drains: tuple[tuple[float, float], ...] = ()
    """Of batch: (when, for how long its kernels ran on after it was stopped). Monotonic seconds, seconds."""
    sensor: str = ""
    """Of a service: by what it is seen within milliseconds whether it is busy; empty: by nothing."""
    sensor_problem: str = ""
    """Why not by more."""
    sensing: bool = False
    """Whether that is still being found out."""
    busy_ratio: float | None = None
    """Of a service: the share of time in which that sensor saw it busy."""


class Card(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One GPU and who is on it, by NVML's list of processes and their cgroups."""

    uuid: str
    index: int = 0
    name: str = ""
    at_seconds: float = 0.0
    """Monotonic time of the reading."""
    memory_bytes: int | None = None
    memory_used_bytes: int | None = None
    percent: int | None = None
    mig: bool = False
    virtual: bool = False
    """A vGPU's guest sees a part of a card: what others do on it is not known."""
    mps: bool = False
    counted: bool = True
    """Whether it has counters (GPM) by which a drain is seen."""
    users: dict[str, CardUser] = {}
    """By the id of the workload."""
    strangers: int = 0
    """Processes on it that are no workload's."""
    reaction_seconds: float | None = None
    """From a sensor to batch stopped, the 95th percentile as it was measured; None: not yet."""
    watts: float | None = None
    """What it draws, and the limit of that which is in force; a neighbour that reaches it costs clock."""
    limit_watts: float | None = None
    set_watts: float | None = None
    """The limit that was set; another one, of the board or its chassis, may be the one in force."""
    least_watts: float | None = None
    most_watts: float | None = None
    """What can be set; None where the driver takes no limit."""
    allotted: tuple[str, ...] = ()
    """Ids of the workloads that were given it, whether they are on it yet or not."""
    pcie_bytes_per_second: tuple[float, float] | None = None
    """To it and from it, since the reading before; None: not told."""
    file: str = ""
    """Its device file, where containers are told it by that alone (AMD): `/dev/dri/renderD128`."""
    preempts: bool = False
    """Whether a process's queues can be taken off it in the middle of their kernels (AMD)."""
    driver: str = ""
    """Its version, `580.159.04`."""
    struck: str = ""
    """Why the driver is not asked to hold processes any more; empty: it may be."""
    limits: bool = False
    """Whether the driver limits what a cgroup may have of its memory (r615 and newer)."""
    suspended: dict[str, str] = {}
    """Batch that was on it and is taken off it, or on its way: `going`, `suspended`, or why that failed."""
    problem: str = ""
    """Why there is no fresh reading."""


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
    cards: dict[str, Card] = {}
    """By UUID; empty on a node without GPUs."""
    cpu_watts: float | None = None
    """What the CPUs draw, packages and their DRAM, since the reading before; None: not read, or not known."""
    power_share: int = 0
    """Watts that a PowerBudget of several nodes leaves to who asks for watts here; 0: none says anything."""
    power_signal: float | None = None
    """How dear or how dirty power is, in the unit of the policy's steps; None: not known."""
    power_ahead: tuple[tuple[float, float], ...] = ()
    """What is foretold of that, beginning with now's: (from when, seconds since the epoch; the signal); only where jobs
    follow it."""
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
    def beside_batch_on_cards(self) -> frozenset[str]:
        """Ids of the workloads that share a card with batch: what they feel may be the card's."""
        found: set[str] = set()
        for card in self.cards.values():
            tiers = {i: self.workloads[i].tier for i in card.users if i in self.workloads}
            if "batch" in tiers.values():
                found |= {i for i, tier in tiers.items() if tier != "batch"}
        return frozenset(found)

    @functools.cached_property
    def _by_tier(self) -> dict[Tier, list[Workload]]:
        found: dict[Tier, list[Workload]] = {}
        for _, workload in sorted(self.workloads.items()):
            found.setdefault(workload.tier, []).append(workload)
        return found
