"""A virtual node with one card: its processes, the law each second, and a hand that looks every five milliseconds."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from itertools import accumulate

from colocate.decide.gpu import CardDecision, CardSeen, CardState, JobSeen, ServiceSeen, decide_card
from colocate.fakecard.card import MILLISECOND, SECOND, Card, CardSpec
from colocate.fakecard.process import Process, Program
from colocate.fakecard.workloads import Arrivals, Service
from colocate.model.gpu import Drains

LOOK = 5 * MILLISECOND
TICK = SECOND
PROBE = 50 * MILLISECOND


def bounds(target_seconds: float) -> tuple[float, ...]:
    """A histogram as a service would have it: eighty buckets, one of which ends at the target."""
    return tuple(target_seconds * 1.06**i for i in range(-60, 20))


class Histogram:
    """Cumulative, as Prometheus has it."""

    def __init__(self, target_seconds: float) -> None:
        self.bounds, self.each = bounds(target_seconds), [0] * 81

    def add(self, nanoseconds: int) -> None:
        self.each[bisect_left(self.bounds, nanoseconds / SECOND)] += 1

    @property
    def counts(self) -> tuple[float, ...]:
        return tuple(map(float, accumulate(self.each)))


class Job:
    """A batch process, and what is known of its drain."""

    def __init__(self, process: Process) -> None:
        self.process, self.drains = process, Drains()
        self._stopped_at: int | None = None

    def stop(self) -> None:
        if not self.process.frozen:
            self.process.freeze()
            self._stopped_at = self.process.card.now

    @property
    def draining(self) -> bool:
        return self._stopped_at is not None

    def let_go(self) -> None:
        self.process.thaw()
        self._stopped_at = None

    def look(self) -> None:
        """How long it went on, once it has ended."""
        if self._stopped_at is not None and not self.process.client.work:
            now = self.process.card.now
            self.drains = self.drains.add(now / SECOND, (now - self._stopped_at) / SECOND)
            self._stopped_at = None


class World:
    """One service with a target, and batch that comes later."""

    def __init__(
        self, per_second: float, target_seconds: float, *, sensor: str = "gauge", seed: int = 1, governed: bool = True
    ) -> None:
        """`governed`: whether the law has a say; else it is stock time slicing."""
        self.card = Card(CardSpec())
        self._per_second, self._seed, self._governed = per_second, seed, governed
        self.arrivals = Arrivals(self.card, per_second, seed)
        self.histogram = Histogram(target_seconds)
        self.latencies: list[int] = []
        self.answered_at: list[int] = []
        self.service = Service(self.card, self.arrivals, self._answered)
        self.jobs: list[Job] = []
        self.state = CardState()
        self.sensor, self.target = sensor, target_seconds
        self.exporter_works = True
        self.read = self.histogram.counts
        self.read_at = 0.0
        self.verdicts: dict[str, int] = {}
        self.modes: dict[str, int] = {}
        self.writes = 0
        self._idle_since: int | None = 0
        self._next_tick = TICK
        self._probed_at = -TICK
        self.decision: CardDecision | None = None
        self.on_tick: Callable[[], None] = lambda: None

    def _answered(self, nanoseconds: int) -> None:
        self.latencies.append(nanoseconds)
        self.answered_at.append(self.card.now)
        self.histogram.add(nanoseconds)

    def serve(self, program: Callable[[Service], Program]) -> Process:
        self._program = program
        return Process(self.card, 1, program(self.service), kind="service")

    def alone(self) -> World:
        """The same arrivals until now, on a card of their own."""
        twin = World(self._per_second, self.target, seed=self._seed)
        twin.serve(self._program)
        twin.card.run_until(self.card.now)
        return twin

    def batch(self, program: Program) -> Job:
        job = Job(Process(self.card, 100 + len(self.jobs), program, kind="batch"))
        self.jobs.append(job)
        return job

    def run(self, seconds: float) -> None:
        end = self.card.now + round(seconds * SECOND)
        if not self._governed:
            self.card.run_until(end)
        while self.card.now < end:
            self.card.run_until(self.card.now + LOOK)
            if self.card.now >= self._next_tick:
                self._next_tick += TICK
                self._tick()
            self._hand()

    def _tick(self) -> None:
        if self.exporter_works:
            self.read, self.read_at = self.histogram.counts, self.card.now / SECOND
        service = ServiceSeen(
            id="service",
            name="service",
            target_seconds=self.target,
            bounds_seconds=self.histogram.bounds,
            counts=self.read,
            read_at=self.read_at,
        )
        seen = CardSeen(
            uuid="GPU-0",
            now=self.card.now / SECOND,
            services=(service,),
            jobs=tuple(JobSeen(id=f"job:{i}", name=f"job {i}", drains=j.drains) for i, j in enumerate(self.jobs)),
            sensor=self.sensor,
            stopped=all(job.process.frozen for job in self.jobs),
        )
        self.decision = decide_card(seen, self.state)
        self.state = self.decision.state
        if self.jobs:
            self.verdicts[self.decision.verdict.reason] = self.verdicts.get(self.decision.verdict.reason, 0) + 1
            self.modes[self.state.mode] = self.modes.get(self.state.mode, 0) + 1
        self.on_tick()

    def _hand(self) -> None:
        if self.service.gauge:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = self.card.now
        for job in self.jobs:
            before = job.process.frozen
            if self._may_run():
                job.let_go()
            else:
                job.stop()
            self.writes += job.process.frozen != before
            job.look()

    def _may_run(self) -> bool:
        decision = self.decision
        if decision is None or self.state.mode == "open":
            return True
        if self.state.mode == "off":
            return False
        idle = self.card.now - self._idle_since if self._idle_since is not None else -1
        if self.state.mode == "gate":
            return idle >= self.state.hold_off * SECOND
        if self.state.mode == "probe":
            return self._probe(idle if self.sensor else SECOND)
        phase = (self.card.now / SECOND) % decision.period_seconds
        return phase < decision.on_seconds

    def _probe(self, idle: int) -> bool:
        """Moments of fifty milliseconds, two a second at most."""
        since = self.card.now - self._probed_at
        if since < PROBE:
            return idle >= 0
        draining = any(job.draining for job in self.jobs)
        if since >= TICK / 2 and not draining and idle >= self.state.hold_off * SECOND:
            self._probed_at = self.card.now
            return True
        return False

    def quantile(self, q: float, since: int = 0) -> float:
        """Of the latencies after the first `since`, seconds."""
        found = sorted(self.latencies[since:])
        return found[min(int(q * len(found)), len(found) - 1)] / SECOND

    def share(self, job: Job, since_busy: float, since: int) -> float:
        """Of the card that a job had."""
        return (job.process.client.busy_ns - since_busy) / (self.card.now - since)
