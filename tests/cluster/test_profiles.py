"""Pods that become batch as they are created, by the API server's own admission policies."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from colocate.cluster.api import QOS
from colocate.cluster.profiles import PROFILE, profile, selector_of
from colocate.errors import BadInput
from colocate.kube.client import EVENTS, Api, ApiError, path_of
from colocate.localcluster.realnode import NAME, RealNode
from colocate.nri import Plugin
from tests.cluster.conftest import World
from tests.cluster.test_kubelet import on, until_ready
from tests.cluster.test_nri import Tier, until_runs


@contextlib.asynccontextmanager
async def in_place(api: Api, made: list[dict[str, Any]]) -> AsyncIterator[None]:
    """Admission policies and their bindings, as long as it lasts."""

    def where(kind: str) -> str:
        plural = f"{kind.lower()}s" if kind.endswith("Binding") else f"{kind.lower().removesuffix('y')}ies"
        return f"/apis/admissionregistration.k8s.io/v1/{plural}"

    for body in made:
        await api.request("POST", where(body["kind"]), body)
    try:
        yield
    finally:
        for body in made:
            with contextlib.suppress(ApiError):
                await api.request("DELETE", f"{where(body['kind'])}/{body['metadata']['name']}", {})


def applied(
    api: Api, name: str, pods: str, namespaces: str, percent: int = 100, *, fail_closed: bool = False
) -> contextlib.AbstractAsyncContextManager[None]:
    return in_place(api, profile(name, pods, namespaces, percent, fail_closed=fail_closed))


async def until_in_force(world: World, labels: dict[str, str]) -> None:
    """Policies come into force a moment after they are made."""
    tried = 0

    async def in_force() -> bool:
        nonlocal tried
        tried += 1
        await world.pod(f"probe-{tried}", labels=labels)
        return (await world.pods())[f"probe-{tried}"].metadata.labels.get(QOS) == "batch"

    await world.until(in_force, "the profile is in force")


async def test_chosen_pods_become_batch_and_no_others(world: World) -> None:
    chosen, mine = {"team": "ml"}, f"kubernetes.io/metadata.name in ({world.namespace}, kube-system)"
    async with applied(world.api, "ml", "team=ml,tier!=web", mine):
        await until_in_force(world, chosen)
        await world.pod("batch", labels=chosen)
        await world.pod("web", labels={**chosen, "tier": "web"})
        await world.pod("another", labels={"team": "shop"})
        await world.pod("says", labels={**chosen, QOS: "service"})
        await world.pod("said", labels=chosen, annotations={"koordinator.sh/qosClass": "LS"})
        found = await world.pods()
        assert found["batch"].metadata.labels == {**chosen, QOS: "batch"}
        assert found["batch"].metadata.annotations[PROFILE] == "ml"
        assert {found[name].metadata.labels.get(QOS) for name in ("web", "another", "said")} == {None}
        assert found["says"].metadata.labels[QOS] == "service"
        await world.pod("of-the-cluster", namespace="kube-system", labels=chosen)
        try:
            assert QOS not in (await world.pods("kube-system"))["of-the-cluster"].metadata.labels
        finally:
            await world.api.request("DELETE", "/api/v1/namespaces/kube-system/pods/of-the-cluster", {})


async def test_a_share_of_the_jobs_whose_pods_are_all_alike(world: World) -> None:
    labels, owners = {"roll": "out"}, []
    for i in range(16):
        body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": f"job-{i}"}}
        answer = await world.api.request("POST", f"/api/v1/namespaces/{world.namespace}/configmaps", body)
        uid = msgspec.json.decode(answer)["metadata"]["uid"]
        owners.append({"apiVersion": "v1", "kind": "ConfigMap", "name": f"job-{i}", "uid": uid, "controller": True})
    where = f"kubernetes.io/metadata.name={world.namespace}"
    async with applied(world.api, "half", "roll=out", where, 50), applied(world.api, "whole", "roll=probe", where):
        await until_in_force(world, {"roll": "probe"})
        for i, owner in enumerate(owners):
            for member in ("a", "b"):
                await world.pod(f"job-{i}-{member}", labels=labels, owner=owner)
        await world.pod("nobody-s", labels=labels, owned=False)
        found = await world.pods()
        for i, owner in enumerate(owners):
            batch = owner["uid"][-4:] < "8000"
            assert {QOS in found[f"job-{i}-{member}"].metadata.labels for member in ("a", "b")} == {batch}
        assert QOS not in found["nobody-s"].metadata.labels


@pytest.mark.slow
async def test_a_container_waits_for_the_agent_where_that_is_asked_for(world: World, real_node: RealNode) -> None:
    await until_ready(world, real_node)
    labels, where = {"team": "ml"}, f"kubernetes.io/metadata.name={world.namespace}"
    spec = {**on(NAME), "nodeName": NAME, "schedulerName": "default-scheduler"}

    async def refused() -> bool:
        events = await world.api.request("GET", path_of(EVENTS, world.namespace))
        said = [event["message"] for event in msgspec.json.decode(events)["items"]]
        return any("required plugin" in text and "colocate" in text for text in said)

    async with applied(world.api, "ml", "team=ml", where, fail_closed=True):
        await until_in_force(world, labels)
        await world.pod("waits", labels=labels, spec=spec)
        await world.until(refused, "the runtime refuses it while there is no agent")
        plugin = Plugin("colocate", "50", Tier(), real_node.nri_socket)
        running = asyncio.create_task(plugin.run())
        try:
            await until_runs(world, real_node, "waits")
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


@pytest.mark.parametrize(
    ("text", "expressions"),
    [
        pytest.param("a=b", [("a", "In", ["b"])], id="equal"),
        pytest.param("x.y/a==b , c!=d", [("x.y/a", "In", ["b"]), ("c", "NotIn", ["d"])], id="two of them"),
        pytest.param("e in (x, y),f notin (z)", [("e", "In", ["x", "y"]), ("f", "NotIn", ["z"])], id="sets"),
        pytest.param("a,!b", [("a", "Exists", None), ("b", "DoesNotExist", None)], id="there, and not there"),
        pytest.param("a=", [("a", "In", [""])], id="an empty value"),
    ],
)
def test_a_selector_is_read_as_kubectl_reads_it(text: str, expressions: list[Any]) -> None:
    found = selector_of(text, "--pods")["matchExpressions"]
    assert [(e["key"], e["operator"], e.get("values")) for e in found] == expressions


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param(("p", "", "", 100), "say whom you mean", id="everybody"),
        pytest.param(("P!", "a=b", "", 100), "NAME", id="no name"),
        pytest.param(("p", "a=b", "", 101), "--percent", id="more than all"),
        pytest.param(("p", "a>b", "", 5), "--pods: 'a>b' is no label selector", id="no selector"),
        pytest.param(("p", "", "a in (b c)", 5), "--namespaces: .* no label may have", id="no value"),
        pytest.param(("p", "a=b,", "", 5), "--pods: ''", id="nothing after a comma"),
    ],
)
def test_a_wrong_profile_names_the_option_and_the_mend(arguments: tuple[str, str, str, int], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        profile(*arguments)
