"""S2.3 with a real kubelet and containerd: a pod's GPU is capped before its first process, by what it asks for.

The card is simulated; its driver is asked by the agent as a real one is. Watts are offered by the node's status, so
that kubelet's own admission counts them too.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from colocate.cluster.api import BATCH, POWER, QOS
from colocate.fakecard.shared import LIBRARY, attach
from colocate.kube.client import MERGE, NODES, PODS, path_of
from colocate.localcluster.controlplane import ControlPlane
from colocate.localcluster.realnode import IMAGE, NAME, RealNode
from colocate.objects import Node
from podgroup.api import POWER_BUDGETS
from tests.cluster.conftest import World, leader
from tests.cluster.test_kubelet import until_ready
from tests.cluster.test_nri import ended, until_runs
from tests.cluster.test_publication import publishing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("kinds"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="the fake NVML needs a C compiler (cc)"),
]
BATCH_LABEL = {QOS: BATCH}
"""A pod of BestEffort is no workload of its own, and no budget lowers it."""
POLICY = """
apiVersion: colocate.io/v1alpha1
kind: ColocationPolicy
metadata: {{name: test}}
spec:
  nodeRoot: {root}
  tick: 250ms
  calibrate: false
  http: {{enabled: false}}
  gpu: {{nvmlLibrary: {library}}}
  power: {{offer: 500}}
