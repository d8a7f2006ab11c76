"""`colocate publish` on a real etcd and kube-apiserver with a thousand of KWOK's nodes, whose agents are played.

A played agent does what a real one does at the API server: it writes its NodeColocation once a minute, and at once
when what it promises has changed. What it costs while nothing changes, and how soon a wave of a hundred nodes that take
everything back is in the nodes' status, where schedulers read it.
"""

from __future__ import annotations

import asyncio
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import Runs, at_most, cpu_seconds, most_resident_mib, reference_loop
from colocate.cluster.api import (
    BATCH_CPU,
    BATCH_MEMORY,
    HEARTBEAT_SECONDS,
    NODE_API,
    NODE_COLOCATIONS,
    amount,
)
from colocate.errors import HostUnfit
from colocate.kube.client import MERGE, NODES, Api, ApiError, path_of
from colocate.kube.reflector import Reflector
from colocate.localcluster.controlplane import ControlPlane, install, with_parent
from colocate.objects import Node
from colocate.units import time_text

NODE_COUNT, WAVE_COUNT, WAVES = 1000, 100, 6
QUIET_SECONDS, SETTLE_SECONDS, PATIENCE_SECONDS = 180.0, 20.0, 120.0
CREATORS = 16
RESIDENT_MIB, WRITES_PER_MINUTE, SHRINK_SECONDS = 200.0, 1.0, 5.0
"""The bars: resident memory, writes per node and minute without change, a shrink in the node's status."""
WRITES = re.compile(
    r'^apiserver_request_total{[^}]*,resource="(\w+)"[^}]*verb="(?:POST|PUT|PATCH)"[^}]*} (\S+)$', re.MULTILINE
)


class Fleet:
    """Nodes, their played agents, and a watch on what nodes offer."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self.names = [f"n{i}" for i in range(NODE_COUNT)]
        self.promised = dict.fromkeys(self.names, 4000)
        self.offered: dict[str, tuple[int, float]] = {}
        """Node -> thousandths of a CPU in its status, and since when."""

    async def each(self, do: Any, names: list[str]) -> None:
        """Do something for each of them, several at a time."""
        waiting = iter(names)

        async def worker() -> None:
            for name in waiting:
                await do(name)

        await asyncio.gather(*(worker() for _ in range(CREATORS)))

    async def make(self, name: str) -> None:
        offered = {"cpu": "16", "memory": "64Gi", "pods": "110"}
        meta = {"name": name, "labels": {"kubernetes.io/hostname": name, "colocate.io/simulated": "true"}}
        body = {"apiVersion": "v1", "kind": "Node", "metadata": meta}
        await self._api.request("POST", NODES, {**body, "status": {"allocatable": offered, "capacity": offered}})
        kind = {"apiVersion": NODE_API, "kind": "NodeColocation", "metadata": {"name": name}}
        await self._api.request("POST", NODE_COLOCATIONS, kind)
        await self.say(name)

    async def say(self, name: str) -> None:
        """What an agent writes (agent/publisher.py)."""
        cpu = self.promised[name]
        status = {
            "promised": {BATCH_CPU: str(cpu), BATCH_MEMORY: str(cpu << 21)},
            "reason": "Promised",
            "message": f"{cpu / 1000:.2f} of 16.00 cores and 8.0 GiB of 64.0 GiB: node - reserve 0.80, 3.2 GiB - "
            "9.20, 48.0 GiB that all others may need within 1h at a risk of 1 %",
            "pressure": "NothingSuffers",
            "lastAction": "",
            "policy": {"name": "default", "uid": "", "generation": 0, "problem": ""},
            "evict": [],
            "observed": time_text(time.time()),
        }
        path = path_of(NODE_COLOCATIONS, name=name, subresource="status")
        await self._api.request("PATCH", path, {"status": status}, content_type=MERGE)

    async def live(self, name: str) -> None:
        """An agent's heartbeat, for ever; agents have not all started at once."""
        await asyncio.sleep(random.uniform(0, HEARTBEAT_SECONDS))
        while True:
            await self.say(name)
            await asyncio.sleep(HEARTBEAT_SECONDS)

    def on_node(self, _before: Node | None, now: Node | None) -> None:
        if now is not None:
            cpu = amount(now.status.allocatable.get(BATCH_CPU))
            if self.offered.get(now.metadata.name, (None, 0.0))[0] != cpu:
                self.offered[now.metadata.name] = cpu, time.perf_counter()

    async def until_offered(self, names: list[str]) -> float:
        """Since when the last of these nodes offers what its agent promises. Raises HostUnfit."""
        end = time.perf_counter() + PATIENCE_SECONDS
        while any(self.offered.get(name, (None, 0.0))[0] != self.promised[name] for name in names):
            if time.perf_counter() > end:
                raise HostUnfit(f"not within {PATIENCE_SECONDS:g} s: what agents promise is in their nodes' status")
            await asyncio.sleep(0.02)
        return max(self.offered[name][1] for name in names)

    async def writes(self) -> dict[str, float]:
        """Kind -> how often something of it was written since the API server's start."""
        found: dict[str, float] = {}
        for resource, count in WRITES.findall((await self._api.request("GET", "/metrics")).decode()):
            found[resource] = found.get(resource, 0.0) + float(count)
        return found


