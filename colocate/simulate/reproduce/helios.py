"""Helios (SC 2021): how much of an oracle's gain estimates bring on Philly; the order of FIFO, QSSF, SJF and SRTF.

QSSF takes the job first that will take least GPU time as it is estimated; on Philly its authors did not learn the
estimates but drew them around the truth (`philly_estimate.py`), and so do we. The copy of Philly's jobs that can be had
is another cut, with fewer long jobs: on the published clusters nobody waits. Each virtual cluster here has three tenths
of its nodes, and at least a seventh more than its jobs need in the mean; so what is compared is the order, not seconds.
"""

from __future__ import annotations

import datetime as dt
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from colocate.errors import BadInput
from colocate.simulate import rounds, traces
from colocate.simulate.reproduce import Cell, in_order

SOURCE = "Hu and others, Helios, SC 2021, QSSF on Philly (S-Lab-System-Group/HeliosArtifact)"
TOLERANCE = {
    "helios": "each faster than the next, as published: the ratio of their means, of completion and of waiting"
}
FOLDER, JOBS = "helios-2020", "philly-2017/philly.csv.gz"
NODE_GPUS, ROUND_SECONDS, SEED = 8, 60.0, 6
OF_NODES, OF_DEMAND = 0.3, 1.15
BEGIN, SECONDS = dt.datetime(2017, 10, 1, tzinfo=dt.UTC), 61 * 86400.0
ERRORS = ((0.1, 0.1), (0.5, 0.5), (0.7, 1.0), (0.9, 10.0), (1.0, 100.0))
"""Of estimates: so many of them are off by at most so much of the truth."""
ORDERS = {
    "FIFO": (rounds.FIFO, False),
    "SJF": (rounds.SHORTEST, False),
    "SRTF": (rounds.LEAST_LEFT, True),
    "QSSF": (rounds.SHORTEST, False),
}


def estimates(truth: NDArray[np.float64], draws: np.random.Generator) -> NDArray[np.float64]:
    """Of durations, seconds; never less than none."""
    lot = draws.random(truth.size)
    step = np.searchsorted([share for share, _ in ERRORS], lot, side="right")
    most = np.array([error for _, error in ERRORS])
    off = draws.uniform(np.concatenate(([0.0], most[:-1]))[step], most[step])
    longer = draws.random(truth.size) < 0.5
    return np.where(longer | (off >= 1.0), truth * (1.0 + off), truth * (1.0 - off))


def cells(name: str, folder: Path, say: Callable[[str], None]) -> Iterator[Cell]:
    """Six. Raises BadInput."""
    del name
    there = folder / FOLDER
    nodes = {r.text("vc"): r.whole("node num") for r in traces.table(there / "philly_vc_nodes.csv", ("vc", "node num"))}
    published: dict[str, dict[str, float]] = {}
    columns = ("metric", "vc", *(policy.lower() for policy in ORDERS))
    for row in traces.table(there / "published_qssf_philly_table.csv", columns):
        if row.text("vc") == "all":
            published[row.text("metric")] = {policy: row.number(policy.lower()) for policy in ORDERS}
    jobs: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for row in traces.table(folder / JOBS, ("timestamp", "duration", "num_gpus", "cluster")):
        at = (row.moment("timestamp") - BEGIN).total_seconds()
        if 0.0 <= at < SECONDS and row.text("cluster") in nodes:
            jobs[row.text("cluster")].append((at, row.number("duration", least=0.0), row.whole("num_gpus", least=1)))
    took, waited, draws = dict.fromkeys(ORDERS, 0.0), dict.fromkeys(ORDERS, 0.0), np.random.default_rng(SEED)
    for vc, found in sorted(jobs.items()):
        say(f"virtual cluster {vc}")
        submit, run, gpus = np.array(sorted(found)).T.copy()
        guess, many = estimates(run, draws) * gpus, gpus.astype(np.int64)
        demand = float((run * gpus).sum()) / SECONDS
        least = math.ceil(max(OF_DEMAND * demand, gpus.max()) / NODE_GPUS)
        capacity = max(round(OF_NODES * nodes[vc]), least) * NODE_GPUS
        for policy, (order, preempts) in ORDERS.items():
            line = rounds.Runs(submit, run, guess if policy == "QSSF" else run, many)
            end = rounds.ends(line, capacity, order, ROUND_SECONDS, 0.0, preempts, True)
            took[policy] += float((end - submit).sum())
            waited[policy] += float((end - submit - run).sum())
    count = sum(len(found) for found in jobs.values())
    if not count:
        raise BadInput(f"{folder / JOBS} has no job of October or November 2017 in a virtual cluster of {there}")
    for metric, label, sums in (("jct_avg", "completion", took), ("que_avg", "waiting", waited)):
        ours = {policy: value / count for policy, value in sums.items()}
        yield from (cell._replace(name=f"{label}: {cell.name}") for cell in in_order(published[metric], ours))
