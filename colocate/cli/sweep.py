"""colocate power sweep: the same command under several power caps, one run after the other, and what that says of it.

Caps go up and down in turn, so that a machine that becomes slower or warmer is no cap's fault. Each run is in the
table once it has ended: a sweep that is broken off loses none.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from colocate.agent.watts import VISIBLE, named
from colocate.amdgpu import PREFIX
from colocate.cgroup.port import KernelPort
from colocate.cli.host import socket_path
from colocate.cli.output import check_file
from colocate.cli.power import AUTO, power
from colocate.cli.run import visible_gpus
from colocate.cli.sweep_jobs import Manifest, read_job, sweep_jobs
from colocate.errors import BadInput, ColocateError
from colocate.jobs.client import connect_or_embed
from colocate.jobs.client import run as run_job
from colocate.observe.kfd import read_cards
from colocate.observe.node import has_amd, has_nvidia
from colocate.observe.nvml import NvmlSilent, Worker
from colocate.observe.nvml_worker import start_ticks
from colocate.power.sweeps import CAP, SECONDS, WATTS
from colocate.units import parse_watts

MOST_CAPS, LEAST_CAPS = 100, 2
RESTORED_SECONDS = 20.0
WATCH_SECONDS = 0.2
Card = dict[str, Any]
"""As the NVML worker tells of it."""


class Gpus(NamedTuple):
    """The GPUs of a sweep, and what each may be capped at: never above the limit that was found."""

    uuids: tuple[str, ...]
    least_watts: float
    most_watts: float
    """Of each: the greatest least, and the least greatest."""
    found: tuple[int, ...]
    """Their limits, milliwatts."""

    @property
    def size(self) -> int:
        """How many."""
        return len(self.uuids)


class Node:
    """Reads the GPUs of this node."""

    def __init__(self, library: str) -> None:
        self.worker = Worker(library)
        self._nvidia, self._amd = bool(library) or has_nvidia() or not has_amd(), has_amd()

    def read(self) -> list[Card]:
        """Each that tells. Raises ColocateError."""
        amd = read_cards(KernelPort()) if self._amd else []
        if not self._nvidia:
            return amd
        try:
            return [*(card for card in self.worker.ask(ask="read")["cards"] if not card["error"]), *amd]
        except NvmlSilent as error:
            raise ColocateError(f"the GPUs cannot be read: {error}; where NVML is says --nvml-library") from error


class RunSpoiledError(ColocateError):
    """A run was not what it is written down as."""


def caps_of(text: str) -> list[int]:
    """`100:300:25`, both ends included, or `150,200,300`; ascending. Raises BadInput."""
    mend = f"{LEAST_CAPS} to {MOST_CAPS} make a sweep: FROM:TO:STEP in whole watts, e.g. 100:300:25, or a list"
    parts = text.split(":")
    try:
        if len(parts) == 3:
            first, last, step = map(parse_watts, parts)
            found = sorted({*range(first, last + 1, step), last} if first < last else set())
        elif len(parts) == 1:
            found = sorted({parse_watts(part) for part in text.split(",")})
        else:
            found = []
    except ValueError as error:
        raise BadInput(f"--caps: {error}") from error
    if not LEAST_CAPS <= len(found) <= MOST_CAPS:
        raise BadInput(f"--caps {text}: these are {len(found)} caps; {mend}")
    return found


def in_turn(caps: list[int], repeats: int) -> list[int]:
    """Up, and down, and up again."""
    return [cap for i in range(repeats) for cap in (caps if i % 2 == 0 else caps[::-1])]


def sweep(options: argparse.Namespace) -> int:
    """Exit as `colocate power fit` does; with the command's own code where it fails. Raises BadInput, ColocateError."""
    command = options.argv[1:] if options.argv[:1] == ["--"] else options.argv
    if bool(command) == bool(options.job):
        raise BadInput("give a command, `... --file FILE -- CMD ...`, or a Job of the cluster, `--job FILE`")
    caps, table = caps_of(options.caps), check_file("--file", options.file)
    if table.exists():
        raise BadInput(f"--file: {table} is there already: name another, for a sweep is one file")
    report = check_file("--report", options.report) if options.report else None
    if report is not None and report.resolve() == table.resolve():
        raise BadInput("--report: that is --file")
    order = in_turn(caps, options.repeats)
    if options.job:
        asyncio.run(_in_cluster(options, read_job(Path(options.job)), order, table))
        code = 0
    else:
        code = _on_this_node(options, command, caps, order, table)
    if code:
        return code
    asked = {"files": [str(table)], "model": AUTO, "where": "", "confidence": None, "report": options.report}
    return power(argparse.Namespace(**asked, slowdown=options.slowdown, output=options.output))


