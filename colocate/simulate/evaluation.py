"""What co-location is worth to a fleet, and at what cost to services: four arms in the same worlds, seed by seed.

    separate pools   services packed by their requests on nodes of their own, batch on the rest
    native mixed     all on all nodes, batch in what nobody has requested, with the weight of its requests
    koordlet         batch below services, promised and held by Koordinator's laws (60 % reclaimed, 65 % used)
    ours             batch below BestEffort, promised and held by this agent's laws

Services are VMs of GWA-T-12 Bitbrains (50 of them for 30 days), each from another day of another VM; batch are tasks of
Alibaba's cluster trace v2017. What is assumed beside that stands in `Assumptions`, and `tornado` says what each is
worth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from colocate.decide.allocatable import GRAIN_RATIO, promise
from colocate.decide.reference.koordlet import CPU_RECLAIM_PERCENT, MEMORY_RECLAIM_PERCENT, Demand, batch_allocatable
from colocate.errors import BadInput
from colocate.model.needs import DAY_SLOTS, Needs, look, slots_of
from colocate.model.statistics import Interval, difference_interval
from colocate.policy.schema import PolicySpec
from colocate.simulate.colocation import FREE, KOORDLET, OURS, SLOT_SECONDS, Rules, Tasks, Told, World, run
from colocate.simulate.threads import side_by_side
from colocate.simulate.traces import filled, lines, table

Floats = NDArray[np.float64]
POOLS, NATIVE, KOORDLET_ARM, OURS_ARM = ARMS = ("separate pools", "native mixed", "koordlet", "ours")
CORES = 64.0
WARM_SECONDS = 3600
"""Of each run, which do not count: the fleet fills."""
WARM_DAYS = 3
"""So long ours has looked at the services before the day that counts."""
PROFILES = 60
"""Different sets of services on nodes; their noise differs from node to node."""
VMS_A_NODE = 4
PEAK = 99.9
"""The percentile of a VM's use that counts as its peak: beyond it lie single samples."""
USAGE, BATCH = "bitbrains-50vm-2013/usage.csv.gz", "alibaba-v2017-batch/batch_task.csv.gz"
MOST_TASKS, LEAST_TASKS = 60_000, 200


class Assumptions(NamedTuple):
    """What no public trace tells. Each is varied by `tornado` between the values in `RANGES`."""

    requested: float = 0.6
    """Of the CPUs of all CPU nodes, what services request."""
    spare: float = 1.2
    """What a service requests, against its peak."""
    memory_used: float = 0.4
    """Of a node's memory, by services that request `requested` of it."""
    gpu_cores: float = 0.3
    """Of a GPU node's CPUs, what its GPU jobs use of the half that they request."""
    shared: float = 0.05
    """Median of what batch adds to a service's waiting below the scheduler, at most; spread e-fold."""
    saturates: float = 0.2
    """At what share of a node batch has most of that effect."""
    bursts: float = 2.0
    """So often a day a service waits more by its own doing."""
    scheduler: float = 0.2
    """The same by the scheduler, beside batch of the same weight on a full node."""
    besteffort: float = 0.5
    """What of that is felt beside BestEffort, under koordlet."""
    below: float = 0.05
    """What of it beside batch below BestEffort (`cpu.idle`)."""
    slo: float = 0.2
    """So much more waiting than usual, as a share of time, violates a minute."""
    noise: float = 0.15
    """Of demand, from second to second."""
    load: float = 0.7
    """Of the CPUs of the whole fleet, what batch tasks that arrive would use."""


RANGES: dict[str, tuple[float, float]] = {
    "requested": (0.45, 0.75),
    "spare": (1.0, 1.5),
    "memory_used": (0.25, 0.55),
    "gpu_cores": (0.15, 0.45),
    "shared": (0.02, 0.12),
    "saturates": (0.1, 1.0),
    "bursts": (0.5, 8.0),
    "scheduler": (0.1, 0.4),
    "besteffort": (0.2, 1.0),
    "below": (0.0, 0.5),
    "slo": (0.15, 0.3),
    "noise": (0.05, 0.3),
    "load": (0.4, 1.0),
}


class Size(NamedTuple):
    """Of a fleet, and of the time that is simulated."""

    cpu_nodes: int
    gpu_nodes: int
    hours: int

    @property
    def nodes(self) -> int:
        """All."""
        return self.cpu_nodes + self.gpu_nodes


