"""Power limits of GPUs, set for workloads that ask for them, and what was found put back once they have ended.

Each is in the journal before it is set, and is read back afterwards: what counts is the limit in force, which may be
another one than was set. It outlives the agent as long as its workload's cgroup is occupied, so that a crash lifts no
cap; the guardian, or whoever starts next, puts it back. A limit that somebody else has changed meanwhile is theirs.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterable, Iterator
from functools import partial

import structlog

from colocate.actuate.driver import SETTING_SECONDS, Driver, DriverFailed
from colocate.actuate.journal import Entry, Journal
from colocate.actuate.workers import Workers
from colocate.cgroup.port import FilePort
from colocate.cgroup.tree import processes_anywhere
from colocate.errors import JournalBroken
from colocate.plan import GpuTarget, Plan
from colocate.snapshot import NodeSnapshot

log = structlog.get_logger()
AGAIN_SECONDS, LIFT_AGAIN_SECONDS = 60.0, 2.0
"""A cap that could not be set is tried again then; one that could not be lifted, for somebody is slowed by it."""
IN_FORCE_SECONDS, LOOK_SECONDS = 0.5, 0.005
"""For so long a driver may take to enforce what it has taken."""
LENDS_AGAIN_SECONDS = 5.0
"""After watts were taken back for somebody who starts: he is in the plan by then."""
COMES_SECONDS = 10.0
"""For so long a workload may take to be there after its cap was set."""
WARM = "warm"
"""The key of the first call, which starts the driver's worker: no container is to wait for that."""


class _Limit:
    """The limit of a card, as long as somebody is there who asks for one."""

    def __init__(self, found: str) -> None:
        self.found = found
        self.owners: dict[str, _Owner] = {}
        """By cgroup: the strictest counts."""
        self.ours: set[str] = set()
        """What it may be read to be as long as nobody else has set it."""
        self.at = 0.0
        """When it was set last, monotonic."""
        self.unsure = False
        """Whether it is being set, and has not been read back."""

    @property
    def wanted(self) -> str:
        """What is to be in force."""
        return min((self.found, *(owner.value for owner in self.owners.values())), key=int)  # asked is "at most"


class _Owner:
    """A cgroup for which a card is limited."""

    def __init__(self, value: str, own: str | None = None) -> None:
        self.value, self.since = value, time.monotonic()
        self.own = own
        """What it asked for, where it is lent more."""
        self.came = False
        """Whether anybody has been there."""


