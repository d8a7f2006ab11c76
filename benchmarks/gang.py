"""Gang scheduling: how fast it decides, binds and drains, beside kube-scheduler on the same API server.

What needs no API server is in `gang_decide`. The rest runs on a real etcd and kube-apiserver with KWOK's nodes;
wall clock stands beside kube-scheduler in the same run, the order of the two alternating.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp

from benchmarks import gang_decide
from benchmarks.common import Runs, bar, reference_loop
from colocate.errors import HostUnfit
from colocate.kube.client import MERGE, NODES, PODS, Api, path_of
from colocate.kube.reflector import Reflector
from colocate.model.statistics import mean_interval
from colocate.objects import (
    Node,
    Pod,
)
from podgroup.api import POD_GROUP_LABEL, POD_GROUPS
from podgroup.demo.controlplane import ControlPlane, install

ROUNDS = 4
HOST = "kubernetes.io/hostname"
BARS = {
    "queue_share": 0.10,
    "memory_mib": 400.0,
    "capacity_seconds": 1.0,
}
QUEUE_PODS, MANY_NODES, MANY_PODS = 15_000, 5000, 20_000
CAPACITY_GANG, CAPACITY_TIMES = 32, 25
POOL_NODES = 4
CREATORS = 24
HTTP_PORT = 20179
DECIDE_SUM = "colocate_gang_decide_seconds_sum "
PLAYED = {"colocate.io/simulated": "true"}


# on an API server


class Live:
    """A control plane with KWOK's nodes, pods made by many creators, and a watch that sees them bound."""

    def __init__(self) -> None:
        self.bound: dict[str, float] = {}
        self.api: Api
        self.nodes_seen: Reflector[Node]

    async def nodes(self, names: list[str], **more: str) -> None:
        offered = {"cpu": "128", "memory": "512Gi", "pods": "500"}

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
        self, jobs: list[tuple[str, int]], scheduler: str, *, groups: bool, on: list[str] | None = None, **pool: str
    ) -> None:
        """Pods of these jobs, created together; gangs of more than one with a PodGroup for ours.

        `on` binds them to these nodes in turn, `pool` selects the nodes that they may use.
        """
        turn = itertools.cycle(on or [""])

        async def group(job: tuple[str, int]) -> None:
            body = {"apiVersion": "scheduling.x-k8s.io/v1alpha1", "kind": "PodGroup", "metadata": {"name": job[0]}}
            await self.api.request("POST", path_of(POD_GROUPS, "default"), {**body, "spec": {"minMember": job[1]}})

        async def pod(named: tuple[str, str]) -> None:
            labels = {POD_GROUP_LABEL: named[1]} if groups else {}
            container = {"name": "c", "image": "i", "resources": {"requests": {"cpu": "100m", "memory": "64Mi"}}}
            spec: dict[str, Any] = {"schedulerName": scheduler, "containers": [container]}
            spec |= {"terminationGracePeriodSeconds": 0, "nodeName": next(turn), "nodeSelector": pool}
            body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": named[0], "labels": labels}, "spec": spec}
            await self.api.request("POST", path_of(PODS, "default"), body)

        if groups:
            await self.many(group, jobs)
        await self.many(pod, [(f"{name}-{i}", name) for name, size in jobs for i in range(size)])

    def on_pod(self, _before: Pod | None, now: Pod | None) -> None:
        if now is not None and now.spec.node_name and now.metadata.name not in self.bound:
            self.bound[now.metadata.name] = time.monotonic()

    async def until_bound(self, count: int, seconds: float = 300.0) -> float:
        """When the last of so many was bound."""
        until = time.monotonic() + seconds
        while len(self.bound) < count:
            if time.monotonic() > until:
                raise HostUnfit(f"only {len(self.bound)} of {count} pods were bound in {seconds:g} s")
            await asyncio.sleep(0.05)
        return max(self.bound.values())


