"""What a queue remembers between cycles, so that one can be decided again elsewhere as it was decided here."""

from __future__ import annotations

import msgspec

from colocate.objects import Lean


class RememberedGang(Lean, frozen=True):
    """What of a gang's `Waiting` outlives a cycle, by the same names; times are seconds since the epoch."""

    since: float
    members_at: float = 0.0
    created: int = 0
    reserved_at: float | None = None
    claimed: int = 0
    capacity: bool = False


class KeptRoom(Lean, frozen=True):
    """Room that is kept for a gang: the place of a lost member, or what victims are leaving."""

    gang: str
    uid: str
    until: float
    kind: str
    node: str
    requests: dict[str, int]
    priority: int = 0
    failed: bool = False


class QueueMemory(Lean, frozen=True):
    """Everything that the next cycle goes by beside the objects of the cluster."""

    now: float
    searches: int | None = None
    """For so many gangs a cycle looks for victims; None: for all."""
    gangs: dict[str, RememberedGang] = msgspec.field(default_factory=dict)
    backing_off: dict[str, tuple[float, int]] = msgspec.field(default_factory=dict, name="resting")
    """Gang -> until when it is left alone, and how often that has been so."""
    kept: list[KeptRoom] = msgspec.field(default_factory=list)
    promised: dict[str, str] = msgspec.field(default_factory=dict)
    """uid -> node of pods that are to be bound, though no plan says so yet."""
    volumes: dict[str, dict[str, str]] = msgspec.field(default_factory=dict)
    """uid of these -> claim -> the volume that it is to have, "" for one that is made."""
    going: list[str] = msgspec.field(default_factory=list)
    """uids of victims that have not gone yet."""
    left_over: list[str] = msgspec.field(default_factory=list)
    """Gangs for which the next cycle looks for victims first."""
