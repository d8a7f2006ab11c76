"""Train a queue priority on the first half of a trace, judge it on the second, and plot how it learnt.

    python examples/train_queue_policy.py JOBS.swf.gz --size 256 --file learning.html

About a minute on one core for ten thousand jobs. What is learnt is eight numbers, printed at the end; what it is judged
by are windows of jobs that come after all that it was trained on, beside the heuristics, with intervals of the paired
ratios of their bounded slowdowns.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

from colocate.cli.options import positive
from colocate.cli.output import check_file, end_status, print_table, status
from colocate.errors import BadInput
from colocate.model.statistics import ratio_interval
from colocate.report.charts import Series, line_chart
from colocate.simulate import traces
from colocate.simulate.episodes import new_pools, rated
from colocate.simulate.page import PageTable, write_page
from colocate.simulate.queue import bounded_slowdown, started
from colocate.simulate.reproduce.rlscheduler import score
from colocate.simulate.train import GENERATIONS, Generation, evolve

JUDGED = 20
HEURISTICS = {"FCFS": "fcfs", "SJF": "sjf", "F1": "f1"}


def main(arguments: list[str] | None = None) -> int:
    """Exit 1 where a heuristic is better on the windows that were not seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, help="jobs in the Standard Workload Format")
    parser.add_argument("--size", type=positive, required=True, help="processors of the pool")
    parser.add_argument("--jobs", type=positive, default=1024, help="of a window (default 1024)")
    parser.add_argument("--no-backfill", action="store_true", help="nobody is started past another one")
    parser.add_argument("--generations", type=positive, default=GENERATIONS, help=f"(default {GENERATIONS})")
    parser.add_argument("--seed", type=positive, default=1)
    parser.add_argument("--file", default="learning.html", help="the page (default learning.html)")
    options = parser.parse_args(arguments)
    try:
        return _train(options)
    except BadInput as error:
        print(f"train_queue_policy: {error}", file=sys.stderr)
        return error.exit_code


def _train(options: argparse.Namespace) -> int:
    page, backfill = check_file("--file", options.file), not options.no_backfill
    jobs = traces.swf(options.trace)
    half, began = len(jobs.submit) // 2, time.perf_counter()
    if half <= options.jobs:
        raise BadInput(f"{options.trace}: half of {len(jobs.submit)} jobs are fewer than a window of {options.jobs}")
    if int(jobs.procs.max()) > options.size:
        raise BadInput(f"--size: a job asks for {jobs.procs.max()} processors, of {options.size}")

    def say(number: int, generation: Generation) -> None:
        status(f"generation {number} of {options.generations}: bounded slowdown {generation.checked:.1f}")

    learned = evolve(
        jobs.part(0, half),
        options.size,
        options.jobs,
        backfill=backfill,
        seed=options.seed,
        generations=options.generations,
        say=say,
    )
    end_status()
    seconds = time.perf_counter() - began
    firsts = half + np.random.default_rng(options.seed + 1).integers(
        len(jobs.submit) - half - options.jobs + 1, size=JUDGED
    )
    ours = rated(new_pools(1, options.jobs), jobs, options.size, firsts, learned.weights, backfill)
    rows = [("trained", f"{ours.mean():.2f}", "")]
    beaten = True
    for name, by in HEURISTICS.items():
        theirs = []
        for first in firsts:
            window = jobs.part(int(first), int(first) + options.jobs)
            theirs.append(bounded_slowdown(window, started(window, score(by, window), options.size, backfill=backfill)))
        ratio = ratio_interval(list(ours), theirs, comparisons=len(HEURISTICS))
        rows.append((name, f"{np.mean(theirs):.2f}", f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"))
        beaten = beaten and bool(ours.mean() < np.mean(theirs))
    columns = ("priority", "bounded slowdown", "trained / it")
    print_table(columns, rows)
    print(f"trained in {seconds:.0f} s on the first {half} jobs; judged on {JUDGED} windows of the other half")
    print(f"least first: {learned.as_text()}")
    points = list(enumerate(learned.curve))
    lines = [
        Series("the best on this generation's windows", [(float(n), g.trained) for n, g in points]),
        Series("the mean on the windows it is chosen by", [(float(n), g.checked) for n, g in points]),
    ]
    chart = line_chart("Learning", lines, "generation", "bounded slowdown")
    table = PageTable(
        "On windows that it was not trained on", columns, rows, "Ratios are paired, 95 % for all together."
    )
    about = f"{options.trace.name}, {options.size} processors, seed {options.seed}, {seconds:.0f} s of training"
    write_page(page, "A queue priority, trained", about, "", [table], [(chart, "On the half that is trained on.")])
    print(f"report: {page.resolve()}")
    return 0 if beaten else 1


if __name__ == "__main__":
    sys.exit(main())
