"""What batch is promised of a node, replayed on recorded loads: how often services needed some of it after all.

Every five minutes a batch pod starts that takes all that is promised, and runs for an hour; it is in the way if all
others need more in that hour than the node has beside it. Koordinator's law (60 % of the CPUs, 65 % of the memory, less
the use now) answers the same questions. Loads: CPU and memory of 16 machines with services and batch for 8 days
(alibaba-v2018-usage), CPU of 50 business VMs for 30 days, five to a node (bitbrains-50vm-2013), CPU of 800 VMs for ten
days, twenty to a node (planetlab-2011), from COLOCATE_TRACES. A node has 1.2 times the CPUs that its VMs ever used.
"""

from __future__ import annotations

import csv
import gzip
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from benchmarks.common import RESULTS, bar
from colocate.decide.allocatable import GRAIN_RATIO, GROW_AGAIN_SECONDS, promise
from colocate.decide.reference.koordlet import CPU_RECLAIM_PERCENT, MEMORY_RECLAIM_PERCENT
from colocate.errors import HostUnfit
from colocate.model.needs import DAY_SLOTS, SLOT_SECONDS, Needs, look, slots_of
from colocate.model.reference import Floats
from colocate.model.statistics import Interval, mean_interval
from colocate.policy.schema import PolicySpec
from colocate.simulate.traces import filled

CORES, SIZE = 64.0, float(256 << 30)
VMS_A_NODE, PLANETLAB_NODES, PLANETLAB_VMS = 5, 40, 20
SPARE = 1.2
RISKS = (0.01, 0.05)
STEPS = int(SLOT_SECONDS / GROW_AGAIN_SECONDS)
"""How often in a slot what is promised may grow."""


class Load(NamedTuple):
    """What all but batch used of one node, slot by slot, as shares of it; shape (slots,)."""

    cpu: Floats
    memory: Floats | None = None


def _rows(name: str) -> Iterator[dict[str, str]]:
    folder = os.environ.get("COLOCATE_TRACES", "")
    file = Path(folder) / name
    if not folder or not file.exists():
        raise HostUnfit(f"the recorded load {name} is not here", "set COLOCATE_TRACES to the folder of traces")
    with gzip.open(file, "rt") as text:
        yield from csv.DictReader(text)


def _scaled(cores: Floats) -> Load:
    return Load(cores / (cores.max() * SPARE))


