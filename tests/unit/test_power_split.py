"""A budget of watts among jobs: the worst slowdown is the least that is possible, and no watt too many is given."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colocate.decide.power import BudgetTooSmallError, split_budget
from colocate.model.power import falling, sweep_of
from tests.unit.test_power_model import DATA, of, power


def jobs(device, dataset_of):
    """One sweep of each network, the largest batch."""
    found = {}
    for key, samples in sorted(of(device).items(), key=lambda kv: int(kv[0][3])):
        found[key[1:3]] = sweep_of(samples)
    chosen = [s for k, s in sorted(found.items()) if k in dataset_of]
    caps = np.array([s.caps for s in chosen])
    return caps, np.array([falling(s.slowdowns) for s in chosen])


SIX = {
    ("cifar100", "shufflenetv2"),
    ("imagenet", "resnet50"),
    ("librispeech", "deepspeech2"),
    ("squad", "bert_base_uncased"),
}


@pytest.mark.parametrize(("device", "times"), [("v100", 2.1), ("a40", 3.9)])
def test_insensitive_jobs_pay_for_sensitive_ones(device, times):
    """Target (d) of public sweeps is of six jobs, two of which hardly feel a cap: they are two flat ones here."""
    caps, slowdowns = jobs(device, SIX)
    flat = np.zeros((2, caps.shape[1]))
    caps, slowdowns = np.vstack((caps, caps[:2])), np.vstack((slowdowns, flat))
    budget = 0.7 * caps[:, -1].sum()
    uniform = max(np.interp(0.7 * c[-1], c, s) for c, s in zip(caps, slowdowns, strict=True))
    assert uniform / split_budget(caps, slowdowns, budget).worst >= times


CURVES = st.lists(st.lists(st.floats(0.0, 3.0), min_size=4, max_size=4), min_size=1, max_size=5)


@given(CURVES, st.floats(0.0, 1.2), st.lists(st.floats(0.2, 5.0), min_size=5, max_size=5))
@settings(deadline=None, max_examples=150)
def test_no_watt_too_many_and_no_split_that_is_better(curves, share, weights):
    slowdowns = np.array([[*sorted(c, reverse=True), 0.0] for c in curves])
    caps = np.tile(np.array([100.0, 150.0, 200.0, 250.0, 300.0]), (len(curves), 1))
    w = np.array(weights[: len(curves)])
    budget = 100.0 * len(curves) + share * 200.0 * len(curves)
    found = split_budget(caps, slowdowns, budget, w)
    assert found.caps.sum() <= budget + 1e-6
    assert np.all(found.caps >= 100.0 - 1e-9)
    assert np.all(found.caps <= 300.0 + 1e-9)
    generator = np.random.default_rng(1)
    for _ in range(30):  # others that keep the budget
        other = 100.0 + 200.0 * generator.random(len(curves))
        other = 100.0 + (other - 100.0) * min((budget - 100.0 * len(curves)) / max((other - 100.0).sum(), 1e-9), 1.0)
        worst = max(np.interp(p, c, s) / x for p, c, s, x in zip(other, caps, slowdowns, w, strict=True))
        assert found.worst <= worst + 1e-6


def test_a_budget_below_all_floors_is_refused_and_one_for_all_gives_everybody_everything():
    caps, slowdowns = np.array([[100.0, 300.0]]), np.array([[1.0, 0.0]])
    with pytest.raises(BudgetTooSmallError, match="99 W are less than the floors of 1 job"):
        split_budget(caps, slowdowns, 99.0)
    assert split_budget(caps, slowdowns, 1000.0).caps.tolist() == [300.0]
    assert split_budget(np.zeros((0, 2)), np.zeros((0, 2)), 0.0).caps.tolist() == []


def test_a_weight_lets_a_job_slow_down_more():
    caps, slowdowns = np.array([[100.0, 300.0]] * 2), np.array([[1.0, 0.0]] * 2)
    found = split_budget(caps, slowdowns, 400.0, np.array([1.0, 3.0]))
    assert found.caps[0] > found.caps[1]
    assert (300.0 - found.caps[1]) == pytest.approx(3.0 * (300.0 - found.caps[0]))


def test_jobs_of_a_table_get_watts_by_what_they_feel():
    found = power("split", DATA, "--where", "device=v100,batch_size=16", "--budget", "600", "-o", "json")
    assert found.returncode == 0, found.stderr
    result = json.loads(found.stdout)
    assert {j["job"].split()[2] for j in result["jobs"]} == {"bert_base_uncased", "deepspeech2", "resnet50"}
    assert sum(j["cap_watts"] for j in result["jobs"]) <= 600.5
    assert result["worst_slowdown"] < result["uniform_worst"]
    assert power("split", DATA, "--where", "device=v100,batch_size=16").returncode == 2
    few = power("split", DATA, "--where", "device=v100,batch_size=16", "--budget", "100")
    assert few.returncode == 2
    assert "less than the floors" in few.stderr


def split(tmp_path, tables, budget):
    files = []
    for name, rows in tables.items():
        files.append(tmp_path / f"{name}.csv")
        files[-1].write_text(
            "power_limit,time_per_epoch,average_power\n" + "".join(f"{c},{t},{w}\n" for c, t, w in rows)
        )
    found = power("split", *files, "--budget", str(budget), "-o", "json")
    assert (found.returncode, found.stderr) == (0, "")
    return json.loads(found.stdout)


CALM = [(50, 101, 45), (100, 100.9, 95), (200, 100.5, 190), (300, 100, 290)]


def test_a_job_whose_hardware_meets_its_greatest_cap_only_keeps_it(tmp_path):
    unmet = [(100, 130, 200), (150, 120, 210), (200, 110, 230), (300, 100, 260)]
    found = split(tmp_path, {"unmet": unmet, "calm": CALM}, 450)
    assert {job["job"]: job["cap_watts"] for job in found["jobs"]} == {"unmet": 300.0, "calm": 150.0}
    assert found["worst_slowdown"] == pytest.approx(0.0081, abs=1e-4)


def test_equal_shares_are_no_comparison_where_a_floor_is_above_them(tmp_path):
    high = [(200, 130, 190), (250, 110, 240), (300, 103, 290), (350, 101, 320), (400, 100, 350)]
    assert split(tmp_path, {"high": high, "calm": CALM}, 260)["uniform_worst"] is None
    assert split(tmp_path, {"high": high, "calm": CALM}, 560)["uniform_worst"] > 0.0
