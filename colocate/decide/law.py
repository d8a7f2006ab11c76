"""What a law is: one view in, one decision out. The pipeline is a tuple of them; each is unaware of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from colocate.calibration import Calibration
from colocate.model.forecast import Forecast
from colocate.plan import Action, CgroupTarget, MemoryLimit, Pulse, Rejected, Request, Verdict
from colocate.policy.schema import PolicySpec
from colocate.snapshot import NodeSnapshot, Workload


class View(NamedTuple):
    """What every law sees in one tick."""

    snapshot: NodeSnapshot
    forecast: Forecast
    spec: PolicySpec
    calibration: Calibration
    requests: tuple[Request, ...] = ()
    """What the laws before it ask for, and what was left over from the tick before."""
    evicting: frozenset[str] = frozenset()
    """Ids of the workloads that have been told to go and have not gone."""
    batch_ceiling: float | None = None
    """Cores that batch may use at most, whatever services feel: the CPUs' power budget. None: no such limit."""

    @property
    def now(self) -> float:
        """Monotonic seconds."""
        return self.snapshot.monotonic_seconds

    def stale(self, *sections: str) -> float:
        """The age of the oldest of these sections beyond its own tick, in seconds; 0 if all are fresh."""
        return max((self.snapshot.stale_seconds.get(s, 0.0) for s in sections), default=0.0)


class Decision(NamedTuple):
    """What a law wants this tick."""

    state: Any
    actions: list[Action]
    verdict: Verdict
    rejected: Sequence[Rejected] = ()
    requests: Sequence[Request] = ()
    look_again_seconds: float | None = None
    """When it wants to look again, if sooner than at the next tick."""
    also: Sequence[Verdict] = ()
    """Verdicts of a law that has several subjects."""
    pulses: Mapping[str, tuple[Pulse, ...]] = {}
    """Of the freeze law: what it grants."""
    suspended: Sequence[str] = ()
    """The same, of batch that is taken off its cards."""
    limits: Sequence[MemoryLimit] = ()


class Law(Protocol):
    """A law: pure, its memory handed in and out."""

    def __call__(self, view: View, state: Any) -> Decision:
        """Decide one tick."""


def act(law: str, workload: Workload, knob: str, value: str, reason: str, message: str) -> Action:
    """An action on the workload's own cgroup."""
    target = CgroupTarget(workload.path)
    return Action(workload=workload.id, target=target, knob=knob, value=value, reason=reason, message=message, law=law)
