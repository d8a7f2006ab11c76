"""S2.3: caps for a job's lifetime, restored: real jobs and real deaths, on a simulated driver."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from colocate.actuate.journal import boot_id, read_entries
from colocate.cgroup.tree import joined, processes_anywhere
from colocate.jobs.client import EXIT_REFUSED
from colocate.localcluster.controlplane import free_ports
from tests.kernel.conftest import PATIENCE, tier_of, wait_for
from tests.kernel.fake_cards import CLI, CLIENT, POLICY, end, line_of
from tests.kernel.test_cpu_power import with_http

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="the fake NVML needs a C compiler (cc)")
FIRST_READING = """
import pathlib, sys
from colocate.fakecard.shared import attach
print(attach(pathlib.Path(sys.argv[1])).devices[0].power_enforced_mw, flush=True)
"""


@pytest.fixture
def job(monkeypatch):
    """`colocate run --power-cap` of a program on simulated cards; its standard output and error are the test's."""
    started = []

    def start(name, fake, cap, *command, cards=(0,), named="", more=()):
        uuids = [fake.state.devices[i].uuid.decode() for i in cards]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(uuids)}
        if not cards:
            del environment["CUDA_VISIBLE_DEVICES"]
        whole = [*CLI, "run", "--name", name, "--power-cap", str(cap), "--power-class", named, *more, "--", *command]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(whole, env=environment, stdout=pipe, stderr=pipe, text=True))
        return started[-1]

    yield start
    for one in started:
        end(one)
        for output in (one.stdout, one.stderr):
            assert output is not None
            output.close()


def limits(fake, of="power_enforced_mw"):
    """Watts in force on each card."""
    return [getattr(fake.state.devices[i], of) // 1000 for i in range(fake.state.device_count)]


def on(fake, *program):
    return [*CLIENT, str(fake.folder), *program]


def begun(job):
    """Wait until its program runs. Before that it is in the tier, and would end with the agent that it asked."""
    assert line_of(job) == "on the card", job.stderr.read()


def ready(running, cards=1):
    """Whether the agent has read them."""
    return wait_for(lambda: len(running.ask("explain").get("snapshot", {}).get("cards", {})) == cards)


def reasons(running):
    return [card["power"].get("reason", "") for card in running.ask("explain", "gpu")]


def problems(running):
    return running.ask("explain")["problems"]


def set_by_hand(fake, watts):
    code = "import pynvml as n, sys; n.nvmlInit(); n.nvmlDeviceSetPowerManagementLimit("
    code += "n.nvmlDeviceGetHandleByIndex(0), 1000 * int(sys.argv[1]))"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(fake.folder)}
    subprocess.run([sys.executable, "-c", code, str(watts)], env=environment, check=True, timeout=60)


def test_s2_3_a_cap_is_in_force_before_the_first_instruction_and_goes_with_the_job(node, agent, cards, job):
    fake = cards()
    running = agent(more=POLICY.format(fake.library))
    assert ready(running)
    one = job("train", fake, 180, sys.executable, "-P", "-c", FIRST_READING, str(fake.folder))
    assert one.stdout.readline().strip() == "180000", one.stderr.read()
    one.wait(PATIENCE * 20)
    assert wait_for(lambda: limits(fake) == [300])
    journal = running.directory / "state" / "journal"  # which forgets it after it is put back, never before
    assert wait_for(lambda: not [e for e in read_entries(journal)[0] if e.kind == "cap"])


def test_s2_3_its_watts_are_shared_by_its_cards_and_no_other_is_touched(node, agent, cards, job):
    fake = cards("--cards", "3")
    running = agent(more=POLICY.format(fake.library))
    assert ready(running, 3)
    one = job("train", fake, 401, *on(fake, "trainer"), cards=(0, 2))
    assert wait_for(lambda: limits(fake) == [200, 300, 200])
    assert wait_for(lambda: reasons(running) == ["Capped", "", "Capped"])
    end(one)
    assert wait_for(lambda: limits(fake) == [300] * 3)


