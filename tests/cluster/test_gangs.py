"""Cases of scheduler-plugins (T, S) and of native gangs (N), in our dialect; nobody else may be bound either."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from colocate.kube.client import PODS, path_of
from tests.cluster.conftest import HIGH, MID, World, leader


class Case(NamedTuple):
    """Groups, pods in the order of their creation as (name, group, memory, priority class), and who is bound."""

    groups: dict[str, dict[str, Any]]
    pods: list[tuple[str, str, int, str]]
    bound: set[str]


def pods(prefix: str, group: str, count: int, memory: int, priority: str = "") -> list[tuple[str, str, int, str]]:
    return [(f"{prefix}-{i}", group, memory, priority) for i in range(1, count + 1)]


def interleaved(*lists: list[tuple[str, str, int, str]]) -> list[tuple[str, str, int, str]]:
    longest = max(map(len, lists))
    return [one[i] for i in range(longest) for one in lists if i < len(one)]


def names(prefix: str, count: int) -> set[str]:
    return {f"{prefix}-{i}" for i in range(1, count + 1)}


P1, P2, P3 = pods("p1", "pg1", 3, 50), pods("p2", "pg2", 4, 100), pods("p3", "pg3", 4, 100)
CASES = {
    "T1 of two groups the older is bound whole and the other not at all": Case(
        {"pg1": {"least": 3}, "pg2": {"least": 4}}, P1 + P2, names("p1", 3)
    ),
    "T2 so too when their pods are created in turn": Case(
        {"pg1": {"least": 3}, "pg2": {"least": 4}}, interleaved(P1, P2), names("p1", 3)
    ),
    "T3 a group short of a member is passed by": Case(
        {"pg1": {"least": 4}}, interleaved(P1, pods("plain", "", 2, 100)), names("plain", 2)
    ),
    "T4 the more important group is bound though it came later": Case(
        {"pg1": {"least": 3}, "pg2": {"least": 3}},
        pods("p1", "pg1", 3, 100, MID) + pods("p2", "pg2", 3, 50, HIGH),
        names("p2", 3),
    ),
    "T5 so too when their pods are created in turn": Case(
        {"pg1": {"least": 3}, "pg2": {"least": 3}},
        interleaved(pods("p1", "pg1", 3, 100, MID), pods("p2", "pg2", 3, 50, HIGH)),
        names("p2", 3),
    ),
    "T6 more important pods alone go before a group": Case(
        {"pg1": {"least": 3}},
        interleaved(pods("p1", "pg1", 3, 50, MID), pods("plain", "", 3, 100, HIGH)),
        names("plain", 3),
    ),
    "T7 of three groups the one that fits is bound": Case(
        {"pg1": {"least": 3}, "pg2": {"least": 4}, "pg3": {"least": 4}}, interleaved(P1, P2, P3), names("p1", 3)
    ),
    "T8 so too with minResources": Case(
        {
            "pg1": {"least": 3, "minResources": {"memory": "150"}},
            "pg2": {"least": 4, "minResources": {"memory": "400"}},
            "pg3": {"least": 4, "minResources": {"memory": "400"}},
        },
        interleaved(P1, P2, P3),
        names("p1", 3),
    ),
    "T9 two groups with minResources": Case(
        {
            "pg1": {"least": 3, "minResources": {"memory": "150"}},
            "pg2": {"least": 4, "minResources": {"memory": "400"}},
        },
        interleaved(P1, P2),
        names("p1", 3),
    ),
}


async def create(world: World, case: Case) -> None:
    for name, spec in case.groups.items():
        await world.group(name, **spec)
    for name, group, memory, priority in case.pods:
        await world.pod(name, group, memory=memory, spec={"priorityClassName": priority} if priority else None)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
async def test_one_node_of_300(world: World, case: Case) -> None:
    await create(world, case)
    await world.node("n", memory=300, cpu=4, pods=32)
    async with leader(world):  # started when everything is there: who came first is then certain
        await world.until_bound(*case.bound)


async def test_t10_a_completed_member_counts_for_the_quorum_and_holds_nothing(world: World) -> None:
    await world.group("pg", 6)
    await world.node("n", cpu=6, memory="1Gi")
    await world.pod("done", "pg", cpu=1)
    await world.set_phase("done", "Succeeded")
    for i in range(5):
        await world.pod(f"m-{i}", "pg", cpu=1)
    async with leader(world):
        await world.until_bound(*(f"m-{i}" for i in range(5)))


async def test_t11_a_big_gang_that_fails_does_not_block_a_small_one(world: World) -> None:
    for name, cpu in (("a", 6), ("b", 2), ("c", 2), ("d", 2)):
        await world.node(name, cpu=cpu, memory="1Gi")
    await world.group("pg1", 6)
    await world.group("pg2", 1)
    for i in range(6):
        await world.pod(f"big-{i}", "pg1", cpu=4)
    await world.pod("small", "pg2", cpu=2)
    async with leader(world):
        await world.until_bound("small")
        await world.told("pg1", "Unschedulable", "1 of 6 members fit; blocked by cpu")


async def one_node(world: World) -> None:
    await world.node("n", cpu=4, memory="8Gi")


async def members(world: World, group: str, *names: str, cpu: int = 1, **options: Any) -> None:
    for name in names:
        await world.pod(name, group, cpu=cpu, **options)


async def scheduled(world: World, group: str, status: str) -> Any:
    """The group's condition, once it says so."""

    async def said() -> Any:
        return next((c for c in (await world.status(group)).status.conditions if c.status == status), None)

    return await world.until(said, f"{group} Scheduled={status}")


