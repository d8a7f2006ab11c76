"""What the GPU driver holds for a plan: processes that are locked or taken off their cards, and memory limits.

Everything is in the journal before it is done, in a worker's thread, so that no tick waits for the disk or the driver.
What is held and no longer asked for is let go here, whoever asked for it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from functools import partial

import structlog

from colocate.actuate.driver import Driver, DriverFailed, process_entry, put_back, setting_entry
from colocate.actuate.journal import Journal, boot_id
from colocate.actuate.statedir import StateDirectory
from colocate.actuate.workers import Workers
from colocate.cgroup.layout import UNIFIED
from colocate.cgroup.port import FilePort
from colocate.cgroup.tree import start_time
from colocate.errors import JournalBroken, StateTooNew
from colocate.plan import MemoryLimit, Plan
from colocate.snapshot import NodeSnapshot

log = structlog.get_logger()
STRUCK_FILE = "gpu-driver"
LIMITS_AGAIN_SECONDS = 60.0
"""A limit that could not be set is tried again then."""
MOST_DEAD_ENTRIES = 50
NO_LIMIT = (1 << 64) - 1
"""NVML_DEVICE_MEMORY_LIMIT_MAX (nvml.h)."""
Processes = Mapping[int, int]
"""pid -> start time."""


class Holds:
    """One node's."""

    def __init__(self, port: FilePort, journal: Journal, state: StateDirectory | None, library: str = "") -> None:
        self._port, self._journal, self._state, self._library = port, journal, state, library
        self.driver = Driver(library, self._remember)
        self.driver.struck = self._remembered()
        self._noted: set[tuple[int, int]] = set()
        """Processes that are in the journal, and when they started."""
        self._suspended: dict[str, tuple[set[str], dict[int, int]]] = {}
        """Workload -> the cards that it was on, and its processes."""
        self._limits: dict[tuple[str, str], tuple[str, str]] = {}
        """(card, cgroup) -> what we set and what was found."""
        self._refused: dict[tuple[str, str], tuple[float, str]] = {}
        """(card, cgroup) -> until when it is not tried again, and why."""
        self._workers: Workers[None] = Workers()

    # whether it is done at all

    def _remembered(self) -> str:
        if self._state is None:
            return ""
        with contextlib.suppress(StateTooNew):
            data = self._state.load(STRUCK_FILE)
            if data is not None and data.get("bootId") == boot_id():
                return str(data.get("why", ""))
        return ""

    def _remember(self, why: str) -> None:
        if self._state is not None:
            self._state.save(STRUCK_FILE, {"bootId": boot_id(), "why": why})

    @property
    def struck(self) -> str:
        """Why no process is held any more in this boot; empty: they are."""
        return self.driver.struck

    # processes

    def may_hold(self, path: str, processes: Processes) -> bool:
        """Whether these are in the journal; if not they will be."""
        new = {p: s for p, s in processes.items() if (p, s) not in self._noted}
        if new:
            self._workers.submit(f"note {path}", partial(self._note, path, new))
        return not new

    def _note(self, path: str, processes: dict[int, int]) -> None:
        boot = self._journal.boot_id
        try:
            self._journal.add(*(process_entry(boot, path, p, s, self._library) for p, s in processes.items()))
            self._noted |= set(processes.items())
            dead = [e for e in self._journal.entries if e.kind == "process" and not self._alive(e.pid, e.start_time)]
            if len(dead) > MOST_DEAD_ENTRIES:
                self._noted = {key for key in self._noted if self._alive(*key)}
                self._journal.keep(lambda e: e not in dead)
        except JournalBroken as error:
            log.warning("not_held", path=path, error=str(error))

    def _alive(self, pid: int, started: int) -> bool:
        return start_time(self._port, pid) == started

    def act(self, plan: Plan, snapshot: NodeSnapshot, on_cards: Mapping[str, dict[int, int]]) -> None:
        """Hold whom the plan suspends, let go whom nothing holds any more, and set the limits that it names."""
        self._workers.arrived()
        self.driver.look(time.monotonic())
        for id_ in plan.suspended:
            self._suspend(id_, snapshot, on_cards)
        for id_ in set(self._suspended) - set(plan.suspended):
            _, processes = self._suspended[id_]
            for pid, started in processes.items():
                self.driver.want(pid, started, "running")
            if not self.driver.busy(processes):
                del self._suspended[id_]
        locked = {i for i, pulses in plan.pulses.items() if all(p.by == "lock" for p in pulses)}
        kept = {pid for _, processes in self._suspended.values() for pid in processes}
        kept |= {pid for id_ in locked for pid in on_cards.get(id_, ())}
        for pid, (started, wanted) in self.driver.held().items():
            if pid not in kept and wanted != "running":
                self.driver.want(pid, started, "running")
        self._limit(plan, snapshot)

    def _suspend(self, id_: str, snapshot: NodeSnapshot, on_cards: Mapping[str, dict[int, int]]) -> None:
        processes = on_cards.get(id_, {})
        cards, known = self._suspended.get(id_, (set[str](), dict[int, int]()))
        cards |= {uuid for uuid, card in snapshot.cards.items() if id_ in card.users}
        known |= processes  # once it is off the card it is on no list any more
        known = {p: s for p, s in known.items() if self._alive(p, s)}
        if not known or id_ not in snapshot.workloads:
            self._suspended.pop(id_, None)
            return
        self._suspended[id_] = cards, known
        if self.may_hold(snapshot.workloads[id_].path, known):
            for pid, started in known.items():
                self.driver.want(pid, started, "checkpointed")

    def suspended(self, card: str) -> dict[str, str]:
        """Workloads that were on a card and are taken off it: `going`, `suspended`, or why that failed."""
        found = {}
        for id_, (cards, processes) in self._suspended.items():
            if card not in cards:
                continue
            states = {self.driver.state(pid) for pid in processes}
            found[id_] = self.struck or ("suspended" if states == {"checkpointed"} else "going")
        return found

    def waiting(self, plan: Plan, on_cards: Mapping[str, dict[int, int]]) -> frozenset[str]:
        """Workloads that may not be frozen just now: a call for one of their processes is under way."""
        freezes = {a.workload for a in plan.actions if a.knob == "cgroup.freeze" and a.value == "1"}
        held = {id_: processes for id_, (_, processes) in self._suspended.items()}
        return frozenset(i for i in freezes if self.driver.busy({**on_cards.get(i, {}), **held.get(i, {})}))

    # memory limits

    def _limit(self, plan: Plan, snapshot: NodeSnapshot) -> None:
        wanted = {}
        for limit in plan.limits:
            group = self._group_of(limit, snapshot)
            if group is not None:
                hard = NO_LIMIT if limit.hard_bytes is None else limit.hard_bytes
                wanted[limit.card, group] = f"{limit.soft_bytes} {hard}"
        now = time.monotonic()
        self._refused = {key: (until, why) for key, (until, why) in self._refused.items() if until > now}
        for key, value in wanted.items():
            known = self._limits.get(key)
            if (known is None or known[0] != value) and key not in self._refused:
                self._workers.submit(f"limit {key}", partial(self._set, *key, value))
        for key in set(self._limits) - set(wanted):
            self._workers.submit(f"limit {key}", partial(self._lift, *key))

    def _group_of(self, limit: MemoryLimit, snapshot: NodeSnapshot) -> str | None:
        workload = snapshot.workloads.get(limit.workload)
        return workload.path if workload is not None and UNIFIED in workload.inodes else None

    def _set(self, uuid: str, group: str, value: str) -> None:
        try:
            known = self._limits.get((uuid, group))
            found = known[1] if known else self.driver.setting("get_memory_limits", uuid=uuid, group=group)
            boot = self._journal.boot_id
            self._journal.add(setting_entry(boot, uuid, "memory_limits", group, found, value, self._library))
            after = self.driver.setting("set_memory_limits", uuid=uuid, group=group, value=value)
            self._limits[uuid, group] = value, found
            if after != value:
                raise DriverFailed(f"set {value}, reads back {after}")
        except (DriverFailed, JournalBroken) as error:
            self._refused[uuid, group] = time.monotonic() + LIMITS_AGAIN_SECONDS, str(error)
            log.warning("gpu_memory_not_limited", card=uuid, cgroup=group, why=str(error))

    def _lift(self, uuid: str, group: str) -> None:
        value, found = self._limits[uuid, group]
        try:
            put_back(self.driver, uuid, "memory_limits", group, found, {value})
            del self._limits[uuid, group]
            self._forget(group, f"{uuid} memory_limits")
        except (DriverFailed, JournalBroken) as error:
            log.warning("gpu_memory_limit_stays", card=uuid, cgroup=group, why=str(error))

    def _forget(self, path: str, file: str) -> None:
        self._journal.keep(lambda e: (e.kind, e.path, e.file) != ("setting", path, file))

    # the end

    def problems(self) -> dict[str, str]:
        """What an operator should mend."""
        found = {}
        if self.struck:
            found["gpu driver"] = f"batch is held by the freezer alone in this boot: {self.struck}"
        for (uuid, group), (_, why) in self._refused.items():
            found[f"gpu limit {uuid} {group}"] = f"{group}: its memory of {uuid} is not limited: {why}"
        return found

    def close(self) -> None:
        """Let everybody go and lift what was set; what could not be stays in the journal, for the guardian."""
        for key in list(self._limits):
            self._lift(*key)
        if self.driver.close():
            with contextlib.suppress(JournalBroken):
                self._journal.keep(lambda e: e.kind != "process")
