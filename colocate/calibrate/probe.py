"""Measuring sticks that run as processes of their own, on the standard library alone.

`service CPU SECONDS PERIOD WORK` wakes every PERIOD seconds, spins for WORK seconds of CPU time and prints, one per
line, how many seconds after its due time each turn ended. `hog FILE` counts work into a memory-mapped file, and so do
`stream FILE`, which copies memory, and `cache FILE`, which fills the page cache. `thrash FILE` reads a file at random
for ever: with less memory than the file has, it stalls.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import struct
import sys
import tempfile
import time
from collections.abc import Callable

BLOCK_BYTES = 32 << 20
CACHED_FILE_BYTES = 512 << 20


class WorkCounter:
    """The work a process has done: eight bytes of a file, mapped by the one who works and by those who read."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if os.fstat(file).st_size < 8:
                os.ftruncate(file, 8)
            self._pages = mmap.mmap(file, 8)
        finally:
            os.close(file)

    @property
    def done(self) -> int:
        """Rounds of work so far; writable."""
        return int(struct.unpack("Q", self._pages[:8])[0])

    @done.setter
    def done(self, rounds: int) -> None:
        self._pages[:8] = struct.pack("Q", rounds)


def service(cpu: int, seconds: float, period: float, work: float) -> None:
    """Print the latency of each turn, from when it was due."""
    if cpu >= 0:
        os.sched_setaffinity(0, {cpu})
    print("ready", flush=True)
    sys.stdin.readline()
    due = time.perf_counter() + period
    end = due + seconds
    latencies = []
    while due < end:
        time.sleep(max(due - time.perf_counter(), 0.0))
        until = time.thread_time() + work
        while time.thread_time() < until:
            pass
        latencies.append(time.perf_counter() - due)
        due += period
    print(" ".join(f"{v:.6f}" for v in latencies))


def end_with_parent() -> None:
    """Ask for SIGKILL when the parent ends (prctl(2), PR_SET_PDEATHSIG): a measurement that is killed leaves no hog."""
    ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)


def hog(path: str) -> None:
    """Count rounds of the same arithmetic into the file's first eight bytes, for ever."""

    def work() -> None:
        total = 0
        for i in range(2000):
            total += i * i

    count(path, work)


def stream(path: str) -> None:
    """Copy memory, for ever."""
    source, target = bytearray(os.urandom(1 << 20) * (BLOCK_BYTES >> 20)), bytearray(BLOCK_BYTES)

    def work() -> None:
        target[:] = source

    count(path, work)


def cache(path: str) -> None:
    """Write a file of CACHED_FILE_BYTES again and again."""
    block = os.urandom(1 << 20) * (BLOCK_BYTES >> 23)
    with tempfile.TemporaryFile(dir=os.path.dirname(path)) as out:

        def work() -> None:
            out.write(block)
            if out.tell() > CACHED_FILE_BYTES:
                out.seek(0)

        count(path, work)


def count(path: str, work: Callable[[], None]) -> None:
    """Do the work for ever, counting its rounds into the file's first eight bytes."""
    end_with_parent()
    counter = WorkCounter(path)
    done = 0
    while True:
        work()
        done += 1
        counter.done = done


def thrash(path: str, size: int = 96 << 20) -> None:
    """Make the file if it is not there, read it through, say `ready`, and read it at random for ever."""
    if not os.path.exists(path):
        block = mmap.mmap(-1, 1 << 20)  # aligned, as O_DIRECT wants it: none of the file may be cached beforehand
        out = os.open(f"{path}.part", os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
        for _ in range(size >> 20):
            block[:] = os.urandom(1 << 20)
            os.write(out, block)
        os.close(out)
        os.rename(f"{path}.part", path)  # who sees it finds it whole
    with open(path, "rb") as file:
        while file.read(1 << 20):  # memory is full soon, also on a slow disk, where single pages would take a minute
            pass
        pages = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)
    pages.madvise(mmap.MADV_RANDOM)
    print("ready", flush=True)
    while True:
        pages[random.randrange(size)]


if __name__ == "__main__":
    if sys.argv[1] == "service":
        service(int(sys.argv[2]), *(float(a) for a in sys.argv[3:6]))
    elif sys.argv[1] == "thrash":
        thrash(sys.argv[2])
    else:
        {"hog": hog, "stream": stream, "cache": cache}[sys.argv[1]](sys.argv[2])
