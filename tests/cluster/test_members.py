"""What becomes of members: fragments, roles, what operators create, losses, refusals, and input that cannot be."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from colocate.kube.client import MERGE, NODES, PODS, Api, ApiError, path_of
from podgroup.api import POD_GROUPS
from podgroup.controller.loop import Controller
from podgroup.queue.entry import Settings
from tests.cluster.conftest import HIGH, LOW, World, leader
from tools.rights import COLLECTIONS

MPI_JOB = {
    "apiVersion": "kubeflow.org/v2beta1",
    "kind": "MPIJob",
    "name": "pi",
    "uid": "0c0ffee0-0000-4000-8000-000000000000",
    "controller": True,
}
RACK = "topology.kubernetes.io/rack"


async def fragments(world: World) -> None:
    """Eight nodes of eight GPUs with one free each."""
    for i in range(8):
        await world.node(f"n{i}", nvidia_com__gpu=8, cpu=64, memory="1Gi")
        await world.pod(f"used-{i}", nvidia_com__gpu=7, spec={"nodeSelector": {"kubernetes.io/hostname": f"n{i}"}})


async def test_k1_eight_free_gpus_on_eight_nodes_are_not_eight_gpus(world: World) -> None:
    await fragments(world)
    used = [f"used-{i}" for i in range(8)]
    async with leader(world):
        await world.until_bound(*used)
        await world.group("pg", 1)
        await world.pod("p", "pg", nvidia_com__gpu=8)
        await world.told("pg", "Unschedulable", "0 of 1 members fit; blocked by nvidia.com/gpu; largest free block 8x1")
        await world.only_bound(*used)
        await world.pod("k3", nvidia_com__gpu=1)
        await world.until_bound(*used, "k3")


async def test_k2_and_the_same_on_one_required_host(world: World) -> None:
    await fragments(world)
    used = [f"used-{i}" for i in range(8)]
    async with leader(world):
        await world.until_bound(*used)
        await world.group("pg", 2, annotations={"colocate.io/required-topology": "kubernetes.io/hostname"})
        for i in range(2):
            await world.pod(f"p{i}", "pg", nvidia_com__gpu=1)
        text = "1 of 2 members fit; blocked by required topology kubernetes.io/hostname"
        await world.told("pg", "Unschedulable", text)
        await world.only_bound(*used)


async def test_a5_nobody_is_moved_to_make_one_block_of_two_halves(world: World) -> None:
    for i in range(2):
        await world.node(f"n{i}", nvidia_com__gpu=2, cpu=8, memory="1Gi")
        await world.pod(f"used-{i}", nvidia_com__gpu=1, spec={"nodeSelector": {"kubernetes.io/hostname": f"n{i}"}})
    async with leader(world):
        await world.until_bound("used-0", "used-1")
        await world.group("pg", 1)
        await world.pod("p", "pg", nvidia_com__gpu=2)
        await world.told("pg", "Unschedulable", "0 of 1 members fit; blocked by nvidia.com/gpu; largest free block 2x1")
        await world.only_bound("used-0", "used-1")


@pytest.mark.parametrize(
    ("small", "starts"), [(7, False), (1, True)], ids=["K6 a role without room", "K7 both roles fit"]
)
async def test_roles_start_together_or_not(world: World, small: int, starts: bool) -> None:
    for i in range(7):
        await world.node(f"n{i}", nvidia_com__gpu=1, cpu=64, memory="1Gi")
    await world.node("big", nvidia_com__gpu=8, cpu=64, memory="1Gi")
    async with leader(world):
        await world.group("pg", 2)
        await world.pod("a", "pg", nvidia_com__gpu=8)
        await world.pod("b", "pg", nvidia_com__gpu=small)
        if starts:
            assert (await world.until_bound("a", "b"))["a"] == "big"
        else:
            await world.told("pg", "Unschedulable")
            await world.only_bound()


@pytest.mark.parametrize(("nodes", "gpus", "where"), [([2], 2, None), ([1, 1], 1, {"n0", "n1"})], ids=["A1", "A2"])
async def test_two_members_with_gpus(world: World, nodes: list[int], gpus: int, where: set[str] | None) -> None:
    for i, size in enumerate(nodes):
        await world.node(f"n{i}", nvidia_com__gpu=size, cpu=8, memory="1Gi")
    async with leader(world):
        await world.group("pg", 2)
        for i in range(2):
            await world.pod(f"p{i}", "pg", nvidia_com__gpu=gpus)
        if where is None:
            await world.told("pg", "Unschedulable")
            await world.only_bound()
        else:
            assert set((await world.until_bound("p0", "p1")).values()) == where


async def test_a3_room_that_a_leaving_pod_still_holds_is_waited_for(world: World) -> None:
    await world.node("n", played=False, nvidia_com__gpu=4, cpu=8, memory="1Gi")
    async with leader(world):
        await world.pod("leaving", nvidia_com__gpu=1)
        await world.until_bound("leaving")
        await world.delete(PODS, "leaving", 30)
        await world.group("pg", 2)
        for i in range(2):
            await world.pod(f"p{i}", "pg", nvidia_com__gpu=2)
        await world.only_bound("leaving")
        await world.delete(PODS, "leaving", 0)
        await world.until_bound("p0", "p1")


async def test_a10_a_rack_that_becomes_free_takes_the_gang_whole(world: World) -> None:
    for i in range(4):
        await world.node(f"n{i}", {RACK: f"r{i // 2}"}, cpu=8, memory="1Gi")
    async with leader(world):
        for i in (1, 2):
            await world.pod(f"used-{i}", cpu=8, spec={"nodeSelector": {"kubernetes.io/hostname": f"n{i}"}})
        await world.until_bound("used-1", "used-2")
        await world.group("pg", 2, annotations={"colocate.io/required-topology": RACK})
        for i in range(2):
            await world.pod(f"p{i}", "pg", cpu=8)
        await world.told("pg", "Unschedulable", RACK)
        await world.only_bound("used-1", "used-2")
        await world.delete(PODS, "used-2", 0)
        bound = await world.until_bound("used-1", "p0", "p1")
        assert {bound["p0"], bound["p1"]} == {"n2", "n3"}


async def test_v20_a_gang_waits_for_what_is_in_its_way_and_starts_when_it_has_gone(world: World) -> None:
    for i in range(4):
        await world.node(f"n{i}", cpu=1, memory="1Gi")
    async with leader(world):
        others = [f"rs-{i}" for i in range(3)]
        for name in others:
            await world.pod(name, cpu=1)
        await world.until_bound(*others)
        await world.group("pg", 3)
        for i in range(3):
            await world.pod(f"p{i}", "pg", cpu=1)
        await world.told("pg", "Unschedulable", "1 of 3 members fit; blocked by cpu")

        async def marked() -> bool:
            conditions = (await world.pods())["p0"].status.conditions
            return [c.reason for c in conditions if c.type == "PodScheduled"] == ["Unschedulable"]

        await world.until(marked, "an autoscaler sees that capacity is missing")
        for name in others:
            await world.delete(PODS, name, 0)
        await world.until_bound("p0", "p1", "p2")


async def test_v23_members_that_ask_for_nothing_are_members_too(world: World) -> None:
    await world.node("n", cpu=2, memory="1Gi")
    async with leader(world):
        await world.group("pg", 4)
        for i in range(2):
            await world.pod(f"cpu-{i}", "pg", cpu=1)
            await world.pod(f"none-{i}", "pg")
        await world.until_bound("cpu-0", "cpu-1", "none-0", "none-1")


# what operators create


async def patch_group(world: World, name: str, spec: dict[str, Any]) -> None:
    await world.api.request("PATCH", path_of(POD_GROUPS, world.namespace, name), {"spec": spec}, content_type=MERGE)


async def test_m1_and_m3_a_group_that_is_edited_while_it_waits(world: World) -> None:
    """mpi-operator rewrites the whole spec with every edit of the job."""
    await world.node("n", cpu=4, memory="1Gi")
    async with leader(world):
        await world.group("pi", 3, scheduleTimeoutSeconds=900, minResources={"cpu": "100000"})
        for name in ("pi-launcher", "pi-worker-0", "pi-worker-1"):
            await world.pod(name, "pi", cpu=1)
        await world.told("pi", "Unschedulable", "minResources")
        await world.only_bound()
        await patch_group(world, "pi", {"scheduleTimeoutSeconds": 10, "minResources": None})
        await world.until_bound("pi-launcher", "pi-worker-0", "pi-worker-1")
        assert (await world.plan("pi")).spec.timeout_seconds == 10


async def test_m4_a_launcher_that_is_made_after_its_workers_run(world: World) -> None:
    """mpi-operator#608: launcherCreationPolicy WaitForWorkersReady, and minMember counts the launcher."""
    await world.node("n", cpu=4, memory="1Gi")
    async with leader(world, Settings(creation_grace_seconds=0.5)):
        await world.group("pi", 3, minResources={"cpu": "3"})
        for i in range(2):
            await world.pod(f"pi-worker-{i}", "pi", cpu=1, owner=MPI_JOB)
        await world.until_bound("pi-worker-0", "pi-worker-1")

        async def named() -> bool:
            return "CreationDependency" in (await world.plan("pi")).status.message

        await world.until(named, "the dependency is named")
        await world.pod("pi-launcher", "pi", cpu=1, owner=MPI_JOB)
        await world.until_bound("pi-worker-0", "pi-worker-1", "pi-launcher")


