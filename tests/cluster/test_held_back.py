"""What the services of its nodes cost a gang, from what agents say to `explain podgroup`, on a real API server."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from colocate.cluster import held_back, publication
from colocate.cluster.api import NODE_COLOCATIONS
from colocate.cluster.held_back import HeldBackPods
from colocate.kube.client import MERGE, PODS, Unreachable, path_of
from colocate.localcluster.controlplane import ControlPlane
from colocate.objects import GANG_HELD, HELD_BACK
from tests.cluster.conftest import World, leader
from tests.cluster.test_publication import (
    BATCH,
    gone,
    installed,
    on_node,
    publishing,
    say,
    token_of,
    wants_gone,
    with_token,
)

FROZEN = {"reason": "Frozen", "message": "MemoryPressure: api stalls", "since": "2026-01-01T00:00:00Z"}


async def holds_back(world: World, node: str, name: str, uid: str = "", /, **why: str) -> None:
    """As the agent of a node says it."""
    uid = uid or (await world.pods())[name].metadata.uid
    await names(world, node, {"namespace": world.namespace, "name": name, "uid": uid, **why})


async def names(world: World, node: str, *held_back: dict[str, str]) -> None:
    path = path_of(NODE_COLOCATIONS, name=node, subresource="status")
    await world.api.request("PATCH", path, {"status": {"heldBack": list(held_back)}}, content_type=MERGE)


async def condition(world: World, name: str) -> tuple[str, str, str]:
    conditions = (await world.pods())[name].status.conditions
    return next(((c.status, c.reason, c.message) for c in conditions if c.type == HELD_BACK), ("", "", ""))


async def until_told(world: World, name: str, status: str, reason: str) -> None:
    async def told() -> bool:
        return (await condition(world, name))[:2] == (status, reason)

    await world.until(told, f"{name} is told {reason}")


async def a_frozen_pod(world: World) -> None:
    """`p` on n0, which knows that it is frozen."""
    await world.node("n0", cpu=8, memory="8Gi")
    await on_node(world, "p", "n0", **BATCH)
    await say(world.api, "n0", 0, 0)
    await holds_back(world, "n0", "p", **FROZEN)
    await until_told(world, "p", "True", "Frozen")


async def test_a_pod_is_told_that_it_is_held_back_and_when_it_is_over(world: World, kinds: None) -> None:
    async with publishing(world.api):
        await a_frozen_pod(world)
        assert (await condition(world, "p"))[2] == "MemoryPressure: api stalls"
        await holds_back(world, "n0", "p", reason="Narrowed", message="api waits")
        await until_told(world, "p", "True", "Narrowed")
        await holds_back(world, "n0", "p", since="2026-01-01T00:01:00Z")
        await until_told(world, "p", "False", "Released")
        assert (await condition(world, "p"))[2] == "nothing is kept from it any more"


@pytest.mark.parametrize(
    ("meanwhile", "reason"),
    [
        pytest.param(lambda world: say(world.api, "n0", 0, 0, "Stopped"), "Released", id="its agent stops"),
        pytest.param(lambda world: names(world, "n0"), "Released", id="its agent no longer names it"),
        pytest.param(
            lambda world: world.api.request("DELETE", path_of(NODE_COLOCATIONS, name="n0"), {}),
            "AgentSilent",
            id="what its agent has said is deleted",
        ),
    ],
)
@pytest.mark.parametrize("leads", [True, False], ids=["while it is watched", "while nobody leads"])
async def test_it_is_over_whatever_became_of_who_said_it(
    world: World, kinds: None, meanwhile: Callable[[World], Awaitable[Any]], reason: str, leads: bool
) -> None:
    async with publishing(world.api):
        await a_frozen_pod(world)
        if leads:
            await meanwhile(world)
            await until_told(world, "p", "False", reason)
    if not leads:
        await meanwhile(world)
        async with publishing(world.api):
            await asyncio.sleep(0.5)
            if reason == "Released":  # a new leader believes an agent once it has heard it itself
                await say(world.api, "n0", 0, 0, "Stopped", at=60)
            await until_told(world, "p", "False", reason)


async def test_an_old_word_is_not_written_over_a_newer_one(
    world: World, kinds: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one fails, and would be tried again later."""
    monkeypatch.setattr(held_back, "AGAIN_SECONDS", 0.5)
    tell, failed = HeldBackPods._tell, list[Any]()

    async def fails_once(pods: HeldBackPods, node: str, word: Any) -> None:
        if not failed:
            failed.append(word)
            raise Unreachable("no answer")
        await tell(pods, node, word)

    monkeypatch.setattr(HeldBackPods, "_tell", fails_once)
    await world.node("n0", cpu=8, memory="8Gi")
    await on_node(world, "p", "n0", **BATCH)
    async with publishing(world.api):
        await say(world.api, "n0", 0, 0)
        await holds_back(world, "n0", "p", **FROZEN)
        while not failed:
            await asyncio.sleep(0.02)
        await holds_back(world, "n0", "p", reason="Narrowed", message="api waits")
        await until_told(world, "p", "True", "Narrowed")
        await asyncio.sleep(1.0)
        assert (await condition(world, "p"))[:2] == ("True", "Narrowed")


