"""Which batch pods are told that services hold them back, tick by tick."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colocate.agent.held_back import KEPT_SECONDS, LASTING_SECONDS, OVER_SECONDS, HeldBack
from colocate.cluster.api import MOST_HELD_BACK
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


def pod(i=0, **changes):
    return msgspec.structs.replace(make.job(f"train-{i}", pod=f"ml/train-{i}", **changes), id=f"pod:u{i}")


def mode(name):
    row = [0.0] * attribution.NODE_STATE
    row[attribution.MODE] = float(MODES.index(name))
    return LawState(cpu=CpuState(node=tuple(row)))


def told(held, at, laws, waiting=None, actions=(), pods=1):
    workloads = [pod(i, frozen=f"pod:u{i}" in laws.freeze.since) for i in range(pods)]
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


def test_what_a_pod_is_held_back_by_changes_only_once_that_lasts():
    """A law that goes back and forth is not told step by step."""
    held, found = HeldBack(), []
    for at in range(100, 220):
        laws = FROZEN if (at // 4) % 2 else mode("held")
        found.append([one.reason for one in told(held, at, laws)])
    assert {tuple(reasons) for reasons in found} <= {(), ("Frozen",), ("Narrowed",)}
    assert sum(a != b for a, b in pairwise(found)) <= 1


def test_what_was_over_is_told_anew_only_once_it_lasts():
    held = HeldBack()
    assert reasons(held, 110, FROZEN) == {"Frozen": LASTING_SECONDS}
    assert set(reasons(held, 150, THAWED, begin=110)) == {"Frozen", ""}
    assert set(reasons(held, 153, FROZEN, begin=150)) == {""}
    assert set(reasons(held, 170, THAWED, begin=153)) == {""}


def test_a_pod_that_could_not_be_frozen_is_not_told_that_it_is():
    held = HeldBack()
    for at in range(100, 120):
        seen = make.forecast({"pod:u0": WorkloadForecast()})
        assert held.look(make.snapshot(pod(frozen=False), at=at), seen, Plan(sequence=1), FROZEN) == []


def test_of_more_pods_than_may_be_named_the_frozen_ones_are_and_who_is_named_stays():
    held, many = HeldBack(), MOST_HELD_BACK + 40
    last = f"pod:u{many - 1}"
    laws = msgspec.structs.replace(mode("held"), freeze=FreezeState(since={last: 100.0}))
    found = [{p.uid for p in told(held, at, laws, pods=many)} for at in range(100, 140)]
    assert len(found[-1]) == MOST_HELD_BACK
    assert last.removeprefix("pod:") in found[-1]
    assert found[-1] == found[10]


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from([THAWED, FROZEN, mode("held")]), st.integers(0, 90)), max_size=120))
def test_nothing_is_told_back_and_forth(ticks):
    """Of a pod that stays, no two words in less time than a word has to last."""
    held, at, since = HeldBack(), 100.0, dict[str, tuple[str, float]]()
    for laws, pods in ticks:
        at += 1
        now = told(held, at, laws, pods=pods)
        assert [p.uid for p in now] == sorted(p.uid for p in now)
        assert all(int(p.uid[1:]) < pods for p in now)
        for one in now:
            before, when = since.get(one.uid, (one.reason, at - LASTING_SECONDS))
            assert one.reason == before or at - when >= LASTING_SECONDS
            if one.reason != before or one.uid not in since:
                since[one.uid] = one.reason, at
        since = {uid: word for uid, word in since.items() if uid in {p.uid for p in now}}
