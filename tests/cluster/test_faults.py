"""Crashes and a hostile network: a gang is bound whole or not at all, and no node is overcommitted."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from colocate.kube.client import LEASES, NODES, Api, path_of
from colocate.localcluster.controlplane import ControlPlane
from podgroup.api import PLAN_API, PLANS, POD_GROUPS
from tests.cluster.conftest import HIGH, LOW, World, leader
from tests.cluster.proxy import BEHIND_SECONDS, Fault, Hold, Proxy, Request, healthy

LEASE_SECONDS = 1


@contextlib.contextmanager
def process(world: World, kubeconfig: Path, log: Path, *options: str) -> Any:
    """`colocate controller` as its own process."""
    command = [sys.executable, "-m", "colocate.cli.main", "controller", "--kubeconfig", str(kubeconfig)]
    command += ["--lease-namespace", world.namespace, "--lease-duration", f"{LEASE_SECONDS}s", *options]
    with log.open("ab") as out:
        running = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        yield running
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(running.pid, signal.SIGCONT)
        running.kill()
        running.wait()


async def two_gangs_and_a_preemption(world: World) -> None:
    """Four slots; `low` fills them and is elastic, `high` needs two, `big` never fits."""
    for i in range(4):
        await world.node(f"n{i}", cpu=1, memory="1Gi")
    for name, count, least, priority in (("low", 4, 2, LOW), ("high", 2, 2, HIGH), ("big", 5, 5, LOW)):
        await world.group(name, least)
        for i in range(count):
            await world.pod(f"{name}-{i}", name, cpu=1, spec={"priorityClassName": priority})


async def test_a_pod_that_a_webhook_keeps_from_being_changed_does_not_stop_a_new_leader(
    world: World, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("podgroup.controller.writes.FENCE_SECONDS", 2.0)

    async def webhook_is_down(request: Request) -> str:
        return "500" if request.method == "PATCH" and request.path.endswith("/pods/stuck") else "pass"

    former = {"holderIdentity": "former", "leaseDurationSeconds": 1, "leaseTransitions": 3}
    former |= {"acquireTime": "2026-01-01T00:00:00.000000Z", "renewTime": "2026-01-01T00:00:00.000000Z"}
    await world.create(LEASES, {"metadata": {"name": "colocate-controller"}, "spec": former})
    await world.node("n", cpu=2, memory="1Gi")
    await world.pod("stuck", cpu=1, spec={"schedulingGates": [{"name": "webhook"}]})
    await world.pod("other", cpu=1)
    proxy.fault = webhook_is_down
    async with Api.connect(str(proxy.kubeconfig())) as api:
        beside = World(api, world.namespace)
        async with leader(beside, lease_seconds=4.0):
            await world.until_bound("other")


async def test_a_plan_that_was_written_after_its_time_is_taken_back(world: World) -> None:
    """A request of a former leader, that the API server carried out long after it was sent."""
    await world.node("n", cpu=1, memory="1Gi")
    async with leader(world):
        await world.pod("other", cpu=1)
        await world.until_bound("other")
        await world.group("pg", 1)
        await world.pod("late", "pg", cpu=1)
        await world.told("pg", "Unschedulable")
        plan, uid = await world.plan("pg"), (await world.pods())["late"].metadata.uid
        members = [{"name": "late", "uid": uid, "node": "n"}]
        spec = {"podGroup": "pg", "planId": "late", "epoch": -1, "minMember": 1, "timeoutSeconds": 60}
        meta = {"name": "pg", "namespace": world.namespace, "resourceVersion": plan.metadata.resource_version}
        body = {"apiVersion": PLAN_API, "kind": "GangPlan", "metadata": meta, "spec": {**spec, "members": members}}
        body["status"] = {"phase": "Binding", "reason": "Binding"}
        await world.api.request("PUT", path_of(PLANS, world.namespace, "pg"), body)
        await world.told("pg", "BackingOff", "written after its time")
        await world.only_bound("other")


async def test_a_token_that_has_run_out_is_asked_for_anew(plane: ControlPlane, tmp_path: Path) -> None:
    """Of an exec plugin, as the clouds have them: its tokens live for minutes."""
    config = yaml.safe_load(plane.kubeconfig().read_text())
    good, count = config["users"][0]["user"]["token"], tmp_path / "count"
    plugin = tmp_path / "plugin"
    plugin.write_text(
        f"""#!/bin/sh
