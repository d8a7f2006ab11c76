"""S2.8: the curve of a class is made better by what running jobs say of their progress."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colocate.decide.deadlines import Curve, Progress
from colocate.decide.power_jobs import Job
from colocate.decide.refine import (
    MOST_JOBS,
    TRY_EVERY,
    TRY_SECONDS,
    Heard,
    Ran,
    Saying,
    better,
    heard,
    known_classes,
    tried,
)
from colocate.model.power import falling, sweep_of
from colocate.model.refine import BEFORE_SECONDS, Did, refined
from colocate.policy.schema import PowerModel, PowerPoint, PowerPolicy
from colocate.snapshot import CardUser, NodeSnapshot
from tests.unit.test_power_caps import card, node
from tests.unit.test_power_model import DATA, sweeps

CAPS = np.array([100.0, 150.0, 200.0, 300.0])
TRUE, WRONG = np.array([1.2, 0.5, 0.2, 0.0]), np.array([0.6, 0.3, 0.1, 0.0])


def ran(scale: float, seconds: float, *watts: float, noise: float = 0.0, seed: int = 0) -> list[Did]:
    """What a job whose class's curve is the true one does."""
    generator = np.random.default_rng(seed)
    rates = [scale / (1.0 + float(np.interp(w, CAPS, TRUE))) * float(np.exp(generator.normal(0, noise))) for w in watts]
    return [Did(w, rate * seconds, seconds) for w, rate in zip(watts, rates, strict=True)]


@pytest.mark.parametrize(
    ("jobs", "expected", "within"),
    [
        pytest.param([], WRONG, 0.0, id="nobody said anything"),
        pytest.param([ran(1.0, 1e6, 150.0)], WRONG, 0.0, id="one cap alone tells only how fast the job is"),
        pytest.param([ran(1.0, 1e7, 100.0, 150.0, 200.0, 300.0)], TRUE, 0.01, id="a job under all caps"),
        pytest.param(
            [ran(2.0, 1e7, 100.0, 300.0), ran(0.1, 1e7, 150.0, 300.0), ran(7.0, 1e7, 200.0, 300.0)],
            TRUE,
            0.01,
            id="jobs of different speed, each under two caps",
        ),
        pytest.param([ran(1.0, 60.0, 100.0, 300.0)], WRONG, 0.06, id="a minute says little"),
        pytest.param([ran(1.0, 1e7, 50.0, 400.0)], WRONG, 0.0, id="caps outside of the curve are not used"),
    ],
)
def test_s2_8_a_curve_after_what_jobs_said(jobs: list[list[Did]], expected: np.ndarray, within: float) -> None:
    found, _ = refined(CAPS, WRONG, jobs)
    assert found == pytest.approx(expected, abs=max(within, 1e-12))


def test_s2_8_it_counts_as_much_as_the_curve_before_after_so_long_a_time() -> None:
    """Of a job whose scale is known well, by a long time at the greatest cap."""
    long = [Did(300.0, 1e9, 1e9), ran(1.0, BEFORE_SECONDS, 100.0)[0]]
    found, seconds = refined(CAPS, WRONG, [long])
    half = np.sqrt((1.0 + TRUE[0]) * (1.0 + WRONG[0])) - 1.0
    assert found[0] == pytest.approx(half, rel=0.02)
    assert seconds.tolist() == [BEFORE_SECONDS, 0.0, 0.0, 1e9]


@pytest.mark.parametrize("watts", [(120.0, 300.0), (165.0, 240.0, 300.0)], ids=str)
def test_s2_8_a_right_curve_stays_right_also_by_caps_between_its_points(watts: tuple[float, ...]) -> None:
    found, _ = refined(CAPS, TRUE, [ran(3.0, 1e7, *watts)])
    assert found == pytest.approx(TRUE, abs=2e-3)


