"""Pods that are gangs of their own and wait for their volumes: planned, and bound once these are there."""

from __future__ import annotations

from podgroup.commit.protocol import VOLUME_SECONDS
from podgroup.controller.watches import Feed, now_seconds
from podgroup.controller.writes import Hands
from podgroup.queue.queue import Queue
from podgroup.state.cluster import Cluster
from podgroup.state.gangs import gang_key


class Alone:
    """Of one leader."""

    def __init__(self, cluster: Cluster, queue: Queue, feed: Feed, hands: Hands) -> None:
        self._cluster, self._queue, self._feed, self._hands = cluster, queue, feed, hands
        self.since: dict[str, float] = {}
        """uid -> since when it waits."""

    def begin(self, key: str, uid: str) -> None:
        """A pod is planned, and its volumes are not there."""
        self.since[uid] = now_seconds()
        self._feed.look_again(key)

    def keys(self) -> set[str]:
        """The gangs that they are."""
        return {gang_key(self._cluster.pods[uid]) for uid in self.since if uid in self._cluster.pods}

    def due(self, now: float) -> list[float]:
        """In how many seconds each has waited for too long."""
        self.since = {uid: at for uid, at in self.since.items() if uid in self._cluster.planned}
        return [at + VOLUME_SECONDS - now for at in self.since.values()]

    def carry_on(self, key: str) -> None:
        """The next step of one of them."""
        for uid in self._cluster.members.get(key, set()) & self.since.keys() - self._feed.busy.keys():
            pod, node = self._cluster.pods[uid], self._cluster.planned.get(uid)
            if node is None:
                continue
            volumes = self._cluster.volumes_of(uid)
            over = volumes.state == "Failed" or now_seconds() - self.since[uid] >= VOLUME_SECONDS
            if volumes.state == "Bound":
                del self.since[uid]
                self._hands.spawn(uid, self._hands.bind(pod, node, ""))
            elif over:
                if volumes.written:
                    self._hands.spawn(uid, self._hands.release_volumes(pod, volumes.written))
                del self.since[uid]
                self._cluster.withdraw(uid)
                self._queue.back_off(key, now_seconds())
                self._feed.look_again(key)
            elif volumes.todo:
                self._hands.spawn(uid, self._hands.bind_volumes(pod, node))
