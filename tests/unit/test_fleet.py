"""The batch core decides what the agent decides: the same source, compiled, over a hundred thousand random states."""

import math

import msgspec
import numpy as np
import pytest

from colocate.calibration import Calibration
from colocate.decide import attribution as law
from colocate.decide import eviction, evidence, fleet, freeze, memory
from colocate.decide.pipeline import LawState, decide
from colocate.model import reference
from colocate.model.forecast import ModelState, forecast
from colocate.model.special import incomplete_beta
from colocate.policy.schema import PolicySpec
from tests import make

COMPILED = fleet.compiled()
SPEC = PolicySpec()
LIVES, LOOKS = 600, 70


def near(found, wanted):
    wanted = np.array(wanted)
    return bool((np.abs(found - wanted) <= 1e-9 + 1e-6 * np.abs(wanted)).all())


def random_inputs(generator, now):
    inputs = [0.0] * evidence.NODE_INPUTS
    inputs[evidence.NOW], inputs[evidence.BATCH_CORES] = now, generator.choice([0.0, 0.05, 1.5])
    inputs[evidence.IN_FORCE], inputs[evidence.RAIL_CORES] = (
        float(generator.random() < 0.9),
        generator.uniform(0.01, 4.0),
    )
    inputs[evidence.NODE_CORES], inputs[evidence.IDLE_CPUS] = 4.0, float(generator.integers(0, 4))
    inputs[evidence.FLOOR_CORES], inputs[evidence.QUESTION_SECONDS], inputs[evidence.HOLD_SECONDS] = 0.01, 3.0, 10.0
    inputs[evidence.PRESSURE_RATIO], inputs[evidence.BESTEFFORT_RATIO] = 0.2, 0.05
    return inputs


def test_the_law_of_attribution_is_the_same_compiled():
    """Random lives of three subjects of all kinds: levels, silences, paces, guard rails."""
    generator = np.random.default_rng(11)
    modes: set[float] = set()
    for _ in range(LIVES):
        kinds = generator.permutation([evidence.WAITING, evidence.LATENCY, evidence.DISPLACED])
        node, rows = [0.0] * law.NODE_STATE, [[0.0] * evidence.SUBJECT_STATE for _ in kinds]
        law.new_node(node, 10.0)
        now, totals, exposures = 1000.0, np.zeros(3), np.zeros(3)
        seen = [[0.0] * evidence.SUBJECT_INPUTS for _ in kinds]
        for row, told, kind in zip(rows, seen, kinds, strict=True):
            told[evidence.KIND], told[evidence.SEEN_AT] = kind, now
            evidence.new_subject(row, told, 5.0)
        own, added = generator.uniform(0, 0.7, 3), generator.choice([0.0, 0.3, 0.9], 3)
        for _ in range(LOOKS):
            dt = float(generator.choice([0.1, 0.5, 1.0, 4.0]))
            now += dt
            on = 1.0 if node[law.GRANT] == law.UNLIMITED else min(node[law.GRANT] / 2, 1.0)
            level = np.clip(own + added * on + generator.normal(0, 0.05, 3), 0, 1)
            requests = np.floor(dt * generator.uniform(0, 60))
            for i, kind in enumerate(kinds):
                more = requests if kind == evidence.LATENCY else dt
                totals[i] += np.floor(level[i] * more) if kind == evidence.LATENCY else level[i] * more
                exposures[i] += more
                seen[i][evidence.SEEN_AT] = now
                seen[i][evidence.SEEN_T] = float(totals[i]) * (-1 if kind == evidence.DISPLACED else 1)
                seen[i][evidence.SEEN_N] = float(exposures[i]) if kind == evidence.LATENCY else now
                seen[i][evidence.SEEN_WAITED] = float(totals[i])
                seen[i][evidence.SILENT] = (
                    float(generator.choice([0, 0, 0, 0, 1, 2])) if kind == evidence.LATENCY else 0.0
                )
            inputs = random_inputs(generator, now)
            there, them = np.array(node), np.array(rows)
            answer = COMPILED["step"](there, them, np.array(seen), np.array(inputs))
            assert law.step(node, rows, seen, inputs) == answer
            # Logarithms of two libraries may differ in their last digit; what is decided may not.
            assert near(there, node)
            assert near(them, rows)
            modes.add(node[law.MODE])
    assert modes == {law.OPEN, law.ASKING_OFF, law.ASKING_ON, law.HELD, law.TRYING}


NUMBERS = np.random.default_rng(3)


def scale(high, low=0.0):
    return lambda: float(NUMBERS.uniform(low, high))


