"""Jobs whose members are in several racks run for longer: what of that a policy avoids."""

from __future__ import annotations

import json

import numpy as np
import pytest

from colocate.cli.main import main
from colocate.simulate.compare import known_run
from colocate.simulate.fleet import DISCIPLINES
from colocate.simulate.outages import NO_OUTAGES
from colocate.simulate.placement import Nodes
from colocate.simulate.workloads import Workload, read_nodes
from tests.unit.test_reproduce import FOLDER, needs
from tests.unit.test_simulate_fleet import fleet, work_of


def racks(*numbers):
    return fleet(len(numbers))._replace(rack=np.array(numbers, np.int64))


def ran(policy, nodes, *rows, across=2.0, outages=NO_OUTAGES):
    kinds, work = work_of(*rows)
    work = work._replace(across=np.full((len(rows), 2), across))
    return known_run(policy, nodes, Workload(work, kinds, tuple(str(i) for i in range(len(rows)))), 3, None, outages)


@pytest.mark.parametrize("policy", [*DISCIPLINES, "ours", "ours-declared"])
@pytest.mark.parametrize(
    ("nodes", "job", "end"),
    [
        pytest.param((1, 2), (0, 100, 2, 4), 200, id="in two racks, for there is no other place"),
        pytest.param((1, 1), (0, 100, 2, 4), 100, id="in one rack"),
        pytest.param((0, 0), (0, 100, 2, 4), 100, id="where no racks are known"),
        pytest.param((1, 2), (0, 100, 1, 4), 100, id="a single member"),
    ],
)
def test_a_job_over_racks_runs_for_longer(policy, nodes, job, end):
    assert ran(policy, racks(*nodes), job).end.tolist() == [end]


@pytest.mark.parametrize("checkpoint", [1.0, 10.0])
@pytest.mark.parametrize("policy", ["packing", "ours"])
def test_work_that_was_saved_is_counted_as_work(policy, checkpoint):
    """Half of the work is done when a node fails after 100 s, of which none is lost."""
    stops = NO_OUTAGES._replace(
        at=np.array([100.0, 150.0]), node=np.zeros(2, np.int64), down=np.array([True, False]), checkpoint=checkpoint
    )
    run = ran(policy, racks(1, 2), (0, 100, 2, 4), outages=stops)
    assert run.end.tolist() == [250]
    assert run.lost_gpu_seconds == 0


def test_ours_keeps_gangs_in_racks_which_kube_scheduler_does_not_know():
    """Sixteen nodes in four racks, and gangs of two nodes and four, one after the other."""
    rows = [(200 * i, 90, 2 + 2 * (i % 2), 4) for i in range(40)]
    nodes = racks(*np.arange(16) % 4 + 1)
    ours, native = (ran(policy, nodes, *rows) for policy in ("ours", "coscheduling"))
    assert (ours.end - ours.start).tolist() == [90.0] * 40
    assert (native.end - native.start).mean() > 120.0


