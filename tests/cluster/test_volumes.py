"""Claims that are bound once their pods have nodes: a gang gets all of its volumes before anybody is bound.

The volume controller of a real kube-controller-manager binds and makes them; its host-path provisioner makes folders
below /tmp/hostpath_pv and removes them again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from colocate.kube.client import CLAIMS, MERGE, PODS, STORAGE_CLASSES, VOLUMES, Api, path_of
from colocate.objects import Claim, PersistentVolume
from podgroup.controller.loop import Controller
from podgroup.state.volumes import is_bound
from tests.cluster.conftest import QUIET, World, leader

LOCAL, MADE, NOBODY = "test-local", "test-made", "test-nobody"
HOST = "kubernetes.io/hostname"
PROVISIONERS = {LOCAL: "kubernetes.io/no-provisioner", MADE: "kubernetes.io/host-path", NOBODY: "nobody.example.com"}
SELECTED = "volume.kubernetes.io/selected-node"


class Stored(World):
    """A world with volumes."""

    async def volume(self, name: str, node: str) -> None:
        only = {"matchExpressions": [{"key": HOST, "operator": "In", "values": [node]}]}
        spec = {
            "capacity": {"storage": "1Gi"},
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": LOCAL,
            "local": {"path": "/x"},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [only]}},
        }
        meta = {"name": f"{self.namespace}-{name}"}
        body = {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": meta, "spec": spec}
        await self.api.request("POST", VOLUMES, body)

        async def free() -> bool:
            return (await self.its_volume(name)).status.phase in ("Available", "Bound")  # or it is taken already

        await self.until(free, f"volume {name} is there")

    async def its_volume(self, name: str) -> PersistentVolume:
        return await self.api.get(PersistentVolume, path_of(VOLUMES, "", f"{self.namespace}-{name}"))

    async def claim(self, name: str, made_by: str) -> None:
        spec = {
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": made_by,
            "resources": {"requests": {"storage": "1Gi"}},
        }
        body = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name}, "spec": spec}
        await self.create(CLAIMS, body)

    async def its_claim(self, name: str) -> Claim:
        return await self.api.get(Claim, path_of(CLAIMS, self.namespace, name))

    async def member(self, name: str, made_by: str, group: str = "", claim: str = "", **more: Any) -> None:
        """A pod with a claim of its own, or with this one."""
        if not claim:
            await self.claim(f"data-{name}", made_by)
        volume = {"name": "data", "persistentVolumeClaim": {"claimName": claim or f"data-{name}"}}
        await self.pod(name, group, cpu=1, spec={"volumes": [volume]}, **more)

    async def selected(self, name: str) -> str:
        return (await self.its_claim(name)).metadata.annotations.get(SELECTED, "")

    async def refuse(self, name: str) -> None:
        """What a provisioner does that cannot make a volume there."""
        path, body = path_of(CLAIMS, self.namespace, name), {"metadata": {"annotations": {SELECTED: None}}}
        await self.api.request("PATCH", path, body, content_type=MERGE)

    async def without_volumes(self) -> None:
        """Claims and volumes go, and the folders of those that were made."""
        await self.api.request("DELETE", path_of(CLAIMS, self.namespace), {})

        async def none_left() -> bool:
            left = await self.api.all(PersistentVolume, VOLUMES)
            for one in left:
                if one.metadata.name.startswith(self.namespace):
                    await self.api.request("DELETE", path_of(VOLUMES, "", one.metadata.name), {})
            return not left

        await self.until(none_left, "the test's volumes are gone")


async def need_class(api: Api, name: str) -> None:
    """A StorageClass, if it is not there yet."""
    body = {"apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": {"name": name}}
    body |= {"provisioner": PROVISIONERS[name], "volumeBindingMode": "WaitForFirstConsumer"}
    if all(c["metadata"]["name"] != name for c in json.loads(await api.request("GET", STORAGE_CLASSES))["items"]):
        await api.request("POST", STORAGE_CLASSES, body)


@pytest.fixture
async def stored(world: World) -> AsyncIterator[Stored]:
    for name in PROVISIONERS:
        await need_class(world.api, name)
    made = Stored(world.api, world.namespace)
    made.owner = world.owner
    yield made
    await made.clear()
    await made.without_volumes()
    with contextlib.suppress(OSError):
        Path("/tmp/hostpath_pv").rmdir()


async def watched(world: Stored, *claims: str) -> None:
    """As long as it runs: none of those with these claims is bound before all of these are."""
    while True:
        # First who is bound: what is bound then had its volumes before.
        bound = {p for p in await world.bound() if f"data-{p}" in claims}
        for claim in claims if bound else ():
            assert is_bound(await world.its_claim(claim)), f"{bound} before {claim} was"
        await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def nobody_early(world: Stored, *claims: str) -> AsyncIterator[None]:
    task = asyncio.ensure_future(watched(world, *claims))
    try:
        yield
    finally:
        failed = task.done()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert not failed


async def test_each_member_goes_where_a_volume_for_its_claim_is(stored: Stored, limited: Api) -> None:
    for name in ("a", "b", "c"):
        await stored.node(name, cpu=8)
    await stored.volume("on-a", "a")
    await stored.volume("on-c", "c")
    await stored.group("pg", 2)
    for i in range(2):
        await stored.member(f"p{i}", LOCAL, "pg")
    async with nobody_early(stored, "data-p0", "data-p1"), leader(World(limited, "colocate-system")):
        bound = await stored.until_bound("p0", "p1")
    assert set(bound.values()) == {"a", "c"}
    for i in range(2):
        claim = await stored.its_claim(f"data-p{i}")
        assert claim.spec.volume_name == f"{stored.namespace}-on-{bound[f'p{i}']}"
    assert (await stored.plan("pg")).status.phase in ("Confirming", "Running")


async def test_a_gang_waits_without_taking_any_volume_until_there_is_one_for_each(stored: Stored) -> None:
    for name in ("a", "b", "c"):
        await stored.node(name, cpu=8)
    await stored.volume("on-a", "a")
    await stored.volume("on-b", "b")
    await stored.group("pg", 3)
    for i in range(3):
        await stored.member(f"p{i}", LOCAL, "pg")
    async with leader(stored):
        text = await stored.told("pg", "Unschedulable")
        assert text.startswith("2 of 3 members fit"), text
        await asyncio.sleep(QUIET)
        assert (await stored.its_volume("on-a")).spec.claim_ref is None
        await stored.volume("on-c", "c")
        assert set((await stored.until_bound("p0", "p1", "p2")).values()) == {"a", "b", "c"}


async def test_volumes_are_made_for_all_members_before_the_first_is_bound(stored: Stored) -> None:
    await stored.node("a", cpu=2)
    await stored.node("b", cpu=2)
    await stored.group("pg", 4)
    for i in range(4):
        await stored.member(f"p{i}", MADE, "pg")
    claims = [f"data-p{i}" for i in range(4)]
    async with nobody_early(stored, *claims), leader(stored):
        bound = await stored.until_bound("p0", "p1", "p2", "p3")
    assert sorted(bound.values()) == ["a", "a", "b", "b"]
    for i in range(4):
        assert await stored.selected(f"data-p{i}") == bound[f"p{i}"]


async def test_members_that_share_a_claim_start_together(stored: Stored) -> None:
    await stored.node("a", cpu=1)
    await stored.node("b", cpu=1)
    await stored.claim("shared", MADE)
    await stored.group("pg", 2)
    for i in range(2):
        await stored.member(f"p{i}", MADE, "pg", claim="shared")
    async with leader(stored):
        assert set((await stored.until_bound("p0", "p1")).values()) == {"a", "b"}


async def two_whose_volumes_nobody_makes(stored: Stored) -> Callable[[], Awaitable[bool]]:
    """A gang of two; whether the volumes of both have been asked for."""
    await stored.node("a", cpu=2)
    await stored.group("pg", 2)
    for i in range(2):
        await stored.member(f"p{i}", NOBODY, "pg")

    async def asked() -> bool:
        return all([await stored.selected(f"data-p{i}") == "a" for i in range(2)])

    return asked


async def test_a_volume_that_cannot_be_made_takes_all_back_and_leaves_the_room_to_others(stored: Stored) -> None:
    asked = await two_whose_volumes_nobody_makes(stored)
    async with leader(stored):
        await stored.until(asked, "both volumes are asked for")
        assert (await stored.plan("pg")).status.phase == "Provisioning"
        assert "data-p" not in str(await stored.bound())
        await stored.pod("other", cpu=2)
        await asyncio.sleep(QUIET)
        assert not await stored.bound()
        await stored.refuse("data-p1")
        text = await stored.told("pg", "BackingOff")
        assert "no volume could be made for claim data-p1 on a; taken back" in text
        assert await stored.selected("data-p0") == ""
        await stored.until_bound("other")


async def test_a_successor_carries_on_where_volumes_are_being_made(stored: Stored) -> None:
    asked = await two_whose_volumes_nobody_makes(stored)
    async with leader(stored, lease_seconds=1.0):
        await stored.until(asked, "both volumes are asked for")
    plan = (await stored.plan("pg")).spec.plan_id
    async with leader(stored) as led:
        await stored.until(lambda: _leads(led), "the successor leads")
        await asyncio.sleep(QUIET)
        assert (await stored.plan("pg")).status.phase == "Provisioning"
        for i in range(2):
            await _make(stored, f"data-p{i}")
        await stored.until_bound("p0", "p1")
    assert (await stored.plan("pg")).spec.plan_id == plan


async def _leads(led: Controller) -> bool:
    return led.synced and led.alive_at is not None


async def _make(world: Stored, claim: str) -> None:
    """What a provisioner does."""
    meta = (await world.its_claim(claim)).metadata
    spec = {
        "capacity": {"storage": "1Gi"},
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": NOBODY,
        "hostPath": {"path": "/x"},
        "claimRef": {"kind": "PersistentVolumeClaim", "namespace": meta.namespace, "name": claim, "uid": meta.uid},
    }
    body = {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": f"{meta.namespace}-{claim}"}}
    await world.api.request("POST", VOLUMES, {**body, "spec": spec})


async def test_a_pod_that_is_alone_gets_its_volume_first_also_an_ephemeral_one(stored: Stored) -> None:
    await stored.node("a", cpu=4)
    await stored.member("alone", MADE)
    template = {
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": MADE,
        "resources": {"requests": {"storage": "1Gi"}},
    }
    volume = {"name": "scratch", "ephemeral": {"volumeClaimTemplate": {"spec": template}}}
    await stored.pod("fleeting", cpu=1, spec={"volumes": [volume]})
    async with nobody_early(stored, "data-alone"), leader(stored):
        await stored.until_bound("alone", "fleeting")
    assert (await stored.its_claim("fleeting-scratch")).status.phase == "Bound"


async def test_a_pod_that_is_alone_is_tried_again_when_its_volume_cannot_be_made(stored: Stored) -> None:
    await stored.node("a", cpu=1)
    await stored.member("alone", NOBODY)

    async def asked() -> bool:
        return await stored.selected("data-alone") == "a"

    async with leader(stored):
        await stored.until(asked, "the volume is asked for")
        await stored.pod("other", cpu=1)
        await asyncio.sleep(QUIET)
        await stored.refuse("data-alone")
        await stored.until_bound("other")
        began = time.monotonic()
        await stored.delete(PODS, "other", 0)
        await stored.until(asked, "the volume is asked for again")
        assert time.monotonic() - began > 1, "it rests before it is tried again"
        await _make(stored, "data-alone")
        await stored.until_bound("alone")
