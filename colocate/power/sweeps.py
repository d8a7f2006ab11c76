"""Sweeps of power caps from files: one file a run as geopmsession writes it, a GEOPM report, or a table of runs.

geopmsession's CSV has a line a second and a column a signal, `"GPU_ENERGY-board-0"`; of a name what is before the first
`-` counts. A run's cap is the mean of its limit, its time from the first line to the last, its energies are counters.
A GEOPM report is YAML, with `Application Totals` of each host. A table has a line a run: `power_limit` (W),
`time_per_epoch` (s), and `average_power` (W) where that is known; what other columns it has tell sweeps apart.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from colocate.errors import BadInput
from colocate.model.power import Sample

SIGNALS = ("TIME", "GPU_POWER_LIMIT_CONTROL", "GPU_ENERGY", "CPU_ENERGY", "DRAM_ENERGY")
"""Of geopmsession: s, W, J, J, J."""
CAP, SECONDS, WATTS = "power_limit", "time_per_epoch", "average_power"


MOST_CAP_WATTS = 20_000.0
"""More than the GPUs of a node have; a table in milliwatts has more."""


class Run(NamedTuple):
    """One run, and the file that it is from."""

    file: str
    cap_watts: float
    seconds: float
    joules: float | None
    """Of GPUs, CPUs and memory together; None where that is not told."""
    capped_joules: float | None = None
    """Of what the cap is for: the GPUs."""

    @property
    def sample(self) -> Sample:
        """As the model takes it."""
        watts, capped = (None if j is None else j / self.seconds for j in (self.joules, self.capped_joules))
        return Sample(self.cap_watts, self.seconds, capped, watts)


def read_runs(paths: Iterable[Path], where: Mapping[str, str] | None = None) -> list[Run]:
    """All runs of these files, in their order. `where` chooses of a table. Raises BadInput naming file and field."""
    runs: list[Run] = []
    tables, others = [], []
    for path in paths:
        if path.suffix in (".yaml", ".yml", ".report"):
            runs.append(_report(path))
            others.append(path)
            continue
        header, rows = _rows(path)
        if CAP in header and SECONDS in header:
            runs += _only(path, header, _table(path, header, rows, where or {}), where or {})
            tables.append(path)
        else:
            runs.append(_session(path, header, rows))
            others.append(path)
    if not runs:
        raise BadInput("no file is given: name the runs of a sweep, a file for each")
    if tables and len(tables) + len(others) > 1:
        raise BadInput(f"{tables[-1]}: a table is a sweep, and other files are given: put all runs of a sweep into it")
    if where and others:
        raise BadInput(f"--where: {others[0]} is one run: lines are chosen of tables only")
    return runs


def read_sweeps(paths: Iterable[Path], where: Mapping[str, str] | None = None) -> dict[str, list[Run]]:
    """Each sweep of these tables, by what tells it apart, or by its file. Raises BadInput."""
    found: dict[str, list[Run]] = {}
    for path in paths:
        header, rows = _rows(path)
        if not (CAP in header and SECONDS in header):
            raise BadInput(f"{path}: it is no table of runs: columns {CAP} and {SECONDS} are needed")
        for key, runs in _table(path, header, rows, where or {}).items():
            name = " ".join(key) or path.stem
            if name in found:
                raise BadInput(f"{path}: the sweep {name!r} is there twice: a column must tell them apart")
            found[name] = runs
    return found


def _rows(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The names of a file's columns, and its lines with their numbers; empty ones are none."""
    try:
        reader = csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig")))
        rows = [(reader.line_num, row) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise BadInput(f"{path}: cannot be read: {error if isinstance(error, csv.Error) else why}") from error
    if not rows:
        raise BadInput(f"{path}: it is empty")
    header = [name.strip() for name in rows[0][1]]
    if len(header) == 1 and ";" in header[0]:
        raise BadInput(f"{path}: its fields are parted by semicolons: commas are needed, and points in numbers")
    for line, row in rows[1:]:
        if len(row) < len(header):
            raise BadInput(f"{path}: line {line}: it has {len(row)} of {len(header)} fields: the file is cut off")
    return header, rows[1:]


def _number(path: Path, line: int, name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise BadInput(f"{path}: line {line}: {name} is {text!r}, which is no number") from error


def _session(path: Path, header: list[str], rows: list[tuple[int, list[str]]]) -> Run:
    """Of a signal with several columns (a GPU or a package each) the sum counts."""
    names = [name.split("-", 1)[0] for name in header]
    missing = [signal for signal in SIGNALS if signal not in names]
    if missing:
        known = f"{', '.join(SIGNALS)} of geopmsession, or {CAP} and {SECONDS} of a table"
        raise BadInput(f"{path}: it has no column {missing[0]}; what is needed: {known}")
    if len(rows) < 2:
        raise BadInput(f"{path}: it has {len(rows)} line(s) of samples: a run needs two")
    at = {signal: [i for i, name in enumerate(names) if name == signal] for signal in SIGNALS}
    if len(at["TIME"]) > 1:
        raise BadInput(f"{path}: it has TIME {len(at['TIME'])} times")

    def value(row: int, signal: str) -> float:
        line, fields = rows[row]
        return sum(_number(path, line, header[i], fields[i]) for i in at[signal])

    caps = [value(i, "GPU_POWER_LIMIT_CONTROL") for i in range(len(rows))]
    used = {s: value(-1, s) - value(0, s) for s in ("GPU_ENERGY", "CPU_ENERGY", "DRAM_ENERGY")}
    for signal, joules in used.items():
        if joules < 0.0:
            raise BadInput(f"{path}: {signal} fell by {-joules:g} J: the counter was reset in this run")
    seconds = value(-1, "TIME") - value(0, "TIME")
    return _checked(Run(str(path), sum(caps) / len(caps), seconds, sum(used.values()), used["GPU_ENERGY"]))


def _table(
    path: Path, header: list[str], rows: list[tuple[int, list[str]]], where: Mapping[str, str]
) -> dict[tuple[str, ...], list[Run]]:
    """The runs that are chosen, by what tells their sweeps apart."""
    others = [name for name in header if name not in (CAP, SECONDS, WATTS)]
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise BadInput(f"{path}: it has the column {twice[0]} {header.count(twice[0])} times")
    unknown = [name for name in where if name not in others]
    if unknown:
        raise BadInput(
            f"--where: {path} has no column {unknown[0]}; it has {', '.join(others) or 'none but the figures'}"
        )
    sweeps: dict[tuple[str, ...], list[Run]] = {}
    for line, row in rows:
        fields = dict(zip(header, row, strict=False))
        if any(fields[name] != value for name, value in where.items()):
            continue
        cap, seconds = (_number(path, line, name, fields[name]) for name in (CAP, SECONDS))
        watts = _number(path, line, WATTS, fields[WATTS]) if fields.get(WATTS) else None
        if watts is not None and not 0.0 <= watts < np.inf:
            raise BadInput(f"{path}: line {line}: {WATTS} is {watts:g}, which nothing draws")
        joules = None if watts is None else watts * seconds
        run = _checked(Run(f"{path}:{line}", cap, seconds, joules, joules))
        sweeps.setdefault(tuple(fields[name] for name in others), []).append(run)
    if not sweeps:
        raise BadInput(f"{path}: no line of it is chosen" if where else f"{path}: it has no runs")
    return sweeps


def _only(
    path: Path, header: list[str], sweeps: Mapping[tuple[str, ...], list[Run]], where: Mapping[str, str]
) -> list[Run]:
    """The runs of the one sweep that is chosen of a table."""
    if len(sweeps) > 1:
        others = [name for name in header if name not in (CAP, SECONDS, WATTS)]
        first = dict(zip(others, next(iter(sweeps)), strict=True))
        different = [name for i, name in enumerate(others) if len({key[i] for key in sweeps}) > 1]
        example = ",".join(f"{name}={first[name]}" for name in others if name in where or name in different)
        raise BadInput(f"{path}: it holds {len(sweeps)} sweeps: choose one, e.g. --where {example}")
    return next(iter(sweeps.values()))


def _report(path: Path) -> Run:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
        hosts: dict[str, dict[str, Any]] = {h: dict(r["Application Totals"]) for h, r in found["Hosts"].items()}
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BadInput(f"{path}: it is no GEOPM report: Hosts with Application Totals are needed") from error
    if not hosts:
        raise BadInput(f"{path}: it names no host")

    def of(name: str, *keys: str) -> float | None:
        known = hosts[name]
        key = next((k for k in keys if k in known), None)
        if key is None:
            return None
        try:
            return float(known[key])
        except (TypeError, ValueError) as error:
            raise BadInput(f"{path}: {name}: {key} is {known[key]!r}, which is no number") from error

    caps, joules, capped = [], list[float | None](), list[float | None]()
    for host in hosts:
        cap = of(host, "GPU_POWER_LIMIT_CONTROL", "BOARD_POWER_LIMIT_CONTROL")
        if cap is None:
            raise BadInput(f"{path}: {host} has neither GPU_POWER_LIMIT_CONTROL nor BOARD_POWER_LIMIT_CONTROL")
        if of(host, "runtime (s)") is None:
            raise BadInput(f"{path}: {host} has no runtime (s)")
        caps.append(cap)
        parts = [of(host, f"{part}-energy (J)") for part in ("package", "gpu", "dram")]
        known, board = [p for p in parts if p is not None], of(host, "BOARD_ENERGY")
        joules.append(board or (sum(known) if known else None))
        capped.append(parts[1] if "GPU_POWER_LIMIT_CONTROL" in hosts[host] else board)
    seconds = max(of(host, "runtime (s)") or 0.0 for host in hosts)
    total = None if None in joules else sum(j or 0.0 for j in joules)
    mine = None if None in capped else sum(j or 0.0 for j in capped) / len(hosts)  # as the cap is: of one host
    return _checked(Run(str(path), sum(caps) / len(caps), seconds, total, mine))


def _checked(run: Run) -> Run:
    if not 0.0 < run.seconds < np.inf:
        raise BadInput(f"{run.file}: the run took {run.seconds:g} s: its times do not rise")
    if not 0.0 < run.cap_watts <= MOST_CAP_WATTS:
        mend = ": watts are needed, and these may be milliwatts" if run.cap_watts > MOST_CAP_WATTS else ""
        raise BadInput(f"{run.file}: a cap of {run.cap_watts:g} W is impossible{mend}")
    for joules in (run.joules, run.capped_joules):
        if joules is not None and not 0.0 <= joules < np.inf:
            raise BadInput(f"{run.file}: it used {joules:g} J, which nothing does")
    return run
