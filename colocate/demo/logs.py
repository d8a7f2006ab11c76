"""A BestEffort pod as every node has some: it ships logs, a little all the time, and holds some memory.

Every tenth of a second it has work for a fixed CPU time. What it cannot do at once waits, for a second at most: then it
is dropped, and that is what batch took from it.
"""

from __future__ import annotations

import sys
import time

from colocate.calibrate.probe import WorkCounter, end_with_parent

PERIOD_SECONDS = 0.1
TURN_SECONDS = 0.03
BACKLOG_SECONDS = 1.0
HELD_BYTES = 48 << 20


def main(path: str) -> None:
    """For ever."""
    end_with_parent()
    counter = WorkCounter(path)
    held = bytearray(HELD_BYTES)
    held[::4096] = b"\1" * len(held[::4096])
    done, due = counter.done, time.perf_counter()
    while True:
        until = time.thread_time() + TURN_SECONDS
        while time.thread_time() < until:
            pass
        done += 1
        counter.done = done
        due = max(due + PERIOD_SECONDS, time.perf_counter() - BACKLOG_SECONDS)
        time.sleep(max(due - time.perf_counter(), 0.0))


if __name__ == "__main__":
    main(sys.argv[1])
