"""S2.8: a job that has to be done by a time keeps the watts for that while a budget is short, and no more."""

from __future__ import annotations

import math
import time

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colocate.agent.publisher import pod_of
from colocate.cluster.api import POWER_DEADLINE, POWER_WORK
from colocate.decide.allowance import PowerState, allowance
from colocate.decide.caps import power_caps
from colocate.decide.deadlines import SPARE, Curve, Floor, Progress, floors, progressed
from colocate.decide.node_budget import Budgeted, Known, budgeted
from colocate.decide.power_jobs import STEP_WATTS
from colocate.objects import ObjectMeta, Pod, PodSpec, PodStatus
from colocate.policy.schema import PowerPolicy
from colocate.snapshot import NodeSnapshot
from colocate.units import parse_time
from tests.unit.test_power_caps import asks, card, node, strictest_of

LINEAR = Curve(np.array([100.0, 200.0, 300.0]), np.array([2.0, 0.5, 0.0]))


def having(at: float, due: float | None, work: float | None, **more: object) -> NodeSnapshot:
    """j1 with a deadline and j2 without one, each on a card of its own and asking for 300 W."""
    limits = more.pop("limits", (300.0, 300.0))
    cards = [card(f"GPU-{i}", f"j{i + 1}", limit_watts=limits[i]) for i in (0, 1)]  # type: ignore[index]
    snapshot = node(*cards, j1=300.0, j2=300.0)
    one = msgspec.structs.replace(snapshot.workloads["j1"], due_seconds=due, work_seconds=work, **more)
    workloads = {**snapshot.workloads, "j1": one}
    return msgspec.structs.replace(snapshot, workloads=workloads, monotonic_seconds=at)


@pytest.mark.parametrize(
    ("snapshot", "done"),
    [
        pytest.param(having(10.0, 100.0, 50.0), 10.0, id="at full watts every second counts"),
        pytest.param(having(10.0, 100.0, 50.0, limits=(200.0, 300.0)), 10.0 / 1.5, id="slowed down it counts less"),
        pytest.param(having(10.0, 100.0, 50.0, frozen=True), 0.0, id="frozen it does nothing"),
        pytest.param(having(10.0, 100.0, 50.0, gang_held="n1/j"), 0.0, id="nor while a member of its gang is"),
        pytest.param(having(1000.0, 2000.0, 50.0), 0.0, id="of a long gap nothing is known"),
        pytest.param(having(10.0, None, None), None, id="who has no deadline is not counted"),
        pytest.param(having(10.0, 100.0, None), None, id="nor who does not say how long its work takes"),
    ],
)
def test_s2_8_what_a_job_has_done(snapshot: NodeSnapshot, done: float | None) -> None:
    found = progressed({"j1": Progress(0.0, 0.0)}, snapshot, {"j1": LINEAR})
    assert (found["j1"].done_seconds if found else None) == (done if done is None else pytest.approx(done, abs=1e-3))


@pytest.mark.parametrize(
    ("before", "told", "at", "done"),
    [
        pytest.param(Progress(2.0, 8.0), 0.4, 9.0, 20.0 + 1.0, id="what it says counts, and the time since"),
        pytest.param(Progress(40.0, 8.0), 0.4, 9.0, 20.0 + 1.0, id="also where it has done less than was thought"),
        pytest.param(Progress(21.0, 9.5), 0.4, 9.0, 21.5, id="once: what came after is counted on"),
        pytest.param(None, 0.4, 3.0, 20.0, id="of an agent before this one: what it did since nobody has seen"),
        pytest.param(None, None, 0.0, 0.0, id="who says nothing begins at nothing"),
        pytest.param(Progress(2.0, 8.0), 1.0, 10.5, 50.0, id="told while this was being read"),
    ],
)
def test_s2_8_a_job_says_how_much_it_has_done(
    before: Progress | None, told: float | None, at: float, done: float
) -> None:
    snapshot = having(10.0, 100.0, 50.0, done_ratio=told, done_at_seconds=at)
    found = progressed({} if before is None else {"j1": before}, snapshot, {"j1": LINEAR})
    assert found["j1"].done_seconds == pytest.approx(done)


@pytest.mark.parametrize(
    ("due", "work", "done", "expected"),
    [
        pytest.param(100.0, 94.0, 0.0, Floor(297.9, late=False), id="hardly any time to spare: nearly everything"),
        pytest.param(100.0, 60.0, 0.0, Floor(194.4, late=False), id="by the curve, between its points"),
        pytest.param(100.0, 60.0, 45.0, Floor(100.0, late=False), id="most of it is done: its least"),
        pytest.param(100.0, 97.0, 0.0, Floor(300.0, late=False), id="within what is kept in reserve"),
        pytest.param(100.0, 120.0, 0.0, Floor(300.0, late=True), id="it cannot be done in time"),
        pytest.param(-5.0, 120.0, 0.0, Floor(300.0, late=True), id="the time is over"),
        pytest.param(100.0, 60.0, 60.0, None, id="more than was said: nothing is known of the rest"),
    ],
)
def test_s2_8_what_a_job_has_to_have(due: float, work: float, done: float, expected: Floor | None) -> None:
    found = floors({"j1": Progress(done, 0.0)}, having(0.0, due, work), {"j1": LINEAR}).get("j1")
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert found.watts == pytest.approx(expected.watts, abs=0.1)
        assert found.late == expected.late


