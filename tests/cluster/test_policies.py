"""Policies as objects of the API server: put in force by agents, and what came of them in their status."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from colocate.actuate.journal import Journal
from colocate.agent.loop import Agent
from colocate.agent.node_power import PowerWatch
from colocate.agent.policies import Policies, merged
from colocate.agent.publisher import Publisher
from colocate.cluster import policy_status
from colocate.cluster.api import (
    POLICIES,
    ColocationPolicyObject,
    NodeColocation,
    NodeColocationStatus,
    PolicyInForce,
)
from colocate.cluster.policy_status import status_of
from colocate.kernelmodel import ModelKernel
from colocate.kube.client import MERGE, path_of
from colocate.localcluster.controlplane import MANIFESTS, ControlPlane
from colocate.model import kernels
from colocate.objects import ObjectMeta
from colocate.policy.file import load_policy
from colocate.units import time_text
from tests.cluster.conftest import World
from tests.cluster.test_kubectl import Kubectl, kubectl
from tests.cluster.test_publication import publishing

__all__ = ["kubectl"]
FILE = """
apiVersion: colocate.io/v1alpha1
kind: ColocationPolicy
metadata: {name: default}
spec: {tick: 1s, cpu: {holdDown: 5s}, memory: {poll: 200ms}}
"""
OBJECT = {"apiVersion": "colocate.io/v1alpha1", "kind": "ColocationPolicy", "metadata": {"name": "default"}}


async def test_a_policy_is_in_force_as_the_cluster_has_it_and_says_what_came_of_it(
    world: World,
    kinds: None,
    plane: ControlPlane,
    kubectl: Kubectl,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """An agent on the kernel model, everything above it real."""
    monkeypatch.setenv("KUBECONFIG", str(plane.kubeconfig()))
    monkeypatch.setattr(policy_status, "EVERY_SECONDS", 0.2)
    await world.node("n0", cpu=8, memory="8Gi")
    file, kernel = tmp_path / "policy.yaml", ModelKernel(version=2)
    file.write_text(FILE)
    agent = Agent(kernel, load_policy(file), kernels.load(jit=False), Journal(tmp_path, "boot"), clock=kernel)
    policies = Policies(agent, file)
    publisher = Publisher(agent, policies, "n0", PowerWatch(lambda: agent.policy.spec.power, None), shadow=False)
    agent.open()
    path = path_of(POLICIES, name="default")

    async def change(spec: dict[str, Any]) -> None:
        await world.api.request("PATCH", path, {"spec": spec}, content_type=MERGE)

    async def until(holds: float, ready: str, problem: str = "") -> ColocationPolicyObject:
        async def so() -> Any:
            await agent.tick()
            await agent.writer.settle()
            kernel.advance(1.0)
            found = await world.api.get(ColocationPolicyObject, path)
            said = found.status
            right = said.ready == ready and problem in said.problem and bool(said.problem) == bool(problem)
            right = right and said.observed_generation == found.metadata.generation
            return found if right and agent.policy.spec.cpu.hold_down == holds else None

        found: ColocationPolicyObject = await world.until(so, f"hold down {holds}, {ready} ready, {problem!r}")
        return found

    task = asyncio.ensure_future(publisher.run())
    try:
        async with publishing(world.api):
            await world.api.request("POST", POLICIES, {**OBJECT, "spec": {"cpu": {"holdDown": "9s"}}})
            first = await until(9.0, "1/1")
            assert (agent.policy.spec.tick, agent.policy.spec.memory.poll) == (1.0, 0.2), "of the file, all the same"
            assert first.status.nodes == 1
            await change({"cpu": {"holdDown": "soon"}})
            await until(9.0, "0/1", "n0: $.spec.cpu.holdDown: ")
            assert "soon" in agent.observer.extra_problems["policy"]
            await change({"cpu": {"holdDown": "7s"}, "memory": {"poll": "300ms"}})
            await until(9.0, "0/1", "$.spec.memory.poll cannot change")
            await change({"memory": None})
            await until(7.0, "1/1")
            assert "policy" not in agent.observer.extra_problems
            shown = await asyncio.to_thread(kubectl, "get", "colocationpolicies")
            head, row = shown.splitlines()
            assert head.split() == ["NAME", "READY", "BATCH-CORES", "PRESSURE", "LAST-ACTION", "PROBLEM", "AGE"]
            assert row.split()[:2] == ["default", "1/1"]
            await world.api.request("DELETE", path, {})

            async def the_file_s() -> bool:
                await agent.tick()  # where a policy comes into force
                return agent.policy.spec.cpu.hold_down == 5.0

            await world.until(the_file_s, "without the object the file holds again")
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await agent.close()


async def test_a_field_that_there_is_not_is_refused_when_it_is_applied(
    world: World,
    kinds: None,
    kubectl: Kubectl,
    tmp_path: Path,
) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(FILE.replace("holdDown", "holdUp"))
    await asyncio.to_thread(kubectl, "create", "-f", str(file), "--dry-run=server", code=1)
    file.write_text(FILE)
    taken = await asyncio.to_thread(kubectl, "create", "-f", str(file), "--dry-run=server")
    assert "colocationpolicy.colocate.io/default created" in taken


def said(node: str, *, pressure: str = "NothingSuffers", reason: str = "Promised", **policy: Any) -> NodeColocation:
    in_force = PolicyInForce(**{"name": "p", "generation": 3, **policy})
    status = NodeColocationStatus(
        promised={"kubernetes.io/batch-cpu": "1500"},
        reason=reason,
        pressure=pressure,
        last_action=f"thawed on {node}",
        policy=in_force,
        observed=time_text(time.time()),
    )
    return NodeColocation(metadata=ObjectMeta(name=node), status=status)


@pytest.mark.parametrize(
    ("spoken", "expected"),
    [
        pytest.param([], ("0/0", "0.00", "", ""), id="nobody"),
        pytest.param([said("a"), said("b")], ("2/2", "3.00", "NothingSuffers", ""), id="two that have it"),
        pytest.param([said("a"), said("b", generation=2)], ("1/2", "3.00", "NothingSuffers", ""), id="one is behind"),
        pytest.param([said("a", name="q")], ("0/0", "0.00", "", ""), id="another policy's"),
        pytest.param([said("a", reason="Stopped")], ("0/0", "0.00", "", ""), id="stopped"),
        pytest.param(
            [said("a", problem="$.spec.tick: no")],
            ("0/1", "1.50", "NothingSuffers", "a: $.spec.tick: no"),
            id="one refuses it",
        ),
        pytest.param(
            [
                said("a", pressure="CausedByBatch"),
                said("b", pressure="CausedByBatch"),
                said("c", pressure="BatchAsked"),
            ],
            ("3/3", "4.50", "CausedByBatch on 2", ""),
            id="what most suffer from",
        ),
    ],
)
def test_a_status_is_the_sum_of_what_the_agents_say(spoken: list[NodeColocation], expected: tuple[str, ...]) -> None:
    found = status_of(ColocationPolicyObject(metadata=ObjectMeta(name="p", generation=3)), spoken)
    assert (found.ready, found.batch_cores, found.pressure, found.problem) == expected


def test_mappings_are_merged_and_all_else_is_replaced() -> None:
    below = {"a": {"x": 1, "y": 2}, "list": [1, 2], "kept": True}
    assert merged(below, {"a": {"y": 3}, "list": [9]}) == {"a": {"x": 1, "y": 3}, "list": [9], "kept": True}


def test_the_base_installs_the_kind() -> None:
    assert "colocationpolicies.yaml" in (MANIFESTS / "crd" / "kustomization.yaml").read_text()