def test_s2_3_a_limit_that_was_set_lower_is_not_raised(node, agent, cards, job):
    fake = cards()
    set_by_hand(fake, 200)
    running = agent(more=POLICY.format(fake.library))
    assert ready(running)
    one = job("train", fake, 280, *on(fake, "trainer"))
    assert wait_for(lambda: reasons(running) == ["Capped"])
    time.sleep(1.0)
    assert limits(fake) == [200]
    end(one)
    time.sleep(1.0)
    assert limits(fake) == [200]


def test_s2_3_a_job_that_was_refused_is_on_no_card(node, agent, cards, job):
    """It is run again without a cap, and without a GPU: nobody's cap is lifted for it."""
    fake = cards()
    running = agent(more=POLICY.format(fake.library))
    assert ready(running)
    job("train", fake, 150, *on(fake, "trainer"))
    assert wait_for(lambda: limits(fake) == [150])
    refused = job("mine", fake, 60, *on(fake, "trainer"))
    refused.wait(PATIENCE * 20)
    assert refused.returncode == EXIT_REFUSED
    again = subprocess.Popen([*CLI, "run", "--name", "mine", "--", "sleep", "4"])
    time.sleep(2.0)
    assert limits(fake) == [150]
    again.wait(PATIENCE * 20)


def test_s2_3_a_cap_that_a_dead_agent_had_not_set_yet_is_set_by_the_next(node, agent, cards, job):
    fake = cards()
    first = agent(more=POLICY.format(fake.library))
    assert ready(first)
    fake.wrong("nvmlDeviceSetPowerManagementLimit 4")
    job("train", fake, 150, *on(fake, "trainer"), cards=())
    journal = first.directory / "state" / "journal"
    assert wait_for(lambda: any(e.kind == "cap" for e in read_entries(journal)[0]))
    first.stop(signal.SIGKILL)
    first.socket.unlink()
    fake.wrong()
    second = agent(more=POLICY.format(fake.library))
    assert ready(second)
    assert wait_for(lambda: limits(fake) == [150])
    assert not any("somebody else" in why for why in problems(second).values())


def test_s2_3_a_card_whose_driver_hangs_holds_up_no_other(node, agent, cards, job):
    fake = cards("--cards", "2")
    running = agent(more=POLICY.format(fake.library))
    assert ready(running, 2)
    fake.wrong("nvmlDeviceSetPowerManagementLimit hang 20")
    hung = job("hung", fake, 150, *on(fake, "trainer"))
    hung.wait(PATIENCE * 30)
    assert hung.returncode == EXIT_REFUSED
    fake.wrong()
    well = job("well", fake, 150, *on(fake, "trainer", "--card", "1"), cards=(1,))
    assert wait_for(lambda: limits(fake)[1] == 150), well.poll()


def test_s2_3_with_a_dead_agent_each_card_comes_back_with_its_own_job(node, agent, cards, job):
    fake = cards("--cards", "2")
    running = agent(more=POLICY.format(fake.library))
    assert ready(running, 2)
    for card, name in enumerate(("short", "long")):
        begun(job(name, fake, 150, *on(fake, "trainer", "--card", str(card)), cards=(card,)))
    assert wait_for(lambda: limits(fake) == [150, 150])
    running.stop(signal.SIGKILL)
    for pid in processes_anywhere(node.port, joined(tier_of(node), "short")):
        node.port.kill(pid, signal.SIGKILL)
    log = running.directory / "state" / "guardian.log"
    assert wait_for(lambda: limits(fake) == [300, 150]), (limits(fake), log.exists() and log.read_text())


def test_s2_3_an_agent_that_looks_at_no_gpu_puts_back_what_one_before_it_set(node, agent, cards, job):
    fake = cards()
    first = agent(more=POLICY.format(fake.library))
    assert ready(first)
    one = job("train", fake, 150, *on(fake, "trainer"))
    begun(one)
    first.stop(signal.SIGKILL)
    first.socket.unlink()
    agent(more="gpu: {enabled: false}")
    time.sleep(3.0)
    assert limits(fake) == [150]
    end(one)
    assert wait_for(lambda: limits(fake) == [300])


