"""S2.1 watts as a resource and quota, S2.2 gang admission on watts: on a real API server, in nodes, racks and whole."""

from __future__ import annotations

from typing import Any

import pytest

from colocate.cluster.api import NODE_COLOCATIONS, NodeColocation
from colocate.kube.client import MERGE, PODS, Api, ApiError, path_of
from podgroup.api import POWER_BUDGETS
from podgroup.commands import _take
from podgroup.explain.snapshot import explain
from podgroup.queue.entry import Settings
from tests.cluster.conftest import World, leader

RACK = "topology.kubernetes.io/rack"


async def racks(world: World, nodes: int = 2, watts: int = 1000) -> None:
    """Two racks, a and b, of so many nodes each that offer so many watts."""
    for rack in "ab":
        for i in range(nodes):
            await world.node(f"{rack}{i}", {RACK: rack}, cpu=16, memory="64Gi", colocate_io__power=watts)


async def gang(world: World, name: str, size: int, watts: int, *, intels: bool = False) -> list[str]:
    await world.group(name, size)
    members = [f"{name}-{i}" for i in range(size)]
    for member in members:
        if intels:
            await world.pod(member, name, cpu=1, intel_com__power=watts)
        else:
            await world.pod(member, name, cpu=1, colocate_io__power=watts)
    return members


async def says(world: World, budget: str, *expected: Any) -> None:
    async def so() -> bool:
        return (await world.power_budget_status(budget)) == expected

    await world.until(so, f"budget {budget} says {expected}")


async def test_s2_1_a_budget_says_what_is_asked_of_it(world: World) -> None:
    await racks(world)
    await world.power_budget("whole", 3000, idleWatts=100)
    await world.power_budget("rack-a", 900, nodeSelector={"matchLabels": {RACK: "a"}})
    await world.power_budget("rack-z", 100, nodeSelector={"matchLabels": {RACK: "z"}})
    async with leader(world):
        await says(world, "whole", 4, 0, 2600, "")
        await world.until_bound(*await gang(world, "one", 2, 600))
        await says(world, "whole", 4, 1200, 1400, "")
        await says(world, "rack-z", 0, 0, 100, "no node has these labels")
        path = path_of(POWER_BUDGETS, name="whole")
        await world.api.request("PATCH", path, {"spec": {"watts": 1500}}, content_type=MERGE)
        await says(
            world,
            "whole",
            4,
            1200,
            -100,
            "100 W too much is asked for: nothing is stopped for that, and nothing more starts",
        )
        await world.api.request("PATCH", path, {"spec": {"watts": 300}}, content_type=MERGE)
        idle = "4 nodes draw 400 W when idle, more than 300 W: no pod that asks for watts starts"
        await says(world, "whole", 4, 1200, -1300, idle)
        assert set(await world.bound()) == {"one-0", "one-1"}, "whoever runs goes on"


async def test_s2_2_a_gang_starts_whole_or_not_at_all_on_node_rack_and_cluster(world: World) -> None:
    """Each rack has 1500 W for its 2000, and all 2800 W: four members of 700 W fit, four of 800 W do not."""
    await racks(world)
    for rack in "ab":
        await world.power_budget(f"rack-{rack}", 1500, nodeSelector={"matchLabels": {RACK: rack}})
    await world.power_budget("whole", 2800)
    async with leader(world):
        large = await gang(world, "large", 4, 800)
        await world.told("large", "Unschedulable", "budget rack-a (1500 W of 1500 W colocate.io/power left)")
        assert not await world.only_bound()
        found = explain(await _take(world.api, Settings()), f"{world.namespace}/large")
        assert found is not None
        assert found.advice is not None
        for member in large:
            await world.delete(PODS, member)
        fitting = await gang(world, "fitting", 4, 700)
        nodes = await world.until_bound(*fitting)
        assert sorted(nodes.values()) == ["a0", "a1", "b0", "b1"]
        await says(world, "rack-a", 2, 1400, 100, "")
        await says(world, "whole", 4, 2800, 0, "")
        more = await gang(world, "more", 1, 50)
        await world.told("more", "Unschedulable", "budget whole (0 W of 2800 W colocate.io/power left)")
        path = path_of(POWER_BUDGETS, name="whole")
        snapshot = await _take(world.api, Settings())
        why = explain(snapshot, f"{world.namespace}/more")
        assert why is not None
        assert why.advice is not None
        changes = [c.change for c in why.advice.counterfactuals]
        assert "the budget whole were 2850 W of colocate.io/power instead of 2800 W" in changes
        await world.api.request("PATCH", path, {"spec": {"watts": 2850}}, content_type=MERGE)
        await world.until_bound(*fitting, *more)


async def test_s2_2_a_budget_that_goes_holds_up_nobody(world: World) -> None:
    await racks(world, nodes=1)
    await world.power_budget("whole", 100)
    async with leader(world):
        members = await gang(world, "one", 2, 200)
        await world.told("one", "Unschedulable")
        await world.delete(POWER_BUDGETS, "whole")
        await world.until_bound(*members)


async def test_s2_2_pods_of_nobody_count_and_pods_without_watts_do_not(world: World) -> None:
    await racks(world, nodes=1)
    await world.power_budget("whole", 1000)
    async with leader(world):
        await world.pod("others", "", colocate_io__power=700, spec={"schedulerName": "default", "nodeName": "a0"})
        await says(world, "whole", 2, 700, 300, "")
        held = await gang(world, "held", 1, 400)
        await world.told("held", "Unschedulable")
        await world.group("free", 1)
        await world.pod("free-0", "free", cpu=1)
        await world.until_bound("others", "free-0")
        await world.delete(PODS, "others")
        await world.until_bound("free-0", *held)


