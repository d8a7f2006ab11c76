"""The node manager as the manifests install it, on a node with full cgroup v2: with either driver of its kubelet."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from colocate.cluster.api import BATCH_CPU, BATCH_MEMORY, QOS
from colocate.demo.digest import Digest, compare
from colocate.localcluster.controlplane import ControlPlane
from colocate.localcluster.installation import Installation
from colocate.localcluster.realnode import IMAGE, NAME
from tests.guest.node import GuestNode
from tools import image
from tools.guest import HOST, lacks, systemd_lacks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.rare,  # on this machine's own kubelet it runs each time; emulated, its image alone takes minutes
    pytest.mark.skipif(bool(lacks()), reason=f"a guest lacks {lacks()}"),
    pytest.mark.skipif(bool(image.lacks()), reason=f"the container image needs {image.lacks()}"),
]
KUBELET_SECONDS = 70.0
"""Kubelet writes the knobs of its groups anew once a minute (cm/qos_container_manager_linux.go)."""
SMALL = {"cpu": "100m", "memory": "32Mi"}
ASKED = {BATCH_CPU: "10", BATCH_MEMORY: "64Mi"}
PODS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "guaranteed": ({}, {"requests": SMALL, "limits": SMALL}),
    "burstable": ({}, {"requests": SMALL}),
    "besteffort": ({}, {}),
    "batch": ({QOS: "batch"}, {}),
    "asks": ({}, {"requests": {BATCH_MEMORY: "64Mi"}, "limits": {BATCH_MEMORY: "64Mi"}}),
}


class Cluster:
    """One node, colocate installed on it; the tests of a driver follow its life in their order."""

    def __init__(self, plane: ControlPlane, node: GuestNode, directory: Path, *, systemd: bool) -> None:
        self.node, self.directory, self.systemd = node, directory, systemd
        policy = {"calibrate": False}
        self.installed = Installation(
            plane,
            directory / "overlay",
            policy,
            host=HOST,
            sys_resource=True,
            environment={"COLOCATE_JIT": "off"},  # emulated, compiling takes minutes
        )

    def group(self, of: str, uid: str = "") -> str:
        """The cgroup of a QoS class, or of a pod in it, by the driver's rules."""
        if not self.systemd:
            return "/" + "/".join(filter(None, ["kubepods", of, uid and f"pod{uid}"]))
        slices = ["kubepods", *filter(None, [of])]
        path = "/".join(f"{'-'.join(slices[: i + 1])}.slice" for i in range(len(slices)))
        return f"/{path}" + (f"/{'-'.join(slices)}-pod{uid.replace('-', '_')}.slice" if uid else "")

    def get(self, what: str, namespace: str = "default") -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.installed.kubectl("get", "-n", namespace, what, "-o", "json"))
        return found

    def offered(self) -> tuple[str | None, str | None]:
        found = self.get(f"node/{NAME}")["status"]["allocatable"]
        return found.get(BATCH_CPU), found.get(BATCH_MEMORY)

    def ready(self) -> bool:
        found = json.loads(self.installed.kubectl("get", "nodes", "-o", "json"))["items"]
        return any(c["type"] == "Ready" and c["status"] == "True" for n in found for c in n["status"]["conditions"])

    def create(self, name: str) -> None:
        labels, resources = PODS[name]
        container = {"name": "c", "image": IMAGE, "imagePullPolicy": "Never", "resources": resources}
        spec = {
            "hostNetwork": True,
            "terminationGracePeriodSeconds": 0,
            "automountServiceAccountToken": False,
            "containers": [container],
        }
        path = self.directory / f"{name}.yaml"
        meta = {"name": name, "namespace": "default", "labels": labels}
        path.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec}))
        self.installed.kubectl("apply", "-f", str(path))

    def uid_of(self, name: str) -> str:
        """Once it runs."""

        def runs() -> str:
            pod = self.get(f"pod/{name}")
            return pod["metadata"]["uid"] if pod["status"]["phase"] == "Running" else ""

        return str(self.node.until(runs, f"{name} runs"))

    def digest(self) -> Digest:
        mounts = shlex.quote(json.dumps({"unified": "/sys/fs/cgroup"}))
        found: Digest = json.loads(self.node.run(f"python3 -m colocate.demo.digest {mounts}"))
        return found

    def agents(self) -> list[int]:
        """The processes of the agent's container."""
        (pod,) = [p for p in self.get("pods", "colocate-system")["items"] if "agent" in p["metadata"]["name"]]
        return self.node.processes(self.group("burstable", pod["metadata"]["uid"]))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(False, id="cgroupfs driver"),
        pytest.param(
            True,
            id="systemd driver",
            marks=pytest.mark.skipif(bool(systemd_lacks()), reason=f"a guest with systemd lacks {systemd_lacks()}"),
        ),
    ],
)
def cluster(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, archive: Path
) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("cluster")
    plane = ControlPlane(directory / "plane", scheduler=True, controllers=True, kwok=False)
    with plane, GuestNode(plane, archive, systemd=request.param) as node:
        made = Cluster(plane, node, directory, systemd=request.param)
        node.until(made.ready, "the node is ready")
        yield made


