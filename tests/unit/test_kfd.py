"""AMD: queues that are suspended in the middle of a kernel, by the kernel's rules; and GPUs as sysfs tells of them."""

from __future__ import annotations

import ctypes as c
import errno
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from colocate import amdgpu
from colocate.actuate import kfd
from colocate.actuate.driver_worker import AmdSettings
from colocate.actuate.kfd_worker import Sessions
from colocate.cgroup.port import KernelPort
from colocate.cli.main import main
from colocate.fakecard.card import MILLISECOND, SECOND, Card
from colocate.fakecard.process import Process
from colocate.fakecard.workloads import blocking
from colocate.observe.kfd import read_cards

HEADER = Path("/usr/include/linux/kfd_ioctl.h")
LAYOUT = """
#include <linux/kfd_ioctl.h>
#include <stddef.h>
#include <stdio.h>
int main(void) {
  printf("%zu %zu %lu\\n", sizeof(struct kfd_ioctl_dbg_trap_args), sizeof(struct kfd_queue_snapshot_entry),
         (unsigned long)AMDKFD_IOC_DBG_TRAP);
  printf("%zu %zu %zu\\n", offsetof(struct kfd_ioctl_dbg_trap_args, enable),
         offsetof(struct kfd_queue_snapshot_entry, queue_id),
         offsetof(struct kfd_ioctl_dbg_trap_suspend_queues_args, num_queues));
  printf("%d %d %d %d %d\\n", KFD_IOC_DBG_TRAP_ENABLE, KFD_IOC_DBG_TRAP_DISABLE, KFD_IOC_DBG_TRAP_SUSPEND_QUEUES,
         KFD_IOC_DBG_TRAP_RESUME_QUEUES, KFD_IOC_DBG_TRAP_GET_QUEUE_SNAPSHOT);
  return 0;
}
"""
EXPECTED = ["32 64 3223341862", "8 40 16", "0 1 6 7 13"]


class FakeKfd:
    """The kernel's rules, over a virtual card: one queue a process, whose id is its pid + 1."""

    def __init__(self, card):
        self.card, self.traced, self.enabled, self.known = card, set(), set(), set()

    def ptrace(self, request, pid, _data):
        if request == kfd.PTRACE_SEIZE:
            if pid in self.traced:
                raise OSError(errno.EPERM, "traced already")
            self.traced.add(pid)
        elif request == kfd.PTRACE_INTERRUPT:
            self.traced.discard(pid)
            raise OSError(errno.ESRCH, "nothing to wait for here")

    def ioctl(self, trap):
        pid, client = trap.pid, self.card.clients.get(trap.pid)
        if client is None:
            raise OSError(errno.ESRCH, "no such process")
        if trap.op != kfd.DISABLE and pid not in self.traced:
            raise OSError(errno.EPERM, "not attached")
        if (trap.op == kfd.ENABLE) == (pid in self.enabled):
            raise OSError(errno.EINVAL, "enabled")
        if trap.op == kfd.ENABLE:
            self.enabled.add(pid)
        elif trap.op == kfd.SNAPSHOT:
            assert trap.snapshot.entry_size == c.sizeof(kfd.QueueEntry)
            entry = kfd.QueueEntry.from_address(trap.snapshot.snapshot_buf_ptr)
            entry.queue_id, trap.snapshot.num_queues = pid + 1, 1
            self.known.add(pid)
        else:
            where = {kfd.SUSPEND: trap.suspend, kfd.RESUME: trap.resume}.get(trap.op)
            ids = c.c_uint32.from_address(where.queue_array_ptr) if where is not None else None
            if ids is not None and (ids.value != pid + 1 or pid not in self.known):
                ids.value |= kfd.QUEUE_INVALID
                return 0
            (self.card.suspend if trap.op == kfd.SUSPEND else self.card.resume)(client)
            if trap.op == kfd.DISABLE:
                self.enabled.discard(pid)
        return 1

    def debugger_dies(self):
        """kfd_process_notifier_release."""
        for pid in self.enabled:
            self.card.resume(self.card.clients[pid])
        self.enabled, self.traced = set(), set()


def busy_in(card, milliseconds):
    before = card.busy_ns
    card.run_until(card.now + milliseconds * MILLISECOND)
    return (card.busy_ns - before) / (milliseconds * MILLISECOND)


