"""Services and batch on the same simulated nodes, second by second, under the agent's own laws (`decide/fleet`).

What is real: the laws and the model of what services will need, as the agent runs them; the published laws of
Koordinator (`decide/reference/koordlet`); the services' usage and the batch tasks of public traces. What is synthetic
(`evaluation.Assumptions`): how large services are, what they have of memory, and what batch makes them feel. Nobody has
published usage and latency of services beside batch together.

A service waits for a CPU by itself, the more the busier its node is; beside batch it waits more, for two reasons: what
is shared below the scheduler (caches, hyper-threads, memory) by the share of the node that batch runs on, each service
by its own measure; and the scheduler, by how much batch yields when the node is full. A minute is violated in which a
service waited for more than `harm` beyond what is usual for it.

Shapes: n nodes, t tasks, a step is a second. Batch runs in what its node's law lets it, and all of a node's batch slows
down together.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from colocate.decide import fleet
from colocate.decide.reference.koordlet import GROWTH_RATIO, MIN_QUOTA_US, PERIOD_US
from colocate.policy.schema import PolicySpec

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
SLOT_SECONDS = 300
PLACE_SECONDS = 2
"""Between two rounds of placing tasks."""
MOST_RECORDS = 200_000
"""Groups of instances that run at once."""
FREE, KOORDLET, OURS = range(3)
"""Whose law says what batch may use of a node now: nobody's, koordlet's 65 %, ours."""
KOORDLET_PERCENT = 0.65
"""Of the node, Koordinator's default."""
LEAST_QUOTA = MIN_QUOTA_US / PERIOD_US
"""Cores."""
TOGETHER = 8
"""So many instances of a task go to a node at once, at most."""
WAITS_NOISE = 0.02
IDLE_WATTS, BUSY_WATTS, CURVE = 0.45, 1.0, 1.4
"""Of a node, against its greatest; Fan, Weber and Barroso, ISCA 2007."""


class World(NamedTuple):
    """What is the same under every policy."""

    cores: float
    """Of each node."""
    demand: Floats
    """(n, slots): cores that the services of a node would use."""
    own: Floats
    """(n,): share of time that they wait by themselves on an idle node."""
    feels_shared: Floats
    """(n,): what batch on the whole node adds to that below the scheduler."""
    feels_scheduler: Floats
    """(n,): what batch of the same weight adds on a full node."""
    saturates: float
    """At what share of a node batch has most of that effect: caches and memory are full long before the cores are."""
    noise: float
    """Of demand from second to second."""
    bursts: float
    """So often a day a service waits more by its own doing (a release, a cold cache), for one to three minutes."""
    served: NDArray[np.bool_]
    """(n,): whether there are services whose waiting counts."""
    harm: float
    """So much more waiting than usual violates a minute."""


class Tasks(NamedTuple):
    """Batch tasks in the order of their arrival; each has instances of one size."""

    arrives: Floats
    """Seconds from the start."""
    seconds: Floats
    """What an instance takes with all its cores."""
    instances: Ints
    cores: Floats
    memory: Floats
    """Of a node, 0 to 1."""


class Rules(NamedTuple):
    """A policy."""

    law: int
    promised: Floats
    """(n, slots): cores that batch may ask for together, by node."""
    memory: Floats
    """(n,): of a node, likewise."""
    yields: float
    """How much of `feels_scheduler` is felt: 1 beside batch of the same weight."""


class Told(NamedTuple):
    """What came of it."""

    service_core_seconds: float
    batch_core_seconds: float
    service_minutes: int
    violated_minutes: int
    added_minutes: int
    """In which batch alone added more than it may."""
    tasks_started: int
    tasks_ended: int
    wait_seconds: float
    """Mean, from arrival to the first instance's start, of those that started."""
    energy: float
    """Of all nodes, against one that is busy all the time: node-seconds at the greatest draw."""
    timeline: Floats
    """(minutes, 3): cores of services, of batch, and the share of service minutes that were violated."""


