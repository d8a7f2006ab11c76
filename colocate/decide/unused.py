"""How much of the watts that a card may draw it needs, as it was seen to draw: the rest is others' where a budget is
short.

A card that has drawn little for a minute, with the same workloads on it, is not slowed by a limit well above that. Once
it comes near the limit in force nothing is known of its needs any more, and it has its full share again in the next
tick: for a minute at least, so that nothing swings. Near is 0.85: measured draw at a limit that binds is 0.87 to 0.97
of it (V100, P100, A40, RTX 6000; Zeus's data).
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from colocate.decide.allowance import FRESH_SECONDS
from colocate.decide.caps import whole_up
from colocate.snapshot import Card, NodeSnapshot

NEAR, MARGIN = 0.85, 1.25
"""A limit by so much above what was drawn is not near to it."""
WINDOW_SECONDS, SLOT_SECONDS = 60.0, 10.0
STEP_WATTS = 10.0


class Drew(msgspec.Struct, frozen=True, omit_defaults=True):
    """Of one card."""

    users: tuple[str, ...]
    """Who it is about."""
    since_seconds: float
    peaks: tuple[tuple[int, float], ...] = ()
    """The most watts of each slot of time, the latest last."""


def watched(known: Mapping[str, Drew], snapshot: NodeSnapshot) -> dict[str, Drew]:
    """What each card that can be limited has drawn of late."""
    now = snapshot.monotonic_seconds
    return {
        uuid: _watched(known.get(uuid), card, now)
        for uuid, card in snapshot.cards.items()
        if card.least_watts is not None and card.watts is not None and (card.users or card.allotted)
    }


def _watched(before: Drew | None, card: Card, now: float) -> Drew:
    users, drawn = tuple(sorted({*card.users, *card.allotted})), card.watts or 0.0
    fresh = not card.problem and now - card.at_seconds <= FRESH_SECONDS
    near = card.limit_watts is not None and drawn >= NEAR * card.limit_watts
    if before is None or before.users != users or near or not fresh:
        return Drew(users, now)
    slot = int(now // SLOT_SECONDS)
    if before.peaks and slot - before.peaks[-1][0] > 1:
        return Drew(users, now)  # of the gap nothing is known
    kept = [peak for peak in before.peaks if peak[0] > slot - WINDOW_SECONDS / SLOT_SECONDS]
    if kept and kept[-1][0] == slot:
        kept[-1] = (slot, max(kept[-1][1], drawn))
    else:
        kept.append((slot, drawn))
    return msgspec.structs.replace(before, peaks=tuple(kept))


def needs(known: Mapping[str, Drew], now: float) -> dict[str, float]:
    """Watts that are enough for a card, where that is known."""
    return {
        uuid: whole_up(MARGIN * max(watts for _, watts in drew.peaks), STEP_WATTS)
        for uuid, drew in known.items()
        if drew.peaks and now - drew.since_seconds >= WINDOW_SECONDS
    }