def test_s2_3_a_job_on_one_of_its_cards_so_far_keeps_its_share_over_a_restart(node, agent, cards, job):
    fake = cards("--cards", "2")
    first = agent(more=POLICY.format(fake.library))
    assert ready(first, 2)
    begun(job("train", fake, 300, *on(fake, "trainer"), cards=(0, 1)))
    assert limits(fake) == [150, 150]
    first.stop(signal.SIGKILL)
    first.socket.unlink()
    second = agent(more=POLICY.format(fake.library))
    assert ready(second, 2)
    time.sleep(2.0)
    assert limits(fake) == [150, 150]


def test_s2_3_of_two_jobs_on_a_card_the_strictest_counts_and_the_other_is_left_its_own(node, agent, cards, job):
    fake = cards()
    running = agent(more=POLICY.format(fake.library))
    assert ready(running)
    job("loose", fake, 250, *on(fake, "trainer"))
    assert wait_for(lambda: limits(fake) == [250])
    strict = job("strict", fake, 150, *on(fake, "trainer"))
    assert wait_for(lambda: limits(fake) == [150]), (end(strict), strict.stderr.read(), running.ask("explain"))
    assert wait_for(lambda: processes_anywhere(node.port, joined(tier_of(node), "strict")))
    end(strict)
    assert wait_for(lambda: limits(fake) == [250])


def test_s2_3_a_job_that_does_not_name_its_cards_is_capped_once_it_is_seen(node, agent, cards, job):
    fake = cards("--cards", "2")
    running = agent(more=POLICY.format(fake.library))
    assert ready(running, 2)
    job("train", fake, 180, *on(fake, "trainer", "--card", "1"), cards=())
    assert wait_for(lambda: limits(fake) == [300, 180])


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "stopped in order"])
def test_s2_3_it_outlives_its_agent_and_is_put_back_with_the_jobs_end(node, agent, cards, job, how):
    fake = cards()
    running = agent(more=POLICY.format(fake.library))
    assert ready(running)
    one = job("train", fake, 180, *on(fake, "trainer"))
    assert wait_for(lambda: limits(fake) == [180])
    begun(one)
    path = joined(tier_of(node), "train")
    said = running.stop(how)
    if how == signal.SIGTERM:
        assert "keep their power limits until its last process ends" in said
    time.sleep(1.5)
    assert limits(fake) == [180], "an agent's end lifts no cap of who runs"
    for pid in processes_anywhere(node.port, path):
        node.port.kill(pid, signal.SIGKILL)
    one.wait(PATIENCE * 20)
    assert wait_for(lambda: limits(fake) == [300])


def test_s2_3_the_next_agent_goes_on_with_it(node, agent, cards, job):
    fake = cards()
    first = agent(more=POLICY.format(fake.library))
    assert ready(first)
    one = job("train", fake, 180, *on(fake, "trainer"))
    assert wait_for(lambda: limits(fake) == [180])
    begun(one)
    first.stop(signal.SIGKILL)
    first.socket.unlink()  # nobody answers there any more
    second = agent(more=POLICY.format(fake.library))
    assert ready(second)
    time.sleep(1.0)
    assert limits(fake) == [180]
    end(one)
    assert wait_for(lambda: limits(fake) == [300])


def test_s2_3_a_limit_that_somebody_else_sets_meanwhile_is_left_alone_and_said(node, agent, cards, job):
    fake = cards()
    running = agent(more=POLICY.format(fake.library))
    assert ready(running)
    one = job("train", fake, 180, *on(fake, "trainer"))
    assert wait_for(lambda: limits(fake) == [180])
    set_by_hand(fake, 220)
    assert wait_for(lambda: any("somebody else has set" in why for why in problems(running).values()))
    assert limits(fake) == [220]
    end(one)
    assert wait_for(lambda: not any("somebody else" in why for why in problems(running).values()))
    assert limits(fake) == [220], "it is theirs"


def test_s2_3_what_was_found_is_put_back_and_not_the_default(node, agent, cards, job):
    fake = cards()
    set_by_hand(fake, 240)
    running = agent(more=POLICY.format(fake.library))
    assert ready(running)
    one = job("train", fake, 180, *on(fake, "trainer"))
    assert wait_for(lambda: limits(fake) == [180])
    end(one)
    assert wait_for(lambda: limits(fake) == [240])


