"""Queue, solver and ledger together, against a search of all assignments and against known loads."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from colocate.objects import (
    Condition,
    DisruptionBudget,
    DisruptionBudgetSpec,
    DisruptionBudgetStatus,
    LabelSelector,
    ObjectMeta,
    OwnerReference,
    PodStatus,
)
from colocate.units import parse_time
from podgroup.api import GangPlan, GangPlanSpec, GangPlanStatus, PlannedMember, PodGroupSpec
from podgroup.queue.decisions import Start
from podgroup.queue.entry import Settings
from podgroup.queue.queue import Queue
from podgroup.solve.sequence import place_in_turn
from podgroup.state.cluster import Cluster
from podgroup.state.gangs import is_group
from tests.unit.test_gang_snapshot import NOW, group, node, pod

replace = msgspec.structs.replace


def written(seconds):
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Simulated:
    """A cluster whose binds succeed at once, and a clock."""

    def __init__(self, **options):
        self.cluster, self.queue, self.now = Cluster(), Queue(Settings(**options), place_in_turn=place_in_turn), 0.0
        self.dirty: set[str] = set()

    def add(self, name, size, least, cpu=1, priority=0, **more):
        self.cluster.groups[f"ns/{name}"] = group(name, least)
        for i in range(size):
            self.cluster.set_pod(pod(f"{name}-{i}", name, cpu, priority=priority, **more))
        self.dirty.add(f"ns/{name}")

    def cycle(self):
        """Decide until nothing more is decided; victims go at once."""
        for _ in range(50):
            decided = self.queue.cycle(self.cluster, self.dirty, self.now)
            self.dirty = set()
            for start in decided.starts:
                self.persist(start.key)
                for member, where in start.placed:
                    one = self.cluster.pods[member.uid]
                    self.cluster.set_pod(
                        replace(
                            one,
                            spec=replace(one.spec, node_name=where),
                            status=PodStatus(phase="Running", start_time=written(self.now)),
                        )
                    )
                self.dirty.add(start.key)
            for eviction in decided.evictions:
                for victim in eviction.preemption.victims:
                    holding = self.cluster.ledger.holdings[victim.metadata.uid]
                    self.cluster.remove_pod(victim.metadata.uid)
                    key = f"ns/{victim.metadata.name.rpartition('-')[0]}"
                    self.queue.lost(self.cluster, holding, key, self.now)
                    self.dirty |= {key, eviction.key}
            if not self.dirty:
                return
        raise AssertionError("the queue does not come to rest")

    def persist(self, key):
        """The plan as it is once its gang runs; only when it was made matters here."""
        if is_group(key) and key not in self.cluster.plans:
            meta = ObjectMeta(name=key.removeprefix("ns/"), namespace="ns", uid="plan")
            made = written(self.now)
            least = self.cluster.groups[key].spec.min_member
            spec = GangPlanSpec(began=made, min_member=least)
            plan = GangPlan(metadata=meta, spec=spec, status=GangPlanStatus(phase="Running"))
            self.cluster.set_plan(key, plan)

    def finish(self, name):
        for one in self.cluster.pods_of(f"ns/{name}"):
            self.cluster.set_pod(replace(one, status=PodStatus(phase="Succeeded")))
        self.dirty.add(f"ns/{name}")

    def bound(self, name):
        return [p for p in self.cluster.pods_of(f"ns/{name}") if p.spec.node_name and not p.terminal]

    def running(self):
        return sorted(k.removeprefix("ns/") for k in self.cluster.groups if self.bound(k.removeprefix("ns/")))


def test_sixty_jobs_of_one_to_eight_gpus_on_two_nodes_drain_without_idling():
    """scheduler-plugins#114: interleaved gangs held each other for ever."""
    made = Simulated(reserve_after_seconds=1e9)
    for i in range(2):
        made.cluster.set_node(node(f"n{i}", 8))
    sizes = [1 + (7 * i) % 8 for i in range(60)]
    for i, size in enumerate(sizes):
        made.add(f"j{i:02}", size, size)
    waiting, done = {f"j{i:02}": s for i, s in enumerate(sizes)}, 0
    while done < 60:
        made.now += 1.0
        made.cycle()
        running = made.running()
        for name in running:
            waiting.pop(name, None)
        free = 16 - sum(len(made.bound(name)) for name in running)
        assert all(size > free for size in waiting.values()), "a job waits though it fits"
        assert running
        made.finish(running[0])
        done += 1


@pytest.mark.parametrize("size", [2, 100])
def test_of_two_jobs_of_one_pod_a_node_exactly_one_runs(size):
    """volcano#3373"""
    made = Simulated()
    for i in range(size):
        made.cluster.set_node(node(f"n{i}", 1))
    made.add("a", size, size)
    made.add("b", size, size)
    made.cycle()
    assert made.running() == ["a"]
    made.finish("a")
    made.cycle()
    assert made.running() == ["b"]


def test_a_big_gang_is_not_starved_by_a_stream_of_small_ones():
    made = Simulated(reserve_after_seconds=10.0)
    made.cluster.set_node(node("n", 4))
    made.add("s0", 2, 2)
    made.add("s1", 2, 2)
    made.cycle()
    made.add("big", 4, 4)
    started = []
    for i in range(2, 40):
        made.add(f"s{i}", 2, 2)
        made.now += 5.0
        made.finish(f"s{i - 2}")
        made.cycle()
        started = made.running()
        if "big" in started:
            break
    assert started == ["big"]


def test_a_short_job_may_run_under_the_reservation_of_a_big_one():
    made = Simulated(reserve_after_seconds=10.0)
    made.cluster.set_node(node("n", 5))
    made.cluster.set_pod(pod("long-0", "long", 3, on="n", expected_runtime_seconds="3600"))
    made.cluster.groups["ns/long"] = group("long", 1)
    made.add("big", 5, 5)
    made.cycle()
    made.now = 20.0
    for name, seconds in (("unknown", ""), ("short", "60")):
        made.cluster.groups[f"ns/{name}"] = group(name, 1)
        made.cluster.set_pod(pod(f"{name}-0", name, 1, expected_runtime_seconds=seconds))
        made.dirty.add(f"ns/{name}")
    made.cycle()
    assert made.running() == ["long", "short"]
    assert made.queue.waiting["ns/unknown"].reason == "BehindReservation"


def test_a_reservation_ends_when_its_time_is_over():
    made = Simulated(reserve_after_seconds=10.0, reservation_seconds=100.0)
    made.cluster.set_node(node("n", 4))
    made.add("holder", 3, 3)
    made.cycle()
    made.add("big", 4, 4)
    made.cycle()
    made.now = 20.0
    made.add("small", 1, 1)
    made.cycle()
    assert made.running() == ["holder"]
    made.now = 130.0
    made.cycle()
    assert made.running() == ["holder", "small"]


def test_a_head_that_needs_a_part_of_the_cluster_is_not_starved_either():
    """What ends goes to the head first: it starts once the room that has ended since its claim suffices."""
    made = Simulated(reserve_after_seconds=10.0)
    made.cluster.set_node(node("n", 4))
    for i in range(4):
        made.add(f"s{i}", 1, 1)
    made.cycle()
    made.add("big", 3, 3)
    made.cycle()
    ended = 0
    for i in range(4, 40):
        made.now += 5.0
        made.add(f"s{i}", 1, 1)
        made.finish(made.running()[0])
        ended += made.now >= 10.0  # since its claim
        made.cycle()
        if "big" in made.running():
            break
    assert "big" in made.running()
    assert ended <= 4


