"""Bad moments of a node that the DaemonSet governs, on a real kubelet: services stay protected, nothing is left behind.

`COLOCATE_API_AWAY_SECONDS` is for how long the API server does not answer: a minute, unless somebody wants to wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from colocate.cgroup.port import KernelPort
from colocate.cgroup.tree import inodes_of, joined, processes_below
from colocate.kube.client import PODS, path_of
from colocate.localcluster.controlplane import ControlPlane
from colocate.localcluster.installation import Installation
from colocate.localcluster.realnode import NAME, RealNode
from tests.cluster.conftest import World
from tests.cluster.test_daemonset import guardians
from tests.cluster.test_kubelet import on, until_ready
from tests.cluster.test_nri import BATCH, SHARES, starts
from tests.cluster.test_publication import offered

AWAY_SECONDS = float(os.environ.get("COLOCATE_API_AWAY_SECONDS", "60"))
SERVICES, BATCH_PODS = 125, 125


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[ControlPlane]:
    """Of its own: the manifests bring kinds, and it is stopped for a while."""
    with ControlPlane(tmp_path / "plane", scheduler=True, controllers=True, kwok=False) as running:
        yield running


@contextlib.asynccontextmanager
async def governed(
    world: World, real_node: RealNode, plane: ControlPlane, archive: Path, directory: Path
) -> AsyncIterator[Installation]:
    """The node promises something to batch; what was installed is removed if the test has not done that."""
    await until_ready(world, real_node)
    real_node.bring(archive)
    installed = Installation(plane, directory, {"nodeRoot": real_node.cgroup, "calibrate": False})
    await asyncio.to_thread(installed.apply)
    try:
        await until_offered_memory(world)
        yield installed
    finally:
        await asyncio.to_thread(installed.remove, wait=False)


async def until_offered_memory(world: World) -> None:
    async def promises() -> bool:
        return (await offered(world.api, NAME))[1] not in (None, "0")  # of CPU this machine may have none left

    await world.until(promises, "what batch may have is in the node's status")


def told_by_agent(what: str) -> Any:
    """What the agent itself says on its node, without the API server; asked by a process of the node."""
    known = Path("/proc").glob("[0-9]*/root/run/colocate/agent.sock")
    socket = max(known, key=lambda path: int(path.parts[2]))  # the first is unshare, which is not in there itself
    inside = ["nsenter", "--target", socket.parts[2], "--pid"]
    command = [*inside, sys.executable, "-m", "colocate.cli.main", what, "--socket", str(socket), "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
async def test_an_api_server_that_does_not_answer_costs_nobody_anything_and_a_silent_node_is_left_clean(
    world: World, real_node: RealNode, plane: ControlPlane, archive: Path, tmp_path: Path
) -> None:
    port, tier = KernelPort(), joined(real_node.cgroup, "kubepods/batch")
    main = SHARES[port.layout.version][0]
    async with governed(world, real_node, plane, archive, tmp_path / "overlay") as installed:
        uid = await starts(world, real_node, "batch", **BATCH)
        (first,) = processes_below(port, main, joined(tier, f"pod{uid}"))
        before = told_by_agent("status")["ticks"]
        os.kill(plane.pid("kube-apiserver"), signal.SIGSTOP)  # worse than one that is gone: connections hang
        try:
            began = time.monotonic()
            await asyncio.sleep(AWAY_SECONDS / 2)
            os.kill(first, signal.SIGKILL)  # kubelet starts it again by itself
            await asyncio.sleep(AWAY_SECONDS / 2)
            again = processes_below(port, main, joined(tier, f"pod{uid}"))
            status, away = told_by_agent("status"), time.monotonic() - began
        finally:
            os.kill(plane.pid("kube-apiserver"), signal.SIGCONT)
        assert again
        assert first not in again, "the runtime asked the agent, who placed it as before"
        assert status["ticks"] - before > 0.8 * away, "it looks every second all the same"
        await until_offered_memory(world)
        assert (await world.pods())["batch"].metadata.uid == uid
        await _is_removed_while_nobody_reaches_it(world, real_node, installed, tier, uid)


async def _is_removed_while_nobody_reaches_it(
    world: World, real_node: RealNode, installed: Installation, tier: str, uid: str
) -> None:
    """Everything is deleted, kinds and rights too; when the node is back its kubelet ends the agent in order."""
    port = KernelPort()
    real_node.silence_kubelet()
    try:
        await asyncio.to_thread(installed.remove, wait=False)
        await asyncio.sleep(5.0)
        assert told_by_agent("status")["ticks"] > 0, "nobody has told it yet"
        assert processes_below(port, SHARES[port.layout.version][0], joined(tier, f"pod{uid}"))
    finally:
        real_node.wake_kubelet()
    await world.delete(PODS, "batch", 0)

    async def nothing() -> bool:
        return not inodes_of(port, tier) and not guardians()

    await world.until(nothing, "the tier and its guardian are gone")


@pytest.mark.slow
async def test_a_node_of_250_pods_is_governed_as_any_other(
    world: World, real_node: RealNode, plane: ControlPlane, archive: Path, tmp_path: Path
) -> None:
    port, tier = KernelPort(), joined(real_node.cgroup, "kubepods/batch")
    main = SHARES[port.layout.version][0]
    async with governed(world, real_node, plane, archive, tmp_path / "overlay"):
        spec = {**on(NAME), "nodeName": NAME, "schedulerName": "default-scheduler"}
        for i in range(SERVICES):
            await world.pod(f"service-{i}", spec=spec)
        for i in range(BATCH_PODS):
            await world.pod(f"batch-{i}", spec=spec, labels=BATCH)

        async def all_run() -> bool:
            real_node.check()
            return sum(p.status.phase == "Running" for p in (await world.pods()).values()) == SERVICES + BATCH_PODS

        began = time.monotonic()
        while not await all_run():
            assert time.monotonic() - began < 600, "250 pods run"
            await asyncio.sleep(1.0)
        uids = {n: p.metadata.uid for n, p in (await world.pods()).items()}
        for name, uid in uids.items():
            inside = processes_below(port, main, joined(tier, f"pod{uid}"))
            assert bool(inside) == name.startswith("batch"), (
                name,
                processes_below(port, main, joined(real_node.cgroup, f"kubepods/besteffort/pod{uid}")),
                (await world.pods())[name].status,
            )
        status = told_by_agent("status")
        await asyncio.sleep(20.0)
        later = told_by_agent("status")
        assert later["ticks"] - status["ticks"] >= 16
        assert not later.get("problems"), later
        grace = {"gracePeriodSeconds": 0}
        await world.api.request("DELETE", path_of(PODS, world.namespace), grace, timeout_seconds=300.0)  # one by one

        async def only_the_tier() -> bool:
            return not any(processes_below(port, main, joined(tier, f"pod{uid}")) for uid in uids.values())

        await world.until(only_the_tier, "batch pods are gone", 300.0)
