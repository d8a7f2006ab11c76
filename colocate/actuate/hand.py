"""The hand: stops and lets go batch within milliseconds, as it was granted, in a thread that no tick blocks.

Every grant is a lease: a tick that does not come any more ends it, and then everything is let go. So is whatever is
no longer granted, unless it is to stay stopped. It moves the gates that were granted (`gates.py`) and nothing else; if
the process dies the guardian lets go.

It also sees for how long a job goes on after it was stopped: in a moment in which no service is busy it stops it, has
the card's counters looked at from then on, and keeps it stopped meanwhile (`Probe`).
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import structlog

from colocate.actuate.gates import Gate
from colocate.cgroup.port import CgroupGone
from colocate.plan import Pulse

log = structlog.get_logger()
LOOK_SECONDS = 0.0045
MARKED_WITHIN_SECONDS = 0.005
PROBE_ON_SECONDS, PROBE_EVERY_SECONDS, PROBE_AGAIN_SECONDS = 0.03, 0.25, 15.0
"""How long a job runs to be stopped, how often that is tried, and how often where it is known."""
MOST_PROBE_SECONDS = 10.0
THOROUGH_EACH = 3
LONG_DRAIN_SECONDS, PROBE_AFTER_LONG_SECONDS = 0.05, 3.0
"""After one that went on for so long it is not let go again before the law has heard of it."""
KEPT_DRAINS, KEPT_REACTIONS = 64, 500
SETTLED_DRAINS = 5


class Senses(Protocol):
    """Who sees whether a service is busy."""

    def look(self, now: float) -> None:
        """Look now."""

    def busy(self, id_: str, now: float) -> bool:
        """Whether a service was busy at the last look."""


class Grant(NamedTuple):
    """A workload that the hand may stop and let go, until `until` (monotonic seconds)."""

    gate: Gate
    pulses: tuple[Pulse, ...]
    until: float


class Probe:
    """One look at how long jobs of a card go on after they were stopped; a service that becomes busy spoils it."""

    def __init__(self, card: str, jobs: tuple[str, ...], services: frozenset[str], *, thorough: bool) -> None:
        self.card, self.jobs, self.services = card, jobs, services
        """`services`: by whose sensors it goes; by none, where nothing shows at once whether they are busy."""
        self.stopped_at: float | None = None
        """Monotonic seconds; None as long as they are not."""
        self.spoiled = False
        self.thorough = thorough
        """Whether more is asked after it was spoiled, which takes a second; else it is tried again."""
        self.drain: float | None = None
        """Once it is known; None where nothing could be seen."""
        self.marked, self.done = threading.Event(), threading.Event()
        self.began = time.monotonic()

    def finish(self, drain: float | None) -> None:
        """It was seen, or it was not."""
        self.drain = drain
        self.done.set()


class _Held:
    """One workload in the hand."""

    def __init__(self) -> None:
        self.stopped = False
        self.stopped_at = float("-inf")
        self.drains: dict[str, deque[tuple[float, float]]] = {}
        """By card."""
        self.problem = ""


class Hand:
    """Carries grants out. All its methods may be called from any thread."""

    def __init__(self, senses: Senses, measure: Callable[[Probe], None]) -> None:
        """`measure` is told of a probe and sees to it that it is finished, in another thread."""
        self._senses, self._measure = senses, measure
        self._grants: dict[str, Grant] = {}
        self._held: dict[str, _Held] = {}
        self._idle_since: dict[str, float] = {}
        self._probes: dict[str, Probe] = {}
        """By card."""
        self._next_probe: dict[str, float] = {}
        self._spoiled: dict[str, int] = {}
        """Of a card, the probes in a row that were spoiled."""
        self._on_until: dict[str, float] = {}
        self._reactions: deque[float] = deque(maxlen=KEPT_REACTIONS)
        self._looked_at = time.monotonic()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closed = False
        self.looks_always = False
        """Whether services are looked at although nothing is granted."""
        self._thread = threading.Thread(target=self._run, name="hand", daemon=True)
        self._thread.start()

    def grant(self, grants: Mapping[str, Grant], stay: frozenset[str] = frozenset()) -> None:
        """These from now on; whoever had one and has none any more is let go, unless it is to stay stopped."""
        with self._lock:
            for id_ in set(self._grants) - set(grants):
                if id_ not in stay and self._held[id_].stopped:  # what somebody else stopped is theirs to let go
                    self._let_go(id_, self._grants[id_])
                self._held.pop(id_, None)
            for id_, grant in grants.items():
                before = self._grants.get(id_)
                if before is None or before.gate.identity != grant.gate.identity:
                    if before is not None and self._held[id_].stopped:
                        self._let_go(id_, before)
                    held = self._held[id_] = _Held()  # what is stopped by then is stopped by a law of ours
                    held.stopped = grant.gate.stopped()
                elif self._held[id_].stopped:
                    self._held[id_].stopped = grant.gate.extend()
            self._grants = dict(grants)
            asked = {s for g in grants.values() for p in g.pulses for s in p.services}
            self._idle_since = {s: at for s, at in self._idle_since.items() if s in asked}
        self._wake.set()

    def drains(self) -> dict[tuple[str, str], tuple[tuple[float, float], ...]]:
        """(workload, card) -> for how long the card went on when it was stopped."""
        with self._lock:
            return {(i, card): tuple(d) for i, h in self._held.items() for card, d in h.drains.items()}

    def problems(self) -> dict[str, str]:
        """Workloads that cannot be stopped or let go, and why."""
        with self._lock:
            return {i: h.problem for i, h in self._held.items() if h.problem}

    @property
    def reaction_seconds(self) -> float | None:
        """From a look to a job that is stopped, the 95th percentile; None before there were some."""
        found = sorted(self._reactions)
        return found[int(0.95 * len(found))] if len(found) >= 20 else None

    def close(self) -> None:
        """Let everything go, and end."""
        self.grant({})
        self._closed = True
        self._wake.set()
        self._thread.join(2.0)

    # the thread

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # it does not wait for a CPU, where that is allowed
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        due = time.monotonic()
        while not self._closed:
            if not self._grants and not self.looks_always:
                self._wake.wait(1.0)
                self._wake.clear()
                due = time.monotonic()
                continue
            now = time.monotonic()
            if now < due:
                time.sleep(due - now)
                now = time.monotonic()
            due = max(due + LOOK_SECONDS, now)
            try:
                self._senses.look(now)
                with self._lock:
                    self._turn(now)
            except Exception:  # it may not end: what is stopped would stay so until the lease's end
                log.exception("hand_failed")
                time.sleep(0.1)

    def _turn(self, now: float) -> None:
        services = {s for g in self._grants.values() for p in g.pulses for s in p.services}
        for service in services:
            if self._senses.busy(service, now):
                self._idle_since.pop(service, None)
            else:
                self._idle_since.setdefault(service, now)
        for card, probe in list(self._probes.items()):
            self._look_at(card, probe, now)
        for id_, grant in self._grants.items():
            try:
                self._turn_one(id_, grant, now)
            except Exception:  # one that cannot be carried out keeps nobody else's from being
                log.exception("grant_failed", workload=id_)
        self._looked_at = now

    def _turn_one(self, id_: str, grant: Grant, now: float) -> None:
        held = self._held[id_]
        if now >= grant.until:
            may = True  # nobody has renewed the lease
        elif any(pulse.card in self._probes for pulse in grant.pulses):
            may = False
        else:
            lets = [self._lets(pulse, now) for pulse in grant.pulses]  # each is asked: it has moments of its own
            may = all(lets)
        if may and held.stopped:
            self._let_go(id_, grant)
        elif not may and not held.stopped:
            self._stop(id_, grant, now)

    def _lets(self, pulse: Pulse, now: float) -> bool:
        card = pulse.card
        busy = any(s not in self._idle_since for s in pulse.services)
        idle = min((now - self._idle_since[s] for s in pulse.services), default=0.0) if not busy else 0.0
        if pulse.mode == "probe":
            return self._lets_probe(card, busy, idle >= pulse.hold_off_seconds, now)
        if pulse.mode == "gate":
            may = not busy and idle >= pulse.hold_off_seconds
        else:
            may = pulse.period_seconds > 0.0 and now % pulse.period_seconds < pulse.on_seconds
        stopped = any(self._held[i].stopped for i in self._on(card))
        if may and not busy and not stopped and now >= self._next_probe.get(card, 0.0):
            self._probe(card)  # from time to time one that runs is stopped, to see for how long it goes on
            return False
        return may

    def _lets_probe(self, card: str, busy: bool, rested: bool, now: float) -> bool:
        """A moment in which it runs, and then the look at how long it goes on."""
        until = self._on_until.get(card)
        if until is None and not busy and rested and now >= self._next_probe.get(card, 0.0):
            self._on_until[card] = now + PROBE_ON_SECONDS
            return True
        if until is None or (not busy and now < until):
            return until is not None
        del self._on_until[card]
        kept = any(self._held[i].stopped for i in self._on(card))  # by something else of theirs, so they did not run
        if busy or kept:
            self._next_probe[card] = now + PROBE_EVERY_SECONDS
        else:
            self._probe(card)
        return False

    def _on(self, card: str) -> tuple[str, ...]:
        return tuple(i for i, g in self._grants.items() if any(p.card == card for p in g.pulses))

    def _probe(self, card: str) -> None:
        jobs = self._on(card)
        services = frozenset(s for i in jobs for p in self._grants[i].pulses if p.card == card for s in p.services)
        unknown = any(not self._known(i, card) for i in jobs)
        thorough = unknown and self._spoiled.get(card, 0) % THOROUGH_EACH == THOROUGH_EACH - 1
        probe = self._probes[card] = Probe(card, jobs, services, thorough=thorough)
        try:
            self._measure(probe)
        except RuntimeError:  # no thread to be had
            probe.finish(None)
        probe.marked.wait(MARKED_WITHIN_SECONDS)  # what runs until it is stopped is counted, and known
        for id_ in jobs:
            self._stop(id_, self._grants[id_], None)
        if all(self._held[i].stopped for i in jobs):  # of one that could not be, nothing is to be seen
            probe.stopped_at = max(self._held[i].stopped_at for i in jobs)

    def _known(self, id_: str, card: str) -> int:
        return len(self._held[id_].drains.get(card, ())) if id_ in self._held else SETTLED_DRAINS

    def _look_at(self, card: str, probe: Probe, now: float) -> None:
        """A probe under way: spoiled by whoever is busy, over once it is finished."""
        if any(s not in self._idle_since for s in probe.services) or any(i not in self._grants for i in probe.jobs):
            probe.spoiled = True
        if not probe.done.is_set() and now - probe.began < MOST_PROBE_SECONDS:
            return
        del self._probes[card]
        if probe.done.is_set() and probe.drain is not None:
            for id_ in filter(self._held.__contains__, probe.jobs):
                drains = self._held[id_].drains.setdefault(card, deque(maxlen=KEPT_DRAINS))
                drains.append((round(now, 3), round(probe.drain, 6)))
        known = min((self._known(i, card) for i in probe.jobs), default=0)
        self._spoiled[card] = self._spoiled.get(card, 0) + 1 if probe.spoiled else 0
        again = PROBE_AGAIN_SECONDS if known >= SETTLED_DRAINS and not probe.spoiled else PROBE_EVERY_SECONDS
        if probe.drain is not None and probe.drain > LONG_DRAIN_SECONDS:
            again = max(again, PROBE_AFTER_LONG_SECONDS)
        self._next_probe[card] = now + again

    def _stop(self, id_: str, grant: Grant, now: float | None) -> None:
        """`now`: of the look that wanted it."""
        held = self._held[id_]
        if held.stopped:
            return
        if grant.gate.stopped():
            return  # somebody else has stopped it: it is theirs to let go
        if not self._move(id_, grant, stop=True):
            return
        held.stopped, held.stopped_at = True, time.monotonic()
        if now is not None:  # what made it was there since the look before, at the earliest
            self._reactions.append(held.stopped_at - min(self._looked_at, now))

    def _let_go(self, id_: str, grant: Grant) -> None:
        if self._move(id_, grant, stop=False) and id_ in self._held:
            self._held[id_].stopped = False

    def _move(self, id_: str, grant: Grant, *, stop: bool) -> bool:
        held = self._held.get(id_)
        try:
            (grant.gate.stop if stop else grant.gate.let_go)()
        except CgroupGone:
            return False
        except OSError as error:
            if held is not None and held.problem != str(error):
                held.problem = str(error)
                log.warning("hand_cannot_move", workload=id_, stop=stop, error=error.strerror)
            return False
        if held is not None:
            held.problem = ""
        return True
