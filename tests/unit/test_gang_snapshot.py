"""Snapshots, what-if and explanations: the same solver, read-only."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from colocate.cli.main import main
from colocate.errors import BadInput, StateTooNew
from colocate.objects import (
    Container,
    Node,
    NodeSpec,
    NodeStatus,
    ObjectMeta,
    OwnerReference,
    Pod,
    PodSpec,
    PodStatus,
    PriorityClass,
    Resources,
    StorageClass,
    Taint,
)
from colocate.units import parse_time, time_text
from podgroup.api import POD_GROUP_LABEL, PodGroup, PodGroupSpec
from podgroup.explain.manifests import Manifest, pods_of
from podgroup.explain.snapshot import KIND, VERSION, ClusterSnapshot, decide, explain, load, what_if
from podgroup.queue.entry import Settings
from podgroup.queue.queue import Queue
from podgroup.state.cluster import Cluster

NOW = "2026-05-01T12:00:00Z"
replace = msgspec.structs.replace


def node(name: str, cpu: int = 4, *, cordoned: bool = False, taint: str = "") -> Node:
    taints = [Taint(key=taint, effect="NoSchedule")] if taint else []
    return Node(
        metadata=ObjectMeta(name=name, labels={"kubernetes.io/hostname": name}),
        spec=NodeSpec(unschedulable=cordoned, taints=taints),
        status=NodeStatus(allocatable={"cpu": str(cpu), "memory": "8Gi", "pods": "110"}),
    )


def pod(name: str, group: str = "", cpu: int = 1, on: str = "", priority: int = 0, **annotations: str) -> Pod:
    owner = [OwnerReference(kind="Job", name=f"{group or name}-1", uid="o", controller=True)]
    made = NOW if not on else "2026-05-01T11:59:00Z"
    meta = ObjectMeta(
        name=name,
        namespace="ns",
        uid=name,
        creation_timestamp=made,
        labels={POD_GROUP_LABEL: group} if group else {},
        annotations={f"colocate.io/{k.replace('_', '-')}": v for k, v in annotations.items()},
        owner_references=owner,
    )
    container = Container(resources=Resources(requests={"cpu": str(cpu)}))
    spec = PodSpec(scheduler_name="colocate", node_name=on, priority=priority, containers=[container])
    return Pod(
        metadata=meta,
        spec=spec,
        status=PodStatus(phase="Running" if on else "Pending", start_time=made if on else None),
    )


def group(name: str, least: int, **annotations: str) -> PodGroup:
    meta = ObjectMeta(name=name, namespace="ns", creation_timestamp=NOW, annotations=annotations)
    return PodGroup(metadata=meta, spec=PodGroupSpec(min_member=least))


def cluster(nodes: list[Node], pods: list[Pod], groups: list[PodGroup]) -> ClusterSnapshot:
    return ClusterSnapshot(taken=NOW, kind=KIND, version=VERSION, nodes=nodes, pods=pods, groups=groups)


def gang(size: int, cpu: int = 1) -> list[Pod]:
    return [pod(f"m-{i}", "g", cpu) for i in range(size)]


def test_a_snapshot_is_decided_again_byte_for_byte_from_its_file():
    taken = cluster([node("a"), node("b")], [*gang(3, 2), pod("alone"), pod("used", on="a", cpu=2)], [group("g", 3)])
    again = load(msgspec.json.encode(replace(taken, verdicts=decide(taken))))
    assert msgspec.json.encode(decide(again)) == msgspec.json.encode(again.verdicts)
    assert {v.gang: v.outcome for v in again.verdicts} == {"ns/g": "Start", "ns/pod:alone": "Wait"}


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"{}", BadInput, "taken"),
        (b'{"taken": "x", "kind": "Pod"}', BadInput, "its kind is 'Pod'"),
        (b'{"taken": "x", "kind": "ClusterSnapshot", "version": 99}', StateTooNew, "version 99"),
        (b"not json", BadInput, "no cluster snapshot"),
    ],
)
def test_what_is_no_snapshot_is_refused(content, error, message):
    with pytest.raises(error, match=message):
        load(content)


EXPLANATIONS = {
    "a smaller quorum": ([node("a")], [], "minMember were 4 instead of 6"),
    "a node that is cordoned": ([node("a"), node("b", cordoned=True)], [], "node b is uncordoned"),
    "a taint": ([node("a"), node("b", taint="dedicated")], [], "its pods tolerate the taint dedicated:NoSchedule"),
    "another gang that ends": (
        [node("a", 8)],
        [pod("x-0", "x", 3, on="a"), pod("y", cpu=1, on="a")],
        "ns/x ends (1 pods)",
    ),
    "more nodes": ([node("a", 1)], [], "5 more nodes like a"),
}


@pytest.mark.parametrize(("nodes", "there", "change"), EXPLANATIONS.values(), ids=EXPLANATIONS.keys())
def test_counterfactuals_of_a_gang_of_six(nodes, there, change):
    found = explain(cluster(nodes, [*there, *gang(6)], [group("g", 6)]), "ns/g")
    assert found is not None
    assert found.verdict.reason == "Unschedulable"
    assert found.advice is not None
    assert change in [c.change for c in found.advice.counterfactuals]


def test_more_nodes_are_like_those_that_the_members_lack():
    """F9: the launcher comes first and asks for no GPU; the node with the most CPU would not help."""
    gpu = node("gpu", 4)
    gpu = replace(gpu, status=replace(gpu.status, allocatable={**gpu.status.allocatable, "nvidia.com/gpu": "8"}))
    worker = pod("worker-0", "g", 1)
    wants = Container(resources=Resources(requests={"cpu": "1", "nvidia.com/gpu": "8"}))
    workers = [
        replace(worker, metadata=replace(worker.metadata, name=n, uid=n), spec=replace(worker.spec, containers=[wants]))
        for n in ("worker-0", "worker-1")
    ]
    found = explain(cluster([node("cpu", 64), gpu], [pod("launcher", "g", 2), *workers], [group("g", 3)]), "ns/g")
    assert found is not None
    assert found.advice is not None
    assert "1 more node like gpu" in [c.change for c in found.advice.counterfactuals]


def test_a_gang_is_not_told_to_end_itself():
    """F10: a running member of its own holds what it lacks."""
    there = pod("m-run", "g", 3, on="a")
    found = explain(cluster([node("a")], [there, *gang(2, cpu=2)], [group("g", 3)]), "ns/g")
    assert found is not None
    assert found.advice is not None
    assert not [c for c in found.advice.counterfactuals if "ns/g ends" in c.change]


def test_a_required_rack_that_is_too_small_is_said():
    racks = [replace(n, metadata=replace(n.metadata, labels={"rack": n.metadata.name})) for n in (node("a"), node("b"))]
    wanted = group("g", 6, **{"colocate.io/required-topology": "rack"})
    found = explain(cluster(racks, gang(6), [wanted]), "ns/g")
    assert found is not None
    assert found.advice is not None
    assert "it is not required to be within one rack" in [c.change for c in found.advice.counterfactuals]
    assert "blocked by required topology rack" in found.verdict.message


def test_an_estimate_follows_declared_runtimes():
    running = [pod(f"x-{i}", "x", 2, on="a", expected_runtime_seconds=str(s)) for i, s in enumerate((160, 360))]
    found = explain(cluster([node("a")], [*running, *gang(3)], [group("g", 3)]), "ns/g")
    assert found is not None
    assert found.advice is not None
    assert found.advice.estimate_seconds == (300.0, 300.0), "the second one began a minute ago and takes six"


def test_nothing_is_said_of_runtimes_that_are_not_known():
    found = explain(cluster([node("a")], [pod("x", cpu=4, on="a"), *gang(3)], [group("g", 3)]), "ns/g")
    assert found is not None
    assert found.advice is not None
    assert found.advice.estimate_seconds is None


def test_of_a_deadline_only_the_most_is_said(tmp_path, capsys):
    ends = pod("x", cpu=4, on="a")
    ends = replace(ends, spec=replace(ends.spec, active_deadline_seconds=1860))
    taken = cluster([node("a")], [ends, *gang(3)], [group("g", 3)])
    file = tmp_path / "cluster.json"
    file.write_bytes(msgspec.json.encode(replace(taken, verdicts=decide(taken))))
    assert main(["explain", "podgroup", "g", "-n", "ns", "--snapshot", str(file)]) == 0
    assert "  as others end, it starts within 30 min" in capsys.readouterr().out.splitlines()


JOB = {
    "kind": "Job",
    "metadata": {"name": "train"},
    "spec": {"parallelism": 3, "template": {"spec": {"containers": [{"resources": {"requests": {"cpu": "2"}}}]}}},
}
MPI = {
    "kind": "MPIJob",
    "metadata": {"name": "pi"},
    "spec": {
        "mpiReplicaSpecs": {
            "Launcher": {"template": {"spec": {"containers": [{}]}}},
            "Worker": {
                "replicas": 2,
                "template": {"spec": {"containers": [{"resources": {"requests": {"cpu": "3"}}}]}},
            },
        }
    },
}


URGENT = PriorityClass(metadata=ObjectMeta(name="urgent"), value=1000)


def asked(*contents, classes=()):
    return pods_of([Manifest("f", i + 1, c) for i, c in enumerate(contents)], "ns", ("colocate",), NOW, classes)


def test_a_priority_class_gives_its_pods_their_priority():
    named = {"kind": "Pod", "metadata": {"name": "p"}, "spec": {"priorityClassName": "urgent", "containers": [{}]}}
    (one,), _, _, _ = asked(named, classes=[URGENT])
    assert one.spec.priority == 1000
    with pytest.raises(BadInput, match=r"spec\.priorityClassName 'urgent' does not exist; known: none"):
        asked(named)


def test_what_does_not_fit_of_a_gang_is_counted():
    (verdict,) = what_if(cluster([node("a")], [], []), [pod(f"m-{i}", "g", 1) for i in range(6)], [group("g", 2)])
    assert (verdict.outcome, len(verdict.members), verdict.surplus) == ("Start", 4, 2)


def test_a_job_without_a_group_is_pods_alone():
    pods, groups, _, _ = asked(JOB)
    assert groups == []
    verdicts = what_if(cluster([node("a")], [], []), pods, groups)
    assert [v.outcome for v in verdicts] == ["Start", "Start", "Wait"]


@pytest.mark.parametrize(("nodes", "outcome"), [(1, "Wait"), (2, "Start")])
def test_an_mpi_job_is_one_gang(nodes, outcome):
    pods, groups, _, _ = asked(MPI)
    (verdict,) = what_if(cluster([node(f"n{i}") for i in range(nodes)], [], []), pods, groups)
    assert (verdict.gang, verdict.outcome) == ("ns/pi", outcome)


ONE = {"spec": {"containers": [{"resources": {"requests": {"cpu": "1"}}}]}}
FILES = {
    "what makes no pods is passed over": ([{"apiVersion": "v1", "kind": "Secret"}, {"kind": "Pod", **ONE}], [""], [1]),
    "null is absent": (
        [{"kind": "Job", "metadata": {"labels": None}, "spec": {"completions": None, "template": ONE}}],
        [""],
        [1],
    ),
    "names that are generated are two": ([{"kind": "Pod", "metadata": {"generateName": "p-"}, **ONE}] * 2, [""], [2]),
    "a LeaderWorkerSet": (
        [
            {
                "apiVersion": "leaderworkerset.x-k8s.io/v1",
                "kind": "LeaderWorkerSet",
                "metadata": {"name": "chat"},
                "spec": {"replicas": 2, "leaderWorkerTemplate": {"size": 3, "workerTemplate": ONE}},
            }
        ],
        ["chat-0", "chat-1"],
        [3, 3],
    ),
    "a Job of Volcano": (
        [
            {
                "apiVersion": "batch.volcano.sh/v1alpha1",
                "kind": "Job",
                "metadata": {"name": "mesh"},
                "spec": {
                    "minAvailable": 3,
                    "schedulerName": "colocate",
                    "tasks": [{"name": "lead", "template": ONE}, {"name": "hand", "replicas": 3, "template": ONE}],
                },
            }
        ],
        ["mesh"],
        [4],
    ),
}


CLAIM = {"spec": {"storageClassName": "later", "resources": {"requests": {"storage": "1Gi"}}}}
LATER = StorageClass(metadata=ObjectMeta(name="later"), provisioner="disks", volume_binding_mode="WaitForFirstConsumer")
STORED: dict[str, list[dict[str, Any]]] = {
    "a claim of the same file": [
        {"kind": "PersistentVolumeClaim", "metadata": {"name": "data"}, **CLAIM},
        {
            "kind": "Pod",
            "spec": {**ONE["spec"], "volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "data"}}]},
        },
    ],
    "an ephemeral volume": [
        {
            "kind": "Pod",
            "spec": {**ONE["spec"], "volumes": [{"name": "v", "ephemeral": {"volumeClaimTemplate": CLAIM}}]},
        }
    ],
    "templates of a StatefulSet": [
        {
            "kind": "StatefulSet",
            "spec": {"template": ONE, "volumeClaimTemplates": [{"metadata": {"name": "data"}, **CLAIM}]},
        }
    ],
}


@pytest.mark.parametrize("contents", STORED.values(), ids=STORED.keys())
def test_claims_that_would_be_made_are_asked_about(contents):
    pods, groups, claims, _ = asked(*contents)
    there = cluster([node("a")], [], [])
    assert [v.outcome for v in what_if(replace(there, storage_classes=[LATER]), pods, groups, claims)] == ["Start"]
    (verdict,) = what_if(there, pods, groups, claims)
    assert "there is no StorageClass later" in verdict.message


@pytest.mark.parametrize(("contents", "gangs", "sizes"), FILES.values(), ids=FILES.keys())
def test_files_as_they_are(contents, gangs, sizes):
    pods, groups, _, passed_over = asked(*contents)
    label = "scheduling.x-k8s.io/pod-group"
    found = [[p for p in pods if p.metadata.labels.get(label, "") == gang] for gang in gangs]
    assert [len(its) for its in found] == sizes
    assert len(pods) == len({p.metadata.name for p in pods}) == sum(sizes)
    assert [g.metadata.name for g in groups] == [gang for gang in gangs if gang]
    assert len(passed_over) == sum(c["kind"] == "Secret" for c in contents)
    if gangs == ["mesh"]:
        assert groups[0].spec.min_member == 3


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({"spec": {}}, "it has no kind"),
        (
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}},
            "there are no pods to ask about; ConfigMap x makes no pods; it is passed over",
        ),
        ({"apiVersion": "x.io/v1", "kind": "Flow"}, "Flow flow of x.io: its pods are not known beforehand"),
        (
            {"apiVersion": "batch.volcano.sh/v1alpha1", "kind": "Job", "spec": {"tasks": [{"template": ONE}]}},
            "spec.schedulerName is 'volcano'",
        ),
        ({"kind": "Job", "spec": {"parallelism": -1}}, "spec.parallelism is -1"),
        ({"kind": "Job", "spec": {"parallelism": 10**9}}, "spec.parallelism is 1000000000"),
        (
            {"kind": "Pod", "spec": {"containers": 5}},
            r"document 1 \(Pod\): Expected `array`, got `int` - at `\$.spec.containers`",
        ),
        ({"kind": "PodGroup", "spec": {"minMember": 1}}, "there are no pods to ask about"),
        ({"kind": "PodGroup", "spec": {"minmember": 1}}, "spec.minmember is not a field"),
        (
            {"kind": "JobSet", "spec": {"replicatedJobs": ["x"]}},
            r"document 1 \(JobSet\): a field that must be an object",
        ),
        ({"kind": "RayCluster", "spec": {"headGroupSpec": None}}, r"document 1 \(RayCluster\)"),
        ({"kind": "Pod", "spec": {"containers": []}}, "without containers"),
        (
            {"kind": "Pod", "spec": {"schedulerName": "default-scheduler", "containers": [{}]}},
            "spec.schedulerName is 'default-scheduler'",
        ),
        (
            {"kind": "Pod", "spec": {"containers": [{"resources": {"requests": {"cpu": "12Gbananas"}}}]}},
            "'12Gbananas' is not a quantity",
        ),
    ],
)
def test_a_manifest_that_cannot_be_used_is_refused(manifest, message):
    with pytest.raises(BadInput, match=message):
        asked(manifest)


TIMES = {
    "1970-01-01T00:00:00Z": 0.0,
    "2026-05-01T12:00:00Z": 1777636800.0,
    "2024-02-29T23:59:59.5Z": 1709251199.5,
    "2026-05-01T14:00:00+02:00": 1777636800.0,
}


@pytest.mark.parametrize(("text", "seconds"), TIMES.items())
def test_times_of_the_api_server(text, seconds):
    assert parse_time(text) == seconds


@given(st.integers(0, 253402300799))
def test_times_are_written_as_they_are_read(seconds):
    written = time_text(seconds)
    assert parse_time(written) == seconds
    assert written == datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ").rjust(20, "0")


sizes = st.integers(1, 4)
jobs = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4), sizes, st.sampled_from([0, 10])), max_size=5)


def bind(cluster_: Cluster, decided: Any, bound: dict[str, Pod]) -> None:
    for start in decided.starts:
        for member, where in start.placed:
            one = cluster_.pods[member.uid]
            bound[member.uid] = replace(one, spec=replace(one.spec, node_name=where), status=PodStatus(phase="Running"))
            cluster_.set_pod(bound[member.uid])


@settings(max_examples=1000)
@given(
    nodes=st.lists(sizes, min_size=1, max_size=4),
    before=jobs,
    asked=st.tuples(sizes, sizes, sizes, st.sampled_from([0, 10])),
)
def test_what_if_says_what_then_happens(nodes, before, asked):
    """`before` and `asked` are gangs of (size, quorum, cpu, priority), which come one after the other."""
    live, queue = Cluster(), Queue(Settings())
    bound: dict[str, Pod] = {}
    for i, cpu in enumerate(nodes):
        live.set_node(node(f"n{i}", cpu))
    groups, pods = [], []
    for i, (size, least, cpu, priority) in enumerate(before):
        groups.append(group(f"g{i}", min(least, size)))
        made = [pod(f"g{i}-{k}", f"g{i}", cpu, priority=priority) for k in range(size)]
        pods += made
        live.groups[f"ns/g{i}"] = groups[-1]
        for one in made:
            live.set_pod(one)
        bind(live, queue.cycle(live, {f"ns/g{i}"}, 0.0), bound)
        bind(live, queue.cycle(live, set(live.groups), 0.0), bound)  # what has become surplus by now
    assume(not queue.holds.ends)  # a snapshot does not know yet what is promised to whom
    size, least, cpu, priority = asked
    wanted = [pod(f"new-{k}", "new", cpu, priority=priority) for k in range(size)]
    snapshot = cluster(live.ledger.nodes(), [bound.get(p.metadata.uid, p) for p in pods], groups)
    (said,) = what_if(snapshot, wanted, [group("new", min(least, size))])
    live.groups["ns/new"] = group("new", min(least, size))
    for one in wanted:
        live.set_pod(one)
    decided = queue.cycle(live, {"ns/new"}, 0.0)
    starts = {s.key: [(m.name, where) for m, where in s.placed] for s in decided.starts}
    evictions = {e.key: sorted(p.metadata.name for p in e.preemption.victims) for e in decided.evictions}
    if said.outcome == "Start":
        assert starts["ns/new"] == [(m.name, m.node) for m in said.members]
    elif said.outcome == "Preempt":
        assert evictions["ns/new"] == sorted(v.removeprefix("ns/") for v in said.victims)
    else:
        assert "ns/new" not in {**starts, **evictions}
        assert queue.waiting["ns/new"].reason == said.reason