def test_the_daemonset_places_pods_and_its_removal_leaves_nothing(cluster: Cluster) -> None:
    node = cluster.node
    for name in ("guaranteed", "burstable", "besteffort"):
        cluster.create(name)
    plain = {name: cluster.uid_of(name) for name in ("guaranteed", "burstable", "besteffort")}
    before = cluster.digest()
    tier = cluster.group("batch")
    assert node.read(f"{tier}/cgroup.procs") == ""

    cluster.installed.apply()
    node.until(lambda: "runtime_connected" in node.words(), "the runtime asks the agent")
    node.until(lambda: cluster.offered()[1] not in (None, "0"), "what batch may have is in the node's status")
    for name in ("batch", "asks"):
        cluster.create(name)
    batch = {name: cluster.uid_of(name) for name in ("batch", "asks")}

    def placed() -> None:
        for name, of in (("guaranteed", ""), ("burstable", "burstable"), ("besteffort", "besteffort")):
            assert node.processes(cluster.group(of, plain[name])), f"{name} is where kubelet puts it"
        for name, uid in batch.items():
            assert node.processes(cluster.group("batch", uid)), f"{name} is in the tier"
        assert node.read(f"{tier}/cpu.weight") == "1\n", "also when systemd has just been told of a pod"
        assert node.read(f"{cluster.group('besteffort')}/cpu.weight") == "1\n"

    placed()
    weigh = [f"{cluster.group('batch', uid)}/cpu.weight" for uid in batch.values()]
    node.until(lambda: [node.read(file) for file in weigh] == ["1\n"] * 2, "pods that request no CPU weigh least")
    pod = cluster.group("batch", batch["asks"])
    limits = node.run(f"cat /sys/fs/cgroup{pod}/*/memory.max").split()
    assert str(64 << 20) in limits
    time.sleep(KUBELET_SECONDS)
    placed()

    for pid in cluster.agents():
        node.run(f"kill -9 {pid} 2>/dev/null || true")
    placed()
    node.until(lambda: len(cluster.agents()) > 1, "the agent's container is started again")

    cluster.installed.remove_agents()
    node.until(lambda: cluster.offered() == (None, None), "what is not promised any more is not offered")
    cluster.installed.remove()
    assert node.processes(cluster.group("batch", batch["batch"])), "whoever runs is not killed"
    cluster.installed.kubectl("delete", "pod", "batch", "asks", "--force", "--grace-period=0")
    node.until(lambda: node.read(f"{tier}/cgroup.events") == "", "the tier goes with the last pod in it")
    if cluster.systemd:
        slices = node.run("systemctl list-units --all --no-legend 'kubepods-batch*'")
        assert slices.strip() == "", "systemd keeps nothing of batch pods in mind"
    node.until(lambda: not compare(before, cluster.digest()), "every knob is as before", KUBELET_SECONDS)
    assert compare(before, cluster.digest()) == []
