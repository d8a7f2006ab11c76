"""One GPU as a discrete-event machine: who has which kernels queued, whose turn it is, and what everybody has used.

    process -> ring (one for each of its streams) -> context, in turn by time slices -> the card

A ring is a queue of launched kernels that outlives its process's will: a process that is frozen stops launching, and
what it has launched runs on. That residue, the drain, is what this model is for. Times are whole nanoseconds and the
caller's: nothing here reads a clock, so the same card serves hours of virtual time and a daemon in real time.

How contexts share a card: by time slices one runs at a time, and a switch costs time and cold caches; under MPS the
kernels of all clients run together as far as their shares of the SMs go, and each slows the others; MIG instances do
not meet at all. What is modelled after what is in README.md.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Mapping
from itertools import count
from typing import Literal, NamedTuple

from colocate.fakecard.power import CURVES, PowerSpec, draw, slowdown

Sharing = Literal["timeslice", "mps", "mig"]
State = Literal["running", "locking", "locked", "checkpointing", "checkpointed", "restoring", "failed"]
Callback = Callable[[], object]
SECOND, MILLISECOND, MICROSECOND = 1_000_000_000, 1_000_000, 1_000
FOREVER = 1 << 62
_DONE = 1e-6
"""Nanoseconds of work that are none: rates other than 1 leave such a rest."""


class CardSpec(NamedTuple):
    """What a card is like, as an H100 was measured (README.md). Times in nanoseconds, memory in bytes."""

    slice_ns: int = 2_090 * MICROSECOND
    """How long a context runs while another one has work; undocumented."""
    switch_ns: int = 150 * MICROSECOND
    cold: float = 0.014
    """By how much the first slice after a switch is slower, of kernels that need no memory; more where they do."""
    depth: int = 1022
    """Launches that a stream holds before the next one blocks its process."""
    launch_ns: int = 10 * MICROSECOND
    """CPU time of one launch."""
    memory_bytes: int = 24 << 30
    checkpoint_bytes_per_second: float = 20e9
    suspend_ns: int = MILLISECOND
    """Within which waves are saved when queues are suspended from outside (AMD's compute wave save and restore)."""
    power: PowerSpec = PowerSpec()


class Run:
    """Equal kernels in a row, as they were launched."""

    __slots__ = ("kernel_ns", "kernels", "slots")

    def __init__(self, kernels: int, kernel_ns: float, slots: int) -> None:
        self.kernels, self.kernel_ns, self.slots = kernels, kernel_ns, slots


class Ring:
    """The launched and unfinished kernels of one stream, in their order."""

    def __init__(self, client: Client, share: float) -> None:
        self.client, self.share = client, share
        """`share` of the SMs that its kernels fill."""
        self.runs: deque[Run] = deque()
        self.queued = 0
        """Slots of the queue that are taken: one for each kernel, one for a whole graph."""
        self.spent = 0.0
        """Of the kernel at the head, nanoseconds of work that are done."""
        self.work = 0.0
        """Nanoseconds of work that are left: the drain, if it ran alone and nothing were added."""
        self.launched = self.finished = 0
        """Kernels since the stream was made."""
        self._watched: list[tuple[int, int, Callback]] = []

    def watch(self, finished: int, callback: Callback) -> None:
        """Call once so many of its kernels have finished."""
        heapq.heappush(self._watched, (finished, next(_order), callback))

    def forget(self) -> list[Callback]:
        """All that is launched, as when a process dies or faults; who waited for it."""
        waited, self._watched = [callback for _, _, callback in self._watched], []
        self.runs.clear()
        self.queued, self.spent, self.work = 0, 0.0, 0.0
        return waited

    def until_watched(self) -> float:
        """Nanoseconds of its own work until the next thing that somebody waits for, at most until it is empty."""
        if not self._watched:
            return self.work
        missing = self._watched[0][0] - self.finished
        found = -self.spent
        for run in self.runs:
            taken = min(missing, run.kernels)
            found += taken * run.kernel_ns
            missing -= taken
            if not missing:
                break
        return max(found, 0.0)

    def progress(self, work: float) -> list[Callback]:
        """So much of its work is done; who waited for that."""
        self.spent += work
        self.work = max(self.work - work, 0.0)
        while self.runs:
            head = self.runs[0]
            kernels = head.kernels if head.kernel_ns <= _DONE else int((self.spent + _DONE) // head.kernel_ns)
            kernels = min(kernels, head.kernels)
            if not kernels:
                break
            self.spent = max(self.spent - kernels * head.kernel_ns, 0.0)
            self.finished += kernels
            slots = kernels if head.slots == head.kernels else head.slots * (kernels == head.kernels)
            self.queued -= slots
            head.kernels -= kernels
            head.slots -= slots
            if head.kernels:
                break
            self.runs.popleft()
        if not self.runs:
            self.spent = self.work = 0.0
        due = []
        while self._watched and self._watched[0][0] <= self.finished:
            due.append(heapq.heappop(self._watched)[2])
        return due


class Client:
    """One process with a context on the card."""

    def __init__(self, card: Card, pid: int, kind: str, group: str) -> None:
        self.card, self.pid, self.kind, self.group = card, pid, kind, group
        """`group` is the cgroup by which its memory is limited."""
        self.rings: dict[int, Ring] = {}
        self.memory = self.on_host = 0
        """Bytes on the card, and bytes that a checkpoint has taken to the host."""
        self.busy_ns = 0.0
        """Time in which kernels of its ran, the sum over all of its life."""
        self.state: State = "running"
        self.suspended = False
        self.on_unlock: list[Callback] = []
        """Whoever waits to launch."""

    def ring(self, stream: int = 0, share: float = 1.0) -> Ring:
        """One of its streams, made when it is first asked for."""
        if stream not in self.rings:
            self.rings[stream] = Ring(self, share)
        return self.rings[stream]

    @property
    def work(self) -> float:
        """Nanoseconds of launched work that are left."""
        return sum(ring.work for ring in self.rings.values())


class _Context:
    """Whose rings run together: one client's, or under MPS all clients' of the server."""

    def __init__(self) -> None:
        self.clients: list[Client] = []

    def rings(self) -> list[Ring]:
        """Those with work that may run."""
        return [r for c in self.clients if not c.suspended for r in c.rings.values() if r.runs]


class _Instance:
    """What contexts share by time slices: the whole card, or a MIG instance."""

    def __init__(self, card: Card) -> None:
        self._card = card
        self.contexts: list[_Context] = []
        self._current: _Context | None = None
        """Whose turn it is, or was last."""
        self._idle = True
        self._ends = 0
        """When the current slice ends; slices follow each other whether somebody else has work or not."""
        self._begins = 0
        """When the current context can run: a switch takes time."""
        self._cold_until = 0
        self._running: list[Ring] = []
        self._rates: list[float] = []

    def plan(self, at: int) -> int:
        """Choose who runs from now on; when that may change by itself."""
        ready = [(c, rings) for c in self.contexts if (rings := c.rings())]
        self._running, self._rates = [], []
        if not ready:
            self._idle = True
            return FOREVER
        spec = self._card.spec
        mine = next((rings for c, rings in ready if c is self._current), None)
        if mine is not None and self._idle:
            self._begins, self._ends = at, at + spec.slice_ns
        elif mine is not None and at > self._ends:
            self._ends += -((self._ends - at) // spec.slice_ns) * spec.slice_ns
        if mine is None or (at == self._ends and len(ready) > 1):
            mine = self._switch(at, ready)
        self._idle = False
        until = self._ends if len(ready) > 1 else FOREVER
        if at < self._begins:
            return min(until, self._begins)
        cold = at < self._cold_until
        self._running, self._rates = mine, self._rates_of(mine, 1.0 / (1.0 + spec.cold) if cold else 1.0)
        for ring, rate in zip(mine, self._rates, strict=True):
            until = min(until, at + math.ceil(ring.until_watched() / rate - _DONE))
        return max(min(until, self._cold_until) if cold else until, at)

    def _switch(self, at: int, ready: list[tuple[_Context, list[Ring]]]) -> list[Ring]:
        """To the next one in turn that has work."""
        spec, before = self._card.spec, self._current
        first = self.contexts.index(before) + 1 if before in self.contexts else 0
        order = {id(c): i for i, c in enumerate(self.contexts[first:] + self.contexts[:first])}
        self._current, rings = min(ready, key=lambda one: order[id(one[0])])
        self._begins = at + (spec.switch_ns if before is not None else 0)
        self._ends = self._begins + spec.slice_ns
        self._cold_until = self._ends if before is not None else at
        return rings

    def _rates_of(self, rings: list[Ring], speed: float) -> list[float]:
        """How fast each runs: as the cap and their shares of the SMs allow, slowed by kinds that run beside it."""
        if len(rings) == 1:
            return [speed * self._card.speed_of(rings[0].client.kind)]
        together = speed * min(1.0, 1.0 / sum(r.share for r in rings))
        kinds, slower = [r.client.kind for r in rings], self._card.interference
        return [
            together
            * self._card.speed_of(kind)
            / math.prod(slower.get((kind, k), 1.0) for j, k in enumerate(kinds) if j != i)
            for i, kind in enumerate(kinds)
        ]

    @property
    def busy(self) -> bool:
        """Whether kernels run, as planned last."""
        return bool(self._running)

    @property
    def share(self) -> float:
        """Of the SMs that the kernels which run now fill."""
        return sum(r.share for r in self._running)

    def progress(self, nanoseconds: int) -> list[Callback]:
        """Those who run do so for so long; who waited for what they finish."""
        due: list[Callback] = []
        for client in {id(r.client): r.client for r in self._running}.values():
            client.busy_ns += nanoseconds
        for ring, rate in zip(self._running, self._rates, strict=True):
            due += ring.progress(nanoseconds * rate)
        return due


class Card:
    """A card and everything on it. `run_until` lets time pass; everything else happens at `now`."""

    def __init__(
        self,
        spec: CardSpec | None = None,
        sharing: Sharing = "timeslice",
        interference: Mapping[tuple[str, str], float] | None = None,
    ) -> None:
        """`interference`: (kind, kind beside it) -> by how much the one is slower, where they run at once (MPS)."""
        self.spec, self.sharing, self.interference = spec or CardSpec(), sharing, dict(interference or {})
        self.now = 0
        self.clients: dict[int, Client] = {}
        self.limits: dict[str, int] = {}
        """Group -> bytes that its clients may have together."""
        self.busy_ns = 0.0
        """Time in which kernels of anybody ran."""
        self.limit_watts = self.spec.power.greatest
        self.energy_joules = 0.0
        """Drawn since it was made."""
        self._instances: list[_Instance] = [] if sharing == "mig" else [_Instance(self)]
        self._timers: list[tuple[int, int, Callback]] = []

    # time

    def at(self, when: int, callback: Callback) -> None:
        """Call then; at once if that has passed."""
        heapq.heappush(self._timers, (max(when, self.now), next(_order), callback))

    def after(self, nanoseconds: float, callback: Callback) -> None:
        """Call so much later."""
        self.at(self.now + math.ceil(nanoseconds), callback)

    def run_until(self, end: int) -> None:
        """Let time pass, event by event."""
        while True:
            upto = self.next_event
            step = min(upto, end) - self.now
            self.now += step
            due: list[Callback] = []
            self.busy_ns += step * any(i.busy for i in self._instances)
            self.energy_joules += step / SECOND * self.watts
            for instance in self._instances:
                due += instance.progress(step)
            while self._timers and self._timers[0][0] <= self.now:
                due.append(heapq.heappop(self._timers)[2])
            for callback in due:
                callback()
            if upto > end or (upto == end and not due):
                return

    @property
    def next_event(self) -> int:
        """When something happens by itself next; far away if nothing does."""
        timer = self._timers[0][0] if self._timers else FOREVER
        return min([timer, *(i.plan(self.now) for i in self._instances)])

    # power

    def limit(self, watts: float) -> bool:
        """Set its power limit; False of one that its driver does not take."""
        if not self.spec.power.least <= watts <= self.spec.power.greatest:
            return False
        self.limit_watts = watts
        return True

    def speed_of(self, kind: str) -> float:
        """Of kernels of a kind of client, 1 without a limit: each has its own curve, or the card's."""
        if self.limit_watts >= self.spec.power.greatest:
            return 1.0
        curve = CURVES.get(kind, self.spec.power.curve)
        return 1.0 / (1.0 + slowdown(curve, self.limit_watts / self.spec.power.greatest))

    @property
    def watts(self) -> float:
        """What it draws now, as planned last."""
        running = [i.share for i in self._instances if i.busy]
        return draw(self.spec.power, self.limit_watts, sum(running)) if running else self.spec.power.idle

    # clients

    def open(self, pid: int, kind: str = "", group: str = "") -> Client:
        """A process makes its context. Raises ValueError of a pid that has one."""
        if pid in self.clients:
            raise ValueError(f"process {pid} has a context already")
        client = self.clients[pid] = Client(self, pid, kind, group)
        if self.sharing == "mig":
            self._instances.append(_Instance(self))
        contexts = self._instances[-1].contexts
        if self.sharing != "mps" or not contexts:
            contexts.append(_Context())
        contexts[-1].clients.append(client)
        return client

    def close(self, client: Client) -> None:
        """It ends: what it has launched and allocated is gone."""
        for ring in client.rings.values():
            ring.forget()
        self.clients.pop(client.pid, None)
        for instance in self._instances:
            for context in instance.contexts:
                if client in context.clients:
                    context.clients.remove(client)
            instance.contexts = [c for c in instance.contexts if c.clients]

    def fault(self, client: Client) -> list[Client]:
        """A fatal fault: under MPS of all clients at once (NVIDIA's MPS documentation). Whom it met."""
        met = list(self.clients.values()) if self.sharing == "mps" else [client]
        for one in met:
            one.state = "failed"
            told, one.on_unlock = one.on_unlock, []
            for ring in one.rings.values():
                told += ring.forget()
            for callback in told:  # whatever it waits for returns, with an error
                self.after(0, callback)
        return met

    # launches

    def launch(self, ring: Ring, kernels: int, kernel_ns: float, *, graph: bool = False) -> int:
        """Queue equal kernels, or one graph of them, as far as there is room; how many were taken.

        A graph takes one slot. What is launched faster than it runs cannot run faster than it is launched.
        """
        if ring.client.state != "running":
            return 0
        if graph:
            if ring.queued >= self.spec.depth:
                return 0
            slots = 1
        else:
            kernels = slots = min(kernels, self.spec.depth - ring.queued)
            kernel_ns = max(kernel_ns, self.spec.launch_ns)
        if kernels <= 0:
            return 0
        ring.runs.append(Run(kernels, kernel_ns, slots))
        ring.queued += slots
        ring.work += kernels * kernel_ns
        ring.launched += kernels
        return kernels

    def retract(self, ring: Ring, kernels: int) -> int:
        """Take back the last kernels, which were queued ahead of their launch; how many had not begun."""
        taken = 0
        while taken < kernels and ring.runs:
            last = ring.runs[-1]
            begun = 1 if len(ring.runs) == 1 and ring.spent > 0.0 else 0
            some = min(kernels - taken, last.kernels - begun)
            if last.slots != last.kernels or some <= 0:
                break
            last.kernels -= some
            last.slots -= some
            ring.queued -= some
            ring.launched -= some
            ring.work = max(ring.work - some * last.kernel_ns, 0.0)
            taken += some
            if not last.kernels:
                ring.runs.pop()
        return taken

    # memory

    @property
    def memory_free(self) -> int:
        """Bytes."""
        return self.spec.memory_bytes - sum(c.memory for c in self.clients.values())

    def allocate(self, client: Client, size: int) -> bool:
        """False where the card or the limit of its group has no room."""
        used = sum(c.memory for c in self.clients.values() if c.group == client.group)
        if size > self.memory_free or used + size > self.limits.get(client.group, FOREVER):
            return False
        client.memory += size
        return True

    def release(self, client: Client, size: int) -> None:
        """Give memory back."""
        client.memory = max(client.memory - size, 0)

    # what is done to a client from outside

    def lock(self, client: Client, done: Callback) -> bool:
        """No further launches; `done` once everything launched has finished. False if it is in another state."""
        if client.state != "running":
            return False
        client.state = "locking"

        def locked() -> None:
            if client.state == "locking" and not client.work:
                client.state = "locked"
                done()

        busy = [ring for ring in client.rings.values() if ring.runs]
        for ring in busy:
            ring.watch(ring.launched, locked)
        if not busy:
            self.after(0, locked)
        return True

    def unlock(self, client: Client) -> bool:
        """Launches go on."""
        if client.state not in ("locking", "locked"):
            return False
        client.state = "running"
        waiting, client.on_unlock = client.on_unlock, []
        for callback in waiting:
            self.after(0, callback)
        return True

    def checkpoint(self, client: Client, done: Callback) -> bool:
        """Its memory goes to the host, from the locked state only (cuda-checkpoint)."""
        if client.state != "locked":
            return False
        client.state = "checkpointing"
        moved = client.memory

        def finished() -> None:
            client.state, client.on_host = "checkpointed", moved
            client.memory = 0
            done()

        self.after(moved / self.spec.checkpoint_bytes_per_second * SECOND, finished)
        return True

    def restore(self, client: Client, done: Callback) -> bool:
        """Its memory comes back, and it is locked as before; False where there is no room for it."""
        if client.state != "checkpointed" or not self.allocate(client, client.on_host):
            return False
        client.state = "restoring"

        def finished() -> None:
            client.state, client.on_host = "locked", 0
            done()

        self.after(client.on_host / self.spec.checkpoint_bytes_per_second * SECOND, finished)
        return True

    def suspend(self, client: Client) -> None:
        """Its waves are saved wherever they are, and go on from there when it is resumed (AMD SUSPEND_QUEUES)."""
        self.after(self.spec.suspend_ns, lambda: setattr(client, "suspended", True))

    def resume(self, client: Client) -> None:
        """Undo `suspend`."""
        self.after(self.spec.suspend_ns, lambda: setattr(client, "suspended", False))


_order = count()