async def _in_cluster(options: argparse.Namespace, job: Manifest, order: list[int], table: Path) -> None:
    async for cap, seconds in sweep_jobs(options, job, order):
        _write(table, f"{cap},{seconds:.0f},")


def _on_this_node(
    options: argparse.Namespace, command: list[str], caps: list[int], order: list[int], table: Path
) -> int:
    node = Node(options.nvml_library)
    try:
        gpus = _gpus(node)
        _check(caps, gpus)
        return _sweep(options, command, order, table, gpus, node)
    finally:
        node.worker.end()


def _check(caps: list[int], gpus: Gpus) -> None:
    """Raises BadInput for caps that these GPUs could not have."""
    for cap in caps:
        if cap % gpus.size:
            raise BadInput(f"--caps: {cap} W are not the same whole watts for each of {gpus.size} GPUs")
        if not gpus.least_watts <= cap / gpus.size <= gpus.most_watts:
            can = f"{gpus.size * gpus.least_watts:g} to {gpus.size * gpus.most_watts:g} W"
            raise BadInput(
                f"--caps: {cap} W is outside of what {gpus.size} GPU(s) take together as they are set now, {can}"
            )


def _sweep(
    options: argparse.Namespace, command: list[str], order: list[int], table: Path, gpus: Gpus, node: Node
) -> int:
    """The runs in their order, each written down; the code of one that fails. Raises ColocateError."""
    visible = ",".join(gpus.uuids)
    if not any(uuid.startswith(PREFIX) for uuid in gpus.uuids):  # ROCr knows its own names for the others
        os.environ[VISIBLE[1]] = visible
    for i, cap in enumerate(order):
        said = f"colocate: run {i + 1} of {len(order)}, {cap} W"
        print(f"{said} ...", file=sys.stderr)
        name = f"sweep-{os.getpid()}-{i}"
        request = {"name": name, "power_watts": cap, "visible_gpus": visible}
        connection = connect_or_embed(socket_path(options), options.config)
        with _Watch(node, gpus, cap, name) as watch, _output_is_no_result():
            began = time.monotonic()
            code = run_job(command, connection, request)
            seconds = time.monotonic() - began
        if code:
            kept = f"{i} runs are in {table}" if i else "no run is written down"
            print(f"{said}: it ended with {code}; {kept}", file=sys.stderr)
            return code
        if watch.spoiled:
            raise RunSpoiledError(f"{said}: {watch.spoiled}: this run is not written down, and the sweep ends here")
        watts = watch.watts
        _write(table, f"{cap},{seconds:.6f},{watts:.3f}")
        _until_restored(node, gpus)
        print(f"{said}: {seconds:.1f} s, {watts:.0f} W", file=sys.stderr)
    return 0


def _write(table: Path, line: str) -> None:
    try:
        with table.open("a") as file:
            if not file.tell():
                file.write(f"{CAP},{SECONDS},{WATTS}\n")
            file.write(f"{line}\n")
    except OSError as error:
        raise ColocateError(f"--file: {table} cannot be written: {error.strerror}") from error