@settings(deadline=None)
@given(
    slots=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    stream=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 7), st.integers(0, 30)), min_size=4, max_size=40),
)
def test_no_head_waits_longer_than_until_what_was_free_or_ended_since_its_claim_suffices(slots, stream):
    """Jobs of unknown length arrive (size, 0: none) and end (which); the head's rival is nobody but who ran before."""
    made = Simulated(reserve_after_seconds=10.0, reservation_seconds=1e9)
    for i, cpus in enumerate(slots):
        made.cluster.set_node(node(f"n{i}", cpus))
    sizes: dict[str, int] = {}
    head, before = "", set[str]()
    for i, (size, which, seconds) in enumerate(stream):
        if size:
            name = f"g{i:03}"
            made.add(name, size, size)
            sizes[name] = size
        running = made.running()
        if running and which < len(running):
            made.finish(running[which])
            del sizes[running[which]]
        made.now += seconds
        made.cycle()
        running = set(made.running())
        if head and head in sizes and head not in running:
            left = sum(slots) - sum(sizes[name] for name in before & running)
            assert left < sizes[head], f"{head} waits though {left} slots were free or have ended since its claim"
        waiting = [
            k for k in made.queue.order if k in made.queue.waiting and made.queue.waiting[k].reserved_at is not None
        ]
        heads = [k.removeprefix("ns/") for k in waiting if sizes.get(k.removeprefix("ns/"), 99) <= sum(slots)]
        if heads and heads[0] != head:
            head, before = heads[0], running


class Easy:
    """A brute-force oracle of EASY backfilling for one head: which room was free or ended since its claim, second by
    second, and who was let into its claim because he ends in time (Lifka 1995; gang.md's shadow time)."""

    def __init__(self, head, size, slots, ends, now):
        self.head, self.size, self.slots, self.now = head, size, slots, now
        self.ends = dict(ends)
        """Who ran when it claimed -> when he really ends."""

    def start(self, ends=None):
        """The first second at which it would fit, had nobody been started since."""
        ends = self.ends if ends is None else ends
        moments = sorted({self.now, *(end for end, _ in ends.values() if end > self.now)})
        for moment in moments:
            if self.slots - sum(size for end, size in ends.values() if end > moment) >= self.size:
                return moment
        return float("inf")


@settings(deadline=None, max_examples=50)
@given(
    slots=st.integers(2, 6),
    stream=st.lists(
        st.tuples(st.integers(0, 6), st.integers(1, 6), st.integers(1, 60), st.booleans()), min_size=4, max_size=30
    ),
)
def test_no_head_waits_longer_than_easys_by_more_than_one_jobs_end(slots, stream):
    """Jobs (seconds after the one before, size, runtime, whether it is declared) on nodes of one slot each."""
    made = Simulated(reserve_after_seconds=3.0, reservation_seconds=1e9)
    made.now = began = parse_time(NOW)
    for i in range(slots):
        made.cluster.set_node(node(f"n{i}", 1))
    coming, at = {}, began
    for i, (gap, size, runtime, declared) in enumerate(stream):
        at += gap
        coming[f"g{i:03}"] = (at, min(size, slots), runtime, declared)
    ends: dict[str, tuple[float, int]] = {}
    oracle, let_in, started = None, dict[str, tuple[float, int]](), set[str]()
    while len(started) < len(coming):
        assert made.now < began + 4000, f"{sorted(coming.keys() - started)} never start"
        for name, (arrives, size, runtime, declared) in coming.items():
            if arrives == made.now:
                told = {"expected_runtime_seconds": str(runtime)} if declared else {}
                made.add(name, size, size, **told)
        for name, (end, _) in list(ends.items()):
            if end <= made.now:
                made.finish(name)
                del ends[name]
        made.cycle()
        for name in set(made.running()) - started:
            started.add(name)
            ends[name] = (made.now + coming[name][2], coming[name][1])
            if oracle is not None and name != oracle.head and coming[name][3]:
                let_in[name] = ends[name]
            if oracle is not None and name == oracle.head:
                latest = max([oracle.start(), *(end for end, _ in let_in.values() if end <= made.now)])
                assert made.now <= latest, f"{name} starts {made.now - latest:g} s after the oracle's"
        if oracle is not None and oracle.head in started:
            oracle = None
        heads = [k for k, memory in made.queue.waiting.items() if memory.reserved_at is not None]
        if oracle is None and heads:
            head = min(heads).removeprefix("ns/")
            oracle, let_in = Easy(head, coming[head][1], slots, ends, made.now), {}
        made.now += 1.0


@settings(deadline=None)
@given(
    stream=st.lists(
        st.tuples(st.integers(0, 4), st.integers(1, 4), st.integers(0, 2), st.integers(0, 7)), min_size=2, max_size=30
    )
)
def test_nobody_starts_while_a_more_important_quorum_that_would_have_fit_waits(stream):
    """Gangs (size, quorum, priority) arrive and end (which); nothing is preempted, claimed or held."""
    made = Simulated(reserve_after_seconds=1e9, slot_seconds=0.0)
    made.cluster.set_node(node("n", 6))
    quorums: dict[str, tuple[int, int]] = {}
    before: dict[str, int] = {}
    for i, (size, least, priority, which) in enumerate(stream):
        if size >= least:
            made.add(f"g{i:03}", size, least, priority=priority)
            for one in made.cluster.pods_of(f"ns/g{i:03}"):
                made.cluster.set_pod(replace(one, spec=replace(one.spec, preemption_policy="Never")))
            quorums[f"g{i:03}"] = (priority, least)
        running = made.running()
        if running and which < len(running):
            made.finish(running[which])
            del quorums[running[which]]
        made.cycle()
        bound = {name: len(made.bound(name)) for name in quorums}
        new = {name: count - before.get(name, 0) for name, count in bound.items()}
        free = 6 - sum(bound.values())
        for name, (rank, wanted) in quorums.items():
            if bound[name] == 0:
                lower = sum(more for other, more in new.items() if more > 0 and quorums[other][0] < rank)
                assert free + lower < wanted, f"{name} waits, and less important members were started"
        before = bound


@pytest.mark.parametrize(("took", "runs"), [(50, ["long", "short"]), (100, ["long"])])
def test_a_declared_runtime_is_believed_unless_its_owner_has_overrun_one(took, runs):
    made = Simulated(reserve_after_seconds=10.0)
    made.now = parse_time(NOW)
    made.cluster.set_node(node("n", 5))
    made.cluster.set_pod(pod("long-0", "long", 3, on="n", expected_runtime_seconds="3600"))
    made.cluster.groups["ns/long"] = group("long", 1)
    began, ended = (written(made.now - ago) for ago in (1000, 1000 - took))
    short = pod("short-0", "short", 1, expected_runtime_seconds="60")
    done = Condition(type="Ready", status="False", last_transition_time=ended)
    before = replace(short, metadata=replace(short.metadata, name="former", uid="former", labels={}))
    made.cluster.set_pod(replace(before, status=PodStatus(phase="Succeeded", start_time=began, conditions=[done])))
    made.add("big", 5, 5)
    made.cycle()
    made.now += 20.0
    made.cluster.groups["ns/short"] = group("short", 1)
    made.cluster.set_pod(short)
    made.dirty.add("ns/short")
    made.cycle()
    assert made.running() == runs


