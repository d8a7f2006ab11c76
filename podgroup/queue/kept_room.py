"""Room that is kept for somebody: the place of a lost member, the places that victims are leaving, and those that
another scheduler has made free for its pods (nominatedNodeName, kube-scheduler's preemption)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from colocate.objects import Pod, Quantities
from colocate.units import seconds_of, time_text
from podgroup.api import KeptPlace
from podgroup.queue.memory import KeptRoom
from podgroup.solve.question import Placed
from podgroup.state.allocation import Holding
from podgroup.state.cluster import Cluster
from podgroup.state.gangs import gang_key
from podgroup.state.shape import Shape, amounts

MOST_PLACES = 200
"""Of one gang, as its plan says them: a plan must fit into a request."""
SLOT, NOMINATED, THEIRS, LEFT = "slot:", "nominated:", "theirs:", "left:"
NEVER = float(2**40)


class Hold(NamedTuple):
    """One pod's room, kept in the ledger under a name of its own."""

    key: str
    uid: str
    until: float
    kind: str
    priority: int = 0
    """Of the gang: a nomination does not stand against one that is more important."""
    failed: bool = False
    """Of a slot: it, or one before it, began with a failure, or the owner makes all anew when one has gone."""
    since: float = 0.0
    """Of a slot: when its member was lost."""


