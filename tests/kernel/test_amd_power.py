"""S2.3 on AMD: power caps through the driver's hwmon files, by a real agent to which made files are its sysfs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from colocate.jobs.client import EXIT_REFUSED
from tests.kernel.conftest import PATIENCE, wait_for
from tests.kernel.fake_cards import CLI, end

WITHIN = """
mkdir -p "$0/dev" && mount --rbind /dev "$0/dev" && mount -t tmpfs none /dev || exit 9
for each in "$0"/dev/*; do ln -s "$each" "/dev/${each##*/}"; done
: > /dev/kfd
mount --bind "$0/class" /sys/class && exec "$@"
"""
WATT = 1_000_000


class Boards:
    """The files of two GPUs, as amdgpu has them: it takes whole watts, and drops a limit that is too low to hold."""

    def __init__(self, root, drops_below=0):
        self.root, self._drops_below, self._ends = root, drops_below, threading.Event()
        for i in (0, 1):
            self._write(f"kfd/kfd/topology/nodes/{i + 1}/gpu_id", f"{100 + i}\n")
            properties = f"simd_count 440\nsimd_per_cu 4\nunique_id {255 + i}\ndrm_render_minor {128 + i}\n"
            self._write(f"kfd/kfd/topology/nodes/{i + 1}/properties", properties)
            at = self._hwmon(i)
            for name, watts in (
                ("cap", 300),
                ("cap_min", 100),
                ("cap_max", 320),
                ("cap_default", 300),
                ("average", 60),
            ):
                self._write(f"{at}/power1_{name}", str(watts * WATT))
            self._write(f"{at}/name", "amdgpu\n")
        self._write("kfd/kfd/proc/1/none", "")
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _hwmon(self, i):
        return f"drm/renderD{128 + i}/device/hwmon/hwmon{3 + i}"

    def _write(self, path, text):
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def _run(self):
        while not self._ends.wait(0.005):
            for i in (0, 1):
                if 0 < self.limit(i) < self._drops_below:
                    self._write(f"{self._hwmon(i)}/power1_cap", str(320 * WATT))

    def limit(self, i):
        text = (self.root / self._hwmon(i) / "power1_cap").read_text()
        return int(text) // WATT if text else 0

    def limits(self):
        return [self.limit(0), self.limit(1)]

    def set_by_hand(self, i, watts):
        self._write(f"{self._hwmon(i)}/power1_cap", str(watts * WATT))

    def uses(self, pid, i):
        self._write(f"kfd/kfd/proc/{pid}/vram_{100 + i}", str(1 << 30))

    def close(self):
        self._ends.set()
        self._thread.join()


@pytest.fixture
def boards(tmp_path):
    made = []

    def start(**options):
        made.append(Boards(tmp_path / "amd" / "class", **options))
        return made[-1]

    yield start
    for one in made:
        one.close()


@pytest.fixture
def amd_agent(agent, tmp_path):
    """An agent that has these boards."""
    allowed = subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode == 0
    if not allowed:
        pytest.skip("a mount namespace of its own (CAP_SYS_ADMIN)")

    def start():
        running = agent(within=("unshare", "-m", "sh", "-c", WITHIN, str(tmp_path / "amd")))
        assert wait_for(lambda: len(running.ask("explain").get("snapshot", {}).get("cards", {})) == 2)
        return running

    return start


@pytest.fixture
def job():
    started = []

    def start(name, cap, *shown, **environment):
        known = {k: v for k, v in os.environ.items() if "VISIBLE_DEVICES" not in k}
        whole = [*CLI, "run", "--name", name, "--power-cap", str(cap), "--"]
        whole += [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)"]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(whole, env={**known, **environment}, stdout=pipe, stderr=pipe, text=True))
        return started[-1]

    yield start
    for one in started:
        end(one)
        one.communicate()


def begun(one):
    """Its pid, once it runs."""
    line = one.stdout.readline()
    assert line, one.stderr.read()
    return int(line)


@pytest.mark.parametrize(
    ("environment", "limits"),
    [
        pytest.param({"ROCR_VISIBLE_DEVICES": "1"}, [300, 180], id="by ROCr's index"),
        pytest.param({"ROCR_VISIBLE_DEVICES": "GPU-00000000000000FF"}, [180, 300], id="by its unique id"),
        pytest.param({"ROCR_VISIBLE_DEVICES": "0,1"}, [100, 100], id="both share, and none has less than its least"),
    ],
)
def test_s2_3_an_amd_gpu_is_capped_before_its_job_starts_and_put_back_after(
    node, boards, amd_agent, job, environment, limits
):
    made = boards()
    amd_agent()
    one = job("train", 180 if len(environment.get("ROCR_VISIBLE_DEVICES", "")) != 3 else 200, **environment)
    begun(one)
    assert made.limits() == limits
    end(one)
    assert wait_for(lambda: made.limits() == [300, 300])


def test_s2_3_a_job_that_does_not_name_its_amd_gpu_is_capped_once_it_is_seen_on_it(node, boards, amd_agent, job):
    made = boards()
    amd_agent()
    one = job("train", 150)
    made.uses(begun(one), 1)
    assert wait_for(lambda: made.limits() == [300, 150])


def test_s2_3_a_limit_that_the_driver_drops_is_none_and_the_job_does_not_start(node, boards, amd_agent, job):
    made = boards(drops_below=140)
    amd_agent()
    one = job("train", 120, ROCR_VISIBLE_DEVICES="0")
    said = one.communicate(timeout=PATIENCE * 60)[1]
    assert one.returncode == EXIT_REFUSED, said
    assert wait_for(lambda: made.limit(0) in (300, 320)), "nothing of ours is left"


def test_s2_3_an_amd_gpus_limit_outlives_its_agent_and_the_next_puts_it_back(node, boards, amd_agent, job):
    made = boards()
    first = amd_agent()
    one = job("train", 150, ROCR_VISIBLE_DEVICES="0")
    begun(one)
    first.stop(signal.SIGKILL)
    time.sleep(1.0)
    assert made.limits() == [150, 300]
    first.socket.unlink(missing_ok=True)
    amd_agent()
    time.sleep(1.0)
    assert made.limits() == [150, 300]
    end(one)
    assert wait_for(lambda: made.limits() == [300, 300])


def test_s2_3_a_limit_of_an_amd_gpu_that_somebody_else_sets_is_left_alone(node, boards, amd_agent, job):
    made = boards()
    running = amd_agent()
    one = job("train", 150, ROCR_VISIBLE_DEVICES="0")
    begun(one)
    made.set_by_hand(0, 200)
    assert wait_for(lambda: any("somebody else" in p for p in running.ask("explain")["problems"].values()))
    end(one)
    time.sleep(1.0)
    assert made.limit(0) == 200


SLOWER = """
import pathlib, sys, time
cap, draws = (pathlib.Path(f"/sys/class/drm/renderD129/device/hwmon/hwmon4/power1_{n}") for n in ("cap", "average"))
watts = int(cap.read_text()) // 1_000_000
draws.write_text(str(int(0.9 * watts * 1_000_000)))
time.sleep(1.0 + (300 - watts) / 100)
draws.write_text("60000000")
"""


def test_s2_4_a_sweep_on_an_amd_gpu(node, boards, amd_agent, tmp_path):
    """The command takes a second more for each hundred watts less, and draws nine tenths of its cap."""
    made, table = boards(), tmp_path / "runs.csv"
    running = amd_agent()
    environment = {k: v for k, v in os.environ.items() if "VISIBLE_DEVICES" not in k} | {"ROCR_VISIBLE_DEVICES": "1"}
    command = ["nsenter", "-m", "-t", str(running.process.pid), *CLI, "power", "sweep", "--caps", "100:300:100"]
    command += ["--repeats", "1", "--file", str(table), "-o", "json", "--slowdown", "50%"]
    command += ["--", sys.executable, "-c", SLOWER]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE * 120, check=False)
    assert ran.returncode in (0, 1), ran.stderr
    runs = [list(map(float, line.split(","))) for line in table.read_text().splitlines()[1:]]
    assert [cap for cap, _, _ in runs] == [100.0, 200.0, 300.0]
    for cap, seconds, watts in runs:
        assert 1.0 + (300 - cap) / 100 <= seconds < 3.5 + (300 - cap) / 100
        assert watts == pytest.approx(0.9 * cap, rel=0.25)
    assert made.limits() == [300, 300]
