"""Other people's traces as arrays: what a row lacks, or cannot be, is said with its line and column."""

from __future__ import annotations

import csv
import datetime as dt
import gzip
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from colocate.errors import BadInput
from colocate.simulate.placement import Kinds, Nodes, arrays
from colocate.simulate.queue import Jobs
from colocate.simulate.scores import MOST_GPUS, WHOLE

ENVIRONMENT = "COLOCATE_TRACES"
PARQUET = ".parquet"
SWF_COLUMNS = 18
MOST, LARGEST = 1e12, 1e300
"""Of times and whole numbers in a trace, and of any: a larger one is a mistake, and seconds could not be told apart."""
MOST_MEMBERS, MOST_PODS = 1_000_000, 50_000_000
"""Of a job, and of all jobs."""
ONLY_ELSEWHERE = 62
"""The bit of GPU models that no node of the fleet has."""
Ints = NDArray[np.int64]


def folder(given: str | None) -> Path:
    """Where the traces are: what was given, else COLOCATE_TRACES. Raises BadInput."""
    where = given or os.environ.get(ENVIRONMENT, "")
    if not where:
        raise BadInput(f"--traces: name the folder of the traces, or set {ENVIRONMENT}")
    path = Path(where)
    if not path.is_dir():
        raise BadInput(f"{'--traces' if given else ENVIRONMENT}: {path} is no folder")
    return path


def lines(path: Path) -> Iterator[str]:
    """Of a text file, compressed or not. Raises BadInput where it is not there, or is cut off."""
    try:
        with (
            gzip.open(path, "rt", newline="", encoding="utf-8-sig")
            if path.suffix == ".gz"
            else path.open(newline="", encoding="utf-8-sig")
        ) as file:
            yield from file
    except FileNotFoundError as error:
        raise BadInput(f"{path} is not there") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise BadInput(f"{path} is cut off, or no gzip file: {error}") from error
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{path} is no text: {error.reason} at byte {error.start} (a compressed file's name ends in .gz)"
        ) from error
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error


def filled(slots: NDArray[np.float64]) -> NDArray[np.float64]:
    """Slots without a reading (NaN) are as the one before; before the first they stay what they are."""
    last = np.where(np.isnan(slots), 0, np.arange(len(slots)))
    return np.asarray(slots[np.maximum.accumulate(last)])


class Row(NamedTuple):
    """One line of a table, by column."""

    values: dict[str, str]
    path: Path
    line: int

    @property
    def place(self) -> str:
        """File and line, or row."""
        return f"{self.path}, {'row' if self.path.suffix == PARQUET else 'line'} {self.line}"

    def text(self, column: str) -> str:
        """As it stands there."""
        return self.values[column] or ""

    def number(self, column: str, *, least: float = -LARGEST, most: float = LARGEST) -> float:
        """A number from `least` to `most`. Raises BadInput."""
        text = self.values.get(column) or ""
        try:
            found = float(text) if "_" not in text else float("nan")
        except ValueError:
            found = float("nan")
        if not least <= found <= most:  # nor is what is no number
            wanted = "a number" + " of seconds" * column.endswith("_seconds")
            wanted += "" if -least == most == LARGEST else f" from {least:g} to {most:g}"
            raise BadInput(f"{self.place}, {column}: {text!r} is not {wanted}")
        return found

    def moment(self, column: str) -> dt.datetime:
        """A time, UTC where it names no zone. Raises BadInput."""
        text = self.text(column)
        try:
            read = dt.datetime.fromisoformat(text)
        except ValueError as error:
            raise BadInput(f"{self.place}, {column}: {text!r} is no time as 2017-10-09 07:01:55") from error
        return read if read.tzinfo is not None else read.replace(tzinfo=dt.UTC)

    def whole(self, column: str, *, least: int = 0, most: float = MOST) -> int:
        """The same, without a fraction."""
        found = self.number(column, least=least, most=most)
        if found != int(found):
            raise BadInput(f"{self.place}, {column}: {found:g} is no whole number")
        return int(found)


def columns(path: Path) -> set[str]:
    """The names in the first line of a CSV file. Raises BadInput."""
    return set(_header(path, fields(path)))


