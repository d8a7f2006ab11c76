"""What is remembered of a gang that waits, and what a cycle of the queue decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from podgroup.solve.preempt import Preemption
from podgroup.solve.question import Gang, Placed
from podgroup.solve.shortage import Shortage
from podgroup.state.ledger import Ledger


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """What is remembered of a gang that waits. Times are seconds of the caller's monotonic clock."""

    since: float
    reason: str = ""
    message: str = ""
    capacity: bool = False
    """Whether more capacity would help: an autoscaler is told so."""
    gain: int = -1
    """The cluster's gains when it was last tried; -1 if it was not."""
    tried: float = 0.0
    question: Gang | None = None
    """What the solver could not place."""
    kind: tuple[object, ...] = ()
    """Its signature: what helps one of a kind helps the others."""
    reserved_at: float | None = None
    """Since when its claim has not grown."""
    claimed: int = 0
    """The places of how many members its claim had at most."""
    members_at: float = 0.0
    """When a member was last added."""
    created: int = 0


class Start(NamedTuple):
    """Bind these."""

    key: str
    placed: list[Placed]
    waited_seconds: float
    note: str = ""


class Elastic(NamedTuple):
    """A start of this cycle of a gang with more members than its quorum."""

    start: Start
    gang: Gang

    @property
    def surplus(self) -> list[Placed]:
        """What it was given beyond its quorum."""
        needed = {m.uid for m in self.gang.members[: self.gang.quorum]}
        return [one for one in self.start.placed if one.member.uid not in needed]


class Evict(NamedTuple):
    """Delete these, to make room for a more important gang."""

    key: str
    preemption: Preemption


class Decisions(NamedTuple):
    """Of one cycle."""

    starts: list[Start]
    evictions: list[Evict]
    failures: list[tuple[str, Exception]]
    """Gangs that could not be decided: a defect of ours, which must not stop the others."""


PlaceInTurn = Callable[[Ledger, Sequence[Gang], bool], "list[list[Placed] | None]"]
"""See solve.sequence.place_in_turn."""

Hopeless = dict[tuple[object, ...], tuple[int, Shortage]]
"""Within one cycle room only shrinks: signature -> a quorum that did not fit, and why."""
