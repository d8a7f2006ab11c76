"""A simulated package: a powercap zone as the kernel has it, with the energy of an idle one and of CPU time used."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from colocate.cgroup.port import FilePort
from colocate.cgroup.tree import processes_anywhere

IDLE_WATTS, WATTS_PER_CORE = 20.0, 15.0
STEP_SECONDS = 0.02
RANGE_MICROJOULES = 1 << 50


class Package:
    """Its folder is `root`; `seconds_used` tells how much CPU time was used so far."""

    def __init__(self, root: Path, seconds_used: Callable[[], float]) -> None:
        self.root, self._seconds_used, self._ends = root, seconds_used, threading.Event()
        self._zone = root / "intel-rapl:0"
        self._zone.mkdir(parents=True)
        for name, text in (("name", "package-0"), ("max_energy_range_uj", RANGE_MICROJOULES), ("energy_uj", 0)):
            (self._zone / name).write_text(str(text))
        self.joules = 0.0
        self._thread = threading.Thread(target=self._run, name="package", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        began = time.monotonic()
        while not self._ends.wait(STEP_SECONDS):
            self.joules = IDLE_WATTS * (time.monotonic() - began) + WATTS_PER_CORE * self._seconds_used()
            part = self._zone / "part"
            part.write_text(str(int(self.joules * 1e6)))
            part.replace(self._zone / "energy_uj")

    def close(self) -> None:
        """It draws nothing any more."""
        self._ends.set()
        self._thread.join()


class UsedIn:
    """CPU seconds of the processes that are in a cgroup or below it, also of those that have ended meanwhile."""

    def __init__(self, port: FilePort, path: str) -> None:
        self._port, self._path = port, path
        self._known: dict[int, float] = {}

    def __call__(self) -> float:
        """So far."""
        for pid in processes_anywhere(self._port, self._path):
            stat = self._port.proc(f"/proc/{pid}/stat")
            if stat:
                fields = stat.rpartition(")")[2].split()
                self._known[pid] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return sum(self._known.values())
