"""The simulator's native scheduler beside the real kube-scheduler, decision for decision.

The real one logs each pod that it takes up, the points of every node that fits, and where the pod went. Each of that is
replayed: the same nodes have to fit, with the same points, and the chosen one has to have the most of them.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

from colocate.kube.client import MERGE, NODES, PODS, Api, path_of
from colocate.localcluster.controlplane import ControlPlane
from colocate.objects import Pod
from colocate.simulate.placement import Kinds, Nodes, State, arrays, ask_of, empty, feasible_to_find, take
from colocate.simulate.preemption import Lesser, by_node, nominate
from colocate.simulate.scores import NATIVE, WHOLE, Typical, rate
from colocate.units import time_text

LINE = re.compile(r'schedule_one\.go:\d+\] "([^"]+)" pod="default/([^"]+)"(.*)')
POINTS = re.compile(r'plugin="NodeResources(?:Fit|BalancedAllocation)" node="([^"]+)" score=(\d+)')
NODE, GPU = re.compile(r'node="([^"]+)"'), "example.com/gpu"
NOT_FGD = Typical(np.empty((0, 5), np.int64), np.empty(0))
CLUSTERS = ((30, 140), (45, 140), (60, 120), (20, 160), (130, 160))
"""Nodes and pods: of more than a hundred nodes a part is looked at."""


class Cycle(NamedTuple):
    """One pod as kube-scheduler took it up."""

    pod: str
    points: dict[str, int]
    """Of each node that fits, by name; empty where no scores were needed."""


def cycles(lines: Iterator[str]) -> tuple[list[Cycle], dict[str, str]]:
    """In their order, and where each pod went in the end."""
    found: list[Cycle] = []
    bound = {}
    for line in lines:
        said = LINE.search(line)
        if said is None:
            continue
        text, pod, rest = said.groups()
        if text == "Attempting to schedule pod":
            found.append(Cycle(pod, {}))
        elif text == "Plugin scored node for pod" and (points := POINTS.search(rest)) is not None:
            assert found[-1].pod == pod
            found[-1].points[points[1]] = found[-1].points.get(points[1], 0) + int(points[2])
        elif text == "Calculated node's final score for pod":
            node = NODE.search(rest)
            assert node is not None
            found[-1].points.setdefault(node[1], 0)
        elif text == "Successfully bound pod to node":
            node = NODE.search(rest)
            assert node is not None
            bound[pod] = node[1]
    return found, bound


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    without = ("TaintNodesByCondition", "StorageObjectInUseProtection")
    with ControlPlane(tmp_path_factory.mktemp("native"), kwok=False, without_admission=without) as plane:
        yield plane


async def offer(api: Api, name: str, cpu: int, memory: int, gpus: int) -> None:
    offered = {"pods": "110", "cpu": f"{cpu}m", "memory": f"{memory}Mi", GPU: str(gpus)}
    conditions = [{"type": "Ready", "status": "True"}]
    status = {"capacity": offered, "allocatable": offered, "conditions": conditions}
    await api.request("POST", NODES, {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "status": status})


async def ask(api: Api, name: str, cpu: int, memory: int, gpus: int, **more: Any) -> None:
    """`more`: of the pod's spec."""
    asked = {"cpu": f"{cpu}m", "memory": f"{memory}Mi", GPU: str(gpus)}
    asked = {k: v for k, v in asked.items() if v not in ("0m", "0Mi", "0")}
    resources = {"requests": asked, "limits": {k: v for k, v in asked.items() if k == GPU}}
    spec: dict[str, Any] = {"containers": [{"name": "c", "image": "i", "resources": resources}]}
    await api.request(
        "POST",
        path_of(PODS, "default"),
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name},
            "spec": spec | {"terminationGracePeriodSeconds": 0} | more,
        },
    )


