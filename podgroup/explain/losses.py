"""What the services of nodes have cost a gang: the members that are held back now, and those that had to go of late.

The node manager says the one in a condition of each pod, the other in Events about the PodGroup; a cluster without it
says nothing of either.
"""

from __future__ import annotations

from collections.abc import Iterable

from colocate.objects import EVICTED, HELD_BACK, Event, Lean, Pod
from podgroup.state.gangs import gang_key


class HeldBackMember(Lean, frozen=True):
    """A member that gets less than it could use."""

    pod: str
    node: str
    reason: str
    """`Frozen`, `CardShared`, `Narrowed` or `Waits`."""
    message: str = ""
    since: str | None = None


class EvictedMember(Lean, frozen=True):
    """A member that had to go for a service."""

    message: str
    """Which, from where, and why."""
    at: str | None = None


def held_back(pods: Iterable[Pod], key: str) -> list[HeldBackMember]:
    """The members of a gang that are held back, in the order of their names."""
    found = [
        HeldBackMember(
            pod=p.metadata.name, node=p.spec.node_name, reason=c.reason, message=c.message, since=c.last_transition_time
        )
        for p in pods
        if gang_key(p) == key and not p.terminal
        for c in p.status.conditions
        if c.type == HELD_BACK and c.status == "True"
    ]
    return sorted(found, key=lambda member: member.pod)


def evicted(events: Iterable[Event]) -> list[EvictedMember]:
    """The members that had to go, the last one first, by the Events about their PodGroup."""
    ours = [e for e in events if e.reason == EVICTED]
    ours.sort(key=lambda e: (e.last_timestamp or "", e.metadata.name), reverse=True)
    return [EvictedMember(message=e.message, at=e.last_timestamp) for e in ours]
