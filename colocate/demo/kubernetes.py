"""The demonstration on a real Kubernetes node: API server, kube-scheduler, controllers, kubelet and containerd of this
machine's own, colocate as its manifests install it, and the same service, BestEffort pod and training jobs as pods.

The node is a scratch cgroup with little memory, of which the kubelet does not know: it takes the machine's for its own,
so that what happens when it is short is the kernel's doing, as on a node that fills faster than the kubelet looks.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from colocate import __version__
from colocate.actuate.scratch import ScratchNode
from colocate.calibrate.probe import WorkCounter
from colocate.calibration import Calibration
from colocate.cgroup.port import KernelPort
from colocate.cgroup.tree import joined, main_hierarchy, processes_below
from colocate.cluster.api import BATCH, BATCH_CPU, BATCH_MEMORY, NODE_COLOCATIONS, QOS, NodeColocation
from colocate.demo.digest import Digest, compare, taken
from colocate.demo.inference import METRIC
from colocate.demo.process import ENVIRONMENT
from colocate.demo.result import TITLES, InCluster
from colocate.demo.scenario import JOB_GROWTH_BYTES, JOB_MOST_BYTES, MIB, NODE_BYTES
from colocate.demo.script import Demo, Progressed, Served
from colocate.demo.service import warm
from colocate.errors import HostUnfit
from colocate.kube.client import NODES, PODS, Api, ApiError, path_of
from colocate.localcluster.controlplane import ControlPlane, free_ports
from colocate.localcluster.installation import Installation
from colocate.localcluster.realnode import NAME, RealNode
from colocate.objects import Node, Pod
from colocate.units import parse_quantity

NAMESPACE = "demo"
IMAGE = f"docker.io/library/colocate:{__version__}"
WORK = "/work"
INSTALLED_BYTES = 320 * MIB
"""What the node has more than that of the other demonstration, in every arm: for the agent and the publisher."""
STATEFUL_SETS = "/apis/apps/v1/statefulsets"
NAMESPACES = "/api/v1/namespaces"
PATIENCE_SECONDS = 120.0
KUBELET_SECONDS = 75.0
"""Kubelet writes the knobs of its groups anew once a minute (cm/qos_container_manager_linux.go)."""
NODE_WEIGHT = 1000
"""Of the node, beside a control plane that has 100 as a whole: on a cluster it is on other machines."""
POLICY = {
    "tick": "500ms",
    "cpu": {"holdDown": "2s"},
    "memory": {"crawl": "1s", "calm": "3s", "checkpointDeadline": "3s", "terminationGrace": "2s"},
}
"""`scenario.SPEC` as an operator writes it."""
REQUESTED = {"cpu": "250m"}
"""By each container of the service, and by each unmanaged batch pod: what a worker uses on average."""
_ARMS: dict[str, tuple[dict[str, str], dict[str, str], str]] = {
    "unmanaged": ({}, REQUESTED, "kubepods/burstable"),
    "besteffort": ({}, {}, "kubepods/besteffort"),
    "colocate": ({QOS: BATCH}, {}, "kubepods/batch"),
}
"""What batch pods say of themselves and request in an arm, and where they are to be."""


class PodService:
    """The service as a pod: one container per CPU, which kubelet starts again when one dies."""

    def __init__(self, urls: list[str]) -> None:
        self.urls = urls
        self.restarts = 0

    async def warm(self) -> None:
        """Have the table in memory again. Raises HostUnfit."""
        await warm(self.urls[0])

    async def end(self) -> None:
        """It ends with its node."""


class KubernetesDemo(Demo):
    """One run, with this image of colocate."""

    batch_pods = _ARMS

    def __init__(
        self,
        port: KernelPort,
        image: Path,
        seconds: float,
        seed: int,
        service_seconds: float,
        progress: Progressed,
    ) -> None:
        super().__init__(port, seconds, seed, service_seconds, progress)
        self._image = image
        self._result.node_mib = (NODE_BYTES + INSTALLED_BYTES) / MIB
        self._result.lever = "weight"
        self._result.in_cluster = self._found = InCluster()
        self._api: Api
        self._restarts: dict[str, int] = {}
        self._in_pod = PodService([])

    @contextlib.asynccontextmanager
    async def _scratch(self) -> AsyncIterator[None]:
        self._progress("starting etcd, kube-apiserver, kube-scheduler, kubelet and containerd", 0.0)
        with (
            ScratchNode(self._port, "plane") as elsewhere,
            ControlPlane(self._directory / "plane", scheduler=True, controllers=True, kwok=False) as self._plane,
            self._real_node() as self._kubelet,
        ):
            self._node = self._kubelet.scratch
            for pid in self._plane.pids:
                elsewhere.enter(pid, elsewhere.make("processes"))
            async with Api.connect(str(self._plane.kubeconfig())) as self._api:
                looking = asyncio.create_task(self._look_at_pods())
                try:
                    yield
                finally:
                    looking.cancel()
                    await asyncio.gather(looking, return_exceptions=True)

    def _real_node(self) -> RealNode:
        home = self._directory / "node"
        home.mkdir()
        return RealNode(self._plane, home, "demo", NODE_BYTES + INSTALLED_BYTES)

    async def _phases(self, calibration: Calibration | None) -> None:
        self._work_folder.mkdir()
        await self._until(self._ready, "the node is ready")
        self._progress("bringing the image to the node", 0.05)
        await asyncio.to_thread(self._kubelet.bring, self._image)
        self._node.make("client")
        self._knob("client", "cpu.weight", "10000")
        self._knob("/", "cpu.weight", str(NODE_WEIGHT))
        await super()._phases(calibration or Calibration())

    def _make_groups(self) -> None:
        """Kubelet makes them."""

    @property
    def _work_folder(self) -> Path:
        return self._directory / "work"

    async def _ready(self) -> bool:
        self._kubelet.check()
        node = await self._api.get(Node, path_of(NODES, name=NAME))
        return any(c.type == "Ready" and c.status == "True" for c in node.status.conditions)

    # pods

    def _container(self, name: str, module: str, arguments: list[str], requests: dict[str, str]) -> dict[str, Any]:
        environment: list[dict[str, Any]] = [{"name": n, "value": v} for n, v in ENVIRONMENT.items()]
        environment.append({"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}})
        environment.append({"name": "PROMETHEUS_MULTIPROC_DIR", "value": f"{WORK}/metrics"})
        return {
            "name": name,
            "image": IMAGE,
            "imagePullPolicy": "Never",
            "command": ["/usr/bin/python3", "-P", "-m", f"colocate.demo.{module}", *arguments],
            "env": environment,
            "resources": {"requests": requests},
            "securityContext": {"runAsUser": 0},
            "volumeMounts": [{"name": "work", "mountPath": WORK}],
        }

    def _pod(self, *containers: dict[str, Any]) -> dict[str, Any]:
        return {
            "hostNetwork": True,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": 5,
            "containers": list(containers),
            "volumes": [{"name": "work", "hostPath": {"path": str(self._work_folder)}}],
        }

    async def _create(self, collection: str, kind: str, name: str, labels: dict[str, str], spec: Any) -> None:
        version = "apps/v1" if collection == STATEFUL_SETS else "v1"
        body = {"apiVersion": version, "kind": kind, "metadata": {"name": name, "labels": labels}, "spec": spec}
        await self._api.request("POST", path_of(collection, NAMESPACE), body)

    async def _serve(self, serving: list[Served]) -> None:
        await self._api.request(
            "POST", NAMESPACES, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
        )
        self._progress("starting the service's pod", 0.15)
        (self._work_folder / "metrics").mkdir()
        ports = free_ports(len(self._cpus))
        containers = []
        for cpu, port in zip(self._cpus, ports, strict=True):
            arguments = ["--cpu", str(cpu), "--port", str(port), "--table", f"{WORK}/table"]
            arguments += ["--service-seconds", str(self._service_seconds)]
            containers.append(self._container(f"worker-{cpu}", "inference", arguments, REQUESTED))
        self._urls = [f"http://127.0.0.1:{port}" for port in ports]
        await self._create(PODS, "Pod", "inference", {"app": "inference"}, self._pod(*containers))
        self._service = self._in_pod = PodService(self._urls)
        serving.append(self._in_pod)
        self._service_pods = [await self._until(self._runs("inference"), "the service's pod runs")]
        await self._service.warm()

    async def _ship_logs(self) -> Served:
        self._logs = WorkCounter(self._work_folder / "logs")
        container = self._container("logs", "logs", [f"{WORK}/logs"], {})
        await self._create(PODS, "Pod", "logs", {"app": "logs"}, self._pod(container))
        self._log_pods = [await self._until(self._runs("logs"), "the BestEffort pod runs")]
        return PodService([])

    def _groups(self) -> dict[str, Sequence[str]]:
        at = self._node.path
        return {
            "service": [joined(at, f"kubepods/burstable/pod{uid}") for uid in self._service_pods],
            "BestEffort pod": [joined(at, f"kubepods/besteffort/pod{uid}") for uid in self._log_pods],
        }

    async def _pods(self) -> list[Pod]:
        return await self._api.all(Pod, path_of(PODS, NAMESPACE))

    def _runs(self, name: str) -> Callable[[], Awaitable[str]]:
        """Its uid, once all its containers run."""

        async def runs() -> str:
            self._kubelet.check()
            pod = await self._api.get(Pod, path_of(PODS, NAMESPACE, name))
            return pod.metadata.uid if pod.status.phase == "Running" and not pod.deleting else ""

        return runs

    async def _until(self, what: Callable[[], Awaitable[Any]], why: str, seconds: float = PATIENCE_SECONDS) -> Any:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if found := await what():
                    return found
            except ApiError as error:
                if error.status not in (404, 503):
                    raise
            await asyncio.sleep(0.1)
        raise HostUnfit(f"not within {seconds:g} s: {why}", self._kubelet.words())

    async def _look_at_pods(self) -> None:
        """Who was started again, for the report."""
        while True:
            with contextlib.suppress(ApiError, OSError):
                for pod in await self._pods():
                    restarts = sum(c.restart_count for c in pod.status.container_statuses)
                    for _ in range(restarts - self._restarts.get(pod.metadata.uid, 0)):
                        self._happened(f"a container of {pod.metadata.name} died, and is started again by kubelet")
                    if pod.metadata.name == "inference":
                        self._in_pod.restarts = restarts
                    self._restarts[pod.metadata.uid] = restarts
            await asyncio.sleep(0.25)

    # arms

    @contextlib.asynccontextmanager
    async def _batch_in(self, arm: str) -> AsyncIterator[None]:
        """A training pod per CPU, of a StatefulSet, whose pods keep their names; all of them begin from nothing."""
        for progress in self._trainings:
            progress.reset()
        labels, requests, group = self.batch_pods[arm]
        labels = {**labels, "app": "training"}
        container = self._container("training", "training", ["--progress", f"{WORK}/$(POD_NAME)"], requests)
        container["command"] += self._growing(JOB_GROWTH_BYTES, JOB_MOST_BYTES + INSTALLED_BYTES // 2)
        spec = {
            "replicas": len(self._trainings),
            "serviceName": "training",
            "podManagementPolicy": "Parallel",
            "selector": {"matchLabels": {"app": "training"}},
            "template": {"metadata": {"labels": labels}, "spec": self._pod(container)},
        }
        await self._create(STATEFUL_SETS, "StatefulSet", "training", {}, spec)
        try:
            pods = await self._until(self._all_run, "the training pods run")
            at = self._node.path
            self._batch_groups = [joined(at, group)]
            if arm != "colocate":
                self._batch_groups = [joined(at, f"{group}/pod{pod.metadata.uid}") for pod in pods]
            yield
        finally:
            self._batch_groups = []
            path = path_of(STATEFUL_SETS, NAMESPACE, "training")
            await self._api.request("DELETE", path, {"propagationPolicy": "Background"})
            await self._until(self._none_left, "the training pods are gone")

    async def _training_pods(self) -> list[Pod]:
        return [pod for pod in await self._pods() if pod.metadata.labels.get("app") == "training"]

    async def _all_run(self) -> list[Pod]:
        pods = [pod for pod in await self._training_pods() if pod.status.phase == "Running"]
        return pods if len(pods) == len(self._trainings) and self._all_began() else []

    def _all_began(self) -> bool:
        """Starting them is not what is measured."""
        return all(progress.done.done for progress in self._trainings)

    async def _none_left(self) -> bool:
        return not await self._training_pods()

    def _deaths_of_batch(self) -> int:
        return sum(max(progress.starts.done - 1, 0) for progress in self._trainings)

    async def _colocate(self, _calibration: Calibration) -> None:
        before = await self._of_node()
        self._progress("kubectl apply -k manifests/base", 0.82)
        policy = {**POLICY, "nodeRoot": self._node.path, "calibrate": False}
        slo = {"p99": f"{1e3 * self._target_seconds:g}ms", "url": f"{self._urls[0]}/metrics", "metric": METRIC}
        selector = {"podSelector": {"app": "inference"}, "namespace": NAMESPACE}
        policy["services"] = [{"name": "inference", "selector": selector, "slo": {**slo, "window": "3s"}}]
        overlay = Path(tempfile.mkdtemp(prefix="overlay-", dir=self._directory)) / "manifests"
        installed = Installation(self._plane, overlay, policy)
        await asyncio.to_thread(installed.apply)
        await self._until(self._promised, "what batch may have is in the node's status")
        self._found.published_batch_cpu_milli = await self._offered(BATCH_CPU) or 0
        self._result.decisions += await self._said()
        self._progress(TITLES["colocate"], 0.85)
        async with self._batch_in("colocate"):
            await self._look_where_batch_is()
            await self._measure("colocate")
            self._result.decisions += await self._said()
        self._progress("kubectl delete -k manifests/base", 0.95)
        await asyncio.to_thread(installed.remove_agents)
        await self._until(self._not_offered, "batch resources are out of the node's status")
        await asyncio.to_thread(installed.remove)
        self._found.node_changes = await self._changed_since(before)
        self._found.node_unchanged = not self._found.node_changes

    async def _offered(self, resource: str) -> int | None:
        offered = (await self._api.get(Node, path_of(NODES, name=NAME))).status.allocatable.get(resource)
        return None if offered is None else int(parse_quantity(offered))

    async def _promised(self) -> bool:
        return bool(await self._offered(BATCH_MEMORY))

    async def _not_offered(self) -> bool:
        return await self._offered(BATCH_CPU) is None and await self._offered(BATCH_MEMORY) is None

    async def _look_where_batch_is(self) -> None:
        tier = joined(self._node.path, self.batch_pods["colocate"][2])
        pods = await self._training_pods()
        there = [joined(tier, f"pod{pod.metadata.uid}") for pod in pods]
        main = main_hierarchy(self._port)
        self._found.batch_pods_in_tier = sum(bool(processes_below(self._port, main, path)) for path in there)
        self._found.placed_by_nri = self._found.batch_pods_in_tier == len(pods) > 0

    async def _said(self) -> list[str]:
        """What the agent said of its node, and what became of pods."""
        found = await self._api.get(NodeColocation, path_of(NODE_COLOCATIONS, name=NAME))
        said = [f"batch resources: {found.status.reason}: {found.status.message}"]
        said += [f"last action: {found.status.last_action}"] if found.status.last_action else []
        events = msgspec.json.decode(await self._api.request("GET", path_of("/api/v1/events", NAMESPACE)))["items"]
        about = ((e["involvedObject"].get("name"), e.get("reason"), e.get("message")) for e in events)
        return said + [f"Event on {n}: {r}: {m}" for n, r, m in about if r == "EvictedForServices"]

    async def _of_node(self) -> Digest:
        """Every cgroup of the node."""
        whole = await taken(self._port.layout.mounts)
        return {where: knobs for where, knobs in whole.items() if self._node.path in where}

    async def _changed_since(self, before: Digest) -> list[str]:
        """What differs once kubelet has had its time to put its own groups right."""
        until, changes = time.monotonic() + KUBELET_SECONDS, ["not looked at"]
        while changes:
            changes = compare(before, await self._of_node())
            if time.monotonic() > until:
                break
            await asyncio.sleep(1)
        return changes
