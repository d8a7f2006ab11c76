"""What the law of attribution makes of worlds: batch work beside a tier that is left open, and service time harmed.

Each world is a node of the kernel model with a service or three, BestEffort, strangers, and batch that always wants two
CPUs; what a service feels is a function of time, of noise and of what batch really runs. The whole agent runs on it at
the default policy, 20 seeds each. The bars are those of issue 10's table; `low` and `high` are the 95 % interval of the
batch work ratio over the seeds.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import msgspec

from benchmarks.common import RESULTS
from colocate.actuate.journal import Journal
from colocate.agent.loop import Agent
from colocate.kernelmodel.fluid import FluidKernel
from colocate.model import reference
from colocate.model.statistics import mean_interval
from colocate.policy.schema import ColocationPolicy, PolicySpec, Selector, ServicePolicy
from colocate.snapshot import Latency, Objective

SEEDS = 20
WARM_SECONDS = 60.0
TARGET_SECONDS = 0.02
BOUNDS = (0.01, 0.02, 0.04)
HARM = 0.2
"""Points of waiting that batch may add: the default `pressure`."""
LATE = 0.02
"""A share of requests beyond the target, twice the error budget, that counts as harmed."""


class MemoryJournal(Journal):
    """A journal that keeps its entries in memory: the model ends with the process."""

    def __init__(self) -> None:
        self.boot_id, self.broken, self.entries = "model", "", []

    def add(self, *entries: Any) -> None:
        self.entries.extend(entries)

    def replace(self, entries: Any) -> None:
        self.entries = list(entries)

    def astray(self) -> bool:
        return False

    def close(self) -> None:
        """Nothing to close."""


class Noise:
    """First-order autoregressive noise, a value a second."""

    def __init__(self, spread: float, seed: int, kept: float = 0.7) -> None:
        self._random, self._kept = random.Random(seed), kept
        self._step = spread * math.sqrt(1 - kept * kept)
        self._value, self._second = 0.0, -1

    def __call__(self, t: float) -> float:
        while self._second < int(t):
            self._value = self._kept * self._value + self._random.gauss(0, self._step)
            self._second += 1
        return self._value


class Service(NamedTuple):
    """What one service feels: `own(t)` by itself, `added(t, share)` beside batch that runs `share` of what it wants."""

    own: Callable[[float], float]
    added: Callable[[float, float], float] = lambda _t, _share: 0.0
    requests_a_second: float = 0.0
    """With an SLO: then what it feels is the share of its requests beyond the target."""
    long: Callable[[float, float], float] | None = None
    """Where its waits are told apart: the share of time in the long ones, which alone are harm."""


class World(NamedTuple):
    """A world and its bars."""

    name: str
    services: Callable[[int], list[Service]]
    seconds: float = 600.0
    work: float | None = None
    """The least batch work ratio; of `outside` seconds only, if there are any."""
    first_minute: float | None = None
    harmed: float | None = None
    """The most of the service time after the first minute (or inside the peak)."""
    peak: tuple[float, float] | None = None
    stranger: Callable[[float], float] = lambda _t: 0.0
    reason: str = ""
    """What a message must say while it lasts."""
    within: float | None = None
    """Seconds within which harm that began must have been answered by the floor."""
    begins: float = 0.0
    """When harm begins."""


class Outcome(NamedTuple):
    """One run."""

    work: float
    first_minute: float
    harmed: float
    answered: float
    said: bool


class _Run:
    """One world with one seed."""

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.random = world, random.Random(seed)
        self.kernel = FluidKernel(cpus=2, seed=seed)
        self.kernel.write("unified", "/", "cgroup.subtree_control", "+cpu +cpuset +memory")
        self.services = world.services(seed)
        for i in range(len(self.services)):
            self.kernel.mkdir("unified", f"/s{i}")
            self.kernel.spawn("sleep", f"/s{i}")
        self.kernel.mkdir("unified", "/stranger")
        self.counts = [[0.0] * (len(BOUNDS) + 1) for _ in self.services]
        self.done = self.first = self.harmed = self.exposed = self.outside = self.worked_outside = 0.0
        self.start = self.kernel.monotonic()
        self.owed = [0.0] * len(self.services)
        self.long = [0.0] * len(self.services)
        self.kernel.happens = self._happens

    def _happens(self, now: float, seconds: float) -> None:
        t = now - self.start
        share = self.kernel.allowed("/colocate-batch/job").cores / 2.0
        strangers = self.world.stranger(t)
        self.kernel.used("/colocate-batch/job", 2.0 * share * seconds)
        self.kernel.used("/stranger", strangers * seconds)
        self.kernel.ran(min(2.0 * share + strangers + 0.3 * len(self.services), 2.0) * seconds, seconds)
        self.done += share * seconds
        self.first += share * seconds if t < WARM_SECONDS else 0.0
        peak = self.world.peak
        inside = peak is not None and peak[0] <= t < peak[1]
        if peak is not None and not inside:
            self.outside += seconds
            self.worked_outside += share * seconds
        for i, service in enumerate(self.services):
            self.kernel.used(f"/s{i}", 0.3 * seconds)
            added = service.added(t, share)
            felt = min(max(service.own(t) + added, 0.0), 1.0)
            if service.requests_a_second:
                self._requests(i, service.requests_a_second * seconds, felt)
            else:
                self.kernel.waited(f"/s{i}", felt * seconds)
            if service.long is not None:
                added = service.long(t, share)
                self.long[i] += added * seconds
            if inside or (peak is None and t >= WARM_SECONDS):
                self.exposed += seconds
                self.harmed += seconds * (added > (LATE if service.requests_a_second else HARM))

    def _requests(self, i: int, number: float, late: float) -> None:
        self.owed[i] += number
        while self.owed[i] >= 1.0:
            self.owed[i] -= 1.0
            beyond = self.random.random() < late
            for k, bound in enumerate(BOUNDS):
                self.counts[i][k] += float((0.03 if beyond else 0.005) <= bound)
            self.counts[i][-1] += 1.0

    def _long_waits(self, id_: str, _at: float) -> int | None:
        i = int(id_.rpartition(":s")[2])
        return int(self.long[i] * 1e6) if self.services[i].long is not None else None

    async def run(self) -> Outcome:
        """The agent at the default policy, looking again when it wants to."""
        names = [f"s{i}" for i in range(len(self.services))]
        policies = tuple(ServicePolicy(name=n, selector=Selector(cgroup=f"/{n}")) for n in names)
        spec = PolicySpec(services=policies)
        agent = Agent(self.kernel, ColocationPolicy(spec=spec), reference, MemoryJournal(), clock=self.kernel)
        agent.observer.long_waits = self._long_waits
        agent.open()
        placement = agent.tier.ensure_job("job")
        agent.tier.move(self.kernel.spawn("sleep").pid, placement)
        following, answered, said = self.kernel.monotonic(), math.inf, not self.world.reason
        while (t := self.kernel.monotonic() - self.start) < self.world.seconds - 1e-9:
            for i, service in enumerate(self.services):
                if service.requests_a_second:
                    agent.observer.objectives[names[i]] = Objective(TARGET_SECONDS)
                    reading = Latency(BOUNDS, tuple(self.counts[i]), self.kernel.monotonic())
                    agent.scraper.readings[names[i]] = reading
            tick = await agent.tick()
            verdict = tick.plan.verdicts[0]
            said = said or self.world.reason in verdict.message
            if verdict.numbers.get("grant_cores", 9.0) <= spec.cpu.floor and t >= self.world.begins:
                answered = min(answered, t - self.world.begins)
            following = max(following + spec.tick, self.kernel.monotonic() + 0.05)
            due = following - self.kernel.monotonic()
            again = tick.plan.look_again_seconds
            if again is not None and again < due:
                due, following = max(again, 0.1), following - spec.tick
            self.kernel.advance(max(round(min(due, self.world.seconds - t), 6), 0.01))
        await agent.close()
        work = self.worked_outside / self.outside if self.outside else self.done / self.world.seconds
        return Outcome(work, self.first / WARM_SECONDS, self.harmed / max(self.exposed, 1e-9), answered, said)


def steady(level: float) -> Callable[[float], float]:
    return lambda _t: level


def noisy(level: float, spread: float, seed: int) -> Callable[[float], float]:
    noise = Noise(spread, seed)
    return lambda t: level + noise(t)


def wave(level: float, swing: float, period: float, phase: float = 0.0) -> Callable[[float], float]:
    return lambda t: level + swing * math.sin(2 * math.pi * (t / period + phase))


def square(high: float, low: float, period: float, phase: float) -> Callable[[float], float]:
    return lambda t: high if (t + phase) % period < period / 2 else low


def both(one: Callable[[float], float], other: Callable[[float], float]) -> Callable[[float], float]:
    return lambda t: one(t) + other(t)


def noisy_share(level: float, spread: float, seed: int) -> Callable[[float, float], float]:
    noise = Noise(spread, seed + 1000)
    return lambda t, share: max((level + noise(t)) * share, 0.0)


def adds(points: float) -> Callable[[float, float], float]:
    return lambda _t, share: points * share


def _cache(_seed: int) -> list[Service]:
    """Harm that outlasts batch by two seconds."""
    last = [-9.0]

    def added(t: float, share: float) -> float:
        if share > 0.5:
            last[0] = t
        return 0.35 if t - last[0] < 2.0 else 0.0

    return [Service(steady(0.1), added)]


def _cache_in_a_peak(_seed: int) -> list[Service]:
    (always,) = _cache(0)
    return [Service(steady(0.1), lambda t, s: always.added(t, s) if 600 <= t < 1200 else 0.0)]


WORLDS = [
    World("quiet service", lambda s: [Service(noisy(0.05, 0.03, s), adds(0.03))], work=0.97, first_minute=0.9),
    World("service that waits 50 % by itself", lambda s: [Service(noisy(0.5, 0.05, s))], work=0.97, first_minute=0.9),
    World(
        "three such services with different phases",
        lambda s: [Service(wave(0.5, 0.1, 20.0, i / 3 + s / 60)) for i in range(3)],
        work=0.97,
        first_minute=0.9,
    ),
    World(
        "p99 beyond its target by its own doing: a release with a bug",
        lambda _s: [Service(steady(0.3), requests_a_second=100.0)],
        work=0.9,
        reason="not batch's doing",
    ),
    World(
        "p99 beyond its target by its own doing: a load beyond capacity",
        lambda _s: [Service(lambda t: min(t / 120.0, 1.0), requests_a_second=100.0)],
        work=0.9,
        reason="not batch's doing",
    ),
    World(
        "p99 beyond its target by its own doing: a cold cache",
        lambda _s: [Service(lambda t: 0.002 + 0.5 * math.exp(-t / 60.0), requests_a_second=100.0)],
        work=0.9,
        reason="not batch's doing",
    ),
    World(
        "strangers take the CPU for five minutes",
        lambda s: [Service(both(lambda t: 0.6 if 60 <= t < 360 else 0.05, Noise(0.05, s)), adds(0.03))],
        work=0.9,
        harmed=0.0,
        stranger=lambda t: 1.6 if 60 <= t < 360 else 0.0,
        reason="/stranger uses",
    ),
    World(
        "batch adds 5 points, noise of 10 points",
        lambda s: [Service(noisy(0.3, 0.1, s), adds(0.05))],
        work=0.95,
    ),
    World(
        "batch adds 35 points",
        lambda s: [Service(noisy(0.1, 0.03, s), lambda t, share: 0.35 * share if t >= 5 else 0.0)],
        harmed=0.03,
        within=1.1,
        begins=5.0,
    ),
    World(
        "batch adds 35 points in waits too short to be felt",
        lambda s: [Service(noisy(0.15, 0.05, s), adds(0.35), long=noisy_share(0.02, 0.01, s))],
        work=0.97,
        first_minute=0.9,
    ),
    World(
        "batch adds 35 points in long waits beside 30 in short ones",
        lambda s: [Service(noisy(0.3, 0.05, s), adds(0.35), long=lambda t, share: 0.35 * share if t >= 5 else 0.0)],
        harmed=0.03,
        within=1.1,
        begins=5.0,
    ),
    World(
        "batch doubles p99 beyond the target",
        lambda _s: [Service(steady(0.002), lambda t, share: 0.1 * share if t >= 5 else 0.0, 100.0)],
        harmed=0.03,
        within=1.1,
        begins=5.0,
    ),
    World(
        "harm only in a daily peak of ten minutes",
        lambda s: [Service(noisy(0.1, 0.05, s), lambda t, share: 0.35 * share if 600 <= t < 1200 else 0.0)],
        seconds=3600.0,
        work=0.9,
        harmed=0.05,
        peak=(600.0, 1200.0),
    ),
    World("harm that outlasts the pulse by 2 s", _cache, harmed=0.05),
    World(
        "harm in a peak that outlasts the pulse by 2 s",
        _cache_in_a_peak,
        seconds=3600.0,
        work=0.9,
        harmed=0.05,
        peak=(600.0, 1200.0),
    ),
    World(
        "load periodic with the tick",
        lambda s: [Service(square(0.5, 0.1, 1.0, s / 20), adds(0.02))],
        work=0.9,
    ),
    World(
        "load periodic with two ticks",
        lambda s: [Service(square(0.45, 0.1, 2.0, s / 10), adds(0.02))],
        work=0.9,
    ),
    World(
        "3 requests a second, within the SLO",
        lambda _s: [Service(steady(0.003), requests_a_second=3.0)],
        work=0.999,
    ),
    World(
        "3 requests a second, harmed",
        lambda _s: [Service(steady(0.003), lambda t, share: 0.3 * share if t >= 120 else 0.0, 3.0)],
        within=60.0,
        begins=120.0,
    ),
]


def once(job: tuple[int, int]) -> Outcome:
    """World number, seed."""
    return asyncio.run(_Run(WORLDS[job[0]], job[1]).run())


def judge(world: World, outcomes: list[Outcome]) -> dict[str, Any]:
    """One row: means over the seeds against the bars."""
    work = mean_interval([o.work for o in outcomes])
    first = sum(o.first_minute for o in outcomes) / len(outcomes)
    harmed = sum(o.harmed for o in outcomes) / len(outcomes)
    answered = max(o.answered for o in outcomes)
    passed = (
        (world.work is None or work.value >= world.work)
        and (world.first_minute is None or first >= world.first_minute)
        and (world.harmed is None or harmed <= world.harmed)
        and (world.within is None or sorted(o.answered for o in outcomes)[len(outcomes) // 2] <= world.within)
        and all(o.said for o in outcomes)
    )
    row = {
        "world": world.name,
        "seeds": len(outcomes),
        "batch_work_ratio": round(work.value, 4),
        "first_minute_ratio": round(first, 4),
        "harmed_ratio": round(harmed, 4),
        "low": round(work.low, 4),
        "high": round(work.high, 4),
        "pass": passed,
    }
    return row | ({"slowest_answer_seconds": round(answered, 2)} if world.within is not None else {})


def measure(seeds: int = SEEDS, only: str = "") -> list[dict[str, Any]]:
    """All worlds, spread over the CPUs."""
    chosen = [i for i, w in enumerate(WORLDS) if only in w.name]
    jobs = [(i, seed) for i in chosen for seed in range(seeds)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        outcomes = dict(zip(jobs, pool.map(once, jobs, chunksize=2), strict=True))
    return [judge(WORLDS[i], [outcomes[i, seed] for seed in range(seeds)]) for i in chosen]


def as_json() -> str:
    """The rows as JSON."""
    return msgspec.json.format(msgspec.json.encode(measure()), indent=2).decode()


def run(_full: bool) -> list[str]:
    """One line a world; the rows are kept, for they repeat by seed."""
    rows = measure()
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "worlds.jsonl").write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
    return [
        f"{'pass' if r['pass'] else 'fail':9s} worlds: {r['world']}: batch work {r['batch_work_ratio']:.3f} "
        f"[{r['low']:.3f}, {r['high']:.3f}], first minute {r['first_minute_ratio']:.3f}, harmed {r['harmed_ratio']:.4f}"
        for r in rows
    ]
