"""Services and batch jobs as programs of the virtual card, in the shapes that differ for whoever shares it."""

from __future__ import annotations

import random
from collections.abc import Callable

from colocate.fakecard.card import MICROSECOND, MILLISECOND, SECOND, Card
from colocate.fakecard.process import Cpu, Get, Launch, Mailbox, Malloc, Program, Sleep, Sync


class Arrivals:
    """Requests of independent users: exponential times between them, at a rate that may change."""

    def __init__(self, card: Card, per_second: float, seed: int) -> None:
        self.mailbox, self.per_second = Mailbox(), per_second
        self._card, self._random = card, random.Random(seed)
        self.count = 0
        self._next()

    def _next(self) -> None:
        if self.per_second <= 0:
            self._card.after(SECOND / 10, self._next)
            return
        self._card.after(self._random.expovariate(self.per_second) * SECOND, self._arrive)

    def _arrive(self) -> None:
        if self.per_second > 0:
            self.count += 1
            self.mailbox.put(self._card.now)
        self._next()


class Service:
    """One that answers requests, one after the other. `answered` is called with the latency in nanoseconds."""

    def __init__(self, card: Card, arrivals: Arrivals, answered: Callable[[int], None]) -> None:
        self._card, self.arrivals, self._answered = card, arrivals, answered
        self.running = 0
        """Requests that it works on: its own gauge, with those that wait."""
        self.slower = 1.0
        """Its kernels take so many times longer."""

    @property
    def gauge(self) -> int:
        """Requests running and waiting."""
        return self.running + len(self.arrivals.mailbox.items)

    def vision(self, kernels: int = 20, kernel_ns: float = MILLISECOND) -> Program:
        """A model of a fixed size: some kernels, then the answer."""
        while True:
            arrived = yield Get(self.arrivals.mailbox)
            self.running = 1
            yield Cpu(200 * MICROSECOND)
            yield Launch(kernels, kernel_ns * self.slower)
            yield Sync()
            self.running = 0
            self._answered(self._card.now - arrived)

    def language(self, prefill_ns: float = 200 * MILLISECOND, tokens: int = 200, token_ns: float = 4e6) -> Program:
        """A prefill, then token by token: each a graph of its own, whose result is waited for."""
        while True:
            arrived = yield Get(self.arrivals.mailbox)
            self.running = 1
            yield Launch(1, prefill_ns * self.slower, graph=True)
            yield Sync()
            for _ in range(tokens):
                yield Launch(1, token_ns * self.slower, graph=True)
                yield Sync()
                yield Cpu(100 * MICROSECOND)
            self.running = 0
            self._answered(self._card.now - arrived)


def trainer(kernels: int = 300, kernel_ns: float = MILLISECOND, cpu_ns: float = 2 * MILLISECOND) -> Program:
    """Steps that each end with a look at the loss: at most one step is queued."""
    while True:
        yield Launch(kernels, kernel_ns)
        yield Sync()
        yield Cpu(cpu_ns)


def asynchronous(kernel_ns: float = MILLISECOND) -> Program:
    """Never waits: its queue is always full."""
    while True:
        yield Launch(256, kernel_ns)


def blocking(kernel_ns: float = 4 * MILLISECOND) -> Program:
    """CUDA_LAUNCH_BLOCKING=1: one kernel at a time."""
    while True:
        yield Launch(1, kernel_ns)
        yield Sync()


def graphs(graph_ns: float = 500 * MILLISECOND) -> Program:
    """One launch is half a second of work."""
    while True:
        yield Launch(100, graph_ns / 100, graph=True)
        yield Sync()


def grower(step_bytes: int = 100 << 20, every_ns: float = SECOND) -> Program:
    """Allocates more and more until that fails; then it ends."""
    while True:
        granted = yield Malloc(step_bytes)
        if not granted:
            return
        yield Launch(10, MILLISECOND)
        yield Sync()
        yield Sleep(every_ns)
