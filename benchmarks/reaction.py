"""How soon the agent acts: a violation visible in the service's histogram, and a service that stalls on memory.

Real parts: an HTTP endpoint with a histogram, real cgroups, real stalls (a service that begins to use a file for which
batch has left the node no room). The clock starts when the violation is visible (the endpoint serves it; PSI `total=`
has passed the threshold, as a reader every 5 ms in the agent's own loop sees it) and stops at the agent's first write;
0 if it acted before. Wall clock, beside a reference loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

from benchmarks.common import Runs, bar, reference_loop
from colocate.actuate.journal import Journal, boot_id
from colocate.actuate.scratch import ScratchNode, sweep
from colocate.agent.loop import Agent, Tick
from colocate.calibrate.measure import PROBE
from colocate.cgroup.knobfiles import write_knob
from colocate.cgroup.layout import UNIFIED
from colocate.cgroup.port import KernelPort
from colocate.cgroup.tree import inodes_of, joined
from colocate.cli.logs import configure_logs
from colocate.model import reference
from colocate.observe.cgroup import parse_pressure
from colocate.policy.schema import (
    ColocationPolicy,
    MemoryPolicy,
    PolicySpec,
    Selector,
    ServiceLevelObjective,
    ServicePolicy,
)
from tools.guest import Guest
from tools.guest import lacks as guest_lacks

ROUNDS = 12
"""They fall on as many different phases of the tick."""
GUEST_ROUNDS = 8
READERS = 6
TICK_SECONDS = 0.5
MEMORY_BAR_SECONDS = 0.3
NODE_BYTES, BATCH_BYTES = 224 << 20, 128 << 20


Measure = Callable[[KernelPort, ScratchNode, Path, float], Coroutine[Any, Any, float]]


class Endpoint:
    """A histogram that turns bad on demand."""

    def __init__(self) -> None:
        self.good = self.bad = 0.0
        self.violated = False

    async def metrics(self, _request: web.Request) -> web.Response:
        """Prometheus text."""
        self.good += 300
        if self.violated:
            self.bad += 300
        total = self.good + self.bad
        rows = {"0.01": self.good, "0.05": total, "+Inf": total}
        lines = ["# TYPE lat histogram", *(f'lat_bucket{{le="{le}"}} {count}' for le, count in rows.items())]
        return web.Response(text="\n".join([*lines, "lat_sum 1", f"lat_count {total}", ""]))


def _hog(agent: Agent, directory: Path) -> subprocess.Popen[bytes]:
    counter = directory / "counter"
    hog = subprocess.Popen([sys.executable, "-IS", str(PROBE), "hog", str(counter)])
    agent.tier.move(hog.pid, agent.tier.ensure_job("hog"))
    return hog


async def _violation(port: KernelPort, node: ScratchNode, directory: Path, phase: float) -> float:
    """Seconds from the violation's first moment at the endpoint to the narrowed grant."""
    endpoint = Endpoint()
    app = web.Application()
    app.add_routes([web.get("/metrics", endpoint.metrics)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/metrics"
    slo = ServiceLevelObjective(p99=0.02, url=url, metric="lat", window=1.0)
    spec = PolicySpec(
        node_root=node.path,
        tick=TICK_SECONDS,
        services=(ServicePolicy(name="web", selector=Selector(cgroup="/web"), slo=slo),),
    )
    agent = Agent(port, ColocationPolicy(spec=spec), reference, Journal(directory, boot_id()))
    agent.open()
    hog = _hog(agent, directory)
    narrowed = asyncio.Event()
    at: list[float] = []

    def see(tick: Tick) -> None:
        if any(o.knob == "cpu.max" and o.status == "applied" and not o.value.startswith("max") for o in tick.outcomes):
            at.append(time.perf_counter())
            narrowed.set()

    agent.on_tick.append(see)
    stop = asyncio.Event()
    running = asyncio.create_task(agent.run(stop))
    await asyncio.sleep(2.2 + phase * TICK_SECONDS)
    started = time.perf_counter()
    endpoint.violated = True
    await asyncio.wait_for(narrowed.wait(), 20)
    stop.set()
    await running
    hog.kill()
    hog.wait()
    await agent.close()
    await runner.cleanup()
    return at[0] - started


def _reader(node: ScratchNode, service: str, directory: Path) -> subprocess.Popen[bytes]:
    thrash = [sys.executable, "-IS", str(PROBE), "thrash", str(directory / "file")]
    command = ["/bin/sh", "-c", 'read _; exec "$@"', "sh", *thrash]
    reader = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    node.enter(reader.pid, service)
    assert reader.stdin is not None
    reader.stdin.write(b"\n")
    reader.stdin.flush()
    return reader


def _drop_cached(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


async def _stall(port: KernelPort, node: ScratchNode, directory: Path, phase: float) -> float:
    """Seconds from a visible stall to the first rung."""
    service = joined(node.path, "web")
    inodes = inodes_of(port, service)
    write_knob(port, node.path, "memory.max", str(NODE_BYTES), inodes_of(port, node.path))
    spec = PolicySpec(
        node_root=node.path,
        tick=1.0,
        services=(ServicePolicy(name="web", selector=Selector(cgroup="/web")),),
        memory=MemoryPolicy(),
    )
    first = _reader(node, service, directory)
    for _ in range(1000):
        if (directory / "file").exists():
            break
        await asyncio.sleep(0.1)
    first.kill()
    first.communicate()
    _drop_cached(directory / "file")
    agent = Agent(port, ColocationPolicy(spec=spec), reference, Journal(directory, boot_id()))
    agent.open()
    pages = BATCH_BYTES >> 12
    grow = f"held = bytearray({pages} << 12); held[::4096] = b'1' * {pages}\nimport time\nwhile True: time.sleep(1)"
    batch = subprocess.Popen(
        [sys.executable, "-ISc", f"import sys; sys.stdin.readline()\n{grow}"], stdin=subprocess.PIPE
    )
    agent.tier.move(batch.pid, agent.tier.ensure_job("batch"))
    assert batch.stdin is not None
    batch.stdin.write(b"\n")
    batch.stdin.flush()
    await asyncio.sleep(1.0)  # it has grown, and grows no more
    at: list[float] = []
    rung = asyncio.Event()

    def see(tick: Tick) -> None:
        if tick.plan.verdicts[1].state != "calm" and not at:
            at.append(time.perf_counter())
            rung.set()

    agent.on_tick.append(see)
    stop = asyncio.Event()
    running = asyncio.create_task(agent.run(stop))
    await asyncio.sleep(1.5 + phase)
    if at:
        raise RuntimeError("the memory law was not calm before the stall began")
    readers = [_reader(node, service, directory) for _ in range(READERS)]
    seen, acted = asyncio.create_task(_visible(port, service, inodes[UNIFIED])), asyncio.create_task(rung.wait())
    await asyncio.wait({seen, acted}, timeout=30, return_when=asyncio.FIRST_COMPLETED)
    if seen.done():
        await asyncio.wait_for(acted, 20)
    elif not acted.done():
        raise RuntimeError("the service did not stall, and nothing was done")
    visible = seen.result() if seen.done() else float("inf")  # who acts in time sees no stall
    seen.cancel()
    stop.set()
    await running
    for process in (*readers, batch):
        process.kill()
        process.communicate()
    await agent.close()
    return max(at[0] - visible, 0.0)


async def _visible(port: KernelPort, path: str, inode: int) -> float:
    """When a reader every 5 ms sees more than 5 % of the last 75 ms stalled."""
    seen: list[tuple[float, int]] = []
    while True:
        now = time.perf_counter()
        total, _ = parse_pressure(port.read(UNIFIED, path, "memory.pressure", inode))
        seen = [*[s for s in seen if now - s[0] < 0.075], (now, total or 0)]
        if seen[-1][1] - seen[0][1] > 0.05 * 75_000:
            return now
        await asyncio.sleep(0.005)


def _once(port: KernelPort, measure: Measure, phase: float) -> float:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name, ScratchNode(port, "bench", 1 << 30) as node:
        node.make("web")
        return asyncio.run(measure(port, node, Path(name), phase))


def run(full: bool) -> list[str]:
    """Run what is missing; the summary."""
    runs, port = Runs("reaction"), KernelPort()
    sweep(port)
    rounds = ROUNDS if not full else 4 * ROUNDS
    for round_ in range(rounds):
        for kind, measure in (("violation", _violation), ("stall", _stall)):
            if runs.has(kind=kind, round=round_):
                continue
            seconds = _once(port, measure, round_ / rounds)
            runs.add(kind=kind, round=round_, seconds=seconds, reference=reference_loop())
    _in_the_guest(runs)
    return summary(runs)


def _in_the_guest(runs: Runs) -> None:
    """The stall once more where PSI triggers are allowed: root has CAP_SYS_RESOURCE there."""
    missing = [i for i in range(GUEST_ROUNDS) if not runs.has(kind="stall, triggers, guest", round=i)]
    if not missing or guest_lacks():
        return
    with Guest() as guest:
        for round_ in missing:
            code, output = guest.run(f"python3 -m benchmarks.reaction {round_ / GUEST_ROUNDS}", 300)
            if code:
                raise RuntimeError(f"in the guest: {output[-2000:]}")
            found = msgspec.json.decode(output.splitlines()[-1])
            runs.add(kind="stall, triggers, guest", round=round_, **found)


def summary(runs: Runs) -> list[str]:
    """The slowest of all rounds (fewer than 100, so it stands for the p99) against the bar."""
    lines = []
    bounds = {
        "violation": TICK_SECONDS + 0.1,
        "stall": MEMORY_BAR_SECONDS,
        "stall, triggers, guest": MEMORY_BAR_SECONDS,
    }
    for kind, bound in bounds.items():
        if not runs.has(kind=kind):
            lines.append(f"          reaction, {kind}: did not run, a guest lacks {guest_lacks()}")
            continue
        values = sorted(r["seconds"] for r in runs.runs if r.get("kind") == kind)
        worst, median = values[-1], values[len(values) // 2]
        judged = "pass" if worst <= bound else "fail"
        lines.append(
            bar(f"reaction, {kind}: slowest of {len(values)} (median {median:.3f})", judged, worst, bound, "s")
        )
    return lines


if __name__ == "__main__":
    configure_logs(logging.ERROR)
    found = {"seconds": _once(KernelPort(), _stall, float(sys.argv[1])), "reference": reference_loop()}
    print(msgspec.json.encode(found).decode())
