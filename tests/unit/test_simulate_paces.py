"""Jobs as fast as a table of throughputs says: by their GPUs, on one node or several, and by who shares a GPU."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colocate.cli.main import main
from colocate.errors import BadInput
from colocate.simulate.compare import known_run
from colocate.simulate.fleet import DISCIPLINES
from colocate.simulate.outages import NO_OUTAGES
from colocate.simulate.paces import COLUMNS, NO_MODEL, read_throughputs
from colocate.simulate.placement import Kinds
from colocate.simulate.running import Work
from colocate.simulate.workloads import Workload, read_fleet
from tests.unit.test_reproduce import FOLDER, needs

INF = float("inf")
TABLE = [
    ("v100", 1, "a", 1, "", "", 10),
    ("v100", 1, "a", 4, "", "", 30),
    ("v100", 0, "a", 4, "", "", 20),
    ("v100", 1, "b", 1, "", "", 4),
    ("v100", 1, "c", 1, "", "", 2),
    ("k80", 1, "a", 1, "", "", 5),
    ("k80", 1, "b", 1, "", "", 8),
    ("v100", 1, "a", 1, "a", 1, 5),
    ("v100", 1, "a", 1, "b", 1, 8),
    ("v100", 1, "b", 1, "a", 1, 2),
    ("v100", 1, "b", 1, "b", 1, 3),
    ("v100", 1, "c", 1, "a", 1, 0),
    ("v100", 1, "a", 1, "c", 1, 0),
    ("v100", 1, "c", 1, "c", 1, 1),
    ("v100", 1, "b", 1, "c", 1, 2),
    ("v100", 1, "c", 1, "b", 1, 2),
]
TIMES = {"aa": 2.0, "ab": 1.25, "ba": 2.0, "bb": 4 / 3, "ca": INF, "ac": INF, "cc": 2.0, "bc": 2.0, "cb": 1.0}
"""What they are beside each other on a V100."""
BEST = {"a": 10, "b": 8, "c": 2}


@pytest.fixture(scope="module")
def throughputs(tmp_path_factory):
    return read_throughputs(written(tmp_path_factory.mktemp("table") / "table.csv", TABLE))


def written(path, rows):
    path.write_text("\n".join(",".join(map(str, row)) for row in [COLUMNS, *rows]) + "\n")
    return path


def ran(throughputs, nodes, rows, policy="packing", outages=NO_OUTAGES):
    """(submit, run, members, GPUs of each, thousandths of each, model[, members that are enough]) of each job."""
    fleet = read_fleet(nodes)
    asks = sorted({row[3:5] for row in rows})
    zero = np.zeros(len(asks), np.int64)
    gpus, milli = (np.array(column, np.int64) for column in zip(*asks, strict=True))
    kinds = Kinds(zero, zero, gpus, milli, zero, zero)
    kind = np.array([asks.index(row[3:5]) for row in rows])
    submit, run = (np.array([float(row[i]) for row in rows]) for i in range(2))
    members = np.array([row[2] for row in rows], np.int64)
    model = np.array([throughputs.models.index(row[5]) if row[5] else NO_MODEL for row in rows], np.int64)
    least = np.array([row[6] if len(row) > 6 else row[2] for row in rows], np.int64)
    work = Work(submit, run, kind, members, least, np.ones((len(rows), 2)))
    paces = throughputs.paces(fleet.gpus, model, gpus[kind], least, members, (milli < 1000)[kind])
    return known_run(policy, fleet.nodes, Workload(work, kinds, ("",) * len(rows), model), 3, None, outages, paces)


@pytest.mark.parametrize(
    ("nodes", "rows", "ends"),
    [
        pytest.param("1x1:v100", [(0, 100, 1, 1, 1000, "a")], [100], id="alone on the GPU on which it is fastest"),
        pytest.param("1x1:k80", [(0, 100, 1, 1, 1000, "a")], [200], id="on one that is half as fast"),
        pytest.param("1x1:v100", [(0, 100, 1, 1, 1000, "b")], [200], id="another model is faster on the older one"),
        pytest.param("1x1:k80", [(0, 100, 1, 1, 1000, "")], [100], id="no model: as fast everywhere"),
        pytest.param("1x4:v100", [(0, 100, 4, 1, 1000, "a")], [100], id="four workers on one node"),
        pytest.param("4x1:v100", [(0, 100, 4, 1, 1000, "a")], [150], id="on four nodes"),
        pytest.param("1x8:v100", [(0, 100, 8, 1, 1000, "a")], [100], id="more workers than were measured"),
        pytest.param("8x1:v100", [(0, 100, 8, 1, 1000, "a")], [150], id="more of them on several nodes"),
        pytest.param("2x1:v100", [(0, 100, 2, 1, 1000, "a")], [100], id="spread, which was measured of more only"),
        pytest.param("1x1:v100", [(0, 100, 1, 1, 500, "a")] * 2, [200, 200], id="two of a kind share a GPU"),
        pytest.param("1x2:v100", [(0, 100, 1, 1, 501, "a")] * 2, [100, 100], id="they have one each"),
        # a has done 50 of 100 when b comes, and 80 more at 1.25: until 50 + 62.5; b 31.25 by then, and 68.75 alone
        pytest.param(
            "1x1:v100",
            [(0, 100, 1, 1, 500, "a"), (50, 100, 1, 1, 500, "b")],
            [112.5, 112.5 + (100 - 62.5 / 4) * 2],
            id="one comes while another runs, and stays",
        ),
        pytest.param(
            "1x1:v100",
            [(0, 100, 1, 1, 500, "c"), (10, 100, 1, 1, 500, "a")],
            [100, 200],
            id="who has no memory beside the first waits in its place",
        ),
        pytest.param(
            "1x1:v100",
            [(0, 100, 1, 1, 500, "a"), (50, 100, 1, 1, 500, "")],
            [100, 150],
            id="who has no model slows nobody down",
        ),
        pytest.param(
            "1x1:v100", [(0, 100, 1, 1, 250, "a")] * 3, [300, 300, 300], id="three that take turns in pairs take turns"
        ),
        pytest.param(
            "1x3:v100", [(0, 100, 4, 1, 1000, "a", 1)], [100], id="three of four: all that was measured of one"
        ),
        pytest.param(
            "1x1:v100", [(0, 100, 4, 1, 1000, "a", 1)], [300], id="one of four, of which all are thrice as fast"
        ),
        pytest.param("1x1:v100", [(0, 0, 1, 1, 500, "a"), (0, 100, 1, 1, 500, "a")], [0, 100], id="no work"),
        pytest.param(
            "1x1:v100",
            [(0, 100, 1, 1, 500, "a"), (10, 0, 1, 1, 500, "c")],
            [100, 100],
            id="no work, and no memory to do it",
        ),
        # c waits for the first a; the second a, beside it, is slowed down by the first alone until 120
        pytest.param(
            "1x1:v100",
            [(0, 100, 1, 1, 300, "a"), (10, 10, 1, 1, 300, "c"), (20, 50, 1, 1, 300, "a")],
            [150, 160, 120],
            id="who has no memory slows nobody down",
        ),
        pytest.param("1x1:v100", [(0, 100, 2, 1, 500, "b")], [2 * 100 * 4 / 3], id="two members on one GPU"),
    ],
)
@pytest.mark.parametrize("policy", [*DISCIPLINES, "ours"])
def test_how_long_jobs_take(throughputs, policy, nodes, rows, ends):
    if policy == "ours" and any(row[4] < 1000 for row in rows):
        with pytest.raises(BadInput, match="a part of a GPU"):
            ran(throughputs, nodes, rows, policy)
        return
    run = ran(throughputs, nodes, rows, policy)
    assert run.end == pytest.approx(ends)
    assert run.lost_gpu_seconds == 0


def test_what_the_work_of_a_shared_gpu_was_worth(throughputs):
    """Two that take 1.25 and 4 times as long (alone: 1 and 2) do 0.8 + 0.25 of what GPUs of their own would."""
    rows = [(0, 1000, 1, 1, 500, "a"), (0, 1000, 1, 1, 500, "b"), (100, 1, 1, 1, 500, "")]
    run = ran(throughputs, "1x1:v100", rows)
    assert run.done_gpu_seconds == pytest.approx(105)
    assert run.busy_gpu_seconds == pytest.approx(100)


def test_what_a_job_stood_still_without_memory_is_not_lost(throughputs):
    """`c` has no memory for 100 s, and works for 50 of which 40 are saved: of these, on its half, a fifth is lost."""
    stops = NO_OUTAGES._replace(
        at=np.array([150.0, 200.0]), node=np.zeros(2, np.int64), down=np.array([True, False]), checkpoint=20.0
    )
    run = ran(throughputs, "1x1:v100", [(0, 100, 1, 1, 500, "a"), (0, 100, 1, 1, 500, "c")], outages=stops)
    assert run.end == pytest.approx([100, 260])
    assert run.lost_gpu_seconds == pytest.approx(0.5 * 50 / 5)


@pytest.mark.parametrize("policy", ["packing", "ours"])
def test_a_simulation_in_which_all_are_over_is_not_cut(throughputs, policy):
    """It grows at 100 s, so that it ends at 150 and not at 200: what happens from 180 on is not known."""
    fleet, ends = read_fleet("1x4"), NO_OUTAGES._replace(until=180.0)
    zero, members = np.zeros(2, np.int64), np.array([2, 4], np.int64)
    kinds = Kinds(zero[:1], zero[:1], zero[:1] + 1, zero[:1] + 1000, zero[:1], zero[:1])
    work = Work(np.zeros(2), np.full(2, 100.0), zero, members, zero + 2, np.ones((2, 2)))
    run = known_run(policy, fleet.nodes, Workload(work, kinds, ("", "")), 3, None, ends)
    assert run.end == pytest.approx([100, 150])
    assert not run.cut


def test_work_is_worth_nothing_while_it_begins_again_or_is_not_bound(throughputs):
    rows = [(0, 1, 1, 1, 1000, "a")] * 1000 + [(5000, 1, 1, 1, 1000, "a")]
    run = ran(throughputs, "125x8:v100", rows, "native")
    assert run.done_gpu_seconds == pytest.approx(1000)
    stops = NO_OUTAGES._replace(at=np.array([50.0, 60.0]), node=np.zeros(2, np.int64), down=np.array([True, False]))
    one = [(0, 100, 1, 1, 1000, "a"), (5000, 1, 1, 1, 1000, "a")]
    for policy in ("packing", "ours"):
        run = ran(throughputs, "1x1:v100", one, policy, stops._replace(restart=1000.0))
        assert (run.done_gpu_seconds, run.end[0]) == (pytest.approx(100), 1160)


def test_who_does_not_fit_beside_another_does_not_the_other_way_round(tmp_path):
    rows = [("v100", 1, m, 1, "", "", 4) for m in "ab"] + [("v100", 1, m, 1, m, 1, 2) for m in "ab"]
    rows += [("v100", 1, "a", 1, "b", 1, 0), ("v100", 1, "b", 1, "a", 1, 2)]
    table = read_throughputs(written(tmp_path / "table.csv", rows))
    run = ran(table, "1x1:v100", [(0, 100, 1, 1, 500, "a"), (10, 100, 1, 1, 500, "b")])
    assert run.end == pytest.approx([100, 200])


def test_of_a_job_whose_pace_changed_what_is_saved_is_a_part_of_the_time_it_took(throughputs):
    """`a` has worked 50 s alone and 50 s at half the pace when its node fails: 75 s, of which 60 are saved."""
    stops = NO_OUTAGES._replace(
        at=np.array([100.0, 200.0]), node=np.zeros(2, np.int64), down=np.array([True, False]), checkpoint=20.0
    )
    run = ran(throughputs, "1x1:v100", [(0, 100, 1, 1, 500, "a"), (50, 100, 1, 1, 500, "a")], outages=stops)
    assert run.end == pytest.approx([280, 320])  # 40 and 80 are left, side by side from 200 on
    # Half a GPU each: of 100 s for 75 of work 15 are done again, and of 50 s for 25 another 5.
    assert run.lost_gpu_seconds == pytest.approx(0.5 * 100 * 15 / 75 + 0.5 * 50 * 5 / 25)


JOBS = st.lists(
    st.tuples(st.integers(0, 40), st.integers(1, 60), st.sampled_from(("a", "b", "c", ""))), min_size=1, max_size=14
)


@settings(max_examples=200, deadline=None)
@given(
    jobs=JOBS, nodes=st.integers(1, 3), milli=st.sampled_from((500, 300)), policy=st.sampled_from(sorted(DISCIPLINES))
)
def test_the_work_that_is_done_is_what_was_asked_for(throughputs, jobs, nodes, milli, policy):
    """On nodes with one GPU each, so that who is on a node shares it; moment by moment, by the table alone."""
    rows = [(at, run, 1, 1, milli, model) for (at, run, model) in sorted(jobs)]
    found = ran(throughputs, f"{nodes}x1:v100", rows, policy)
    assert not np.isnan(found.end).any()
    done = np.zeros(len(rows))
    for then, until in itertools.pairwise(sorted({*found.start, *found.end})):
        middle = (then + until) / 2
        runs = (int(j) for j in np.flatnonzero((found.start < middle) & (middle < found.end)))
        there = sorted(runs, key=lambda j: (found.start[j], j))
        working: list[int] = []
        for j in there:  # who was there before has memory
            beside = [k for k in working if found.node[k] == found.node[j] and rows[j][5] and rows[k][5]]
            if all(TIMES[rows[j][5] + rows[k][5]] < INF for k in beside):
                working.append(j)
        for j in working:
            model = rows[j][5]
            pace, lost = BEST[model] / {"a": 10, "b": 4, "c": 2}[model] if model else 1.0, 0.0
            for k in working:
                if k != j and found.node[k] == found.node[j] and model and rows[k][5]:
                    lost += TIMES[model + rows[k][5]] - 1.0
            pace *= 1.0 + lost
            done[j] += (until - then) / pace
    assert done == pytest.approx([row[1] for row in rows])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        pytest.param([("v100", 1, "", 1, "", "", 1)], "line 2, model: it is empty", id="no model"),
        pytest.param([("", 1, "a", 1, "", "", 1)], "line 2, gpu_type: it is empty", id="no GPU"),
        pytest.param(
            [("v100", 2, "a", 1, "", "", 1)], "line 2, consolidated: '2' is not", id="neither on one node nor"
        ),
        pytest.param([("v100", 1, "a", 0, "", "", 1)], "line 2, scale_factor: '0' is not", id="nobody works"),
        pytest.param([("v100", 1, "a", 1, "", "", -1)], "line 2, throughput: '-1' is not", id="backwards"),
        pytest.param([("v100", 1, "a", 1, "", "", "nan")], "line 2, throughput: 'nan' is not", id="no number"),
        pytest.param([("v100", 1, "a", 1, "b", 1, 1)], "nobody runs alone", id="pairs alone"),
        pytest.param(
            [("v100", 1, "a", 1, "", "", 1), ("v100", 1, "a", 1, "", "", 2)],
            "line 3: the same was measured as in .*line 2",
            id="twice",
        ),
        pytest.param([], "nobody runs alone", id="nothing"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(tmp_path, rows, said):
    with pytest.raises(BadInput, match=said):
        read_throughputs(written(tmp_path / "table.csv", rows))


PLAIN = "submit_seconds,duration_seconds,gpus,gpu_milli,model\n"
STEPS = "job_type,scale_factor,total_steps,arrival_time_s\n"


@pytest.mark.parametrize(
    ("nodes", "jobs", "more", "said"),
    [
        pytest.param("2x1", PLAIN + "0,1,1,,a\n", [], "what its GPUs are is not said: .* has k80, v100", id="unsaid"),
        pytest.param("2x1:a100", PLAIN + "0,1,1,,a\n", [], "'a100' is none of the GPUs", id="another GPU"),
        pytest.param("2x0:v100", PLAIN + "0,1,1,,a\n", [], "--nodes has no GPUs", id="no GPUs"),
        pytest.param("2x1:v100", PLAIN + "0,1,1,,d\n", [], "line 2: 'd' is no model of", id="another model"),
        pytest.param("2x1:v100", PLAIN + "0,1,,,a\n", [], "line 2, gpus: a job with a model runs on GPUs", id="CPUs"),
        pytest.param("2x1:k80", PLAIN + "0,1,1,,c\n", [], "nothing was measured of 'c' with 1 workers on k80", id="c"),
        pytest.param(
            "2x1:k80", PLAIN + "0,1,1,500,a\n", [], "'a' beside 'a' was not measured on k80", id="an unknown pair"
        ),
        pytest.param(
            "2x1:v100",
            PLAIN + "0,1,1,500,b\n",
            ["--share-gpus"],
            "--share-gpus: no job with a model",
            id="nobody shares",
        ),
        pytest.param("2x1:v100", PLAIN + "0,1,1,,\n", [], "no job of .* says its model", id="none"),
        pytest.param("2x1:v100", STEPS + "d,1,10,0\n", [], "line 2: 'd' is no model of", id="another model's steps"),
    ],
)
def test_what_does_not_go_with_a_table_is_said(tmp_path, capsys, nodes, jobs, more, said):
    (tmp_path / "jobs.csv").write_text(jobs)
    table = written(tmp_path / "table.csv", TABLE)
    told = ["simulate", "--nodes", nodes, "--jobs", str(tmp_path / "jobs.csv"), "--throughputs", str(table), *more]
    assert main(told) == 2
    assert re.search(said, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("jobs", "more", "said"),
    [
        pytest.param(STEPS + "a,1,10,0\n", [], "line 2, total_steps: how long they take", id="steps"),
        pytest.param(PLAIN + "0,1,1,,a\n", ["--share-gpus"], "--share-gpus: what that costs", id="to share"),
    ],
)
def test_what_needs_a_table_says_so(tmp_path, capsys, jobs, more, said):
    (tmp_path / "jobs.csv").write_text(jobs)
    assert main(["simulate", "--nodes", "1x1", "--jobs", str(tmp_path / "jobs.csv"), *more]) == 2
    assert said in capsys.readouterr().err


def test_a_fleet_of_two_kinds_of_gpus_and_jobs_that_share(tmp_path, capsys):
    """Steps are of the best GPU; the card has what the work was worth."""
    table = written(tmp_path / "table.csv", [*TABLE, ("k80", 1, "a", 1, "a", 1, 4)])
    (tmp_path / "fleet.yaml").write_text(
        "nodes:\n- {cpu: 8, memory: 1Gi, gpus: 1, gpu: k80}\n- {cpu: 8, memory: 1Gi}\n"
    )
    (tmp_path / "jobs.csv").write_text(STEPS + "a,1,1000,0\na,1,1000,0\na,1,0,1000\n")
    told = ["simulate", "--nodes", str(tmp_path / "fleet.yaml"), "--jobs", str(tmp_path / "jobs.csv"), "--policy"]
    told += ["packing", "--throughputs", str(table), "-o", "json"]
    assert main(told) == 0
    alone = json.loads(capsys.readouterr().out)["runs"][0]
    assert main([*told, "--share-gpus"]) == 0
    shared = json.loads(capsys.readouterr().out)["runs"][0]
    assert alone["jct_seconds"]["mean"] == pytest.approx((200 + 400 + 0) / 3, abs=1e-3)
    assert shared["jct_seconds"]["mean"] == pytest.approx((250 + 250 + 0) / 3, abs=1e-3)
    assert alone["gpu_effective"] == pytest.approx(0.4 * 0.5)
    assert shared["gpu_effective"] == pytest.approx(0.25 * 2 * 0.4)


@needs("gavel-osdi20")
def test_gavels_table_and_trace(tmp_path, capsys):
    """Of its pairs on V100s the median runs at 0.68 of its own pace; every job of its trace on 8 GPUs a node ends."""
    folder = FOLDER / "gavel-osdi20"
    table = read_throughputs(folder / "simulation_throughputs.csv.gz")
    v100 = table.gpus.index("v100")
    pair = table.pair[v100] / table.alone[:, table.scales.index(1), v100, 0][:, None]
    assert len(table.models) == 26
    assert float(np.median(pair[pair > 0])) == pytest.approx(0.6785, abs=1e-4)
    with gzip.open(folder / "msr_philly_seed0.csv.gz", "rt") as file:
        rows = list(csv.reader(file))[:1001]
    jobs = tmp_path / "jobs.csv"
    jobs.write_text("\n".join(",".join(row) for row in rows) + "\n")
    told = ["simulate", "--nodes", "24x8:p100", "--jobs", str(jobs), "--policy", "native,packing"]
    told += ["--throughputs", str(folder / "simulation_throughputs.csv.gz"), "-o", "json"]
    means = []
    for more in ([], ["--share-gpus"]):
        assert main([*told, *more]) == 0
        runs = json.loads(capsys.readouterr().out)["runs"]
        assert [run["never_started"] for run in runs] == [0, 0]
        means.append([run["wait_seconds"]["mean"] for run in runs])
    assert means[1][0] < means[0][0], "who shares waits less"
