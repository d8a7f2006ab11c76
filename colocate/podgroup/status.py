"""What users are told: PodGroup status, conditions on pods and on our own GangPlan, Events. Coalesced, and after the
binds.

A gang's status is written when it has changed, at most once a second. Pods that wait for capacity keep
`PodScheduled=False, reason=Unschedulable`, so that an autoscaler sees them; pods that wait for anything else carry the
gang's own reason.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import msgspec
import structlog

from colocate.errors import ColocateError
from colocate.kube.client import ApiError, Unreachable
from colocate.kube.lease import LeadershipLost
from colocate.objects import Condition, GangPlan, GangPlanStatus, ObjectMeta, PodGroup, PodGroupStatus
from colocate.podgroup.binder import Binder, now_text
from colocate.podgroup.cluster import OPEN_PHASES, Cluster
from colocate.podgroup.gangs import group_status, is_group
from colocate.podgroup.queue import Queue, Waiting

ROUND_SECONDS = 0.1
AGAIN_SECONDS = 1.0
GROUPS_A_ROUND = 32
log = structlog.get_logger()
Save = Callable[[str, GangPlanStatus], Awaitable[None]]


class StatusWriter:
    """Writes what has changed, a few gangs a round."""

    def __init__(self, cluster: Cluster, queue: Queue, save: Save) -> None:
        self._cluster, self._queue, self._save = cluster, queue, save
        self.conditions = False
        """Whether the installed PodGroup schema has conditions."""
        self._touched: dict[str, None] = {}
        self._written: dict[str, float] = {}
        self._told: dict[str, tuple[str, str]] = {}
        """Gang -> the reason and message that its users were told last."""
        self._told_pods: dict[str, tuple[str, str]] = {}

    def touch(self, key: str) -> None:
        """Something about this gang may have changed."""
        self._touched[key] = None

    def touch_waiting(self) -> None:
        """The queue has decided: whoever has another reason now is told."""
        for key, memory in self._queue.waiting.items():
            if self._told.get(key) != (memory.reason, memory.message):
                self._touched[key] = None

    async def run(self, binder: Binder) -> None:
        """Until cancelled. Raises LeadershipLost."""
        while True:
            await asyncio.sleep(ROUND_SECONDS)
            now = time.monotonic()
            due = [k for k in self._touched if now - self._written.get(k, -AGAIN_SECONDS) >= AGAIN_SECONDS]
            due = due[:GROUPS_A_ROUND]
            for key in due:
                del self._touched[key]
                self._written[key] = now
            await asyncio.gather(*(self._tell(binder, key) for key in due))

    async def _tell(self, binder: Binder, key: str) -> None:
        try:
            if is_group(key):
                await self._tell_group(binder, key)
            await self._tell_waiting(binder, key)
        except LeadershipLost:
            raise
        except (ApiError, Unreachable) as error:
            self._failed(key, error)

    def _failed(self, key: str, error: ColocateError) -> None:
        log.warning("status_not_written", gang=key, error=str(error))
        self._touched[key] = None

    async def _tell_group(self, binder: Binder, key: str) -> None:
        group = self._cluster.groups.get(key)
        if group is None:
            self._written.pop(key, None)
            return
        status = group_status(group, self._cluster.pods_of(key))
        if self.conditions:
            status = msgspec.structs.replace(status, conditions=self._conditions(key, group))
        else:
            status = msgspec.structs.replace(status, observed_generation=0)
        if not _same(status, group.status):
            await binder.tell_group(group, status, self.conditions)

    def _conditions(self, key: str, group: PodGroup) -> list[Condition]:
        memory, plan = self._queue.waiting.get(key), self._cluster.plans.get(key)
        if memory is not None and memory.reason:
            scheduled, reason, message = "False", memory.reason, memory.message
        elif plan is not None:
            scheduled = "True" if plan.status.phase == "Running" else "False"
            reason, message = plan.status.reason, plan.status.message
        else:
            return group.status.conditions
        before = next((c for c in group.status.conditions if c.type == "Scheduled"), None)
        changed = before is None or before.status != scheduled
        return [
            Condition(
                type="Scheduled",
                status=scheduled,
                reason=reason or "Pending",
                message=message,
                last_transition_time=now_text() if changed or before is None else before.last_transition_time,
                observed_generation=group.metadata.generation,
            )
        ]

    async def _tell_waiting(self, binder: Binder, key: str) -> None:
        memory = self._queue.waiting.get(key)
        if memory is None or not memory.reason:
            self._told.pop(key, None)
            return
        if self._told.get(key) != (memory.reason, memory.message):
            self._told[key] = (memory.reason, memory.message)
            await self._tell_plan(binder, key, memory)
        reason = "Unschedulable" if memory.capacity else memory.reason
        for pod in self._cluster.pods_of(key):
            uid, told = pod.metadata.uid, (reason, memory.message)
            waits = not pod.spec.node_name and not pod.terminal and uid not in self._cluster.planned
            if waits and self._told_pods.get(uid) != told:
                self._told_pods[uid] = told
                await binder.tell_pod(pod, reason, memory.message)

    async def _tell_plan(self, binder: Binder, key: str, memory: Waiting) -> None:
        group = self._cluster.groups.get(key)
        if group is None:
            pods = self._cluster.pods_of(key)
            if pods:
                await binder.event(pods[0], memory.reason, memory.message, warning=True)
            return
        position = self._queue.order.index(key) + 1 if key in self._queue.order else 0
        status = GangPlanStatus(
            phase="Waiting",
            reason=memory.reason,
            message=memory.message,
            position=position,
            waiting_since=group.metadata.creation_timestamp,
            observed_generation=group.metadata.generation,
        )
        await self._save(key, status)
        await binder.event(group, memory.reason, memory.message, warning=memory.capacity)


def may_be_told(plan: GangPlan | None) -> bool:
    """Whether a plan is at rest, so that its status may say why the gang waits."""
    return plan is None or plan.status.phase not in (*OPEN_PHASES, "Repairing", "RollingBack")


def empty_plan(group: PodGroup) -> GangPlan:
    """The plan of a group for which nothing is planned yet."""
    meta = ObjectMeta(name=group.metadata.name, namespace=group.metadata.namespace)
    return GangPlan(metadata=meta)


def _same(now: PodGroupStatus, before: PodGroupStatus) -> bool:
    return msgspec.structs.replace(now, schedule_start_time=before.schedule_start_time) == before