@pytest.mark.parametrize(
    ("cap", "fault", "says"),
    [
        pytest.param("60", "", "takes 100 W to 300 W", id="less than the card can be set to"),
        pytest.param("180", "nvmlDeviceSetPowerManagementLimit 4", "NO_PERMISSION", id="no right to set it"),
        pytest.param("180", "nvmlDeviceSetPowerManagementLimit hang 30", "did not answer", id="a driver that hangs"),
        pytest.param("180", "nvmlDeviceSetPowerManagementLimit die", "did not answer", id="a driver that falls over"),
    ],
)
def test_s2_3_who_cannot_be_capped_does_not_start(node, agent, cards, job, cap, fault, says):
    fake = cards()
    running = agent(more=POLICY.format(fake.library))
    assert ready(running)
    fake.wrong(*([fault] if fault else []))
    one = job("train", fake, cap, *on(fake, "trainer"))
    said = one.communicate(timeout=PATIENCE * 30)[1]
    assert one.returncode == EXIT_REFUSED
    assert says in said
    fake.wrong()
    assert wait_for(lambda: limits(fake) == [300])


def test_s2_3_a_service_on_the_card_that_asks_for_nothing_is_not_slowed(node, agent, cards, job):
    fake = cards()
    running = agent(more=POLICY.format(fake.library))
    assert ready(running)
    fake.service("web")
    assert wait_for(lambda: "web" in str(running.ask("explain")["snapshot"]["cards"]))
    one = job("train", fake, 180, *on(fake, "trainer"))
    said = one.communicate(timeout=PATIENCE * 30)[1]
    assert one.returncode == EXIT_REFUSED
    assert "web is on it too and asks for nothing: it is not slowed" in said
    assert limits(fake) == [300]


def test_s2_3_a_service_that_comes_to_a_capped_card_has_the_cap_lifted(node, agent, cards, job):
    fake = cards()
    running = agent(more=POLICY.format(fake.library))
    assert ready(running)
    job("train", fake, 180, *on(fake, "blocking"))
    assert wait_for(lambda: limits(fake) == [180])
    fake.service("web")
    assert wait_for(lambda: limits(fake) == [300])
    assert reasons(running) == ["Shared"]


BUDGET = """gpu: {{nvmlLibrary: {library}}}
  power:
    budget: {budget}
    models:
    - {{name: bert, points: [{{watts: 120, slowdown: 1.134}}, {{watts: 180, slowdown: 0.317}},
        {{watts: 240, slowdown: 0.067}}, {{watts: 300, slowdown: 0.0}}]}}
    - {{name: ncf, points: [{{watts: 100, slowdown: 0.02}}, {{watts: 300, slowdown: 0.0}}]}}"""


def test_s2_8_a_budget_that_is_cut_lowers_caps_and_is_never_exceeded_meanwhile(node, agent, cards, job):
    """A third card, which nobody is on, draws 45 W."""
    fake = cards("--cards", "3")
    running = agent(more=BUDGET.format(library=fake.library, budget=700))
    assert ready(running, 3)
    first = job("one", fake, 300, *on(fake, "trainer"), named="bert")
    assert wait_for(lambda: processes_anywhere(node.port, joined(tier_of(node), "one")))
    job("two", fake, 300, *on(fake, "trainer", "--card", "1"), cards=(1,), named="ncf")
    assert wait_for(lambda: processes_anywhere(node.port, joined(tier_of(node), "two")))
    time.sleep(0.5)
    assert limits(fake) == [300, 300, 300]
    running.config.write_text(running.config.read_text().replace("budget: 700", "budget: 445"))
    assert wait_for(lambda: sum(limits(fake)[:2]) <= 400)
    seen: list[int] = []
    while len(seen) < 50:
        seen.append(sum(limits(fake)[:2]))
        time.sleep(0.02)
    assert max(seen) <= 400
    assert limits(fake)[0] > 270 > 130 > limits(fake)[1], "who hardly feels it gives"
    said = json.loads(subprocess.run([*CLI, "power", "budget", "-o", "json"], capture_output=True, check=True).stdout)
    assert [row["workloads"] for row in said["gpus"]] == [["one"], ["two"], []]
    assert [row["cap_watts"] for row in said["gpus"]] == [*map(float, limits(fake)[:2]), None]
    assert said["node"]["reason"] == "Lowered"
    assert said["node"]["numbers"]["worst_slowdown"] < 0.1
    refused = job("three", fake, 150, *on(fake, "trainer", "--card", "2"), cards=(2,))
    assert "W of that are not left" in refused.communicate(timeout=PATIENCE * 30)[1]
    assert refused.returncode == EXIT_REFUSED
    end(first)
    assert wait_for(lambda: limits(fake) == [300, 300, 300]), "there is enough again"