async def test_m5_a_ray_cluster_that_is_scaled_down_keeps_running(world: World) -> None:
    """KubeRay never updates its PodGroup: it still says three."""
    await world.node("n", cpu=4, memory="1Gi")
    async with leader(world):
        await world.group("ray", 3)
        for name in ("ray-head", "ray-worker-0", "ray-worker-1"):
            await world.pod(name, "ray", cpu=1)
        await world.until_bound("ray-head", "ray-worker-0", "ray-worker-1")
        await world.delete(PODS, "ray-worker-1", 0)
        await world.only_bound("ray-head", "ray-worker-0")

        async def goes_on() -> bool:  # the status follows the pods
            return (await world.status("ray")).status.phase in ("Pending", "Running")

        await world.until(goes_on, "the gang goes on with two")


# losses and refusals


async def test_a_gang_that_lost_a_member_is_repaired_before_newcomers(world: World) -> None:
    for i in range(2):
        await world.node(f"n{i}", cpu=1, memory="1Gi")
    async with leader(world):
        await world.group("pg", 2)
        for i in range(2):
            await world.pod(f"p{i}", "pg", cpu=1)
        await world.until_bound("p0", "p1")
        await world.pod("newcomer", cpu=1)
        await world.delete(PODS, "p1", 0)
        await world.only_bound("p0")
        await world.pod("p1-again", "pg", cpu=1)
        await world.until_bound("p0", "p1-again")


