"""What a GPU driver is made to do, through a process of its own: the agent's and its guardian's end of it.

Processes are held by the driver's checkpoint interface (locked: no CUDA call of theirs gets through, their CPU side
goes on; checkpointed: what they had on the card is in the host's memory), and cards have settings. Everything is in the
journal before it is done. A driver that hangs or fails at holding a process is not asked again in this boot.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Iterable
from typing import Any, Literal

import structlog

from colocate.actuate.journal import Entry
from colocate.cgroup.child import end_child, start_child
from colocate.cgroup.port import FilePort
from colocate.cgroup.tree import start_time

log = structlog.get_logger()
Held = Literal["running", "locked", "checkpointed"]
HANG_SECONDS = 10.0
"""A step that takes longer hangs: a lock's time-out is five."""
CHECKPOINT_HANG_SECONDS = 120.0
"""Memory is moved at some 20 GB/s."""
SETTING_SECONDS = 3.0
UNDO_SECONDS = 15.0


class DriverFailed(Exception):  # noqa: N818 - it is the driver's state
    """It did not do what it was asked for, and why."""


class _Known:
    """A process that is held, or was."""

    def __init__(self, started: int) -> None:
        self.started = started
        self.wanted: Held = "running"
        self.wish = 0
        self.settled = True
        """Whether the worker has said, after the last wish, that nothing is left to be done."""
        self.state = "running"
        self.doing = ""
        self.doing_since = 0.0


