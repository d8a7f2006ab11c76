"""Other people's tables: one cell of each, all in the slow tests; and what is wrong with a trace is said."""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colocate.cli.main import main
from colocate.errors import BadInput
from colocate.simulate import traces
from colocate.simulate.reproduce import TABLES, kinds, openb, pollux, reproduce, rlscheduler, sia
from colocate.simulate.reproduce.genetic import Pollux

FOLDER = Path(os.environ.get(traces.ENVIRONMENT) or "/nowhere")


def needs(name):
    return pytest.mark.skipif(not (FOLDER / name).is_dir(), reason=f"{name} in {traces.ENVIRONMENT}")


@needs("rlscheduler-sc20")
def test_a_cell_of_rlschedulers_table_is_exact():
    [cell] = islice(rlscheduler.cells("rlscheduler", FOLDER, lambda _: None), 1)
    assert (cell.name, cell.published, cell.detail, cell.passed) == (
        "Lublin-1 FCFS",
        7273.77,
        "10 of 10 sequences the same",
        True,
    )


@needs("pollux-osdi21")
@pytest.mark.parametrize("name", ["pollux-tiresias", "pollux-optimus"])
def test_a_workload_of_pollux_is_complete_to_the_second(name):
    [cell] = islice(pollux.cells(name, FOLDER, lambda _: None), 1)
    assert (cell.detail, cell.passed) == ("80 of 80 jobs to the second", True)


@needs("openb-2023")
def test_fgd_and_best_fit_hand_out_what_was_published():
    nodes, models = traces.openb_nodes(FOLDER / "openb-2023" / "nodes_gpu_node.csv.gz")
    pods = traces.openb_pods(FOLDER / "openb-2023" / "pods" / "default.csv.gz", models)
    assert int(nodes.gpus.sum()) == 6212
    for policy, published in (("fgd", 95.39), ("best-fit", 93.08), ("packing", 92.00)):
        found = [100 * openb.allocated(nodes, pods, policy, seed) for seed in (42, 43, 44)]
        assert sum(found) / 3 == pytest.approx(published, abs=0.6), policy


@needs("helios-2020")
@needs("philly-2017")
def test_the_order_of_helios_is_as_it_was_published():
    table = reproduce("helios", FOLDER, lambda _: None)
    assert (table.passed, len(table.cells)) == (6, 6)
    assert table.cells[0].name == "completion: SRTF before SJF"


@needs("sia-sosp23")
@needs("pollux-osdi21")
def test_two_dozen_jobs_are_complete_sooner_under_sia_than_under_gavel_and_no_gpu_is_given_twice():
    models, mean = kinds.read_models(FOLDER), {}
    for name, make in sia.POLICIES.items():
        policy = make()
        jobs = kinds.read_jobs(FOLDER, models, ("rate_10", "workload-1"), elastic=policy.elastic)[:24]
        decide = policy.decide

        def checked(jobs, now, decide=decide):
            after, used = decide(jobs, now), Counter[tuple[int, int]]()
            for where in after.values():
                for node, count in where.nodes:
                    used[where.kind, node] += count
            assert set(after) <= {job.name for job in jobs}
            assert all(count <= kinds.KINDS[kind].node_gpus for (kind, _), count in used.items())
            return after

        vars(policy)["decide"] = checked
        if isinstance(policy, Pollux):
            policy.GENERATIONS = 3
        kinds.simulate(jobs, policy)
        mean[name] = sia.figures(jobs)[0]
    assert mean["Sia"] < mean["Gavel"]
    assert mean["Pollux"] < mean["Gavel"]


SIZES = st.sampled_from([1, 2, 4, 8, 16, 24])


@given(kind=st.sampled_from([1, 2]), rounds=st.lists(st.lists(SIZES, max_size=8), min_size=1, max_size=4))
def test_what_sia_hands_out_finds_its_nodes_and_who_keeps_its_size_where_all_fits_stays(kind, rounds):
    before: dict[str, kinds.Where] = {}
    for sizes in rounds:
        wanted, left = {}, kinds.KINDS[kind].gpus
        for number, size in enumerate(sizes):
            if size <= left:
                wanted[str(number)] = size
                left -= size
        after = kinds.settled(kind, wanted, before)
        assert {name: sum(where.placement) for name, where in after.items()} == wanted
        if wanted == {name: sum(where.placement) for name, where in before.items()}:
            assert after == before
        before = after


EXTREMES = ("default", "cpu250", "gpushare100", "gpuspec33", "multigpu50")


@pytest.mark.slow
@needs("openb-2023")
def test_what_fgd_and_five_others_hand_out_of_five_workloads_is_as_it_was_published():
    found = list(openb.cells("openb-fgd", FOLDER, lambda _: None, EXTREMES))
    assert [cell for cell in found if not cell.passed] == []
    assert len(found) == 6 * len(EXTREMES)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.rare] * (name == "openb-fgd")) for name in TABLES]
)
def test_every_cell_is_as_it_was_published(name):
    if not FOLDER.is_dir():
        pytest.skip(f"{traces.ENVIRONMENT}, the folder of the traces, is unset")
    table = reproduce(name, FOLDER, lambda _: None)
    assert [cell for cell in table.cells if not cell.passed] == []
    assert len(table.cells) == TABLES[name][1]


@needs("rlscheduler-sc20")
def test_the_command_says_what_was_published_and_what_came_out(capsys):
    assert main(["reproduce", "rlscheduler", "--traces", str(FOLDER), "-o", "json"]) == 0
    [table] = json.loads(capsys.readouterr().out)
    assert (table["table"], table["cells"], table["passed"]) == ("rlscheduler", 20, 20)
    assert table["seconds"] > 0
    assert main(["reproduce", "rlscheduler", "--traces", str(FOLDER), "--cells"]) == 0
    assert "Lublin-2 SJF + backfilling" in capsys.readouterr().out


