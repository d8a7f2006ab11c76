"""S2.8: watts that nobody asks for go to jobs that turn them into speed, as long as they do."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colocate.actuate import caps as module
from colocate.actuate.journal import Journal
from colocate.decide.allowance import PowerState, allowance
from colocate.decide.boost import WAIT_SECONDS, Boosted
from colocate.decide.caps import power_caps
from colocate.decide.node_budget import Budgeted, Known, budgeted
from colocate.plan import GpuTarget, Plan, PowerCap
from colocate.policy.schema import PowerModel, PowerPoint, PowerPolicy
from colocate.snapshot import NodeSnapshot
from tests.unit.test_power_caps import card, node, strictest_of

FEELS = PowerModel("feels", tuple(PowerPoint(w, s) for w, s in ((100, 1.0), (200, 0.25), (260, 0.05), (300, 0.04))))
HARDLY = PowerModel("hardly", tuple(PowerPoint(w, s) for w, s in ((100, 0.05), (300, 0.0))))
MODELS = (FEELS, HARDLY)
POLICY = PowerPolicy(budget=600, boost=50.0, models=MODELS)


def at(now: float, *watts: float | None, asked: float = 200.0, classes: str = "feels", **more: Any) -> NodeSnapshot:
    """Jobs with a card each, that draw so much of 200 W."""
    cards = [
        card(f"GPU-{i}", f"j{i}", limit_watts=asked, watts=drawn, at_seconds=now, **more)
        for i, drawn in enumerate(watts)
    ]
    snapshot = node(*cards, **{f"j{i}": asked for i in range(len(watts))})
    named = {i: msgspec.structs.replace(w, power_class=classes) for i, w in snapshot.workloads.items()}
    return msgspec.structs.replace(snapshot, workloads=named, monotonic_seconds=now)


def after(snapshot: NodeSnapshot, policy: PowerPolicy = POLICY, before: dict[str, Boosted] | None = None) -> Budgeted:
    power = allowance(PowerState(), snapshot, policy)
    return budgeted(power_caps(snapshot), snapshot, policy, power, {}, Known(boosted=before or {}))


def with_(**more: Any) -> PowerPolicy:
    return msgspec.structs.replace(POLICY, **more)


WAITED = {"j0": Boosted(200.0, 0.0), "j1": Boosted(200.0, 0.0)}


@pytest.mark.parametrize(
    ("snapshot", "policy", "before", "watts"),
    [
        pytest.param(at(11.0, 195.0, 60.0), POLICY, WAITED, [260.0, 200.0], id="who draws what it may"),
        pytest.param(at(11.0, 195.0, 60.0), POLICY, {}, [200.0, 200.0], id="only after ten seconds of it"),
        pytest.param(at(11.0, 60.0, 60.0), POLICY, WAITED, [200.0, 200.0], id="a phase that is not bound by power"),
        pytest.param(
            at(11.0, 60.0),
            POLICY,
            {"j0": Boosted(260.0, 0.0)},
            [200.0],
            id="its phase is over",
        ),
        pytest.param(
            at(11.0, 230.0),
            POLICY,
            {"j0": Boosted(260.0, 5.0)},
            [260.0],
            id="it goes on with it",
        ),
        pytest.param(at(11.0, 195.0, 195.0), POLICY, WAITED, [260.0, 260.0], id="two of them"),
        pytest.param(
            at(11.0, 195.0, 195.0),
            with_(budget=460),
            WAITED,
            [230.0, 230.0],
            id="two of them share what is left",
        ),
        pytest.param(
            at(11.0, 195.0, 195.0),
            with_(budget=430),
            {"j0": Boosted(260.0, 10.0), "j1": Boosted(200.0, 10.0)},
            [215.0, 200.0],
            id="what is taken back goes at once, what is given waits",
        ),
        pytest.param(
            at(11.0, 195.0),
            with_(boost=10.0),
            WAITED,
            [220.0],
            id="as far as the policy lets it",
        ),
        pytest.param(at(11.0, 195.0), with_(boost=0.0), WAITED, [200.0], id="it does not"),
        pytest.param(at(11.0, 195.0), with_(budget=0), WAITED, [200.0], id="there is no budget"),
        pytest.param(at(11.0, 195.0, most_watts=240.0), POLICY, WAITED, [240.0], id="as far as the card takes it"),
        pytest.param(at(11.0, 195.0, classes="hardly"), POLICY, WAITED, [200.0], id="watts hardly make it faster"),
        pytest.param(at(11.0, 195.0, classes="?"), POLICY, WAITED, [200.0], id="of its class nothing is known"),
        pytest.param(at(11.0, 195.0, problem="lost"), POLICY, WAITED, [200.0], id="its readings are old"),
    ],
)
def test_s2_8_who_is_lent_watts(
    snapshot: NodeSnapshot, policy: PowerPolicy, before: dict[str, Boosted], watts: list[float]
) -> None:
    found = after(snapshot, policy, before)
    assert [strictest_of(found.capped.caps)[f"GPU-{i}"] for i in range(len(watts))] == watts
    for cap in found.capped.caps:
        assert cap.unboosted == (200.0 if (cap.watts or 0.0) > 200.0 else None)
    reasons = {v.subject: v.reason for v in found.capped.verdicts}
    assert [reasons[f"GPU-{i}"] for i in range(len(watts))] == ["Boosted" if w > 200.0 else "Capped" for w in watts]


def test_s2_8_a_card_that_is_shared_is_not_boosted() -> None:
    snapshot = at(11.0, 195.0)
    both = msgspec.structs.replace(snapshot.workloads["j0"], id="j9", name="j9", path="/j9")
    shared = msgspec.structs.replace(
        snapshot,
        workloads={**snapshot.workloads, "j9": both},
        cards={"GPU-0": card("GPU-0", "j0", "j9", limit_watts=200.0, watts=195.0, at_seconds=11.0)},
    )
    assert strictest_of(after(shared, POLICY, WAITED).capped.caps) == {"GPU-0": 200.0}


@given(
    budget=st.integers(100, 1500),
    drawn=st.lists(st.floats(0.0, 300.0), min_size=1, max_size=4),
    known=st.lists(st.floats(200.0, 300.0), min_size=4, max_size=4),
    since=st.floats(0.0, 2 * WAIT_SECONDS),
)
@settings(max_examples=200, deadline=None)
def test_s2_8_limits_with_what_is_lent_stay_within_the_budget(
    budget: int, drawn: list[float], known: list[float], since: float
) -> None:
    before = {f"j{i}": Boosted(watts, since) for i, watts in enumerate(known)}
    policy = with_(budget=budget)
    found = after(at(2 * WAIT_SECONDS, *drawn), policy, before)
    caps = [w or 0.0 for w in strictest_of(found.capped.caps).values()]
    assert sum(caps) <= max(budget, 100.0 * len(drawn))
    assert all(100.0 <= w <= 300.0 for w in caps)


class SlowDriver:
    """Takes every limit; the card's first question waits until it may be answered."""

    def __init__(self) -> None:
        self.limits = {"GPU-0": "300000", "GPU-1": "300000"}
        self.asked, self.may_answer = threading.Event(), threading.Event()

    def setting(self, call: str, uuid: str, value: str = "", **_: Any) -> str:
        if call == "get_power_limit" and uuid == "GPU-0":
            self.asked.set()
            self.may_answer.wait(30)
        if call == "set_power_limit":
            self.limits[uuid] = value
        return self.limits[uuid]