class _Watch:
    """Looks during a run whether the limits in force are those of it, and whether it is alone on its GPUs."""

    def __init__(self, node: Node, gpus: Gpus, cap: int, job: str) -> None:
        self._node, self._gpus, self._each, self._job = node, gpus, 1000 * cap // gpus.size, job
        self.spoiled = ""
        self._joules, self._began = 0.0, 0.0
        self._drew: list[tuple[float, float]] = []
        """When looked at, and what those drew that count no energy."""
        self._seen = False
        self._strange: set[int] = set()
        """Processes on the GPUs that were not its at the last look."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> _Watch:
        self._joules, self._began = self._counted(), time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if kind is None:
            self._joules, self._began = self._counted() - self._joules, time.monotonic() - self._began

    @property
    def watts(self) -> float:
        """What they drew on average, once it is over: by their counters, or else as they were seen to draw."""
        pairs = itertools.pairwise(self._drew)
        seen = sum((a[1] + b[1]) / 2 * (b[0] - a[0]) for a, b in pairs)
        span = self._drew[-1][0] - self._drew[0][0] if len(self._drew) > 1 else 0.0
        mean = seen / span if span else self._drew[0][1] if self._drew else 0.0
        return self._joules / self._began + mean

    def _counted(self) -> float:
        """Joules so far of those that count them. Raises ColocateError."""
        cards = {card["uuid"]: card for card in self._node.read()}
        missing = [uuid for uuid in self._gpus.uuids if uuid not in cards or not _tells(cards[uuid])]
        if missing:
            raise ColocateError(f"{missing[0]} does not tell its energy any more")
        return sum(float(cards[uuid].get("energy_mj") or 0) for uuid in self._gpus.uuids) / 1000

    def _run(self) -> None:
        while not self._ended.wait(WATCH_SECONDS) and not self.spoiled:
            with contextlib.suppress(ColocateError):
                cards = {str(card["uuid"]): card for card in self._node.read()}
                if not self._ended.is_set():  # what was asked before its end may be answered after it
                    self._look([cards[uuid] for uuid in self._gpus.uuids if uuid in cards])

    def _look(self, cards: list[Card]) -> None:
        uncounted = [card["power_mw"] for card in cards if card.get("energy_mj") is None]
        if uncounted and None not in uncounted:
            self._drew.append((time.monotonic(), sum(uncounted) / 1000))
        limits = [card["limit_mw"] for card in cards]
        self._seen = self._seen or limits == [self._each] * len(limits)
        if self._seen and limits != [self._each] * len(limits):
            watts = ", ".join(f"{limit / 1000:g}" for limit in limits)
            self.spoiled = f"the limits in force were {watts} W meanwhile"
        before, self._strange = self._strange, set()
        for pid, started, *_ in (process for card in cards for process in card["processes"]):
            with contextlib.suppress(OSError):  # it has ended
                path = Path(f"/proc/{pid}/cgroup").read_text() if start_ticks(pid) == started else self._job
                if self._job not in path:
                    self._strange.add(pid)
        if both := before & self._strange:  # one that is about to end has left its cgroup
            self.spoiled = f"process {min(both)} was on its GPUs too"


@contextlib.contextmanager
def _output_is_no_result() -> Iterator[None]:
    """What the command prints goes to standard error: standard output is ours."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _tells(card: Card) -> bool:
    """Whether it says what it draws: AMD's boards count no energy."""
    return card.get("energy_mj") is not None or card.get("power_mw") is not None


def _gpus(node: Node) -> Gpus:
    """Those in CUDA_, ROCR_ or HIP_VISIBLE_DEVICES, or the only one. Raises BadInput, ColocateError."""
    cards = node.read()
    by_name = {str(card["index"]): card for card in cards} | {str(card["uuid"]): card for card in cards}
    shown = visible_gpus()
    if shown is None and len(cards) != 1:
        raise BadInput(
            f"this node has {len(cards)} GPUs: name those of the sweep in {VISIBLE[1]} (AMD: ROCR_VISIBLE_DEVICES)"
        )
    names = named([shown]) if shown is not None else tuple(by_name)[:1]
    if not names:
        raise BadInput(f"{VISIBLE[1]} is {shown!r}: it shows no GPU")
    chosen = []
    for name in names:
        if name not in by_name:
            raise BadInput(f"{VISIBLE[1]}: {name} is no GPU of this node")
        card = by_name[name]
        if not card["limits_mw"] or card["set_mw"] is None or not _tells(card):
            raise BadInput(f"GPU {card['index']}: it takes no power limit, or does not tell what it draws")
        chosen.append(card)
    least = max(card["limits_mw"][0] for card in chosen) / 1000
    most = min(min(card["limits_mw"][1], card["set_mw"]) for card in chosen) / 1000
    return Gpus(tuple(card["uuid"] for card in chosen), least, most, tuple(card["set_mw"] for card in chosen))


def _until_restored(node: Node, gpus: Gpus) -> None:
    """A run does not begin under the cap of the one before. Raises ColocateError."""
    deadline = time.monotonic() + RESTORED_SECONDS
    while True:
        now = {card["uuid"]: card["set_mw"] for card in node.read()}
        if tuple(now.get(uuid) for uuid in gpus.uuids) == gpus.found:
            return
        if time.monotonic() >= deadline:
            raise ColocateError(f"the limits that were found are not back {RESTORED_SECONDS:g} s after a run: {now}")
        time.sleep(0.05)
