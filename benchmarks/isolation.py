"""What a service feels beside batch: p99, batch work and effective utilization in each arm, paired round by round.

Arms: alone, unmanaged, kubelet's BestEffort, koordlet's law on BestEffort, ours at the policy's defaults, ours at the
demo's faster values, and BestEffort and ours again while a third party burns CPU beside them; the order is reversed in
every second round. The same cells run here and in the guest (full cgroup v2, another kernel). Rounds are fixed in
`SUBSET` and `FULL`. The rows of our arms keep what the CPU law said and what the service waited, tick by tick, so that
a miss can be traced.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from benchmarks.common import Runs, bar, reference_loop
from benchmarks.services import WithNginx, WithPostgres, lacks
from colocate.actuate.statedir import default_state_dir
from colocate.agent.loop import Tick
from colocate.agent.numba_cache import load_kernels
from colocate.calibrate.measure import PROBE
from colocate.calibrate.probe import WorkCounter
from colocate.calibration import Calibration
from colocate.cgroup.knobfiles import read_knob
from colocate.cgroup.port import KernelPort
from colocate.cgroup.tree import inodes_of, joined
from colocate.cli.logs import configure_logs
from colocate.decide.reference.koordlet import next_quota_us, suppress_milli
from colocate.demo.process import Process
from colocate.demo.script import SERVICE_POD, Demo, Served
from colocate.model.statistics import Interval, mean_interval, ratio_interval
from colocate.observe.cgroup import oom_kills, read_workload
from colocate.observe.node import capacity, figures
from colocate.policy.schema import ColocationPolicy, PolicySpec, ServiceLevelObjective
from tools.guest import Guest
from tools.guest import lacks as guest_lacks

ARMS = (
    "alone", "unmanaged", "besteffort", "koordlet", "colocate", "colocate/demo", "besteffort/disturbed",
    "colocate/disturbed",
)  # fmt: skip
PLAIN_ARMS = ARMS[:5]
FULL_ARMS = tuple(a for a in ARMS if a not in ("unmanaged", "koordlet"))
"""Of a minute each: what is compared with BestEffort."""
BATCHES = ("training", "hogs", "growth", "stream", "cache", "beside")
"""`beside` is CPU hogs with a plain BestEffort group of hogs beside them."""
CPU_BATCHES = ("training", "hogs")
SERVICES = ("inference", "postgres", "nginx")
SUBSET = {("here", s, "hogs"): 3 for s in SERVICES}
FULL = {("here", s, b): 6 for s in SERVICES for b in BATCHES} | {
    ("guest", "inference", b): 6 for b in ("training", "hogs", "growth", "beside")
}
SECONDS = {"here": 20.0, "guest": 20.0}
FULL_SECONDS = 60.0
BARS = {"besteffort": 1.05, "here": 1.25, "guest": 1.1, "growth_besteffort": 0.5, "work": 0.9, "effective": 0.9,
        "disturbed": 1.1, "bought": 0.8}  # fmt: skip
LEAST = 1e-3


def arms_of(batch: str, seconds: float) -> tuple[str, ...]:
    """Which arms a cell has: what the CPU law's values and a third party change is asked beside CPU work only."""
    if batch not in CPU_BATCHES:
        return PLAIN_ARMS
    return FULL_ARMS if seconds >= FULL_SECONDS else ARMS