def test_s2_8_a_job_with_a_deadline_keeps_what_it_needs_for_it_under_a_short_budget(node, agent, cards, job):
    fake = cards("--cards", "2")
    running = agent(more=BUDGET.format(library=fake.library, budget=700))
    assert ready(running, 2)
    begun(job("due", fake, 300, *on(fake, "trainer"), more=("--deadline", "10m", "--work", "8m")))
    begun(job("free", fake, 300, *on(fake, "trainer", "--card", "1"), cards=(1,)))
    running.config.write_text(running.config.read_text().replace("budget: 700", "budget: 400"))
    assert wait_for(lambda: sum(limits(fake)) <= 400)
    assert wait_for(lambda: limits(fake)[0] >= 250), reasons(running)
    assert sum(limits(fake)) <= 400
    said = running.ask("explain")["plan"]["verdicts"]
    assert any(v["message"].endswith("deadlines are kept: due") for v in said if v["law"] == "power")


def test_s2_8_a_job_with_a_deadline_has_its_watts_when_the_forecast_is_low(node, agent, cards, job, tmp_path):
    fake, forecast = cards("--cards", "2"), tmp_path / "forecast.json"

    def foretell(*prices):
        """From now on, an hour each, as the Carbon Aware SDK says it; whole in an instant."""
        points = [{"timestamp": time.time() - 60.0 + 3600.0 * i, "value": p} for i, p in enumerate(prices)]
        (tmp_path / "next").write_text(json.dumps({"forecastData": points}))
        (tmp_path / "next").rename(forecast)

    foretell(600, 100)
    policy = BUDGET.format(library=fake.library, budget=700)
    running = agent(more=policy + f"\n    signal: {{file: {forecast}, elastic: true}}")
    assert ready(running, 2)
    begun(job("due", fake, 300, *on(fake, "trainer"), named="bert", more=("--deadline", "2h", "--work", "80m")))
    begun(job("free", fake, 300, *on(fake, "trainer", "--card", "1"), cards=(1,), named="bert"))
    assert wait_for(lambda: limits(fake)[0] < 150), reasons(running)
    assert limits(fake)[1] == 300, "who has no deadline is left alone"
    assert reasons(running) == ["Shifted", "Capped"]
    foretell(100, 600)
    assert wait_for(lambda: limits(fake)[0] > 200, 60), reasons(running)


def test_s2_8_watts_that_are_left_are_lent_and_taken_back_for_whoever_starts(node, agent, cards, job):
    fake = cards("--cards", "2")
    running = agent(more=BUDGET.format(library=fake.library, budget=445) + "\n    boost: 50%")
    assert ready(running, 2)
    begun(job("one", fake, 200, *on(fake, "trainer"), named="bert"))
    assert wait_for(lambda: limits(fake)[0] > 230, 30), reasons(running)
    assert reasons(running)[0] == "Boosted"
    begun(job("two", fake, 200, *on(fake, "trainer", "--card", "1"), cards=(1,), named="ncf"))
    assert limits(fake) == [200, 200], "taken back before the other started"
    seen: list[list[int]] = []
    until = time.monotonic() + PATIENCE * 30
    while (not seen or seen[-1][0] <= 230) and time.monotonic() < until:
        seen.append(limits(fake))
        time.sleep(0.02)
    assert seen[-1][0] > 230, "what is left is lent again"
    assert max(map(sum, seen)) <= 445


