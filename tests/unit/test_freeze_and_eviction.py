"""The laws of freezing and eviction, tick by tick."""

import msgspec
import pytest

from colocate.decide.eviction import EvictionState, decide_eviction, still_leaving
from colocate.decide.freeze import FreezeState, decide_freeze
from colocate.plan import Request
from tests import make

replace = msgspec.structs.replace


def freeze(now, requests, state):
    return decide_freeze(make.view(now, requests=requests), state)


def evict(now, requests, state):
    return decide_eviction(make.view(now, requests=requests), state)


def request(verb, workload="job:train", law="memory"):
    return Request(verb=verb, workload=workload, law=law, reason="MemoryPressure", message="because")


def test_a_freeze_is_made_on_request_and_undone_without():
    frozen = make.job(frozen=True)
    made = freeze(make.snapshot(make.job()), [request("freeze")], FreezeState())
    undone = freeze(make.snapshot(frozen), [], made.state)
    assert [(a.knob, a.value) for a in made.actions] == [("cgroup.freeze", "1")]
    assert [(a.knob, a.value) for a in undone.actions] == [("cgroup.freeze", "0")]


def test_a_job_frozen_too_long_is_evicted():
    first = freeze(make.snapshot(make.job(), at=100), [request("freeze")], FreezeState())
    later = freeze(make.snapshot(make.job(frozen=True), at=131), [request("freeze")], first.state)
    assert [r.reason for r in later.requests] == ["FrozenTooLong"]


def test_a_thaw_beats_a_freeze_and_the_loser_is_recorded():
    found = freeze(
        make.snapshot(make.job(frozen=True)), [request("freeze"), request("thaw", law="eviction")], FreezeState()
    )
    assert [(a.knob, a.value) for a in found.actions] == [("cgroup.freeze", "0")]
    assert found.rejected


def test_13_a_job_that_is_taken_off_its_card_is_thawed_and_not_frozen():
    both = [request("freeze"), request("suspend", law="gpu-memory")]
    frozen = make.snapshot(make.job(frozen=True), at=101)
    found = freeze(frozen, both, FreezeState(since={"job:train": 100.0}))
    assert [(a.knob, a.value) for a in found.actions] == [("cgroup.freeze", "0")]
    assert found.suspended == ("job:train",)
    assert [r.considered for r in found.rejected] == ["freezing train for memory"]


def test_an_eviction_is_thaw_and_sigterm_then_grace_then_kill():
    first = evict(make.snapshot(make.job(frozen=True), at=100), [request("evict")], EvictionState())
    assert [(a.knob, a.value) for a in first.actions] == [("signal", "SIGTERM")]
    assert [r.verb for r in first.requests] == ["thaw"]
    waiting = evict(make.snapshot(make.job(), at=104), [], first.state)
    assert list(waiting.actions) == []
    killed = evict(make.snapshot(make.job(), at=106), [], waiting.state)
    assert [a.knob for a in killed.actions] == ["cgroup.kill"]
    gone = evict(make.snapshot(at=107), [], killed.state)
    assert gone.state.under_way == {}


def test_one_eviction_is_for_one_instance():
    now = evict(make.snapshot(make.job(), at=100), [request("evict")], EvictionState())
    again = msgspec.structs.replace(make.job(), inodes={"unified": 12})
    anew = evict(make.snapshot(again, at=106), [], now.state)
    assert anew.actions == [], "its owner has started it again, and nobody asks for its end"
    asked = evict(make.snapshot(again, at=107), [request("evict")], anew.state)
    assert [(a.knob, a.value) for a in asked.actions] == [("signal", "SIGTERM")]


def test_an_eviction_ends_soon_after_the_kill():
    state = evict(make.snapshot(make.job(), at=100), [request("evict")], EvictionState()).state
    kills = []
    for at in range(101, 120):
        found = evict(make.snapshot(make.job(), at=at), [], state)
        state = found.state
        kills += [at for a in found.actions if a.knob == "cgroup.kill"]
    assert kills
    assert max(kills) < 112


def test_an_eviction_kills_once_at_least_however_late_the_tick():
    state = evict(make.snapshot(make.job(), at=100), [request("evict")], EvictionState()).state
    late = evict(make.snapshot(make.job(), at=160), [], state)
    assert [a.knob for a in late.actions] == ["cgroup.kill"]


def test_what_we_froze_in_place_is_thawed_until_it_is():
    frozen = make.job(in_place=True, frozen=True)
    state = FreezeState(since={"job:train": 90.0})
    for _ in range(3):  # the write fails
        found = freeze(make.snapshot(frozen), [], state)
        assert [a.value for a in found.actions] == ["0"]
        state = found.state
    assert freeze(make.snapshot(make.job(in_place=True)), [], state).state.since == {}