def test_a_gang_that_raises_its_quorum_jumps_no_priority():
    made = Simulated(reserve_after_seconds=1e9)
    made.cluster.set_node(node("n", 4))
    made.add("blocks", 3, 3)
    made.add("tenant", 1, 1)
    made.cycle()
    made.add("vip", 3, 3, priority=1000)
    for i in range(3):
        one = made.cluster.pods[f"vip-{i}"]
        made.cluster.set_pod(replace(one, spec=replace(one.spec, preemption_policy="Never")))
    made.cycle()
    made.cluster.groups["ns/tenant"] = group("tenant", 4)
    for i in range(1, 4):
        made.cluster.set_pod(pod(f"tenant-{i}", "tenant", 1))
    made.dirty.add("ns/tenant")
    made.finish("blocks")
    made.cycle()
    assert len(made.bound("vip")) == 3
    assert len(made.bound("tenant")) == 1


def test_members_that_are_only_wished_for_go_after_quorums_of_the_same_priority():
    made = Simulated(reserve_after_seconds=10.0)
    made.cluster.set_node(node("n", 4))
    made.add("old", 40, 1)
    made.cycle()
    assert len(made.bound("old")) == 4
    made.add("young", 4, 4)
    made.cycle()
    for _ in range(8):
        made.now += 20.0
        ended = made.bound("old")
        if ended:
            made.cluster.set_pod(replace(ended[0], status=PodStatus(phase="Succeeded")))
            made.dirty.add("ns/old")
        made.cycle()
    assert len(made.bound("young")) == 4


def test_quorums_that_arrive_together_come_before_the_surplus_of_the_first():
    made = Simulated()
    made.cluster.set_node(node("n", 4))
    made.add("a", 4, 1)
    made.add("b", 2, 2)
    made.cycle()
    assert (len(made.bound("a")), len(made.bound("b"))) == (2, 2)


def test_a_cycle_that_runs_out_of_time_goes_on_with_those_it_has_not_tried():
    made = Simulated(reserve_after_seconds=1e9)
    made.cluster.set_node(node("n", 4))
    for i in range(6):  # too few members: they are looked at anew in each pass, and never start
        made.cluster.groups[f"ns/a{i}"] = group(f"a{i}", 2)
        made.cluster.set_pod(pod(f"a{i}-0", f"a{i}"))
        made.dirty.add(f"ns/a{i}")
    made.add("fits", 2, 2)
    started: list[Start] = []
    cycles = 0
    while not started:
        cycles += 1
        decided = made.queue.cycle(made.cluster, made.dirty, made.now, out_of_time=lambda: True)
        made.dirty, started = set(), decided.starts
        assert cycles <= 7, "a pass makes no progress"
    assert started[0].key == "ns/fits"


def test_surplus_is_not_given_before_all_quorums_were_asked_also_when_time_is_over():
    made = Simulated()
    made.cluster.set_node(node("n", 4))
    made.add("a", 4, 1)
    made.add("b", 2, 2)
    decided = made.queue.cycle(made.cluster, made.dirty, made.now, out_of_time=lambda: True)
    assert [len(start.placed) for start in decided.starts] == [1]


def test_a_head_of_several_kinds_claims_for_those_that_fit_though_its_first_does_not():
    """A Ray head without a place must not leave the GPUs of its workers to a stream of small gangs."""
    made = Simulated(reserve_after_seconds=10.0)
    made.cluster.set_node(node("big", 8))
    made.cluster.set_node(node("n", 4))
    made.add("holder", 1, 1, cpu=8)
    made.add("one", 1, 1)
    made.cycle()
    made.cluster.groups["ns/ray"] = group("ray", 5)
    made.cluster.set_pod(pod("ray-0", "ray", 8))
    for i in range(1, 5):
        made.cluster.set_pod(pod(f"ray-{i}", "ray", 1))
    made.dirty.add("ns/ray")
    made.cycle()
    made.now = 20.0
    made.add("small", 1, 1)
    made.cycle()
    assert made.queue.waiting["ns/ray"].claimed == 3
    assert made.queue.waiting["ns/small"].reason == "BehindReservation"


def test_what_minresources_has_already_makes_no_surplus_owed():
    made = Simulated(reserve_after_seconds=10.0)
    made.cluster.set_node(node("n", 4))
    spark(made, "old", executors=9, wanted={"cpu": "1"})
    made.cycle()
    assert len(made.bound("old")) == 4
    made.add("young", 2, 2)
    made.cycle()
    for _ in range(4):
        made.now += 20.0
        made.cluster.set_pod(replace(made.bound("old")[0], status=PodStatus(phase="Succeeded")))
        made.dirty.add("ns/old")
        made.cycle()
    assert len(made.bound("young")) == 2


def test_the_place_of_a_member_that_is_drained_is_its_replacements():
    made = Simulated(slot_seconds=60.0)
    made.cluster.set_node(node("n1", 1))
    made.cluster.set_node(node("n2", 1))
    made.add("g", 2, 2)
    made.cluster.set_node(node("n0", 1))
    made.add("low", 1, 1, priority=-1)
    made.cycle()
    leave(made, "g-1", due="2099-01-01T00:00:00Z")
    made.add("b", 1, 1)
    made.cycle()
    holding = made.cluster.ledger.holdings["g-1"]
    made.cluster.remove_pod("g-1")
    made.queue.lost(made.cluster, holding, "ns/g", made.now)
    made.cluster.set_pod(replace(pod("g-1", "g"), metadata=replace(pod("g-1", "g").metadata, uid="again")))
    made.dirty |= {"ns/g", "ns/b"}
    made.cycle()
    assert len(made.bound("g")) == 2


def test_room_that_leaving_pods_make_is_kept_for_whom_it_was_promised():
    made = Simulated()
    for name in ("n1", "n2"):
        made.cluster.set_node(node(name, 1))
    made.add("old", 1, 1)
    made.cycle()
    leave(made, "old-0", due="2099-01-01T00:00:00Z")
    made.add("high", 2, 2, priority=10)
    made.add("low", 1, 1)
    made.cycle()
    assert made.running() == ["old"]
    assert made.queue.waiting["ns/high"].reason == "WaitingForPreemption"
    made.cluster.remove_pod("old-0")
    made.dirty |= {"ns/old", "ns/high"}
    made.cycle()
    assert len(made.bound("high")) == 2
    assert not made.bound("low")


def test_a_worker_that_is_lost_before_the_launcher_exists_is_replaced():
    """mpi-operator makes the launcher once the workers run: without the replacement it never does."""
    made = Simulated(creation_grace_seconds=0.5)
    owner = [OwnerReference(kind="MPIJob", name="pi", uid="m", controller=True)]

    def worker(name, uid):
        one = pod(name, "pi", 1)
        made.cluster.set_pod(replace(one, metadata=replace(one.metadata, uid=uid, owner_references=owner)))
        made.dirty.add("ns/pi")

    for i in range(3):
        made.cluster.set_node(node(f"n{i}", 1))
    made.cluster.groups["ns/pi"] = group("pi", 3)
    worker("pi-0", "first"), worker("pi-1", "second")
    made.cycle()
    made.now = 1.0
    made.cycle()
    assert len(made.bound("pi")) == 2
    holding = made.cluster.ledger.holdings["second"]
    made.cluster.remove_pod("second")
    made.queue.lost(made.cluster, holding, "ns/pi", made.now)
    worker("pi-1", "again")
    made.cycle()
    made.now = 3.0
    made.cycle()
    assert len(made.bound("pi")) == 2


