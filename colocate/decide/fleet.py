"""Model and laws over many nodes at once, compiled by numba: the agent's own cores, without messages and actions.

For simulation and training: a step takes arrays of counters and returns arrays of decisions. Every law's core is the
same source that the agent runs (`attribution`, `evidence`, and the scalar functions of `memory`, `eviction` and
`freeze`); it is compiled here, function by function, with the ones that it calls. Nothing in the agent imports this
module. Not here: batch beyond its allowance, less than 1 % of memory left, checkpoints, batch in place, gangs.

Shapes: n nodes, w workloads a node (s services first, then jobs). Memory is changed in place.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from colocate.decide import attribution, eviction, evidence, freeze, memory
from colocate.model import forecast as model
from colocate.model import histogram, special
from colocate.policy.schema import PolicySpec

Floats = NDArray[np.float64]


def _functions(module: types.ModuleType) -> tuple[str, ...]:
    return tuple(n for n, f in vars(module).items() if isinstance(f, types.FunctionType))


CORES = (
    (special, ("incomplete_beta",)),
    (memory, ("allow", "presses", "climb")),
    (freeze, ("since_of",)),
    (eviction, ("proceed",)),
    (evidence, _functions(evidence)),
    (attribution, _functions(attribution)),
)


def compiled(cores: tuple[tuple[types.ModuleType, tuple[str, ...]], ...] = CORES) -> dict[str, Callable[..., Any]]:
    """name -> the function compiled, each with the compiled ones of those that it calls."""
    found: dict[str, Callable[..., Any]] = {}
    for module, names in cores:
        mine = {n: getattr(module, n) for n in names if n not in found}
        space = {**vars(module), **found}
        for name, function in _callees_first(mine):
            plain = types.FunctionType(function.__code__, space, name, function.__defaults__)
            found[name] = space[name] = numba.njit(nogil=True)(plain)
    return found


def _callees_first(functions: dict[str, Any]) -> list[tuple[str, Any]]:
    """In an order in which whoever is called stands before its caller."""
    ordered: dict[str, Any] = {}

    def add(name: str) -> None:
        if name not in ordered:
            for other in functions[name].__code__.co_names:
                if other in functions and other != name:
                    add(other)
            ordered[name] = functions[name]

    for name in functions:
        add(name)
    return list(ordered.items())


_F = compiled()
_ALLOW, _PRESSES, _CLIMB = _F["allow"], _F["presses"], _F["climb"]
_SINCE, _PROCEED = _F["since_of"], _F["proceed"]
_STEP, _NEW_NODE, _NEW_SUBJECT = _F["step"], _F["new_node"], _F["new_subject"]

# What is told of a workload each tick.
CPU_US, PRESSURE_US, THROTTLED_US, STALL_US, WORKING_SET, OWN_LIMIT, FROZEN, WISHED, REQUESTS, LATE, WORKLOAD = range(
    11
)
# What is told of a node each tick.
NOW, DAY_SECONDS, BUSY_US, AVAILABLE_BYTES, IDLE_CPUS, IN_FORCE, NODE = range(7)
# What is remembered of a workload beside its histograms.
(AT, LAST_CPU, LAST_PRESSURE, LAST_THROTTLED, LAST_STALL, WAITED, USED, SMOOTH, HIGHEST_CPU, HIGHEST_MEMORY, LOWEST_CPU,
 LOWEST_MEMORY, DEADLINE, KILLED, SINCE, KEPT) = range(16)  # fmt: skip
# What is remembered of a node beside the law's row.
LAST_AT, LAST_BUSY, RUNG, RUNG_SINCE, PRESSED, ALLOWED, SLOT, SETTLED, VICTIM, NODE_KEPT = range(10)
# VICTIM: 1 + the job whose eviction the memory law asked for, 0: none.
# The policy, and what does not change of a node.
(CPUS, MEMORY_BYTES, FLOOR, QUESTION, HOLD, PRESSURE, BESTEFFORT, RESERVE_CPU, RESERVE_MEMORY, STALL_RATIO,
RUNG_SECONDS,
 CALM_SECONDS, GRACE_SECONDS, LATENCY, WINDOW, POLICY) = range(16)  # fmt: skip


class Decisions(NamedTuple):
    """What the laws want of every node."""

    grant_cores: Floats
    """(n,): -1 for none."""
    reason: NDArray[np.int64]
    """(n,): of `attribution`."""
    rung: NDArray[np.int64]
    """(n,): of the memory ladder, -1 for calm."""
    allowance_bytes: Floats
    done: NDArray[np.int64]
    """(n, jobs): of `eviction`."""


@numba.njit(nogil=True)
def _quantile(weights: Floats, bounds: Floats, lowest: int, highest: int, q: float) -> float:
    """`model.reference.histogram_quantile` of one row, whose buckets outside of these two are empty."""
    total = 0.0
    for j in range(lowest, highest + 1):
        total += weights[j]
    if total <= 0.0:
        return math.nan
    wanted, running = total * q, 0.0
    for j in range(lowest, highest + 1):
        running += weights[j]
        if running >= wanted:
            return float(bounds[j])
    return float(bounds[highest])


@numba.njit(nogil=True)
def _add(
    weights: Floats, bounds: Floats, lowest: int, highest: int, value: float, seconds: float, left: float
) -> tuple[int, int]:
    """`model.reference.histogram_add` of one row; the lowest and the highest bucket in use (lowest > highest: none)."""
    for j in range(lowest, highest + 1):
        weights[j] *= left
    column: Any = min(np.searchsorted(bounds, value), bounds.size - 1)
    weights[column] += seconds
    return min(lowest, int(column)), max(highest, int(column))


@numba.njit(nogil=True)
def _rate(now: float, before: float, seconds: float) -> float:
    return (now - before) / seconds if now >= before and seconds > 0.0 else math.nan


@numba.njit(nogil=True)
def _forecast_row(
    kept: Floats,
    told: Floats,
    cpu: Floats,
    mem: Floats,
    season: Floats,
    at: float,
    slot: int,
    entered: bool,
    cpu_bounds: Floats,
    memory_bounds: Floats,
) -> tuple[float, float, float, float]:
    """One workload now and soon: (cores, peak cores, peak bytes, stalled share); NaN where it is not known."""
    seconds = at - kept[AT] if kept[AT] > 0.0 else 0.0
    cores = _rate(told[CPU_US], kept[LAST_CPU], seconds) / 1e6
    waits = _rate(told[PRESSURE_US], kept[LAST_PRESSURE], seconds) / 1e6
    held = _rate(told[THROTTLED_US], kept[LAST_THROTTLED], seconds) / 1e6
    stalled = _rate(told[STALL_US], kept[LAST_STALL], seconds) / 1e6
    if not math.isnan(waits):
        kept[WAITED] += min(max(waits - (0.0 if math.isnan(held) else held), 0.0), 1.0) * seconds
    if entered:
        season[slot] *= model.SEASON_KEPT_A_DAY
    if not math.isnan(cores):
        kept[USED] += cores * seconds
        left = 2.0 ** (-seconds / histogram.CPU_HALF_LIFE_SECONDS)
        low, high = int(kept[LOWEST_CPU]), int(kept[HIGHEST_CPU])
        kept[LOWEST_CPU], kept[HIGHEST_CPU] = _add(cpu, cpu_bounds, low, high, cores, seconds, left)
        if math.isnan(kept[SMOOTH]):
            kept[SMOOTH] = cores
        else:
            constant = model.RISE_SECONDS if cores > kept[SMOOTH] else model.FALL_SECONDS
            kept[SMOOTH] += (1.0 - math.exp(-seconds / constant)) * (cores - kept[SMOOTH])
    if seconds > 0.0:
        left = 2.0 ** (-seconds / histogram.MEMORY_HALF_LIFE_SECONDS)
        low, high = int(kept[LOWEST_MEMORY]), int(kept[HIGHEST_MEMORY])
        kept[LOWEST_MEMORY], kept[HIGHEST_MEMORY] = _add(
            mem, memory_bounds, low, high, told[WORKING_SET], seconds, left
        )
    if not math.isnan(kept[SMOOTH]):
        season[slot] = max(season[slot], kept[SMOOTH]) if not math.isnan(season[slot]) else kept[SMOOTH]
    best = _quantile(cpu, cpu_bounds, int(kept[LOWEST_CPU]), int(kept[HIGHEST_CPU]), 0.95)
    best = -1.0 if math.isnan(best) else best
    for ahead in range(model.AHEAD + 1):
        best = max(best, season[(slot + ahead) % model.SLOTS]) if season[(slot + ahead) % model.SLOTS] > best else best
    best = max(best, kept[SMOOTH])
    memory_peak = _quantile(mem, memory_bounds, int(kept[LOWEST_MEMORY]), int(kept[HIGHEST_MEMORY]), 0.98)
    most = told[WORKING_SET] if math.isnan(memory_peak) else max(memory_peak, told[WORKING_SET])
    kept[AT], kept[LAST_CPU], kept[LAST_PRESSURE] = at, told[CPU_US], told[PRESSURE_US]
    kept[LAST_THROTTLED], kept[LAST_STALL] = told[THROTTLED_US], told[STALL_US]
    return cores, (math.nan if best < 0.0 else best * model.MARGIN), most * model.MARGIN, stalled


@numba.njit(nogil=True)
def _step_nodes(
    policy: Floats,
    told: Floats,
    of_node: Floats,
    kept: Floats,
    cpu: Floats,
    mem: Floats,
    season: Floats,
    node: Floats,
    law: Floats,
    subjects: Floats,
    services: int,
    cpu_bounds: Floats,
    memory_bounds: Floats,
    grants: Floats,
    reasons: NDArray[np.int64],
    rungs: NDArray[np.int64],
    allowances: Floats,
    done: NDArray[np.int64],
) -> None:
    n, w = told.shape[0], told.shape[1]
    stalls = np.zeros(services)
    seen, inputs = np.zeros((services, evidence.SUBJECT_INPUTS)), np.zeros(evidence.NODE_INPUTS)
    for i in range(n):
        at = of_node[i, NOW]
        slot = int(of_node[i, DAY_SECONDS] % 86400 / 86400 * model.SLOTS)
        entered = slot != int(node[i, SLOT])
        node[i, SLOT] = slot
        used = peak = batch = peak_bytes = service_bytes = batch_bytes = 0.0
        presses = False
        for j in range(w):
            cores, most, most_bytes, stalled = _forecast_row(
                kept[i, j], told[i, j], cpu[i, j], mem[i, j], season[i, j], at, slot, entered, cpu_bounds, memory_bounds
            )
            cores = 0.0 if math.isnan(cores) else cores
            if j < services:
                used += cores
                peak += 0.0 if math.isnan(most) else most
                peak_bytes += most_bytes
                service_bytes += told[i, j, WORKING_SET]
                stalls[j] = stalled
            else:
                batch += cores
                batch_bytes += told[i, j, WORKING_SET]
        seconds = at - node[i, LAST_AT] if node[i, LAST_AT] > 0.0 else 0.0
        busy = (of_node[i, BUSY_US] - node[i, LAST_BUSY]) / 1e6 / seconds if seconds > 0.0 else 0.0
        node[i, LAST_AT], node[i, LAST_BUSY] = at, of_node[i, BUSY_US]
        system = max(busy - used - batch, 0.0) if seconds > 0.0 else 0.0

        latency = policy[LATENCY] > 0.0
        for j in range(services):
            seen[j, evidence.KIND] = evidence.LATENCY if latency else evidence.WAITING
            seen[j, evidence.SEEN_AT], seen[j, evidence.SEEN_WAITED] = at, kept[i, j, WAITED]
            seen[j, evidence.SEEN_T] = told[i, j, LATE] if latency else kept[i, j, WAITED]
            seen[j, evidence.SEEN_N] = told[i, j, REQUESTS] if latency else at
            if subjects[i, j, evidence.WINDOW] == 0.0:
                _NEW_SUBJECT(subjects[i, j], seen[j], policy[WINDOW])
        inputs[evidence.NOW], inputs[evidence.BATCH_CORES] = at, batch
        inputs[evidence.IN_FORCE], inputs[evidence.IDLE_CPUS] = of_node[i, IN_FORCE], of_node[i, IDLE_CPUS]
        rail = policy[CPUS] - peak - system - policy[CPUS] * policy[RESERVE_CPU]
        inputs[evidence.RAIL_CORES], inputs[evidence.NODE_CORES] = max(rail, policy[FLOOR]), policy[CPUS]
        inputs[evidence.FLOOR_CORES], inputs[evidence.QUESTION_SECONDS] = policy[FLOOR], policy[QUESTION]
        inputs[evidence.HOLD_SECONDS], inputs[evidence.PRESSURE_RATIO] = policy[HOLD], policy[PRESSURE]
        inputs[evidence.BESTEFFORT_RATIO] = policy[BESTEFFORT]
        if law[i, attribution.HOLD] == 0.0:
            _NEW_NODE(law[i], policy[HOLD])
        reason, _ = _STEP(law[i], subjects[i], seen, inputs)
        grants[i], reasons[i] = law[i, attribution.GRANT], reason

        left, total = of_node[i, AVAILABLE_BYTES], policy[MEMORY_BYTES]
        others = max(total - left - service_bytes - batch_bytes, 0.0)
        node[i, ALLOWED] = _ALLOW(total, math.floor(peak_bytes), others, policy[RESERVE_MEMORY], node[i, ALLOWED])
        allowances[i] = node[i, ALLOWED]
        for j in range(services):
            presses = presses or _PRESSES(
                stalls[j], policy[STALL_RATIO], left, total, told[i, j, OWN_LIMIT] > 0.0, batch_bytes
            )
        leaving, gone = False, False
        for j in range(w - services):
            row = kept[i, services + j]
            if row[DEADLINE] > 0.0:
                over = told[i, services + j, WORKING_SET] <= 0.0 or (
                    row[KILLED] > 0.0 and at >= row[KILLED] + eviction.KILLING_SECONDS
                )
                leaving, gone = leaving or not over, gone or (over and j + 1 == int(node[i, VICTIM]))
        if gone:  # what was felt until then says nothing of what is left
            node[i, RUNG], node[i, RUNG_SINCE], node[i, PRESSED], node[i, VICTIM] = -1.0, 0.0, 0.0, 0.0
            node[i, SETTLED] = at + max(policy[RUNG_SECONDS], seconds)
        presses = presses and at >= node[i, SETTLED]
        rung, since, pressed = _CLIMB(
            int(node[i, RUNG]),
            node[i, RUNG_SINCE],
            node[i, PRESSED],
            at,
            presses,
            False,
            0b10011,
            5,
            policy[RUNG_SECONDS],
            policy[CALM_SECONDS],
        )
        node[i, RUNG], node[i, RUNG_SINCE], node[i, PRESSED] = rung, since, pressed
        rungs[i] = rung
        victim = _victim(told[i], services) if presses and rung == 4 and not leaving else -1
        node[i, VICTIM] = victim + 1 if victim >= 0 else node[i, VICTIM]
        for j in range(w - services):
            row, frozen = kept[i, services + j], told[i, services + j, FROZEN] > 0.0
            wished = j == victim or told[i, services + j, WISHED] > 0.0
            alive = told[i, services + j, WORKING_SET] > 0.0
            act, row[DEADLINE], row[KILLED] = _PROCEED(
                alive, wished, row[DEADLINE], row[KILLED], at, policy[GRACE_SECONDS]
            )
            row[SINCE] = _SINCE(False, frozen, row[SINCE], at)
            done[i, j] = act


@numba.njit(nogil=True)
def _victim(told: Floats, services: int) -> int:
    """The job that loses least, CPU-seconds spent (nothing of it was saved), of those whose going will be felt."""
    found, least, large = -1, math.inf, False
    for j in range(told.shape[0] - services):
        spent, held = told[services + j, CPU_US], told[services + j, WORKING_SET]
        felt = held >= memory.LEAST_BYTES
        if held > 0.0 and (felt, -spent) > (large, -least):
            found, least, large = j, spent, felt
    return found


class Batch:
    """Many equal nodes, each with `services` services and `jobs` jobs, under one policy."""

    def __init__(
        self, nodes: int, services: int, jobs: int, spec: PolicySpec, *, cpus: float, memory_bytes: float, latency: bool
    ) -> None:
        w = services + jobs
        self.services = services
        self.kept = np.zeros((nodes, w, KEPT))
        self.kept[:, :, SMOOTH] = np.nan
        self.kept[:, :, SINCE] = self.kept[:, :, HIGHEST_CPU] = self.kept[:, :, HIGHEST_MEMORY] = -1.0
        self.kept[:, :, LOWEST_CPU] = self.kept[:, :, LOWEST_MEMORY] = histogram.MEMORY_BOUNDS_BYTES.size
        self.cpu = np.zeros((nodes, w, histogram.CPU_BOUNDS_CORES.size))
        self.memory = np.zeros((nodes, w, histogram.MEMORY_BOUNDS_BYTES.size))
        self.season = np.full((nodes, w, model.SLOTS), np.nan)
        self.node = np.zeros((nodes, NODE_KEPT))
        self.node[:, RUNG] = self.node[:, SLOT] = -1.0
        self.law = np.zeros((nodes, attribution.NODE_STATE))
        self.subjects = np.zeros((nodes, services, evidence.SUBJECT_STATE))
        self.policy = np.zeros(POLICY)
        cpu, mem = spec.cpu, spec.memory
        self.policy[[CPUS, MEMORY_BYTES, FLOOR, QUESTION, HOLD]] = (
            cpus,
            memory_bytes,
            cpu.floor,
            cpu.question,
            cpu.hold_down,
        )
        self.policy[[PRESSURE, BESTEFFORT, RESERVE_CPU]] = (
            cpu.pressure / 100,
            cpu.best_effort_waits / 100,
            cpu.reserve / 100,
        )
        self.policy[[RESERVE_MEMORY, STALL_RATIO]] = mem.reserve / 100, mem.pressure / 100
        self.policy[[RUNG_SECONDS, CALM_SECONDS, GRACE_SECONDS]] = mem.rung, mem.calm, mem.termination_grace
        self.policy[LATENCY], self.policy[WINDOW] = float(latency), 5.0 if latency else evidence.NEAR_SECONDS
        self.decisions = Decisions(
            np.zeros(nodes), np.zeros(nodes, np.int64), np.zeros(nodes, np.int64), np.zeros(nodes),
            np.zeros((nodes, jobs), np.int64),
        )  # fmt: skip

    def step(self, told: Floats, of_node: Floats) -> Decisions:
        """One look at every node: `told` (n, w, WORKLOAD), `of_node` (n, NODE). The next overwrites the answer."""
        _step_nodes(
            self.policy, told, of_node, self.kept, self.cpu, self.memory, self.season, self.node, self.law,
            self.subjects, self.services, histogram.CPU_BOUNDS_CORES, histogram.MEMORY_BOUNDS_BYTES, *self.decisions,
        )  # fmt: skip
        return self.decisions
