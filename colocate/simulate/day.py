"""A made-up day of jobs for a fleet of GPUs, for the demonstration: what is like Philly in it is said here.

The share of jobs of each size, and the median and mean of their durations, are those counted in Microsoft's Philly
trace of 2017 (Jeon and others, USENIX ATC 2019); that they follow a log-normal law, the course of a day in which twice
as many come by day as by night, and the CPUs and memory that a GPU's work asks for, are assumed.
"""

from __future__ import annotations

import math

import numpy as np

from colocate.simulate.placement import Kinds
from colocate.simulate.running import Work
from colocate.simulate.scores import MOST_GPUS, WHOLE
from colocate.simulate.workloads import Workload

JOBS_OF_GPUS = {1: 76_627, 2: 1_818, 4: 1_870, 8: 1_643, 16: 199, 32: 67}
MEDIAN_SECONDS, MEAN_SECONDS, MOST_SECONDS = 1_144.0, 13_136.0, 86_400.0
DAY_SECONDS, BY_DAY = 86_400.0, 1 / 3
"""The rate of arrivals is 1 +- this about its mean."""
LOAD = 1.0
"""GPU seconds that are asked for, over those that the fleet has in a day."""
CPU_MILLI_OF_GPU, MEMORY_MIB_OF_GPU = 6_000, 40_960


def made_day(gpus: int, seed: int) -> Workload:
    """Jobs whose work would fill so many GPUs for a day. The same for the same seed."""
    rng = np.random.default_rng(seed)
    sizes, counts = np.array(list(JOBS_OF_GPUS)), np.array(list(JOBS_OF_GPUS.values()), float)
    spread = math.sqrt(2.0 * math.log(MEAN_SECONDS / MEDIAN_SECONDS))
    asked, run = np.empty(0, np.int64), np.empty(0)
    while (asked * run).sum() < LOAD * gpus * DAY_SECONDS:
        asked = np.append(asked, rng.choice(sizes, 100, p=counts / counts.sum()))
        run = np.append(run, np.minimum(np.exp(rng.normal(math.log(MEDIAN_SECONDS), spread, 100)), MOST_SECONDS))
    come: list[float] = []
    while len(come) < len(asked):  # by thinning (Lewis and Shedler, 1979)
        at = rng.uniform(0.0, DAY_SECONDS)
        rate = 1.0 - BY_DAY * math.cos(2.0 * math.pi * at / DAY_SECONDS)
        if rng.uniform(0.0, 1.0 + BY_DAY) < rate:
            come.append(at)
    per = np.minimum(asked, MOST_GPUS)
    widths, kind = np.unique(per, return_inverse=True)
    kinds = Kinds(
        widths * CPU_MILLI_OF_GPU,
        widths * MEMORY_MIB_OF_GPU,
        widths,
        np.full(len(widths), WHOLE),
        0 * widths,
        0 * widths,
    )
    work = Work(np.sort(come), run, kind.astype(np.int64), asked // per, asked // per, np.ones((len(run), 2)))
    return Workload(work, kinds, tuple(f"job {i}" for i in range(len(asked))))
