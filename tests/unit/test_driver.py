"""What a GPU driver is made to do with processes: step by step, never while they are frozen, and undone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colocate.actuate.driver import process_entry, setting_entry
from colocate.actuate.driver_worker import STATES, next_step
from colocate.actuate.journal import Entry, Journal, read_entries

AFTER = {"lock": "locked", "checkpoint": "checkpointed", "restore": "locked", "unlock": "running"}
ALLOWED = {"lock": "running", "checkpoint": "locked", "restore": "checkpointed", "unlock": "locked"}


@pytest.mark.parametrize(
    ("state", "wanted", "steps"),
    [
        pytest.param("running", "running", [], id="it runs"),
        pytest.param("running", "locked", ["lock"], id="a gate closes"),
        pytest.param("locked", "running", ["unlock"], id="a gate opens"),
        pytest.param("running", "checkpointed", ["lock", "checkpoint"], id="off the card"),
        pytest.param("checkpointed", "running", ["restore", "unlock"], id="back on it"),
        pytest.param("checkpointed", "locked", ["restore"], id="back, and held"),
        pytest.param("failed", "running", [], id="a process that failed cannot be helped"),
    ],
)
def test_steps_to_what_is_wanted(state, wanted, steps):
    taken = []
    while step := next_step(state, wanted):
        assert state == ALLOWED[step]
        taken.append(step)
        state = AFTER[step]
    assert taken == steps


@given(st.sampled_from(STATES[:3]), st.lists(st.sampled_from(STATES[:3]), min_size=1, max_size=20))
def test_31_whatever_is_wanted_in_between_each_step_is_allowed_and_the_last_wish_is_reached(state, wishes):
    for wanted in wishes:
        step = next_step(state, wanted)
        if step:
            assert state == ALLOWED[step]
            state = AFTER[step]
    for _ in range(2):
        step = next_step(state, wishes[-1])
        state = AFTER[step] if step else state
    assert state == wishes[-1]


def test_what_drivers_hold_is_in_the_journal_of_a_version_that_an_older_program_refuses(tmp_path):
    journal = Journal(tmp_path, "boot")
    old = Entry(kind="made", boot_id="boot", hierarchy="unified", path="/a")
    journal.add(
        old, process_entry("boot", "/a", 7, 123, ""), setting_entry("boot", "GPU-0", "x", "/a", "0 1", "0 2", "")
    )
    journal.close()
    lines = (tmp_path / "journal").read_bytes().split(b"\n")
    assert [b'"version":2' in line for line in lines[:3]] == [False, True, True]
    entries, _ = read_entries(tmp_path / "journal")
    assert [(e.kind, e.pid, e.found) for e in entries] == [("made", 0, ""), ("process", 7, ""), ("setting", 0, "0 1")]