async def test_a_pod_that_is_batch_no_longer_is_released(world: World, kinds: None) -> None:
    async with publishing(world.api):
        await a_frozen_pod(world)
        unlabelled = {"metadata": {"labels": dict.fromkeys(BATCH)}}
        await world.api.request("PATCH", path_of(PODS, world.namespace, "p"), unlabelled, content_type=MERGE)
        await names(world, "n0")
        await until_told(world, "p", "False", "Released")


async def test_an_agent_that_is_silent_holds_nobody_back(
    world: World, kinds: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publication, "SILENT_SECONDS", 2.0)
    monkeypatch.setattr(publication, "LOOK_SECONDS", 0.2)
    async with publishing(world.api):
        await a_frozen_pod(world)
        await until_told(world, "p", "False", "AgentSilent")


@pytest.mark.parametrize(
    ("node", "labels", "uid"),
    [
        pytest.param("n1", BATCH, "", id="a pod of another node"),
        pytest.param("n0", {}, "", id="a service"),
        pytest.param("n0", BATCH, "another", id="a namesake of one that is gone"),
        pytest.param("n0", BATCH, "unheard-of", id="a reason that there is not"),
    ],
)
async def test_of_whom_an_agent_has_no_say(
    world: World, kinds: None, node: str, labels: dict[str, str], uid: str
) -> None:
    for name in ("n0", "n1"):
        await world.node(name, cpu=8, memory="8Gi")
    await on_node(world, "p", node, **labels)
    await on_node(world, "q", "n1", **BATCH)
    async with publishing(world.api):
        for name, pod in (("n0", "p"), ("n1", "q")):
            await say(world.api, name, 0, 0)
            why = {**FROZEN, "reason": "x" * 9000} if (pod, uid) == ("p", "unheard-of") else FROZEN
            await holds_back(world, name, pod, uid if (pod, uid) == ("p", "another") else "", **why)
        await until_told(world, "q", "True", "Frozen")
        await asyncio.sleep(0.5)
        assert await condition(world, "p") == ("", "", "")


@pytest.fixture
def explained(world: World, plane: ControlPlane) -> Callable[..., str]:
    def run(*words: str) -> str:
        command = [sys.executable, "-m", "colocate.cli.main", "explain", "podgroup", *words]
        environment = {**os.environ, "KUBECONFIG": str(plane.kubeconfig())}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.replace(f"{world.namespace}/", "ml/")

    return run


