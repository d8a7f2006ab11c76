"""A cluster's snapshot, simulated from now on: what runs holds its place until it is over, then who waits starts."""

import json

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colocate.cli.main import main
from podgroup.explain.snapshot import decide
from podgroup.queue.runtimes import RUNTIME
from tests.unit.test_gang_snapshot import cluster, group, node, pod

replace = msgspec.structs.replace


def job(name, members, cpu=1, on=(), seconds=None):
    """A gang, on nodes or waiting."""
    pods = [pod(f"{name}-{i}", name, cpu, on[i] if on else "") for i in range(members)]
    if seconds is None:
        return pods
    notes = {RUNTIME: str(seconds)}
    return [replace(p, metadata=replace(p.metadata, annotations=notes)) for p in pods]


def written(tmp_path, nodes, *jobs):
    """Its snapshot's file."""
    groups = [group(pods[0].metadata.name.rpartition("-")[0], len(pods)) for pods in jobs]
    path = tmp_path / "cluster.json"
    path.write_bytes(msgspec.json.encode(cluster(nodes, [pod for pods in jobs for pod in pods], groups)))
    return str(path)


def starts(capsys, path, *arguments, code=0):
    """Of each scene and policy, who starts when."""
    assert main(["simulate", "--from-cluster", path, *arguments, "-o", "json"]) == code
    found = json.loads(capsys.readouterr().out)
    return {
        (one["what_if"], one["policy"]): {w["gang"]: w["starts_in_seconds"] for w in one["waiting"]} for one in found
    }


@pytest.mark.parametrize("policy", ["ours", "ours-declared", "coscheduling", "packing", "fifo"])
def test_who_waits_starts_when_what_runs_is_over(policy, tmp_path, capsys):
    """`old` has run for a minute of ten; `large` needs both nodes, `small` fits beside `old`."""
    path = written(
        tmp_path,
        [node("a"), node("b")],
        job("old", 2, 2, on=("a", "a"), seconds=600),
        job("large", 2, 4, seconds=100),
        job("small", 1, 1, seconds=50),
    )
    found = starts(capsys, path, "--policy", policy)
    large, small = found["as it is", policy]["ns/large"], found["as it is", policy]["ns/small"]
    assert large == 540
    assert small == (640 if policy == "fifo" else 0), "it does not delay the large one"


def test_more_nodes_and_a_job_more_are_beside_the_cluster_as_it_is(tmp_path, capsys):
    path = written(tmp_path, [node("a")], job("old", 1, 4, on=("a",)), job("next", 1, 4, seconds=30))
    found = starts(capsys, path, "--runs", "20m", "--what-if", "nodes=1x0", "--what-if", "job=1x4cpu:1m")
    assert found == {
        ("as it is", "ours"): {"ns/next": 1200},
        ("nodes=1x0", "ours"): {"ns/next": 0},
        ("job=1x4cpu:1m", "ours"): {"ns/next": 1200, "job=1x4cpu:1m": 1230},
    }


def test_what_people_read_says_what_was_assumed(tmp_path, capsys):
    path = written(tmp_path, [node("a")], job("old", 1, 4, on=("a",)), job("next", 1, 4, seconds=30))
    assert main(["simulate", "--from-cluster", path, "--what-if", "nodes=1x0"]) == 0
    out = capsys.readouterr().out
    assert "1 nodes, 1 jobs run, 1 wait" in out
    assert "1 do not declare how long they run (colocate.io/expected-runtime-seconds): 3,600 s" in out
    assert "ns/next    3,600 s   now" in out


def test_services_keep_what_they_have_and_cordoned_nodes_take_nobody(tmp_path, capsys):
    service = pod("web", on="a", cpu=3)
    service = replace(service, metadata=replace(service.metadata, owner_references=[]))
    path = tmp_path / "cluster.json"
    taken = cluster([node("a"), node("b"), node("c", cordoned=True)], [service, *job("two", 2, 2)], [group("two", 2)])
    path.write_bytes(msgspec.json.encode(taken))
    assert starts(capsys, str(path)) == {("as it is", "ours"): {"ns/two": 0}}
    path.write_bytes(msgspec.json.encode(replace(taken, pods=[service, *job("two", 2, 3)])))
    assert starts(capsys, str(path), code=1) == {("as it is", "ours"): {"ns/two": None}}


def test_one_that_would_never_fit_leaves_the_others_their_answers(tmp_path, capsys):
    path = written(tmp_path, [node("a")], job("huge", 9, 4), job("next", 1, 4, seconds=30))
    found = starts(capsys, path, "--what-if", "nodes=8x0", code=1)
    assert found == {
        ("as it is", "ours"): {"ns/huge": None, "ns/next": 0},
        ("nodes=8x0", "ours"): {"ns/huge": 0, "ns/next": 3600},
    }


