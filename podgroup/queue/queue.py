"""The queue: which gangs wait, in which order they are tried, and what each is told.

A gang is one entry. Priority comes first; within it quorums before members that are only wished for, broken gangs
first, then age. A gang that does not fit is passed by, and tried again only after its members or a node that could take
one of them have changed. The first that waits for room and could ever run claims what is free (backfill.py). What was
tried is remembered in frozen `Waiting` entries; the clock is an argument.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Set
from contextlib import ExitStack
from itertools import groupby

import msgspec
import numpy as np

from colocate.objects import Pod
from colocate.units import seconds_of, time_text
from podgroup.api import GangPlan, GangPlanStatus
from podgroup.queue.backfill import Head, claim
from podgroup.queue.decisions import Decisions, Elastic, Evict, Hopeless, PlaceInTurn, Start, Waiting
from podgroup.queue.entry import Entry, Order, Settings, elsewhere, entry_of, not_ready, question
from podgroup.queue.in_turn import FEW, InTurn
from podgroup.queue.kept_room import NOMINATED, SLOT, Holds
from podgroup.queue.memory import QueueMemory, RememberedGang
from podgroup.queue.min_resources import MinResources
from podgroup.queue.runtimes import Known, durations, runtime, starts_at
from podgroup.queue.victims import Victims
from podgroup.solve.place import place
from podgroup.solve.question import Gang, Placed, Trial, classes_of, is_simple, looked_at
from podgroup.solve.shortage import shortage
from podgroup.state.allocation import Holding
from podgroup.state.cluster import Cluster
from podgroup.state.gangs import is_group, sort_members

BACK_OFF_SECONDS, MAX_BACK_OFF_SECONDS, DOUBLINGS = 10.0, 300.0, 5
DELETED_SLOT_SECONDS = 10.0
"""For how long the place of a deleted member is kept: owners that want another one make it at once."""
NOMINATION_SECONDS = 30.0
"""Beyond their grace period victims have so long to go, before other room is looked for."""
RETRY_SECONDS = 60.0
"""A gang that waits for room is tried again after so long though no node has changed: pods beside it may have."""


class Queue:
    """All gangs that wait."""

    def __init__(
        self, settings: Settings, searches: int | None = None, place_in_turn: PlaceInTurn | None = None
    ) -> None:
        """`place_in_turn` decides many simple gangs at once (solve.sequence); without it one by one, and alike."""
        self.place_in_turn = place_in_turn
        self.settings = settings
        self.victims = Victims(searches)
        self._shadow: tuple[str, float | None] | None = None
        """The head of this cycle, and when it can start."""
        self._durations: Known | None = None
        self._head = ""
        self._elastic: list[Elastic] = []
        """Of the priority that is being decided."""
        self.waiting: dict[str, Waiting] = {}
        self.order: list[str] = []
        """The gangs that wait, as they were last tried."""
        self._entries: dict[str, Entry] = {}
        self._ranked: list[tuple[Order, Entry]] = []
        """The same, in their order."""
        self.unfinished = False
        """Whether the last cycle ran out of time: the next one goes on, and passes by what has been tried."""
        self._tried: set[str] = set()
        """What a pass that is unfinished has tried already."""
        self._helped: dict[tuple[object, ...], bool] = {}
        """Of this cycle: kind, and when it was tried -> whether a node that has changed since could take a member."""
        self.holds, self.owed = Holds(), MinResources(settings.reservation_seconds)
        self._backing_off: dict[str, tuple[float, int]] = {}
        self._taken_back: dict[str, str] = {}
        """Gang -> the last plan that was."""
        """Gang -> until when it is left alone, and how often that has been so."""

    def cycle(
        self,
        cluster: Cluster,
        dirty: set[str],
        now: float,
        put_off: Set[str] = frozenset(),
        out_of_time: Callable[[], bool] = lambda: False,
    ) -> Decisions:
        """Look again at the gangs named and at those that a change can help; promise room to those that fit.

        Gangs that are `put_off` have changed and will be looked at in a later cycle; what is reserved for them stands.
        Once it is `out_of_time` the rest is left `unfinished` to the next cycle, which begins with the first again.
        """
        for key in self.victims.begin(cluster, len(self._entries) + len(dirty)) & self.waiting.keys():
            self.waiting[key] = msgspec.structs.replace(self.waiting[key], gain=-1)
        self._shadow, self._durations = None, None
        slots = self.holds.keys(SLOT)
        self.holds.expire(cluster, now, {key for key in slots if not self._needs_slots(cluster, key)})
        decided = Decisions([], [], [])
        freed = self.owed.expire(now)
        for key in dirty:
            freed = self._refresh_safely(cluster, key, now, decided) or freed
        if freed:
            self._try_all_again()
        entries = [entry for _, entry in self._ranked]
        self.order = [e.key for e in entries]
        self._tried = self._tried - dirty if self.unfinished else set()
        self.unfinished, self._helped = False, {}
        with ExitStack() as claimed:
            self._decide(cluster, entries, now, put_off, decided, claimed, out_of_time)
        for start in decided.starts:
            self._refresh_safely(cluster, start.key, now, decided)
        return decided

    def _decide(
        self,
        cluster: Cluster,
        entries: list[Entry],
        now: float,
        put_off: Set[str],
        decided: Decisions,
        claimed: ExitStack,
        out_of_time: Callable[[], bool],
    ) -> None:
        """Try the entries in their order; what the head claims is held until `claimed` ends."""
        hopeless: Hopeless = {}
        head: Head | None = None
        for _, equal in groupby(entries, key=lambda e: e.priority):
            self._elastic = []
            in_turn = InTurn(list(equal))
            while in_turn.left:
                if self._start_in_turn(cluster, in_turn, put_off, hopeless, now, decided) and out_of_time():
                    self._out_of_time(cluster)
                    return
                entry = in_turn.next()
                if entry is None:
                    continue
                try:
                    later = entry.key in put_off or entry.key in self._tried
                    later = later or self._passes_by(cluster, entry, head, hopeless, now)
                    found = None if later else self._try(cluster, entry, head, hopeless, now)
                    self._tried.add(entry.key)
                    if found is None and head is None and self._reserves(cluster, entry, now):
                        head = self._claim(cluster, entry, now)
                        claimed.enter_context(cluster.ledger.with_also(head.claims))
                except Exception as error:  # noqa: BLE001 - see Decisions.failures
                    self._failed(cluster, entry.key, entry.members.pending, error, decided)
                    continue
                if isinstance(found, Start):
                    decided.starts.append(found)
                elif isinstance(found, Evict):
                    decided.evictions.append(found)
                if not later and out_of_time():
                    self._out_of_time(cluster)
                    return
            for elastic in self._elastic:
                try:
                    self._give_surplus(cluster, elastic)
                except Exception as error:  # noqa: BLE001 - see Decisions.failures
                    decided.failures.append((elastic.start.key, error))
        if (head.key if head is not None else "") != self._head:
            self._head = head.key if head is not None else ""
            self._room_was_unclaimed()

    def _out_of_time(self, cluster: Cluster) -> None:
        self.unfinished = True
        self._take_surplus_back(cluster)  # quorums come first; it waits for its turn

    def _failed(self, cluster: Cluster, key: str, pending: Iterable[Pod], error: Exception, decided: Decisions) -> None:
        """A gang could not be decided: what was promised to it is void, and its users are told."""
        decided.failures.append((key, error))
        for pod in pending:
            cluster.withdraw(pod.metadata.uid)
        self._tell(key, "InternalError", f"it could not be decided: {error!r}", capacity=False)

    def _refresh_safely(self, cluster: Cluster, key: str, now: float, decided: Decisions) -> bool:
        """Look at a gang again; whether it is owed less than before, so that there may be room for others."""
        try:
            self._refresh(cluster, key, now)
            return self._owed_less(cluster, key, now)
        except Exception as error:  # noqa: BLE001
            self._unrank(key)
            self.waiting.setdefault(key, Waiting(since=now, members_at=now))
            self._failed(cluster, key, (), error, decided)
            return False

    def _owed_less(self, cluster: Cluster, key: str, now: float) -> bool:
        if not self.owed.concerns(cluster, key):
            return False
        return self.owed.refresh(cluster, key, self.holds.shapes(cluster, key), now)

    def remember(self, cluster: Cluster, now: float) -> None:
        """Know since when each gang has waited: what a plan says of it, and when its youngest member was made."""
        for key in {*cluster.members, *cluster.groups}:
            plan, since = cluster.plans.get(key), now
            if plan is not None and plan.status.phase == "Waiting" and plan.status.waiting_since:
                since = min(seconds_of(plan.status.waiting_since) or now, now)
            pods = cluster.pods_of(key)
            made = [seconds_of(p.metadata.creation_timestamp) or now for p in pods]
            created = sort_members(pods, self.settings.schedulers).created
            self.waiting[key] = Waiting(since=since, members_at=min(max(made, default=now), now), created=created)
            if plan is not None:
                self._recall_plan(cluster, key, plan, now)

    def _recall_plan(self, cluster: Cluster, key: str, plan: GangPlan, now: float) -> None:
        """What a former leader wrote down of this gang, and not of a namesake. A claim that ran out begins anew."""
        status, group = plan.status, cluster.groups.get(key)
        if group is not None and plan.spec.pod_group_uid not in ("", group.metadata.uid):
            return
        self.holds.restore(cluster, key, status.kept_places, now)
        if status.taken_back:
            until = min(seconds_of(status.backing_off_until) or now, now + MAX_BACK_OFF_SECONDS)
            self._backing_off[key] = (until, status.taken_back)
        began = seconds_of(status.reserved_since)
        if status.waits and began is not None and now - began < self.settings.reservation_seconds:
            claimed = {"reserved_at": min(began, now), "claimed": status.reserved_members}
            self.waiting[key] = msgspec.structs.replace(self.waiting[key], **claimed)

    def in_plan(self, cluster: Cluster, key: str, status: GangPlanStatus) -> GangPlanStatus:
        """A plan's status with what a new leader needs to go on as this one would."""
        memory, (until, times) = self.waiting.get(key, Waiting(since=0.0)), self._backing_off.get(key, (0.0, 0))
        claims = status.waits and memory.reserved_at is not None
        return msgspec.structs.replace(
            status,
            kept_places=self.holds.places(cluster, key),
            taken_back=times,
            backing_off_until=time_text(until) if times else None,
            reserved_since=time_text(memory.reserved_at or 0.0) if claims else None,
            reserved_members=memory.claimed if claims else 0,
        )

    def memory(self, cluster: Cluster, now: float) -> QueueMemory:
        """What the next cycle goes by; that one tries every gang anew, as whoever recalls this will."""
        self._try_all_again()
        self.unfinished = False
        going, left_over = self.victims.remembered()
        return QueueMemory(
            now=now,
            searches=self.victims.most,
            gangs={k: msgspec.convert(m, RememberedGang, from_attributes=True) for k, m in self.waiting.items()},
            backing_off=dict(self._backing_off),
            kept=self.holds.remembered(cluster),
            promised=dict(cluster.planned),
            volumes={uid: dict(chosen) for uid, chosen in cluster.storage.chosen.items() if chosen},
            going=going,
            left_over=left_over,
        )

    def recall(self, cluster: Cluster, memory: QueueMemory) -> None:
        """Go on from what another queue remembered."""
        self.waiting = {key: Waiting(**msgspec.structs.asdict(m)) for key, m in memory.gangs.items()}
        self._backing_off = dict(memory.backing_off)
        for uid, node in memory.promised.items():
            if uid in memory.volumes:
                cluster.storage.remember(uid, memory.volumes[uid])
            cluster.promise(uid, node)
        self.holds.recall(cluster, memory.kept)
        self.victims.recall(memory.going, memory.left_over)

    def next_look(self, now: float) -> float | None:
        """In how many seconds a gang must be looked at although nothing changes; None if none."""
        settings, due = self.settings, self.holds.ends + self.owed.ends
        due += [at for at, _ in self._backing_off.values()]
        for memory in self.waiting.values():
            if memory.reason == "NotEnoughMembers":
                due.append(memory.members_at + settings.creation_grace_seconds)
            elif memory.question is not None:
                due += [memory.since + settings.reserve_after_seconds, memory.tried + RETRY_SECONDS]
        ahead = [at for at in due if at > now]
        return min(ahead) - now if ahead else None

    def back_off(self, key: str, now: float, plan_id: str = "") -> None:
        """A gang that was taken back is left alone for a while: 10 s, doubling to 5 minutes; once for a plan."""
        if plan_id and self._taken_back.get(key) == plan_id:
            return  # its end was not written down at the first try
        self._taken_back[key] = plan_id
        times = self._backing_off.get(key, (0.0, 0))[1] + 1
        self._backing_off[key] = (
            now + min(BACK_OFF_SECONDS * 2 ** min(times - 1, DOUBLINGS), MAX_BACK_OFF_SECONDS),
            times,
        )

    def forget_back_off(self, key: str) -> None:
        """A gang has started, or is no more: what went wrong before is forgotten."""
        self._backing_off.pop(key, None)
        self._taken_back.pop(key, None)

    def _backs_off(self, cluster: Cluster, key: str, now: float) -> tuple[str, str] | None:
        if now >= self._backing_off.get(key, (now, 0))[0]:
            return None
        plan = cluster.plans.get(key)
        return "BackingOff", plan.status.message if plan is not None else "its last start was taken back"

    # entries

    def _refresh(self, cluster: Cluster, key: str, now: float) -> None:
        """Build a gang's entry anew from its pods."""
        entry = entry_of(cluster, key, self.settings)
        if entry is None:
            self._forget(cluster, key)
            return
        self._unrank(key)
        self._entries[key] = entry
        insort(self._ranked, (entry.order, entry))  # no two orders are equal
        before = self.waiting.get(key, Waiting(since=now, members_at=now))
        if entry.members.created > before.created:
            before = msgspec.structs.replace(before, members_at=now)
        self.waiting[key] = msgspec.structs.replace(before, question=None, created=entry.members.created)

    def _unrank(self, key: str) -> None:
        """Take a gang's former entry out of the order."""
        former = self._entries.pop(key, None)
        if former is not None:
            del self._ranked[bisect_left(self._ranked, (former.order, former))]

    def _forget(self, cluster: Cluster, key: str) -> None:
        self._unrank(key)
        self.waiting.pop(key, None)
        if not any(uid in cluster.planned for uid in cluster.members.get(key, ())):
            self.holds.drop(cluster, key, NOMINATED)  # whoever wanted the places has gone or runs
        if key not in cluster.groups and not cluster.members.get(key):
            self.forget_back_off(key)

    def _try_all_again(self) -> None:
        """Room that was kept for one is free to all: no node has changed, and yet more may fit."""
        self._tried.clear()
        self.waiting = {key: msgspec.structs.replace(memory, gain=-1) for key, memory in self.waiting.items()}

    def _start_in_turn(
        self,
        cluster: Cluster,
        in_turn: InTurn,
        put_off: Set[str],
        hopeless: Hopeless,
        now: float,
        decided: Decisions,
    ) -> bool:
        """Start what comes next in one question to the solver, up to the first that does not fit; whether it was asked.

        Only who has not been tried is asked so, and what is simple: what each of them is told is the same.
        """
        if in_turn.alone:
            return False
        if self.place_in_turn is None:
            in_turn.none_of(len(in_turn.left))
            return False
        asked: list[Gang] = []
        for entry in in_turn.ahead():
            gang = None if entry.key in put_off else self._simple(cluster, entry, hopeless, now)
            if gang is None:
                break
            asked.append(gang)
        if len(asked) < FEW:
            in_turn.none_of(len(asked))
            return False
        try:
            found = self.place_in_turn(cluster.ledger, asked, True)
        except Exception as error:  # noqa: BLE001
            decided.failures.append((in_turn.left[0].key, error))
            in_turn.none_of(len(asked))
            return False  # each by itself will tell whose fault it is
        for placed in found:
            if placed is None:
                in_turn.none_of(1)
                break
            entry = in_turn.started()
            for member, node in placed:
                cluster.promise(member.uid, node)
            decided.starts.append(Start(entry.key, placed, now - self.waiting[entry.key].since))
        return True

    def _simple(self, cluster: Cluster, entry: Entry, hopeless: Hopeless, now: float) -> Gang | None:
        """What is asked for an entry that has not been tried and that nothing is kept for; None if it is not simple."""
        memory, members = self.waiting[entry.key], entry.members
        if memory.question is not None or not members.pending or members.bound or entry.key in self._backing_off:
            return None
        if self.holds.any_for(entry.key) or self.owed.against(entry.key, entry.priority):
            return None
        if not_ready(cluster, entry, self.settings, now - memory.members_at) is not None:
            return None
        gang, note = question(cluster, entry, self.settings, ())
        if note or not is_simple(gang):
            return None
        keys = cluster.ledger.repelling_keys
        known = hopeless.get(gang.signature(keys))
        if known is not None and gang.quorum >= known[0]:
            return None
        first = looked_at(gang.members[0], keys)
        return gang if not keys or all(looked_at(m, keys) == first for m in gang.members[1:]) else None

    def _passes_by(self, cluster: Cluster, entry: Entry, head: Head | None, hopeless: Hopeless, now: float) -> bool:
        """Whether a gang that did not fit need not be asked again: nothing has changed for its kind since."""
        memory = self.waiting[entry.key]
        if memory.question is None or memory.reason == "BehindReservation" or self.holds.any_for(entry.key):
            return False
        known, quorum = hopeless.get(memory.kind), memory.question.quorum
        vain = not self._may_evict(cluster, entry) or self.victims.in_vain(memory.kind, quorum, entry.priority)
        if known is not None and quorum >= known[0] and vain:
            told = {"gain": cluster.gain, "tried": now}
            self.waiting[entry.key] = msgspec.structs.replace(memory, **told)
            return True
        if now - memory.tried >= RETRY_SECONDS:
            return False
        if memory.gain == cluster.gain:
            return True
        since = (*memory.kind, memory.gain, cluster.gain)
        if since not in self._helped:
            with cluster.ledger.without(head.held if head is not None else []):
                self._helped[since] = self._could_help(cluster, memory, now)
        return not self._helped[since]

    def _may_evict(self, cluster: Cluster, entry: Entry) -> bool:
        """Whether somebody might go for it."""
        return entry.broken or min(cluster.priorities, default=entry.priority) < entry.priority

    def _try(
        self, cluster: Cluster, entry: Entry, head: Head | None, hopeless: Hopeless, now: float
    ) -> Start | Evict | None:
        memory = self.waiting[entry.key]
        refused = self._backs_off(cluster, entry.key, now)
        refused = refused or not_ready(cluster, entry, self.settings, now - memory.members_at)
        refused = refused or self._gives_way(entry)
        if refused is not None:
            self._tell(entry.key, *refused, capacity=False)
            return None
        if self.holds.any_for(entry.key):
            with self.holds.usable_by(cluster, entry.key, entry.priority):
                if memory.question is not None and not self._could_help(cluster, memory, now):
                    return None
        owed = self.owed.against(entry.key, entry.priority)
        gang, note = question(cluster, entry, self.settings, owed)
        kind = gang.signature(cluster.ledger.repelling_keys)
        with self.holds.usable_by(cluster, entry.key, entry.priority):
            known = hopeless.get(kind)
            if known is not None and gang.quorum >= known[0] and not self.holds.any_for(entry.key):
                placed, reason, message = None, "Unschedulable", known[1]._replace(quorum=gang.quorum).text
            else:
                placed, reason, message = self._room(cluster, gang, kind, head, hopeless, now)
                if placed is None and gang.quorum:
                    placed = self._instead_of_surplus(cluster, gang, hopeless)
        if not placed:
            self.waiting[entry.key] = msgspec.structs.replace(
                memory,
                reason=reason,
                message=message,
                capacity=reason != "BehindReservation",
                gain=cluster.gain,
                tried=now,
                question=gang,
                kind=kind,
            )
            return self._make_room(cluster, entry, gang, now) if reason == "Unschedulable" else None
        self.holds.drop(cluster, entry.key, NOMINATED)
        self.holds.drop_slots(cluster, entry.key, [node for _, node in placed])
        cluster.promise_all((member.uid, node) for member, node in placed)
        self._owed_less(cluster, entry.key, now)
        start = Start(entry.key, placed, now - memory.since, note)
        if gang.quorum and len(gang.members) > gang.quorum and not entry.owed:
            self._elastic.append(Elastic(start, gang))
        return start

    def _gives_way(self, entry: Entry) -> tuple[str, str] | None:
        """A quorum that is about to go gets no more members: they would be left alone."""
        going = sum(self.victims.going(p.metadata.uid) for p in entry.members.bound)
        least = entry.group.spec.min_member if entry.group is not None else 1
        if entry.need or not going or entry.members.satisfied - going >= least:
            return None
        return "SurplusWaits", "its members make room for a more important gang"

    def _instead_of_surplus(self, cluster: Cluster, gang: Gang, hopeless: Hopeless) -> list[Placed] | None:
        """Room for a quorum that equally important gangs have just been given beyond theirs: it is taken back."""
        surplus = [one.member.uid for elastic in self._elastic for one in elastic.surplus]
        if not surplus:
            return None
        with cluster.ledger.without(surplus):
            placed = place(cluster.ledger, gang)
        if placed is None:
            return None
        hopeless.clear()  # there is more room than when they were asked
        self._take_surplus_back(cluster)
        return placed

    def _take_surplus_back(self, cluster: Cluster) -> None:
        for elastic in self._elastic:
            for one in elastic.surplus:
                cluster.withdraw(one.member.uid)
                elastic.start.placed.remove(one)

    def _room_was_unclaimed(self) -> None:
        """Another gang is the head, or none: what was claimed may help those that are only wished for."""
        for key, memory in self.waiting.items():
            if memory.reason == "SurplusWaits":
                self.waiting[key] = msgspec.structs.replace(memory, gain=-1)

    def _give_surplus(self, cluster: Cluster, elastic: Elastic) -> None:
        """What is left once all quorums of this priority were tried goes to members beyond a quorum."""
        there = {one.member.uid for one in elastic.start.placed}
        left, nodes = [m for m in elastic.gang.members if m.uid not in there], [o.node for o in elastic.start.placed]
        wished = elastic.gang._replace(
            members=tuple(left), quorum=0, min_resources={}, fixed=(*elastic.gang.fixed, *nodes)
        )
        found = place(cluster.ledger, wished) or [] if left else []
        cluster.promise_all((one.member.uid, one.node) for one in found)
        elastic.start.placed.extend(found)

    def _tell(self, key: str, reason: str, message: str, capacity: bool) -> None:
        self.waiting[key] = msgspec.structs.replace(
            self.waiting[key], reason=reason, message=message, capacity=capacity, question=None
        )

    # room

    def _could_help(self, cluster: Cluster, memory: Waiting, now: float) -> bool:
        """Whether a node that has changed since the last try could take one of the members."""
        if memory.reason == "BehindReservation" or memory.question is None or now - memory.tried >= RETRY_SECONDS:
            return True
        nodes = cluster.gained_since(memory.gain)
        if not nodes:
            return nodes is None
        if memory.question.leave:
            return True  # what is free on nodes that it cannot use helps those that it must leave room for
        ledger = cluster.ledger
        rows = sorted({ledger.rows[n] for n in nodes if n in ledger.rows})
        trial = Trial(ledger, np.ones(len(ledger.names), dtype=bool))
        groups = classes_of(memory.question.members, ledger)
        if any(ledger.budgeted(g.shape) for g in groups):
            return True  # what is free on one node of a budget may help on another
        return any(bool(trial.room(g, trial.mask(g))[rows].any()) for g in groups)

    def _room(
        self,
        cluster: Cluster,
        gang: Gang,
        kind: tuple[object, ...],
        head: Head | None,
        hopeless: Hopeless,
        now: float,
    ) -> tuple[list[Placed] | None, str, str]:
        """Where a gang can go now; else the reason why not, and a message."""
        placed = place(cluster.ledger, gang)
        if placed is None and gang.quorum == 0:
            placed = []  # nothing is owed to others by members that are only wished for
        if placed is None:
            with cluster.ledger.without(head.held if head is not None else []):
                placed = place(cluster.ledger, gang) if head is not None else None
                if placed is None:
                    why = shortage(cluster.ledger, gang)
                    hopeless[kind] = (gang.quorum, why)
                    return None, "Unschedulable", why.text
                if head is not None and not self._ends_before(cluster, placed, head, now):
                    return None, "BehindReservation", f"the room is reserved for {head.key}, which waits for more"
        if not placed:
            return placed, "SurplusWaits", f"the quorum runs; {len(gang.members)} more members wait for room"
        return placed, "", ""

    def _reserves(self, cluster: Cluster, entry: Entry, now: float) -> bool:
        """Whether this entry waits for room, long enough, and could run if everything else ended."""
        memory = self.waiting[entry.key]
        if memory.reason != "Unschedulable" or memory.question is None:
            return False
        if now - memory.since < self.settings.reserve_after_seconds:
            return False
        began = now if memory.reserved_at is None else memory.reserved_at
        spent, most = now - began, memory.claimed
        if spent >= 2 * self.settings.reservation_seconds:
            began, spent, most = now, 0.0, 0
        self.waiting[entry.key] = msgspec.structs.replace(memory, reserved_at=began, claimed=most)
        return spent < self.settings.reservation_seconds and self._fits_an_empty_cluster(cluster, memory.question)

    def _claim(self, cluster: Cluster, entry: Entry, now: float) -> Head:
        """What the head claims; as long as that grows, its time has not begun."""
        memory = self.waiting[entry.key]
        assert memory.question is not None, "only who was asked about can wait for room"
        head, members = claim(cluster.ledger, entry.key, memory.question)
        if members > memory.claimed:
            self.waiting[entry.key] = msgspec.structs.replace(memory, reserved_at=now, claimed=members)
        return head

    def _make_room(self, cluster: Cluster, entry: Entry, gang: Gang, now: float) -> Evict | None:
        """Victims for a gang that does not fit; its places are kept until they have gone."""
        found = None
        message = "its victims have not gone yet"
        if not self.makes_room(entry.key):
            found = self.victims.find(cluster, entry, gang, self._yielding(entry, now), self.holds, now)
            if found is None:
                return None
            grace = max((p.spec.termination_grace_period_seconds or 30 for p in found.victims), default=30)
            self.holds.nominate(cluster, entry.key, found.placed, now + grace + NOMINATION_SECONDS, entry.priority)
            message = "pods that are leaving make room"
            if found.victims:
                message = f"{len(found.victims)} pods of lower priority are leaving"
        memory = self.waiting[entry.key]
        told = {"reason": "WaitingForPreemption", "message": message, "capacity": False, "gain": cluster.gain}
        self.waiting[entry.key] = msgspec.structs.replace(memory, **told)
        return Evict(entry.key, found) if found is not None and found.victims else None

    def _yielding(self, entry: Entry, now: float) -> frozenset[str]:
        """The gangs that are broken as this one is, and come after it: of two that each lack a member, one must go.

        Not before the places of lost members have been held for their time.
        """
        if not entry.broken:
            return frozenset()
        return frozenset(
            other.key
            for other in self._entries.values()
            if other.broken and other.order > entry.order and self._waits_in_vain(other.key, now)
        )

    def _waits_in_vain(self, key: str, now: float) -> bool:
        memory = self.waiting.get(key)
        return memory is not None and memory.capacity and now - memory.since >= self.settings.slot_seconds

    def place_again(self, cluster: Cluster, key: str, pods: list[Pod]) -> list[Placed] | None:
        """Other places for planned members of a gang, beside the rest of it; None if there are none for all of them."""
        priority = max(p.spec.priority for p in pods)
        gang = elsewhere(cluster, key, pods, self.settings, self.owed.against(key, priority))
        with cluster.ledger.without(m.uid for m in gang.members), self.holds.usable_by(cluster, key, priority):
            return place(cluster.ledger, gang)

    def nominated(self, cluster: Cluster, pod: Pod) -> None:
        """Another scheduler's pod is, or was, to have a place that it has made free."""
        self.holds.theirs(cluster, pod, self.settings.schedulers)

    def makes_room(self, key: str) -> bool:
        """Whether victims are still to go for this gang."""
        return key in self.holds.keys(NOMINATED)

    def lost(
        self, cluster: Cluster, holding: Holding, key: str, now: float, failed: bool = True, made_anew: bool = False
    ) -> None:
        """A bound member of a gang is gone or has failed: keep its place for the one that replaces it.

        Not if it has made room for another gang, or was taken back with its own. Whoever was deleted without having
        `failed` may be one that its owner wants no more: its place is kept for a short time only, and only while
        another member lives; where its owner has all `made_anew` when one is lost, until a moment after the last.
        """
        plan = cluster.plans.get(key)
        taken_back = plan is not None and plan.status.phase == "RollingBack"
        if self.victims.going(holding.uid):
            self.victims.spared(holding.uid)
        elif is_group(key) and not taken_back:
            since, most = self.holds.whole_until(key), self.settings.slot_seconds  # its owner may make all anew
            until = max(now + (most if failed else min(most, DELETED_SLOT_SECONDS)), since)
            self.holds.keep_slot(cluster, holding, key, now, until, failed or made_anew or since > 0)
            if made_anew:
                self.holds.extend(key, until, most)

    def _needs_slots(self, cluster: Cluster, key: str) -> bool:
        """Whether a gang is below its quorum and lives, or none of it does and its owner may make it anew."""
        members, group = sort_members(cluster.pods_of(key), self.settings.schedulers), cluster.groups.get(key)
        lives = members.satisfied > 0 or self.holds.whole_until(key) > 0
        return group is not None and lives and members.satisfied < group.spec.min_member

    def _end(self, cluster: Cluster, placed: list[Placed], now: float) -> float:
        """When the last of these will have ended at the latest; never, if nothing is known of one."""
        if self._durations is None:
            self._durations = durations(cluster, now)
        takes = [runtime(cluster.pods[m.uid], self._durations) for m, _ in placed if m.uid in cluster.pods]
        return now + max((t[1] if t is not None else float("inf") for t in takes), default=0.0)

    def _fits_an_empty_cluster(self, cluster: Cluster, gang: Gang) -> bool:
        with cluster.ledger.empty():
            return place(cluster.ledger, gang._replace(leave=())) is not None

    def _ends_before(self, cluster: Cluster, placed: list[Placed], head: Head, now: float) -> bool:
        """Whether all of these will have ended before the head can start, as far as is known."""
        if self._shadow is None or self._shadow[0] != head.key:
            shadow = starts_at(cluster, head.gang, now)
            self._shadow = (head.key, None if shadow is None else shadow[0])
        return self._shadow[1] is not None and self._end(cluster, placed, now) <= self._shadow[1]
