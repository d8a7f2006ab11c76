"""Which batch pods are told that services hold them back, tick by tick."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from colocate.agent.held_back import KEPT_SECONDS, LASTING_SECONDS, MOST, OVER_SECONDS, HeldBack
from colocate.cluster.api import PodHeldBack
from colocate.decide import attribution
from colocate.decide.cpu import MODES, CpuState
from colocate.decide.freeze import FreezeState
from colocate.decide.pipeline import LawState
from colocate.model.forecast import WorkloadForecast
from colocate.plan import Action, CgroupTarget, Plan, Verdict
from tests import make

THAWED, FROZEN = LawState(), LawState(freeze=FreezeState(since={"pod:u0": 100.0}))
FREEZE = Action(
    workload="pod:u0",
    target=CgroupTarget("/batch/train-0"),
    knob="cgroup.freeze",
    value="1",
    reason="MemoryPressure",
    message="api stalls",
    law="freeze",
)
CPU = Verdict(law="cpu", state="held", reason="CausedByBatch", message="api: p99 9 ms, target 5 ms")


def pod(i=0):
    return msgspec.structs.replace(make.job(f"train-{i}", pod=f"ml/train-{i}"), id=f"pod:u{i}")


def mode(name):
    row = [0.0] * attribution.NODE_STATE
    row[attribution.MODE] = float(MODES.index(name))
    return LawState(cpu=CpuState(node=tuple(row)))


def told(held, at, laws, waiting=None, actions=(), pods=1):
    workloads = [pod(i) for i in range(pods)]
    seen = make.forecast({w.id: WorkloadForecast(cpu_pressure_ratio=waiting) for w in workloads})
    plan = Plan(sequence=1, actions=tuple(actions), verdicts=(CPU,))
    return held.look(make.snapshot(*workloads, at=at), seen, plan, laws)


def reasons(held, until, laws, waiting=None, begin=100):
    """Second by second: when each reason was told first."""
    found: dict[str, int] = {}
    for at in range(begin, until):
        for one in told(held, at, laws, waiting):
            found.setdefault(one.reason, at - begin)
    return found


def test_a_freeze_that_lasts_is_told_with_its_cause_and_since_when():
    held = HeldBack()
    assert told(held, 100, FROZEN, actions=[FREEZE]) == []
    (one,) = [told(held, at, FROZEN) for at in range(101, 107)][-1]
    assert (one.namespace, one.name, one.uid, one.reason) == ("ml", "train-0", "u0", "Frozen")
    assert one.message == "MemoryPressure: api stalls"
    assert one.since == "2023-11-14T22:15:00Z"


def test_a_freeze_that_is_over_at_once_is_not_told():
    held = HeldBack()
    assert reasons(held, 103, FROZEN) == {}
    assert reasons(held, 200, THAWED, begin=103) == {}


def test_what_is_over_is_told_as_over_and_then_no_longer():
    held = HeldBack()
    assert reasons(held, 110, FROZEN) == {"Frozen": LASTING_SECONDS}
    assert set(reasons(held, 139, THAWED, begin=110)) == {"Frozen"}, "it may begin again"
    (over,) = told(held, 110 + OVER_SECONDS, THAWED)
    assert (over.reason, over.message, over.uid) == ("", "", "u0")
    assert told(held, 110 + OVER_SECONDS + KEPT_SECONDS + 1, THAWED) == []


@pytest.mark.parametrize(
    ("laws", "waiting", "expected"),
    [
        pytest.param(mode("held"), None, {"Narrowed": 5}, id="kept to a grant, and waits are not known (cgroup v1)"),
        pytest.param(mode("asking, at the floor"), 1.0, {"Narrowed": 16}, id="at the floor, and it waits"),
        pytest.param(mode("held"), 0.1, {}, id="kept to a grant that is enough for it"),
        pytest.param(mode("asking, open"), 0.1, {}, id="asked with everything open"),
        pytest.param(mode("open"), 1.0, {"Waits": 26}, id="nothing is done, and services take the CPUs"),
        pytest.param(mode("open"), 0.4, {}, id="it waits less than half of the time"),
        pytest.param(mode("open"), None, {}, id="nothing is done, and nothing is known"),
    ],
)
def test_cpu_that_is_kept_from_a_pod_is_told(laws, waiting, expected):
    assert reasons(HeldBack(), 200, laws, waiting) == expected


def test_a_pod_that_is_gone_is_not_told_of():
    held = HeldBack()
    assert reasons(held, 110, FROZEN) == {"Frozen": LASTING_SECONDS}
    assert told(held, 111, THAWED, pods=0) == []


@given(st.lists(st.tuples(st.sampled_from([THAWED, FROZEN, mode("held")]), st.integers(0, 90)), max_size=40))
def test_no_more_is_told_than_may_be_and_nothing_changes_back_and_forth(ticks):
    held, at, changes = HeldBack(), 100.0, 0
    before: list[PodHeldBack] = []
    for laws, pods in ticks:
        at += 1
        now = told(held, at, laws, pods=pods)
        assert len(now) <= MOST
        assert [p.uid for p in now] == sorted(p.uid for p in now)
        released = {p.uid for p in before if p.reason} & {p.uid for p in now if not p.reason}
        changes += len(released)
        before = now
    assert changes <= 90 * (len(ticks) // OVER_SECONDS), "it is over only when it has been for half a minute"
