"""The guard of a card's memory: when batch is stopped, who goes, and what a declaration is held to."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colocate.cluster.card_memory import declared_bytes
from colocate.decide.card_memory import Bounds, CardMemory, Suspended, guard
from colocate.objects import Container, ObjectMeta, Pod, PodSpec, Resources
from colocate.snapshot import Card, CardUser, Workload

GIB, MIB = 1 << 30, 1 << 20
WEB = Workload(id="web", name="web", tier="service", path="/web")


def job(name, declared=None):
    return Workload(id=name, name=name, tier="batch", path=f"/{name}", gpu_memory_bytes=declared)


def card(at, web, **jobs):
    users = {"web": CardUser(memory_bytes=web)} | {n: CardUser(memory_bytes=b) for n, b in jobs.items()}
    used = web + sum(b or 0 for b in jobs.values())
    return Card(uuid="GPU-0", at_seconds=at, memory_bytes=24 * GIB, memory_used_bytes=used, users=users)


def run(*readings, jobs=("a",), declared=None, reserve=GIB):
    """(seconds, the service's bytes, each job's): what is wanted after the last of them."""
    state, batch, found = CardMemory(), [job(n, declared) for n in jobs], None
    for at, web, *each in readings:
        found = guard(card(at, web, **dict(zip(jobs, each, strict=True))), [WEB], batch, state, Bounds(reserve))
        state = found.state
    return found


def wanted(found):
    return [(r.verb, r.workload) for r in found.requests]


@pytest.mark.parametrize(
    ("readings", "jobs", "expected"),
    [
        pytest.param([(1, 8 * GIB, 2 * GIB), (2, 8 * GIB, 2 * GIB)], ("a",), [], id="there is room, and nobody grows"),
        pytest.param(
            [(1, 20 * GIB, 2600 * MIB), (2, 20 * GIB, 2700 * MIB)],
            ("a",),
            [("freeze", "a")],
            id="100 MiB/s reach the reserve within five seconds: stopped before that",
        ),
        pytest.param(
            [(1, 20 * GIB, 2000 * MIB), (2, 20 * GIB, 2100 * MIB)], ("a",), [], id="at that speed it is further away"
        ),
        pytest.param(
            [(1, 20 * GIB, 2 * GIB), (2, 22 * GIB, 2 * GIB - 1)],
            ("a",),
            [("freeze", "a")],
            id="the service grew into the reserve: batch is stopped",
        ),
        pytest.param(
            [(1, 21 * GIB, 2 * GIB, GIB), (2, 21 * GIB, 2 * GIB, GIB), (3.5, 21 * GIB, 2 * GIB, GIB)],
            ("a", "b"),
            [("evict", "a"), ("freeze", "b")],
            id="the reserve stays touched for two seconds: who holds most goes, the other stands still",
        ),
        pytest.param(
            [(1, 20 * GIB, 2600 * MIB), (2, 20 * GIB, 2700 * MIB), (3, 20 * GIB, 2700 * MIB)],
            ("a",),
            [("freeze", "a")],
            id="once stopped it stays so while less than twice the reserve is free",
        ),
        pytest.param(
            [
                (1, 20 * GIB, 2600 * MIB),
                (2, 20 * GIB, 2700 * MIB),
                (3, 15 * GIB, 2700 * MIB),
                (9, 15 * GIB, 2700 * MIB),
            ],
            ("a",),
            [],
            id="the service gave much back: batch goes on",
        ),
    ],
)
def test_what_is_wanted(readings, jobs, expected):
    assert wanted(run(*readings, jobs=jobs)) == expected


def test_who_declares_more_than_there_is_room_for_goes_before_it_has_taken_that():
    found = run((1, 10 * GIB, GIB), declared=14 * GIB)
    assert wanted(found) == [("evict", "a")]
    assert found.verdict.message == (
        "a declares 14.0 GiB, the services used up to 10.0 GiB, the reserve is 1.0 GiB: more than the card's 24.0 GiB"
    )
    assert wanted(run((1, 10 * GIB, GIB), declared=13 * GIB)) == []


def test_a_services_peak_counts_for_ten_minutes():
    readings = [(1, 12 * GIB, GIB), (300, 4 * GIB, GIB)]
    assert wanted(run(*readings, declared=12 * GIB)) == [("evict", "a")]
    assert wanted(run(*readings, (700, 4 * GIB, GIB), declared=12 * GIB)) == []


def test_unknown_memory_is_no_verdict():
    seen = Card(uuid="GPU-0", at_seconds=1.0, users={"web": CardUser(), "a": CardUser()})
    found = guard(seen, [WEB], [job("a")], CardMemory(), Bounds(GIB))
    assert (found.verdict, found.requests) == (None, [])


def test_a_reading_that_is_not_newer_changes_nothing():
    stopped = run((1, 20 * GIB, 2600 * MIB), (2, 20 * GIB, 2700 * MIB))
    again = guard(card(2, 20 * GIB, a=2700 * MIB), [WEB], [job("a")], stopped.state, Bounds(GIB))
    assert (again.state, wanted(again)) == (stopped.state, [("freeze", "a")])


@settings(deadline=None)
@given(
    growth=st.integers(1, 400),
    service=st.integers(1, 18),
    tick=st.sampled_from([0.25, 1.0, 2.0]),
    start=st.integers(0, 4),
)
def test_a_steady_grower_is_stopped_before_the_reserve(growth, service, tick, start):
    state, held, at = CardMemory(), start * GIB, 0.0
    while True:
        at += tick
        found = guard(card(at, service * GIB, a=held), [WEB], [job("a")], state, Bounds(GIB))
        state = found.state
        if wanted(found):
            break
        held += int(growth * MIB * tick)
    assert 24 * GIB - service * GIB - held >= GIB


def held(at, web, how=None, job_bytes=0, **bounds):
    """A card from which `a` was taken, 10 GiB."""
    seen = card(at, web, a=job_bytes)
    state = CardMemory(at=at - 1, suspended={"a": Suspended(10 * GIB, 1.0)})
    seen = msgspec.structs.replace(seen, suspended={} if how is None else {"a": how})
    return guard(seen, [WEB], [job("a")] if job_bytes else [], state, Bounds(GIB, there=frozenset({"a"}), **bounds))


def test_the_largest_is_taken_into_the_hosts_memory_where_that_may_be():
    batch, state = [job("a"), job("b")], CardMemory()
    for at in (1, 2, 3.5):
        bounds = Bounds(GIB, can_be_suspended=frozenset({"a"}))
        found = guard(card(at, 21 * GIB, a=2 * GIB, b=GIB), [WEB], batch, state, bounds)
        state = found.state
    assert wanted(found) == [("suspend", "a"), ("freeze", "b")]
    assert state.suspended == {"a": Suspended(2 * GIB, 3.5)}


def test_a_job_that_has_been_stopped_for_memory_for_long_is_taken_off_the_card():
    bounds, state = Bounds(GIB, can_be_suspended=frozenset({"a"})), CardMemory()
    asked = []
    for at in range(1, 20):
        found = guard(card(at, 22 * GIB - MIB, a=GIB), [WEB], [job("a")], state, bounds)
        state = found.state
        asked += wanted(found)[:1]
        if at == 1:
            state = msgspec.structs.replace(state, stopped=True)
    assert [verb for verb, _ in asked[:14]] == ["freeze"] * 14, asked
    assert ("suspend", "a") in asked


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        pytest.param(held(10, 20 * GIB, "going"), [("suspend", "a")], id="on its way"),
        pytest.param(held(10, 20 * GIB, "suspended"), [("suspend", "a")], id="there is no room: it stays away"),
        pytest.param(held(10, 20 * GIB, "no such call"), [("evict", "a"), ("suspend", "a")], id="it failed: it goes"),
        pytest.param(
            held(800, 20 * GIB, "suspended"), [("evict", "a"), ("suspend", "a")], id="too long away: it runs elsewhere"
        ),
    ],
)
def test_what_is_taken_off_its_card(found, expected):
    assert wanted(found) == expected


def test_it_comes_back_when_there_has_been_room_for_a_minute():
    state = CardMemory(suspended={"a": Suspended(10 * GIB, 1.0)})
    away = []
    for at in range(10, 100, 5):
        seen = msgspec.structs.replace(card(at, 8 * GIB), suspended={"a": "suspended"})
        found = guard(seen, [WEB], [], state, Bounds(GIB, there=frozenset({"a"})))
        state = found.state
        away.append(bool(wanted(found)))
    assert away == [True] * 12 + [False] * 6


@pytest.mark.parametrize(
    ("jobs", "declared", "expected"),
    [
        pytest.param({"a": 2 * GIB}, None, {"web": (10 * GIB, None), "a": (0, 13 * GIB)}, id="all but what is kept"),
        pytest.param({"a": 2 * GIB}, 6 * GIB, {"web": (10 * GIB, None), "a": (0, 6 * GIB)}, id="what it declares"),
        pytest.param(
            {"a": 2 * GIB, "b": 4 * GIB},
            None,
            {"web": (10 * GIB, None), "a": (0, 9 * GIB), "b": (0, 11 * GIB)},
            id="what the others have is theirs",
        ),
        pytest.param(
            {"a": 13 * GIB + 1},
            None,
            {"web": (10 * GIB, None), "a": (0, 13 * GIB + 256 * MIB)},
            id="what it has is not taken by a limit",
        ),
    ],
)
def test_limits_are_what_services_used_and_what_that_leaves(jobs, declared, expected):
    seen = msgspec.structs.replace(card(1, 10 * GIB, **jobs), limits=True)
    batch = [job(n, declared if n == "a" else None) for n in jobs]
    found = guard(seen, [WEB], batch, CardMemory(), Bounds(GIB))
    assert {x.workload: (x.soft_bytes, x.hard_bytes) for x in found.limits} == expected
    plain = guard(card(1, 10 * GIB, **jobs), [WEB], batch, CardMemory(), Bounds(GIB))
    assert plain.limits == [], "a driver without limits is asked for none"


def pod(annotations=None, **limits):
    container = Container(name="c", resources=Resources(limits={k.replace("__", "/"): v for k, v in limits.items()}))
    return Pod(metadata=ObjectMeta(name="p", annotations=annotations or {}), spec=PodSpec(containers=[container]))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param(pod({"colocate.io/gpu-memory": "12Gi"}), 12 * GIB, id="ours, a quantity"),
        pytest.param(pod({"gpu-memory": "2048"}), 2 * GIB, id="KAI, MiB"),
        pytest.param(pod(**{"nvidia.com__gpumem": "3000"}), 3000 * MIB, id="HAMi, MiB"),
        pytest.param(pod(**{"koordinator.sh__gpu-memory": "8Gi"}), 8 * GIB, id="Koordinator, bytes"),
        pytest.param(pod(**{"nvidia.com__gpu": "1"}), None, id="a whole card or a replica of one: nothing is said"),
        pytest.param(
            pod({"colocate.io/gpu-memory": "1Gi"}, **{"nvidia.com__gpumem": "3000"}), GIB, id="ours before others'"
        ),
    ],
)
def test_24_what_pods_declare_is_read_in_every_dialect(given, expected):
    assert declared_bytes(given) == expected


@pytest.mark.parametrize("text", ["much", "-1", "0"])
def test_a_declaration_that_cannot_be_read_is_named(text):
    with pytest.raises(ValueError, match=r"the annotation colocate.io/gpu-memory: .*write a quantity"):
        declared_bytes(pod({"colocate.io/gpu-memory": text}))
