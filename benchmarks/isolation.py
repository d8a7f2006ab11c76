"""What the service feels beside batch: p99, batch work and effective utilization in each arm, paired round by round.

Service: the demo's, pinned workers, open loop. Batch: training, CPU hogs, memory growth. Arms: alone, unmanaged,
kubelet's BestEffort, koordlet's law on BestEffort, ours. The order of the arms is reversed in every second round.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys

from benchmarks.common import Runs, bar, reference_loop
from colocate.calibrate import PROBE
from colocate.cgroupfs import KernelPort, joined
from colocate.config import Calibration
from colocate.decide.reference.koordlet import next_quota_us, suppress_milli
from colocate.demo.result import Result
from colocate.demo.script import SERVICE_POD, Demo
from colocate.knobs import read_knob
from colocate.model.statistics import Interval, mean_interval, ratio_interval
from colocate.observe.cgroup import inodes_of, read_workload
from colocate.observe.node import capacity, figures

ARMS = ("alone", "unmanaged", "besteffort", "koordlet", "colocate")
BATCHES = ("training", "hogs", "growth")
ROUNDS, FULL_ROUNDS = 4, 8
SECONDS = 8.0
BARS = {"p99_besteffort": 1.05, "p99_alone": 1.25, "work": 0.9, "effective": 0.9}


class Cell(Demo):
    """One batch kind beside the demo's service, arm by arm."""

    def __init__(self, port: KernelPort, batch: str, round_: int) -> None:
        super().__init__(port, SECONDS, 100 + round_, 0.002, lambda _text, _done: None)
        self._batch, self._round = batch, round_

    def _training(self, i: int) -> list[str]:
        if self._batch == "hogs":
            return [sys.executable, "-IS", str(PROBE), "hog", str(self._progress_files[i])]
        command = super()._training(i)
        if self._batch == "growth":
            command += ["--most-bytes", str(700 << 20), "--grow-bytes", str(4 << 20)]
        return command

    async def _arms(self, calibration: Calibration) -> None:
        await self._arm("alone", calibration)
        for arm in ARMS[1:] if self._round % 2 == 0 else ARMS[:0:-1]:
            if arm == "koordlet":
                await self._koordlet()
            else:
                await self._arm(arm, calibration)

    async def _koordlet(self) -> None:
        group = joined(self._node.path, "kubepods/besteffort")
        law = asyncio.create_task(self._suppress(group))
        try:
            async with self._batch_in("kubepods/besteffort/podbatch") as jobs:
                await self._measure("koordlet", jobs)
        finally:
            law.cancel()
            await asyncio.gather(law, return_exceptions=True)
            self._knob("kubepods/besteffort", "cpu.max", "max 100000")

    async def _suppress(self, group: str) -> None:
        """koordlet's loop: 65 % of the node, once a second, from the last second."""
        port, have = self._port, capacity(self._port, self._node.path)
        cores = len(have.cpus)

        def used(path: str) -> int:
            inodes = inodes_of(port, path)
            seen = read_workload(port, id_=path, name=path, tier="service", path=path, inodes=inodes)
            return (seen.cpu_usage_us if seen else None) or 0

        service = joined(self._node.path, SERVICE_POD)
        before = (figures(port, "/", have.cpus, 0).cpu_busy_us or 0, used(service), used(group))
        while True:
            await asyncio.sleep(1)
            now = (figures(port, "/", have.cpus, 0).cpu_busy_us or 0, used(service), used(group))
            node, ls, be = ((b - a) // 1000 for a, b in zip(before, now, strict=True))
            before = now
            milli = suppress_milli(
                capacity_milli=1000 * cores,
                threshold_percent=65,
                node_used_milli=node,
                pods_used_milli=(("LS", ls), ("BE", be)),
            )
            current = (read_knob(port, group, "cpu.max", inodes_of(port, group)) or "max").split()[0]
            quota = next_quota_us(milli, -1 if current == "max" else int(current), cores)
            if quota is not None:
                with contextlib.suppress(OSError):
                    self._knob("kubepods/besteffort", "cpu.max", f"{quota} 100000")


def run(full: bool) -> list[str]:
    """Run what is missing; the summary."""
    runs, port = Runs("isolation"), KernelPort()
    rounds = FULL_ROUNDS if full else ROUNDS
    for round_ in range(rounds):
        for batch in BATCHES if full else BATCHES[:2]:
            if runs.has(batch=batch, round=round_, arm="colocate"):
                continue
            result: Result = asyncio.run(Cell(port, batch, round_).run(Calibration()))
            for arm, found in result.arms.items():
                runs.add(
                    batch=batch,
                    round=round_,
                    arm=arm,
                    reference=reference_loop(),
                    host_unchanged=result.host_unchanged,
                    p50_ms=found.p50_ms,
                    p99_ms=found.p99_ms,
                    work=found.batch_work_per_second,
                    cpu=found.cpu_utilization,
                    effective=found.effective_machine_utilization,
                    failed=found.failed_requests,
                    lost=found.batch_processes_lost,
                )
            print(f"isolation: {batch}, round {round_ + 1}/{rounds} done", file=sys.stderr, flush=True)
    return summary(runs)


def _column(runs: Runs, batch: str, arm: str, field: str) -> list[float]:
    rows = sorted((r for r in runs.runs if r.get("batch") == batch and r.get("arm") == arm), key=lambda r: r["round"])
    return [r[field] for r in rows if r[field] is not None]


def summary(runs: Runs) -> list[str]:
    """Each bar by the interval of paired ratios over the rounds."""
    lines = []
    for batch in dict.fromkeys(r["batch"] for r in runs.runs if "batch" in r):
        p99 = {arm: _column(runs, batch, arm, "p99_ms") for arm in ARMS}
        work = {arm: _column(runs, batch, arm, "work") for arm in ARMS}
        lines += [
            f"          {batch}, {arm}: p99 {_median(p99[arm]):.2f} ms, work {_median(work[arm]):.0f}/s, "
            f"medians of {len(p99[arm])}"
            for arm in ARMS
        ]
        to_plain = ratio_interval(p99["colocate"], p99["besteffort"])
        to_alone = ratio_interval(p99["colocate"], p99["alone"])
        to_koordlet = ratio_interval(p99["colocate"], p99["koordlet"])
        gained = ratio_interval(work["colocate"], work["besteffort"])
        more = ratio_interval(work["colocate"], work["koordlet"])
        effective: Interval = mean_interval(_column(runs, batch, "colocate", "effective"))
        bound = BARS["p99_besteffort"]
        lines += [
            bar(f"{batch}: p99 to BestEffort's", to_plain.below(bound), to_plain, bound),
            bar(f"{batch}: p99 to alone", to_alone.below(BARS["p99_alone"]), to_alone, BARS["p99_alone"]),
            bar(f"{batch}: batch work to BestEffort's", gained.above(BARS["work"]), gained, BARS["work"]),
            bar(
                f"{batch}: effective utilization", effective.above(BARS["effective"]), effective, BARS["effective"], ""
            ),
            bar(f"{batch}: p99 to koordlet's law", "reported", to_koordlet, 1.0),
            bar(f"{batch}: batch work to koordlet's law", "reported", more, 1.0),
        ]
    return lines


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2] if ordered else 0.0
