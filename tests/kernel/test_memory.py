"""The memory law on this very kernel: a service that stalls gets memory back, by the ladder of this cgroup version."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from colocate.actuate.journal import Journal, boot_id
from colocate.agent.loop import Agent
from colocate.calibrate.measure import PROBE
from colocate.cgroup.layout import UNIFIED
from colocate.cgroup.tree import inodes_of
from colocate.model import reference
from colocate.observe.cgroup import FilePages, parse_pressure, read_workload
from colocate.observe.pressure import PressureWatch
from colocate.policy.schema import ColocationPolicy, MemoryPolicy, PolicySpec, Selector, ServicePolicy
from tests.kernel.conftest import PATIENCE, wait_for

pytestmark = pytest.mark.layouts

GROW = """
import time
held = []
while True:
    block = bytearray(4 << 20)
    block[::4096] = b"1" * len(block[::4096])
    held.append(block)
    time.sleep(0.01)
"""
THRASH = f"""
import runpy, sys
sys.argv = ["probe", "thrash", sys.argv[1]]
runpy.run_path({str(PROBE)!r}, run_name="__main__")
"""


def test_a_growing_job_is_stopped_before_the_node_is_full(node, tmp_path):
    node.knob("/", "memory.max", str(320 << 20))
    node.make("web")
    node.start(
        "web", "import time\nheld = bytearray(40 << 20)\nheld[::4096] = b'1' * 10240\nwhile True: time.sleep(0.05)"
    )
    spec = PolicySpec(
        node_root=node.path,
        tick=0.1,
        services=(ServicePolicy(name="web", selector=Selector(cgroup="/web")),),
        memory=MemoryPolicy(rung=0.1, termination_grace=1.0),
    )
    agent = Agent(node.port, ColocationPolicy(spec=spec), reference, Journal(tmp_path, boot_id()))
    states: list[str] = []

    async def live():
        agent.open()
        job = node.start("web", GROW)
        agent.tier.move(job.pid, agent.tier.ensure_job("grow"))
        agent.on_tick.append(lambda tick: states.append(tick.plan.verdicts[1].state))
        stop = asyncio.Event()
        running = asyncio.create_task(agent.run(stop))
        end = time.monotonic() + 6 * PATIENCE
        while time.monotonic() < end and job.poll() is None:
            await asyncio.sleep(0.1)
        stop.set()
        await running
        held = agent.last.snapshot.tier.memory_bytes if agent.last and agent.last.snapshot.tier else 0
        job.kill()
        job.communicate()
        await agent.close()
        return held

    held = asyncio.run(live())
    service = node.processes[0]
    assert service.poll() is None, "the service was killed"
    assert held < 300 << 20
    if node.port.layout.version == 2:
        assert agent.laws.memory.allowance_bytes < 300 << 20
    assert states


SAVES = """
import os, signal, sys, time
from colocate.jobs.client import tell_checkpointed
def save(*_):
    open(sys.argv[1], "w").write("saved")
    tell_checkpointed()
signal.signal(signal.SIGUSR1, save)
held = []
while True:
    if len(held) < 100:
        block = bytearray(4 << 20)
        block[::4096] = b"1" * len(block[::4096])
        held.append(block)
    time.sleep(0.1)
"""


def test_a_job_that_wants_more_than_its_allowance_saves_its_work_and_goes(node, agent, tmp_path):
    """By the kernel's own mark on v2, by what it holds on v1; the service never stalls, and nobody is killed."""
    node.knob("/", "memory.max", str(384 << 20))
    more = "memory: {crawl: 500ms, checkpointDeadline: 20s}"
    running = agent(tick="200ms", more=more)
    command = [sys.executable, "-m", "colocate.cli.main", "run", "--name", "wants", "--checkpoint-signal", "SIGUSR1"]
    program = [sys.executable, "-c", SAVES, str(tmp_path / "saved")]
    started = time.monotonic()
    found = subprocess.run([*command, "--", *program], capture_output=True, text=True, timeout=120 * PATIENCE)
    assert found.returncode == 75, found.stderr
    assert "OverAllowance" in found.stderr
    assert (tmp_path / "saved").read_text() == "saved"
    assert time.monotonic() - started < 20 * PATIENCE  # it answered, so the deadline was not waited for
    assert running.process.poll() is None


@pytest.fixture
def on_disk():
    """A directory whose files are page cache, not memory: /tmp may be a tmpfs."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        yield Path(name)


MAPS = """
import mmap, sys, time
if sys.argv[1] == "shared":
    pages = mmap.mmap(-1, 64 << 20)
    for at in range(0, 64 << 20, 4096): pages[at] = 1
    with open(sys.argv[2], "rb") as file: file.read()
