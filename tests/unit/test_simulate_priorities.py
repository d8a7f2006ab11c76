"""Jobs of different priorities: whom kube-scheduler stops for whom, that ours stops whole gangs, and what is lost."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colocate.cli.main import main
from colocate.simulate.compare import known_run
from colocate.simulate.fleet import DISCIPLINES
from colocate.simulate.outages import NO_OUTAGES
from colocate.simulate.placement import Kinds, Nodes, ask_of, empty, take
from colocate.simulate.preemption import Lesser, by_node, nominate
from colocate.simulate.running import Work
from colocate.simulate.scores import BEST_FIT
from colocate.simulate.workloads import Workload
from tests.unit.test_simulate_fleet import GPUS, fleet, used_at

PREEMPTING = ("native", "native-packed", "ours", "ours-declared")


def ran(policy, nodes, *rows, checkpoint=np.inf, restart=0.0):
    """(submit, run, members, GPUs of each, priority) of each job."""
    kinds: dict[tuple[int, int], int] = {}
    kind = [kinds.setdefault((row[3], row[4]), len(kinds)) for row in rows]
    gpus, priority = (np.array(column, np.int64) for column in zip(*kinds, strict=True))
    submit, run, members = (np.array([row[i] for row in rows]) for i in range(3))
    members = members.astype(np.int64)
    work = Work(
        submit.astype(float), run.astype(float), np.array(kind, np.int64), members, members, np.ones((len(rows), 2))
    )
    asks = Kinds(0 * gpus, 0 * gpus, gpus, 1000 + 0 * gpus, 0 * gpus, priority)
    outages = NO_OUTAGES._replace(checkpoint=float(checkpoint), restart=float(restart))
    names = tuple(str(i) for i in range(len(rows)))
    return asks, work, known_run(policy, fleet(nodes), Workload(work, asks, names), 3, None, outages)


@pytest.mark.parametrize("policy", PREEMPTING)
@pytest.mark.parametrize(
    ("checkpoint", "restart", "end", "lost"),
    [
        pytest.param(np.inf, 0, 170, 60, id="all is done again"),
        pytest.param(25, 5, 125, 15, id="since the last checkpoint, and beginning again takes time"),
    ],
)
def test_a_more_important_job_takes_the_place_of_a_less_important_one(policy, checkpoint, restart, end, lost):
    _, _, run = ran(policy, 1, (0, 100, 1, 4, 0), (60, 10, 2, 2, 5), checkpoint=checkpoint, restart=restart)
    assert run.start.tolist() == [0, 60]
    assert run.end.tolist() == [end, 70]
    assert (run.restarts, run.lost_gpu_seconds) == (1, lost * GPUS)


@pytest.mark.parametrize("policy", [*DISCIPLINES, "ours", "ours-declared"])
def test_the_more_important_waits_before_the_less_important(policy):
    _, _, run = ran(policy, 1, (0, 100, 1, 4, 9), (1, 10, 1, 4, 0), (2, 20, 1, 4, 3), (3, 5, 1, 4, 3))
    by_length = policy == "shortest-first"
    assert run.start.tolist() == ([0, 125, 105, 100] if by_length else [0, 125, 100, 120])


@pytest.mark.parametrize("policy", PREEMPTING)
def test_equals_are_not_stopped_and_nobody_is_for_nothing(policy):
    _, _, run = ran(policy, 2, (0, 50, 1, 4, 1), (0, 50, 1, 4, 5), (10, 10, 1, 4, 1), (10, 10, 2, 4, 5))
    assert run.restarts == (1 if policy.startswith("native") else 0), "ours stops nobody: the gang would not fit anyway"
    assert run.start[2] >= 50, "who is as important as who runs waits"


def test_native_stops_for_a_part_of_a_gang_that_cannot_start_and_ours_does_not():
    """Two nodes; on one runs who is more important. Pod by pod a place is made free that then is held idle."""
    rows = (0, 100, 1, 4, 9), (0, 100, 1, 4, 0), (10, 10, 2, 4, 5)
    _, _, native = ran("native", 2, *rows)
    _, _, ours = ran("ours", 2, *rows)
    assert (native.restarts, ours.restarts) == (1, 0)
    assert native.end.tolist() == [100, 210, 110]
    assert ours.end.tolist() == [100, 100, 110]


def test_ours_stops_a_gang_whole_and_native_a_job_that_loses_a_member():
    rows = (0, 100, 2, 4, 0), (50, 10, 1, 4, 1)
    for policy in PREEMPTING:
        _, _, run = ran(policy, 2, *rows)
        assert run.end.tolist() == [160, 60], policy


ROWS = st.lists(
    st.tuples(
        st.integers(0, 4), st.integers(1, 9), st.integers(1, 3), st.integers(1, GPUS), st.sampled_from([-2, 0, 0, 7])
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=200)
@given(
    rows=ROWS,
    policy=st.sampled_from([*DISCIPLINES, "ours", "ours-declared"]),
    checkpoint=st.sampled_from([1.0, 3.0, np.inf]),
    restart=st.sampled_from([0.0, 2.0]),
)
def test_what_ran_is_what_was_asked_for_and_what_was_lost(rows, policy, checkpoint, restart):
    times = np.cumsum([gap for gap, *_ in rows])
    jobs = [*((int(t), *rest) for t, (_, *rest) in zip(times, rows, strict=True)), (100_000, 1, 1, 1, 0)]
    kinds, work, run = ran(policy, 3, *jobs, checkpoint=checkpoint, restart=restart)
    _, _, again = ran(policy, 3, *jobs, checkpoint=checkpoint, restart=restart)
    assert np.array_equal(run.end, again.end, equal_nan=True)
    over = ~np.isnan(run.end)
    assert policy.startswith("native") or over.all(), "only who holds a part may wait for ever"
    assert (run.end >= run.start + work.run)[over].all()
    gpus = kinds.gpus[work.kind] * work.members
    if (run.end[:-1] <= 100_000).all():  # else pods that hold a part waited until the last job stopped some
        asked = float((work.run * gpus)[:-1].sum())
        assert run.busy_gpu_seconds == pytest.approx(asked + run.lost_gpu_seconds)
    if policy not in PREEMPTING:
        assert not run.restarts
    if not run.restarts:
        for at in run.start[over]:
            assert used_at(run, kinds, work, 3, at).max() <= GPUS
        assert run.lost_gpu_seconds == 0.0


def reference(free, pods, cpu, priority):
    """DefaultPreemption in a few plain lines: node -> victims; `pods` are (node, CPU, priority, began) each."""
    found = {}
    for node, spare in enumerate(free):
        lower = [i for i, pod in enumerate(pods) if pod[0] == node and pod[2] < priority]
        lower.sort(key=lambda i: (-pods[i][2], pods[i][3], i))
        left, gone = spare + sum(pods[i][1] for i in lower), []
        if not lower or left < cpu:
            continue
        for i in lower:
            if left - pods[i][1] >= cpu:
                left -= pods[i][1]
            else:
                gone.append(i)
        found[node] = gone
    return found


PODS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(-2, 3), st.integers(0, 3)), min_size=1, max_size=14
)


@settings(max_examples=300)
@given(
    pods=PODS,
    free=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    wanted=st.integers(1, 9),
    start=st.integers(0, 3),
)
def test_the_node_and_the_victims_are_kube_schedulers(pods, free, wanted, start):
    """Every node is a candidate where there are fewer than a hundred."""
    mine = 2
    free = [min(left, wanted - 1) for left in free]  # it fits nowhere
    taken = [sum(pod[1] for pod in pods if pod[0] == node) for node in range(4)]
    zero = np.zeros(4, np.int64)
    nodes = Nodes(np.array(free) + np.array(taken), zero + 1, zero, zero, zero, zero)
    rows = [(pod[1], 0, 0, 1000, 0, pod[2]) for pod in pods] + [(wanted, 0, 0, 1000, 0, mine)]
    kinds = Kinds(*(np.array(column, np.int64) for column in zip(*rows, strict=True)))
    state = empty(nodes)
    for k, pod in enumerate(pods):
        take(state, pod[0], ask_of(kinds, k), 0, BEST_FIT, 0)
    lower = [k for k, pod in enumerate(pods) if pod[2] < mine]
    head, after = by_node(4, np.array([pods[k][0] for k in lower], np.int64))
    numbers = np.array(lower, np.int64)
    began = np.array([float(pods[k][3]) for k in lower])
    before = state.nodes.copy()
    lesser = Lesser(head, after, numbers, numbers, numbers, 0 * numbers, began)
    node, victims = nominate(kinds, state, len(pods), start, lesser)
    assert np.array_equal(before, state.nodes), "nobody has gone yet"
    known = reference(free, pods, wanted, mine)
    if not known:
        assert node == -1
        return

    def rank(of):
        gone = [pods[i] for i in known[of]]
        highest = max(pod[2] for pod in gone)
        return highest, sum(pod[2] + (1 << 31) for pod in gone), -min(pod[3] for pod in gone if pod[2] == highest)

    assert sorted(numbers[victims]) == sorted(known[node])
    assert rank(node) == min(rank(of) for of in known)


def test_waits_are_told_by_priority(tmp_path, capsys):
    jobs = tmp_path / "jobs.csv"
    jobs.write_text("submit_seconds,duration_seconds,gpus,priority\n0,100,8,0\n10,50,8,1000\n20,5,8,\n")
    told = ["simulate", "--nodes", "1x8", "--jobs", str(jobs), "--policy", "native,packing"]
    assert main([*told, "-o", "json", "--restart", "10s"]) == 0
    native, packing = json.loads(capsys.readouterr().out)["runs"]
    assert native["wait_seconds_by_priority"]["1000"]["mean"] == 0.0
    assert packing["wait_seconds_by_priority"]["1000"]["mean"] == 90.0
    assert (native["restarts"], packing["restarts"]) == (1, 0)
    assert native["work_redone"] == pytest.approx((10 + 10) / 155, abs=1e-6)
    assert main(told) == 0
    assert "mean wait by priority" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["high", "1e12", "0.5", "nan"])
def test_a_priority_is_a_whole_number(tmp_path, capsys, text):
    jobs = tmp_path / "jobs.csv"
    jobs.write_text(f"submit_seconds,duration_seconds,priority\n0,100,{text}\n")
    assert main(["simulate", "--nodes", "1x8", "--jobs", str(jobs)]) == 2
    assert "line 2, priority" in capsys.readouterr().err


def fleet_of(*cpus):
    ones = np.ones(len(cpus), np.int64)
    return Nodes(np.array(cpus, np.int64), ones, 0 * ones, 0 * ones, 0 * ones, 0 * ones)


def on_cpus(policy, nodes, *rows, checkpoint=np.inf):
    """(submit, run, CPU, priority) of each job."""
    kinds: dict[tuple[int, int], int] = {}
    kind = np.array([kinds.setdefault(row[2:], len(kinds)) for row in rows], np.int64)
    cpu, priority = (np.array(column, np.int64) for column in zip(*kinds, strict=True))
    submit, run = (np.array([float(row[i]) for row in rows]) for i in range(2))
    work = Work(submit, run, kind, *2 * (np.ones(len(rows), np.int64),), np.ones((len(rows), 2)))
    asks = Kinds(cpu, 0 * cpu, 0 * cpu, 1000 + 0 * cpu, 0 * cpu, priority)
    names, outages = tuple(str(i) for i in range(len(rows))), NO_OUTAGES._replace(checkpoint=checkpoint)
    return known_run(policy, nodes, Workload(work, asks, names), 3, None, outages)


def test_who_was_stopped_at_a_checkpoint_and_began_again_at_once_is_there_once():
    """It then ends when it would have ended; counted twice, its going would make room for twice as much."""
    rows = (0, 200, 4, 9), (0, 100, 4, 0), (10, 0, 4, 5), (20, 50, 8, 5)
    run = on_cpus("native", fleet_of(8), *rows, checkpoint=10.0)
    assert run.start[3] >= 200, "beside the more important job there are four CPUs"
    assert run.end.tolist() == [200, 100, 10, 250]


ON_CPUS = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 20), st.sampled_from([2, 4, 8]), st.sampled_from([0, 5, 9])),
    min_size=2,
    max_size=25,
)


@settings(max_examples=200)
@given(rows=ON_CPUS, policy=st.sampled_from(PREEMPTING), cpus=st.lists(st.just(8), min_size=1, max_size=3))
def test_no_node_runs_more_than_it_has_though_jobs_are_stopped(rows, policy, cpus):
    """Jobs are saved at each second, so that a job ran on its last node from when what was left of it began."""
    times = np.cumsum([gap for gap, *_ in rows])
    jobs = [(int(t), *rest) for t, (_, *rest) in zip(times, rows, strict=True)]
    run = on_cpus(policy, fleet_of(*cpus), *jobs, checkpoint=1.0)
    assert (run.end - run.start >= [row[1] for row in jobs]).all()
    work = sum(row[1] * row[2] for row in jobs)
    assert run.end.max() - times[0] >= work / sum(cpus) - 1e-9, "no more is done at once than there is"
    last = max(jobs, key=lambda row: row[3])
    most = [i for i, row in enumerate(jobs) if row[3] == last[3]]
    for at in run.start[most]:  # the most important are never stopped
        used = np.zeros(len(cpus))
        for i in most:
            used[run.node[i]] += jobs[i][2] * (run.start[i] <= at < run.end[i])
        assert used.max() <= 8


def test_who_is_stopped_before_its_last_pod_is_bound_has_not_begun():
    """A thousand pods at once take 18 s to be bound, and after a second a more important thousand come."""
    rows = (0, 1, 1000, 1, 0), (1, 100, 1000, 1, 5), (500, 1, 1, 1, 5)
    _, _, run = ran("native", 250, *rows, restart=60.0)
    assert run.start[0] == pytest.approx(run.end[1] + 18)
    assert run.end[0] == run.start[0] + 1, "and has nothing to begin again"
    assert (run.restarts, run.lost_gpu_seconds) == (0, 0.0)
    assert run.busy_gpu_seconds == pytest.approx(1000 * 1 + 1000 * 100)


def test_two_gangs_that_want_the_same_one_stopped_stop_it_once():
    rows = (0, 100, 15, 1, 0), (4, 5, 4, 2, 7), (4, 6, 3, 3, 7)
    _, _, run = ran("ours", 5, *rows)
    assert run.restarts == 1
    assert run.end.max() >= 100
