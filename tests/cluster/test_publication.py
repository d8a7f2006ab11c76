"""What batch may have of a node, from its agent's object to where schedulers read it, on a real API server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from colocate.actuate.journal import Journal
from colocate.agent import publisher as agent_publisher
from colocate.agent.loop import Agent
from colocate.agent.node_power import PowerWatch
from colocate.agent.policies import Policies
from colocate.agent.publisher import Publisher
from colocate.cgroup.layout import UNIFIED
from colocate.cluster import evictions, publication
from colocate.cluster.api import (
    BATCH_CPU,
    BATCH_MEMORY,
    CPU_UTILIZATION,
    GANGS,
    NODE_COLOCATIONS,
    POWER_CURVE,
    NodeColocationStatus,
)
from colocate.cluster.publication import Publication, differs, wanted
from colocate.kernelmodel import ModelKernel
from colocate.kube.client import MERGE, NODES, PODS, Api, ApiError, path_of
from colocate.kube.lease import Election
from colocate.localcluster.controlplane import MANIFESTS, ControlPlane
from colocate.model import kernels
from colocate.objects import Quantities
from colocate.plan import Request
from colocate.policy.schema import ColocationPolicy
from colocate.units import time_text
from podgroup.policy import AgeAndLeastWatts
from podgroup.queue.entry import Settings
from tests.cluster.conftest import World, ignoring_conflict, leader
from tests.cluster.test_nri import ended
from tools.rights import COLLECTIONS

BATCH = {"colocate.io/qos": "batch"}
ADMISSION = "/apis/admissionregistration.k8s.io/v1"
POLICIES = {
    "ValidatingAdmissionPolicy": f"{ADMISSION}/validatingadmissionpolicies",
    "ValidatingAdmissionPolicyBinding": f"{ADMISSION}/validatingadmissionpolicybindings",
}


@contextlib.asynccontextmanager
async def publishing(api: Api, lease_namespace: str = "default") -> AsyncIterator[Publication]:
    election = Election(api, lease_namespace, "publication", "test")
    found = Publication(api, election)
    task = asyncio.ensure_future(election.lead(found.run))
    try:
        while not found.synced and not task.done():
            await asyncio.sleep(0.02)
        yield found
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task  # whatever it has ended by before fails the test


async def say(api: Api, node: str, cpu: int, memory: int, reason: str = "Promised", at: int = 0) -> None:
    """As an agent does."""
    body = {"apiVersion": "colocate.io/v1alpha1", "kind": "NodeColocation", "metadata": {"name": node}}
    await ignoring_conflict(api, NODE_COLOCATIONS, body)
    status = {"promised": {BATCH_CPU: str(cpu), BATCH_MEMORY: str(memory)}, "reason": reason}
    status |= {"observed": time_text(time.time() + at)}
    path = path_of(NODE_COLOCATIONS, name=node, subresource="status")
    await api.request("PATCH", path, {"status": status}, content_type=MERGE)


async def offered(api: Api, node: str) -> tuple[str | None, str | None]:
    found = msgspec.json.decode(await api.request("GET", path_of(NODES, name=node)))["status"]["allocatable"]
    return found.get(BATCH_CPU), found.get(BATCH_MEMORY)


async def until_offered(world: World, node: str, cpu: str | None) -> None:
    async def said() -> bool:
        return (await offered(world.api, node))[0] == cpu

    await world.until(said, f"{node} offers {cpu}")


async def test_what_an_agent_promises_is_in_its_node_s_status_and_goes_with_its_word(world: World, kinds: None) -> None:
    await world.node("n0", cpu=8, memory="8Gi")
    async with publishing(world.api) as publisher:
        await say(world.api, "n0", 4000, 2 << 30)
        await until_offered(world, "n0", "4k")
        assert (await offered(world.api, "n0"))[1] in ("2Gi", str(2 << 30))
        await say(world.api, "n0", 1500, 1 << 30)
        await until_offered(world, "n0", "1500")
        await asyncio.sleep(0.5)
        wrote = publisher.writes
        await say(world.api, "n0", 1500, 1 << 30, at=30)
        await asyncio.sleep(0.5)
        assert publisher.writes == wrote, "a heartbeat changes nothing"
        await say(world.api, "n0", 9000, 9 << 30, "Shadow")
        await until_offered(world, "n0", None)
        await say(world.api, "n0", 1500, 1 << 30)
        await until_offered(world, "n0", "1500")
        await world.api.request("DELETE", path_of(NODE_COLOCATIONS, name="n0"), {})
        await until_offered(world, "n0", None)


async def test_what_a_publisher_before_has_written_is_taken_over(world: World, kinds: None) -> None:
    """One that did not say yet that it was ours: it is what the agent promises."""
    for name in ("n0", "n1"):
        written: dict[str, Any] = {BATCH_CPU.replace("/", "__"): "4k", BATCH_MEMORY.replace("/", "__"): "1Gi"}
        await world.node(name, cpu=8, memory="8Gi", **written)
        await say(world.api, name, 4000, 1 << 30)
    async with publishing(world.api):
        await asyncio.sleep(0.5)
        await say(world.api, "n0", 0, 0)
        await until_offered(world, "n0", "0")
        await world.api.request("DELETE", path_of(NODE_COLOCATIONS, name="n1"), {})
        await until_offered(world, "n1", None)


OTHERS: dict[str, Any] = {BATCH_CPU: "12k", BATCH_MEMORY: "24Gi"}


@pytest.mark.parametrize(
    "reason",
    [
        pytest.param("", id="of a node that colocate does not govern"),
        pytest.param("Shadow", id="of one where it only looks"),
        pytest.param("AnotherAgent", id="of one whose agent has seen the other"),
        pytest.param("Promised", id="of one that nobody knows to be another's"),
    ],
)
async def test_what_somebody_else_publishes_is_left_alone(world: World, kinds: None, reason: str) -> None:
    """Koordinator and Volcano offer resources of the same names; ours goes there when theirs has gone."""
    await world.node("theirs", cpu=32, memory="64Gi", **{n.replace("/", "__"): v for n, v in OTHERS.items()})
    await world.node("ours", cpu=8, memory="8Gi")
    async with publishing(world.api) as publisher:
        await say(world.api, "ours", 4000, 2 << 30)
        if reason:
            await say(world.api, "theirs", 1000, 1 << 30, reason)
        await until_offered(world, "ours", "4k")
        await asyncio.sleep(0.5)
        assert await offered(world.api, "theirs") == ("12k", "24Gi")
        if reason:
            await world.api.request("DELETE", path_of(NODE_COLOCATIONS, name="theirs"), {})
            await asyncio.sleep(0.5)
            assert await offered(world.api, "theirs") == ("12k", "24Gi"), "what is not ours is not taken away"
        assert publisher.writes == 1
        nothing = dict.fromkeys(OTHERS)
        free: dict[str, Any] = {"status": {"capacity": nothing, "allocatable": nothing}}
        await world.api.request("PATCH", path_of(NODES, name="theirs", subresource="status"), free, content_type=MERGE)
        await say(world.api, "theirs", 1000, 1 << 30)
        await until_offered(world, "theirs", "1k")


@pytest.mark.parametrize("reason", [pytest.param("", id="not governed"), pytest.param("AnotherAgent", id="seen")])
async def test_another_s_nothing_is_left_alone_too(world: World, kinds: None, reason: str) -> None:
    """Koordinator says 0 of a node that is loaded."""
    nothing: dict[str, Any] = {n.replace("/", "__"): "0" for n in OTHERS}
    await world.node("theirs", cpu=32, memory="64Gi", **nothing)
    async with publishing(world.api) as publisher:
        if reason:
            await say(world.api, "theirs", 1000, 1 << 30, reason)
        await asyncio.sleep(0.7)
        assert await offered(world.api, "theirs") == ("0", "0")
        assert publisher.writes == 0


async def test_the_command_publishes_and_ends_in_order(
    world: World, kinds: None, plane: ControlPlane, tmp_path: Path
) -> None:
    await world.node("n0", cpu=8, memory="8Gi")
    await say(world.api, "n0", 4000, 2 << 30)
    command = [sys.executable, "-m", "colocate.cli.main", "publish", "--kubeconfig", str(plane.kubeconfig())]
    with ended([*command, "--lease-namespace", "default"], dict(os.environ), tmp_path / "publish.log") as running:
        await until_offered(world, "n0", "4k")
        running.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(running.wait, 10) == 0


async def test_an_agent_that_is_silent_promises_nothing(
    world: World, kinds: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publication, "SILENT_SECONDS", 1.0)
    monkeypatch.setattr(publication, "LOOK_SECONDS", 0.2)
    await world.node("n0", cpu=8, memory="8Gi")
    async with publishing(world.api):
        await say(world.api, "n0", 4000, 2 << 30)
        await until_offered(world, "n0", "4k")
        await until_offered(world, "n0", "0")
        await say(world.api, "n0", 4000, 2 << 30, at=30)
        await until_offered(world, "n0", "4k")


@pytest.mark.parametrize("skew", [pytest.param(-86400, id="a day behind"), pytest.param(86400, id="a day ahead")])
async def test_a_clock_that_is_wrong_changes_nothing(
    world: World, kinds: None, monkeypatch: pytest.MonkeyPatch, skew: int
) -> None:
    """Silence is measured by the publisher's own clock, from one word to the next."""
    monkeypatch.setattr(publication, "SILENT_SECONDS", 3.0)
    monkeypatch.setattr(publication, "LOOK_SECONDS", 0.2)
    await world.node("n0", cpu=8, memory="8Gi")
    async with publishing(world.api):
        for cpu in range(1000, 7000, 1000):
            await say(world.api, "n0", cpu, 2 << 30, at=skew + cpu // 1000)
            if cpu > 1000:  # the first word of a node that was there before may be an old one
                await until_offered(world, "n0", f"{cpu // 1000}k")
            await asyncio.sleep(0.8)
        await until_offered(world, "n0", "0")


async def test_a_node_that_is_gone_takes_its_object_with_it(
    world: World, kinds: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publication, "ORPHANED_SECONDS", 0.5)
    monkeypatch.setattr(publication, "LOOK_SECONDS", 0.2)
    async with publishing(world.api):
        await say(world.api, "never", 4000, 2 << 30)

        async def gone() -> bool:
            found = msgspec.json.decode(await world.api.request("GET", NODE_COLOCATIONS))["items"]
            return not found

        await world.until(gone, "nobody speaks for a node that is not there")


async def test_a_gang_of_batch_pods_is_placed_on_what_is_promised(world: World, kinds: None) -> None:
    """Both halves: the gang waits until its node promises enough, and starts whole."""
    await world.node("n0", cpu=8, memory="8Gi")
    async with publishing(world.api), leader(world):
        await say(world.api, "n0", 1000, 1 << 30)
        await world.group("pg", 2)
        asked = {"requests": {BATCH_CPU: "800"}, "limits": {BATCH_CPU: "800"}}
        for name in ("a", "b"):
            await world.pod(name, "pg", spec={"containers": [{"name": "c", "image": "i", "resources": asked}]})
        await world.told("pg", "Unschedulable")
        await say(world.api, "n0", 2000, 1 << 30)
        await world.until_bound("a", "b")


async def has_power(world: World, name: str, used: str | None) -> None:
    """Once the annotation says so."""

    async def said() -> bool:
        node = msgspec.json.decode(await world.api.request("GET", path_of(NODES, name=name)))
        annotations = node["metadata"].get("annotations", {})
        return annotations.get(CPU_UTILIZATION) == used and (POWER_CURVE in annotations) == (used is not None)

    await world.until(said, f"{name} says that {used} of its CPUs are busy")


async def test_s2_7_a_gang_goes_where_it_draws_the_least_more(world: World, kinds: None) -> None:
    """Both halves: what agents say of their nodes' power is published, and gangs go by it; unknown nodes are last."""
    curve = [{"utilization": 0, "watts": 100}, {"utilization": 0.5, "watts": 150}, {"utilization": 1, "watts": 400}]
    for name in ("busy", "idle", "unknown"):
        await world.node(name, cpu=8, memory="8Gi")
        await say(world.api, name, 1000, 1 << 30)
    async with publishing(world.api), leader(world, Settings(policy=AgeAndLeastWatts.id)):
        for name, used in (("busy", 0.7), ("idle", 0.2)):
            path = path_of(NODE_COLOCATIONS, name=name, subresource="status")
            power = {"utilization": used, "curve": curve, "measured": True}
            await world.api.request("PATCH", path, {"status": {"power": power}}, content_type=MERGE)
            await has_power(world, name, str(used))
        await world.group("pg", 2)
        for name in ("a", "b"):
            await world.pod(name, "pg", cpu=2)
        assert set((await world.until_bound("a", "b")).values()) == {"idle"}
        path = path_of(NODE_COLOCATIONS, name="idle", subresource="status")
        await world.api.request("PATCH", path, {"status": {"power": None}}, content_type=MERGE)
        await has_power(world, "idle", None)


async def wants_gone(world: World, node: str, name: str, /, **other: Any) -> None:
    """As the agent of a node does."""
    pod = (await world.pods())[name]
    wanted = {"namespace": world.namespace, "name": name, "uid": pod.metadata.uid, "reason": "MemoryPressure"}
    path = path_of(NODE_COLOCATIONS, name=node, subresource="status")
    body = {"status": {"evict": [{**wanted, "graceSeconds": 0, **other}]}}
    await world.api.request("PATCH", path, body, content_type=MERGE)


async def gone(world: World, *names: str) -> None:
    async def none_of_them() -> bool:
        return not (await world.pods()).keys() & set(names)

    await world.until(none_of_them, f"{', '.join(names)} are gone")


async def on_node(world: World, name: str, node: str, **labels: str) -> None:
    await world.pod(name, labels=labels, spec={"nodeName": node})


async def test_a_pod_that_has_to_go_is_evicted_and_told_why(world: World, kinds: None) -> None:
    await world.node("n0", cpu=8, memory="8Gi")
    await on_node(world, "p", "n0", **BATCH)
    async with publishing(world.api):
        await say(world.api, "n0", 0, 0)
        await wants_gone(world, "n0", "p")
        await gone(world, "p")

        async def said() -> bool:
            return ("p", "EvictedForServices") in await world.events_of_pods()

        await world.until(said, "an Event says so")


async def test_gangs_are_broken_one_after_the_other(world: World, kinds: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first gives back on every node may be what the second was to go for; memory waits for nobody."""
    monkeypatch.setattr(evictions, "GANG_SECONDS", 4.0)
    monkeypatch.setattr(evictions, "AGAIN_SECONDS", 0.2)
    for node, names in (("n0", ("a-0", "a-1")), ("n1", ("b-0", "c-0"))):
        await world.node(node, cpu=8, memory="8Gi")
        for name in names:
            await on_node(world, name, node, **BATCH, **{GANGS[0]: name[0]})
    async with publishing(world.api):
        for node in ("n0", "n1"):
            await say(world.api, node, 0, 0)
        await wants_gone(world, "n0", "a-0", reason="FrozenTooLong")
        await gone(world, "a-0")
        broken = time.monotonic()
        await wants_gone(world, "n1", "b-0", reason="FrozenTooLong")
        await wants_gone(world, "n0", "a-1", reason="FrozenTooLong")
        await gone(world, "a-1")
        assert "b-0" in await world.pods(), "another member of the same gang goes at once, another gang is spared"
        await gone(world, "b-0")
        assert time.monotonic() - broken > 3.0
        await wants_gone(world, "n1", "c-0", reason="MemoryPressure")
        await gone(world, "c-0")
        assert time.monotonic() - broken < 8.0, "for memory at once"


async def test_of_many_gangs_that_are_named_at_once_one_is_broken(world: World, kinds: None) -> None:
    for i in range(6):
        await world.node(f"n{i}", cpu=8, memory="8Gi")
        await on_node(world, f"p{i}", f"n{i}", **BATCH, **{GANGS[0]: f"g{i}"})
        await say(world.api, f"n{i}", 0, 0)
        await wants_gone(world, f"n{i}", f"p{i}", reason="FrozenTooLong")
    async with publishing(world.api):
        await asyncio.sleep(2.0)
        assert len(await world.pods()) == 5


@contextlib.asynccontextmanager
async def modelled_agent(directory: Path, *pods: str) -> AsyncIterator[tuple[Agent, Callable[[], Awaitable[None]]]]:
    """An agent of n0 on the kernel model, and its next tick; what it says to the API server is real."""
    kernel = ModelKernel(version=2)
    for path in ("/kubepods", "/kubepods/burstable", "/kubepods/besteffort", "/kubepods/batch"):
        kernel.mkdir(UNIFIED, path)
    for uid in pods:
        kernel.mkdir(UNIFIED, f"/kubepods/batch/pod{uid}")
        kernel.spawn("hog", f"/kubepods/batch/pod{uid}")
    agent = Agent(kernel, ColocationPolicy(), kernels.load(jit=False), Journal(directory, "boot"), clock=kernel)
    publisher = Publisher(
        agent, Policies(agent, None), "n0", PowerWatch(lambda: agent.policy.spec.power, None), shadow=False
    )
    agent.open()

    async def tick() -> None:
        await agent.tick()
        await agent.writer.settle()
        kernel.advance(1.0)

    task = asyncio.ensure_future(publisher.run())
    try:
        yield agent, tick
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await agent.close()


async def test_a_pod_that_a_law_evicts_goes_through_its_agent_and_the_api_server(
    world: World, kinds: None, plane: ControlPlane, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(plane.kubeconfig()))
    await world.node("n0", cpu=8, memory="8Gi")
    await on_node(world, "p", "n0", **BATCH)
    await on_node(world, "svc", "n0")
    uid = (await world.pods())["p"].metadata.uid
    async with modelled_agent(tmp_path, uid) as (agent, tick), publishing(world.api):

        async def knows_its_pods() -> bool:
            await tick()
            return agent.observer.lister.watched and uid in agent.observer.lister.pods

        async def says_so() -> bool:
            await tick()
            return (await offered(world.api, "n0"))[0] not in (None, "0")

        await world.until(knows_its_pods, "the agent knows the pods of its node")
        await world.until(says_so, "what batch may have is published")
        wish = Request(verb="evict", workload=f"pod:{uid}", law="memory", reason="MemoryPressure", message="svc stalls")
        agent.laws = msgspec.structs.replace(agent.laws, pending=(wish,))
        await tick()
        await gone(world, "p")
        assert "svc" in await world.pods()


async def test_a_node_that_is_made_anew_offers_again_what_its_agent_says(
    world: World, kinds: None, plane: ControlPlane, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of the same name: soon enough, or when the object of the former one has gone already."""
    monkeypatch.setenv("KUBECONFIG", str(plane.kubeconfig()))
    monkeypatch.setattr(agent_publisher, "HEARTBEAT_SECONDS", 0.5)
    monkeypatch.setattr(publication, "ORPHANED_SECONDS", 1.0)
    monkeypatch.setattr(publication, "LOOK_SECONDS", 0.2)
    async with modelled_agent(tmp_path) as (_, tick), publishing(world.api):

        async def says_so() -> bool:
            await tick()
            return (await offered(world.api, "n0"))[0] not in (None, "0")

        for away in (0.0, 3.0):
            await world.node("n0", cpu=8, memory="8Gi")
            await world.until(says_so, "what batch may have is published")
            await world.delete(NODES, "n0")
            await asyncio.sleep(away)
        await world.node("n0", cpu=8, memory="8Gi")
        await world.until(says_so, "what batch may have is published")


@pytest.mark.parametrize(
    ("resource", "said"),
    [
        pytest.param("pods", 'cannot list resource "pods"', id="of the pods"),
        pytest.param("nodecolocations/status", 'cannot patch resource "nodecolocations/status"', id="of its object"),
        pytest.param("colocationpolicies", 'cannot list resource "colocationpolicies"', id="of the policies"),
    ],
)
async def test_a_right_that_an_agent_lacks_is_among_its_problems(
    world: World,
    kinds: None,
    plane: ControlPlane,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    resource: str,
    said: str,
) -> None:
    """By name; it governs its node all the same."""
    await world.node("n0", cpu=8, memory="8Gi")
    async with installed(world.api, "base/agent.yaml"):
        path = f"{COLLECTIONS['ClusterRole']}/colocate-agent"
        role = json.loads(await world.api.request("GET", path))
        role["rules"] = [rule for rule in role["rules"] if resource not in rule["resources"]]
        await world.api.request("PUT", path, role)
        token = await token_of(world.api, "colocate-agent", {})
        async with with_token(plane, tmp_path, token):
            monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
            async with modelled_agent(tmp_path) as (agent, tick):

                async def told() -> bool:
                    await tick()
                    return any(said in problem for problem in agent.problems().values())

                await world.until(told, "the missing right is named")


async def test_a_disruption_budget_holds_until_it_allows_it(world: World, kinds: None) -> None:
    await world.node("n0", cpu=8, memory="8Gi")
    budgets = path_of("/apis/policy/v1/poddisruptionbudgets", world.namespace)
    budget = {"minAvailable": 1, "selector": {"matchLabels": {"app": "train"}}}
    meta = {"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": {"name": "train"}}
    await world.api.request("POST", budgets, {**meta, "spec": budget})
    await on_node(world, "p", "n0", app="train", **BATCH)
    async with publishing(world.api):
        await say(world.api, "n0", 0, 0)
        await wants_gone(world, "n0", "p")
        await asyncio.sleep(3.0)
        assert "p" in await world.pods()
        await world.api.request("DELETE", f"{budgets}/train", {})
        await gone(world, "p")


@pytest.mark.parametrize(
    ("node", "labels", "other", "reason"),
    [
        pytest.param("n1", BATCH, {}, "Promised", id="a pod of another node"),
        pytest.param("n0", {}, {}, "Promised", id="a service"),
        pytest.param("n0", BATCH, {"uid": "another"}, "Promised", id="a namesake of one that is gone"),
        pytest.param("n0", BATCH, {"name": "../../../../version"}, "Promised", id="what is no pod's name"),
        pytest.param("n0", BATCH, {}, "Stopped", id="an agent that has ended"),
        pytest.param("n0", BATCH, {}, "Shadow", id="an agent that only computes"),
    ],
)
async def test_whom_an_agent_does_not_end(
    world: World, kinds: None, node: str, labels: dict[str, str], other: dict[str, str], reason: str
) -> None:
    for name in ("n0", "n1"):
        await world.node(name, cpu=8, memory="8Gi")
    await on_node(world, "p", node, **labels)
    await on_node(world, "q", "n1", **BATCH)
    async with publishing(world.api):
        await say(world.api, "n0", 0, 0, reason)
        await wants_gone(world, "n0", "p", **other)
        await say(world.api, "n1", 0, 0)
        await wants_gone(world, "n1", "q")
        await gone(world, "q")
        await asyncio.sleep(0.5)
        assert "p" in await world.pods()


@pytest.mark.parametrize(
    ("promised", "reason", "silent", "cpu"),
    [
        pytest.param({BATCH_CPU: "4000"}, "Promised", 10.0, "4000", id="what is said"),
        pytest.param({BATCH_CPU: "4k"}, "Promised", 10.0, "4000", id="as the API server writes it"),
        pytest.param({BATCH_CPU: "9k"}, "Promised", 10.0, "8000", id="more than the node has"),
        pytest.param({BATCH_CPU: "9e60"}, "Promised", 10.0, "8000", id="more than there is anywhere"),
        pytest.param({BATCH_CPU: "1e999999999"}, "Promised", 10.0, "0", id="what would take for ever to read"),
        pytest.param({BATCH_CPU: "9" * 5000}, "Promised", 10.0, "0", id="what is too long to read"),
        pytest.param({BATCH_CPU: "4000"}, "Promised", 151.0, "0", id="said too long ago"),
        pytest.param({BATCH_CPU: "4000"}, "Shadow", 1.0, None, id="said by one that only computes"),
        pytest.param({BATCH_CPU: "-5"}, "Promised", 1.0, "0", id="less than nothing"),
        pytest.param({BATCH_CPU: "lots"}, "Promised", 1.0, "0", id="no quantity"),
        pytest.param({}, "", 0.0, "0", id="nothing said yet"),
    ],
)
def test_what_a_node_s_status_is_to_say(promised: Quantities, reason: str, silent: float, cpu: str | None) -> None:
    status = NodeColocationStatus(promised=promised, reason=reason)
    assert wanted(status, {"cpu": "8", "memory": "8Gi"}, silent)[BATCH_CPU] == cpu


def test_nothing_is_written_that_is_so_already() -> None:
    assert not differs({BATCH_CPU: "4k"}, {BATCH_CPU: "4000"})
    assert not differs({}, {BATCH_CPU: None})
    assert differs({BATCH_CPU: "4k"}, {BATCH_CPU: None})
    assert differs({}, {BATCH_CPU: "0"})


@contextlib.asynccontextmanager
async def installed(api: Api, file: str) -> AsyncIterator[None]:
    """What a manifest says of rights, as long as the block runs."""
    for body in yaml.safe_load_all((MANIFESTS / "controller/namespace.yaml").read_text()):
        await ignoring_conflict(api, COLLECTIONS["Namespace"], body)
    made = []
    try:
        for body in yaml.safe_load_all((MANIFESTS / file).read_text()):
            collection = (COLLECTIONS | POLICIES).get(body["kind"])
            if collection is not None:
                path = path_of(collection, body["metadata"].get("namespace", ""))
                await ignoring_conflict(api, path, body)
                made.append(f"{path}/{body['metadata']['name']}")
        yield
    finally:
        for path in reversed(made):
            await api.request("DELETE", path, {})


async def token_of(api: Api, account: str, spec: dict[str, Any]) -> str:
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
    path = path_of("/api/v1/serviceaccounts", "colocate-system", account, "token")
    token: str = msgspec.json.decode(await api.request("POST", path, request))["status"]["token"]
    return token


@contextlib.asynccontextmanager
async def with_token(plane: ControlPlane, folder: Path, token: str) -> AsyncIterator[Api]:
    config = json.loads(plane.kubeconfig().read_text())
    config["users"][0]["user"] = {"token": token}
    (folder / "kubeconfig").write_text(json.dumps(config))
    async with Api.connect(str(folder / "kubeconfig")) as api:
        yield api


async def test_the_role_of_the_manifests_is_enough_to_publish(
    world: World, kinds: None, plane: ControlPlane, tmp_path: Path
) -> None:
    await world.node("n0", cpu=8, memory="8Gi")
    await on_node(world, "p", "n0", **BATCH)
    async with installed(world.api, "base/publication.yaml"):
        token = await token_of(world.api, "colocate-publication", {})
        async with with_token(plane, tmp_path, token) as api, publishing(api, "colocate-system"):
            await say(world.api, "n0", 4000, 2 << 30)
            await until_offered(world, "n0", "4k")
            await wants_gone(world, "n0", "p")
            await gone(world, "p")


async def test_an_agent_may_write_of_its_own_node_only(
    world: World, kinds: None, plane: ControlPlane, tmp_path: Path
) -> None:
    """By the manifests' role and admission policy, with a token as its pod gets one."""
    await world.node("n0", cpu=8, memory="8Gi")
    async with installed(world.api, "base/agent.yaml"):
        container = {"name": "agent", "image": "colocate"}
        spec = {"serviceAccountName": "colocate-agent", "nodeName": "n0", "containers": [container]}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "agent-0"}, "spec": spec}
        answer = await world.api.request("POST", path_of(PODS, "colocate-system"), pod)
        uid = msgspec.json.decode(answer)["metadata"]["uid"]
        bound = {"apiVersion": "v1", "kind": "Pod", "name": "agent-0", "uid": uid}
        token = await token_of(world.api, "colocate-agent", {"boundObjectRef": bound})
        try:
            async with with_token(plane, tmp_path, token) as agent:
                await _refused_elsewhere(world, agent)
                await say(agent, "n0", 4000, 1 << 30)
                with pytest.raises(ApiError, match="forbidden"):
                    await agent.request("PATCH", path_of(NODES, name="n0"), {"metadata": {}}, content_type=MERGE)
                with pytest.raises(ApiError, match="forbidden"):
                    await agent.request("DELETE", path_of(NODE_COLOCATIONS, name="n0"), {})
        finally:
            await world.api.request("DELETE", path_of(PODS, "colocate-system", "agent-0"), {"gracePeriodSeconds": 0})


async def _refused_elsewhere(world: World, agent: Api) -> None:
    async def refused() -> bool:
        try:
            await say(agent, "n1", 4000, 1 << 30)
        except ApiError as error:
            return error.status == 422 and "its own node only" in error.message
        return False

    await world.until(refused, "the policy is in force")
