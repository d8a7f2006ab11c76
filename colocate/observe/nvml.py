"""Cards by way of the NVML worker: asked in a thread, with a timeout, so that no tick ever waits for a driver.

A worker that does not answer is ended, and another one is started after a while; what was read last is shown meanwhile,
with its age. A process is followed to its cgroup, and from there to a workload: by the cgroup it is stopped, never by
its pid, which may be another's by then.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any

import structlog

from colocate.cgroup.child import start_child
from colocate.cgroup.port import FilePort
from colocate.cgroup.tree import cgroup_of, has_ended, main_hierarchy, start_time
from colocate.observe.kfd import read_cards
from colocate.observe.workloads import Target
from colocate.snapshot import Card, CardUser

log = structlog.get_logger()
ANSWER_SECONDS = 2.0
AGAIN_SECONDS, MOST_AGAIN_SECONDS = 2.0, 60.0
MOST_HUNG = 3
WAITING = "the NVML worker is started again in a while"


class NvmlSilent(Exception):  # noqa: N818 - it is the driver's state
    """The worker did not answer in time, or is not there."""


class Worker:
    """The process that talks to NVML. One question at a time, from any thread."""

    def __init__(self, library: str = "") -> None:
        self._library = library
        self._process: subprocess.Popen[bytes] | None = None
        self._not_before, self._again = float("-inf"), AGAIN_SECONDS
        self._rest = b""
        self._number = 0
        self._hung: list[subprocess.Popen[bytes]] = []
        """Workers that do not end: they wait in the driver."""
        self._lock = threading.Lock()

    def _start(self) -> subprocess.Popen[bytes]:
        if time.monotonic() < self._not_before:
            raise NvmlSilent(WAITING)
        self._hung = [p for p in self._hung if p.poll() is None]
        if len(self._hung) >= MOST_HUNG:
            raise NvmlSilent(f"{MOST_HUNG} NVML workers hang in the driver: none is started before one of them ends")
        self._rest = b""
        self._process = start_child("colocate.observe.nvml_worker", self._library)
        return self._process

    @property
    def pid(self) -> int:
        """Of the process; 0 while there is none."""
        return self._process.pid if self._process is not None else 0

    def ask(self, seconds: float = ANSWER_SECONDS, **question: Any) -> dict[str, Any]:
        """Its answer. Raises NvmlSilent."""
        with self._lock:
            answer = self._ask(seconds, question)
        if "error" in answer:
            raise NvmlSilent(str(answer["error"]))
        return answer

    def _ask(self, seconds: float, question: dict[str, Any]) -> dict[str, Any]:
        process = self._process if self._process is not None and self._process.poll() is None else self._start()
        assert process.stdin is not None
        self._number += 1
        try:
            process.stdin.write(json.dumps({**question, "number": self._number}).encode() + b"\n")
            process.stdin.flush()
            answer = self._answer(process, time.monotonic() + seconds)
        except OSError as error:
            self._give_up()
            raise NvmlSilent("the NVML worker has ended") from error
        self._again = AGAIN_SECONDS
        return answer

    def _answer(self, process: subprocess.Popen[bytes], deadline: float) -> dict[str, Any]:
        """The answer to the last question; whatever else a driver prints is none."""
        while True:
            with contextlib.suppress(ValueError):
                answer = json.loads(self._line(process, deadline))
                if isinstance(answer, dict) and answer.get("to") == self._number:
                    return answer

    def _line(self, process: subprocess.Popen[bytes], deadline: float) -> bytes:
        assert process.stdout is not None
        descriptor = process.stdout.fileno()
        while b"\n" not in self._rest:
            ready, _, _ = select.select([descriptor], [], [], max(deadline - time.monotonic(), 0.0))
            if not ready:
                self._give_up()
                raise NvmlSilent(f"NVML did not answer within {ANSWER_SECONDS:g} s")
            chunk = os.read(descriptor, 1 << 16)
            if not chunk:
                self._give_up()
                raise NvmlSilent("the NVML worker has ended")
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _give_up(self) -> None:
        """Another one is started after a while, after a longer one each time."""
        self.end()
        self._not_before = time.monotonic() + self._again
        self._again = min(2 * self._again, MOST_AGAIN_SECONDS)

    def end(self) -> None:
        """End it; one that hangs in the driver is left to the kernel."""
        process, self._process = self._process, None
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        with contextlib.suppress(OSError):
            process.kill()
        try:
            process.wait(0.5)
        except subprocess.TimeoutExpired:
            self._hung.append(process)


class Cards:
    """What is known of this node's cards. `read` is called each tick, and waits for nobody."""

    def __init__(self, port: FilePort, library: str = "", *, nvidia: bool = True, amd: bool = False) -> None:
        self._port = port
        self.nvidia, self.amd = nvidia, amd
        self.worker = Worker(library)
        self._asked, self._closed = threading.Event(), False
        self._found: list[dict[str, Any]] = []
        self._good: dict[int, tuple[float, dict[str, Any]]] = {}
        """By index: when a card was read whole last, and what it was."""
        self.problem = ""
        self.driver = ""
        self.pids: dict[str, dict[int, int]] = {}
        """Of each workload, its processes on cards and when they started."""
        self.ran: dict[str, list[tuple[str, int | None]]] = {}
        """Of each card, the cgroups of the processes on it, and the share of time in which each one's kernels ran."""
        self.entries: dict[str, str] = {}
        """The policy's entry of each workload."""
        self._strange: dict[str, dict[tuple[int, int], float]] = {}
        """Card -> processes that are no workload's, and the reading at which each was that first."""
        self._thread = threading.Thread(target=self._serve, name="nvml", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while self._asked.wait() and not self._closed:
            self._asked.clear()
            amd = read_cards(self._port) if self.amd else []
            self._good |= {c["index"]: (c["at"], c) for c in amd}
            try:
                if not self.nvidia:
                    self._found = amd
                    continue
                answer = self.worker.ask(ask="read")
                self._good |= {c["index"]: (answer["at"], c) for c in answer["cards"] if not c["error"]}
                self._found, self.driver, self.problem = [*answer["cards"], *amd], answer["driver"], ""
            except NvmlSilent as error:
                self._fail(str(error))
            except Exception:  # a driver that answers nonsense is one that does not answer
                log.exception("nvml_failed")

    def _fail(self, problem: str) -> None:
        if problem not in (self.problem, WAITING):
            self.problem = problem
            log.warning("nvml_silent", why=problem)

    def read(self) -> None:
        """Have the cards read, beside everything else."""
        self._asked.set()

    def collect(self, targets: Iterable[Target]) -> dict[str, Card]:
        """The cards as they were read whole last, by UUID, with the workloads that are on them."""
        by_path = {t.path: t for t in targets if t.inodes}
        self.ran, self.pids, self.entries = {}, {}, {t.id: t.entry or t.name for t in by_path.values()}
        hierarchy = main_hierarchy(self._port)
        found = {}
        for now in self._found:
            if now["index"] not in self._good:
                continue
            at, raw = self._good[now["index"]]
            self.ran[raw["uuid"]] = []
            users, strange = self._users(raw["processes"], by_path, hierarchy, self.ran[raw["uuid"]])
            strangers = self._strangers(raw["uuid"], at, strange)
            memory = raw["memory"] or (None, None)
            found[raw["uuid"]] = Card(
                uuid=raw["uuid"],
                index=raw["index"],
                name=raw["name"],
                at_seconds=round(at, 6),
                memory_bytes=memory[0],
                memory_used_bytes=memory[1],
                percent=raw["percent"],
                mig=raw["mig"],
                virtual=raw["virtual"],
                mps=raw["mps"],
                counted=raw["counted"],
                driver="" if raw.get("preempts") else self.driver,
                limits=raw["limits"],
                watts=_watts(raw.get("power_mw")),
                limit_watts=_watts(raw.get("limit_mw")),
                set_watts=_watts(raw.get("set_mw")),
                least_watts=_watts((raw.get("limits_mw") or (None, None))[0]),
                most_watts=_watts((raw.get("limits_mw") or (None, None))[1]),
                pcie_bytes_per_second=tuple(map(round, raw["pcie"])) if raw.get("pcie") else None,
                preempts=raw.get("preempts", False),
                file=raw.get("file", ""),
                users=users,
                strangers=strangers,
                problem=self.problem or (f"NVML: {now['error']}" if now["error"] else ""),
            )
        return found

    def _users(
        self,
        processes: list[list[Any]],
        by_path: Mapping[str, Target],
        hierarchy: str,
        ran: list[tuple[str, int | None]],
    ) -> tuple[dict[str, CardUser], set[tuple[int, int]]]:
        users: dict[str, CardUser] = {}
        strange = set()
        for pid, started, memory, percent in processes:
            path = cgroup_of(self._port, pid, hierarchy)
            if path is None or start_time(self._port, pid) != started or has_ended(self._port, pid):
                continue  # it has ended since, and the pid may be another's
            ran.append((path, percent))
            while path not in by_path and path not in ("", "/"):
                path = path.rpartition("/")[0]
            target = by_path.get(path)
            if target is None:
                strange.add((pid, started))
                continue
            self.pids.setdefault(target.id, {})[pid] = started
            before = users.get(target.id)
            if before is None:
                users[target.id] = CardUser(memory_bytes=memory, percent=percent)
                continue
            both = None if memory is None or before.memory_bytes is None else memory + before.memory_bytes
            share = None if percent is None or before.percent is None else min(percent + before.percent, 100)
            users[target.id] = CardUser(processes=before.processes + 1, memory_bytes=both, percent=share)
        return users, strange

    def _strangers(self, uuid: str, at: float, strange: set[tuple[int, int]]) -> int:
        """How many of these were that at an earlier reading too: one that is about to end has left its cgroup."""
        known = self._strange.get(uuid, {})
        self._strange[uuid] = {process: known.get(process, at) for process in strange}
        return sum(since < at for since in self._strange[uuid].values())

    def close(self) -> None:
        """End the worker, whatever it does."""
        self._closed = True
        self._asked.set()
        self.worker.end()
        self._thread.join(1.0)


def _watts(milliwatts: int | None) -> float | None:
    return None if milliwatts is None else round(milliwatts / 1000, 3)
