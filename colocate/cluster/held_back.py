"""The condition `colocate.io/HeldBack` of batch pods: what their nodes' services cost them, for whoever owns them.

Agents name the pods of their own node; the condition is written when it changes, and taken back when its agent is
silent, has stopped, or is gone.
"""

from __future__ import annotations

import asyncio
import time

import msgspec
import structlog

from colocate.cluster.api import SHADOW, STOPPED, NodeColocation, PodHeldBack
from colocate.cluster.batch_pods import ASK_SECONDS, pod_meant
from colocate.kube.client import PODS, STRATEGIC, Api, ApiError, Unreachable, path_of
from colocate.kube.events import MESSAGE_CHARACTERS
from colocate.kube.lease import Election, LeadershipLost
from colocate.objects import HELD_BACK, Condition
from colocate.units import time_text

AGAIN_SECONDS = 5.0
AT_ONCE, MOST_OF_A_NODE = 8, 64
FINAL = (400, 403, 404, 409, 422)
"""409: a namesake of the pod is there."""
RELEASED, SILENT = "Released", "AgentSilent"
log = structlog.get_logger()


class HeldBackPods:
    """Of one leader."""

    def __init__(self, api: Api, election: Election) -> None:
        self._api, self._election = api, election
        self._said: dict[str, dict[str, PodHeldBack]] = {}
        """Node -> uid -> what was said last."""
        self._due: dict[tuple[str, str], tuple[PodHeldBack, Condition]] = {}
        """Node and uid -> what the condition of that pod is to be."""
        self._wake = asyncio.Event()

    def told(self, node: str, now: NodeColocation | None, *, silent: bool = False) -> None:
        """What the agent of a node says now; it no longer says anything of what it does not name."""
        before = self._said.pop(node, {})
        speaks = now is not None and not silent and now.status.reason not in (SHADOW, STOPPED)
        named = now.status.held_back[:MOST_OF_A_NODE] if now is not None and speaks else []
        said = {pod.uid: pod for pod in named}
        if said:
            self._said[node] = said
        for uid, pod in said.items():
            if before.get(uid) != pod:
                self._want(node, pod, _condition(pod))
        for uid in before.keys() - said.keys():
            if before[uid].reason:
                self._want(node, before[uid], _no_longer(SILENT if silent else RELEASED))

    def _want(self, node: str, pod: PodHeldBack, condition: Condition) -> None:
        self._due[node, pod.uid] = pod, condition
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled. Raises LeadershipLost."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._due:
                keys = list(self._due)[:AT_ONCE]
                await asyncio.gather(*(self._write(node, *self._due.pop((node, uid))) for node, uid in keys))

    async def _write(self, node: str, named: PodHeldBack, condition: Condition) -> None:
        try:
            await self._tell(node, named, condition)
        except (ApiError, Unreachable, msgspec.DecodeError) as error:
            name = f"{named.namespace}/{named.name}"
            if isinstance(error, msgspec.DecodeError) or (isinstance(error, ApiError) and error.status in FINAL):
                log.warning("not_told", pod=name, error=str(error))
            else:
                log.info("not_told_yet", pod=name, error=str(error))
                asyncio.get_running_loop().call_later(AGAIN_SECONDS, self._again, node, named, condition)

    def _again(self, node: str, named: PodHeldBack, condition: Condition) -> None:
        if (node, named.uid) not in self._due:  # else there is later word
            self._want(node, named, condition)

    async def _tell(self, node: str, named: PodHeldBack, condition: Condition) -> None:
        if not self._election.holds():
            raise LeadershipLost("the lease was not renewed in time: nothing is written any more")
        pod = await pod_meant(self._api, node, named)
        if pod is None:
            return
        there = next((c for c in pod.status.conditions if c.type == HELD_BACK), None)
        if there is None and condition.status != "True":
            return
        if there is not None and (there.status, there.reason, there.message) == (
            condition.status,
            condition.reason,
            condition.message,
        ):
            return
        body = {"metadata": {"uid": named.uid}, "status": {"conditions": [msgspec.to_builtins(condition)]}}
        path = path_of(PODS, named.namespace, named.name, "status")
        await self._api.request("PATCH", path, body, content_type=STRATEGIC, timeout_seconds=ASK_SECONDS, patient=False)


def _condition(pod: PodHeldBack) -> Condition:
    if not pod.reason:
        return _no_longer(RELEASED)
    return Condition(
        type=HELD_BACK,
        status="True",
        reason=pod.reason,
        message=pod.message[:MESSAGE_CHARACTERS],
        last_transition_time=time_text(time.time()),
    )


def _no_longer(reason: str) -> Condition:
    return Condition(type=HELD_BACK, status="False", reason=reason, last_transition_time=time_text(time.time()))