@pytest.fixture
def world():
    card = Card()
    Process(card, 7, blocking(kernel_ns=500 * MILLISECOND))
    card.run_until(SECOND)
    fake, said = FakeKfd(card), list[dict[str, object]]()
    return card, fake, Sessions(fake.ioctl, said.append, fake.ptrace), said


def test_29_a_kernel_of_half_a_second_stops_within_ten_milliseconds(world):
    card, _, sessions, said = world
    assert busy_in(card, 10) > 0.9
    sessions.want(7, "suspended")
    card.run_until(card.now + 10 * MILLISECOND)
    assert busy_in(card, 200) == 0.0
    sessions.want(7, "running")
    card.run_until(card.now + 10 * MILLISECOND)
    assert busy_in(card, 100) > 0.9
    assert said == []


def test_29_the_death_of_the_debugger_resumes_what_it_held(world):
    card, fake, sessions, _ = world
    sessions.want(7, "suspended")
    card.run_until(card.now + 10 * MILLISECOND)
    assert busy_in(card, 100) == 0.0
    fake.debugger_dies()
    card.run_until(card.now + 10 * MILLISECOND)
    assert busy_in(card, 100) > 0.9


def test_what_was_held_is_put_back_at_the_end(world):
    card, fake, sessions, _ = world
    sessions.want(7, "suspended")
    sessions.close()
    card.run_until(card.now + 10 * MILLISECOND)
    assert busy_in(card, 100) > 0.9
    assert (fake.enabled, fake.traced, sessions.open) == (set(), set(), {})


def test_a_process_that_somebody_else_debugs_is_said_and_left(world):
    card, fake, sessions, said = world
    fake.traced.add(7)
    sessions.want(7, "suspended")
    assert busy_in(card, 100) > 0.9
    assert [fact["pid"] for fact in said] == [7]
    assert "errno 1" in said[0]["error"]


def test_the_structures_are_those_of_the_kernels_header():
    assert (c.sizeof(kfd.TrapArgs), c.sizeof(kfd.QueueEntry), kfd.DBG_TRAP) == (32, 64, 0xC0204B26)
    offsets = (kfd.TrapArgs.enable.offset, kfd.QueueEntry.queue_id.offset, kfd.QueuesArgs.num_queues.offset)
    assert f"{offsets[0]} {offsets[1]} {offsets[2]}" == EXPECTED[1]


def test_the_header_says_so_too(tmp_path):
    if not HEADER.exists() or "KFD_IOC_DBG_TRAP_SUSPEND_QUEUES" not in HEADER.read_text():
        pytest.skip(f"{HEADER} has no debug interface: linux-libc-dev of Linux 6.5 or newer")
    if shutil.which("cc") is None:
        pytest.skip("a C compiler (cc)")
    (tmp_path / "layout.c").write_text(LAYOUT)
    subprocess.run(["cc", "-o", str(tmp_path / "layout"), str(tmp_path / "layout.c")], check=True)
    said = subprocess.run([str(tmp_path / "layout")], capture_output=True, text=True, check=True).stdout
    assert said.split("\n")[:3] == EXPECTED


TRACED = """
import os, signal, time
count = 0
def handler(*_):
    global count
    count += 1
    os.write(1, f"{count}\\n".encode())  # print, if it is in print already, would raise
signal.signal(signal.SIGUSR1, handler)
print("ready", flush=True)
while True: time.sleep(0.01)
"""