# What is remembered of a node.
(DRIFT, WAITS, BURST, BURST_UNTIL, FELT, ADDED, ASKED, HELD, WORKED, QUOTA, LIMIT) = range(11)
# Of how many things there are.
RECORDS, HEAD, ARRIVED, TURN, STARTED, ENDED = range(6)
# Of what is summed up.
SERVICES, BATCH, ENERGY, WAITED, BUSIEST = range(5)
# A task, and a group of its instances that runs.
ARRIVES, TAKES, CORES_EACH, MEMORY_EACH, INSTANCES = range(5)
AT_NODE, COUNT, OF_TASK, UNTIL = range(4)
# What does not change of a node, and of the world.
OWN, SHARED, SCHEDULER, SERVED = range(4)
CORES_OF, SATURATES, NOISE, BURSTS, YIELDS = range(5)
KEPT = 0.9
"""Of noise from one second to the next."""


@numba.njit(nogil=True)
def _seed(seed: int) -> None:
    np.random.seed(seed)


@numba.njit(nogil=True)
def _end(tasks: Floats, left: Ints, running: Ints, groups: Floats, counts: Ints, nodes: Floats) -> None:
    """Instances that have done their work go."""
    kept = 0
    for k in range(counts[RECORDS]):
        i, task, count = int(groups[k, AT_NODE]), int(groups[k, OF_TASK]), int(groups[k, COUNT])
        if nodes[i, WORKED] >= groups[k, UNTIL]:
            nodes[i, ASKED] -= count * tasks[task, CORES_EACH]
            nodes[i, HELD] -= count * tasks[task, MEMORY_EACH]
            running[task] -= count
            counts[ENDED] += running[task] == 0 and left[task] == 0
        else:
            if kept < k:
                groups[kept] = groups[k]
            kept += 1
    counts[RECORDS] = kept


@numba.njit(nogil=True)
def _place(
    second: int,
    slot: int,
    tasks: Floats,
    left: Ints,
    running: Ints,
    groups: Floats,
    counts: Ints,
    nodes: Floats,
    promised: Floats,
    memory: Floats,
    sums: Floats,
) -> None:
    """Who came first is served first, on one node after the other."""
    n = nodes.shape[0]
    while counts[ARRIVED] < tasks.shape[0] and tasks[counts[ARRIVED], ARRIVES] <= second:
        counts[ARRIVED] += 1
    while counts[HEAD] < counts[ARRIVED]:
        task, in_vain = counts[HEAD], 0
        cores, room = tasks[task, CORES_EACH], tasks[task, MEMORY_EACH]
        while left[task] > 0 and in_vain < n and counts[RECORDS] < MOST_RECORDS:
            i = counts[TURN]
            counts[TURN] = i + 1 if i + 1 < n else 0
            fits = min((promised[i, slot] - nodes[i, ASKED]) / cores, (memory[i] - nodes[i, HELD]) / room)
            count = min(int(fits + 1e-9), left[task], TOGETHER)
            in_vain = in_vain + 1 if count <= 0 else 0
            if count <= 0:
                continue
            if running[task] == 0 and left[task] == int(tasks[task, INSTANCES]):
                counts[STARTED] += 1
                sums[WAITED] += second - tasks[task, ARRIVES]
            nodes[i, ASKED] += count * cores
            nodes[i, HELD] += count * room
            left[task] -= count
            running[task] += count
            group = groups[counts[RECORDS]]
            group[AT_NODE], group[COUNT], group[OF_TASK] = i, count, task
            group[UNTIL] = nodes[i, WORKED] + tasks[task, TAKES]
            counts[RECORDS] += 1
        if left[task] > 0:
            return
        counts[HEAD] += 1


