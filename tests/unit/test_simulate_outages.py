"""Nodes that fail: work since the last checkpoint is lost, nothing else, and energy is power times time."""

from __future__ import annotations

import json
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colocate.cli.main import main
from colocate.simulate.compare import Conditions, known_run, one_run, run_all, windows
from colocate.simulate.fleet import DISCIPLINES
from colocate.simulate.outages import NO_OUTAGES, Outages, Trouble
from colocate.simulate.workloads import Workload
from tests.unit.test_simulate_fleet import GPUS, ROWS, arrived, fleet, work_of

INFINITE = np.inf
GANGS = [*(name for name, discipline in DISCIPLINES.items() if discipline.gang), "ours", "ours-declared"]


def outages(*rows, checkpoint=INFINITE, restart=0.0):
    """(when, node, whether it fails) of each."""
    at, node, down = (np.array(column) for column in zip(*rows, strict=True))
    return Outages(
        at.astype(float), node.astype(np.int64), down.astype(np.bool_), float(checkpoint), float(restart), INFINITE
    )


def ran(policy, nodes, kinds, work, trouble):
    workload = Workload(work, kinds, tuple(str(i) for i in range(len(work.submit))))
    return known_run(policy, fleet(nodes), workload, 3, None, trouble)


@pytest.mark.parametrize("policy", [*DISCIPLINES, "ours", "ours-declared"])
@pytest.mark.parametrize(
    ("checkpoint", "restart", "end", "lost"),
    [
        pytest.param(INFINITE, 0, 170, 60, id="without checkpoints all is done again"),
        pytest.param(25, 0, 120, 10, id="since the last checkpoint"),
        pytest.param(25, 5, 125, 15, id="and beginning again takes time"),
        pytest.param(1, 0, 110, 0, id="a checkpoint at that moment loses nothing"),
    ],
)
def test_a_job_whose_node_fails_does_again_what_was_not_saved(policy, checkpoint, restart, end, lost):
    """One node, down from 60 to 70; a second job waits for the first and never sees it fail."""
    kinds, work = work_of((0, 100, 2, 2), (200, 10, 1, 1))
    trouble = outages((60, 0, True), (70, 0, False), checkpoint=checkpoint, restart=restart)
    run = ran(policy, 1, kinds, work, trouble)
    assert run.start.tolist() == [0, 200]
    assert run.end.tolist() == [end, 210]
    assert (run.restarts, run.lost_gpu_seconds) == (1, lost * GPUS)
    assert run.busy_gpu_seconds == (100 + lost) * GPUS
    assert run.idle_gpu_seconds == 0, "a node that has failed has no GPUs that could be had"


@pytest.mark.parametrize("policy", [*DISCIPLINES, "ours"])
def test_a_gang_stops_whole_where_one_of_its_members_is_hit_and_the_other_node_is_used(policy):
    kinds, work = work_of((0, 50, 2, 4), (0, 30, 1, 1), (300, 1, 1, 1))
    run = ran(policy, 3, kinds, work, outages((20, 0, True), (1000, 0, False)))
    hit = [start == 0 and end > 50 for start, end in zip(run.start[:2], run.end[:2], strict=True)]
    assert sum(hit) == run.restarts == 1, "node 0 had one of both"
    assert set(run.node[:2]) == {1, 2} or not hit[0]
    assert (run.end < 1000).all()


@pytest.mark.parametrize("policy", ["native", "coscheduling", "packing"])
def test_who_is_hit_keeps_its_place_where_its_gang_is_known_and_is_new_where_it_is_not(policy):
    kinds, work = work_of((0, 100, 1, 4), (1, 10, 1, 4), (500, 1, 1, 1))
    run = ran(policy, 1, kinds, work, outages((50, 0, True), (60, 0, False)))
    assert run.end.tolist() == ([170, 70, 501] if policy == "native" else [160, 170, 501])


def test_what_a_gang_holds_on_a_node_that_fails_is_placed_anew():
    """Pod by pod: it holds two GPUs of node 0 or 1 and lacks the rest; then both it and the node's jobs begin anew."""
    kinds, work = work_of((0, 40, 1, 4), (1, 10, 2, 4), (500, 1, 1, 1))
    for node in (0, 1):
        run = ran("native-packed", 2, kinds, work, outages((20, node, True), (30, node, False)))
        assert not np.isnan(run.end).any()
        assert run.held_gpu_seconds > 0
        assert run.busy_gpu_seconds == pytest.approx(40 * 4 + 10 * 8 + run.lost_gpu_seconds)


TROUBLES = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 2), st.integers(1, 9)), min_size=1, max_size=6)


