"""Simulations side by side in threads, for their kernels let go of the interpreter; and none that keeps it from ending.

A pool of concurrent.futures waits at Ctrl-C until what runs has ended, which of a simulation may take hours.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from typing import TypeVar

Task = TypeVar("Task")
Found = TypeVar("Found")
LOOK_SECONDS = 0.5
"""A signal that arrives just before a wait begins is heard when that ends."""


def side_by_side(one: Callable[[Task], Found], tasks: Sequence[Task], workers: int | None = None) -> Iterator[Found]:
    """What `one` makes of each task, in their order; the first error is raised, and nothing new is begun then."""
    promised: list[Future[Found]] = [Future() for _ in tasks]
    waiting, over = iter(range(len(tasks))), threading.Event()

    def work() -> None:
        for i in waiting:
            if over.is_set():
                return
            try:
                promised[i].set_result(one(tasks[i]))
            except BaseException as error:  # noqa: BLE001 - it is raised where the result is awaited
                promised[i].set_exception(error)

    for _ in range(min(workers or os.cpu_count() or 1, len(tasks))):
        threading.Thread(target=work, daemon=True).start()
    try:
        for each in promised:
            while not each.done():
                wait([each], LOOK_SECONDS)
            yield each.result()
    finally:
        over.set()
