"""S2.8: whose energy the GPUs' meters counted, under Kepler's names; the parts sum up to the meters'."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from colocate.cgroup.tree import Tree
from colocate.observe.card_energy import GPU, MOST_STEP_SECONDS, CardEnergy, CardReading, Ran
from colocate.observe.containers import Consumer, consumer_of
from colocate.observe.energy import ENDED_SECONDS, Account
from colocate.observe.pods import Pod
from colocate.report.energy import card_families
from colocate.snapshot import Card

A, B = Consumer("a" * 64, 0, "", "pod-a", "a" * 64, "containerd"), Consumer("job train", 0, job="train")


def at(seconds: float, watts: float | None, *ran: Ran, uuid: str = "GPU-0", divided: bool = False) -> CardReading:
    return CardReading(uuid, seconds, watts, divided, ran)


def drawn(*readings: CardReading) -> dict[str, float]:
    """Joules of each after these, and of the card's idle and others."""
    energy = CardEnergy()
    for reading in readings:
        energy.add(reading.at_seconds, [reading])
    account = energy.account
    found = {key: kinds[GPU].joules for key, kinds in account.by.items()}
    parts = {"idle": account.idle, "others": account.others, "node": account.node}
    return found | {name: sum(each.joules for each in of.values()) for name, of in parts.items()}


IDLE = at(0.0, 50.0)


@pytest.mark.parametrize(
    ("readings", "expected"),
    [
        pytest.param([IDLE, at(1.0, 50.0)], {"node": 50, "idle": 50}, id="nobody is on it"),
        pytest.param(
            [IDLE, at(1.0, 250.0, Ran(A, 0)), at(2.0, 250.0, Ran(A, 0))],
            {"node": 400, "idle": 100, A.key: 300},
            id="one that is alone has all beyond idle",
        ),
        pytest.param(
            [IDLE, at(1.0, 50.0, Ran(A, 30), Ran(B, 10)), at(2.0, 250.0, Ran(A, 30), Ran(B, 10))],
            {"node": 200, "idle": 100, A.key: 75, B.key: 25},
            id="several by the time that their kernels ran",
        ),
        pytest.param(
            [IDLE, at(1.0, 50.0, Ran(A, None), Ran(B, 10)), at(2.0, 250.0, Ran(A, None), Ran(B, 10))],
            {"node": 200, "idle": 100, A.key: 50, B.key: 50},
            id="alike where that is not told of all",
        ),
        pytest.param(
            [IDLE, at(1.0, 50.0, Ran(A, 30), Ran(None, 10)), at(2.0, 250.0, Ran(A, 30), Ran(None, 10))],
            {"node": 200, "idle": 100, A.key: 75, "others": 25},
            id="a process that is nobody's",
        ),
        pytest.param(
            [IDLE, at(1.0, 50.0, Ran(A, 30), divided=True), at(2.0, 250.0, Ran(A, 30), divided=True)],
            {"node": 200, "idle": 100, "others": 100},
            id="of a divided card nothing tells who",
        ),
        pytest.param(
            [at(0.0, 250.0, Ran(A, 9)), at(1.0, 250.0, Ran(A, 9))],
            {"node": 250, A.key: 250},
            id="what it draws idle is not known: nothing is",
        ),
        pytest.param([IDLE, at(MOST_STEP_SECONDS + 1, 50.0)], {}, id="of a long gap nothing is known"),
        pytest.param([IDLE, at(1.0, None), at(2.0, 50.0)], {}, id="a reading without watts"),
        pytest.param([IDLE, at(0.0, 90.0)], {}, id="the same reading again"),
    ],
)
def test_s2_8_whose_a_cards_energy_was(readings: list[CardReading], expected: dict[str, float]) -> None:
    found = {key: joules for key, joules in drawn(*readings).items() if joules}
    assert found == pytest.approx(expected, abs=1e-5)


def test_s2_8_cards_that_are_read_seldom_are_counted_too() -> None:
    energy = CardEnergy()
    energy.most_step_seconds = 150.0
    for reading in (at(0.0, 300.0, Ran(A, 9)), at(60.0, 300.0, Ran(A, 9))):
        energy.add(reading.at_seconds, [reading])
    assert energy.account.node["GPU-0"].joules == pytest.approx(18000.0)


TREE = Tree("/", "/kubepods", systemd_driver=False, tier_path="/kubepods/batch")
UID = "0a1b2c3d-0000-4000-8000-0123456789ab"