@contextlib.contextmanager
def scheduler_of(kind: str, plane: ControlPlane) -> Iterator[tuple[str, int]]:
    """The scheduler measured: (its name in pods, its pid)."""
    if kind == "kube-scheduler":
        plane.start_scheduler()
        yield "default-scheduler", plane.pid("kube-scheduler")
        plane.end("kube-scheduler")
        return
    command = [sys.executable, "-m", "colocate.cli.main", "controller", "--kubeconfig", str(plane.kubeconfig())]
    command += ["--lease-namespace", "default", "--http", f"127.0.0.1:{HTTP_PORT}"]
    with (plane.directory / "controller.log").open("wb") as log:
        running = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield "colocate", running.pid
    finally:
        running.send_signal(signal.SIGTERM)
        running.wait()


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _asked(path: str) -> str:
    """What our controller answers over HTTP; empty until it listens."""
    try:
        async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{HTTP_PORT}{path}") as answer:
            return await answer.text()
    except aiohttp.ClientError:
        return ""


def _rss_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return float(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1024


async def _shape(live: Live, plane: ControlPlane, kind: str, jobs: list[tuple[str, int]]) -> dict[str, float]:
    """Pods from creation to bound, by one of the two."""
    count = sum(size for _, size in jobs)
    with scheduler_of(kind, plane) as (name, pid):
        await asyncio.sleep(4)
        api, own, started = _cpu(plane.pid("kube-apiserver")), _cpu(pid), time.monotonic()
        await live.pods(jobs, name, groups=kind == "colocate" and jobs[0][1] > 1)
        created = time.monotonic()
        last = await live.until_bound(count)
        return {
            "seconds": last - started,
            "behind_creation": last - created,
            "pods_per_second": count / (last - started),
            "cpu_seconds": _cpu(pid) - own,
            "api_cpu_seconds": _cpu(plane.pid("kube-apiserver")) - api,
            "rss_mib": _rss_mib(pid),
        }


async def _burst(live: Live, plane: ControlPlane, kind: str, count: int) -> dict[str, float]:
    """Binds a second when all pods are there already and the nodes become free at once."""
    with scheduler_of(kind, plane) as (name, pid):
        await asyncio.sleep(4)
        await _cordon(live, True)
        await live.pods([("burst", count)], name, groups=kind == "colocate")
        await asyncio.sleep(3)
        started, own = time.monotonic(), _cpu(pid)
        await _cordon(live, False)
        last = await live.until_bound(count)
        return {
            "binds_per_second": count / (last - started),
            "capacity_to_last_bind": last - started,
            "cpu_seconds": _cpu(pid) - own,
        }


async def _cordon(live: Live, cordoned: bool, prefix: str = "") -> None:
    async def patch(name: str) -> None:
        body = {"spec": {"unschedulable": cordoned}}
        await live.api.request("PATCH", path_of(NODES, name=name), body, content_type=MERGE)

    names = [n.metadata.name for n in live.nodes_seen.objects.values()]
    await live.many(patch, [name for name in names if name.startswith(prefix)])


async def _capacity(live: Live, plane: ControlPlane) -> dict[str, Any]:
    """Seconds from the moment nodes are free to the last bind of a gang that waits for them, again and again."""
    found = []
    with scheduler_of("colocate", plane) as (name, _):
        await asyncio.sleep(4)
        for i in range(CAPACITY_TIMES):
            await _cordon(live, True, "pool")
            await live.pods([(f"wait{i}", CAPACITY_GANG)], name, groups=True, pool="small")
            await asyncio.sleep(1.2)  # it has been tried, and its users have been told
            started = time.monotonic()
            await _cordon(live, False, "pool")
            found.append(await live.until_bound((i + 1) * CAPACITY_GANG) - started)
    return {"seconds": found}


async def _long_queue(live: Live, plane: ControlPlane, count: int) -> dict[str, float]:
    """One-pod workloads through to bound, and the share of the time that deciding takes."""
    with scheduler_of("colocate", plane) as (name, _):
        await asyncio.sleep(4)
        started = time.monotonic()
        await live.pods([("one", count)], name, groups=False)
        last = await live.until_bound(count)
        decide = next(float(line.split()[1]) for line in (await _asked("/metrics")).splitlines() if DECIDE_SUM in line)
    return {"seconds": last - started, "decide_seconds": decide, "share": decide / (last - started)}


async def _memory(live: Live, plane: ControlPlane, nodes: int, pods: int) -> dict[str, float]:
    """Of a controller that leads a cluster of this size, every pod bound."""
    names = [f"many{i:05}" for i in range(nodes)]
    await live.nodes(names)
    await live.pods([("there", pods)], "colocate", groups=False, on=names)
    with scheduler_of("colocate", plane) as (_, pid):
        while await _asked("/readyz") != "leading\n":
            await asyncio.sleep(0.2)
        await asyncio.sleep(5)
        return {"rss_mib": _rss_mib(pid)}


@contextlib.asynccontextmanager
async def _fresh() -> AsyncIterator[tuple[Live, ControlPlane]]:
    """A control plane with 100 empty nodes, for one measurement: deleting 10,000 pods takes longer."""
    with tempfile.TemporaryDirectory() as name, ControlPlane(Path(name) / "plane", controllers=True) as plane:
        live = Live()
        async with Api.connect(str(plane.kubeconfig())) as live.api:
            await install(live.api)
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


Measure = Callable[[Live, ControlPlane], Awaitable[dict[str, Any]]]


def _plan(full: bool) -> Iterator[tuple[dict[str, Any], Measure]]:
    """Every run on an API server: what it is called, and what is done."""
    scale, rounds = (1, ROUNDS) if full else (10, 2)
    shapes = {"10000x1": (10_000, 1), "500x20": (500, 20), "20x500": (20, 500), "1x10000": (1, 10_000)}
    one = {"round": 0, "scale": scale}
    yield {"kind": "queue", **one}, partial(_long_queue, count=QUEUE_PODS // scale)
    yield {"kind": "memory", **one}, partial(_memory, nodes=MANY_NODES // scale, pods=MANY_PODS // scale)
    for round_ in range(rounds):
        yield {"kind": "capacity", "round": round_}, _capacity
        for by in ("colocate", "kube-scheduler")[:: 1 if round_ % 2 == 0 else -1]:
            key = {"by": by, "round": round_, "scale": scale}
            for shape, (jobs, size) in shapes.items():
                few = [(f"j{i}", size if jobs >= scale else size // scale) for i in range(max(jobs // scale, 1))]
                yield {"kind": "shape", "shape": shape, **key}, partial(_shape, kind=by, jobs=few)
            yield {"kind": "burst", **key}, partial(_burst, kind=by, count=10_000 // scale)


async def _on_api_server(runs: Runs, full: bool) -> None:
    for key, measure in _plan(full):
        if not runs.has(**key):
            print("gang:", *key.values(), file=sys.stderr, flush=True)
            async with _fresh() as (live, plane):
                found = await measure(live, plane)
            runs.add(**key, reference=reference_loop(), **found)


def decided() -> Runs:
    """The rounds of the part that needs no API server; those that are missing are run."""
    runs = Runs("gang-decide")
    for round_ in range(ROUNDS):
        if not runs.has(round=round_):
            print("gang: decide, round", round_ + 1, file=sys.stderr, flush=True)
            runs.add(round=round_, reference=reference_loop(), **gang_decide.measure(round_))
    return runs


def worst_decided() -> dict[str, float]:
    """Each figure, the worst of all rounds."""
    rounds = [r for r in decided().runs if "round" in r]
    return {
        name: (min if name in gang_decide.MORE_IS_BETTER else max)(r[name] for r in rounds) for name in gang_decide.BARS
    }


def summary_decided() -> list[str]:
    """A line a figure."""
    return [
        _line(f"gang, decide: {name}", value, gang_decide.BARS[name], "", least=name in gang_decide.MORE_IS_BETTER)
        for name, value in worst_decided().items()
    ]


def run(full: bool) -> list[str]:
    """Run what is missing; the summary."""
    lines = summary_decided()
    runs = Runs("gang")
    try:
        asyncio.run(_on_api_server(runs, full))
    except HostUnfit as error:
        lines.append(f"          gang, on an API server: did not run to its end: {str(error).splitlines()[0]}")
    return lines + summary(runs)


def summary(runs: Runs) -> list[str]:
    """Means with their 95 % intervals, ours beside kube-scheduler's."""
    lines = _summary_of_ours(runs)
    for kind, field, unit in (("shape", "pods_per_second", "pods/s"), ("burst", "binds_per_second", "binds/s")):
        for shape in dict.fromkeys(r.get("shape", "") for r in runs.runs if r.get("kind") == kind):
            for scale in dict.fromkeys(r["scale"] for r in runs.runs if r.get("kind") == kind):
                lines += _compared(
                    runs, {"kind": kind, "scale": scale, **({"shape": shape} if shape else {})}, field, unit
                )
    return lines


def _summary_of_ours(runs: Runs) -> list[str]:
    lines = []
    waits = sorted(s for r in runs.runs if r.get("kind") == "capacity" for s in r["seconds"])
    if waits:
        name = f"gang, capacity free to last bind of {CAPACITY_GANG}: p99 of {len(waits)} (median {median(waits):.3f})"
        lines.append(_line(name, waits[max(ceil(0.99 * len(waits)) - 1, 0)], BARS["capacity_seconds"], "s"))
    for run in (r for r in runs.runs if r.get("kind") == "queue"):
        count = QUEUE_PODS // run["scale"]
        name = f"gang, {count} one-pod workloads at {count / run['seconds']:.0f}/s: share of deciding"
        lines.append(_line(name, run["share"], BARS["queue_share"], ""))
    for run in (r for r in runs.runs if r.get("kind") == "memory"):
        name = f"gang, {MANY_NODES // run['scale']} nodes and {MANY_PODS // run['scale']} pods: resident memory"
        lines.append(_line(name, run["rss_mib"], BARS["memory_mib"], "MiB"))
    return lines


def _compared(runs: Runs, key: dict[str, Any], field: str, unit: str) -> list[str]:
    lines, ratios = [], []
    found: dict[tuple[str, int], dict[str, Any]] = {
        (r["by"], r["round"]): r for r in runs.runs if all(r.get(k) == v for k, v in key.items())
    }
    name = " ".join(str(v) for k, v in key.items() if k != "scale")
    for round_ in sorted({round_ for _, round_ in found}):
        ours, theirs = found.get(("colocate", round_)), found.get(("kube-scheduler", round_))
        if ours and theirs:
            ratios.append(ours[field] / theirs[field])
    for kind in ("colocate", "kube-scheduler"):
        mine = [r for (by, _), r in found.items() if by == kind]
        if mine:
            value = sum(r[field] for r in mine) / len(mine)
            cpu = sum(r["cpu_seconds"] for r in mine) / len(mine)
            api = [r["api_cpu_seconds"] for r in mine if "api_cpu_seconds" in r]
            its = f", the API server's {sum(api) / len(api):.1f} s" if api else ""
            lines.append(f"          gang, {name} /{key['scale']}: {kind}: {value:.0f} {unit}, {cpu:.1f} s of CPU{its}")
    if len(ratios) > 2:  # two rounds have no interval worth the name
        ratio = mean_interval(ratios)
        judged = "pass" if ratio.low >= 1 else "fail" if ratio.high < 1 else "undecided"
        lines.append(bar(f"gang, {name}: {field.replace('_', ' ')} to kube-scheduler's", judged, ratio, 1.0))
    return lines


def _line(name: str, value: float, bound: float, unit: str, *, least: bool = False) -> str:
    good = value >= bound if least else value <= bound
    return bar(name, "pass" if good else "fail", value, bound, unit)
