"""Simple gangs, many of which are asked about in one question."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice

from podgroup.queue.entry import Entry

FEW, MOST_IN_TURN = 8, 256
"""How many simple gangs are asked about in one question: fewer are not worth it, more would take too long."""


class InTurn:
    """The entries of one priority, in their order; so many at a time are asked about in one question."""

    def __init__(self, entries: list[Entry]) -> None:
        self.left = deque(entries)
        self._most, self.alone = FEW, 0
        """`alone`: so many are to be tried one by one first."""

    def ahead(self) -> Iterator[Entry]:
        """Those to be asked about next."""
        return islice(self.left, self._most)

    def none_of(self, count: int) -> None:
        """So many, or the one behind them if there are none, are to be tried one by one."""
        self.alone, self._most = max(count, 1), FEW

    def started(self) -> Entry:
        """The first has started."""
        self._most = min(2 * self._most, MOST_IN_TURN)
        return self.left.popleft()

    def next(self) -> Entry | None:
        """The one that is to be tried by itself, if any."""
        if not self.alone:
            return None
        self.alone -= 1
        return self.left.popleft() if self.left else None
