"""When members on vanished nodes are given up."""

from __future__ import annotations

import pytest

from podgroup.controller.lost_nodes import LostNodes
from podgroup.queue.entry import Settings


@pytest.mark.parametrize(
    ("lost", "present", "waited", "due"),
    [
        pytest.param(1, 9, 39.0, 0, id="within the grace period nothing is"),
        pytest.param(1, 9, 40.0, 1, id="after it the node is lost"),
        pytest.param(3, 7, 60.0, 3, id="three of ten may be lost"),
        pytest.param(4, 6, 60.0, 0, id="four of ten at once are an accident of another kind"),
        pytest.param(1, 0, 60.0, 1, id="the only node may be lost"),
        pytest.param(50, 0, 600.0, 0, id="all nodes at once: the list is wrong, not the nodes"),
    ],
)
def test_which_nodes_are_given_up(lost, present, waited, due):
    nodes = LostNodes(Settings())
    for i in range(lost):
        nodes.gone(f"n{i}", 100.0)
    assert len(nodes.due(100.0 + waited, present)) == due
    assert bool(nodes.halted(present)) == (due == 0 and waited > 40)


def test_a_node_that_comes_back_is_not_lost_and_starts_anew_when_it_goes_again():
    nodes = LostNodes(Settings())
    nodes.gone("a", 0.0)
    nodes.look({"a", "b"})
    assert nodes.names == []
    nodes.gone("a", 100.0)
    assert nodes.due(120.0, 5) == []
    assert nodes.next_due(120.0) == 20.0
    assert nodes.due(140.0, 5) == ["a"]
