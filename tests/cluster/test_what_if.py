"""What `what-if` says of a gang is what becomes of it, on a real API server, in states that were drawn."""

from __future__ import annotations

import asyncio
import random
import time
from typing import NamedTuple

import pytest

from colocate.kube.client import PODS
from colocate.objects import Container, ObjectMeta, Pod, PodSpec, Resources
from podgroup.api import POD_GROUP_LABEL, PodGroup, PodGroupSpec
from podgroup.commands import _take
from podgroup.controller.loop import Controller
from podgroup.explain.snapshot import what_if
from podgroup.queue.entry import REQUIRED_TOPOLOGY, Settings
from tests.cluster.conftest import HIGH, LOW, PRIORITIES, QUIET, World, leader

RACK = "topology.kubernetes.io/rack"


class Asked(NamedTuple):
    """A gang: so many members of so many CPUs, its quorum, its priority, and whether it must be in one rack."""

    name: str
    size: int
    least: int
    cpu: int
    priority: str
    racked: bool

    @property
    def members(self) -> list[str]:
        return [f"{self.name}-{i}" for i in range(self.size)]

    @property
    def annotations(self) -> dict[str, str]:
        return {REQUIRED_TOPOLOGY: RACK} if self.racked else {}

    def pods(self, world: World) -> list[Pod]:
        """As `what-if` is given them."""
        container = Container(resources=Resources(requests={"cpu": str(self.cpu)}))
        spec = PodSpec(scheduler_name="colocate", priority=PRIORITIES[self.priority], containers=[container])
        labels = {POD_GROUP_LABEL: self.name}
        return [
            Pod(metadata=ObjectMeta(name=n, namespace=world.namespace, uid=f"asked-{n}", labels=labels), spec=spec)
            for n in self.members
        ]

    def group(self, world: World) -> PodGroup:
        meta = ObjectMeta(name=self.name, namespace=world.namespace, annotations=self.annotations)
        return PodGroup(metadata=meta, spec=PodGroupSpec(min_member=self.least))


def drawn(generator: random.Random, name: str) -> Asked:
    size = generator.randint(1, 4)
    priority, racked = generator.choice([LOW, LOW, HIGH]), generator.random() < 0.25
    return Asked(name, size, generator.randint(1, size), generator.randint(1, 3), priority, racked)


async def create(world: World, gang: Asked, led: Controller) -> None:
    """The pods first: they wait for their group, and all of them are decided about at once."""
    for name in gang.members:
        await world.pod(name, gang.name, cpu=gang.cpu, spec={"priorityClassName": gang.priority})
    await world.known(led, gang.name, len(gang.members))
    await world.group(gang.name, gang.least, annotations=gang.annotations)


FOR_ROOM = frozenset({"Unschedulable", "SurplusWaits", "BehindReservation", "NotEnoughMembers"})
"""What a gang is told for as long as nothing changes; `PodGroupNotFound` is of before it was created."""


async def settled(world: World, gangs: list[Asked]) -> None:
    """Every gang runs or is told why it, or what it is short of, waits; nobody is leaving; and that for a moment."""
    since: list[tuple[object, float]] = []

    async def at_rest() -> bool:
        pods = await world.pods()
        seen: list[object] = []
        for gang in gangs:
            there = [p for name, p in pods.items() if name in gang.members]
            status = (await world.plan(gang.name)).status if there else None
            bound = sum(bool(p.spec.node_name) for p in there)
            waits = status is not None and status.waits and status.reason in FOR_ROOM
            runs = status is not None and status.phase == "Running" and bound >= min(gang.least, len(there))
            seen.append((bound, status and (status.phase, status.reason)))
            if there and not (waits or (runs and bound == len(there))):
                since.clear()
                return False
        if any(p.deleting for p in pods.values()):
            since.clear()
            return False
        if not since or since[0][0] != seen:
            since[:] = [(seen, time.monotonic())]
        return time.monotonic() - since[0][1] >= QUIET

    await world.until(at_rest, "all gangs are at rest")


async def one_state(world: World, seed: int, led: Controller) -> str:
    """A state, what is said of a gang in it, and what then happens; the outcome."""
    generator, gangs = random.Random(seed), list[Asked]()
    for i in range(generator.randint(2, 4)):
        await world.node(f"s{seed}-n{i}", {RACK: f"s{seed}-r{i % 2}"}, cpu=generator.randint(1, 5), memory="8Gi")
    await world.settled()
    for i in range(generator.randint(0, 4)):
        gangs.append(drawn(generator, f"g{i}"))
        await create(world, gangs[-1], led)
        await settled(world, gangs)
    bound = await world.bound()
    if bound and generator.random() < 0.4:  # one is lost: its place is kept for a while
        await world.delete(PODS, generator.choice(sorted(bound)), 0)
        await settled(world, gangs)
    new = drawn(generator, "new")
    before = await world.pods()
    snapshot = await _take(world.api, Settings())
    (said,) = what_if(snapshot, new.pods(world), [new.group(world)])
    await create(world, new, led)
    what = f"state {seed}: {new}; {gangs}; said {said}"
    if said.outcome == "Wait":
        await world.told("new", said.reason)
        assert not set(new.members) & (await world.bound()).keys(), what
        return said.outcome
    wanted = {m.name for m in said.members}

    async def there() -> bool:
        return wanted <= (await world.bound()).keys()

    await world.until(there, what)
    await asyncio.sleep(QUIET)
    bound = await world.bound()
    mine = {n: bound[n] for n in new.members if n in bound}
    assert mine.keys() == wanted, what
    if said.outcome == "Start":  # a gang that others make room for starts as soon as enough of it is there
        assert mine == {m.name: m.node for m in said.members}, what
    gone = {f"{world.namespace}/{n}" for n in before if n not in await world.pods()}
    assert gone == set(said.victims), what
    return said.outcome


@pytest.mark.parametrize(
    "states",
    [pytest.param(12, id="twelve states"), pytest.param(30, id="thirty states", marks=pytest.mark.slow)],
)
async def test_what_is_said_is_what_happens(world: World, states: int) -> None:
    outcomes: dict[str, int] = {}
    for i in range(states):
        seed = i if states <= 12 else 1000 + i
        async with leader(world) as led:
            outcome = await one_state(world, seed, led)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        await world.clear()
    assert {"Start", "Wait"} <= outcomes.keys(), outcomes
    assert states <= 12 or "Preempt" in outcomes, outcomes
