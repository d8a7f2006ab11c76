"""The simulator's speed on one core, on the traces that it is tried with (COLOCATE_TRACES).

queue: decisions a second, of scores that never change and of a trained priority. steps: of 256 environments at once.
placement: pods a second onto the 1,213 GPU nodes of openb. philly: seconds for two months of jobs. exact: seconds for
all tables of `colocate reproduce` that are to be exact. colocated: seconds for a day of 600 nodes with services and
batch under the agent's laws, a second a step, from one hour of it. nodes, jobs, waiting: how the rate falls with more
nodes (pods a second), a longer trace, and more jobs that wait at once (jobs a second); results/simulate-growth.html
plots it. ray: how much longer a sweep takes over a Ray with two workers than in two threads, once Ray runs.
Each round does everything forwards and then backwards; everything has been compiled before.
"""

from __future__ import annotations

import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import RESULTS, Runs, bar, reference_loop
from colocate.errors import BadInput
from colocate.policy.schema import PolicySpec
from colocate.report.charts import Series, line_chart
from colocate.simulate import traces
from colocate.simulate.colocation import run as run_world
from colocate.simulate.environments import QueueVectorEnv
from colocate.simulate.episodes import new_pools, rated
from colocate.simulate.evaluation import OURS_ARM, Assumptions, Size, make_fleet, prepared
from colocate.simulate.fleet import DISCIPLINES, simulate
from colocate.simulate.node_environment import NodeVectorEnv
from colocate.simulate.page import write_page
from colocate.simulate.placement import Nodes, arrivals, place, typical_shares
from colocate.simulate.queue import started
from colocate.simulate.reproduce import reproduce
from colocate.simulate.reproduce.openb import ARRIVED
from colocate.simulate.sweep import World, on_ray, points, sweep
from colocate.simulate.workloads import Workload, read_jobs, read_nodes

ROUNDS, WINDOW, POOLS, STEPS = 3, 1024, 256, 200
WEIGHTS = np.array([1.8, 1.0, -0.5, -0.5, 0.3, 1.1, 0.0, -1.5])
MORE_NODES, MORE_JOBS, MORE_WAITING = (100, 1_000, 10_000), (4_000, 16_000, 64_000), (100, 1_000, 10_000)
RAY_SEEDS = tuple(range(1, 41))
BARS = {"queue": 1e6, "trained": 1e6, "steps": 1e6, "placement": 1e5, "philly": 1.0, "exact": 60.0, "colocated": 60.0,
        "ray": 1.1}  # fmt: skip
EXACT = ("rlscheduler", "pollux-tiresias", "pollux-optimus")
UNITS = {"philly": "s", "exact": "s", "colocated": "s", "ray": "times"}
"""What is better the less it is."""
Arm = Callable[[], float]


