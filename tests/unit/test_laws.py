"""The laws of CPU, BestEffort, memory, freeze and eviction, tick by tick."""

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colocate.decide import besteffort
from colocate.decide.cpu import CpuState, chosen_cpus, decide_cpu, guard_rail_cores
from colocate.decide.eviction import EvictionState, decide_eviction
from colocate.decide.freeze import FreezeState, decide_freeze
from colocate.decide.memory import MemoryState, allowance_bytes, decide_memory, least_loss
from colocate.decide.pipeline import OFF_UNMANAGED, LawState, decide, order
from colocate.model.forecast import WorkloadForecast
from colocate.plan import Action, Request
from colocate.calibration import Calibration
from colocate.policy.schema import CpuPolicy, PolicySpec
from colocate.units import cores_of_cpu_max, cpu_max, format_cpulist
from tests import make
from tests.make import GIB, SPEC

replace = msgspec.structs.replace


class Node:
    """Steps the CPU law and remembers its state."""

    def __init__(self, spec=SPEC, calibration=None, cores=((0,), (1,))):
        self.state, self.spec, self.calibration = CpuState(), spec, calibration or Calibration()
        self.cores, self.now = cores, 100.0

    def tick(self, evidence=None, seconds=1.0, **figures):
        self.now += seconds
        cpus = tuple(c for core in self.cores for c in core)
        workloads = {"service:web": evidence or WorkloadForecast()}
        services = [make.service(objective=make.OBJECTIVE)] if evidence is not None else []
        if evidence is None:
            workloads = {}
        if "besteffort_waiting_ratio" in figures:
            services.append(make.besteffort())
            workloads["besteffort"] = WorkloadForecast()
        now = make.snapshot(*services, at=self.now, cpus=cpus, cores=self.cores)
        seen = make.forecast(workloads, node_cores=float(len(cpus)), **figures)
        decision = decide_cpu(now, seen, self.spec, self.calibration, self.state)
        self.state = decision.state
        self.knobs = {a.knob: a.value for a in decision.actions}
        self.decision = decision
        return decision.verdict.reason

    @property
    def grant(self):
        return cores_of_cpu_max(self.knobs["cpu.max"])


def test_without_evidence_only_the_class_is_written():
    node = Node()
    assert node.tick() == "NoServices"
    assert node.knobs == {"cpu.idle": "0", "cpu.weight": "1", "cpu.max": "max 100000", "cpuset.cpus": "0-1"}


def test_the_calibrated_lever_replaces_the_weight():
    node = Node(calibration=Calibration(lever="idle"))
    node.tick()
    assert node.knobs["cpu.idle"] == "1"
    assert "cpu.weight" not in node.knobs


def test_a_violation_puts_batch_to_its_floor_in_the_same_tick():
    node = Node()
    assert node.tick(make.latency_evidence(-0.1)) == "SlackNegative"
    assert node.grant == SPEC.cpu.floor


def test_a_violation_while_batch_does_not_run_is_not_its_fault():
    node = Node()
    assert node.tick(make.latency_evidence(-0.5), batch_cores=0.0) == "BatchIdle"
    assert node.grant is None


def held(node, slack=0.3, ticks=1):
    return [node.tick(make.latency_evidence(slack)) for _ in range(ticks)]


def test_a_rung_replaces_the_floor_only_after_enough_ticks_and_requests():
    node = Node()
    node.tick(make.latency_evidence(-0.1))
    assert held(node, ticks=3)[-1] == "Trial"
    assert node.knobs["cpuset.cpus"] == "1"
    assert node.grant is None
    assert node.tick(make.latency_evidence(0.3, 50)) == "Trial"
    assert held(node, ticks=2) == ["Trial", "TrialHeld"]


def test_too_few_requests_keep_a_trial_open():
    node = Node()
    node.tick(make.latency_evidence(-0.1))
    held(node, ticks=3)
    assert {node.tick(make.latency_evidence(0.3, 10)) for _ in range(8)} == {"Trial"}


def test_a_rung_that_does_not_hold_gives_way_to_the_next():
    node = Node()
    node.tick(make.latency_evidence(-0.1))
    held(node, ticks=3)
    assert node.tick(make.latency_evidence(-0.2)) == "SlackNegative"
    assert node.grant == SPEC.cpu.floor
    held(node, ticks=3)
    assert node.grant == pytest.approx(0.6)
    assert node.knobs["cpuset.cpus"] == "0-1"


