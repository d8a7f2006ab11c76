"""S2.6: an MPIJob under power caps, as in "Environmentally Sustainable AI via Power-Aware Batch Scheduling" (KubeCon
NA 2023): quota of watts by Kueue, pods by an unpatched mpi-operator, all members or none by us.

The manifests are of the talk's shape, in our words: a job that is born suspended, of whose pods only a sidecar (an init
container that is kept running) asks for watts.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.operators.conftest import Played
from tests.operators.jobs import MPI
from tools import operators

pytestmark = [
    pytest.mark.parametrize("world", MPI, ids=[a.name for a in MPI], indirect=True),
    pytest.mark.skipif(bool(operators.lacks("kueue")), reason=operators.lacks("kueue") or "-"),
]
POWER = "intel.com/power"


def mpi_job(name: str, queue: str, workers: int = 2, watts: int = 500) -> dict[str, Any]:
    def container(name: str, **limits: str | int) -> dict[str, Any]:
        return {"name": name, "image": "registry.example/mpi:1", "resources": {"limits": limits}}

    sidecar = {**container("measures", **{POWER: watts}), "restartPolicy": "Always"}
    of_worker = {"containers": [container("worker", cpu=1, memory="1Gi")], "initContainers": [sidecar]}
    of_launcher = {"containers": [container("launcher", cpu=1, memory="1Gi")]}
    replicas = {
        "Launcher": {"replicas": 1, "template": {"spec": of_launcher}},
        "Worker": {"replicas": workers, "template": {"spec": of_worker}},
    }
    return {
        "apiVersion": "kubeflow.org/v2beta1",
        "kind": "MPIJob",
        "metadata": {"name": name, "labels": {"kueue.x-k8s.io/queue-name": queue}},
        "spec": {
            "slotsPerWorker": 1,
            "runPolicy": {"cleanPodPolicy": "Running", "suspend": True},
            "mpiReplicaSpecs": replicas,
        },
    }


async def submit(world: Played, name: str, queue: str = "user-queue", **shape: int) -> None:
    await world.create(world.adapter.collection, mpi_job(world.called(name), queue, **shape))


async def test_s2_6_an_mpi_job_starts_whole_where_its_watts_are(world: Played) -> None:
    """1000 W on two nodes of 800: one worker on each. Then nobody else fits, whatever CPUs are free."""
    for name in ("t0", "t1"):
        await world.node(name, cpu=16, memory="64Gi", intel_com__power=800)
    await submit(world, "pi")
    await world.until_runs("pi", 3)
    workers = [p for n, p in (await world.members("pi")).items() if "worker" in n]
    assert {p.spec.node_name for p in workers} == {"t0", "t1"}
    await submit(world, "mnist")
    await world.until_waits("mnist", 3)
    await world.end("pi")
    await world.until_runs("mnist", 3)


async def test_s2_6_no_quota_of_watts_is_exceeded(world: Played) -> None:
    """Kueue admits 1500 W: the second job of 1000 stays suspended, and has no pods."""
    await world.node("u0", cpu=16, memory="64Gi", intel_com__power=9000)
    await submit(world, "a", "few-watts")
    await world.until_runs("a", 3)
    await submit(world, "b", "few-watts")
    await asyncio.sleep(2.0)
    assert not await world.members("b")
    await world.end("a")
    await world.until_runs("b", 3)


async def test_s2_6_a_rack_s_budget_counts_what_sidecars_ask_for(world: Played) -> None:
    await world.node("v0", cpu=16, memory="64Gi", intel_com__power=9000)
    await world.power_budget("rack", 900, resource=POWER)
    await submit(world, "a")
    await world.until_waits("a", 3)
    await world.told(world.called("a"), "Unschedulable")
    assert "budget rack (900 W of 900 W" in str((await world.plan(world.called("a"))).status.message)
    await world.delete("/apis/colocate.io/v1alpha1/powerbudgets", "rack")
    await world.until_runs("a", 3)
