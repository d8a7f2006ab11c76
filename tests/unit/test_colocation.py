"""Services and batch on simulated nodes: nothing is lost or made up, and policies differ by what they do alone."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colocate.cli.fleet import size_of
from colocate.cli.main import main
from colocate.errors import BadInput
from colocate.model.statistics import Interval
from colocate.policy.schema import PolicySpec
from colocate.simulate import evaluation
from colocate.simulate.colocation import (
    FREE,
    KOORDLET,
    KOORDLET_PERCENT,
    OURS,
    SLOT_SECONDS,
    Rules,
    Tasks,
    Told,
    World,
    run,
)
from colocate.simulate.evaluation import ARMS, OURS_ARM, POOLS, RANGES, Assumptions, Result, Size, beside, kept

CORES, NODES, SECONDS = 8.0, 4, 1200
SPEC = PolicySpec()


def world(demand: float = 2.0, shared: float = 0.0, **more: Any) -> World:
    """Four nodes whose services use so many of eight CPUs."""
    slots = 2 + SECONDS // SLOT_SECONDS
    known: dict[str, Any] = {
        "cores": CORES, "demand": np.full((NODES, slots), demand), "own": np.full(NODES, 0.05),
        "feels_shared": np.full(NODES, shared), "feels_scheduler": np.zeros(NODES), "saturates": 0.2, "noise": 0.0,
        "bursts": 0.0, "served": np.ones(NODES, bool), "harm": 0.2,
    }  # fmt: skip
    return World(**{**known, **more})


def rules(law: int = FREE, cores: float = 6.0, memory: float = 1.0, yields: float = 1.0) -> Rules:
    slots = 2 + SECONDS // SLOT_SECONDS
    return Rules(law, np.full((NODES, slots), cores), np.full(NODES, memory), yields)


def tasks(
    count: int = 400, seconds: float = 60.0, instances: int = 4, cores: float = 0.5, memory: float = 0.01
) -> Tasks:
    return Tasks(
        np.linspace(0.0, SECONDS / 2, count), np.full(count, seconds), np.full(count, instances),
        np.full(count, cores), np.full(count, memory),
    )  # fmt: skip


def play(where: World, what: Tasks, by: Rules, seed: int = 1, warm: int = 0) -> Told:
    return run(where, what, by, SECONDS - warm, seed, SPEC, warm)


@pytest.mark.parametrize(
    ("by", "share"),
    [
        pytest.param(rules(cores=6.0), 6.0 / 8, id="what is promised is used"),
        pytest.param(rules(cores=3.0), 3.0 / 8, id="and no more"),
        pytest.param(rules(cores=16.0), 6.0 / 8, id="nor what services use"),
        pytest.param(rules(cores=6.0, memory=0.08), 4.0 / 8, id="memory may bind first"),
        pytest.param(rules(KOORDLET, cores=8.0), KOORDLET_PERCENT - 2.0 / 8, id="koordlet's law holds it to its share"),
        pytest.param(rules(OURS, cores=6.0), 6.0 / 8, id="ours, where services feel nothing"),
    ],
)
def test_what_batch_has(by: Rules, share: float) -> None:
    """More work than fits, from the fifth minute on."""
    told = play(world(), tasks(4000, 600.0), by, warm=300)
    assert told.batch_core_seconds / (NODES * CORES * (SECONDS - 300)) == pytest.approx(share, abs=0.02)
    assert told.service_core_seconds == pytest.approx(NODES * 2.0 * (SECONDS - 300), rel=1e-6)


def test_work_done_is_work_asked() -> None:
    """All of it ends: 100 tasks of 4 instances of half a CPU for a minute."""
    told = play(world(), tasks(100), rules())
    assert told.tasks_started == told.tasks_ended == 100
    assert told.batch_core_seconds == pytest.approx(100 * 4 * 0.5 * 60.0, rel=0.04), "ends are looked at every 2 s"


def test_services_that_feel_batch_are_left_alone_by_ours_and_not_by_a_fixed_share() -> None:
    """Batch adds 40 points where it runs at all: ours finds that out, for each node by itself."""
    sensitive = world(shared=0.4, noise=0.05)
    fixed, ours = (play(sensitive, tasks(4000, 600.0), rules(law, yields=0.0), warm=300) for law in (KOORDLET, OURS))
    assert fixed.violated_minutes == fixed.service_minutes
    assert ours.violated_minutes <= 0.1 * ours.service_minutes
    half = sensitive._replace(feels_shared=np.array([0.4, 0.4, 0.0, 0.0]))
    told = play(half, tasks(4000, 600.0), rules(OURS), warm=300)
    assert told.batch_core_seconds >= 0.9 * 2 * 6.0 * (SECONDS - 300), "the other two nodes are used"


def test_bursts_of_services_are_the_same_under_every_policy() -> None:
    told = [play(world(bursts=200.0), tasks(), rules(law)) for law in (FREE, KOORDLET, OURS)]
    assert len({one.violated_minutes for one in told}) == 1
    assert told[0].violated_minutes > 0
    assert all(one.added_minutes == 0 for one in told)


@given(
    demand=st.floats(0.0, 12.0),
    noise=st.floats(0.0, 0.5),
    law=st.sampled_from([FREE, KOORDLET, OURS]),
    cores=st.floats(0.0, 20.0),
    instances=st.integers(1, 50),
    seed=st.integers(1, 1000),
)
@settings(max_examples=20, deadline=None)
def test_no_node_runs_more_than_it_has_and_a_seed_says_everything(
    demand: float, noise: float, law: int, cores: float, instances: int, seed: int
) -> None:
    first, again = (
        play(world(demand, 0.1, noise=noise), tasks(50, 30.0, instances), rules(law, cores), seed) for _ in range(2)
    )
    for one, other in zip(first, again, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))
    whole = NODES * CORES * SECONDS
    assert 0.0 <= first.service_core_seconds + first.batch_core_seconds <= whole * (1 + 1e-9)
    assert first.batch_core_seconds <= 50 * instances * 0.5 * 30.0 + 50 * instances * 0.5 * 2.0
    assert first.tasks_ended <= first.tasks_started <= 50
    assert 0.45 * NODES * SECONDS - 1e-6 <= first.energy <= NODES * SECONDS + 1e-6
    assert first.service_minutes == NODES * SECONDS // 60


def result(utilization: float, violations: float) -> Result:
    told = Told(0.0, 0.0, 0, 0, 0, 0, 0, 0.0, 0.0, np.zeros((1, 3)))
    return Result(utilization, 0.0, violations, 0.0, 0.0, 0, 1.0, told)


def test_bars_are_judged_by_pairs_of_the_same_seed() -> None:
    drift = [0.0, 0.1, 0.2, 0.3]
    results = {arm: [result(0.3 + d, 0.01) for d in drift] for arm in ARMS}
    results[OURS_ARM] = [result(0.45 + d, 0.01) for d in drift]
    assert beside(results, POOLS).utilization == pytest.approx(Interval(15.0, 15.0, 15.0))
    judged = list(kept(results).values())
    assert judged == [True, True, True, False], "as many violations as koordlet's are not fewer"
    results[OURS_ARM] = [result(0.45 + d, 0.02) for d in drift]
    assert not kept(results)["no more violations than in separate pools"]


def test_every_assumption_is_varied_to_both_sides_of_what_is_assumed() -> None:
    assert set(RANGES) == set(Assumptions._fields)
    for name, (low, high) in RANGES.items():
        assert low < getattr(Assumptions(), name) < high, name


@pytest.mark.parametrize(
    ("nodes", "hours", "says"),
    [
        pytest.param("5+1", 24, "no fleet with pools", id="too few"),
        pytest.param("many", 24, "write CPU nodes", id="no number"),
        pytest.param("99999+1", 24, "10000 at most", id="absurdly many"),
        pytest.param("500+100", 9999, "--hours", id="absurdly long"),
    ],
)
def test_a_fleet_that_makes_no_sense_is_refused(nodes: str, hours: int, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        size_of(nodes, hours)


def traces(root: Path, days: int = 5, line: str = "") -> Path:
    """Two services, and tasks of half a minute."""
    (root / "bitbrains-50vm-2013").mkdir(parents=True)
    (root / "alibaba-v2017-batch").mkdir()
    usage = ["vm,t_s,duration_ms,cpu_count,cpu_usage_mhz"]
    for vm in ("a", "b"):
        usage += [f"{vm},{300 * i},300000,1,{1000 + 500 * np.sin(i / 40)}" for i in range(days * 288 + 20)]
    with gzip.open(root / evaluation.USAGE, "wt") as file:
        file.write("\n".join(usage) + "\n")
    with gzip.open(root / evaluation.BATCH, "wt") as file:
        file.write(
            "names of columns\n" + "".join(f"{i},{i + 30},1,1,20,Terminated,50,0.005\n" for i in range(500)) + line
        )
    return root


def test_the_whole_command_on_a_small_fleet_says_the_same_with_any_number_of_workers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "WARM_SECONDS", 300)
    where, page = traces(tmp_path / "t"), tmp_path / "fleet.html"
    command = ["evaluate", "fleet", "--nodes", "12+2", "--hours", "1", "--seeds", "2", "--traces", str(where)]
    said = []
    for workers in ("1", "2"):
        assert main([*command, "--workers", workers, "-o", "json", "--file", str(page)]) in (0, 1)
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    data = json.loads(said[0])
    assert {"utilization_points", "low", "high", "violation_ratio", "arms"} <= set(data)
    assert [arm["arm"] for arm in data["arms"]] == list(ARMS)
    assert "points of utilization" in page.read_text()
    assert main(command) in (0, 1)
    assert "Synthetic:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("days", "line", "says"),
    [
        pytest.param(2, "", "5 are needed", id="too short a record of usage"),
        pytest.param(5, "1,2,3,4,x,Terminated,50,0.1\n", "line 502", id="a task whose instances are no number"),
    ],
)
def test_a_trace_that_is_not_what_it_should_be_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], days: int, line: str, says: str
) -> None:
    where = traces(tmp_path, days, line)
    assert main(["evaluate", "fleet", "--nodes", "12+2", "--hours", "1", "--seeds", "2", "--traces", str(where)]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("COLOCATE_TRACES"), reason="bitbrains and alibaba-v2017-batch in COLOCATE_TRACES"
)
def test_on_public_traces_ours_is_ten_points_ahead_of_pools_and_hurts_less_than_a_fixed_share() -> None:
    folder = Path(os.environ["COLOCATE_TRACES"])
    results = evaluation.play_all(folder, Size(60, 12, 3), Assumptions(), range(1, 5), SPEC, lambda *_: None)
    judged = kept(results)
    assert judged["10 points over separate pools"]
    assert judged["more utilization than koordlet's law"]
    assert judged["fewer violations than koordlet's law"]
    assert float(np.mean([r.added for r in results[OURS_ARM]])) < 0.001, "minutes that batch alone has violated"