class Caps:
    """One node's. Values are milliwatts, as text."""

    def __init__(
        self, port: FilePort, journal: Journal, driver: Driver, library: str = "", *, shadow: bool = False
    ) -> None:
        self._port, self._journal, self._driver, self._library = port, journal, driver, library
        self._limits: dict[str, _Limit] = {}
        for entry in (e for e in journal.entries if e.kind == "cap" and not shadow):  # of an agent before this one
            limit = self._limits.setdefault(entry.file, _Limit(entry.found))
            limit.owners[entry.path] = _Owner(entry.wanted)
            limit.ours |= {entry.wanted, entry.found}  # it may have died before it set it
            limit.unsure = True
        self._refused: dict[str, tuple[float, str]] = {}
        """Card -> when its limit could not be set, and why."""
        self._theirs: dict[str, tuple[frozenset[str], str]] = {}
        """Card -> the cgroups whose cap somebody else has changed, and what was read then."""
        self._locks: dict[str, threading.Lock] = {}
        self._workers: Workers[None] = Workers()
        self._lending: set[str] = set()
        """Cards of which more is being lent right now."""
        self._lends_after = 0.0
        """Until then nobody has more than he asked for; monotonic."""
        self._warm = shadow

    def act(self, plan: Plan, snapshot: NodeSnapshot) -> None:
        """Set what the plan names, and put back what was found where nobody is left who asked for it."""
        self._workers.arrived()
        now = time.monotonic()
        for uuid, (at, _) in dict(self._refused).items():
            if now - at >= AGAIN_SECONDS:
                self._refused.pop(uuid, None)
        takes_limits = next((uuid for uuid, card in snapshot.cards.items() if card.least_watts is not None), "")
        if takes_limits and not self._warm:
            self._warm = True
            self._workers.submit(WARM, partial(self._start, takes_limits))
        lifted, wishes, own = self._wishes(plan, now)
        limits = dict(self._limits)  # workers change it meanwhile
        for uuid, asked in own.items():
            for path, owner in dict(limits[uuid].owners).items() if uuid in limits else ():
                if owner.value == wishes[uuid].get(path):  # of an agent before this one it is not known
                    owner.own = asked
        for limit in limits.values():
            for path, owner in dict(limit.owners).items():
                self._needed(path, owner)  # who has come and gone between two plans is not waited for
        every = {*wishes, *limits, *lifted}
        falls = {uuid for uuid in every if self._falls(uuid, wishes.get(uuid, {}))}
        waits = every - falls - lifted if plan.power_budget and falls else set[str]()  # but whoever is slowed unasked
        for uuid in every:
            if self._workers.busy(uuid) or uuid in waits:
                continue
            wanted, lift = wishes.get(uuid, {}), uuid in lifted
            if self._differs(uuid, wanted, lift, snapshot):
                self._lending |= {uuid} & own.keys()
                self._workers.submit(uuid, partial(self._try, uuid, wanted, lift=lift, own=own.get(uuid)))
        for uuid, (paths, _) in dict(self._theirs).items():
            if uuid not in wishes and not any(map(self._occupied, paths)):
                self._theirs.pop(uuid, None)

    def _wishes(self, plan: Plan, now: float) -> tuple[set[str], dict[str, dict[str, str]], dict[str, str]]:
        """The cards whose cap is to be lifted; what each cgroup is to have of each card; and what was asked for of
        those of which more is lent."""
        lifted, wishes, own = set[str](), dict[str, dict[str, str]](), dict[str, str]()
        for cap in plan.caps:
            if isinstance(cap.target, GpuTarget) and cap.watts is None:
                lifted.add(cap.target.uuid)
            elif isinstance(cap.target, GpuTarget) and cap.watts is not None:
                watts = cap.watts
                if cap.unboosted is not None and now >= self._lends_after:
                    own[cap.target.uuid] = milliwatts(cap.unboosted)
                elif cap.unboosted is not None:
                    watts = cap.unboosted
                wishes.setdefault(cap.target.uuid, {})[cap.path] = milliwatts(watts)
        return lifted, wishes, own

    def _falls(self, uuid: str, wishes: dict[str, str]) -> bool:
        """Whether a card is to draw less than it may by now."""
        limit = self._limits.get(uuid)
        least = min(map(int, self._still(uuid, wishes).values()), default=None)
        if least is None:
            return False
        return limit is None or not limit.owners or least < int(limit.wanted) or limit.unsure

    def limits(self) -> dict[str, float]:
        """The caps that are in force or about to be, in watts, by card."""
        limits = dict(self._limits)
        return {uuid: max(map(int, tuple(limit.ours))) / 1000 for uuid, limit in limits.items() if limit.owners}

    def _differs(self, uuid: str, wishes: dict[str, str], lift: bool, snapshot: NodeSnapshot) -> bool:
        """Whether anything is to be done about a card."""
        limit = self._limits.get(uuid)
        if uuid in self._refused and not (lift and time.monotonic() - self._refused[uuid][0] >= LIFT_AGAIN_SECONDS):
            return False
        if lift:
            return limit is not None
        owners = {path: owner.value for path, owner in limit.owners.items()} if limit is not None else {}
        if any(owners.get(path) != value for path, value in self._still(uuid, wishes).items()):
            return True
        return limit is not None and (
            limit.unsure
            or any(path not in wishes and not self._needed(path, owner) for path, owner in limit.owners.items())
            or self._changed(uuid, limit, snapshot)
        )

    def _still(self, uuid: str, wishes: dict[str, str]) -> dict[str, str]:
        """These wishes without those of cgroups whose cap somebody else has changed."""
        theirs, _ = self._theirs.get(uuid, (frozenset[str](), ""))
        return {path: value for path, value in wishes.items() if path not in theirs}

    def _changed(self, uuid: str, limit: _Limit, snapshot: NodeSnapshot) -> bool:
        """Whether a reading of after our setting shows another limit."""
        card = snapshot.cards.get(uuid)
        if card is None or card.set_watts is None or card.problem or card.at_seconds <= limit.at + LOOK_SECONDS:
            return False
        return milliwatts(card.set_watts) not in limit.ours

    def ended(self, path: str) -> None:
        """Nobody comes to this cgroup any more."""
        for limit in dict(self._limits).values():
            owner = limit.owners.get(path)
            if owner is not None:
                owner.came = True

    def _needed(self, path: str, owner: _Owner) -> bool:
        """Whether somebody is there for whom it was set, or may come: it is set before its workload starts."""
        occupied = self._occupied(path)
        owner.came = owner.came or occupied
        return occupied or (not owner.came and time.monotonic() - owner.since < COMES_SECONDS)

    def _occupied(self, path: str) -> bool:
        return bool(processes_anywhere(self._port, path))

    def _start(self, uuid: str) -> None:
        with contextlib.suppress(DriverFailed, OSError):
            self._driver.setting("get_power_limit", uuid=uuid)

    def set_now(self, uuid: str, watts: float, path: str, deadline: float) -> None:
        """Before a workload starts: a limit that is in force when this returns, until then (monotonic seconds).

        Raises DriverFailed, JournalBroken.
        """
        value = milliwatts(watts)
        try:
            with self._lock(uuid, max(deadline - time.monotonic(), 0.0)):
                self._settle(uuid, {path: value}, deadline=deadline)
        except OSError as error:
            raise DriverFailed(f"the driver's worker cannot be started: {error.strerror}") from error
        theirs = self._theirs.get(uuid)
        if theirs is not None and path in theirs[0] and int(theirs[1]) > int(value):
            raise DriverFailed(f"somebody else has set its limit to {int(theirs[1]) / 1000:g} W, which is left so")

    @contextlib.contextmanager
    def _lock(self, uuid: str, seconds: float) -> Iterator[None]:
        lock = self._locks.setdefault(uuid, threading.Lock())
        if not lock.acquire(timeout=seconds):
            raise DriverFailed(f"its limit is being set, and that takes longer than {seconds:.1f} s")
        try:
            yield
        finally:
            lock.release()

    def take_back(self, deadline: float) -> None:
        """Lower every card to which more is lent than was asked for, for somebody who starts; nothing more is lent for
        a while. Raises DriverFailed, JournalBroken."""
        self._lends_after = time.monotonic() + LENDS_AGAIN_SECONDS
        lent_on = {u for u, limit in dict(self._limits).items() if any(o.own for o in dict(limit.owners).values())}
        for uuid in lent_on | set(self._lending):  # also where a loan is on its way: it is seen once that has ended
            with self._lock(uuid, max(deadline - time.monotonic(), 0.0)):
                limit = self._limits.get(uuid)
                owners = dict(limit.owners) if limit is not None else {}
                lent = {path: owner.own for path, owner in owners.items() if owner.own is not None}
                if lent:
                    self._settle(uuid, lent, deadline=deadline)

    def _try(self, uuid: str, wishes: dict[str, str], *, lift: bool = False, own: str | None = None) -> None:
        try:
            with self._lock(uuid, AGAIN_SECONDS):
                if own is not None and time.monotonic() < self._lends_after:
                    return  # it was taken back meanwhile
                self._settle(uuid, wishes, lift=lift, own=own)
            self._refused.pop(uuid, None)
        except (DriverFailed, JournalBroken, OSError) as error:
            self._refused[uuid] = time.monotonic(), str(error)
            log.warning("power_not_capped", card=uuid, why=str(error))
        finally:
            self._lending.discard(uuid)

    def _settle(
        self,
        uuid: str,
        wishes: dict[str, str],
        *,
        lift: bool = False,
        deadline: float = math.inf,
        own: str | None = None,
    ) -> None:
        """These wishes too, without those of whom nobody is left; what was found, once there is none."""
        now = self._driver.setting("get_power_limit", seconds=left_until(deadline), uuid=uuid)
        limit = self._limits.get(uuid)
        if limit is not None and now not in limit.ours:
            self._give_up(uuid, limit, now)
            limit = None
        wishes = self._still(uuid, wishes)
        if limit is None and (lift or not wishes):
            return
        limit = limit or _Limit(now)
        stay = {p: o for p, o in limit.owners.items() if p not in wishes and not lift and self._needed(p, o)}
        kept = {p: o for p, o in limit.owners.items() if p in wishes and o.value == wishes[p]}
        fresh = {path: _Owner(value, own) for path, value in wishes.items() if path not in kept}
        if fresh:
            self._journal.add(*(self._entry(uuid, limit.found, path, owner) for path, owner in fresh.items()))
        limit.owners = {**stay, **kept, **fresh}
        self._limits[uuid] = limit
        limit.ours = {*limit.ours, now, limit.wanted}
        limit.unsure = True
        if now != limit.wanted:
            enforce(self._driver, uuid, limit.wanted, lower=bool(limit.owners), deadline=deadline)
        limit.ours, limit.at, limit.unsure = {limit.wanted}, time.monotonic(), False
        self._theirs.pop(uuid, None)
        if not limit.owners:
            del self._limits[uuid]
        self._note(uuid, limit)

    def _entry(self, uuid: str, found: str, path: str, owner: _Owner) -> Entry:
        return Entry(
            kind="cap",
            boot_id=self._journal.boot_id,
            hierarchy="nvml",
            path=path,
            file=uuid,
            found=found,
            wanted=owner.value,
            library=self._library,
        )

    def _note(self, uuid: str, limit: _Limit) -> None:
        """The journal has of a card one entry for each that is there."""
        mine = [self._entry(uuid, limit.found, path, owner) for path, owner in limit.owners.items()]
        if len(mine) != sum((e.kind, e.file) == ("cap", uuid) for e in tuple(self._journal.entries)):
            self._journal.keep(lambda e: (e.kind, e.file) != ("cap", uuid), *mine)

    def _give_up(self, uuid: str, limit: _Limit, now: str) -> None:
        """Somebody else has set it: nothing is put back any more, and nothing set for who is there now."""
        self._theirs[uuid] = frozenset(limit.owners), now
        log.warning("power_limit_changed", card=uuid, ours=limit.wanted, found=now, effect="it is left so")
        del self._limits[uuid]
        self._note(uuid, _Limit(now))

    def problems(self) -> dict[str, str]:
        """What an operator should know."""
        found = {f"power {u}": f"{u} is not capped: {why}" for u, (_, why) in dict(self._refused).items()}
        for uuid, (_, now) in dict(self._theirs).items():
            watts = f"{int(now) / 1000:g} W"
            found[f"power {uuid}"] = f"somebody else has set the power limit of {uuid} to {watts}: it is left so"
        return found

    def close(self) -> None:
        """Put back what nobody needs any more; the rest stays in the journal, for whoever comes next."""
        for uuid, limit in list(self._limits.items()):
            if not all(self._needed(path, owner) for path, owner in limit.owners.items()):
                self._try(uuid, {})
        self._driver.close()


