"""The law of all cards of a node: from who is on them to what is asked of the freeze law."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colocate.calibration import Calibration
from colocate.decide.card_memory import CardMemory, Suspended
from colocate.decide.cards import CardsState, decide_cards
from colocate.decide.gpu import CardState, ServiceState
from colocate.decide.law import View
from colocate.decide.pipeline import LawState, laws_from_builtins, laws_to_builtins
from colocate.model.forecast import Forecast
from colocate.policy.schema import GpuPolicy, PolicySpec
from colocate.snapshot import Card, CardUser, Latency, NodeSnapshot, Objective, Workload

BOUNDS = (0.02, 0.05, 0.1, 0.2)
SHORT, LONG = ((1.0, 0.003),) * 5, ((1.0, 0.9),) * 5


class Node:
    """Cards, who is on them, and the law from tick to tick."""

    def __init__(self, spec=None, *, slo=("web",), sensor="cpu"):
        self.spec, self.state, self.at = spec or PolicySpec(), CardsState(), 100.0
        self.counts = dict.fromkeys(slo, (0.0,) * 5)
        self.services, self.sensor = dict.fromkeys(slo, "GPU-0"), sensor
        self.jobs, self.frozen, self.more = {}, set(), {}
        self.card, self.gangs = {}, {}
        self.stale = 0.0
        self.target, self.bounds = 0.1, BOUNDS

    def ask(self, name="web", fast=20, late=0):
        new = [0, fast, 0, late, 0]
        total = 0.0
        each = [b - a for a, b in zip((0.0, *self.counts[name]), self.counts[name], strict=False)]
        counts = []
        for have, more in zip(each, new, strict=True):
            total += have + more
            counts.append(total)
        self.counts[name] = tuple(counts)

    def tick(self, seconds=1.0, fast=20, late=0):
        self.at += seconds
        for name in self.counts:
            self.ask(name, fast, late)
        workloads: dict[str, Workload] = {}
        users: dict[str, dict[str, CardUser]] = {}
        for name, uuid in self.services.items():
            workloads[name] = Workload(id=name, name=name, tier="service", path=f"/{name}")
            if name in self.counts:
                latency, objective = (
                    Latency(self.bounds, self.counts[name], self.at),
                    Objective(p99_seconds=self.target),
                )
                workloads[name] = msgspec.structs.replace(workloads[name], objective=objective, latency=latency)
            users.setdefault(uuid, {})[name] = CardUser(
                sensor=self.sensor, sensor_problem="" if self.sensor else "none"
            )
        for name, cards in self.jobs.items():
            frozen = name in self.frozen
            gang = self.gangs.get(name, "")
            workloads[name] = Workload(id=name, name=name, tier="batch", path=f"/{name}", frozen=frozen, gang=gang)
            for uuid, user in cards.items():
                users.setdefault(uuid, {})[name] = user
        cards = {
            uuid: Card(uuid=uuid, at_seconds=self.at - self.stale, users=found, **self.card)
            for uuid, found in users.items()
        }
        snapshot = NodeSnapshot(
            sequence=1, time_seconds=self.at, monotonic_seconds=self.at, cgroup_version=2, cpus=(0,), cores=((0,),),
            memory_bytes=1, workloads=workloads, cards=cards,
        )  # fmt: skip
        forecast = Forecast(interval_seconds=1.0)
        found = decide_cards(View(snapshot, forecast, self.spec, Calibration()), self.state)
        self.state = found.state
        self.frozen = {r.workload for r in found.requests if r.verb == "freeze"}
        return found

    def run(self, ticks, **asked):
        for _ in range(ticks):
            found = self.tick(**asked)
        return found

    def job(self, name="a", uuid="GPU-0", drains=SHORT, **user):
        self.jobs.setdefault(name, {})[uuid] = CardUser(drains=drains, percent=user.pop("percent", 50), **user)


def of(found, uuid="GPU-0"):
    [verdict] = [v for v in (found.verdict, *found.also) if v.subject == uuid and v.law == "gpu"]
    return verdict.state, verdict.reason


def gated():
    node = Node()
    node.run(10)
    node.job()
    node.run(3)
    return node


def test_a_service_with_room_gates_a_job_that_stops_soon():
    node = gated()
    found = node.tick()
    assert of(found) == ("gate", "Gate")
    [request] = found.requests
    assert (request.verb, request.workload, request.pulse.mode, request.pulse.services) == (
        "pulse",
        "a",
        "gate",
        ("web",),
    )


def test_a_job_that_comes_while_a_violation_is_held_down_does_not_run():
    node = gated()
    assert of(node.tick(fast=0, late=100)) == ("off", "Violated")
    node.jobs.clear()
    node.run(2)
    node.job("b")
    assert of(node.tick()) == ("off", "HeldDown")


def test_what_was_not_ours_beside_one_job_says_nothing_of_the_next():
    """A service that is slow by itself; its job goes, and another comes once it is well again."""
    node = gated()
    node.run(60, fast=0, late=20)
    assert node.state.cards["GPU-0"].not_ours
    node.jobs.clear()
    node.run(30)
    node.job("b")
    modes = [of(node.tick(fast=0, late=20)) for _ in range(20)]
    assert ("off", "Violated") in modes, "it is stopped for what comes of it"
    assert not [m for m in modes if m[0] == "open"]


def test_a_job_on_its_way_out_is_not_stopped_so_nothing_is_concluded_of_it():
    node = gated()
    node.tick(fast=0, late=100)
    for _ in range(30):  # it is thawed to end, and makes the service late until it has
        node.frozen = set()
        found = node.tick(fast=0, late=20)
        node.frozen = set()
        assert of(found)[1] in ("Violated", "HeldDown")


def test_a_driver_that_is_silent_changes_nothing_that_was_decided():
    spec = PolicySpec(gpu=GpuPolicy(modes=("dial",)))
    node = Node(spec)
    node.bounds = (0.9, 1.0, 1.3, 2.0)
    node.target = 1.3
    node.run(10)
    node.job()
    found = node.run(5)
    assert of(found)[0] == "dial"
    before = found.requests[0].pulse
    node.stale = 15.0
    found = node.tick()
    assert of(found) == ("dial", "CardLost")
    assert found.requests[0].pulse == before
    assert before.period_seconds > 0.0


def test_a_card_that_is_not_read_for_a_while_is_remembered():
    node = gated()
    alone = node.state.cards["GPU-0"].services["web"].alone
    node.services["web"], node.jobs = "GPU-1", {}
    node.tick()
    assert node.state.cards["GPU-0"].services["web"].alone == alone


@pytest.mark.parametrize(
    ("drains", "expected"),
    [
        pytest.param((), ("probe", "Learning"), id="how long batch goes on is seen first"),
        pytest.param(SHORT, ("gate", "NoObjective"), id="it stops soon: it runs while all are idle"),
        pytest.param(LONG, ("off", "NoObjective"), id="a request that meets it would lose a second"),
    ],
)
def test_a_service_without_an_slo_alone_on_its_card(drains, expected):
    node = Node(slo=())
    node.services["db"] = "GPU-0"
    node.job(drains=drains)
    assert of(node.tick()) == expected


@pytest.mark.parametrize("slo", [pytest.param(("web",), id="with an SLO"), pytest.param((), id="without one")])
@pytest.mark.parametrize(
    ("long", "expected"),
    [
        pytest.param({2}, "gate", id="one look was mistaken"),
        pytest.param(set(range(2, 24, 8)), "off", id="it really goes on for long now and then"),
    ],
)
def test_one_long_drain_among_short_ones_is_looked_into(slo, long, expected):
    """For a job that is kept off is evicted soon."""
    node = Node(slo=slo)
    node.services = {"web": "GPU-0"}
    node.run(10)
    drains: list[tuple[float, float]] = []
    for _ in range(40):
        node.job(drains=tuple(drains))
        mode, _ = of(node.tick(0.25))
        if mode == "probe":
            drains.append((node.at, 0.9 if len(drains) in long else 0.003))
    assert mode == expected
    assert 15 <= len(drains) <= 24


def test_a_service_without_an_slo_takes_nothing_from_one_that_has_one():
    node = gated()
    node.tick(fast=0, late=100)
    node.services["db"] = "GPU-0"
    assert of(node.tick()) == ("off", "HeldDown")


def test_a_service_without_an_slo_that_is_not_seen_keeps_batch_off():
    node = Node(slo=(), sensor="")
    node.services["db"] = "GPU-0"
    node.job()
    assert of(node.tick()) == ("off", "NoObjective")


def test_on_a_card_without_counters_a_second_is_taken_for_granted():
    node = Node()
    node.card = {"counted": False}
    node.run(10)
    node.job(drains=())
    assert of(node.run(3)) == ("off", "CannotProtect")
    generous = Node()
    generous.card, generous.target, generous.bounds = {"counted": False}, 5.0, (0.02, 2.0, 5.0, 9.0)
    generous.spec = PolicySpec(gpu=GpuPolicy(modes=("gate",)))
    generous.run(10)
    generous.job(drains=())
    assert of(generous.run(3)) == ("gate", "Gate")


def test_time_in_which_nobody_looked_is_no_time_alone():
    node = gated()
    before = node.state.cards["GPU-0"].services["web"].alone
    for _ in range(60):  # `evaluate` has batch run freely
        node.ask(fast=0, late=20)
    node.at += 60.0
    found = node.run(5)
    assert of(found)[1] in ("Gate", "Learning")
    after = node.state.cards["GPU-0"].services["web"].alone
    assert after[2] == after[-1], "no late request is taken for its own"
    assert before[-1] > 0


@pytest.mark.parametrize(
    ("percent", "starves"),
    [
        pytest.param(0, True, id="nothing"),
        pytest.param(None, False, id="not told"),
        pytest.param(2, False, id="enough"),
    ],
)
def test_27_a_job_that_gets_nothing_goes_elsewhere(percent, starves):
    node = gated()
    node.jobs.clear()
    node.job(percent=percent)
    found = node.run(620)
    assert ("Starved" in {r.reason for r in found.requests}) is starves
    if starves:
        assert "Starved" in {r.reason for r in node.tick().requests}, "as long as it is there"


def test_a_job_that_works_on_one_of_its_cards_does_not_starve():
    node = Node()
    node.services["other"], node.counts["other"] = "GPU-1", (0.0,) * 5
    node.run(10)
    node.job(percent=90)
    node.job(uuid="GPU-1", percent=0)
    assert "Starved" not in {r.reason for r in node.run(620).requests}


def test_19_a_job_on_two_cards_obeys_both():
    node = Node()
    node.services["other"], node.counts["other"] = "GPU-1", (0.0,) * 5
    node.run(10)
    node.job()
    node.job(uuid="GPU-1", drains=LONG)
    found = node.run(5)
    assert (of(found), of(found, "GPU-1")) == (("gate", "Gate"), ("off", "CannotProtect"))
    assert {(r.verb, r.reason) for r in found.requests} == {("pulse", "Gate"), ("freeze", "CannotProtect")}


def test_28_the_members_of_a_gang_on_a_node_are_stopped_together():
    node = Node()
    node.run(10)
    node.gangs = {"a": "ml/train", "b": "ml/train"}
    node.job("a")
    node.job("b", uuid="GPU-1")  # alone on its card
    node.job("c", uuid="GPU-1")  # of no gang
    found = node.run(5)
    pulses = {r.workload: r.pulse for r in found.requests if r.verb == "pulse"}
    assert set(pulses) == {"a", "b"}
    assert pulses["a"] == pulses["b"]
    assert node.tick(fast=0, late=100).verdict.reason == "Violated"
    assert node.frozen == {"a", "b"}


def test_a_divided_card_is_let_be():
    node = Node()
    node.card = {"mig": True, "memory_bytes": 1 << 30, "memory_used_bytes": 1 << 30}
    node.run(10)
    node.job(memory_bytes=1 << 29)
    found = node.tick()
    assert (of(found), found.requests) == (("open", "Unsupported"), [])


def test_other_buckets_are_another_histogram():
    node = gated()
    node.bounds = (0.2, 0.5, 1.0, 2.0)
    found = node.tick()
    assert of(found) == ("off", "Learning")


def test_14_of_who_was_taken_off_a_card_and_has_ended_since_nothing_is_asked():
    """Card and workloads are read one after the other, and a job may be evicted in between."""
    node = gated()
    away = {"gone": Suspended(1 << 30, node.at)}
    memory = {"GPU-0": CardMemory(at=node.at, suspended=away)}
    node.state = msgspec.structs.replace(node.state, memory=memory)
    node.card = {"suspended": {"gone": "its worker ended"}}
    found = node.tick()
    assert {r.workload for r in found.requests} == {"a"}
    assert node.state.memory["GPU-0"].suspended.keys() == {"gone"}, "it may be there again: readings are of two times"


def test_24_who_brought_them_together_does_not_matter():
    """Whatever made a pod share: it is the card's UUID that says it."""
    node = Node()
    node.run(10)
    for name in ("replica", "claim", "hami", "plain"):
        node.job(name)
    found = node.run(3)
    assert {r.workload for r in found.requests if r.verb == "pulse"} == {"replica", "claim", "hami", "plain"}


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from(["ask", "late", "idle", "come", "go", "stale", "gap", "none"]), st.integers(1, 15)),
        min_size=1,
        max_size=12,
    )
)
def test_31_whatever_happens_its_memory_can_be_written_down_and_read_again(steps):
    node = Node()
    for what, ticks in steps:
        node.stale = 15.0 if what == "stale" else 0.0
        if what == "come":
            node.job(f"j{ticks % 3}", drains=(SHORT, LONG, ())[ticks % 3])
        elif what == "go":
            node.jobs.clear()
        elif what == "gap":
            node.at += 100.0
        late = 20 if what == "late" else 0
        found = node.run(ticks, fast=0 if what in ("late", "idle") else 20, late=late)
        state = LawState(gpu=node.state)
        again = laws_from_builtins(msgspec.json.decode(msgspec.json.encode(laws_to_builtins(state))), "test")
        assert again.gpu == node.state
        for request in found.requests:
            if request.pulse is not None and request.pulse.mode == "dial":
                assert 0.0 < request.pulse.on_seconds <= request.pulse.period_seconds
        mode, reason = of(found) if found.verdict.subject else ("", "")
        if mode == "open" and "a" in node.jobs:
            assert reason in ("Open", "NothingShared")
    assert isinstance(node.state.cards["GPU-0"], CardState)
    assert all(isinstance(s, ServiceState) for s in node.state.cards["GPU-0"].services.values())


