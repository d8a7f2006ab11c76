"""How fast model and laws run over many nodes at once: `decide/fleet.py`, 1,000 nodes of one service and four jobs.

CPU time of one thread, beside a reference loop; rounds fixed beforehand.
"""

from __future__ import annotations

import time

import numpy as np

from benchmarks.common import Runs, bar, reference_loop
from colocate.decide import fleet
from colocate.policy.schema import PolicySpec

NODES, JOBS, ROUNDS, WARM, TICKS = 1000, 4, 5, 20, 100
BAR_NODE_TICKS = 2e5


def once(seed: int) -> float:
    """Node-ticks a second of CPU."""
    engine = fleet.Batch(NODES, 1, JOBS, PolicySpec(), cpus=32.0, memory_bytes=float(1 << 37), latency=False)
    generator = np.random.default_rng(seed)
    told, of_node = np.zeros((NODES, 1 + JOBS, fleet.WORKLOAD)), np.zeros((NODES, fleet.NODE))
    told[:, :, fleet.WORKING_SET] = 1 << 28
    of_node[:, fleet.IN_FORCE], of_node[:, fleet.AVAILABLE_BYTES] = 1.0, 1 << 36
    spent = 0.0
    for k in range(WARM + TICKS):
        told[:, :, fleet.CPU_US] += generator.uniform(1e5, 3e6, (NODES, 1 + JOBS))
        told[:, 0, fleet.PRESSURE_US] += generator.uniform(0, 5e5, NODES)
        of_node[:, fleet.NOW], of_node[:, fleet.DAY_SECONDS] = 1000.0 + k, 1e6 + k
        of_node[:, fleet.BUSY_US] = told[:, :, fleet.CPU_US].sum(axis=1)
        started = time.thread_time()
        engine.step(told, of_node)
        spent += (time.thread_time() - started) * (k >= WARM)
    return NODES * TICKS / spent


def run(_full: bool) -> list[str]:
    """The slowest of the rounds against the bar."""
    runs = Runs("speed")
    once(0)  # compiles
    for number in range(ROUNDS):
        if not runs.has(round=number):
            runs.add(round=number, node_ticks_per_second=round(once(number)), reference_loop_seconds=reference_loop())
    found = min(r["node_ticks_per_second"] for r in runs.runs if "round" in r)
    judged = "pass" if found >= BAR_NODE_TICKS else "fail"
    return [
        bar(
            "speed: node-ticks a second and core through model and laws, slowest round",
            judged,
            found,
            BAR_NODE_TICKS,
            "",
        )
    ]