def _rate(count: int, act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return count / (time.perf_counter() - began)


def _seconds(act: Callable[[], object]) -> float:
    return 1.0 / _rate(1, act)


def _two_months(folder: Path) -> Workload:
    """October and November of Philly: 68,510 jobs."""
    whole = read_jobs(folder / "philly-2017" / "philly.csv.gz", read_nodes("64x8"))
    _, *rows = traces.lines(folder / "philly-2017" / "philly.csv.gz")
    before = sum(row[:7] < "2017-10" for row in rows)
    return whole.part(before, before + sum(row[:7] in ("2017-10", "2017-11") for row in rows))


def _arms(folder: Path) -> dict[str, Arm]:
    jobs = traces.swf(folder / "rlscheduler-sc20" / "lublin_256.swf.gz")
    firsts = np.arange(8) * WINDOW
    windows, pools = [jobs.part(int(f), int(f) + WINDOW) for f in firsts], new_pools(1, WINDOW)
    many = QueueVectorEnv(POOLS, jobs, size=256, slots=32)
    many.reset(seed=1)
    governed = NodeVectorEnv(POOLS)
    governed.reset(seed=1)
    nodes, models = traces.openb_nodes(folder / "openb-2023" / "nodes_gpu_node.csv.gz")
    pods = traces.openb_pods(folder / "openb-2023" / "pods" / "default.csv.gz", models)
    come = arrivals(pods.kinds, pods.kind_of, ARRIVED * int(nodes.gpus.sum()) * 1000, 42)
    typical = typical_shares(pods.kind_of, pods.kinds)
    two_months, fleet = _two_months(folder), read_nodes("64x8")

    def queue() -> None:
        for window in windows:
            started(window, window.request, 256, backfill=True)

    def steps(env: QueueVectorEnv | NodeVectorEnv, actions: NDArray[Any]) -> float:
        return _rate(POOLS * STEPS, lambda: [env.step(actions) for _ in range(STEPS)])

    arms: dict[str, Arm] = {
        "queue": lambda: _rate(len(firsts) * WINDOW, queue),
        "trained": lambda: _rate(len(firsts) * WINDOW, lambda: rated(pools, jobs, 256, firsts, WEIGHTS, True)),
        "steps Queue": lambda: steps(many, np.zeros(POOLS, np.int64)),
        "steps Node": lambda: steps(governed, np.full((POOLS, 1), 0.5, np.float32)),
        "exact": lambda: _seconds(lambda: [reproduce(name, folder, lambda _: None) for name in EXACT]),
    }
    for policy in ("native", "best-fit", "fgd"):
        arms[f"placement {policy}"] = lambda p=policy: _rate(  # type: ignore[misc]
            len(come), lambda: place(nodes, pods.kinds, come, p, 1, typical if p == "fgd" else None)
        )
    for policy in ("native", "packing", "shortest-first"):
        arms[f"philly {policy}"] = lambda p=policy: _seconds(  # type: ignore[misc]
            lambda: simulate(fleet, two_months.kinds, two_months.work, DISCIPLINES[p], 1)
        )
    together = make_fleet(folder, Size(500, 100, 1), Assumptions(), 1)
    world, rules = prepared(OURS_ARM, together, PolicySpec())
    arms["colocated day"] = lambda: (
        24 * _seconds(lambda: run_world(world, together.tasks, rules, 3600, 1, PolicySpec()))
    )
    for count in MORE_NODES:
        larger = Nodes(*(np.resize(column, count) for column in nodes))
        arms[f"nodes {count}"] = lambda n=larger: _rate(  # type: ignore[misc]
            len(come), lambda: place(n, pods.kinds, come, "best-fit", 1)
        )
    for count in MORE_JOBS:
        part = two_months.part(0, count)
        arms[f"jobs {count}"] = lambda w=part: _played(fleet, w)  # type: ignore[misc]
    for count in MORE_WAITING:
        part = two_months.part(0, count)
        at_once = part._replace(work=part.work._replace(submit=np.zeros(count)))
        arms[f"waiting {count}"] = lambda w=at_once: _played(fleet, w)  # type: ignore[misc]
    sweeping = World(("64x8", "philly"), fleet, two_months)
    arms["ray"] = lambda: _over_ray(sweeping)
    return arms


def _played(fleet: Nodes, part: Workload) -> float:
    return _rate(len(part.where), lambda: simulate(fleet, part.kinds, part.work, DISCIPLINES["packing"], 1))


def _over_ray(world: World) -> float:
    """Seconds over Ray to seconds in threads, two at once; the mean of both orders, once Ray's workers are there."""
    import ray

    def in_threads() -> float:
        return _seconds(lambda: sweep([world], ["packing"], RAY_SEEDS, 20_000, lambda *_: None, workers=2))

    def there() -> float:
        todo = points(1, ["packing"], RAY_SEEDS)
        return _seconds(lambda: list(on_ray(ray, [world], todo, 20_000)))

    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        ray.init("local", num_cpus=2, include_dashboard=False, _temp_dir=folder, logging_level=logging.ERROR)
        try:
            there()
            here, over, again, at_last = in_threads(), there(), there(), in_threads()
        finally:
            ray.shutdown()
    return (over + again) / (here + at_last)


def measure(runs: Runs) -> None:
    """The rounds that are missing. Raises BadInput without the traces."""
    if all(runs.has(round=index) for index in range(ROUNDS)):
        return
    arms = _arms(traces.folder(None))
    for act in arms.values():
        act()  # compiled
    for index in range(ROUNDS):
        if runs.has(round=index):
            continue
        found: dict[str, list[float]] = {name: [] for name in arms}
        before = reference_loop()
        for name in [*arms, *reversed(arms)]:
            found[name].append(round(arms[name](), 6))
        reference = {"reference": round(before, 5), "reference_after": round(reference_loop(), 5)}
        runs.add(round=index, **reference, found=found)


def _plot(rounds: list[dict[str, Any]]) -> None:
    lines = []
    for kind, name in (("nodes", "pods, by nodes"), ("jobs", "jobs, by jobs"), ("waiting", "jobs, by jobs that wait")):
        middle = {
            float(arm.split()[1]): statistics.median(value for r in rounds for value in r["found"][arm])
            for arm in rounds[0]["found"]
            if arm.startswith(f"{kind} ")
        }
        lines.append(Series(name, [(count, 1e6 / rate) for count, rate in sorted(middle.items())]))
    chart = line_chart("What one takes", lines, "nodes, jobs", "microseconds", log_x=True, log_y=True)
    about = (
        f"Medians of {len(rounds)} rounds on one core; best fit on openb's pods, packing of Philly's jobs on 64 nodes"
    )
    write_page(RESULTS / "simulate-growth.html", "How the simulator's cost grows", about, "", [], [(chart, "")])


def run(_full: bool) -> list[str]:
    """Measure what is missing, and judge."""
    if not os.environ.get(traces.ENVIRONMENT):
        return [f"simulate: needs {traces.ENVIRONMENT}, the folder of the traces"]
    runs = Runs("simulate")
    try:
        measure(runs)
    except BadInput as error:
        return [f"simulate: {error}"]
    rounds = [r for r in runs.runs if "round" in r]
    lines = []
    for name in rounds[0]["found"]:
        values = [value for r in rounds for value in r["found"][name]]
        middle, kind = statistics.median(values), name.split()[0]
        less = kind in UNITS
        text = f"simulate {name} (of {len(values)}, {min(values):,.3g} to {max(values):,.3g})"
        if kind not in BARS:
            lines.append(f"          {text}: {middle:,.0f} a second")
            continue
        good = middle <= BARS[kind] if less else middle >= BARS[kind]
        lines.append(bar(text, "PASS" if good else "FAIL", middle, BARS[kind], UNITS.get(kind, "a second")))
    _plot(rounds)
    reference = statistics.median(v for r in rounds for v in (r["reference"], r["reference_after"]))
    lines.append(f"          simulate, beside a reference loop of {1e3 * reference:.1f} ms")
    return lines
