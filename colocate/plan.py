"""Decisions as data: an Action is one knob to one value with its reason; a Plan is one tick's worth of them.

Knobs are named as cgroup v2 names its files (`cpu.max`, `cpuset.cpus`, `cgroup.freeze` ...); the actuator translates
them for v1. Two knobs are no files: `signal` (value: a signal's name) and `kill` (every process of the cgroup).
"""

from __future__ import annotations

from typing import Literal

import msgspec

Status = Literal["applied", "unchanged", "skipped", "failed", "shadow"]


class Action(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One knob of one cgroup to one value."""

    workload: str
    path: str
    knob: str
    value: str
    reason: str
    """A stable CamelCase word: metric label, `explain` heading and docs anchor."""
    message: str
    law: str


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


class Outcome(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What became of one Action."""

    workload: str
    knob: str
    value: str
    status: Status
    found: str | None = None
    error: str = ""
    reason: str = ""