else:
    with open(sys.argv[2], "rb") as file: pages = mmap.mmap(file.fileno(), 64 << 20, prot=mmap.PROT_READ)
    for at in range(0, 64 << 20, 4096): pages[at]
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("what", "cached"),
    [
        pytest.param("file", 64, id="a file that is mapped is in use"),
        pytest.param("shared", 0, id="shared memory makes no idle page cache count"),
    ],
)
def test_what_a_service_maps_belongs_to_its_working_set(node, on_disk, what, cached):
    path = node.make("web")
    # Nothing of it may be cached beforehand, by whoever wrote it, for the cache belongs to its first reader.
    subprocess.run(["dd", "if=/dev/zero", f"of={on_disk}/file", "bs=1M", "count=64", "conv=fsync"], check=True,
                   stderr=subprocess.DEVNULL)  # fmt: skip
    with open(on_disk / "file", "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    reader = node.start("web", MAPS, what, str(on_disk / "file"))
    assert reader.stdout.readline() == "ready\n"
    inodes = inodes_of(node.port, path)
    service = read_workload(node.port, id_="web", name="web", tier="service", path=path, inodes=inodes)
    as_kubelet = read_workload(node.port, id_="web", name="web", tier="besteffort", path=path, inodes=inodes)
    assert service is not None
    assert as_kubelet is not None
    counted = (service.working_set_bytes or 0) - (as_kubelet.working_set_bytes or 0)
    assert counted == service.mapped_bytes
    assert counted / (1 << 20) == pytest.approx(cached, abs=16)


def start_stalling(node, path: str, file: Path) -> None:
    """Returns once memory is full, however slow the disk is: from here on the kernel counts stalls.

    v2 throttles growth above the high mark, a stall by itself; v1 stalls when evicted pages are wanted again.
    """
    v2 = node.port.layout.version == 2
    node.knob(path, "memory.high" if v2 else "memory.max", str((16 if v2 else 48) << 20))
    process = node.start(path, *([GROW] if v2 else [THRASH, str(file)]))
    if not v2:
        assert process.stdout.readline() == "ready\n"


def test_a_stalling_service_wakes_the_loop(node, on_disk):
    if "psi" not in node.port.layout.controllers:
        pytest.skip("needs PSI in the unified hierarchy")
    path = node.make("web")
    woken: list[float] = []

    async def watch():
        watcher = PressureWatch(node.port.layout, lambda _: woken.append(time.monotonic()), 0.02, 0.075)
        inode = node.port.inode(UNIFIED, path)
        watcher.watch({"service:web": (path, inode)})
        await asyncio.to_thread(start_stalling, node, "web", on_disk / "file")
        end = time.monotonic() + 15 * PATIENCE
        while not woken and time.monotonic() < end:
            await asyncio.sleep(0.05)
        watcher.close()
        return watcher.mode

    mode = asyncio.run(watch())
    assert mode in ("poll", "trigger")
    assert woken, "the service did not stall"


def test_a_pods_stall_shows_in_its_group(node, on_disk):
    """Pods' own totals are read only once their group's has moved: what is kept is what the kernel would say."""
    if "psi" not in node.port.layout.controllers:
        pytest.skip("needs PSI in the unified hierarchy")
    for path in ("kubepods", "kubepods/burstable"):
        node.make(path, inner=True)
    pods = [node.make(f"kubepods/burstable/pod{name}") for name in "ab"]
    group = f"{node.path}/kubepods/burstable"
    pages, inodes = FilePages(), [node.port.inode(UNIFIED, pod) for pod in pods]

    def totals(read) -> list[list[int]]:
        return [[total or 0 for total in read(pod, inode)] for pod, inode in zip(pods, inodes, strict=True)]

    def directly(pod: str, inode: int) -> tuple[int | None, int | None]:
        return parse_pressure(node.port.read(UNIFIED, pod, "memory.pressure", inode))

    def agree() -> int:
        """What podb has stalled, in microseconds, read between two direct looks at both."""
        before = totals(directly)
        pages.look_above(node.port, group)
        kept = totals(lambda pod, inode: pages.memory_pressure(node.port, pod, inode))
        after = totals(directly)
        for low, found, high in zip(before, kept, after, strict=True):
            assert all(x - 2 <= y <= z for x, y, z in zip(low, found, high, strict=True)), (low, found, high)
        return kept[1][0]

    assert agree() == agree(), "nothing runs, nothing stalls"
    still = agree()
    start_stalling(node, "kubepods/burstable/podb", on_disk / "file")
    assert wait_for(lambda: agree() > still + 20_000, 15), "podb did not stall"
