"""Whose energy the GPUs' meters counted since the agent began, as Kepler reckons it: counters that only rise.

What a card draws while nobody is on it, the least that was seen, is idle; the rest goes to who is on it by whose
kernels ran (NVML's process utilization), to one that is alone all of it, to all alike where that is not told. Of a card
that is divided by MIG nothing tells that: it is the others'. The parts sum up to the meter's, in whole microjoules.
Source: Kepler, docs/developer/power-attribution-guide.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from colocate.observe.containers import Consumer
from colocate.observe.energy import Account, Drawn, ended_of, forget, more, tidy

GPU = "gpu"
"""The kind of meter, in an account."""
MOST_STEP_SECONDS = 10.0
"""Between two readings of a card; of a longer time nothing is known."""


class Ran(NamedTuple):
    """A process on a card."""

    who: Consumer | None
    """None: it is nobody's."""
    percent: int | None
    """Share of the time in which its kernels ran; None: not told."""


class CardReading(NamedTuple):
    """One card at one instant."""

    uuid: str
    at_seconds: float
    watts: float | None
    divided: bool
    ran: Sequence[Ran]


class CardEnergy:
    """Keeps the account; `node`, `idle`, `active` and `others` are by card, who drew it of all cards together, and so
    are those of the others whose containers are no longer told of."""

    def __init__(self) -> None:
        self.most_step_seconds = MOST_STEP_SECONDS
        """Between two readings of a card: cards are read once a tick, which may be longer."""
        self.account = Account()
        """Replaced as a whole, so that another thread may look at it."""
        self._before: dict[str, CardReading] = {}
        self._idle: dict[str, float] = {}

    def add(self, now: float, cards: Iterable[CardReading]) -> None:
        """Count what was drawn since the reading before of each."""
        last, fresh, there = self.account, list[CardReading](), set[str]()
        for card in cards:
            there.add(card.uuid)
            if not card.ran and card.watts is not None:
                self._idle[card.uuid] = min(card.watts, self._idle.get(card.uuid, card.watts))
            before = self._before.get(card.uuid)
            if before is None or card.at_seconds != before.at_seconds:
                fresh.append(card)
        lost = self._before.keys() - there
        if not fresh and not lost:
            return
        of = [dict(each) for each in (last.node, last.idle, last.active, last.others)]
        by = {key: dict(kinds) for key, kinds in last.by.items()}
        who, drawn = dict(last.who), dict[str, tuple[int, float]]()
        for card in fresh:
            total, idle, parts, seconds = self._parts(card)
            self._before[card.uuid] = card
            if not seconds:
                for each in of:
                    each[card.uuid] = each.get(card.uuid, Drawn()).still()
                continue
            given = 0
            for consumer, micro in parts:
                who[consumer.key] = consumer
                known, watts = drawn.get(consumer.key, (0, 0.0))
                drawn[consumer.key] = known + micro, watts + micro / 1e6 / seconds
                given += micro
            for each, micro in zip(of, (total, idle, total - idle, total - idle - given), strict=True):
                each[card.uuid] = more(each.get(card.uuid), micro, seconds)
        for uuid in lost:
            del self._before[uuid]
            for each in of:
                each[uuid] = each[uuid].still()
        here = {ran.who.key: ran.who for card in self._before.values() for ran in card.ran if ran.who is not None}
        who |= here
        for key in who:
            before_ = by.get(key, {}).get(GPU, Drawn())
            micro, watts = drawn.get(key, (0, before_.watts if key in here else 0.0))
            by.setdefault(key, {})[GPU] = Drawn(before_.microjoules + micro, watts)
        ended = ended_of(last.ended, who, dict.fromkeys(here, 0.0), now)
        gone = dict(last.gone)
        for key in [key for key in who if key not in here and key not in ended]:
            forget(who.pop(key), by.pop(key), gone, of[3])
        tidy(gone, who, of[3])
        self.account = Account(0.0, of[0], of[1], of[2], of[3], gone, by, who, ended)

    def _parts(self, card: CardReading) -> tuple[int, int, list[tuple[Consumer, int]], float]:
        """Microjoules of a card since its reading before, of that idle, and of each that was on it; and the seconds,
        0 where that is not known."""
        before = self._before.get(card.uuid)
        if before is None or before.watts is None or card.watts is None:
            return 0, 0, [], 0.0
        seconds = card.at_seconds - before.at_seconds
        if not 0.0 < seconds <= self.most_step_seconds:
            return 0, 0, [], 0.0
        watts = (before.watts + card.watts) / 2.0
        total = round(1e6 * watts * seconds)
        if not card.ran:
            return total, total, [], seconds
        idle = min(int(1e6 * self._idle.get(card.uuid, 0.0) * seconds), total)
        if card.divided:
            return total, idle, [], seconds
        return total, idle, _shared(card.ran, total - idle), seconds


def _shared(ran: Sequence[Ran], micro: int) -> list[tuple[Consumer, int]]:
    """What each has of so much: by the time that its kernels ran, or alike."""
    told = [0 if each.percent is None else each.percent for each in ran]
    if sum(told) == 0 or any(each.percent is None for each in ran):
        told = [1] * len(ran)
    return [(each.who, micro * part // sum(told)) for each, part in zip(ran, told, strict=True) if each.who is not None]
