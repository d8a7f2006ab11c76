"""The node manager as the manifests install it: its image and DaemonSet on a real kubelet, and gone again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from colocate.cgroup.port import KernelPort
from colocate.cgroup.tree import cgroup_of, inodes_of, joined, processes_below
from colocate.cluster.api import BATCH_MEMORY
from colocate.errors import HostUnfit
from colocate.kube.client import PODS, ApiError, path_of
from colocate.localcluster.controlplane import MANIFESTS, ControlPlane
from colocate.localcluster.realnode import NAME, RealNode
from tests.cluster.conftest import World
from tests.cluster.test_kubelet import on, until_ready
from tests.cluster.test_nri import BATCH, SHARES, starts, until_runs
from tests.cluster.test_publication import POLICIES, offered, publishing
from tools import image, rights

SYSTEM = "colocate-system"
COLLECTIONS = (
    rights.COLLECTIONS
    | POLICIES
    | {
        "ConfigMap": "/api/v1/configmaps",
        "DaemonSet": "/apis/apps/v1/daemonsets",
    }
)
ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
SYS_RESOURCE = 24


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image, as `make image` makes it."""
    if image.lacks():
        pytest.skip(f"the container image needs {image.lacks()}")
    path = tmp_path_factory.mktemp("image") / "colocate.tar"
    try:
        image.build(path)
    except HostUnfit as error:
        pytest.skip(f"the container image could not be made here (no mirror?): {error}")
    return path


@pytest.fixture
def kube_scheduler(plane: ControlPlane) -> Iterator[None]:
    plane.start_scheduler()
    yield
    plane.end("kube-scheduler")


def manifests(real_node: RealNode, plane: ControlPlane) -> list[dict[str, Any]]:
    """The manifests, but for what this cluster has not: a network of pods (and so no probes), kube-proxy, tokens that
    admission mounts, and some right of root.
    """
    files = ("controller/namespace.yaml", "base/agent.yaml")
    found = [o for f in files for o in yaml.safe_load_all((MANIFESTS / f).read_text())]
    policy = next(o for o in found if o["kind"] == "ConfigMap")
    spec = yaml.safe_load(policy["data"]["policy.yaml"])
    spec["spec"] |= {"nodeRoot": real_node.cgroup, "calibrate": False, "http": {"enabled": False}}
    policy["data"]["policy.yaml"] = yaml.safe_dump(spec)
    pod = next(o for o in found if o["kind"] == "DaemonSet")["spec"]["template"]["spec"]
    pod["hostNetwork"] = True
    container = pod["containers"][0]
    container = {k: v for k, v in container.items() if k not in ("readinessProbe", "livenessProbe", "ports")}
    has = int((Path("/proc/self/status").read_text().partition("CapBnd:\t")[2]).split()[0], 16)
    if not has >> SYS_RESOURCE & 1:
        container["securityContext"]["capabilities"]["add"].remove("SYS_RESOURCE")
    pod["containers"] = [container]
    container["env"] += [
        {"name": "KUBERNETES_SERVICE_HOST", "value": "127.0.0.1"},
        {"name": "KUBERNETES_SERVICE_PORT", "value": str(plane.port)},
    ]
    container["volumeMounts"].append({"name": "account", "mountPath": ACCOUNT, "readOnly": True})
    sources = [{"serviceAccountToken": {"path": "token"}}, {"configMap": {"name": "authority"}}]
    pod["volumes"].append({"name": "account", "projected": {"sources": sources}})
    authority = (plane.directory / "certs" / "apiserver.crt").read_text()
    meta = {"name": "authority", "namespace": SYSTEM}
    found.insert(1, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": {"ca.crt": authority}})
    return found


def guardians() -> list[int]:
    """Of agents in a container: by the path that Python has there."""
    wanted, found = b"/usr/bin/python3\0-P\0-m\0colocate.actuate.guardian", []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "cmdline").read_bytes().startswith(wanted):
                found.append(int(folder.name))
    return found


