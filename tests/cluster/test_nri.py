"""The runtime's plugin protocol with a real containerd: where the processes of batch pods really are."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from colocate.cgroup.layout import UNIFIED
from colocate.cgroup.port import KernelPort
from colocate.cgroup.tree import joined, processes, processes_below
from colocate.kube.client import PODS, STRATEGIC, path_of
from colocate.localcluster.controlplane import ControlPlane, binaries
from colocate.localcluster.realnode import IMAGE, NAME, RealNode
from colocate.nri import Adjustment, Container, Limits, Plugin, Pod, Refused, Update
from tests.cluster.conftest import World
from tests.cluster.test_kubelet import on, until_ready

QOS = "colocate.io/qos"
BATCH = {QOS: "batch"}
POLICY = """
apiVersion: colocate.io/v1alpha1
kind: ColocationPolicy
metadata: {{name: test}}
spec: {{nodeRoot: {root}, tick: 250ms, calibrate: false, http: {{enabled: false}}}}
"""
SHARES = {1: ("cpu", "cpu.shares", "7"), 2: (UNIFIED, "cpu.weight", "1")}
"""Where 7 shares are found, as runc writes them."""


class Tier:
    """Containers of pods that say so go into a sibling of BestEffort."""

    def __init__(self) -> None:
        self.made: dict[str, str] = {}
        """Pod -> its container."""
        self.found: dict[str, Container] = {}
        self.times_away = 0

    def synchronize(self, pods: list[Pod], containers: list[Container]) -> Iterable[Update]:
        self.found = {c.id: c for c in containers}
        return []

    def create_container(self, pod: Pod, container: Container) -> Adjustment | None:
        self.made[pod.name] = container.id
        if pod.labels.get(QOS) != "batch":
            return None
        return Adjustment(container.cgroups_path.replace("/besteffort/", "/batch/"))

    def container_removed(self, pod: Pod, container: Container) -> None:
        self.made.pop(pod.name, None)

    def pod_removed(self, pod: Pod) -> None:
        """Nothing is known of it."""

    def away(self) -> None:
        self.times_away += 1


@contextlib.contextmanager
def ended(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that does not outlive the test."""
    with log.open("wb") as file:
        made = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        yield made
    finally:
        made.kill()
        made.wait()


async def starts(world: World, real_node: RealNode, name: str, **labels: str) -> str:
    """A pod of the real node, once it runs; its uid."""
    spec = {**on(NAME), "nodeName": NAME, "schedulerName": "default-scheduler"}
    await world.pod(name, spec=spec, labels=labels)
    return await until_runs(world, real_node, name)


async def until_runs(world: World, real_node: RealNode, name: str) -> str:
    """Its uid, once it runs."""

    async def runs() -> Any:
        real_node.check()
        pod = (await world.pods())[name]
        return pod.metadata.uid if pod.status.phase == "Running" else None

    return str(await world.until(runs, f"{name} runs"))


@pytest.mark.slow
async def test_batch_pods_go_into_the_tier_and_stay_there(world: World, real_node: RealNode) -> None:
    await until_ready(world, real_node)
    port, handler = KernelPort(), Tier()
    plugin = Plugin("colocate-test", "50", handler, real_node.nri_socket)
    running = asyncio.create_task(plugin.run())

    def where(uid: str, container: str, of: str) -> list[set[int]]:
        path = joined(real_node.cgroup, f"kubepods/{of}/pod{uid}/{container}")
        return [set(processes(port, hierarchy, path)) for hierarchy in port.layout.mounts]

    async def connected() -> bool:
        return plugin.connected

    try:
        await world.until(connected, "the plugin is registered")
        assert plugin.runtime.startswith("containerd")
        plain, batch = await starts(world, real_node, "plain"), await starts(world, real_node, "batch", **BATCH)
        there = where(batch, handler.made["batch"], "batch")
        assert all(there)
        assert all(where(plain, handler.made["plain"], "besteffort")), "who did not ask is where kubelet put it"

        assert await plugin.update([Update(handler.made["batch"], Limits(cpu_shares=7))]) == []
        path = joined(real_node.cgroup, f"kubepods/batch/pod{batch}/{handler.made['batch']}")
        hierarchy, file, shown = SHARES[port.layout.version]
        assert (port.read(hierarchy, path, file) or "").strip() == shown
        assert await plugin.update([Update("no-such-container", Limits(cpu_shares=7))]) == [], "it says nothing of it"

        real_node.end_containerd()

        async def back() -> bool:
            return handler.times_away == 1 and plugin.connected

        await world.until(back, "containerd is back, and so is the plugin")
        assert where(batch, handler.made["batch"], "batch") == there, "its processes have not noticed"
        assert handler.found[handler.made["batch"]].cgroups_path == path
        assert handler.found[handler.made["batch"]].running

        container = handler.made["batch"]
        await world.delete(PODS, "batch", 0)

        async def removed() -> bool:
            return "batch" not in handler.made and not any(where(batch, container, "batch"))

        await world.until(removed, "the pod's container is removed, wherever it was")
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    orphan = await starts(world, real_node, "orphan", **BATCH)
    path = joined(real_node.cgroup, f"kubepods/besteffort/pod{orphan}")
    assert port.children(SHARES[port.layout.version][0], path), "without the plugin a pod starts as plain BestEffort"


