"""Decides a recorded day again, open loop: the recorded snapshots go through the model and the laws once more.

Open loop means that what another decision would have changed in the world is not simulated. With the recorded policy
and kernel backend the plans come out byte for byte as recorded; with another policy the difference is the answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from colocate.calibration import Calibration
from colocate.decide.pipeline import LawState, decide, laws_from_builtins
from colocate.model import kernels
from colocate.model.forecast import ModelState, forecast
from colocate.model.state import from_builtins
from colocate.policy.file import policy_of_builtins
from colocate.policy.schema import ColocationPolicy
from colocate.report.record import plan_builtins, read_full
from colocate.snapshot import NodeSnapshot


def canonical(plan: dict[str, Any]) -> bytes:
    """A plan as JSON with sorted keys."""
    return msgspec.json.encode(plan, order="sorted")


class Replayed(NamedTuple):
    """One tick decided again."""

    sequence: int
    time_seconds: float
    recorded: dict[str, Any]
    decided: dict[str, Any]
    backend: str

    @property
    def same(self) -> bool:
        """Whether both plans are the same, byte for byte, with sorted keys (a merge patch keeps no order of keys)."""
        return canonical(self.recorded) == canonical(self.decided)


def replay(path: Path, other: ColocationPolicy | None = None) -> Iterator[Replayed]:
    """Every tick from the first keyframe on. Raises BadInput, StateTooNew."""
    model, laws = ModelState(), LawState()
    policy, calibration, backend = ColocationPolicy(), Calibration(), "numpy"
    kernel = kernels.load(jit=False)
    for line in read_full(path):
        frame = line.get("keyframe")
        if frame is not None:
            if frame["backend"] != backend:
                backend = frame["backend"]
                kernel = kernels.load(jit=backend == "numba")
            policy = other or policy_of_builtins(frame["policy"])
            calibration = msgspec.convert(frame["calibration"], Calibration)
            if other is None or model.snapshot_seconds is None:  # another policy keeps its own state across keyframes
                model = from_builtins(frame["model"], str(path))
                laws = laws_from_builtins(frame["laws"], str(path))
        snapshot = msgspec.convert(line["snapshot"], NodeSnapshot, strict=False)
        model, seen = forecast(snapshot, model, policy.spec, kernel)
        laws, plan = decide(snapshot, seen, policy.spec, calibration, laws, line.get("arm", ""))
        decided = msgspec.json.decode(msgspec.json.encode(plan_builtins(plan)))
        yield Replayed(snapshot.sequence, snapshot.time_seconds, line["plan"], decided, backend)
