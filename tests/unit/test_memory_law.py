"""The memory law, tick by tick."""

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colocate.calibration import Calibration
from colocate.decide.memory import MemoryState, allowance_bytes, decide_memory, least_loss, lost_work
from colocate.decide.pipeline import LawState, decide
from colocate.model.forecast import WorkloadForecast
from tests import make
from tests.make import GIB, SPEC

replace = msgspec.structs.replace
MIB = 1 << 20


class Memory:
    """Steps the memory law."""

    def __init__(self, *workloads, **changes):
        self.state, self.now = MemoryState(), 100.0
        self.evicting: tuple[str, ...] = ()
        self.crawls: float | None = None
        self.changes = {"memory_available_bytes": GIB // 16, **changes}
        self.workloads = workloads or (make.service(working_set_bytes=GIB // 2), make.job())

    def tick(self, stall=0.0, seconds=0.6):
        self.now += seconds
        figures = {
            w.id: WorkloadForecast(
                memory_pressure_ratio=stall if w.tier == "service" else None,
                memory_full_ratio=self.crawls if w.tier == "batch" else None,
                usage_cores=1.0,
            )
            for w in self.workloads
        }
        now = make.snapshot(*self.workloads, at=self.now, **self.changes)
        seen = make.forecast(figures, services_peak_bytes=GIB // 2)
        self.decision = decide_memory(make.view(now, seen, evicting=self.evicting), self.state)
        self.state = self.decision.state
        self.knobs = {a.knob: a.value for a in self.decision.actions}
        self.evicting += tuple(r.workload for r in self.decision.requests if r.verb == "evict")  # and it takes its time
        return self.decision.verdict.state


V1: dict[str, Any] = {"capabilities": ("psi", "freeze", "kill", "memory.max", "cpuset"), "cgroup_version": 1}


def test_the_allowance_is_what_services_and_others_leave():
    workloads = (make.service(working_set_bytes=GIB // 2), make.job())
    now = make.snapshot(*workloads, memory_available_bytes=GIB)
    found = allowance_bytes(make.view(now, make.forecast(services_peak_bytes=GIB // 2)))
    others = 2 * GIB - GIB - GIB // 2 - GIB // 4
    assert found == (2 * GIB - GIB // 2 - others - int(0.05 * 2 * GIB)) // (1 << 20) * (1 << 20)


def test_pressure_climbs_the_ladder_one_rung_at_a_time():
    law = Memory(make.service(working_set_bytes=GIB // 2), make.job(checkpoint_signal="SIGUSR1"), swap_free_bytes=GIB)
    assert law.tick() == "calm"
    assert [law.tick(0.2) for _ in range(3)] == ["high", "reclaim", "checkpoint"]
    assert law.knobs["signal"] == "SIGUSR1"
    assert int(law.knobs["memory.high"]) == GIB // 4 + 64 * MIB
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
    for action in decide_memory(make.view(now, seen), MemoryState()).actions:
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
        assert list(law.decision.requests) == []
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
        make.job(
            name,
            priority=priority,
            gang=gang,
            started_seconds=start,
            checkpointed_seconds=saved,
            cpu_usage_us=int((1000 - start) * 1e6),  # one core since its start
            checkpointed_cpu_us=int((saved - start) * 1e6) if saved else 0,
        )
        for name, priority, gang, start, saved in jobs
    ]
    now = make.snapshot(*workloads, at=1000.0)
    seen = make.forecast({w.id: WorkloadForecast(usage_cores=1.0) for w in workloads})
    assert [w.name for w in least_loss(make.view(now, seen), workloads)] == victims


@pytest.mark.parametrize(
    ("changes", "figures", "why"),
    [
        pytest.param({"memory_available_bytes": GIB}, {}, "are free on the node", id="half of the node is free"),
        pytest.param({}, {"at_own_limit": True}, "at its own limit", id="the service is at its own limit"),
        pytest.param(
            {"tier": make.tier(memory_bytes=MIB, working_set_bytes=MIB)},
            {},
            "batch holds only",
            id="batch holds nothing",
        ),
    ],
)
def test_a_stall_that_is_not_batchs_doing_moves_no_batch(changes, figures, why):
    service, job = make.service(working_set_bytes=GIB // 2), make.job()
    now = make.snapshot(service, job, **{"memory_available_bytes": GIB // 16, **changes})
    state = MemoryState()
    for i in range(60):
        seen = make.forecast(
            {service.id: WorkloadForecast(memory_pressure_ratio=0.5, **figures), job.id: WorkloadForecast()}
        )
        found = decide_memory(make.view(replace(now, monotonic_seconds=100.0 + i), seen), state)
        state = found.state
        assert found.verdict.state == "calm"
        assert why in found.rejected[0].why
        assert not found.requests


class Shortage:
    """Two jobs on a node that is short of memory, decided by all laws together every 100 ms."""

    def __init__(self):
        self.laws, self.now, self.sequence = LawState(memory=MemoryState(rung=1, since=95.0, pressed=99.0)), 100.0, 0
        self.alive = {
            "a": {"processes": 1, "working_set_bytes": GIB // 2, "started_seconds": 50.0, "cpu_usage_us": 1000},
            "b": {"processes": 1, "working_set_bytes": GIB // 2, "started_seconds": 40.0, "cpu_usage_us": 1000},
        }

    def tick(self, stall, dt=0.1):
        jobs = [make.job(n, **{**f, "inodes": {"unified": 20 + i}}) for i, (n, f) in enumerate(self.alive.items())]
        now = make.snapshot(make.service(working_set_bytes=GIB), *jobs, at=self.now, memory_available_bytes=GIB // 16)
        figures = {"service:web": WorkloadForecast(memory_pressure_ratio=stall)}
        seen = make.forecast({**figures, **{j.id: WorkloadForecast() for j in jobs}}, interval_seconds=dt)
        self.laws, plan = decide(now, seen, SPEC, Calibration(), self.laws)
        self.now += dt
        return [(a.workload, a.value) for a in plan.actions if a.knob == "signal"]


def test_one_shortage_evicts_one_job_also_if_its_last_interval_still_holds_the_stall():
    node, told = Shortage(), []
    for i in range(14):
        if i == 9:
            node.alive["a"] |= {"processes": 0, "working_set_bytes": 0}
        told += node.tick(0.5 if i <= 9 else 0.0)
    assert told == [("job:a", "SIGTERM")]


def test_a_victim_that_works_in_its_signal_handler_brings_no_other_down():
    node, told = Shortage(), []
    for i in range(40):
        if i == 6:
            node.alive["a"]["cpu_usage_us"] = 10**9
        told += node.tick(0.5)
    assert told == [("job:a", "SIGTERM")]


def test_a_shortage_that_goes_on_after_the_first_is_gone_evicts_the_next():
    node, told = Shortage(), []
    for i in range(60):
        if i == 9:
            node.alive["a"] |= {"processes": 0, "working_set_bytes": 0}
        told += node.tick(0.5)
    assert told == [("job:a", "SIGTERM"), ("job:b", "SIGTERM")]


@pytest.mark.parametrize(
    ("job", "least"),
    [
        pytest.param({"cpu_usage_us": 8 * 3600 * 10**6, "started_seconds": 1.0}, 8 * 3600, id="what was really spent"),
        pytest.param(
            {"cpu_usage_us": 8 * 3600 * 10**6, "started_seconds": 1.0, "in_place": True}, 8 * 3600, id="also in place"
        ),
        pytest.param({"started_seconds": 1.0, "working_set_bytes": GIB}, 70_000, id="memory held counts too"),
    ],
)
def test_lost_work_is_cumulative(job, least):
    assert lost_work(make.job(**{"working_set_bytes": 0, **job}), 72_001.0) >= least


def test_what_was_saved_by_a_checkpoint_is_not_lost():
    saved = make.job(
        cpu_usage_us=9_000_000, checkpointed_cpu_us=8_000_000, checkpointed_seconds=90.0, started_seconds=1.0
    )
    assert lost_work(replace(saved, working_set_bytes=0), 100.0) == 1.0


def test_the_ladder_goes_on_when_all_have_answered_and_gives_room_to_write_until_then():
    """Room is bounded: a job that grows instead of saving must not take the node."""
    jobs = [make.job(n, checkpoint_signal="SIGUSR1", started_seconds=1.0) for n in ("a", "b")]
    law = Memory(make.service(working_set_bytes=GIB // 2), *jobs)
    while law.tick(0.2) != "checkpoint":
        pass
    law.changes["tier"] = make.tier(working_set_bytes=GIB, memory_bytes=GIB)
    law.workloads = (law.workloads[0], replace(jobs[0], checkpointed_seconds=law.now + 0.3), jobs[1])
    assert law.tick(0.2) == "checkpoint"
    assert int(law.knobs["memory.high"]) == GIB // 4 + 64 * MIB
    law.workloads = tuple(replace(w, checkpointed_seconds=law.now) for w in law.workloads)
    assert law.tick(0.2) == "evict"


class Wanting:
    """Two jobs that want more than the allowance: at its mark (v2), or beyond it (v1). All laws together, each 1 s."""

    def __init__(self, *, v2=True, full=0.9, answers=True, spec=SPEC):
        self.laws, self.now, self.v2, self.full, self.answers, self.spec = LawState(), 100.0, v2, full, answers, spec
        self.alive = {n: {"started_seconds": 10.0, "cpu_usage_us": 10**7} for n in ("a", "b")}
        self.high, self.told = 0, []

    def tick(self):
        self.now += 1.0
        size = len(self.alive) * 256 * MIB
        jobs = [
            make.job(n, checkpoint_signal="SIGUSR1", inodes={"unified": 20 + i}, memory_bytes=256 * MIB, **f)
            for i, (n, f) in enumerate(self.alive.items())
        ]
        capabilities = ("psi", "freeze", "memory.high") if self.v2 else ("psi", "freeze", "memory.max")
        knobs = {**make.OPEN_KNOBS, "memory.max": "max", "memory.high": str(self.high) if self.high else "max"}
        tier = make.tier(memory_bytes=size, working_set_bytes=size, knobs=knobs)
        service = make.service(working_set_bytes=GIB // 4)
        now = make.snapshot(
            service, *jobs, at=self.now, tier=tier, memory_bytes=GIB, memory_available_bytes=int(0.59 * GIB) - size,
            capabilities=capabilities,
        )  # fmt: skip
        crawls = bool(self.high) and size >= 0.9 * self.high
        figures = {j.id: WorkloadForecast(memory_full_ratio=self.full if crawls else 0.0) for j in jobs}
        seen = make.forecast({service.id: WorkloadForecast(memory_pressure_ratio=0.0), **figures},
                             services_peak_bytes=GIB // 2)  # fmt: skip
        self.laws, plan = decide(now, seen, self.spec, Calibration(), self.laws)
        self.verdict = next(v for v in plan.verdicts if v.law == "memory")
        for action in plan.actions:
            if action.workload == "tier" and action.knob == "memory.high":
                self.high = int(action.value)
            elif action.knob == "signal":
                self.told.append((round(self.now - 100), action.workload, action.value))
                if action.value == "SIGUSR1" and self.answers:
                    self.alive[action.workload.removeprefix("job:")]["checkpointed_seconds"] = self.now + 0.5
                elif action.value == "SIGTERM":
                    self.alive.pop(action.workload.removeprefix("job:"))


@pytest.mark.parametrize("v2", [pytest.param(True, id="crawling at the mark"), pytest.param(False, id="beyond it, v1")])
def test_who_wants_more_than_the_allowance_for_long_is_saved_and_one_evicted(v2):
    node = Wanting(v2=v2)
    while not node.told:
        node.tick()
    assert node.verdict.reason == "OverAllowance"
    waited = SPEC.memory.crawl if v2 else 0.0  # beyond the allowance begins what services need
    assert waited <= node.told[0][0] <= waited + 3
    for _ in range(60):
        node.tick()
    values = [(who, value) for _, who, value in node.told]
    assert values == [("job:a", "SIGUSR1"), ("job:b", "SIGUSR1"), ("job:a", "SIGTERM")]
    assert node.told[2][0] - node.told[0][0] <= 2  # it answered: nobody waits for the deadline
    assert node.verdict.reason == "MemoryAllowance"
    assert not v2 or node.high == node.laws.memory.allowance_bytes  # the other one is not squeezed


def test_who_does_not_answer_has_until_the_deadline():
    node = Wanting(answers=False)
    while "SIGTERM" not in [value for _, _, value in node.told]:
        node.tick()
    assert node.told[-1][0] - node.told[0][0] == pytest.approx(SPEC.memory.checkpoint_deadline, abs=1)


def test_who_works_at_the_allowance_without_crawling_stays():
    node = Wanting(full=0.3)
    for _ in range(60):
        node.tick()
    assert not node.told


def looks(workloads, seconds, *, full=None, tier=None, spec=SPEC, step=1.0, state=None, **changes):
    """What the memory law asks for: (when, job), looking every `step` seconds."""
    state, asked = state or MemoryState(), []
    for i in range(round(seconds / step)):
        now = make.snapshot(*workloads, at=100.0 + i * step, tier=tier, **{"memory_bytes": 16 * GIB, **changes})
        figures = {w.id: WorkloadForecast(memory_full_ratio=(full or {}).get(w.name), memory_pressure_ratio=0.0)
                   for w in workloads}  # fmt: skip
        found = decide_memory(make.view(now, make.forecast(figures, services_peak_bytes=4 * GIB), spec=spec), state)
        state = found.state
        asked += [(i * step, r.workload) for r in found.requests if r.verb == "evict"]
    return asked


def at_its_mark(held):
    """A tier of v2 that holds what it may."""
    knobs = {**make.OPEN_KNOBS, "memory.high": str(held)}
    return make.tier(knobs=knobs, memory_bytes=held, working_set_bytes=held)


ALLOWED = 10 * GIB


@pytest.mark.parametrize(
    ("jobs", "full", "victims"),
    [
        pytest.param(
            [("big", 9 * GIB, {}), ("small", 10 * MIB, {})], {"big": 0.9}, {"job:big"},
            id="who crawls, not who is cheapest",
        ),
        pytest.param(
            [("big", 9 * GIB, {}), ("nightly", 50 * MIB, {"in_place": True})], {"big": 0.9}, {"job:big"},
            id="nobody outside of the tier",
        ),
        pytest.param(
            [("own", GIB, {"memory_bytes": GIB, "knobs": {"memory.max": str(GIB)}}), ("other", 8 * GIB, {})],
            {"own": 0.9}, set(), id="who crawls at a limit of his own costs nobody his place",
        ),
    ],
)  # fmt: skip
def test_who_has_to_go_for_the_allowance_makes_room(jobs, full, victims):
    workloads = [make.service(working_set_bytes=4 * GIB)]
    workloads += [make.job(name, working_set_bytes=size, **more) for name, size, more in jobs]
    left = 16 * GIB - 4 * GIB - ALLOWED
    allowed = allowance_bytes(
        make.view(
            make.snapshot(*workloads, memory_bytes=16 * GIB, memory_available_bytes=left, tier=at_its_mark(ALLOWED)),
            make.forecast(services_peak_bytes=4 * GIB),
        )
    )
    asked = looks(workloads, 40, full=full, tier=at_its_mark(allowed), memory_available_bytes=left)
    assert {who for _, who in asked} == victims


@pytest.mark.parametrize(
    ("tiers", "left"),
    [
        pytest.param([9 * GIB, 9 * GIB + 256 * MIB], 5 * GIB, id="one large allocation"),
        pytest.param([6 * GIB, None, 6 * GIB], int(1.4 * GIB), id="one look at which the tier was not readable"),
        pytest.param([12 * GIB], 5 * GIB, id="beyond what a forecast peak leaves, on a node with room"),
    ],
)
def test_on_v1_nobody_goes_for_one_difference_or_while_the_node_has_room(tiers, left):
    state, job = MemoryState(), make.job("old", working_set_bytes=6 * GIB)
    for i in range(100):
        held = tiers[min(i, len(tiers) - 1)]
        tier = make.tier(memory_bytes=held, working_set_bytes=held)
        node = {"at": 100.0 + i / 10, "tier": tier, "memory_bytes": 16 * GIB, "memory_available_bytes": left, **V1}
        now = make.snapshot(job, make.service(working_set_bytes=4 * GIB), **node)
        seen = make.forecast({w: WorkloadForecast() for w in now.workloads}, services_peak_bytes=4 * GIB)
        found = decide_memory(make.view(now, seen), state)
        state = found.state
        assert not found.requests, i


def test_a_signal_that_nobody_heard_is_no_checkpoint():
    """Jobs without an answer are waited for until the deadline, and those that come late as well."""
    law = Memory(make.service(working_set_bytes=GIB // 2), make.job("a", checkpoint_signal="SIGUSR1"))
    while law.tick(0.2) != "checkpoint":
        pass
    law.workloads = (*law.workloads, make.job("late", checkpoint_signal="SIGUSR1", started_seconds=law.now))
    assert law.tick(0.2) == "checkpoint"
    told = law.now
    law.workloads = (
        law.workloads[0],
        replace(law.workloads[1], checkpointed_seconds=told),
        replace(law.workloads[2], checkpointed_seconds=told),  # delivered at this moment, which is no answer
    )
    assert law.tick(0.2) == "checkpoint"


def test_a_stall_that_comes_back_asks_for_checkpoints_again():
    law = Memory(make.service(working_set_bytes=GIB // 2), make.job("a", checkpoint_signal="SIGUSR1"))
    while law.tick(0.2) != "checkpoint":
        pass
    law.workloads = (law.workloads[0], replace(law.workloads[1], checkpointed_seconds=law.now + 0.1))
    assert law.knobs["signal"] == "SIGUSR1"
    while law.tick(0.0, seconds=3.0) == "checkpoint":
        pass  # calm again, at the first rung
    while law.tick(0.2) != "checkpoint":
        pass
    assert law.knobs["signal"] == "SIGUSR1"


def test_the_end_of_somebody_elses_eviction_ends_no_episode():
    jobs = [make.job(n, checkpoint_signal="SIGUSR1") for n in ("a", "b")]
    law = Memory(make.service(working_set_bytes=GIB // 2), *jobs)
    law.evicting = ("job:other",)
    while law.tick(0.2) != "checkpoint":
        pass
    law.evicting = ()
    assert law.tick(0.2) == "checkpoint"
    assert "signal" not in law.knobs


def test_while_checkpoints_are_written_batch_in_place_has_a_little_room_too():
    found = {**make.OPEN_KNOBS, "memory.high": "max"}
    job = make.job(in_place=True, found=found, memory_bytes=GIB, working_set_bytes=GIB, checkpoint_signal="SIGUSR1")
    law = Memory(make.service(working_set_bytes=GIB // 2), job, tier=None)
    while law.tick(0.2) != "checkpoint":
        pass
    assert int(law.knobs["memory.high"]) == GIB + 64 * MIB


def test_a_tier_that_is_not_readable_when_checkpoints_begin_keeps_its_mark():
    law = Memory(make.service(working_set_bytes=GIB // 2), make.job(checkpoint_signal="SIGUSR1", in_place=True))
    while law.tick(0.2) != "reclaim":
        pass
    law.changes["tier"] = None
    assert law.tick(0.2) == "checkpoint"
    law.changes["tier"] = make.tier()
    assert law.tick(0.2) == "checkpoint"
    assert not [a for a in law.decision.actions if a.workload == "tier"]


def test_crawling_at_a_squeezed_mark_is_not_wanting_more_than_the_allowance():
    """The mark was ours for a stall that is over; what was felt there evicts nobody later."""
    job = make.job(checkpoint_signal="SIGUSR1", working_set_bytes=GIB // 4)
    law = Memory(make.service(working_set_bytes=GIB // 2), job)
    while law.tick(0.2) != "checkpoint":
        pass
    for _ in range(40):
        law.crawls = 0.9
        law.tick(0.0, seconds=0.5)
        assert not law.decision.requests


def test_where_squeezing_helped_batch_may_work_with_what_it_has():
    law = Memory(memory_available_bytes=GIB // 8)
    assert law.tick(0.2) == "high"
    squeezed = int(law.knobs["memory.high"])
    assert squeezed == int(GIB / 4 * 0.9) // MIB * MIB
    law.changes["tier"] = make.tier(knobs={**make.OPEN_KNOBS, "memory.high": str(squeezed)})
    law.tick(0.0)
    assert int(law.knobs["memory.high"]) == GIB // 4


def test_batch_in_place_gives_memory_back_by_its_own_limit_and_gets_its_owners_back():
    found = {**make.OPEN_KNOBS, "memory.high": "max"}
    job = make.job(in_place=True, found=found, memory_bytes=GIB, working_set_bytes=GIB)
    law = Memory(make.service(working_set_bytes=GIB // 2), job, tier=None)
    law.tick(0.2)
    assert int(law.knobs["memory.high"]) < GIB
    for _ in range(3):
        law.tick(0.0, seconds=10.1)
    assert law.knobs["memory.high"] == "max"


def test_batch_in_place_keeps_a_mark_that_its_owner_set_lower():
    found = {**make.OPEN_KNOBS, "memory.high": str(100 * MIB)}
    job = make.job(in_place=True, found=found, knobs=found, memory_bytes=GIB, working_set_bytes=GIB)
    law = Memory(make.service(working_set_bytes=GIB // 2), job, tier=None)
    law.tick(0.2)
    assert law.knobs["memory.high"] == str(100 * MIB)
