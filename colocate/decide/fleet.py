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
            found[name] = space[name] = numba.njit(nogil=True, error_model="numpy")(plain)
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
# What is remembered of a workload: this, how its histograms and its day are, and their weights.
(AT, LAST_CPU, LAST_PRESSURE, LAST_THROTTLED, LAST_STALL, WAITED, USED, SMOOTH, AHEAD_PEAK,
 DEADLINE, KILLED, SINCE, KEPT) = range(13)  # fmt: skip
# What is remembered of a histogram beside its weights, which are to be multiplied by SCALE: all of them, those below
# the bucket of the quantile, that bucket, and the one that was added to last.
SCALE, TOTAL, BELOW, QUANTILE, LAST, HISTOGRAM = range(6)
ABOUT_CPU, ABOUT_MEMORY, SEASON = KEPT, KEPT + HISTOGRAM, KEPT + 2 * HISTOGRAM
CPU_WEIGHTS = SEASON + model.SLOTS
MEMORY_WEIGHTS = CPU_WEIGHTS + histogram.CPU_BOUNDS_CORES.size
STATE = MEMORY_WEIGHTS + histogram.MEMORY_BOUNDS_BYTES.size
LEAST_SCALE = 1e-9
# What fades, and how far in so many seconds: mostly the same for everybody.
OF_SECONDS, OF_CPU, OF_MEMORY, OF_RISE, OF_FALL, FADED = range(6)
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


# Arrays and indices are passed, no rows: each view would be counted in and out, which takes longer than all the rest.


@numba.njit(nogil=True, error_model="numpy")
def _add(
    state: Floats, i: int, j: int, about: int, weights: int, bounds: Floats, value: float, seconds: float, left: float
) -> None:
    """`model.reference.histogram_add` of one row; that the others fade is remembered as one number."""
    scale = state[i, j, about + SCALE] * left
    if scale < LEAST_SCALE:
        for k in range(bounds.size):
            state[i, j, weights + k] *= scale
        state[i, j, about + TOTAL] *= scale
        state[i, j, about + BELOW] *= scale
        scale = 1.0
    column = int(state[i, j, about + LAST])
    while column > 0 and bounds[column - 1] >= value:
        column -= 1
    while column < bounds.size - 1 and bounds[column] < value:
        column += 1
    added = seconds / scale
    state[i, j, weights + column] += added
    state[i, j, about + SCALE], state[i, j, about + LAST] = scale, column
    state[i, j, about + TOTAL] += added
    if column < state[i, j, about + QUANTILE]:
        state[i, j, about + BELOW] += added


@numba.njit(nogil=True, error_model="numpy")
def _quantile(state: Floats, i: int, j: int, about: int, weights: int, bounds: Floats, q: float) -> float:
    """`model.reference.histogram_quantile` of one row, from where it was last; always the same `q`."""
    if state[i, j, about + TOTAL] <= 0.0:
        return math.nan
    wanted, column, below = (
        state[i, j, about + TOTAL] * q,
        int(state[i, j, about + QUANTILE]),
        state[i, j, about + BELOW],
    )
    while column > 0 and below >= wanted:
        column -= 1
        below -= state[i, j, weights + column]
    while column < bounds.size - 1 and below + state[i, j, weights + column] < wanted:
        below += state[i, j, weights + column]
        column += 1
    state[i, j, about + QUANTILE], state[i, j, about + BELOW] = column, below if column > 0 else 0.0
    return float(bounds[column])


@numba.njit(nogil=True, error_model="numpy")
def _rate(now: float, before: float, seconds: float) -> float:
    return (now - before) / seconds if now >= before and seconds > 0.0 else math.nan


