"""What a running controller decided, decided again elsewhere."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from pathlib import Path

from colocate.localcluster.controlplane import ControlPlane
from tests.cluster.conftest import LOW, World
from tests.cluster.test_faults import process


def typed(*arguments: str) -> str:
    command = [sys.executable, "-m", "colocate.cli.main", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return f"{ran.stdout}{ran.stderr}rc {ran.returncode}"


async def test_the_snapshot_of_a_controller_is_decided_as_it_decided(
    world: World, plane: ControlPlane, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for i in range(2):
        await world.node(f"n{i}", cpu=2, memory="1Gi")
    file, url = str(tmp_path / "cluster.json"), f"http://127.0.0.1:{port}"
    with process(world, plane.kubeconfig(), tmp_path / "log", "--http", f"127.0.0.1:{port}"):
        await world.group("runs", 2)
        for i in range(2):
            await world.pod(f"runs-{i}", "runs", cpu=2, spec={"priorityClassName": LOW})
        await world.until_bound("runs-0", "runs-1")
        await world.group("waits", 3)
        for i in range(3):
            await world.pod(f"waits-{i}", "waits", cpu=2, spec={"priorityClassName": LOW})
        await world.told("waits", "Unschedulable")
        said = await asyncio.to_thread(typed, "snapshot", "--from", url, "-f", file)
        assert said.endswith("rc 0"), said
    said = await asyncio.to_thread(typed, "replay", file)
    assert "decided as recorded" in said
    assert "waits  Wait" in said
    said = await asyncio.to_thread(typed, "snapshot", "--from", url, "-f", file)
    assert "does not answer" in said
    assert said.endswith("rc 2")
