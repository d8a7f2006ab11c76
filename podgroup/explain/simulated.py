"""A cluster snapshot as the simulator takes it: `colocate simulate --from-cluster`. Found by `colocate.snapshots`.

Nodes that take pods, with what pods without an end (services) leave of them; the gangs that run, with what is left of
their declared runtimes; those that wait, by priority and age. Members of a gang that waits and ask for different
amounts count as the largest; those beyond its quorum are a gang of their own behind it. Selectors, taints, affinity and
volumes are not looked at.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from colocate.objects import Pod
from colocate.units import seconds_of
from podgroup.explain.snapshot import load
from podgroup.queue.runtimes import RUNTIME, declared_seconds
from podgroup.state.gangs import POD, gang_key, is_group, sort_members
from podgroup.state.shape import amounts, requests_of

GPU = "nvidia.com/gpu"
MIB = 1 << 20
Asks = tuple[int, int, int]
"""Millicores, MiB and GPUs."""


class SeenNode(NamedTuple):
    """One that takes pods."""

    name: str
    offers: Asks
    """But for what pods without an end have."""


class SeenGang(NamedTuple):
    """One that runs or waits."""

    name: str
    asks: Asks
    """Of each member."""
    members: int
    seconds: float | None
    """That it will run, or still runs, as it has declared; None: it has not."""
    nodes: list[int]
    """Of each member; empty: it waits."""


class Seen(NamedTuple):
    """A cluster at one instant; the gangs that wait as they queue, behind those that run."""

    nodes: list[SeenNode]
    gangs: list[SeenGang]


def of_snapshot(content: bytes) -> Seen:
    """Of the bytes of a snapshot's file. Raises BadInput, StateTooNew."""
    snapshot = load(content)
    nodes = [n for n in snapshot.nodes if not n.spec.unschedulable]
    row = {node.metadata.name: i for i, node in enumerate(nodes)}
    offers = [list(_asks(amounts(node.status.allocatable))) for node in nodes]
    by_gang: dict[str, list[Pod]] = defaultdict(list)
    for pod in snapshot.pods:
        by_gang[gang_key(pod)].append(pod)
    least = {f"{g.metadata.namespace}/{g.metadata.name}": g.spec.min_member for g in snapshot.groups}
    running, waiting = list[SeenGang](), list[tuple[int, str, SeenGang]]()
    for key, pods in by_gang.items():
        members = sort_members(pods, snapshot.settings.schedulers)
        here = [p for p in (*members.bound, *members.leaving) if p.spec.node_name in row]
        ours = [p for p in here if _ends(p)]
        for pod in here:
            if not _ends(pod):
                at = offers[row[pod.spec.node_name]]
                at[:] = [max(o - a, 0) for o, a in zip(at, _asks(requests_of(pod)), strict=True)]
        for asks in dict.fromkeys(_asks(requests_of(p)) for p in ours):  # members that differ end together
            alike = [p for p in ours if _asks(requests_of(p)) == asks]
            age = snapshot.now - min(seconds_of(p.status.start_time) or snapshot.now for p in ours)
            declared = _declared(ours)
            left = max(declared - age, 1.0) if declared is not None else None
            running.append(SeenGang(_name(key), asks, len(alike), left, [row[p.spec.node_name] for p in alike]))
        lacks = least.get(key, 1) - members.satisfied
        if members.pending and len(members.pending) >= lacks:
            first = min(p.metadata.creation_timestamp or "" for p in members.pending)
            quorum = lacks if lacks > 0 else len(members.pending)
            rest = f"{_name(key)}, {len(members.pending) - quorum} more"
            for name, some in ((_name(key), members.pending[:quorum]), (rest, members.pending[quorum:])):
                if some:
                    gang = SeenGang(name, _largest(some), len(some), _declared(some), [])
                    waiting.append((-members.priority, first, gang))
    waiting.sort(key=lambda one: one[:2])
    seen = [SeenNode(n.metadata.name, (o[0], o[1], o[2])) for n, o in zip(nodes, offers, strict=True)]
    return Seen(seen, [*running, *(gang for _, _, gang in waiting)])


def _name(key: str) -> str:
    return key if is_group(key) else key.replace(POD, "", 1)


def _ends(pod: Pod) -> bool:
    """Whether it is work that will be over: it declares so, is of a group or a Job."""
    owners = {o.kind for o in pod.metadata.owner_references}
    return is_group(gang_key(pod)) or RUNTIME in pod.metadata.annotations or "Job" in owners


def _declared(pods: list[Pod]) -> float | None:
    known = [seconds for pod in pods if (seconds := declared_seconds(pod)) is not None]
    return max(known) if len(known) == len(pods) else None


def _asks(units: dict[str, int]) -> Asks:
    return units.get("cpu", 0), units.get("memory", 0) // MIB, units.get(GPU, 0)


def _largest(pods: list[Pod]) -> Asks:
    each = [_asks(requests_of(pod)) for pod in pods]
    cpu, memory, gpus = (max(column) for column in zip(*each, strict=True))
    return cpu, memory, gpus
