"""The condition `colocate.io/GangHeld` of batch pods: a member of their gang is frozen on another node.

Agents name the gangs of which they have frozen a member; the others' agents read the condition of their own pods, and
stop them (`decide/gangs.py`). It is taken back when the agent no longer names the gang, is silent, or is gone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

import msgspec
import structlog

from colocate.cluster.api import NodeColocation, gang_of
from colocate.cluster.batch_pods import speaks, write_condition
from colocate.kube.client import PODS, SUBDOMAIN, Api, ApiError, Unreachable, path_of
from colocate.kube.events import MESSAGE_CHARACTERS
from colocate.kube.lease import Election
from colocate.objects import GANG_HELD, Pod
from colocate.units import time_text

AGAIN_SECONDS = 5.0
FROZEN, RELEASED = "MemberFrozen", "Released"
NOBODY = "no member of the gang is frozen on another node any more"
log = structlog.get_logger()


class HeldGangs:
    """Of one leader."""

    def __init__(self, api: Api, election: Election) -> None:
        self._api, self._election = api, election
        self._frozen: dict[str, dict[str, str]] = {}
        """Node -> gang -> what its agent says of it."""
        self._due: dict[str, None] = {}
        self._wake = asyncio.Event()

    def inherit(self, gangs: Iterable[str]) -> None:
        """Look again at those that leaders before have told of."""
        for gang in gangs:
            self._ask(gang)

    def told(self, node: str, now: NodeColocation | None, *, silent: bool = False) -> None:
        """What the agent of a node says now."""
        before = self._frozen.pop(node, {})
        named = now.status.frozen_gangs if now is not None and speaks(now, silent=silent) else ()
        said = {g.gang: g.message[:MESSAGE_CHARACTERS] for g in named}
        if said:
            self._frozen[node] = said
        for gang in before.keys() ^ said.keys():
            self._ask(gang)

    def _ask(self, gang: str) -> None:
        self._due[gang] = None
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled. Raises LeadershipLost."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._due:
                gang = next(iter(self._due))
                del self._due[gang]
                try:
                    await self._settle(gang)
                except (ApiError, Unreachable, msgspec.DecodeError) as error:
                    log.warning("gang_not_told", gang=gang, error=str(error))
                    asyncio.get_running_loop().call_later(AGAIN_SECONDS, self._ask, gang)

    async def _settle(self, gang: str) -> None:
        """Have the condition of each member say what is so. An agent is believed of gangs with a pod on its node."""
        namespace, _, _ = gang.partition("/")
        if not SUBDOMAIN.fullmatch(namespace):
            return
        every = await self._api.all(Pod, path_of(PODS, namespace))
        members = [p for p in every if gang_of(p.metadata) == gang and p.spec.node_name and not p.terminal]
        nodes = {p.spec.node_name for p in members}
        held = {node: said[gang] for node, said in self._frozen.items() if gang in said and node in nodes}
        for pod in members:
            others = [f"on {node}: {why}" for node, why in sorted(held.items()) if node != pod.spec.node_name]
            await self._tell(pod, "; ".join(others)[:MESSAGE_CHARACTERS])

    async def _tell(self, pod: Pod, why: str) -> None:
        there = next((c for c in pod.status.conditions if c.type == GANG_HELD), None)
        status, reason = ("True", FROZEN) if why else ("False", RELEASED)
        if (there.status if there is not None else "False") == status:
            return
        condition = {
            "type": GANG_HELD,
            "status": status,
            "reason": reason,
            "message": why or NOBODY,
            "lastTransitionTime": time_text(time.time()),
        }
        self._election.check()
        try:
            await write_condition(self._api, pod.metadata.namespace, pod.metadata.name, pod.metadata.uid, condition)
        except ApiError as error:
            if error.status not in (404, 409):  # it has gone, or is another one by now
                raise
