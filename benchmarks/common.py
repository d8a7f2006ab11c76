"""What every benchmark needs: the machine's facts, a reference loop, and results that are kept run by run."""

from __future__ import annotations

import datetime as dt
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import msgspec

from colocate.calibrate.measure import machine_facts
from colocate.cgroup.port import KernelPort
from colocate.errors import BadInput
from colocate.model.statistics import Interval

RESULTS = Path(__file__).parent / "results"


def reference_loop() -> float:
    """Seconds of CPU that a fixed loop takes now: the measure beside every wall-clock figure."""
    best = float("inf")
    for _ in range(3):
        started = time.thread_time()
        total = 0
        for i in range(300_000):
            total += i * i
        best = min(best, time.thread_time() - started)
    return best


class Runs:
    """A JSON-lines file of runs; what is in it is not run again, so a benchmark can be resumed."""

    def __init__(self, name: str) -> None:
        self.path = RESULTS / f"{name}.jsonl"
        RESULTS.mkdir(exist_ok=True)
        lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        self.runs: list[dict[str, Any]] = [msgspec.json.decode(line) for line in lines if line]
        here = {**machine_facts(KernelPort()), "memory": _memory()}
        known = next((r["machine"] for r in self.runs if "machine" in r), None)
        if known is None:
            self.add(machine=here)
        elif known != here:
            raise BadInput(f"{self.path} was measured on another machine: move it away, for runs are not mixed")

    def has(self, **key: Any) -> bool:
        """Whether a run with these fields is there."""
        return any(all(r.get(k) == v for k, v in key.items()) for r in self.runs)

    def add(self, **run: Any) -> None:
        """Keep a run."""
        run = {"at": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"), "commit": _commit(), **run}
        self.runs.append(run)
        with self.path.open("ab") as file:
            file.write(msgspec.json.encode(run) + b"\n")


def _commit() -> str:
    """Which code was measured; a `+` after it: with changes."""
    command = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _memory() -> str:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{pages / (1 << 30):.0f} GiB"


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far. Raises OSError if it is gone."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mib(pid: int, what: str = "Rss") -> float:
    """Resident memory of a process, or its part of what is shared (`Pss`), in MiB. Raises OSError if it is gone."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(text.partition(f"\n{what}:")[2].split()[0]) / 1024


def most_resident_mib(pid: int) -> float:
    """Resident memory of a process at its largest so far, in MiB. Raises OSError if it is gone."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024


def at_most(name: str, value: float, bound: float, unit: str) -> str:
    """The line of a figure that is no estimate, and is not to exceed its bar."""
    return bar(name, "PASS" if value <= bound else "FAIL", value, bound, unit)


def bar(name: str, judged: str, found: Interval | float, bound: float, unit: str = "x") -> str:
    """One line of the summary: pass, fail or undecided."""
    if isinstance(found, Interval):
        shown = f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}] {unit}"
    else:
        shown = f"{found:.3f} {unit}"
    return f"{judged:9s} {name}: {shown} (bar {bound:g})"
