"""The law of a card, on the fake card: cases by number as the acceptance cases of the GPU work, in virtual time."""

from __future__ import annotations

from typing import NamedTuple

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.gpu.world import World
from colocate.decide.gpu import (
    FIRST_HOLD_SECONDS,
    CardSeen,
    CardState,
    JobSeen,
    ServiceSeen,
    decide_card,
)
from colocate.fakecard.card import MILLISECOND, SECOND
from colocate.fakecard.workloads import Service, asynchronous, blocking, trainer
from colocate.model.gpu import SIGMA, Drains, Slowdown, learn, queueing, stretch
from colocate.model.special import binomial_bound

VISION_P99 = 0.0523
"""Of the vision service at ten requests a second, alone: see the first test."""


def vision(factor, **more):
    """A service of requests of 20 ms, ten a second, which the law has known for a minute."""
    world = World(10.0, factor * VISION_P99, **more)
    world.serve(Service.vision)
    world.run(60)
    return world


class Came(NamedTuple):
    """Of a time beside batch: p99 to that of the same requests without it, and shares: late requests, the job's."""

    p99: float
    late: float
    share: float


def beside(world, program, seconds, settle=30):
    """What came of it after the law has settled, and of the same arrivals on a card of their own."""
    job = world.batch(program)
    world.run(settle)
    before, busy, since = len(world.latencies), job.process.client.busy_ns, world.card.now
    world.run(seconds)
    twin = world.alone()
    late = sum(ns > world.target * SECOND for ns in world.latencies[before:]) / (len(world.latencies) - before)
    p99 = world.quantile(0.99, before) / twin.quantile(0.99, before)
    return Came(p99, late, world.share(job, busy, since))


def test_the_service_alone_is_as_the_cases_say():
    world = World(10.0, 1.0)
    world.serve(Service.vision)
    world.run(600)
    assert world.quantile(0.99) == pytest.approx(VISION_P99, rel=0.05)


def test_1_a_gate_where_the_drain_fits_into_the_headroom():
    world = vision(1.5)
    came = beside(world, blocking(), 300)
    assert world.state.mode == "gate"
    assert came.p99 <= 1.25
    assert came.share >= 0.6


def test_2_a_drain_beyond_the_headroom_is_said_and_the_job_kept_off():
    world = vision(1.5)
    came = beside(world, asynchronous(), 200)
    assert (world.state.mode, came.share) == ("off", 0.0)
    assert came.p99 <= 1.03
    assert world.decision is not None
    verdict = world.decision.verdict
    assert verdict.reason == "CannotProtect"
    assert verdict.message.startswith("drain 1.")
    assert "headroom 2" in verdict.message or "headroom 3" in verdict.message
    assert verdict.numbers["drain_seconds"] > 1.0


def test_3_a_dial_where_requests_last_for_many_periods():
    world = World(0.3, 1.3 * 1.27, sensor="", seed=5)
    world.serve(lambda service: service.language(prefill_ns=100 * MILLISECOND, tokens=100))
    world.run(1500)
    came = beside(world, trainer(kernels=4), 1500, settle=60)
    assert world.state.mode == "dial"
    assert came.share >= 0.08
    assert 0.1 <= world.state.share <= 0.45
    assert came.late <= 0.02
    assert came.p99 <= 1.3
    assert world.state.slowdown.error < 0.1, "what a share costs is predicted within ten per cent"


def test_4_where_there_is_room_for_everything_nothing_is_ever_written():
    world = vision(4.0)
    came = beside(world, trainer(), 300)
    assert (world.state.mode, world.writes) == ("open", 0)
    assert world.verdicts == {"Open": 330}
    assert came.share > 0.6


def test_5_nothing_is_cried_without_batch_on_the_card():
    """At a target so near that a plain p99 of ten seconds is past it now and then."""
    world = vision(1.15)
    beside(world, asynchronous(), 1800)
    assert set(world.verdicts) <= {"Learning", "CannotProtect"}


def test_6_a_service_that_is_slow_by_itself_is_not_ours():
    world = vision(1.5)
    job = world.batch(blocking())
    world.run(30)
    world.service.slower = 2.5
    world.run(60)
    assert world.verdicts["NotOurs"] > 30
    assert world.state.not_ours
    assert world.state.hold_seconds == FIRST_HOLD_SECONDS, "nothing is doubled"
    busy = job.process.client.busy_ns
    world.run(10)
    assert job.process.client.busy_ns > busy, "it is let go on probation"
    world.service.slower = 1.0
    world.run(120)
    assert not world.state.not_ours
    assert world.state.mode == "gate"


def test_7_only_the_first_request_of_a_burst_meets_batch():
    world = vision(1.5)
    job = world.batch(blocking())
    world.run(60)
    world.arrivals.per_second = 0.0
    world.run(20)
    drain = job.drains.bound()
    before = len(world.latencies)
    world.arrivals.per_second = 10.0
    world.run(2)
    first = world.latencies[before] / SECOND
    assert first <= 0.0202 + 0.005 + drain + 0.0022 + 0.005, "its own time, reaction, drain, slice, and a look"
    assert drain <= 0.015