class Result(NamedTuple):
    """One arm with one seed, as shares."""

    utilization: float
    """Of the CPUs of all nodes, mean."""
    batch: float
    """Of them, what batch had."""
    violations: float
    """Of service minutes, in which services waited for more than is usual and allowed."""
    added: float
    """In which batch added more by itself than it may."""
    wait_seconds: float
    tasks_ended: int
    energy_a_core: float
    """Node-seconds at the greatest draw for a core-second of work."""
    told: Told


class Fleet(NamedTuple):
    """What the arms of one seed have in common."""

    size: Size
    assumed: Assumptions
    seed: int
    spread: Floats
    """(nodes, slots): demand where services are on all CPU nodes, with WARM_DAYS before the time that counts."""
    packed: Floats
    """The same where they are packed; nodes without services have none."""
    pool: int
    """How many CPU nodes they are packed on."""
    tasks: Tasks
    feels: Floats
    """(nodes, 3): own, below the scheduler, by the scheduler."""


@lru_cache(maxsize=2)
def usage(folder: Path) -> Floats:
    """(VMs, slots of five minutes): each VM's use against its peak; a slot without a sample is as the one before.

    Raises BadInput.
    """
    path = folder / USAGE
    by_vm: dict[str, dict[int, float]] = {}
    for row in table(path, ("vm", "t_s", "cpu_usage_mhz")):
        by_vm.setdefault(row.text("vm"), {})[int(row.number("t_s") // SLOT_SECONDS)] = row.number("cpu_usage_mhz")
    if not by_vm:
        raise BadInput(f"{path} has no rows")
    length = min(max(slots) for slots in by_vm.values()) + 1
    found = []
    for slots in by_vm.values():
        values = np.full(length, np.nan)
        for slot, value in slots.items():
            if slot < length:
                values[slot] = value
        values = np.nan_to_num(filled(values))
        peak = float(np.percentile(values, PEAK))
        if peak > 0.0:
            found.append(np.minimum(values / peak, 1.0))
    if length < (WARM_DAYS + 2) * DAY_SLOTS or not found:
        raise BadInput(f"{path} covers {length / DAY_SLOTS:.1f} days: {WARM_DAYS + 2} are needed")
    return np.array(found)


@lru_cache(maxsize=2)
def batch_tasks(folder: Path) -> Tasks:
    """Every task of the trace that ended, from the first arrival on. Raises BadInput."""
    path = folder / BATCH
    rows = []
    for number, line in enumerate(lines(path), start=1):
        parts = [part.strip() for part in line.split(",")]
        if number == 1 or len(parts) < 8 or parts[5] != "Terminated" or not parts[6] or not parts[7]:
            continue  # the first line is of names; tasks that wait, fail or ask for nothing are no work that was done
        try:
            begin, end, count, cpu, memory = (float(parts[i]) for i in (0, 1, 4, 6, 7))
        except ValueError as error:
            raise BadInput(f"{path}, line {number}: {error}") from error
        if end > begin >= 0.0 and count >= 1 and 0.0 < cpu <= 100.0 * CORES and 0.0 < memory <= 1.0:
            rows.append((begin, end - begin, count, cpu / 100.0, memory))
    if not rows:
        raise BadInput(f"{path} has no task that ended")
    found = np.array(sorted(rows))
    return Tasks(found[:, 0] - found[0, 0], found[:, 1], found[:, 2].astype(np.int64), found[:, 3], found[:, 4])


def make_fleet(folder: Path, size: Size, assumed: Assumptions, seed: int) -> Fleet:
    """A world that is drawn. Raises BadInput."""
    draw = np.random.default_rng(seed)
    curves = usage(folder)
    slots = WARM_DAYS * DAY_SLOTS + (3600 * size.hours + WARM_SECONDS) // SLOT_SECONDS + 1
    request = assumed.requested * CORES / VMS_A_NODE
    profiles = min(PROFILES, size.cpu_nodes)

    def summed(vms: int) -> Floats:
        chosen = draw.integers(0, len(curves), (profiles, vms))
        begins = draw.integers(0, (curves.shape[1] - slots) // DAY_SLOTS + 1, (profiles, vms)) * DAY_SLOTS
        rows = [
            sum(curves[vm, at : at + slots] for vm, at in zip(*pair, strict=True))
            for pair in zip(chosen, begins, strict=True)
        ]
        return np.array(rows) * request / assumed.spare

    kind = draw.integers(0, profiles, size.cpu_nodes)
    on_gpus = np.full((size.gpu_nodes, slots), assumed.gpu_cores * CORES)
    spread = np.concatenate([summed(VMS_A_NODE)[kind], on_gpus])
    a_node = max(int(CORES / request + 1e-9), 1)
    pool = min(-(-size.cpu_nodes * VMS_A_NODE // a_node), size.cpu_nodes)
    packed = np.concatenate([summed(a_node)[kind], on_gpus])
    packed[pool : size.cpu_nodes] = 0.0
    feels = np.stack(
        [
            draw.uniform(0.02, 0.1, size.nodes),
            np.minimum(draw.lognormal(np.log(assumed.shared), 1.0, size.nodes), 0.7),
            np.minimum(draw.lognormal(np.log(assumed.scheduler), 0.7, size.nodes), 0.9),
        ],
        axis=1,
    )
    return Fleet(size, assumed, seed, spread, packed, pool, _drawn_tasks(folder, size, assumed, draw), feels)


def _drawn_tasks(folder: Path, size: Size, assumed: Assumptions, draw: np.random.Generator) -> Tasks:
    """Tasks of the trace in an order that is drawn, as many as are the work that is to arrive."""
    every, seconds = batch_tasks(folder), 3600 * size.hours + WARM_SECONDS
    short = np.flatnonzero(every.seconds <= seconds / 4)
    wanted = assumed.load * size.nodes * CORES * seconds
    order = np.tile(draw.permutation(short), -(-MOST_TASKS // len(short)))[:MOST_TASKS]
    each = every.cores[order] * every.seconds[order]
    # One task is a two-hundredth of the work at most: else a small fleet's day would be one of them.
    count = np.clip(every.instances[order], 1, np.maximum(wanted / LEAST_TASKS / each, 1.0)).astype(np.int64)
    many = min(int(np.searchsorted(np.cumsum(count * each), wanted)) + 1, MOST_TASKS)
    arrives = np.sort(draw.uniform(0.0, seconds, many))
    chosen = order[:many]
    return Tasks(arrives, every.seconds[chosen], count[:many], every.cores[chosen], every.memory[chosen])


def rules_of(arm: str, fleet: Fleet, spec: PolicySpec) -> tuple[Floats, Rules]:
    """The demand under an arm and what batch is promised there."""
    size, assumed = fleet.size, fleet.assumed
    warm = WARM_DAYS * DAY_SLOTS
    gpu = np.arange(size.nodes) >= size.cpu_nodes
    demand = fleet.packed if arm == POOLS else fleet.spread
    asked = np.where(gpu, 0.5, assumed.requested)
    now = demand[:, warm:]
    if arm == POOLS:
        free = (np.arange(size.nodes) >= fleet.pool) & ~gpu
        cores = np.where(free, CORES, 0.0)[:, None] * np.ones_like(now)
        return now, Rules(FREE, cores, np.where(free, 1.0, 0.0), 1.0)
    if arm == NATIVE:
        return now, Rules(FREE, ((1.0 - asked) * CORES)[:, None] * np.ones_like(now), 1.0 - asked, 1.0)
    used = np.where(gpu, assumed.memory_used * 0.5 / assumed.requested, assumed.memory_used)
    if arm == KOORDLET_ARM:
        whole = int(1000 * CORES)
        cores = np.array(
            [
                [
                    batch_allocatable(
                        capacity=whole,
                        reclaim_percent=CPU_RECLAIM_PERCENT,
                        system_used=0,
                        pods=[Demand(int(1000 * CORES * share), int(1000 * each))],
                    )
                    for each in row
                ]
                for row, share in zip(now, asked, strict=True)
            ]
        )
        memory = np.maximum(MEMORY_RECLAIM_PERCENT / 100 - used, 0.0)
        return now, Rules(KOORDLET, cores / 1000.0, memory, assumed.besteffort)
    promised = {row.tobytes(): _promised(row, spec) for row in {row.tobytes(): row for row in demand}.values()}
    cores = np.array([promised[row.tobytes()] for row in demand])
    memory = np.maximum(1.0 - spec.memory.reserve / 100 - used, 0.0)
    return now, Rules(OURS, cores, memory, assumed.below)


def _promised(row: Floats, spec: PolicySpec) -> Floats:
    """What the node's own model and law promise to batch, slot by slot of the time that counts."""
    resources = spec.batch_resources
    slots, needs, promised = slots_of(resources.runtime), Needs(), 0.0
    reserve, grain = spec.cpu.reserve / 100 * CORES, GRAIN_RATIO * CORES
    grown = resources.growth / 100 * CORES
    found = []
    for i, cores in enumerate(row):
        needs = look(needs, i * SLOT_SECONDS + 1.0, SLOT_SECONDS, float(cores), 0.0, slots, resources.risk / 100)
        bound = needs.bound
        left = CORES - reserve - (bound[0] if bound is not None else CORES)
        promised = promise(left, promised, grain, grown, may_grow=True)
        found.append(promised)
    return np.array(found[WARM_DAYS * DAY_SLOTS :])


def prepared(arm: str, fleet: Fleet, spec: PolicySpec) -> tuple[World, Rules]:
    """The world of a seed under an arm."""
    size, assumed = fleet.size, fleet.assumed
    demand, rules = rules_of(arm, fleet, spec)
    served = demand.max(axis=1) > 0.0
    served[size.cpu_nodes :] = False  # a GPU job's own CPUs are no service
    own, shared, scheduler = fleet.feels.T.copy()
    rest = (assumed.saturates, assumed.noise, assumed.bursts, served, assumed.slo)
    return World(CORES, demand, own, shared, scheduler, *rest), rules


def play(arm: str, fleet: Fleet, spec: PolicySpec) -> Result:
    """One arm in the world of one seed."""
    seconds = 3600 * fleet.size.hours
    world, rules = prepared(arm, fleet, spec)
    told = run(world, fleet.tasks, rules, seconds, fleet.seed, spec, WARM_SECONDS)
    whole = fleet.size.nodes * CORES * seconds
    work = told.service_core_seconds + told.batch_core_seconds
    return Result(
        work / whole,
        told.batch_core_seconds / whole,
        told.violated_minutes / max(told.service_minutes, 1),
        told.added_minutes / max(told.service_minutes, 1),
        told.wait_seconds,
        told.tasks_ended,
        told.energy / max(work, 1e-9),
        told,
    )


def play_all(
    folder: Path,
    size: Size,
    assumed: Assumptions,
    seeds: Sequence[int],
    spec: PolicySpec,
    say: Callable[[int, int], None],
    workers: int | None = None,
    arms: Sequence[str] = ARMS,
) -> dict[str, list[Result]]:
    """Of each arm a result a seed, the same with any number of workers. Raises BadInput."""
    usage(folder), batch_tasks(folder)  # once, and what is wrong with them is said here

    def one(seed: int) -> list[Result]:
        fleet = make_fleet(folder, size, assumed, seed)
        return [play(arm, fleet, spec) for arm in arms]

    found: dict[str, list[Result]] = {arm: [] for arm in arms}
    for done, results in enumerate(side_by_side(one, seeds, workers), start=1):
        for arm, result in zip(arms, results, strict=True):
            found[arm].append(result)
        say(done, len(seeds))
    return found


class Verdict(NamedTuple):
    """Ours beside another arm, in points, by pairs of the same seed."""

    utilization: Interval
    violations: Interval


def beside(results: dict[str, list[Result]], other: str) -> Verdict:
    """Of ours less the other's; intervals that all hold together for the three others."""
    ours, theirs = results[OURS_ARM], results[other]

    def points(of: Callable[[Result], float]) -> Interval:
        pairs = [100.0 * of(one) for one in ours], [100.0 * of(one) for one in theirs]
        return difference_interval(*pairs, comparisons=len(ARMS) - 1)

    return Verdict(points(lambda r: r.utilization), points(lambda r: r.violations))


def kept(results: dict[str, list[Result]], least_points: float = 10.0) -> dict[str, bool]:
    """The bars: more points of utilization than separate pools at violations that are no more, and ahead of koordlet's
    law in both."""
    pools, koordlet = beside(results, POOLS), beside(results, KOORDLET_ARM)
    return {
        f"{least_points:g} points over separate pools": pools.utilization.low >= least_points,
        "no more violations than in separate pools": pools.violations.high <= 0.0,
        "more utilization than koordlet's law": koordlet.utilization.low > 0.0,
        "fewer violations than koordlet's law": koordlet.violations.high < 0.0,
    }


class Bar(NamedTuple):
    """What one assumption is worth: ours less separate pools, at its lowest and highest value."""

    name: str
    values: tuple[float, float]
    utilization: tuple[float, float]
    violations: tuple[float, float]
    """Of ours less separate pools, points."""


def tornado(
    folder: Path,
    size: Size,
    seeds: Sequence[int],
    spec: PolicySpec,
    say: Callable[[int, int], None],
    workers: int | None = None,
) -> Iterator[Bar]:
    """Each assumption alone, the others as they are; the widest first is the caller's."""
    for number, (name, values) in enumerate(RANGES.items(), start=1):
        found = []
        for value in values:
            assumed = Assumptions()._replace(**{name: value})
            results = play_all(folder, size, assumed, seeds, spec, lambda *_: None, workers, (POOLS, OURS_ARM))
            found.append(beside(results, POOLS))
        say(number, len(RANGES))
        low, high = found
        utilization = low.utilization.value, high.utilization.value
        yield Bar(name, values, utilization, (low.violations.value, high.violations.value))
