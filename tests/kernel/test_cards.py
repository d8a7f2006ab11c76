"""Cards that are simulated, processes and freezes that are real: who is on them is found, stopped and let go."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest

from colocate import doctor
from colocate.cgroup.tree import inodes_of, joined
from colocate.cli.main import main
from colocate.jobs.client import EXIT_EVICTED
from colocate.observe.nvml import Cards
from colocate.observe.workloads import Target
from tests.kernel.conftest import PATIENCE, tier_of, wait_for
from tests.kernel.fake_cards import CLI, POLICY, end, frozen, pulsing, states_of

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="the fake NVML needs a C compiler (cc)")


@pytest.fixture
def read(node):
    """The cards as the agent reads them, of the children that are named as workloads."""
    readers = []

    def start(fake, *children):
        reader = Cards(node.port, str(fake.library))
        readers.append(reader)
        paths = [joined(node.path, child) for child in children]
        targets = [Target(p, p.rpartition("/")[2], "service", p, inodes_of(node.port, p)) for p in paths]

        def look():
            reader.read()
            return {c.index: c for c in reader.collect(targets).values()}

        return reader, look

    yield start
    for reader in readers:
        reader.close()


def users(card):
    return {id_.rpartition("/")[2]: user for id_, user in card.users.items()}


def test_who_is_on_a_card_is_found_by_its_cgroup(node, cards, read):
    node.make("web")
    node.make("train")
    node.make("nobody")
    fake = cards("--cards", "2")
    fake.service("web")
    fake.batch("train", "trainer", "--card", "1", "--memory", str(1 << 30))
    fake.batch("nobody", "trainer", "--card", "1")
    _, look = read(fake, "web", "train")
    assert wait_for(lambda: (look().get(1) is not None) and users(look()[1]).get("train") is not None)
    assert wait_for(lambda: users(look()[1])["train"].percent)
    found = look()
    assert list(users(found[0])) == ["web"]
    assert list(users(found[1])) == ["train"]
    assert (users(found[1])["train"].memory_bytes, found[1].memory_used_bytes) == (1 << 30, 1 << 30)
    assert wait_for(lambda: look()[1].strangers == 1), "from its second reading on: one that ends has left its cgroup"
    assert (found[0].memory_bytes, found[0].mig, found[0].problem) == (24 << 30, False, "")


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        pytest.param("nvmlDeviceGetProcessUtilization 6", 0, id="nothing newer is idle, not an error"),
        pytest.param("percent-wild", 0, id="values beyond a hundred are dropped"),
        pytest.param("nvmlDeviceGetProcessUtilization 3", None, id="a card that does not tell: that is unknown"),
        pytest.param("nvmlDeviceGetProcessUtilization 7", None, id="a list that grew between two calls: so is that"),
    ],
)
def test_21_utilization_that_cannot_be_believed_is_none(node, cards, read, fault, expected):
    node.make("web")
    fake = cards()
    fake.wrong(fault)
    fake.batch("web", "trainer")
    _, look = read(fake, "web")
    assert wait_for(lambda: 0 in look() and "web" in users(look()[0]))
    time.sleep(0.5)
    look()
    time.sleep(0.5)
    assert users(look()[0])["web"].percent == expected


def test_21_stale_rows_do_not_hide_the_newest(node, cards, read):
    node.make("web")
    fake = cards()
    fake.wrong("stale-samples")
    fake.batch("web", "trainer")
    _, look = read(fake, "web")
    assert wait_for(lambda: 0 in look() and "web" in users(look()[0]) and users(look()[0])["web"].percent)
    assert wait_for(lambda: users(look()[0])["web"].percent > 90, 5)


def test_21_unknown_memory_is_none(node, cards, read):
    node.make("web")
    fake = cards()
    fake.wrong("memory-unknown")
    fake.batch("web", "trainer")
    _, look = read(fake, "web")
    assert wait_for(lambda: 0 in look() and "web" in users(look()[0]))
    assert users(look()[0])["web"].memory_bytes is None


def test_21_a_lost_card_is_named_and_comes_back(node, cards, read):
    node.make("web")
    fake = cards()
    fake.batch("web", "trainer")
    _, look = read(fake, "web")
    assert wait_for(lambda: 0 in look() and "web" in users(look()[0]))
    fake.wrong("nvmlDeviceGetMemoryInfo 15")
    assert wait_for(lambda: look()[0].problem == "NVML: GPU_IS_LOST")
    fake.wrong()
    assert wait_for(lambda: look()[0].problem == "" and "web" in users(look()[0]))


def test_21_a_driver_that_hangs_delays_nobody(node, cards, read):
    node.make("web")
    fake = cards()
    fake.batch("web", "trainer")
    reader, look = read(fake, "web")
    assert wait_for(lambda: 0 in look() and "web" in users(look()[0]))
    fake.wrong("nvmlDeviceGetMemoryInfo hang 30")
    longest, deadline = 0.0, time.monotonic() + 4.0
    while time.monotonic() < deadline:
        began = time.thread_time()
        card = look()[0]
        longest = max(longest, time.thread_time() - began)
        time.sleep(0.02)
    assert longest < 0.5
    assert reader.problem == "NVML did not answer within 2 s"
    assert time.monotonic() - card.at_seconds > 2.0, "what was read last is shown with its age"
    fake.wrong()
    assert wait_for(lambda: time.monotonic() - look()[0].at_seconds < 1.0)
    assert reader.problem == ""


def test_21_no_permission_and_no_driver_are_said(node, cards, read):
    fake = cards()
    fake.wrong("nvmlInitWithFlags 4")
    reader, look = read(fake)
    look()
    assert wait_for(lambda: reader.problem == "NVML: NO_PERMISSION")
    fake.wrong("nvmlInitWithFlags 9")
    assert wait_for(lambda: (look(), reader.problem)[1] == "NVML: DRIVER_NOT_LOADED")


def test_22_pids_of_another_namespace_are_nobodys(node, cards, read):
    node.make("web")
    fake = cards()
    fake.wrong("namespaced-pids")
    fake.batch("web", "trainer")
    _, look = read(fake, "web")
    assert wait_for(lambda: 0 in look() and look()[0].strangers)
    assert users(look()[0]) == {}


def test_22_a_pid_that_is_another_process_by_now_is_nobodys(node, cards, read):
    node.make("web")
    fake = cards()
    process = fake.batch("web", "trainer")
    reader, look = read(fake, "web")
    assert wait_for(lambda: 0 in look() and "web" in users(look()[0]))
    wait_for(lambda: not reader._asked.is_set())
    [row] = [p for c in reader._found for p in c["processes"]]
    assert row[0] == process.pid
    row[1] += 1  # it started at another time
    targets = [
        Target("web", "web", "service", joined(node.path, "web"), inodes_of(node.port, joined(node.path, "web")))
    ]
    assert [c.users for c in reader.collect(targets).values()] == [{}]


def test_11_an_agent_that_is_killed_in_mid_pulse_leaves_nothing_stopped(node, agent, cards, start_job):
    fake = cards()
    running = agent(more=POLICY.format(fake.library))
    fake.service("web")
    job = start_job("train", fake, "blocking")
    path = joined(tier_of(node), "train")
    assert pulsing(node, running, path)
    assert wait_for(lambda: frozen(node, path))
    running.process.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    assert wait_for(lambda: not inodes_of(node.port, path) or not frozen(node, path), 10)
    took = time.monotonic() - killed
    for _ in range(50):
        assert not inodes_of(node.port, path) or not frozen(node, path), "and it stays so"
        time.sleep(0.01)
    end(job)
    assert took < 5.0 * PATIENCE, "how fast it is, a second, is for the benchmark"


def true_drain(node, fake, child):
    """For how long the card goes on after all in a cgroup was stopped."""
    node.knob(child, "cgroup.freeze", "1")
    began = last_at = time.monotonic()
    last = fake.busy_ns
    while time.monotonic() - last_at < 0.1:
        if fake.busy_ns != last:
            last, last_at = fake.busy_ns, time.monotonic()
        time.sleep(0.001)
    node.knob(child, "cgroup.freeze", "0")
    return last_at - began


@pytest.mark.parametrize("share", ["1.0", "0.2"], ids=["kernels that fill the card", "kernels that fill a fifth of it"])
def test_10_the_drain_that_is_published_is_what_the_card_goes_on_for(node, agent, cards, start_job, share):
    """About 1,000 kernels of 0.2 ms are queued whenever it is stopped."""
    node.make("plain")
    fake = cards()
    plain = fake.batch("plain", "async", "--kernel-ms", "0.2", "--share", share)
    time.sleep(1.0)
    expected = true_drain(node, fake, "plain")
    plain.kill()
    plain.wait()
    running = agent(more=POLICY.format(fake.library))
    fake.service("web", every=1.5)
    job = start_job("train", fake, "async", "--kernel-ms", "0.2", "--share", share)

    def drains():
        cards_now = running.ask("explain")["snapshot"].get("cards", {}).values()
        users_now = [c["users"]["job:train"] for c in cards_now if "job:train" in c.get("users", {})]
        return [seconds for user in users_now for _, seconds in user.get("drains", [])]

    assert wait_for(lambda: len(drains()) >= 2, 60), running.ask("explain")["plan"]["verdicts"]
    published = sorted(drains())
    end(job)
    running.stop()
    assert expected == pytest.approx(0.2, rel=0.1)
    assert published[len(published) // 2] == pytest.approx(expected, rel=0.2)


def test_15_batch_that_grows_is_stopped_before_the_reserve_and_then_goes(node, agent, cards, start_job):
    fake = cards("--memory", str(4 << 30))
    running = agent(more=POLICY.format(fake.library) + "\n  freeze: {maxFrozen: 2s}")
    fake.service("web", memory=2 << 30)
    job = start_job("grow", fake, "grower", "--memory", str(512 << 20))
    path = joined(tier_of(node), "grow")
    least = 4 << 30

    def gone():
        nonlocal least
        device = fake.state.devices[0]
        least = min(least, device.memory_total - device.memory_used)
        return job.poll() is not None

    assert wait_for(gone, 60)
    assert path
    assert least >= 1 << 30, f"{least >> 20} MiB were free at the least"
    assert job.returncode == EXIT_EVICTED
    said = [n for n in running.ask("explain")["lately"] if n["workload"] == "job:grow"]
    assert any("free on the card, reserve 1.0 GiB" in n["why"] for n in said), said
    assert fake.processes[0].poll() is None, "the service never felt it"


def test_18_two_jobs_on_a_card_are_stopped_together(node, agent, cards, start_job):
    fake = cards()
    running = agent(more=POLICY.format(fake.library))
    fake.service("web")
    jobs = [start_job(name, fake, "blocking") for name in ("one", "two")]
    paths = [joined(tier_of(node), name) for name in ("one", "two")]
    assert all(pulsing(node, running, path) for path in paths)
    time.sleep(2.0)
    seen: dict[tuple[bool, ...], int] = {}
    for _ in range(600):
        both = tuple(frozen(node, path) for path in paths)
        seen[both] = seen.get(both, 0) + 1
        time.sleep(0.003)
    for job in jobs:
        end(job)
    assert seen.get((True, True), 0) > 20, seen
    assert seen.get((False, False), 0) > 20, seen
    assert seen.get((True, False), 0) + seen.get((False, True), 0) <= 30, "but for the moments between two writes"


def test_20_batch_alone_on_its_card_is_never_stopped(node, agent, cards, start_job):
    fake = cards("--cards", "2")
    running = agent(more=POLICY.format(fake.library))
    fake.service("web")
    job = start_job("train", fake, "blocking", "--card", "1")
    path = joined(tier_of(node), "train")
    assert wait_for(
        lambda: any(
            "job:train" in c.get("users", {}) for c in running.ask("explain")["snapshot"].get("cards", {}).values()
        )
    )
    assert not any(states_of(node, path, 300))
    end(job)


def test_23_on_a_card_that_is_divided_batch_is_only_watched(node, agent, cards, start_job):
    fake = cards("--sharing", "mig")
    running = agent(more=POLICY.format(fake.library))
    fake.service("web")
    job = start_job("train", fake, "blocking")
    path = joined(tier_of(node), "train")
    reasons = lambda: [v["reason"] for v in running.ask("explain")["plan"]["verdicts"] if v["law"] == "gpu"]  # noqa: E731
    assert wait_for(lambda: reasons() == ["Unsupported"])
    assert not any(states_of(node, path, 200))
    end(job)


def test_30_a_shadow_agent_decides_the_same_and_stops_nobody(node, agent, cards):
    fake = cards()
    node.make("train")
    running = agent(
        more=POLICY.format(fake.library) + "\n  batch: [{name: train, selector: {cgroup: /train}}]",
        options=("--shadow",),
    )
    fake.service("web")
    fake.batch("train", "blocking")
    pulses = lambda: running.ask("explain")["plan"].get("pulses", {})  # noqa: E731
    assert wait_for(lambda: any(p["mode"] == "probe" for of in pulses().values() for p in of))
    path = joined(node.path, "train")
    assert not any(states_of(node, path, 200))


def test_batch_in_place_is_stopped_only_with_its_freezer_in_the_journal(node, agent, cards, dirs):
    fake = cards()
    node.make("train")
    running = agent(more=POLICY.format(fake.library) + "\n  batch: [{name: train, selector: {cgroup: /train}}]")
    fake.service("web")
    fake.batch("train", "blocking")
    path = joined(node.path, "train")
    assert pulsing(node, running, path)
    entries = [
        line for line in (dirs / "state" / "journal").read_text().splitlines() if '"path":"' + path + '"' in line
    ]
    assert any('"file":"cgroup.freeze"' in e or '"file":"freezer.state"' in e for e in entries)
    running.stop()
    assert not frozen(node, path)


def test_25_batch_that_somebody_else_paused_is_not_let_go(node, agent, cards):
    fake = cards()
    node.make("train")
    fake.service("web")
    fake.batch("train", "blocking")
    node.knob("train", "cgroup.freeze", "1")  # docker pause
    running = agent(more=POLICY.format(fake.library) + "\n  batch: [{name: train, selector: {cgroup: /train}}]")
    states = lambda: [v["state"] for v in running.ask("explain")["plan"]["verdicts"] if v["law"] == "gpu"]  # noqa: E731
    assert wait_for(lambda: states() == ["probe"])
    path = joined(node.path, "train")
    assert all(states_of(node, path, 300))
    running.stop()
    assert frozen(node, path), "nor at our end"


@pytest.mark.parametrize(
    ("options", "fault", "expected"),
    [
        pytest.param((), "", {"memory limits"}, id="a whole card"),
        pytest.param(("--memory-limits",), "", set(), id="one whose driver limits memory"),
        pytest.param(("--driver", "550.54.15"), "", {"memory limits", "checkpoints"}, id="an old driver"),
        pytest.param(("--no-persistence",), "", {"memory limits", "persistence"}, id="settings are forgotten"),
        pytest.param(("--sharing", "mig"), "", {"sharing", "counters", "memory limits", "checkpoints"}, id="divided"),
        pytest.param((), "nvmlInitWithFlags 4", {"GPUs"}, id="no permission"),
        pytest.param((), "nvmlDeviceGetMemoryInfo 15", {"GPU 0"}, id="a lost card"),
    ],
)
def test_the_doctor_says_of_each_card_what_the_law_can_go_by(node, cards, monkeypatch, options, fault, expected):
    fake = cards(*options)
    fake.wrong(fault)
    monkeypatch.setattr("colocate.observe.node.DRIVER_FILES", (str(fake.library),))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(fake.folder))
    found = [c for c in doctor.checks(node.port) if c.name.startswith("GPU")]
    assert {c.name.removeprefix("GPU 0 ") for c in found if not c.ok} == expected
    assert all(c.ok or (c.cost and c.mend) for c in found), "what it costs, and the mend"


def test_power_status_reads_cards(cards, tmp_path, capsys):
    fake = cards("--cards", "2")
    arguments = ["power", "status", "--sysfs", str(tmp_path), "--nvml-library", str(fake.library)]
    assert main([*arguments, "-o", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [gpu["index"] for gpu in found["gpus"]] == [0, 1]
    assert all(0 < gpu["watts"] < gpu["limit_watts"] for gpu in found["gpus"])
    assert (found["zones"], found["cpu_watts"]) == ([], None)
    assert main([*arguments[:-1], str(tmp_path / "none.so")]) == 0
    assert "not read: " in capsys.readouterr().out


def test_power_limits_are_set_and_read_back_as_a_driver_does(node, cards, monkeypatch):
    fake = cards("--no-persistence")
    node.make("train")
    fake.batch("train", "async")
    ask = """