def test_a_traced_process_gets_its_signals_and_outlives_its_tracer():
    process = subprocess.Popen([sys.executable, "-c", TRACED], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        try:
            session = kfd.Session(process.pid, lambda trap: 0)
        except PermissionError:
            pytest.skip("ptrace is not allowed here (CAP_SYS_PTRACE)")
        sessions = Sessions(lambda trap: 0, lambda fact: None)
        sessions.open[process.pid] = session
        process.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and not _readable(process.stdout):
            sessions.reap()
            time.sleep(0.005)
        assert process.stdout.readline() == "1\n"
        sessions.close()
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == "2\n"
    finally:
        process.kill()
        process.communicate()


def _readable(file):
    import select

    return bool(select.select([file], [], [], 0)[0])


def test_gpus_and_their_processes_are_read_from_sysfs(tmp_path):
    import os

    for path, text in {
        "topology/nodes/0/gpu_id": "0\n",
        "topology/nodes/1/gpu_id": "4711\n",
        "topology/nodes/1/name": "aldebaran\n",
        "topology/nodes/1/properties": "simd_count 440\nsimd_per_cu 4\nunique_id 255\n",
        "topology/nodes/1/mem_banks/0/properties": "heap_type 1\nsize_in_bytes 68702699520\n",
        f"proc/{os.getpid()}/vram_4711": "1073741824\n",
        f"proc/{os.getpid()}/stats_4711/cu_occupancy": "55\n",
        "proc/2/vram_4711": "0\n",
        "proc/2/stats_4711/cu_occupancy": "0\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    [card] = read_cards(KernelPort(), tmp_path)
    assert (card["uuid"], card["name"]) == ("AMD-00000000000000ff", "AMD aldebaran")
    assert (card["memory"], card["percent"]) == ([68702699520, 1073741824], 50)
    [[pid, started, memory, percent]] = card["processes"]
    assert (pid, memory, percent) == (os.getpid(), 1 << 30, 50)
    assert started is not None
    assert read_cards(KernelPort(), tmp_path / "nothing") == []


def board(root, minor, **files):
    folder = root / f"renderD{minor}" / "device" / "hwmon" / "hwmon7"
    folder.mkdir(parents=True)
    (folder / "name").write_text("amdgpu\n")
    for name, text in files.items():
        (folder / f"power1_{name}").write_text(f"{text}\n")
    return folder


W = 1_000_000


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param(
            {"average": 93 * W, "cap": 300 * W, "cap_min": 150 * W, "cap_max": 330 * W, "cap_default": 300 * W},
            amdgpu.Power(93_000, 300_000, (150_000, 330_000)),
            id="as amdgpu has them",
        ),
        pytest.param(
            {"input": 120 * W, "cap": 700 * W, "cap_min": 0, "cap_max": 750 * W, "cap_default": 750 * W},
            amdgpu.Power(120_000, 700_000, (375_000, 750_000)),
            id="no least limit and no mean: half of the default, and what it draws now",
        ),
        pytest.param({"average": 30 * W}, amdgpu.Power(30_000, None, None), id="a board that takes no limit"),
        pytest.param(
            {"average": "", "cap": "N/A", "cap_min": W, "cap_max": 2 * W}, amdgpu.Power(None, None, None),
            id="files that say nothing now",
        ),
        pytest.param(
            {"cap": 300 * W, "cap_min": 400 * W, "cap_max": 330 * W}, amdgpu.Power(None, 300_000, None),
            id="a range that is none",
        ),
    ],
)  # fmt: skip
def test_s2_3_a_boards_power_is_read_from_its_drivers_files(tmp_path, files, expected):
    folder = board(tmp_path, 128, **files)
    assert amdgpu.folder_of(128, tmp_path) == folder
    assert amdgpu.read_power(folder) == expected
    assert amdgpu.folder_of(129, tmp_path) is None


def topology(root, *minors):
    with_properties(root, *({"unique_id": i, "drm_render_minor": minor} for i, minor in enumerate(minors, start=1)))


def test_s2_3_parts_of_one_board_have_no_limit_of_their_own(tmp_path):
    topology(tmp_path / "kfd", 128, 129, 130)
    mine = board(tmp_path / "drm", 130, cap=300 * W, cap_min=100 * W, cap_max=300 * W)
    shared = board(tmp_path / "drm", 128, cap=300 * W, cap_min=100 * W, cap_max=300 * W)
    (tmp_path / "drm" / "renderD129" / "device").mkdir(parents=True)
    (tmp_path / "drm" / "renderD129" / "device" / "hwmon").symlink_to(shared.parent)
    uuids = [f"AMD-{i:016x}" for i in (1, 2, 3)]
    found = [amdgpu.power_folder(uuid, tmp_path / "kfd", tmp_path / "drm") for uuid in uuids]
    assert found == [None, None, mine]
    cards = read_cards(KernelPort(), tmp_path / "kfd", tmp_path / "drm")
    assert [card["limits_mw"] for card in cards] == [None, None, [100_000, 300_000]]
    settings = AmdSettings(tmp_path / "kfd", tmp_path / "drm")
    assert "no power limit of its own" in settings.answer({"call": "get_power_limit", "uuid": uuids[0]})["error"]
    assert settings.answer({"call": "get_power_limit", "uuid": uuids[2]}) == {"value": "300000"}
    set_ = {"call": "set_power_limit", "uuid": uuids[2], "value": "150000"}
    assert settings.answer(set_) == {"value": "150000"}
    assert (mine / "power1_cap").read_text() == str(150 * W)
    assert "error" in settings.answer({"call": "get_memory_limits", "uuid": uuids[2], "group": "/"})


