"""Jobs and nodes for the fleet simulator, in the formats that traces come in. Errors name the row and the field."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
import numpy as np

from colocate.errors import BadInput
from colocate.simulate import traces
from colocate.simulate.formats import Job, jobs_of
from colocate.simulate.paces import NO_MODEL, NO_PACES, Ints, Throughputs
from colocate.simulate.placement import Kinds, Nodes, arrays
from colocate.simulate.running import Work
from colocate.simulate.scores import MOST_GPUS
from colocate.units import parse_bytes

FLEET = re.compile(r"([0-9]{1,9})x([0-9]{1,9})(?::([A-Za-z0-9][A-Za-z0-9._-]{0,62}))?")
MOST_NODES, MOST_CPUS, MOST_KINDS = 200_000, 100_000, 62
CPU_MILLI_OF_GPU, MEMORY_MIB_OF_GPU = 8_000, 65_536
"""Of a node that is given by its GPUs alone: what no job of a trace of GPUs is short of."""
CLOS = ("ip", "PSW", "ASW")
"""Of Alibaba's lingjun 2023: hosts of a Clos network."""
LARGEST_SCORES = 40_000_000
"""Kinds of pods times nodes: a score and its age are kept of each, a gigabyte in all."""


class Workload(NamedTuple):
    """Jobs as arrays."""

    work: Work
    kinds: Kinds
    where: tuple[str, ...]
    """Of each job, file and line."""
    model: Ints = NO_PACES.row
    """Of each job, in the table of throughputs; NO_MODEL: none. Empty: of no job."""

    def part(self, first: int, last: int) -> Workload:
        """The jobs from one to before another, and their kinds."""
        at = slice(first, last)
        kept, kind = np.unique(self.work.kind[at], return_inverse=True)
        whole = self.work
        its = (whole.members[at], whole.least[at], whole.across[at])
        work = Work(whole.submit[at], whole.run[at], kind.astype(np.int64), *its)
        return Workload(work, Kinds(*(column[kept] for column in self.kinds)), self.where[at], self.model[at])


class Fleet(NamedTuple):
    """Nodes, and what their GPUs are called."""

    nodes: Nodes
    gpus: tuple[str, ...]
    """By the numbers of their models; "": it was not said."""


def read_nodes(given: str) -> Nodes:
    """The nodes of `read_fleet`. Raises BadInput."""
    return read_fleet(given).nodes


def read_fleet(given: str) -> Fleet:
    """`64x8` or `64x8:v100`, nodes times GPUs; or a YAML file with `nodes:`, or a CSV of openb's
    columns, or of the hosts of lingjun's Clos network.

    Raises BadInput.
    """
    short = FLEET.fullmatch(given)
    if short is not None:
        count, gpus = int(short[1]), int(short[2])
        if not 1 <= count <= MOST_NODES:
            raise BadInput(f"--nodes: {given}: {f'more than {MOST_NODES}' if count else 'no'} nodes")
        if gpus > MOST_GPUS:
            raise BadInput(f"--nodes: {given}: {gpus} GPUs of one node, at most {MOST_GPUS}")
        ones = np.ones(count, np.int64)
        size = max(gpus, 1)
        cpu, memory = ones * size * CPU_MILLI_OF_GPU, ones * size * MEMORY_MIB_OF_GPU
        return Fleet(Nodes(cpu, memory, ones * gpus, *3 * (0 * ones,)), (short[3] or "",))
    path = Path(given)
    if not given or len(given) > 4096 or not os.path.exists(path):  # of any text, however strange
        raise BadInput(f"--nodes: {given[:80]} is neither a file nor NODESxGPUS, as in 64x8 or 64x8:v100")
    if path.suffix in (".yaml", ".yml"):
        return _nodes_of_yaml(path)
    if traces.columns(path).issuperset(CLOS):
        return Fleet(_clos(path), ("",))
    nodes, models = traces.openb_nodes(path)
    return Fleet(nodes, tuple(models))


def _clos(path: Path) -> Nodes:
    """Hosts with eight GPUs below a switch each, these below switches of aggregation. Raises BadInput."""
    hosts = [(row.text("PSW"), row.text("ASW")) for row in traces.table(path, CLOS)]
    if not hosts:
        raise BadInput(f"{path} has no hosts")
    racks = {host: number for number, host in enumerate(dict.fromkeys(hosts))}
    blocks = {block: number for number, block in enumerate(dict.fromkeys(block for block, _ in hosts))}
    cpu, memory = MOST_GPUS * CPU_MILLI_OF_GPU, MOST_GPUS * MEMORY_MIB_OF_GPU
    return Nodes(*arrays((cpu, memory, MOST_GPUS, 0, racks[host], blocks[host[0]]) for host in hosts))