async def _measure(directory: Path) -> dict[str, Any]:
    plane = ControlPlane(directory / "plane")
    with plane:
        async with Api.connect(str(plane.kubeconfig())) as api:
            await install(api, "colocationpolicies", "nodecolocations")
            namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "colocate-system"}}
            await api.request("POST", "/api/v1/namespaces", namespace)
            fleet = Fleet(api)
            await _kinds_known(api)
            await fleet.each(fleet.make, fleet.names)
            watch = asyncio.create_task(Reflector(api, NODES, Node, fleet.on_node).run())
            command = [sys.executable, "-P", "-m", "colocate.cli.main", "publish", "--kubeconfig"]
            with (directory / "publish.log").open("wb") as log:
                started = time.perf_counter()
                process = subprocess.Popen(
                    with_parent(*command, str(plane.kubeconfig())), cwd=directory, stdout=log, stderr=log
                )
            try:
                first = await fleet.until_offered(fleet.names) - started
                lives = [asyncio.create_task(fleet.live(name)) for name in fleet.names]
                await asyncio.sleep(SETTLE_SECONDS)
                quiet = await _quiet(fleet, process.pid)
                waves = [await _wave(fleet, i) for i in range(WAVES)]
                resident = most_resident_mib(process.pid)
            finally:
                process.terminate()
                process.wait()
            for task in (*lives, watch):
                task.cancel()
            await asyncio.gather(*lives, watch, return_exceptions=True)
    return {"first_seconds": first, **quiet, "waves": waves, "resident_mib": resident}


async def _kinds_known(api: Api) -> None:
    while True:
        try:
            await api.request("GET", NODE_COLOCATIONS)
        except ApiError:
            await asyncio.sleep(0.1)
        else:
            return


async def _quiet(fleet: Fleet, pid: int) -> dict[str, float]:
    """While nothing changes: writes per node and minute, by agents and by the publisher, and CPU of the publisher."""
    before, spent, started = await fleet.writes(), cpu_seconds(pid), time.perf_counter()
    await asyncio.sleep(QUIET_SECONDS)
    after, elapsed = await fleet.writes(), time.perf_counter() - started
    per = {kind: (after[kind] - before.get(kind, 0.0)) * 60 / elapsed / NODE_COUNT for kind in after}
    return {
        "agents_writes": per.get("nodecolocations", 0.0),
        "publisher_writes": per.get("nodes", 0.0),
        "publisher_cores": (cpu_seconds(pid) - spent) / elapsed,
    }


async def _wave(fleet: Fleet, number: int) -> list[float]:
    """Seconds from an agent's decision to its node's status, of each node of a wave."""
    names = random.Random(number).sample(fleet.names, WAVE_COUNT)
    decided = time.perf_counter()
    for name in names:
        fleet.promised[name] = 0 if fleet.promised[name] else 4000
    await fleet.each(fleet.say, names)
    await fleet.until_offered(names)
    await asyncio.sleep(2.0)
    return sorted(fleet.offered[name][1] - decided for name in names)


def run(full: bool) -> list[str]:
    """Measure what is missing; the bars. `full`: five runs instead of two. Raises HostUnfit."""
    runs = Runs("cluster")
    for i in range(5 if full else 2):
        if not runs.has(run=i):
            with tempfile.TemporaryDirectory(prefix="colocate-bench-") as directory:
                reference = reference_loop()
                runs.add(run=i, nodes=NODE_COUNT, reference_seconds=reference, **asyncio.run(_measure(Path(directory))))
    found = [r for r in runs.runs if "run" in r]

    def middle(name: str) -> float:
        return float(statistics.median(r[name] for r in found))

    shrinks = [second for r in found for wave in r["waves"] for second in wave]
    slowest = max(shrinks)
    writes = middle("agents_writes") + middle("publisher_writes")

    rest = (
        f"          median of them {statistics.median(shrinks):.2f} s; all {NODE_COUNT} nodes written "
        f"{middle('first_seconds'):.1f} s after the publisher's start; it takes {middle('publisher_cores'):.3f} cores "
        f"while nothing changes ({len(found)} runs)"
    )
    return [
        at_most(f"publish at {NODE_COUNT} nodes: resident memory at most", middle("resident_mib"), RESIDENT_MIB, "MiB"),
        at_most(
            "writes per node and minute without change, agents and publisher", writes, WRITES_PER_MINUTE + 0.02, ""
        ),
        at_most(f"slowest node of {len(shrinks)} in waves of {WAVE_COUNT}", slowest, SHRINK_SECONDS, "s"),
        rest,
    ]