async def test_a_member_that_its_kubelet_refused_is_replaced(world: World) -> None:
    for i in range(2):
        await world.node(f"n{i}", cpu=1, memory="1Gi")
    async with leader(world):
        await world.group("pg", 2)
        await world.pod("p0", "pg", cpu=1)
        await world.pod("p1", "pg", cpu=1, annotations={"colocate.io/simulated-rejection": "OutOfcpu"})
        await world.told("pg", "MemberLost", "p1 did not start: OutOfcpu")
        await world.pod("p1-again", "pg", cpu=1)

        async def started() -> bool:
            return (await world.plan("pg")).status.phase == "Running"

        await world.until(started, "the gang runs")
        await world.only_bound("p0", "p1", "p1-again")


async def test_a_gang_whose_member_is_never_replaced_is_taken_back(world: World) -> None:
    for i in range(2):
        await world.node(f"n{i}", cpu=1, memory="1Gi")
    async with leader(world):
        await world.group("pg", 2, scheduleTimeoutSeconds=2)
        await world.pod("p0", "pg", cpu=1)
        await world.pod("p1", "pg", cpu=1, annotations={"colocate.io/simulated-rejection": "OutOfcpu"})
        message = await world.told("pg", "BackingOff")
        assert message == "1 of 2 members were taken by their kubelets in time; taken back"
        assert "p0" not in await world.bound()


