"""Jobs and nodes for the fleet simulator, in the formats that traces come in. Errors name the row and the field."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
import numpy as np

from colocate.errors import BadInput
from colocate.simulate import traces
from colocate.simulate.fleet import Work
from colocate.simulate.placement import MOST_GPUS, WHOLE, Kinds, Nodes, arrays
from colocate.units import parse_bytes

FLEET = re.compile(r"([0-9]{1,9})x([0-9]{1,9})")
MOST_NODES, MOST_CPUS = 200_000, 100_000
CPU_MILLI_OF_GPU, MEMORY_MIB_OF_GPU = 8_000, 65_536
"""Of a node that is given by its GPUs alone: what no job of a trace of GPUs is short of."""
LARGEST_SCORES = 40_000_000
"""Kinds of pods times nodes: a score and its age are kept of each, a gigabyte in all."""


class Job(NamedTuple):
    """One, as it was read."""

    submit: float
    run: float
    members: int
    gpus: int
    gpu_milli: int
    cpu_milli: int
    memory_mib: int
    where: str
    """File and line."""


class Workload(NamedTuple):
    """Jobs as arrays."""

    work: Work
    kinds: Kinds
    where: tuple[str, ...]
    """Of each job, file and line."""

    def part(self, first: int, last: int) -> Workload:
        """The jobs from one to before another, and their kinds."""
        at = slice(first, last)
        kept, kind = np.unique(self.work.kind[at], return_inverse=True)
        work = Work(self.work.submit[at], self.work.run[at], kind.astype(np.int64), self.work.members[at])
        return Workload(work, Kinds(*(column[kept] for column in self.kinds)), self.where[at])


def read_nodes(given: str) -> Nodes:
    """`64x8`, nodes times GPUs; or a YAML file with `nodes:`, or a CSV of openb's columns. Raises BadInput."""
    short = FLEET.fullmatch(given)
    if short is not None:
        count, gpus = int(short[1]), int(short[2])
        if not 1 <= count <= MOST_NODES:
            raise BadInput(f"--nodes: {given}: {f'more than {MOST_NODES}' if count else 'no'} nodes")
        if gpus > MOST_GPUS:
            raise BadInput(f"--nodes: {given}: {gpus} GPUs of one node, at most {MOST_GPUS}")
        ones = np.ones(count, np.int64)
        size = max(gpus, 1)
        return Nodes(ones * size * CPU_MILLI_OF_GPU, ones * size * MEMORY_MIB_OF_GPU, ones * gpus, 0 * ones)
    path = Path(given)
    if len(given) > 4096 or not os.path.exists(path):  # of any text, however strange
        raise BadInput(f"--nodes: {given[:80]} is neither a file nor NODESxGPUS, as in 64x8")
    if path.suffix in (".yaml", ".yml"):
        return _nodes_of_yaml(path)
    return traces.openb_nodes(path)[0]


