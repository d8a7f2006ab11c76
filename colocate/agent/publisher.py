"""The node's side of the API server: which pods run here, and what batch may have of this node.

Pods are watched by the name of their node; while the API server is away, what was known last and the cgroups themselves
go on being the truth. What the allocatable law says is written into this node's own NodeColocation at once when it
changes, and once a minute when it does not; a cluster-wide controller carries it over into the node's status
(cluster/publication.py), so this program needs no right on nodes.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterable, Mapping
from math import ceil
from typing import Any

import msgspec
import structlog

from colocate.actuate.statedir import SHARE_FILE
from colocate.agent.held_back import HeldBack
from colocate.agent.loop import Agent, Tick
from colocate.agent.node_power import PowerWatch, differs
from colocate.agent.policies import Policies
from colocate.cluster.api import (
    ANOTHER,
    BATCH_CPU,
    BATCH_MEMORY,
    GPU_BORROW,
    HEARTBEAT_SECONDS,
    NODE_API,
    NODE_COLOCATIONS,
    POLICIES,
    POWER,
    POWER_CLASS,
    POWER_DEADLINE,
    POWER_RESOURCES,
    POWER_WORK,
    SHADOW,
    STOPPED,
    ColocationPolicyObject,
    NodeColocation,
    NodePower,
    PodHeldBack,
    PodToEvict,
    PowerNeed,
    PowerNeeds,
    amount,
    gang_of,
    whole,
)
from colocate.cluster.card_memory import declared_bytes
from colocate.decide.allocatable import LAW
from colocate.decide.lending import lendable
from colocate.errors import ColocateError
from colocate.kube.client import MERGE, PODS, Api, ApiError, Unreachable, age_of, path_of, pause
from colocate.kube.events import MESSAGE_CHARACTERS
from colocate.kube.reflector import Reflector, either
from colocate.objects import GANG_HELD, Container, Quantities
from colocate.objects import Pod as PodObject
from colocate.observe.peers import PEERS, publishers
from colocate.observe.pods import BatchRequest, Pod, by_id
from colocate.plan import PowerNeeds as PlannedNeeds
from colocate.plan import Verdict
from colocate.units import MOST_BYTES, MOST_CORES, parse_duration, parse_quantity, parse_time, time_text

MOST_ATTEMPTS, AGAIN_SECONDS, LOOK_SECONDS = 6, 30.0, 2.0
GANGS_SECONDS = 2.0
"""Between two words of frozen gangs: others stand still by them."""
NEEDS_SECONDS, NEEDS_RATIO = 10.0, 0.02
"""What watts are needed for is told so often at most, and where it has changed by so much of what is asked for."""
HELD_BACK_SECONDS = 10.0
"""Who is held back is told at most so often: it changes with the load of the services."""
CONFIG_HASH, MIRROR = "kubernetes.io/config.hash", "kubernetes.io/config.mirror"
"""On the mirror of a static pod: what kubelet calls the pod by, and its cgroup."""
log = structlog.get_logger()


def asked(pod: PodObject) -> tuple[float, int]:
    """Cores and bytes that a pod requests: its containers together, or what it says for itself (KEP-2837)."""
    sidecars = [c for c in pod.spec.init_containers if c.restart_policy == "Always"]
    containers: Iterable[Container] = (*pod.spec.containers, *sidecars)
    cores, size = 0.0, 0
    for requests in (c.resources.requests for c in containers):
        cores += _cores(requests)
        size += _bytes(requests)
    whole = pod.spec.resources.requests
    return _cores(whole) if "cpu" in whole else cores, _bytes(whole) if "memory" in whole else size


def _cores(requests: Quantities) -> float:
    return min(float(parse_quantity(requests.get("cpu", 0))), MOST_CORES)


def _bytes(requests: Quantities) -> int:
    return min(int(parse_quantity(requests.get("memory", 0))), MOST_BYTES)


def batch_requests(pod: PodObject) -> dict[str, BatchRequest]:
    """What its containers ask for of batch resources, by name; only batch pods may."""
    found = {}
    for container in (*pod.spec.containers, *pod.spec.init_containers):
        requests, limits = container.resources.requests, container.resources.limits
        borrows = bool(_whole(requests.get(GPU_BORROW)))
        if BATCH_CPU in requests or BATCH_MEMORY in requests or borrows:
            found[container.name] = BatchRequest(
                cpu_milli=_whole(requests.get(BATCH_CPU)),
                cpu_limit_milli=_whole(limits.get(BATCH_CPU)),
                memory_limit_bytes=_whole(limits.get(BATCH_MEMORY)),
                borrows=borrows,
                passing=container in pod.spec.init_containers and container.restart_policy != "Always",
            )
    return found


def _needs(found: PlannedNeeds | None) -> PowerNeeds | None:
    if found is None:
        return None
    least = [PowerNeed(slowdown=slowdown, watts=ceil(watts)) for slowdown, watts in found.least]
    return PowerNeeds(asked=ceil(found.asked), least=least)


def needs_differ(before: PowerNeeds | None, now: PowerNeeds | None) -> bool:
    """Whether a change is worth telling."""
    if before is None or now is None:
        return before is not now
    pairs = zip(before.least, now.least, strict=True)
    return any(abs(a.watts - b.watts) > NEEDS_RATIO * now.asked for a, b in pairs)


def _whole(quantity: str | float | None) -> int | None:
    return None if quantity is None else min(int(parse_quantity(quantity)), MOST_BYTES)


def pod_of(found: PodObject, monotonic: float) -> Pod | None:
    """What the observer needs of a pod; None of one that is not understood, or has ended."""
    if found.terminal:
        return None
    meta = found.metadata
    made = (*found.status.container_statuses, *found.status.init_container_statuses)
    static = MIRROR in meta.annotations and any(o.kind == "Node" for o in meta.owner_references)
    try:
        cores, size = asked(found)
        batch = {} if static else batch_requests(found)  # kubelet alone makes static ones
    except ValueError as error:
        log.warning("pod_not_understood", pod=f"{meta.namespace}/{meta.name}", error=str(error))
        return None
    return Pod(
        uid=meta.annotations.get(CONFIG_HASH, meta.uid) if static else meta.uid,
        name=meta.name,
        namespace=meta.namespace,
        labels=meta.labels,
        asked_cores=cores,
        asked_bytes=size,
        started_seconds=monotonic - min(max(age_of(meta.creation_timestamp), 0.0), 1e9),
        leaving=found.deleting,
        batch=batch,
        gang=gang_of(meta),
        containers=by_id((c.container_id, c.name) for c in made),
        gang_held=next((c.message for c in found.status.conditions if (c.type, c.status) == (GANG_HELD, "True")), ""),
        gpu_memory_bytes=_declared(found),
        power_watts=_together(found, POWER_RESOURCES) or None,
        power_class=meta.labels.get(POWER_CLASS) or meta.annotations.get(POWER_CLASS, ""),
        cards=_together(found, GPUS),
        **_deadline(found, monotonic),
    )


def _deadline(pod: PodObject, monotonic: float) -> dict[str, float]:
    """Both, or nothing: one alone says nothing."""
    said = pod.metadata.annotations
    if POWER_DEADLINE not in said and POWER_WORK not in said:
        return {}
    name = f"{pod.metadata.namespace}/{pod.metadata.name}"
    try:
        due, work = parse_time(said.get(POWER_DEADLINE, "")), parse_duration(said.get(POWER_WORK, ""))
    except ValueError as error:
        log.warning("power_deadline_not_understood", pod=name, error=str(error), effect="it has none")
        return {}
    if work <= 0.0:
        log.warning("power_deadline_not_understood", pod=name, error=f"{POWER_WORK} is 0", effect="it has none")
        return {}
    return {"due_seconds": monotonic + due - time.time(), "work_seconds": work}


GPUS = ("nvidia.com/gpu", "amd.com/gpu", GPU_BORROW)


def _together(pod: PodObject, names: Iterable[str]) -> int:
    """What its containers ask for of any of these resources; those that come before the others, one after the other,
    count where one of them alone asks for more."""

    def of(container: Container) -> int:
        return sum(amount(container.resources.requests.get(name)) for name in names)

    first = [c for c in pod.spec.init_containers if c.restart_policy != "Always"]
    stay = [*pod.spec.containers, *(c for c in pod.spec.init_containers if c.restart_policy == "Always")]
    return max([sum(map(of, stay)), *map(of, first)])


def _declared(pod: PodObject) -> int | None:
    try:
        return declared_bytes(pod)
    except ValueError as error:
        log.warning("gpu_memory_not_understood", pod=f"{pod.metadata.namespace}/{pod.metadata.name}", error=str(error))
        return None


class Publisher:
    """Of one agent, from its start to its end."""

    def __init__(self, agent: Agent, policies: Policies, node: str, power: PowerWatch, *, shadow: bool) -> None:
        self._agent, self._policies, self._node, self._shadow = agent, policies, node, shadow
        self._path = path_of(NODE_COLOCATIONS, name=node, subresource="status")
        self._verdict: Verdict | None = None
        self._changed = asyncio.Event()
        self._pods: dict[str, Pod] = {}
        self._told_to_go: list[PodToEvict] = []
        self._held_back, self._told_held_back = HeldBack(), list[PodHeldBack]()
        self._held_back_at = float("-inf")
        self._told_lent: int | None = None
        self._told_gangs, self._gangs_at = dict[str, str](), float("-inf")
        self._power, power.wanted = power, True
        self._told_power: NodePower | None = None
        self._power_at = float("-inf")
        self._told_in_force: int | None = None
        self._told_needs: PowerNeeds | None = None
        self._needs_at = float("-inf")
        kept = agent.state.load(SHARE_FILE) if agent.state is not None else None
        if kept is not None and isinstance(kept.get("watts"), int):
            agent.observer.power_share = max(kept["watts"], 0)  # until the API server says otherwise
        self._others: list[str] = []
        """Programs that offer batch resources of this node too."""
        agent.on_tick.append(self._on_tick)
        agent.observer.lister.expected = True

    async def run(self) -> None:
        """Until cancelled. Whatever goes wrong here is said and begun anew: services are protected all the same."""
        while True:
            try:
                await self._run()
            except Exception as error:
                why = error.exceptions[0] if isinstance(error, ExceptionGroup) else error
                self._agent.observer.extra_problems["api"] = f"nothing is published: {why}"
                log.exception("not_published", error=str(why))
                await asyncio.sleep(AGAIN_SECONDS)

    async def _run(self) -> None:
        async with Api.connect() as api:
            path, query = PODS, {"fieldSelector": f"spec.nodeName={self._node}"}
            pods: Reflector[PodObject] = Reflector(api, path, PodObject, self._on_pod, query)
            query = {"fieldSelector": f"metadata.name={self._policies.name}"}
            policies: Reflector[ColocationPolicyObject] = Reflector(
                api, POLICIES, ColocationPolicyObject, lambda _, now: self._policies.told(now), query
            )
            query = {"fieldSelector": f"metadata.name={self._node}"}
            mine: Reflector[NodeColocation] = Reflector(api, NODE_COLOCATIONS, NodeColocation, self._on_mine, query)
            self._pods.clear()  # what has gone meanwhile nobody tells of
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(pods.run())
                tasks.create_task(policies.run())
                tasks.create_task(mine.run())
                tasks.create_task(self._tell_of_policy())
                tasks.create_task(self._tell_observer(pods))
                tasks.create_task(self._tell_of_problems({"pods": pods, "policies": policies, "NodeColocations": mine}))
                await self._publish(api)

    def _on_pod(self, before: PodObject | None, now: PodObject | None) -> None:
        about = either(before, now)
        pod = pod_of(now, time.monotonic()) if now is not None else None
        if pod is not None:
            self._pods[about.metadata.uid] = pod
        else:
            self._pods.pop(about.metadata.uid, None)
        if self._agent.observer.lister.watched:
            self._agent.observer.lister.told(self._by_cgroup())

    def _on_mine(self, _before: NodeColocation | None, now: NodeColocation | None) -> None:
        """What the cluster leaves to this node; of one that is gone for a moment what was said last counts."""
        if now is not None and now.spec.power_watts != self._agent.observer.power_share:
            self._agent.set_power_share(now.spec.power_watts)

    def _by_cgroup(self) -> dict[str, Pod]:
        """By the uid that kubelet calls their cgroups by; who only says that his is another's does not become that."""
        static = {pod.uid: pod for uid, pod in self._pods.items() if pod.uid != uid}
        return static | {uid: pod for uid, pod in self._pods.items() if pod.uid == uid}

    async def _tell_observer(self, pods: Reflector[PodObject]) -> None:
        await pods.synced.wait()
        self._agent.observer.lister.told(self._by_cgroup())

    async def _tell_of_problems(self, watched: Mapping[str, Reflector[Any]]) -> None:
        while True:
            for what, reflector in watched.items():
                if reflector.problem:
                    self._agent.observer.extra_problems[what] = f"{what} are not watched: {reflector.problem}"
                else:
                    self._agent.observer.extra_problems.pop(what, None)
            await asyncio.sleep(LOOK_SECONDS)

    async def _tell_of_policy(self) -> None:
        while True:
            await self._policies.changed.wait()
            self._policies.changed.clear()
            self._changed.set()

    def _on_tick(self, tick: Tick) -> None:
        verdict = next((v for v in tick.plan.verdicts if v.law == LAW), None)
        if verdict is None:
            return
        leaving, lent = self._leaving(), self._lent(tick)
        if (
            self._verdict is None
            or promised_by(verdict) != promised_by(self._verdict)
            or (leaving, lent) != (self._told_to_go, self._told_lent)
        ):
            self._changed.set()
        self._told_lent = lent
        self._verdict, self._told_to_go = verdict, leaving
        now = tick.snapshot.monotonic_seconds
        in_force = self._in_force()
        if in_force != self._told_in_force:
            self._told_in_force = in_force
            self._changed.set()
        needs = _needs(tick.plan.power_needs)
        asked, told = (said and said.asked for said in (needs, self._told_needs))
        if asked != told or (now - self._needs_at >= NEEDS_SECONDS and needs_differ(self._told_needs, needs)):
            self._told_needs, self._needs_at = needs, now
            self._changed.set()
        due = now - self._power_at >= HEARTBEAT_SECONDS
        if due and differs(self._told_power, power := self._power_now()):
            self._told_power, self._power_at = power, now
            self._changed.set()
        gangs = self._held_back.frozen_gangs(tick.snapshot, self._agent.laws)
        if gangs.keys() != self._told_gangs.keys() and now - self._gangs_at >= GANGS_SECONDS:
            self._told_gangs, self._gangs_at = gangs, now
            self._changed.set()
        held_back = self._held_back.look(tick.snapshot, tick.forecast, tick.plan, self._agent.laws)
        if held_back != self._told_held_back and now - self._held_back_at >= HELD_BACK_SECONDS:
            self._told_held_back, self._held_back_at = held_back, now
            self._changed.set()

    def _lent(self, tick: Tick) -> int | None:
        """How many cards services of this node lend; None where that is not offered."""
        spec = self._agent.policy.spec
        return len(lendable(tick.snapshot, spec)) if spec.gpu.borrow else None

    def _leaving(self) -> list[PodToEvict]:
        """The batch pods that the eviction law has told to go; by their cgroups, and so by uids of this node's pods."""
        found, grace = [], ceil(self._agent.policy.spec.memory.termination_grace)
        for id_, eviction in sorted(self._agent.laws.eviction.under_way.items()) if not self._shadow else ():
            pod = self._pods.get(id_.removeprefix("pod:")) if id_.startswith("pod:") else None
            if pod is not None and eviction.asked and self._agent.may_be_ended(id_):
                found.append(
                    PodToEvict(
                        namespace=pod.namespace,
                        name=pod.name,
                        uid=pod.uid,
                        reason=eviction.reason,
                        message=eviction.message[:MESSAGE_CHARACTERS],
                        grace_seconds=grace,
                    )
                )
        return found

    async def _publish(self, api: Api) -> None:
        """Write what has changed at once, and the rest once a minute."""
        attempt = 0
        while True:
            try:
                async with asyncio.timeout(HEARTBEAT_SECONDS):
                    await self._changed.wait()
            except TimeoutError:
                pass
            self._changed.clear()
            if self._verdict is None:
                continue
            await self._look_for_others()
            try:
                await self._write(api, self._verdict)
                self._agent.observer.extra_problems.pop("api", None)
                attempt = 0
            except (ApiError, Unreachable) as error:
                self._agent.observer.extra_problems["api"] = f"what batch may have is not published: {error}"
                log.warning("not_published", error=str(error))
                self._changed.set()
                await pause(error, min(attempt, MOST_ATTEMPTS), random.random())
                attempt += 1

    async def _look_for_others(self) -> None:
        """Two that offer the same resources by two laws would write against each other: then it is not ours."""
        found = await asyncio.to_thread(publishers, self._agent.port)
        if found == self._others:
            return
        self._others = found
        problems = self._agent.observer.extra_problems
        problems.pop("peers", None)
        if found:
            peer = PEERS[found[0]]
            problems["peers"] = f"nothing is published, for {' and '.join(found)} is here: {peer.does}; {peer.mend}"
        for name in found:
            log.warning("another_agent", program=name, does=PEERS[name].does, mend=PEERS[name].mend)

    async def _write(self, api: Api, verdict: Verdict) -> None:
        path, body = self._path, {"status": self._status(verdict)}
        try:
            await api.request("PATCH", path, body, content_type=MERGE)
        except ApiError as error:
            if error.status != 404:
                raise
            kind = {"apiVersion": NODE_API, "kind": "NodeColocation", "metadata": {"name": self._node}}
            await api.request("POST", NODE_COLOCATIONS, kind)
            await api.request("PATCH", path, body, content_type=MERGE)

    def _status(self, verdict: Verdict) -> Mapping[str, object]:
        last, notes = self._agent.last, self._agent.lately.notes
        cpu = next((v for v in last.plan.verdicts if v.law == "cpu"), None) if last is not None else None
        action = f"{notes[-1].workload}: {notes[-1].what}" if notes else ""
        reason, message = verdict.reason, verdict.message
        curve = [whole(point) for point in self._told_power.curve] if self._told_power is not None else []
        least = [whole(point) for point in self._told_needs.least] if self._told_needs is not None else []
        if self._others:
            reason, message = ANOTHER, self._agent.observer.extra_problems["peers"]
        return {
            "promised": {**promised_by(verdict)[1], **self._offered()},
            "reason": SHADOW if self._shadow else reason,
            "message": message[:MESSAGE_CHARACTERS],
            "pressure": cpu.reason if cpu is not None else "",
            "lastAction": action,
            "policy": whole(self._policies.in_force),
            "evict": [msgspec.to_builtins(pod) for pod in self._told_to_go],
            "heldBack": [msgspec.to_builtins(pod) for pod in self._told_held_back],
            "frozenGangs": [{"gang": gang, "message": why} for gang, why in sorted(self._told_gangs.items())],
            "powerWatts": self._in_force(),
            "power": None if self._told_power is None else {**whole(self._told_power), "curve": curve},
            "powerNeeds": None if self._told_needs is None else {**whole(self._told_needs), "least": least},
            "observed": time_text(time.time()),
        }

    def _in_force(self) -> int | None:
        watts = self._agent.power_in_force()
        return None if self._shadow or watts is None else ceil(watts)

    def _power_now(self) -> NodePower | None:
        told = self._power.told()
        if told is None:
            return None
        batch = sum(int(r.cpu_milli or 0) for pod in self._pods.values() for r in pod.batch.values())
        asked = sum(pod.asked_cores or 0.0 for pod in self._pods.values())
        return msgspec.structs.replace(told, requested_milli=round(1000 * asked) + batch)

    def _offered(self) -> dict[str, str | None]:
        """A merge patch keeps what it does not name."""
        watts = self._agent.policy.spec.power.offer
        return {
            GPU_BORROW: None if self._told_lent is None else str(self._told_lent),
            POWER: str(watts) if watts else None,
        }

    async def stopped(self) -> None:
        """Nothing is promised any more: the agent ends in order."""
        try:
            async with Api.connect() as api, asyncio.timeout(2.0):
                nothing = {BATCH_CPU: "0", BATCH_MEMORY: "0"}
                nothing |= {name: "0" for name, value in self._offered().items() if value is not None}
                why = {"reason": STOPPED, "message": "the agent of this node was stopped"}
                status = {"promised": nothing, "evict": [], "heldBack": [], "frozenGangs": [], **why}
                await api.request("PATCH", self._path, {"status": status}, content_type=MERGE)
        except (ColocateError, TimeoutError) as error:
            log.warning("end_not_published", error=str(error))


def promised_by(verdict: Verdict) -> tuple[str, Mapping[str, str]]:
    """The reason, and the node's batch resources, in thousandths of a CPU and in bytes."""
    numbers = verdict.numbers
    return verdict.reason, {
        BATCH_CPU: str(int(numbers["batch_cpu_milli"])),
        BATCH_MEMORY: str(int(numbers["batch_memory_bytes"])),
    }
