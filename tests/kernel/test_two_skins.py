"""The fake card in virtual time and with real processes: the same requests take as long."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys

import pytest

from colocate.fakecard.card import MILLISECOND, SECOND, Card
from colocate.fakecard.process import Process
from colocate.fakecard.workloads import Arrivals, Service, blocking, trainer
from tests.kernel.conftest import colocate
from tests.kernel.fake_cards import line_of

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="the fake NVML needs a C compiler (cc)")
SEED, PER_SECOND, SECONDS, ROUNDS = 7, 15.0, 12, 4
SERVICE = """
import json, random, sys, time
from colocate.fakecard.client import Device
folder, seed, rate, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])
chance, due, arrivals = random.Random(seed), 0.0, []
while (due := due + chance.expovariate(rate)) < seconds: arrivals.append(due)
with Device(folder) as device:
    print("on the card", flush=True)
    sys.stdin.readline()
    began, latencies = time.monotonic(), []
    for arrival in arrivals:
        time.sleep(max(began + arrival - time.monotonic(), 0.0))
        device.launch(20, 1e6)
        device.sync(spins=True)
        latencies.append(time.monotonic() - began - arrival)
print(json.dumps(latencies))
"""
BATCH = {"one kernel at a time": (blocking, ("blocking",)), "steps": (trainer, ("trainer",))}


def virtual(program):
    card, latencies = Card(), list[int]()
    service = Service(card, Arrivals(card, PER_SECOND, SEED), latencies.append)
    Process(card, 1, service.vision())
    Process(card, 2, program())
    card.run_until(SECONDS * SECOND)
    return [ns / SECOND for ns in latencies]


def real(fake, node, child, program):
    batch = fake.batch(child, *program)
    arguments = [str(fake.folder), str(SEED), str(PER_SECOND), str(SECONDS)]
    command = [sys.executable, "-P", "-c", SERVICE, *arguments]
    service = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert line_of(service) == "on the card"
    assert service.stdin is not None
    service.stdin.write("go\n")
    service.stdin.flush()
    found = [float(word) for word in line_of(service).strip("[]").split(",")]
    service.communicate()
    batch.kill()
    batch.wait()
    return found


def p99(latencies):
    return statistics.quantiles(latencies, n=100)[98]


@pytest.mark.slow
@pytest.mark.parametrize("name", BATCH)
def test_both_skins_agree_on_what_a_request_takes(node, cards, name):
    """Within a tenth, median and p99. A real one may meet a moment without a CPU: one of some rounds will not."""
    program, command = BATCH[name]
    expected, fake = virtual(program), cards()
    node.make("train")
    seen = []
    for _ in range(ROUNDS):
        found = real(fake, node, "train", command)
        ratios = statistics.median(found) / statistics.median(expected), p99(found) / p99(expected)
        seen.append(tuple(round(r, 3) for r in ratios))
        if all(abs(r - 1.0) <= 0.1 for r in ratios):
            return
    pytest.fail(f"real / virtual, median and p99: {seen}; alone a request takes {20 * MILLISECOND / SECOND} s")


@pytest.mark.slow
def test_the_demonstration_runs_on_a_card_that_only_the_drivers_libraries_tell_of(cards, dirs):
    """As on a real one: processes that launch by libcuda.so.1, an agent and a meter that read NVML."""
    fake = cards()
    uuid = fake.state.devices[0].uuid.decode()
    options = ["--nvml-library", str(fake.library), "--seconds", "6s", "--report", str(dirs / "report.html")]
    found = colocate("demo", "gpu", "--card", uuid, "-o", "json", *options)
    assert found.returncode == 0, found.stderr
    result = json.loads(found.stdout)
    assert not result["simulated_card"]
    assert result["host_unchanged"]
    assert {"alone", "timeslicing", "gate", "off"} <= result["arms"].keys()
    assert result["arms"]["timeslicing"]["batch_share"] > 0.5
    assert result["arms"]["gate"]["batch_share"] > 0.2
    assert result["arms"]["off"]["batch_share"] < 0.1
    assert result["arms"]["gate"]["p99_ms"] < result["arms"]["timeslicing"]["p99_ms"]
    assert result["refused"]["reason"] == "CannotProtect"


def test_a_card_that_is_not_there_is_named_with_those_that_are(cards, dirs):
    fake = cards()
    found = colocate("demo", "gpu", "--card", "GPU-7", "--nvml-library", str(fake.library))
    assert found.returncode == 2
    assert f"there is no GPU-7; there is {fake.state.devices[0].uuid.decode()}" in found.stderr
