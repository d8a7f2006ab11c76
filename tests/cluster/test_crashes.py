"""A controller that dies, or sleeps through its lease, at each write that matters: the successor brings the same about.

Seen from the API server a killed process is one of which nothing more is heard: the proxy stands between the first
controller and the server, and from write `index` on lets nothing through (before), nothing back (after), or everything
only when another leads (late). `test_faults.py` kills a real process at some of these.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

import pytest

from colocate.kube.client import Api
from colocate.kube.lease import Election, LeadershipLost
from colocate.objects import Lease
from podgroup.controller.loop import Controller
from podgroup.queue.entry import Settings
from tests.cluster.conftest import HIGH, LOW, PATIENCE, World
from tests.cluster.proxy import Proxy, Request, healthy
from tests.cluster.test_gangs import CASES, create
from tests.cluster.test_volumes import LOCAL, Stored, need_class

SILENT_SECONDS = 1.5
"""When all is done, and no write has come for so long, there are no more."""
LEASE_SECONDS = 1.0
MOST_WRITES, MOST_LOST = 60, 10


class Successor(Election):
    """A candidate for whom the lease of a dead leader has run out already, as it would after its seconds."""

    def _expired(self, lease: Lease) -> bool:
        return True


class Scenario(NamedTuple):
    """What is there before the first controller starts, and what must have come of it."""

    create: Callable[[World], Awaitable[None]]
    bound: set[str]
    clear: Callable[[World], Awaitable[None]] | None = None


def of_table(name: str) -> Scenario:
    case = next(c for key, c in CASES.items() if key.startswith(f"{name} "))

    async def make(world: World) -> None:
        await create(world, case)
        await world.node("n", memory=300, cpu=4, pods=32)

    return Scenario(make, case.bound)


async def nodes(world: World, count: int, cpu: int = 1) -> None:
    for i in range(count):
        await world.node(f"n{i}", cpu=cpu, memory="1Gi")


async def gang(world: World, name: str, least: int, size: int, priority: str = LOW, cpu: int = 1) -> None:
    await world.group(name, least)
    for i in range(size):
        await world.pod(f"{name}-{i}", name, cpu=cpu, spec={"priorityClassName": priority})


async def elastic(world: World) -> None:
    """N4: the quorum, and as much of the surplus as there is room for."""
    await nodes(world, 4)
    await gang(world, "pg", 2, 3)


async def big_and_small(world: World) -> None:
    """T11: the big gang fails and blocks nobody."""
    await nodes(world, 3, cpu=2)
    await gang(world, "big", 6, 6, cpu=2)
    await gang(world, "small", 1, 1, cpu=2)


async def preemption(world: World) -> None:
    """V5: a running gang gives way as a whole."""
    await nodes(world, 2)
    await world.group("low", 2)
    for i in range(2):
        pin = {"priorityClassName": LOW, "nodeName": f"n{i}"}
        await world.pod(f"low-{i}", "low", cpu=1, spec=pin)
    await gang(world, "high", 2, 2, HIGH)


async def volumes(world: World) -> None:
    """A volume for each of two claims, on different nodes: kept for them, bound, and only then the members."""
    await nodes(world, 2)
    await need_class(world.api, LOCAL)
    await world.group("pg", 2)
    made = Stored(world.api, world.namespace)
    made.owner = world.owner
    for i in range(2):
        await made.volume(f"on-{i}", f"n{i}")
        await made.member(f"pg-{i}", LOCAL, "pg")


async def without_volumes(world: World) -> None:
    await Stored(world.api, world.namespace).without_volumes()


SCENARIOS = {
    **{name: of_table(name) for name in ("T1", "T2", "T3", "T4", "T6", "T9")},
    "T11": Scenario(big_and_small, {"small-0"}),
    "N4": Scenario(elastic, {"pg-0", "pg-1", "pg-2"}),
    "V5": Scenario(preemption, {"high-0", "high-1"}),
    "volumes": Scenario(volumes, {"pg-0", "pg-1"}, without_volumes),
}


def matters(request: Request) -> bool:
    """Writes that decide something: plans, binds, stamps and deletions; not what users are told."""
    return request.number >= 0 and not request.path.endswith(("/status", "/events"))


class Cut:
    """The fault: from the write `index` on."""

    def __init__(self, index: int, when: str) -> None:
        self.index, self.when, self.seen = index, when, 0
        self.held: set[int] = set()
        """Numbers of the binds that are held back."""
        self.reached, self.release = asyncio.Event(), asyncio.Event()
        self.last = asyncio.get_running_loop().time()

    async def __call__(self, request: Request) -> str:
        here = False
        if matters(request):
            self.last = asyncio.get_running_loop().time()
            here, self.seen = self.seen == self.index, self.seen + 1
            if here:
                self.reached.set()
        if not self.reached.is_set():
            return "pass"
        if self.when == "late":
            if request.path.endswith("/binding"):
                self.held.add(request.number)
            await self.release.wait()
            return "pass"
        return "act" if here and self.when == "after" else "drop"

    async def wait(self, leading: asyncio.Future[Any], done: Callable[[], Awaitable[bool]]) -> bool:
        """Whether the write has come; False once no more come. Raises LeadershipLost, on a busy machine."""
        while not self.reached.is_set():
            if leading.done():
                leading.result()
            silent = asyncio.get_running_loop().time() - self.last
            if silent > SILENT_SECONDS and (silent > PATIENCE or await done()):
                return False
            await asyncio.sleep(0.02)
        return True


@contextlib.asynccontextmanager
async def controller(
    api: Api, namespace: str, lease: str, kind: type[Election], seconds: float
) -> AsyncIterator[asyncio.Future[Any]]:
    election = kind(api, namespace, lease, f"{lease}-{kind.__name__}", seconds)
    task = asyncio.ensure_future(election.lead(Controller(api, Settings(), election).run))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def one_write(
    world: World, proxy: Proxy, scenario: Scenario, index: int, when: str, lease: str
) -> tuple[bool, int]:
    """The fault at one write: whether it was reached, and how many late binds were refused. Raises LeadershipLost."""
    await scenario.create(world)
    cut, refused = Cut(index, when), 0
    proxy.fault = cut

    async def done() -> bool:
        return scenario.bound <= (await world.bound()).keys()

    async def answered() -> bool:
        return cut.held <= {r.number for r, _ in proxy.answers}

    async with Api.connect(str(proxy.kubeconfig())) as through:
        seconds = LEASE_SECONDS if when == "late" else 10.0  # else it is taken over before it has run out
        async with controller(through, world.namespace, lease, Election, seconds) as leading:
            reached = await cut.wait(leading, done)
            if when != "late":
                leading.cancel()
                await asyncio.gather(leading, return_exceptions=True)
            kind = Election if when == "late" else Successor
            async with controller(world.api, world.namespace, lease, kind, 10.0):
                if reached or when != "late":
                    await world.until_bound(*scenario.bound)
                cut.release.set()
                if reached and when == "late":
                    await world.until(answered, "the late binds have reached the server")
                    late = [status for r, status in proxy.answers if r.number in cut.held]
                    assert set(late) <= {409}, f"a late bind was accepted at write {index}"
                    refused = len(late)
                    await world.only_bound(*scenario.bound)
    return reached, refused


RARE = ("T1", "T2", "T4", "T6", "T9")
"""What they write is written in the others too."""


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after", "late"])
@pytest.mark.parametrize(
    "scenario",
    [pytest.param(s, id=name, marks=[pytest.mark.rare] * (name in RARE)) for name, s in SCENARIOS.items()],
)
async def test_a_successor_brings_about_the_same_at_every_write(
    world: World, proxy: Proxy, scenario: Scenario, when: str
) -> None:
    refused, index, lost = 0, 0, 0
    while index < MOST_WRITES:
        reached: bool | None = None
        try:
            reached, late = await one_write(world, proxy, scenario, index, when, f"at-{index}-{lost}")
        except LeadershipLost:  # a lease of a second, on a busy machine: once more
            lost += 1
            assert lost <= MOST_LOST, "the machine is too busy for a lease of a second"
        proxy.fault = healthy
        await world.clear()
        if scenario.clear is not None:
            await scenario.clear(world)
        if reached is None:
            continue
        if not reached:
            assert index >= len(scenario.bound), "each bind is a write that decides something"
            assert bool(refused) == (when == "late"), "each bind was late once"
            return
        refused, index = refused + late, index + 1
    raise AssertionError(f"more than {MOST_WRITES} writes")