def test_a_table_without_its_rows_does_not_pass(tmp_path, capsys):
    there = tmp_path / "rlscheduler-sc20"
    there.mkdir()
    (there / "expected_table5.csv").write_text("trace,backfill,FCFS,WFP3,UNICEP,SJF,F1\n")
    (there / "expected_per_sequence.csv").write_text(
        "trace,backfill,sequence,start_index,policy,avg_bounded_slowdown\n"
    )
    assert main(["reproduce", "rlscheduler", "--traces", str(tmp_path)]) == 2
    assert "make 0 cells, and 20 were published" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(["table6"], "'table6' is no table; known: rlscheduler", id="a table that is not known"),
        pytest.param(["--traces", "/nowhere"], "--traces: /nowhere is no folder", id="no folder"),
        pytest.param([], "--traces: name the folder of the traces, or set COLOCATE_TRACES", id="none named"),
        pytest.param(["rlscheduler", "--traces", "."], "expected_per_sequence.csv is not there", id="an empty folder"),
    ],
)
def test_what_is_missing_is_said(arguments, said, capsys, monkeypatch, tmp_path):
    monkeypatch.delenv(traces.ENVIRONMENT, raising=False)
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", *arguments]) == 2
    assert said in capsys.readouterr().err


JOB = "1 5094 -1 12072 16 -1 -1 -1 -1 -1 1 -1 -1 -1 0 -1 -1 -1"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("; only a header\n", "has no jobs", id="no jobs"),
        pytest.param(f"{JOB}\n2 3\n", "line 2: 2 fields, SWF has 18", id="a line that is cut off"),
        pytest.param(JOB.replace("12072", "nan"), "line 1: times are numbers of at most 1e", id="no number in it"),
        pytest.param(JOB.replace("5094", "inf"), "line 1: times are numbers of at most 1e", id="infinite"),
        pytest.param(JOB.replace(" 16 ", " 0.5 "), "line 1: 0.5 processors; they are whole", id="half a processor"),
        pytest.param(JOB.replace(" 16 ", " 1e30 "), "line 1: 1e[+]30 processors", id="more than there can be"),
        pytest.param(JOB.replace("12072", "soon"), "line 1: could not convert string to float: 'soon'", id="no number"),
    ],
)
def test_what_is_wrong_with_a_swf_file_is_said_with_its_line(tmp_path, text, said):
    path = tmp_path / "jobs.swf"
    path.write_text(text)
    with pytest.raises(BadInput, match=said):
        traces.swf(path)


def test_a_swf_file_is_read_by_submission_and_what_it_does_not_ask_is_what_it_ran(tmp_path):
    path = tmp_path / "jobs.swf"
    asks = "2 3 -1 7 4 -1 -1 8 60 -1 1 -1 -1 -1 0 -1 -1 -1"
    never = "3 9 -1 -1 4 -1 -1 8 60 -1 0 -1 -1 -1 0 -1 -1 -1"
    path.write_text(f"; a comment\n{JOB}\n{asks}\n{never}\n")
    jobs = traces.swf(path)
    assert [column.tolist() for column in jobs] == [[3, 5094], [7, 12072], [60, 12072], [8, 16]]


def test_a_file_that_is_cut_off_is_no_trace(tmp_path):
    path = tmp_path / "jobs.swf.gz"
    path.write_bytes(gzip.compress(f"{JOB}\n".encode() * 999)[:-9])
    with pytest.raises(BadInput, match="is cut off, or no gzip file"):
        traces.swf(path)


NODES = "sn,cpu_milli,memory_mib,gpu,model\n"
PODS = "name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec\n"


@pytest.mark.parametrize(
    ("read", "text", "said"),
    [
        pytest.param(traces.openb_nodes, "sn,gpu\na,1\n", "has no column cpu_milli, memory_mib, model", id="columns"),
        pytest.param(traces.openb_nodes, NODES, "has no nodes", id="no nodes"),
        pytest.param(traces.openb_nodes, NODES + "a,1,1,9,P100\n", "line 2, gpu: 9 GPUs of one node", id="many GPUs"),
        pytest.param(traces.openb_nodes, NODES + "a,1,1\n", "line 2: 3 values, but 5 columns", id="a row cut off"),
        pytest.param(traces.openb_nodes, NODES + "a,-1,1,1,T4\n", "line 2, cpu_milli: '-1' is not", id="negative"),
        pytest.param(
            traces.openb_nodes, NODES + "a,1.5,1,1,T4\n", "cpu_milli: 1.5 is no whole number", id="a fraction"
        ),
        pytest.param(traces.openb_nodes, NODES + "a,nan,1,1,T4\n", "cpu_milli: 'nan' is not", id="not a number"),
        pytest.param(lambda p: traces.openb_pods(p, ()), PODS, "has no pods", id="no pods"),
        pytest.param(
            lambda p: traces.openb_pods(p, ()), PODS + "a,1,1,1,1001,\n", "line 2: 1 GPUs, 1001 thousandths", id="a GPU"
        ),
    ],
)
def test_what_is_wrong_with_a_table_is_said_with_its_line_and_column(tmp_path, read, text, said):
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(BadInput, match=said):
        read(path)


def test_a_pod_that_wants_a_model_that_is_not_there_fits_nowhere(tmp_path):
    path = tmp_path / "pods.csv"
    path.write_text(PODS + "a,1,1,1,1000,A10|V9\nb,1,1,1,1000,V9\nc,1,1,1,1000,\n")
    assert traces.openb_pods(path, ["A10", "T4"]).kinds.models.tolist() == [1, 1 << traces.ONLY_ELSEWHERE, 0]
