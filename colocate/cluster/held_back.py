"""The condition `colocate.io/HeldBack` of batch pods: what their nodes' services cost them, for whoever owns them.

Agents name the pods of their own node; the condition is written when it changes, and taken back when its agent no
longer names the pod, is silent, has stopped, or is gone. A new leader begins with the conditions that are there, and
believes an agent once it has heard it itself.
"""

from __future__ import annotations

import asyncio
import time
from typing import NamedTuple

import msgspec
import structlog

from colocate.cluster.api import HOLDS, MOST_HELD_BACK, NodeColocation, PodHeldBack, gang_of
from colocate.cluster.batch_pods import NotItsBusiness, pod_meant, speaks, write_condition
from colocate.kube.client import PODS, Api, ApiError, Unreachable
from colocate.kube.events import MESSAGE_CHARACTERS
from colocate.kube.lease import Election
from colocate.objects import GANG_HELD, HELD_BACK, Condition, Lean, ObjectMeta
from colocate.units import time_text

AGAIN_SECONDS, REFUSED_AGAIN_SECONDS = 5.0, 60.0
AT_ONCE = 8
REFUSALS = (400, 403, 404, 422)
"""What will hardly be otherwise in a moment."""
RELEASED, SILENT = "Released", "AgentSilent"
TEXTS = {RELEASED: "nothing is kept from it any more", SILENT: "nobody tells of its node any more"}
log = structlog.get_logger()


class _Spec(Lean, frozen=True):
    node_name: str = ""


class _Status(Lean, frozen=True):
    conditions: tuple[Condition, ...] = ()


class _PodSeen(Lean, frozen=True):
    """Of a pod what is needed of all of them."""

    metadata: ObjectMeta
    spec: _Spec = _Spec()
    status: _Status = _Status()


class _Word(NamedTuple):
    """What the condition of a pod is to be."""

    pod: PodHeldBack
    status: str
    reason: str
    message: str


class HeldBackPods:
    """Of one leader."""

    def __init__(self, api: Api, election: Election) -> None:
        self._api, self._election = api, election
        self._said: dict[str, dict[str, PodHeldBack]] = {}
        """Node -> uid -> what its condition says, or is about to."""
        self._wanted: dict[tuple[str, str], _Word] = {}
        """Node and uid -> the last word, until it is written."""
        self._due: dict[tuple[str, str], None] = {}
        self._wake = asyncio.Event()

    async def inherit(self) -> set[str]:
        """Look for the conditions that leaders before have written; the gangs that were told to stand still."""
        gangs = set[str]()
        try:
            for pod in await self._api.all(_PodSeen, PODS):
                if any(c.type == GANG_HELD and c.status == "True" for c in pod.status.conditions):
                    gangs.add(gang_of(pod.metadata))
                its = next((c for c in pod.status.conditions if c.type == HELD_BACK and c.status == "True"), None)
                if its is not None:
                    meta = pod.metadata
                    known = PodHeldBack(namespace=meta.namespace, name=meta.name, uid=meta.uid, reason=its.reason)
                    known = msgspec.structs.replace(known, message=its.message)
                    self._said.setdefault(pod.spec.node_name, {})[meta.uid] = known
        except (ApiError, Unreachable, msgspec.DecodeError) as error:
            log.warning("conditions_unknown", error=str(error))
        return gangs

    @property
    def nodes(self) -> list[str]:
        """Those of whose pods some are held back."""
        return list(self._said)

    def told(self, node: str, now: NodeColocation | None, *, silent: bool = False) -> None:
        """What the agent of a node says now; it no longer says anything of what it does not name."""
        before = self._said.pop(node, {})
        named = now.status.held_back[:MOST_HELD_BACK] if now is not None and speaks(now, silent=silent) else []
        said = {pod.uid: pod for pod in named if pod.reason in HOLDS}
        if said:
            self._said[node] = said
        for uid, pod in said.items():
            if uid not in before or (before[uid].reason, before[uid].message) != (pod.reason, pod.message):
                self._want(node, _Word(pod, "True", pod.reason, pod.message[:MESSAGE_CHARACTERS]))
        why = RELEASED if now is not None and not silent else SILENT
        for uid in before.keys() - said.keys():
            self._want(node, _Word(before[uid], "False", why, TEXTS[why]))

    def _want(self, node: str, word: _Word) -> None:
        self._wanted[node, word.pod.uid] = word
        self._ask(node, word.pod.uid)

    def _ask(self, node: str, uid: str) -> None:
        self._due[node, uid] = None
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled. Raises LeadershipLost."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._due:
                async with asyncio.TaskGroup() as tasks:
                    for key in list(self._due)[:AT_ONCE]:
                        del self._due[key]
                        tasks.create_task(self._write(*key))

    async def _write(self, node: str, uid: str) -> None:
        """Write the last word of a pod; what fails is tried again, if it still is the last one then."""
        word = self._wanted.get((node, uid))
        if word is None:
            return
        try:
            await self._tell(node, word)
        except (ApiError, Unreachable) as error:
            final = isinstance(error, NotItsBusiness)
            log.info("not_told", pod=f"{word.pod.namespace}/{word.pod.name}", error=str(error), again=not final)
            if not final:
                refused = isinstance(error, ApiError) and error.status in REFUSALS
                later = REFUSED_AGAIN_SECONDS if refused else AGAIN_SECONDS
                asyncio.get_running_loop().call_later(later, self._ask, node, uid)
                return
        except msgspec.DecodeError as error:
            log.warning("not_told", pod=f"{word.pod.namespace}/{word.pod.name}", error=str(error), again=False)
        if self._wanted.get((node, uid)) is word:
            del self._wanted[node, uid]

    async def _tell(self, node: str, word: _Word) -> None:
        self._election.check()
        pod = await pod_meant(self._api, node, word.pod, batch_only=word.status == "True")
        there = next((c for c in pod.status.conditions if c.type == HELD_BACK), None) if pod is not None else None
        so_already = there is not None and (there.status, there.reason, there.message) == word[1:]
        if pod is None or so_already or (there is None and word.status == "False"):
            return
        changed = there is None or there.status != word.status or there.last_transition_time is None
        condition = {
            "type": HELD_BACK,
            "status": word.status,
            "reason": word.reason,
            "message": word.message,
            "lastTransitionTime": time_text(time.time()) if changed else there.last_transition_time,  # type: ignore[union-attr]
        }
        self._election.check()
        await write_condition(self._api, word.pod.namespace, word.pod.name, word.pod.uid, condition)
