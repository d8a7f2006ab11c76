"""The simulator beside reality: the same jobs, at the same times, played by our controller on a real etcd and
kube-apiserver with KWOK's nodes, and simulated under `ours`.

A job's pods are told Succeeded as soon as all have been bound for as long as the job runs. Compared are the mean
completion time and the makespan; a difference is of the controller's latency and of what the simulator gets wrong. The
rounds and their jobs were fixed beforehand.
"""

from __future__ import annotations

import asyncio
import time

import numpy as np

from benchmarks.common import Runs, bar, reference_loop
from benchmarks.gang_live import OURS, PLAYED, Live, fresh, scheduler_of
from colocate.errors import HostUnfit
from colocate.simulate.compare import known_run
from colocate.simulate.placement import Kinds, Nodes, arrays
from colocate.simulate.running import Work
from colocate.simulate.scores import WHOLE
from colocate.simulate.workloads import Workload

ROUNDS, NODES, NODE_GPUS = 3, 8, 8
JOBS, ARRIVE_SECONDS, LEAST, MOST = 80, 150.0, 5.0, 60.0
SIZES, SHARES = (1, 2, 4, 8, 16, 32), (0.4, 0.15, 0.2, 0.15, 0.07, 0.03)
"""Members with a GPU each, and how many of the jobs are so large."""
DEADLINE_SECONDS = 900.0
BAR, POLICY = 0.05, "ours"


def jobs_of(round_number: int) -> Workload:
    """Arrivals over two and a half minutes."""
    draws = np.random.default_rng(round_number)
    submit = np.sort(draws.uniform(0.0, ARRIVE_SECONDS, JOBS)).round(1)
    run = np.exp(draws.uniform(np.log(LEAST), np.log(MOST), JOBS)).round(1)
    members = draws.choice(SIZES, JOBS, p=SHARES).astype(np.int64)
    work = Work(submit - submit[0], run, np.zeros(JOBS, np.int64), members, members, np.ones((JOBS, 2)))
    return Workload(work, Kinds(*arrays([(100, 64, 1, WHOLE, 0, 0)])), tuple(f"job{i:03}" for i in range(JOBS)))


def simulated(workload: Workload) -> tuple[float, float]:
    """(mean completion time, makespan), seconds."""
    ones = np.ones(NODES, np.int64)
    nodes = Nodes(ones * 128_000, ones * (512 << 10), ones * NODE_GPUS, 0 * ones, 0 * ones, 0 * ones)
    end = known_run(POLICY, nodes, workload, 1).start + workload.work.run
    return float((end - workload.work.submit).mean()), float(end.max())


async def played(live: Live, workload: Workload) -> tuple[float, float]:
    """The same, in reality; our controller runs."""
    work, began = workload.work, time.monotonic()
    ends: dict[int, float] = {}
    over: set[int] = set()
    created = -1

    async def create(i: int) -> None:
        await live.pods([(workload.where[i], int(work.members[i]))], OURS, gpus=1, farm="gpu")

    making: list[asyncio.Task[None]] = []
    while len(over) < JOBS:
        await asyncio.sleep(0.02)
        now = time.monotonic() - began
        if now > DEADLINE_SECONDS:
            raise HostUnfit(f"only {len(over)} of {JOBS} jobs were over after {DEADLINE_SECONDS:g} s")
        while created + 1 < JOBS and work.submit[created + 1] <= now:
            created += 1
            making.append(asyncio.create_task(create(created)))
        for i in range(created + 1):
            names = [f"{workload.where[i]}-{k}" for k in range(int(work.members[i]))]
            if i not in ends and all(name in live.bound for name in names):
                ends[i] = max(live.bound[name] for name in names) - began + float(work.run[i])
            if i in ends and i not in over and now >= ends[i]:
                over.add(i)
                making.append(asyncio.create_task(live.many(live.succeed, names)))
    await asyncio.gather(*making)
    found = np.array([ends[i] for i in range(JOBS)])
    return float((found - work.submit).mean()), float(found.max())


async def _round(number: int) -> dict[str, float]:
    workload, before = jobs_of(number), reference_loop()
    async with fresh() as (live, plane):
        await live.nodes([f"farm{i}" for i in range(NODES)], {"nvidia.com/gpu": str(NODE_GPUS)}, farm="gpu", **PLAYED)
        with scheduler_of(OURS, plane):
            await asyncio.sleep(4)
            jct, makespan = await played(live, workload)
    its_jct, its_makespan = simulated(workload)
    return {
        "jct": round(jct, 3),
        "makespan": round(makespan, 3),
        "simulated_jct": round(its_jct, 3),
        "simulated_makespan": round(its_makespan, 3),
        "reference": round(before, 5),
        "reference_after": round(reference_loop(), 5),
    }


def run(_full: bool) -> list[str]:
    """Measure what is missing, and judge: the worst round counts."""
    runs = Runs("fidelity")
    for number in range(ROUNDS):
        if not runs.has(round=number):
            runs.add(round=number, **asyncio.run(_round(number)))
    lines = []
    for what in ("jct", "makespan"):
        gaps = [abs(r[f"simulated_{what}"] / r[what] - 1.0) for r in runs.runs if "round" in r]
        text = f"fidelity {what}: simulated beside a real controller on KWOK, the worst of {len(gaps)} rounds"
        lines.append(bar(text, "PASS" if max(gaps) <= BAR else "FAIL", 100 * max(gaps), 100 * BAR, "%"))
    return lines
