"""Decisions as data: an Action is one knob to one value with its reason; a Plan is one tick's worth of them.

Knobs are the rows of `knob.KNOBS`, named as cgroup v2 names its files; the actuator translates them for v1. What a knob
belongs to is a typed target: today a cgroup, or one device of a cgroup; then a traffic class, a GPU, a power zone.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec

Status = Literal["applied", "unchanged", "started", "skipped", "failed", "shadow"]
"""`started`: a worker does it beside the loop, and its outcome comes with a later tick."""


class CgroupTarget(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="kind", tag="cgroup"):
    """A cgroup, or what it says of one block device (`8:0`), as in `io.max`."""

    path: str
    device: str = ""


class TrafficClassTarget(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="kind", tag="class"):
    """A class of a network interface's queueing discipline (tc(8)): `1:20` on `eth0`."""

    interface: str
    classid: str


class GpuTarget(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="kind", tag="gpu"):
    """A GPU, known by its UUID, never by its index."""

    uuid: str


class PowerZoneTarget(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="kind", tag="power"):
    """A zone of /sys/class/powercap: `intel-rapl:0`."""

    zone: str


Target = CgroupTarget | TrafficClassTarget | GpuTarget | PowerZoneTarget


class Pulse(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """How batch on one card is stopped and let go between two ticks, by the hand (`actuate/hand.py`).

    gate: it runs while none of the services is busy. dial: it runs for `on_seconds` of every `period_seconds`.
    probe: it runs for moments in which no service is busy, to see for how long it goes on when it is stopped.
    """

    card: str
    mode: Literal["gate", "dial", "probe"]
    services: tuple[str, ...] = ()
    """Ids of the workloads whose sensors it goes by."""
    hold_off_seconds: float = 0.0
    """For how long they must have been idle."""
    period_seconds: float = 0.0
    on_seconds: float = 0.0
    by: Literal["freeze", "lock", "suspend"] = "freeze"
    """The cgroup freezer; NVIDIA's checkpoint lock: CUDA calls wait then, and the CPU side goes on; or AMD's suspended
    queues: what runs is stopped in its midst."""


class MemoryLimit(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What a workload may have of a card's memory, where the driver limits that by cgroup (r615 and newer)."""

    card: str
    workload: str
    soft_bytes: int = 0
    """What is kept for it."""
    hard_bytes: int | None = None
    """Beyond this its allocations fail; None: no limit."""


class PowerCap(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What a device may draw, for a workload that asks for so much."""

    target: GpuTarget | PowerZoneTarget
    watts: float | None
    """None: what was found is put back."""
    workload: str
    path: str
    """Its cgroup: once that is empty, what was found is put back."""
    unboosted: float | None = None
    """What it asked for, where it has more: the rest is lent. None: it has no more than that."""


class Action(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One knob of one target to one value."""

    workload: str
    """The id of the workload that it is about."""
    target: Target
    knob: str
    value: str
    reason: str
    """A stable CamelCase word: metric label, `explain` heading and docs anchor."""
    message: str
    law: str

    @property
    def path(self) -> str:
        """The cgroup that is meant; empty if the target is none."""
        return self.target.path if isinstance(self.target, CgroupTarget) else ""


class Request(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """A law's wish for a knob that another law owns: to `freeze`, `pulse`, `thaw`, `suspend` or `evict` a workload.

    suspend: what it has on its cards goes to the host's memory until nobody wishes so any more.
    """

    verb: Literal["freeze", "pulse", "thaw", "suspend", "evict"]
    workload: str
    law: str
    reason: str
    message: str
    pulse: Pulse | None = None
    """Of the verb `pulse`."""
    patience_seconds: float | None = None
    """Of the verb `freeze`: for how long it may last, where that is not the policy's maxFrozen."""


class Verdict(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What a law found this tick, also when it changed nothing."""

    law: str
    state: str
    reason: str
    message: str
    numbers: dict[str, float] = {}
    subject: str = ""
    """What it is about, where the law has several: the UUID of a card."""


class Rejected(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What was considered and not done, with why."""

    law: str
    considered: str
    why: str


class PowerNeeds(NamedTuple):
    """What the limits of those who ask for watts have to add up to for each slowdown of the one that is slowed most."""

    asked: float
    least: tuple[tuple[float, float], ...]


class Plan(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """The ordered, conflict-free actions of one tick, the verdicts behind them, and what was rejected."""

    sequence: int
    actions: tuple[Action, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    look_again_seconds: float | None = None
    """When a law wants to look again, if sooner than at the next tick."""
    pulses: dict[str, tuple[Pulse, ...]] = {}
    """Workloads that are stopped and let go between ticks: it runs while all of its pulses let it."""
    suspended: tuple[str, ...] = ()
    """Workloads that are to be taken off their cards, into the host's memory, as long as they are named here."""
    limits: tuple[MemoryLimit, ...] = ()
    """All that are to be in force; one that is not named any more is taken away."""
    caps: tuple[PowerCap, ...] = ()
    """Power caps that are asked for; of a device the strictest is in force. One that is not named stays as long as its
    workload's cgroup is occupied."""
    power_budget: bool = False
    """Whether they are within one: then none is raised before all that fall have been read back."""
    power_needs: PowerNeeds | None = None
    """None: nobody asks for watts."""


class Outcome(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What became of one Action."""

    workload: str
    knob: str
    value: str
    status: Status
    found: str | None = None
    error: str = ""
    reason: str = ""