@numba.njit(cache=True, nogil=True)
def felt_of(
    own: float, shared: float, scheduler: float, saturates: float, yields: float, used: float, batch: float, over: float
) -> tuple[float, float]:
    """The share of time that a node's services wait by themselves, and what batch adds; `used`, `batch` of the node."""
    total = used + batch
    alone = own + 0.3 * used**4 + over
    beside = shared * (1.0 - math.exp(-batch / saturates))
    if total > 0.0:
        beside += yields * scheduler * min(total, 1.0) ** 4 * batch / total
    return alone, beside


@numba.njit(nogil=True, error_model="numpy")  # else each division may raise, which costs more than the rest
def _second(
    second: int, wished: Floats, of_nodes: Floats, world: Floats, nodes: Floats, told: Floats, looks: Floats,
    sums: Floats,
) -> None:  # fmt: skip
    """What runs on every node, what its services feel, and what its agent is told."""
    cores, fresh = world[CORES_OF], math.sqrt(1.0 - KEPT * KEPT)
    starts = world[BURSTS] / 86400.0
    for i in range(nodes.shape[0]):
        node = nodes[i]
        node[DRIFT] = KEPT * node[DRIFT] + world[NOISE] * fresh * np.random.normal()
        node[WAITS] = KEPT * node[WAITS] + WAITS_NOISE * fresh * np.random.normal()
        lot = np.random.random()  # always drawn, so that every policy has the same bursts
        if lot < starts and second >= node[BURST_UNTIL]:
            node[BURST] = 0.1 + 0.4 * lot / starts
            node[BURST_UNTIL] = second + 60.0 + 120.0 * (lot * 1e6 % 1.0)
        demand = wished[i] * math.exp(node[DRIFT] - world[NOISE] ** 2 / 2.0)
        used = min(demand, cores)
        batch = max(min(node[ASKED], node[LIMIT], cores - used), 0.0)
        node[WORKED] += batch / node[ASKED] if node[ASKED] > 0.0 else 0.0
        over = max(demand - cores, 0.0) / cores + (node[BURST] if second < node[BURST_UNTIL] else 0.0)
        of = of_nodes[i]
        alone, beside = felt_of(
            of[OWN], of[SHARED], of[SCHEDULER], world[SATURATES], world[YIELDS], used / cores, batch / cores, over
        )
        felt = min(max(alone + beside + node[WAITS], 0.0), 1.0)
        node[FELT] += felt
        node[ADDED] += beside
        busy = (used + batch) / cores
        sums[SERVICES] += used
        sums[BATCH] += batch
        sums[BUSIEST] = max(sums[BUSIEST], busy)
        sums[ENERGY] += IDLE_WATTS + (BUSY_WATTS - IDLE_WATTS) * (2.0 * busy - busy**CURVE)
        told[i, 0, fleet.CPU_US] += used * 1e6
        told[i, 0, fleet.PRESSURE_US] += felt * 1e6
        told[i, 1, fleet.CPU_US] += batch * 1e6
        looks[i, fleet.NOW], looks[i, fleet.DAY_SECONDS] = 1000.0 + second, second
        looks[i, fleet.BUSY_US] += (used + batch) * 1e6
        looks[i, fleet.IDLE_CPUS] = math.floor(cores - used - batch)


@numba.njit(nogil=True)
def _koordlet(nodes: Floats, wished: Floats, cores: float) -> None:
    """koordlet's quota: what its threshold leaves of the node, growing by a part of it a second."""
    for i in range(nodes.shape[0]):
        target = max(KOORDLET_PERCENT * cores - min(wished[i], cores), LEAST_QUOTA)
        nodes[i, QUOTA] = min(target, nodes[i, QUOTA] + GROWTH_RATIO * cores)
        nodes[i, LIMIT] = nodes[i, QUOTA]