async def test_a_kubelet_that_refuses_every_replacement_does_not_hold_a_gang_for_ever(world: World) -> None:
    """All attempts to repair a start share its one timeout."""
    refused = {"colocate.io/simulated-rejection": "UnexpectedAdmissionError"}
    for i in range(2):
        await world.node(f"n{i}", cpu=1, memory="1Gi")

    async def owner() -> None:
        for i in range(100):
            await world.pod(f"p1-{i}", "pg", cpu=1, annotations=refused)
            while (await world.pods())[f"p1-{i}"].status.phase != "Failed":
                await asyncio.sleep(0.05)

    async with leader(world):
        await world.group("pg", 2, scheduleTimeoutSeconds=4)
        await world.pod("p0", "pg", cpu=1)
        making = asyncio.ensure_future(owner())
        try:
            await world.told("pg", "BackingOff", "taken back")
            assert "p0" not in await world.pods()
        finally:
            making.cancel()
            await asyncio.gather(making, return_exceptions=True)


async def test_a_node_that_goes_away_before_its_kubelet_answers(world: World) -> None:
    await world.node("good", cpu=1, memory="1Gi")
    await world.node("silent", cpu=1, memory="1Gi", played=False)
    async with leader(world, Settings(node_loss_grace_seconds=1.0, most_lost_nodes_ratio=1.0)):
        await world.group("pg", 2)
        for i in range(2):
            await world.pod(f"p{i}", "pg", cpu=1)
        bound = await world.until_bound("p0", "p1")
        lost = next(name for name, node in bound.items() if node == "silent")
        await world.delete(NODES, "silent")

        async def deleted() -> bool:
            return lost not in await world.pods()

        await world.until(deleted, "the pod of the lost node is deleted")
        await world.node("other", cpu=1, memory="1Gi")
        await world.pod("again", "pg", cpu=1)

        async def started() -> bool:
            return (await world.plan("pg")).status.phase == "Running"

        await world.until(started, "the gang runs")


# input that cannot be


async def test_a_group_larger_than_the_cluster_waits_and_blocks_nobody(world: World) -> None:
    await world.node("n", cpu=4, memory="1Gi")
    async with leader(world, Settings(reserve_after_seconds=0.0)):
        await world.group("huge", 9)
        for i in range(9):
            await world.pod(f"huge-{i}", "huge", cpu=1)
        await world.told("huge", "Unschedulable", "4 of 9 members fit")
        await world.group("small", 2)
        for i in range(2):
            await world.pod(f"small-{i}", "small", cpu=1)
        await world.until_bound("small-0", "small-1")


@pytest.mark.parametrize("least", [0, -1])
async def test_an_impossible_quorum_is_refused_by_the_api_server(world: World, least: int) -> None:
    with pytest.raises(ApiError, match="minMember"):
        await world.group("pg", least)


async def test_members_of_two_schedulers_do_not_start(world: World) -> None:
    await world.node("n", cpu=4, memory="1Gi")
    async with leader(world):
        await world.group("pg", 2)
        await world.pod("ours", "pg", cpu=1)
        await world.pod("theirs", "pg", cpu=1, spec={"schedulerName": "default-scheduler"})
        await world.told("pg", "SchedulerNameMismatch", "theirs has schedulerName default-scheduler")
        await world.only_bound()


async def test_a_pod_that_names_a_missing_group_is_told_so(world: World) -> None:
    await world.node("n", cpu=4, memory="1Gi")
    async with leader(world):
        await world.pod("p", "nowhere", cpu=1)

        async def said() -> Any:
            return [c for c in (await world.pods())["p"].status.conditions if c.reason == "PodGroupNotFound"]

        (condition,) = await world.until(said, "the pod is told")
        assert condition.message == "there is no PodGroup nowhere in this namespace"
        assert await world.told("nowhere", "PodGroupNotFound") == condition.message, "the queue has a line for it"
        await world.only_bound()
        await world.group("nowhere", 1)
        await world.until_bound("p")


async def test_a_gate_of_somebody_else_holds_the_gang(world: World) -> None:
    await world.node("n", cpu=4, memory="1Gi")
    async with leader(world):
        await world.group("pg", 2)
        await world.pod("p0", "pg", cpu=1)
        await world.pod("p1", "pg", cpu=1, spec={"schedulingGates": [{"name": "example.com/quota"}]})
        await world.told("pg", "SchedulingGated", "example.com/quota")
        await world.only_bound()
        path = path_of(PODS, world.namespace, "p1")
        await world.api.request("PATCH", path, {"spec": {"schedulingGates": None}}, content_type=MERGE)
        await world.until_bound("p0", "p1")