async def test_s2_8_a_loan_that_is_on_its_way_is_taken_back_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who starts waits for it, and finds the watts there."""
    monkeypatch.setattr(module, "processes_anywhere", lambda _port, _path: {1})
    driver: Any = SlowDriver()
    port: Any = None
    caps = module.Caps(port, Journal(tmp_path, "b"), driver, shadow=True)
    driver.may_answer.set()
    caps.set_now("GPU-0", 200.0, "/a", time.monotonic() + 60)
    driver.may_answer.clear()
    driver.asked.clear()
    lent = PowerCap(target=GpuTarget("GPU-0"), watts=260.0, workload="a", path="/a", unboosted=200.0)
    caps.act(Plan(sequence=1, actions=(), verdicts=(), caps=(lent,), power_budget=True), at(11.0))
    while not driver.asked.is_set():
        await asyncio.sleep(0.01)
    taking = asyncio.create_task(asyncio.to_thread(caps.take_back, time.monotonic() + 30))
    await asyncio.sleep(0.1)
    assert not taking.done()
    driver.may_answer.set()
    await taking
    await caps._workers.settle(5)
    assert driver.limits["GPU-0"] == "200000"
    assert caps.limits() == {"GPU-0": 200.0}
    caps.act(Plan(sequence=2, actions=(), verdicts=(), caps=(lent,), power_budget=True), at(12.0))
    await caps._workers.settle(5)
    assert driver.limits["GPU-0"] == "200000", "nothing is lent until he who starts is in the plan"


def test_s2_8_who_does_not_draw_what_he_was_lent_gives_it_back() -> None:
    """To one who does; and is not lent it again for a minute."""
    policy = with_(budget=460)
    lent = {"j0": Boosted(230.0, 0.0), "j1": Boosted(230.0, 0.0)}
    first = after(at(11.0, 172.0, 229.0), policy, lent)
    assert strictest_of(first.capped.caps)["GPU-0"] == 200.0
    again = after(at(30.0, 172.0, 229.0), policy, first.boosted)
    assert strictest_of(again.capped.caps)["GPU-0"] == 200.0
