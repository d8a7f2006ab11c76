"""Events about pods: where each was bound, and for whom it had to go, as `kubectl describe pod` shows them.

Binds go first: as long as some are wanted or under way, what has been done is told later, though not much later.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from colocate.objects import Pod
from podgroup.controller.binder import Binder

AT_ONCE = 8
MOST = 20_000
"""More of them do not wait: the oldest is not told, as with every Event that is lost."""
LATEST_SECONDS = 5.0
LOOK_SECONDS = 0.05


class Announcements:
    """What is still to be told."""

    def __init__(self, under_way: Callable[[], bool]) -> None:
        self._under_way = under_way
        self._untold: deque[tuple[float, Pod, str, str]] = deque(maxlen=MOST)
        self._some = asyncio.Event()

    def add(self, pod: Pod, reason: str, message: str) -> None:
        """Tell this of a pod, in time."""
        self._untold.append((time.monotonic(), pod, reason, message))
        self._some.set()

    async def run(self, binder: Binder) -> None:
        """Until cancelled; `AT_ONCE` of these run. Raises LeadershipLost."""
        while True:
            await self._some.wait()
            if not self._untold:
                self._some.clear()
            elif self._under_way() and time.monotonic() - self._untold[0][0] < LATEST_SECONDS:
                await asyncio.sleep(LOOK_SECONDS)
            else:
                _, pod, reason, message = self._untold.popleft()
                await binder.event(pod, reason, message, warning=False)
