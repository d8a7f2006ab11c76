"""What differs by the layout of cgroups, and what needs full v2, in a virtual machine with Debian's kernel."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tools.guest import Guest, lacks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(lacks()), reason=f"a guest lacks {lacks()}"),
]
PYTEST = "cd /opt/project && python3 -m pytest -q -p no:cacheprovider -x"


@pytest.fixture(scope="module")
def guest() -> Iterator[Guest]:
    with Guest() as running:
        yield running


def passes(guest: Guest, selection: str, seconds: float) -> None:
    code, output = guest.run(f"{PYTEST} {selection} > /tmp/out 2>&1; rc=$?; tail -60 /tmp/out; exit $rc", seconds)
    assert code == 0, output[-6000:]
    assert " passed" in output, output[-6000:]


def test_the_guest_offers_full_cgroup_v2(guest):
    code, output = guest.run("cat /sys/fs/cgroup/cgroup.controllers")
    assert code == 0
    assert {"cpu", "cpuset", "io", "memory", "pids"} <= set(output.split())


def test_doctor_finds_a_tier_possible(guest):
    code, output = guest.run("cd /opt/project && COLOCATE_JIT=off python3 -m colocate.cli.main doctor")
    assert code == 0, output
    assert "v2" in output


@pytest.mark.parametrize(
    ("file", "seconds"),
    [
        pytest.param("test_model_differential.py", 400, id="the model answers as this kernel does"),
        pytest.param("test_crash.py", 400, id="a SIGKILL at ten moments leaves the node as it was found"),
        pytest.param("test_memory.py", 400, id="memory is given back"),
        pytest.param("test_long_waits.py", 200, id="long waits are told from short ones"),
        pytest.param("test_agent_on_a_kernel.py", 700, id="the agent and its command line"),
        pytest.param("test_bad_moments.py", 300, id="bad moments", marks=pytest.mark.rare),
        pytest.param("test_hung_and_restarted.py", 300, id="hung and restarted agents", marks=pytest.mark.rare),
    ],
)
def test_what_differs_by_layout_is_right_on_v2(guest, file, seconds):
    passes(guest, f"-m layouts tests/kernel/{file}", seconds)
