"""What a simulated GPU driver holds for the agent: locked and suspended processes, limits of memory, and their undo."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from colocate.cgroup.tree import joined, processes_anywhere
from colocate.jobs.client import EXIT_EVICTED
from tests.kernel.conftest import PATIENCE, tier_of, wait_for
from tests.kernel.fake_cards import CLI, end, frozen, pulsing

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="the fake driver needs a C compiler (cc)")
LOCKS = 'gpu: {{nvmlLibrary: {}, lockDrivers: ["580.*"], {}}}'
SUSPEND = "suspend: true, memoryReserve: 64Mi"
HEARTBEAT = """
import sys, threading, time
from colocate.fakecard.client import Device
beats = open(sys.argv[2], "w")
def beat():
    while True:
        beats.write("x"); beats.flush()
        time.sleep(0.01)
device = Device(sys.argv[1])
threading.Thread(target=beat, daemon=True).start()
while True:
    device.launch(1, 4e6)
    device.sync()
"""


@pytest.fixture
def start_python(tmp_path):
    """`colocate run` of a program of the test's own."""
    started = []

    def start(name, code, *arguments):
        command = [*CLI, "run", "--name", name, "--", sys.executable, "-P", "-c", code, *map(str, arguments)]
        started.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        return started[-1]

    yield start
    for job in started:
        end(job)


def on_card(fake):
    """The processes that have a context."""
    device = fake.state.devices[0]
    return {device.processes[i].pid for i in range(device.process_count)}


def pid_of(node, fake, name):
    """The process of a job that is on the card."""
    path, found = joined(tier_of(node), name), list[int]()

    def there():
        found[:] = sorted(processes_anywhere(node.port, path) & on_card(fake))
        return found

    assert wait_for(there)
    return found[0]


def becomes(fake, pid, state, seconds=40.0):
    return wait_for(lambda: fake.held(pid) == state, seconds)


def lately(running):
    return json.dumps(running.ask("explain")["lately"])


def test_12_a_locked_jobs_cpu_side_goes_on_and_a_dead_agent_leaves_it_running(
    node, agent, cards, start_python, tmp_path
):
    fake = cards()
    running = agent(more=LOCKS.format(fake.library, ""))
    fake.service("web")
    beats = tmp_path / "beats"
    job = start_python("train", HEARTBEAT, fake.folder, beats)
    path, pid = joined(tier_of(node), "train"), pid_of(node, fake, "train")
    assert becomes(fake, pid, "locked")
    assert becomes(fake, pid, "running"), "it is let go between requests"

    def goes_on():
        before, locked = beats.stat().st_size, fake.held(pid) == "locked"
        time.sleep(0.05)
        return locked and fake.held(pid) == "locked" and not frozen(node, path) and beats.stat().st_size > before

    assert wait_for(goes_on)
    assert becomes(fake, pid, "locked")
    running.process.send_signal(signal.SIGKILL)
    assert becomes(fake, pid, "running", 5)
    for _ in range(50):
        assert fake.held(pid) == "running", "and it stays so"
        time.sleep(0.01)
    assert job.poll() is None


def test_12_the_guardian_lets_go_where_the_worker_died_with_the_agent(node, agent, cards, start_python, tmp_path):
    fake = cards()
    running = agent(more=LOCKS.format(fake.library, ""))
    fake.service("web")
    start_python("train", HEARTBEAT, fake.folder, tmp_path / "beats")
    pid = pid_of(node, fake, "train")
    workers: list[int] = []

    def stopped_while_locked():
        if not becomes(fake, pid, "locked"):
            return False
        running.process.send_signal(signal.SIGSTOP)  # so that it starts no other worker
        workers[:] = [p for p in children_of(running.process.pid) if "driver_worker" in command_of(p)]
        for worker in workers:
            kill(worker)
        time.sleep(0.05)
        if fake.held(pid) == "locked":
            return True
        running.process.send_signal(signal.SIGCONT)
        return False

    assert wait_for(stopped_while_locked, 60)
    assert workers
    running.process.send_signal(signal.SIGKILL)
    assert becomes(fake, pid, "running", 10)


def children_of(pid):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in found.stdout.split()]


def command_of(pid):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def kill(pid):
    subprocess.run(["kill", "-KILL", str(pid)], check=True)