@pytest.mark.parametrize(
    ("listed", "card", "expected"),
    [
        pytest.param((), {}, "freeze", id="no driver is on the list"),
        pytest.param(("580.*",), {}, "lock", id="this one is"),
        pytest.param(("570.*",), {}, "freeze", id="another one is"),
        pytest.param(("580.*",), {"mps": True}, "freeze", id="MPS and locks do not go together"),
        pytest.param(("580.*",), {"struck": "it hung"}, "freeze", id="it failed in this boot"),
    ],
)
def test_who_stops_a_job_is_the_policys_and_the_drivers_to_say(listed, card, expected):
    node = Node(PolicySpec(gpu=GpuPolicy(lock_drivers=listed)))
    node.card = {"driver": "580.159.04", **card}
    node.run(10)
    node.job()
    found = node.run(4)
    [request] = found.requests
    assert (request.verb, request.pulse.by) == ("pulse", expected)


def test_28_a_gangs_member_is_refused_a_shared_card_where_the_policy_says_so():
    refused = {("evict", "a", "GangRefused")}
    for policy, expected in ((GpuPolicy(), set()), (GpuPolicy(gangs="refused"), refused)):
        node = Node(PolicySpec(gpu=policy))
        node.run(10)
        node.job()
        node.job("b")
        node.gangs = {"a": "pods/ml/train"}
        found = node.run(3)
        assert {(r.verb, r.workload, r.reason) for r in found.requests if r.verb == "evict"} == expected


@pytest.mark.parametrize(
    ("on", "expected", "by"),
    [
        pytest.param(False, ("open", "Unsupported"), [], id="only watched"),
        pytest.param(True, ("gate", "Gate"), ["suspend"], id="its queues are suspended, however long its kernels are"),
    ],
)
def test_29_batch_on_amds_gpus_is_preempted_where_the_policy_says_so(on, expected, by):
    node = Node(PolicySpec(gpu=GpuPolicy(suspend_queues=on)))
    node.card = {"preempts": True, "counted": False}
    node.run(10)
    node.job(drains=())
    found = node.run(4)
    assert of(found) == expected
    assert [r.pulse.by for r in found.requests] == by