class NodeGroup(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Nodes that are alike."""

    cpu: Annotated[int, msgspec.Meta(ge=1, le=MOST_CPUS)]
    memory: str
    count: Annotated[int, msgspec.Meta(ge=1, le=MOST_NODES)] = 1
    gpus: Annotated[int, msgspec.Meta(ge=0, le=MOST_GPUS)] = 0


class FleetFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The YAML file of a fleet."""

    nodes: Annotated[list[NodeGroup], msgspec.Meta(min_length=1)]


def _nodes_of_yaml(path: Path) -> Nodes:
    import yaml

    from colocate.policy.file import NOT_YAML, StrictLoader

    try:
        fleet = msgspec.convert(yaml.load(path.read_text(), StrictLoader), FleetFile)
    except (OSError, UnicodeDecodeError, *NOT_YAML, msgspec.ValidationError) as error:
        raise BadInput(f"--nodes: {path}: {error}") from error
    rows = []
    for number, group in enumerate(fleet.nodes):
        try:
            memory = parse_bytes(group.memory) >> 20
        except ValueError:
            memory = 0
        if memory < 1:
            raise BadInput(f"--nodes: {path}: $.nodes[{number}].memory: {group.memory!r} is no size as 512Gi")
        rows += [(1000 * group.cpu, memory, group.gpus, 0)] * group.count
    return Nodes(*arrays(rows))


def read_jobs(path: Path, node_gpus: int) -> Workload:
    """Jobs of a trace, whose format is told by its columns; those larger than a node's GPUs are gangs of whole nodes.

    SWF (by the name); Philly (`timestamp,duration,num_gpus`); openb's pods (`creation_time,deletion_time`); else
    `submit_seconds,duration_seconds` with `members`, `gpus`, `gpu_milli`, `cpu_milli`, `memory_mib`. Raises BadInput.
    """
    name = path.name.removesuffix(".gz")
    jobs = list(_of_swf(path) if name.endswith(".swf") else _of_table(path, max(node_gpus, 1)))
    if not jobs:
        raise BadInput(f"{path} has no jobs")
    jobs.sort(key=lambda job: job.submit)
    kinds: dict[tuple[int, ...], int] = {}
    kind_of = [kinds.setdefault((j.cpu_milli, j.memory_mib, j.gpus, j.gpu_milli, 0), len(kinds)) for j in jobs]
    submit = np.array([j.submit for j in jobs])
    work = Work(
        submit - submit[0],
        np.array([j.run for j in jobs]),
        np.array(kind_of, np.int64),
        np.array([j.members for j in jobs], np.int64),
    )
    return Workload(work, Kinds(*arrays(kinds)), tuple(job.where for job in jobs))


def _of_swf(path: Path) -> Iterator[Job]:
    """A processor is a member with one CPU."""
    jobs = traces.swf(path)
    for i, (submit, run, _, procs) in enumerate(zip(*jobs, strict=True), 1):
        yield Job(float(submit), float(run), int(procs), 0, WHOLE, 1000, 0, f"{path}, job {i}")


def _of_table(path: Path, node_gpus: int) -> Iterator[Job]:
    header = traces.columns(path)
    wanted, make = next(((w, m) for w, m in KNOWN if header.issuperset(w)), (PLAIN[:2], _plain))
    unknown = header - set(PLAIN)
    if make is _plain and header.issuperset(wanted) and unknown:
        raise BadInput(f"{path}: column {min(unknown)} is not known; known: {', '.join(PLAIN)}")
    pods = 0
    for row in traces.table(path, wanted):
        job = make(row)
        if job is None:
            continue
        if job.gpus > node_gpus:  # whole nodes, which share the rest of what one member asks for
            parts = -(-job.gpus // node_gpus)
            cpu, memory = -(-job.cpu_milli // parts), -(-job.memory_mib // parts)
            job = job._replace(members=job.members * parts, gpus=node_gpus, cpu_milli=cpu, memory_mib=memory)
        pods += job.members
        if pods > traces.MOST_PODS:
            raise BadInput(f"{job.where}: more than {traces.MOST_PODS} members of all jobs")
        yield job


PLAIN = ("submit_seconds", "duration_seconds", "name", "members", "gpus", "gpu_milli", "cpu_milli", "memory_mib")


def _seconds(row: traces.Row, column: str, least: float = 0.0) -> float:
    return row.number(column, least=least, most=traces.MOST)


def _plain(row: traces.Row) -> Job:
    def whole(column: str, otherwise: int, least: int = 0, most: float = traces.MOST_MEMBERS) -> int:
        return row.whole(column, least=least, most=most) if row.values.get(column) else otherwise

    gpus, milli = whole("gpus", 0), whole("gpu_milli", WHOLE, 1)
    if milli > WHOLE or (milli < WHOLE and gpus != 1):
        raise BadInput(f"{row.place}, gpu_milli: {milli}: a part of one GPU is 1 to {WHOLE}, with gpus 1")
    submit, run = _seconds(row, "submit_seconds", -traces.MOST), _seconds(row, "duration_seconds")
    cpu, memory = whole("cpu_milli", 0, most=traces.MOST), whole("memory_mib", 0, most=traces.MOST)
    return Job(submit, run, whole("members", 1, 1), gpus, milli, cpu, memory, row.place)


def _philly(row: traces.Row) -> Job:
    return Job(
        row.moment("timestamp").timestamp(),
        _seconds(row, "duration"),
        1,
        row.whole("num_gpus", least=1, most=traces.MOST_MEMBERS),
        WHOLE,
        0,
        0,
        row.place,
    )


def _openb(row: traces.Row) -> Job | None:
    """None of a pod that was never scheduled: how long it would have run is not known."""
    came, begun = _seconds(row, "creation_time", -traces.MOST), row.values.get("scheduled_time")
    if not begun or not row.text("deletion_time"):
        return None
    run = _seconds(row, "deletion_time", -traces.MOST) - _seconds(row, "scheduled_time", -traces.MOST)
    if run < 0.0:
        raise BadInput(f"{row.place}, deletion_time: it is before scheduled_time")
    gpus = row.whole("num_gpu", most=MOST_GPUS)
    milli = row.whole("gpu_milli", least=1, most=WHOLE) if gpus else WHOLE
    return Job(came, run, 1, gpus, milli, row.whole("cpu_milli"), row.whole("memory_mib"), row.place)


KNOWN: tuple[tuple[tuple[str, ...], Callable[[traces.Row], Job | None]], ...] = (
    (("timestamp", "duration", "num_gpus"), _philly),
    (("creation_time", "deletion_time", "scheduled_time", "num_gpu", "gpu_milli", "cpu_milli", "memory_mib"), _openb),
)


def check(nodes: Nodes, workload: Workload, too_large: Callable[[Nodes, Kinds, Work], int]) -> None:
    """Raises BadInput of a job that does not fit the empty fleet, and of more than can be kept in mind."""
    if len(nodes.gpus) * len(workload.kinds.gpus) > LARGEST_SCORES:
        text = f"{len(workload.kinds.gpus)} different requests on {len(nodes.gpus)} nodes are too many to rate"
        raise BadInput(f"--jobs: {text}: round what the jobs ask for")
    at = too_large(nodes, workload.kinds, workload.work)
    if at >= 0:
        asks = {name: int(column[workload.work.kind[at]]) for name, column in workload.kinds._asdict().items()}
        members = int(workload.work.members[at])
        each = f"{asks['gpus']} GPUs, {asks['cpu_milli']} m CPU, {asks['memory_mib']} MiB each"
        raise BadInput(f"{workload.where[at]}: {members} members of {each} do not fit the empty fleet")