class Holds:
    """All that is kept, for a time."""

    def __init__(self) -> None:
        self._holds: list[Hold] = []

    def keep_slot(self, cluster: Cluster, lost: Holding, key: str, now: float, until: float, failed: bool) -> None:
        """The place of a member that was lost is kept for the one that replaces it."""
        self._keep(cluster, Hold(key, SLOT + lost.uid, until, SLOT, failed=failed, since=now), lost)

    def places(self, cluster: Cluster, key: str) -> list[KeptPlace]:
        """The places of lost members of a gang, as its plan says them."""
        counted: Counter[tuple[str, tuple[tuple[str, int], ...], str, bool]] = Counter()
        for hold in self._holds:
            holding = cluster.ledger.holdings.get(hold.uid) if (hold.key, hold.kind) == (key, SLOT) else None
            if holding is not None:
                counted[holding.node, holding.shape.requests, time_text(hold.until), hold.failed] += 1
        found = []
        for (node, requests, until, failed), count in list(counted.items())[:MOST_PLACES]:
            asked: Quantities = {r: f"{a}m" if r == "cpu" else a for r, a in requests}
            found.append(KeptPlace(node=node, requests=asked, until=until, failed=failed, count=count))
        return found

    def restore(self, cluster: Cluster, key: str, places: list[KeptPlace], now: float) -> None:
        """What a former leader kept."""
        for i, place in enumerate(places):
            until = seconds_of(place.until) or 0.0
            if until > now:
                shape = Shape(requests=tuple(sorted(amounts(place.requests).items())))
                for j in range(min(place.count, MOST_PLACES)):
                    lost = Holding(f"{key}/{i}/{j}", "", key.partition("/")[0], place.node, shape, {})
                    self.keep_slot(cluster, lost, key, now, until, place.failed)

    def remembered(self, cluster: Cluster) -> list[KeptRoom]:
        """All that is kept, but for what other schedulers' pods say themselves."""
        found, known = [], {h.uid for h in self._holds}
        for uid, one in cluster.ledger.holdings.items():
            if one.kept and uid not in known:  # a place that a moved member has left and is not fenced from yet
                requests = dict(one.shape.requests)
                found.append(KeptRoom(gang="", uid=uid, until=NEVER, kind=LEFT, node=one.node, requests=requests))
        for h in self._holds:
            holding = cluster.ledger.holdings.get(h.uid) if h.kind != THEIRS else None
            if holding is not None:
                requests = dict(holding.shape.requests)
                found.append(
                    KeptRoom(
                        gang=h.key,
                        uid=h.uid,
                        until=h.until,
                        kind=h.kind,
                        node=holding.node,
                        requests=requests,
                        priority=h.priority,
                        failed=h.failed,
                    )
                )
        return found

    def recall(self, cluster: Cluster, kept: Iterable[KeptRoom]) -> None:
        """Keep these."""
        for one in kept:
            shape = Shape(requests=tuple(sorted(one.requests.items())))
            like = Holding(one.uid, "", one.gang.partition("/")[0], one.node, shape, {})
            self._keep(cluster, Hold(one.gang, one.uid, one.until, one.kind, one.priority, one.failed), like)

    def whole_until(self, key: str) -> float:
        """Until when places are kept for this gang though none of its members lives; 0 if they are not."""
        return max((h.until for h in self._holds if h.key == key and h.failed), default=0.0)

    def extend(self, key: str, until: float, most: float) -> None:
        """The places of lost members of a gang are kept until then, but none for more than `most` seconds in all."""
        self._holds = [
            h._replace(until=max(h.until, min(until, h.since + most))) if (h.key, h.kind) == (key, SLOT) else h
            for h in self._holds
        ]

    def nominate(self, cluster: Cluster, key: str, placed: list[Placed], until: float, priority: int) -> None:
        """The places that a gang has made victims leave are its own."""
        self.drop(cluster, key, NOMINATED)
        for one in placed:
            self._keep(cluster, Hold(key, NOMINATED + one.member.uid, until, NOMINATED, priority), one.holding)

    def theirs(self, cluster: Cluster, pod: Pod, ours: tuple[str, ...]) -> None:
        """The room that another scheduler has made free for its pod, until it is bound, gone, or wants it no more."""
        uid, node = THEIRS + pod.metadata.uid, pod.status.nominated_node_name
        waits = node and not pod.spec.node_name and not pod.terminal and not pod.deleting
        waits = waits and pod.spec.scheduler_name not in ours and pod.metadata.uid in cluster.pods
        mine = [h for h in self._holds if h.uid == uid]
        if not waits:
            self._give_up(cluster, mine)
            return
        meta, shape = pod.metadata, cluster.shape(pod)
        cluster.ledger.hold(Holding(uid, meta.name, meta.namespace, node, shape, meta.labels, kept=True))
        if not mine:
            self._holds.append(Hold(gang_key(pod), uid, float("inf"), THEIRS, pod.spec.priority))

    def _keep(self, cluster: Cluster, hold: Hold, like: Holding) -> None:
        room_only = Shape(requests=like.shape.requests)
        cluster.ledger.hold(like._replace(uid=hold.uid, labels={}, shape=room_only, leaving=False, kept=True))
        self._holds.append(hold)

    def drop(self, cluster: Cluster, key: str, kind: str) -> None:
        """Give up a gang's holds of one kind."""
        self._give_up(cluster, [h for h in self._holds if h.key == key and h.kind == kind])

    def drop_slots(self, cluster: Cluster, key: str, nodes: Iterable[str]) -> None:
        """A gang has got members on these nodes: a slot for each, those there first."""
        there = {h.uid: cluster.ledger.holdings[h.uid].node for h in self._holds if (h.key, h.kind) == (key, SLOT)}
        for node in nodes:
            uid = next((uid for uid, where in there.items() if where == node), next(iter(there), None))
            if uid is not None:
                del there[uid]
                self._give_up(cluster, [h for h in self._holds if h.uid == uid])

    def expire(self, cluster: Cluster, now: float, whole: set[str]) -> None:
        """Give up what is over, and the slots of gangs that need none any more."""
        self._give_up(cluster, [h for h in self._holds if now >= h.until or (h.kind == SLOT and h.key in whole)])

    def _give_up(self, cluster: Cluster, holds: list[Hold]) -> None:
        for hold in holds:
            cluster.release_hold(hold.uid)
        self._holds = [h for h in self._holds if h not in holds]

    def shapes(self, cluster: Cluster, key: str) -> list[Shape]:
        """Of the room that is kept for this gang."""
        holdings = [cluster.ledger.holdings.get(h.uid) for h in self._holds if h.key == key]
        return [holding.shape for holding in holdings if holding is not None]

    def any_for(self, key: str) -> bool:
        """Whether something is kept for this gang."""
        return any(h.key == key for h in self._holds)

    def keys(self, kind: str) -> set[str]:
        """The gangs that something of this kind is kept for."""
        return {h.key for h in self._holds if h.kind == kind}

    @property
    def ends(self) -> list[float]:
        """When each is over."""
        return [h.until for h in self._holds]

    @contextmanager
    def usable_by(self, cluster: Cluster, key: str, priority: int) -> Iterator[None]:
        """What is kept for a gang is free to itself, and what is promised to those that are less important."""
        lifted = [
            h.uid for h in self._holds if h.key == key or (h.kind in (NOMINATED, THEIRS) and h.priority < priority)
        ]
        with cluster.ledger.without(lifted):
            yield
