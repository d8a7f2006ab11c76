"""What was measured of this kernel's CPU levers (calibrate/); the default is what holds without measuring."""

from __future__ import annotations

from typing import Literal

import msgspec


class Calibration(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Which lever makes the tier's class, and which limit of its CPUs costs services least."""

    lever: Literal["weight", "idle"] = "weight"
    rungs: tuple[Literal["cpuset", "quota", "freeze"], ...] = ("cpuset", "quota", "freeze")
    """The order of limits by what they cost; a grant of whole cores is a cpuset if that stands before the quota."""
    kernel: str = ""
    machine: dict[str, str] = {}
    """HZ, preemption model, CPU model: a calibration of another machine is not used."""
    measured_seconds: float = 0.0
    """Wall clock of the measurement; 0 if never."""
    evidence: dict[str, dict[str, float]] = {}
    """Per arm: p99_ms, work, and the paired ratio to weight 1 with its 95 % interval."""