class Lends(Tier):
    """Every batch container gets a card, but for the first one."""

    asked = 0

    def create_container(self, pod: Pod, container: Container) -> Adjustment | None:
        wanted = super().create_container(pod, container)
        self.asked += wanted is not None
        if wanted is not None and self.asked == 1:
            raise Refused("no service lends a card just now")
        return wanted and wanted._replace(devices=("colocate.test/gpu=GPU-7",))


@pytest.mark.slow
async def test_a_card_is_lent_by_the_runtime_and_who_is_refused_one_is_tried_again(
    world: World, real_node: RealNode
) -> None:
    """The card is a device of the Container Device Interface that sets a variable."""
    await until_ready(world, real_node)
    devices = [{"name": "GPU-7", "containerEdits": {"env": ["BORROWED=GPU-7"]}}]
    card = real_node.cdi_folder / "card.json"
    card.write_text(json.dumps({"cdiVersion": "0.6.0", "kind": "colocate.test/gpu", "devices": devices}))
    port, handler = KernelPort(), Lends()
    plugin = Plugin("colocate-test", "50", handler, real_node.nri_socket)
    running = asyncio.create_task(plugin.run())

    async def connected() -> bool:
        return plugin.connected

    try:
        await world.until(connected, "the plugin is registered")
        borrower = await starts(world, real_node, "borrower", **BATCH)
        assert handler.asked > 1, "kubelet tries again who was refused"
        path = joined(real_node.cgroup, f"kubepods/batch/pod{borrower}/{handler.made['borrower']}")
        [pid, *_] = processes(port, SHARES[port.layout.version][0], path)
        assert b"BORROWED=GPU-7" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@pytest.mark.slow
async def test_the_agent_places_batch_pods_governs_them_and_leaves_nothing(
    world: World, real_node: RealNode, tmp_path: Path
) -> None:
    await until_ready(world, real_node)
    port, tier, log = KernelPort(), joined(real_node.cgroup, "kubepods/batch"), tmp_path / "agent.log"
    (tmp_path / "policy.yaml").write_text(POLICY.format(root=real_node.cgroup))
    places = {"COLOCATE_STATE_DIR": str(tmp_path / "state"), "COLOCATE_RUNTIME_DIR": str(tmp_path / "run")}
    environment = {**os.environ, **places, "COLOCATE_JIT": "off"}
    colocate = [sys.executable, "-m", "colocate.cli.main"]
    command = [*colocate, "agent", "--config", str(tmp_path / "policy.yaml"), "--nri", real_node.nri_socket]

    def there(path: str) -> list[str]:
        return [h for h in port.layout.mounts if port.inode(h, path) is not None]

    async def connected() -> bool:
        assert agent.poll() is None, log.read_text()
        return "runtime_connected" in log.read_text()

    with ended(command, environment, log) as agent:
        await world.until(connected, "the runtime asks the agent")
        plain, batch = await starts(world, real_node, "plain"), await starts(world, real_node, "batch", **BATCH)
        main = SHARES[port.layout.version][0]
        assert processes_below(port, main, joined(tier, f"pod{batch}"))
        assert processes_below(port, main, joined(real_node.cgroup, f"kubepods/besteffort/pod{plain}"))

        async def governed() -> bool:
            asked = [*colocate, "top", "-o", "json"]
            told = await asyncio.to_thread(
                subprocess.run, asked, env=environment, capture_output=True, text=True, check=False
            )
            return f"pod:{batch}" in told.stdout

        await world.until(governed, "the agent has seen it in its tier")
        await world.delete(PODS, "batch", 0)

        async def gone() -> bool:
            return not there(joined(tier, f"pod{batch}"))

        await world.until(gone, "what the pod left in the tier is removed, in every hierarchy")
        assert there(tier)
        agent.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(agent.wait, 30) == 0, log.read_text()
        assert not there(tier)


