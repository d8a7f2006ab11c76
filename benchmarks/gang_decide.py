"""How fast gangs are decided, without an API server: CPU time of this process, so that neighbours hardly matter.

5,000 nodes in 50 shapes, 60 % full; pods have the labels that their owners give them (`controller-uid`, `job-name`).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from functools import partial
from math import ceil
from typing import Any

import msgspec

from colocate.objects import (
    Affinity,
    Container,
    LabelSelector,
    Node,
    NodeStatus,
    ObjectMeta,
    OwnerReference,
    Pod,
    PodAffinity,
    PodAffinityTerm,
    PodSpec,
    PodStatus,
    Resources,
)
from podgroup.api import POD_GROUP_LABEL, PodGroup, PodGroupSpec
from podgroup.controller.loop import CYCLE_SECONDS, SEARCHES_A_CYCLE, settle_memory
from podgroup.queue.entry import REQUIRED_TOPOLOGY, Settings
from podgroup.queue.queue import Queue
from podgroup.solve.question import Gang, Member
from podgroup.solve.sequence import compile_all, place_in_turn
from podgroup.state.cluster import Cluster
from podgroup.state.shape import shape_of

NODES, SHAPES, ROW = 5000, 50, 320
HOST, RACK = "kubernetes.io/hostname", "topology.kubernetes.io/rack"
GPU = "nvidia.com/gpu"
MADE = "2026-01-01T00:00:00Z"
GANGS_256, SMALL_GANGS, PODS, JOBS, GAINS, SEARCHES, BATCH = 120, 1000, 10_000, 15_000, 100, 30, 2000
BARS = {
    "gang_256_ms_p99": 50.0,
    "three_pod_gangs_per_second": 5000.0,
    "ten_thousand_pods_seconds": 1.0,
    "queue_15000_gain_ms_p99": 50.0,
    "victim_search_ms_p99": 100.0,
    "batch_placements_per_second": 1e5,
}
MORE_IS_BETTER = frozenset({"three_pod_gangs_per_second", "batch_placements_per_second"})


def p99(values: Iterable[float]) -> float:
    """The 99th percentile, by the nearest rank."""
    ordered = sorted(values)
    return ordered[max(ceil(0.99 * len(ordered)) - 1, 0)]


def timed(work: Callable[[], Any]) -> float:
    """Seconds of CPU."""
    started = time.process_time()
    work()
    return time.process_time() - started


def cluster_of(generator: random.Random, full: float = 0.6) -> Cluster:
    """All nodes in rows of 320, `full` of their CPU taken by pods of 8, 16 and 32 cores."""
    cluster = Cluster()
    for i in range(NODES):
        cpu = 16 + 4 * (i % SHAPES)
        labels = {HOST: f"n{i:05}", RACK: f"r{i // ROW:03}", "pool": f"p{i % 10}"}
        offered: dict[str, str | int | float] = {"cpu": str(cpu), "memory": f"{4 * cpu}Gi", "pods": "110"}
        if i % 2:
            offered[GPU] = "8"
        meta = ObjectMeta(name=f"n{i:05}", labels=labels)
        cluster.set_node(Node(metadata=meta, status=NodeStatus(allocatable=offered)))
        left = full * cpu
        while left > 0:
            asked = min(generator.choice([8, 16, 32]), max(round(left), 1))
            pod = job_pod(f"used-{i}-{left:.0f}", {"cpu": str(asked), "memory": f"{2 * asked}Gi"})
            cluster.set_pod(runs(pod, f"n{i:05}"))
            left -= asked
    return cluster


def runs(pod: Pod, node: str) -> Pod:
    """The pod on a node."""
    spec = msgspec.structs.replace(pod.spec, node_name=node)
    return msgspec.structs.replace(pod, spec=spec, status=PodStatus(phase="Running", start_time=MADE))


def job_pod(
    name: str, requests: dict[str, Any], group: str = "", *, apart: bool = False, priority: int = 0, job: str = ""
) -> Pod:
    """A pod as a Job's controller makes it."""
    job = job or group or name
    labels = {"batch.kubernetes.io/controller-uid": f"uid-{job}", "job-name": job, "controller-uid": f"uid-{job}"}
    labels |= {POD_GROUP_LABEL: group} if group else {}
    selector = LabelSelector(match_labels={POD_GROUP_LABEL: group})
    term = PodAffinityTerm(topology_key=HOST, label_selector=selector)
    owner = OwnerReference(kind="Job", name=job, uid=f"uid-{job}", controller=True)
    return Pod(
        metadata=ObjectMeta(
            name=name, namespace="b", uid=name, labels=labels, creation_timestamp=MADE, owner_references=[owner]
        ),
        spec=PodSpec(
            scheduler_name="colocate",
            priority=priority,
            containers=[Container(resources=Resources(requests=requests))],
            affinity=Affinity(pod_anti_affinity=PodAffinity(required=[term])) if apart else None,
        ),
    )