@pytest.mark.parametrize(
    ("labels", "kind", "starts"),
    [
        pytest.param({"jobset.sigs.k8s.io/jobset-name": "js"}, "Job", True, id="a JobSet's pod is a Job's"),
        pytest.param(
            {"leaderworkerset.sigs.k8s.io/name": "lws"}, "StatefulSet", True, id="a leader's is a StatefulSet's"
        ),
        pytest.param({"ray.io/originated-from-crd": "RayJob"}, "RayCluster", True, id="a RayJob's is a RayCluster's"),
        pytest.param({"ray.io/originated-from-crd": "RayCluster"}, "RayCluster", False, id="a RayCluster makes all"),
        pytest.param({}, "RayCluster", True, id="a RayCluster of an operator that does not say: it may be a RayJob's"),
        pytest.param({}, "MPIJob", True, id="an MPIJob's is its own"),
        pytest.param({}, "Job", False, id="a Job makes all"),
    ],
)
def test_staged_owners_are_known_by_what_operators_put_on_their_pods(labels, kind, starts):
    made = Simulated(creation_grace_seconds=1.0)
    made.cluster.set_node(node("n", 4))
    made.cluster.groups["ns/g"] = group("g", 2)
    one = pod("g-0", "g")
    owner = [OwnerReference(kind=kind, name="x", uid="o", controller=True)]
    meta = replace(one.metadata, labels={**one.metadata.labels, **labels}, owner_references=owner)
    made.cluster.set_pod(replace(one, metadata=meta))
    made.dirty.add("ns/g")
    made.cycle()
    assert not made.bound("g")
    made.now = 2.0
    made.cycle()
    assert bool(made.bound("g")) == starts
    if not starts:
        assert "colocate.io/creation-dependency" in made.queue.waiting["ns/g"].message


def test_a_stage_follows_one_that_has_completed():
    """C02: data, then model, then trainers: one group, each made only after the one before is complete."""
    made = Simulated(creation_grace_seconds=1.0)
    made.cluster.set_node(node("n", 4))
    staged = group("g", 4)
    annotations = {"colocate.io/creation-dependency": "true"}
    made.cluster.groups["ns/g"] = replace(staged, metadata=replace(staged.metadata, annotations=annotations))
    done = pod("g-data", "g")
    made.cluster.set_pod(replace(done, status=replace(done.status, phase="Succeeded")))
    made.cluster.set_pod(pod("g-model", "g"))
    made.dirty.add("ns/g")
    made.cycle()
    made.now = 2.0
    made.cycle()
    assert [p.metadata.name for p in made.bound("g")] == ["g-model"]


def test_a_gang_that_runs_gets_the_members_that_are_there_though_one_failed_for_good():
    """mpi-operator keeps a failed worker and makes the launcher anew: that one must run, so that the job can end."""
    made = Simulated(creation_grace_seconds=30.0, slot_seconds=0.0)
    made.cluster.set_node(node("n", 4))
    made.add("g", 4, 4)
    made.cycle()
    for name in ("g-0", "g-1"):
        one = made.cluster.pods[name]
        made.cluster.set_pod(replace(one, status=PodStatus(phase="Failed")))
    made.cluster.set_pod(replace(pod("g-9", "g"), metadata=replace(pod("g-9", "g").metadata, uid="launcher")))
    made.dirty.add("ns/g")
    made.cycle()
    assert "g-0 failed and was not replaced" in made.queue.waiting["ns/g"].message
    made.now = 31.0
    made.cycle()
    assert len(made.bound("g")) == 3


def test_scaling_up_takes_no_running_members_of_an_equal_gang():
    made = Simulated(reserve_after_seconds=1e9, slot_seconds=1.0)
    made.cluster.set_node(node("n", 6))
    made.add("e1", 3, 3)
    made.add("e2", 3, 3)
    made.cycle()
    for name in ("e1", "e2"):
        made.cluster.groups[f"ns/{name}"] = group(name, 4)
        made.cluster.set_pod(pod(f"{name}-3", name))
        made.dirty.add(f"ns/{name}")
    for _ in range(5):
        made.now += 30.0
        made.cycle()
    assert (len(made.bound("e1")), len(made.bound("e2"))) == (3, 3)


@pytest.mark.parametrize(
    ("failed", "made_anew", "after", "rival"),
    [
        pytest.param(True, False, 0, False, id="a failure, and all are made anew: the place is kept"),
        pytest.param(True, False, 61, True, id="a failure, and nobody makes them anew: not for ever"),
        pytest.param(False, False, 0, True, id="suspended, all are deleted: the room is free at once"),
        pytest.param(False, True, 0, False, id="one was deleted, and its owner deletes the others: the place is kept"),
        pytest.param(False, True, 14, False, id="a moment more after the last of them has gone"),
        pytest.param(False, True, 16, True, id="its owner is deleted itself: a short time only"),
        pytest.param(True, True, 59, False, id="one failed, and its owner deletes the others: as after every failure"),
    ],
)
def test_whether_the_place_of_a_gang_without_pods_is_kept(failed, made_anew, after, rival):
    made = Simulated(slot_seconds=60.0)
    made.cluster.set_node(node("n", 2))
    made.add("g", 2, 2)
    made.cycle()
    for i, name in enumerate(("g-0", "g-1")):
        holding = made.cluster.ledger.holdings[name]
        made.cluster.remove_pod(name)
        made.queue.lost(made.cluster, holding, "ns/g", made.now, failed and i == 0, made_anew)
        made.now = 5.0
    made.add("rival", 2, 2)
    made.dirty.add("ns/g")
    made.now = float(after) if after else made.now
    made.cycle()
    assert bool(made.bound("rival")) == rival


def test_a_set_whose_pods_trickle_away_keeps_no_place_for_more_than_a_minute():
    made = Simulated(slot_seconds=60.0)
    made.cluster.set_node(node("n", 9))
    made.add("g", 9, 9)
    made.cycle()
    for i in range(9):
        holding = made.cluster.ledger.holdings[f"g-{i}"]
        made.cluster.remove_pod(f"g-{i}")
        made.queue.lost(made.cluster, holding, "ns/g", made.now, False, made_anew=True)
        made.now += 9.0
    made.now -= 9.0
    made.add("rival", 1, 1)
    made.dirty.add("ns/g")
    made.cycle()
    assert made.bound("rival"), "the first has been gone for 72 s"


def test_the_place_of_a_deleted_member_is_kept_for_a_short_time_only():
    made = Simulated(slot_seconds=60.0)
    made.cluster.set_node(node("n", 3))
    made.add("g", 3, 3)
    made.cycle()
    holding = made.cluster.ledger.holdings["g-2"]
    made.cluster.remove_pod("g-2")
    made.queue.lost(made.cluster, holding, "ns/g", made.now, False)
    made.add("rival", 1, 1)
    made.dirty.add("ns/g")
    made.cycle()
    assert not made.bound("rival")
    made.now = 11.0
    made.cycle()
    assert made.bound("rival")


def bind(made, name, on):
    one = made.cluster.pods[name]
    made.cluster.set_pod(replace(one, spec=replace(one.spec, node_name=on), status=PodStatus(phase="Running")))


def leave(made, name, due=None):
    """A pod is leaving, and has time to until `due`, by default until it was made."""
    one = made.cluster.pods[name]
    due = due or one.metadata.creation_timestamp
    made.cluster.set_pod(replace(one, metadata=replace(one.metadata, deletion_timestamp=due)))