def test_the_last_rung_asks_for_a_freeze():
    node = Node(calibration=Calibration(rungs=("freeze",)))
    node.tick(make.latency_evidence(-0.1))
    held(node, ticks=4)
    assert node.state.freeze


def test_below_ten_percent_slack_nothing_grows_and_above_twenty_it_does():
    node = Node(calibration=Calibration(rungs=("quota",)))
    node.tick(make.latency_evidence(-0.1))
    held(node, ticks=8)
    node.now += 20
    before = node.grant
    assert node.tick(make.latency_evidence(0.05)) == "HoldGrant"
    assert node.tick(make.latency_evidence(0.15)) == "HoldGrant"
    assert node.grant == before
    assert node.tick(make.latency_evidence(0.25)) == "SlackAmple"
    assert node.grant == pytest.approx(before + 0.2)
    assert node.tick(make.latency_evidence(0.15)) == "SlackAmple", "once growing it goes on down to ten"
    assert node.tick(make.latency_evidence(0.05)) == "HoldGrant"
    assert node.tick(make.latency_evidence(0.15)) == "HoldGrant"


def test_a_healthy_service_gets_the_tier_open_again():
    node = Node()
    node.tick(make.latency_evidence(-0.1))
    held(node, ticks=60)
    assert node.state.mode == "open"
    assert node.grant is None
    assert node.knobs["cpuset.cpus"] == "0-1"


def test_each_new_violation_holds_twice_as_long():
    node = Node(calibration=Calibration(rungs=("quota",)))
    node.tick(make.latency_evidence(-0.1))
    first = node.state.hold_seconds
    held(node, ticks=9)
    node.tick(make.latency_evidence(-0.1))
    assert node.state.hold_seconds == 2 * first


def test_waiting_that_does_not_fall_at_the_floor_was_not_caused_by_batch():
    node = Node()
    assert node.tick(make.waiting_evidence(0.4)) == "SlackNegative"
    reasons = [node.tick(make.waiting_evidence(0.4)) for _ in range(4)]
    assert "NotCausedByBatch" in reasons
    assert node.grant is None
    assert node.tick(make.waiting_evidence(0.4)) == "NotCausedByBatch"


def test_waiting_that_falls_at_the_floor_was():
    node = Node()
    node.tick(make.waiting_evidence(0.4))
    assert node.tick(make.waiting_evidence(0.25)) == "FloorInForce"
    assert node.tick(make.waiting_evidence(0.1)) == "FloorInForce"
    assert node.tick(make.waiting_evidence(0.05)) == "Trial"


def test_what_a_service_waits_by_itself_does_not_keep_batch_at_its_floor():
    node = Node()
    assert node.tick(make.waiting_evidence(0.7)) == "SlackNegative"
    reasons = [node.tick(make.waiting_evidence(0.4)) for _ in range(3)]
    assert reasons == ["FloorInForce", "FloorInForce", "OwnWaiting"]
    assert node.tick(make.waiting_evidence(0.4)) == "Trial", "batch added 30 %"
    assert [node.tick(make.waiting_evidence(0.5)) for _ in range(3)][-1] == "TrialHeld"
    assert node.tick(make.waiting_evidence(0.7)) == "SlackNegative"


def test_what_a_service_waits_while_batch_does_not_run_is_learnt_before_batch_comes():
    node = Node()
    reasons = [node.tick(make.waiting_evidence(0.4), batch_cores=0.0) for _ in range(3)]
    assert reasons == ["BatchIdle", "BatchIdle", "OwnWaiting"]
    assert node.tick(make.waiting_evidence(0.5)) == "SlackEnough"
    assert node.tick(make.waiting_evidence(0.7)) == "SlackNegative"


def test_what_was_learnt_of_a_services_own_waiting_is_asked_anew_after_a_while():
    """While batch runs it cannot be told how much of the waiting is still the service's own."""
    node = Node()
    for _ in range(3):
        node.tick(make.waiting_evidence(0.5), batch_cores=0.0)
    assert node.tick(make.waiting_evidence(0.65)) == "SlackEnough"
    node.now += 600.0
    assert node.tick(make.waiting_evidence(0.65)) == "SlackNegative"