def fields(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Each line of a CSV that is not empty, with its number; of Parquet the names first. Raises BadInput."""
    if path.suffix == PARQUET:
        yield from _parquet(path)
        return
    reader = csv.reader(lines(path))
    try:
        for row in reader:
            if any(value.strip() for value in row):
                yield reader.line_num, row
    except csv.Error as error:
        raise BadInput(f"{path}, line {reader.line_num}: {error}: is a quotation mark not closed?") from error


def _parquet(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The names are row 0. What is null is empty."""
    import duckdb

    if not path.is_file():
        raise BadInput(f"{path} is not there")
    with duckdb.connect() as connection:
        try:
            found = connection.execute("select * from read_parquet(?)", [str(path)])
        except duckdb.Error as error:
            raise BadInput(f"{path} is no Parquet file: {str(error).splitlines()[0]}") from error
        yield 0, [column[0] for column in found.description]
        number = 0
        while rows := found.fetchmany(10_000):
            for row in rows:
                number += 1
                yield number, ["" if value is None else str(value) for value in row]


def _header(path: Path, rows: Iterator[tuple[int, list[str]]]) -> list[str]:
    _, first = next(rows, (0, list[str]()))
    header = [name.strip() for name in first]
    if not header:
        raise BadInput(f"{path} is empty")
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise BadInput(f"{path} has two columns {twice[0]}")
    return header


def table(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of a CSV file that has at least these columns. Raises BadInput."""
    rows = fields(path)
    header = _header(path, rows)
    missing = [c for c in columns if c not in header]
    if missing:
        raise BadInput(f"{path} has no column {', '.join(missing)}: it has {', '.join(header) or 'none'}")
    for number, row in rows:
        if len(row) != len(header):
            raise BadInput(f"{path}, line {number}: {len(row)} values, but {len(header)} columns")
        yield Row(dict(zip(header, row, strict=True)), path, number)


def swf(path: Path) -> Jobs:
    """Jobs of the Standard Workload Format (Parallel Workloads Archive), by submission. Raises BadInput.

    A job that says neither how many processors it wants nor how many it had is left out, as is one without a run time.
    """
    found: list[tuple[float, float, float, float]] = []
    for number, line in enumerate(lines(path), 1):
        fields = line.split()
        if not fields or fields[0].startswith(";"):
            continue
        if len(fields) != SWF_COLUMNS:
            raise BadInput(f"{path}, line {number}: {len(fields)} fields, SWF has {SWF_COLUMNS}")
        try:
            submit, run, had, wanted, asked = (float(fields[i]) for i in (1, 3, 4, 7, 8))
        except ValueError as error:
            raise BadInput(f"{path}, line {number}: {error}") from error
        procs = wanted if wanted > 0 else had
        if not all(abs(value) <= MOST for value in (submit, run, asked)):
            raise BadInput(f"{path}, line {number}: times are numbers of at most {MOST:g} s")
        if not (procs <= MOST_MEMBERS and procs == int(procs)):
            raise BadInput(f"{path}, line {number}: {procs:g} processors; they are whole, at most {MOST_MEMBERS}")
        if procs > 0 and run >= 0:
            found.append((submit, run, asked if asked > 0 else run, procs))
    if not found:
        raise BadInput(f"{path} has no jobs")
    return _by_submission(np.array(found))


def _by_submission(found: NDArray[np.float64]) -> Jobs:
    order = np.argsort(found[:, 0], kind="stable")
    submit, run, request, procs = found[order].T
    return Jobs(submit.copy(), run.copy(), request.copy(), procs.astype(np.int64))


class Pods(NamedTuple):
    """A list of pods: kinds that ask for the same, and each pod's kind in the order of the list."""

    kinds: Kinds
    kind_of: Ints


def openb_nodes(path: Path) -> tuple[Nodes, list[str]]:
    """Nodes of Alibaba's cluster-trace-gpu-v2023, and the names of their GPU models. Raises BadInput."""
    rows = list(table(path, ("sn", "cpu_milli", "memory_mib", "gpu", "model")))
    if not rows:
        raise BadInput(f"{path} has no nodes")
    models = sorted({row.text("model") for row in rows if row.text("model")})
    if len(models) > ONLY_ELSEWHERE:
        raise BadInput(f"{path} has {len(models)} GPU models, of at most {ONLY_ELSEWHERE}")
    gpus = [row.whole("gpu") for row in rows]
    if max(gpus) > MOST_GPUS:
        at = rows[int(np.argmax(gpus))]
        raise BadInput(f"{path}, line {at.line}, gpu: {max(gpus)} GPUs of one node, at most {MOST_GPUS}")

    def column(value: Callable[[Row], int]) -> Ints:
        return np.array([value(row) for row in rows], np.int64)

    model = column(lambda row: models.index(row.text("model")) if row.text("model") else ONLY_ELSEWHERE)
    cpu, memory = column(lambda r: r.whole("cpu_milli")), column(lambda r: r.whole("memory_mib"))
    return Nodes(cpu, memory, np.array(gpus, np.int64), model, 0 * cpu, 0 * cpu), models


def openb_pods(path: Path, models: Sequence[str]) -> Pods:
    """Pods of the same trace, for nodes with these GPU models. Raises BadInput."""
    kinds: dict[tuple[int, ...], int] = {}
    kind_of = []
    for row in table(path, ("cpu_milli", "memory_mib", "num_gpu", "gpu_milli")):
        gpus, milli = row.whole("num_gpu"), row.whole("gpu_milli")
        if gpus > MOST_GPUS or milli > WHOLE:
            raise BadInput(f"{path}, line {row.line}: {gpus} GPUs, {milli} thousandths of one, is more than there is")
        asked = (row.values.get("gpu_spec") or "").split("|")
        allowed = sum(1 << models.index(m) for m in asked if m in models)
        if any(asked) and not allowed:
            allowed = 1 << ONLY_ELSEWHERE
        kind = (row.whole("cpu_milli"), row.whole("memory_mib"), gpus, milli, allowed, 0)
        kind_of.append(kinds.setdefault(kind, len(kinds)))
    if not kinds:
        raise BadInput(f"{path} has no pods")
    return Pods(Kinds(*arrays(kinds)), np.array(kind_of, np.int64))