def with_properties(root, *each):
    for number, properties in enumerate(each, start=1):
        node = root / "topology" / "nodes" / str(number)
        node.mkdir(parents=True)
        (node / "gpu_id").write_text(str(100 + number))
        (node / "properties").write_text("".join(f"{name} {value}\n" for name, value in properties.items()))


def test_s2_3_nor_has_the_first_part_of_a_board_whose_others_have_no_hwmon(tmp_path):
    """As amdxcp makes them: platform devices. The upper bits of `location_id` tell the parts apart (kfd_topology.c)."""
    parts = [{"unique_id": 7, "drm_render_minor": 128 + i, "location_id": 0x4300 | i << 28} for i in range(4)]
    with_properties(tmp_path / "kfd", *parts, {"unique_id": 9, "drm_render_minor": 140, "location_id": 0x8300})
    board(tmp_path / "drm", 128, cap=300 * W, cap_min=100 * W, cap_max=300 * W)
    other = board(tmp_path / "drm", 140, cap=300 * W, cap_min=100 * W, cap_max=300 * W)
    every = amdgpu.gpus(tmp_path / "kfd", tmp_path / "drm")
    assert [amdgpu.alone(gpu, every) for gpu in every] == [False] * 4 + [True]
    assert amdgpu.power_folder("AMD-0000000000000007", tmp_path / "kfd", tmp_path / "drm") is None
    assert amdgpu.power_folder("AMD-0000000000000009", tmp_path / "kfd", tmp_path / "drm") == other


def test_s2_3_boards_without_a_unique_id_are_told_apart(tmp_path):
    with_properties(tmp_path / "kfd", *({"unique_id": 0, "drm_render_minor": 128 + i} for i in range(2)))
    boards = [board(tmp_path / "drm", 128 + i, cap=300 * W, cap_min=100 * W, cap_max=300 * W) for i in range(2)]
    every = amdgpu.gpus(tmp_path / "kfd", tmp_path / "drm")
    assert len({gpu.uuid for gpu in every}) == 2
    assert [amdgpu.power_folder(gpu.uuid, tmp_path / "kfd", tmp_path / "drm") for gpu in every] == boards


def test_s2_3_a_range_is_whole_watts_within_the_boards(tmp_path):
    folder = board(tmp_path, 128, cap=300 * W, cap_min=100 * W + W // 2, cap_max=300 * W - 1)
    assert amdgpu.read_power(folder).range_mw == (101_000, 299_000)


def test_gpus_are_counted_as_the_kernel_counts_them(tmp_path):
    topology(tmp_path, *range(128, 140))
    assert [gpu.known["unique_id"] for gpu in amdgpu.gpus(tmp_path, tmp_path)] == list(range(1, 13))


@pytest.mark.parametrize(
    ("rocr", "hip", "expected"),
    [
        pytest.param(None, None, None, id="neither is set"),
        pytest.param("0,2", None, "1000,1002", id="ROCr's indices"),
        pytest.param("", None, "", id="it shows none"),
        pytest.param(None, "1", "1001", id="HIP's indices"),
        pytest.param("3,GPU-00000000000000FF", "1", "AMD-00000000000000ff", id="HIP counts among what ROCr shows"),
        pytest.param("3", "1", "HIP:1", id="what ROCr does not show is no GPU"),
        pytest.param("GPU-1,none", None, "AMD-1,none", id="other words too"),
    ],
)
def test_s2_3_what_a_job_may_see_of_amd_gpus(rocr, hip, expected):
    assert amdgpu.shown(rocr, hip) == expected


def test_power_status_has_amd_gpus_too(tmp_path, capsys):
    topology(tmp_path / "class" / "kfd" / "kfd", 128)
    board(tmp_path / "class" / "drm", 128, average=93 * W, cap=250 * W, cap_min=100 * W, cap_max=300 * W)
    assert main(["power", "status", "--sysfs", str(tmp_path), "-o", "json"]) == 0
    (gpu,) = json.loads(capsys.readouterr().out)["gpus"]
    assert (gpu["uuid"], gpu["watts"], gpu["limit_watts"]) == ("AMD-0000000000000001", 93.0, 250.0)
