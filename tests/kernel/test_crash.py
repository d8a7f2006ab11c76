"""SIGKILL of the agent at random moments on this very kernel: afterwards everything is as it was found."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from colocate.actuate.journal import Journal, boot_id
from colocate.actuate.restore import restore
from colocate.agent.loop import Agent
from colocate.calibration import Calibration
from colocate.cgroup.layout import UNIFIED
from colocate.cgroup.port import KernelPort
from colocate.cgroup.tree import joined
from colocate.model import reference
from colocate.policy.schema import (
    BatchPolicy,
    ColocationPolicy,
    CpuPolicy,
    FreezePolicy,
    PolicySpec,
    Selector,
    ServicePolicy,
)
from colocate.snapshot import Latency, Objective
from tests.kernel.conftest import HOG, PATIENCE

MOMENTS = 100 if PATIENCE == 1 else 10
FILES = (
    *("cpu.shares", "cpu.weight", "cpu.idle", "cpu.cfs_quota_us", "cpu.max", "memory.limit_in_bytes", "memory.max"),
    *("memory.high", "freezer.state", "cgroup.freeze", "cgroup.subtree_control", "cpuset.cpus"),
)


def knobs(port: KernelPort, path: str) -> dict[tuple[str, str, str], str]:
    """Every knob of a cgroup and of those below that are not ours."""
    found = {}
    for hierarchy in port.layout.mounts:
        for file in FILES:
            text = port.read(hierarchy, path, file)
            if text is not None:
                found[hierarchy, path, file] = text
        for child in port.children(hierarchy, path):
            if child != "colocate-batch":
                found.update(knobs(port, joined(path, child)))
    return found


def life(root: str, directory: Path, job: int, seed: int) -> None:
    """What the agent does until it is killed: violations, floors, questions, changes of a foreign group."""
    port, generator = KernelPort(), random.Random(seed)
    spec = PolicySpec(
        node_root=root,
        services=(ServicePolicy(name="web", selector=Selector(cgroup="/web")),),
        batch=(BatchPolicy(name="nightly", selector=Selector(cgroup="/nightly")),),
        cpu=CpuPolicy(question=0.5, hold_down=0.1),
        freeze=FreezePolicy(max_frozen=60.0),
    )
    rungs: Any = generator.choice([("freeze", "cpuset", "quota"), ("quota", "freeze"), ("cpuset", "freeze")])
    calibration = Calibration(lever="idle" if generator.random() < 0.5 else "weight", rungs=rungs)
    journal = Journal(directory, boot_id())
    agent = Agent(port, ColocationPolicy(spec=spec), reference, journal, calibration=calibration)
    agent.observer.objectives["web"] = Objective(0.02, 1, 0.01)

    async def run() -> None:
        agent.open()
        agent.tier.move(job, agent.tier.ensure_job("train"))
        good = bad = 0.0
        while True:
            good += 100
            bad += 20 if generator.random() < 0.3 else 0
            agent.scraper.readings["web"] = Latency((0.01, 0.05), (good, good + bad, good + bad), time.monotonic())
            await agent.tick()
            await asyncio.sleep(0.002)  # workers write beside the loop

    asyncio.run(run())


@pytest.mark.layouts
def test_a_sigkill_at_any_moment_leaves_the_node_as_it_was_found(node, tmp_path):
    node.make("web")
    node.make("nightly")
    node.knob("nightly", "cpu.weight", "37")
    node.knob("nightly", "cpu.max", "150000 100000")
    node.start("nightly", HOG)
    node.start("web", "import time\nwhile True: time.sleep(0.01)")
    port, generator = node.port, random.Random(20261121)
    if port.layout.version == 2:
        port.write(UNIFIED, node.path, "cgroup.subtree_control", "+cpu +cpuset +memory +io +pids")
    before = knobs(port, node.path)
    assert len(before) > 10
    written = 0
    for moment in range(MOMENTS):
        directory = tmp_path / str(moment)
        directory.mkdir()
        job = node.start("web", HOG)
        child = os.fork()
        if child == 0:
            try:
                life(node.path, directory, job.pid, moment)
            finally:
                os._exit(3)
        time.sleep(generator.uniform(0.0, 0.55) * PATIENCE)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"moment {moment}: the agent ended by itself"
        journal = Journal(directory, boot_id())
        written += sum(e.kind == "value" for e in journal.entries)
        restore(port, journal)
        state = (port.proc(f"/proc/{job.pid}/stat") or "").rpartition(")")[2].split()[0]
        assert state in ("R", "S"), f"moment {moment}: the job is {state}"
        job.kill()
        job.communicate()
        report = restore(port, journal)
        assert report.clean, f"moment {moment}: {report}"
        assert knobs(port, node.path) == before, f"moment {moment}"
        assert not any("colocate-batch" in port.children(h, node.path) for h in port.layout.mounts), f"moment {moment}"
        journal.close()
    assert written > MOMENTS, "the agent was killed before it did anything"
