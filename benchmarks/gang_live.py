"""Gang scheduling on a real etcd and kube-apiserver with KWOK's nodes: one measurement, by one scheduler.

The schedulers get the same pods with the same labels from the same creator, on a control plane of their own that is new
for each run, with the rights of their own manifests: ours, kube-scheduler, and scheduler-plugins' coscheduling with its
shipped configuration.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from benchmarks.common import cpu_seconds, most_resident_mib
from colocate.errors import HostUnfit
from colocate.kube.client import MERGE, NODES, PODS, Api, path_of
from colocate.kube.reflector import Reflector
from colocate.localcluster.controlplane import ControlPlane, free_ports, install, with_parent
from colocate.objects import Node, Pod
from podgroup.api import POD_GROUP_LABEL, POD_GROUPS
from tools import operators, rights

HOST = "kubernetes.io/hostname"
CREATORS = 24
(HTTP_PORT,) = free_ports(1)
OURS = "colocate"
WRITES = re.compile(
    r'^apiserver_request_total{[^}]*resource="(\w+)"[^}]*verb="(?:POST|PUT|PATCH)"[^}]*} (\S+)$', re.MULTILINE
)
DECIDE_SUM = "colocate_gang_decide_seconds_sum "
PLAYED: dict[str, Any] = {"colocate.io/simulated": "true"}
QUIET_SECONDS, QUIET_DEADLINE_SECONDS = 2.0, 300.0
"""Once nothing has been written for so long, a run is over: Events follow the binds."""
CAPACITY_GANG, CAPACITY_TIMES = 32, 25
POOL_NODES, FARM_NODES = 4, 8
DRAINED, DRAINED_SIZE, DRAINED_SECONDS = 20, 8, 3.0
"""Gangs that share eight nodes, on which four of them have room, and how long each runs: 15 s are the ideal."""
Jobs = list[tuple[str, int]]
"""Names and sizes."""


class Live:
    """A control plane with KWOK's nodes, pods made by many creators, and a watch that sees them bound."""

    def __init__(self) -> None:
        self.bound: dict[str, float] = {}
        self.running: set[str] = set()
        self.api: Api
        self.nodes_seen: Reflector[Node]

    async def nodes(self, names: list[str], offered: dict[str, str] | None = None, **more: str) -> None:
        offered = {"cpu": "128", "memory": "512Gi", "pods": "500", **(offered or {})}

        async def make(name: str) -> None:
            labels = {HOST: name, **more}
            body = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}}
            await self.api.request("POST", NODES, {**body, "status": {"allocatable": offered, "capacity": offered}})

        await self.many(make, names)

    async def many(self, make: Any, items: list[Any]) -> None:
        waiting = iter(items)

        async def worker() -> None:
            for item in waiting:
                await make(item)

        await asyncio.gather(*(worker() for _ in range(CREATORS)))

    async def pods(
        self,
        jobs: Jobs,
        scheduler: str,
        *,
        gpus: int = 0,
        mixed: bool = False,
        on: list[str] | None = None,
        **pool: str,
    ) -> None:
        """Pods of these jobs, created together; those of more than one member have a PodGroup, whoever schedules them.

        `mixed` creates a member of each job in turn, `on` binds to these nodes in turn, `pool` selects the nodes that
        they may use.
        """
        turn = itertools.cycle(on or [""])

        async def group(job: tuple[str, int]) -> None:
            body = {"apiVersion": "scheduling.x-k8s.io/v1alpha1", "kind": "PodGroup", "metadata": {"name": job[0]}}
            spec = {"minMember": job[1], "scheduleTimeoutSeconds": 60 if scheduler == OURS else 10}
            await self.api.request("POST", path_of(POD_GROUPS, "default"), {**body, "spec": spec})

        async def pod(named: tuple[str, str, int]) -> None:
            labels = {POD_GROUP_LABEL: named[1]} if named[2] > 1 else {}
            asked = {"cpu": "100m", "memory": "64Mi", **({"nvidia.com/gpu": str(gpus)} if gpus else {})}
            container = {"name": "c", "image": "i", "resources": {"requests": asked, "limits": asked}}
            spec: dict[str, Any] = {"schedulerName": scheduler, "containers": [container]}
            spec |= {"terminationGracePeriodSeconds": 0, "nodeName": next(turn), "nodeSelector": pool}
            body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": named[0], "labels": labels}, "spec": spec}
            await self.api.request("POST", path_of(PODS, "default"), body)

        await self.many(group, [job for job in jobs if job[1] > 1])
        members = [(i, (f"{name}-{i}", name, size)) for name, size in jobs for i in range(size)]
        if mixed:
            members.sort(key=lambda member: member[0])
        await self.many(pod, [named for _, named in members])

    def on_pod(self, _before: Pod | None, now: Pod | None) -> None:
        if now is not None and now.spec.node_name and now.metadata.name not in self.bound:
            self.bound[now.metadata.name] = time.monotonic()
        if now is not None and now.status.phase == "Running":
            self.running.add(now.metadata.name)

    async def succeed(self, name: str) -> None:
        """A pod has done its work."""
        path, body = path_of(PODS, "default", name, "status"), {"status": {"phase": "Succeeded"}}
        await self.api.request("PATCH", path, body, content_type=MERGE)

    async def until_bound(self, count: int, seconds: float = 300.0) -> float:
        """When the last of so many was bound."""
        until = time.monotonic() + seconds
        while len(self.bound) < count:
            if time.monotonic() > until:
                raise HostUnfit(f"only {len(self.bound)} of {count} pods were bound in {seconds:g} s")
            await asyncio.sleep(0.05)
        return max(self.bound.values())

    async def writes(self) -> tuple[int, int]:
        """How often the API server was asked to write something, leases apart, and how many Events were among it."""
        found = WRITES.findall((await self.api.request("GET", "/metrics")).decode())
        counts = [(resource, float(count)) for resource, count in found if resource != "leases"]
        return int(sum(n for _, n in counts)), int(sum(n for resource, n in counts if resource == "events"))

    async def until_quiet(self) -> int:
        """How many Events there are once nothing more is written and every pod that is bound runs."""
        until = time.monotonic() + QUIET_DEADLINE_SECONDS
        before, now = (-1, -1), await self.writes()
        while now != before or len(self.running) < len(self.bound):
            if time.monotonic() > until:
                raise HostUnfit(f"something is still written after {QUIET_DEADLINE_SECONDS:g} s")
            await asyncio.sleep(QUIET_SECONDS)
            before, now = now, await self.writes()
        return now[1]

    async def cordon(self, cordoned: bool, prefix: str = "") -> None:
        async def patch(name: str) -> None:
            body = {"spec": {"unschedulable": cordoned}}
            await self.api.request("PATCH", path_of(NODES, name=name), body, content_type=MERGE)

        names = [n.metadata.name for n in self.nodes_seen.objects.values()]
        await self.many(patch, [name for name in names if name.startswith(prefix)])


