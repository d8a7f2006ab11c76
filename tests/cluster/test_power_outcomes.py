"""S2.8: pods that say what they may lose ask for watts once they are created, on a real API server."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from colocate.cluster.api import MAX_SLOWDOWN, POWER, POWER_BECAUSE, POWER_CLASS
from colocate.cluster.outcomes import outcomes
from colocate.kube.client import PODS, ApiError
from colocate.objects import Pod
from tests.cluster.conftest import World, leader
from tests.cluster.test_profiles import in_place
from tests.unit.test_power_caps import HARDLY, MUCH

GPU = "nvidia.com/gpu"


def asks(*gpus: int, **limits: str) -> dict[str, Any]:
    """A pod with a container for each of these, and one without."""
    every = [{GPU: str(count), **limits} for count in gpus]
    containers = [
        {"name": f"c{i}", "image": "i", "resources": {"limits": one}} for i, one in enumerate([*every, {"cpu": "1"}])
    ]
    return {"containers": containers}


async def made(world: World, name: str, slowdown: str, class_: str, spec: dict[str, Any], group: str = "") -> Pod:
    await world.pod(name, group, annotations={MAX_SLOWDOWN: slowdown}, labels={POWER_CLASS: class_}, spec=spec)
    return (await world.pods())[name]


async def in_force(world: World) -> None:
    """Policies come into force a moment after they are made, each for itself."""
    tried = 0

    async def both() -> bool:
        nonlocal tried
        tried += 1
        pod = await made(world, f"probe-{tried}", "5%", "ncf", asks(1))
        with contextlib.suppress(ApiError):
            await made(world, f"wrong-{tried}", "little", "ncf", asks(1))
            return False
        return POWER in pod.spec.containers[0].resources.requests

    await world.until(both, "the policies are in force")
    for name in await world.pods():
        await world.delete(PODS, name, 0)


async def test_s2_8_a_slowdown_becomes_watts_that_everybody_counts(world: World) -> None:
    async with in_place(world.api, outcomes([MUCH, HARDLY])):
        await in_force(world)
        pod = await made(world, "a", "5%", "bert", asks(2, 1))
        requests = [c.resources.requests for c in pod.spec.containers]
        assert [r.get(POWER) for r in requests] == ["512", "256", None]
        assert pod.metadata.annotations[POWER_BECAUSE] == "bert at 5%: 256 W of each GPU"
        pod = await made(world, "b", "0.03", "ncf", asks(1))
        assert pod.spec.containers[0].resources.requests[POWER] == "100"
        plain = await made(world, "c", "5%", "bert", asks(1, **{POWER: "280"}))
        assert plain.spec.containers[0].resources.requests[POWER] == "280", "who asks for watts himself has those"
        await world.pod("nothing", spec=asks(1))
        assert POWER not in (await world.pods())["nothing"].spec.containers[0].resources.requests


@pytest.mark.parametrize(
    ("slowdown", "class_", "gpus", "says"),
    [
        pytest.param("little", "bert", (1,), "little is no slowdown: write 5% or 0.05", id="no number"),
        pytest.param("-5%", "bert", (1,), "-5% is no slowdown", id="negative"),
        pytest.param("5%", "gpt", (1,), "no model of the class gpt; known: bert, ncf", id="no model"),
        pytest.param("5%", "bert", (), "no container has a limit of nvidia.com/gpu or amd.com/gpu", id="no GPU"),
    ],
)
async def test_s2_8_what_cannot_be_turned_into_watts_is_refused_with_its_reason(
    world: World, slowdown: str, class_: str, gpus: tuple[int, ...], says: str
) -> None:
    async with in_place(world.api, outcomes([MUCH, HARDLY])):
        await in_force(world)
        with pytest.raises(ApiError) as refused:
            await made(world, "a", slowdown, class_, asks(*gpus))
        assert says in str(refused.value)


async def test_s2_8_a_gang_that_asks_for_an_outcome_waits_for_its_watts(world: World) -> None:
    """Two of 256 W on a node of 470: none starts; at 10 % slower they do."""
    async with in_place(world.api, outcomes([MUCH, HARDLY])), leader(world):
        await in_force(world)
        await world.node("n", cpu=8, memory="8Gi", nvidia_com__gpu=8, colocate_io__power=470)
        for group, slowdown in (("strict", "5%"), ("lax", "10%")):
            await world.group(group, 2)
            for i in range(2):
                await made(world, f"{group}-{i}", slowdown, "bert", asks(1), group)
            if group == "strict":
                await world.told(group, "Unschedulable", POWER)
        await world.until_bound("lax-0", "lax-1")
