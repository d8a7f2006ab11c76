"""A real kubelet, containerd and runc, beside nodes that KWOK plays: what a node refuses, and what runs on it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from colocate.errors import HostUnfit
from colocate.kube.client import NODES, PODS, Api, path_of
from colocate.localcluster.realnode import IMAGE, NAME, RealNode
from colocate.objects import Node
from tests.cluster.conftest import World, leader
from tests.cluster.proxy import Hold, Proxy

MILLI_MOST = 700
"""Of the CPU that is left to its pods, one member asks for this many thousandths, and a thief for as many."""


async def until_ready(world: World, real_node: RealNode) -> Node:
    async def ready() -> Any:
        real_node.check()
        node = await world.api.get(Node, path_of(NODES, name=NAME))
        return node if any(c.type == "Ready" and c.status == "True" for c in node.status.conditions) else None

    try:
        found: Node = await world.until(ready, "the real node is ready")
    except AssertionError as error:
        raise HostUnfit(str(error), real_node.words()) from error
    return found


def on(node: str) -> dict[str, Any]:
    """What a pod needs that can really run."""
    container = {"name": "c", "image": IMAGE, "imagePullPolicy": "Never"}
    return {"hostNetwork": True, "nodeSelector": {"kubernetes.io/hostname": node}, "containers": [container]}


@pytest.mark.slow
async def test_a_slot_that_was_stolen_is_refused_by_the_kubelet_and_the_gang_repaired(
    world: World, proxy: Proxy, real_node: RealNode
) -> None:
    """The API server accepts a bind to a node that is full by now; the kubelet says OutOfcpu."""
    node = await until_ready(world, real_node)
    asked = {"cpu": f"{int(float(node.status.allocatable['cpu']) * MILLI_MOST)}m"}
    await world.node("played", cpu=4, memory="1Gi")
    hold = proxy.fault = Hold("/second/binding")

    def spec() -> dict[str, Any]:
        pod = on(NAME)
        pod["containers"][0]["resources"] = {"requests": asked}
        return pod

    async def phase(name: str, wanted: str) -> bool:
        pod = (await world.pods()).get(name)
        return pod is not None and pod.status.phase == wanted

    async with Api.connect(str(proxy.kubeconfig())) as through, leader(World(through, world.namespace)):
        await world.group("pg", 2)
        await world.pod("first", "pg", cpu=1, spec={"nodeSelector": {"kubernetes.io/hostname": "played"}})
        await world.pod("second", "pg", spec=spec())
        await asyncio.wait_for(hold.held.wait(), 20)
        await world.pod("thief", spec={**spec(), "nodeName": NAME, "schedulerName": "default-scheduler"})
        await world.until(lambda: phase("thief", "Running"), "the thief runs")
        hold.release.set()
        await world.told("pg", "MemberLost", "second did not start: OutOfcpu")
        assert (await world.pods())["second"].status.reason == "OutOfcpu"
        await world.pod("third", "pg", spec=spec())
        await world.delete(PODS, "thief", 1)
        await world.until(lambda: phase("third", "Running"), "the replacement runs")

        async def whole() -> bool:
            return (await world.plan("pg")).status.phase == "Running"

        await world.until(whole, "the gang runs")
        assert (await world.bound())["third"] == NAME
