"""The queue: which gangs wait, in which order they are tried, and what each is told.

A gang is one entry. Broken gangs are repaired first, then priority, then age; a gang that does not fit is passed by,
and tried again only after its members or a node that could take one of them have changed. The first that waits for
room and could ever run gets a time-boxed reservation: those behind it may start where they leave it the room it waits
for (EASY backfill, Lifka 1995). What was tried is remembered in frozen `Waiting` entries; the clock is an argument.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import msgspec
import numpy as np

from colocate.objects import Pod, PodGroup
from colocate.podgroup.cluster import OPEN_PHASES, Cluster
from colocate.podgroup.explain import Shortage, shortage
from colocate.podgroup.gangs import Members, is_group, sort_members
from colocate.podgroup.holds import NOMINATED, SLOT, Holds
from colocate.podgroup.ledger import Holding
from colocate.podgroup.place import Gang, Member, Placed, Trial, classes_of, place
from colocate.podgroup.preempt import Preemption, preempt
from colocate.podgroup.shape import amounts

REQUIRED_TOPOLOGY = "colocate.io/required-topology"
PREFERRED_TOPOLOGY = "colocate.io/preferred-topology"
REST_SECONDS, MAX_REST_SECONDS = 10.0, 300.0
NOMINATION_SECONDS = 30.0
"""Beyond their grace period victims have so long to go, before other room is looked for."""
RETRY_SECONDS = 60.0
"""A gang that waits for room is tried again after so long though no node has changed: pods beside it may have."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator chooses."""

    schedulers: frozenset[str] = frozenset({"colocate"})
    topology: tuple[str, ...] = ("topology.kubernetes.io/zone", "topology.kubernetes.io/rack", "kubernetes.io/hostname")
    """Node labels from the broadest to the narrowest: gangs go into as few domains as they can."""
    timeout_seconds: int = 60
    """From the first bind to the last acceptance, where a PodGroup says nothing or 0."""
    creation_grace_seconds: float = 30.0
    """A group whose owner makes no more members for so long, though it has not reached its quorum, waits for its own
    start: what is there is started, with the room of the rest reserved."""
    slot_seconds: float = 60.0
    """For how long the place of a lost member is held for its replacement."""
    reserve_after_seconds: float = 60.0
    reservation_seconds: float = 600.0
    """The head's reservation lasts so long at most; as long again it has none."""


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """What is remembered of a gang that waits. Times are seconds of the caller's monotonic clock."""

    since: float
    reason: str = ""
    message: str = ""
    capacity: bool = False
    """Whether more capacity would help: an autoscaler is told so."""
    gain: int = -1
    """The cluster's gains when it was last tried; -1 if it was not."""
    tried: float = 0.0
    question: Gang | None = None
    """What the solver could not place."""
    reserved_at: float | None = None
    members_at: float = 0.0
    """When a member was last added."""
    created: int = 0


class Entry(NamedTuple):
    """One gang in the queue."""

    key: str
    members: Members
    group: PodGroup | None
    broken: bool
    need: int
    created: str

    @property
    def order(self) -> tuple[object, ...]:
        """Repairs, then priority, then age, then name."""
        return not self.broken, -self.members.priority, self.created, self.key


class Start(NamedTuple):
    """Bind these."""

    key: str
    placed: list[Placed]
    waited_seconds: float
    note: str = ""


class Evict(NamedTuple):
    """Delete these, to make room for a more important gang."""

    key: str
    preemption: Preemption


class Decisions(NamedTuple):
    """Of one cycle."""

    starts: list[Start]
    evictions: list[Evict]


Hopeless = dict[tuple[object, ...], tuple[int, Shortage]]
"""Within one cycle room only shrinks: signature -> a quorum that did not fit, and why."""


