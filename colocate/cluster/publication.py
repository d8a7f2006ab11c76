"""`colocate publish`: carries what the agents promise over into the nodes' status, where schedulers read it.

One replica leads. A node's `kubernetes.io/batch-cpu` and `batch-memory` are what its NodeColocation says; 0 once its
agent has been silent for 150 s, by this program's own clock since the last change that it saw; and gone with the
object, which goes with its node. Nothing is written that is so already, and nothing over what another has published.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

import msgspec
import structlog

from colocate.cluster.api import (
    ANOTHER,
    BATCH_CPU,
    BATCH_MEMORY,
    CPU_REQUESTED,
    CPU_UTILIZATION,
    GPU_BORROW,
    NODE_COLOCATIONS,
    POLICIES,
    POWER,
    POWER_CURVE,
    POWER_PUBLISHED,
    PUBLISHED,
    SHADOW,
    SILENT_SECONDS,
    STOPPED,
    ColocationPolicyObject,
    NodeColocation,
    NodeColocationStatus,
    amount,
)
from colocate.cluster.evictions import Evictions
from colocate.cluster.held_back import HeldBackPods
from colocate.cluster.held_gangs import HeldGangs
from colocate.cluster.policy_status import PolicyStatuses
from colocate.kube.client import MERGE, NODES, Api, ApiError, Unreachable, age_of, path_of
from colocate.kube.lease import Election, LeadershipLost
from colocate.kube.reflector import Reflector, either
from colocate.objects import Node

OPTIONAL = {GPU_BORROW: 64, POWER: 100_000}
"""What only some nodes offer, and the most that is believed of one: cards, watts."""
BATCH_RESOURCES = (BATCH_CPU, BATCH_MEMORY, GPU_BORROW)
RESOURCES = (*BATCH_RESOURCES, POWER)
LOOK_SECONDS = 10.0
"""How often silence is looked for."""
OLD_SECONDS = 900.0
"""What was said so long ago, by the wall clock, is no word at all: clocks are not so far apart."""
AGAIN_SECONDS, WRITE_SECONDS = 2.0, 10.0
ORPHANED_SECONDS = 60.0
"""An object whose node has been gone for so long goes too."""
WRITES_AT_ONCE = 16
log = structlog.get_logger()


def wanted(status: NodeColocationStatus, node: Mapping[str, object], silent_seconds: float) -> dict[str, str | None]:
    """What a node's status is to say, by what its agent said so long ago: never more than the `node` can allot.

    What cannot be read is nothing. None is not to be there: an agent that only looks leaves its node as it is.
    """
    if status.reason in (SHADOW, ANOTHER):
        return dict.fromkeys(RESOURCES)
    most = {BATCH_CPU: amount(node.get("cpu"), 1000), BATCH_MEMORY: amount(node.get("memory")), **OPTIONAL}
    if silent_seconds >= SILENT_SECONDS:
        most = dict.fromkeys(RESOURCES, 0)
    promised = {name: max(min(amount(status.promised.get(name)), most[name]), 0) for name in RESOURCES}
    offered = {name: name not in OPTIONAL or name in status.promised for name in RESOURCES}
    return {name: str(promised[name]) if offered[name] else None for name in RESOURCES}


def watts_are_ours(node: Node, should: Mapping[str, str | None]) -> bool:
    """Whether its watts may be written: we did so, or they are offered by its agent and by nobody by hand."""
    if POWER_PUBLISHED in node.metadata.annotations:
        return True
    return should.get(POWER) is not None and not amount(node.status.allocatable.get(POWER))


def power_annotations(status: NodeColocationStatus | None, silent_seconds: float) -> dict[str, str | None]:
    """What a node's annotations are to say of its power, by what its agent said; None: not to be there."""
    power = status.power if status is not None and status.reason not in (SHADOW, STOPPED) else None
    if power is None or not power.curve or silent_seconds >= SILENT_SECONDS:
        return {POWER_CURVE: None, CPU_UTILIZATION: None, CPU_REQUESTED: None}
    curve = " ".join(f"{point.utilization:g}:{point.watts:g}" for point in power.curve)
    said = {CPU_UTILIZATION: f"{power.utilization:g}", CPU_REQUESTED: str(power.requested_milli)}
    return {POWER_CURVE: curve, **said}


def power_is_ours(node: Node) -> bool:
    """Whether its curve may be written: nobody else's is there (who sets one by hand says nothing of requests)."""
    return CPU_REQUESTED in node.metadata.annotations or POWER_CURVE not in node.metadata.annotations