def two_slots_held():
    """Two nodes of one CPU, held by `low` and `low2`."""
    made = one_slot_held()
    made.cluster.set_node(node("m", 1))
    made.dirty.discard("ns/high")
    made.add("low2", 1, 1)
    made.cycle()
    return made


def one_slot_held():
    """One node of one CPU, held by `low`, and `high`, which is more important."""
    made = Simulated()
    made.cluster.set_node(node("n", 1))
    made.add("low", 1, 1)
    made.cycle()
    made.add("high", 1, 1, priority=5)
    return made


def test_a_preemptor_starts_when_its_victim_has_gone_though_nothing_else_changes():
    made = one_slot_held()
    (evicted,) = made.queue.cycle(made.cluster, made.dirty, 1.0).evictions
    assert [p.metadata.name for p in evicted.preemption.victims] == ["low-0"]
    made.cluster.remove_pod("low-0")
    assert [s.key for s in made.queue.cycle(made.cluster, set(), 2.0).starts] == ["ns/high"]


def test_nobody_is_evicted_where_somebody_is_leaving_anyway():
    made = two_slots_held()
    leave(made, "low-0")
    decided = made.queue.cycle(made.cluster, {"ns/high"}, 1.0)
    assert (decided.starts, decided.evictions) == ([], [])


def test_a_gang_that_is_broken_goes_whole_with_its_surplus():
    made = Simulated()
    made.cluster.set_node(node("n", 4))
    made.add("low", 4, 3)
    made.cycle()
    made.add("high", 2, 2, priority=5)
    (evicted,) = made.queue.cycle(made.cluster, made.dirty, 1.0).evictions
    assert len(evicted.preemption.victims) == 4


def test_a_pod_that_should_have_ended_long_ago_makes_no_room_by_itself():
    made = two_slots_held()
    leave(made, "low-0", "1970-01-01T00:00:00Z")
    assert made.queue.cycle(made.cluster, {"ns/high"}, 20.0).evictions == []
    (evicted,) = made.queue.cycle(made.cluster, {"ns/high"}, 100.0).evictions
    assert [p.metadata.name for p in evicted.preemption.victims] == ["low2-0"]


def test_a_victim_that_could_not_be_told_to_go_may_be_chosen_again():
    made = one_slot_held()
    made.cluster.budgets["ns/b"] = budget(1)
    assert made.queue.cycle(made.cluster, made.dirty, 1.0).evictions
    assert made.queue.cycle(made.cluster, {"ns/high"}, 2.0).evictions == [], "its going is awaited"
    made.queue.victims.spared("low-0")
    assert made.queue.cycle(made.cluster, {"ns/high"}, 1000.0).evictions


def budget(allowed):
    spec = DisruptionBudgetSpec(selector=LabelSelector())
    status = DisruptionBudgetStatus(disruptions_allowed=allowed)
    return DisruptionBudget(metadata=ObjectMeta(name="b", namespace="ns"), spec=spec, status=status)


def test_a_budget_is_spent_on_victims_and_not_on_those_that_are_looked_at():
    made = Simulated()
    made.cluster.set_node(node("small", 1))
    made.cluster.set_node(node("large", 2))
    made.cluster.budgets["ns/b"] = budget(1)
    for name, cpu, on in (("v0", 1, "small"), ("v1", 2, "large")):
        made.cluster.groups[f"ns/{name}"] = group(name, 1)
        made.cluster.set_pod(pod(f"{name}-0", name, cpu))
        bind(made, f"{name}-0", on)
    made.add("high", 1, 1, cpu=2, priority=5)
    (evicted,) = made.queue.cycle(made.cluster, made.dirty, 1.0).evictions
    assert [p.metadata.name for p in evicted.preemption.victims] == ["v1-0"]


def test_no_more_victims_go_than_their_budget_allows():
    made = Simulated()
    made.cluster.set_node(node("n", 2))
    made.cluster.budgets["ns/b"] = budget(1)
    made.add("v0", 1, 1)
    made.add("v1", 1, 1)
    made.cycle()
    made.add("high", 1, 1, cpu=2, priority=5)
    assert made.queue.cycle(made.cluster, made.dirty, 1.0).evictions == []


def test_of_hundreds_of_small_victims_only_those_that_must_go_do():
    made = Simulated()
    for i in range(100):
        made.cluster.set_node(node(f"n{i:03}", 4))
    for i in range(400):
        made.add(f"v{i:03}", 1, 1)
    made.cycle()
    made.add("high", 30, 30, cpu=2, priority=5)
    (evicted,) = made.queue.cycle(made.cluster, made.dirty, 1.0).evictions
    assert len(evicted.preemption.victims) == 60


def test_a_cycle_looks_for_victims_for_so_many_and_leaves_the_others_to_the_next():
    made = Simulated()
    made.queue = Queue(Settings(), searches=2)
    made.cluster.set_node(node("n", 4))
    for i in range(4):
        made.add(f"low{i}", 1, 1)
    made.cycle()
    for i in range(4):
        made.add(f"high{i}", 1, 1, cpu=1 + i % 3, priority=5)
    first = made.queue.cycle(made.cluster, made.dirty, 1.0)
    assert [e.key for e in first.evictions] == ["ns/high0", "ns/high1"]
    assert made.queue.victims.unfinished
    second = made.queue.cycle(made.cluster, set(), 2.0)
    assert [e.key for e in second.evictions] == ["ns/high3"], "high2 needs three, and one is left"
    assert not made.queue.victims.unfinished


def test_of_two_gangs_that_each_lack_a_member_one_goes():
    made = Simulated(slot_seconds=60.0)
    for i in range(4):
        made.cluster.set_node(node(f"n{i}", 1))
    made.add("a", 2, 2)
    made.add("b", 2, 2)
    made.cycle()
    for lost in ("a-1", "b-1"):
        made.cluster.remove_node(made.cluster.pods[lost].spec.node_name)
        made.cluster.remove_pod(lost)
        made.cluster.set_pod(pod(f"{lost}-again", lost[0]))
        made.dirty.add(f"ns/{lost[0]}")
    made.cycle()
    assert [len(made.bound(name)) for name in "ab"] == [1, 1], "the places of the lost are held first"
    made.now += 130.0
    made.cycle()
    made.now += 130.0
    made.cycle()
    assert [len(made.bound(name)) for name in "ab"] == [2, 0]


def test_what_a_preemptor_was_promised_is_free_once_it_is_gone():
    made = one_slot_held()
    made.queue.cycle(made.cluster, made.dirty, 1.0)
    made.cluster.remove_pod("low-0")
    made.cluster.remove_pod("high-0")
    made.cluster.groups.pop("ns/high")
    made.add("other", 1, 1)
    assert [s.key for s in made.queue.cycle(made.cluster, {"ns/high", "ns/other"}, 2.0).starts] == ["ns/other"]


def test_a_group_that_is_submitted_anew_does_not_back_off_for_its_namesake():
    made = Simulated()
    made.cluster.set_node(node("n", 1))
    made.add("g", 1, 1)
    made.queue.back_off("ns/g", 0.0)
    assert made.queue.cycle(made.cluster, {"ns/g"}, 1.0).starts == []
    made.cluster.remove_pod("g-0")
    made.cluster.groups.pop("ns/g")
    made.queue.cycle(made.cluster, {"ns/g"}, 2.0)
    made.add("g", 1, 1)
    assert len(made.queue.cycle(made.cluster, {"ns/g"}, 3.0).starts) == 1