def milliwatts(watts: float) -> str:
    """As a driver takes them."""
    return str(round(1000 * watts))


def left_until(deadline: float) -> float:
    """For how long a call may be waited for, in seconds."""
    return min(max(deadline - time.monotonic(), 0.0), SETTING_SECONDS)


def enforce(driver: Driver, uuid: str, value: str, *, lower: bool = True, deadline: float = math.inf) -> None:
    """Set a limit and read it back; with `lower` it is also in force when this returns. Raises DriverFailed."""
    after = driver.setting("set_power_limit", seconds=left_until(deadline), uuid=uuid, value=value)
    if after != value:
        raise DriverFailed(f"its limit was set to {value} mW and reads {after} mW")
    settled = min(deadline, time.monotonic() + IN_FORCE_SECONDS)

    def in_force() -> str:
        return driver.setting("get_enforced_limit", seconds=left_until(deadline), uuid=uuid)

    while lower and int(enforced := in_force()) > int(value):
        if time.monotonic() >= settled:
            raise DriverFailed(f"its limit was set to {value} mW, but {enforced} mW are in force")
        time.sleep(LOOK_SECONDS)


def put_back_caps(port: FilePort, entries: Iterable[Entry]) -> tuple[list[Entry], dict[str, str]]:
    """What a dead agent has set: the entries that stay, whose cgroups are occupied, and the cards that fail, with why.

    A card on which such a workload is keeps the strictest cap of theirs; every other gets what was found.
    """
    every, stay, failed = list(entries), list[Entry](), dict[str, str]()
    for library in sorted({e.library for e in every}):
        driver = Driver(library)
        left, why = _put_back(port, driver, [e for e in every if e.library == library])
        stay += left
        failed |= why
        driver.close()
    return stay, failed


def _put_back(port: FilePort, driver: Driver, entries: Iterable[Entry]) -> tuple[list[Entry], dict[str, str]]:
    by_card: dict[str, list[Entry]] = {}
    for entry in entries:
        by_card.setdefault(entry.file, []).append(entry)
    stay, failed = [], {}
    for uuid, them in by_card.items():
        last = {e.path: e for e in them}
        living = [e for e in last.values() if processes_anywhere(port, e.path)]
        stay += living
        found = them[0].found
        target = min((found, *(e.wanted for e in living)), key=int)
        try:
            now = driver.setting("get_power_limit", uuid=uuid)
            if now in {found, *(e.wanted for e in them)} and now != target:
                enforce(driver, uuid, target, lower=bool(living))
        except DriverFailed as error:
            failed[uuid] = str(error)
            stay += [e for e in them if e not in living]
    return stay, failed