class NodeGroup(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Nodes that are alike."""

    cpu: Annotated[int, msgspec.Meta(ge=1, le=MOST_CPUS)]
    memory: str
    count: Annotated[int, msgspec.Meta(ge=1, le=MOST_NODES)] = 1
    gpus: Annotated[int, msgspec.Meta(ge=0, le=MOST_GPUS)] = 0
    rack: Annotated[int, msgspec.Meta(ge=1, le=MOST_NODES)] | None = None
    """So many of them are in one rack, of this group alone; None: all that say none are in one."""
    block: Annotated[int, msgspec.Meta(ge=1, le=MOST_NODES)] | None = None
    """So many of them are in one block of racks, likewise."""
    gpu: Annotated[str, msgspec.Meta(max_length=64)] = ""
    """What its GPUs are called, as a table of throughputs calls them."""


class FleetFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The YAML file of a fleet."""

    nodes: Annotated[list[NodeGroup], msgspec.Meta(min_length=1)]


def _nodes_of_yaml(path: Path) -> Fleet:
    import yaml

    from colocate.policy.file import NOT_YAML, StrictLoader

    try:
        fleet = msgspec.convert(yaml.load(path.read_text(), StrictLoader), FleetFile)
    except (OSError, UnicodeDecodeError, *NOT_YAML, msgspec.ValidationError) as error:
        mend = "groups under nodes:, as {count: 4, cpu: 64, memory: 512Gi, gpus: 8, rack: 2}"
        raise BadInput(f"--nodes: {path}: {error} ({mend})") from error
    rows, racks, blocks = [], 1, 1
    names = [*dict.fromkeys(group.gpu for group in fleet.nodes)]
    if len(names) > MOST_KINDS:
        raise BadInput(f"--nodes: {path}: {len(names)} kinds of GPUs, at most {MOST_KINDS}")
    for number, group in enumerate(fleet.nodes):
        try:
            memory = parse_bytes(group.memory) >> 20
        except ValueError:
            memory = 0
        if memory < 1:
            raise BadInput(f"--nodes: {path}: $.nodes[{number}].memory: {group.memory!r} is no size as 512Gi")
        size, wide = group.rack or group.count, group.block or group.count
        if group.block and (not group.rack or group.block % group.rack):
            text = f"$.nodes[{number}].block: {group.block} is no multiple of its `rack`: whole racks make a block"
            raise BadInput(f"--nodes: {path}: {text}")
        rows += [
            (
                1000 * group.cpu,
                memory,
                group.gpus,
                names.index(group.gpu),
                racks + i // size if group.rack else 0,
                blocks + i // wide if group.block else 0,
            )
            for i in range(group.count)
        ]
        racks, blocks = racks - (-group.count // size), blocks - (-group.count // wide)
    return Fleet(Nodes(*arrays(rows)), tuple(names))


def read_jobs(path: Path, nodes: Nodes, throughputs: Throughputs | None = None) -> Workload:
    """Jobs of a trace (see formats); a member that asks for more GPUs than a node has becomes whole nodes.

    Without `throughputs` nobody has a model. Raises BadInput.
    """
    jobs, pods = list[Job](), 0
    for job in jobs_of(path, int(nodes.memory_mib.max())):
        jobs.append(_in_nodes(_timed(job, throughputs), max(int(nodes.gpus.max()), 1)))
        pods += jobs[-1].members
        if pods > traces.MOST_PODS:
            raise BadInput(f"{job.where}: more than {traces.MOST_PODS} members of all jobs")
    if not jobs:
        raise BadInput(f"{path} has no jobs")
    jobs.sort(key=lambda job: job.submit)
    kinds: dict[tuple[int, ...], int] = {}
    kind_of = [
        kinds.setdefault((j.cpu_milli, j.memory_mib, j.gpus, j.gpu_milli, 0, j.priority), len(kinds)) for j in jobs
    ]
    submit = np.array([j.submit for j in jobs])
    work = Work(
        submit - submit[0],
        np.array([j.run for j in jobs]),
        np.array(kind_of, np.int64),
        np.array([j.members for j in jobs], np.int64),
        np.array([j.least or j.members for j in jobs], np.int64),
        np.array([j.across for j in jobs]),
    )
    model = NO_PACES.row
    if throughputs is not None:
        model = np.array([throughputs.number(j.model, j.where) if j.model else NO_MODEL for j in jobs], np.int64)
    return Workload(work, Kinds(*arrays(kinds)), tuple(job.where for job in jobs), model)


def _timed(job: Job, throughputs: Throughputs | None) -> Job:
    """Of one that says its steps: how long these take. Raises BadInput."""
    if job.steps is None:
        return job
    if throughputs is None:
        raise BadInput(f"{job.where}, total_steps: how long they take says a table: colocate simulate --throughputs")
    model = throughputs.number(job.model, job.where)
    return job._replace(run=job.steps / throughputs.best(model, job.members * job.gpus))


def _in_nodes(job: Job, node_gpus: int) -> Job:
    """Members that ask for more GPUs than a node has are whole nodes, which share the rest of what one asks for."""
    if job.gpus <= node_gpus:
        return job
    parts = -(-job.gpus // node_gpus)
    cpu, memory = -(-job.cpu_milli // parts), -(-job.memory_mib // parts)
    return job._replace(
        members=job.members * parts, least=job.least * parts, gpus=node_gpus, cpu_milli=cpu, memory_mib=memory
    )


def check(nodes: Nodes, workload: Workload, too_large: Callable[[Nodes, Kinds, Work], int]) -> None:
    """Raises BadInput of a job that does not fit the empty fleet, and of more than can be kept in mind."""
    if len(nodes.gpus) * len(workload.kinds.gpus) > LARGEST_SCORES:
        text = f"{len(workload.kinds.gpus)} different requests on {len(nodes.gpus)} nodes are too many to rate"
        raise BadInput(f"--jobs: {text}: round what the jobs ask for")
    at = too_large(nodes, workload.kinds, workload.work)
    if at >= 0:
        asks = {name: int(column[workload.work.kind[at]]) for name, column in workload.kinds._asdict().items()}
        members = int(workload.work.least[at])
        each = f"{asks['gpus']} GPUs, {asks['cpu_milli']} m CPU, {asks['memory_mib']} MiB each"
        largest = f"{nodes.gpus.max()} GPUs, {nodes.cpu_milli.max()} m CPU, {nodes.memory_mib.max()} MiB"
        has = f"{len(nodes.gpus)} nodes of at most {largest}, {nodes.gpus.sum()} GPUs in all"
        raise BadInput(f"{workload.where[at]}: {members} members of {each} do not fit the empty fleet: {has}")