def test_s2_8_the_energy_of_gpus_is_told_by_who_drew_it_and_sums_up(node, agent, cards, job, monkeypatch):
    fake, port = cards("--cards", "2"), free_ports(1)[0]
    monkeypatch.setattr("tests.kernel.conftest.POLICY", with_http(port))
    running = agent(more=POLICY.format(fake.library) + "\n  power: {attribution: true}")
    assert ready(running, 2)
    time.sleep(3)  # what they draw while nobody is on them
    begun(job("one", fake, 300, *on(fake, "trainer")))

    def series():
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                text = answer.read().decode()
        except OSError:
            return []
        return [one for family in text_string_to_metric_families(text) for one in family.samples]

    def joules(samples, name):
        return sum(s.value for s in samples if s.name == f"{name}_joules_total")

    assert wait_for(lambda: joules(series(), "colocate_job_gpu") > 1000, 60)
    samples = series()
    parts = ("colocate_job_gpu", "kepler_container_gpu", "kepler_node_gpu_idle", "colocate_node_gpu_others")
    assert sum(joules(samples, part) for part in parts) == pytest.approx(joules(samples, "kepler_node_gpu"))
    assert joules(samples, "colocate_node_gpu_others") < 0.2 * joules(samples, "colocate_job_gpu")
    (watts,) = [s.value for s in samples if s.name == "colocate_job_gpu_watts"]
    assert 150 < watts < 300, "what is beyond idle of one card under a trainer"


TELLS = """
import subprocess, sys, time
from colocate.fakecard.client import Device
device, done, told = Device(sys.argv[1]), 0, time.monotonic()
print("on the card", flush=True)
while True:
    device.launch(20, 5e6)
    device.sync()
    done += 1
    if time.monotonic() - told >= 5.5:
        told = time.monotonic()
        subprocess.run([*sys.argv[2:], "progress", str(done / 10000)], check=True)
"""


@pytest.mark.slow
def test_s2_8_what_jobs_say_of_their_progress_makes_their_model_better(node, agent, cards, job, dirs):
    """The policy thinks that ncf hardly feels a cap; a job of that class does, as the simulated card has it."""
    fake = cards("--cards", "1")
    running = agent(more=BUDGET.format(library=fake.library, budget=300) + "\n    refine: true")
    assert ready(running)
    begun(job("tells", fake, 300, sys.executable, "-P", "-c", TELLS, str(fake.folder), *CLI, named="ncf"))

    def known():
        asked = subprocess.run([*CLI, "power", "models", "-o", "json"], capture_output=True, check=True)
        data = json.loads(asked.stdout)
        at = [one["name"] for one in data["heard"]].index("ncf")
        return data["models"][at]["points"][0]["slowdown"], data["heard"][at]

    time.sleep(25)
    running.config.write_text(running.config.read_text().replace("budget: 300", "budget: 120"))
    assert wait_for(lambda: known()[1]["seconds"][0] > 10, 90), running.ask("explain")["laws"]["heard"]
    slowdown, about = known()
    assert about["jobs"] == 1
    assert about["policy"][0] == 0.02 < slowdown, "half a minute moves it a little"
    running.stop()
    assert (dirs / "state" / "power-classes.json").exists()


SURGES = """
"$@" --share 0.05 & calm=$!
while [ ! -e "$NOW" ]; do sleep 0.1; done
kill $calm
exec "$@"
"""


@pytest.mark.slow
def test_s2_8_watts_that_a_card_leaves_unused_for_a_minute_are_anothers_until_it_wants_them(
    node, agent, cards, job, tmp_path, monkeypatch
):
    fake = cards("--cards", "2")
    running = agent(more=BUDGET.format(library=fake.library, budget=400))
    assert ready(running, 2)
    monkeypatch.setenv("NOW", str(tmp_path / "now"))
    begun(job("surges", fake, 200, "sh", "-c", SURGES, "sh", *on(fake, "trainer")))
    job("busy", fake, 200, *on(fake, "trainer", "--card", "1"), cards=(1,))
    assert wait_for(lambda: limits(fake) == [200, 200])
    running.config.write_text(running.config.read_text().replace("budget: 400", "budget: 300"))
    assert wait_for(lambda: limits(fake) == [150, 150])
    assert wait_for(lambda: limits(fake)[1] > 180, 120), reasons(running)
    (tmp_path / "now").touch()
    while limits(fake) != [150, 150]:
        assert sum(limits(fake)) <= 300
        time.sleep(0.02)


