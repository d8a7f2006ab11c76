"""A process that loads the card in one of the shapes of batch jobs, or serves: `python -m benchmarks.gpu.load`.

Everything that is measured of it stands in its words (`cuda.Words`); it runs until it is ended.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path

from benchmarks.gpu.cuda import Card, Words

STEP = 300
"""Kernels of a training step, then one synchronization (as `loss.item()` does)."""


def trainer(card: Card, words: Words, rounds: int) -> None:
    """Steps of many kernels, synchronized once each."""
    while True:
        for _ in range(STEP):
            card.work(rounds)
            words[Words.LAUNCHED] += 1
        card.sync()


def asynchronous(card: Card, words: Words, rounds: int) -> None:
    """Never synchronizes; how many launches the queue took before one had to wait is its depth."""
    count, full = 0, False
    while True:
        began = time.perf_counter_ns()
        card.work(rounds)
        took = time.perf_counter_ns() - began
        count += 1
        words[Words.LAUNCHED] = count
        if not full and took > 400_000 and count > 8:
            full = True
            words[Words.DEPTH] = count - words[Words.BEATS]


def blocking(card: Card, words: Words, rounds: int) -> None:
    """Waits for every kernel."""
    while True:
        card.work(rounds)
        words[Words.LAUNCHED] += 1
        card.sync()


def graph(card: Card, words: Words, rounds: int) -> None:
    """One launch is 500 kernels."""
    launchable = card.graph(500, rounds)
    while True:
        card.replay(launchable)
        words[Words.LAUNCHED] += 500
        card.sync()


def serve(card: Card, words: Words, rounds: int, kernels: int, rate: float, seconds: float, out: Path) -> None:
    """Requests of `kernels` kernels, first come first served: Poisson arrivals at `rate`, or one after another (0)."""
    rng = random.Random(7)
    arrivals: list[float] = []
    at = 0.0
    while rate and (at := at + rng.expovariate(rate)) < seconds:
        arrivals.append(at)
    latencies: list[float] = []
    start = time.perf_counter()
    while True:
        now = time.perf_counter() - start
        if len(latencies) >= len(arrivals) if rate else now >= seconds:
            break
        came = arrivals[len(latencies)] if rate else now
        if came > now:
            words[Words.BUSY] = 0
            time.sleep(min(came - now, 0.0005))
            continue
        words[Words.BUSY] = 1
        for _ in range(kernels):
            card.work(rounds)
        card.sync()
        latencies.append(time.perf_counter() - start - came)
    words[Words.BUSY] = 0
    out.write_text(json.dumps(latencies))


def watch(card: Card, seconds: float) -> None:
    """See for `seconds` when the card ran another context."""
    card.watch(int(seconds * 1e9), 10_000)
    card.sync()


def probe(card: Card, words: Words) -> None:
    """Ask the card for next to nothing over and over; CYCLES is the last moment at which another context made it wait.

    Monotonic nanoseconds. An answer that takes over 1.2 ms came after another context's slice.
    """
    while True:
        began = time.perf_counter_ns()
        card.work(1)
        card.sync()
        ended = time.perf_counter_ns()
        if ended - began > 1_200_000:
            words[Words.CYCLES] = ended


def measure(card: Card, words: Words, rounds: int, seconds: float) -> None:
    """Kernels of `rounds` in `seconds`, synchronized every hundred: into LAUNCHED, and nanoseconds into CYCLES."""
    began, count = time.perf_counter_ns(), 0
    while time.perf_counter_ns() - began < seconds * 1e9:
        for _ in range(100):
            card.work(rounds)
        card.sync()
        count += 100
    words[Words.CYCLES] = time.perf_counter_ns() - began
    words[Words.LAUNCHED] = count


def main(role: str, path: str, rounds: int, *more: str) -> None:
    """Load the card as `role` until ended."""
    words = Words(Path(path))
    card = Card(words)
    card.work(1)
    card.sync()
    words[Words.BEATS] = 0
    words[Words.READY] = 1
    if role == "serve":
        serve(card, words, rounds, int(more[0]), float(more[1]), float(more[2]), Path(more[3]))
    elif role == "watch":
        watch(card, float(more[0]))
    elif role == "probe":
        probe(card, words)
    elif role == "measure":
        measure(card, words, rounds, float(more[0]))
    else:
        {"trainer": trainer, "asynchronous": asynchronous, "blocking": blocking, "graph": graph}[role](
            card, words, rounds
        )
    words[Words.READY] = 2


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
