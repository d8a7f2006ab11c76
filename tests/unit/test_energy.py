"""S2.8: whose energy it was. What all are said to have drawn, idle CPUs too, is what the meter counted."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from colocate.cgroup.layout import UNIFIED
from colocate.cgroup.tree import Tree
from colocate.kernelmodel import ModelKernel
from colocate.model.energy import Part, split
from colocate.observe import energy as under_test
from colocate.observe.containers import Consumer, read_consumers
from colocate.observe.energy import ENDED_SECONDS, MOST_ENDED, Account, Energy, Reading, Users
from colocate.observe.pods import Pod, parse_pods
from colocate.observe.powercap import Limit, Zone
from colocate.report.energy import energy_families

LINE = (np.array([0.0, 1.0]), np.array([100.0, 300.0]))
CONCAVE = (np.array([0.0, 0.5, 1.0]), np.array([100.0, 250.0, 300.0]))


@dataclasses.dataclass(frozen=True)
class Case:
    counted: float
    used: float
    shares: dict[str, float]
    curve: object
    idle: float
    others: float
    by: dict[str, Part]


TABLE = {
    "without a curve idle counts as much as the CPUs were idle": Case(
        200.0, 0.5, {"a": 0.3, "b": 0.1}, None, 100.0, 20.0, {"a": Part(60.0), "b": Part(20.0)}
    ),
    "with one it is the curve's first point": Case(
        200.0, 0.5, {"a": 0.5}, LINE, 100.0, 0.0, {"a": Part(100.0, 100.0, 100.0)}
    ),
    "on a straight curve every rule says the same": Case(
        200.0, 0.5, {"a": 0.25, "b": 0.25}, LINE, 100.0, 0.0, dict.fromkeys("ab", Part(50.0, 50.0, 50.0))
    ),
    "on a concave one who came last drew less than who came first": Case(
        300.0, 1.0, {"a": 0.5, "b": 0.5}, CONCAVE, 100.0, 0.0, dict.fromkeys("ab", Part(100.0, 50.0, 150.0))
    ),
    "a meter that counts less than the curve's idle is all idle": Case(
        80.0, 0.1, {"a": 0.1}, LINE, 80.0, 0.0, {"a": Part(0.0, 0.0, 0.0)}
    ),
    "nobody ran": Case(100.0, 0.0, {"a": 0.0}, None, 100.0, 0.0, {"a": Part(0.0)}),
    "readings one after the other may add up to more than all": Case(
        100.0, 0.5, {"a": 0.4, "b": 0.2}, None, 50.0, 0.0, {"a": Part(100 / 3), "b": Part(50 / 3)}
    ),
}


@pytest.mark.parametrize("case", TABLE.values(), ids=TABLE.keys())
def test_s2_8_energy_is_divided(case: Case) -> None:
    found = split(case.counted, 1.0, case.used, case.shares, case.curve)  # type: ignore[arg-type]
    assert found.idle == pytest.approx(case.idle)
    assert found.others == pytest.approx(case.others, abs=1e-9)
    for name, part in case.by.items():
        assert found.by[name] == pytest.approx(part), name


ratios = st.floats(0.0, 1.0)


@st.composite
def curves(draw: st.DrawFn) -> object:
    if draw(st.booleans()):
        return None
    steps = draw(st.lists(st.floats(0.0, 100.0), min_size=4, max_size=8))
    watts = draw(st.floats(0.0, 200.0)) + np.cumsum([0.0, *steps])
    return np.linspace(0.0, 1.0, len(watts)), watts


@example(1.0, 1.0, 2.2e-313, [0.0], (np.linspace(0.0, 1.0, 5), np.array([0.0, 1.0, 1.0, 1.0, 1.0])))  # hardly any rise
@given(st.floats(0.0, 1e5), st.floats(0.1, 60.0), ratios, st.lists(ratios, max_size=6), curves())
def test_s2_8_the_parts_sum_up_to_the_meter(
    counted: float, seconds: float, used: float, shares: list[float], curve: object
) -> None:
    by_name = {str(i): share for i, share in enumerate(shares)}
    found = split(counted, seconds, used, by_name, curve)  # type: ignore[arg-type]
    parts = [part.joules for part in found.by.values()]
    assert found.idle + found.others + sum(parts) == pytest.approx(counted)
    assert min([found.others, *parts]) >= 0.0
    assert found.idle >= -1e-9 * counted
    for part in found.by.values():
        if part.low is not None and part.high is not None:
            assert part.low <= part.joules * (1 + 1e-9) + 1e-9
            assert part.joules <= part.high * (1 + 1e-9) + 1e-9


def zone(name: str, joules: float, range_joules: float = 1000.0, id_: str = "") -> Zone:
    return Zone(
        id=id_ or f"intel-rapl:{name}",
        name=name,
        parent="",
        enabled=True,
        limits=(Limit("long_term", 100.0, 1.0, 150.0),),
        energy_microjoules=round(joules * 1e6),
        range_microjoules=round(range_joules * 1e6),
    )


def reading(at: float, package: float, busy: float, *consumers: Consumer, dram: float | None = None) -> Reading:
    zones = [zone("package-0", package), *([] if dram is None else [zone("dram", dram)])]
    return Reading(at, zones, Users(round(1e6 * busy), round(1e6 * (2 * at - busy)), consumers))


def container(letter: str, seconds: float, uid: str = "u") -> Consumer:
    return Consumer(f"{letter * 64}@1", round(1e6 * seconds), "", uid, letter * 64, "containerd")


def test_s2_8_counters_rise_by_what_was_drawn_by_kind_of_zone() -> None:
    energy = Energy()
    energy.add(reading(0.0, 0.0, 0.0, dram=0.0), None)
    assert energy.account == Account(), "the first reading tells of nothing"
    energy.add(reading(5.0, 100.0, 5.0, container("a", 4.0), dram=10.0), None)
    found = energy.account
    assert found.used == 0.5
    assert found.node["package"].joules == 100
    assert found.node["package"].watts == 20
    assert found.idle["package"].joules == pytest.approx(50)
    assert found.by[container("a", 0).key]["package"].joules == pytest.approx(40)
    assert found.by[container("a", 0).key]["dram"].joules == pytest.approx(4)
    assert found.others["dram"].joules == pytest.approx(1)
    energy.add(reading(10.0, 150.0, 10.0, container("a", 9.0), dram=12.0), None)
    assert energy.account.by[container("a", 0).key]["package"].joules == pytest.approx(65)
    assert energy.account.by[container("a", 0).key]["package"].watts == pytest.approx(5)


@pytest.mark.parametrize(
    ("package", "counted"),
    [
        pytest.param(100.0, 200.0, id="a counter that wrapped at its range counts on"),
        pytest.param(890.0, 0.0, id="one that was set back counts nothing"),
    ],
)
def test_s2_8_what_the_meter_cannot_say_is_not_counted(package: float, counted: float) -> None:
    energy = Energy()
    energy.add(reading(0.0, 900.0, 0.0), None)
    energy.add(reading(2.0, package, 2.0), None)
    assert sum(d.joules for d in energy.account.node.values()) == pytest.approx(counted)
    energy.add(reading(4.0, package + 10, 4.0), None)
    assert energy.account.node["package"].joules == pytest.approx(counted + 10), "and it goes on from there"


def test_s2_8_who_has_ended_is_told_of_for_a_while_and_a_pods_sum_never_falls() -> None:
    energy = Energy()
    energy.add(reading(0.0, 0.0, 0.0), None)
    energy.add(reading(5.0, 50.0, 5.0, container("a", 2.0), container("b", 2.0, "v"), container("c", 1.0)), None)
    energy.add(reading(10.0, 100.0, 10.0, container("c", 3.0)), None)
    found = energy.account
    assert set(found.ended) == {container("a", 0).key, container("b", 0).key}
    assert found.by[container("a", 0).key]["package"].watts == 0.0
    assert found.by[container("a", 0).key]["package"].joules == pytest.approx(10.0)
    later = 10.0 + ENDED_SECONDS
    energy.add(reading(later, 110.0, 20.0, container("c", 3.0)), None)
    assert set(energy.account.who) == {container("a", 0).key, container("c", 0).key}, "its pod runs on"


def test_s2_8_not_all_that_ended_are_remembered() -> None:
    energy = Energy()
    energy.add(reading(0.0, 0.0, 0.0), None)
    many = [Consumer(f"j{i}", 1000, job=f"j{i}") for i in range(MOST_ENDED + 50)]
    energy.add(reading(5.0, 50.0, 5.0, *many), None)
    energy.add(reading(10.0, 100.0, 10.0), None)
    assert len(energy.account.who) == MOST_ENDED


def test_s2_8_no_counter_ever_falls_and_the_parts_are_the_whole_at_every_reading(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Containers come and go, more than are remembered; names of jobs are used again; the node is idle, and full."""
    monkeypatch.setattr(under_test, "MOST_ENDED", 15)
    energy, before = Energy(), dict[str, dict[tuple[tuple[str, str], ...], float]]()
    at = busy = package = dram = 0.0
    draw = random.Random(7)
    energy.add(reading(at, package, busy, dram=dram), None)
    living: dict[str, float] = {}
    for step in range(100):
        at, used = at + 5.0, draw.choice([0.0, 0.1, 5.0, 10.0])
        busy, package, dram = busy + used, package + draw.uniform(1, 900), dram + draw.uniform(0.1, 90)
        for key in draw.sample(sorted(living), len(living) // 3):
            del living[key]
        living |= {f"{step}-{i}": 0.0 for i in range(draw.choice([0, 2, 8]))}
        for key in living:
            living[key] += used / max(len(living), 1) * draw.uniform(0.0, 1.0)
        now = [
            Consumer(key, round(1e6 * s), job=f"train{key[-1]}")
            if int(key[-1]) % 2
            else Consumer(key, round(1e6 * s), "", f"pod{key[-1]}", key.zfill(64), "")
            for key, s in living.items()
        ]
        curve = draw.choice([None, CONCAVE])
        energy.add(reading(at, package % 1000, busy, *now, dram=dram % 1000), curve)
        found = series(energy.account, {})
        counters = {name: values for name, values in found.items() if name.endswith("_joules_total")}
        for name, values in counters.items():
            for labels, value in values.items():
                about = dict(labels)
                begins_anew = "job" in about and about["state"] == "running"  # another job of the name
                if not begins_anew and ("job" in about or about.get("state") != "terminated"):
                    assert value >= before.get(name, {}).get(labels, 0.0), (name, labels)
        before = counters
        parts = ("kepler_container_cpu", "colocate_job_cpu", "colocate_node_cpu_others", "kepler_node_cpu_idle")
        whole = sum(counters["kepler_node_cpu_joules_total"].values())
        assert sum(sum(counters.get(f"{p}_joules_total", {}).values()) for p in parts) == pytest.approx(whole)


def test_s2_8_a_container_that_was_not_read_once_counts_from_what_was_known_of_it() -> None:
    energy, job = Energy(), Consumer("/batch/a@1", 10_000_000, job="a")
    energy.add(reading(5.0, 0.0, 10.0, job), None)
    energy.add(reading(10.0, 100.0, 15.0, job._replace(cpu_us=11_000_000)), None)
    energy.add(reading(15.0, 200.0, 20.0), None)
    energy.add(reading(20.0, 300.0, 25.0, job._replace(cpu_us=13_000_000)), None)
    assert energy.account.by[job.key]["package"].joules == pytest.approx((1 + 2) / 10 * 100)


def test_s2_8_what_is_not_known_now_is_told_as_no_watts() -> None:
    energy = Energy()
    energy.add(reading(0.0, 0.0, 0.0), None)
    energy.add(reading(5.0, 100.0, 5.0, container("a", 3.0)), None)
    energy.add(Reading(10.0, [], Users(10_000_000, 10_000_000, [container("a", 6.0)])), None)
    assert (energy.account.node["package"].watts, energy.account.node["package"].joules) == (0.0, 100.0)
    energy.add(reading(15.0, 150.0, 15.0, container("a", 8.0)), None)
    energy.forget()
    assert energy.account.by[container("a", 0).key]["package"].watts == 0.0
    counted = energy.account.node["package"].joules
    energy.add(reading(4000.0, 900.0, 100.0), None)
    assert energy.account.node["package"].joules == counted, "what was drawn meanwhile is nobody's"


class Families(Collector):
    def __init__(self, account: Account, pods: dict[str, Pod]) -> None:
        self._account, self._pods = account, pods

    def collect(self) -> object:  # type: ignore[override]
        return energy_families(self._account, self._pods, "n0")


def series(account: Account, pods: dict[str, Pod]) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    registry = CollectorRegistry()
    registry.register(Families(account, pods))
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


def test_s2_8_series_have_keplers_names_and_labels_and_sum_up_to_the_nodes() -> None:
    energy = Energy()
    job = Consumer("/batch/spin@7", 0, job="spin")
    energy.add(reading(0.0, 0.0, 0.0, container("a", 0.0), container("b", 0.0), job), CONCAVE)
    now = [container("a", 1.0), container("b", 2.0), job._replace(cpu_us=3_000_000)]
    energy.add(reading(5.0, 1000.0, 7.0, *now), CONCAVE)
    names = {"a" * 64: "server"}
    found = series(energy.account, {"u": Pod("u", "web", "shop", {}, containers=names)})
    (labels,) = [dict(k) for k in found["kepler_container_cpu_joules_total"] if dict(k)["container_name"]]
    assert labels == {
        "container_id": "a" * 64,
        "container_name": "server",
        "runtime": "containerd",
        "state": "running",
        "zone": "package",
        "pod_id": "u",
        "node_name": "n0",
    }
    (pod,) = [dict(k) for k in found["kepler_pod_cpu_watts"]]
    assert pod == {
        "pod_id": "u",
        "pod_name": "web",
        "pod_namespace": "shop",
        "state": "running",
        "zone": "package",
        "node_name": "n0",
    }
    whole = sum(found["kepler_node_cpu_joules_total"].values())
    assert whole == 1000.0
    parts = ("kepler_container_cpu", "colocate_job_cpu", "colocate_node_cpu_others", "kepler_node_cpu_idle")
    assert sum(sum(found[f"{part}_joules_total"].values()) for part in parts) == pytest.approx(whole)
    active, idle = (sum(found[f"kepler_node_cpu_{kind}_joules_total"].values()) for kind in ("active", "idle"))
    assert active + idle == pytest.approx(whole)
    assert sum(found["kepler_pod_cpu_joules_total"].values()) == pytest.approx(
        sum(found["kepler_container_cpu_joules_total"].values())
    )
    bounds = {
        dict(k)["bound"]: v
        for k, v in found["colocate_container_cpu_watts_bound"].items()
        if dict(k)["container_id"][0] == "b"
    }
    (watts,) = [v for k, v in found["kepler_container_cpu_watts"].items() if dict(k)["container_id"][0] == "b"]
    assert bounds["low"] < watts < bounds["high"]


def test_s2_8_before_anything_was_counted_nothing_is_served() -> None:
    assert series(Account(), {}) == {}


UID, ID = "11111111-2222-3333-4444-555555555555", "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("pod", "container_name", "runtime"),
    [
        pytest.param(f"/kubepods/burstable/pod{UID}", ID, "", id="cgroupfs, no class of its own"),
        pytest.param(f"/kubepods/pod{UID}", ID, "", id="guaranteed"),
        pytest.param(f"/kubepods/batch/pod{UID}", ID, "", id="in the tier"),
        pytest.param(
            f"/kubepods/burstable/kubepods-burstable-pod{UID.replace('-', '_')}.slice",
            f"cri-containerd-{ID}.scope",
            "containerd",
            id="systemd, containerd",
        ),
        pytest.param(f"/kubepods/burstable/pod{UID}", f"crio-{ID}.scope", "crio", id="cri-o"),
    ],
)
def test_s2_8_containers_are_found_wherever_kubelet_puts_them(pod: str, container_name: str, runtime: str) -> None:
    kernel = ModelKernel(version=2)
    at = ""
    for part in [*pod.strip("/").split("/"), container_name]:
        at += f"/{part}"
        kernel.mkdir(UNIFIED, at)
    kernel.mkdir(UNIFIED, f"{pod}/crio-conmon-{ID}.scope")
    if "batch" not in pod:
        kernel.mkdir(UNIFIED, "/kubepods/batch")
    kernel.mkdir(UNIFIED, "/kubepods/batch/spin")
    kernel.spawn("hog", at)
    kernel.advance(1.0)
    tree = Tree(root="/", kubepods="/kubepods", systemd_driver=False, tier_path="/kubepods/batch")
    found = read_consumers(kernel, tree)
    assert {c.job for c in found} == {"", "spin"}
    (one,) = [c for c in found if not c.job]
    assert (one.pod_uid, one.container_id, one.runtime) == (UID, ID, runtime)
    assert one.cpu_us > 0


def test_s2_8_kubelet_tells_the_names_of_containers() -> None:
    body = b"""{"items": [
      {"metadata": {"name": "web", "namespace": "shop", "uid": "u"},
       "status": {"containerStatuses": [{"name": "server", "containerID": "containerd://abc"}, {"name": "new"}]}},
      {"metadata": {"name": "young", "namespace": "shop", "uid": "v"}, "status": {"containerStatuses": null}}]}"""
    found = parse_pods(body)
    assert found["u"].containers == {"abc": "server"}
    assert found["v"].containers == {}