def test_racks_in_the_file_of_the_fleet(tmp_path, capsys):
    nodes, jobs = tmp_path / "fleet.yaml", tmp_path / "jobs.csv"
    groups = "{count: 3, cpu: 8, memory: 1Gi, gpus: 8, rack: 2}", "{count: 2, cpu: 8, memory: 1Gi}"
    nodes.write_text("nodes:\n" + "".join(f"- {group}\n" for group in groups))
    assert isinstance(read_nodes(str(nodes)), Nodes)
    assert read_nodes(str(nodes)).rack.tolist() == [1, 1, 2, 0, 0]
    jobs.write_text("submit_seconds,duration_seconds,members,gpus,across_racks\n0,100,3,8,1.5\n")
    told = ["simulate", "--nodes", str(nodes), "--jobs", str(jobs), "--policy", "packing", "-o", "json"]
    assert main(told) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["jct_seconds"]["mean"] == 150.0
    assert main([*told, "--across-racks", "3"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["jct_seconds"]["mean"] == 300.0


@pytest.mark.parametrize(
    ("groups", "column", "more", "named"),
    [
        pytest.param("{cpu: 8, memory: 1Gi, gpus: 8, rack: 0}", "1", (), "rack", id="racks of no nodes"),
        pytest.param("{cpu: 8, memory: 1Gi, gpus: 8}", "0.5", (), "line 2, across_racks", id="faster across racks"),
        pytest.param("{cpu: 8, memory: 1Gi, gpus: 8}", "1", ("2",), "has no racks", id="without racks"),
        pytest.param("{count: 2, cpu: 8, memory: 1Gi, gpus: 8, rack: 1}", "1", ("nan",), "nan is not", id="no number"),
    ],
)
def test_what_cannot_be_is_named(tmp_path, capsys, groups, column, more, named):
    nodes, jobs = tmp_path / "fleet.yaml", tmp_path / "jobs.csv"
    nodes.write_text(f"nodes:\n- {groups}\n")
    jobs.write_text(f"submit_seconds,duration_seconds,gpus,across_racks\n0,100,1,{column}\n")
    options = ["--across-racks", *more] if more else []
    assert main(["simulate", "--nodes", str(nodes), "--jobs", str(jobs), *options]) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("policy", [*DISCIPLINES, "ours"])
@pytest.mark.parametrize(
    ("where", "end"),
    [
        pytest.param(((1, 1), (1, 1)), 100, id="in one rack"),
        pytest.param(((1, 1), (2, 1)), 150, id="in two racks of one block"),
        pytest.param(((1, 1), (2, 2)), 300, id="in two blocks"),
    ],
)
def test_a_job_over_blocks_of_racks_runs_for_longer_still(policy, where, end):
    rack, block = (np.array(column, np.int64) for column in zip(*where, strict=True))
    kinds, work = work_of((0, 100, 2, 4))
    work = work._replace(across=np.array([[1.5, 3.0]]))
    nodes = fleet(2)._replace(rack=rack, block=block)
    assert known_run(policy, nodes, Workload(work, kinds, ("",)), 3).end.tolist() == [end]


def test_ours_keeps_gangs_in_blocks_that_are_larger_than_a_rack():
    """Gangs of four nodes on racks of two: in one block they could be, one after the other."""
    rows = [(200 * i, 90, 4, 4) for i in range(20)]
    nodes = racks(*np.arange(16) % 8 + 1)
    nodes = nodes._replace(block=nodes.rack % 2)
    ours, native = (ran(policy, nodes, *rows) for policy in ("ours", "coscheduling"))
    blocks = [{int(b) for b in nodes.block[run.node.reshape(20, 4)[i]]} for run in (ours, native) for i in range(20)]
    assert all(len(found) == 1 for found in blocks[:20])
    assert not all(len(found) == 1 for found in blocks[20:])


def test_hosts_of_a_clos_network_and_groups_in_blocks(tmp_path, capsys):
    (tmp_path / "topo.csv").write_text("ip,DSW,PSW,ASW\na,G,P1,S1\nb,G,P1,S1\nc,G,P1,S2\nd,G,P2,S1\n")
    nodes = read_nodes(str(tmp_path / "topo.csv"))
    assert (nodes.rack.tolist(), nodes.block.tolist(), nodes.gpus.tolist()) == ([0, 0, 1, 2], [0, 0, 0, 1], [8] * 4)
    text = "nodes:\n- {count: 5, cpu: 8, memory: 1Gi, gpus: 8, rack: 1, block: 2}\n- {cpu: 8, memory: 1Gi}\n"
    (tmp_path / "fleet.yaml").write_text(text)
    nodes = read_nodes(str(tmp_path / "fleet.yaml"))
    assert (nodes.rack.tolist(), nodes.block.tolist()) == ([1, 2, 3, 4, 5, 0], [1, 1, 2, 2, 3, 0])
    (tmp_path / "jobs.csv").write_text("submit_seconds,duration_seconds,members,gpus\n0,100,5,8\n")
    told = ["simulate", "--nodes", str(tmp_path / "fleet.yaml"), "--jobs", str(tmp_path / "jobs.csv"), "-o", "json"]
    assert main([*told, "--policy", "packing", "--across-racks", "1.2", "--across-blocks", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["jct_seconds"]["mean"] == 200.0
    assert main([*told, "--policy", "packing", "--across-racks", "1.2"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["jct_seconds"]["mean"] == 120.0
    (tmp_path / "jobs.csv").write_text("submit_seconds,duration_seconds,members,gpus,across_blocks\n0,100,5,8,3\n")
    assert main([*told, "--policy", "packing", "--across-racks", "1.2"]) == 0, "what a job says itself stands"
    assert json.loads(capsys.readouterr().out)["runs"][0]["jct_seconds"]["mean"] == 300.0


@pytest.mark.parametrize(
    ("group", "more", "said"),
    [
        pytest.param("rack: 2, block: 3", [], "$.nodes[0].block: 3 is no multiple of its `rack`", id="half a rack"),
        pytest.param("block: 2", [], "$.nodes[0].block: 2 is no multiple of its `rack`", id="no racks"),
        pytest.param("rack: 2", ["--across-blocks", "2"], "--nodes has no blocks", id="no blocks"),
        pytest.param(
            "rack: 1, block: 2",
            ["--across-racks", "2", "--across-blocks", "1.5"],
            "across racks, which those across blocks are, too (/",
            id="faster across blocks",
        ),
    ],
)
def test_what_is_wrong_with_blocks_is_said(tmp_path, capsys, group, more, said):
    (tmp_path / "fleet.yaml").write_text(f"nodes: [{{count: 4, cpu: 8, memory: 1Gi, gpus: 8, {group}}}]\n")
    (tmp_path / "jobs.csv").write_text("submit_seconds,duration_seconds,members,gpus\n0,100,4,8\n")
    told = ["simulate", "--nodes", str(tmp_path / "fleet.yaml"), "--jobs", str(tmp_path / "jobs.csv"), *more]
    assert main(told) == 2
    assert said in capsys.readouterr().err


@needs("topology-and-nodes")
def test_lingjuns_network():
    """847 hosts below 119 switches, in three blocks."""
    nodes = read_nodes(str(FOLDER / "topology-and-nodes" / "lingjun2023_topo.csv.gz"))
    assert (len(nodes.rack), len(set(nodes.rack)), len(set(nodes.block))) == (847, 119, 3)