class Cell(Demo):
    """One batch kind beside the demo's service, arm by arm."""

    logs_beside = False

    def __init__(self, port: KernelPort, batch: str, round_: int, seconds: float) -> None:
        super().__init__(port, seconds, 100 + round_, 0.002, lambda _text, _done: None)
        self._batch, self._round = batch, round_
        self._serving: list[Served] = []
        self._others: list[WorkCounter] = []
        self._others_per_second = 0.0
        self.rows: list[dict[str, Any]] = []
        self._arm_policy = ""
        self._ticks: list[dict[str, Any]] = []

    async def _serve(self, serving: list[Served]) -> None:
        self._serving = serving
        await super()._serve(serving)

    def _training(self, i: int) -> list[str]:
        file = str(self._trainings[i].path)
        kind = {"hogs": "hog", "beside": "hog", "stream": "stream", "cache": "cache"}.get(self._batch)
        if kind is not None:
            return [sys.executable, "-IS", str(PROBE), kind, file]
        grow, most = (200 << 20, 700 << 20) if self._batch == "growth" else (48 << 20, 128 << 20)
        return [*super()._training(i), *self._growing(grow, most)]

    async def _arms(self, calibration: Calibration) -> None:
        service = joined(self._node.path, SERVICE_POD)
        arms = arms_of(self._batch, self._seconds)
        for arm in ("alone", *(arms[1:] if self._round % 2 == 0 else arms[:0:-1])):
            killed, _ = oom_kills(self._port, service, inodes_of(self._port, service))
            plain, _, self._arm_policy = arm.partition("/")
            self._ticks = []
            async with self._besteffort_beside(arm), self._disturbed(arm):
                await (self._koordlet() if arm == "koordlet" else self._arm(plain, calibration))
            found = self._result.arms[plain]
            foreign = [p for p in self._serving if isinstance(p, Process)]  # nobody starts these again
            gone = sum(p.process.returncode is not None for p in foreign)
            lost = max(oom_kills(self._port, service, inodes_of(self._port, service))[0] - killed, gone)
            self.rows.append(
                {
                    "arm": arm,
                    "p50_ms": found.p50_ms,
                    "p99_ms": found.p99_ms,
                    "work": found.batch_work_per_second,
                    "cpu": found.cpu_utilization,
                    "effective": found.effective_machine_utilization,
                    "requests": found.requests,
                    "failed": found.failed_requests,
                    "batch_lost": found.batch_processes_lost,
                    "service_lost": lost,
                    "besteffort_work": round(self._others_per_second, 1),
                    "ticks": self._ticks,
                }
            )
            if lost and foreign:
                await self._serve_again()

    async def _serve_again(self) -> None:
        for process in self._serving:
            await process.end()
        self._serving.clear()
        self._urls.clear()
        await self._serve(self._serving)

    @contextlib.asynccontextmanager
    async def _besteffort_beside(self, arm: str) -> AsyncIterator[None]:
        """A BestEffort pod of hogs that is there in every arm but `alone`."""
        self._others.clear()
        hogs: list[Process] = []
        if self._batch == "beside" and arm != "alone":
            path = joined(self._node.path, "kubepods/besteffort/podother")
            self._node.make("kubepods/besteffort/podother")
            for i in range(len(self._cpus)):
                file = self._directory / f"other{i}"
                self._others.append(WorkCounter(file))
                command = [sys.executable, "-IS", str(PROBE), "hog", str(file)]
                hogs.append(await Process.start(self._node, path, command, {}))
        try:
            yield
        finally:
            for hog in hogs:
                await hog.end()

    @contextlib.asynccontextmanager
    async def _disturbed(self, arm: str) -> AsyncIterator[None]:
        """A third party, neither service nor batch, that burns CPU while the arm runs."""
        burning: list[Process] = []
        if arm.endswith("/disturbed"):
            self._node.make("stranger")
            path = joined(self._node.path, "stranger")
            command = [sys.executable, "-IS", str(PROBE), "hog", str(self._directory / "stranger")]
            burning.append(await Process.start(self._node, path, command, {}))
        try:
            yield
        finally:
            for process in burning:
                await process.end()

    def _policy(self) -> ColocationPolicy:
        """The policy's defaults, but for the arm that has the demo's faster values."""
        policy = super()._policy()
        if self._arm_policy == "demo":
            return policy
        replace = msgspec.structs.replace
        named = [(p, p.slo and ServiceLevelObjective(p.slo.p99, p.slo.url, p.slo.metric)) for p in policy.spec.services]
        services = tuple(replace(p, slo=slo) for p, slo in named)
        plain = PolicySpec(node_root=policy.spec.node_root, services=services)
        return replace(policy, spec=plain)

    def _decided(self, tick: Tick) -> None:
        super()._decided(tick)
        said = next((v for v in tick.plan.verdicts if v.law == "cpu"), None)
        service = tick.forecast.workloads.get("service:inference")
        self._ticks.append(
            {
                "at": round(tick.snapshot.monotonic_seconds, 3),
                "reason": said.reason if said else "",
                "grant": said.numbers.get("grant_cores") if said else None,
                "waited": round(service.waited_seconds, 4) if service else None,
                "pressure": service.cpu_pressure_ratio if service else None,
                "p99_ms": round(service.p99_seconds * 1e3, 2) if service and service.p99_seconds is not None else None,
            }
        )

    async def _measure(self, arm: str) -> None:
        """Also the work of the BestEffort group beside, while batch runs."""

        def work() -> int:
            return sum(c.done for c in self._others)

        before, started = work(), time.perf_counter()
        await super()._measure(arm)
        self._others_per_second = (work() - before) / (time.perf_counter() - started)

    async def _koordlet(self) -> None:
        group = joined(self._node.path, "kubepods/besteffort")
        law = asyncio.create_task(self._suppress(group))
        try:
            async with self._batch_in("besteffort"):
                await self._measure("koordlet")
            if law.done():
                law.result()  # without it the arm would be plain BestEffort
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


