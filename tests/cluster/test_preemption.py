"""Preemption of whole gangs: the cases of Volcano's gangevict suite (V), of native gangs (N7-N11) and of Kueue (K)."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from colocate.kube.client import PODS
from tests.cluster.conftest import HIGH, LOW, LOWEST, MID, POLITE, World, leader

GPU = "nvidia.com/gpu"


class Gang(NamedTuple):
    """So many members of one CPU, the quorum, and a priority class."""

    size: int
    least: int
    priority: str


class Case(NamedTuple):
    """What runs on four slots of one CPU, what arrives, and how many members of each are bound in the end.

    A set says: these counts, in some order.
    """

    running: dict[str, Gang]
    arriving: Gang
    arrived: int
    left: dict[str, int] | tuple[int, ...]


SLOTS = {
    "V1 surplus members give way, the quorum stays": Case({"a": Gang(4, 2, LOW)}, Gang(2, 2, HIGH), 2, {"a": 2}),
    "V2 surplus of two gangs before the quorum of one": Case(
        {"a": Gang(2, 1, LOW), "b": Gang(2, 1, LOW)}, Gang(2, 2, HIGH), 2, {"a": 1, "b": 1}
    ),
    "V3 exactly one of two gangs is broken": Case(
        {"a": Gang(2, 2, LOW), "b": Gang(2, 2, LOW)}, Gang(2, 2, HIGH), 2, (0, 2)
    ),
    "V4 both, if both are needed": Case(
        {"a": Gang(2, 2, LOW), "b": Gang(2, 2, LOW)}, Gang(4, 4, HIGH), 4, {"a": 0, "b": 0}
    ),
    "V5 a gang is never half broken": Case({"a": Gang(4, 4, LOW)}, Gang(2, 2, HIGH), 2, {"a": 0}),
    "V7 equals are not preempted": Case({"a": Gang(4, 4, MID)}, Gang(2, 2, MID), 0, {"a": 4}),
    "V8 nobody is evicted in vain": Case(
        {"a": Gang(2, 2, HIGH), "b": Gang(2, 2, LOW)}, Gang(4, 4, MID), 0, {"a": 2, "b": 2}
    ),
    "V21 a second gang of the cluster's size waits": Case({"a": Gang(4, 4, LOW)}, Gang(4, 4, LOW), 0, {"a": 4}),
    "V22 as V21, of the same priority and smaller": Case({"a": Gang(4, 4, LOW)}, Gang(1, 1, LOW), 0, {"a": 4}),
    "A9 an elastic job gives one member to a single task": Case({"a": Gang(4, 2, LOW)}, Gang(1, 1, HIGH), 1, {"a": 3}),
    "N11 of two gangs the less important one": Case(
        {"a": Gang(2, 2, LOWEST), "b": Gang(2, 2, LOW)}, Gang(2, 2, MID), 2, {"a": 0, "b": 2}
    ),
}


async def start(world: World, name: str, gang: Gang, **options: Any) -> None:
    await world.group(name, gang.least)
    for i in range(gang.size):
        await world.pod(f"{name}-{i}", name, cpu=1, spec={"priorityClassName": gang.priority}, **options)


async def counts(world: World) -> dict[str, int]:
    found: dict[str, int] = {}
    for name in await world.bound():
        found[name.rpartition("-")[0]] = found.get(name.rpartition("-")[0], 0) + 1
    return found


async def until_counts(world: World, expected: dict[str, int]) -> None:
    expected = {name: count for name, count in expected.items() if count}

    async def reached() -> bool:
        return await counts(world) == expected

    await world.until(reached, f"{expected} bound")


@pytest.mark.parametrize("case", SLOTS.values(), ids=SLOTS.keys())
async def test_four_slots(world: World, case: Case) -> None:
    for i in range(4):
        await world.node(f"n{i}", cpu=1, memory="1Gi")
    async with leader(world):
        for name, gang in case.running.items():
            await start(world, name, gang)
        await until_counts(world, {name: gang.size for name, gang in case.running.items()})
        await start(world, "new", case.arriving)
        if case.arrived:

            async def arrived() -> bool:
                return (await counts(world)).get("new") == case.arrived

            await world.until(arrived, "the new gang is bound")
        else:
            await world.told("new", "Unschedulable")
        await world.only_bound(*(await world.bound()))
        left = await counts(world)
        assert left.pop("new", 0) == case.arrived
        if isinstance(case.left, tuple):
            assert sorted(left.get(name, 0) for name in case.running) == sorted(case.left)
        else:
            assert {name: left.get(name, 0) for name in case.left} == case.left


async def test_a_victim_is_marked_so_that_its_job_does_not_count_a_failure(world: World) -> None:
    await world.node("n", played=False, cpu=1, memory="1Gi")
    async with leader(world):
        slow = {"priorityClassName": LOW, "terminationGracePeriodSeconds": 60}
        await world.pod("low", cpu=1, spec=slow)
        await world.until_bound("low")
        await start(world, "new", Gang(1, 1, HIGH))

        async def marked() -> Any:
            pod = (await world.pods())["low"]
            return pod.deleting and [c for c in pod.status.conditions if c.type == "DisruptionTarget"]

        (condition,) = await world.until(marked, "the victim is marked")
        assert condition.reason == "PreemptionByScheduler"
        await world.told("new", "WaitingForPreemption")
        await world.delete(PODS, "low", 0)
        await world.until_bound("new-0")
        said = {("low", "Scheduled"), ("low", "Preempted"), ("new-0", "Scheduled")}

        async def told() -> bool:
            return said <= await world.events_of_pods()

        await world.until(told, "kubectl describe pod shows where each was bound, and why one went")


async def test_a_pod_without_an_owner_is_never_deleted(world: World) -> None:
    await world.node("n", cpu=1, memory="1Gi")
    async with leader(world):
        await world.pod("low", cpu=1, spec={"priorityClassName": LOW}, owned=False)
        await world.until_bound("low")
        await start(world, "new", Gang(1, 1, HIGH))
        await world.told("new", "Unschedulable")
        await world.only_bound("low")


async def test_a_preemptor_that_may_not_preempt_waits(world: World) -> None:
    await world.node("n", cpu=1, memory="1Gi")
    async with leader(world):
        await world.pod("low", cpu=1, spec={"priorityClassName": LOW})
        await world.until_bound("low")
        await world.group("new", 1)
        await world.pod("new-0", "new", cpu=1, spec={"priorityClassName": POLITE})
        await world.told("new", "Unschedulable")
        await world.only_bound("low")


async def test_a_disruption_budget_is_respected(world: World) -> None:
    await world.node("n", cpu=1, memory="1Gi")
    budget = {"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": {"name": "b"}}
    budget |= {"spec": {"minAvailable": 1, "selector": {"matchLabels": {"app": "x"}}}}
    await world.create("/apis/policy/v1/poddisruptionbudgets", budget)
    async with leader(world):
        await world.pod("low", cpu=1, labels={"app": "x"}, spec={"priorityClassName": LOW})
        await world.until_bound("low")
        await start(world, "new", Gang(1, 1, HIGH))
        await world.told("new", "Unschedulable")
        await world.only_bound("low")


async def test_n7_a_pod_in_the_way_goes_and_the_surplus_is_bound_too(world: World) -> None:
    await world.node("n", cpu=4, memory="1Gi")
    async with leader(world):
        await world.pod("low", cpu=2, spec={"priorityClassName": LOWEST})
        await world.until_bound("low")
        await start(world, "new", Gang(4, 3, HIGH))
        await world.until_bound(*(f"new-{i}" for i in range(4)))


async def test_n10_pods_alone_give_way_to_quorum_and_surplus(world: World) -> None:
    await world.node("n", cpu=4, memory="1Gi")
    async with leader(world) as led:
        for i in range(4):
            await world.pod(f"low-{i}", cpu=1, spec={"priorityClassName": LOW})
        await world.until_bound(*(f"low-{i}" for i in range(4)))
        for i in range(4):
            await world.pod(f"new-{i}", "new", cpu=1, spec={"priorityClassName": HIGH})
        await world.known(led, "new", 4)
        await world.group("new", 3)
        await world.until_bound(*(f"new-{i}" for i in range(4)))


RACK = "topology.kubernetes.io/rack"


async def racks(world: World) -> None:
    for i in range(4):
        await world.node(f"n{i}", {RACK: f"r{i // 2}"}, cpu=8, memory="1Gi")


async def low_gang(world: World, least: int) -> None:
    await world.group("low", least)
    for i in range(4):
        await world.pod(f"low-{i}", "low", cpu=8, spec={"priorityClassName": LOW})
    await world.until_bound(*(f"low-{i}" for i in range(4)))


async def test_v11_and_v13_room_is_made_in_one_rack(world: World) -> None:
    await racks(world)
    async with leader(world):
        await low_gang(world, 2)
        await world.group("new", 2, annotations={"colocate.io/required-topology": RACK})
        for i in range(2):
            await world.pod(f"new-{i}", "new", cpu=8, spec={"priorityClassName": HIGH})
        await until_counts(world, {"low": 2, "new": 2})
        bound = await world.bound()
        assert {bound["new-0"], bound["new-1"]} in ({"n0", "n1"}, {"n2", "n3"})


async def test_v12_what_does_not_pack_into_a_rack_evicts_nobody(world: World) -> None:
    await racks(world)
    async with leader(world):
        await low_gang(world, 4)
        await world.group("new", 3, annotations={"colocate.io/required-topology": RACK})
        for i in range(3):
            await world.pod(f"new-{i}", "new", cpu=5, spec={"priorityClassName": HIGH})
        await world.told("new", "Unschedulable")
        await world.only_bound(*(f"low-{i}" for i in range(4)))


async def fill_of_k4(world: World) -> None:
    """Four nodes of eight GPUs, each with six important and two unimportant pods of one."""
    for i in range(4):
        await world.node(f"n{i}", nvidia_com__gpu=8, cpu=64, memory="1Gi")
        for k in range(8):
            spec = {"priorityClassName": HIGH if k < 6 else LOW, "nodeSelector": {"kubernetes.io/hostname": f"n{i}"}}
            await world.pod(f"{'high' if k < 6 else 'low'}-{i}{k}", nvidia_com__gpu=1, spec=spec)


@pytest.mark.parametrize(
    ("required", "left"), [(True, 8), (False, 0)], ids=["K4 on one host: nobody goes", "K5 anywhere: eight go"]
)
async def test_eight_gpus_of_a_gang_among_more_important_pods(world: World, required: bool, left: int) -> None:
    await fill_of_k4(world)
    async with leader(world):

        async def full() -> bool:
            return len(await world.bound()) == 32

        await world.until(full, "all are bound")
        annotations = {"colocate.io/required-topology": "kubernetes.io/hostname"} if required else {}
        await world.group("new", 8, annotations=annotations)
        for i in range(8):
            await world.pod(f"new-{i}", "new", nvidia_com__gpu=1, spec={"priorityClassName": MID})
        if not required:

            async def arrived() -> bool:
                return (await counts(world)).get("new") == 8

            await world.until(arrived, "the gang is bound")
        else:
            await world.told("new", "Unschedulable")
        await world.only_bound(*(await world.bound()))
        assert (await counts(world)).get("low", 0) == left


async def test_k16_the_two_least_important_go_and_no_more(world: World) -> None:
    await world.node("n", cpu=4, memory="1Gi")
    async with leader(world):
        for name, priority in (("low1", LOW), ("low2", LOW), ("mid", MID), ("high", HIGH)):
            await world.pod(name, cpu=1, spec={"priorityClassName": priority})
        await world.until_bound("low1", "low2", "mid", "high")
        await world.pod("new", cpu=2, spec={"priorityClassName": HIGH})
        await world.until_bound("mid", "high", "new")


async def test_v24_a_member_that_is_leaving_keeps_its_group_running(world: World) -> None:
    await world.node("n", played=False, cpu=4, memory="1Gi")
    async with leader(world):
        await world.group("pg", 2)
        await world.pod("p1", "pg", cpu=1)
        await world.pod("p2", "pg", cpu=1)
        await world.until_bound("p1", "p2")
        for name in ("p1", "p2"):
            await world.set_phase(name, "Running")

        async def running() -> bool:
            return (await world.status("pg")).status.phase == "Running"

        await world.until(running, "phase Running")
        await world.delete(PODS, "p1", 30)
        await world.only_bound("p1", "p2")
        assert (await world.status("pg")).status.phase == "Running"