async def placed(api: Api, name: str, began: int) -> str:
    """Where a pod is once it is somewhere; there it has begun at a second of ours."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        pod = next(p for p in await api.all(Pod, PODS) if p.metadata.name == name)
        if pod.spec.node_name:
            status = {"status": {"startTime": time_text(1.7e9 + began), "phase": "Running"}}
            path = path_of(PODS, "default", name, "status")
            await api.request("PATCH", path, status, content_type=MERGE)
            return pod.spec.node_name
        await asyncio.sleep(0.05)
    raise AssertionError(f"kube-scheduler has not placed {name}")


async def all_decided(api: Api, count: int) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until:
        pods = await api.all(Pod, PODS)
        done = [p for p in pods if p.spec.node_name or any(c.status == "False" for c in p.status.conditions)]
        if len(done) == count:
            return
        await asyncio.sleep(0.1)
    raise AssertionError("kube-scheduler has not decided all pods")


def points_of(state: State, kinds: Kinds, i: int, k: int) -> float:
    return rate(state.nodes, state.fragmented, NOT_FGD, NATIVE, i, ask_of(kinds, k))[0]


def replayed(nodes: Nodes, names: list[str], kinds: Kinds, of: dict[str, int], log: Iterator[str]) -> int:
    """How many decisions were compared."""
    found, bound = cycles(log)
    state = empty(nodes)
    compared, last = 0, {cycle.pod: at for at, cycle in enumerate(found)}
    for at, cycle in enumerate(found):
        k = of[cycle.pod]
        ours = {name: points_of(state, kinds, i, k) for i, name in enumerate(names)}
        fits = {name: int(points) for name, points in ours.items() if points >= 0.0}
        chosen = bound.get(cycle.pod) if last[cycle.pod] == at else None
        theirs = cycle.points
        if theirs and len(names) < 100:
            assert theirs == fits, (cycle.pod, at)
        elif theirs:
            assert theirs == {name: fits.get(name) for name in theirs}, (cycle.pod, at)
            assert len(theirs) == min(feasible_to_find(len(names)), len(fits)), (cycle.pod, at)
        if chosen is None:
            assert not fits, f"{cycle.pod} fits {sorted(fits)}, and was not placed"
        elif theirs:
            assert theirs[chosen] == max(theirs.values()), (cycle.pod, at)
        else:
            assert list(fits) == [chosen], "only where one node alone fits nothing is scored"
        compared += 1
        if chosen is not None:
            i = names.index(chosen)
            take(state, i, ask_of(kinds, k), -1, NATIVE, 0)
    return compared


async def compare(plane: ControlPlane, rng: random.Random, number: int, nodes: int, pods: int) -> int:
    """On a random cluster of its own."""
    log = plane.directory / "kube-scheduler.log"
    shapes = [(rng.choice((2000, 4000, 7900, 16000)), rng.choice((2048, 8192, 30000)), rng.choice((0, 0, 2, 8)))]
    shapes += [(rng.randrange(1000, 16000, 100), rng.randrange(1024, 32768, 256), rng.choice((0, 4))) for _ in range(5)]
    made = [rng.choice(shapes) for _ in range(nodes)]
    names = [f"n{number}-{i}" for i in range(nodes)]
    kinds = [
        (rng.choice((0, 100, 250, 500, 1000, 1900)), rng.choice((0, 128, 256, 1000, 2048)), rng.choice((0, 0, 0, 1, 2)))
        for _ in range(12)
    ]
    asked = [rng.randrange(len(kinds)) for _ in range(pods)]
    async with Api.connect(str(plane.kubeconfig())) as api:
        for name, shape in zip(names, made, strict=True):
            await offer(api, name, *shape)
        plane.start_scheduler("--vmodule=schedule_one=10")
        try:
            for p, k in enumerate(asked):
                await ask(api, f"p{number}-{p}", *kinds[k])
            await all_decided(api, pods)
        finally:
            plane.end("kube-scheduler")
        for p in range(pods):
            await api.request("DELETE", path_of(PODS, "default", f"p{number}-{p}"))
        for name in names:
            await api.request("DELETE", path_of(NODES, "", name))

    def column(rows: list[tuple[int, int, int]], i: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.array([row[i] for row in rows], np.int64)

    offered = Nodes(column(made, 0), column(made, 1), column(made, 2), *3 * (np.zeros(nodes, np.int64),))
    zeros, ones = np.zeros(len(kinds), np.int64), np.ones(len(kinds), np.int64)
    wanted = Kinds(column(kinds, 0), column(kinds, 1), column(kinds, 2), WHOLE * ones, zeros, zeros)
    with log.open() as file:
        return replayed(offered, names, wanted, {f"p{number}-{p}": k for p, k in enumerate(asked)}, file)


async def test_the_native_scheduler_decides_as_the_real_one(scheduler: ControlPlane) -> None:
    rng = random.Random(1)
    compared = 0
    for number, (nodes, pods) in enumerate(CLUSTERS):
        compared += await compare(scheduler, rng, number, nodes, pods)
    assert compared >= sum(pods for _, pods in CLUSTERS)


@pytest.mark.slow
async def test_five_thousand_decisions_over_random_clusters(scheduler: ControlPlane) -> None:
    rng = random.Random(2)
    compared = 0
    while compared < 5000:
        nodes = rng.choice((12, 25, 40, 70, 110, 140))
        compared += await compare(scheduler, rng, 1000 + compared, nodes, rng.randint(150, 400))
    assert compared >= 5000


class Bound(NamedTuple):
    """A pod of the test of preemption."""

    name: str
    node: int
    kind: int
    began: int


def filled(nodes: Nodes, kinds: Kinds, there: list[Bound]) -> tuple[State, dict[str, int]]:
    """What these pods leave, and the GPUs of each."""
    state = empty(nodes)
    cards = {pod.name: take(state, pod.node, ask_of(kinds, pod.kind), -1, NATIVE, 0) for pod in there}
    return state, cards


def chosen(
    nodes: Nodes, kinds: Kinds, there: list[Bound], k: int, only: int | None = None
) -> tuple[int, list[str], tuple[int, int, int]]:
    """By ours: the node (of one alone), the victims, and how important they are."""
    state, cards = filled(nodes, kinds, there)
    lower = [p for p in there if kinds.priority[p.kind] < kinds.priority[k] and only in (None, p.node)]
    head, after = by_node(len(nodes.gpus), np.array([pod.node for pod in lower], np.int64))
    numbers, kind = np.arange(len(lower)), np.array([pod.kind for pod in lower], np.int64)
    mask = np.array([cards[pod.name] for pod in lower], np.int64)
    began = np.array([float(pod.began) for pod in lower])
    node, victims = nominate(kinds, state, k, 0, Lesser(head, after, numbers, numbers, kind, mask, began))
    gone = [lower[v] for v in victims]
    importance = [int(kinds.priority[pod.kind]) for pod in gone]
    latest = min((pod.began for pod in gone if kinds.priority[pod.kind] == max(importance)), default=0)
    rank = (max(importance, default=0), sum(importance) + (len(gone) << 31), -latest)
    return node, sorted(pod.name for pod in gone), rank


async def preemptions(plane: ControlPlane, rng: random.Random, number: int, nodes: int, decisions: int) -> int:
    """How many pods took the place of others on a full cluster of its own."""
    shapes = [(rng.choice((4000, 8000)), rng.choice((8192, 16384)), rng.choice((0, 2, 4))) for _ in range(nodes)]
    offered = Nodes(*arrays([(*shape, 0, 0, 0) for shape in shapes]))
    rows = [
        (rng.choice((500, 1000, 2000)), rng.choice((512, 2048, 4096)), rng.choice((0, 0, 1, 2)), WHOLE, 0, priority)
        for priority in (0, 0, 0, 10, 10, 20, 1000)
    ]
    kinds = Kinds(*(np.array(column, np.int64) for column in zip(*rows, strict=True)))
    names = [f"t{number}-{i}" for i in range(nodes)]
    there: list[Bound] = []
    compared = 0
    async with Api.connect(str(plane.kubeconfig())) as api:
        for priority in sorted({row[5] for row in rows}):
            body = {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "value": priority}
            body["metadata"] = {"name": f"t{number}-{priority}"}
            await api.request("POST", "/apis/scheduling.k8s.io/v1/priorityclasses", body)
        for name, shape in zip(names, shapes, strict=True):
            await offer(api, name, *shape)
        state = empty(offered)
        for i in range(nodes):  # until it is full
            for at in range(12):
                k = rng.randrange(len(rows) - 1)
                if points_of(state, kinds, i, k) < 0:
                    continue
                take(state, i, ask_of(kinds, k), -1, NATIVE, 0)
                pod = Bound(f"l{number}-{i}-{at}", i, k, rng.randrange(1000))
                there.append(pod)
                class_ = f"t{number}-{rows[k][5]}"
                await ask(api, pod.name, *rows[k][:3], nodeName=names[i], priorityClassName=class_)
                await placed(api, pod.name, pod.began)
        plane.start_scheduler()
        try:
            for step in range(decisions):
                k = rng.choice((3, 4, 5, 6))
                if any(points_of(state, kinds, i, k) >= 0 for i in range(nodes)):
                    continue
                best, _, least = chosen(offered, kinds, there, k)
                if best < 0:
                    continue
                name = f"h{number}-{step}"
                await ask(api, name, *rows[k][:3], priorityClassName=f"t{number}-{rows[k][5]}")
                where = names.index(await placed(api, name, 2000 + step))
                left = {p.metadata.name for p in await api.all(Pod, PODS)}
                gone = sorted(pod.name for pod in there if pod.name not in left)
                _, victims, rank = chosen(offered, kinds, there, k, where)
                assert gone == victims, (number, step)
                assert rank == least, (number, step)
                there = [pod for pod in there if pod.name in left] + [Bound(name, where, k, 2000 + step)]
                state, _ = filled(offered, kinds, there)
                compared += 1
        finally:
            plane.end("kube-scheduler")
        for p in await api.all(Pod, PODS):
            await api.request("DELETE", path_of(PODS, "default", p.metadata.name))
        for name in names:
            await api.request("DELETE", path_of(NODES, "", name))
    return compared


@pytest.mark.parametrize(
    "decisions", [pytest.param(20, id="twenty"), pytest.param(150, id="a hundred and fifty", marks=pytest.mark.slow)]
)
async def test_the_native_scheduler_stops_whom_the_real_one_stops(scheduler: ControlPlane, decisions: int) -> None:
    rng, compared, number = random.Random(decisions), 0, 0
    while compared < decisions:
        found = await preemptions(scheduler, rng, 1000 * decisions + number, rng.choice((4, 6, 9)), 24)
        assert found, "a round in which nobody is stopped says nothing"
        compared, number = compared + found, number + 1