token=expired; [ -e {count} ] && token={good}; touch {count}
echo '{{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential","status":{{"token":"'$token'"}}}}'
"""
    )
    plugin.chmod(0o755)
    run = {"apiVersion": "client.authentication.k8s.io/v1", "command": str(plugin), "interactiveMode": "Never"}
    config["users"][0]["user"] = {"exec": run}
    file = tmp_path / "exec.kubeconfig"
    file.write_text(yaml.safe_dump(config))
    async with Api.connect(str(file)) as api:
        assert b"NodeList" in await api.request("GET", NODES)


async def settled(world: World) -> None:
    """`high` is bound and nobody else in part; no node has two."""

    async def whole() -> bool:
        bound = await world.bound()
        assert len(set(bound.values())) == len(bound), "a node holds two pods of its only CPU"
        assert not any(name.startswith("big") for name in bound)
        return {"high-0", "high-1"} <= bound.keys() and sum(name.startswith("low") for name in bound) in (0, 2)

    await world.until(whole, "high is bound, and low whole or not at all")
    await asyncio.sleep(1.0)  # the successor may only now be binding what the first one had planned
    await world.until(whole, "and stays so")


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("index", range(0, 24, 2))
async def test_a_controller_killed_at_any_write_is_succeeded(
    world: World, proxy: Proxy, tmp_path: Path, index: int, when: str
) -> None:
    """SIGKILL as the server is about to see write `index`, or when it has acted and before it has answered."""
    killed = asyncio.Event()
    await two_gangs_and_a_preemption(world)
    config, log = proxy.kubeconfig(), tmp_path / "log"
    with process(world, config, log) as first:

        async def kill(request: Request) -> str:
            if request.number != index or killed.is_set():
                return "drop" if killed.is_set() and first.poll() is None else "pass"
            killed.set()
            first.kill()
            first.wait()
            return "drop" if when == "before" else "act"

        proxy.fault = kill
        await asyncio.wait_for(killed.wait(), 30)  # there are more writes than that
        proxy.fault = healthy
        first.kill()
        first.wait()
        with process(world, config, log):
            await settled(world)


FAULTS = {
    "every third write acts and is not answered": lambda r: "act" if r.number >= 0 and r.number % 3 == 2 else "pass",
    "every third write is lost": lambda r: "drop" if r.number >= 0 and r.number % 3 == 2 else "pass",
    "every bind arrives twice": lambda r: "twice" if r.path.endswith("/binding") else "pass",
    "every fifth read breaks": lambda r: "drop" if r.number < 0 and r.reads % 5 == 4 else "pass",
    "every third write is to come again later": lambda r: "429" if r.number >= 0 and r.number % 3 == 2 else "pass",
    "every fifth read is to come again later": lambda r: "429" if r.number < 0 and r.reads % 5 == 4 else "pass",
    "every event of a watch comes twice": lambda r: "echo" if "watch=true" in r.query else "pass",
}


def fault_of(law: Any) -> Fault:
    async def fault(request: Request) -> str:
        await asyncio.sleep(0.02 * (request.number % 4))  # answers overtake each other
        return str(law(request))

    return fault


@pytest.mark.parametrize("law", FAULTS.values(), ids=FAULTS.keys())
async def test_a_hostile_network(world: World, proxy: Proxy, law: Any) -> None:
    await two_gangs_and_a_preemption(world)
    proxy.fault = fault_of(law)
    async with Api.connect(str(proxy.kubeconfig())) as through:
        async with leader(World(through, world.namespace)):
            await settled(world)
        proxy.fault = healthy


async def test_a_watch_that_goes_back_and_catches_up_undoes_nothing(world: World, proxy: Proxy) -> None:
    """Another API server answers, and is behind: for a while pods are unbound again, and plans and groups are young."""
    await two_gangs_and_a_preemption(world)

    async def back(request: Request) -> str:
        return "back" if "watch=true" in request.query and "sendInitialEvents" not in request.query else "pass"

    async with Api.connect(str(proxy.kubeconfig())) as through, leader(World(through, world.namespace)):
        await settled(world)
        before = {name: (p.metadata.uid, p.spec.node_name) for name, p in (await world.pods()).items()}
        proxy.fault = back
        for _ in range(2):
            proxy.cut_streams()
            await asyncio.sleep(BEHIND_SECONDS + 2.0)
        proxy.fault = healthy
        await settled(world)
        after = {name: (p.metadata.uid, p.spec.node_name) for name, p in (await world.pods()).items()}
        assert after == before, "who was there is there, on the same nodes"
        await world.node("n-new", cpu=8, memory="1Gi")

        async def goes_on() -> bool:
            return {f"big-{i}" for i in range(5)} <= (await world.bound()).keys()

        await world.until(goes_on, "and it is not blind afterwards")


@pytest.mark.parametrize("again", [False, True], ids=["for good", "and made anew"])
async def test_a_group_that_is_deleted_in_the_middle_of_its_binds(world: World, proxy: Proxy, again: bool) -> None:
    """The last of three binds is on the wire when the group goes: what was planned whole is started whole."""
    for i in range(3):
        await world.node(f"n{i}", cpu=1, memory="1Gi")
    hold = proxy.fault = Hold("/p2/binding")
    async with Api.connect(str(proxy.kubeconfig())) as through, leader(World(through, world.namespace)):
        await world.group("pg", 3)
        for i in range(3):
            await world.pod(f"p{i}", "pg", cpu=1)
        await asyncio.wait_for(hold.held.wait(), 20)
        await world.delete(POD_GROUPS, "pg")
        if again:
            await world.group("pg", 3)
        await asyncio.sleep(1.0)
        hold.release.set()
        proxy.fault = healthy

        await world.until_bound("p0", "p1", "p2")
        if again:

            async def counted() -> bool:
                return (await world.status("pg")).status.running == 3

            await world.until(counted, "the new group has what the old one started")
        await world.only_bound("p0", "p1", "p2")


async def test_a_leader_that_was_asleep_binds_nothing_after_its_time(
    world: World, proxy: Proxy, tmp_path: Path
) -> None:
    """SIGSTOP with binds on the wire, a second leader, SIGCONT: what the first one sent late must be refused."""
    for i in range(3):
        await world.node(f"n{i}", cpu=1, memory="1Gi")
    hold = proxy.fault = Hold("/binding")
    log = tmp_path / "log"
    with process(world, proxy.kubeconfig(), log) as sleeper:
        await world.group("pg", 3)
        for i in range(3):
            await world.pod(f"p{i}", "pg", cpu=1)
        await asyncio.wait_for(hold.held.wait(), 20)
        os.kill(sleeper.pid, signal.SIGSTOP)
        async with leader(world):

            async def fenced() -> bool:
                return all("colocate.io/epoch" in p.metadata.annotations for p in (await world.pods()).values())

            await world.until(fenced, "the new leader has stamped its epoch")
            await world.until_bound("p0", "p1", "p2")
            hold.release.set()
            os.kill(sleeper.pid, signal.SIGCONT)

            async def late() -> list[int]:
                return [status for request, status in proxy.answers if request.path.endswith("/binding")]

            await world.until(late, "the late binds have reached the server")
            await asyncio.sleep(1.5)
            await world.only_bound("p0", "p1", "p2")
            assert set(await late()) == {409}


async def test_a_lease_that_somebody_deleted_does_not_turn_back_the_epoch(world: World) -> None:
    """A new lease counts from 0; what was stamped with an epoch could then not be told from what is stamped anew."""
    await world.node("n", cpu=4, memory="1Gi")
    epochs = []
    for name in ("a", "b", "c"):
        async with leader(world):
            await world.group(name, 1)
            await world.pod(f"{name}-0", name, cpu=1)

            async def there(name: str = name) -> bool:
                return f"{name}-0" in await world.bound()

            await world.until(there, "it is bound")
            epochs.append((await world.plan(name)).spec.epoch)
        await world.api.request("DELETE", path_of(LEASES, world.namespace, "colocate-controller"))
    assert epochs == sorted(set(epochs))


async def test_the_api_server_is_away_for_a_while(world: World, proxy: Proxy) -> None:
    await world.node("n", cpu=4, memory="1Gi")

    async def away(_: Request) -> str:
        return "drop"

    async with (
        Api.connect(str(proxy.kubeconfig())) as through,
        leader(World(through, world.namespace), lease_seconds=30.0),
    ):
        await world.group("a", 1)
        await world.pod("a-0", "a", cpu=1)
        await world.until_bound("a-0")
        proxy.fault = away
        await world.group("b", 2)
        for i in range(2):
            await world.pod(f"b-{i}", "b", cpu=1)
        await asyncio.sleep(3)
        assert set(await world.bound()) == {"a-0"}
        proxy.fault = healthy
        await world.until_bound("a-0", "b-0", "b-1")