def test_8_an_exporter_that_is_gone_opens_nothing():
    world = vision(1.5)
    world.batch(blocking())
    world.run(30)
    hold_off = world.state.hold_off
    world.exporter_works = False
    world.run(60)
    assert (world.state.mode, world.state.hold_off) == ("gate", pytest.approx(hold_off, rel=0.7))
    assert world.verdicts["StaleReadings"] > 50
    settled = world.state.hold_off
    world.run(10)
    assert world.state.hold_off == settled


def test_a_service_that_starts_anew_is_still_known():
    """Its counters begin at nothing; how it is alone need not be learnt again with batch off."""
    world = vision(1.5)
    world.batch(blocking())
    world.run(30)
    world.histogram.each = [0] * len(world.histogram.each)
    verdicts = dict(world.verdicts)
    world.run(20)
    assert world.state.mode == "gate"
    assert world.verdicts["Learning"] == verdicts["Learning"]


def test_8_where_all_was_open_the_gate_closes_by_the_sensor():
    world = vision(4.0)
    world.batch(trainer())
    world.run(30)
    world.exporter_works = False
    world.run(20)
    assert world.state.mode == "gate"


def test_9_without_a_sensor_a_short_request_cannot_be_protected_and_that_is_why():
    world = vision(1.5, sensor="")
    came = beside(world, blocking(), 60)
    assert (world.state.mode, came.share) == ("off", 0.0)
    assert world.decision is not None
    assert "nothing shows within milliseconds that it is idle" in world.decision.verdict.message


@pytest.mark.parametrize(
    ("services", "jobs"),
    [
        pytest.param((), (JobSeen(id="j", name="j"),), id="20: batch alone on its card"),
        pytest.param((ServiceSeen(id="s", name="s", target_seconds=0.1),), (), id="a service alone on its card"),
    ],
)
def test_who_shares_nothing_is_left_alone(services, jobs):
    found = decide_card(CardSeen(uuid="GPU-0", now=5.0, services=services, jobs=jobs), CardState())
    assert (found.state.mode, found.verdict.reason) == ("open", "NothingShared")


@pytest.mark.parametrize(
    ("trials", "soft", "hard"), [(100, 3, 5), (200, 5, 8), (400, 8, 11), (1000, 15, 21), (0, 0, 0)]
)
def test_how_many_late_requests_are_chance(trials, soft, hard):
    assert (binomial_bound(trials, 0.01, 0.95), binomial_bound(trials, 0.01, 0.999)) == (soft, hard)


def test_what_a_share_costs_is_learnt():
    slowdown = Slowdown()
    for share in (0.1, 0.3, 0.5, 0.2) * 10:
        slowdown = learn(slowdown, share, 1.0, stretch(0.35, share))
    assert slowdown.sigma == pytest.approx(0.35, abs=0.01)
    assert slowdown.error < 0.02
    assert learn(slowdown, 0.0, 1.0, 9.0) == slowdown


def test_closed_forms():
    assert SIGMA == 0.56
    assert stretch(SIGMA, 0.5) == pytest.approx(1 / (1 - 0.28))
    assert stretch(1.0, 1.0) == float("inf")
    assert queueing(0.15, 1.27) == pytest.approx(0.85 / (1 - 0.1905))
    assert queueing(0.6, 2.0) == float("inf")


def test_a_drain_is_a_second_until_it_is_known_and_old_ones_are_forgotten():
    drains = Drains()
    assert drains.bound() == 1.0
    for i in range(20):
        drains = drains.add(float(i), 0.3)
    assert drains.bound() == 0.3
    for i in range(20):
        drains = drains.add(600.0 + i, 0.01)
    assert drains.bound() == 0.01


readings = st.lists(
    st.tuples(st.integers(0, 200), st.integers(0, 50), st.booleans(), st.booleans(), st.floats(0.0, 2.0)), max_size=60
)


@settings(deadline=None)
@given(readings, st.sampled_from(["", "gauge"]), st.floats(0.001, 10.0))
def test_whatever_is_seen_a_decision_comes_of_it_and_what_it_says_is_what_it_does(readings, sensor, target):
    """Histograms that start anew, jobs that come and go, drains of any length."""
    state, fast, slow, drains = CardState(), 0, 0, Drains()
    for at, (more, late, anew, job, drain) in enumerate(readings):
        fast, slow = (0, 0) if anew else (fast + more, slow + late)
        counts = (float(fast), float(fast + slow), float(fast + slow))
        service = ServiceSeen(
            id="s",
            name="s",
            target_seconds=target,
            bounds_seconds=(target / 2, target * 2),
            counts=counts,
            read_at=float(at),
        )
        drains = drains.add(at, drain)
        jobs = (JobSeen(id="j", name="j", drains=drains),) if job else ()
        seen = CardSeen(uuid="G", now=float(at), services=(service,), jobs=jobs, sensor=sensor)
        found = decide_card(seen, state)
        assert found == decide_card(seen, state)
        state = msgspec.json.decode(msgspec.json.encode(found.state), type=CardState) if at % 7 else found.state
        assert 0.0 <= state.share <= 1.0
        assert 0.0 <= found.on_seconds <= found.period_seconds
        assert (found.period_seconds > 0.0) == (state.mode == "dial")
        assert state.mode != "gate" or sensor
        assert found.verdict.state == state.mode
        assert state.mode == "open" or jobs
        assert state.mode == "off" or state.off_at is None
