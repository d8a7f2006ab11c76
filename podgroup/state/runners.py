"""Pods that run alone, in the order in which they would have to go: of what runs on a cluster they are the most."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from colocate.objects import Pod
from colocate.units import seconds_of
from podgroup.state.gangs import gang_key, is_group, owned

Rank = tuple[int, float, str, str]
"""(priority, youngest first, gang, uid)"""


def youngest_first(pod: Pod) -> float:
    """The less, the younger."""
    return -(seconds_of(pod.metadata.creation_timestamp) or 0.0)


class Runners:
    """Bound pods without a group that a controller would make anew, sorted; kept so pod by pod."""

    def __init__(self) -> None:
        self._order: list[Rank] = []
        self._rank: dict[str, Rank] = {}

    def set(self, pod: Pod) -> None:
        """A pod as it is now."""
        uid, key = pod.metadata.uid, gang_key(pod)
        if not pod.spec.node_name or pod.terminal or pod.deleting or is_group(key) or not owned(pod):
            self.drop(uid)
            return
        rank = (pod.spec.priority, youngest_first(pod), key, uid)
        if self._rank.get(uid) != rank:
            self.drop(uid)
            self._rank[uid] = rank
            insort(self._order, rank)

    def drop(self, uid: str) -> None:
        """A pod that is gone, or is alone no more."""
        rank = self._rank.pop(uid, None)
        if rank is not None:
            del self._order[bisect_left(self._order, rank)]

    def below(self, priority: int) -> Iterator[Rank]:
        """Those of a lower priority, the first to go first."""
        for rank in self._order:
            if rank[0] >= priority:
                return
            yield rank