class PostgresCell(Cell, WithPostgres):
    """The same beside PostgreSQL."""


class NginxCell(Cell, WithNginx):
    """The same beside nginx."""


CELLS: dict[str, type[Cell]] = {"inference": Cell, "postgres": PostgresCell, "nginx": NginxCell}


def run_cell(service: str, batch: str, round_: int, seconds: float) -> list[dict[str, Any]]:
    """All arms of one round on this kernel, one row an arm."""
    kernels = load_kernels(default_state_dir())
    cell = CELLS[service](KernelPort(), batch, round_, seconds)
    result = asyncio.run(cell.run(Calibration(), kernels))
    reference = reference_loop()
    common = {"service": service, "batch": batch, "round": round_, "seconds": seconds, "reference": reference}
    return [{**common, **row, "host_unchanged": result.host_unchanged} for row in cell.rows]


def run(full: bool) -> list[str]:
    """Run what is missing; the summary."""
    runs = Runs("isolation")
    cells = FULL if full else SUBSET
    lasts = dict.fromkeys(SECONDS, FULL_SECONDS) if full else SECONDS
    missing = [
        (where, service, batch, round_)
        for round_ in range(max(cells.values()))  # rounds first: what is cut short is balanced
        for (where, service, batch), rounds in cells.items()
        if round_ < rounds
        and not all(
            runs.has(where=where, service=service, batch=batch, round=round_, arm=arm, seconds=lasts[where])
            for arm in arms_of(batch, lasts[where])
        )
    ]
    missing.sort(key=lambda cell: cell[2] != "hogs")  # what has bars comes first
    notes = {f"          {s}: did not run, it lacks {lacks(s)}" for _, s, _, _ in missing if lacks(s)}
    for where, service, batch, round_ in missing:
        if where == "here" and not lacks(service):
            print(f"isolation: {service} beside {batch}, round {round_ + 1}", file=sys.stderr, flush=True)
            for row in run_cell(service, batch, round_, lasts[where]):
                runs.add(where=where, **row)
    inside = [cell for cell in missing if cell[0] == "guest"]
    if inside and guest_lacks():
        notes.add(f"          guest: did not run, it lacks {guest_lacks()}")
    elif inside:
        with Guest() as guest:
            for where, service, batch, round_ in inside:
                print(
                    f"isolation: {service} beside {batch} in the guest, round {round_ + 1}", file=sys.stderr, flush=True
                )
                command = f"python3 -m benchmarks.isolation {service} {batch} {round_} {lasts[where]}"
                code, output = guest.run(command, 900)
                if code:
                    raise RuntimeError(f"in the guest: {output[-2000:]}")
                for line in output.splitlines():
                    if line.startswith("{"):
                        runs.add(where=where, **msgspec.json.decode(line))
    return [*sorted(notes), *summary(runs)]


def _ratio(rows: list[dict[str, Any]], field: str, other: str, ours: str = "colocate") -> Interval:
    """Ours to another arm's, round by round. Nothing done counts as next to nothing, not as a round that was not."""
    values = {(r["arm"], r["round"]): max(r[field] or 0.0, LEAST) for r in rows}
    rounds = sorted(i for arm, i in values if arm == ours and (other, i) in values)
    return ratio_interval([values[ours, i] for i in rounds], [values[other, i] for i in rounds])


def _cpu_of_batch(rows: list[dict[str, Any]]) -> Interval:
    """What is used beyond the service's own, ours to BestEffort's: unlike work, a busy host does not change it much."""
    own = {r["round"]: r["cpu"] for r in rows if r["arm"] == "alone"}
    beyond = [{**r, "batch_cpu": r["cpu"] - own[r["round"]]} for r in rows if r["round"] in own]
    return _ratio(beyond, "batch_cpu", "besteffort")


def _disturbed_bars(cell: str, rows: list[dict[str, Any]]) -> list[str]:
    """Beside a third party: no worse than BestEffort, and batch work that is given up has to buy something."""
    ours, plain = "colocate/disturbed", "besteffort/disturbed"
    p99, work = _ratio(rows, "p99_ms", plain, ours), _ratio(rows, "work", plain, ours)
    bought = BARS["disturbed"] if work.value >= BARS["work"] else BARS["bought"]
    return [
        bar(f"{cell}, disturbed: p99 to BestEffort's", p99.below(bought), p99, bought),
        bar(f"{cell}, disturbed: batch work to BestEffort's", "reported", work, BARS["work"]),
    ]


