"""S2.7: work goes where it costs the least watts, by the node's curve and by how busy it is measured to be."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colocate.agent.node_power import PowerWatch, differs, utilization
from colocate.cluster.api import (
    CPU_REQUESTED,
    CPU_UTILIZATION,
    POWER_CURVE,
    CurvePoint,
    NodeColocationStatus,
    NodePower,
)
from colocate.cluster.publication import power_annotations, power_differs, power_is_ours
from colocate.errors import ConfigError
from colocate.model.node_power import GRID, NodeCurve
from colocate.objects import Node
from colocate.observe.energy import Users
from colocate.observe.powercap import Zone
from colocate.policy.file import parse_policy
from colocate.policy.schema import API_VERSION, NodePowerPoint, PowerPolicy
from colocate.snapshot import NodeSnapshot
from podgroup.explain.snapshot import KIND, VERSION, ClusterSnapshot, Verdict, decide
from podgroup.policy import DEFAULT, AgeAndLeastWatts
from podgroup.queue.entry import Settings
from podgroup.state.node_power import curve_of, watts_more
from tests.unit.test_gang_snapshot import NOW, group, node, pod

CONVEX, FLAT = "0:100 0.5:160 1:300", "0:150 1:200"
STEEP_FIRST = "0:50 0.3:200 1:260"


def with_power(name: str, cpu: int, curve: str, used: str) -> Node:
    plain = node(name, cpu)
    meta = msgspec.structs.replace(
        plain.metadata, annotations={POWER_CURVE: curve, CPU_UTILIZATION: used, CPU_REQUESTED: "0"}
    )
    return msgspec.structs.replace(plain, metadata=meta)


def decided(nodes: list[Node], *sizes: int, policy: str = AgeAndLeastWatts.id) -> list[Verdict]:
    pods = [pod(f"g{i}-{j}", f"g{i}") for i, size in enumerate(sizes) for j in range(size)]
    snapshot = ClusterSnapshot(
        taken=NOW,
        kind=KIND,
        version=VERSION,
        settings=Settings(policy=policy),
        nodes=nodes,
        pods=pods,
        groups=[group(f"g{i}", size) for i, size in enumerate(sizes)],
    )
    return decide(snapshot)


@pytest.mark.parametrize(
    ("nodes", "size", "where"),
    [
        pytest.param(
            [with_power("a", 4, CONVEX, "0.6"), with_power("b", 8, FLAT, "0.6")], 1, {"b"}, id="the flatter curve"
        ),
        pytest.param(
            [with_power("a", 4, CONVEX, "0.6"), with_power("b", 8, CONVEX, "0.1")],
            1,
            {"b"},
            id="one curve: by how busy they are, although the other is tighter",
        ),
        pytest.param(
            [with_power("a", 4, STEEP_FIRST, "0"), with_power("b", 4, STEEP_FIRST, "0.5")],
            1,
            {"b"},
            id="a curve that is steep first: the busy one, so that an idle one stays idle",
        ),
        pytest.param(
            [node("a", 2), with_power("b", 8, CONVEX, "0.9")], 1, {"b"}, id="one of which nothing is known is last"
        ),
        pytest.param(
            [
                with_power("a", 4, CONVEX, "lots"),
                with_power("b", 8, "0:9 0:7", "0.1"),
                with_power("c", 9, CONVEX, "0.9"),
            ],
            1,
            {"c"},
            id="so is one whose word cannot be read",
        ),
        pytest.param([node("a", 8), node("b", 4)], 1, {"b"}, id="nothing is known of any: the tightest, as by default"),
        pytest.param(
            [with_power("a", 2, FLAT, "0"), with_power("b", 8, CONVEX, "0.6")],
            3,
            {"b"},
            id="a gang that one node takes stays together first",
        ),
        pytest.param(
            [with_power("a", 4, CONVEX, "0.7"), with_power("b", 8, CONVEX, "0.2"), node("c", 3)],
            3,
            {"b"},
            id="of the nodes that take it whole the one that draws the least more",
        ),
    ],
)
def test_s2_7_a_gang_goes_where_it_draws_the_least_more(nodes: list[Node], size: int, where: set[str]) -> None:
    (verdict,) = decided(nodes, size)
    assert verdict.outcome == "Start"
    assert {bound.node for bound in verdict.members} == where


curves = st.lists(st.integers(0, 400), min_size=2, max_size=6).map(
    lambda w: " ".join(f"{i / (len(w) - 1):g}:{each}" for i, each in enumerate(sorted(w)))
)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 8), curves, st.floats(0, 1).map(str)), min_size=1, max_size=5),
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
)
def test_s2_7_watts_change_neither_who_starts_nor_what_a_node_holds(
    nodes: list[tuple[int, str, str]], sizes: list[int]
) -> None:
    found = decided([with_power(f"n{i}", *each) for i, each in enumerate(nodes)], *sizes)
    held: dict[str, int] = {}
    for verdict in found:
        for bound in verdict.members if verdict.outcome == "Start" else ():
            held[bound.node] = held.get(bound.node, 0) + 1
    assert all(count <= nodes[int(name[1:])][0] for name, count in held.items())
    if len(nodes) == 1:
        left = nodes[0][0]
        for size, verdict in zip(sizes, sorted(found, key=lambda v: v.gang), strict=True):
            starts = size <= left
            assert (verdict.outcome == "Start") == starts
            left -= size if starts else 0


@settings(deadline=None)
@given(curves, st.floats(0, 1), st.floats(0, 1), st.floats(0, 0.5))
def test_s2_7_more_work_never_draws_less(curve: str, used: float, share: float, more: float) -> None:
    asked, cores = np.array([1000 * share, 1000 * (share + more)]), np.full(2, 1000)
    nothing = np.zeros(2, dtype=np.int64)
    one, other = watts_more([with_power("n", 4, curve, str(used))] * 2, nothing, asked, cores)
    assert -1e-9 <= one <= other + 1e-9


@pytest.mark.parametrize("text", ["", "0:1", "0:1 x", "0:1 1:nan", "0:2 1:1", "0.5:1 0.5:2", "-1:1 1:2", "0:1:2 1:2:3"])
def test_s2_7_what_is_no_curve_is_not_known(text: str) -> None:
    assert np.isnan(curve_of(text)).all()


def busy(at: float, busy_us: int | None, idle_us: int | None) -> NodeSnapshot:
    return NodeSnapshot(
        sequence=0,
        time_seconds=at,
        monotonic_seconds=at,
        cgroup_version=2,
        cpus=(0, 1),
        cores=((0,), (1,)),
        memory_bytes=1,
        cpu_busy_us=busy_us,
        cpu_idle_us=idle_us,
    )


@pytest.mark.parametrize(
    ("before", "now", "used"),
    [
        pytest.param((0, 0), (250, 750), 0.25, id="a quarter"),
        pytest.param((None, 0), (250, 750), None, id="not read"),
        pytest.param((500, 0), (250, 750), None, id="a counter that went back"),
        pytest.param((1, 1), (1, 1), None, id="no time"),
    ],
)
def test_s2_7_how_busy_a_node_is(
    before: tuple[int | None, int | None], now: tuple[int | None, int | None], used: float | None
) -> None:
    assert utilization(busy(0.0, *before), busy(1.0, *now)) == used


def test_s2_7_a_node_learns_its_curve_from_its_meter_and_keeps_it_monotone() -> None:
    """A published curve (SPECpower_ssj2008 kind: steep first, then flatter), with a meter that errs by 3 %."""
    generator, curve = np.random.default_rng(7), NodeCurve()
    truth = np.interp(np.linspace(0, 1, GRID), [0, 0.1, 0.3, 0.6, 1.0], [60, 110, 150, 200, 280])
    assert curve.points() is None
    for _ in range(4000):
        used = float(generator.uniform(0.05, 0.7))
        watts = float(np.interp(used, np.linspace(0, 1, GRID), truth)) * float(generator.normal(1.0, 0.03))
        curve.learn(used, watts)
    found = curve.points()
    assert found is not None
    assert (np.diff(found) >= 0).all()
    seen = slice(2, 15)
    assert np.abs(found[seen] / truth[seen] - 1).max() < 0.03
    assert found[-1] > found[14] + 40, "a load that was never seen is not for nothing"


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-1, 2), st.floats(-10, 1e7)), max_size=300))
def test_s2_7_no_reading_makes_a_curve_fall(readings: list[tuple[float, float]]) -> None:
    curve = NodeCurve()
    for used, watts in readings:
        curve.learn(used, watts)
    found = curve.points()
    assert found is None or ((np.diff(found) >= -1e-9).all() and np.isfinite(found).all())


class Meter:
    """A package that draws 50 W and 100 W more at full use."""

    def __init__(self) -> None:
        self.joules = 0.0

    def read(self, _root: Path) -> list[Zone]:
        energy = int(self.joules * 1e6)
        return [Zone("intel-rapl:0", "package-0", "", None, (), energy, 1 << 40)]


async def test_s2_7_the_agent_reads_its_meter_and_tells_what_it_has_learnt() -> None:
    meter, policy = Meter(), PowerPolicy()
    watch = PowerWatch(lambda: policy, None, meter.read)
    watch.wanted = True
    assert watch.told() is None
    at, spent, idle = 0.0, 0, 0
    for step in range(270):
        used = 0.1 + 0.8 * ((step // 15) % 9) / 8
        at, spent, idle = at + 5.0, spent + int(1e7 * used), idle + int(1e7 * (1 - used))
        meter.joules += 5 * (50 + 100 * used)
        watch.look(busy(at, spent, idle))
        await watch.settle()
    told = watch.told()
    assert told is not None
    assert told.measured
    by_use = {round(p.utilization, 2): p.watts for p in told.curve}
    assert by_use[0.1] == pytest.approx(60, abs=4)
    assert by_use[0.9] == pytest.approx(140, abs=4)
    policy = PowerPolicy(curve=(NodePowerPoint(utilization=0, watts=90), NodePowerPoint(utilization=1, watts=300)))
    said = watch.told()
    assert said is not None
    assert not said.measured, "the operator's own counts"
    assert [p.watts for p in said.curve] == [90, 300]


NOTHING = {POWER_CURVE: None, CPU_UTILIZATION: None, CPU_REQUESTED: None}
CURVE = [CurvePoint(utilization=0.0, watts=100.0), CurvePoint(utilization=1.0, watts=300.0)]


@pytest.mark.parametrize(
    ("status", "silent", "said"),
    [
        pytest.param(
            NodeColocationStatus(reason="Promised", power=NodePower(utilization=0.35, curve=CURVE)),
            0.0,
            {POWER_CURVE: "0:100 1:300", CPU_UTILIZATION: "0.35", CPU_REQUESTED: "0"},
            id="what its agent says",
        ),
        pytest.param(NodeColocationStatus(reason="Promised"), 0.0, NOTHING, id="nothing"),
        pytest.param(None, 0.0, NOTHING, id="no agent"),
        pytest.param(
            NodeColocationStatus(reason="Promised", power=NodePower(utilization=0.35, curve=CURVE)),
            1e3,
            NOTHING,
            id="it has been silent: old utilization is none",
        ),
        pytest.param(
            NodeColocationStatus(reason="Stopped", power=NodePower(utilization=0.35, curve=CURVE)),
            0.0,
            NOTHING,
            id="it was stopped",
        ),
    ],
)
def test_s2_7_what_is_published(
    status: NodeColocationStatus | None, silent: float, said: dict[str, str | None]
) -> None:
    assert power_annotations(status, silent) == said
    assert power_differs(with_power("n", 1, "0:100 1:300", "0.35"), said) == (said[POWER_CURVE] is None)


@pytest.mark.parametrize(
    ("there", "ours"),
    [
        pytest.param({}, True, id="nobody has said anything"),
        pytest.param({POWER_CURVE: "0:1 1:2", CPU_UTILIZATION: "0.5", CPU_REQUESTED: "0"}, True, id="we have"),
        pytest.param({POWER_CURVE: "0:1 1:2"}, False, id="an administrator has"),
        pytest.param({POWER_CURVE: "0:1 1:2", CPU_UTILIZATION: "0.5"}, False, id="another program has"),
    ],
)
def test_s2_7_what_somebody_else_says_of_a_node_is_left_alone(there: dict[str, str], ours: bool) -> None:
    plain = node("n", 1)
    meta = msgspec.structs.replace(plain.metadata, annotations=there)
    assert power_is_ours(msgspec.structs.replace(plain, metadata=meta)) == ours


async def test_s2_7_a_meter_that_comes_later_or_lies_elsewhere_is_found() -> None:
    meter, policy, looked = Meter(), PowerPolicy(powercap="/none"), list[Path]()

    def read(root: Path) -> list[Zone]:
        looked.append(root)
        return meter.read(root) if root == Path("/there") else []

    watch = PowerWatch(lambda: policy, None, read)
    watch.wanted = True
    for second in range(0, 60, 5):
        watch.look(busy(float(second), 1000 * second, 1000 * second))
        await watch.settle()
    assert looked == [Path("/none")], "it is not looked for all the time"
    policy = PowerPolicy(powercap="/there")
    for second in range(60, 80, 5):
        watch.look(busy(float(second), 1000 * second, 1000 * second))
        await watch.settle()
    assert looked[1:] == [Path("/there")] * 4


async def test_s2_8_energy_is_counted_only_while_the_policy_says_so() -> None:
    meter, policy, busy_us = Meter(), PowerPolicy(attribution=True), [0]

    def users() -> Users:
        busy_us[0] += 5_000_000
        return Users(busy_us[0], busy_us[0], [])

    watch, at = PowerWatch(lambda: policy, None, meter.read, users), 0

    async def pass_seconds(seconds: int) -> float:
        nonlocal at
        for _ in range(seconds // 5):
            at += 5
            meter.joules += 5 * 100
            watch.look(busy(float(at), 10**6 * at, 10**6 * at))
            await watch.settle()
        return sum(drawn.joules for drawn in watch.energy.account.node.values())

    counted = await pass_seconds(60)
    assert counted > 0
    policy = PowerPolicy()
    assert await pass_seconds(600) == counted
    policy = PowerPolicy(attribution=True)
    assert await pass_seconds(60) <= counted + 6000, "nothing of the time between"


@pytest.mark.parametrize("curve", ["0:110 0.5:240 0.9:310", "0:100 1:300", "0.1:100 0.8:300", "0:100 0.5:300 1:300"])
def test_s2_7_a_full_node_is_never_for_nothing(curve: str) -> None:
    nodes = [with_power("full", 64, curve, "0.99"), with_power("half", 64, curve, "0.3")]
    full, half = watts_more(nodes, np.zeros(2, dtype=np.int64), np.full(2, 4000), np.full(2, 64000))
    assert full >= 0.4 * half


def test_s2_7_a_small_change_is_not_worth_a_word() -> None:
    one = NodePower(utilization=0.30, curve=CURVE)
    assert not differs(one, msgspec.structs.replace(one, utilization=0.33))
    assert differs(one, msgspec.structs.replace(one, utilization=0.36))
    assert differs(one, None)
    assert not differs(None, None)


@pytest.mark.parametrize(
    ("curve", "says"),
    [
        pytest.param("[{utilization: 0, watts: 100}]", "does not reach from 0 to 1", id="one point"),
        pytest.param("[{utilization: 0, watts: 100}, {utilization: 0, watts: 200}]", "both rise", id="not rising"),
        pytest.param("[{utilization: 0, watts: 200}, {utilization: 1, watts: 100}]", "both rise", id="falling watts"),
        pytest.param("[{utilization: 0, watts: 1}, {utilization: 0.9, watts: 9}]", "from 0 to 1", id="not to the end"),
        pytest.param("[{utilization: 0, watts: 1}, {utilization: 50, watts: 100}]", "utilization", id="per cent"),
    ],
)
def test_s2_7_a_curve_that_is_none_is_refused(curve: str, says: str) -> None:
    text = f"apiVersion: {API_VERSION}\nkind: ColocationPolicy\nspec: {{power: {{curve: {curve}}}}}\n"
    with pytest.raises(ConfigError, match=says):
        parse_policy(text, "a file")


SPEC_POWER = (
    "128 257 300 340 378 410 442 498 577 697 817",  # two EPYC 9654
    "138 297 367 438 515 593 661 710 771 812 861",  # two EPYC 9655
    "157 265 314 362 412 461 503 544 587 661 800",  # two EPYC 9965
)
"""Watts at 0, 10, ... 100 % of published SPECpower_ssj2008 results."""


def drawn_more(seed: int, policy: str) -> float:
    """Watts that a member of twelve gangs adds to 24 nodes of three kinds, at utilizations that have nothing to do with
    requests."""
    generator = np.random.default_rng(seed)
    curves = [" ".join(f"{i / 10:g}:{w}" for i, w in enumerate(each.split())) for each in SPEC_POWER]
    used = generator.uniform(0.05, 0.75, size=24)
    nodes = [
        with_power(f"n{i:02}", int(generator.integers(12, 33)), curves[i % 3], f"{u:.3f}") for i, u in enumerate(used)
    ]
    found = decided(nodes, *(int(size) for size in generator.integers(1, 9, size=12)), policy=policy)
    placed: dict[str, int] = {}
    for verdict in found:
        for bound in verdict.members if verdict.outcome == "Start" else ():
            placed[bound.node] = placed.get(bound.node, 0) + 1
    cores = np.array([1000 * int(n.status.allocatable["cpu"]) for n in nodes])
    asked = np.array([1000 * placed.get(n.metadata.name, 0) for n in nodes])
    return float(watts_more(nodes, np.zeros(len(nodes), dtype=np.int64), asked, cores).sum()) / sum(placed.values())


def test_s2_7_on_published_curves_gangs_cost_fewer_watts_than_on_the_tightest_nodes() -> None:
    saved = [1 - drawn_more(seed, AgeAndLeastWatts.id) / drawn_more(seed, DEFAULT.id) for seed in range(12)]
    assert min(saved) > 0.0, saved
    assert float(np.median(saved)) > 0.2, saved
