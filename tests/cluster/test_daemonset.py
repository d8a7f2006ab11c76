"""The node manager as the manifests install it: its image and DaemonSet on a real kubelet, and gone again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from colocate.cgroup.port import KernelPort
from colocate.cgroup.tree import cgroup_of, inodes_of, joined, processes_below
from colocate.cluster.api import BATCH_MEMORY
from colocate.demo.result import ARMS
from colocate.kube.client import PODS
from colocate.localcluster import realnode
from colocate.localcluster.controlplane import ControlPlane
from colocate.localcluster.installation import Installation
from colocate.localcluster.realnode import NAME, RealNode
from tests.cluster.conftest import World
from tests.cluster.test_held_back import FROZEN, condition, holds_back, until_told
from tests.cluster.test_kubelet import on, until_ready
from tests.cluster.test_nri import BATCH, SHARES, starts, until_runs
from tests.cluster.test_publication import offered


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[ControlPlane]:
    """Of its own: the manifests bring kinds, and take them away."""
    with ControlPlane(tmp_path / "plane", scheduler=True, controllers=True, kwok=False) as running:
        yield running


def guardians() -> list[int]:
    """Of agents in a container: by the path that Python has there."""
    wanted, found = b"/usr/bin/python3\0-P\0-m\0colocate.actuate.guardian", []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "cmdline").read_bytes().startswith(wanted):
                found.append(int(folder.name))
    return found


def asked_from_afar(plane: ControlPlane, namespace: str, uid: str, directory: Path) -> None:
    """The commands about a node, of any node of the cluster."""

    def colocate(*arguments: str, code: int = 0) -> str:
        command = [str(Path(sys.executable).with_name("kubectl-colocate")), *arguments]
        ran = subprocess.run(
            [*command, "--kubeconfig", str(plane.kubeconfig())],
            cwd=directory,
            env={**os.environ, "COLUMNS": "200"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert ran.returncode == code, ran.stdout + ran.stderr
        return ran.stdout if code == 0 else ran.stderr

    assert json.loads(colocate("status", "--node", NAME, "-o", "json"))["ticks"] > 0
    assert uid in colocate("top", "--node", NAME, "--once", "-o", "wide")
    assert "allocatable: " in colocate("explain", "node", NAME)
    for words in (("pod", "asks", "-n", namespace), ("pod", f"{namespace}/asks"), (f"pod/{namespace}/asks",)):
        told = colocate("explain", *words)
        assert "is batch work at " in told
        assert uid in told
    assert "a batch tier is possible" in colocate("doctor", "--node", NAME)
    assert "verdict" in json.loads(colocate("report", "--node", NAME, "-o", "json"))
    colocate("report", "--node", NAME, "--file", "far.html")
    assert "colocate" in (directory / "far.html").read_text()
    assert "there is no node 'nowhere'" in colocate("top", "--node", "nowhere", code=2)
    assert "there is no pod 'nobody'" in colocate("explain", "pod", "nobody", code=2)
    assert "no name of an object" in colocate("top", "--node", "../pods", code=2)
    assert "known: " in colocate("explain", "stranger", "--node", NAME, code=2)


async def asks_for_batch(world: World) -> None:
    """A pod that kube-scheduler places by what the node promises to batch."""
    asked = {"requests": {BATCH_MEMORY: "64Mi"}, "limits": {BATCH_MEMORY: "64Mi"}}
    spec = on(NAME)
    spec["containers"][0]["resources"] = asked
    await world.pod("asks", spec={**spec, "schedulerName": "default-scheduler"})


@pytest.mark.slow
async def test_the_daemonset_places_pods_and_its_removal_leaves_nothing(
    world: World, real_node: RealNode, plane: ControlPlane, archive: Path, tmp_path: Path
) -> None:
    assert os.stat(archive).st_size <= 150e6
    await until_ready(world, real_node)
    real_node.bring(archive)
    port, tier = KernelPort(), joined(real_node.cgroup, "kubepods/batch")
    main = SHARES[port.layout.version][0]
    installed = Installation(plane, tmp_path / "overlay", {"nodeRoot": real_node.cgroup, "calibrate": False})

    async def asked() -> bool:
        real_node.check()
        return "runtime_connected" in real_node.said_by("colocate-agent")

    async def promises() -> bool:
        cpu, memory = await offered(world.api, NAME)
        return cpu is not None and memory not in (None, "0")  # other suites may have all CPUs of this machine

    await asyncio.to_thread(installed.apply)
    try:
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
        await asyncio.to_thread(asked_from_afar, plane, world.namespace, asking, tmp_path)
        await holds_back(world, NAME, "asks", **FROZEN)
        await until_told(world, "asks", "True", "Frozen")
        await until_runs(world, real_node, "asks")
        assert (await condition(world, "asks"))[0] == "True", "kubelet leaves the condition to us"
        await asyncio.to_thread(installed.remove_agents)
        await until_told(world, "asks", "False", "Released")

        async def nothing_offered() -> bool:
            return await offered(world.api, NAME) == (None, None)

        await world.until(nothing_offered, "what is not promised any more is not offered")
    finally:
        await asyncio.to_thread(installed.remove)
    assert processes_below(port, main, joined(tier, f"pod{batch}")), "whoever runs is not killed"
    for name in ("batch", "asks"):
        await world.delete(PODS, name, 0)

    async def nothing() -> bool:
        return not inodes_of(port, tier)

    await world.until(nothing, "the tier goes with the last pod in it, though no agent is there any more")

    async def nobody() -> bool:
        return not guardians()

    await world.until(nobody, "the guardian ends with it")


@pytest.mark.slow
def test_the_demonstration_shows_the_table_and_leaves_the_node_as_it_was(archive: Path, tmp_path: Path) -> None:
    missing = realnode.lacks()
    if missing:
        pytest.skip(f"a real kubelet needs {missing}")
    command = [sys.executable, "-m", "colocate.cli.main", "demo", "kubernetes", "--image", str(archive)]
    ran = subprocess.run(
        [*command, "--seconds", "6", "-o", "json"], cwd=tmp_path, capture_output=True, text=True, timeout=400
    )
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert set(told["arms"]) == set(ARMS)
    assert all(arm["requests"] for arm in told["arms"].values())
    assert all(told["arms"][arm]["batch_work_per_second"] > 0 for arm in ARMS if arm != "alone")
    assert told["batch_pods_in_tier"] == len(os.sched_getaffinity(0))
    assert told["placed_by_nri"]
    assert isinstance(told["published_batch_cpu_milli"], int)
    assert (told["node_unchanged"], told["host_unchanged"]) == (True, True)
    assert "small Kubernetes node" in Path(told["report"]).read_text()
