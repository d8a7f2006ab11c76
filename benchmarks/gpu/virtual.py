"""The law of a card on the fake card, beside stock time slicing and the service alone, in virtual time.

Each row is a service with a target and a batch job, seeds 1 to 5: ten minutes (an hour where requests are few)
after the law has settled, the same arrivals in every arm. Nothing here depends on the machine: the rows repeat by seed.
The fake card is held to an H100's slices, switches and drains (tests/unit/test_fake_card.py); whether the law
protects on a real card is not measured here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import msgspec

from benchmarks.common import RESULTS, bar
from benchmarks.gpu.world import World
from colocate.fakecard.card import MILLISECOND, SECOND
from colocate.fakecard.process import Program
from colocate.fakecard.workloads import Service, asynchronous, blocking, graphs, trainer
from colocate.model.statistics import mean_interval

SEEDS = range(1, 6)
SETTLE_SECONDS = 60.0


class Shape(NamedTuple):
    """A service: what a request is, how many come in a second, its p99 alone in seconds (of 20,000 requests)."""

    program: Callable[[Service], Program]
    per_second: float
    p99_seconds: float
    warm_seconds: float
    seconds: float


SERVICES = {
    "20 ms, 10/s": Shape(lambda s: s.vision(), 10.0, 0.0523, 120.0, 600.0),
    "5 ms, 40/s": Shape(lambda s: s.vision(kernels=5), 40.0, 0.0139, 60.0, 600.0),
    "0.5 s, 0.3/s": Shape(lambda s: s.language(prefill_ns=100 * MILLISECOND, tokens=100), 0.3, 1.29, 1500.0, 3600.0),
}
JOBS: dict[str, Callable[[], Program]] = {
    "waits for each kernel of 4 ms": blocking,
    "steps of 4 ms": lambda: trainer(kernels=4),
    "steps of 300 ms": trainer,
    "never waits": asynchronous,
    "graphs of 500 ms": graphs,
}


class Case(NamedTuple):
    """A service, what it is promised, a job, and what shows within milliseconds that the service is idle."""

    service: str
    factor: float
    """Of its p99 alone."""
    job: str
    sensor: str = "gauge"


CASES = (
    *(Case("20 ms, 10/s", 1.5, job) for job in JOBS),
    *(Case("5 ms, 40/s", 1.5, job) for job in ("waits for each kernel of 4 ms", "steps of 300 ms")),
    Case("20 ms, 10/s", 4.0, "steps of 300 ms"),
    Case("0.5 s, 0.3/s", 1.3, "steps of 4 ms", ""),
    Case("0.5 s, 0.3/s", 1.3, "steps of 300 ms", ""),
    Case("20 ms, 10/s", 1.5, "waits for each kernel of 4 ms", ""),
)


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one case with one seed. Ratios are to the same requests alone; shares are of the card's time."""

    service: str
    target_factor: float
    job: str
    sensor: str
    seed: int
    mode: str
    reason: str
    p99_ratio: float
    sliced_p99_ratio: float
    late: float
    sliced_late: float
    alone_late: float
    batch_share: float
    sliced_batch_share: float
    idle_share: float
    """What the service alone leaves."""
    drain_ms: float
    prediction_error: float