def test_s2_8_caps_just_beyond_the_curves_ends_count_at_them() -> None:
    found, seconds = refined(CAPS, WRONG, [ran(1.0, 1e6, 99.0, 301.0)])
    assert found[0] == pytest.approx(TRUE[0], abs=0.02)
    assert seconds[-1] == 1e6


def test_s2_8_a_leap_does_not_ruin_a_curve() -> None:
    """A word that cannot be true changes a time threefold at most."""
    found, _ = refined(CAPS, WRONG, [[Did(100.0, 1.0, 1e6), Did(300.0, 1e6, 1e6)]])
    assert (1.0 + found[0]) <= 3.0 * (1.0 + WRONG[0]) + 1e-9


@given(
    jobs=st.lists(
        st.lists(
            st.tuples(st.sampled_from([90.0, 100.0, 120.0, 260.0, 300.0]), st.floats(0.0, 1e6), st.floats(1.0, 1e6)),
            max_size=4,
        ),
        max_size=4,
    )
)
@settings(max_examples=100, deadline=None)
def test_a_curve_falls_to_nothing_whatever_is_said(jobs: list[list[tuple[float, float, float]]]) -> None:
    found, seconds = refined(CAPS, WRONG, [[Did(*did) for did in job] for job in jobs])
    assert np.all(np.diff(found) <= 1e-12)
    assert found[-1] == WRONG[-1]
    assert np.isfinite(found).all()
    assert (seconds >= 0.0).all()


def test_s2_8_noisy_jobs_bring_the_curve_nearer() -> None:
    """Thirty jobs of ten minutes at each of two caps, whose rates are 5 % off: less than half of the error is left."""
    pairs = [(100.0, 300.0), (150.0, 300.0), (100.0, 200.0)] * 10
    jobs = [ran(1.0 + i / 7, 600.0, *caps, noise=0.05, seed=i) for i, caps in enumerate(pairs)]
    found, _ = refined(CAPS, WRONG, jobs)
    off = np.abs((1.0 + found) / (1.0 + TRUE) - 1.0)
    before = np.abs((1.0 + WRONG) / (1.0 + TRUE) - 1.0)
    assert off[:2].max() < before[:2].max() / 2.0


def says(at: float, ratio: float | None, limit: float, class_: str = "a", **more: object) -> NodeSnapshot:
    """j1 said that so much was done a second ago."""
    snapshot = node(card("GPU-0", "j1", limit_watts=limit), j1=300.0)
    told = msgspec.structs.replace(
        snapshot.workloads["j1"],
        power_class=class_,
        **{"done_ratio": ratio, "done_at_seconds": at - 1.0, "started_seconds": 0.0, **more},
    )
    return msgspec.structs.replace(snapshot, workloads={"j1": told}, monotonic_seconds=at)


def after(*snapshots: NodeSnapshot) -> tuple[Did, ...]:
    known = Heard()
    for snapshot in snapshots:
        known = heard(known, snapshot, PowerPolicy(models=(MODEL,), refine=True))
    return tuple(did for one in known.ran.values() for did in one.did)


MODEL = PowerModel("a", tuple(PowerPoint(int(w), s) for w, s in zip(CAPS, WRONG.tolist(), strict=True)))


def looks(*words: tuple[float, float, float], **more: Any) -> list[NodeSnapshot]:
    """A look each second from the first word to the last; a word is (when, done, the limit from then on)."""
    found, (at, ratio, limit), rest = [], words[0], list(words[1:])
    now = at - 1.0
    while True:
        if rest and now >= rest[0][0]:
            at, ratio, limit = rest.pop(0)
        found.append(says(now, None if now < at else ratio, limit, done_at_seconds=at, **more))
        if not rest and now > at:
            return found
        now += 1.0


HALF = [(10.0, 0.1, 300.0), (20.0, 0.3, 300.0), (30.0, 0.5, 300.0)]