@pytest.mark.parametrize(
    ("annotations", "expected"),
    [
        pytest.param({POWER_DEADLINE: "2100-01-01T00:00:00Z", POWER_WORK: "90m"}, 5400.0, id="both"),
        pytest.param({POWER_DEADLINE: "2100-01-01T00:00:00Z"}, None, id="no work"),
        pytest.param({POWER_WORK: "90m"}, None, id="no deadline"),
        pytest.param({POWER_DEADLINE: "tomorrow", POWER_WORK: "90m"}, None, id="no time"),
        pytest.param({POWER_DEADLINE: "2100-01-01T00:00:00Z", POWER_WORK: "0"}, None, id="no work at all"),
        pytest.param({POWER_DEADLINE: "2100-01-01T00:00:00Z", POWER_WORK: "much"}, None, id="no duration"),
    ],
)
def test_s2_8_a_pod_says_by_when_and_how_long(annotations: dict[str, str], expected: float | None) -> None:
    meta = ObjectMeta(name="p", namespace="ns", uid="u", annotations=annotations)
    spec = PodSpec(containers=[asks("c", colocate_io__power="300", nvidia_com__gpu="1")])
    found = pod_of(Pod(metadata=meta, spec=spec, status=PodStatus(phase="Running")), 1000.0)
    assert found is not None
    assert (found.work_seconds, found.as_batch.get("work_seconds")) == (expected, expected)
    if expected is not None:
        assert found.due_seconds == pytest.approx(1000.0 + parse_time("2100-01-01T00:00:00Z") - time.time(), abs=5.0)


def split(snapshot: NodeSnapshot, budget: int, progress: dict[str, Progress]) -> Budgeted:
    policy = PowerPolicy(budget=budget)
    power = allowance(PowerState(), snapshot, policy)
    return budgeted(power_caps(snapshot), snapshot, policy, power, {}, Known(progress))


def test_s2_8_the_other_gives_what_a_deadline_needs_and_is_told_why() -> None:
    found = split(having(0.0, 100.0, 85.0), 400, {"j1": Progress(0.0, 0.0)})
    caps = strictest_of(found.capped.caps)
    assert caps["GPU-0"] == math.ceil(300.0 * 85.0 / (SPARE * 100.0) / STEP_WATTS) * STEP_WATTS
    assert sum(w or 0.0 for w in caps.values()) <= 400
    about = next(v for v in found.capped.verdicts if v.subject == "node")
    assert about.message.endswith("deadlines are kept: j1")
    assert found.needs is not None
    assert min(watts for _, watts in found.needs.least) >= 100 + 250


def test_s2_8_who_is_late_anyhow_takes_nobody_elses_time() -> None:
    snapshot = having(0.0, 1000.0, 5000.0)
    other = msgspec.structs.replace(snapshot.workloads["j2"], due_seconds=1000.0, work_seconds=700.0)
    snapshot = msgspec.structs.replace(snapshot, workloads={**snapshot.workloads, "j2": other})
    progress = {"j1": Progress(0.0, 0.0), "j2": Progress(0.0, 0.0)}
    found = split(snapshot, 400, progress)
    caps = strictest_of(found.capped.caps)
    assert (caps["GPU-1"] or 0.0) >= 300.0 * 700.0 / (SPARE * 1000.0)
    about = next(v for v in found.capped.verdicts if v.subject == "node")
    assert about.message.endswith("not done by its deadline: j1; deadlines are kept: j2")
    enough = split(snapshot, 700, progress)
    about = next(v for v in enough.capped.verdicts if v.subject == "node")
    assert about.message.endswith("not done by its deadline: j1"), "also where nobody is held to less"


def test_s2_8_a_limit_for_a_deadline_is_whole_watts_and_not_another_one_in_every_tick() -> None:
    known, seen = {"j1": Progress(0.0, 0.0)}, set[float | None]()
    for second in range(1, 61):
        found = split(having(float(second), 1000.0, 800.0, limits=(255.0, 145.0)), 400, known)
        known = found.progress
        seen.add(strictest_of(found.capped.caps)["GPU-0"])
    assert len(seen) <= 2
    assert all(watts == int(watts) for watts in seen if watts is not None)


def test_s2_8_a_budget_goes_before_a_deadline_and_says_who_is_late() -> None:
    found = split(having(0.0, 100.0, 94.0), 380, {"j1": Progress(0.0, 0.0)})
    caps = strictest_of(found.capped.caps)
    assert caps == {"GPU-0": 190.0, "GPU-1": 190.0}
    about = next(v for v in found.capped.verdicts if v.subject == "node")
    assert about.message.endswith("not done by its deadline: j1")


@settings(deadline=None, max_examples=12)
@given(st.integers(30, 120), st.floats(1.05, 4.0), st.lists(st.integers(200, 600), min_size=1, max_size=8))
def test_s2_8_whoever_can_be_done_in_time_within_the_budget_is(work: int, spare: float, budgets: list[int]) -> None:
    """A budget that changes all the while; j1's time grows as its watts fall, and so says its curve."""
    due, done, limits = spare * work, 0.0, (300.0, 300.0)
    known, always = {"j1": Progress(0.0, 0.0)}, True
    for second in range(1, int(due) + 1):
        done += limits[0] / 300.0
        if done >= work:
            break
        found = split(having(float(second), due, float(work), limits=limits), budgets[second % len(budgets)], known)
        known = found.progress
        caps = strictest_of(found.capped.caps)
        limits = (caps["GPU-0"] or 0.0, caps["GPU-1"] or 0.0)
        always = always and not any("not done by" in v.message for v in found.capped.verdicts)
        assert sum(limits) <= max(budgets[second % len(budgets)], 200)
    assert done >= work - 1.0 or not always, "it is late only where that was said"
