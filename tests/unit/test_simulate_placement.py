"""Placement on nodes with shared GPUs: capacities hold, scores are those of the papers and of kube-scheduler."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colocate.simulate.placement import Kinds, Nodes, feasible_to_find, place, typical_shares
from colocate.simulate.scores import POLICIES, native_points


def nodes_of(*rows):
    """(milli CPU, MiB, GPUs, model) each."""
    return Nodes(*(np.array(column, np.int64) for column in zip(*((*row, 0, 0) for row in rows), strict=True)))


def kinds_of(*rows):
    """(milli CPU, MiB, GPUs, milli of each, models) each."""
    return Kinds(*(np.array(column, np.int64) for column in zip(*((*row, 0) for row in rows), strict=True)))


NODES = st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(0, 8), st.integers(0, 2)), min_size=1)
GPU = st.sampled_from([(0, 0), (1, 200), (1, 500), (1, 1000), (2, 1000), (8, 1000)])
KINDS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), GPU, st.integers(0, 7)), min_size=1, max_size=6)


def world(nodes, kinds):
    nodes = nodes_of(*((1000 * c, 1024 * m, g, model) for c, m, g, model in nodes))
    kinds = kinds_of(*((1000 * c, 1024 * m, *gpu, ok if gpu[0] else 0) for c, m, gpu, ok in kinds))
    return nodes, kinds


@settings(max_examples=150, deadline=None)
@given(NODES, KINDS, st.data(), st.sampled_from(POLICIES))
def test_no_node_is_given_more_than_it_has(nodes, kinds, data, policy):
    nodes, kinds = world(nodes, kinds)
    pods = np.array(data.draw(st.lists(st.integers(0, len(kinds.gpus) - 1), min_size=1, max_size=40)), np.int64)
    typical = typical_shares(pods, kinds)
    found = place(nodes, kinds, pods, policy, 7, typical)
    total = 0
    for i in range(len(nodes.gpus)):
        there = pods[found.node == i]
        assert kinds.cpu_milli[there].sum() <= nodes.cpu_milli[i]
        assert kinds.memory_mib[there].sum() <= nodes.memory_mib[i]
        assert (kinds.gpus * kinds.gpu_milli)[there].sum() <= 1000 * nodes.gpus[i]
        asked = kinds.models[there]
        assert all(m == 0 or m >> nodes.model[i] & 1 for m in asked)
        total += int((kinds.gpus * kinds.gpu_milli)[there].sum())
    assert found.allocated_milli[-1] == total
    assert place(nodes, kinds, pods, policy, 7, typical).node.tolist() == found.node.tolist()


@settings(max_examples=100, deadline=None)
@given(NODES, KINDS, st.data(), st.sampled_from(POLICIES))
def test_a_pod_waits_only_where_no_node_has_room_for_it(nodes, kinds, data, policy):
    nodes, kinds = world(nodes, kinds)
    kind = data.draw(st.integers(0, len(kinds.gpus) - 1))
    alone = np.array([kind], np.int64)
    found = place(nodes, kinds, alone, policy, 1, typical_shares(alone, kinds)).node[0]
    c, m, num, _, ok, _ = (int(column[kind]) for column in kinds)
    fits = [
        nodes.cpu_milli[i] >= c
        and nodes.memory_mib[i] >= m
        and nodes.gpus[i] >= num
        and (num == 0 or ok == 0 or ok >> nodes.model[i] & 1)
        for i in range(len(nodes.gpus))
    ]
    assert (found >= 0) == any(fits)
    assert found < 0 or fits[found]


@pytest.mark.parametrize(
    ("pod", "used", "every", "points"),
    [
        pytest.param((1000, 1024), (0, 0), (4000, 8192), (81, 71), id="(75 + 87) / 2 cut off; 93 after, 100 before"),
        pytest.param((1000, 1024), (0, 0), (5000, 8192), (83, 73), id="96 after, 100 before"),
        pytest.param((1000, 1024), (1000, 1024), (6000, 8192), (70, 74), id="95 after, 97 before"),
        pytest.param((1000, 1024), (0, 1024), (4000, 8192), (75, 78), id="0.25 and 0.25 after 0 and 0.125"),
        pytest.param(
            (0, 0), (0, 0), (4000, 8192), (97, 0), id="no request: counted as 100 m and 200 MiB, not balanced"
        ),
        pytest.param((4000, 8192), (0, 0), (4000, 8192), (0, 75), id="all of a node leaves it as balanced"),
        pytest.param((0, 0), (4000, 8192), (4000, 8192), (0, 0), id="counted beyond a full node"),
        pytest.param((1000, 0), (0, 0), (4000, 0), (75, 75), id="a node without memory"),
    ],
)
def test_native_is_kube_schedulers_arithmetic(pod, used, every, points):
    """least_allocated.go and balanced_allocation.go of Kubernetes 1.36; the first three as its log has them."""
    assert native_points(pod, used, used, every) == points


def test_native_does_not_look_at_gpus():
    nodes = nodes_of((8000, 8192, 8, 0), (9000, 9216, 1, 0))
    found = place(nodes, kinds_of((1000, 1024, 1, 1000, 0)), np.array([0], np.int64), "native", 3)
    assert found.node.tolist() == [1], "the last GPU of its node goes"


@pytest.mark.parametrize(
    ("nodes", "wanted"), [(1, 1), (99, 99), (100, 100), (500, 230), (1213, 497), (5000, 500), (6000, 300)]
)
def test_native_looks_at_a_part_of_many_nodes(nodes, wanted):
    """numFeasibleNodesToFind: 50 less a 125th of the nodes, in percent, at least 5; and a hundred nodes at least."""
    assert feasible_to_find(nodes) == wanted


def fragmented(cpu, left, model, typical, kinds):
    total = 0.0
    for k, share in enumerate(typical):
        fits = [g for g in left if g >= kinds.gpu_milli[k]]
        allowed = kinds.models[k] == 0 or kinds.models[k] >> model & 1
        if kinds.gpus[k] == 0 or not allowed or cpu < kinds.cpu_milli[k] or len(fits) < kinds.gpus[k]:
            total += share * sum(left)
        else:
            total += share * sum(g for g in left if g < kinds.gpu_milli[k])
    return total


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(4, 8), st.integers(4, 8), st.integers(1, 4), st.integers(0, 1)), min_size=2), KINDS
)
def test_fgd_goes_where_fragmentation_grows_least(nodes, kinds):
    nodes, kinds = world(nodes, kinds)
    typical = typical_shares(np.arange(len(kinds.gpus)), kinds)
    pod = int(np.argmax(kinds.gpus * kinds.gpu_milli))
    found = int(place(nodes, kinds, np.array([pod], np.int64), "fgd", 5, typical).node[0])
    scores = {}
    for i in range(len(nodes.gpus)):
        c, m, num, milli, ok, _ = (int(column[pod]) for column in kinds)
        room = nodes.cpu_milli[i] >= c and nodes.memory_mib[i] >= m and nodes.gpus[i] >= num
        if not room or (num and ok and not ok >> nodes.model[i] & 1):
            continue
        left = [1000] * int(nodes.gpus[i])
        before = fragmented(nodes.cpu_milli[i], left, nodes.model[i], typical, kinds)
        after = [1000 - milli if g < num else 1000 for g in range(len(left))]
        grown = fragmented(nodes.cpu_milli[i] - c, after, nodes.model[i], typical, kinds) - before
        scores[i] = math.floor(100.0 / (1.0 + math.exp(grown / 1000.0)))
    assert found in ({-1} if not scores else {i for i, s in scores.items() if s == max(scores.values())})


def test_typical_pods_are_the_most_frequent_that_make_up_the_cover():
    kinds = kinds_of((1, 1, 0, 0, 0), (1, 2, 0, 0, 0), (2, 1, 1, 500, 0), (9, 9, 8, 1000, 0))
    kind_of = np.array([0] * 40 + [1] * 40 + [2] * 19 + [3])
    assert typical_shares(kind_of, kinds, 0.95) == pytest.approx([80 / 99, 0.0, 19 / 99, 0.0])