def test_the_floor_is_no_question_where_another_services_latency_is_a_reason_too():
    node, both = Node(), (make.service(), make.service("db", objective=make.OBJECTIVE))

    def tick(web, db):
        node.now += 1
        now = make.snapshot(*both, at=node.now)
        seen = make.forecast({"service:web": make.waiting_evidence(web), "service:db": make.latency_evidence(db)})
        found = decide_cpu(now, seen, SPEC, Calibration(), node.state)
        node.state = found.state
        return found.verdict.reason

    assert tick(0.35, -0.2) == "SlackNegative"
    assert [tick(0.2, 0.5) for _ in range(4)][-1] == "Trial", "though batch added 15 %"


def test_nothing_is_learnt_while_an_evaluation_leaves_batch_unmanaged():
    now = make.snapshot(make.service(objective=make.OBJECTIVE))
    seen = make.forecast({"service:web": make.latency_evidence(-0.5)})
    assert decide(now, seen, SPEC, Calibration(), LawState())[0].cpu.mode == "floor"
    assert decide(now, seen, SPEC, Calibration(), LawState(), OFF_UNMANAGED)[0].cpu == CpuState()


def test_unmanaged_batch_may_run_on_all_cpus_but_a_job_keeps_what_it_asked_for():
    narrow = {**make.OPEN_KNOBS, "cpuset.cpus": "1", "cpu.max": "50000 100000"}
    job = make.job(requested_cores=0.5, knobs={**make.OPEN_KNOBS, "cpu.max": "20000 100000"})
    now = make.snapshot(job, tier=make.tier(knobs=narrow))
    below = besteffort.BestEffortState(mode="elsewhere", cpus=(1,), ticks=7, until=1e9)
    state = LawState(cpu=CpuState(besteffort=below))
    after, plan = decide(now, make.forecast({job.id: WorkloadForecast()}), SPEC, Calibration(), state, OFF_UNMANAGED)
    values = {(a.workload, a.knob): a.value for a in plan.actions}
    assert values["tier", "cpuset.cpus"] == "0-1"
    assert values["tier", "cpu.max"] == "max 100000"
    assert values["job:train", "cpu.max"] == "50000 100000"
    assert after.cpu.besteffort == replace(below, ticks=0), "where the tier is now does not count against it"


def test_a_large_floor_is_not_taken_for_idleness():
    node = Node(spec=PolicySpec(cpu=CpuPolicy(floor=1.0)))
    assert node.tick(make.latency_evidence(-3.0), batch_cores=1.9) == "SlackNegative"


def test_what_a_service_waits_before_batch_comes_is_learnt_though_it_is_little():
    node = Node()
    for _ in range(3):
        assert node.tick(make.waiting_evidence(0.12), batch_cores=0.0) == "SlackEnough"
    assert node.state.own_waiting == {"web": 0.12}
    assert node.tick(make.waiting_evidence(0.3)) == "SlackEnough", "batch adds 18 %"
    assert node.tick(make.waiting_evidence(0.35)) == "SlackNegative"


@pytest.mark.parametrize(
    ("before", "at_floor", "expected"),
    [
        pytest.param(0.3, 0.15, "BatchAddsLittle", id="batch added 15 % to a service that waits little by itself"),
        pytest.param(0.5, 0.35, "BatchAddsLittle", id="batch added 15 % to a service that waits too much by itself"),
        pytest.param(0.3, 0.05, "Trial", id="batch added 25 %"),
    ],
)
def test_the_floor_first_asks_what_batch_added(before: float, at_floor: float, expected: str) -> None:
    node = Node()
    assert node.tick(make.waiting_evidence(before)) == "SlackNegative"
    reasons = [node.tick(make.waiting_evidence(at_floor)) for _ in range(4)]
    assert expected in reasons
    if expected == "BatchAddsLittle":
        assert node.state.mode == "open"
        assert node.tick(make.waiting_evidence(before)) == "SlackEnough", "what was learnt holds"
        assert node.tick(make.waiting_evidence(at_floor + 0.21)) == "SlackNegative"


def test_waiting_that_was_a_services_own_is_forgotten_as_its_load_falls():
    node = Node()
    node.tick(make.waiting_evidence(0.7))
    for _ in range(4):
        node.tick(make.waiting_evidence(0.4))
    node.tick(make.waiting_evidence(0.0))
    assert node.state.own_waiting == {"web": 0.36}
    for _ in range(40):
        node.tick(make.waiting_evidence(0.0))
    assert node.state.own_waiting["web"] < 0.01


