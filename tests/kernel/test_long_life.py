"""Hours of a node's life in seconds: pods that come and go leave nothing in the agent."""

from __future__ import annotations

import pytest

from benchmarks import life


@pytest.mark.slow
def test_after_hours_an_agent_holds_what_it_held_after_one():
    hourly = life.in_a_process(3)
    before, first, last, end = hourly[0], hourly[1], hourly[-2], hourly[-1]
    assert first["cgroups"] > before["cgroups"]
    assert last["descriptors"] <= first["descriptors"]
    assert last["cgroups"] == first["cgroups"]
    assert end["cgroups"] == before["cgroups"]
    assert end["journal_bytes"] == 0
