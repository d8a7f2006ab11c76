"""The gang demonstration: a real API server, simulated nodes, real owners, our controller as its own process.

Two gangs that cannot both fit, the second one's start when the first has finished, a preemption, the loss of a node and
the repair. What happened is counted by `observer.py`, which is yet another process.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from colocate.errors import HostUnfit
from colocate.kube.client import NODES, PODS, Api, ApiError, path_of
from colocate.localcluster.controlplane import ControlPlane, install, with_parent
from colocate.objects import Pod
from podgroup.api import PLANS, POD_GROUP_LABEL, POD_GROUPS, GangPlan

NAMESPACE = "demo"
REPLICA_SETS = "/apis/apps/v1/replicasets"
GPU = "nvidia.com/gpu"
NODE_COUNT, GPUS = 4, 8
PATIENCE_SECONDS = 60.0
Progress = Callable[[str, list[tuple[str, str, str]]], None]
"""(what is happening, (gang, where its members are, why it waits))."""


class GangDemo:
    """One run."""

    def __init__(self, directory: Path, progress: Progress) -> None:
        self._directory, self._progress = directory, progress
        self._api: Api
        self._text = ""

    def run(self) -> dict[str, Any]:
        """The observer's counts. Raises HostUnfit if the binaries are not here, or something does not come about."""
        self._say_only("starting etcd, kube-apiserver, kube-controller-manager and KWOK")
        with ControlPlane(self._directory, controllers=True) as plane:
            return asyncio.run(self._play(str(plane.kubeconfig())))

    async def _play(self, kubeconfig: str) -> dict[str, Any]:
        async with Api.connect(kubeconfig) as self._api:
            await self._prepare()
            with (
                self._process("podgroup.demo.observer", kubeconfig) as observer,
                self._process(
                    "colocate.cli.main",
                    "controller",
                    "--kubeconfig",
                    kubeconfig,
                    "--lease-namespace",
                    NAMESPACE,
                    "--node-loss-grace",
                    "1s",  # nobody wants to watch a minute of nothing
                ) as controller,
            ):
                try:
                    await self._script()
                    counted, _ = await asyncio.to_thread(observer.communicate)
                    return dict(msgspec.json.decode(counted.splitlines()[-1]))
                finally:
                    for process in (controller, observer):
                        process.terminate()

    def _process(self, module: str, *arguments: str) -> subprocess.Popen[bytes]:
        log = (self._directory / f"{module}.log").open("wb")
        with log:
            return subprocess.Popen(
                with_parent(sys.executable, "-P", "-m", module, *arguments),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if module.endswith("observer") else log,
                stderr=log,
            )

    async def _prepare(self) -> None:
        await install(self._api)
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
        await self._create("/api/v1/namespaces", namespace, cluster=True)
        urgent = {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": "urgent"}}
        await self._create("/apis/scheduling.k8s.io/v1/priorityclasses", {**urgent, "value": 1000}, cluster=True)
        for i in range(NODE_COUNT):
            await self._node(f"gpu-{i}")

        async def served() -> bool:
            return bool([await self._api.request("GET", path) for path in (POD_GROUPS, PLANS)])

        await self._until(served, "the custom resources are served")

    async def _script(self) -> None:
        self._say_only(f"{NODE_COUNT} nodes of {GPUS} GPUs; two jobs of three whole nodes each are created together")
        await asyncio.gather(self._job("red", 3), self._job("blue", 3))
        first = await self._until(self._one_runs, "one of two gangs runs")
        second = "blue" if first == "red" else "red"
        await self._pause()
        self._say_only(f"{first} finishes: {second} starts whole")
        await self._finish(first)
        await self._until(self._runs(second, 3), f"{second} runs")
        await self._pause()
        self._say_only(f"an urgent job of two nodes: {second} makes room as a whole, and waits again")
        await self._job("urgent", 2, "urgent")
        await self._until(self._runs("urgent", 2), "urgent runs")
        await self._pause()
        self._say_only(f"urgent finishes: {second} starts again")
        await self._finish("urgent")
        await self._until(self._runs(second, 3), f"{second} runs again")
        await self._pause()
        lost = next(p.spec.node_name for p in await self._members(second) if p.spec.node_name)
        self._say_only(f"node {lost} is lost: its member is replaced on the spare node")
        await self._api.request("DELETE", path_of(NODES, name=lost))
        await self._until(self._runs(second, 3, without=lost), f"{second} is repaired")
        await self._pause()

    # the small words of the script

    async def _node(self, name: str) -> None:
        offered = {"cpu": "64", "memory": "512Gi", "pods": "110", GPU: str(GPUS)}
        labels = {"colocate.io/simulated": "true", "kubernetes.io/hostname": name}
        body = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}}
        await self._create(NODES, {**body, "status": {"allocatable": offered, "capacity": offered}}, cluster=True)

    async def _job(self, name: str, size: int, priority: str = "") -> None:
        meta = {"name": name}
        group = {"apiVersion": "scheduling.x-k8s.io/v1alpha1", "kind": "PodGroup", "metadata": meta}
        await self._create(POD_GROUPS, {**group, "spec": {"minMember": size}})
        container = {"name": "worker", "image": "train", "resources": {"limits": {GPU: str(GPUS)}}}
        pod: dict[str, Any] = {
            "schedulerName": "colocate",
            "containers": [container],
            "terminationGracePeriodSeconds": 1,
        }
        pod |= {"priorityClassName": priority} if priority else {}
        labels = {POD_GROUP_LABEL: name}
        # A ReplicaSet makes lost members anew at once; a Job would wait 10 s, 20 s, 40 s ... before it does.
        template = {"metadata": {"labels": labels}, "spec": pod}
        spec = {"replicas": size, "selector": {"matchLabels": labels}, "template": template}
        await self._create(
            REPLICA_SETS, {"apiVersion": "apps/v1", "kind": "ReplicaSet", "metadata": meta, "spec": spec}
        )

    async def _finish(self, name: str) -> None:
        background = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"}
        await self._api.request("DELETE", path_of(REPLICA_SETS, NAMESPACE, name), background)
        await self._api.request("DELETE", path_of(POD_GROUPS, NAMESPACE, name), background)

    async def _create(self, collection: str, body: dict[str, Any], *, cluster: bool = False) -> None:
        await self._api.request("POST", collection if cluster else path_of(collection, NAMESPACE), body)

    async def _members(self, name: str) -> list[Pod]:
        pods = await self._api.all(Pod, path_of(PODS, NAMESPACE))
        return [p for p in pods if p.metadata.labels.get(POD_GROUP_LABEL) == name and not p.terminal]

    async def _one_runs(self) -> str:
        for name in ("red", "blue"):
            if await self._runs(name, 3)():
                return name
        return ""

    def _runs(self, name: str, size: int, without: str = "") -> Callable[[], Awaitable[bool]]:
        async def running() -> bool:
            members = [p for p in await self._members(name) if p.status.phase == "Running" and not p.deleting]
            return len(members) == size and all(p.spec.node_name != without for p in members)

        return running

    async def _until(self, what: Callable[[], Awaitable[Any]], why: str) -> Any:
        until = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < until:
            try:
                found = await what()
            except ApiError as error:
                found = None
                if error.status != 404:
                    raise
            if found:
                return found
            await self._show()
            await asyncio.sleep(0.1)
        raise HostUnfit(f"not within {PATIENCE_SECONDS:g} s: {why}", f"read the logs in {self._directory}")

    async def _pause(self) -> None:
        """Long enough for a person to see it, and for the observer to find a gang that is partly bound."""
        for _ in range(20):
            await self._show()
            await asyncio.sleep(0.1)

    def _say_only(self, text: str) -> None:
        self._text = text
        self._progress(text, [])

    async def _show(self) -> None:
        try:
            pods = await self._api.all(Pod, path_of(PODS, NAMESPACE))
            plans = await self._api.all(GangPlan, path_of(PLANS, NAMESPACE))
        except ApiError:
            return
        rows = []
        for plan in sorted(plans, key=lambda p: p.metadata.name):
            name = plan.metadata.name
            members = [p for p in pods if p.metadata.labels.get(POD_GROUP_LABEL) == name and not p.terminal]
            where = sorted(p.spec.node_name or "-" for p in members)
            rows.append((name, " ".join(where), f"{plan.status.phase} {plan.status.reason}: {plan.status.message}"))
        self._progress(self._text, rows)