def test_an_exonerated_service_does_not_hide_another_ones_violation():
    node = Node()
    node.tick(make.waiting_evidence(0.9))
    for _ in range(4):
        node.tick(make.waiting_evidence(0.9))
    assert node.state.exonerated == "web"
    now = make.snapshot(make.service(), make.service("db", objective=make.OBJECTIVE), at=node.now + 1)
    seen = make.forecast({"service:web": make.waiting_evidence(0.9), "service:db": make.latency_evidence(-0.2)})
    found = decide_cpu(now, seen, SPEC, Calibration(), node.state)
    assert found.verdict.reason == "SlackNegative"
    assert "db" in found.verdict.message


def test_a_freeze_as_a_rung_ends_before_it_would_evict():
    node = Node(calibration=Calibration(rungs=("freeze",)))
    node.tick(make.latency_evidence(-0.1))
    held(node, ticks=4)
    assert node.state.freeze
    held(node, slack=0.15, ticks=25)
    assert not node.state.freeze


def test_old_readings_stop_tightening_and_then_open_the_tier():
    def reason(ticks):
        now = make.snapshot(make.service(objective=make.OBJECTIVE), stale_ticks={"workloads": ticks})
        seen = make.forecast({"service:web": make.latency_evidence(-0.5)})
        return decide_cpu(now, seen, SPEC, Calibration(), CpuState()).verdict.reason

    assert reason(1) == "SlackNegative"
    assert reason(3) == "ReadingsOld"
    assert reason(10) == "ReadingsTooOld"


def test_cpus_are_chosen_in_whole_cores_from_the_last_one():
    now = make.snapshot(cpus=(0, 1, 2, 3), cores=((0, 2), (1, 3)))
    assert chosen_cpus(now, 2, None) == (1, 3)
    assert chosen_cpus(now, 1, None) == (1, 3)
    assert chosen_cpus(now, None, None) == (0, 1, 2, 3)


EVENTS = st.lists(
    st.tuples(
        st.one_of(
            st.none(),
            st.floats(-1, 1).map(lambda s: make.latency_evidence(round(s, 4))),
            st.floats(0, 1).map(lambda w: make.waiting_evidence(round(w, 4))),
        ),
        st.fixed_dictionaries(
            {
                "services_peak_cores": st.floats(0, 2),
                "batch_cores": st.floats(0, 2),
                "besteffort_waiting_ratio": st.floats(0, 1),
                "idle_cpus": st.sampled_from([(), (0,), (1,), (0, 1)]),
            }
        ),
    ),
    max_size=60,
)


@settings(deadline=None, max_examples=150)
@given(EVENTS)
def test_no_sequence_of_evidence_makes_an_impossible_plan(events):
    node = Node(PolicySpec(cpu=CpuPolicy(hold_down=2.0)))
    previous = None
    for evidence, figures in events:
        node.tick(evidence, **figures)
        grant = node.grant
        assert node.knobs["cpuset.cpus"] in ("0", "1", "0-1")
        if (
            evidence is not None
            and evidence.evidence == "latency"
            and evidence.slack < 0
            and figures["batch_cores"] > 0.1
        ):
            assert grant == SPEC.cpu.floor
        if node.state.grant_cores is not None and node.state.mode == "granted" and node.state.ticks <= 1:
            seen = make.forecast(**{k: v for k, v in figures.items() if k != "idle_cpus"})
            rail = guard_rail_cores(seen, node.spec)
            grown = previous is not None and node.state.grant_cores > previous
            assert not grown or node.state.grant_cores <= max(rail, SPEC.cpu.floor) + 1e-9
        previous = node.state.grant_cores


# -- below BestEffort ---------------------------------------------------------------------------------------------


def below(*ratios, idle_cpus=(), batch=1.0, confines=True):
    state, modes = besteffort.BestEffortState(), []
    for i, ratio in enumerate(ratios):
        idle = idle_cpus if state.mode == "floor" else ()
        seen = make.forecast(besteffort_waiting_ratio=ratio, batch_cores=batch, idle_cpus=idle)
        knobs = {**make.OPEN_KNOBS, "cpuset.cpus": format_cpulist(state.cpus or (0, 1)) if confines else "0-1"}
        state = besteffort.step(state, make.snapshot(at=100.0 + i, tier=make.tier(knobs=knobs)), seen, SPEC)
        modes.append(state.mode)
    return modes, state