@pytest.fixture
async def placing(real_node: RealNode, tmp_path: Path, world: World) -> AsyncIterator[str]:
    """An agent that places and governs; the tier."""
    await until_ready(world, real_node)
    log = tmp_path / "agent.log"
    (tmp_path / "policy.yaml").write_text(POLICY.format(root=real_node.cgroup))
    places = {"COLOCATE_STATE_DIR": str(tmp_path / "state"), "COLOCATE_RUNTIME_DIR": str(tmp_path / "run")}
    command = [sys.executable, "-m", "colocate.cli.main", "agent", "--config", str(tmp_path / "policy.yaml")]
    with ended(
        [*command, "--nri", real_node.nri_socket], {**os.environ, **places, "COLOCATE_JIT": "off"}, log
    ) as agent:

        async def connected() -> bool:
            assert agent.poll() is None, log.read_text()
            return "runtime_connected" in log.read_text()

        await world.until(connected, "the runtime asks the agent")
        yield joined(real_node.cgroup, "kubepods/batch")
        agent.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(agent.wait, 30) == 0, log.read_text()


@pytest.mark.slow
async def test_whatever_is_done_to_a_batch_pod_is_done_in_the_tier(
    world: World, real_node: RealNode, plane: ControlPlane, placing: str
) -> None:
    """A process that is run in it, a resize, a container that is added or dies, a kubelet that starts anew."""
    port, main = KernelPort(), SHARES[KernelPort().layout.version][0]
    spec = {**on(NAME), "nodeName": NAME, "schedulerName": "default-scheduler"}
    spec["containers"][0]["resources"] = {"requests": {"cpu": "50m", "memory": "16Mi"}}
    await world.pod("batch", spec=spec, labels=BATCH)
    uid = await until_runs(world, real_node, "batch")
    pod, path = joined(placing, f"pod{uid}"), path_of(PODS, world.namespace, "batch")

    def there() -> set[int]:
        return set(processes_below(port, main, pod))

    async def so_many(count: int) -> bool:
        return len(there()) == count

    first = there()
    assert len(first) == 1
    kubectl = [str(binaries("kubectl") / "kubectl"), "--kubeconfig", str(plane.kubeconfig()), "-n", world.namespace]
    with ended(
        [*kubectl, "exec", "batch", "--", "/bin/sleep", "600"],
        dict(os.environ),
        real_node.static_pods.parent / "exec.log",
    ):
        await world.until(lambda: so_many(2), "what is run in the pod is in the tier")
        (run,) = there() - first
    os.kill(run, signal.SIGKILL)
    await world.until(lambda: so_many(1), "it has ended")

    (container,) = port.children(main, pod)
    asked = {"spec": {"containers": [{"name": "c", "resources": {"requests": {"cpu": "200m"}}}]}}
    await world.api.request("PATCH", f"{path}/resize", asked, content_type=STRATEGIC)
    hierarchy, file, _ = SHARES[port.layout.version]

    async def resized() -> bool:
        shares = int(port.read(hierarchy, joined(pod, container), file) or 0)
        return shares == 204 if port.layout.version == 1 else shares > 5

    await world.until(resized, "the container is resized where it is")
    assert there() == first, "it was not started again"

    added = {"spec": {"ephemeralContainers": [{"name": "e", "image": IMAGE, "imagePullPolicy": "Never"}]}}
    await world.api.request("PATCH", f"{path}/ephemeralcontainers", added, content_type=STRATEGIC)
    await world.until(lambda: so_many(2), "a container that is added to it is in the tier")

    (process,) = first
    os.kill(process, signal.SIGKILL)

    async def again() -> bool:
        return len(there()) == 2 and process not in there()

    await world.until(again, "a container that is started again is in the tier")

    before = there()
    real_node.end_kubelet()
    static = {**on(NAME), "nodeName": NAME}
    static.pop("nodeSelector")
    meta = {"name": "static", "namespace": world.namespace, "labels": BATCH}
    body = {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": static}
    (real_node.static_pods / "static.json").write_text(json.dumps(body))

    async def static_there() -> bool:
        return len(processes_below(port, main, placing)) == 3

    await world.until(static_there, "kubelet is back, and a static pod in the tier")
    assert there() == before, "a pod that runs has not noticed"
    (real_node.static_pods / "static.json").unlink()
    await world.delete(PODS, "batch", 0)

    async def nothing() -> bool:
        return not port.children(main, placing)

    await world.until(nothing, "nothing of either is left")
