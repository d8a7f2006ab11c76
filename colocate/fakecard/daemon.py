"""A fake card for real processes: the engine of `card.py` in real time, for whoever connects, and shown through NVML.

    python -P -m colocate.fakecard.daemon FOLDER

makes FOLDER/libnvidia-ml.so.1 and FOLDER/libcuda.so.1 (with a C compiler), FOLDER/state, which they read, and
FOLDER/socket, where processes come (`client.py`). It says `ready` once that is there, and ends with SIGTERM or when its
standard input closes; then nothing of it is left but the libraries.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import mmap
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
import uuid
from collections import deque
from pathlib import Path
from typing import Any

from colocate.fakecard.card import MILLISECOND, SECOND, Card, CardSpec, Client, Ring
from colocate.fakecard.shared import (
    CUDA,
    ENTRY,
    FAILED,
    FINISHED,
    HEAD,
    LIBRARY,
    LOCKED,
    MAGIC,
    MOST_DEVICES,
    MOST_PROCESSES,
    MOST_SAMPLES,
    MPS_CONTROL,
    RING_BYTES,
    RING_HEADER,
    SLOTS,
    SOCKET,
    STATE,
    WORD,
    DeviceState,
    State,
)

SAMPLE_NS = 200 * MILLISECOND
"""Between two samples of NVML's (measured on an H100: benchmarks/gpu)."""
LOOK_NS, IDLE_LOOK_NS = MILLISECOND, 5 * MILLISECOND
"""How often rings are looked at for launches that nobody waits for; and where nothing has run of late."""
NAME, DRIVER = "Simulated H100 80GB HBM3", "580.159.04"
_CREDENTIALS = struct.Struct("3i")
VERBS = {"lock": 1, "checkpoint": 2, "restore": 3, "unlock": 4, "state": 5, "terminate": 6}
"""Of cuda.c."""
ASKED, DONE = 2, 3
STATES = {"locking": 0, "locked": 1, "checkpointing": 1, "checkpointed": 2, "restoring": 2, "failed": 3}
"""CUprocessState; 0 is running."""
NO_SUCH_PROCESS, OUT_OF_MEMORY, ILLEGAL_STATE, NOT_READY = 1, 2, 401, 600
"""CUresult."""
UNIFIED, FREEZER = ("/sys/fs/cgroup/unified", "/sys/fs/cgroup"), ("/sys/fs/cgroup/freezer",)


def build_libraries(folder: Path) -> None:
    """What shows the state beside it as a driver does. Raises OSError or CalledProcessError without a C compiler."""
    here = Path(__file__).parent
    made = {LIBRARY: "nvml.c", CUDA: "cuda.c", MPS_CONTROL: "mps_control.c"}
    for name, file in made.items():
        source = here / file
        kind = ["-shared", "-fPIC", f"-Wl,-soname,{name}"] if name.startswith("lib") else []
        library = folder / name
        newest = max(f.stat().st_mtime for f in (source, here / "state.h"))
        if not library.exists() or library.stat().st_mtime < newest:
            fresh = folder / f"{name}.{os.getpid()}"
            command = ["cc", "-O2", "-Wall", "-Werror", *kind]
            subprocess.run([*command, "-o", str(fresh), str(source)], check=True)
            fresh.replace(library)


