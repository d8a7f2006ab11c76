"""The pipeline: laws in order, conflicts, and the order of writing."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from colocate.calibration import Calibration
from colocate.decide.cpu import CpuState
from colocate.decide.memory import MemoryState, allowance_bytes
from colocate.decide.pipeline import (
    LAWS_VERSION,
    OFF_UNMANAGED,
    LawState,
    decide,
    laws_from_builtins,
    laws_to_builtins,
    order,
    settle,
)
from colocate.errors import StateTooNew, StateTooOld
from colocate.model.forecast import WorkloadForecast
from colocate.plan import Action, CgroupTarget
from colocate.units import cores_of_cpu_max, cpu_max
from tests import make
from tests.make import GIB, SPEC

replace = msgspec.structs.replace


def test_what_is_so_already_is_not_written_again():
    now = make.snapshot(tier=make.tier(knobs={**make.OPEN_KNOBS, "memory.high": str(allowance_of())}))
    _, plan = decide(now, make.forecast(), SPEC, Calibration(), LawState())
    assert plan.actions == ()


def allowance_of():
    return allowance_bytes(make.view(make.snapshot()))


def test_every_law_says_something_every_tick():
    _, plan = decide(make.snapshot(), make.forecast(), SPEC, Calibration(), LawState())
    assert {v.law for v in plan.verdicts} == {"cpu", "memory", "eviction", "freeze", "allocatable"}
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
    return Action(
        workload=workload, target=CgroupTarget(path), knob=knob, value=value, reason="R", message="m", law="cpu"
    )


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


def test_where_two_laws_want_one_knob_the_narrower_wins_and_the_loser_is_recorded():
    wide, narrow = (
        action("/batch", "cpu.max", "100000 100000"),
        replace(action("/batch", "cpu.max", "1000 100000"), law="power"),
    )
    for both in ([wide, narrow], [narrow, wide]):
        kept, rejected = settle(both)
        assert kept == [narrow]
        assert [(r.law, "1000 100000" in r.why) for r in rejected] == [("cpu", True)]


def test_a_signal_and_a_kill_are_both_done():
    acts = [action("/batch/train", "signal", "SIGTERM"), action("/batch/train", "cgroup.kill", "1")]
    assert settle(acts)[0] == acts


def test_an_unmanaged_window_switches_every_law_off():
    narrow = {**make.OPEN_KNOBS, "cpuset.cpus": "1", "cpu.max": "50000 100000", "memory.high": str(GIB // 8)}
    job = make.job(requested_cores=0.5, knobs={**make.OPEN_KNOBS, "cpu.max": "20000 100000"})
    given = {"cpu.max": "70000 100000", "cpu.weight": "30", "memory.high": "max"}
    nightly = replace(
        make.job("nightly", in_place=True, knobs=narrow, found=given), inodes={"unified": 12}, path="/nightly"
    )
    now = make.snapshot(job, nightly, tier=make.tier(knobs=narrow), memory_available_bytes=GIB // 64)
    figures = {job.id: WorkloadForecast(), nightly.id: WorkloadForecast()}
    state = LawState(memory=MemoryState(rung=0, since=99.0, pressed=99.0))
    after, plan = decide(now, make.forecast(figures), SPEC, Calibration(), state, OFF_UNMANAGED)
    values = {(a.workload, a.knob): a.value for a in plan.actions}
    assert values["tier", "cpuset.cpus"] == "0-1"
    assert values["tier", "cpu.max"] == "max 100000"
    assert values["tier", "cpu.weight"] == "100"
    assert values["tier", "memory.high"] == "max"
    assert values["job:train", "cpu.max"] == "50000 100000", "what a job asked for is no rule of ours"
    assert values["job:nightly", "cpu.max"] == "70000 100000", "what its owner gave is none either"
    assert (after.cpu, after.memory) == (CpuState(suspended=True), state.memory), "nothing is learnt from it"


@pytest.mark.parametrize(
    ("version", "error"),
    [
        pytest.param(LAWS_VERSION + 1, StateTooNew, id="of a newer program"),
        pytest.param(LAWS_VERSION - 1, StateTooOld, id="of an older one"),
    ],
)
def test_law_state_of_another_version_is_refused_by_name(version, error):
    data = {**laws_to_builtins(LawState(cpu=CpuState())), "version": version}
    with pytest.raises(error, match="handover"):
        laws_from_builtins(data, "handover.json")


def test_law_state_survives_a_handover():
    state = LawState(
        memory=MemoryState(rung=2, since=5.0), cpu=CpuState(node=(1.0, 2.0), subjects={"a/waiting": (0.5,)})
    )
    assert laws_from_builtins(laws_to_builtins(state), "handover.json") == state
