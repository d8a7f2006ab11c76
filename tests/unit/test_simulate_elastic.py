"""Jobs that run with fewer members than they ask for, and grow and shrink."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colocate.cli.main import main
from colocate.simulate import running
from colocate.simulate.compare import known_run
from colocate.simulate.fleet import DISCIPLINES
from colocate.simulate.outages import NO_OUTAGES
from colocate.simulate.paces import NO_PACES
from colocate.simulate.placement import arrays, new_board
from colocate.simulate.scores import BEST_FIT, CLASS, LEFT, WHOLE
from colocate.simulate.workloads import Workload
from tests.unit.test_simulate_fleet import GPUS, fleet, work_of

EVERY = [*DISCIPLINES, "ours", "ours-declared"]


def ran(policy, nodes, *rows, gpus=GPUS, outages=NO_OUTAGES, priority=None):
    """(submit, run, members, GPUs of each, members that are enough) of each job."""
    kinds, work = work_of(*(row[:4] for row in rows))
    work = work._replace(least=np.array([row[4] for row in rows], np.int64))
    if priority is not None:
        kinds = type(kinds)(
            *arrays([(*(int(c[k]) for c in kinds[:5]), p) for k, p in zip(work.kind, priority, strict=True)])
        )
        work = work._replace(kind=np.arange(len(rows)))
    return known_run(policy, fleet(nodes, gpus), Workload(work, kinds, ("",) * len(rows)), 3, None, outages)


def failing(*when, checkpoint=10.0, restart=0.0):
    """(at, node, down) of each."""
    at, node, down = (np.array(column) for column in zip(*when, strict=True))
    known = NO_OUTAGES._replace(at=at.astype(float), node=node.astype(np.int64), down=down.astype(bool))
    return known._replace(checkpoint=checkpoint, restart=restart)


@pytest.mark.parametrize(
    ("nodes", "rows", "ends"),
    [
        pytest.param(1, [(0, 100, 8, 1, 1)], [200], id="half of them fit: twice as long"),
        pytest.param(1, [(0, 100, 2, 1, 2), (0, 100, 4, 1, 2)], [100, 150], id="it grows when another ends"),
        pytest.param(2, [(0, 100, 12, 1, 4), (10, 20, 4, 1, 4)], [150, 170], id="while it lacks some nobody passes it"),
        pytest.param(1, [(0, 40, 4, 1, 4), (10, 20, 8, 1, 1)], [40, 80], id="it waits for the first of its members"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("policy", EVERY)
def test_a_job_runs_with_the_members_that_fit(policy, nodes, rows, ends):
    run = ran(policy, nodes, *rows)
    assert run.end == pytest.approx(ends)
    assert run.lost_gpu_seconds == run.restarts == 0


@pytest.mark.parametrize("policy", EVERY)
def test_who_grows_before_who_begins(policy):
    """Ours gives what others need to begin before what is only wished for; here the other is also the shorter one."""
    others_first = policy in ("ours", "ours-declared", "shortest-first")
    run = ran(policy, 1, (0, 100, 2, 1, 2), (0, 100, 4, 1, 2), (1, 50, 2, 1, 2))
    assert run.end == pytest.approx([100, 175, 150] if others_first else [100, 150, 200])


@pytest.mark.parametrize("policy", EVERY)
def test_to_grow_takes_a_restart(policy):
    """From 100 s on, when the other ends, 10 s pass until all four work together."""
    run = ran(
        policy,
        1,
        (0, 100, 2, 1, 2),
        (0, 100, 4, 1, 2),
        (1000, 1, 1, 1, 1),
        outages=failing((1e9, 0, True), restart=10.0),
    )
    assert run.end[:2] == pytest.approx([100, 160])
    assert (run.lost_gpu_seconds, run.restarts) == (pytest.approx(4 * 10), 0)
    assert run.busy_gpu_seconds == pytest.approx(200 + 400 + 40)


@pytest.mark.parametrize("policy", EVERY)
@pytest.mark.parametrize(
    ("least", "restart", "end", "lost"),
    [
        # 30 of 35 s are saved; the two that are left do 10 in the 20 s until the node is back
        pytest.param(2, 0.0, 115, 4 * 5, id="the others are enough"),
        # they begin 4 s later, and all again 4 s later when it is back: 8 are done by then
        pytest.param(2, 4.0, 55 + 4 + 62, 4 * 5 + 2 * 4 + 4 * 4, id="and begin again first"),
        pytest.param(3, 0.0, 55 + 70, 4 * 5, id="the others are too few"),
    ],
)
def test_a_node_that_fails_takes_its_members_and_what_was_not_saved(policy, least, restart, end, lost):
    stops = failing((35, 1, True), (55, 1, False), restart=restart)
    if least == 3:
        end, lost = end + restart, lost + 4 * restart
    run = ran(policy, 2, (0, 100, 4, 1, least), (1000, 1, 1, 1, 1), gpus=2, outages=stops)
    assert run.end[0] == pytest.approx(end)
    assert run.restarts == 1
    assert run.lost_gpu_seconds == pytest.approx(lost)
    assert run.busy_gpu_seconds == pytest.approx(400 + lost)


@pytest.mark.parametrize("policy", EVERY)
def test_gpus_are_idle_while_somebody_waits_only_where_somebody_has_not_begun(policy):
    """One that runs with one of its two members, and would like the other, is nobody who waits."""
    run = ran(policy, 1, (0, 100, 2, 3, 1), (1000, 1, 1, 1, 1))
    assert run.end[0] == 200
    assert run.idle_gpu_seconds == 0


@pytest.mark.parametrize("member", [0, 1, 2])
def test_only_the_member_whose_place_is_taken_goes(member):
    """Of three on one node; the last takes its place, not its fate."""
    kinds, work = work_of((0, 100, 3, 1))
    board = new_board(fleet(1, 4), kinds, None, np.random.default_rng(1))
    rule = running.Rule(BEST_FIT, gang=False, strict=False, shortest=False, binds=False, preempts=True)
    play = running.new_play(board, work, rule, NO_OUTAGES, NO_PACES)
    for _ in range(3):
        running.put_on(board, play.pods, 0, 0, 0, -1, BEST_FIT, 0)
    masks = set(play.pods.mask.tolist())
    gone = int(play.pods.mask[member])
    assert running.lose(board, play.pods, 0, 0, member, 0) == 1
    assert play.pods.placed[0] == 2
    assert set(play.pods.mask[:2].tolist()) == masks - {gone}
    assert play.pods.node.tolist() == [0, 0, -1]
    assert board.state.nodes[0, LEFT:CLASS].sum() == 2 * WHOLE


@pytest.mark.parametrize("policy", ["native", "ours"])
def test_who_loses_two_members_at_once_begins_again_once(policy):
    run = ran(policy, 1, (0, 100, 4, 1, 2), (50, 20, 2, 1, 2), priority=(0, 10))
    assert run.restarts == 1


def test_who_joins_before_the_first_are_bound_is_held_until_then_and_nothing_is_lost():
    """150 pods come at once: 50 of them are bound one second later, and three more of the first a moment after."""
    rows = [(0, 1, 1, 0, 1)] * 200 + [(0, 10, 4, 2, 1), (0.5, 1, 1, 1, 1), (1000, 1, 1, 1, 1)]
    run = ran("native", 2, *rows, gpus=4)
    assert run.lost_gpu_seconds == 0
    assert run.busy_gpu_seconds == pytest.approx(4 * 2 * 10 + 1)


@pytest.mark.parametrize("policy", ["native", "native-packed"])
def test_kube_scheduler_takes_the_places_of_single_members(policy):
    """The job of four goes on with two for 20 s, from its start on, for nothing was saved."""
    run = ran(policy, 1, (0, 100, 4, 1, 2), (50, 20, 2, 1, 2), priority=(0, 10))
    assert run.end == pytest.approx([50 + 20 + 90, 70])


def test_ours_takes_the_places_of_those_that_are_not_needed():
    run = ran("ours", 1, (0, 100, 4, 1, 2), (50, 20, 2, 1, 2), priority=(0, 10))
    assert run.end == pytest.approx([50 + 20 + 90, 70])


ROWS = st.lists(
    st.tuples(st.integers(0, 9), st.integers(1, 20), st.integers(1, 6), st.integers(1, 2), st.integers(1, 6)),
    min_size=1,
    max_size=12,
)


@settings(max_examples=200, deadline=None)
@given(rows=ROWS, policy=st.sampled_from(EVERY), failures=st.integers(0, 3), restart=st.sampled_from((0.0, 3.0)))
def test_gpus_are_spent_on_the_work_or_lost(rows, policy, failures, restart):
    """Whatever a job had when: what its GPUs spent is what it asked for, and what was done again or begun again."""
    times = np.cumsum([row[0] for row in rows])
    jobs = [(int(t), run, n, g, min(n, m, 3)) for t, (_, run, n, g, m) in zip(times, rows, strict=True)]
    when = [(7 * i + at, i % 3, at == 0) for i in range(failures) for at in (0, 5)] or [(10**9, 0, True)]
    outages = failing(*sorted(when), checkpoint=2.0, restart=restart)
    run = ran(policy, 3, *jobs, (100_000, 1, 1, 1, 1), gpus=2, outages=outages)
    if np.isnan(run.end[:-1]).any():
        assert policy.startswith("native"), "only who holds a part may wait for ever"
        return
    asked = sum(run * members * gpus for _, run, members, gpus, _ in jobs)
    assert run.busy_gpu_seconds == pytest.approx(asked + run.lost_gpu_seconds)
    assert run.done_gpu_seconds == pytest.approx(asked)
    assert (run.end[:-1] >= run.start[:-1] + np.array([row[1] for row in jobs]) - 1e-9).all()


@pytest.mark.parametrize("value", ["0", "5", "1.5", "x"])
def test_members_that_are_enough_are_at_most_all(tmp_path, capsys, value):
    (tmp_path / "jobs.csv").write_text(f"submit_seconds,duration_seconds,members,min_members\n0,1,4,{value}\n")
    assert main(["simulate", "--nodes", "1x1", "--jobs", str(tmp_path / "jobs.csv")]) == 2
    assert re.search(rf"line 2, min_members: '?{value}'? is n", capsys.readouterr().err)


def test_who_has_not_even_room_for_those_that_are_enough_is_refused(tmp_path, capsys):
    (tmp_path / "jobs.csv").write_text("submit_seconds,duration_seconds,members,gpus,min_members\n0,1,9,1,5\n")
    assert main(["simulate", "--nodes", "1x4", "--jobs", str(tmp_path / "jobs.csv")]) == 2
    assert "line 2: 5 members of 1 GPUs" in capsys.readouterr().err


def test_a_trace_of_jobs_that_grow(tmp_path, capsys):
    """A member with 16 GPUs is two whole nodes: so are those that are enough; a job need not fit with all."""
    text = "submit_seconds,duration_seconds,members,gpus,min_members\n0,100,2,16,1\n0,100,8,8,2\n"
    (tmp_path / "jobs.csv").write_text(text)
    told = ["simulate", "--nodes", "4x8", "--jobs", str(tmp_path / "jobs.csv"), "--policy", "packing", "-o", "json"]
    assert main([*told, "--file", str(tmp_path / "page.html")]) == 0
    [card] = json.loads(capsys.readouterr().out)["runs"]
    assert card["jct_seconds"]["mean"] == pytest.approx((100 + 300) / 2)
