"""Processes of the virtual card: programs that launch kernels, and what a freeze, a lock or a kill makes of them.

A program is a generator that yields what it does next and is sent what came of it. What it launches is on the card from
then on; that it launches at all needs its CPU, so a frozen process stops in the middle of its launches, and between two
of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from functools import partial
from typing import Any, NamedTuple

from colocate.fakecard.card import Card, Client


class Cpu(NamedTuple):
    """Compute on the CPU."""

    nanoseconds: float


class Sleep(NamedTuple):
    """Wait; that time passes for a frozen process too."""

    nanoseconds: float


class Launch(NamedTuple):
    """Launch equal kernels, or one graph of them."""

    kernels: int
    kernel_ns: float
    stream: int = 0
    graph: bool = False


class Sync(NamedTuple):
    """Wait until all that it has launched has finished."""


class Malloc(NamedTuple):
    """Allocate on the card; sent whether that was possible."""

    size: int


class Free(NamedTuple):
    """Give memory back."""

    size: int


class Get(NamedTuple):
    """Take the next item from a mailbox, once there is one."""

    mailbox: Mailbox


Step = Cpu | Sleep | Launch | Sync | Malloc | Free | Get
Program = Generator[Step, Any, None]


class Mailbox:
    """Requests that wait for whoever serves them."""

    def __init__(self) -> None:
        self.items: deque[Any] = deque()
        self._readers: deque[Callable[[], None]] = deque()

    def put(self, item: Any) -> None:
        """One more."""
        self.items.append(item)
        if self._readers:
            self._readers.popleft()()

    def wake(self, reader: Callable[[], None]) -> None:
        """Call once there is an item."""
        self._readers.append(reader)


class Process:
    """A program that runs on a card. `spins`: a wait for the card, or a full queue, costs CPU (CUDA's default)."""

    def __init__(
        self,
        card: Card,
        pid: int,
        program: Program,
        *,
        kind: str = "",
        group: str = "",
        share: float = 1.0,
        spins: bool = True,
        always_spins: bool = False,
    ) -> None:
        self.card, self.pid, self.program = card, pid, program
        self.client: Client = card.open(pid, kind, group)
        self.share, self.frozen, self.ended = share, False, False
        self._spins, self._always = spins, always_spins
        """`always_spins`: also while it waits for work, as some servers do."""
        self._cpu_ns = 0.0
        self._on_cpu_since: int | None = None
        self._turn = 0
        """Whatever was to come back to an earlier turn is no longer waited for."""
        self._held: Callable[[], None] | None = None
        """What it does when it is thawed."""
        self._interrupt: Callable[[], Callable[[], None]] | None = None
        """Of what needs its own CPU: end that here; how it goes on from here."""
        self._launching = self._waits_busily = False
        self._lock_asked: Callable[[], object] | None = None
        card.after(0, lambda: self._go_on(None))

    @property
    def cpu_ns(self) -> float:
        """CPU time so far."""
        running = self.card.now - self._on_cpu_since if self._on_cpu_since is not None else 0
        return self._cpu_ns + running

    def freeze(self) -> None:
        """It does nothing more; what it has launched runs on."""
        if not self.frozen:
            self._held = self._halt() if self._interrupt is not None else None
            self._on_cpu(False)
            self.frozen = True

    def thaw(self) -> None:
        """It goes on where it was."""
        if not self.frozen:
            return
        self.frozen = False
        asked, self._lock_asked = self._lock_asked, None
        if asked is not None:
            self.lock(asked)
        held, self._held = self._held, None
        if held is not None:
            held()
        else:
            self._on_cpu(self._waits_busily)

    def lock(self, done: Callable[[], object]) -> None:
        """Block its launches, and tell when the card has nothing of it left. A frozen process never answers."""
        if self.frozen:
            self._lock_asked = done
            return
        again = self._halt() if self._launching else None
        self.card.lock(self.client, done)
        if again is not None:
            again()

    def _halt(self) -> Callable[[], None]:
        interrupt, self._interrupt, self._launching = self._interrupt, None, False
        assert interrupt is not None
        self._turn += 1
        return interrupt()

    def kill(self) -> None:
        """SIGKILL: gone with all it has on the card."""
        self._turn += 1
        self._on_cpu(False)
        self.ended = True
        self.card.close(self.client)

    # one step after the other

    def _on_cpu(self, busy: bool) -> None:
        if self._on_cpu_since is not None:
            self._cpu_ns += self.card.now - self._on_cpu_since
        self._on_cpu_since = self.card.now if busy else None

    def _wait(self, busy: bool) -> None:
        """For somebody else; `busy`: at the cost of CPU."""
        self._waits_busily = busy or self._always
        self._on_cpu(self._waits_busily)

    def _later(self, action: Callable[[], None]) -> Callable[[], None]:
        """Do it when it comes, or when the process is thawed then; not if its turn is over."""
        turn = self._turn

        def come() -> None:
            if turn != self._turn:
                return
            if self.frozen:
                self._held = action
            else:
                action()

        return come

    def _go_on(self, sent: Any) -> None:
        self._turn += 1
        self._interrupt, self._launching = None, False
        if self.client.state == "failed":
            self.kill()
            return
        try:
            step = self.program.send(sent)
        except StopIteration:
            self.kill()
            return
        self._begin(step)

    def _begin(self, step: Step) -> None:
        match step:
            case Cpu(nanoseconds):
                self._compute(nanoseconds)
            case Sleep(nanoseconds):
                self._wait(False)
                self.card.after(nanoseconds, self._later(lambda: self._go_on(None)))
            case Launch():
                self._launch(step, step.kernels)
            case Sync():
                self._wait(self._spins)
                self._sync()
            case Malloc(size):
                self._go_on(self.card.allocate(self.client, size))
            case Free(size):
                self.card.release(self.client, size)
                self._go_on(None)
            case Get(mailbox):
                self._wait(False)
                self._get(mailbox)

    def _compute(self, left: float) -> None:
        began = self.card.now
        self._on_cpu(True)
        self._interrupt = lambda: partial(self._compute, max(left - (self.card.now - began), 0.0))
        self.card.after(left, self._later(lambda: self._go_on(None)))

    def _launch(self, step: Launch, left: int) -> None:
        """What there is room for is queued at once, and taken back if it is stopped before it could launch that."""
        if self.client.state == "failed":
            self._go_on(None)
            return
        ring, launch_ns = self.client.ring(step.stream, self.share), self.card.spec.launch_ns
        began = self.card.now
        queued = self.card.launch(ring, left, step.kernel_ns, graph=step.graph)
        rest = left - queued
        self._launching = True
        self._on_cpu(True)

        def interrupt() -> Callable[[], None]:
            launched = min((self.card.now - began) // launch_ns, queued) if not step.graph else queued
            taken_back = self.card.retract(ring, queued - launched)
            missing = rest + taken_back
            if rest and not taken_back:  # the process was waiting, and launched one whenever one finished
                missing -= self.card.launch(ring, rest, step.kernel_ns, graph=step.graph)
            return partial(self._launch, step, missing) if missing else partial(self._go_on, None)

        self._interrupt = interrupt
        if not rest:
            self.card.after((1 if step.graph else queued) * launch_ns, self._later(lambda: self._go_on(None)))
        elif self.client.state != "running":
            self._wait(False)  # a lock blocks without CPU
            self._interrupt = lambda: partial(self._launch, step, left)
            self.client.on_unlock.append(self._later(partial(self._launch, step, left)))
        else:
            self._wait(self._spins)
            room = min(rest, self.card.spec.depth // 2)
            target = ring.finished + (room if not step.graph else ring.runs[0].kernels)
            ring.watch(target, self._later(partial(self._launch, step, rest)))

    def _sync(self) -> None:
        ring = next((r for r in self.client.rings.values() if r.runs), None)
        if ring is None:
            self._go_on(None)
        else:
            ring.watch(ring.launched, self._later(self._sync))

    def _get(self, mailbox: Mailbox) -> None:
        if mailbox.items:
            self._go_on(mailbox.items.popleft())
        else:
            mailbox.wake(self._later(lambda: self._get(mailbox)))