def power_differs(node: Node, should: Mapping[str, str | None]) -> bool:
    """Whether its annotations say something else."""
    return any(node.metadata.annotations.get(key) != value for key, value in should.items())


def differs(status: Mapping[str, object], should: Mapping[str, str | None]) -> bool:
    """Whether a node's allocatable says something else; absent is only what should be."""
    for name, value in should.items():
        now = status.get(name)
        if (now is None) != (value is None):
            return True
        if amount(now) != amount(value):
            return True
    return False


class Publication:
    """One leader's time in office."""

    def __init__(self, api: Api, election: Election) -> None:
        self._api, self._election = api, election
        self._nodes: dict[str, Node] = {}
        self._said: dict[str, NodeColocation] = {}
        self._heard: dict[str, float] = {}
        """Node -> when its agent was heard last, monotonic."""
        self._orphaned: dict[str, float] = {}
        self._due: dict[str, None] = {}
        self._busy: set[str] = set()
        self._anothers: set[str] = set()
        """Nodes whose batch resources somebody else publishes."""
        self._promised: dict[str, list[list[int]]] = {}
        """What the agent of a node has promised first and last since we lead."""
        self._evictions = Evictions(api, election)
        self._held_back = HeldBackPods(api, election)
        self._held_gangs = HeldGangs(api, election)
        self._statuses = PolicyStatuses(api, election, self._spoken)
        self.synced = False
        """Whether it has listed what it watches."""
        self._wake = asyncio.Event()
        self._slots = asyncio.Semaphore(WRITES_AT_ONCE)
        self.writes = 0

    async def run(self, _epoch: int) -> None:
        """Lead until cancelled. Raises LeadershipLost."""
        self._election.settled = True  # a former leader's late write is seen in the watch, and written over
        try:
            async with asyncio.TaskGroup() as tasks:
                nodes: Reflector[Node] = Reflector(self._api, NODES, Node, self._on_node)
                said: Reflector[NodeColocation] = Reflector(self._api, NODE_COLOCATIONS, NodeColocation, self._on_said)
                policies: Reflector[ColocationPolicyObject] = Reflector(
                    self._api, POLICIES, ColocationPolicyObject, self._statuses.told
                )
                self._held_gangs.inherit(await self._held_back.inherit())
                for task in (nodes.run(), said.run(), policies.run()):
                    tasks.create_task(task)
                for reflector in (nodes, said):
                    await reflector.synced.wait()
                self.synced = True
                for name in set(self._held_back.nodes) - self._said.keys():
                    self._held_back.told(name, None)
                tasks.create_task(self._look_for_silence())
                tasks.create_task(self._evictions.run(self._asking))
                tasks.create_task(self._held_back.run())
                tasks.create_task(self._held_gangs.run())
                tasks.create_task(self._statuses.run())
                while True:
                    await self._wake.wait()
                    self._wake.clear()
                    for name in self._due.keys() - self._busy:
                        del self._due[name]
                        self._busy.add(name)
                        tasks.create_task(self._settle(name))
        except* LeadershipLost:  # however deep in it
            raise LeadershipLost("the lease was not renewed in time: nothing is written any more") from None

    def _look_at(self, name: str) -> None:
        self._due[name] = None
        self._wake.set()

    def _on_node(self, before: Node | None, now: Node | None) -> None:
        node = either(before, now)
        name = node.metadata.name
        if now is None:
            self._nodes.pop(name, None)
            self._anothers.discard(name)
            self._promised.pop(name, None)
            return
        self._nodes[name] = now
        if name in self._said or any(r in now.status.allocatable for r in RESOURCES):
            self._look_at(name)

    def _on_said(self, before: NodeColocation | None, now: NodeColocation | None) -> None:
        said = either(before, now)
        name = said.metadata.name
        if now is None:
            self._said.pop(name, None)
            self._heard.pop(name, None)
        else:
            self._said[name] = now
            if now.status.reason not in ("", SHADOW, ANOTHER):
                promised = [amount(now.status.promised.get(r)) for r in BATCH_RESOURCES]
                self._promised[name] = [*self._promised.get(name, [])[:1], promised]
            old = before is None and age_of(now.status.observed) > OLD_SECONDS  # a new leader need not wait to know
            if not old and (before is None or before.status.observed != now.status.observed):
                self._heard[name] = time.monotonic()
        self._look_at(name)
        if self.synced and (now is None or before is None or before.status != now.status):
            self._held_gangs.told(name, now)
            self._held_back.told(name, now)  # not what was said before this program led: it may be old
        self._evictions.wake.set()

    async def _look_for_silence(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            now = time.monotonic()
            for name in self._said:
                if self._silent_seconds(name) >= SILENT_SECONDS:
                    self._look_at(name)
                    self._held_back.told(name, None, silent=True)
                    self._held_gangs.told(name, None, silent=True)
            gone = self._said.keys() - self._nodes.keys()
            self._orphaned = {name: self._orphaned.get(name, now) for name in gone}
            for name, since in self._orphaned.items():
                if now - since >= ORPHANED_SECONDS:
                    await self._remove(name)

    async def _settle(self, name: str) -> None:
        """Make a node's status say what it should; what fails is tried again, and holds up nobody else's."""
        try:
            async with self._slots:
                await self._write(name)
        except (ApiError, Unreachable) as error:
            if not (isinstance(error, ApiError) and error.status == 404):
                log.warning("node_not_written", node=name, error=str(error))
                asyncio.get_running_loop().call_later(AGAIN_SECONDS, self._look_at, name)
        finally:
            self._busy.discard(name)
            if name in self._due:
                self._wake.set()

    async def _write(self, name: str) -> None:
        node, said = self._nodes.get(name), self._said.get(name)
        if node is None:
            return
        if said is not None and not said.status.reason and PUBLISHED not in node.metadata.annotations:
            return  # an agent has just begun: its first word may be that this node is another's
        should: dict[str, str | None] = dict.fromkeys(RESOURCES)
        if said is not None:
            should |= wanted(said.status, node.status.allocatable, self._silent_seconds(name))
        promises = any(value is not None for value in should.values())
        annotations: dict[str, str | None] = {PUBLISHED: "true" if promises else None}
        if watts_are_ours(node, should):
            annotations[POWER_PUBLISHED] = "true" if should[POWER] is not None else None
        else:
            del should[POWER]
        power = power_annotations(said.status if said is not None else None, self._silent_seconds(name))
        if not power_is_ours(node):
            power = {}
        told = {**annotations, **power}
        differ = differs(node.status.allocatable, should) or power_differs(node, power)
        if not differ or self._is_anothers(node, promises):
            return
        self._election.check()
        meta = {"annotations": told}
        body = {"metadata": meta, "status": {"capacity": should, "allocatable": should}}
        path = path_of(NODES, name=name, subresource="status")
        answer = await self._api.request(
            "PATCH", path, body, content_type=MERGE, timeout_seconds=WRITE_SECONDS, patient=False
        )
        self.writes += 1
        if name in self._nodes:  # the watch may tell later what is known by now
            self._nodes[name] = msgspec.json.decode(answer, type=Node)

    def _is_anothers(self, node: Node, promises: bool) -> bool:
        """Whether somebody else offers batch resources there: then they are his to change, and to take away.

        Nothing of them is nobody's, where an agent `promises` something: kubelet leaves zeros when it registers anew.
        So is what that very agent has promised since we lead: a publisher before us wrote it, and did not say so.
        """
        name, offered = node.metadata.name, node.status.allocatable
        if PUBLISHED in node.metadata.annotations or not any(r in offered for r in BATCH_RESOURCES):
            self._anothers.discard(name)
            return False
        amounts = [amount(offered.get(r)) for r in BATCH_RESOURCES]
        if (promises and not any(amounts)) or amounts in self._promised.get(name, ()):
            self._anothers.discard(name)
            return False
        if name in self._said and name not in self._anothers:
            log.warning("node_has_another_publisher", node=name, effect="its batch resources are left as they are")
        self._anothers.add(name)
        return True

    def _silent_seconds(self, name: str) -> float:
        return time.monotonic() - self._heard.get(name, float("-inf"))

    def _spoken(self) -> list[NodeColocation]:
        return [said for name, said in self._said.items() if self._silent_seconds(name) < SILENT_SECONDS]

    def _asking(self) -> dict[str, NodeColocation]:
        """The objects of agents that speak, and do more than compute."""
        return {
            said.metadata.name: said
            for said in self._spoken()
            if said.status.evict and said.status.reason not in (SHADOW, STOPPED)
        }

    async def _remove(self, name: str) -> None:
        """The object of a node that is gone for good."""
        try:
            await self._api.request("DELETE", path_of(NODE_COLOCATIONS, name=name), {})
        except (ApiError, Unreachable) as error:
            log.warning("object_not_removed", node=name, error=str(error))