@contextlib.contextmanager
def scheduler_of(kind: str, plane: ControlPlane) -> Iterator[int]:
    """The pid of the scheduler measured."""
    if kind == "kube-scheduler":
        plane.start_scheduler()
        yield plane.pid("kube-scheduler")
        plane.end("kube-scheduler")
        return
    if kind == "coscheduling":
        folder = operators.built(kind)
        if folder is None:
            raise HostUnfit("coscheduling is not built", "python -m tools.operators coscheduling")
        config = plane.directory / "coscheduling.yaml"
        config.write_text(yaml.safe_dump(_coscheduling(plane)))
        command = [str(folder / "operator"), f"--config={config}", "--secure-port=0"]
        command += [f"--{f}-kubeconfig={plane.kubeconfig('scheduler')}" for f in ("authentication", "authorization")]
    else:
        command = [sys.executable, "-m", "colocate.cli.main", "controller"]
        command += ["--kubeconfig", str(plane.kubeconfig(OURS)), "--http", f"127.0.0.1:{HTTP_PORT}"]
    log = plane.directory / f"{kind}.log"
    with log.open("wb") as file:
        running = subprocess.Popen(with_parent(*command), stdout=file, stderr=file)
    try:
        yield running.pid
    except HostUnfit as error:
        if running.poll() is not None:  # that is no finding about it
            raise HostUnfit(f"{kind} ended by itself", log.read_text()[-800:]) from error
        raise
    finally:
        running.send_signal(signal.SIGTERM)
        running.wait()


