"""Another order of gangs and nodes takes the place of ours, and nothing that is promised to anybody depends on it."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colocate.errors import BadInput
from podgroup import policy
from podgroup.explain.snapshot import KIND, VERSION, ClusterSnapshot, decide, load
from podgroup.policy import DEFAULT, Floats, Gangs, Ints, Nodes
from podgroup.queue.entry import Settings
from tests.unit.test_gang_snapshot import NOW, group, node, pod


class LargestAndEmptiest:
    """The gang that asks for the most CPU first, onto the nodes with the most room."""

    id, reads_power = "largest-emptiest/test", False

    def order(self, gangs: Gangs) -> Floats:
        largest: Floats = -gangs.requests[:, gangs.columns["cpu"]].astype(float)
        return largest

    def rows(self, nodes: Nodes) -> Ints:
        return np.argsort(-nodes.free[:, nodes.columns["cpu"]], kind="stable")


@pytest.fixture(autouse=True)
def another_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(policy.POLICIES, LargestAndEmptiest.id, LargestAndEmptiest())


def snapshot_of(sizes: list[tuple[int, int]], rooms: list[int], id_: str) -> ClusterSnapshot:
    """Gangs (members, priority) of one CPU each; nodes of so many CPUs."""
    pods = [pod(f"g{i}-{j}", f"g{i}", priority=p) for i, (size, p) in enumerate(sizes) for j in range(size)]
    return ClusterSnapshot(
        taken=NOW,
        kind=KIND,
        version=VERSION,
        settings=Settings(policy=id_),
        nodes=[node(f"n{i}", cpu) for i, cpu in enumerate(rooms)],
        pods=pods,
        groups=[group(f"g{i}", size) for i, (size, _) in enumerate(sizes)],
    )


@pytest.mark.parametrize(
    ("id_", "started", "where"),
    [
        pytest.param(DEFAULT.id, ["ns/g0", "ns/g1"], ["n0", "n1"], id="ours: the first, the tightest node"),
        pytest.param(LargestAndEmptiest.id, ["ns/g2", "ns/g0"], ["n1", "n0"], id="another: the largest, the emptiest"),
    ],
)
def test_the_policy_says_who_is_first_and_which_node_is_filled(id_: str, started: list[str], where: list[str]) -> None:
    found = [v for v in decide(snapshot_of([(2, 0), (2, 0), (4, 0)], [2, 4], id_)) if v.outcome == "Start"]
    assert [v.gang for v in found] == started
    assert [v.members[0].node for v in found] == where


GANGS = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 2)), min_size=1, max_size=6)


@settings(deadline=None)
@given(GANGS, st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_no_policy_jumps_a_priority_or_starts_a_part(sizes: list[tuple[int, int]], rooms: list[int]) -> None:
    found = {v.gang: v for v in decide(snapshot_of(sizes, rooms, LargestAndEmptiest.id))}
    started = {key for key, v in found.items() if v.outcome == "Start"}
    used: dict[str, int] = {}
    for i, (size, _) in enumerate(sizes):
        verdict = found[f"ns/g{i}"]
        assert len(verdict.members) in ((size,) if f"ns/g{i}" in started else (0,)), "all or none"
        for one in verdict.members:
            used[one.node] = used.get(one.node, 0) + 1
    assert all(count <= rooms[int(name[1:])] for name, count in used.items())
    left = sum(rooms) - sum(used.values())
    for i, (size, priority) in enumerate(sizes):
        if f"ns/g{i}" not in started:
            after = sum(s for j, (s, p) in enumerate(sizes) if p < priority and f"ns/g{j}" in started)
            assert size > left + after, f"g{i} would have fit in what less important ones were given"


def test_a_cycle_under_a_policy_is_decided_again_under_it() -> None:
    made = snapshot_of([(2, 0), (2, 0), (4, 0)], [2, 4], LargestAndEmptiest.id)
    assert decide(load(msgspec.json.encode(made))) == decide(made)


def test_a_snapshot_under_a_policy_that_is_not_here_is_refused() -> None:
    made = snapshot_of([(1, 0)], [1], "learned/7")
    known = "age-least-watts/1, age-tightest/1"
    with pytest.raises(
        BadInput, match=rf"settings\.policy \(--order\): 'learned/7' is not known here; known are: {known}"
    ):
        load(msgspec.json.encode(made))