def test_a_gang_that_is_taken_back_for_ever_backs_off_five_minutes_each_time():
    """After four days of it a new leader reads how often that was."""
    made = Simulated()
    meta, group_uid = ObjectMeta(name="g", namespace="ns", uid="plan"), "ns/g"
    made.add("g", 1, 1)
    for taken_back, until in ((5_000, "2100-01-01T00:00:00Z"), (10**12, None)):
        status = GangPlanStatus(phase="Waiting", taken_back=taken_back, backing_off_until=until)
        made.cluster.set_plan(group_uid, GangPlan(metadata=meta, status=status))
        made.queue.remember(made.cluster, 100.0)
        assert made.queue._backing_off[group_uid][0] <= 400.0, "a clock ahead, or a hand, does not hold it longer"
        made.queue.back_off(group_uid, 100.0)
        assert made.queue._backing_off[group_uid] == (400.0, taken_back + 1)


def test_a_new_leader_takes_no_namesake_s_memory_for_a_group_s():
    made = Simulated(reserve_after_seconds=5.0)
    made.add("g", 1, 1)
    meta = ObjectMeta(name="g", namespace="ns", uid="plan")
    status = GangPlanStatus(phase="Waiting", reason="BackingOff", taken_back=3, backing_off_until=written(900.0))
    spec = GangPlanSpec(pod_group_uid="of another group")
    made.cluster.set_plan("ns/g", GangPlan(metadata=meta, spec=spec, status=status))
    made.queue.remember(made.cluster, 100.0)
    assert made.queue._backing_off == {}


def test_a_claim_that_ran_out_while_nobody_led_begins_anew():
    made = Simulated(reservation_seconds=100.0)
    made.add("g", 1, 1)
    meta = ObjectMeta(name="g", namespace="ns", uid="plan")
    status = GangPlanStatus(phase="Waiting", reason="Unschedulable", reserved_since=written(1000.0), reserved_members=2)
    made.cluster.set_plan("ns/g", GangPlan(metadata=meta, status=status))
    for now, claim in ((1090.0, (1000.0, 2)), (1110.0, (None, 0))):
        made.queue.remember(made.cluster, now)
        assert (made.queue.waiting["ns/g"].reserved_at, made.queue.waiting["ns/g"].claimed) == claim


def test_a_plan_whose_end_is_not_written_at_the_first_try_is_backed_off_from_once():
    made = Simulated()
    for plan, until in (("p1", 10.0), ("p1", 10.0), ("p2", 20.0), ("p2", 20.0), ("p3", 40.0)):
        made.queue.back_off("ns/g", 0.0, plan)
        assert made.queue._backing_off["ns/g"][0] == until


def run_of_a_cron_job(made, run, size, *, done, hour=10, name="nightly"):
    job = [OwnerReference(kind="Job", name=f"{name}-{run}", uid=f"job-{run}", controller=True)]
    for i in range(size):
        one = pod(f"r{run}-{i}", "g")
        meta = replace(one.metadata, owner_references=job, creation_timestamp=f"2026-05-0{run}T{hour}:00:00Z")
        ended = [Condition(type="Ready", status="False", last_transition_time=f"2026-05-0{run}T{hour + 1}:00:00Z")]
        status = PodStatus(phase="Succeeded", conditions=ended) if done else PodStatus()
        made.cluster.set_pod(replace(one, metadata=meta, status=status))
    made.dirty.add("ns/g")


def test_what_completed_in_a_former_run_is_no_quorum_of_this_one():
    made = Simulated()
    made.cluster.set_node(node("n", 2))
    made.cluster.groups["ns/g"] = group("g", 4)
    run_of_a_cron_job(made, 1, 4, done=True)
    run_of_a_cron_job(made, 2, 4, done=False)
    assert made.queue.cycle(made.cluster, made.dirty, 1.0).starts == []
    made.cluster.set_node(node("m", 2))
    (start,) = made.queue.cycle(made.cluster, set(), 2.0).starts
    assert len(start.placed) == 4


def test_what_another_role_has_completed_counts_though_this_one_is_made_anew():
    """A driver and a worker, each a Job of its own."""
    made = Simulated()
    made.cluster.set_node(node("n", 1))
    made.cluster.groups["ns/g"] = group("g", 2)
    run_of_a_cron_job(made, 1, 1, done=True, name="driver")
    run_of_a_cron_job(made, 2, 1, done=False, name="worker")
    assert len(made.queue.cycle(made.cluster, made.dirty, 1.0).starts) == 1


def test_what_completed_in_this_run_is_counted_whoever_made_it():
    made = Simulated()
    made.cluster.set_node(node("n", 2))
    made.cluster.groups["ns/g"] = group("g", 4)
    run_of_a_cron_job(made, 1, 2, done=True, hour=10)
    run_of_a_cron_job(made, 2, 2, done=False)
    for name in ("r2-0", "r2-1"):  # made before the others had ended
        one = made.cluster.pods[name]
        made.cluster.set_pod(replace(one, metadata=replace(one.metadata, creation_timestamp="2026-05-01T10:30:00Z")))
    (start,) = made.queue.cycle(made.cluster, made.dirty, 1.0).starts
    assert len(start.placed) == 2


def test_a_plan_that_says_nonsense_stops_nobody():
    made = Simulated()
    made.cluster.set_node(node("n", 3))
    made.add("g", 1, 1)
    made.cycle()
    made.cluster.groups["ns/g"] = replace(
        made.cluster.groups["ns/g"], spec=PodGroupSpec(min_member=1, min_resources={"cpu": "2"})
    )
    plan = made.cluster.plans["ns/g"]
    made.cluster.set_plan("ns/g", replace(plan, spec=replace(plan.spec, began="yesterday")))
    made.add("other", 1, 1)
    assert [s.key for s in made.queue.cycle(made.cluster, {"ns/g", "ns/other"}, 1.0).starts] == ["ns/other"]


def test_a_gang_does_not_evict_its_own_members():
    made = Simulated()
    made.cluster.set_node(node("n", 2))
    made.cluster.groups["ns/g"] = group("g", 3)
    for i in range(2):
        made.cluster.set_pod(pod(f"g-{i}", "g"))
        bind(made, f"g-{i}", "n")
    made.cluster.set_pod(pod("g-head", "g", priority=10))
    assert made.queue.cycle(made.cluster, {"ns/g"}, 1.0).evictions == []


def test_an_open_plan_keeps_its_room_whatever_is_known_first():
    made = Simulated()
    made.cluster.set_node(node("n", 1))
    members = [PlannedMember(name="planned", uid="planned", node="n")]
    spec, meta = GangPlanSpec(plan_id="x", members=members), ObjectMeta(name="g", namespace="ns")
    made.cluster.set_plan("ns/g", GangPlan(metadata=meta, spec=spec, status=GangPlanStatus(phase="Binding")))
    made.cluster.set_pod(pod("planned", "g"))
    made.add("rival", 1, 1)
    made.cycle()
    assert made.running() == []
    assert made.queue.waiting["ns/rival"].reason == "Unschedulable"


def test_a_gang_whose_quorum_makes_room_gets_no_surplus_meanwhile():
    """It would be left alone when the victims have gone: found by the state machine below."""
    gangs = Gangs()
    for what in (
        (1, 2, 0, 4), 1, 1, (1, 1, 0, 1), (1, 1, 0, 1), (1, 2, 0, 2), (1, 1, 0, 1), 1, 1, 2, 2, (2, 3, 5, 3), 3,
    ):  # fmt: skip
        if isinstance(what, int):
            gangs.add_node(cpu=what)
        else:
            cpu, least, priority, size = what
            gangs.add_gang(cpu=cpu, least=least, priority=priority, size=size)
        gangs.holds()
    assert gangs.made.bound("g6")


