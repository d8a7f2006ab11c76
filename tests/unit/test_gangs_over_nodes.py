"""A member of a gang is frozen on another node: who waits for it stands still, for a while."""

from __future__ import annotations

import msgspec
import pytest

from colocate.agent.held_back import HeldBack
from colocate.agent.publisher import pod_of
from colocate.decide.freeze import FreezeState
from colocate.decide.gangs import GangsState, decide_gangs
from colocate.decide.pipeline import LawState
from colocate.objects import GANG_HELD, Condition, ObjectMeta, PodStatus
from colocate.objects import Pod as PodObject
from colocate.policy.schema import FreezePolicy
from tests import make

WHY = "on n1: worker-0 is frozen: CardMemory: 0 free"


def asked(at, state=None, spec=None, **job):
    found = decide_gangs(make.view(make.snapshot(make.job(**job), at=at), spec=spec), state or GangsState())
    return [(r.verb, r.reason, r.message) for r in found.requests], found.state


def test_who_waits_stands_still_and_says_why():
    assert asked(100, gang="pods/ml/train", gang_held=WHY)[0] == [("freeze", "GangHeld", WHY)]
    assert asked(100, gang="pods/ml/train")[0] == []


def test_what_is_never_taken_back_holds_nobody_for_ever():
    requests, state = asked(100, gang="pods/ml/train", gang_held=WHY)
    for at in (130, 159):
        requests, state = asked(at, state, gang="pods/ml/train", gang_held=WHY)
        assert requests
    for at in (161, 1000):
        requests, state = asked(at, state, gang="pods/ml/train", gang_held=WHY)
        assert requests == []
    requests, state = asked(1001, state, gang="pods/ml/train")
    assert asked(1002, state, gang="pods/ml/train", gang_held=WHY)[0], "told anew"


def test_the_policy_may_leave_each_member_alone():
    spec = msgspec.structs.replace(make.SPEC, freeze=FreezePolicy(gangs="alone"))
    assert asked(100, spec=spec, gang="pods/ml/train", gang_held=WHY)[0] == []


@pytest.mark.parametrize(
    ("since", "held", "expected"),
    [
        pytest.param({"job:train": 95.0}, {}, {"ml/train": "train is frozen: "}, id="for five seconds, by itself"),
        pytest.param({"job:train": 99.0}, {}, {}, id="for a second: the others just wait"),
        pytest.param({}, {}, {}, id="not by us"),
        pytest.param(
            {"job:train": 95.0}, {"job:train": 94.0}, {}, id="as another node's member is: it says nothing of it"
        ),
    ],
)
def test_which_gangs_an_agent_tells_of(since, held, expected):
    job = make.job(frozen=True, gang="pods/ml/train", pod="ml/worker-1")
    laws = LawState(freeze=FreezeState(since=since), gangs=GangsState(held))
    assert HeldBack().frozen_gangs(make.snapshot(job, at=100), laws) == expected


def test_an_agent_reads_it_from_its_own_pods():
    meta = ObjectMeta(name="worker-1", namespace="ml", uid="u", labels={"scheduling.x-k8s.io/pod-group": "train"})
    told = Condition(type=GANG_HELD, status="True", reason="MemberFrozen", message=WHY)
    pods = [pod_of(PodObject(metadata=meta, status=PodStatus(conditions=c)), 0.0) for c in ([told], [])]
    assert [p.as_batch["gang_held"] if p is not None else None for p in pods] == [WHY, ""]