"""


class FakeCards(NamedTuple):
    """Two cards, and their limits in force."""

    folder: Path
    state: Any

    @property
    def uuids(self) -> list[str]:
        return [self.state.devices[i].uuid.decode() for i in range(2)]

    @property
    def watts(self) -> list[int]:
        return [self.state.devices[i].power_enforced_mw // 1000 for i in range(2)]


@pytest.fixture
def cards(tmp_path: Path) -> Iterator[FakeCards]:
    folder = tmp_path / "cards"
    folder.mkdir()
    command = [sys.executable, "-P", "-m", "colocate.fakecard.daemon", str(folder), "--cards", "2"]
    daemon = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert daemon.stdout is not None
    assert daemon.stdout.readline() == "ready\n"
    yield FakeCards(folder, attach(folder))
    daemon.communicate(timeout=30)  # its standard input closes


class Running(NamedTuple):
    """An agent that governs the real node, and what it says."""

    process: subprocess.Popen[bytes]
    log: Path


@pytest.fixture
async def agent(
    world: World, real_node: RealNode, plane: ControlPlane, cards: FakeCards, tmp_path: Path
) -> AsyncIterator[Running]:
    await until_ready(world, real_node)
    log, policy = tmp_path / "agent.log", tmp_path / "policy.yaml"
    policy.write_text(POLICY.format(root=real_node.cgroup, library=cards.folder / LIBRARY))
    places = {"COLOCATE_STATE_DIR": str(tmp_path / "state"), "COLOCATE_RUNTIME_DIR": str(tmp_path / "run")}
    environment = {**os.environ, **places, "COLOCATE_JIT": "off", "KUBECONFIG": str(plane.kubeconfig())}
    command = [sys.executable, "-m", "colocate.cli.main", "agent", "--config", str(policy)]

    async def offers() -> bool:
        assert process.poll() is None, log.read_text()
        offered = (await world.api.get(Node, path_of(NODES, name=NAME))).status.allocatable.get(POWER)
        return offered == "500" and "runtime_connected" in log.read_text()

    async with publishing(world.api, world.namespace):
        with ended([*command, "--nri", real_node.nri_socket, "--node", NAME], environment, log) as process:
            await world.until(offers, "the node offers its watts, and the runtime asks the agent")
            yield Running(process, log)
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                assert await asyncio.to_thread(process.wait, 30) == 0, log.read_text()


async def pod(
    world: World, name: str, uuid: str, watts: int, group: str = "", labels: dict[str, str] | None = None
) -> None:
    """A pod that a device plugin has given this card, which asks for so many watts."""
    container = {
        "name": "c",
        "image": IMAGE,
        "imagePullPolicy": "Never",
        "env": [{"name": "NVIDIA_VISIBLE_DEVICES", "value": uuid}],
        "resources": {"requests": {POWER: str(watts)}, "limits": {POWER: str(watts)}},
    }
    hostname = {"kubernetes.io/hostname": NAME}
    where = {"hostNetwork": True, "nodeSelector": hostname, "containers": [container]}
    if not group:
        where |= {"nodeName": NAME, "schedulerName": "default-scheduler"}
    await world.pod(name, group, labels=labels, spec=where)


async def capped(world: World, cards: FakeCards, *watts: int) -> None:
    async def so() -> bool:
        return cards.watts == list(watts)

    await world.until(so, f"the cards may draw {watts}")


async def test_s2_3_a_gang_under_caps_starts_whole_and_its_limits_go_with_it(
    world: World, real_node: RealNode, agent: Running, cards: FakeCards
) -> None:
    async with leader(world):
        await world.group("train", 2)
        for i, uuid in enumerate(cards.uuids):
            await pod(world, f"train-{i}", uuid, 150 + 50 * i, "train")
        for i in range(2):
            await until_runs(world, real_node, f"train-{i}")
        assert cards.watts == [150, 200], "before their first process"
        await world.group("more", 1)
        await pod(world, "more-0", cards.uuids[0], 200, "more")
        await world.told("more", "Unschedulable", "blocked by colocate.io/power")
        await world.delete(PODS, "train-1", 0)
        await until_runs(world, real_node, "more-0")
        await capped(world, cards, 150, 300)
        await world.delete(PODS, "train-0", 0)
        await capped(world, cards, 200, 300)


async def test_s2_3_a_killed_agent_leaves_the_cap_and_the_next_one_puts_it_back(
    world: World, real_node: RealNode, agent: Running, cards: FakeCards
) -> None:
    await pod(world, "train", cards.uuids[0], 150)
    await until_runs(world, real_node, "train")
    assert cards.watts == [150, 300]
    agent.process.kill()
    await asyncio.to_thread(agent.process.wait, 30)
    await asyncio.sleep(1.5)
    assert cards.watts == [150, 300]
    await world.delete(PODS, "train", 0)
    await capped(world, cards, 300, 300)


async def test_s2_3_a_pod_that_cannot_be_capped_says_why_and_is_tried_again(
    world: World, real_node: RealNode, agent: Running, cards: FakeCards
) -> None:
    (cards.folder / "faults").write_text("nvmlDeviceSetPowerManagementLimit 4\n")
    await pod(world, "train", cards.uuids[0], 150)

    async def told() -> bool:
        answer = await world.api.request("GET", path_of("/api/v1/events", world.namespace))
        return b"asks for 150 W: set_power_limit: NVML_ERROR_NO_PERMISSION" in answer

    await world.until(told, "an Event says why")
    assert cards.watts == [300, 300]
    (cards.folder / "faults").write_text("")
    await until_runs(world, real_node, "train")
    assert cards.watts == [150, 300]


async def test_s2_8_a_rack_s_budget_that_is_cut_lowers_the_limits_of_who_runs(
    world: World, real_node: RealNode, agent: Running, cards: FakeCards
) -> None:
    await world.power_budget("rack", 500, enforce=True)
    async with leader(world):
        await world.group("train", 2)
        for i, uuid in enumerate(cards.uuids):
            await pod(world, f"train-{i}", uuid, 200, "train", BATCH_LABEL)
        for i in range(2):
            await until_runs(world, real_node, f"train-{i}")
        assert cards.watts == [200, 200]
        path = path_of(POWER_BUDGETS, name="rack")
        await world.api.request("PATCH", path, {"spec": {"watts": 300}}, content_type=MERGE)
        await capped(world, cards, 150, 150)
        await world.api.request("PATCH", path, {"spec": {"watts": 360}}, content_type=MERGE)
        await capped(world, cards, 180, 180)
    agent.process.send_signal(signal.SIGSTOP)  # nobody leads and nobody answers: what was set stays
    await asyncio.sleep(1.0)
    assert cards.watts == [180, 180]
    agent.process.send_signal(signal.SIGCONT)
    async with leader(world):
        await world.delete(POWER_BUDGETS, "rack")
        await capped(world, cards, 200, 200)
