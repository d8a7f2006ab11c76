"""Watches an API server by itself and counts what gangs did: `python -m podgroup.demo.observer KUBECONFIG`.

It knows nothing of the controller. When its input ends it prints one JSON object: gangs that started, gangs that were
found partly bound for longer than a grace, nodes that were ever promised more than they have, gangs that were whole
again after a loss, and how long each gang took from the moment that its room was free to its last bind.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from colocate.kube.client import NODES, PODS, Api
from colocate.kube.reflector import Reflector, either
from colocate.objects import Node, Pod
from podgroup.api import POD_GROUP_LABEL, POD_GROUPS, PodGroup
from podgroup.state.shape import amounts, requests_of

PARTIAL_SECONDS = 2.0


class Gang(msgspec.Struct):
    """What has been seen of one gang."""

    started: bool = False
    whole: bool = False
    """It has been, and at least one member is left."""
    partial_since: float | None = None
    partial: bool = False
    broken: bool = False
    repairs: int = 0
    ready_at: float | None = None
    """When its quorum existed."""
    took: float | None = None


class Observer:
    """Counts, from pods, nodes and groups as the API server tells of them."""

    def __init__(self) -> None:
        self.pods: dict[str, Pod] = {}
        self.nodes: dict[str, Node] = {}
        self.groups: dict[str, PodGroup] = {}
        self.gangs: dict[str, Gang] = {}
        self.overcommitted: set[str] = set()
        self.freed_at = time.monotonic()
        """When a node last got room back."""

    def on_node(self, before: Node | None, now: Node | None) -> None:
        """A node has come or gone."""
        if now is not None:
            self.nodes[now.metadata.name] = now
        elif before is not None:
            self.nodes.pop(before.metadata.name, None)
        if before is None:
            self.freed_at = time.monotonic()

    def on_group(self, before: PodGroup | None, now: PodGroup | None) -> None:
        """A group has come or gone."""
        group = either(before, now)
        if now is not None:
            self.groups[group.metadata.name] = now
        self.look(group.metadata.name)

    def on_pod(self, before: Pod | None, now: Pod | None) -> None:
        """A pod has come, changed or gone."""
        pod = either(before, now)
        if now is not None:
            self.pods[pod.metadata.uid] = now
        else:
            self.pods.pop(pod.metadata.uid, None)
        held = before is not None and bool(before.spec.node_name) and not before.terminal
        if held and (now is None or now.terminal):
            self.freed_at = time.monotonic()
        self.look(pod.metadata.labels.get(POD_GROUP_LABEL, ""))
        if now is not None and now.spec.node_name:
            self._add_up(now.spec.node_name)

    def look(self, name: str) -> None:
        """Where a gang stands."""
        group = self.groups.get(name)
        if group is None:
            return
        now, gang, least = time.monotonic(), self.gangs.setdefault(name, Gang()), group.spec.min_member
        mine = [p for p in self.pods.values() if p.metadata.labels.get(POD_GROUP_LABEL) == name]
        there = sum(bool(p.spec.node_name) and p.status.phase != "Failed" for p in mine)
        if len(mine) >= least and gang.ready_at is None:
            gang.ready_at = now
        if there >= least:
            if not gang.started and gang.ready_at is not None:
                gang.took = now - max(gang.ready_at, self.freed_at)
            gang.repairs += gang.broken
            gang.started, gang.whole, gang.broken, gang.partial_since = True, True, False, None
        elif gang.whole:
            gang.broken, gang.whole = there > 0, there > 0
        elif there:
            gang.partial_since = gang.partial_since or now
            gang.partial |= now - gang.partial_since > PARTIAL_SECONDS
        else:
            gang.partial_since = None

    def _add_up(self, name: str) -> None:
        node = self.nodes.get(name)
        if node is None:
            return
        used: dict[str, int] = {}
        for pod in self.pods.values():
            if pod.spec.node_name == name and not pod.terminal:
                for resource, amount in requests_of(pod).items():
                    used[resource] = used.get(resource, 0) + amount
        offered = amounts(node.status.allocatable)
        if any(amount > offered.get(resource, 0) for resource, amount in used.items()):
            self.overcommitted.add(name)

    def result(self) -> dict[str, Any]:
        """The counts."""
        for name in self.groups:
            self.look(name)
        gangs = self.gangs
        return {
            "gangs_started": sum(g.started for g in gangs.values()),
            "partial_gangs": sum(g.partial for g in gangs.values()),
            "overcommitted_nodes": len(self.overcommitted),
            "repaired": sum(g.repairs for g in gangs.values()),
            "capacity_to_start_seconds": {n: round(g.took, 3) for n, g in sorted(gangs.items()) if g.took is not None},
        }


@asynccontextmanager
async def watching(api: Api, seen: Observer) -> AsyncIterator[None]:
    """The observer is told of everything while this is entered."""
    watched: list[tuple[str, Any, Any]] = [
        (NODES, Node, seen.on_node),
        (POD_GROUPS, PodGroup, seen.on_group),
        (PODS, Pod, seen.on_pod),
    ]
    tasks = []
    try:
        for path, kind, handler in watched:
            reflector: Reflector[Any] = Reflector(api, path, kind, handler)
            tasks.append(asyncio.create_task(reflector.run()))
            await reflector.synced.wait()
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def observe(kubeconfig: str) -> None:
    """Until the input ends; then print the result."""
    seen = Observer()
    async with Api.connect(kubeconfig) as api, watching(api, seen):
        print("watching", flush=True)
        await asyncio.to_thread(sys.stdin.read)
    print(msgspec.json.encode(seen.result()).decode())


if __name__ == "__main__":
    asyncio.run(observe(sys.argv[1]))