@contextlib.asynccontextmanager
async def applied(world: World, objects: list[dict[str, Any]]) -> AsyncIterator[None]:
    """As long as the block runs; the namespace stays, for an API server needs its time to take one away."""

    def path(one: dict[str, Any]) -> str:
        return path_of(COLLECTIONS[one["kind"]], one["metadata"].get("namespace", ""))

    made = [one for one in objects if one["kind"] != "Namespace"]
    try:
        for one in objects:
            try:
                await world.api.request("POST", path(one), one)
            except ApiError as error:
                if error.status != 409 or one in made:
                    raise
        yield
    finally:
        for one in reversed(made):
            with contextlib.suppress(ApiError):
                await world.api.request("DELETE", f"{path(one)}/{one['metadata']['name']}", {})


async def asks_for_batch(world: World) -> None:
    """A pod that kube-scheduler places by what the node promises to batch."""
    asked = {"requests": {BATCH_MEMORY: "64Mi"}, "limits": {BATCH_MEMORY: "64Mi"}}
    spec = on(NAME)
    spec["containers"][0]["resources"] = asked
    await world.pod("asks", spec={**spec, "schedulerName": "default-scheduler"})


@pytest.mark.slow
async def test_the_daemonset_places_pods_and_its_removal_leaves_nothing(
    world: World, real_node: RealNode, plane: ControlPlane, archive: Path, kinds: None, kube_scheduler: None
) -> None:
    assert os.stat(archive).st_size <= 150e6
    await until_ready(world, real_node)
    real_node.bring(archive)
    port, tier = KernelPort(), joined(real_node.cgroup, "kubepods/batch")
    main, agents = SHARES[port.layout.version][0], path_of(COLLECTIONS["DaemonSet"], SYSTEM, "colocate-agent")

    async def asked() -> bool:
        real_node.check()
        return "runtime_connected" in real_node.said_by("colocate-agent")

    async def no_agent() -> bool:
        try:
            await world.api.request("GET", agents)
        except ApiError as error:
            return error.status == 404
        return False

    async def promises() -> bool:
        cpu, memory = await offered(world.api, NAME)
        return cpu is not None and memory not in (None, "0")  # other suites may have all CPUs of this machine

    async with applied(world, manifests(real_node, plane)), publishing(world.api):
        await world.until(asked, "the runtime asks the agent")
        await world.until(promises, "what batch may have is in the node's status")
        batch = await starts(world, real_node, "batch", **BATCH)
        assert processes_below(port, main, joined(tier, f"pod{batch}"))
        await asks_for_batch(world)
        asking = await until_runs(world, real_node, "asks")
        assert processes_below(port, main, joined(tier, f"pod{asking}")), "no label: what it asks for says so"
        if port.layout.version == 1:
            (made,) = port.children("memory", joined(tier, f"pod{asking}"))
            limit = port.read("memory", joined(tier, f"pod{asking}/{made}"), "memory.limit_in_bytes")
            assert limit == f"{64 << 20}\n"
        assert [cgroup_of(port, pid, main) for pid in guardians()] == ["/"], "out of its container's cgroup"
        await world.api.request("DELETE", agents, {"propagationPolicy": "Foreground"})
        await world.until(no_agent, "the DaemonSet and its pod are gone")

        async def no_promise() -> bool:
            return (await offered(world.api, NAME))[1] == "0"

        await world.until(no_promise, "an agent that ends takes its promise back")
    assert processes_below(port, main, joined(tier, f"pod{batch}")), "whoever runs is not killed"
    for name in ("batch", "asks"):
        await world.delete(PODS, name, 0)

    async def nothing() -> bool:
        return not inodes_of(port, tier)

    await world.until(nothing, "the tier goes with the last pod in it, though no agent is there any more")

    async def nobody() -> bool:
        return not guardians()

    await world.until(nobody, "the guardian ends with it")
