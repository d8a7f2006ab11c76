"""Peers' published laws against cases A to D that were transcribed from koordlet's own tests."""

import pytest

from colocate.decide.reference import koordlet
from colocate.decide.reference.kubelet import besteffort_knobs

LS8_BE2 = (("LS", 8000), ("BE", 2000))


@pytest.mark.parametrize(
    ("case", "milli"),
    [
        pytest.param({"node_used_milli": 12000, "pods_used_milli": LS8_BE2}, 4000, id="A1 the system uses 2 of 20"),
        pytest.param(
            {"node_used_milli": 11000, "pods_used_milli": (("", 8000), ("BE", 4000))}, 6000,
            id="A2 pods without metadata count, the system is not negative",
        ),
        pytest.param(
            {"node_used_milli": 12000, "pods_used_milli": LS8_BE2, "host_apps_used_milli": (("LS", 1000),)}, 4000,
            id="A3 a host application of LS counts",
        ),
        pytest.param(
            {"node_used_milli": 12000, "pods_used_milli": LS8_BE2, "host_apps_used_milli": (("BE", 1000),)}, 5000,
            id="A4 one of BestEffort does not",
        ),
        pytest.param({"node_used_milli": 12000, "pods_used_milli": LS8_BE2, "min_percent": 60}, 12000, id="A5"),
    ],
)  # fmt: skip
def test_koordlet_suppresses(case, milli):
    assert koordlet.suppress_milli(capacity_milli=20000, threshold_percent=70, **case) == milli


@pytest.mark.parametrize(
    ("pods", "quota"),
    [
        pytest.param((("", 8000), ("BE", 4000)), 320000, id="B1 3.2 cores"),
        pytest.param(LS8_BE2, 120000, id="B2 1.2 cores"),
    ],
)
def test_koordlets_quota_end_to_end(pods, quota):
    milli = koordlet.suppress_milli(
        capacity_milli=16000, threshold_percent=70, node_used_milli=12000, pods_used_milli=pods
    )
    assert koordlet.next_quota_us(milli, -1, 16) == quota


def test_koordlets_cpuset_policy_gives_two_cpus_for_1_2_cores():
    assert koordlet.cpus_wanted(1200, 16, 16) == 2


@pytest.mark.parametrize(
    ("milli", "current", "written"),
    [
        pytest.param(20000, 1_000_000, 1_800_000, id="C1 grows by a tenth of the node"),
        pytest.param(20000, 1_900_000, 2_000_000, id="C2 grows to the target"),
        pytest.param(20000, 2_400_000, 2_000_000, id="C3 falls at once"),
        pytest.param(20000, 1_980_000, None, id="C4 small changes are skipped"),
        pytest.param(1, 80_000, 2_000, id="C5 never below 2 ms"),
        pytest.param(20000, -1, 2_000_000, id="C6 from no quota at once"),
    ],
)
def test_koordlets_quota_ramp(milli, current, written):
    assert koordlet.next_quota_us(milli, current, 80) == written


TWO_NODES = [(0, 0, 0), (4, 0, 0), (1, 1, 0), (5, 1, 0), (2, 2, 1), (6, 2, 1), (3, 3, 1), (7, 3, 1)]
ADJACENT = [(c, c // 2, c // 4) for c in range(8)]
FOUR_SOCKETS = [(c, c // 2, c // 4) for c in range(16)]


@pytest.mark.parametrize(
    ("topology", "wanted", "cpus"),
    [
        pytest.param(TWO_NODES, 3, [0, 4, 2], id="D1 a pair, then a single of the other node"),
        pytest.param(ADJACENT, 3, [0, 1, 4], id="D2 the same with siblings side by side"),
        pytest.param(ADJACENT, 9, None, id="D4 more than there are"),
        pytest.param(FOUR_SOCKETS, 5, [0, 1, 4, 5, 8], id="D3 sockets take turns"),
        pytest.param(FOUR_SOCKETS[::-1], 5, [0, 1, 4, 5, 8], id="D3 whatever the order of the input"),
    ],
)
def test_koordlets_choice_of_cpus(topology, wanted, cpus):
    assert koordlet.choose_cpus(wanted, topology) == cpus


def test_kubelets_best_effort_is_the_least_weight_and_nothing_else():
    assert besteffort_knobs() == {"cpu.weight": "1"}
