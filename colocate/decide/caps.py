"""Power caps of devices: what each may draw, by what the workloads that it was given to ask for.

A cap is of a whole card, so everybody on it must have asked: whoever asked for nothing is never slowed. Of several the
strictest counts. What a workload asks for is shared equally by its cards. Pure: a matter of one tick, or of one
container that is about to start.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from colocate.plan import GpuTarget, PowerCap, Verdict
from colocate.snapshot import Card, NodeSnapshot

LAW = "power"


class Share(NamedTuple):
    """What one workload asks for of one card."""

    workload: str
    name: str
    path: str
    watts: float


class Capped(NamedTuple):
    """What is to be in force, and why."""

    caps: tuple[PowerCap, ...]
    verdicts: tuple[Verdict, ...]


def power_caps(snapshot: NodeSnapshot) -> Capped:
    """The caps of all cards of which somebody asks for watts."""
    caps, verdicts = [], []
    for _, card in sorted(snapshot.cards.items()):
        shares, others = shares_of(card, snapshot)
        if not shares:
            continue
        found, verdict = caps_of(card, shares, others)
        verdicts.append(verdict)
        caps += found
    return Capped(tuple(caps), tuple(verdicts))


def shares_of(card: Card, snapshot: NodeSnapshot, without: str = "") -> tuple[list[Share], list[str]]:
    """What each that is on a card, or was given it, asks for of it; and the names of those that ask for nothing."""
    shares, others = [], ["a process of nobody's"] * bool(card.strangers)
    for id_ in sorted({*card.users, *card.allotted}):
        workload = snapshot.workloads.get(id_)
        if workload is None or id_ == without:
            continue
        if workload.power_watts:
            cards = sum(id_ in other.users or id_ in other.allotted for other in snapshot.cards.values())
            each = workload.power_watts / max(cards, workload.power_cards)
            shares.append(Share(id_, workload.name, workload.path, each))
        else:
            others.append(workload.name)
    return shares, others


def caps_of(card: Card, shares: list[Share], others: list[str]) -> tuple[list[PowerCap], Verdict]:
    """One for each that asks, of which the strictest counts; one without watts where it is to be lifted."""
    strictest = min(shares, key=lambda s: (s.watts, s.workload))
    wish = f"{strictest.name} asks for {_watts(strictest.watts)} of it"
    least, most = card.least_watts, card.most_watts
    if card.mig or card.virtual:
        what = "is divided by MIG" if card.mig else "is a part of a virtualized one"
        return [], _said(card, "open", "Unsupported", f"{wish}, but the card {what}: a limit would be of the whole")
    if least is None or most is None:
        return [], _said(card, "open", "Unsupported", f"{wish}, but its driver takes no power limit")
    if others:
        text = f"{wish}, but {others[0]} is on it too and asks for nothing: it is not slowed"
        return [_cap(card, strictest, None)], _said(card, "open", "Shared", text)
    caps = [_cap(card, s, min(max(s.watts, least), most)) for s in shares]
    if strictest.watts < least:
        text = f"{wish}, but it takes {_watts(least)} to {_watts(most)}: it has the least"
        return caps, _said(card, "capped", "BelowLeast", text, least)
    return caps, _said(card, "capped", "Capped", wish, min(strictest.watts, most))


def _cap(card: Card, share: Share, watts: float | None) -> PowerCap:
    return PowerCap(
        target=GpuTarget(card.uuid),
        watts=None if watts is None else max(float(int(watts)), whole_up(card.least_watts or 0.0)),
        workload=share.workload,
        path=share.path,
    )


def whole_up(watts: float, step: float = 1.0) -> float:
    """The next whole watt, which is all that some drivers keep; or the next step, of what moves all the while: else
    every limit would be another one in every tick."""
    return math.ceil(watts / step) * step


def _said(card: Card, state: str, reason: str, message: str, watts: float | None = None) -> Verdict:
    numbers = {} if watts is None else {"cap_watts": round(watts, 3)}
    return Verdict(law=LAW, state=state, reason=reason, message=message, numbers=numbers, subject=card.uuid)


def _watts(watts: float) -> str:
    return f"{watts:g} W" if watts >= 1.0 else f"{watts:.3g} W"