async def test_n1_a_group_of_three_starts_and_says_so(world: World) -> None:
    await one_node(world)
    async with leader(world):
        await world.group("pg", 3)
        await members(world, "pg", "p1", "p2", "p3")
        await world.until_bound("p1", "p2", "p3")
        assert (await scheduled(world, "pg", "True")).reason == "Started"

        async def running() -> bool:
            status = (await world.status("pg")).status
            return status.phase == "Running" and status.running == 3

        await world.until(running, "phase Running")


async def test_n2_the_third_member_releases_all_three(world: World) -> None:
    await one_node(world)
    async with leader(world):
        await world.group("pg", 3)
        await members(world, "pg", "p1", "p2")
        await world.told("pg", "NotEnoughMembers")
        assert (await scheduled(world, "pg", "False")).reason == "NotEnoughMembers"
        await world.only_bound()
        await members(world, "pg", "p3")
        await world.until_bound("p1", "p2", "p3")


async def test_n3_pods_before_their_group_wait_for_it_and_then_for_room(world: World) -> None:
    await one_node(world)
    async with leader(world):
        await members(world, "", "blocker", cpu=2)
        await world.until_bound("blocker")
        await members(world, "pg", "p1", "p2", "p3")
        await world.only_bound("blocker")
        await world.group("pg", 3)
        await world.told("pg", "Unschedulable")
        await world.delete(PODS, "blocker", 0)
        await world.until_bound("p1", "p2", "p3")
        await scheduled(world, "pg", "True")


async def test_n4_the_surplus_follows_when_there_is_room(world: World) -> None:
    await one_node(world)
    async with leader(world):
        await members(world, "", "blocker")
        await world.until_bound("blocker")
        await members(world, "pg", "p1", "p2", "p3", "p4")
        await world.group("pg", 3)

        async def four() -> bool:
            return len(await world.bound()) == 4

        await world.until(four, "the quorum beside the blocker")
        assert len(await world.only_bound(*(await world.bound()))) == 4
        await world.delete(PODS, "blocker", 0)
        await world.until_bound("p1", "p2", "p3", "p4")


@pytest.mark.parametrize(
    ("order", "first"),
    [(["p1", "o1", "p2", "o2", "p3", "o3"], "p"), (["o3", "p3", "o2", "p2", "o1", "p1"], "o")],
    ids=["N5", "N6"],
)
async def test_two_groups_whose_pods_come_in_turn_do_not_hold_each_other(
    world: World, order: list[str], first: str
) -> None:
    await one_node(world)
    groups = ["p", "o"] if first == "p" else ["o", "p"]
    async with leader(world):
        for group in groups:
            await world.group(f"pg-{group}", 3)
        for name in order:
            await members(world, f"pg-{name[0]}", name)

        async def three() -> bool:
            return len(await world.bound()) >= 3

        await world.until(three, "one of the two")
        bound = await world.only_bound(*(await world.bound()))
        assert len(bound) == 3
        assert len({name[0] for name in bound}) == 1


async def test_s9_groups_of_one_name_in_two_namespaces_are_counted_apart(world: World) -> None:
    await one_node(world)
    other = world.namespace + "-b"
    body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": other}}
    await world.api.request("POST", "/api/v1/namespaces", body)
    async with leader(world):
        await world.group("pg", 2)
        await world.group("pg", 2, namespace=other)
        await members(world, "pg", "p1", "p2")
        await members(world, "pg", "q1", namespace=other)
        await world.until_bound("p1", "p2")

        async def counted() -> bool:
            return (await world.status("pg")).status.running == 2

        await world.until(counted, "running 2")
        assert (await world.status("pg", other)).status.running == 0
        assert await world.bound(other) == {}
    for name in ("q1",):
        await world.api.request("DELETE", path_of(PODS, other, name), {"gracePeriodSeconds": 0})
    await world.api.request("DELETE", f"/api/v1/namespaces/{other}")
