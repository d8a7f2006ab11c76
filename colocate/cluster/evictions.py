"""Batch pods that have to go from their nodes, evicted through the API server: their disruption budgets hold.

An agent may name batch pods of its own node only: what it names is looked at before anything is asked. What a budget
refuses (429) is asked again as long as the agent goes on asking; after 15 s that signals the pod's processes itself.

A gang that loses a member loses all it did, and gives its places back on every node. So where no service waits for the
memory, gangs are broken one after the other: what the first gives back may be what the second was to go for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

import msgspec
import structlog

from colocate.cluster.api import GANGS, NodeColocation, PodToEvict, gang_of
from colocate.cluster.batch_pods import ASK_SECONDS, pod_meant
from colocate.decide.eviction import URGENT
from colocate.kube.client import EVENTS, PODS, SUBDOMAIN, Api, ApiError, Unreachable, path_of
from colocate.kube.events import event_about
from colocate.kube.lease import Election
from colocate.objects import EVICTED, Lean, ObjectMeta, Pod

AGAIN_SECONDS = 2.0
"""Between two attempts at what a budget refuses."""
FORGET_SECONDS = 600.0
GANG_SECONDS = 20.0
"""For so long after one gang no other is broken, unless for memory."""
AT_ONCE, MOST_OF_A_NODE = 16, 32
LEAST_GRACE_SECONDS = 1
COMPONENT = "colocate-publication"
POD_GROUP_API = "scheduling.x-k8s.io/v1alpha1"
log = structlog.get_logger()


class _Named(Lean, frozen=True):
    """Of an object its metadata."""

    metadata: ObjectMeta


class Evictions:
    """Of one leader."""

    def __init__(self, api: Api, election: Election) -> None:
        self._api, self._election = api, election
        self.wake = asyncio.Event()
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._busy: set[tuple[str, str]] = set()
        self._done: dict[tuple[str, str], float] = {}
        """Node and uid -> when the pod's end was accepted, or it was found to be none of that node's business."""
        self._broken: dict[str, float] = {}
        """Gangs that were broken a moment ago, and when."""

    async def run(self, asking: Callable[[], Mapping[str, NodeColocation]]) -> None:
        """Until cancelled; `asking` are the objects of agents that speak now. Raises LeadershipLost."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                await self.wake.wait()
                self.wake.clear()
                now = time.monotonic()
                self._done = {key: at for key, at in self._done.items() if now - at < FORGET_SECONDS}
                for node, one in asking().items():
                    for pod in one.status.evict[:MOST_OF_A_NODE]:
                        key = node, pod.uid
                        if key not in self._done and key not in self._busy:
                            self._busy.add(key)
                            tasks.create_task(self._evict(node, pod))

    async def _evict(self, node: str, wanted: PodToEvict) -> None:
        """Ask for one pod; what is refused for now is asked again soon, if it still is to go then."""
        key, name = (node, wanted.uid), f"{wanted.namespace}/{wanted.name}"
        try:
            async with self._slots:
                await self._ask(node, wanted)
            self._done[key] = time.monotonic()
        except (ApiError, Unreachable, msgspec.DecodeError) as error:
            if not (isinstance(error, ApiError) and error.status in (400, 403, 404, 422)):
                log.info("not_evicted", pod=name, error=str(error))
                asyncio.get_running_loop().call_later(AGAIN_SECONDS, self.wake.set)
                return
            log.warning("not_evictable", pod=name, error=str(error))
            self._done[key] = time.monotonic()
        finally:
            self._busy.discard(key)

    async def _ask(self, node: str, wanted: PodToEvict) -> None:
        self._election.check()
        pod = await pod_meant(self._api, node, wanted)
        if pod is None:
            return
        gang = gang_of(pod.metadata)
        self._take_turn(gang, wanted)
        grace = max(wanted.grace_seconds, LEAST_GRACE_SECONDS)
        options = {"preconditions": {"uid": wanted.uid}, "gracePeriodSeconds": grace}
        meta = {"name": wanted.name, "namespace": wanted.namespace}
        body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": meta, "deleteOptions": options}
        path = path_of(PODS, wanted.namespace, wanted.name, "eviction")
        try:
            await self._api.request("POST", path, body, timeout_seconds=ASK_SECONDS, patient=False)
        except (ApiError, Unreachable):
            self._broken.pop(gang, None)  # it was not: the next one may
            raise
        await self._say(pod, wanted)

    def _take_turn(self, gang: str, wanted: PodToEvict) -> None:
        """Note that a gang is broken. Raises ApiError (429) where another one was, a moment ago."""
        now = time.monotonic()
        self._broken = {name: at for name, at in self._broken.items() if now - at < GANG_SECONDS}
        if not gang or gang in self._broken:
            return
        if self._broken and wanted.reason not in URGENT:
            last = max(self._broken, key=lambda name: self._broken[name])
            left = self._broken[last] + GANG_SECONDS - now
            raise ApiError(429, "TooManyRequests", f"the gang {last} was broken just now: {gang} waits {left:.0f} s")
        self._broken[gang] = now

    async def _say(self, pod: Pod, wanted: PodToEvict) -> None:
        """Events on the pod, and on its PodGroup, which outlives it: who took its place, and why."""
        meta, text = pod.metadata, f"{wanted.reason}: {wanted.message}"
        try:
            await self._tell("v1", "Pod", meta, text)
            group = await self._group_of(meta)
            if group is not None:
                await self._tell(POD_GROUP_API, "PodGroup", group, f"{meta.name} on {pod.spec.node_name}: {text}")
        except (ApiError, Unreachable, msgspec.DecodeError) as error:
            log.debug("event_lost", error=str(error))

    async def _tell(self, api: str, kind: str, meta: ObjectMeta, text: str) -> None:
        body = event_about(api, kind, meta, EVICTED, text, COMPONENT, warning=True)
        path = path_of(EVENTS, meta.namespace)
        await self._api.request("POST", path, body, timeout_seconds=ASK_SECONDS, patient=False)

    async def _group_of(self, meta: ObjectMeta) -> ObjectMeta | None:
        """The PodGroup whose member a pod says it is, if there is one."""
        name = next(filter(None, map(meta.labels.get, GANGS[:2])), "")
        if not SUBDOMAIN.fullmatch(name):
            return None
        path = path_of(f"/apis/{POD_GROUP_API}/podgroups", meta.namespace, name)
        try:
            answer = await self._api.request("GET", path, timeout_seconds=ASK_SECONDS, patient=False)
        except ApiError as error:
            if error.status == 404:
                return None
            raise
        return msgspec.json.decode(answer, type=_Named).metadata