def test_16_a_jobs_memory_is_limited_by_the_driver_and_the_limits_go_with_the_agent(node, agent, cards, start_job):
    fake = cards("--memory", str(4 << 30), "--memory-limits")
    running = agent(more=LOCKS.format(fake.library, ""))
    fake.service("web", memory=2 << 30)
    job = start_job("grow", fake, "grower", "--memory", str(256 << 20))
    device = fake.state.devices[0]

    def limits():
        return {one.group.decode().rpartition("/")[2]: (one.soft, one.hard) for one in device.limits if one.group}

    assert wait_for(lambda: set(limits()) == {"web", "grow"}, 40), limits()
    assert limits() == {"web": (2 << 30, (1 << 64) - 1), "grow": (0, 1 << 30)}
    least = 4 << 30
    deadline = time.monotonic() + 8 * PATIENCE
    while time.monotonic() < deadline:
        least = min(least, device.memory_total - device.memory_used)
        time.sleep(0.02)
    assert least >= 1 << 30, "its allocations failed before the reserve was touched"
    assert device.memory_used > 2 << 30
    assert job.poll() is None or job.returncode != EXIT_EVICTED
    running.stop()
    assert limits() == {}
    assert fake.processes[0].poll() is None


def test_a_job_is_taken_off_its_card_for_a_services_memory_and_comes_back(node, agent, cards, start_job):
    fake = cards("--memory", str(512 << 20))
    agent(more=LOCKS.format(fake.library, SUSPEND))
    fake.service("web", memory=128 << 20)
    start_job("train", fake, "trainer", "--memory", str(192 << 20))
    pid = pid_of(node, fake, "train")
    grown = fake.service("web", memory=160 << 20)  # the reserve is touched
    assert becomes(fake, pid, "checkpointed", 60)
    device = fake.state.devices[0]
    assert wait_for(lambda: device.memory_used == 288 << 20)
    assert not frozen(node, joined(tier_of(node), "train")), "a frozen process cannot be held"
    assert grown.poll() is None
    for service in fake.processes:
        service.kill()
    assert becomes(fake, pid, "running")
    assert wait_for(lambda: device.memory_used == 192 << 20)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param("cuCheckpointProcessCheckpoint die", id="its worker dies half-way"),
        pytest.param("cuCheckpointProcessCheckpoint 999", id="the driver fails half-way"),
    ],
)
def test_14_a_driver_that_fails_at_a_checkpoint_is_not_asked_again(node, agent, cards, start_job, fault):
    fake = cards("--memory", str(512 << 20))
    running = agent(more=LOCKS.format(fake.library, SUSPEND))
    fake.service("web", memory=128 << 20)
    job = start_job("train", fake, "trainer", "--memory", str(192 << 20))
    pid_of(node, fake, "train")
    fake.wrong(fault)
    fake.service("web", memory=160 << 20)
    assert wait_for(lambda: job.poll() is not None, 60)
    assert job.returncode == EXIT_EVICTED
    problems = running.ask("top")["problems"]
    assert "in this boot" in problems["gpu driver"]
    assert fake.processes[0].poll() is None
    assert wait_for((running.directory / "state" / "gpu-driver").exists)


def test_14_a_lock_that_hangs_delays_nobody_and_batch_is_held_by_the_freezer(node, agent, cards, start_job):
    fake = cards()
    fake.wrong("cuCheckpointProcessLock hang 60")
    running = agent(more=LOCKS.format(fake.library, ""))
    fake.service("web")
    start_job("train", fake, "blocking")
    path = joined(tier_of(node), "train")
    assert wait_for(lambda: "has not returned" in running.ask("top")["problems"].get("gpu driver", ""), 60)
    assert pulsing(node, running, path)
    assert running.stop() is not None
    assert not frozen(node, path)


@pytest.mark.parametrize("controlled", [True, False], ids=["by its control daemon", "by a signal alone, as a proof"])
def test_17_a_client_of_mps_that_has_to_go_takes_no_neighbour_along(
    node, agent, cards, start_job, monkeypatch, controlled
):
    fake = cards("--memory", str(4 << 30), "--sharing", "mps")
    if controlled:
        monkeypatch.setenv("PATH", f"{fake.folder}:{os.environ['PATH']}")
    running = agent(more=f"gpu: {{nvmlLibrary: {fake.library}}}\n  freeze: {{maxFrozen: 2s}}")
    service = fake.service("web", memory=2 << 30)
    job = start_job("grow", fake, "grower", "--memory", str(512 << 20))
    assert wait_for(lambda: job.poll() is not None, 60)
    assert job.returncode == EXIT_EVICTED
    if controlled:
        time.sleep(1.0)
        assert service.poll() is None
        assert "gpu mps" not in running.ask("top")["problems"]
    else:
        assert wait_for(lambda: service.poll() is not None), "the fake does what MPS does"
        assert "is not installed" in running.ask("top")["problems"]["gpu mps"]
