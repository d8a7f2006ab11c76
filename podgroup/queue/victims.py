"""Which gangs may look for victims in a cycle, and which victims have not gone yet.

A search is the dearest of all decisions: so many a cycle are made, those that were left over come first in the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Set

from podgroup.queue.entry import Entry
from podgroup.queue.kept_room import Holds
from podgroup.solve.place import place
from podgroup.solve.preempt import Preemption, preempt
from podgroup.solve.question import Gang
from podgroup.state.cluster import Cluster


class Victims:
    """The searches of one cycle after the other."""

    def __init__(self, searches: int | None = None) -> None:
        self._most = searches
        """How many gangs a cycle may look for victims for; None: all."""
        self._left = 0
        self._searching: set[str] = set()
        """Gangs that earlier cycles have left to this one."""
        self._left_over: list[str] = []
        """Gangs that are left to the next ones, the first first."""
        self._hopeless: dict[tuple[object, ...], tuple[int, int]] = {}
        """Within one cycle: signature -> quorum and priority for which no victims made room."""
        self._going: set[str] = set()
        """uids of victims that have not gone yet."""

    def begin(self, cluster: Cluster, gangs: int) -> Set[str]:
        """A cycle over so many gangs begins; those that earlier ones have left to it."""
        most = self._most or gangs
        self._searching, self._left_over = set(self._left_over[:most]), self._left_over[most:]
        self._left = most - len(self._searching)
        self._hopeless = {}
        self._going &= cluster.pods.keys()
        return self._searching

    @property
    def most(self) -> int | None:
        """For so many gangs a cycle looks; None: for all."""
        return self._most

    def remembered(self) -> tuple[list[str], list[str]]:
        """uids of victims that have not gone yet, and the gangs that are left to the next cycle."""
        return sorted(self._going), list(self._left_over)

    def recall(self, going: Iterable[str], left_over: Iterable[str]) -> None:
        """Go on from these."""
        self._going, self._left_over = set(going), list(left_over)

    @property
    def unfinished(self) -> bool:
        """Whether gangs were left to the next cycle."""
        return bool(self._left_over)

    def going(self, uid: str) -> bool:
        """Whether this pod makes room for a gang."""
        return uid in self._going

    def spared(self, uid: str) -> None:
        """A victim has gone, or could not be told to go: it may be chosen again."""
        self._going.discard(uid)

    def in_vain(self, kind: tuple[object, ...], quorum: int, priority: int) -> bool:
        """Whether in this cycle nobody's going made room for such a gang."""
        known = self._hopeless.get(kind)
        return known is not None and quorum >= known[0] and priority <= known[1]

    def find(
        self, cluster: Cluster, entry: Entry, gang: Gang, yielding: frozenset[str], holds: Holds, now: float
    ) -> Preemption | None:
        """Whose going makes room for a gang that does not fit, nobody's if others are leaving; None if none's may."""
        priority = entry.priority
        if not gang.quorum or any(p.spec.preemption_policy == "Never" for p in entry.members.pending):
            return None
        signature = gang.signature(cluster.ledger.repelling_keys)
        if self.in_vain(signature, gang.quorum, priority):
            return None
        if not yielding and min(cluster.priorities, default=priority) >= priority:
            return None  # nobody is less important
        with holds.usable_by(cluster, entry.key, entry.priority):
            if gang.leave and place(cluster.ledger, gang._replace(leave=())) is not None:
                return None  # there is room, but for what others are owed: nobody goes for pods that do not exist
            if not self._may_search(entry.key):
                return None
            found = preempt(cluster, gang, entry.key, priority, now, self._going, yielding)
        if found is None:
            if not yielding:
                self._hopeless[signature] = (gang.quorum, priority)
            return None
        self._going.update(p.metadata.uid for p in found.victims)
        self._going.update(found.leaving)  # their places are promised: they are not kept for their replacements
        return found

    def _may_search(self, key: str) -> bool:
        if key in self._searching:
            return True
        if self._left:
            self._left -= 1
            return True
        if key not in self._left_over:
            self._left_over.append(key)
        return False