def test_what_others_froze_in_place_is_not_ours_to_thaw():
    paused = make.job(in_place=True, frozen=True)
    assert freeze(make.snapshot(paused), [], FreezeState()).actions == []
    ours = FreezeState(since={"job:train": 90.0})
    assert [a.value for a in freeze(make.snapshot(paused), [], ours).actions] == ["0"]
    asked = freeze(make.snapshot(paused), [request("thaw")], FreezeState())
    assert [a.value for a in asked.actions] == ["0"], "one that must end must run"


def test_a_job_past_its_maximum_runtime_is_evicted():
    old = make.job(started_seconds=1.0, max_runtime_seconds=50.0)
    found = evict(make.snapshot(old, at=100), [], EvictionState())
    assert [a.reason for a in found.actions] == ["MaxRuntime"]


@pytest.mark.parametrize("jump", [pytest.param(86400.0, id="forward"), pytest.param(-86400.0, id="back")])
def test_a_clock_that_is_set_evicts_nobody(jump):
    young = make.job(started_seconds=90.0, max_runtime_seconds=50.0)
    now = make.snapshot(young, at=100, time_seconds=1_700_000_000.0 + jump)
    assert evict(now, [], EvictionState()).actions == []


def test_a_job_that_cannot_be_frozen_is_not_evicted_as_frozen_too_long():
    state, follow = FreezeState(), []
    for at in range(100, 200):
        found = freeze(make.snapshot(make.job(frozen=False), at=at), [request("freeze")], state)
        state = found.state
        follow += found.requests
    assert follow == []


# a pod that the API server knows


def pod(**changes):
    return make.job("podabc", pod="ns/train", **changes)


def asked(reason="MemoryPressure"):
    return Request(verb="evict", workload="job:podabc", law="memory", reason=reason, message="because")


def test_a_pod_is_asked_for_before_it_is_signalled():
    first = evict(make.snapshot(pod(), at=100), [asked()], EvictionState())
    assert first.actions == []
    assert first.state.under_way["job:podabc"].asked == 115.0
    waiting = evict(make.snapshot(pod(), at=114), [], first.state)
    assert waiting.actions == []
    told = evict(make.snapshot(pod(), at=116), [], waiting.state)
    assert [(a.knob, a.value) for a in told.actions] == [("signal", "SIGTERM")]
    killed = evict(make.snapshot(pod(), at=122), [], told.state)
    assert [a.knob for a in killed.actions] == ["cgroup.kill"]


def test_a_pod_that_goes_by_itself_is_not_signalled():
    first = evict(make.snapshot(pod(), at=100), [asked()], EvictionState())
    gone = evict(make.snapshot(pod(processes=0), at=103), [], first.state)
    assert gone.state.under_way == {}
    assert gone.actions == []


def test_a_pod_is_not_killed_against_its_budget_because_it_was_frozen():
    """Its kubelet would start it again on the spot."""
    wish = [asked("FrozenTooLong")]
    state = evict(make.snapshot(pod(frozen=True), at=100), wish, EvictionState()).state
    found = evict(make.snapshot(pod(frozen=True), at=1000), wish, state)
    assert found.actions == []
    assert found.requests == []
    assert "job:podabc" in found.state.under_way


def test_a_pod_that_nobody_wants_gone_any_more_stays():
    state = evict(make.snapshot(pod(frozen=True), at=100), [asked("FrozenTooLong")], EvictionState()).state
    assert evict(make.snapshot(pod(), at=101), [], state).state.under_way == {}


def test_what_a_budget_may_refuse_for_ever_is_nothing_to_count_on():
    """Memory that services need later is not waited for from a pod that was asked for because it was frozen."""
    wish = [asked("FrozenTooLong")]
    snapshot = make.snapshot(pod(frozen=True), at=100)
    state = evict(snapshot, wish, EvictionState()).state
    assert not still_leaving(snapshot, "job:podabc", state.under_way["job:podabc"], 110.0)
    urgent = evict(make.snapshot(pod(frozen=True), at=200), [asked()], state)
    assert urgent.state.under_way["job:podabc"].reason == "MemoryPressure"
    told = evict(make.snapshot(pod(frozen=True), at=216), [], urgent.state)
    assert [(a.knob, a.value) for a in told.actions] == [("signal", "SIGTERM")]


def test_a_pod_whose_end_has_begun_is_thawed():
    state = evict(make.snapshot(pod(frozen=True), at=100), [asked()], EvictionState()).state
    found = evict(make.snapshot(pod(frozen=True, leaving=True), at=101), [], state)
    assert [r.verb for r in found.requests] == ["thaw"]


def test_while_a_pod_is_asked_for_no_other_one_has_to_go():
    snapshot = make.snapshot(pod(), at=100)
    state = evict(snapshot, [asked()], EvictionState()).state
    assert still_leaving(snapshot, "job:podabc", state.under_way["job:podabc"], 110.0)
