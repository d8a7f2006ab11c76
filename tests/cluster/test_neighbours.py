"""Other software of the same names on the cluster: an upstream CRD, an upstream scheduler, KubeRay's fixed name."""

from __future__ import annotations

import asyncio
import copy
import json
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from colocate.kube.client import DEFINITIONS, LEASES, MERGE, PODS, Api, path_of
from colocate.localcluster.controlplane import ControlPlane
from podgroup.queue.entry import Settings
from tests.cluster.conftest import HIGH, World, leader
from tests.cluster.proxy import Proxy, Request
from tests.cluster.test_faults import process

UPSTREAM = "scheduler-plugins-scheduler"


@pytest.fixture
async def upstream_schema(api: Api) -> AsyncIterator[None]:
    """The PodGroup of scheduler-plugins as it is installed in many clusters: its status has no conditions."""
    path = f"{DEFINITIONS}/podgroups.scheduling.x-k8s.io"
    ours = json.loads(await api.request("GET", path))
    theirs = copy.deepcopy(ours)
    for version in theirs["spec"]["versions"]:
        for field in ("conditions", "observedGeneration"):
            del version["schema"]["openAPIV3Schema"]["properties"]["status"]["properties"][field]
    await api.request("PUT", path, theirs)
    await asyncio.sleep(1.0)  # until the API server serves by it
    yield
    theirs = json.loads(await api.request("GET", path))
    await api.request("PUT", path, {**theirs, "spec": ours["spec"]})
    await asyncio.sleep(1.0)


async def test_a_foreign_schema_without_conditions_gets_what_it_has_room_for(
    world: World, upstream_schema: None
) -> None:
    await world.node("n", cpu=2, memory="1Gi")
    async with leader(world):
        await world.group("runs", 2)
        await world.group("waits", 3)
        await world.group("theirs", 3)
        for i in range(2):
            await world.pod(f"runs-{i}", "runs", cpu=1)
        await world.pod("waits-0", "waits", cpu=1)
        await world.until_bound("runs-0", "runs-1")

        async def counted() -> bool:
            status = (await world.status("runs")).status
            return status.phase == "Running" and status.running == 2

        await world.until(counted, "phase and counters are upstream's")
        await world.told("waits", "NotEnoughMembers", "1 of 3 members exist")
        status = (await world.status("waits")).status
        assert status.conditions == []
        assert status.observed_generation == 0


async def lease(world: World, age_seconds: float) -> None:
    """Of an upstream scheduler that renewed it so long ago."""
    renewed = (datetime.now(UTC) - timedelta(seconds=age_seconds)).isoformat(timespec="microseconds")
    spec = {"holderIdentity": "them", "leaseDurationSeconds": 15, "renewTime": renewed.replace("+00:00", "Z")}
    body = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": UPSTREAM}, "spec": spec}
    await world.create(LEASES, body)


async def test_the_name_of_an_upstream_scheduler_is_refused_while_that_one_lives(
    world: World, plane: ControlPlane
) -> None:
    await lease(world, age_seconds=1)
    command = [sys.executable, "-m", "colocate.cli.main", "controller", "--kubeconfig", str(plane.kubeconfig())]
    running = await asyncio.create_subprocess_exec(
        *command, "--also-answer-to", UPSTREAM, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    _, said = await asyncio.wait_for(running.communicate(), 30)
    await world.api.request("DELETE", path_of(LEASES, world.namespace, UPSTREAM))
    assert running.returncode == 2
    assert f"that scheduler is alive (lease {world.namespace}/{UPSTREAM}, held by them); stop it first" in said.decode()


async def test_pods_of_kuberay_are_served_once_the_upstream_scheduler_is_gone(
    world: World, plane: ControlPlane, tmp_path: Path
) -> None:
    """KubeRay writes the name into its pods, whatever its operator is told."""
    await lease(world, age_seconds=60)
    await world.node("n", cpu=4, memory="1Gi")
    with process(world, plane.kubeconfig(), tmp_path / "log", "--also-answer-to", UPSTREAM):
        await world.group("ray-cluster-pg", 2)
        for name in ("ray-head", "ray-worker-0"):
            await world.pod(name, "ray-cluster-pg", cpu=1, spec={"schedulerName": UPSTREAM})
        await world.until_bound("ray-head", "ray-worker-0")


async def test_without_the_option_pods_of_that_name_are_left_alone(world: World) -> None:
    await world.node("n", cpu=4, memory="1Gi")
    async with leader(world, Settings()):
        await world.group("ray-cluster-pg", 1)
        await world.pod("ray-head", "ray-cluster-pg", cpu=1, spec={"schedulerName": UPSTREAM})
        await world.pod("ours", cpu=1)
        await world.until_bound("ours")
        assert (await world.status("ray-cluster-pg")).status.phase == ""


async def test_the_room_that_kube_scheduler_has_made_free_for_its_pod_is_left_to_it(world: World) -> None:
    """C07: `nominatedNodeName` is there for other schedulers to read; to a more important gang it does not stand."""
    await world.node("n", cpu=4, memory="1Gi")
    await world.pod("shop", cpu=4, spec={"schedulerName": "somebody-else"})
    nominated = {"status": {"nominatedNodeName": "n"}}
    path = path_of(PODS, world.namespace, "shop", "status")
    await world.api.request("PATCH", path, nominated, content_type=MERGE)
    async with leader(world):
        await world.group("batch", 4)
        for i in range(4):
            await world.pod(f"batch-{i}", "batch", cpu=1)
        await world.told("batch", "Unschedulable", "0 of 4 members fit; blocked by cpu")
        await world.only_bound()
        await world.pod("urgent", cpu=1, spec={"priorityClassName": HIGH})
        await world.until_bound("urgent")
        await world.api.request("PATCH", path, {"status": {"nominatedNodeName": None}}, content_type=MERGE)
        await world.delete(PODS, "urgent", 0)
        await world.until_bound(*(f"batch-{i}" for i in range(4)))


async def test_members_whose_room_another_scheduler_takes_are_placed_elsewhere(world: World, proxy: Proxy) -> None:
    """1.8: between the plan and the binds, which the API server is too busy for; nothing is taken back for it."""
    for name in ("a", "b", "c", "d"):
        await world.node(name, cpu=2, memory="1Gi")
    taken = asyncio.Event()

    async def too_busy(request: Request) -> str:
        return "503" if request.path.endswith("/binding") and not taken.is_set() else "pass"

    proxy.fault = too_busy
    async with Api.connect(str(proxy.kubeconfig())) as through, leader(World(through, world.namespace)):
        await world.group("pg", 3)
        for i in range(3):
            await world.pod(f"p{i}", "pg", cpu=2)

        async def planned() -> list[str]:
            return [m.node for m in (await world.plan("pg")).spec.members]

        before = await world.until(planned, "there is a plan")
        plan = (await world.plan("pg")).spec.plan_id
        await world.pod("theirs", cpu=2, spec={"schedulerName": "somebody-else", "nodeName": before[2]})

        async def moved() -> bool:
            return before[2] not in await planned()

        await world.until(moved, "the member is planned elsewhere")
        taken.set()
        bound = await world.until_bound("p0", "p1", "p2", "theirs")
    assert len(set(bound.values())) == 4, "each has a node of its own"
    assert (await world.plan("pg")).spec.plan_id == plan