async def test_a_gang_is_told_what_services_cost_it(
    world: World, kinds: None, plane: ControlPlane, tmp_path: Path, explained: Callable[..., str]
) -> None:
    """By the manifests' own rights: one member frozen, one evicted."""
    inside = ("-n", world.namespace)
    await world.node("n0", cpu=8, memory="8Gi")
    async with leader(world):
        await world.group("train", 2)
        for i in range(3):
            await world.pod(f"train-{i}", "train", labels=BATCH, cpu=1)
        await world.until_bound("train-0", "train-1", "train-2")
        assert (
            await asyncio.to_thread(explained, "train", *inside) == "ml/train does not wait: 3 members have started\n"
        )
        async with installed(world.api, "base/publication.yaml"):
            token = await token_of(world.api, "colocate-publication", {})
            async with with_token(plane, tmp_path, token) as api, publishing(api, "colocate-system"):
                await say(world.api, "n0", 0, 0)
                await holds_back(world, "n0", "train-0", **FROZEN)
                await until_told(world, "train-0", "True", "Frozen")
                await wants_gone(world, "n0", "train-2", message="api stalls")
                await gone(world, "train-2")

                async def told() -> list[str]:
                    lines = (await asyncio.to_thread(explained, "train", *inside)).splitlines()
                    return lines if any("evicted" in line for line in lines) else []

                lines = await world.until(told, "the gang is told of its loss")
        assert "  train-0 on n0 is held back since " in lines[1]
        assert lines[1].endswith(" (Frozen): MemoryPressure: api stalls")
        assert lines[2].endswith(" evicted: train-2 on n0: MemoryPressure: api stalls")
        said: dict[str, Any] = json.loads(await asyncio.to_thread(explained, "train", "-o", "json", *inside))
        assert [(m["pod"], m["node"], m["reason"]) for m in said["heldBack"]] == [("train-0", "n0", "Frozen")]
        assert [m["message"] for m in said["evicted"]] == ["train-2 on n0: MemoryPressure: api stalls"]
        anew = await asyncio.to_thread(explained, "train", "--anew", *inside)
        assert anew.splitlines()[1:] == lines[1:]


GANG = {"scheduling.x-k8s.io/pod-group": "train"}


async def freezes_gang(world: World, node: str, *gangs: str) -> None:
    """As the agent of a node says it."""
    path = path_of(NODE_COLOCATIONS, name=node, subresource="status")
    said = [{"gang": f"{world.namespace}/{gang}", "message": f"a member on {node} is frozen"} for gang in gangs]
    await world.api.request("PATCH", path, {"status": {"frozenGangs": said}}, content_type=MERGE)


async def gang_held(world: World, name: str) -> tuple[str, str]:
    conditions = (await world.pods())[name].status.conditions
    return next(((c.status, c.message) for c in conditions if c.type == GANG_HELD), ("", ""))


async def until_gang(world: World, **expected: str) -> None:
    async def so() -> bool:
        return {name: (await gang_held(world, name))[0] for name in expected} == expected

    await world.until(so, f"{expected}")


async def test_28_a_member_frozen_on_one_node_holds_those_on_others(world: World, kinds: None) -> None:
    for node in ("n0", "n1", "n2"):
        await world.node(node, cpu=8, memory="8Gi")
        await say(world.api, node, 0, 0)
    for i in range(2):
        await on_node(world, f"w{i}", f"n{i}", **BATCH, **GANG)
    await on_node(world, "stranger", "n1", **BATCH)
    async with publishing(world.api):
        await freezes_gang(world, "n0", "train")
        await until_gang(world, w0="", w1="True", stranger="")
        assert (await gang_held(world, "w1"))[1] == "on n0: a member on n0 is frozen"
        await freezes_gang(world, "n0")
        await until_gang(world, w0="", w1="False")
        await freezes_gang(world, "n2", "train")  # no pod of it is there: it has no say in it
        await asyncio.sleep(0.5)
        await until_gang(world, w0="", w1="False")
        await freezes_gang(world, "n0", "train")
        await until_gang(world, w1="True")
    await say(world.api, "n0", 0, 0, "Stopped", at=60)
    async with publishing(world.api):
        await until_gang(world, w1="False")