class Queue:
    """All gangs that wait."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.waiting: dict[str, Waiting] = {}
        self.order: list[str] = []
        """The gangs that wait, as they were last tried."""
        self._entries: dict[str, Entry] = {}
        self.holds = Holds()
        self._resting: dict[str, tuple[float, int]] = {}
        """Gang -> until when it is left alone, and how often that has been so."""

    def cycle(
        self, cluster: Cluster, dirty: set[str], now: float, budgets: Mapping[str, int] | None = None
    ) -> Decisions:
        """Look again at the gangs named and at those that a change can help; promise room to those that fit.

        `budgets` says of a pod's uid how many more pods of its PodDisruptionBudget may be disrupted.
        """
        slots = self.holds.keys(SLOT)
        self.holds.expire(cluster, now, {key for key in slots if not self._needs_slots(cluster, key)})
        for key in dirty:
            self._refresh(cluster, key, now)
        decided = Decisions([], [])
        hopeless: Hopeless = {}
        head: Entry | None = None
        entries = sorted(self._entries.values(), key=lambda e: e.order)
        self.order = [e.key for e in entries]
        for entry in entries:
            found = self._try(cluster, entry, head, hopeless, now, budgets or {})
            if isinstance(found, Start):
                decided.starts.append(found)
            elif isinstance(found, Evict):
                decided.evictions.append(found)
            elif head is None and self._reserves(cluster, entry, now):
                head = entry
        for start in decided.starts:
            self._refresh(cluster, start.key, now)
        return decided

    def next_look(self, now: float) -> float | None:
        """In how many seconds a gang must be looked at although nothing changes; None if none."""
        settings, due = self.settings, self.holds.ends + [at for at, _ in self._resting.values()]
        for memory in self.waiting.values():
            if memory.reason == "NotEnoughMembers":
                due.append(memory.members_at + settings.creation_grace_seconds)
            elif memory.question is not None:
                due += [memory.since + settings.reserve_after_seconds, memory.tried + RETRY_SECONDS]
        ahead = [at for at in due if at > now]
        return min(ahead) - now if ahead else None

    def rest(self, key: str, now: float) -> None:
        """A gang that was taken back is left alone for a while: 10 s, doubling to 5 minutes."""
        times = self._resting.get(key, (0.0, 0))[1] + 1
        self._resting[key] = (now + min(REST_SECONDS * 2 ** (times - 1), MAX_REST_SECONDS), times)

    # entries

    def _refresh(self, cluster: Cluster, key: str, now: float) -> None:
        """Build a gang's entry anew from its pods; what is promised or under way is not the queue's."""
        pods = [p for p in cluster.pods_of(key) if p.metadata.uid not in cluster.planned]
        group = cluster.groups.get(key)
        members = sort_members(pods, self.settings.schedulers)
        promised = sum(uid in cluster.planned for uid in cluster.members.get(key, ()))
        plan = cluster.plans.get(key)
        open_plan = plan is not None and plan.status.phase in (*OPEN_PHASES, "RollingBack")
        ours = bool(members.pending or members.gated)
        if promised or open_plan or not (ours or (group is not None and not members.satisfied)):
            self._entries.pop(key, None)
            self.waiting.pop(key, None)
            return
        least = group.spec.min_member if group is not None else 1
        need = max(least - members.satisfied, 0)
        broken = bool(members.bound) and need > 0
        first = min((p.metadata.creation_timestamp or "" for p in pods), default="")
        created = (group.metadata.creation_timestamp or "") if group is not None else first
        self._entries[key] = Entry(key, members, group, broken, need, created)
        before = self.waiting.get(key, Waiting(since=now, members_at=now))
        if members.created > before.created:
            before = msgspec.structs.replace(before, members_at=now)
        self.waiting[key] = msgspec.structs.replace(before, gain=-1, created=members.created)

    def _try(
        self,
        cluster: Cluster,
        entry: Entry,
        head: Entry | None,
        hopeless: Hopeless,
        now: float,
        budgets: Mapping[str, int],
    ) -> Start | Evict | None:
        memory = self.waiting[entry.key]
        refused = self._not_ready(cluster, entry, now)
        if refused is not None:
            self._tell(entry.key, *refused, capacity=False)
            return None
        if memory.question is not None and not self._could_help(cluster, memory, now):
            return None
        gang, note = self._question(cluster, entry)
        signature = _signature(gang)
        with self.holds.usable_by(cluster, entry.key):
            known = hopeless.get(signature)
            if known is not None and gang.quorum >= known[0]:
                placed, reason, message = None, "Unschedulable", known[1]._replace(quorum=gang.quorum).text
            else:
                placed, reason, message = self._room(cluster, gang, head, signature, hopeless)
        if not placed:
            self.waiting[entry.key] = msgspec.structs.replace(
                memory,
                reason=reason,
                message=message,
                capacity=reason != "BehindReservation",
                gain=cluster.gain,
                tried=now,
                question=gang,
            )
            return self._make_room(cluster, entry, gang, now, budgets) if reason == "Unschedulable" else None
        self.holds.drop(cluster, entry.key, NOMINATED)
        self.holds.drop(cluster, entry.key, SLOT, len(placed))
        for member, node in placed:
            cluster.promise(member.uid, node)
        return Start(entry.key, placed, now - memory.since, note)

    def _tell(self, key: str, reason: str, message: str, capacity: bool) -> None:
        self.waiting[key] = msgspec.structs.replace(
            self.waiting[key], reason=reason, message=message, capacity=capacity, question=None
        )

    # readiness

    def _not_ready(self, cluster: Cluster, entry: Entry, now: float) -> tuple[str, str] | None:
        """Why a gang cannot be tried yet, whatever room there is: reason and message."""
        members, group = entry.members, entry.group
        if now < self._resting.get(entry.key, (now, 0))[0]:
            plan = cluster.plans.get(entry.key)
            return "BackingOff", plan.status.message if plan is not None else "its last start was taken back"
        if is_group(entry.key) and group is None:
            return "PodGroupNotFound", f"there is no PodGroup {entry.key.partition('/')[2]} in this namespace"
        if group is not None and group.spec.min_member < 1:
            return "InvalidPodGroup", f"spec.minMember is {group.spec.min_member}: it must be at least 1"
        if group is not None:
            try:
                amounts(group.spec.min_resources)
            except ValueError as error:
                return "InvalidPodGroup", f"spec.minResources: {error}"
        if members.foreign:
            other = members.foreign[0]
            message = f"{other.metadata.name} has schedulerName {other.spec.scheduler_name}"
            ours = ", ".join(sorted(self.settings.schedulers))
            return "SchedulerNameMismatch", f"{message}: all members need {ours}"
        for pod in members.pending:
            shape = cluster.shape(pod)
            if shape.unsupported:
                return "UnsupportedConstraint", f"UnsupportedConstraint: {shape.unsupported} (pod {pod.metadata.name})"
        if len(members.pending) >= entry.need:
            return None
        if members.created >= members.satisfied + entry.need:
            gates = sorted({g.name for p in members.gated for g in p.spec.scheduling_gates})
            return "SchedulingGated", f"{len(members.gated)} members are held by scheduling gates: {', '.join(gates)}"
        if self._waits_for_itself(entry, now):
            return None
        least = entry.members.satisfied + entry.need
        return "NotEnoughMembers", f"{members.created} of {least} members exist"

    def _waits_for_itself(self, entry: Entry, now: float) -> bool:
        """The owner makes the missing members only after the others run (mpi-operator#608)."""
        members = entry.members
        owned = members.pending and all(p.metadata.owner_references for p in members.pending)
        still = now - self.waiting[entry.key].members_at >= self.settings.creation_grace_seconds
        return bool(owned) and still and not members.gated

    def _question(self, cluster: Cluster, entry: Entry) -> tuple[Gang, str]:
        """What the solver is asked for this entry, and what to say about it."""
        members, group, note = entry.members, entry.group, ""
        quorum = min(entry.need, len(members.pending))
        if quorum < entry.need:
            missing = entry.need - quorum
            note = f"CreationDependency: {missing} members are made only after the others run; their room is reserved"
        annotations = group.metadata.annotations if group is not None else {}
        preferred = annotations.get(PREFERRED_TOPOLOGY)
        gang = Gang(
            members=tuple(self.member(cluster, p) for p in members.pending),
            quorum=quorum,
            required_topology=annotations.get(REQUIRED_TOPOLOGY, ""),
            preferred_topology=(preferred,) if preferred else self.settings.topology,
            fixed=tuple(p.spec.node_name for p in members.bound),
            reserve=self._rest_of_min_resources(cluster, entry) if entry.need else {},
        )
        return gang, note

    def member(self, cluster: Cluster, pod: Pod) -> Member:
        """A pod as the solver sees it."""
        meta = pod.metadata
        return Member(meta.uid, meta.name, meta.namespace, cluster.shape(pod), meta.labels)

    def _rest_of_min_resources(self, cluster: Cluster, entry: Entry) -> dict[str, int]:
        """What minResources asks for beyond the members that exist."""
        if entry.group is None or not entry.group.spec.min_resources:
            return {}
        rest = amounts(entry.group.spec.min_resources)
        members = entry.members
        for pod in (*members.pending, *members.bound, *members.succeeded, *members.gated):
            for resource, amount in cluster.shape(pod).requests:
                if resource in rest:
                    rest[resource] -= amount
        return {resource: amount for resource, amount in rest.items() if amount > 0}

    # room

    def _could_help(self, cluster: Cluster, memory: Waiting, now: float) -> bool:
        """Whether a node that has changed since the last try could take one of the members."""
        if memory.reason == "BehindReservation" or memory.question is None or now - memory.tried >= RETRY_SECONDS:
            return True
        nodes = cluster.gained_since(memory.gain)
        if not nodes:
            return nodes is None
        ledger = cluster.ledger
        rows = sorted({ledger.rows[n] for n in nodes if n in ledger.rows})
        trial = Trial(ledger, np.ones(len(ledger.names), dtype=bool))
        groups = classes_of(memory.question.members, ledger)
        return any(bool(trial.room(g, trial.mask(g))[rows].any()) for g in groups)

    def _room(
        self, cluster: Cluster, gang: Gang, head: Entry | None, signature: tuple[object, ...], hopeless: Hopeless
    ) -> tuple[list[Placed] | None, str, str]:
        """Where a gang can go now; else the reason why not, and a message."""
        placed = place(cluster.ledger, gang)
        if placed is None:
            why = shortage(cluster.ledger, gang)
            hopeless[signature] = (gang.quorum, why)
            return None, "Unschedulable", why.text
        if not placed:
            return placed, "SurplusWaits", f"the quorum runs; {len(gang.members)} more members wait for room"
        if head is not None and not self._leaves_room(cluster, placed, head):
            return None, "BehindReservation", f"the room is reserved for {head.key}, which waits for more"
        return placed, "", ""

    def _reserves(self, cluster: Cluster, entry: Entry, now: float) -> bool:
        """Whether this entry waits for room, long enough, and could run if everything else ended."""
        memory = self.waiting[entry.key]
        if memory.reason != "Unschedulable" or memory.question is None:
            return False
        if now - memory.since < self.settings.reserve_after_seconds:
            return False
        began = now if memory.reserved_at is None else memory.reserved_at
        spent = now - began
        if spent >= 2 * self.settings.reservation_seconds:
            began, spent = now, 0.0
        self.waiting[entry.key] = msgspec.structs.replace(memory, reserved_at=began)
        return spent < self.settings.reservation_seconds and self._fits_an_empty_cluster(cluster, memory.question)

    def _make_room(
        self, cluster: Cluster, entry: Entry, gang: Gang, now: float, budgets: Mapping[str, int]
    ) -> Evict | None:
        """Victims for a gang that does not fit; its places are kept until they have gone."""
        found = None
        if entry.key in self.holds.keys(NOMINATED):
            message = "its victims have not gone yet"
        else:
            if not gang.quorum or any(p.spec.preemption_policy == "Never" for p in entry.members.pending):
                return None
            with self.holds.usable_by(cluster, entry.key):
                found = preempt(cluster, gang, entry.members.priority, budgets)
            if found is None:
                return None
            grace = max(p.spec.termination_grace_period_seconds or 30 for p in found.victims)
            self.holds.nominate(cluster, entry.key, found.placed, now + grace + NOMINATION_SECONDS)
            message = f"{len(found.victims)} pods of lower priority are leaving"
        memory = self.waiting[entry.key]
        told = {"reason": "WaitingForPreemption", "message": message, "capacity": False, "gain": cluster.gain}
        self.waiting[entry.key] = msgspec.structs.replace(memory, **told)
        return Evict(entry.key, found) if found is not None else None

    def lost(self, cluster: Cluster, holding: Holding, key: str, now: float) -> None:
        """A bound member of a gang is gone or has failed: keep its place for the one that replaces it."""
        if is_group(key):
            self.holds.keep_slot(cluster, holding, key, now + self.settings.slot_seconds)

    def _needs_slots(self, cluster: Cluster, key: str) -> bool:
        """Whether a gang lives and is below its quorum."""
        members, group = sort_members(cluster.pods_of(key), self.settings.schedulers), cluster.groups.get(key)
        return group is not None and 0 < members.satisfied < group.spec.min_member

    def _fits_an_empty_cluster(self, cluster: Cluster, gang: Gang) -> bool:
        with cluster.ledger.without(list(cluster.ledger.holdings)):
            return place(cluster.ledger, gang) is not None

    def _leaves_room(self, cluster: Cluster, placed: list[Placed], head: Entry) -> bool:
        """Whether the head still fits beside these when all that now runs has ended."""
        question = self.waiting[head.key].question
        ledger = cluster.ledger
        running = list(ledger.holdings)
        also = [Holding(m.uid, m.name, m.namespace, node, m.shape, m.labels) for m, node in placed]
        with ledger.with_also(also), ledger.without(running):
            return question is None or place(cluster.ledger, question) is not None


def _signature(gang: Gang) -> tuple[object, ...]:
    """Two gangs with equal signatures fit alike, but for the size of their quorum."""
    shapes = {id(m.shape): m.shape for m in gang.members}
    if len(shapes) > 1 or gang.fixed or gang.reserve:
        return (gang.members[0].uid,)
    member = gang.members[0]
    return id(member.shape), tuple(sorted(member.labels.items())), member.namespace, gang.required_topology