def test_a_quorum_starts_without_the_rest(tmp_path, capsys):
    """Of two with a quorum of one there is room for one; the rest follows."""
    path = tmp_path / "cluster.json"
    pods = [*job("old", 1, 2, on=("a",), seconds=600), *job("g", 2, 2, seconds=60)]
    path.write_bytes(msgspec.json.encode(cluster([node("a")], pods, [group("old", 1), group("g", 1)])))
    assert starts(capsys, str(path))["as it is", "ours-declared"] == {"ns/g": 0, "ns/g, 1 more": 60}


def test_members_that_run_and_differ_hold_what_each_asks_for(tmp_path, capsys):
    """A launcher of one CPU on `a`, a worker of all on `b`: `a` has room for three, and nothing is made up."""
    path = tmp_path / "cluster.json"
    pods = [pod("launcher", "mpi", 1, "a"), pod("worker", "mpi", 4, "b"), *job("small", 1, 3), *job("large", 2, 4)]
    groups = [group("mpi", 2), group("small", 1), group("large", 2)]
    path.write_bytes(msgspec.json.encode(cluster([node("a"), node("b")], pods, groups)))
    assert starts(capsys, str(path), "--runs", "10m")["as it is", "ours"] == {"ns/large": 600, "ns/small": 0}


def test_of_many_that_came_at_once_the_first_named_is_the_first(tmp_path, capsys):
    path = written(tmp_path, [node("a")], *(job(f"g{i:02}", 1, 4, seconds=10) for i in range(12)))
    for policy in ("ours", "packing"):
        found = starts(capsys, path, "--policy", policy)["as it is", policy]
        assert found == {f"ns/g{i:02}": 10 * i for i in range(12)}


def test_a_member_on_a_cordoned_node_counts_for_its_quorum(tmp_path, capsys):
    path = tmp_path / "cluster.json"
    pods = [pod("g-0", "g", 1, "c"), pod("g-1", "g", 1)]
    path.write_bytes(msgspec.json.encode(cluster([node("a"), node("c", cordoned=True)], pods, [group("g", 2)])))
    assert starts(capsys, str(path)) == {("as it is", "ours"): {"ns/g": 0}}


worlds = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=6)


@settings(deadline=None, max_examples=40)
@given(worlds, st.integers(0, 3))
def test_who_starts_at_once_is_who_the_controller_would_start(rows, taken_cpus):
    """`ours` from a snapshot begins with the decisions that the controller itself takes on it."""
    from colocate.simulate.from_cluster import AS_IS, Scene, future
    from colocate.simulate.placement import Nodes, arrays
    from podgroup.explain.simulated import of_snapshot

    nodes = [node("a"), node("b"), node("c")]
    pods = [*job("old", 1, taken_cpus, on=("a",))] if taken_cpus else []
    for i, (members, cpu) in enumerate(rows):
        pods += job(f"g{i}", members, cpu)
    groups = [group(f"g{i}", members) for i, (members, _) in enumerate(rows)]
    taken = cluster(nodes, pods, [*groups, group("old", 1)])
    controllers = {v.gang for v in decide(taken) if v.outcome == "Start"}
    seen = of_snapshot(msgspec.json.encode(taken))
    scene = Scene(AS_IS, Nodes(*arrays([(*n.offers, 0, 0, 0) for n in seen.nodes])), [(*g,) for g in seen.gangs])
    ours = {name for name, at in future(scene, "ours", 60.0, 1).starts if at == 0.0}
    assert ours == controllers


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(["--what-if", "nodes=4"], "--what-if: 'nodes=4' is neither nodes=COUNTxGPUS nor job=", id="nodes"),
        pytest.param(["--what-if", "job=2x1:soon"], "--what-if: job=2x1:soon: ", id="no duration"),
        pytest.param(["--what-if", "job=0x1:1h"], "'job=0x1:1h' is neither", id="nobody"),
        pytest.param(["--nodes", "4x8"], "--nodes: not with --from-cluster", id="other nodes"),
        pytest.param(["--policy", "best"], "'best' is no policy", id="an unknown policy"),
    ],
)
def test_what_cannot_be_is_said(arguments, said, tmp_path, capsys):
    path = written(tmp_path, [node("a")], job("next", 1, 4))
    assert main(["simulate", "--from-cluster", path, *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(["--from-cluster", "/nowhere"], "--from-cluster: /nowhere cannot be read", id="no file"),
        pytest.param(["--nodes", "4x8"], "--nodes and --jobs are needed, or --from-cluster", id="no jobs"),
        pytest.param(["--what-if", "nodes=1x1"], "--what-if is about a cluster", id="no cluster"),
    ],
)
def test_what_is_missing_is_said(arguments, said, capsys):
    assert main(["simulate", *arguments]) == 2
    assert said in capsys.readouterr().err