@pytest.mark.parametrize(
    ("snapshots", "did"),
    [
        pytest.param(looks(*HALF), [(300, 0.2, 10)], id="so much under one limit, from the second word on"),
        pytest.param(looks(*HALF[:2]), [], id="before that it may have leapt, from a checkpoint"),
        pytest.param(looks(*HALF, frozen=True), [], id="it is frozen"),
        pytest.param(looks(*HALF, class_=""), [], id="it is of no class"),
        pytest.param(looks(*HALF, class_="unknown"), [], id="or of one that the policy does not have"),
        pytest.param(looks(*HALF[:2], (24.0, 0.4, 300.0), (30.0, 0.5, 300.0)), [(300, 0.1, 6)], id="too short a time"),
        pytest.param(looks(*HALF[:2], (30.0, 0.2, 300.0), (40.0, 0.4, 300.0)), [], id="it went back"),
    ],
)
def test_s2_8_what_a_job_did_under_a_limit(snapshots: list[NodeSnapshot], did: list[tuple[float, ...]]) -> None:
    assert [tuple(each) for each in after(*snapshots)] == [pytest.approx(each) for each in did]


def beside(snapshot: NodeSnapshot, **card: Any) -> NodeSnapshot:
    """Somebody else on its card."""
    uuid = next(iter(snapshot.cards))
    return msgspec.structs.replace(snapshot, cards={uuid: msgspec.structs.replace(snapshot.cards[uuid], **card)})


@pytest.mark.parametrize(
    "card",
    [
        pytest.param({"users": {"j1": CardUser(), "s1": CardUser()}}, id="a service"),
        pytest.param({"strangers": 1}, id="a stranger"),
        pytest.param({"suspended": {"j1": "suspended"}}, id="it was taken off it"),
    ],
)
def test_s2_8_what_a_job_does_beside_somebody_else_does_not_count(card: dict[str, Any]) -> None:
    every = looks(*HALF)
    disturbed = [beside(one, **card) if one.monotonic_seconds == 25.0 else one for one in every]
    assert after(*every)
    assert not after(*disturbed)


def test_s2_8_a_limit_that_changed_between_two_looks_is_not_taken_for_the_one_before() -> None:
    every = [one for one in looks(*HALF, (40.0, 0.6, 200.0)) if one.monotonic_seconds not in (20.0, 30.0)]
    assert all(one.watts != 200.0 for one in after(*every))


def test_what_is_said_while_models_are_not_refined_is_forgotten() -> None:
    known = Heard(saying={"j1": Saying(1.0, 0.1)}, ran=TOLD.ran)
    assert heard(known, says(10, 0.1, 300), PowerPolicy(models=(MODEL,))) == Heard(ran=TOLD.ran)


def test_of_a_class_the_latest_are_remembered_and_first_those_that_tell_something() -> None:
    """Whatever jobs of other classes say."""
    known = Heard(ran={"told": Ran("a", tuple(ran(1.0, 1e4, 100.0, 300.0)))})
    for i in range(MOST_JOBS + 5):
        for snapshot in looks(*HALF, started_seconds=float(i)):
            known = heard(known, snapshot, PowerPolicy(models=(MODEL,), refine=True))
        known = msgspec.structs.replace(known, saying={})
    assert len(known.ran) == MOST_JOBS
    assert "told" in known.ran
    assert f"j1 {MOST_JOBS + 4:.3f}" in known.ran


TOLD = Heard(ran={"j": Ran("a", tuple(ran(1.0, 1e6, 100.0, 300.0))), "k": Ran("b", tuple(ran(1.0, 1e6, 100.0, 300.0)))})


def test_s2_8_the_policys_models_are_used_as_they_are_unless_it_says_otherwise() -> None:
    assert better(PowerPolicy(models=(MODEL,)), TOLD).models == (MODEL,)
    found = better(PowerPolicy(models=(MODEL,), refine=True), TOLD).models[0]
    assert found.points[0].slowdown == pytest.approx(1.2, abs=0.02)
    assert found.points[-1] == MODEL.points[-1]
    about = known_classes(PowerPolicy(models=(MODEL,), refine=True), TOLD)[0]
    assert (about.jobs, about.seconds[0], about.policy) == (1, 1e6, tuple(WRONG))