async def test_a_constraint_that_we_do_not_know_is_no_guess(world: World) -> None:
    await world.node("n", cpu=4, memory="1Gi")
    async with leader(world):
        await world.group("pg", 1)
        await world.pod("p", "pg", cpu=1, spec={"resourceClaims": [{"name": "gpu", "resourceClaimName": "gpu"}]})
        await world.told("pg", "UnsupportedConstraint", "resourceClaims")


async def test_a_bound_volume_says_where_its_pod_goes(world: World) -> None:
    for name in ("a", "b"):
        await world.node(name, cpu=4, memory="1Gi")
    term = {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": ["b"]}]}
    spec: dict[str, Any] = {"capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteOnce"], "storageClassName": "x"}
    claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "data"}}
    async with leader(world):
        wanted = {
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": "x",
            "resources": {"requests": {"storage": "1Gi"}},
        }
        await world.create("/api/v1/persistentvolumeclaims", {**claim, "spec": wanted})
        await world.group("pg", 1)
        await world.pod(
            "p", "pg", cpu=1, spec={"volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "data"}}]}
        )
        await world.told("pg", "UnsupportedConstraint", "not bound to a volume yet")
        name = f"pv-{world.namespace}"
        volume = {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name}}
        local = {"local": {"path": "/x"}, "nodeAffinity": {"required": {"nodeSelectorTerms": [term]}}}
        await world.api.request("POST", "/api/v1/persistentvolumes", {**volume, "spec": {**spec, **local}})
        path = path_of("/api/v1/persistentvolumeclaims", world.namespace, "data")
        await world.api.request("PATCH", path, {"spec": {"volumeName": name}}, content_type=MERGE)
        await world.told("pg", "UnsupportedConstraint", "not bound to a volume yet")
        bound = {"metadata": {"annotations": {"pv.kubernetes.io/bind-completed": "yes"}}}
        await world.api.request("PATCH", path, bound, content_type=MERGE)
        assert await world.until_bound("p") == {"p": "b"}
    await world.api.request("DELETE", f"/api/v1/persistentvolumes/{name}")


async def test_a_group_that_is_deleted_while_it_waits(world: World) -> None:
    await world.node("n", cpu=1, memory="1Gi")
    async with leader(world):
        await world.group("pg", 2)
        for i in range(2):
            await world.pod(f"p{i}", "pg", cpu=1)
        await world.told("pg", "Unschedulable")
        await world.delete(POD_GROUPS, "pg")
        await world.told("pg", "PodGroupNotFound")
        await world.node("m", cpu=1, memory="1Gi")
        await world.only_bound()
        await world.group("pg", 2)
        await world.until_bound("p0", "p1")


async def in_phase(world: World, group: str, phase: str) -> None:
    """Its plan comes to say so."""

    async def said() -> bool:
        with contextlib.suppress(ApiError):
            return (await world.plan(group)).status.phase == phase
        return phase == ""

    await world.until(said, f"the plan of {group} is {phase or 'gone'}")


async def test_a_gang_whose_pods_are_all_gone_runs_no_longer(world: World) -> None:
    """A sibling of F12 (an operator's users saw it): its group is still there, and no pod is."""
    await world.node("n0", cpu=4, memory="4Gi")
    async with leader(world) as it:
        await world.group("pg", 2)
        for name in ("a", "b"):
            await world.pod(name, "pg", cpu=1)
        await world.until_bound("a", "b")
        await in_phase(world, "pg", "Running")
        told = it.metrics.text(it.queue)
        assert b"colocate_gang_bind_spread_seconds_count 1.0" in told
        assert b"colocate_gang_capacity_to_start_seconds_count 1.0" in told
        for name in ("a", "b"):
            await world.delete(PODS, name, 0)
        await in_phase(world, "pg", "Waiting")
        assert (await world.plan("pg")).status.message == ""


async def test_a_plan_ends_with_its_group_though_what_has_completed_stays(world: World) -> None:
    """As Spark's operator leaves it: the group goes, the driver's pod stays to be read."""
    await world.node("n0", cpu=4, memory="4Gi")
    async with leader(world):
        await world.group("pg", 1)
        await world.pod("driver", "pg", cpu=1)
        await world.until_bound("driver")
        await in_phase(world, "pg", "Running")
        await world.set_phase("driver", "Succeeded")
        await world.delete(POD_GROUPS, "pg")
        await in_phase(world, "pg", "")


