"""Nodes whose objects have vanished, and when their pods may be given up.

A node object that vanishes is no proof that its containers are dead: `kubectl delete node` leaves a live kubelet, and
an etcd that was restored lists fewer nodes than there are. So a node counts as lost only after a grace period (PodGC
waits 40 s before it deletes orphaned pods), for few gangs at a time, and not at all while a large part of the nodes has
vanished together: then somebody has to look.
"""

from __future__ import annotations

from collections.abc import Collection

from podgroup.queue.entry import Settings


class LostNodes:
    """Those that have not come back."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._since: dict[str, float] = {}

    def gone(self, name: str, now: float) -> None:
        """A node object has vanished."""
        self._since.setdefault(name, now)

    def look(self, present: Collection[str]) -> None:
        """These nodes are there: what has come back is not lost."""
        self._since = {name: since for name, since in self._since.items() if name not in present}

    def forget(self, name: str) -> None:
        """Nothing of it is left."""
        self._since.pop(name, None)

    @property
    def names(self) -> list[str]:
        """All that have vanished, the longest ago first."""
        return sorted(self._since, key=lambda name: (self._since[name], name))

    def halted(self, present: int) -> str:
        """Why nothing is given up now, in words; empty if nothing speaks against it."""
        lost, most = len(self._since), self._settings.most_lost_nodes_ratio
        if lost < 2 or lost <= most * (lost + present):
            return ""
        return (
            f"{lost} of {lost + present} nodes have vanished, which is more than {most:.0%}: their pods are left until "
            "some of the nodes are back, or somebody deletes them who knows that they are dead"
        )

    def due(self, now: float, present: int) -> list[str]:
        """The nodes whose pods may be given up now."""
        if self.halted(present):
            return []
        grace = self._settings.node_loss_grace_seconds
        return [name for name in self.names if now - self._since[name] >= grace]

    def next_due(self, now: float) -> float | None:
        """In how many seconds the next one is due; None if none is."""
        grace = self._settings.node_loss_grace_seconds
        ahead = [since + grace - now for since in self._since.values() if since + grace > now]
        return min(ahead, default=None)
