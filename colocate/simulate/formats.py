"""The formats that traces of jobs come in, told apart by their columns. Errors name the row and the field.

    plain            submit_seconds,duration_seconds[,name,members,gpus,gpu_milli,cpu_milli,memory_mib,priority,
                     across_racks,across_blocks,model,min_members]
    SWF              *.swf (Parallel Workloads Archive): a processor is a member with one CPU
    Philly           timestamp,duration,num_gpus (msr-fiddle/philly-traces, flattened)
    openb            creation_time,deletion_time,scheduled_time,... (Alibaba cluster-trace-gpu-v2023)
    Azure LLM        TIMESTAMP,ContextTokens,GeneratedTokens (Azure LLM inference traces 2023): a request each
    Gavel            job_type,scale_factor,total_steps,arrival_time_s (Gavel, OSDI 2020): needs its throughputs
    Alibaba v2017    batch_task.csv, 8 columns, with names or without (cluster-trace-v2017)
    Alibaba v2018    batch_task.csv, 9 columns without names (cluster-trace-v2018)
    records          a state directory of the agent, or a file of its records: what the jobs of a node used

All but SWF and records may be CSV, CSV.gz or Parquet. Alibaba's memory is a share of a machine's: of the largest node
of the fleet here. The instances of its tasks need not run at once: a task is jobs of at most INSTANCES members.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from colocate.errors import BadInput
from colocate.simulate import traces
from colocate.simulate.scores import MOST_GPUS, WHOLE

INSTANCES = 100
STATES = frozenset(("Ready", "Waiting", "Running", "Terminated", "Failed", "Cancelled", "Interrupted"))
"""Of a task of Alibaba's."""
CONTEXT_TOKEN_SECONDS, GENERATED_TOKEN_SECONDS = 0.0002, 0.04
"""Made up: the traces of Azure do not say how long a request took. One at a time on a GPU."""
MOST_PRIORITY = 1_000_000_000
"""Of a PriorityClass of users."""
MOST_ACROSS = 1000.0
GONE_SECONDS = 60.0
"""A job of that name that is seen again so long after is another."""


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
    priority: int = 0
    """The greater goes first."""
    across: tuple[float, float] = (1.0, 1.0)
    """So many times as long it runs where its members are in more than one rack, and block of racks."""
    model: str = ""
    """What it trains, of a table of throughputs."""
    least: int = 0
    """With so many members it runs, the slower; 0: with all."""
    steps: float | None = None
    """Of its work, where `run` is not said."""


def jobs_of(path: Path, node_memory_mib: int) -> Iterator[Job]:
    """Of a file, or of a state directory, in any order. Raises BadInput."""
    name = path.name.removesuffix(".gz")
    try:
        folder = path.is_dir()
    except OSError as error:
        raise BadInput(f"{str(path)[:60]}... is no path: {error.strerror}") from error
    if folder or name.endswith(".jsonl"):
        yield from _of_records(path)
    elif name.endswith(".swf"):
        yield from _of_swf(path)
    elif (make := _without_names(path)) is not None:
        for number, fields in traces.fields(path):
            if len(fields) != make.columns:
                raise BadInput(f"{path}, line {number}: {len(fields)} values, but {make.columns} columns")
            row = traces.Row(dict(zip(make.names, (f.strip() for f in fields), strict=True)), path, number)
            yield from _task(row, node_memory_mib * make.of_node)
    else:
        yield from _of_table(path, node_memory_mib)


def _of_swf(path: Path) -> Iterator[Job]:
    jobs = traces.swf(path)
    for i, (submit, run, _, procs) in enumerate(zip(*jobs, strict=True), 1):
        yield Job(float(submit), float(run), int(procs), 0, WHOLE, 1000, 0, f"{path}, job {i}")


def _of_table(path: Path, node_memory_mib: int) -> Iterator[Job]:
    header = traces.columns(path)
    if header.issuperset(V2017_NAMED):
        for row in traces.table(path, V2017_NAMED):
            values = dict(zip(V2017.names, (row.text(column).strip() for column in V2017_NAMED), strict=True))
            yield from _task(row._replace(values=values), float(node_memory_mib))
        return
    wanted, make = next(((w, m) for w, m in KNOWN if header.issuperset(w)), (PLAIN[:2], _plain))
    unknown = header - set(PLAIN)
    if make is _plain and header.issuperset(wanted) and unknown:
        names = f"column{'s' * (len(unknown) > 1)} {', '.join(sorted(unknown))}"
        raise BadInput(f"{path}, line 1: {names}: not known; known: {', '.join(PLAIN)}")
    for row in traces.table(path, wanted):
        job = make(row)
        if job is not None:
            yield job


PLAIN = (
    "submit_seconds",
    "duration_seconds",
    "name",
    "members",
    "gpus",
    "gpu_milli",
    "cpu_milli",
    "memory_mib",
    "priority",
    "across_racks",
    "across_blocks",
    "model",
    "min_members",
)


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
    priority = whole("priority", 0, -MOST_PRIORITY, MOST_PRIORITY)
    racks = row.number("across_racks", least=1.0, most=MOST_ACROSS) if row.values.get("across_racks") else 1.0
    blocks = row.number("across_blocks", least=racks, most=MOST_ACROSS) if row.values.get("across_blocks") else racks
    model = row.values.get("model") or ""
    if model and not gpus:
        raise BadInput(f"{row.place}, gpus: a job with a model runs on GPUs")
    members = whole("members", 1, 1)
    least = whole("min_members", 0, 1, members)
    return Job(submit, run, members, gpus, milli, cpu, memory, row.place, priority, (racks, blocks), model, least)