def of(*values):
    return lambda: values[NUMBERS.integers(len(values))]


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        pytest.param(incomplete_beta, [scale(400, 0.5), scale(400, 0.5), scale(1)], id="incomplete_beta"),
        pytest.param(memory.allow, [scale(2**38)] * 3 + [scale(0.5), of(0.0, 2.0**33, 2.0**30)], id="allow"),
        pytest.param(
            memory.presses, [scale(0.2), scale(0.1), scale(2**34), scale(2**36), of(True, False), scale(2**30)],
            id="presses"
        ),
        pytest.param(
            memory.climb,
            [of(-1, 0, 1, 2, 3, 4), scale(100), scale(100), scale(120, 90), of(True, False), of(True, False),
             of(0b10011, 0b11111, 0b10000), of(4, 5), scale(2), scale(20)],
            id="climb",
        ),
        pytest.param(freeze.since_of, [of(True, False), of(True, False), of(-1.0, 5.0), scale(100)], id="since_of"),
        pytest.param(
            eviction.proceed,
            [of(True, False), of(True, False), of(0.0, 95.0, 120.0), of(0.0, 96.0), scale(130, 90), scale(10)],
            id="proceed",
        ),
    ],
)  # fmt: skip
def test_every_other_core_is_the_same_compiled(function, arguments):
    for _ in range(20_000):
        values = [draw() for draw in arguments]
        assert COMPILED[function.__name__](*values) == pytest.approx(function(*values), rel=1e-9, abs=1e-15), values


def test_a_batch_of_nodes_decides_what_the_agent_would():
    """Two nodes of one service and four jobs, five minutes: through the model and all laws, both ways."""
    nodes, jobs, seconds = 2, 4, 300
    engine = fleet.Batch(nodes, 1, jobs, SPEC, cpus=2.0, memory_bytes=float(2 * make.GIB), latency=False)
    models, laws = [ModelState()] * nodes, [LawState()] * nodes
    told, of_node = np.zeros((nodes, 1 + jobs, fleet.WORKLOAD)), np.zeros((nodes, fleet.NODE))
    told[:, :, fleet.WORKING_SET] = make.GIB // 8
    of_node[:, fleet.IN_FORCE] = 1.0
    grants = np.full(nodes, -1.0)
    compared = set()
    for t in range(seconds):
        for n in range(nodes):
            share = 1.0 if grants[n] < 0 else min(grants[n] / 2.0, 1.0)
            waits = 0.1 + (0.6 * share if n == 0 and 20 <= t < 200 else 0.0)
            told[n, 0, fleet.CPU_US] += 300_000
            told[n, 0, fleet.PRESSURE_US] += round(waits * 1e6)
            told[n, 0, fleet.STALL_US] += 200_000 if 100 <= t < 110 else 0
            told[n, 1:, fleet.CPU_US] += round(share * 400_000)
            of_node[n, fleet.BUSY_US] = told[n, :, fleet.CPU_US].sum() + t * 10_000
        of_node[:, fleet.NOW], of_node[:, fleet.DAY_SECONDS] = 1000.0 + t, 86400.0 * 9 + t
        of_node[:, fleet.AVAILABLE_BYTES] = make.GIB // 16 if 100 <= t < 110 else make.GIB
        answer = engine.step(told, of_node)
        for n in range(nodes):
            names = ["web", *(f"j{i}" for i in range(jobs))]
            workloads = [
                (make.service if i == 0 else make.job)(
                    name,
                    cpu_usage_us=int(told[n, i, fleet.CPU_US]),
                    cpu_pressure_us=int(told[n, i, fleet.PRESSURE_US]),
                    memory_pressure_us=int(told[n, i, fleet.STALL_US]),
                    working_set_bytes=int(told[n, i, fleet.WORKING_SET]),
                    processes=int(told[n, i, fleet.WORKING_SET] > 0),
                )
                for i, name in enumerate(names)
            ]
            tier = make.tier(
                cpu_usage_us=int(told[n, 1:, fleet.CPU_US].sum()),
                working_set_bytes=int(told[n, 1:, fleet.WORKING_SET].sum()),
                knobs={**make.OPEN_KNOBS, "cpu.max": "1000 100000"},
            )  # fmt: skip
            now = make.snapshot(
                *workloads, at=1000.0 + t, tier=tier, time_seconds=86400.0 * 9 + t,
                cpu_busy_us=int(of_node[n, fleet.BUSY_US]), cpu_idle_us=0,
                memory_available_bytes=int(of_node[n, fleet.AVAILABLE_BYTES]), swap_free_bytes=0,
            )  # fmt: skip
            models[n], seen = forecast(now, models[n], SPEC, reference)
            laws[n], plan = decide(now, seen, SPEC, Calibration(), laws[n])
            ours = laws[n].cpu.grant_cores
            assert (-1.0 if ours is None else ours) == pytest.approx(answer.grant_cores[n], rel=1e-3), (t, n)
            assert laws[n].memory.rung == answer.rung[n], (t, n)
            evicted = [a.workload for a in plan.actions if (a.knob, a.value) == ("signal", "SIGTERM")]
            assert evicted == [f"job:j{j}" for j in range(jobs) if answer.done[n, j] == eviction.TOLD], (t, n)
            compared |= {plan.verdicts[0].reason, *evicted, laws[n].memory.rung}
            grants[n] = answer.grant_cores[n]
            for j in range(jobs):
                if answer.done[n, j] == eviction.KILLED:
                    told[n, 1 + j, fleet.WORKING_SET] = 0.0
    assert {"CausedByBatch", "TryingMore", "BatchAsked"} <= compared
    assert any(isinstance(c, str) and c.startswith("job:") for c in compared)
    assert math.isfinite(float(grants.sum()))
    assert msgspec.json.encode(msgspec.to_builtins(laws[0]))