@settings(max_examples=150)
@given(
    rows=ROWS,
    drawn=TROUBLES,
    policy=st.sampled_from(GANGS),
    checkpoint=st.sampled_from([1.0, 3.0, INFINITE]),
    restart=st.sampled_from([0.0, 2.0]),
)
def test_every_gang_ends_and_what_ran_is_what_was_asked_for_and_what_was_lost(rows, drawn, policy, checkpoint, restart):
    events, free_at = [], dict.fromkeys(range(3), 0)
    for gap, node, down in drawn:
        at = free_at[node] + gap
        events += [(at, node, True), (at + down, node, False)]
        free_at[node] = at + down + 1
    kinds, work = arrived([*rows, (100_000, 1, 1, 1)])
    run = ran(policy, 3, kinds, work, outages(*sorted(events), checkpoint=checkpoint, restart=restart))
    again = ran(policy, 3, kinds, work, outages(*sorted(events), checkpoint=checkpoint, restart=restart))
    assert np.array_equal(run.end, again.end)
    assert (run.end >= run.start + work.run).all()
    gpus = kinds.gpus[work.kind] * work.members
    asked = float((work.run * gpus)[:-1].sum())
    assert run.busy_gpu_seconds == pytest.approx(asked + run.lost_gpu_seconds)
    if checkpoint == 1.0 and restart == 0.0 and all(float(t).is_integer() for t in run.start):
        assert run.lost_gpu_seconds == 0.0, "everything happens at whole seconds"
    if not run.restarts:
        assert run.lost_gpu_seconds == 0.0
        assert np.allclose(run.end, run.start + work.run)


def test_failures_are_as_often_as_was_said_and_what_is_known_for_longer_begins_alike():
    _, work = work_of((0, 1, 1, 1), (1_000_000, 1, 1, 1))
    known = list(islice(Trouble(10_000.0, repair=100.0).drawn(50, work.submit, work.run, 7), 2))
    for drawn, longer in zip(known, [*known[1:], known[-1]], strict=True):
        same = longer.at < drawn.until
        assert np.array_equal(drawn.at[drawn.at < drawn.until], longer.at[same])
        assert np.array_equal(drawn.node[drawn.at < drawn.until], longer.node[same])
        assert (np.diff(drawn.at) >= 0).all()
        assert drawn.down.sum() == pytest.approx(50 * drawn.until / 10_100, rel=0.05)
        for node in range(50):
            mine = drawn.node == node
            assert (drawn.down[mine] == np.resize([True, False], mine.sum())).all()
            assert np.diff(drawn.at[mine])[::2] == pytest.approx(100.0)
    assert known[1].until > 3 * known[0].until
    assert not len(next(Trouble(1e12).drawn(3, work.submit, work.run, 1)).at)


def long_job(policy, mtbf, runs=30):
    """One of ten hours on one node, without a checkpoint."""
    kinds, work = work_of((0, 36_000, 1, 4))
    workload, part = Workload(work, kinds, ("a",)), windows(1, 1, None, 1)[0]
    return [
        one_run(fleet(1), workload, policy, part, seed, Conditions(Trouble(mtbf, repair=60.0)))
        for seed in range(1, runs + 1)
    ]


@pytest.mark.parametrize("policy", ["packing", "ours"])
def test_nodes_fail_as_long_as_jobs_run(policy):
    """A job of length r is done after mtbf (e^(r / mtbf) - 1) in the mean, and the repairs: longer than any horizon."""
    ends = [float(outcome.run.end[0]) for outcome in long_job(policy, 18_000.0)]
    assert np.mean(ends) == pytest.approx(18_000 * (np.exp(2) - 1) + (np.exp(2) - 1) * 60, rel=0.45)
    assert max(ends) > 3 * 36_000


def test_who_can_never_be_done_between_failures_is_said_never_to_end():
    outcome = long_job("packing", 400.0, runs=1)[0]
    card = outcome.card(fleet(1))
    assert (card["never_started"], card["jct_seconds"]["mean"]) == (1, None)
    assert card["restarts"] > 10_000


def test_more_failures_than_can_be_played_are_refused(tmp_path, capsys):
    jobs = tmp_path / "jobs.csv"
    jobs.write_text("submit_seconds,duration_seconds\n0,1\n5000000,1\n")
    assert main(["simulate", "--nodes", "1x8", "--jobs", str(jobs), "--mtbf", "1s", "--repair", "0s"]) == 2
    assert "--mtbf: 1 nodes fail 5,000,001 times" in capsys.readouterr().err


