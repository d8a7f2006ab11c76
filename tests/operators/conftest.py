"""Real operators beside a real API server: they make the pods, KWOK plays the nodes, a controller of ours schedules."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec
import pytest
import yaml

from colocate.kube.client import DEFINITIONS, MERGE, Api, ApiError, path_of
from colocate.localcluster.controlplane import ControlPlane, free_ports, install
from colocate.objects import Pod
from podgroup.api import PLANS, POD_GROUPS
from podgroup.demo.observer import Observer, watching
from podgroup.queue.entry import Settings
from tests.cluster.conftest import World, leader
from tests.operators.jobs import ADAPTERS, Adapter
from tests.operators.running import Running
from tools import operators

GPU = "nvidia.com/gpu"
UPSTREAM = "scheduler-plugins-scheduler"
"""What operators write into their pods, whatever they are told."""


BUILT = [adapter for adapter in ADAPTERS if not operators.lacks(adapter.name)]


@pytest.fixture(scope="package")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    with ControlPlane(tmp_path_factory.mktemp("plane"), controllers=True) as running:
        yield running


@pytest.fixture(scope="package")
def played(plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """All operators that are built, running."""
    config = plane.kubeconfig()
    asyncio.run(_install(plane))
    with contextlib.ExitStack() as stack:
        started = []
        for adapter, port in zip(BUILT, free_ports(len(BUILT)), strict=True):
            directory = tmp_path_factory.mktemp(adapter.name)
            started.append(Running(adapter, config, directory, port))
            stack.enter_context(started[-1].running())
        asyncio.run(_hook(plane, started))
        yield


async def _hook(plane: ControlPlane, started: list[Running]) -> None:
    async with Api.connect(str(plane.kubeconfig())) as api:
        for running in started:
            for collection, body in running.webhooks():
                await api.request("POST", collection, body)
            for collection, body in running.adapter.beside():
                await api.request("POST", collection, body)


async def _install(plane: ControlPlane) -> None:
    async with Api.connect(str(plane.kubeconfig())) as api:
        await install(api)
        for adapter in BUILT:
            folder = operators.built(adapter.name)
            assert folder is not None
            for file in sorted((folder / "crds").iterdir()):
                await api.request("POST", DEFINITIONS, yaml.safe_load(file.read_text()))
            for collection, body in adapter.before():
                await api.request("POST", collection, body)
        for adapter in BUILT:
            for _ in range(300):
                with contextlib.suppress(ApiError):
                    await api.request("GET", adapter.collection)
                    break
                await asyncio.sleep(0.1)


def first_worker(members: dict[str, Pod]) -> str:
    """The name of one that has GPUs."""
    return min(n for n, p in members.items() if GPU in p.spec.containers[0].resources.requests)


class Played(World):
    """The cluster as an operator's user has it, in the namespace `default`."""

    def __init__(self, api: Api, adapter: Adapter) -> None:
        super().__init__(api, "default")
        self.adapter, self.seen = adapter, Observer()
        self._suffix = uuid.uuid4().hex[:4]
        """What owned objects of an earlier test's job leave behind for a while has another name."""

    def called(self, name: str) -> str:
        """As the API server knows a job."""
        return f"{name}-{self._suffix}"

    async def nodes(self, *names: str, gpus: int = 8) -> None:
        for name in names:
            await self.node(name, nvidia_com__gpu=gpus, cpu=16, memory="64Gi")

    async def start(self, name: str, workers: int, queue: str = "", **spec: Any) -> None:
        """Make a job, with this in its specification besides."""
        for collection, body in self.adapter.objects(self.called(name), workers):
            if collection == self.adapter.collection:
                body["spec"] |= spec
            if queue:
                body["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": queue}
            await self.create(collection, body)

    async def fail(self, name: str) -> str:
        """A worker of a job ends with an error; its name."""
        failed = first_worker(await self.members(name))
        await self.set_phase(failed, "Failed")
        return failed

    async def change(self, name: str, spec: dict[str, Any]) -> None:
        await self.patch(self.adapter.collection, self.called(name), spec)

    async def patch(self, collection: str, name: str, spec: dict[str, Any]) -> None:
        path = path_of(collection, self.namespace, name)
        await self.api.request("PATCH", path, {"spec": spec}, content_type=MERGE)

    async def suspend(self, name: str, yes: bool) -> None:
        await self.adapter.suspend(self, self.called(name), yes)

    async def items(self, collection: str) -> list[dict[str, Any]]:
        answer = await self.api.request("GET", path_of(collection, self.namespace))
        found: list[dict[str, Any]] = msgspec.json.decode(answer)["items"]
        return found

    async def end(self, name: str) -> None:
        body = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background"}
        await self.api.request("DELETE", path_of(self.adapter.collection, self.namespace, self.called(name)), body)

    async def members(self, name: str) -> dict[str, Pod]:
        label, job = self.adapter.label, self.called(name)
        return {n: p for n, p in (await self.pods()).items() if p.metadata.labels.get(label) == job and not p.deleting}

    async def bound_of(self, name: str) -> int:
        return sum(bool(p.spec.node_name) and not p.terminal for p in (await self.members(name)).values())

    async def until_runs(self, name: str, count: int) -> None:
        async def all_run() -> bool:
            return await self.bound_of(name) == count

        try:
            await self.until(all_run, f"{count} members of {name} are bound")
        except AssertionError as error:
            raise AssertionError(await self.told_of()) from error

    async def until_waits(self, name: str, count: int) -> None:
        """Its pods are there, none is on a node, and its users are told why."""
        count = self.adapter.ahead or count

        async def told() -> bool:
            pods = await self.members(name)
            said = [c.reason for p in pods.values() for c in p.status.conditions if c.type == "PodScheduled"]
            return len(pods) == count and len(said) == count and not any(p.spec.node_name for p in pods.values())

        await self.until(told, f"{name} waits whole")

    async def told_of(self) -> list[str]:
        """Plans, and the Events of the last minutes, for a test that has failed."""
        plans = [(i["metadata"]["name"], i.get("status")) for i in await self.items(PLANS)]
        groups = [(i["metadata"]["name"], i.get("status")) for i in await self.items(POD_GROUPS)]
        print(plans, groups)
        return [
            f"{e['involvedObject']['kind']}/{e['involvedObject']['name']} {e['reason']}: {e['message']}"
            for e in await self.items("/api/v1/events")
        ]

    async def sweep(self) -> None:
        """Everything goes, what would make pods anew first."""
        for collection in (self.adapter.collection, "/apis/batch/v1/jobs"):
            with contextlib.suppress(ApiError):
                path = path_of(collection, self.namespace)
                await self.api.request("DELETE", path, {"kind": "DeleteOptions", "apiVersion": "v1"})
        await self.clear()


@contextlib.asynccontextmanager
async def _playing(world: Played) -> AsyncIterator[None]:
    async def play() -> None:
        while True:
            with contextlib.suppress(ApiError):  # what it acts for may just have gone
                await world.adapter.plays(world)
                return

    task = asyncio.ensure_future(play())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest.fixture(params=ADAPTERS, ids=[adapter.name for adapter in ADAPTERS])
async def world(plane: ControlPlane, played: None, request: pytest.FixtureRequest) -> AsyncIterator[Played]:
    """A cluster with one operator's jobs, watched by somebody who knows nothing of the controller."""
    if lacks := operators.lacks(request.param.name):
        pytest.skip(lacks)
    async with Api.connect(str(plane.kubeconfig())) as api:
        world = Played(api, request.param)
        settings = Settings(schedulers=("colocate", UPSTREAM), creation_grace_seconds=10.0)
        try:
            async with watching(api, world.seen), leader(world, settings), _playing(world):
                yield world
            found = world.seen.result()
            assert (found["partial_gangs"], found["overcommitted_nodes"]) == (0, 0), found
        finally:
            await world.sweep()
            await asyncio.sleep(0.25)  # encrypted streams end a moment after they are let go