def make_gang(
    cluster: Cluster, name: str, size: int, cpu: int, *, rack: bool = False, apart: bool = False, priority: int = 0
) -> str:
    """A PodGroup and its pods; its key."""
    annotations = {REQUIRED_TOPOLOGY: RACK} if rack else {}
    meta = ObjectMeta(name=name, namespace="b", annotations=annotations, creation_timestamp=MADE)
    cluster.groups[f"b/{name}"] = PodGroup(metadata=meta, spec=PodGroupSpec(min_member=size))
    for i in range(size):
        asked = {"cpu": str(cpu), "memory": f"{cpu}Gi"}
        cluster.set_pod(job_pod(f"{name}-{i}", asked, name, apart=apart, priority=priority))
    return f"b/{name}"


def new_queue(**settings: Any) -> Queue:
    """As the controller has it."""
    return Queue(Settings(**settings), SEARCHES_A_CYCLE, place_in_turn)


def forget(cluster: Cluster, queue: Queue, *keys: str) -> None:
    """These gangs are gone."""
    for key in keys:
        for uid in list(cluster.members.get(key, ())):
            cluster.remove_pod(uid)
        cluster.groups.pop(key, None)
    queue.cycle(cluster, set(keys), 0.0)


def gangs_of_256(cluster: Cluster) -> list[float]:
    """Milliseconds for each: in one row and on nodes of their own, every third one fragmented (no row has so many)."""
    queue, found = new_queue(), []
    queue.cycle(cluster, set(), 0.0)
    for i in range(GANGS_256):
        key = make_gang(cluster, f"big{i}", 256, (2, 8, 24)[i % 3], rack=True, apart=True)
        found.append(1e3 * timed(partial(queue.cycle, cluster, {key}, 0.0)))
        forget(cluster, queue, key)
    return found


def small_gangs(cluster: Cluster) -> float:
    """Gangs of three a second, all asked for at once."""
    queue = new_queue()
    queue.cycle(cluster, set(), 0.0)
    keys = [make_gang(cluster, f"small{i}", 3, 1 + i % 4) for i in range(SMALL_GANGS)]
    seconds = timed(lambda: queue.cycle(cluster, set(keys), 0.0))
    assert all(uid in cluster.planned for key in keys for uid in cluster.members[key])
    forget(cluster, queue, *keys)
    return SMALL_GANGS / seconds


def many_pods(cluster: Cluster) -> float:
    """Seconds for 10,000 pods of 100 shapes."""
    queue = new_queue()
    queue.cycle(cluster, set(), 0.0)
    for i in range(PODS):
        cluster.set_pod(job_pod(f"one-{i}", {"cpu": f"{500 + 10 * (i % 100)}m", "memory": "1Gi"}))
    keys = {f"b/pod:one-{i}" for i in range(PODS)}
    seconds = timed(lambda: queue.cycle(cluster, keys, 0.0))
    forget(cluster, queue, *keys)
    return seconds


def _past(moment: float) -> bool:
    return time.process_time() > moment


