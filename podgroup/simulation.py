"""The controller's own queue and solver on a simulated fleet: `colocate simulate --policy ours`.

What decides is the production code, unmodified, on objects as the API server has them; binding succeeds at once, and
the clock is the simulation's. Found by the entry points `colocate.simulate`.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from colocate.errors import BadInput
from colocate.objects import (
    Container,
    Node,
    NodeStatus,
    ObjectMeta,
    OwnerReference,
    Pod,
    PodSpec,
    PodStatus,
    Quantities,
    Resources,
)
from colocate.units import time_text
from podgroup.api import POD_GROUP_LABEL, GangPlan, GangPlanSpec, GangPlanStatus, PodGroup, PodGroupSpec
from podgroup.queue.entry import Settings
from podgroup.queue.queue import Queue
from podgroup.queue.runtimes import RUNTIME
from podgroup.solve.sequence import place_in_turn
from podgroup.state.cluster import Cluster
from podgroup.state.gangs import gang_key

GPU, RACK, BLOCK = "nvidia.com/gpu", "topology.kubernetes.io/rack", "topology.kubernetes.io/zone"
NAMESPACE = "sim"
WHOLE = 1000
MOST_CYCLES = 100
"""In one moment: a queue that decides more has not come to rest."""
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class NodesLike(Protocol):
    """Columns of nodes (see colocate.simulate.placement.Nodes)."""

    cpu_milli: Ints
    memory_mib: Ints
    gpus: Ints
    model: Ints
    rack: Ints
    block: Ints


class KindsLike(Protocol):
    """Columns of kinds of pods (see colocate.simulate.placement.Kinds)."""

    cpu_milli: Ints
    memory_mib: Ints
    gpus: Ints
    gpu_milli: Ints
    priority: Ints


class WorkLike(Protocol):
    """Columns of jobs (see colocate.simulate.running.Work)."""

    submit: Floats
    run: Floats
    kind: Ints
    members: Ints
    least: Ints
    across: Floats


def _name(job: int) -> str:
    """By which the queue orders who came in the same second."""
    return f"j{job:09d}"


def _job(key: str) -> int:
    return int(key.rpartition("/j")[2])


class OutagesLike(Protocol):
    """Nodes that fail, and what being stopped costs (see colocate.simulate.outages.Outages)."""

    at: Floats
    node: Ints
    down: NDArray[np.bool_]
    restart: float
    until: float

    def saved(self, worked: float, left: float) -> float:
        """Of so many seconds of work of a job that had so many left, those that are not lost when it is stopped."""
        ...


class PacesLike(Protocol):
    """How fast jobs run by their GPUs (see colocate.simulate.paces.Paces)."""

    def of(self, job: int, more: int, gpus: Ints) -> float | None:
        """Seconds that a second of its work takes on nodes with these kinds of GPUs; None: it is not said."""
        ...


Found = tuple[Floats, float, float, int, Ints, Floats, float, int, float, bool, float]
"""The columns of colocate.simulate.fleet.Run."""


class Running(msgspec.Struct):
    """A job that runs: on what, and how fast. Seconds."""

    pods: list[int]
    gpus: int
    since: float
    """From then on it works at this pace."""
    pace: float
    """What a second of its work takes."""
    over: float
    done: float = 0.0
    """Of its work, until `since`."""
    told: float = 0.0
    """The part of it that is in the sum of all work."""
    spent: float = 0.0
    """Times GPUs, until `spent_at`."""
    spent_at: float = 0.0
    paused: float = 0.0
    """Times GPUs, in which it began again."""

    def put_down(self, now: float, last: float) -> float:
        """What it has done until now; the part of it until `last`."""
        if now <= self.since:
            return 0.0
        told = max(min(now, last) - self.since, 0.0) / self.pace
        self.done, self.since, self.told = self.done + (now - self.since) / self.pace, now, self.told + told
        return told

    def lost(self, now: float, kept: float) -> float:
        """Of all that its GPUs spent on its work, times GPUs, what was not spent on the part that is kept."""
        total = self.spent + self.gpus * max(now - self.spent_at, 0.0)
        pauses = self.paused - self.gpus * max(self.since - now, 0.0)
        return total - kept / self.done * (total - pauses) if kept else total


class Simulation:
    """One run: the cluster, its queue, and who is where."""

    def __init__(
        self,
        nodes: NodesLike,
        kinds: KindsLike,
        work: WorkLike,
        outages: OutagesLike | None = None,
        paces: PacesLike | None = None,
        *,
        declared: bool,
    ) -> None:
        """`declared`: jobs say how long they will run. Raises BadInput of a request for a part of a GPU."""
        if ((kinds.gpu_milli < WHOLE) & (kinds.gpus > 0)).any():
            text = "a job asks for a part of a GPU, which the controller does not hand out"
            raise BadInput(f"--policy ours: {text} (leave out gpu_milli and --share-gpus, or take another policy)")
        self.kinds, self.work, self.declared = kinds, work, declared
        self.each, self.busy = kinds.gpus[work.kind], 0
        self.offered: list[Node] = []
        self.cluster = Cluster()
        self.queue = Queue(Settings(), place_in_turn=place_in_turn)
        for i, (cpu, memory, gpus) in enumerate(zip(nodes.cpu_milli, nodes.memory_mib, nodes.gpus, strict=True)):
            offered: Quantities = {"cpu": f"{cpu}m", "memory": f"{memory}Mi", "pods": "1000000", GPU: str(gpus)}
            labels = {"kubernetes.io/hostname": f"n{i}"}
            if (nodes.rack != nodes.rack[0]).any():
                labels[RACK] = f"r{nodes.rack[i]}"
            if (nodes.block != nodes.block[0]).any():
                labels[BLOCK] = f"b{nodes.block[i]}"
            meta = ObjectMeta(name=f"n{i}", labels=labels)
            self.offered.append(Node(metadata=meta, status=NodeStatus(allocatable=offered)))
            self.cluster.set_node(self.offered[-1])
        self.first = np.concatenate(([0], np.cumsum(work.members))).astype(np.int64)
        self.node = np.full(self.first[-1], -1, np.int64)
        self.start, self.end = np.full(len(work.submit), np.nan), np.full(len(work.submit), np.nan)
        self.paces, self.model, self.done = paces, nodes.model, 0.0
        self.rack, self.block, self.left = nodes.rack, nodes.block, work.run.astype(float)
        self.running: dict[int, Running] = {}
        self.down: set[int] = set()
        self.outages, self.restart, self.lost = outages, 0.0 if outages is None else outages.restart, 0.0
        self.again = Counter[int]()
        """How often each job was stopped."""
        self.waiting = 0
        self.usable = int(nodes.gpus.sum())
        self.free = np.stack([nodes.cpu_milli, nodes.memory_mib, nodes.gpus], axis=1)
        self.dirty: set[str] = set()
        self.ends: list[tuple[float, int]] = []
        self.cycles = 0

    def _asks(self, job: int) -> Ints:
        k = self.work.kind[job]
        return np.array([self.kinds.cpu_milli[k], self.kinds.memory_mib[k], self.kinds.gpus[k]], np.int64)

    def _arrive(self, job: int, now: float, created: float | None = None) -> None:
        """`created`: its PodGroup has been there since then, and only its pods are new."""
        name, made = _name(job), time_text(now if created is None else created)
        meta = ObjectMeta(name=name, namespace=NAMESPACE, creation_timestamp=made)
        spec = PodGroupSpec(min_member=int(self.work.least[job]))
        self.cluster.groups[f"{NAMESPACE}/{name}"] = PodGroup(metadata=meta, spec=spec)
        for p in range(self.first[job], self.first[job + 1]):
            self._make(job, p, now)
        self.dirty.add(f"{NAMESPACE}/{name}")
        self.waiting += 1

    def _make(self, job: int, p: int, now: float) -> None:
        """One of its pods, which waits."""
        name, cpu_memory_gpus = _name(job), self._asks(job)
        texts = zip(("cpu", "memory", GPU), ("m", "Mi", ""), cpu_memory_gpus, strict=True)
        requests: Quantities = {resource: f"{amount}{unit}" for resource, unit, amount in texts if amount}
        its = ObjectMeta(
            name=f"p{p}",
            namespace=NAMESPACE,
            uid=f"{p}",
            creation_timestamp=time_text(now),
            labels={POD_GROUP_LABEL: name},
            annotations={RUNTIME: str(int(np.ceil(self._takes(job))))} if self.declared else {},
            owner_references=[OwnerReference(kind="Job", name=name, uid=name, controller=True)],
        )
        containers = [Container(resources=Resources(requests=requests))]
        priority = int(self.kinds.priority[self.work.kind[job]])
        spec = PodSpec(scheduler_name="colocate", containers=containers, priority=priority)
        self.cluster.set_pod(Pod(metadata=its, spec=spec, status=PodStatus(phase="Pending")))

    def _takes(self, job: int) -> float:
        """Seconds, once all of it is placed, where its GPUs and racks do not make it slower."""
        return float(self.left[job]) + (self.restart if job in self.again else 0.0)

    def _leave(self, job: int) -> None:
        """It has nothing any more."""
        key, ran = f"{NAMESPACE}/{_name(job)}", self.running.pop(job)
        for p in range(self.first[job], self.first[job + 1]):
            self.cluster.remove_pod(f"{p}")
        self._release(job, ran, ran.pods)
        self.cluster.groups.pop(key, None)
        self.cluster.remove_plan(key)
        self.dirty.add(key)

    def _release(self, job: int, ran: Running, pods: list[int]) -> None:
        """It does not run, and these give back what they have."""
        for p in pods:
            self.free[self.node[p]] += self._asks(job)
        self.busy -= ran.gpus

    def _put_down(self, job: int, now: float) -> None:
        """What it has done until now."""
        told = self.running[job].put_down(now, float(self.work.submit[-1]))
        self.done += self._worth(job) * told

    def _worth(self, job: int) -> float:
        """GPUs that a second of its work takes."""
        return float(self.each[job] * self.work.members[job])

    def _lose(self, job: int, pods: list[int], now: float) -> None:
        """It loses members, and what was not saved. It goes on with the others if these are enough, or waits again."""
        ran, saved = self.running[job], 0.0
        self._put_down(job, now)
        if self.outages is not None:
            saved = self.outages.saved(ran.done, float(self.left[job]))
        self.left[job] -= saved
        self.lost += ran.lost(now, saved)
        self.done -= self._worth(job) * max(ran.told - saved, 0.0)
        self.again[job] += 1
        left = [p for p in ran.pods if p not in pods]
        if len(left) < self.work.least[job]:
            self._leave(job)
            self._arrive(job, now, float(self.work.submit[job]))  # its PodGroup is the same
            return
        self._release(job, self.running.pop(job), pods)
        for p in pods:
            self.cluster.remove_pod(f"{p}")
            self._make(job, p, now)
        self.dirty.add(f"{NAMESPACE}/{_name(job)}")
        self._begin(job, left, now)

    def _fail(self, node: int, now: float) -> None:
        """A node is gone, and with it the members there."""
        self.down.add(node)
        for job in sorted(self.running):
            there = [p for p in self.running[job].pods if self.node[p] == node]
            if there:
                self._lose(job, there, now)
        spec = msgspec.structs.replace(self.offered[node].spec, unschedulable=True)
        self.cluster.set_node(msgspec.structs.replace(self.offered[node], spec=spec))
        self.usable -= int(self.free[node, 2])

    def _repair(self, node: int) -> None:
        self.down.discard(node)
        self.cluster.set_node(self.offered[node])
        self.usable += int(self.free[node, 2])

    def _bind(self, key: str, placed: list[tuple[str, str]], now: float, *, there: bool = False) -> None:
        """Pods (by uid) to nodes. Raises RuntimeError of what no fleet could carry out: a defect of the policy.

        `there`: they are on them already, whatever the nodes offer now.
        """
        job = _job(key)
        for uid, where in placed:
            p, i = int(uid), int(where[1:])
            self.node[p] = i
            self.free[i] -= self._asks(job)
            if ((self.free[i] < 0).any() or i in self.down) and not there:
                raise RuntimeError(f"ours puts {key} on {where}, which has no room for it")
            pod = self.cluster.pods[uid]
            spec = msgspec.structs.replace(pod.spec, node_name=where)
            status = PodStatus(phase="Running", start_time=time_text(now))
            self.cluster.set_pod(msgspec.structs.replace(pod, spec=spec, status=status))
        pods = [int(uid) for uid, _ in placed]
        self.dirty.add(key)
        if job in self.running:
            self._grow(job, pods, now)
            return
        if len(pods) < self.work.least[job]:
            raise RuntimeError(f"ours starts {key} with {len(pods)} of {self.work.least[job]} members")
        meta = ObjectMeta(name=_name(job), namespace=NAMESPACE, uid=f"plan-{job}")
        began = GangPlanSpec(began=time_text(now), min_member=int(self.work.least[job]))
        plan = GangPlan(metadata=meta, spec=began, status=GangPlanStatus(phase="Running"))
        self.cluster.set_plan(key, plan)
        if job not in self.again:
            self.start[job] = now
        self.waiting -= 1
        self._begin(job, pods, now)

    def _pace(self, job: int, pods: list[int]) -> float:
        on = np.unique(self.node[pods])
        racks, blocks = (bool((level[on] != level[on[0]]).any()) for level in (self.rack, self.block))
        pace = float(self.work.across[job, int(blocks)]) if racks or blocks else 1.0
        more = len(pods) - int(self.work.least[job])
        slower = None if self.paces is None else self.paces.of(job, more, self.model[on])
        return pace * (float(self.work.members[job] / len(pods)) if slower is None else slower)

    def _begin(self, job: int, pods: list[int], now: float) -> None:
        gpus, pace = int(self.each[job]) * len(pods), self._pace(job, pods)
        restart = self.restart if job in self.again else 0.0
        since, paused = now + restart, restart * gpus
        over = now + (float(self.left[job]) * pace + restart)
        self.running[job] = Running(pods, gpus, since, pace, over, spent_at=now, paused=paused)
        self.busy += gpus
        heapq.heappush(self.ends, (over, job))

    def _grow(self, job: int, pods: list[int], now: float) -> None:
        """More of its members are there: all begin again together, from where they are."""
        ran, added = self.running[job], int(self.each[job]) * len(pods)
        self._put_down(job, now)
        ran.spent, ran.spent_at = ran.spent + ran.gpus * (now - ran.spent_at), now
        ran.pods, ran.gpus, self.busy = [*ran.pods, *pods], ran.gpus + added, self.busy + added
        resumes = max(ran.since, now + self.restart)
        ran.paused += added * max(ran.since - now, 0.0) + (resumes - max(ran.since, now)) * ran.gpus
        ran.since, ran.pace = resumes, self._pace(job, ran.pods)
        ran.over = resumes + max(float(self.left[job]) - ran.done, 0.0) * ran.pace
        heapq.heappush(self.ends, (ran.over, job))

    def _is_end(self, at: float, job: int) -> bool:
        """Else it was stopped since, or has another pace."""
        return job in self.running and self.running[job].over == at

    def _decide(self, now: float) -> None:
        """Until nothing more is decided."""
        for _ in range(MOST_CYCLES):
            decided = self.queue.cycle(self.cluster, self.dirty, now)
            self.dirty, self.cycles = set(), self.cycles + 1
            for key, error in decided.failures:
                raise RuntimeError(f"ours cannot decide {key}") from error
            for start in decided.starts:
                self._bind(start.key, [(member.uid, node) for member, node in start.placed], now)
            for eviction in decided.evictions:
                victims = eviction.preemption.victims
                for pod in victims:  # they go at once, and are made anew by those names
                    self.queue.victims.spared(pod.metadata.uid)
                for job in sorted({_job(gang_key(pod)) for pod in victims}):
                    gone = [int(pod.metadata.uid) for pod in victims if _job(gang_key(pod)) == job]
                    gone = [p for p in gone if job in self.running and p in self.running[job].pods]
                    if gone:  # two gangs may ask for the same
                        self._lose(job, gone, now)
            if not self.dirty:
                return
        raise RuntimeError("ours does not come to rest")

    def resume(self, running: Ints) -> int:
        """The first jobs, whose pods are on these nodes already; how many they are."""
        jobs, began = int(np.searchsorted(self.first, len(running))), float(self.work.submit[0])
        for job in range(jobs):
            self._arrive(job, began)
            placed = [(str(p), f"n{running[p]}") for p in range(self.first[job], self.first[job + 1])]
            self._bind(f"{NAMESPACE}/{_name(job)}", placed, began, there=True)
        return jobs

    def run(self, arrived: int = 0) -> Found:
        """Until nothing happens any more. The first `arrived` jobs are there already."""
        work, jobs, now, outages = self.work, len(self.work.submit), 0.0, self.outages
        busy_area, idle_area, first, last = 0.0, 0.0, float(work.submit[0]), float(work.submit[-1])
        outage, troubles = 0, 0 if outages is None else len(outages.at)
        until, cut = np.inf if outages is None else outages.until, False
        while arrived < jobs or self.ends or (self.waiting and outage < troubles):
            then = self.ends[0][0] if self.ends else np.inf
            then = min(then, float(work.submit[arrived])) if arrived < jobs else then
            if outages is not None and outage < troubles:
                then = min(then, float(outages.at[outage]))
            look = self.queue.next_look(now)
            then = then if look is None else min(then, now + look)
            if then > until:
                cut = True
                break
            passed = max(min(then, last) - max(now, first), 0.0)
            busy_area += self.busy * passed
            idle_area += (self.usable - self.busy) * passed if self.waiting else 0.0
            now = then
            while self.ends and self.ends[0][0] <= now:
                at, job = heapq.heappop(self.ends)
                if self._is_end(at, job):
                    self._put_down(job, now)
                    self.lost += self.running[job].paused
                    self._leave(job)
                    self.end[job] = now
            while outages is not None and outage < troubles and outages.at[outage] <= now:
                node = int(outages.node[outage])
                if outages.down[outage]:
                    self._fail(node, now)
                else:
                    self._repair(node)
                outage += 1
            while arrived < jobs and work.submit[arrived] <= now:
                self._arrive(arrived, now)
                arrived += 1
            self._decide(now)
            while self.ends and not self._is_end(*self.ends[0]):
                heapq.heappop(self.ends)
        for job in self.running:
            self._put_down(job, now)
        cut = cut or (self.waiting > 0 and until < np.inf)
        held, restarts = 0.0, self.again.total()
        found = self.start, busy_area, held, self.cycles, self.node, self.end, self.lost, restarts, idle_area, cut
        return *found, self.done


def _policy(about: str, *, declared: bool) -> Callable[..., Found]:
    """One that `colocate simulate` finds by its entry point, and tells about."""

    def policy(
        nodes: NodesLike,
        kinds: KindsLike,
        work: WorkLike,
        seed: int,
        running: Ints | None = None,
        outages: OutagesLike | None = None,
        paces: PacesLike | None = None,
    ) -> Found:
        del seed  # nothing is drawn
        simulation = Simulation(nodes, kinds, work, outages, paces, declared=declared)
        return simulation.run(simulation.resume(running) if running is not None else 0)

    policy.__doc__ = about
    return policy


ours = _policy(
    "the controller's own queue and solver: all or none, in order of arrival, room is kept for gangs that wait",
    declared=False,
)
ours_declared = _policy(
    "the same, and each job declares how long it runs, truly: who is over in time is started past one that waits",
    declared=True,
)
