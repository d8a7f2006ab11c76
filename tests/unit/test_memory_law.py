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


class Memory:
    """Steps the memory law."""

    def __init__(self, *workloads, **changes):
        self.state, self.now, self.evicting = MemoryState(), 100.0, ()
        self.changes = {"memory_available_bytes": GIB // 16, **changes}
        self.workloads = workloads or (make.service(working_set_bytes=GIB // 2), make.job())

    def tick(self, stall=0.0, seconds=0.6):
        self.now += seconds
        figures = {
            w.id: WorkloadForecast(memory_pressure_ratio=stall if w.tier == "service" else None, usage_cores=1.0)
            for w in self.workloads
        }
        now = make.snapshot(*self.workloads, at=self.now, **self.changes)
        seen = make.forecast(figures, services_peak_bytes=GIB // 2)
        self.decision = decide_memory(make.view(now, seen, evicting=self.evicting), self.state)
        self.state = self.decision.state
        self.knobs = {a.knob: a.value for a in self.decision.actions}
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
    assert [w.name for w in least_loss(make.view(now, seen))] == victims


MIB = 1 << 20


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


def stuck(seconds, **job):
    """A job that stalls nearly all the time at the tier's high mark."""
    knobs = {**make.OPEN_KNOBS, "memory.high": str(256 * MIB)}
    tier = make.tier(knobs=knobs, memory_bytes=250 * MIB, working_set_bytes=250 * MIB)
    state, wishes = MemoryState(), []
    for i in range(seconds):
        now = make.snapshot(make.job(**job), at=100.0 + i, tier=tier)
        seen = make.forecast({"job:train": WorkloadForecast(memory_full_ratio=0.9)})
        found = decide_memory(make.view(now, seen), state)
        state = found.state
        wishes += [(i, r.reason) for r in found.requests]
    return wishes


def test_a_job_that_crawls_at_our_limit_ends_after_a_bounded_time():
    assert stuck(30) == []
    first, reason = stuck(40)[0]
    assert (reason, first) == ("MemoryStuck", 31)


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