def gains_of_a_long_queue(cluster: Cluster) -> list[float]:
    """Milliseconds from a node's gain to the start of a Job, of 15,000 that wait; in slices, as the shell asks."""
    queue = new_queue(reserve_after_seconds=1e9)
    for i in range(JOBS):
        cluster.set_pod(job_pod(f"wait-{i}", {"cpu": f"{300 + i % 40}", "memory": "1Gi"}))
    keys = {f"b/pod:wait-{i}" for i in range(JOBS)}
    queue.cycle(cluster, keys, 0.0)
    found = []
    for i in range(GAINS):
        name = f"n{i * 37 % NODES:05}"
        node = cluster.ledger.node(name)
        assert node is not None
        offered = {**node.status.allocatable, "cpu": "100000"}
        cluster.set_node(msgspec.structs.replace(node, status=NodeStatus(allocatable=offered)))
        started, starts = time.process_time(), 0
        while not starts:
            until = time.process_time() + CYCLE_SECONDS
            decided = queue.cycle(cluster, set(), 0.0, out_of_time=partial(_past, until))
            starts += len(decided.starts)
            assert starts or queue.unfinished, "the gain lets nobody in"
        found.append(1e3 * (time.process_time() - started))
        for start in decided.starts:
            for one in start.placed:
                cluster.remove_pod(one.member.uid)
        queue.cycle(cluster, {s.key for s in decided.starts}, 0.0)
        cluster.set_node(node)
    forget(cluster, queue, *keys)
    return found


def victim_searches(cluster: Cluster) -> list[float]:
    """Milliseconds to find who makes room for a gang of eight among 20,000 pods that run."""
    found = []
    have = sum(1 for p in cluster.pods.values() if p.spec.node_name)
    for i in range(max(20_000 - have, 0)):
        cluster.set_pod(runs(job_pod(f"more-{i}", {"cpu": "100m"}), f"n{i % NODES:05}"))
    for i in range(SEARCHES):
        key = make_gang(cluster, f"vip{i}", 8, 100 + i, priority=1000)
        queue = new_queue()
        found.append(1e3 * timed(partial(queue.cycle, cluster, {key}, 0.0)))
        assert queue.waiting[key].reason == "WaitingForPreemption", queue.waiting[key]
        forget(cluster, queue, key)
    return found


def batch() -> float:
    """Members a second by the solver alone on 1,213 nodes: gangs of 1 to 16, parts of GPUs, every third in one rack."""
    cluster, generator = Cluster(), random.Random(7)
    for i in range(1213):
        labels = {HOST: f"n{i:04}", RACK: f"r{i // 32:03}"}
        offered: dict[str, str | int | float] = {
            "cpu": "96",
            "memory": "768Gi",
            "pods": "110",
            "nvidia.com/gpu-milli": "8000",
        }
        meta = ObjectMeta(name=f"n{i:04}", labels=labels)
        cluster.set_node(Node(metadata=meta, status=NodeStatus(allocatable=offered)))
    milli = "nvidia.com/gpu-milli"
    asks = [{"cpu": f"{4 * g}m", "memory": f"{16 * g}Mi", milli: str(g)} for g in (125, 250, 500, 1000, 2000)]
    shapes = [shape_of(job_pod("p", asked)) for asked in asks]
    gangs = []
    for i in range(BATCH):
        shape, size = generator.choice(shapes), generator.choice([1, 2, 4, 8, 16])
        members = tuple(Member(f"{i}-{j}", f"{i}-{j}", "b", shape, {}) for j in range(size))
        gangs.append(Gang(members, size, required_topology=RACK if i % 3 == 0 else ""))
    started = time.process_time()
    found = place_in_turn(cluster.ledger, gangs)
    return sum(len(placed) for placed in found if placed) / (time.process_time() - started)


def measure(seed: int) -> dict[str, float]:
    """All figures of one round."""
    compile_all()
    cluster = cluster_of(random.Random(seed))
    settle_memory()
    return {
        "gang_256_ms_p99": p99(gangs_of_256(cluster)),
        "three_pod_gangs_per_second": small_gangs(cluster),
        "ten_thousand_pods_seconds": many_pods(cluster),
        "queue_15000_gain_ms_p99": p99(gains_of_a_long_queue(cluster)),
        "victim_search_ms_p99": p99(victim_searches(cluster)),
        "batch_placements_per_second": batch(),
    }