@lru_cache(maxsize=10_000)
def possible(free: tuple[int, ...], asks: tuple[int, ...]) -> bool:
    """Whether some assignment exists at all."""
    if not asks:
        return True
    return any(
        possible(tuple(sorted((*free[:i], f - asks[0], *free[i + 1 :]))), asks[1:])
        for i, f in enumerate(free)
        if f >= asks[0] and f not in free[:i]
    )


class Gangs(RuleBasedStateMachine):
    """Anything may happen; after each step the invariants hold."""

    def __init__(self) -> None:
        super().__init__()
        self.made = Simulated(reserve_after_seconds=1e9, slot_seconds=0.0)
        self.count = 0
        self.lost: set[str] = set()
        """Gangs that have lost members since they started."""

    @rule(cpu=st.integers(1, 4))
    def add_node(self, cpu: int) -> None:
        self.made.cluster.set_node(node(f"n{len(self.made.cluster.ledger.names)}-{self.count}", cpu))

    @rule(size=st.integers(1, 4), least=st.integers(1, 4), cpu=st.integers(1, 3), priority=st.sampled_from([0, 0, 5]))
    def add_gang(self, size: int, least: int, cpu: int, priority: int) -> None:
        self.count += 1
        self.made.add(f"g{self.count}", size, min(least, size), cpu, priority)

    @precondition(lambda self: self.made.running())
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.made.finish(data.draw(st.sampled_from(self.made.running())))

    @precondition(lambda self: self.made.running())
    @rule(data=st.data())
    def lose_a_member(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.made.running()))
        gone = self.made.bound(name)[0]
        self.made.cluster.remove_pod(gone.metadata.uid)
        self.made.dirty.add(f"ns/{name}")
        self.lost.add(name)

    @precondition(lambda self: self.made.cluster.ledger.names)
    @rule(data=st.data(), cordoned=st.booleans())
    def cordon(self, data: st.DataObject, cordoned: bool) -> None:
        ledger = self.made.cluster.ledger
        one = ledger.node(data.draw(st.sampled_from(ledger.names)))
        assert one is not None
        self.made.cluster.set_node(replace(one, spec=replace(one.spec, unschedulable=cordoned)))

    @invariant()
    def holds(self) -> None:
        self.made.now += 61.0  # every gang is tried again: what waits now, waits with reason
        self.made.cycle()
        cluster = self.made.cluster
        assert (cluster.ledger.free >= 0).all(), "a node is overcommitted"
        for key, one in cluster.groups.items():
            name = key.removeprefix("ns/")
            there = len(self.made.bound(name)) + sum(p.status.phase == "Succeeded" for p in cluster.pods_of(key))
            assert there == 0 or there >= one.spec.min_member or name in self.lost, f"{name} is bound in part"
        ledger, memory = cluster.ledger, self.made.queue.waiting
        good = [row for row, name in enumerate(ledger.names) if not ledger.node(name).spec.unschedulable]  # type: ignore[union-attr]
        free = tuple(sorted(int(ledger.free[row, ledger.columns["cpu"]]) for row in good))
        for key, waiting in memory.items():
            if waiting.reason == "Unschedulable" and waiting.question is not None:
                asks = [dict(m.shape.requests)["cpu"] for m in waiting.question.members[: waiting.question.quorum]]
                assert not possible(free, tuple(asks)), f"{key} waits though it fits"


Gangs.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestGangs = Gangs.TestCase


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"min_member": 0}, "spec.minMember is 0: it must be at least 1"),
        ({"schedule_timeout_seconds": -5}, "spec.scheduleTimeoutSeconds is -5: it must be at least 0"),
        ({"min_resources": {"cpu": "many"}}, "spec.minResources: "),
    ],
)
def test_a_group_that_cannot_be_is_told_which_field(spec, message):
    """The API server's schema refuses most of it; a foreign or older one may not."""
    made = Simulated()
    made.cluster.set_node(node("n", 4))
    made.add("g", 1, 1)
    wrong = made.cluster.groups["ns/g"]
    made.cluster.groups["ns/g"] = replace(wrong, spec=replace(wrong.spec, **spec))
    made.cycle()
    assert made.queue.waiting["ns/g"].reason == "InvalidPodGroup"
    assert made.queue.waiting["ns/g"].message.startswith(message)
    assert made.running() == []


def spark(made, name, executors=0, priority=0, wanted=None):
    """A driver that makes its three executors once it runs; minResources says four CPUs, or what is `wanted`."""
    driver = group(name, 1)
    spec = replace(driver.spec, min_resources=wanted or {"cpu": "4"})
    made.cluster.groups[f"ns/{name}"] = replace(driver, spec=spec)
    for i in range(1 + executors):
        made.cluster.set_pod(pod(f"{name}-{i}", name, 1, priority=priority))
    made.dirty.add(f"ns/{name}")


def drivers(*names):
    made = Simulated(reserve_after_seconds=1e9)
    for i in range(2):
        made.cluster.set_node(node(f"n{i}", 3))
    for name in names:
        spark(made, name)
    made.cycle()
    return made


def test_of_two_drivers_whose_executors_cannot_all_fit_one_runs():
    """Two drivers that both started would each wait for ever for the other's room."""
    made = drivers("a", "b")
    assert made.running() == ["a"]
    spark(made, "a", executors=3)
    made.cycle()
    assert len(made.bound("a")) == 4
    assert made.queue.waiting["ns/b"].message.endswith("blocked by minResources (4 of cpu, 2 free)")
    made.finish("a")
    made.cycle()
    assert made.running() == ["b"]


@pytest.mark.parametrize(
    ("size", "priority", "now", "runs"),
    [
        pytest.param(3, 0, 1.0, False, id="three pods would take an executor's room"),
        pytest.param(2, 0, 1.0, True, id="two pods leave it"),
        pytest.param(3, 9, 1.0, True, id="a more important gang need not leave it"),
        pytest.param(3, 0, 601.0, True, id="the reservation is over"),
    ],
)
def test_what_a_driver_is_owed_is_left_free(size, priority, now, runs):
    made = drivers("a")
    made.now = now
    made.add("other", size, size, priority=priority)
    made.cycle()
    assert ("other" in made.running()) == runs
    if not runs:
        text = made.queue.waiting["ns/other"].message
        assert text == "2 of 3 members fit; blocked by what others are owed of their minResources"
        made.now = 601.0
        made.cycle()
        assert "other" in made.running(), "nothing but the clock has changed"


def test_two_drivers_that_are_owed_more_than_is_left_do_not_wait_for_each_other():
    """A node is lost while both drivers wait for their executors: the earlier one's fit, so they start."""
    made = Simulated(reserve_after_seconds=1e9)
    for i in range(3):
        made.cluster.set_node(node(f"n{i}", 3))
    spark(made, "a")
    made.cycle()
    made.now = 1.0
    spark(made, "b")
    made.cycle()
    assert made.running() == ["a", "b"]
    on = {p.spec.node_name for p in made.cluster.pods.values()}
    made.cluster.remove_node(next(n for n in ("n2", "n1", "n0") if n not in on))
    for name in ("b", "a"):
        spark(made, name, executors=3)
    made.cycle()
    assert len(made.bound("a")) == 4
    assert made.queue.waiting["ns/b"].reason == "SurplusWaits"