async def test_a_label_that_is_added_after_binding_counts_from_then_on(world: World) -> None:
    await world.node("n", cpu=4, memory="1Gi")
    async with leader(world):
        await world.pod("early", cpu=1)
        await world.until_bound("early")
        await world.group("pg", 2)
        await world.pod("late", "pg", cpu=1)
        await world.told("pg", "NotEnoughMembers")
        labels = {"metadata": {"labels": {"scheduling.x-k8s.io/pod-group": "pg"}}}
        await world.api.request("PATCH", path_of(PODS, world.namespace, "early"), labels, content_type=MERGE)
        await world.until_bound("early", "late")


# permissions


@contextlib.asynccontextmanager
async def limited_leader(limited: Api) -> AsyncIterator[Controller]:
    """A leader that may only do what the manifests say, its lease in its own namespace."""
    async with leader(World(limited, "colocate-system")) as led:
        yield led


async def test_the_role_of_the_manifests_is_enough(world: World, limited: Api) -> None:
    """Start, preempt, roll back, status, events: all of it as the service account."""
    await world.node("n", cpu=2, memory="1Gi")
    async with limited_leader(limited):
        await world.group("low", 2)
        for i in range(2):
            await world.pod(f"low-{i}", "low", cpu=1, spec={"priorityClassName": LOW})
        await world.until_bound("low-0", "low-1")

        async def running() -> bool:
            return (await world.status("low")).status.phase == "Running"

        await world.until(running, "the status is written")
        await world.group("high", 2)
        for i in range(2):
            await world.pod(f"high-{i}", "high", cpu=1, spec={"priorityClassName": HIGH})
        await world.until_bound("high-0", "high-1")
        await world.group("waits", 2)
        await world.pod("waits-0", "waits", cpu=1)

        async def told_of() -> bool:
            events = await world.api.request("GET", path_of("/api/v1/events", world.namespace))
            return b'"reason":"NotEnoughMembers"' in events

        await world.until(told_of, "an Event says why the third group waits")


async def test_a_verb_that_is_forbidden_is_named(world: World, limited: Api) -> None:
    await world.node("n", cpu=2, memory="1Gi")
    path = f"{COLLECTIONS['ClusterRole']}/colocate-controller"
    role = json.loads(await world.api.request("GET", path))
    role["rules"] = [rule for rule in role["rules"] if rule["resources"] != ["pods/binding"]]
    await world.api.request("PUT", path, role)
    async with limited_leader(limited):
        await world.group("pg", 2, scheduleTimeoutSeconds=4)
        for i in range(2):
            await world.pod(f"p{i}", "pg", cpu=1)

        async def named() -> Any:
            return [c for c in (await world.plan("pg")).status.conditions if c.type == "Permitted"]

        (condition,) = await world.until(named, "the forbidden verb is named")
        assert 'cannot create resource "pods/binding"' in condition.message
        await world.only_bound()


async def test_the_place_of_a_lost_member_outlives_the_leader_that_keeps_it(world: World) -> None:
    """1.9: who comes after it reads it in the plan; a gang that waits does not get it."""
    for i in range(2):
        await world.node(f"n{i}", cpu=1, memory="1Gi")
    await world.group("pg", 2)
    for i in range(2):
        await world.pod(f"p{i}", "pg", cpu=1)

    async def started() -> bool:
        return (await world.plan("pg")).status.reason == "Started"

    async def kept() -> list[str]:
        return [place.node for place in (await world.plan("pg")).status.kept_places]

    async def waits() -> bool:
        return any(c.status == "False" for c in (await world.pods())["newcomer"].status.conditions)

    async def replaced() -> bool:
        return (await world.bound()).get("again") == bound["p1"]

    async with leader(world, lease_seconds=1.0):
        bound = await world.until_bound("p0", "p1")
        await world.until(started, "the gang runs")
        await world.set_phase("p1", "Failed")
        assert await world.until(kept, "its place is kept") == [bound["p1"]]
    await world.pod("newcomer", cpu=1)
    async with leader(world):
        await world.until(waits, "the newcomer waits")
        await world.pod("again", "pg", cpu=1)
        await world.until(replaced, "the replacement has the place")
