"""An agent that hangs, loses its state directory, or is replaced by another while jobs run; and what jobs tell."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from colocate.cgroup.knobfiles import read_knob
from colocate.cgroup.tree import inodes_of, joined
from colocate.jobs.client import EXIT_EVICTED, Connection
from tests.kernel.conftest import HOG, PATIENCE, colocate, tier_of, wait_for

CLI = [sys.executable, "-m", "colocate.cli.main"]
NIGHTLY = "batch: [{name: nightly, selector: {cgroup: /nightly}}]"


def start_job(name, *command, options=()):
    return subprocess.Popen([*CLI, "run", "--name", name, *options, "--", *command], stderr=subprocess.PIPE, text=True)


def weight(node, child):
    path = joined(node.path, child)
    return read_knob(node.port, path, "cpu.weight", inodes_of(node.port, path))


@pytest.mark.layouts
def test_an_agent_that_hangs_leaves_nothing_frozen_and_no_limit_in_force(node, agent):
    """SIGSTOP in the worst moment: batch is frozen, and its quota is at the floor."""
    node.make("nightly")
    node.knob("nightly", "cpu.weight", "37")
    found = weight(node, "nightly")
    node.start("nightly", HOG)
    running = agent(more=f"{NIGHTLY}\n  freeze: {{maxFrozen: 2s}}")
    job = start_job("ice", "sleep", "60")
    path = joined(tier_of(node), "ice")
    assert wait_for(lambda: inodes_of(node.port, path))
    connection = Connection(running.socket)
    connection.ask(op="arm", arm="off-frozen", seconds=60)
    freezes = lambda p: read_knob(node.port, p, "cgroup.freeze", inodes_of(node.port, p))  # noqa: E731
    assert wait_for(lambda: freezes(path) == "1" and weight(node, "nightly") == "1")
    running.process.send_signal(signal.SIGSTOP)
    assert wait_for(lambda: freezes(path) == "0" and freezes(joined(node.path, "nightly")) == "0", 20)
    assert wait_for(lambda: weight(node, "nightly") == found)
    running.process.send_signal(signal.SIGCONT)
    assert wait_for(lambda: weight(node, "nightly") == "1"), "the agent goes on as before"
    connection.close()
    job.terminate()
    job.communicate(timeout=20 * PATIENCE)
    running.stop()


def removed(folder):
    """Remove a folder that the agent writes into at the same time."""
    while True:
        try:
            shutil.rmtree(folder)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                raise
            if not folder.exists():
                return


def test_a_state_directory_that_is_emptied_costs_no_undo(node, agent, dirs):
    node.make("nightly")
    node.knob("nightly", "cpu.weight", "37")
    found = weight(node, "nightly")
    node.start("nightly", HOG)
    running = agent(more=NIGHTLY)
    assert wait_for(lambda: weight(node, "nightly") == "1")
    removed(dirs / "state")
    assert wait_for((dirs / "state" / "journal").exists)
    running.stop(signal.SIGKILL)
    assert wait_for(lambda: weight(node, "nightly") == found)


@pytest.mark.parametrize(
    ("longest", "between"),
    [
        pytest.param("8s", 0.0, id="which its caller has found by then"),
        pytest.param("3s", 3.0, id="in its first tick"),
    ],
)
def test_a_job_of_before_a_restart_is_told_of_its_eviction_by_the_successor(node, agent, longest, between):
    first = agent()
    job = start_job("long", "sleep", "120", options=("--max-runtime", longest))
    assert wait_for(lambda: first.ask("status")["jobs"] == 1)
    first.stop()
    time.sleep(between)
    second = agent()
    _, said = job.communicate(timeout=60 * PATIENCE)
    assert job.returncode == EXIT_EVICTED, said
    assert "evicted: MaxRuntime" in said
    second.stop()


ALLOCATE = "x = bytearray(400 << 20)"


@pytest.mark.parametrize(
    ("script", "code"),
    [
        pytest.param(f"{sys.executable} -ISc '{ALLOCATE}'; exit $?", 137, id="its shell ends with 137"),
        pytest.param(f"{sys.executable} -ISc '{ALLOCATE}'; exit 0", 0, id="its shell ends well"),
    ],
)
def test_a_child_that_the_kernel_killed_is_told_of(node, agent, script, code):
    running = agent()
    found = colocate("run", "--memory", "64Mi", "--", "sh", "-c", script)
    assert found.returncode == code
    assert "killed by the kernel: over its --memory of 64.0 MiB" in found.stderr
    running.stop()


def test_many_jobs_at_once_do_not_keep_the_loop_from_the_services(node, agent):
    """Thirty callers at once: the age of the last tick stays within a few ticks, and each gets its answer."""
    running = agent()
    jobs = [start_job(f"many-{i}", "sleep", "20") for i in range(30)]
    tier, oldest = tier_of(node), 0.0
    deadline = time.monotonic() + 60 * PATIENCE
    while len(node.port.children(next(iter(inodes_of(node.port, tier))), tier)) < 30 and time.monotonic() < deadline:
        age = running.ask("status")["age_seconds"]
        oldest = max(oldest, age or 0.0)
    assert len(node.port.children(next(iter(inodes_of(node.port, tier))), tier)) == 30
    assert oldest < 5 * PATIENCE
    for job in jobs:
        os.kill(job.pid, signal.SIGTERM)
    for job in jobs:
        job.communicate(timeout=30 * PATIENCE)
    running.stop()