class Connected:
    """One process with a context: its ring, and what of it the engine has taken."""

    def __init__(self, link: socket.socket, ring: mmap.mmap, card: Card, client: Client, index: int) -> None:
        self.link, self.memory, self.card, self.client, self.index = link, ring, card, client, index
        self.taken = 0
        """Launches that the engine knows."""
        self._kernels: deque[tuple[int, int]] = deque()
        """(launches up to here, kernels up to there): where one launch is many kernels."""
        self.sampled_ns = 0.0
        self.held: list[dict[str, Any]] = []
        """What it has asked for while it was locked."""

    @property
    def ring(self) -> Ring:
        """The engine's."""
        return self.client.ring()

    def take(self) -> bool:
        """Take what has been launched since; whether something was. A locked one's launches wait."""
        head = WORD.unpack_from(self.memory, HEAD)[0]
        if head == self.taken or self.client.state != "running":
            return False
        ring = self.ring
        while self.taken < head:
            nanoseconds, kernels, graph = self._entry(self.taken)
            self.taken += 1
            while not graph and self.taken < head and self._entry(self.taken) == (nanoseconds, 1, 0):
                kernels += 1
                self.taken += 1
            self.card.launch(ring, kernels, nanoseconds, graph=bool(graph))
            self._kernels.append((self.taken, ring.launched))
        return True

    def _entry(self, index: int) -> tuple[int, int, int]:
        return ENTRY.unpack_from(self.memory, RING_HEADER + index % SLOTS * ENTRY.size)

    def publish(self) -> None:
        """How many of its launches have finished."""
        WORD.pack_into(self.memory, FINISHED, self.taken - self.ring.queued)
        while len(self._kernels) > 1 and self._kernels[0][1] <= self.ring.finished:
            self._kernels.popleft()

    def kernels_of(self, launches: int) -> int:
        """How many kernels have finished once so many launches have."""
        for upto, kernels in self._kernels:
            if upto >= launches:
                return kernels - (upto - launches)  # what is taken together is of one kernel each
        return self.ring.launched

    def say(self, **answer: object) -> None:
        """An answer, if it still listens."""
        with contextlib.suppress(OSError):
            self.link.send(json.dumps(answer).encode(), socket.MSG_DONTWAIT)