@numba.njit(nogil=True, error_model="numpy")
def _forecast(
    i: int,
    j: int,
    state: Floats,
    told: Floats,
    at: float,
    slot: int,
    entered: bool,
    cpu_bounds: Floats,
    memory_bounds: Floats,
    faded: Floats,
) -> tuple[float, float, float, float]:
    """One workload now and soon: (cores, peak cores, peak bytes, stalled share); NaN where it is not known."""
    seconds = at - state[i, j, AT] if state[i, j, AT] > 0.0 else 0.0
    cores = _rate(told[i, j, CPU_US], state[i, j, LAST_CPU], seconds) / 1e6
    waits = _rate(told[i, j, PRESSURE_US], state[i, j, LAST_PRESSURE], seconds) / 1e6
    held = _rate(told[i, j, THROTTLED_US], state[i, j, LAST_THROTTLED], seconds) / 1e6
    stalled = _rate(told[i, j, STALL_US], state[i, j, LAST_STALL], seconds) / 1e6
    if not math.isnan(waits):
        state[i, j, WAITED] += min(max(waits - (0.0 if math.isnan(held) else held), 0.0), 1.0) * seconds
    if entered:
        state[i, j, SEASON + slot] *= model.SEASON_KEPT_A_DAY
        state[i, j, AHEAD_PEAK] = -1.0
        for ahead in range(1, model.AHEAD + 1):
            then = state[i, j, SEASON + (slot + ahead) % model.SLOTS]
            if not math.isnan(then):
                state[i, j, AHEAD_PEAK] = max(state[i, j, AHEAD_PEAK], then)
    if seconds != faded[OF_SECONDS]:
        faded[OF_SECONDS] = seconds
        faded[OF_CPU] = 2.0 ** (-seconds / histogram.CPU_HALF_LIFE_SECONDS)
        faded[OF_MEMORY] = 2.0 ** (-seconds / histogram.MEMORY_HALF_LIFE_SECONDS)
        faded[OF_RISE] = 1.0 - math.exp(-seconds / model.RISE_SECONDS)
        faded[OF_FALL] = 1.0 - math.exp(-seconds / model.FALL_SECONDS)
    smooth = state[i, j, SMOOTH]
    if not math.isnan(cores):
        state[i, j, USED] += cores * seconds
        _add(state, i, j, ABOUT_CPU, CPU_WEIGHTS, cpu_bounds, cores, seconds, faded[OF_CPU])
        smooth = (
            cores if math.isnan(smooth) else smooth + faded[OF_RISE if cores > smooth else OF_FALL] * (cores - smooth)
        )
        state[i, j, SMOOTH] = smooth
    if seconds > 0.0:
        _add(
            state, i, j, ABOUT_MEMORY, MEMORY_WEIGHTS, memory_bounds, told[i, j, WORKING_SET], seconds, faded[OF_MEMORY]
        )
    best = _quantile(state, i, j, ABOUT_CPU, CPU_WEIGHTS, cpu_bounds, 0.95)
    best = max(-1.0 if math.isnan(best) else best, state[i, j, AHEAD_PEAK])
    if not math.isnan(smooth):
        known = state[i, j, SEASON + slot]
        state[i, j, SEASON + slot] = smooth if math.isnan(known) else max(known, smooth)
        best = max(best, state[i, j, SEASON + slot])
    memory_peak = _quantile(state, i, j, ABOUT_MEMORY, MEMORY_WEIGHTS, memory_bounds, 0.98)
    most = told[i, j, WORKING_SET] if math.isnan(memory_peak) else max(memory_peak, told[i, j, WORKING_SET])
    state[i, j, AT], state[i, j, LAST_CPU], state[i, j, LAST_PRESSURE] = at, told[i, j, CPU_US], told[i, j, PRESSURE_US]
    state[i, j, LAST_THROTTLED], state[i, j, LAST_STALL] = told[i, j, THROTTLED_US], told[i, j, STALL_US]
    return cores, (math.nan if best < 0.0 else best * model.MARGIN), most * model.MARGIN, stalled


@numba.njit(nogil=True, error_model="numpy")
def _step_nodes(
    policy: Floats,
    told: Floats,
    of_node: Floats,
    state: Floats,
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
    stalls, faded = np.zeros(services), np.full(FADED, -1.0)
    seen, inputs = np.zeros((services, evidence.SUBJECT_INPUTS)), np.zeros(evidence.NODE_INPUTS)
    for i in range(n):
        at = of_node[i, NOW]
        slot = int(of_node[i, DAY_SECONDS] % 86400 / 86400 * model.SLOTS)
        entered = slot != int(node[i, SLOT])
        node[i, SLOT] = slot
        used = peak = batch = peak_bytes = service_bytes = batch_bytes = 0.0
        presses = False
        for j in range(w):
            cores, most, most_bytes, stalled = _forecast(
                i,
                j,
                state,
                told,
                at,
                slot,
                entered,
                cpu_bounds,
                memory_bounds,
                faded,
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
            seen[j, evidence.SEEN_AT], seen[j, evidence.SEEN_WAITED] = at, state[i, j, WAITED]
            seen[j, evidence.SEEN_T] = told[i, j, LATE] if latency else state[i, j, WAITED]
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
            row = state[i, services + j]
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
            row, frozen = state[i, services + j], told[i, services + j, FROZEN] > 0.0
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
        self.state = np.zeros((nodes, w, STATE))
        self.state[:, :, [SMOOTH, *range(SEASON, SEASON + model.SLOTS)]] = np.nan
        self.state[:, :, SINCE] = -1.0
        self.state[:, :, [ABOUT_CPU + SCALE, ABOUT_MEMORY + SCALE]] = 1.0
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
            self.policy, told, of_node, self.state, self.node, self.law,
            self.subjects, self.services, histogram.CPU_BOUNDS_CORES, histogram.MEMORY_BOUNDS_BYTES, *self.decisions,
        )  # fmt: skip
        return self.decisions
