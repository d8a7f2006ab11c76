"""S2.8: the CPUs of a node stay within a power budget, and batch alone gives way."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colocate.decide.cpu_power import GROW_SECONDS, SILENT_SECONDS, CpuPowerState, ceiling
from colocate.errors import ConfigError
from colocate.observe.powercap import CpuMeter
from colocate.policy.file import parse_policy
from colocate.policy.schema import API_VERSION, PowerPolicy
from colocate.snapshot import NodeSnapshot
from tests.unit.test_power_caps import node

POLICY, FLOOR = PowerPolicy(cpu_budget=100), 0.1


def drawing(watts: float | None, at: float = 100.0, cpus: int = 8) -> NodeSnapshot:
    return msgspec.structs.replace(node(), cpu_watts=watts, monotonic_seconds=at, cpus=tuple(range(cpus)))


LIMITED = CpuPowerState(cores=2.0, changed_seconds=0.0, heard_seconds=99.0)


@pytest.mark.parametrize(
    ("policy", "state", "watts", "used", "cores", "reason"),
    [
        pytest.param(PowerPolicy(), LIMITED, 500.0, 4.0, None, "", id="no budget"),
        pytest.param(POLICY, CpuPowerState(), 50.0, 4.0, None, "WithinBudget", id="room"),
        pytest.param(POLICY, CpuPowerState(), 95.0, 4.0, None, "WithinBudget", id="near it"),
        pytest.param(POLICY, CpuPowerState(), 99.5, 4.0, 2.8, "Lowered", id="nearly there: 0.7 of what batch uses"),
        pytest.param(POLICY, LIMITED, 99.5, 4.0, 1.4, "Lowered", id="0.7 of its limit, where that is less"),
        pytest.param(POLICY, CpuPowerState(), 101.0, 4.0, FLOOR, "Lowered", id="above it: the floor at once"),
        pytest.param(POLICY, LIMITED, 98.0, 2.0, 2.0, "Lowered", id="between the bands it stays"),
        pytest.param(POLICY, LIMITED, 95.0, 2.0, 2.05, "Growing", id="a little room: a little more"),
        pytest.param(POLICY, LIMITED, 80.0, 2.0, 2.425, "Growing", id="room again: as much as the draw leaves"),
        pytest.param(POLICY, LIMITED, 20.0, 2.0, 3.0, "Growing", id="a lot of room: half as much again"),
        pytest.param(
            POLICY, msgspec.structs.replace(LIMITED, cores=7.9), 80.0, 2.0, None, "Growing", id="until it limits nobody"
        ),
        pytest.param(
            POLICY,
            msgspec.structs.replace(LIMITED, changed_seconds=100 - GROW_SECONDS / 2),
            80.0,
            2.0,
            2.0,
            "Lowered",
            id="room, but it has just changed",
        ),
        pytest.param(POLICY, LIMITED, None, 2.0, 2.0, "MeterSilent", id="one reading is missing: it stays"),
        pytest.param(
            POLICY,
            msgspec.structs.replace(LIMITED, heard_seconds=100 - SILENT_SECONDS),
            None,
            2.0,
            FLOOR,
            "MeterSilent",
            id="the meter is silent: the floor",
        ),
        pytest.param(POLICY, CpuPowerState(), None, 2.0, None, "MeterSilent", id="the first reading tells nothing yet"),
    ],
)
def test_s2_8_what_batch_may_use(
    policy: PowerPolicy, state: CpuPowerState, watts: float | None, used: float, cores: float | None, reason: str
) -> None:
    found, verdict = ceiling(state, drawing(watts), used, policy, FLOOR)
    assert found.cores == cores
    assert (verdict.reason if verdict is not None else "") == reason


@settings(deadline=None)
@given(st.integers(20, 300), st.floats(5, 40), st.floats(2, 20), st.floats(0, 4), st.floats(0.5, 8))
def test_s2_8_it_settles_below_the_budget_where_batch_is_the_cause(
    budget: int, idle: float, per_core: float, services: float, wants: float
) -> None:
    """A node of eight CPUs; five minutes, a look a second. Where services alone draw too much batch has its floor."""
    policy, state, drawn = PowerPolicy(cpu_budget=budget), CpuPowerState(), []
    for second in range(300):
        batch = min(wants, state.cores if state.cores is not None else 8.0, 8.0 - services)
        drawn.append(idle + per_core * (services + batch))
        state, _ = ceiling(state, drawing(drawn[-1], at=float(second)), batch, policy, FLOOR)
    least = idle + per_core * (services + FLOOR)
    over = [w for w in drawn[10:] if w > budget + 1e-6]
    if least > budget:
        assert state.cores == FLOOR
    elif not any(w >= 0.99 * budget for w in drawn):
        assert state.cores is None, "nobody is limited for nothing"
    else:
        assert len(over) <= 0.1 * len(drawn)


def zone(root: Path, name: str, joules: float, number: int = 0, limit: int = 1 << 40) -> None:
    folder = root / f"intel-rapl:{number}"
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in (("name", name), ("energy_uj", str(int(joules * 1e6))), ("max_energy_range_uj", str(limit))):
        (folder / file).write_text(f"{text}\n")


def test_s2_8_the_meter_is_read_from_one_look_to_the_next(tmp_path: Path) -> None:
    meter = CpuMeter()
    assert meter.watts(tmp_path, 1.0) is None
    assert "has no zone of a package" in meter.problem
    zone(tmp_path, "package-0", 100.0)
    zone(tmp_path, "psys", 900.0, 1)
    assert meter.watts(tmp_path, 2.0) is None, "the first"
    assert not meter.problem
    zone(tmp_path, "package-0", 160.0)
    zone(tmp_path, "psys", 1900.0, 1)
    assert meter.watts(tmp_path, 4.0) == pytest.approx(30.0)
    zone(tmp_path, "package-0", 1.0)
    assert meter.watts(tmp_path, 5.0) is None, "it was set back"
    zone(tmp_path, "package-0", 21.0)
    assert meter.watts(tmp_path, 6.0) == pytest.approx(20.0)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    assert meter.watts(tmp_path, 7.0) is None
    assert "its energy cannot be read" in meter.problem


@pytest.mark.parametrize(
    ("power", "says"),
    [
        pytest.param("cpuBudget: -5", "cpuBudget", id="negative"),
        pytest.param("powercap: sys", "is no path", id="a relative folder"),
    ],
)
def test_s2_8_a_policy_that_makes_no_sense_is_refused(power: str, says: str) -> None:
    text = f"apiVersion: {API_VERSION}\nkind: ColocationPolicy\nspec: {{power: {{{power}}}}}\n"
    with pytest.raises(ConfigError, match=says):
        parse_policy(text, "a file")