def test_a_driver_that_would_take_what_another_is_owed_is_not_told_that_too_little_is_free():
    """Of six CPUs a is owed four of which it has one: five are free, and two are for b, which asks for three."""
    made = drivers("a")
    spark(made, "b", wanted={"cpu": "3"})
    made.cycle()
    assert made.running() == ["a"]
    text = made.queue.waiting["ns/b"].message
    assert text.endswith("blocked by what others are owed of their minResources")


def test_what_is_owed_counts_also_where_only_later_members_take_it():
    """Drivers ask for CPUs, their executors for memory: two drivers that both started would wait for ever."""
    made = Simulated(reserve_after_seconds=1e9)
    made.cluster.set_node(node("n", 8))
    for name in ("a", "b"):
        spark(made, name, wanted={"cpu": "2", "memory": "5Gi"})
    made.cycle()
    assert made.running() == ["a"]


def pinned(made, name, on):
    for one in made.cluster.pods_of(f"ns/{name}"):
        made.cluster.set_pod(replace(one, spec=replace(one.spec, node_selector={"kubernetes.io/hostname": on})))


def test_what_is_owed_holds_up_only_gangs_that_could_take_it():
    made = Simulated(reserve_after_seconds=1e9)
    for i in range(2):
        made.cluster.set_node(node(f"n{i}", 3))
    spark(made, "a", wanted={"cpu": "3"})
    pinned(made, "a", "n0")
    made.cycle()
    made.add("elsewhere", 3, 3)
    pinned(made, "elsewhere", "n1")
    made.add("here", 1, 1)
    pinned(made, "here", "n0")
    made.cycle()
    assert made.running() == ["a", "elsewhere"]


def test_a_gang_that_is_put_off_is_passed_by_for_now():
    made = Simulated()
    made.cluster.set_node(node("n", 2))
    for name in ("first", "second"):
        made.add(name, 1, 1)
    decided = made.queue.cycle(made.cluster, made.dirty, 0.0, {"ns/first"})
    assert [start.key for start in decided.starts] == ["ns/second"]
    assert [start.key for start in made.queue.cycle(made.cluster, set(), 0.0).starts] == ["ns/first"]


def test_nobody_is_evicted_for_members_that_do_not_exist_yet():
    made = Simulated(reserve_after_seconds=1e9)
    made.cluster.set_node(node("n", 5))
    made.add("low", 1, 1)
    spark(made, "a", priority=10)
    made.cycle()
    assert made.running() == ["a", "low"]
    made.add("other", 1, 1, priority=10)
    made.cycle()
    assert made.running() == ["a", "low"]
    assert made.queue.waiting["ns/other"].reason == "Unschedulable"


def test_a_gang_that_what_is_owed_keeps_waiting_can_still_be_the_head():
    made = drivers("a")
    made.queue.settings = Settings(reserve_after_seconds=0.0)
    made.now = 1.0
    made.add("whole", 6, 6)
    made.cycle()
    made.finish("a")
    made.cycle()
    assert made.running() == ["whole"]


def test_a_driver_that_is_submitted_again_is_owed_its_room_from_its_new_start():
    made = drivers("a")
    made.finish("a")
    made.now = 5000.0
    made.cycle()
    made.cluster.set_pod(pod("a-again", "a", 1))
    made.dirty.add("ns/a")
    spark(made, "b")
    decided = made.queue.cycle(made.cluster, made.dirty, made.now)
    assert [start.key for start in decided.starts] == ["ns/a"], "b would take its executors' room in the same cycle"


def test_a_pod_alone_leaves_what_a_driver_is_owed():
    made = drivers("a")
    for i in range(4):
        made.cluster.set_pod(pod(f"single-{i}", "", 1))
        made.dirty.add(f"ns/pod:single-{i}")
    made.cycle()
    assert sum(bool(p.spec.node_name) for p in made.cluster.pods.values() if p.metadata.name.startswith("single")) == 2


def test_a_gang_that_cannot_be_decided_does_not_stop_the_others(monkeypatch):
    made = Simulated()
    made.cluster.set_node(node("n", 4))
    made.add("good", 1, 1)
    made.add("bad", 1, 1)
    decide = Queue._room

    def broken(self, cluster, gang, *rest):
        if gang.members[0].name.startswith("bad"):
            raise ZeroDivisionError("a defect")
        return decide(self, cluster, gang, *rest)

    monkeypatch.setattr(Queue, "_room", broken)
    decided = made.queue.cycle(made.cluster, made.dirty, 0.0)
    assert [start.key for start in decided.starts] == ["ns/good"]
    assert [key for key, _ in decided.failures] == ["ns/bad"]
    assert made.queue.waiting["ns/bad"].reason == "InternalError"


def test_surplus_on_another_node_than_was_thought_of_first_goes():
    """Which member is surplus depends on where the gang would go; one without an owner keeps its gang whole."""
    made = Simulated(reserve_after_seconds=1e9)
    for name, cpus, cordoned in (("n0", 1, True), ("n1", 2, False), ("n2", 1, True)):
        made.cluster.set_node(node(name, cpus, cordoned=cordoned))
    made.cluster.groups["ns/g"] = group("g", 2)
    for i in range(3):
        one = pod(f"g-{i}", "g", on=f"n{i}")
        owners = one.metadata.owner_references if i < 2 else []
        made.cluster.set_pod(replace(one, metadata=replace(one.metadata, owner_references=owners)))
    made.cluster.set_pod(pod("alone", on="n1"))
    made.add("vip", 1, 1, priority=10)
    made.cycle()
    assert [p.spec.node_name for p in made.bound("vip")] == ["n1"]
    assert sorted(p.metadata.name for p in made.bound("g")) == ["g-0", "g-2"]


def test_a_new_leader_goes_on_with_back_offs_and_the_claim_of_the_head():
    """What it knows of them stands in the plans."""
    old = Simulated(reserve_after_seconds=5.0, reservation_seconds=100.0)
    old.now = 1_000_000.0
    for name in ("n0", "n1"):
        old.cluster.set_node(node(name, 4))
    old.add("runs", 1, 1, cpu=4)
    old.cycle()
    old.add("head", 2, 2, cpu=4)
    old.add("taken-back", 3, 3, cpu=4)
    old.cycle()
    for _ in range(2):
        old.queue.back_off("ns/taken-back", old.now)
    old.now += 6.0
    old.dirty |= {"ns/head", "ns/taken-back"}
    old.cycle()
    waiting, resting = replace(old.queue.waiting["ns/head"], claimed=1), old.queue._backing_off
    old.queue.waiting["ns/head"] = waiting
    assert (waiting.reserved_at, resting) == (old.now, {"ns/taken-back": (old.now + 14.0, 2)})

    new = Simulated(reserve_after_seconds=5.0, reservation_seconds=100.0)
    for name in ("head", "taken-back"):
        told = old.queue.waiting[f"ns/{name}"]
        status = GangPlanStatus(phase="Waiting", reason=told.reason, waiting_since=written(told.since))
        meta = ObjectMeta(name=name, namespace="ns", uid=name)
        status = old.queue.in_plan(old.cluster, f"ns/{name}", status)
        old.cluster.set_plan(f"ns/{name}", GangPlan(metadata=meta, status=status))
    new.cluster, new.now = old.cluster, old.now + 3.0
    new.queue.remember(new.cluster, new.now)
    kept = new.queue.waiting["ns/head"]
    assert (kept.since, kept.reserved_at, kept.claimed) == (waiting.since, waiting.reserved_at, waiting.claimed)
    assert new.queue._backing_off == resting