import pynvml as n, sys, time
n.nvmlInit(); h = n.nvmlDeviceGetHandleByIndex(0)
print([x // 1000 for x in n.nvmlDeviceGetPowerManagementLimitConstraints(h)])
try: n.nvmlDeviceSetPowerManagementLimit(h, 99_000)
except n.NVMLError as error: print(error)
n.nvmlDeviceSetPowerManagementLimit(h, 150_000)
time.sleep(2.0)
print(n.nvmlDeviceGetEnforcedPowerLimit(h) // 1000, round(n.nvmlDeviceGetPowerUsage(h), -3) // 1000)
print(n.nvmlDeviceGetCurrentClocksEventReasons(h))
for _ in range(10):  # the simulated card's own process may be late by a part of a second
    first, at = n.nvmlDeviceGetTotalEnergyConsumption(h), time.monotonic()
    time.sleep(1.0)
    drawn = round((n.nvmlDeviceGetTotalEnergyConsumption(h) - first) / 1000 / (time.monotonic() - at), -1)
    if drawn == 150.0:
        break
print(drawn)
"""
    monkeypatch.setenv("LD_LIBRARY_PATH", str(fake.folder))
    said = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, timeout=60, check=True).stdout
    assert said.splitlines() == ["[100, 300]", "Invalid Argument", "150 150", "4", "150.0"]
    fake.processes[0].kill()
    assert wait_for(lambda: fake.state.devices[0].power_limit_mw == 300_000), "forgotten with its last client"


def test_what_a_card_draws_is_recorded(node, cards, read):
    fake = cards()
    node.make("train")
    fake.batch("train", "async")
    _, look = read(fake, "train")
    assert wait_for(lambda: 0 in look() and (look()[0].watts or 0.0) > 250.0)
    assert (look()[0].limit_watts, look()[0].pcie_bytes_per_second) == (300.0, None)


PAIR = """
import socket, sys, threading, time
from colocate.fakecard.client import Device
folder, card, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
device = Device(folder, card)
link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
if card == 0:
    server = link
    server.bind(path); server.listen()
    link, _ = server.accept()
else:
    while link.connect_ex(path): time.sleep(0.05)
link.settimeout(float(sys.argv[4]))  # the watchdog of a collective
print("on the card", flush=True)
while True:
    device.launch(1, 4e6)
    device.sync()
    link.sendall(b"x")
    if not link.recv(1): sys.exit("the other has gone")
"""


def test_28_a_pair_that_waits_for_each_other_is_stopped_together(node, agent, cards, tmp_path):
    fake = cards("--cards", "2")
    running = agent(more=POLICY.format(fake.library))
    fake.service("web")
    jobs, paths = [], []
    for card in (0, 1):
        program = [sys.executable, "-P", "-c", PAIR, str(fake.folder), str(card), str(tmp_path / "pair"), "5"]
        command = [*CLI, "run", "--name", f"rank{card}", "--gang", "train", "--", *program]
        jobs.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        paths.append(joined(tier_of(node), f"rank{card}"))
    try:
        assert all(pulsing(node, running, path, 60) for path in paths)
        apart = looks = 0
        for _ in range(400):
            time.sleep(0.01)
            first, second = (frozen(node, path) for path in paths)
            looks += first or second
            apart += first != second
        assert looks
        assert apart <= 0.25 * looks + 4, f"of {looks} looks at a stopped pair {apart} saw one of them run"
        assert [job.poll() for job in jobs] == [None, None], "no watchdog gave up"
    finally:
        for job in jobs:
            end(job)