class Driver:
    """The worker and what it said last. All methods may be called from any thread; none of them waits for a driver,
    but for `setting`."""

    def __init__(self, library: str = "", on_struck: Callable[[str], None] = lambda _why: None) -> None:
        """`library`: of NVML, where it is not found by itself; CUDA's is beside it then."""
        self._library, self._on_struck = library, on_struck
        self._process: subprocess.Popen[bytes] | None = None
        self._known: dict[int, _Known] = {}
        self._answers: dict[int, dict[str, Any]] = {}
        self._number = self._wishes = self._workers = 0
        """`_workers`: how many there have been."""
        self._lock, self._answered = threading.RLock(), threading.Condition()
        self.struck = ""
        """Why it holds no process any more; empty: it does."""
        self._closed = False
        self._dying: list[subprocess.Popen[bytes]] = []

    # processes

    def want(self, pid: int, started: int, state: Held) -> None:
        """Have a process brought to this; what it is in the end `states` tells."""
        with self._lock:
            known = self._known.get(pid)
            if known is None or known.started != started:
                if state == "running":
                    return
                known = self._known[pid] = _Known(started)
            if known.wanted == state or (self.struck and state != "running"):
                return
            known.wanted = state
            self._wish(pid, known)

    def _wish(self, pid: int, known: _Known) -> None:
        self._wishes += 1
        known.wish, known.settled = self._wishes, False
        self._send(pid=pid, started=known.started, want=known.wanted, wish=known.wish)

    def release(self, pid: int, started: int) -> None:
        """Have a process let go that somebody else has held."""
        with self._lock:
            known = self._known[pid] = _Known(started)
            known.state = "unknown"
            self._wish(pid, known)

    def state(self, pid: int) -> str:
        """As the driver said last: running, locked, checkpointed, failed, unknown."""
        with self._lock:
            return self._known[pid].state if pid in self._known else "running"

    def busy(self, pids: Iterable[int]) -> bool:
        """Whether a call for one of these processes is under way, or about to be: it may not be frozen now."""
        with self._lock:
            return any(pid in self._known and not self._known[pid].settled for pid in pids)

    def held(self) -> dict[int, tuple[int, Held]]:
        """pid -> (start time, what it shall be), of all that shall not run or do not yet."""
        with self._lock:
            kept = {p: k for p, k in self._known.items() if k.wanted != "running" or k.state not in ("running", "gone")}
            return {pid: (k.started, k.wanted) for pid, k in kept.items()}

    def look(self, now: float) -> None:
        """Once a tick: a step that hangs is the driver's end as a holder of processes."""
        with self._lock:
            for pid, known in self._known.items():
                patience = HANG_SECONDS if known.doing in ("lock", "unlock") else CHECKPOINT_HANG_SECONDS
                if known.doing and now - known.doing_since > patience:
                    self._strike(f"{known.doing} of process {pid} has not returned for {now - known.doing_since:.0f} s")
                    self._start_anew()
                    break

    def _strike(self, why: str) -> None:
        """Hold nobody any more, and let everybody go."""
        if not self.struck:
            log.error("driver_struck", why=why, effect="no process is locked any more in this boot")
            self.struck = why
            self._on_struck(why)
        for known in self._known.values():
            known.wanted = "running"

    def _repeat(self) -> None:
        """Say again what is wanted of each."""
        for pid, known in self._known.items():
            self._wish(pid, known)

    def _start_anew(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            process.kill()
            self._dying.append(process)  # it may be in the driver: that it ends is not waited for
        with self._answered:
            self._workers += 1
            self._answered.notify_all()
        self._dying = [p for p in self._dying if p.poll() is None]
        for known in self._known.values():
            known.doing, known.state = "", "unknown"
        self._repeat()

    # settings

    def setting(self, call: str, seconds: float = SETTING_SECONDS, **arguments: str) -> str:
        """A setting's value, after it was set or as it is. Waits for at most so long. Raises DriverFailed."""
        deadline, answer = time.monotonic() + seconds, None
        while answer is None:
            with self._lock:
                self._number += 1
                number, workers = self._number, self._workers
                self._send(number=number, call=call, **arguments)
            with self._answered:
                while number not in self._answers and workers == self._workers:
                    if not self._answered.wait(max(deadline - time.monotonic(), 0.0)):
                        break
                answer = self._answers.pop(number, None)
            if answer is None and time.monotonic() >= deadline:
                self._give_up(workers)
                raise DriverFailed(f"the driver did not answer {call} within {seconds:.1f} s")
        if "error" in answer:
            raise DriverFailed(f"{call}: {answer['error']}")
        return str(answer["value"])

    def _give_up(self, workers: int) -> None:
        """End a worker that does not answer, unless it holds processes: others are not to wait for its call."""
        with self._lock:
            if workers == self._workers and not self._known:
                self._start_anew()

    # the worker

    def _send(self, **wish: object) -> None:
        if self._closed:
            return
        if self._process is None or self._process.poll() is not None:
            self._process = self._start()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended: whoever listens to it knows
            self._process.stdin.write(json.dumps(wish).encode() + b"\n")
            self._process.stdin.flush()

    def _start(self) -> subprocess.Popen[bytes]:
        process = start_child("colocate.actuate.driver_worker", self._library)
        threading.Thread(target=self._listen, args=(process,), name="driver", daemon=True).start()
        return process

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with contextlib.suppress(ValueError, KeyError):  # whatever else a driver prints is no fact
                self._hear(json.loads(line))
        process.wait()
        with self._lock:
            if process is self._process and not self._closed:
                doing = [f"{k.doing} of process {pid}" for pid, k in self._known.items() if k.doing]
                if doing:
                    self._strike(f"its worker ended (code {process.returncode}) in {doing[0]}")
                self._start_anew()

    def _hear(self, fact: dict[str, Any]) -> None:
        if "number" in fact:
            with self._answered:
                self._answers[fact["number"]] = fact
                self._answered.notify_all()
            return
        with self._lock:
            known = self._known.get(fact["pid"])
            if known is None:
                return
            known.state, known.doing = fact["state"], fact.get("doing", "")
            if known.doing:
                known.doing_since = time.monotonic()
            elif fact.get("wish") == known.wish:
                known.settled = True
            if known.state == "gone" or (known.settled and known.state == "running" == known.wanted):
                self._known.pop(fact["pid"], None)
            if "error" in fact:
                self._strike(f"process {fact['pid']}: {fact['error']}")
                self._repeat()

    def close(self) -> bool:
        """Let everybody go, and end; whether all were let go in time."""
        with self._lock:
            for pid, known in list(self._known.items()):
                self.want(pid, known.started, "running")
            self._closed = True
            process, self._process = self._process, None
        return process is None or end_child(process, UNDO_SECONDS)


def process_entry(boot: str, path: str, pid: int, started: int, library: str) -> Entry:
    """What is in the journal before a process is held."""
    return Entry(
        kind="process", boot_id=boot, hierarchy="cuda", path=path, pid=pid, start_time=started, library=library
    )


def setting_entry(boot: str, uuid: str, call: str, group: str, found: str, wanted: str, library: str) -> Entry:
    """What is in the journal before a setting of a card is changed."""
    return Entry(
        kind="setting",
        boot_id=boot,
        hierarchy="nvml",
        path=group,
        file=f"{uuid} {call}",
        found=found,
        wanted=wanted,
        library=library,
    )


def undo(port: FilePort, entries: Iterable[Entry]) -> list[tuple[Entry, str]]:
    """Let held processes go and put settings back; what could not be undone, and why.

    A process that was frozen meanwhile is to be thawed first. A setting that somebody else changed since is theirs.
    """
    failed = []
    every = list(entries)
    for library in sorted({e.library for e in every}):
        driver = Driver(library)
        mine = [e for e in every if e.library == library]
        alive = [e for e in mine if e.kind == "process" and start_time(port, e.pid) == e.start_time]
        for entry in alive:
            driver.release(entry.pid, entry.start_time)
        settings: dict[tuple[str, str], list[Entry]] = {}
        for entry in mine:
            if entry.kind == "setting":
                settings.setdefault((entry.path, entry.file), []).append(entry)
        for (group, file), them in settings.items():
            try:
                uuid, name = file.split()
                put_back(driver, uuid, name, group, them[0].found, {e.wanted for e in them})
            except DriverFailed as error:
                failed += [(e, str(error)) for e in them]
        deadline = time.monotonic() + UNDO_SECONDS
        while driver.busy(e.pid for e in alive) and time.monotonic() < deadline:
            time.sleep(0.005)
        failed += [(e, f"is {driver.state(e.pid)}") for e in alive if driver.busy([e.pid])]
        driver.close()
    return failed


def put_back(driver: Driver, uuid: str, name: str, group: str, found: str, ours: Collection[str]) -> None:
    """Give a setting the value that was found, while it is still one of ours. Raises DriverFailed."""
    current = driver.setting(f"get_{name}", uuid=uuid, group=group)
    if current not in ours:
        return
    soft, hard = current.split()
    if soft != "0":  # what is kept for it goes first: a limit below it would be refused
        driver.setting(f"set_{name}", uuid=uuid, group=group, value=f"0 {hard}")
    driver.setting(f"set_{name}", uuid=uuid, group=group, value=found)
