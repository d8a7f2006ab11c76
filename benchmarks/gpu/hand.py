"""How soon a request stops batch on its card, what that costs the agent, and how soon a killed agent's batch runs.

Real: the agent as a process, the freezer, the kernel. The card is simulated (`colocate/fakecard`). A service computes
for 20 ms about seven times a second, waiting for its card with its CPU, and says when each request begins; the kernel
tells when batch was told to stop (inotify of `cgroup.freeze`), and when it says that it is (`cgroup.events`). Idle:
nobody else. Loaded: a hog on each CPU, in BestEffort's place. Wall clock, beside a reference loop.

Batch that waits for a CPU when it is told to stop, as one does that was let go a moment ago, is said to be stopped when
it gets one; in between it launches nothing, for it freezes before it comes to its own code. So what a service feels
ends with the word, and that is what the bars are held to; that nothing was launched after it is counted too, and the
kernel's own answer is kept beside it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.common import Runs, bar, cpu_seconds, reference_loop
from colocate.actuate.scratch import ScratchNode, sweep
from colocate.cgroup.knobfiles import write_knob
from colocate.cgroup.layout import UNIFIED
from colocate.cgroup.port import KernelPort
from colocate.cgroup.tree import inodes_of, joined
from colocate.errors import HostUnfit
from colocate.fakecard.shared import LIBRARY

LAUNCHES, IN_MODIFY = "launches", 2
CONDITIONS = ("idle", "loaded", "loaded", "idle")
SECONDS, SETTLE_SECONDS, BEFORE_SECONDS, LEARN_SECONDS = 20.0, 2.0, 10.0, 90.0
KILLS = 5
IDLE_BAR_MS, LOADED_BAR_MS, COST_BAR_CORES, THAWED_BAR_SECONDS = 5.0, 20.0, 0.02, 1.0
SERVICE = """
import random, sys, time
from colocate.fakecard.client import Device
device, generator = Device(sys.argv[1]), random.Random(1)
print("on the card", flush=True)
while True:
    time.sleep(0.06 + generator.expovariate(1 / 0.06))
    print(time.monotonic(), flush=True)
    device.launch(20, 1e6)
    device.sync(spins=True)
"""
BATCH = """
import struct, sys, time
from colocate.fakecard.client import Device
device, log = Device(sys.argv[1]), open(sys.argv[2], "ab", buffering=0)
while True:
    device.launch(1, 4e6)
    log.write(struct.pack("d", time.monotonic()))
    device.sync()
"""
UNDER_WAY_SECONDS = 0.001
"""A launch that was just being made when it was told to stop."""
HOG = "while True: pass"
POLICY = """
apiVersion: colocate.io/v1alpha1
kind: ColocationPolicy
spec:
  nodeRoot: {root}
  calibrate: false
  services: [{{name: web, selector: {{cgroup: /kubepods/burstable/podweb}}}}]
  gpu: {{nvmlLibrary: {library}}}
  http: {{enabled: false}}
"""


class Stops(threading.Thread):
    """When the kernel says that a cgroup is stopped, and that it runs again."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self._path = path
        self.events: list[tuple[float, bool]] = []
        self.ended = False

    def run(self) -> None:
        """Until it is ended, or the cgroup has gone."""
        descriptor = os.open(self._path, os.O_RDONLY)
        poll = select.poll()
        poll.register(descriptor, select.POLLPRI)
        with contextlib.suppress(OSError):
            while not self.ended:
                frozen = b"frozen 1" in os.pread(descriptor, 4096, 0)
                now = time.monotonic()
                if not self.events or self.events[-1][1] != frozen:
                    self.events.append((now, frozen))
                poll.poll(200)
        os.close(descriptor)