def _gavel(row: traces.Row) -> Job:
    """A worker is a member with a GPU."""
    come, steps = _seconds(row, "arrival_time_s"), row.number("total_steps", least=0.0, most=traces.MOST)
    workers = row.whole("scale_factor", least=1, most=traces.MOST_MEMBERS)
    return Job(come, 0.0, workers, 1, WHOLE, 0, 0, row.place, model=row.text("job_type"), steps=steps)


def _philly(row: traces.Row) -> Job:
    gpus = row.whole("num_gpus", least=1, most=traces.MOST_MEMBERS)
    return Job(row.moment("timestamp").timestamp(), _seconds(row, "duration"), 1, gpus, WHOLE, 0, 0, row.place)


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
    if gpus > 1 and milli < WHOLE:
        raise BadInput(f"{row.place}, gpu_milli: {milli}: a part is of one GPU, with num_gpu 1")
    return Job(came, run, 1, gpus, milli, row.whole("cpu_milli"), row.whole("memory_mib"), row.place)


def _request(row: traces.Row) -> Job:
    context, generated = row.whole("ContextTokens"), row.whole("GeneratedTokens")
    seconds = context * CONTEXT_TOKEN_SECONDS + generated * GENERATED_TOKEN_SECONDS
    return Job(row.moment("TIMESTAMP").timestamp(), seconds, 1, 1, WHOLE, 0, 0, row.place)


KNOWN: tuple[tuple[tuple[str, ...], Callable[[traces.Row], Job | None]], ...] = (
    (("timestamp", "duration", "num_gpus"), _philly),
    (("creation_time", "deletion_time", "scheduled_time", "num_gpu", "gpu_milli", "cpu_milli", "memory_mib"), _openb),
    (("TIMESTAMP", "ContextTokens", "GeneratedTokens"), _request),
    (("job_type", "scale_factor", "total_steps", "arrival_time_s"), _gavel),
)


class Tasks(NamedTuple):
    """Batch tasks of Alibaba's co-location traces, in a file without names of columns."""

    names: tuple[str, ...]
    status: int
    """Which column."""
    of_node: float
    """1 of its memory is so much of a machine."""

    @property
    def columns(self) -> int:
        """How many."""
        return len(self.names)


V2017 = Tasks(("start", "end", "job", "task", "instances", "status", "cpu", "memory"), 5, 1.0)
V2018 = Tasks(("task", "instances", "job", "kind", "status", "start", "end", "cpu", "memory"), 4, 0.01)
V2017_NAMED = (
    "task_create_time",
    "task_end_time",
    "job_id",
    "task_id",
    "number_of_instances",
    "status",
    "number_of_cpus_requested_per_instance_in_the_task",
    "normalized_memory_requested_per_instance_in_the_task",
)


def _without_names(path: Path) -> Tasks | None:
    """Which of Alibaba's, by what its first line has where the status stands."""
    if path.suffix == traces.PARQUET:
        return None
    first = next((fields for _, fields in traces.fields(path)), [])
    found = (kind for kind in (V2017, V2018) if len(first) == kind.columns and first[kind.status].strip() in STATES)
    return next(found, None)


def _task(row: traces.Row, memory_mib: float) -> Iterator[Job]:
    """None of one that has not ended, or asks for nothing: no work that was done."""
    if row.text("status") != "Terminated" or not row.text("cpu") or not row.text("memory"):
        return
    start, end = _seconds(row, "start", -traces.MOST), _seconds(row, "end", -traces.MOST)
    if end < start:
        raise BadInput(f"{row.place}, end: it is before the start")
    cpu = round(10 * row.number("cpu", least=0.0, most=1e6))
    memory = round(memory_mib * row.number("memory", least=0.0, most=100.0))
    left = row.whole("instances", least=1, most=traces.MOST_MEMBERS) if row.text("instances") else 1
    while left > 0:
        yield Job(start, end - start, min(left, INSTANCES), 0, WHOLE, cpu, memory, row.place)
        left -= INSTANCES


def _of_records(path: Path) -> Iterator[Job]:
    """What each job of a node used, from when it was first seen until it was last; cores are its mean."""
    from colocate.report.record import read_lines, segments

    seen: dict[str, tuple[float, float, float]] = {}
    """By name: first seen, last seen, core-seconds."""

    def job(name: str) -> Job:
        first, last, work = seen.pop(name)
        seconds = max(last - first, 1.0)
        return Job(first, seconds, 1, 0, WHOLE, round(1000 * work / seconds), 0, f"{path}, job {name}")

    lines = 0
    for file in segments(path):
        for line in read_lines(file):
            lines += 1
            try:
                at, step, cores_of = _of_line(line)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise BadInput(f"{file}, record {lines}: it is none of the agent's: {error!r}") from error
            for name in [name for name, (_, last, _) in seen.items() if at - last > GONE_SECONDS]:
                yield job(name)
            for name, cores in cores_of.items():
                first, _, work = seen.get(name, (at - step, at, 0.0))
                seen[name] = first, at, work + cores * step
    if not lines:
        raise BadInput(f"{path} has no line of the agent's records: a .jsonl file is taken for one")
    for name in list(seen):
        yield job(name)


def _of_line(line: dict[str, Any]) -> tuple[float, float, dict[str, float]]:
    """When, how long, and the cores of each job."""
    series = line["series"]
    return (
        float(line["time"]),
        float(series["dt"]),
        {str(k): float(v) for k, v in series.get("job", {}).items()},
    )
