"""Batch pods that have to go from their nodes, evicted through the API server: their disruption budgets hold.

An agent names pods of its own node only: whether they are there is looked at before anything is asked. What a budget
refuses (429) is asked again as long as the agent goes on asking; after 15 s that signals the pod's processes itself.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

import structlog

from colocate.cluster.api import NodeColocation, PodToEvict
from colocate.kube.client import EVENTS, PODS, Api, ApiError, Unreachable, path_of
from colocate.kube.lease import Election, LeadershipLost
from colocate.objects import Pod
from colocate.units import time_text

AGAIN_SECONDS = 2.0
"""Between two attempts at what a budget refuses."""
FORGET_SECONDS = 600.0
log = structlog.get_logger()


class Evictions:
    """Of one leader."""

    def __init__(self, api: Api, election: Election) -> None:
        self._api, self._election = api, election
        self.wake = asyncio.Event()
        self._done: dict[str, float] = {}
        """uid -> when its end was accepted, or it was found to be nobody's business."""

    async def run(self, said: Mapping[str, NodeColocation]) -> None:
        """Until cancelled. Raises LeadershipLost."""
        while True:
            await self.wake.wait()
            self.wake.clear()
            now = time.monotonic()
            self._done = {uid: at for uid, at in self._done.items() if now - at < FORGET_SECONDS}
            wanted = [
                (node, pod) for node, one in said.items() for pod in one.status.evict if pod.uid not in self._done
            ]
            ended = await asyncio.gather(*(self._evict(node, pod) for node, pod in wanted))
            if not all(ended):
                asyncio.get_running_loop().call_later(AGAIN_SECONDS, self.wake.set)

    async def _evict(self, node: str, wanted: PodToEvict) -> bool:
        """Whether nothing is left to be asked for."""
        if not self._election.holds():
            raise LeadershipLost("the lease was not renewed in time: nothing is written any more")
        path = path_of(PODS, wanted.namespace, wanted.name)
        try:
            pod = await self._api.get(Pod, path)
            if pod.metadata.uid == wanted.uid and pod.spec.node_name != node:
                log.warning("pod_of_another_node", node=node, pod=f"{wanted.namespace}/{wanted.name}")
            if pod.metadata.uid == wanted.uid and pod.spec.node_name == node and not pod.deleting:
                options = {"preconditions": {"uid": wanted.uid}, "gracePeriodSeconds": wanted.grace_seconds}
                kind = {"apiVersion": "policy/v1", "kind": "Eviction"}
                meta = {"name": wanted.name, "namespace": wanted.namespace}
                body = {**kind, "metadata": meta, "deleteOptions": options}
                await self._api.request("POST", f"{path}/eviction", body, patient=False)
                await self._say(pod, wanted)
        except (ApiError, Unreachable) as error:
            if not (isinstance(error, ApiError) and error.status == 404):
                log.warning("not_evicted", pod=f"{wanted.namespace}/{wanted.name}", error=str(error))
                return False
        self._done[wanted.uid] = time.monotonic()
        return True

    async def _say(self, pod: Pod, wanted: PodToEvict) -> None:
        """An Event on the pod: who took its place, and why."""
        meta, now = pod.metadata, time_text(time.time())
        about = {"apiVersion": "v1", "kind": "Pod", "name": meta.name, "namespace": meta.namespace, "uid": meta.uid}
        body = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"generateName": f"{meta.name[:200]}.", "namespace": meta.namespace},
            "involvedObject": about,
            "reason": "EvictedForServices",
            "message": f"{wanted.reason}: {wanted.message}"[:1024],
            "type": "Warning",
            "source": {"component": "colocate-publication"},
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        try:
            await self._api.request("POST", path_of(EVENTS, meta.namespace), body)
        except (ApiError, Unreachable) as error:
            log.debug("event_lost", error=str(error))