@pytest.mark.parametrize(
    ("ratios", "idle_cpus", "modes"),
    [
        pytest.param((0.0, 0.0), (), ["clear", "clear"], id="nobody waits"),
        pytest.param((0.5, 0.5, 0.5), (), ["floor", "floor", "floor"], id="batch stays at the floor while it waits"),
        pytest.param((0.5, 0.5, 0.5), (1,), ["floor", "floor", "elsewhere"], id="CPUs it leaves idle are batch's"),
        pytest.param((0.5, 0.0, 0.0), (), ["floor", "growing", "growing"], id="batch grows when it waits no more"),
        pytest.param((0.5, 0.0, 0.5), (), ["floor", "growing", "floor"], id="and falls back when it waits again"),
    ],
)
def test_batch_makes_room_for_best_effort(ratios, idle_cpus, modes):
    assert below(*ratios, idle_cpus=idle_cpus)[0] == modes


def test_a_tier_that_does_not_go_where_it_was_sent_goes_back_to_its_floor():
    assert below(*[0.5] * 5, idle_cpus=(1,), confines=False)[0][2:] == ["elsewhere", "elsewhere", "floor"][:3]


def test_hogs_that_wait_only_for_each_other_are_tested_ever_less_often():
    _, state = below(*[0.5] * 100, idle_cpus=(1,))
    assert state.seconds > besteffort.ELSEWHERE_SECONDS
    modes, _ = below(*[0.5] * 400, idle_cpus=(1,))
    assert modes.count("elsewhere") > 0.9 * len(modes)


# -- memory -------------------------------------------------------------------------------------------------------