def alibaba() -> list[Load]:
    """Each machine by itself."""
    readings: dict[str, list[tuple[int, float, float]]] = defaultdict(list)
    for row in _rows("alibaba-v2018-usage/machine_usage_16.csv.gz"):
        if row["cpu_util_percent"] and row["mem_util_percent"]:
            found = int(row["time_stamp"]), float(row["cpu_util_percent"]), float(row["mem_util_percent"])
            readings[row["machine_id"]].append(found)
    loads = []
    for machine in readings.values():
        begin, end = min(machine)[0], max(machine)[0]
        slots = np.full((2, int((end - begin) // SLOT_SECONDS) + 1), np.nan)
        for at, cpu, memory in machine:
            slot = int((at - begin) // SLOT_SECONDS)
            slots[:, slot] = np.fmax(slots[:, slot], (cpu / 100, memory / 100))
        loads.append(Load(filled(slots[0]), filled(slots[1])))
    return loads


def bitbrains() -> list[Load]:
    """Five VMs to a node, in the order of their names."""
    readings: dict[str, dict[int, float]] = defaultdict(dict)
    for row in _rows("bitbrains-50vm-2013/usage.csv.gz"):
        readings[row["vm"]][int(int(row["t_s"]) // SLOT_SECONDS)] = float(row["cpu_usage_mhz"])
    vms = [readings[name] for name in sorted(readings)]
    length = min(max(vm) for vm in vms) + 1
    used = np.array([[vm.get(slot, 0.0) for slot in range(length)] for vm in vms])
    return [_scaled(used[i : i + VMS_A_NODE].sum(axis=0)) for i in range(0, len(vms), VMS_A_NODE)]


def planetlab() -> list[Load]:
    """Twenty VMs to a node; those of the same rows of the following day go on where they were."""
    days: dict[str, list[list[float]]] = defaultdict(list)
    for row in _rows("planetlab-2011/cpu_util_5min.csv.gz"):
        days[row["day"]].append([float(row[f"u{i}"]) for i in range(DAY_SLOTS)])
    used = [np.array(vms[: PLANETLAB_NODES * PLANETLAB_VMS]) for _, vms in sorted(days.items())]
    whole = np.concatenate(used, axis=1).reshape(PLANETLAB_NODES, PLANETLAB_VMS, -1).sum(axis=1)
    return [_scaled(node) for node in whole]


LOADS = {"alibaba": alibaba, "bitbrains": bitbrains, "planetlab": planetlab}


class Judged(NamedTuple):
    """One node and resource: shares of the starts, and of the node."""

    in_the_way: float
    """Starts after which others needed some of what was promised."""
    bound_exceeded: float
    promised: float
    others_in_the_way: float
    """The same under Koordinator's law."""
    others_promised: float


def _peaks(used: Floats, slots: int) -> Floats:
    """The largest use in the slots after each, shape (n - slots,)."""
    peaks: Floats = np.lib.stride_tricks.sliding_window_view(used[1:], slots).max(axis=1)
    return peaks


def replay(load: Load, risk: float, spec: PolicySpec) -> dict[str, Judged]:
    """A node's life under the production model and law; starts count from the second day on."""
    slots, growth = slots_of(spec.batch_resources.runtime), spec.batch_resources.growth / 100
    memory = load.memory if load.memory is not None else np.full(len(load.cpu), 0.5)
    needs, promised, bounds = Needs(), np.zeros((len(load.cpu), 2)), np.full((len(load.cpu), 2), np.nan)
    size = np.array([CORES, SIZE])
    reserve = np.array([spec.cpu.reserve, spec.memory.reserve]) / 100 * size
    now = [0.0, 0.0]
    for i, (cpu, held) in enumerate(zip(load.cpu, memory, strict=True)):
        for begins in (True, False):  # when a slot begins the one before is over
            at = i * SLOT_SECONDS + (1.0 if begins else SLOT_SECONDS - 1.0)
            needs = look(needs, at, SLOT_SECONDS, cpu * CORES, held * SIZE, slots, risk)
            bound = needs.bound
            for _ in range(1 if begins else STEPS):
                for j in range(2) if bound is not None else ():
                    left = size[j] - reserve[j] - (bound or (0.0, 0.0))[j]
                    grown = growth / STEPS * size[j]
                    now[j] = promise(left, now[j], GRAIN_RATIO * size[j], grown, may_grow=not begins)
        promised[i], bounds[i] = now, bound if bound is not None else (np.nan, np.nan)
    found = {}
    margins = (100 - CPU_RECLAIM_PERCENT) / 100, (100 - MEMORY_RECLAIM_PERCENT) / 100
    for j, (name, used) in enumerate((("cpu", load.cpu), ("memory", load.memory))):
        if used is None:
            continue
        peaks = _peaks(used, slots)[DAY_SLOTS:]
        starts = slice(DAY_SLOTS, DAY_SLOTS + len(peaks))
        mine = promised[starts, j] / size[j]
        theirs = np.maximum(1 - margins[j] - used[starts], 0.0)
        found[name] = Judged(
            in_the_way=float((peaks > 1 - mine + 1e-6).mean()),
            bound_exceeded=float((peaks > bounds[starts, j] / size[j] + 1e-6).mean()),
            promised=float(mine.mean()),
            others_in_the_way=float((peaks > 1 - theirs + 1e-6).mean()),
            others_promised=float(theirs.mean()),
        )
    return found


def measure(names: list[str] | None = None) -> list[dict[str, Any]]:
    """Per load, resource and risk the means over nodes; the interval of the share that was in the way."""
    spec, rows = PolicySpec(), []
    for name in names or list(LOADS):
        loads = LOADS[name]()
        for risk in RISKS:
            judged = [replay(load, risk, spec) for load in loads]
            for resource in judged[0]:
                each = [one[resource] for one in judged]
                kept = mean_interval([one.bound_exceeded for one in each])
                means = {field: float(np.mean([getattr(o, field) for o in each])) for field in Judged._fields}
                idle = float(np.mean([1 - getattr(load, resource).mean() for load in loads]))
                interval = {"low": kept.low, "high": kept.high}
                rows.append(
                    {"load": name, "resource": resource, "risk": risk, "nodes": len(loads), "idle": idle, **interval}
                    | {k: round(v, 5) for k, v in means.items()}
                )
    return rows


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """A bar each: the interval of the share of bounds that were too low must not lie above the risk."""
    lines = []
    for row in rows:
        name = f"publication, {row['load']} {row['resource']} at {row['risk']:.0%}: bounds that were too low"
        found = Interval(row["bound_exceeded"], row["low"], row["high"])
        judged = "pass" if found.high <= row["risk"] else "fail" if found.low > row["risk"] else "undecided"
        lines.append(bar(name, judged, found, row["risk"], ""))
        said = f"promised {row['promised']:.1%} of a node of which {row['idle']:.1%} idle, {row['in_the_way']:.2%} of "
        said += f"starts in the way; Koordinator's law {row['others_promised']:.1%}, {row['others_in_the_way']:.2%}"
        lines.append(f"          {said}")
    return lines


def run(_full: bool) -> list[str]:
    """Replay everything; the same on every machine. The rows are kept."""
    rows = measure()
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "publication.jsonl").write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
    return summary(rows)
