"""What will become of the jobs of a cluster: a snapshot, simulated from now on, as it is and as it might be."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from colocate.errors import BadInput
from colocate.simulate.compare import Outcome, Window, known_run
from colocate.simulate.fleet import too_large
from colocate.simulate.placement import Kinds, Nodes, arrays
from colocate.simulate.running import Work, one_job
from colocate.simulate.scores import MOST_GPUS, WHOLE
from colocate.simulate.workloads import MOST_NODES, Workload, read_nodes
from colocate.units import parse_duration

AS_IS = "as it is"
NODES, JOB = re.compile(r"nodes=(\d{1,6}x\d{1,2})"), re.compile(r"job=(\d{1,6})x(\d{1,6})(cpu)?:(.+)")
WHAT_IF = "nodes=COUNTxGPUS nor job=MEMBERSxGPUS:DURATION (8x8:2h, or of CPUs 4x16cpu:30m)"
MOST_MEMBERS = 100_000
Gang = tuple[str, tuple[int, int, int], int, float | None, list[int]]
"""Name, what each member asks for (millicores, MiB, GPUs), members, seconds, the node of each that runs."""


class Scene(NamedTuple):
    """A cluster as it is, or as it might be."""

    name: str
    nodes: Nodes
    gangs: list[Gang]
    """Those that run first."""


def scenes(path: Path, changes: Sequence[str]) -> list[Scene]:
    """The cluster of a snapshot as it is, and with each of the changes (`nodes=4x8`, `job=8x8:2h`,
    `job=4x16cpu:30m`). Raises BadInput."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadInput(f"--from-cluster: {path} cannot be read: {error.strerror}") from error
    readers = [point.load() for point in entry_points(group="colocate.snapshots")]
    if not readers:
        raise BadInput("--from-cluster: nothing that is installed reads snapshots of a cluster")
    seen = readers[0](content)
    rows = [(*node.offers, 0, 0, 0) for node in seen.nodes]
    if not rows:
        raise BadInput(f"--from-cluster: {path} has no node that takes pods")
    if max(row[2] for row in rows) > MOST_GPUS:
        raise BadInput(f"--from-cluster: a node of {path} has more than {MOST_GPUS} GPUs")
    found = [Scene(AS_IS, Nodes(*arrays(rows)), [tuple(gang) for gang in seen.gangs])]
    return found + [_changed(found[0], change) for change in changes]


def _changed(scene: Scene, change: str) -> Scene:
    nodes, job = NODES.fullmatch(change), JOB.fullmatch(change)
    if nodes is not None:
        more = read_nodes(nodes[1])
        if len(more.gpus) + len(scene.nodes.gpus) > MOST_NODES:
            raise BadInput(f"--what-if: {change}: more than {MOST_NODES} nodes")
        alike = scene.nodes.gpus == more.gpus[0]
        if alike.any():  # another of those that are there
            at = int(np.flatnonzero(alike)[np.argmax(scene.nodes.cpu_milli[alike])])
            more = Nodes(*(np.full(len(more.gpus), column[at]) for column in scene.nodes))
        both = Nodes(*(np.concatenate(pair) for pair in zip(scene.nodes, more, strict=True)))
        return Scene(change, both, scene.gangs)
    if job is not None:
        members, each = int(job[1]), int(job[2])
        asks = (1000 * each, 0, 0) if job[3] else (0, 0, each)
        try:
            seconds = parse_duration(job[4])
        except ValueError as error:
            raise BadInput(f"--what-if: {change}: {error}") from error
        if 1 <= members <= MOST_MEMBERS:
            return Scene(change, scene.nodes, [*scene.gangs, (change, asks, members, seconds, [])])
    raise BadInput(f"--what-if: {change!r} is neither {WHAT_IF}")


class Future(NamedTuple):
    """What becomes of a scene under a policy."""

    scene: Scene
    policy: str
    outcome: Outcome | None
    """None: nothing runs, and nobody who waits ever fits."""
    starts: list[tuple[str, float | None]]
    """Of those that wait, in their order: name, and seconds from now; None: never, as far as is known."""


def future(scene: Scene, policy: str, otherwise_seconds: float, seed: int) -> Future:
    """`otherwise_seconds`: how long those run, or still run, that have not said so. Raises BadInput."""
    if not scene.gangs:
        raise BadInput("--from-cluster: nothing runs in this cluster, and nothing waits")
    possible = [gang for gang in scene.gangs if gang[4] or _fits(scene.nodes, gang)]
    kinds: dict[tuple[int, ...], int] = {}
    rows, running = [], list[int]()
    for _, (cpu, memory, gpus), members, seconds, there in possible:
        kind = kinds.setdefault((cpu, memory, gpus, WHOLE, 0, 0), len(kinds))
        rows.append((0.0, otherwise_seconds if seconds is None else seconds, kind, members))
        running += there
    if not rows:
        return Future(scene, policy, None, [(gang[0], None) for gang in scene.gangs])
    submit, run, kind_of, members_of = (np.array(column) for column in zip(*rows, strict=True))
    names = tuple(gang[0] for gang in possible)
    work = Work(submit, run.astype(float), kind_of, members_of, members_of, np.ones((len(run), 2)))
    workload = Workload(work, Kinds(*arrays(kinds)), names)
    found = known_run(policy, scene.nodes, workload, seed, np.array(running, np.int64))
    outcome = Outcome(policy, Window(0, len(rows)), found, workload)
    times = {n: None if np.isnan(at) else round(float(at), 3) for n, at in zip(names, found.start, strict=True)}
    return Future(scene, policy, outcome, [(gang[0], times.get(gang[0])) for gang in scene.gangs if not gang[4]])


def _fits(nodes: Nodes, gang: Gang) -> bool:
    """Whether a gang would fit if nothing else ran."""
    _, (cpu, memory, gpus), members, _, _ = gang
    kind = Kinds(*arrays([(cpu, memory, gpus, WHOLE, 0, 0)]))
    return too_large(nodes, kind, one_job(members)) < 0


def data(one: Future) -> dict[str, Any]:
    """For programs."""
    card = one.outcome.card(one.scene.nodes) if one.outcome is not None else None
    starts = [{"gang": name, "starts_in_seconds": at} for name, at in one.starts]
    return {"what_if": one.scene.name, "policy": one.policy, "waiting": starts, "card": card}
