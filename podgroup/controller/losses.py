"""Members on nodes that have vanished: they will never end by themselves, and their owners may replace them."""

from __future__ import annotations

from functools import partial

import structlog

from colocate.kube.client import ApiError, Unreachable
from colocate.objects import Pod
from podgroup.api import PodGroup
from podgroup.controller.metrics import Metrics
from podgroup.controller.watches import Feed, now_seconds
from podgroup.controller.writes import Hands
from podgroup.queue.entry import Settings
from podgroup.state.cluster import Cluster
from podgroup.state.gangs import gang_key, is_group, owned

GIVE_UP_AGAIN_SECONDS = 5.0
"""How often members on vanished nodes are looked at that were left for later."""
log = structlog.get_logger()


class Losses:
    """Of one leader."""

    def __init__(self, cluster: Cluster, feed: Feed, hands: Hands, metrics: Metrics, settings: Settings) -> None:
        self._cluster, self._feed, self._hands = cluster, feed, hands
        self._metrics, self._settings = metrics, settings
        self._halted = ""
        """Why the members on vanished nodes are not given up."""
        self._given_up: dict[str, float] = {}
        """Gang -> when it last lost a member to a vanished node."""
        self._asked: dict[str, float] = {}
        """uid of such a member -> when its end was last asked for; a finalizer may keep it."""

    def give_up(self) -> None:
        """Ask for the end of those whose time is over, of few gangs at a time."""
        lost, now = self._feed.lost_nodes, now_seconds()
        lost.look(self._cluster.ledger.rows)
        members = {name: self._ours_on(name) for name in lost.names}
        if not any(members.values()):  # nobody of ours is on any of them
            for name in lost.names:
                lost.forget(name)
        present, grace = len(self._cluster.ledger.rows), self._settings.node_loss_grace_seconds
        self._halt(lost.halted(present), members)
        self._metrics.lost_nodes.set(sum(bool(pods) for pods in members.values()))
        self._given_up = {key: at for key, at in self._given_up.items() if now - at < grace}
        self._asked = {uid: at for uid, at in self._asked.items() if uid in self._cluster.pods}
        for name in lost.due(now, present):
            for pod in members.get(name, ()):
                key, uid = gang_key(pod), pod.metadata.uid
                again = now - self._asked.get(uid, -GIVE_UP_AGAIN_SECONDS) >= GIVE_UP_AGAIN_SECONDS
                if uid in self._feed.busy or not again:
                    continue
                if key not in self._given_up and len(self._given_up) >= self._settings.most_lost_gangs:
                    continue  # with a later look
                self._given_up[key] = self._asked[uid] = now
                self._metrics.lost_members.inc()
                text = f"node {name} has been gone for {grace:.0f} s"
                deletion = self._hands.delete(pod, "DeletionByNodeLoss", text, partial(self._is_lost, name))
                self._hands.spawn(pod.metadata.uid, deletion)

    def _halt(self, why: str, members: dict[str, list[Pod]]) -> None:
        """So many have vanished together that somebody has to look: the gangs concerned are told once."""
        if bool(why) != bool(self._halted):
            log.warning("node_loss_halted" if why else "node_loss_goes_on", why=why)
            for pod in {gang_key(p): p for pods in members.values() for p in pods}.values() if why else ():
                about = self._cluster.groups.get(gang_key(pod), pod)
                self._hands.tasks.create_task(self._tell(about, "NodeLossHalted", why))
        self._halted = why
        self._metrics.node_loss_halted.set(bool(why))

    def _ours_on(self, node: str) -> list[Pod]:
        """Members of gangs on a node that is gone, which have an owner to replace them."""
        uids = [h.uid for h in self._cluster.ledger.on(node)]
        pods = [self._cluster.pods[uid] for uid in uids if uid in self._cluster.pods]
        return [
            p
            for p in pods
            if p.spec.node_name == node
            and not p.terminal
            and p.spec.scheduler_name in self._settings.schedulers
            and is_group(gang_key(p))
            and owned(p)
        ]

    async def _tell(self, about: Pod | PodGroup, reason: str, message: str) -> None:
        try:
            await self._hands.limited(self._hands.binder.event(about, reason, message, warning=True))
        except (ApiError, Unreachable) as error:
            log.warning("event_lost", reason=reason, error=str(error))

    def _is_lost(self, node: str) -> bool:
        return node not in self._cluster.ledger.rows
