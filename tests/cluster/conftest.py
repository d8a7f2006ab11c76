"""A real etcd and API server for the whole run; nodes played by KWOK; a controller for each test."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from colocate.cluster.api import NODE_COLOCATIONS, POLICIES
from colocate.kube.client import DEFINITIONS, MERGE, NODES, PODS, Api, ApiError, path_of
from colocate.kube.lease import Election
from colocate.localcluster.controlplane import MANIFESTS, ControlPlane, install
from colocate.localcluster.realnode import RealNode, lacks
from colocate.objects import Node, Pod
from podgroup.api import PLAN_API, PLANS, POD_GROUPS, POWER_BUDGETS, GangPlan, PodGroup, PowerBudget
from podgroup.controller.loop import Controller
from podgroup.queue.entry import Settings
from tests.cluster.proxy import Proxy
from tools import rights

PATIENCE = 60.0
HIGH, MID, LOW, LOWEST = "test-high", "test-mid", "test-low", "test-lowest"
POLITE = "test-polite"
PRIORITIES = {POLITE: 1000, HIGH: 1000, MID: 500, LOW: 100, LOWEST: 50}
QUIET = 0.4
"""For so long nothing more may happen, before a test says that something did not."""


@pytest.fixture(scope="package")  # not the session: it would run on beside the suites that follow
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    with ControlPlane(tmp_path_factory.mktemp("plane"), controllers=True) as running:
        yield running


@pytest.fixture
async def proxy(plane: ControlPlane, tmp_path: Path) -> AsyncIterator[Proxy]:
    async with Proxy(plane, tmp_path) as running:
        yield running


@pytest.fixture
def real_node(plane: ControlPlane, tmp_path: Path) -> Iterator[RealNode]:
    missing = lacks()
    if missing:
        pytest.skip(f"a real kubelet needs {missing}")
    home = tmp_path / "node"
    home.mkdir()
    with RealNode(plane, home) as node:
        yield node


@contextlib.contextmanager
def not_there() -> Iterator[None]:
    """It is as well if what is to go is not there."""
    try:
        yield
    except ApiError as error:
        if error.status != 404:
            raise


class _Pods(msgspec.Struct):
    items: list[Pod]


def _usable(node: Node) -> bool:
    ready = any(c.type == "Ready" and c.status == "True" for c in node.status.conditions)
    return ready and not any(t.key == "node.kubernetes.io/not-ready" for t in node.spec.taints)


class World:
    """The cluster as a test uses it: small words for making objects and waiting for what becomes of them."""

    def __init__(self, api: Api, namespace: str) -> None:
        self.api, self.namespace, self.owner = api, namespace, ""
        self._new: set[str] = set()

    async def node(
        self, name: str, labels: dict[str, str] | None = None, *, played: bool = True, **offered: str | int
    ) -> None:
        """A node that offers 110 pods and what is said; played by KWOK, or ready and silent."""
        capacity = {"pods": "110", **{k.replace("__", "/").replace("_", "."): str(v) for k, v in offered.items()}}
        labels = {
            "kubernetes.io/hostname": name,
            **({"colocate.io/simulated": "true"} if played else {}),
            **(labels or {}),
        }
        status: dict[str, Any] = {"allocatable": capacity, "capacity": capacity}
        if not played:
            status["conditions"] = [{"type": "Ready", "status": "True"}]
        body = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}, "status": status}
        await self.api.request("POST", NODES, body)
        self._new.add(name)

    async def settled(self) -> None:
        """Wait until the new nodes are ready and without the taint of those that are not: no verdict of a test is
        about that."""

        async def usable() -> bool:
            nodes = {n.metadata.name: n for n in await self.api.all(Node, NODES)}
            self._new = {name for name in self._new if name in nodes and not _usable(nodes[name])}
            return not self._new

        if self._new:
            await self.until(usable, "the new nodes are ready")

    async def group(self, name: str, least: int, namespace: str = "", **spec: Any) -> None:
        await self.settled()
        annotations = spec.pop("annotations", {})
        meta = {"name": name, "annotations": annotations}
        body = {"apiVersion": "scheduling.x-k8s.io/v1alpha1", "kind": "PodGroup", "metadata": meta}
        await self.api.request(
            "POST", path_of(POD_GROUPS, namespace or self.namespace), {**body, "spec": {"minMember": least, **spec}}
        )

    async def pod(
        self,
        name: str,
        group: str = "",
        *,
        namespace: str = "",
        owned: bool = True,
        owner: dict[str, Any] | None = None,
        labels: dict[str, str] | None = None,
        annotations: dict[str, str] | None = None,
        spec: dict[str, Any] | None = None,
        finalizers: list[str] | None = None,
        **requests: str | int,
    ) -> None:
        """A pod of ours, with what it asks for."""
        await self.settled()
        asked = {k.replace("__", "/").replace("_", "."): str(v) for k, v in requests.items()}
        meta: dict[str, Any] = {
            "name": name,
            "labels": {**(labels or {})},
            "annotations": annotations or {},
            "finalizers": finalizers or [],
        }
        if group:
            meta["labels"]["scheduling.x-k8s.io/pod-group"] = group
        if owned and not namespace:
            own = {"apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": self.owner, "controller": True}
            meta["ownerReferences"] = [owner or own]
        container = {
            "name": "c",
            "image": "i",
            "resources": {"requests": asked, "limits": {k: v for k, v in asked.items() if "/" in k}},
        }
        whole = {
            "schedulerName": "colocate",
            "terminationGracePeriodSeconds": 0,
            "containers": [container],
            **(spec or {}),
        }
        body = {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": whole}
        await self.api.request("POST", path_of(PODS, namespace or self.namespace), body)

    async def pods(self, namespace: str = "") -> dict[str, Pod]:
        answer = await self.api.request("GET", path_of(PODS, namespace or self.namespace))
        return {p.metadata.name: p for p in msgspec.json.decode(answer, type=_Pods).items}

    async def bound(self, namespace: str = "") -> dict[str, str]:
        """Pod -> node."""
        return {n: p.spec.node_name for n, p in (await self.pods(namespace)).items() if p.spec.node_name}

    async def events_of_pods(self) -> set[tuple[str, str]]:
        """Pod and reason of each."""
        answer = await self.api.request("GET", path_of("/api/v1/events", self.namespace))
        told = ((e["involvedObject"], e["reason"]) for e in msgspec.json.decode(answer)["items"])
        return {(about["name"], reason) for about, reason in told if about["kind"] == "Pod"}

    async def status(self, name: str, namespace: str = "") -> PodGroup:
        return await self.api.get(PodGroup, path_of(POD_GROUPS, namespace or self.namespace, name))

    async def plan(self, name: str) -> GangPlan:
        return await self.api.get(GangPlan, path_of(PLANS, self.namespace, name))

    async def power_budget(self, name: str, watts: int, **spec: Any) -> None:
        body = {"apiVersion": PLAN_API, "kind": "PowerBudget", "metadata": {"name": name}}
        await self.api.request("POST", POWER_BUDGETS, {**body, "spec": {"watts": watts, **spec}})

    async def power_budget_status(self, name: str) -> tuple[int, int, int, str]:
        """Nodes, watts that are asked for and that are left, message."""
        status = (await self.api.get(PowerBudget, path_of(POWER_BUDGETS, name=name))).status
        return status.nodes, status.requested, status.left, status.message

    async def delete(self, collection: str, name: str, seconds: int | None = None) -> None:
        namespace = "" if collection in (NODES, POWER_BUDGETS) else self.namespace
        body = {
            "kind": "DeleteOptions",
            "apiVersion": "v1",
            **({} if seconds is None else {"gracePeriodSeconds": seconds}),
        }
        await self.api.request("DELETE", path_of(collection, namespace, name), body)

    async def create(self, collection: str, body: dict[str, Any]) -> None:
        await self.api.request("POST", path_of(collection, self.namespace), body)

    async def finish(self, name: str) -> None:
        """Let a pod go that a finalizer holds."""
        path, body = path_of(PODS, self.namespace, name), {"metadata": {"finalizers": None}}
        await self.api.request("PATCH", path, body, content_type=MERGE)

    async def set_phase(self, name: str, phase: str) -> None:
        await self.api.request(
            "PATCH",
            path_of(PODS, self.namespace, name, "status"),
            {"status": {"phase": phase}},
            content_type=MERGE,
        )

    async def until(self, what: Callable[[], Any], why: str, patience: float = PATIENCE) -> Any:
        """What `what` returns, once it is true."""
        end, seen = time.monotonic() + patience, None
        while time.monotonic() < end:
            with contextlib.suppress(ApiError):
                seen = await what()
                if seen:
                    return seen
            await asyncio.sleep(0.05)
        raise AssertionError(f"{why}: not within {patience:g} s; last seen {seen}; {await self.described()}")

    async def described(self) -> str:
        """How everything of the test is, for whoever asks why it is not otherwise."""
        said: list[str] = []
        for path in (NODES, path_of(PODS, self.namespace), path_of(PLANS, self.namespace)):
            with not_there():  # a test may have removed the kind
                for item in msgspec.json.decode(await self.api.request("GET", path))["items"]:
                    spec, status = item.get("spec", {}), item.get("status", {})
                    ready = {c["type"]: c["status"] for c in status.get("conditions", []) if c["type"] == "Ready"}
                    seen = [status.get(key) for key in ("phase", "reason", "message")]
                    where = spec.get("nodeName") or [m.get("node") for m in spec.get("members", [])]
                    said.append(f"{path.rpartition('/')[2]} {item['metadata']['name']}: {ready} {seen} {where}")
        return "; ".join(said)

    async def known(self, led: Controller, group: str, members: int) -> None:
        """Until the controller knows so many members of a group: then it decides about all of them at once."""

        async def seen() -> bool:
            return len(led.cluster.members.get(f"{self.namespace}/{group}", ())) == members

        await self.until(seen, f"the controller knows {members} members of {group}")

    async def told(self, group: str, reason: str, says: str = "") -> str:
        """The message of the plan, once the group waits for this reason and is told this: a first verdict may be of
        what the watches had told by then."""

        async def said() -> Any:
            status = (await self.plan(group)).status
            return status if status.reason == reason and says in status.message else None

        return str((await self.until(said, f"{group} is told {reason} {says}")).message)

    async def until_bound(self, *names: str) -> dict[str, str]:
        """The bindings, once these pods are bound; nobody else may be, then or a moment later."""

        async def all_of_them() -> bool:
            return set(names) <= (await self.bound()).keys()

        await self.until(all_of_them, f"{names} bound")
        return await self.only_bound(*names)

    async def only_bound(self, *names: str) -> dict[str, str]:
        """After a quiet moment: exactly these are bound, and no node is overcommitted."""
        await asyncio.sleep(QUIET)
        bound = await self.bound()
        assert set(bound) == set(names)
        return bound

    async def clear(self) -> None:
        """Everything of the test goes."""
        for path in (
            path_of(PODS, self.namespace),
            path_of(POD_GROUPS, self.namespace),
            path_of(PLANS, self.namespace),
            POWER_BUDGETS,
            NODES,
        ):
            with not_there():  # a test may have removed the kind
                await self.api.request(
                    "DELETE", path, {"kind": "DeleteOptions", "apiVersion": "v1", "gracePeriodSeconds": 0}
                )

        async def empty() -> bool:
            return not await self.pods()

        for name in await self.pods():
            with contextlib.suppress(ApiError):
                await self.finish(name)
        await self.until(empty, "the test's pods are gone")


@pytest.fixture
async def api(plane: ControlPlane) -> AsyncIterator[Api]:
    async with Api.connect(str(plane.kubeconfig())) as connected:
        await install(connected)
        yield connected


@pytest.fixture
async def world(api: Api) -> AsyncIterator[World]:
    namespace = f"t-{uuid.uuid4().hex[:8]}"
    body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}
    await api.request("POST", "/api/v1/namespaces", body)
    made = World(api, namespace)

    async def served() -> bool:
        return bool([await api.request("GET", path) for path in (POD_GROUPS, PLANS, POWER_BUDGETS)])

    await made.until(served, "the CRDs are served")
    there = await api.request("GET", "/apis/scheduling.k8s.io/v1/priorityclasses")
    for name, value in PRIORITIES.items():
        class_: dict[str, Any] = {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "value": value}
        class_ |= {"metadata": {"name": name}, **({"preemptionPolicy": "Never"} if name == POLITE else {})}
        if f'"{name}"'.encode() not in there:
            await api.request("POST", "/apis/scheduling.k8s.io/v1/priorityclasses", class_)
    owner = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "owner"}}
    answer = await api.request("POST", path_of("/api/v1/configmaps", namespace), owner)
    made.owner = msgspec.json.decode(answer)["metadata"][
        "uid"
    ]  # a real one: pods of an owner that is not there are collected
    try:
        yield made
    finally:
        await made.clear()
        await api.request("DELETE", f"/api/v1/namespaces/{namespace}")


@contextlib.asynccontextmanager
async def leader(
    world: World, settings: Settings | None = None, lease_seconds: float = 10.0
) -> AsyncIterator[Controller]:
    """A controller that leads, in this process."""
    election = Election(
        world.api, world.namespace, "colocate-controller", f"test-{uuid.uuid4().hex[:6]}", lease_seconds
    )
    led = Controller(world.api, settings or Settings(), election)
    task = asyncio.ensure_future(election.lead(led.run))
    try:
        yield led
    finally:
        failed = task.done()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert not failed, "the controller ended by itself"


@pytest.fixture
async def limited(plane: ControlPlane, api: Api) -> AsyncIterator[Api]:
    """The controller's own service account, with the role that the manifests give it."""
    await rights.grant(api)
    async with Api.connect(str(plane.kubeconfig("colocate"))) as connected:
        yield connected
    await api.request("DELETE", f"{rights.COLLECTIONS['ClusterRole']}/colocate-controller")
    await api.request("DELETE", f"{rights.COLLECTIONS['ClusterRoleBinding']}/colocate-controller")


async def ignoring_conflict(api: Api, path: str, body: dict[str, Any]) -> None:
    """Make an object, unless it is there."""
    try:
        await api.request("POST", path, body)
    except ApiError as error:
        if error.status != 409:
            raise


@pytest.fixture
async def kinds(world: World) -> AsyncIterator[None]:
    """The node manager's kinds are installed, and what a test has said is gone after it."""
    for name in ("nodecolocations", "colocationpolicies"):
        kind = yaml.safe_load((MANIFESTS / "crd" / f"{name}.yaml").read_text())
        await ignoring_conflict(world.api, DEFINITIONS, kind)

    async def served() -> bool:
        with contextlib.suppress(ApiError):
            return bool([await world.api.request("GET", path) for path in (NODE_COLOCATIONS, POLICIES)])
        return False

    await world.until(served, "the kind is served")
    yield
    for path in (NODE_COLOCATIONS, POLICIES):
        with not_there():
            await world.api.request("DELETE", path, {})
