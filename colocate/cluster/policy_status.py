"""What came of each ColocationPolicy, from what the agents say: written into its status, for `kubectl get`."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable

import msgspec
import structlog

from colocate.cluster.api import (
    BATCH_CPU,
    POLICIES,
    STOPPED,
    ColocationPolicyObject,
    ColocationPolicyStatus,
    NodeColocation,
    amount,
    whole,
)
from colocate.kube.client import MERGE, Api, ApiError, Unreachable, path_of
from colocate.kube.lease import Election
from colocate.kube.reflector import either

EVERY_SECONDS = 5.0
"""A status is written so often at most: it changes with every node's."""
WELL = "NothingSuffers"
PROBLEM_CHARACTERS = 500
log = structlog.get_logger()


def status_of(policy: ColocationPolicyObject, spoken: Iterable[NodeColocation]) -> ColocationPolicyStatus:
    """The sum of what the agents say that go by it and are not silent."""
    name, generation = policy.metadata.name, policy.metadata.generation
    going_by = [s for s in spoken if s.status.policy.name == name and s.status.reason != STOPPED]
    there = [s for s in going_by if s.status.policy.generation == generation and not s.status.policy.problem]
    suffering = Counter(s.status.pressure for s in going_by if s.status.pressure not in ("", WELL))
    pressure = WELL if going_by else ""
    if suffering:
        reason, count = suffering.most_common(1)[0]
        pressure = f"{reason} on {count}"
    acted = max((s for s in going_by if s.status.last_action), key=lambda s: s.status.observed, default=None)
    refusing = next((s for s in going_by if s.status.policy.problem), None)
    problem = f"{refusing.metadata.name}: {refusing.status.policy.problem}" if refusing is not None else ""
    return ColocationPolicyStatus(
        observed_generation=generation,
        nodes=len(going_by),
        ready=f"{len(there)}/{len(going_by)}",
        batch_cores=f"{sum(max(amount(s.status.promised.get(BATCH_CPU)), 0) for s in going_by) / 1000:.2f}",
        pressure=pressure,
        last_action=f"{acted.metadata.name}: {acted.status.last_action}" if acted is not None else "",
        problem=problem[:PROBLEM_CHARACTERS],
    )


class PolicyStatuses:
    """Of one leader; `spoken` gives the objects of agents that are not silent."""

    def __init__(self, api: Api, election: Election, spoken: Callable[[], list[NodeColocation]]) -> None:
        self._api, self._election, self._spoken = api, election, spoken
        self._policies: dict[str, ColocationPolicyObject] = {}
        self.writes = 0

    def told(self, before: ColocationPolicyObject | None, now: ColocationPolicyObject | None) -> None:
        """The watch has told of one."""
        if now is not None:
            self._policies[now.metadata.name] = now
        else:
            self._policies.pop(either(before, now).metadata.name, None)

    async def run(self) -> None:
        """Until cancelled. Raises LeadershipLost."""
        while True:
            started = time.monotonic()
            for policy in list(self._policies.values()):
                status = status_of(policy, self._spoken())
                if status != policy.status:
                    await self._write(policy, status)
            await asyncio.sleep(max(EVERY_SECONDS - (time.monotonic() - started), 0.0))

    async def _write(self, policy: ColocationPolicyObject, status: ColocationPolicyStatus) -> None:
        self._election.check()
        path = path_of(POLICIES, name=policy.metadata.name, subresource="status")
        try:
            await self._api.request(
                "PATCH", path, {"status": whole(status)}, content_type=MERGE, timeout_seconds=5, patient=False
            )
        except (ApiError, Unreachable) as error:
            if not (isinstance(error, ApiError) and error.status == 404):
                log.warning("policy_status_not_written", policy=policy.metadata.name, error=str(error))
            return
        self.writes += 1
        if policy.metadata.name in self._policies:  # the watch may tell later what is known by now
            self._policies[policy.metadata.name] = msgspec.structs.replace(policy, status=status)