@pytest.mark.parametrize(
    ("path", "who"),
    [
        pytest.param(f"/kubepods/pod{UID}/{'c' * 64}", ("", UID, "c" * 64), id="a container's"),
        pytest.param(f"/kubepods/pod{UID}/{'c' * 64}/own", ("", UID, "c" * 64), id="below it"),
        pytest.param(f"/kubepods/batch/pod{UID}/{'c' * 64}", ("", UID, "c" * 64), id="of a batch pod"),
        pytest.param("/kubepods/batch/train/inner", ("train", "", ""), id="a job's"),
        pytest.param(f"/kubepods/pod{UID}", None, id="a pod's own, which is no container's"),
        pytest.param("/system.slice/x.service", None, id="the system's"),
    ],
)
def test_whose_a_process_on_a_card_is(path: str, who: tuple[str, str, str] | None) -> None:
    found = consumer_of(path, TREE)
    assert (None if found is None else (found.job, found.pod_uid, found.container_id)) == who


class Families(Collector):
    def __init__(self, account: Account) -> None:
        self._account = account

    def collect(self) -> object:  # type: ignore[override]
        cards = {"GPU-0": Card(uuid="GPU-0", index=0, name="H100"), "GPU-1": Card(uuid="GPU-1", index=1, name="H100")}
        pods = {"pod-a": Pod(uid="pod-a", name="web", namespace="ml", labels={}, containers={"a" * 64: "main"})}
        return card_families(self._account, cards, pods, "n0")


def series(account: Account) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    registry = CollectorRegistry()
    registry.register(Families(account))
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


def test_s2_8_series_of_gpus_have_keplers_names_and_labels() -> None:
    energy = CardEnergy()
    for reading in (IDLE, at(1.0, 50.0, Ran(A, 30), Ran(B, 10)), at(2.0, 250.0, Ran(A, 30), Ran(B, 10))):
        energy.add(reading.at_seconds, [reading])
    found = series(energy.account)
    of_node = {"gpu": "0", "gpu_uuid": "GPU-0", "gpu_name": "H100", "vendor": "nvidia", "node_name": "n0"}
    assert [dict(labels) for labels in found["kepler_node_gpu_active_joules_total"]] == [of_node]
    assert len(found["kepler_node_gpu_info"]) == 2
    ((labels, joules),) = found["kepler_container_gpu_joules_total"].items()
    assert joules == pytest.approx(75.0)
    assert dict(labels) == {
        "container_id": "a" * 64, "container_name": "main", "runtime": "containerd", "state": "running",
        "pod_id": "pod-a", "node_name": "n0",
    }  # fmt: skip
    ((labels, watts),) = found["kepler_pod_gpu_watts"].items()
    assert watts == pytest.approx(75.0)
    assert dict(labels) == {
        "pod_id": "pod-a", "pod_name": "web", "pod_namespace": "ml", "state": "running", "node_name": "n0"
    }  # fmt: skip
    ((labels, _),) = found["colocate_job_gpu_joules_total"].items()
    assert dict(labels) == {"job": "train", "state": "running", "node_name": "n0"}


steps = st.lists(
    st.tuples(
        st.floats(0.1, 15.0),
        st.lists(
            st.tuples(
                st.none() | st.floats(0.0, 700.0),
                st.lists(st.tuples(st.integers(0, 4), st.none() | st.integers(0, 100)), max_size=4),
                st.booleans(),
            ),
            max_size=3,
        ),
    ),
    min_size=2,
    max_size=12,
)


def consumer(i: int, step: int) -> Consumer | None:
    """Nobody, jobs, and containers that are others every few steps."""
    if i == 0:
        return None
    if i == 1:
        return B
    id_ = f"{i}{step // 4}".zfill(64)
    return Consumer(id_, 0, "", f"pod-{i}", id_, "")


@given(steps=steps, jump=st.floats(0.0, 2 * ENDED_SECONDS))
@settings(max_examples=150, deadline=None)
def test_s2_8_the_parts_sum_up_to_the_meters_and_no_counter_falls(
    steps: list[tuple[float, list[tuple[float | None, list[tuple[int, int | None]], bool]]]], jump: float
) -> None:
    energy, now, before = CardEnergy(), 0.0, dict[str, dict[tuple[tuple[str, str], ...], float]]()
    for number, (seconds, cards) in enumerate(steps):
        now += seconds + (jump if number == len(steps) // 2 else 0.0)
        energy.add(
            now,
            [
                CardReading(f"GPU-{i}", now, watts, divided, [Ran(consumer(who, number), p) for who, p in ran])
                for i, (watts, ran, divided) in enumerate(cards)
            ],
        )
        account = energy.account
        node = sum(each.microjoules for each in account.node.values())
        parts = sum(each.microjoules for of in (account.idle, account.others) for each in of.values())
        assert (
            parts
            + sum(kinds[GPU].microjoules for kinds in account.by.values())
            + sum(kinds.get(GPU, 0) for (uid, job), kinds in account.gone.items() if job)
            == node
        )
        if not account.node:
            continue
        counters = {name: values for name, values in series(account).items() if name.endswith("_joules_total")}
        for name, values in counters.items():
            for labels, value in values.items():
                if dict(labels).get("state") != "terminated":
                    assert value >= before.get(name, {}).get(labels, 0.0) - 1e-9, (name, labels)
        before = counters