WORK = """
import sys
from colocate.fakecard.client import Device
device = Device(sys.argv[1])
for _ in range(4):
    device.launch(50, 5e6)
    device.sync()
print("done")
"""


@pytest.fixture
def sweep():
    """`colocate power sweep` on simulated cards."""

    def run(fake, *options, code=WORK, cards=(0,)):
        uuids = [fake.state.devices[i].uuid.decode() for i in cards]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(uuids)}
        command = [*CLI, "power", "sweep", "--nvml-library", str(fake.library), *map(str, options)]
        command += ["--", sys.executable, "-P", "-c", code, str(fake.folder)]
        seconds = PATIENCE * 120
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds, check=False)

    return run


def test_s2_4_a_sweep_is_run_written_down_and_fitted(node, agent, cards, sweep, tmp_path):
    fake = cards()
    running = agent(more=POLICY.format(fake.library))
    assert ready(running)
    file = tmp_path / "runs.csv"
    found = sweep(fake, "--caps", "120:300:90", "--file", file, "--slowdown", "50%", "-o", "json")
    assert found.returncode == 0, found.stderr
    lines = file.read_text().splitlines()
    assert lines[0] == "power_limit,time_per_epoch,average_power"
    assert [line.split(",")[0] for line in lines[1:]] == ["120", "210", "300", "300", "210", "120"], "up and down"
    said = json.loads(found.stdout)
    assert [(cap["cap_watts"], cap["runs"]) for cap in said["caps"]] == [(120, 2), (210, 2), (300, 2)]
    assert said["caps"][0]["slowdown"] > 0.5
    assert 120 < said["recommended_cap_watts"] <= 300
    assert "done" in found.stderr, "what the command prints is no result of ours"
    again = subprocess.run([*CLI, "power", "fit", str(file), "-o", "json"], capture_output=True, text=True, check=True)
    assert json.loads(again.stdout)["caps"] == said["caps"]
    assert wait_for(lambda: limits(fake) == [300])


def test_s2_4_a_run_that_fails_ends_the_sweep_and_what_was_run_is_kept(node, agent, cards, sweep, tmp_path):
    fake = cards()
    running = agent(more=POLICY.format(fake.library))
    assert ready(running)
    file, marker = tmp_path / "runs.csv", tmp_path / "once"
    code = f"import pathlib, sys; m = pathlib.Path({str(marker)!r}); sys.exit(7 if m.exists() else m.touch())"
    found = sweep(fake, "--caps", "150,300", "--file", file, code=code)
    assert found.returncode == 7
    assert f"it ended with 7; 1 runs are in {file}" in found.stderr
    again = sweep(fake, "--caps", "150,300", "--file", tmp_path / "none.csv", code="raise SystemExit(3)")
    assert (again.returncode, (tmp_path / "none.csv").exists()) == (3, False)
    assert len(file.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        pytest.param("60:300:60", "1 GPU(s) take together as they are set now, 100 to 300 W", id="too low"),
        pytest.param("300", "these are 1 caps", id="one cap"),
        pytest.param("300:100:25", "these are 0 caps", id="from the top"),
        pytest.param("100:300:2.5", "write whole watts", id="a part of a watt"),
    ],
)
def test_s2_4_a_sweep_that_is_none_is_refused(node, cards, sweep, tmp_path, options, says):
    fake = cards()
    found = sweep(fake, "--caps", options, "--file", tmp_path / "runs.csv")
    assert found.returncode == 2
    assert says in found.stderr
    assert not (tmp_path / "runs.csv").exists()


