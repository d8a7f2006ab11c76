"""What a process does with a fake card: launch, wait, allocate; and how a program of the virtual card runs for real.

python -P -m colocate.fakecard.client FOLDER trainer
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import socket
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from colocate.fakecard.card import MILLISECOND, SECOND
from colocate.fakecard.process import Cpu, Free, Launch, Malloc, Program, Sleep, Sync
from colocate.fakecard.shared import ENTRY, FAILED, FINISHED, HEAD, LOCKED, RING_BYTES, RING_HEADER, SLOTS, SOCKET, WORD
from colocate.fakecard.workloads import asynchronous, blocking, graphs, grower, trainer


class CardLost(Exception):  # noqa: N818 - it is no error of the process
    """The card has failed, or its daemon has ended."""


class Device:
    """One process's context on a card."""

    def __init__(self, folder: str | Path, index: int = 0, *, kind: str = "", share: float = 1.0) -> None:
        """Raises OSError where no daemon serves the folder."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.connect(str(Path(folder) / SOCKET))
        memory = os.memfd_create("fakecard")
        os.ftruncate(memory, RING_BYTES)
        self._ring = mmap.mmap(memory, RING_BYTES)
        said = json.dumps({"open": index, "kind": kind, "share": share}).encode()
        socket.send_fds(self._socket, [said], [memory])
        os.close(memory)
        answer = self._answer()
        self._depth, self._launch_ns = int(answer["depth"]), int(answer["launch_ns"])
        self._head = 0

    def _answer(self) -> dict[str, Any]:
        heard = self._socket.recv(4096)
        if not heard:
            raise CardLost("the card is gone")
        answer: dict[str, Any] = json.loads(heard)
        return answer

    def _ask(self, **question: float) -> dict[str, Any]:
        try:
            self._socket.send(json.dumps(question).encode())
        except OSError as error:
            raise CardLost("the card is gone") from error
        return self._answer()

    def _push(self, kernel_ns: float, kernels: int, graph: bool) -> None:
        due = time.monotonic_ns() + self._launch_ns
        if WORD.unpack_from(self._ring, FAILED)[0]:
            raise CardLost("the card has failed")
        if WORD.unpack_from(self._ring, LOCKED)[0]:
            self._ask(unlocked=True)  # answered once it is
        if self._head - WORD.unpack_from(self._ring, FINISHED)[0] >= self._depth:
            self._ask(wait=self._head - self._depth + self._depth // 16)
        ENTRY.pack_into(
            self._ring, RING_HEADER + self._head % SLOTS * ENTRY.size, round(kernel_ns), kernels, int(graph)
        )
        self._head += 1
        WORD.pack_into(self._ring, HEAD, self._head)
        while time.monotonic_ns() < due:  # what a launch costs
            pass

    def launch(self, kernels: int, kernel_ns: float) -> None:
        """Launch equal kernels, one after the other; it waits where the queue is full."""
        for _ in range(kernels):
            self._push(kernel_ns, 1, False)

    def graph(self, kernels: int, kernel_ns: float) -> None:
        """Launch so many at once."""
        self._push(kernel_ns, kernels, True)

    def sync(self, *, spins: bool = False) -> None:
        """Wait until all that it has launched has finished: without CPU, or looking all the time (CUDA's default)."""
        if not self._head:
            return
        if spins:
            self._socket.send(json.dumps({"wait": self._head}).encode())
            while (
                WORD.unpack_from(self._ring, FINISHED)[0] < self._head and not WORD.unpack_from(self._ring, FAILED)[0]
            ):
                pass
            self._answer()
        else:
            self._ask(wait=self._head)

    def malloc(self, size: int) -> bool:
        """Whether there was room."""
        return bool(self._ask(malloc=size)["granted"])

    def free(self, size: int) -> None:
        """Give memory back."""
        self._ask(free=size)

    def close(self) -> None:
        """The context and all that it has is gone."""
        self._socket.close()

    def __enter__(self) -> Device:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Launches(Protocol):
    """What programs need of a card, simulated or real."""

    def launch(self, kernels: int, kernel_ns: float) -> None:
        """Equal kernels, one after the other."""

    def graph(self, kernels: int, kernel_ns: float) -> None:
        """So many at once."""

    def sync(self) -> None:
        """Wait for all."""

    def malloc(self, size: int) -> bool:
        """Whether there was room."""

    def free(self, size: int) -> None:
        """Give memory back."""


def run(device: Launches, program: Program) -> None:
    """Do what a program of the virtual card does, until it ends."""
    sent: Any = None
    while True:
        try:
            step = program.send(sent)
        except StopIteration:
            return
        sent = None
        match step:
            case Cpu(nanoseconds):
                due = time.monotonic_ns() + nanoseconds
                while time.monotonic_ns() < due:
                    pass
            case Sleep(nanoseconds):
                time.sleep(nanoseconds / SECOND)
            case Launch(kernels, kernel_ns, _, graph):
                (device.graph if graph else device.launch)(kernels, kernel_ns)
            case Sync():
                device.sync()
            case Malloc(size):
                sent = device.malloc(size)
            case Free(size):
                device.free(size)
            case _:
                raise TypeError(f"{step} has no meaning outside the virtual card")


PROGRAMS = {"trainer": trainer, "async": asynchronous, "blocking": blocking, "graph": graphs, "grower": grower}


def main() -> int:
    """Run a batch program on a card until it is ended."""
    parser = argparse.ArgumentParser(description="a batch job of a fake card")
    parser.add_argument("folder")
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("--card", type=int, default=0)
    parser.add_argument("--kernel-ms", type=float, default=0.0, help="of trainer, async and blocking")
    parser.add_argument("--share", type=float, default=1.0, help="of the SMs that its kernels fill")
    parser.add_argument("--memory", type=int, default=0, help="bytes to allocate first")
    options = parser.parse_args()
    with Device(options.folder, options.card, kind=options.program, share=options.share) as device:
        if options.memory and not device.malloc(options.memory):
            print("out of memory", file=sys.stderr)
            return 1
        print("on the card", flush=True)
        make: Any = PROGRAMS[options.program]
        run(device, make(kernel_ns=options.kernel_ms * MILLISECOND) if options.kernel_ms else make())
    return 0


if __name__ == "__main__":
    sys.exit(main())