class Words(threading.Thread):
    """When batch was told to stop, and to go on."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self._path = path
        self._library = ctypes.CDLL(None, use_errno=True)
        self._inotify = self._library.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if self._library.inotify_add_watch(self._inotify, os.fsencode(path), IN_MODIFY) < 0:
            raise OSError(ctypes.get_errno(), f"inotify of {path}")
        self.events: list[tuple[float, bool]] = []
        self.ended = False

    def run(self) -> None:
        """Until it is ended, or the cgroup has gone."""
        file = os.open(self._path, os.O_RDONLY)
        with contextlib.suppress(OSError):
            while not self.ended:
                if select.select([self._inotify], [], [], 0.2)[0]:
                    now = time.monotonic()
                    os.read(self._inotify, 4096)
                    self.events.append((now, os.pread(file, 8, 0).strip() == b"1"))
        os.close(file)
        os.close(self._inotify)

    def launched_in_vain(self, launches: list[float]) -> int:
        """Launches that were made after it was told to stop and before it was let go."""
        late = 0
        for (told, stopped), (let_go, _) in pairwise([*self.events, (float("inf"), False)]):
            between = told + UNDER_WAY_SECONDS, let_go - UNDER_WAY_SECONDS  # words are heard a moment later
            late += sum(between[0] < at < between[1] for at in launches) if stopped else 0
        return late


def reactions(events: list[tuple[float, bool]], requests: list[float]) -> list[float]:
    """Of the requests that came while batch ran: how long it took until it was stopped. Seconds, sorted."""
    found = []
    for at in requests:
        before = [stopped for when, stopped in events if when <= at]
        after = next((when for when, stopped in events if when > at and stopped), None)
        if before and not before[-1] and after is not None:
            found.append(after - at)
    return sorted(found)


class Bench:
    """A node with a card, a service, and an agent."""

    def __init__(self, port: KernelPort, node: ScratchNode, folder: Path) -> None:
        self._port, self._node, self._folder = port, node, folder
        self._environment = {
            **os.environ,
            "COLOCATE_STATE_DIR": str(folder / "agent"),
            "COLOCATE_RUNTIME_DIR": str(folder / "run"),
        }
        for inner in ("kubepods", "kubepods/burstable", "kubepods/besteffort"):
            node.make_inner(inner)
        for leaf in ("kubepods/burstable/podweb", "kubepods/besteffort/podhogs", "card"):
            node.make(leaf)
        path = joined(node.path, "kubepods/besteffort")
        write_knob(port, path, "cpu.weight", "1", inodes_of(port, path))

    def start(self, group: str, *command: str, said: str = "") -> subprocess.Popen[str]:
        """In a group of the node, once it has said so."""
        pipe = subprocess.PIPE  # the card ends when its standard input does
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=self._environment)
        self._node.enter(process.pid, joined(self._node.path, group))
        if said:
            assert process.stdout is not None
            if process.stdout.readline().strip() != said:
                raise HostUnfit("the simulated card did not start", "install a C compiler: gcc")
        return process

    def module(self, group: str, *arguments: str, said: str = "") -> subprocess.Popen[str]:
        """A module of ours there."""
        return self.start(group, sys.executable, "-P", "-m", *arguments, said=said)

    @contextlib.contextmanager
    def agent(self) -> Iterator[subprocess.Popen[str]]:
        """Where agents are: not in the node."""
        config = self._folder / "policy.yaml"
        config.write_text(POLICY.format(root=self._node.path, library=self._folder / LIBRARY))
        command = [sys.executable, "-P", "-m", "colocate.cli.main", "agent", "--config", str(config)]
        log = (self._folder / "agent.log").open("w")
        agent = subprocess.Popen(command, stderr=log, env=self._environment, text=True)
        try:
            listens = (self._folder / "run" / "agent.sock").exists
            _wait(lambda: listens() or agent.poll() is not None, "the agent does not listen")
            if agent.poll() is not None:
                raise HostUnfit(f"the agent has ended: {(self._folder / 'agent.log').read_text()[-500:]}")
            yield agent
        finally:
            agent.send_signal(signal.SIGTERM)
            agent.wait(30)
            log.close()

    def job(self) -> subprocess.Popen[str]:
        """Batch that waits for each kernel of 4 ms."""
        client = [sys.executable, "-P", "-c", BATCH, str(self._folder), str(self._folder / LAUNCHES)]
        command = [sys.executable, "-P", "-m", "colocate.cli.main", "run", "--name", "train", "--", *client]
        return subprocess.Popen(command, env=self._environment, stdout=subprocess.DEVNULL, text=True)

    def gated(self) -> bool:
        """Whether the law has got to know the job. It is asked once a second."""
        time.sleep(1.0)
        command = [sys.executable, "-P", "-m", "colocate.cli.main", "explain", "gpu", "-o", "json"]
        found = subprocess.run(command, env=self._environment, capture_output=True, text=True, check=False)
        return '"state": "gate"' in found.stdout

    def launches(self) -> list[float]:
        """Of that job."""
        return list(array("d", (self._folder / LAUNCHES).read_bytes()))

    def words(self) -> Words:
        """To that job."""
        words = Words(Path(f"{self._port.layout.mounts[UNIFIED]}{self._node.path}/kubepods/batch/train/cgroup.freeze"))
        words.start()
        return words

    def stops(self) -> Stops:
        """Of that job."""
        path = Path(f"{self._port.layout.mounts[UNIFIED]}{self._node.path}/kubepods/batch/train/cgroup.events")
        _wait(path.exists, "the job is not in the tier")
        stops = Stops(path)
        stops.start()
        return stops


def _wait(condition: Any, otherwise: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise HostUnfit(otherwise)
        time.sleep(0.01)


def _cost(agent: subprocess.Popen[str]) -> float:
    """CPU seconds of the agent and of its NVML worker, but not of its guardian."""
    total = cpu_seconds(agent.pid)
    for child in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split():
        if b"nvml_worker" in Path(f"/proc/{child}/cmdline").read_bytes():
            total += cpu_seconds(int(child))
    return total


def _reaction(bench: Bench, folder: Path, loaded: bool) -> dict[str, Any]:
    processes = [bench.module("card", "colocate.fakecard.daemon", str(folder), said="ready")]
    try:
        web = bench.start(
            "kubepods/burstable/podweb", sys.executable, "-P", "-c", SERVICE, str(folder), said="on the card"
        )
        processes.append(web)
        requests: list[float] = []
        reader = threading.Thread(target=lambda: requests.extend(float(x) for x in web.stdout or ()), daemon=True)
        reader.start()
        with bench.agent() as agent:
            hogs = [sys.executable, "-ISc", HOG]
            processes += [
                bench.start("kubepods/besteffort/podhogs", *hogs) for _ in range((os.cpu_count() or 1) * loaded)
            ]
            time.sleep(3.0)
            began = time.monotonic(), _cost(agent)
            time.sleep(BEFORE_SECONDS)
            before = (_cost(agent) - began[1]) / (time.monotonic() - began[0])
            job = bench.job()
            stops = bench.stops()
            _wait(bench.gated, "the law does not gate", LEARN_SECONDS)
            words = bench.words()
            time.sleep(SETTLE_SECONDS)
            began = time.monotonic(), _cost(agent)
            first = len(requests)
            time.sleep(SECONDS)
            cost = (_cost(agent) - began[1]) / (time.monotonic() - began[0])
            told, frozen = reactions(words.events, requests[first:]), reactions(stops.events, requests[first:])
            late = words.launched_in_vain(bench.launches())
            stops.ended = words.ended = True
            job.terminate()
            job.wait(30)
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(10)
    if not told or not frozen:
        raise HostUnfit("batch was never stopped for a request")
    return {
        "requests": len(requests) - first,
        "stopped": len(told),
        "p50_ms": round(told[len(told) // 2] * 1e3, 3),
        "p95_ms": round(told[int(0.95 * len(told))] * 1e3, 3),
        "most_ms": round(told[-1] * 1e3, 3),
        "launches_after": late,
        "frozen_p50_ms": round(frozen[len(frozen) // 2] * 1e3, 3),
        "frozen_p95_ms": round(frozen[int(0.95 * len(frozen))] * 1e3, 3),
        "agent_cores_before": round(before, 4),
        "agent_cores": round(cost, 4),
    }


def _killed(bench: Bench, folder: Path) -> dict[str, Any]:
    """SIGKILL while batch is stopped: how long until the kernel says that it runs."""
    card = bench.module("card", "colocate.fakecard.daemon", str(folder), said="ready")
    try:
        web = bench.start(
            "kubepods/burstable/podweb", sys.executable, "-P", "-c", SERVICE, str(folder), said="on the card"
        )
        threading.Thread(target=lambda: list(web.stdout or ()), daemon=True).start()
        with bench.agent() as agent:
            job = bench.job()
            stops = bench.stops()
            _wait(bench.gated, "the law does not gate", LEARN_SECONDS)
            _wait(lambda: stops.events[-1][1], "batch is not stopped")
            agent.kill()
            killed = time.monotonic()
            agent.wait(10)
            _wait(
                lambda: (not stops.events[-1][1] and stops.events[-1][0] > killed) or not stops.is_alive(),
                "still stopped",
            )
            thawed = stops.events[-1][0] if not stops.events[-1][1] else time.monotonic()
            stops.ended = True
            job.terminate()
            job.wait(30)
        web.terminate()
        web.wait(10)
    finally:
        card.terminate()
        card.wait(10)
    return {"thawed_seconds": round(max(thawed - killed, 0.0), 3)}


def run(_full: bool) -> list[str]:
    """Measure what is missing; the lines of the summary."""
    runs = Runs("gpu-hand")
    port = KernelPort()
    sweep(port)
    wanted = [("reaction", i, condition) for i, condition in enumerate(CONDITIONS)]
    wanted += [("killed", i, "") for i in range(KILLS)]
    for part, number, condition in wanted:
        if runs.has(part=part, round=number):
            continue
        folder = Path(tempfile.mkdtemp(prefix="colocate-hand-"))
        try:
            with ScratchNode(port, "bench") as node:
                bench = Bench(port, node, folder)
                reference = reference_loop()
                found = (
                    _reaction(bench, folder, condition == "loaded") if part == "reaction" else _killed(bench, folder)
                )
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        runs.add(part=part, round=number, condition=condition, reference_seconds=round(reference, 4), **found)
    port.close()
    return summary(runs)


def summary(runs: Runs) -> list[str]:
    """A line a bar, by the worst of the rounds."""
    lines = []
    for condition, bound in (("idle", IDLE_BAR_MS), ("loaded", LOADED_BAR_MS)):
        rows = [r for r in runs.runs if r.get("part") == "reaction" and r["condition"] == condition]
        if rows:
            worst = max(r["p95_ms"] for r in rows)
            judged = "PASS" if worst <= bound else "FAIL"
            lines.append(bar(f"gpu: request to batch told to stop, p95, {condition} node", judged, worst, bound, "ms"))
    rows = [r for r in runs.runs if r.get("part") == "reaction"]
    if rows:
        late = max(r["launches_after"] for r in rows)
        judged = "PASS" if not late else "FAIL"
        lines.append(bar("gpu: launches by batch that had been told to stop", judged, late, 0, ""))
        more = max(r["agent_cores"] - r["agent_cores_before"] for r in rows)
        judged = "PASS" if more <= COST_BAR_CORES else "FAIL"
        lines.append(bar("gpu: what looking and stopping costs the agent", judged, more, COST_BAR_CORES, "cores"))
    if killed := [r["thawed_seconds"] for r in runs.runs if r.get("part") == "killed"]:
        judged = "PASS" if max(killed) <= THAWED_BAR_SECONDS else "FAIL"
        lines.append(bar("gpu: SIGKILL of the agent to batch running", judged, max(killed), THAWED_BAR_SECONDS, "s"))
    return lines