def _coscheduling(plane: ControlPlane) -> dict[str, Any]:
    """Its shipped configuration, with the rates that all schedulers get here."""
    plugins = {
        "multiPoint": {"enabled": [{"name": "Coscheduling"}]},
        "queueSort": {"enabled": [{"name": "Coscheduling"}], "disabled": [{"name": "*"}]},
    }
    timeout = {"name": "Coscheduling", "args": {"permitWaitingTimeSeconds": 10}}
    return {
        "apiVersion": "kubescheduler.config.k8s.io/v1",
        "kind": "KubeSchedulerConfiguration",
        "leaderElection": {"leaderElect": False},
        "clientConnection": {"kubeconfig": str(plane.kubeconfig("scheduler")), "qps": 5000, "burst": 5000},
        "profiles": [{"schedulerName": "default-scheduler", "plugins": plugins, "pluginConfig": [timeout]}],
    }


def _name(kind: str) -> str:
    return OURS if kind == OURS else "default-scheduler"


async def _asked(path: str) -> str:
    """What our controller answers over HTTP; empty until it listens."""
    try:
        async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{HTTP_PORT}{path}") as answer:
            return await answer.text()
    except aiohttp.ClientError:
        return ""


async def burst(live: Live, plane: ControlPlane, kind: str, jobs: Jobs) -> dict[str, float]:
    """All pods are there and have been looked at, and the nodes become free at once."""
    count = sum(size for _, size in jobs)
    await live.cordon(True)
    await live.pods(jobs, _name(kind))
    with scheduler_of(kind, plane) as pid:
        await asyncio.sleep(8)
        server = plane.pid("kube-apiserver")
        before = await live.until_quiet()
        own, api, started = cpu_seconds(pid), cpu_seconds(server), time.monotonic()
        await live.cordon(False)
        last = await live.until_bound(count)
        events = await live.until_quiet() - before
        return {
            "binds_per_second": count / (last - started),
            "cpu_per_pod_ms": (cpu_seconds(pid) - own) / count * 1e3,
            "api_cpu_per_pod_ms": (cpu_seconds(server) - api) / count * 1e3,
            "until_quiet_seconds": time.monotonic() - started,
            "events": events,
            "rss_mib": most_resident_mib(pid),
        }


async def waiting(live: Live, plane: ControlPlane, kind: str, jobs: Jobs) -> dict[str, float]:
    """All pods are there before the scheduler starts: from its start to the last bind."""
    count, server = sum(size for _, size in jobs), plane.pid("kube-apiserver")
    await live.pods(jobs, _name(kind))
    before = await live.until_quiet()
    api, started = cpu_seconds(server), time.monotonic()
    with scheduler_of(kind, plane) as pid:
        last = await live.until_bound(count)
        events = await live.until_quiet() - before
        return {
            "binds_per_second": count / (last - started),
            "to_first_bind_seconds": min(live.bound.values()) - started,
            "cpu_per_pod_ms": cpu_seconds(pid) / count * 1e3,
            "api_cpu_per_pod_ms": (cpu_seconds(server) - api) / count * 1e3,
            "events": events,
            "rss_mib": most_resident_mib(pid),
        }


async def capacity(live: Live, plane: ControlPlane, kind: str) -> dict[str, Any]:
    """Seconds from the moment nodes are free to the last bind of a gang that waits for them, again and again."""
    found, spread = [], []
    with scheduler_of(kind, plane):
        await asyncio.sleep(4)
        for i in range(CAPACITY_TIMES):
            await live.cordon(True, "pool")
            await live.pods([(f"wait{i}", CAPACITY_GANG)], _name(kind), pool="small")
            await asyncio.sleep(1.2)  # it has been tried, and its users have been told
            started = time.monotonic()
            await live.cordon(False, "pool")
            found.append(await live.until_bound((i + 1) * CAPACITY_GANG) - started)
            binds = [at for name, at in live.bound.items() if name.startswith(f"wait{i}-")]
            spread.append(max(binds) - min(binds))
    return {"seconds": found, "spread_seconds": spread}


