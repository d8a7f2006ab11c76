"""Tells those that wait for room what would let them start, and when: beside everything else, and at its leisure."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import msgspec
import structlog

from podgroup.api import Advice
from podgroup.controller.binder import now_text
from podgroup.controller.watches import now_seconds
from podgroup.explain.advice import advise
from podgroup.queue.queue import Queue
from podgroup.state.cluster import Cluster

NEAREST = 32
"""So many gangs that wait for room are advised, from the head of the queue."""
AGAIN_SECONDS = 30.0
SHARE = 0.1
"""Of a CPU: for nine times as long as it has worked it rests."""
SLICE_SECONDS = 0.005
MOST_SECONDS = 2.0
"""Of work for one gang; what is known by then is said."""
log = structlog.get_logger()


class Advisor:
    """Of one leader."""

    def __init__(self, cluster: Cluster, queue: Queue, tell: Callable[[str, Advice], None]) -> None:
        self._cluster, self._queue, self._tell = cluster, queue, tell
        self._given: dict[str, float] = {}
        """Gang -> when it was advised."""

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            key = self._next()
            if key is None:
                await asyncio.sleep(1.0)
                continue
            self._given[key] = time.monotonic()
            try:
                advice = await self._advise(key)
            except Exception as error:
                log.error("gang_not_advised", gang=key, exc_info=error)
                continue
            if advice is not None and key in self._queue.waiting:
                self._tell(key, msgspec.structs.replace(advice, given=now_text()))

    def _next(self) -> str | None:
        """Who has not been advised, or longest ago."""
        waits = [k for k in self._queue.order if self._lacks_room(k)][:NEAREST]
        self._given = {key: given for key, given in self._given.items() if key in waits}
        now = time.monotonic()
        due = [k for k in waits if now - self._given.get(k, float("-inf")) >= AGAIN_SECONDS]
        return min(due, key=lambda k: self._given.get(k, 0.0), default=None)

    def _lacks_room(self, key: str) -> bool:
        memory = self._queue.waiting.get(key)
        return memory is not None and memory.reason == "Unschedulable" and memory.question is not None

    async def _advise(self, key: str) -> Advice | None:
        known, spent, began = None, 0.0, time.monotonic()
        for advice in advise(self._cluster, self._queue, key, now_seconds()):
            known = advice
            worked = time.monotonic() - began
            if worked >= SLICE_SECONDS:
                spent += worked
                await asyncio.sleep(worked * (1 / SHARE - 1))
                began = time.monotonic()
                if spent >= MOST_SECONDS or not self._lacks_room(key):
                    break
        return known
