"""Decisions as data: an Action is one knob to one value with its reason; a Plan is one tick's worth of them.

Knobs are the rows of `knob.KNOBS`, named as cgroup v2 names its files; the actuator translates them for v1. What a knob
belongs to is a typed target: today a cgroup, or one device of a cgroup; then a traffic class, a GPU, a power zone.
"""

from __future__ import annotations

from typing import Literal

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
    """A law's wish for a knob that another law owns: `freeze`, `thaw` or `evict` a workload."""

    verb: Literal["freeze", "thaw", "evict"]
    workload: str
    law: str
    reason: str
    message: str


class Verdict(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What a law found this tick, also when it changed nothing."""

    law: str
    state: str
    reason: str
    message: str
    numbers: dict[str, float] = {}


class Rejected(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What was considered and not done, with why."""

    law: str
    considered: str
    why: str


class Plan(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """The ordered, conflict-free actions of one tick, the verdicts behind them, and what was rejected."""

    sequence: int
    actions: tuple[Action, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    look_again_seconds: float | None = None
    """When a law wants to look again, if sooner than at the next tick."""


class Outcome(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What became of one Action."""

    workload: str
    knob: str
    value: str
    status: Status
    found: str | None = None
    error: str = ""
    reason: str = ""