@pytest.mark.parametrize("policy", [*DISCIPLINES, "ours", "ours-declared"])
def test_a_node_that_is_back_at_once_is_lost_to_nobody(policy):
    kinds, work = work_of(*((i, 50, 1, 2) for i in range(40)))
    workload, part = Workload(work, kinds, tuple(map(str, range(40)))), windows(40, 1, None, 1)[0]
    outcome = one_run(fleet(2), workload, policy, part, 3, Conditions(Trouble(100.0, repair=0.0, checkpoint=5.0)))
    assert not np.isnan(outcome.run.end).any()
    assert outcome.run.restarts > 5
    assert outcome.run.idle_gpu_seconds >= 0


@pytest.mark.parametrize("policy", ["coscheduling", "fifo", "packing", "fgd", "ours"])
def test_who_came_at_the_same_moment_keeps_the_order_of_the_trace(policy):
    kinds, work = work_of(*((0, 100, 1, 4) for _ in range(3)))
    assert ran(policy, 1, kinds, work, outages((50, 0, True), (60, 0, False))).end.tolist() == [160, 260, 360]


def test_pod_by_pod_who_loses_what_it_held_is_behind_who_waited():
    """Node 0 or 1 is held by a job that lacks the other; it fails, and a job that waited takes it once it is back."""
    kinds, work = work_of((0, 100, 1, 4), (1, 10, 2, 4), (2, 10, 1, 4))
    runs = [ran("native-packed", 2, kinds, work, outages((20, node, True), (30, node, False))) for node in (0, 1)]
    assert [100, 30] in [run.start.tolist()[1:] for run in runs]


def test_the_report_says_what_failures_cost_and_what_energy_was_drawn(tmp_path, capsys):
    jobs = tmp_path / "jobs.csv"
    jobs.write_text("submit_seconds,duration_seconds,gpus\n" + "".join(f"{i * 600},7200,4\n" for i in range(300)))
    given = ["simulate", "--nodes", "8x8", "--jobs", str(jobs), "--policy", "native,ours", "--mtbf", "24h"]
    given += ["--checkpoint", "30m", "--restart", "1m", "--gpu-watts", "30:250"]
    assert main([*given, "-o", "json"]) == 0
    cards = json.loads(capsys.readouterr().out)["runs"]
    for card in cards:
        assert card["restarts"] > 10
        assert 0.0 < card["work_redone"] < 0.1
        hours, busy = 299 * 600 / 3600, card["gpu_allocation"]
        assert card["gpu_kwh"] == pytest.approx(64 * hours * (30 + 220 * busy) / 1000, rel=1e-3)
    assert main(given) == 0
    said = capsys.readouterr().out
    assert "work redone" in said
    assert "kWh" in said


def test_without_failures_nothing_is_told_of_them():
    kinds, work = work_of((0, 10, 1, 1), (5, 10, 1, 1))
    workload = Workload(work, kinds, ("a", "b"))
    [one] = run_all(fleet(1), workload, ["packing"], windows(2, 1, None, 1), 1, lambda *_: None)
    assert one.run.restarts == 0
    assert "restarts" not in one.card(fleet(1))
    [other] = run_all(
        fleet(1), workload, ["packing"], windows(2, 1, None, 1), 1, lambda *_: None, None, Conditions(Trouble(1e12))
    )
    assert other.card(fleet(1)) == one.card(fleet(1)) | {"restarts": 0, "work_redone": 0.0}
    assert len(NO_OUTAGES.at) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(["--repair", "1h"], "--repair: say with --mtbf how often a node fails", id="no failures"),
        pytest.param(["--mtbf", "10ms"], "--mtbf: 0.01 s are less than a second", id="it fails without end"),
        pytest.param(["--mtbf", "1h", "--checkpoint", "0s"], "--checkpoint: 0 s are less", id="without end"),
        pytest.param(["--gpu-watts", "250"], "--gpu-watts: '250' is not IDLE:BUSY", id="one number"),
        pytest.param(["--gpu-watts", "250:30"], "--gpu-watts: '250:30' is not IDLE:BUSY", id="the wrong way round"),
        pytest.param(["--gpu-watts", "nan:30"], "--gpu-watts: 'nan:30' is not IDLE:BUSY", id="no number"),
        pytest.param(["--from-cluster", "x.json", "--mtbf", "1h"], "--mtbf: not with --from-cluster", id="a cluster"),
    ],
)
def test_what_makes_no_sense_is_said(arguments, said, capsys, tmp_path):
    jobs = tmp_path / "jobs.csv"
    jobs.write_text("submit_seconds,duration_seconds,gpus\n0,1,1\n")
    base = [] if "--from-cluster" in arguments else ["--nodes", "1x1", "--jobs", str(jobs)]
    assert main(["simulate", *base, *arguments]) == 2
    assert said in capsys.readouterr().err