class Memory:
    """Steps the memory law."""

    def __init__(self, *workloads, **changes):
        self.state, self.now, self.changes = MemoryState(), 100.0, changes
        self.workloads = workloads or (make.service(working_set_bytes=GIB // 2), make.job())

    def tick(self, stall=0.0, seconds=0.6):
        self.now += seconds
        figures = {
            w.id: WorkloadForecast(memory_pressure_ratio=stall if w.tier == "service" else None, usage_cores=1.0)
            for w in self.workloads
        }
        now = make.snapshot(*self.workloads, at=self.now, **self.changes)
        self.decision = decide_memory(now, make.forecast(figures, services_peak_bytes=GIB // 2), SPEC, self.state)
        self.state = self.decision.state
        self.knobs = {a.knob: a.value for a in self.decision.actions}
        return self.decision.verdict.state


V1: dict[str, Any] = {"capabilities": ("psi", "freeze", "kill", "memory.max", "cpuset"), "cgroup_version": 1}


def test_the_allowance_is_what_services_and_others_leave():
    workloads = (make.service(working_set_bytes=GIB // 2), make.job())
    now = make.snapshot(*workloads, memory_available_bytes=GIB)
    found = allowance_bytes(now, make.forecast(services_peak_bytes=GIB // 2), SPEC)
    others = 2 * GIB - GIB - GIB // 2 - GIB // 4
    assert found == (2 * GIB - GIB // 2 - others - int(0.05 * 2 * GIB)) // (1 << 20) * (1 << 20)


def test_pressure_climbs_the_ladder_one_rung_at_a_time():
    law = Memory(make.service(working_set_bytes=GIB // 2), make.job(checkpoint_signal="SIGUSR1"), swap_free_bytes=GIB)
    assert law.tick() == "calm"
    assert [law.tick(0.2) for _ in range(3)] == ["high", "reclaim", "checkpoint"]
    assert law.knobs["signal"] == "SIGUSR1"
    assert law.knobs["memory.high"] == "max"
    law.now += 11
    assert law.tick(0.2) == "freeze"
    assert [r.verb for r in law.decision.requests] == ["freeze"]
    assert law.tick(0.2) == "evict"
    assert [r.verb for r in law.decision.requests] == ["evict"]


def test_jobs_that_come_and_go_do_not_hold_the_ladder_at_the_checkpoint():
    law = Memory(make.service(working_set_bytes=GIB // 2), make.job(checkpoint_signal="SIGUSR1"), swap_free_bytes=GIB)
    while law.tick(0.2) != "checkpoint":
        pass
    for i in range(8):
        law.workloads = (law.workloads[0], make.job(f"train{i}", checkpoint_signal="SIGUSR1"))
        law.tick(0.2, seconds=1.5)
    assert law.decision.verdict.state in ("freeze", "evict")


def test_without_swap_freezing_is_skipped_and_without_a_signal_the_checkpoint():
    law = Memory()
    assert [law.tick(0.2) for _ in range(4)] == ["high", "reclaim", "evict", "evict"]


def test_v1_has_a_ladder_of_its_own_and_never_a_limit_below_usage():
    law = Memory(**V1)
    states = [law.tick(0.2) for _ in range(4)]
    assert states == ["limit", "reclaim", "evict", "evict"]
    assert "memory.high" not in law.knobs


@settings(deadline=None)
@given(usage=st.integers(0, 2 * GIB), peak=st.integers(0, 2 * GIB))
def test_v1_never_sets_a_limit_below_usage(usage, peak):
    now = make.snapshot(make.job(), tier=make.tier(memory_bytes=usage, working_set_bytes=usage), **V1)
    seen = make.forecast({"job:train": WorkloadForecast()}, services_peak_bytes=peak)
    for action in decide_memory(now, seen, SPEC, MemoryState()).actions:
        if action.knob == "memory.max":
            assert int(action.value) > usage


def test_calm_undoes_the_rungs_one_by_one():
    law = Memory()
    for _ in range(3):
        law.tick(0.2)
    seen = [law.tick(0.0, seconds=10.1) for _ in range(6)]
    assert seen[-1] == "calm"
    assert law.state.rung == -1


def test_on_the_way_down_nothing_is_frozen_or_reclaimed():
    law = Memory(swap_free_bytes=GIB)
    while law.tick(0.2) != "evict":
        pass
    for _ in range(4):
        state = law.tick(0.0, seconds=10.1)
        assert state in ("evict", "high", "calm")
        assert law.decision.requests == []
        assert "memory.reclaim" not in law.knobs


def test_page_cache_is_not_pressure():
    law = Memory(make.service(working_set_bytes=GIB // 2), make.job(memory_bytes=GIB, working_set_bytes=GIB // 8))
    assert law.tick(0.0) == "calm"


def test_pressure_without_batch_memory_is_not_batchs():
    law = Memory(make.service(), make.job(working_set_bytes=0), tier=make.tier(memory_bytes=0, working_set_bytes=0))
    assert law.tick(0.5) == "calm"
    assert law.decision.rejected


@pytest.mark.parametrize(
    ("jobs", "victims"),
    [
        pytest.param([("old", 0, "", 100.0, None), ("young", 0, "", 900.0, None)], ["young"], id="the least lost work"),
        pytest.param([("old", 0, "", 100.0, 990.0), ("young", 0, "", 900.0, None)], ["old"], id="a checkpoint counts"),
        pytest.param([("low", -1, "", 100.0, None), ("high", 5, "", 990.0, None)], ["low"], id="priority comes first"),
        pytest.param(
            [("a", 0, "g", 950.0, None), ("b", 0, "g", 950.0, None), ("c", 0, "", 930.0, None)], ["c"],
            id="a gang counts whole",
        ),
        pytest.param(
            [("a", 0, "g", 990.0, None), ("b", 0, "g", 990.0, None), ("c", 0, "", 100.0, None)], ["a", "b"],
            id="and goes whole",
        ),
    ],
)  # fmt: skip
def test_the_victim_is_the_job_with_the_least_lost_work(jobs, victims):
    workloads = [
        make.job(name, priority=priority, gang=gang, started_seconds=start, checkpointed_seconds=saved)
        for name, priority, gang, start, saved in jobs
    ]
    now = make.snapshot(*workloads, at=1000.0)
    seen = make.forecast({w.id: WorkloadForecast(usage_cores=1.0) for w in workloads})
    assert [w.name for w in least_loss(now, seen)] == victims


# -- freeze and eviction ------------------------------------------------------------------------------------------


def request(verb, workload="job:train", law="memory"):
    return Request(verb=verb, workload=workload, law=law, reason="MemoryPressure", message="because")


def test_a_freeze_is_made_on_request_and_undone_without():
    frozen = make.job(frozen=True)
    made = decide_freeze(make.snapshot(make.job()), SPEC, [request("freeze")], FreezeState())
    undone = decide_freeze(make.snapshot(frozen), SPEC, [], made.state)
    assert [(a.knob, a.value) for a in made.actions] == [("cgroup.freeze", "1")]
    assert [(a.knob, a.value) for a in undone.actions] == [("cgroup.freeze", "0")]


def test_a_job_frozen_too_long_is_evicted():
    first = decide_freeze(make.snapshot(make.job(), at=100), SPEC, [request("freeze")], FreezeState())
    later = decide_freeze(make.snapshot(make.job(frozen=True), at=131), SPEC, [request("freeze")], first.state)
    assert [r.reason for r in later.requests] == ["FrozenTooLong"]


def test_a_thaw_beats_a_freeze_and_the_loser_is_recorded():
    found = decide_freeze(
        make.snapshot(make.job(frozen=True)), SPEC, [request("freeze"), request("thaw", law="eviction")], FreezeState()
    )
    assert [(a.knob, a.value) for a in found.actions] == [("cgroup.freeze", "0")]
    assert found.rejected


def test_an_eviction_is_thaw_and_sigterm_then_grace_then_kill():
    first = decide_eviction(make.snapshot(make.job(frozen=True), at=100), SPEC, [request("evict")], EvictionState())
    assert [(a.knob, a.value) for a in first.actions] == [("signal", "SIGTERM")]
    assert [r.verb for r in first.requests] == ["thaw"]
    waiting = decide_eviction(make.snapshot(make.job(), at=104), SPEC, [], first.state)
    assert waiting.actions == []
    killed = decide_eviction(make.snapshot(make.job(), at=106), SPEC, [], waiting.state)
    assert [a.knob for a in killed.actions] == ["cgroup.kill"]
    gone = decide_eviction(make.snapshot(at=107), SPEC, [], killed.state)
    assert gone.state.under_way == {}


def test_one_eviction_is_for_one_instance():
    now = decide_eviction(make.snapshot(make.job(), at=100), SPEC, [request("evict")], EvictionState())
    again = msgspec.structs.replace(make.job(), inodes={"unified": 12})
    anew = decide_eviction(make.snapshot(again, at=106), SPEC, [], now.state)
    assert anew.actions == [], "its owner has started it again, and nobody asks for its end"
    asked = decide_eviction(make.snapshot(again, at=107), SPEC, [request("evict")], anew.state)
    assert [(a.knob, a.value) for a in asked.actions] == [("signal", "SIGTERM")]


def test_an_eviction_ends_soon_after_the_kill():
    state = decide_eviction(make.snapshot(make.job(), at=100), SPEC, [request("evict")], EvictionState()).state
    kills = []
    for at in range(101, 120):
        found = decide_eviction(make.snapshot(make.job(), at=at), SPEC, [], state)
        state = found.state
        kills += [at for a in found.actions if a.knob == "cgroup.kill"]
    assert kills
    assert max(kills) < 112


def test_an_eviction_kills_once_at_least_however_late_the_tick():
    state = decide_eviction(make.snapshot(make.job(), at=100), SPEC, [request("evict")], EvictionState()).state
    late = decide_eviction(make.snapshot(make.job(), at=160), SPEC, [], state)
    assert [a.knob for a in late.actions] == ["cgroup.kill"]


def test_what_we_froze_in_place_is_thawed_until_it_is():
    frozen = make.job(in_place=True, frozen=True)
    state = FreezeState(since={"job:train": 90.0})
    for _ in range(3):  # the write fails
        found = decide_freeze(make.snapshot(frozen), SPEC, [], state)
        assert [a.value for a in found.actions] == ["0"]
        state = found.state
    assert decide_freeze(make.snapshot(make.job(in_place=True)), SPEC, [], state).state.since == {}


def test_what_others_froze_in_place_is_not_ours_to_thaw():
    paused = make.job(in_place=True, frozen=True)
    assert decide_freeze(make.snapshot(paused), SPEC, [], FreezeState()).actions == []
    ours = FreezeState(since={"job:train": 90.0})
    assert [a.value for a in decide_freeze(make.snapshot(paused), SPEC, [], ours).actions] == ["0"]
    asked = decide_freeze(make.snapshot(paused), SPEC, [request("thaw")], FreezeState())
    assert [a.value for a in asked.actions] == ["0"], "one that must end must run"


def test_a_job_past_its_maximum_runtime_is_evicted():
    old = make.job(started_seconds=1.0, max_runtime_seconds=50.0)
    found = decide_eviction(make.snapshot(old, at=100), SPEC, [], EvictionState())
    assert [a.reason for a in found.actions] == ["MaxRuntime"]


@pytest.mark.parametrize("jump", [pytest.param(86400.0, id="forward"), pytest.param(-86400.0, id="back")])
def test_a_clock_that_is_set_evicts_nobody(jump):
    young = make.job(started_seconds=90.0, max_runtime_seconds=50.0)
    now = make.snapshot(young, at=100, time_seconds=1_700_000_000.0 + jump)
    assert decide_eviction(now, SPEC, [], EvictionState()).actions == []


# -- the pipeline -------------------------------------------------------------------------------------------------


def test_what_is_so_already_is_not_written_again():
    now = make.snapshot(tier=make.tier(knobs={**make.OPEN_KNOBS, "memory.high": str(allowance_of())}))
    _, plan = decide(now, make.forecast(), SPEC, Calibration(), LawState())
    assert plan.actions == ()


def allowance_of():
    return allowance_bytes(make.snapshot(), make.forecast(), SPEC)


def test_every_law_says_something_every_tick():
    _, plan = decide(make.snapshot(), make.forecast(), SPEC, Calibration(), LawState())
    assert {v.law for v in plan.verdicts} == {"cpu", "memory", "eviction", "freeze"}
    assert all(v.reason and v.message for v in plan.verdicts)


def quota(text):
    cores = cores_of_cpu_max(text)
    return float("inf") if cores is None else cores


KNOB_VALUES = {
    "cpu.max": st.floats(0.01, 2).map(cpu_max),
    "cpuset.cpus": st.sampled_from(["0", "1", "0-1"]),
    "cpu.idle": st.sampled_from(["0", "1"]),
    "cpu.weight": st.just("1"),
    "cgroup.freeze": st.sampled_from(["0", "1"]),
    "signal": st.just("SIGTERM"),
    "cgroup.kill": st.just("1"),
}


def action(path, knob, value):
    workload = "tier" if path == "/batch" else "job:train"
    return Action(workload=workload, path=path, knob=knob, value=value, reason="R", message="m", law="cpu")


@given(
    st.lists(
        st.sampled_from(sorted(KNOB_VALUES)).flatmap(
            lambda knob: st.tuples(st.sampled_from(["/batch", "/batch/train"]), st.just(knob), KNOB_VALUES[knob])
        ),
        unique_by=lambda t: t[:2],
    ),
    st.tuples(*[st.floats(0.01, 2).map(cpu_max)] * 2),
)
def test_every_intermediate_state_of_a_plan_is_allowed(entries, quotas):
    """Widen from parent to child, tighten from child to parent, thaw before signals, idle off before a weight."""
    quotas = sorted(quotas, key=quota, reverse=True)
    known = {
        "tier": make.tier(knobs={**make.OPEN_KNOBS, "cpu.max": quotas[0], "cpu.idle": "1"}),
        "job:train": make.job(knobs={**make.OPEN_KNOBS, "cpu.max": quotas[1]}),
    }
    ordered = order([action(*e) for e in entries], known)
    values = {("/batch", "cpu.max"): quotas[0], ("/batch/train", "cpu.max"): quotas[1], ("/batch", "cpu.idle"): "1"}
    wanted = {(a.path, a.knob): a.value for a in ordered}
    child, parent = (wanted.get((p, "cpu.max"), values[p, "cpu.max"]) for p in ("/batch/train", "/batch"))
    possible = quota(child) <= quota(parent)
    thawed = frozen = False
    for step in ordered:
        if step.knob == "cpu.weight" and (step.path, "cpu.idle") in wanted:
            assert (
                values.get((step.path, "cpu.idle")) == wanted[step.path, "cpu.idle"]
                or wanted[step.path, "cpu.idle"] == "1"
            )
        values[step.path, step.knob] = step.value
        if possible:
            assert quota(values["/batch/train", "cpu.max"]) <= quota(values["/batch", "cpu.max"])
        thawed = thawed or (step.knob, step.value) == ("cgroup.freeze", "0")
        frozen = frozen or (step.knob, step.value) == ("cgroup.freeze", "1")
        assert not (step.knob == "signal" and frozen)
        assert not ((step.knob, step.value) == ("cgroup.freeze", "0") and values.get(("/batch", "signal")))
