"""One worker a target: what may block for seconds runs beside the loop, and its outcome arrives in a later tick.

fsync before a change of somebody else's cgroup, and `memory.high`, which reclaims before it returns, must not stand
between a reading and a protection. A target has one thing under way; of what waits behind it only the newest is kept,
for a desired state is computed anew each tick.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Workers(Generic[T]):
    """Runs functions in threads, at most one a key at a time."""

    def __init__(self) -> None:
        self._running: dict[Hashable, asyncio.Task[None]] = {}
        self._waiting: dict[Hashable, Callable[[], T]] = {}
        self._done: list[T] = []
        self._failed: BaseException | None = None

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return not self._running

    def busy(self, key: Hashable) -> bool:
        """Whether something is under way for a target."""
        return key in self._running

    def submit(self, key: Hashable, work: Callable[[], T]) -> None:
        """Do this next for a target, in place of what still waits."""
        self._waiting[key] = work
        if key not in self._running:
            self._running[key] = asyncio.create_task(self._run(key))

    async def _run(self, key: Hashable) -> None:
        try:
            while (work := self._waiting.pop(key, None)) is not None:
                done = await asyncio.to_thread(work)
                self._done.append(done)
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001
            self._failed = error  # it ends whoever asks for what has arrived, as if it had been done at once
        finally:
            self._running.pop(key, None)

    def arrived(self) -> list[T]:
        """What has come back since the last call. Raises what a worker could not handle."""
        if self._failed is not None:
            raise self._failed
        done, self._done = self._done, []
        return done

    async def settle(self, seconds: float) -> None:
        """Wait until nothing is under way, at most so long. Raises what a worker could not handle."""
        if self._running:
            await asyncio.wait(list(self._running.values()), timeout=seconds)
        if self._failed is not None:
            raise self._failed