@numba.njit(nogil=True)
def _minute(nodes: Floats, of_nodes: Floats, harm: float) -> tuple[int, int, int]:
    """Service minutes that are over, those that were violated, and those that batch alone has violated."""
    here = bad = added = 0
    for i in range(nodes.shape[0]):
        if of_nodes[i, SERVED] > 0.0:
            here += 1
            bad += nodes[i, FELT] / 60.0 > of_nodes[i, OWN] + harm
            added += nodes[i, ADDED] / 60.0 > harm
        nodes[i, FELT] = nodes[i, ADDED] = 0.0
    return here, bad, added


def run(world: World, tasks: Tasks, rules: Rules, seconds: int, seed: int, spec: PolicySpec, warm: int = 0) -> Told:
    """One policy in one world, for so many seconds after `warm` ones that do not count (whole minutes; the demand has
    to reach so far, and a slot further)."""
    n, cores = len(world.own), world.cores
    laws = fleet.Batch(n, 1, 1, spec, cpus=cores, memory_bytes=float(1 << 40), latency=False)
    nodes, counts, sums = np.zeros((n, LIMIT + 1)), np.zeros(ENDED + 1, np.int64), np.zeros(BUSIEST + 1)
    nodes[:, [QUOTA, LIMIT]] = cores
    of_nodes = np.stack([world.own, world.feels_shared, world.feels_scheduler, world.served.astype(float)], axis=1)
    facts = np.array([cores, world.saturates, world.noise, world.bursts, rules.yields])
    rows = np.stack([tasks.arrives, tasks.seconds, tasks.cores, tasks.memory, tasks.instances.astype(float)], axis=1)
    left, running, groups = tasks.instances.copy(), np.zeros(len(rows), np.int64), np.zeros((MOST_RECORDS, UNTIL + 1))
    told, looks = np.zeros((n, 2, fleet.WORKLOAD)), np.zeros((n, fleet.NODE))
    told[:, :, fleet.WORKING_SET] = 1 << 30
    looks[:, fleet.IN_FORCE], looks[:, fleet.AVAILABLE_BYTES] = 1.0, 1 << 40
    timeline, minutes = np.zeros((seconds // 60, 3)), np.zeros(3, np.int64)
    before = sums.copy()
    _seed(seed)
    for second in range(seconds + warm):
        slot, part = divmod(second, SLOT_SECONDS)
        wished = world.demand[:, slot] + part / SLOT_SECONDS * (world.demand[:, slot + 1] - world.demand[:, slot])
        if second % PLACE_SECONDS == 0:
            _end(rows, left, running, groups, counts, nodes)
            _place(second, slot, rows, left, running, groups, counts, nodes, rules.promised, rules.memory, sums)
        if rules.law == KOORDLET:
            _koordlet(nodes, wished, cores)
        _second(second, wished, of_nodes, facts, nodes, told, looks, sums)
        if rules.law == OURS:
            grants = laws.step(told, looks).grant_cores
            nodes[:, LIMIT] = np.where(grants >= 0.0, grants, cores)
        if second % 60 == 59:
            found = _minute(nodes, of_nodes, world.harm)
            if second >= warm:
                minutes += found
                passed = (sums - before)[[SERVICES, BATCH]] / 60.0
                timeline[(second - warm) // 60] = *passed, found[1] / max(found[0], 1)
            before = sums.copy()
        if second == warm - 1:  # the fleet has filled, and the laws have looked at everybody: now it counts
            sums[[SERVICES, BATCH, ENERGY, WAITED]] = 0.0
            before, counts[[STARTED, ENDED]] = sums.copy(), 0
    assert sums[BUSIEST] <= 1.0 + 1e-9, "no node runs more than it has"
    here, violated, added = map(int, minutes)
    started, ended = int(counts[STARTED]), int(counts[ENDED])
    waited = float(sums[WAITED]) / max(started, 1)
    services, batch, energy = float(sums[SERVICES]), float(sums[BATCH]), float(sums[ENERGY])
    return Told(services, batch, here, violated, added, started, ended, waited, energy, timeline)
