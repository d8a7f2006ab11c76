"""Which nodes a pod could go to: ours beside kube-scheduler's, for random clusters and pods over all filters.

kube-scheduler is asked through an extender: what its filters leave is sent to it, and it says no to all, so that
nothing is ever bound and every pod is asked about the cluster as it is. A counter-example is shrunk by Hypothesis, with
the real scheduler in the loop.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from colocate.kube.client import (
    ATTACHMENTS,
    CLAIMS,
    CSI_DRIVERS,
    CSI_NODES,
    MERGE,
    NAMESPACES,
    NODES,
    PODS,
    STORAGE_CAPACITIES,
    STORAGE_CLASSES,
    VOLUMES,
    Api,
    path_of,
)
from colocate.localcluster.controlplane import ControlPlane
from colocate.objects import (
    Claim,
    CsiDriver,
    CsiNode,
    CsiStorageCapacity,
    Namespace,
    Node,
    PersistentVolume,
    Pod,
    StorageClass,
    VolumeAttachment,
)
from podgroup.queue.entry import member_of
from podgroup.solve.place_class import feasible
from podgroup.solve.question import Trial, classes_of
from podgroup.state.cluster import Cluster

EXAMPLES, PODS_ASKED = 42, 25
"""1,050 pairs of a cluster and a pod."""
HOMES = {"one": {"team": "a"}, "two": {"team": "b"}}
ZONE, HOST, SIZE = "topology.kubernetes.io/zone", "kubernetes.io/hostname", "size"
GPU = "nvidia.com/gpu"
DRIVER = "disks.example.com"
LATER: dict[str, tuple[str, str, dict[str, Any]]] = {
    "small": ("later", "1Gi", {}),
    "large": ("later", "3Gi", {}),
    "too-large": ("later", "90Gi", {}),
    "many": ("later", "1Gi", {"accessModes": ["ReadWriteMany"]}),
    "block": ("later", "1Gi", {"volumeMode": "Block"}),
    "labelled": ("later", "1Gi", {"selector": {"matchLabels": {"speed": "fast"}}}),
    "kept": ("later", "1Gi", {}),
    "made": ("made", "1Gi", {}),
    "selected": ("made", "1Gi", {}),
    "roomy-small": ("roomy", "1Gi", {}),
    "roomy-large": ("roomy", "2Gi", {}),
    "no-class": ("none-of-that-name", "1Gi", {}),
}
"""Claims that are bound once their pod has a node -> StorageClass, size, and what else they say."""
FREE: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    "on-first": ("1Gi", {}, {"only": (HOST, "first")}),
    "in-zone": ("2Gi", {"speed": "fast"}, {"only": (ZONE, "z0")}),
    "anywhere": ("4Gi", {}, {"accessModes": ["ReadWriteOnce", "ReadWriteMany"], "only": (ZONE, "z1")}),
    "of-blocks": ("1Gi", {}, {"volumeMode": "Block"}),
    "kept": ("1Gi", {}, {"only": (HOST, "first")}),
    "released": ("50Gi", {}, {}),
}
"""Volumes of the class `later` -> size, labels, and where they are."""
MADE = {"provisioner": "made.example.com", "volumeBindingMode": "WaitForFirstConsumer"}
number = itertools.count()


# what clusters and pods are made of


def some(one: Any, most: int = 2) -> Any:
    return st.lists(one, min_size=1, max_size=most)


labels = st.dictionaries(st.sampled_from(["app", "tier"]), st.sampled_from(["x", "y"]), max_size=2)
pod_requirement = st.builds(
    lambda key, operator, values: {
        "key": key,
        "operator": operator,
        **({"values": values} if operator in ("In", "NotIn") else {}),
    },
    st.sampled_from(["app", "tier"]),
    st.sampled_from(["In", "NotIn", "Exists", "DoesNotExist"]),
    some(st.sampled_from(["x", "y"])),
)
selector = st.one_of(
    st.builds(lambda found: {"matchLabels": found}, labels),
    st.builds(lambda found: {"matchExpressions": [found]}, pod_requirement),
)
topology = st.sampled_from([ZONE, HOST] * 3 + ["absent"])
affinity_term = st.builds(
    lambda key, selected, where: {"topologyKey": key, "labelSelector": selected, **where},
    topology,
    selector,
    st.one_of(
        st.just({}),
        st.builds(lambda names: {"namespaces": names}, some(st.sampled_from(list(HOMES)))),
        st.just({"namespaceSelector": {}}),
        st.builds(lambda team: {"namespaceSelector": {"matchLabels": {"team": team}}}, st.sampled_from(["a", "c"])),
        st.just({"namespaces": ["one"], "namespaceSelector": {"matchLabels": {"team": "b"}}}),
    ),
)
node_requirement = st.one_of(
    st.builds(
        lambda key, operator, values: {"key": key, "operator": operator, "values": values},
        st.sampled_from([ZONE, "absent"]),
        st.sampled_from(["In", "NotIn"]),
        some(st.sampled_from(["z0", "z1"])),
    ),
    st.builds(
        lambda key, operator: {"key": key, "operator": operator},
        st.sampled_from([ZONE, SIZE]),
        st.sampled_from(["Exists", "DoesNotExist"]),
    ),
    st.builds(
        lambda operator, bound: {"key": SIZE, "operator": operator, "values": [bound]},
        st.sampled_from(["Gt", "Lt"]),
        st.sampled_from(["1", "2"]),
    ),
)
node_field = st.builds(
    lambda operator, i: {"key": "metadata.name", "operator": operator, "values": [f"node-{i}"]},
    st.sampled_from(["In", "NotIn"]),
    st.integers(0, 3),
)
node_term = st.one_of(
    st.builds(lambda found: {"matchExpressions": found}, some(node_requirement)),
    st.builds(lambda found: {"matchFields": [found]}, node_field),
    st.builds(lambda a, b: {"matchExpressions": [a], "matchFields": [b]}, node_requirement, node_field),
    st.just({}),
)
toleration = st.one_of(
    st.just({"operator": "Exists"}),
    st.builds(
        lambda key, effect: {"key": key, "operator": "Exists", **({"effect": effect} if effect else {})},
        st.sampled_from(["dedicated", "node.kubernetes.io/unschedulable"]),
        st.sampled_from(["", "NoSchedule"]),
    ),
    st.builds(
        lambda value, effect: {"key": "dedicated", "value": value, **({"effect": effect} if effect else {})},
        st.sampled_from(["a", ""]),
        st.sampled_from(["", "NoSchedule", "NoExecute"]),
    ),
)
amounts = st.fixed_dictionaries(
    {},
    optional={
        "cpu": st.sampled_from(["1m", "500m", "1", "1500m", "3"]),
        "memory": st.sampled_from(["1", "512Mi", "1G", "3Gi"]),
        GPU: st.sampled_from(["1", "2"]),
        "ephemeral-storage": st.sampled_from(["1Gi"]),
    },
)


def container(name: str, asked: dict[str, str], **more: Any) -> dict[str, Any]:
    whole = {k: v for k, v in asked.items() if "/" in k}
    return {"name": name, "image": "i", "resources": {"requests": asked, "limits": whole}, **more}


port = st.builds(
    lambda number, protocol, ip: {
        "containerPort": number,
        "hostPort": number,
        "protocol": protocol,
        **({"hostIP": ip} if ip else {}),
    },
    st.sampled_from([8080, 8081]),
    st.sampled_from(["TCP", "UDP"]),
    st.sampled_from(["", "0.0.0.0", "127.0.0.1", "127.0.0.2"]),
)
main = st.builds(
    lambda asked, ports: container("c", asked, **({"ports": ports} if ports else {})),
    amounts,
    st.one_of(st.just([]), st.just([]), st.lists(port, min_size=1, max_size=1)),
)
init = st.builds(lambda asked, sidecar: (asked, {"restartPolicy": "Always"} if sidecar else {}), amounts, st.booleans())
spread = st.builds(
    lambda key, skew, selected, more: {
        "topologyKey": key,
        "maxSkew": skew,
        "whenUnsatisfiable": "DoNotSchedule",
        "labelSelector": selected,
        **more,
    },
    topology,
    st.integers(1, 2),
    selector,
    st.fixed_dictionaries(
        {},
        optional={
            "minDomains": st.integers(1, 3),
            "nodeAffinityPolicy": st.sampled_from(["Honor", "Ignore"]),
            "nodeTaintsPolicy": st.sampled_from(["Honor", "Ignore"]),
            "matchLabelKeys": st.just(["tier"]),
        },
    ),
)


def _spec(found: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = {"terminationGracePeriodSeconds": 0, "containers": [found.pop("main")]}
    affinity = {
        name: {"requiredDuringSchedulingIgnoredDuringExecution": found.pop(key)}
        for key, name in (("beside", "podAffinity"), ("apart", "podAntiAffinity"))
        if key in found
    }
    if "nodes" in found:
        required = {"nodeSelectorTerms": found.pop("nodes")}
        affinity["nodeAffinity"] = {"requiredDuringSchedulingIgnoredDuringExecution": required}
    if affinity:
        spec["affinity"] = affinity
    starting = found.pop("init", [])
    if starting:
        spec["initContainers"] = [container(f"i{i}", asked, **more) for i, (asked, more) in enumerate(starting)]
    seen: dict[tuple[str, str], Any] = {}
    for constraint in found.pop("spread", []):
        if "matchLabelKeys" in constraint and "tier" in json.dumps(constraint["labelSelector"]):
            del constraint["matchLabelKeys"]  # the API server refuses a key that both name
        seen.setdefault((constraint["topologyKey"], constraint["whenUnsatisfiable"]), constraint)
    if seen:
        spec["topologySpreadConstraints"] = list(seen.values())
    claims = found.pop("claims", []) + found.pop("volumes", [])
    if claims:
        spec["volumes"] = [{"name": c, "persistentVolumeClaim": {"claimName": c}} for c in dict.fromkeys(claims)]
    return {**spec, **found}


OPTIONS = {
    "init": some(init),
    "nodeSelector": st.builds(lambda z: {ZONE: z}, st.sampled_from(["z0", "z1"])),
    "nodes": some(node_term),
    "tolerations": some(toleration),
    "beside": some(affinity_term),
    "apart": some(affinity_term),
    "spread": some(spread),
    "claims": some(st.sampled_from(["local", "zoned", "alone"] * 3 + ["unbound", "half", "lost", "missing"])),
    "volumes": some(st.sampled_from([*LATER, "disk-a", "disk-b", "disk-a", "disk-b"]), 3),
    "resources": st.builds(
        lambda cpu: {"requests": {"cpu": cpu}, "limits": {"cpu": cpu}}, st.sampled_from(["2", "3500m"])
    ),
}


@st.composite
def pods(draw: Any, most: int) -> dict[str, Any]:
    """A pod with few of the things that a pod can have: with all of them it would fit nowhere."""
    chosen = draw(st.lists(st.sampled_from(sorted(OPTIONS)), max_size=most, unique=True))
    found = {"main": draw(main), **{name: draw(OPTIONS[name]) for name in chosen}}
    if "resources" in found:  # must cover what its containers ask for of it
        found["main"] = container("c", {})
        found.pop("init", None)
    return {"home": draw(st.sampled_from(list(HOMES))), "labels": draw(labels), "spec": _spec(found)}


taints: Any = st.one_of(
    st.just([]),
    st.just([]),
    some(
        st.builds(
            lambda value, effect: {"key": "dedicated", "effect": effect, **({"value": value} if value else {})},
            st.sampled_from(["a", ""]),
            st.sampled_from(["NoSchedule", "NoExecute", "PreferNoSchedule"]),
        ),
        1,
    ),
)
nodes = st.lists(
    st.fixed_dictionaries(
        {
            "zone": st.sampled_from(["z0", "z1", "z2", None]),
            "size": st.sampled_from(["1", "2", "3", "big", None]),
            "taints": taints,
            "unschedulable": st.sampled_from([False, False, False, True]),
            "cpu": st.sampled_from(["2", "4"]),
            "memory": st.sampled_from(["2Gi", "4Gi"]),
            "pods": st.sampled_from(["2", "110"]),
            "gpu": st.sampled_from([None, "2"]),
            "disks": st.sampled_from([None, None, 0, 1, 2]),
            "attached": st.booleans(),
        }
    ),
    min_size=2,
    max_size=6,
)
there = st.lists(
    st.tuples(pods(2), st.integers(0, 5), st.sampled_from(["runs", "runs", "leaves", "ended"])), max_size=8
)


# the two that are asked


class Extender:
    """Hears which nodes the filters of kube-scheduler left of all, and lets none of them through."""

    def __init__(self) -> None:
        self.heard: dict[str, set[str]] = {}
        extender = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                names = asked.get("NodeNames", asked.get("nodenames")) or []
                uid = (asked.get("Pod") or asked.get("pod"))["metadata"]["uid"]
                extender.heard[uid] = set(names)
                answer = json.dumps({"nodenames": [], "failedAndUnresolvableNodes": dict.fromkeys(names, "asked only")})
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(answer.encode())

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ControlPlane, Extender]]:
    extender = Extender()
    without = ("TaintNodesByCondition", "StorageObjectInUseProtection")
    directory = tmp_path_factory.mktemp("predicates")
    with ControlPlane(directory, kwok=False, without_admission=without) as plane:
        config = {
            "apiVersion": "kubescheduler.config.k8s.io/v1",
            "kind": "KubeSchedulerConfiguration",
            "leaderElection": {"leaderElect": False},
            "clientConnection": {"kubeconfig": str(plane.kubeconfig("scheduler")), "qps": 5000, "burst": 5000},
            "percentageOfNodesToScore": 100,
            "profiles": [
                {
                    "schedulerName": "default-scheduler",
                    "plugins": {"postFilter": {"disabled": [{"name": "*"}]}},
                }
            ],
            "extenders": [{"urlPrefix": extender.url, "filterVerb": "filter", "nodeCacheCapable": True}],
        }
        file = Path(directory) / "scheduler.yaml"
        file.write_text(yaml.safe_dump(config))
        plane.start_scheduler(f"--config={file}")
        asyncio.run(_prepare(plane))
        yield plane, extender
    extender.server.shutdown()
    extender.server.server_close()


async def _prepare(plane: ControlPlane) -> None:
    async with Api.connect(str(plane.kubeconfig())) as api:
        for name, its in HOMES.items():
            meta = {"name": name, "labels": its}
            await api.request("POST", NAMESPACES, {"apiVersion": "v1", "kind": "Namespace", "metadata": meta})
        in_two_zones = {"key": ZONE, "values": ["z0", "z1"]}
        later = {"volumeBindingMode": "WaitForFirstConsumer"}
        body: dict[str, Any] = {
            "apiVersion": "storage.k8s.io/v1",
            "kind": "StorageClass",
            "provisioner": "kubernetes.io/no-provisioner",
        }
        kinds: tuple[tuple[str, dict[str, Any]], ...] = (
            ("x", {"volumeBindingMode": "Immediate"}),
            ("later", later),
            ("made", {**MADE, "allowedTopologies": [{"matchLabelExpressions": [in_two_zones]}]}),
            ("roomy", {**MADE, "provisioner": DRIVER}),
        )
        for name, kind in kinds:
            await api.request("POST", STORAGE_CLASSES, {**body, **kind, "metadata": {"name": name}})
        driver = {"apiVersion": "storage.k8s.io/v1", "kind": "CSIDriver", "metadata": {"name": DRIVER}}
        await api.request("POST", CSI_DRIVERS, {**driver, "spec": {"storageCapacity": True, "attachRequired": True}})
        for zone, size, most in (("z0", "1Gi", "8Gi"), ("z1", "1Gi", None), ("z2", None, None)):
            capacity = {
                "apiVersion": "storage.k8s.io/v1",
                "kind": "CSIStorageCapacity",
                "metadata": {"name": f"in-{zone}"},
                "storageClassName": "roomy",
                "nodeTopology": {"matchLabels": {ZONE: zone}},
            }
            capacity |= {"capacity": size} if size else {}
            capacity |= {"maximumVolumeSize": most} if most else {}
            await api.request("POST", path_of(STORAGE_CAPACITIES, "default"), capacity)


class Asked:
    """One cluster on the API server, and the pods that are asked about."""

    def __init__(self, api: Api, extender: Extender) -> None:
        self.api, self.extender, self.n = api, extender, next(number)

    def node(self, i: int) -> str:
        return f"node-{i}-{self.n}"

    def _named(self, body: dict[str, Any]) -> dict[str, Any]:
        """Node affinity to fields names nodes of this example."""
        text = json.dumps(body)
        for i in range(6):
            text = text.replace(f'"node-{i}"', f'"{self.node(i)}"')
        return json.loads(text)  # type: ignore[no-any-return]

    async def pod(self, name: str, one: dict[str, Any], **spec: Any) -> str:
        meta = {"name": name, "labels": one["labels"], "finalizers": spec.pop("finalizers", [])}
        body = {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": {**self._named(one["spec"]), **spec}}
        answer = await self.api.request("POST", path_of(PODS, one["home"]), body)
        return str(json.loads(answer)["metadata"]["uid"])

    async def build(self, made: list[dict[str, Any]], running: list[tuple[dict[str, Any], int, str]]) -> None:
        for i, one in enumerate(made):
            optional = {ZONE: one["zone"], SIZE: one["size"], HOST: self.node(i)}
            offered = {k: one[k] for k in ("cpu", "memory", "pods")} | {"ephemeral-storage": "10Gi"}
            offered |= {GPU: one["gpu"]} if one["gpu"] else {}
            body = {
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {"name": self.node(i), "labels": {k: v for k, v in optional.items() if v}},
                "spec": {"taints": one["taints"], "unschedulable": one["unschedulable"]},
                "status": {
                    "allocatable": offered,
                    "capacity": offered,
                    "conditions": [{"type": "Ready", "status": "True"}],
                },
            }
            await self.api.request("POST", NODES, body)
        await self._volumes()
        for i, one in enumerate(made):
            await self._disks(i, one)
        for i, (one, where, state) in enumerate(running):
            name, node = f"there-{self.n}-{i}", self.node(where % len(made))
            keep = {"finalizers": ["colocate.io/test"]} if state == "leaves" else {}
            await self.pod(name, one, nodeName=node, **keep)
            path = path_of(PODS, one["home"], name)
            if state == "leaves":
                await self.api.request("DELETE", path, {"gracePeriodSeconds": 0})
            elif state == "ended":
                await self.api.request(
                    "PATCH", f"{path}/status", {"status": {"phase": "Succeeded"}}, content_type=MERGE
                )

    async def _volumes(self) -> None:
        """`local` is on the first node, `zoned` in a zone by labels, `alone` for one pod; the others lack something."""
        on_first = {"matchExpressions": [{"key": HOST, "operator": "In", "values": [self.node(0)]}]}
        affinity = {"nodeAffinity": {"required": {"nodeSelectorTerms": [on_first]}}}
        kinds: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
            "local": ("ReadWriteOnce", {}, {"local": {"path": "/x"}, **affinity}),
            "zoned": ("ReadWriteOnce", {ZONE: "z0__z1"}, {"hostPath": {"path": "/x"}}),
            "alone": ("ReadWriteOncePod", {}, {"csi": {"driver": DRIVER, "volumeHandle": "h"}}),
            "half": ("ReadWriteOnce", {}, {"hostPath": {"path": "/x"}}),
            **{
                name: ("ReadWriteMany", {}, {"csi": {"driver": DRIVER, "volumeHandle": name}})
                for name in ("disk-a", "disk-b", "disk-c")
            },
        }
        size = {"storage": "1Gi"}
        for name, (mode, its, source) in kinds.items():
            spec = {"capacity": size, "accessModes": [mode], "storageClassName": "x", **source}
            meta = {"name": f"{name}-{self.n}", "labels": its}
            await self.api.request(
                "POST", VOLUMES, {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": meta, "spec": spec}
            )
        for home in HOMES:
            for name in ("local", "zoned", "alone", "half", "unbound", "lost", "disk-a", "disk-b"):
                mode = kinds[name][0] if name in kinds else "ReadWriteOnce"
                claim: dict[str, Any] = {
                    "accessModes": [mode],
                    "storageClassName": "x",
                    "resources": {"requests": size},
                }
                claim |= {} if name == "unbound" else {"volumeName": f"{name}-{self.n}"}
                done = {} if name in ("unbound", "half") else {"pv.kubernetes.io/bind-completed": "yes"}
                meta = {"name": name, "annotations": done}
                body = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": meta, "spec": claim}
                await self.api.request("POST", path_of(CLAIMS, home), body)

        await self._free_volumes()
        for home in HOMES:
            for name, (made_by, bytes_, more) in LATER.items():
                wanted = {"accessModes": ["ReadWriteOnce"], "storageClassName": made_by, **more}
                wanted["resources"] = {"requests": {"storage": bytes_}}
                chosen = {"volume.kubernetes.io/selected-node": self.node(1)} if name == "selected" else {}
                meta = {"name": name, "annotations": chosen}
                body = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": meta, "spec": wanted}
                await self.api.request("POST", path_of(CLAIMS, home), body)

    async def _free_volumes(self) -> None:
        for name, (size, its, more) in FREE.items():
            spec = {"accessModes": ["ReadWriteOnce"], "storageClassName": "later", "local": {"path": "/x"}, **more}
            key, value = spec.pop("only", (HOST, "first"))
            there = {"key": key, "operator": "In", "values": [self.node(0) if value == "first" else value]}
            spec["nodeAffinity"] = {"required": {"nodeSelectorTerms": [{"matchExpressions": [there]}]}}
            if name == "kept":
                spec["claimRef"] = {"namespace": "one", "name": "kept"}
            called = f"{name}-{self.n}"
            body = {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": called, "labels": its}}
            await self.api.request("POST", VOLUMES, {**body, "spec": {**spec, "capacity": {"storage": size}}})
            status = {"status": {"phase": "Released" if name == "released" else "Available"}}
            await self.api.request("PATCH", f"{path_of(VOLUMES, '', called)}/status", status, content_type=MERGE)

    async def _disks(self, i: int, one: dict[str, Any]) -> None:
        """How many disks a node can have, and one that is attached to it and that no pod uses."""
        meta = {"name": self.node(i)}
        if one["disks"] is not None:
            driver = {"name": DRIVER, "nodeID": self.node(i), "allocatable": {"count": one["disks"]}}
            body = {
                "apiVersion": "storage.k8s.io/v1",
                "kind": "CSINode",
                "metadata": meta,
                "spec": {"drivers": [driver]},
            }
            await self.api.request("POST", CSI_NODES, {**body, "metadata": meta})
        if one["attached"]:
            source = {"persistentVolumeName": f"disk-c-{self.n}"}
            spec = {"attacher": DRIVER, "nodeName": self.node(i), "source": source}
            body = {"apiVersion": "storage.k8s.io/v1", "kind": "VolumeAttachment", "metadata": meta, "spec": spec}
            await self.api.request("POST", ATTACHMENTS, body)

    async def theirs(self, asked: list[dict[str, Any]]) -> list[set[str]]:
        """By kube-scheduler, once it has seen all of the cluster."""
        uids = [await self.pod(f"asked-{self.n}-{next(number)}", one) for one in asked]
        waiting, until = set(uids), time.monotonic() + 30
        while waiting:
            for home in HOMES:
                for pod in await self.api.all(Pod, path_of(PODS, home)):
                    said = any(c.type == "PodScheduled" and c.status == "False" for c in pod.status.conditions)
                    waiting -= {pod.metadata.uid} if said else set()
            assert time.monotonic() < until, "kube-scheduler does not answer"
            await asyncio.sleep(0.03)
        return [self.extender.heard.get(uid, set()) for uid in uids]

    async def seen(self, made: list[dict[str, Any]]) -> None:
        """Wait until kube-scheduler knows these nodes and no others, or none of them can be told of by this pod."""
        spec = {"containers": [container("c", {})], "tolerations": [{"operator": "Exists"}]}
        new, until = {self.node(i) for i in range(len(made))}, time.monotonic() + 1
        while time.monotonic() < until:
            told = (await self.theirs([{"home": "one", "labels": {"none": "z"}, "spec": spec}]))[0]
            if told and told <= new:
                return

    async def ours(self, asked: list[dict[str, Any]]) -> list[set[str]]:
        """By the solver, on what the API server has."""
        cluster, found = Cluster(), []
        for namespace in await self.api.all(Namespace, NAMESPACES):
            cluster.set_namespace(namespace.metadata.name, namespace.metadata.labels)
        for node in await self.api.all(Node, NODES):
            cluster.set_node(node)
        for made_by in await self.api.all(StorageClass, STORAGE_CLASSES):
            cluster.storage.set_class(made_by.metadata.name, made_by)
        for driver in await self.api.all(CsiDriver, CSI_DRIVERS):
            cluster.storage.set_driver(driver.metadata.name, driver)
        for capacity in await self.api.all(CsiStorageCapacity, STORAGE_CAPACITIES):
            cluster.storage.set_capacity(capacity.metadata.name, capacity)
        for volume in await self.api.all(PersistentVolume, VOLUMES):
            cluster.storage.set_volume(volume.metadata.name, volume)
        for csi_node in await self.api.all(CsiNode, CSI_NODES):
            cluster.set_csi_node(csi_node.metadata.name, csi_node)
        for attachment in await self.api.all(VolumeAttachment, ATTACHMENTS):
            cluster.set_attachments(cluster.storage.set_attachment(attachment.metadata.name, attachment))
        for claim in await self.api.all(Claim, CLAIMS):
            cluster.storage.set_claim(f"{claim.metadata.namespace}/{claim.metadata.name}", claim)
        all_pods = {p.metadata.name: p for p in await self.api.all(Pod, PODS)}
        for pod in all_pods.values():
            if pod.spec.node_name:
                cluster.set_pod(pod)
        newest = sorted((n for n in all_pods if n.startswith(f"asked-{self.n}-")), key=lambda n: int(n.split("-")[2]))
        for name in newest[-len(asked) :]:
            cluster.set_pod(all_pods[name])  # who shares a disk with it holds it in another way from then on
            (group,) = classes_of([member_of(cluster, all_pods[name])], cluster.ledger)
            mask = feasible(Trial(cluster.ledger, np.ones(len(cluster.ledger.names), dtype=bool)), group)
            found.append({n for n, good in zip(cluster.ledger.names, mask, strict=True) if good})
            cluster.remove_pod(all_pods[name].metadata.uid)
        return found

    async def clear(self) -> None:
        for home in HOMES:
            for pod in await self.api.all(Pod, path_of(PODS, home)):
                if pod.metadata.finalizers:
                    path = path_of(PODS, home, pod.metadata.name)
                    await self.api.request("PATCH", path, {"metadata": {"finalizers": None}}, content_type=MERGE)
            for collection in (PODS, CLAIMS):
                await self.api.request("DELETE", path_of(collection, home), {"gracePeriodSeconds": 0})
        for path in (NODES, VOLUMES, CSI_NODES, ATTACHMENTS):
            await self.api.request("DELETE", path, {})


def frees_the_port_of_another(running: list[tuple[dict[str, Any], int, str]]) -> bool:
    """Whether a pod that has ended and one that runs have a host port in common.

    kube-scheduler keeps the ports of a node as a set (NodeInfo.updateUsedPorts), so that the end of one frees them for
    both; no kubelet would have let them run side by side.
    """

    def ports(state: str) -> set[tuple[int, str]]:
        found = [
            p
            for pod, _, became in running
            if became == state
            for c in pod["spec"]["containers"]
            for p in c.get("ports", [])
        ]
        return {(p["hostPort"], p.get("protocol", "TCP")) for p in found if "hostPort" in p}

    return bool(ports("ended") & (ports("runs") | ports("leaves")))


async def _compare(
    scheduler: tuple[ControlPlane, Extender],
    made: list[dict[str, Any]],
    running: list[tuple[dict[str, Any], int, str]],
    asked: list[dict[str, Any]],
) -> None:
    plane, extender = scheduler
    async with Api.connect(str(plane.kubeconfig())) as api:
        world = Asked(api, extender)
        try:
            await world.build(made, running)
            await world.seen(made)
            theirs = await world.theirs(asked)
            ours = await world.ours(asked)
            for _ in range(4):  # what it hears of nodes and volumes comes by other ways than what it hears of pods
                if theirs != ours:
                    await asyncio.sleep(0.3)
                    theirs = await world.theirs(asked)
            for one, a, b in zip(asked, ours, theirs, strict=True):
                assert a == b, f"ours {sorted(a)}, kube-scheduler's {sorted(b)}, for {json.dumps(one)}"
        finally:
            await world.clear()
            extender.heard.clear()


@given(nodes, there, st.lists(st.one_of(pods(1), pods(3)), min_size=PODS_ASKED, max_size=PODS_ASKED))
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink),
)
def test_the_feasible_nodes_are_those_of_kube_scheduler(
    scheduler: tuple[ControlPlane, Extender],
    made: list[dict[str, Any]],
    running: list[tuple[dict[str, Any], int, str]],
    asked: list[dict[str, Any]],
) -> None:
    assume(not frees_the_port_of_another(running))
    asyncio.run(_compare(scheduler, made, running, asked))