async def drain(live: Live, plane: ControlPlane, kind: str) -> dict[str, float]:
    """Gangs that compete for room: until all have run, and the time in which the room of a gang was free in vain."""
    farm = [f"farm{i}" for i in range(FARM_NODES)]
    await live.nodes(farm, {"nvidia.com/gpu": "8"}, farm="gpu", **PLAYED)
    jobs, left = [(f"gang{i:02}", DRAINED_SIZE) for i in range(DRAINED)], {f"gang{i:02}" for i in range(DRAINED)}
    at_once = FARM_NODES * 8 // (2 * DRAINED_SIZE)
    with scheduler_of(kind, plane):
        await asyncio.sleep(4)
        started = time.monotonic()
        await live.pods(jobs, _name(kind), gpus=2, mixed=True, farm="gpu")
        ends: dict[str, float] = {}
        idle, partly, before = 0.0, 0.0, time.monotonic()
        while left:
            await asyncio.sleep(0.02)
            now = time.monotonic()
            if now - started > 240:
                raise HostUnfit(f"{kind}: {len(left)} gangs have not run after 240 s")
            bound = {g: sum(f"{g}-{i}" in live.bound for i in range(DRAINED_SIZE)) for g in left}
            some = sum(0 < many < DRAINED_SIZE for many in bound.values())
            whole = [g for g, many in bound.items() if many == DRAINED_SIZE]
            idle += (now - before) * max(0, min(at_once, len(left)) - len(whole) - some)
            partly += (now - before) * some
            before = now
            for gang in whole:
                ends.setdefault(gang, max(live.bound[f"{gang}-{i}"] for i in range(DRAINED_SIZE)) + DRAINED_SECONDS)
            for gang in [g for g in whole if now >= ends[g]]:
                left.discard(gang)
                await live.many(live.succeed, [f"{gang}-{i}" for i in range(DRAINED_SIZE)])
        return {"seconds": time.monotonic() - started, "idle_gang_seconds": idle, "partly_gang_seconds": partly}


async def long_queue(live: Live, plane: ControlPlane, count: int) -> dict[str, float]:
    """One-pod workloads through to bound, and the share of the time that deciding takes."""
    with scheduler_of(OURS, plane):
        await asyncio.sleep(4)
        started = time.monotonic()
        await live.pods([(f"one{i}", 1) for i in range(count)], OURS)
        last = await live.until_bound(count)
        decide = next(float(line.split()[1]) for line in (await _asked("/metrics")).splitlines() if DECIDE_SUM in line)
    return {"seconds": last - started, "decide_seconds": decide, "share": decide / (last - started)}


async def memory(live: Live, plane: ControlPlane, nodes: int, pods: int) -> dict[str, float]:
    """Of a controller that leads a cluster of this size, every pod bound."""
    names = [f"many{i:05}" for i in range(nodes)]
    await live.nodes(names)
    await live.pods([(f"there{i}", 1) for i in range(pods)], OURS, on=names)
    with scheduler_of(OURS, plane) as pid:
        while await _asked("/readyz") != "leading\n":
            await asyncio.sleep(0.2)
        await asyncio.sleep(5)
        return {"rss_mib": most_resident_mib(pid)}


@contextlib.asynccontextmanager
async def fresh() -> AsyncIterator[tuple[Live, ControlPlane]]:
    """A control plane with 100 empty nodes, for one measurement: deleting 10,000 pods takes longer."""
    with tempfile.TemporaryDirectory() as name, ControlPlane(Path(name) / "plane", controllers=True) as plane:
        live = Live()
        async with Api.connect(str(plane.kubeconfig())) as live.api:
            await install(live.api)
            await rights.grant(live.api)
            await rights.grant_scheduler(live.api)
            await live.nodes([f"n{i:05}" for i in range(100)], **PLAYED)
            await live.nodes([f"pool{i}" for i in range(POOL_NODES)], pool="small", **PLAYED)
            live.nodes_seen = Reflector(live.api, NODES, Node, lambda _before, _now: None)
            pods: Reflector[Pod] = Reflector(live.api, PODS, Pod, live.on_pod)
            watching = [asyncio.create_task(r.run()) for r in (live.nodes_seen, pods)]
            try:
                await pods.synced.wait()
                await asyncio.sleep(4)
                yield live, plane
            finally:
                for task in watching:
                    task.cancel()
                await asyncio.gather(*watching, return_exceptions=True)
