"""RLScheduler (SC 2020), Table V: average bounded slowdown of five heuristics, with and without backfilling.

Ten sequences of 1,024 jobs each out of a trace of the Lublin-Feitelson model, each on an empty cluster. One quirk is
kept for the published values: WFP3 and UNICEP see no wait of a job, but -1 - its submission.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from colocate.errors import BadInput
from colocate.simulate import traces
from colocate.simulate.queue import Jobs, bounded_slowdown, started
from colocate.simulate.reproduce import Cell

SOURCE = "Zhang and others, RLScheduler, SC 2020, Table V (DIR-LAB/deep-batch-scheduler)"
TOLERANCE = {"rlscheduler": "each of ten sequences exactly, the mean to two decimals"}
FOLDER, SIZE, SEQUENCE = "rlscheduler-sc20", 256, 1024
COLUMNS = {"fcfs": "FCFS", "wfp": "WFP3", "uni": "UNICEP", "sjf": "SJF", "f1": "F1"}
EPSILON = 1e-15
"""Of the published code, where it would divide by nothing."""
SAME = 1e-9
"""Relative: sums in another order differ by rounding."""


def score(name: str, jobs: Jobs) -> NDArray[np.float64]:
    """Of each job, the least first."""
    submit, request, procs = jobs.submit, jobs.request, jobs.procs
    waited = -1.0 - submit
    if name == "fcfs":
        return submit
    if name == "sjf":
        return request
    if name == "f1":
        return np.log10(request) * procs + 870.0 * np.log10(submit)
    if name == "wfp":
        return -((waited / request) ** 3) * procs
    return -(waited + EPSILON) / (np.log2(procs + EPSILON) * (request + EPSILON))  # type: ignore[no-any-return]


def cells(name: str, folder: Path, say: Callable[[str], None]) -> Iterator[Cell]:
    """Twenty. Raises BadInput."""
    del name
    there = folder / FOLDER
    columns = ("trace", "backfill", "sequence", "start_index", "policy", "avg_bounded_slowdown")
    sequences: dict[tuple[str, str, str], list[tuple[int, float]]] = defaultdict(list)
    for row in traces.table(there / "expected_per_sequence.csv", columns):
        key = row.text("trace"), row.text("backfill"), row.text("policy")
        sequences[key].append((row.whole("start_index"), row.number("avg_bounded_slowdown")))
    jobs: dict[str, Jobs] = {}
    for row in traces.table(there / "expected_table5.csv", ("trace", "backfill", *COLUMNS.values())):
        trace, backfill = row.text("trace"), row.text("backfill")
        if trace not in jobs:
            jobs[trace] = traces.swf(there / f"{trace}.swf.gz")
        for policy, column in COLUMNS.items():
            say(f"{trace}, {column}")
            published, same, values = row.number(column), 0, []
            for at, expected in sequences[trace, backfill, policy]:
                some = jobs[trace].part(at, at + SEQUENCE)
                found = bounded_slowdown(some, started(some, score(policy, some), SIZE, backfill=backfill == "1"))
                same += abs(found - expected) <= SAME * expected
                values.append(found)
            count = len(values)
            if not count:
                raise BadInput(f"{there / 'expected_per_sequence.csv'} has no sequence of {trace}, {policy}")
            ours = float(np.mean(values))
            label = f"{row.values.get('paper_name', trace)} {column}{' + backfilling' if backfill == '1' else ''}"
            passed = same == count and abs(ours - published) <= 0.005 + SAME * published
            yield Cell(label, published, ours, passed, f"{same} of {count} sequences the same")