def summary(runs: Runs) -> list[str]:
    """Each bar by the interval of paired ratios over the rounds."""
    lines = []
    every = [r for r in runs.runs if "batch" in r]

    def key(row: dict[str, Any]) -> tuple[str, str, str, float]:
        return row["where"], row["service"], row["batch"], row["seconds"]

    for where, service, batch, seconds in dict.fromkeys(key(r) for r in every):
        rows = [r for r in every if key(r) == (where, service, batch, seconds)]
        cell = f"{service} beside {batch}, {seconds:g} s" + (" (guest)" if where == "guest" else "")
        lines.append(f"{cell}: medians of {1 + max(r['round'] for r in rows)} rounds")
        for arm in arms_of(batch, seconds):
            here = [r for r in rows if r["arm"] == arm]
            lines.append(
                f"          {arm:20s} p99 {_median(here, 'p99_ms'):8.2f} ms  work {_median(here, 'work'):9.0f}/s  CPU "
                f"{_median(here, 'cpu'):4.0%}  lost: service {sum(r['service_lost'] for r in here)}, batch "
                f"{sum(r['batch_lost'] for r in here)}, requests {sum(r['failed'] for r in here)}"
                + (f"  BestEffort's work {_median(here, 'besteffort_work'):.0f}/s" if batch == "beside" else "")
            )
        lines += _bars(cell, where, batch, rows)
    return lines


def _bars(cell: str, where: str, batch: str, rows: list[dict[str, Any]]) -> list[str]:
    to_plain, to_alone = _ratio(rows, "p99_ms", "besteffort"), _ratio(rows, "p99_ms", "alone")
    gained = _ratio(rows, "work", "besteffort")
    lines = []
    if batch in CPU_BATCHES:
        effective = mean_interval([r["effective"] or 0.0 for r in rows if r["arm"] == "colocate"])
        alone = BARS[where]
        lines = [
            bar(f"{cell}: p99 to BestEffort's", to_plain.below(BARS["besteffort"]), to_plain, BARS["besteffort"]),
            bar(f"{cell}: p99 to alone", to_alone.below(alone), to_alone, alone),
            bar(f"{cell}: batch work to BestEffort's", gained.above(BARS["work"]), gained, BARS["work"]),
            bar(f"{cell}: batch's CPU time to BestEffort's", "reported", _cpu_of_batch(rows), BARS["work"]),
            bar(f"{cell}: p99 to BestEffort's, demo's policy", "reported", *_demo(rows, "p99_ms")),
            bar(f"{cell}: batch work to BestEffort's, demo's policy", "reported", *_demo(rows, "work")),
            *_disturbed_bars(cell, rows),
            bar(f"{cell}: effective utilization", effective.above(BARS["effective"]), effective, BARS["effective"], ""),
        ]
    elif batch == "growth":
        lost = sum(r["service_lost"] for r in rows if r["arm"] == "colocate")
        half = BARS["growth_besteffort"]
        both = (to_alone.below(1.1), to_plain.below(half))
        either = next((word for word in ("pass", "undecided") if word in both), "fail")
        lines = [
            bar(f"{cell}: p99 to alone, or", either, to_alone, 1.1),
            bar(f"{cell}: p99 to BestEffort's", either, to_plain, half),
            bar(f"{cell}: service processes killed", "fail" if lost else "pass", float(lost), 0, ""),
        ]
    else:
        lines = [
            bar(f"{cell}: p99 to alone", "reported", to_alone, 1.0),
            bar(f"{cell}: p99 to BestEffort's", "reported", to_plain, 1.0),
            bar(f"{cell}: batch work to BestEffort's", "reported", gained, 1.0),
        ]
    if any(r["arm"] == "koordlet" for r in rows):
        lines.append(bar(f"{cell}: p99 to koordlet's law", "reported", _ratio(rows, "p99_ms", "koordlet"), 1.0))
        lines.append(bar(f"{cell}: batch work to koordlet's law", "reported", _ratio(rows, "work", "koordlet"), 1.0))
    return lines


def _demo(rows: list[dict[str, Any]], field: str) -> tuple[Interval, float]:
    return _ratio(rows, field, "besteffort", "colocate/demo"), BARS["work" if field == "work" else "besteffort"]


def _median(rows: list[dict[str, Any]], field: str) -> float:
    ordered = sorted(r[field] or 0.0 for r in rows)
    return ordered[len(ordered) // 2] if ordered else 0.0


if __name__ == "__main__":
    configure_logs(logging.ERROR)
    for row in run_cell(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])):
        print(msgspec.json.encode(row).decode())