def measure_one(case: Case, seed: int) -> Row:
    """Three arms: alone, time slicing without anybody's hand, the law."""
    shape = SERVICES[case.service]
    target = case.factor * shape.p99_seconds
    governed = World(shape.per_second, target, sensor=case.sensor, seed=seed)
    sliced = World(shape.per_second, target, seed=seed, governed=False)
    shares, latencies = [], []
    for world in (governed, sliced):
        world.serve(shape.program)
        world.run(shape.warm_seconds)
        job = world.batch(JOBS[case.job]())
        world.run(SETTLE_SECONDS)
        before, busy, since = len(world.latencies), job.process.client.busy_ns, world.card.now
        world.run(shape.seconds)
        shares.append(world.share(job, busy, since))
        latencies.append(world.latencies[before:])
        began = since
    alone = governed.alone()
    used = alone.card.clients[1].busy_ns / alone.card.now
    first = sum(arrived < began for arrived in alone.answered_at)
    latencies.append(alone.latencies[first:])

    def p99(found: list[int]) -> float:
        return sorted(found)[int(0.99 * len(found))]

    def late(found: list[int]) -> float:
        return sum(ns > target * SECOND for ns in found) / len(found)

    law, plain, own = latencies
    decision = governed.decision
    assert decision is not None
    return Row(
        service=case.service,
        target_factor=case.factor,
        job=case.job,
        sensor=case.sensor,
        seed=seed,
        mode=max(governed.modes, key=lambda mode: governed.modes[mode]),
        reason=max(governed.verdicts, key=lambda reason: governed.verdicts[reason]),
        p99_ratio=round(p99(law) / p99(own), 4),
        sliced_p99_ratio=round(p99(plain) / p99(own), 4),
        late=round(late(law), 5),
        sliced_late=round(late(plain), 5),
        alone_late=round(late(own), 5),
        batch_share=round(shares[0], 4),
        sliced_batch_share=round(shares[1], 4),
        idle_share=round(1.0 - used, 4),
        drain_ms=round(governed.jobs[0].drains.bound(governed.card.now / SECOND) * 1e3, 2),
        prediction_error=round(governed.state.slowdown.error, 4),
    )


def measure() -> list[Row]:
    """All of them, on as many CPUs as there are."""
    asked = [(case, seed) for case in CASES for seed in SEEDS]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(measure_one, *zip(*asked, strict=True)))


def run(_full: bool) -> list[str]:
    """One line a case, then the bars; the rows are kept, for they repeat by seed."""
    rows = measure()
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "gpu-virtual.jsonl").write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
    by_case = [[r for r in rows if (r.service, r.target_factor, r.job, r.sensor) == tuple(case)] for case in CASES]
    return [_line(case, its) for case, its in zip(CASES, by_case, strict=True)] + bars(rows)


def _line(case: Case, rows: list[Row]) -> str:
    def mean(values: Iterable[float]) -> float:
        return sum(values) / len(rows)

    first, unseen = rows[0], "" if case.sensor else ", no sensor"
    return (
        f"gpu: {case.service}, target {case.factor} x, {case.job}{unseen}: {first.mode} ({first.reason}), "
        f"p99 {mean(r.p99_ratio for r in rows):.2f} x (time slicing {mean(r.sliced_p99_ratio for r in rows):.2f}), "
        f"late {mean(r.late for r in rows):.2%} ({mean(r.sliced_late for r in rows):.2%}), "
        f"batch {mean(r.batch_share for r in rows):.2f} of the card "
        f"({mean(r.sliced_batch_share for r in rows):.2f}), drain {mean(r.drain_ms for r in rows):.3g} ms"
    )


def bars(rows: list[Row]) -> list[str]:
    """What the law is held to, over the seeds."""
    gate = [r for r in rows if r.mode == "gate" and r.service.startswith("20 ms") and r.drain_ms <= 15.0]
    harvested = [r.batch_share / r.idle_share for r in gate if r.job == "waits for each kernel of 4 ms"]
    off = [r for r in rows if r.mode == "off" and r.reason == "CannotProtect"]
    dial = [r for r in rows if r.mode == "dial"]
    protected = [r for r in rows if r.mode in ("gate", "dial") and r.sliced_late > 0.0]
    return [
        _at_most("gpu: gate, p99 to alone", [r.p99_ratio for r in gate], 1.25),
        _at_least("gpu: gate, idle time harvested, by a job that always has work", harvested, 0.8),
        _at_least("gpu: gate, batch to time slicing's", [r.batch_share / r.sliced_batch_share for r in gate], 0.8),
        _at_most("gpu: off, p99 to alone", [r.p99_ratio for r in off], 1.03),
        _at_most("gpu: dial, prediction error", [r.prediction_error for r in dial], 0.1),
        _at_most("gpu: gate and dial, late to time slicing's", [r.late / r.sliced_late for r in protected], 0.68),
    ]


def _at_most(name: str, values: list[float], bound: float) -> str:
    found = mean_interval(values)
    return bar(name, found.below(bound).upper(), found, bound)


def _at_least(name: str, values: list[float], bound: float) -> str:
    found = mean_interval(values)
    return bar(name, found.above(bound).upper(), found, bound)