@pytest.mark.parametrize(
    ("minute", "explore", "every", "more", "watts"),
    [
        pytest.param(TRY_EVERY - 1, True, 10.0, {"max_slowdown": 0.1}, 270.0, id="a tenth less, one minute of ten"),
        pytest.param(3, True, 10.0, {"max_slowdown": 0.1}, None, id="not in the other nine"),
        pytest.param(TRY_EVERY - 1, False, 10.0, {"max_slowdown": 0.1}, None, id="the policy does not let it"),
        pytest.param(TRY_EVERY - 1, True, 10.0, {"max_slowdown": 0.001}, None, id="it may not lose so much"),
        pytest.param(TRY_EVERY - 1, True, 10.0, {}, None, id="it did not say that it may lose anything"),
        pytest.param(TRY_EVERY - 1, True, 0.0, {"max_slowdown": 0.1}, None, id="it says nothing of its progress"),
        pytest.param(TRY_EVERY - 1, True, 50.0, {"max_slowdown": 0.1}, None, id="or too seldom"),
        pytest.param(
            TRY_EVERY - 1,
            True,
            10.0,
            {"due_seconds": 9000.0, "work_seconds": 8000.0},
            270.0,
            id="it has time to spare",
        ),
        pytest.param(
            TRY_EVERY - 1,
            True,
            10.0,
            {"due_seconds": 9000.0, "work_seconds": 8400.0},
            None,
            id="it has no time to spare",
        ),
    ],
)
def test_s2_8_a_job_is_tried_within_what_it_may_lose(
    minute: int, explore: bool, every: float, more: dict[str, Any], watts: float | None
) -> None:
    at = minute * TRY_SECONDS + 5.0
    snapshot = says(at, 0.3, 300, **more)
    policy = PowerPolicy(models=(MODEL,), refine=True, explore=explore)
    job = Job("j1", ("GPU-0",), 100.0, 300.0, np.inf)
    known = Heard(saying={"j1": Saying(at - 1.0, 0.3, 300.0, every)})
    found = tried(known, snapshot, policy, [job], {"j1": Curve(CAPS, WRONG)}, {"j1": Progress(0.0, at)})
    assert found == ({} if watts is None else {"j1": watts})


@pytest.mark.parametrize("device", ["v100", "a40"])
def test_s2_8_on_public_sweeps_another_jobs_curve_becomes_this_ones(device: str) -> None:
    """Each job begins with the mean curve of the others; 20 minutes at each of four caps halve what it is off by, and
    two hours leave less than a fifth."""
    curves = {key: sweep_of(samples) for key, samples in sweeps(DATA, device).items() if key[0] == device}
    caps = next(iter(curves.values())).caps
    slower = {key: np.interp(caps, sweep.caps, falling(sweep.slowdowns)) for key, sweep in curves.items()}
    off: dict[float, list[float]] = {0.0: [], 1200.0: [], 7200.0: []}
    for key, true in slower.items():
        others = falling(np.mean([s for other, s in slower.items() if other != key], axis=0))
        for seconds, found in off.items():
            did = [Did(float(caps[i]), seconds / (1.0 + true[i]), seconds) for i in range(0, caps.size, 2)][-4:]
            known, _ = refined(caps, others, [did] if seconds else [])
            at = np.isin(caps, [one.watts for one in did])
            found.append(float(np.abs((1.0 + known[at]) / (1.0 + true[at]) - 1.0).max()))
    before, after, long = (float(np.median(off[seconds])) for seconds in off)
    assert before > 0.02, "they differ"
    assert after < 0.5 * before
    assert long < 0.2 * before