class Daemon:
    """All cards of one folder."""

    def __init__(
        self,
        folder: Path,
        cards: list[Card],
        *,
        driver: str = DRIVER,
        memory_limits: bool = False,
        persistence: bool = True,
    ) -> None:
        self._folder, self._cards = folder, cards
        self._began = time.monotonic_ns()
        self._clients: dict[int, Connected] = {}
        """By the descriptor of its socket."""
        self._sampled = 0
        self._gone_sm_ns = [0] * len(cards)
        self._drawn = [deque[tuple[float, int]](maxlen=SECOND // SAMPLE_NS) for _ in cards]
        self._active = 0
        self._asks: dict[int, int] = {}
        """By slot: when its time is over."""
        self._begun: set[int] = set()
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with contextlib.suppress(FileNotFoundError):
            (folder / SOCKET).unlink()
        self._listening.bind(str(folder / SOCKET))
        self._listening.listen(64)
        self._pending: dict[int, socket.socket] = {}
        fresh = folder / f"{STATE}.{os.getpid()}"
        fresh.write_bytes(bytes(ctypes.sizeof(State)))
        with fresh.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), ctypes.sizeof(State))
        fresh.replace(folder / STATE)
        self.state = State.from_buffer(self._memory)
        self.state.driver, self.state.device_count = driver.encode(), len(cards)
        self.state.memory_limits = memory_limits
        for i, card in enumerate(cards):
            device = self.state.devices[i]
            device.uuid = f"GPU-{uuid.uuid5(uuid.NAMESPACE_URL, f'{folder}/{i}')}".encode()
            device.name, device.memory_total = NAME.encode(), card.spec.memory_bytes
            device.mig = card.sharing == "mig"
            device.power_least_mw = round(1000 * card.spec.power.least)
            device.power_limit_mw = device.power_greatest_mw = round(1000 * card.spec.power.greatest)
            device.persistence = persistence
            device.power_mw = round(1000 * card.watts)  # it was there before its driver
        self._show(0)
        self.state.magic = MAGIC

    def run(self) -> None:
        """Until standard input closes."""
        while True:
            now = time.monotonic_ns() - self._began
            look = LOOK_NS if now - self._active < SECOND else IDLE_LOOK_NS
            due = min([now + look, *(c.next_event for c in self._cards)])
            waiting: list[Any] = [
                0,
                self._listening,
                *self._pending.values(),
                *(c.link for c in self._clients.values()),
            ]
            ready, _, _ = select.select(waiting, [], [], max(due - now, 0) / SECOND)
            if 0 in ready and not os.read(0, 4096):
                return
            now = time.monotonic_ns() - self._began
            for card in self._cards:
                card.run_until(now)
            self._limit()
            self._take(now)
            self._look_at_asks(now)
            for one in ready:
                self._hear(one)
            self._take(now)
            for connected in self._clients.values():
                connected.publish()
            self._show(now)

    def _take(self, now: int) -> None:
        for connected in self._clients.values():
            if connected.take():
                self._active = now

    def _hear(self, one: Any) -> None:
        if one is self._listening:
            link, _ = self._listening.accept()
            self._pending[link.fileno()] = link
        elif one == 0:
            return
        elif one.fileno() in self._pending:
            self._open(one)
        elif one.fileno() in self._clients:
            self._answer(self._clients[one.fileno()])

    def _open(self, link: socket.socket) -> None:
        del self._pending[link.fileno()]
        try:
            said, descriptors, _, _ = socket.recv_fds(link, 4096, 1)
            asked = json.loads(said)
            card = self._cards[asked["open"]]
            pid, _, _ = _CREDENTIALS.unpack(link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
            client = card.open(pid, asked.get("kind", ""), _cgroup_of(pid))
            ring = mmap.mmap(descriptors[0], RING_BYTES)
            os.close(descriptors[0])
        except (OSError, ValueError, LookupError):  # whoever connects may be no client of ours
            link.close()
            return
        client.ring(0, asked.get("share", 1.0))
        connected = Connected(link, ring, card, client, asked["open"])
        self._clients[link.fileno()] = connected
        connected.say(depth=card.spec.depth, launch_ns=card.spec.launch_ns)

    def _answer(self, connected: Connected) -> None:
        try:
            said = connected.link.recv(4096, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            said = b""
        if not said:
            if connected.card.sharing == "mps" and connected.client.work:  # killed in the middle of something
                for one in connected.card.fault(connected.client):
                    for other in self._clients.values():
                        if other.client is one:
                            WORD.pack_into(other.memory, FAILED, 1)
            self._gone(connected)
            return
        asked = json.loads(said)
        if connected.client.state in ("running", "failed"):
            self._do(connected, asked)
        else:
            connected.held.append(asked)

    def _do(self, connected: Connected, asked: dict[str, Any]) -> None:
        if "wait" in asked:
            connected.take()
            target = connected.kernels_of(asked["wait"])
            if connected.ring.finished >= target:
                self._finished(connected)
            else:
                connected.ring.watch(target, lambda: self._finished(connected))
        elif "malloc" in asked:
            connected.say(granted=connected.card.allocate(connected.client, asked["malloc"]))
        elif "free" in asked:
            connected.card.release(connected.client, asked["free"])
            connected.say(freed=True)
        elif "unlocked" in asked:
            connected.say(unlocked=True)

    def _limit(self) -> None:
        """Limits of power and memory, as they were set by NVML."""
        for device, card in zip(self.state.devices, self._cards, strict=False):
            card.limit(device.power_limit_mw / 1000)
            device.power_enforced_mw = round(1000 * card.limit_watts)
        for device, card in zip(self.state.devices, self._cards if self.state.memory_limits else (), strict=False):
            card.limits = {one.group.decode(): one.hard for one in device.limits if one.group}

    def _look_at_asks(self, now: int) -> None:
        """What is asked of processes through libcuda: each is begun once, and answered when it is done."""
        for slot, ask in enumerate(self.state.asks):
            if ask.stage != ASKED:
                continue
            if slot not in self._asks:
                self._asks[slot] = now + ask.timeout_ms * MILLISECOND
                self._active = now
            connected = next((c for c in self._clients.values() if c.client.pid == ask.pid), None)
            if connected is None:
                self._answered(slot, NO_SUCH_PROCESS)
            elif ask.verb == VERBS["state"]:
                self._answered(slot, 0, STATES.get(connected.client.state, 0))
            elif ask.verb == VERBS["terminate"]:
                self._gone(connected)
                self._answered(slot, 0)
            elif ask.verb == VERBS["unlock"]:
                self._unlock(slot, connected)
            elif ask.verb == VERBS["lock"]:
                self._lock_one(slot, connected, now)
            elif slot not in self._begun and not _frozen(ask.pid):  # its own threads take part in all of it
                self._begin(slot, ask.verb, connected)

    def _begin(self, slot: int, verb: int, connected: Connected) -> None:
        act = connected.card.checkpoint if verb == VERBS["checkpoint"] else connected.card.restore
        if act(connected.client, lambda: self._answered(slot, 0)):
            self._begun.add(slot)
        else:
            self._answered(slot, OUT_OF_MEMORY if connected.client.state == "checkpointed" else ILLEGAL_STATE)

    def _lock_one(self, slot: int, connected: Connected, now: int) -> None:
        client = connected.client
        if _frozen(client.pid):
            return  # as measured: it does not return before it is thawed, whatever its time-out
        if slot not in self._begun:
            connected.take()
            if not connected.card.lock(client, lambda: self._answered(slot, 0)):
                self._answered(slot, ILLEGAL_STATE)
                return
            self._begun.add(slot)
            WORD.pack_into(connected.memory, LOCKED, 1)
        elif self.state.asks[slot].timeout_ms and now > self._asks[slot]:
            connected.card.unlock(client)
            self._let_go(connected)
            self._answered(slot, NOT_READY)

    def _unlock(self, slot: int, connected: Connected) -> None:
        done = connected.card.unlock(connected.client)
        if done:
            self._let_go(connected)
        self._answered(slot, 0 if done else ILLEGAL_STATE)

    def _let_go(self, connected: Connected) -> None:
        WORD.pack_into(connected.memory, LOCKED, 0)
        held, connected.held = connected.held, []
        for asked in held:
            self._do(connected, asked)

    def _answered(self, slot: int, result: int, value: int = 0) -> None:
        if slot not in self._asks:
            return  # of a process that has ended meanwhile
        del self._asks[slot]
        self._begun.discard(slot)
        self.state.asks[slot].result, self.state.asks[slot].value = result, value
        self.state.asks[slot].stage = DONE

    def _gone(self, connected: Connected) -> None:
        """Its context ends, and all that was in it."""
        del self._clients[connected.link.fileno()]
        self._gone_sm_ns[connected.index] += int(connected.client.busy_ns * connected.ring.share)
        WORD.pack_into(connected.memory, FAILED, 1)
        connected.link.close()
        connected.card.close(connected.client)

    def _finished(self, connected: Connected) -> None:
        if connected.client.state == "failed":
            WORD.pack_into(connected.memory, FAILED, 1)
        connected.publish()
        connected.say(finished=True)

    def _show(self, now: int) -> None:
        """What NVML shows from now on."""
        self.state.sequence += 1
        sample = now - self._sampled >= SAMPLE_NS
        for i, card in enumerate(self._cards):
            device = self.state.devices[i]
            device.at_ns, device.busy_ns = now, int(card.busy_ns)
            device.sm_ns = self._gone_sm_ns[i] + sum(
                int(c.client.busy_ns * c.ring.share) for c in self._clients.values() if c.index == i
            )
            if sample:
                self._sample(device, i, now - self._sampled)
        if sample:
            self._sampled = now
            self._forget_limits()
        self.state.sequence += 1

    def _sample(self, device: DeviceState, index: int, elapsed: int) -> None:
        at_us = time.time_ns() // 1000
        busy = 0.0
        clients = [c for c in self._clients.values() if c.index == index]
        for connected in clients:
            used, connected.sampled_ns = connected.client.busy_ns - connected.sampled_ns, connected.client.busy_ns
            busy += used
            percent = round(100.0 * used / elapsed)
            if percent:
                sample = device.samples[device.sample_count % MOST_SAMPLES]
                sample.at_us, sample.pid, sample.percent = at_us, connected.client.pid, min(percent, 100)
                device.sample_count += 1
        self._measure_power(device, index, elapsed)
        device.percent = min(round(100.0 * busy / elapsed), 100)
        device.memory_used = sum(c.client.memory for c in clients)
        shown = clients[:MOST_PROCESSES]
        for process, connected in zip(device.processes, shown, strict=False):
            process.pid, process.memory = connected.client.pid, connected.client.memory
            process.busy_ns = int(connected.client.busy_ns)
            process.mps = connected.card.sharing == "mps"
        device.process_count = len(shown)

    def _measure_power(self, device: DeviceState, index: int, elapsed: int) -> None:
        """The mean of the last second, and the counter: as drivers from Ampere on tell it."""
        joules = self._cards[index].energy_joules
        self._drawn[index].append((joules - device.energy_mj / 1000, elapsed))
        drawn, seconds = (sum(x) for x in zip(*self._drawn[index], strict=True))
        device.power_mw, device.energy_mj = round(1000 * drawn / (seconds / SECOND)), round(1000 * joules)

    def _forget_limits(self) -> None:
        """Without persistence mode a driver forgets its settings when its last client ends."""
        readers = self.state.readers
        for i, pid in enumerate(readers):
            if pid and not Path(f"/proc/{pid}").exists():
                readers[i] = 0
        if not any(readers) and not self._clients:
            for device in self.state.devices[: len(self._cards)]:
                if not device.persistence:
                    device.power_limit_mw = device.power_greatest_mw

    def close(self) -> None:
        """Leave nothing but the library; whoever has the state mapped is told that the card is lost."""
        self.state.magic = 0
        for name in (SOCKET, STATE):
            (self._folder / name).unlink(missing_ok=True)


def _frozen(pid: int) -> bool:
    """Whether a process is, in either hierarchy: it cannot take part in anything."""
    with contextlib.suppress(OSError, IndexError):
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            for root in UNIFIED if not controllers else FREEZER if "freezer" in controllers.split(",") else ():
                for name, said in (("cgroup.events", "frozen 1"), ("freezer.state", "FROZEN")):
                    file = Path(f"{root}{path}/{name}")
                    if file.exists() and said in file.read_text().splitlines():
                        return True
    return False


def _cgroup_of(pid: int) -> str:
    """Of the unified hierarchy."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            if line.startswith("0::"):
                return line[3:]
    return ""


def main() -> int:
    """Serve cards until standard input closes."""
    parser = argparse.ArgumentParser(description="a fake card for real processes")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cards", type=int, default=1)
    parser.add_argument("--memory", type=int, default=CardSpec().memory_bytes, help="bytes of each")
    parser.add_argument("--driver", default=DRIVER, help="its version")
    parser.add_argument("--memory-limits", action="store_true", help="of cgroups, as drivers from r615 on have them")
    parser.add_argument("--no-persistence", action="store_true", help="settings go with the last client of the driver")
    parser.add_argument("--sharing", choices=("timeslice", "mps", "mig"), default="timeslice")
    options = parser.parse_args()
    if not 1 <= options.cards <= MOST_DEVICES:
        parser.error(f"--cards: 1 to {MOST_DEVICES}")
    options.folder.mkdir(parents=True, exist_ok=True)
    try:
        build_libraries(options.folder)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"fakecard: {LIBRARY} cannot be made: {error}: install a C compiler (gcc)", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with contextlib.suppress(OSError):  # a card does not wait for a CPU
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    cards = [Card(CardSpec(memory_bytes=options.memory), options.sharing) for _ in range(options.cards)]
    daemon = Daemon(
        options.folder,
        cards,
        driver=options.driver,
        memory_limits=options.memory_limits,
        persistence=not options.no_persistence,
    )
    gc.freeze()
    print("ready", flush=True)
    try:
        daemon.run()
    finally:
        daemon.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
