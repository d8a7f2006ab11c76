"""S2.4 in a cluster: a Job under each cap, gang-admitted under a budget, and what kubelet tells of it in the table."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from colocate.cli.sweep import in_turn
from colocate.cli.sweep_jobs import JOBS, POD_GROUPS, read_job, sweep_jobs
from colocate.errors import ColocateError
from colocate.kube.client import MERGE, PODS, path_of
from colocate.localcluster.controlplane import ControlPlane
from colocate.units import time_text
from podgroup.api import POWER_BUDGETS
from tests.cluster.conftest import World, leader

JOB = """
apiVersion: batch/v1
kind: Job
metadata: {name: train}
spec:
  parallelism: 2
  completions: 2
  template:
    spec:
      containers:
      - {name: c, image: i, resources: {requests: {cpu: 1}, limits: {nvidia.com/gpu: 1}}}
"""
SLOWER = {150: 30.0, 300: 20.0}
"""Watts of each pod -> for how long it works."""
BEGAN = 1_800_000_000.0


@contextlib.asynccontextmanager
async def working(world: World, phase: str = "Succeeded") -> AsyncIterator[list[int]]:
    """Pods that run end at once, and say that it took them as long as their watts have it; how many ran at a time."""
    seen: list[int] = []

    async def end_them() -> None:
        while True:
            answer = await world.api.request("GET", path_of(PODS, world.namespace))
            pods: list[Any] = [p for p in msgspec.json.decode(answer)["items"] if p["status"]["phase"] == "Running"]
            seen.append(sum(int(p["spec"]["containers"][0]["resources"]["limits"]["colocate.io/power"]) for p in pods))
            for pod in pods if len(pods) == 2 else ():
                took = SLOWER[int(pod["spec"]["containers"][0]["resources"]["limits"]["colocate.io/power"])]
                times = {"startedAt": time_text(BEGAN), "finishedAt": time_text(BEGAN + took), "exitCode": 0}
                container = {"name": "c", "image": "i", "imageID": "", "ready": False, "restartCount": 0}
                status = {"phase": phase, "containerStatuses": [{**container, "state": {"terminated": times}}]}
                path = path_of(PODS, world.namespace, pod["metadata"]["name"], "status")
                await world.api.request("PATCH", path, {"status": status}, content_type=MERGE)
            await asyncio.sleep(0.1)

    task = asyncio.ensure_future(end_them())
    try:
        yield seen
    finally:
        assert not task.done(), task.exception()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def options(plane: ControlPlane, world: World) -> argparse.Namespace:
    where = {"kubeconfig": str(plane.kubeconfig()), "context": None, "namespace": world.namespace}
    return argparse.Namespace(**where, scheduler_name="colocate")


@pytest.fixture
def job(tmp_path: Path) -> Any:
    file = tmp_path / "job.yaml"
    file.write_text(JOB)
    return read_job(file)


async def nothing_left(world: World) -> None:
    async def so() -> bool:
        found = [await world.api.request("GET", path_of(c, world.namespace)) for c in (JOBS, POD_GROUPS)]
        return not any(msgspec.json.decode(answer)["items"] for answer in found)

    await world.until(so, "the Jobs and their gangs are removed")


async def test_s2_4_a_job_is_run_under_each_cap_as_a_gang(plane: ControlPlane, world: World, job: Any) -> None:
    for name in ("n0", "n1"):
        await world.node(name, cpu=4, memory="8Gi", nvidia_com__gpu=1, colocate_io__power=300)
    await world.power_budget("whole", 600)
    async with leader(world), working(world) as seen:
        found = [run async for run in sweep_jobs(options(plane, world), job, in_turn([150, 300], 2))]
    assert found == [(150, 30.0), (300, 20.0), (300, 20.0), (150, 30.0)]
    assert {300, 600} <= set(seen), "both members of a gang at a time"
    await nothing_left(world)


async def test_s2_4_a_budget_holds_a_run_up_and_says_so(
    plane: ControlPlane, world: World, job: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("n0", "n1"):
        await world.node(name, cpu=4, memory="8Gi", nvidia_com__gpu=1, colocate_io__power=300)
    await world.power_budget("whole", 400)
    said = ""

    async def waits() -> bool:
        nonlocal said
        said += capsys.readouterr().err
        return "budget whole (400 W of 400 W colocate.io/power left)" in said

    async with leader(world), working(world):
        runs = sweep_jobs(options(plane, world), job, [300])
        first = asyncio.ensure_future(anext(aiter(runs)))
        await world.until(waits, "it says what it waits for")
        await world.delete(POWER_BUDGETS, "whole")
        assert await first == (300, 20.0)
        with pytest.raises(StopAsyncIteration):
            await anext(runs)
    await nothing_left(world)


async def test_s2_4_a_job_that_fails_ends_the_sweep_and_is_removed(plane: ControlPlane, world: World, job: Any) -> None:
    for name in ("n0", "n1"):
        await world.node(name, cpu=4, memory="8Gi", nvidia_com__gpu=1, colocate_io__power=300)
    async with leader(world), working(world, "Failed"):
        with pytest.raises(ColocateError, match="the Job train-150w-0 failed: BackoffLimitExceeded"):
            [run async for run in sweep_jobs(options(plane, world), job, [150, 300])]
    await nothing_left(world)