@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles"])
def test_s2_4_gpus_that_are_hidden_are_not_taken(node, cards, monkeypatch, tmp_path, hidden):
    fake = cards("--cards", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    command = [*CLI, "power", "sweep", "--nvml-library", str(fake.library), "--caps", "150,300"]
    command += ["--file", str(tmp_path / "runs.csv"), "--", "true"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE * 60, check=False)
    assert (found.returncode, limits(fake)) == (2, [300, 300])
    assert "it shows no GPU" in found.stderr


def test_s2_4_caps_that_gpus_cannot_share_are_refused(node, cards, sweep, tmp_path):
    fake = cards("--cards", "3")
    found = sweep(fake, "--caps", "400,600", "--file", tmp_path / "runs.csv", cards=(0, 1, 2))
    assert found.returncode == 2
    assert "400 W are not the same whole watts for each of 3 GPUs" in found.stderr


def test_s2_4_a_run_beside_a_stricter_job_is_not_written_down(node, agent, cards, job, sweep, tmp_path):
    fake, file = cards(), tmp_path / "runs.csv"
    running = agent(more=POLICY.format(fake.library))
    assert ready(running)
    job("strict", fake, 120, *on(fake, "trainer"))
    assert wait_for(lambda: limits(fake) == [120])
    found = sweep(fake, "--caps", "200,300", "--file", file)
    assert found.returncode != 0
    assert "as they are set now, 100 to 120 W" in found.stderr
    assert not file.exists()


def test_s2_4_a_run_whose_gpu_somebody_comes_to_is_not_written_down(node, agent, cards, sweep, tmp_path):
    fake, file = cards(), tmp_path / "runs.csv"
    running = agent(more=POLICY.format(fake.library))
    assert ready(running)
    found = []
    work = WORK.replace("range(4)", "range(14)")
    thread = threading.Thread(target=lambda: found.append(sweep(fake, "--caps", "150,300", "--file", file, code=work)))
    thread.start()
    assert wait_for(lambda: limits(fake) == [150])
    fake.service("web")
    thread.join()
    assert found[0].returncode == 1
    assert "this run is not written down" in found[0].stderr
    assert not file.exists()


def test_s2_4_a_file_that_is_there_is_not_overwritten(node, cards, sweep, tmp_path):
    fake, file = cards(), tmp_path / "runs.csv"
    file.write_text("precious\n")
    found = sweep(fake, "--caps", "150,300", "--file", file)
    assert (found.returncode, file.read_text()) == (2, "precious\n")


def test_s2_3_a_limit_of_a_boot_that_is_over_is_nobodys(node, agent, cards, job):
    """The driver has forgotten it with the boot."""
    fake = cards()
    running = agent(more=POLICY.format(fake.library))
    assert ready(running)
    journal = running.directory / "state" / "journal"
    job("train", fake, 180, *on(fake, "trainer"))
    assert wait_for(lambda: limits(fake) == [180])
    (entry,) = [e for e in read_entries(journal)[0] if e.kind == "cap"]
    assert (entry.boot_id, entry.found, entry.wanted) == (boot_id(), "300000", "180000")
    assert entry.path == joined(tier_of(node), "train")


BERT = """
power:
    models:
    - {name: bert, points: [{watts: 120, slowdown: 1.0}, {watts: 200, slowdown: 0.2}, {watts: 300, slowdown: 0}]}"""


@pytest.mark.parametrize(
    ("options", "cards_seen", "says"),
    [
        pytest.param(
            ["--max-slowdown", "10%", "--power-class", "bert"], 1, "bert at 0.1: 250 W of each GPU", id="watts"
        ),
        pytest.param(["--max-slowdown", "10%"], 1, "have no such class; known: bert", id="no class"),
        pytest.param(
            ["--max-slowdown", "10%", "--power-class", "bert"], 0, "name its GPUs in CUDA_VISIBLE_DEVICES", id="no GPU"
        ),
        pytest.param(["--max-slowdown", "10%", "--power-cap", "200"], 1, "not allowed with", id="both"),
    ],
)
def test_s2_8_a_job_that_says_what_it_may_lose_has_the_watts_of_its_class(
    node, agent, cards, monkeypatch, options, cards_seen, says
):
    fake = cards()
    running = agent(more=POLICY.format(fake.library) + BERT.replace("\n", "\n  "))
    assert ready(running)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if cards_seen:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", fake.state.devices[0].uuid.decode())
    command = [*CLI, "run", "--name", "train", *options, "--", sys.executable, "-P", "-c", FIRST_READING]
    ran = subprocess.run([*command, str(fake.folder)], capture_output=True, text=True, timeout=PATIENCE * 60)
    assert says in ran.stderr
    if says.endswith("each GPU"):
        assert ran.stdout.strip() == "250000"
        assert wait_for(lambda: limits(fake) == [300])
    else:
        assert ran.returncode in (2, EXIT_REFUSED)
        assert not ran.stdout