async def test_s2_1_intels_name_for_watts_counts_where_the_budget_says_so(world: World) -> None:
    for name in ("n0", "n1"):
        await world.node(name, cpu=16, memory="64Gi", intel_com__power=1000)
    await world.power_budget("whole", 1000, resource="intel.com/power")
    async with leader(world):
        members = await gang(world, "one", 2, 500, intels=True)
        await world.until_bound(*members)
        await gang(world, "two", 1, 1, intels=True)
        await world.told("two", "Unschedulable", "budget whole (0 W of 1000 W intel.com/power left)")


@pytest.mark.parametrize(
    ("spec", "says_why"),
    [
        pytest.param({}, "watts: Required", id="no watts"),
        pytest.param({"watts": -1}, "should be greater than or equal to 0", id="negative"),
        pytest.param({"watts": 1.5}, "must be of type integer", id="a part of a watt"),
        pytest.param({"watts": 1, "idleWatts": -5}, "should be greater than or equal to 0", id="negative when idle"),
        pytest.param({"watts": 1, "resource": "cpu"}, "Unsupported value", id="a resource that is not in watts"),
        pytest.param(
            {"watts": 1, "nodeSelector": {"matchExpressions": [{"key": "rack", "operator": "Is"}]}},
            "Unsupported value",
            id="an operator that there is not",
        ),
        pytest.param(
            {"watts": 1, "nodeSelector": {"matchExpressions": [{"operator": "Exists"}]}}, "key: Required", id="no label"
        ),
    ],
)
async def test_s2_1_a_budget_that_is_none_is_refused(world: World, spec: dict[str, Any], says_why: str) -> None:
    body = {"apiVersion": "colocate.io/v1alpha1", "kind": "PowerBudget", "metadata": {"name": "bad"}, "spec": spec}
    with pytest.raises(ApiError, match=says_why):
        await world.api.request("POST", POWER_BUDGETS, body)


async def test_s2_2_the_controllers_own_rights_are_enough(world: World, limited: Api) -> None:
    await racks(world, nodes=1)
    await world.power_budget("whole", 1000)
    async with leader(World(limited, "colocate-system")):
        await world.until_bound(*await gang(world, "one", 2, 500))
        await says(world, "whole", 2, 1000, 0, "")


async def leaves(world: World, expected: dict[str, int]) -> None:
    """What the NodeColocations say that their nodes may draw."""

    async def so() -> bool:
        nodes = await world.api.all(NodeColocation, NODE_COLOCATIONS)
        return {n.metadata.name: n.spec.power_watts for n in nodes} == expected

    await world.until(so, f"nodes are left {expected}")


async def enforces(world: World, node: str, watts: int) -> None:
    """As the agent of a node says of its limits."""
    path = path_of(NODE_COLOCATIONS, name=node, subresource="status")
    await world.api.request("PATCH", path, {"status": {"powerWatts": watts, "reason": "Promised"}}, content_type=MERGE)


async def test_s2_8_a_budget_that_is_cut_lowers_its_nodes_and_raises_none_before_that_is_so(
    world: World, limited: Api, kinds: None
) -> None:
    await racks(world, nodes=1)
    for node in ("a0", "b0"):
        kind = {"apiVersion": "colocate.io/v1alpha1", "kind": "NodeColocation", "metadata": {"name": node}}
        await world.api.request("POST", NODE_COLOCATIONS, kind)
    await world.power_budget("whole", 2000, enforce=True)
    async with leader(World(limited, "colocate-system")):
        await world.until_bound(*await gang(world, "one", 1, 900), *await gang(world, "two", 1, 300))
        bound = await world.bound()
        large, small = bound["one-0"], bound["two-0"]
        assert large != small
        await enforces(world, large, 900)
        await enforces(world, small, 300)
        await leaves(world, {large: 0, small: 0})
        path = path_of(POWER_BUDGETS, name="whole")
        await world.api.request("PATCH", path, {"spec": {"watts": 800}}, content_type=MERGE)
        await leaves(world, {large: 600, small: 200})
        lowered = "400 W too much is asked for: power limits of its nodes are lowered for that, and nothing more starts"
        await says(world, "whole", 2, 1200, -400, lowered)
        await enforces(world, large, 600)
        await world.api.request("PATCH", path, {"spec": {"watts": 1000}}, content_type=MERGE)
        await leaves(world, {large: 700, small: 250})  # the small one's 300 W may be drawn as yet
        await enforces(world, small, 250)
        await leaves(world, {large: 750, small: 250})
        await enforces(world, large, 750)
        hardly = {"asked": 900, "least": [{"slowdown": 0.0, "watts": 900}, {"slowdown": 0.01, "watts": 300}]}
        status = path_of(NODE_COLOCATIONS, name=large, subresource="status")
        await world.api.request("PATCH", status, {"status": {"powerNeeds": hardly}}, content_type=MERGE)
        await leaves(world, {large: 700, small: 250})  # which hardly feels it; the other's 250 W may be drawn as yet
        await enforces(world, large, 700)
        await leaves(world, {large: 700, small: 299})
        await world.delete(POWER_BUDGETS, "whole")
        await leaves(world, {large: 0, small: 0})
