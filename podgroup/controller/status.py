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
from colocate.objects import Condition, ObjectMeta, Pod
from colocate.units import time_text
from podgroup.api import Advice, GangPlan, GangPlanStatus, PodGroup, PodGroupStatus
from podgroup.controller.binder import Binder, now_text
from podgroup.controller.watches import now_seconds
from podgroup.dialects.scheduling_sigs import DIALECT
from podgroup.queue.decisions import Waiting
from podgroup.queue.queue import Queue
from podgroup.state.cluster import CARRIED_ON, OPEN_PHASES, Cluster
from podgroup.state.gangs import is_group, sort_members

ROUND_SECONDS = 0.1
AGAIN_SECONDS = 1.0
STARTING_SECONDS = 3.0
"""A gang that is being bound changes with each of its pods: it is told of once it is, or after so long."""
GROUPS_A_ROUND = 32
MESSAGE_SECONDS = 5.0
"""A message that only has other numbers is told again after so long."""
SETTLED_SECONDS = 1.0
"""Events and pods tell when no member has been added for so long: until then the next one may let the gang start."""
PODS_AT_ONCE = 64
"""Of one gang; the others come with the next rounds."""
FORGET_SECONDS = 60.0
NEAR_THE_HEAD = 20
log = structlog.get_logger()
Save = Callable[[str, GangPlanStatus], Awaitable[None]]


class StatusWriter:
    """Writes what has changed, a few gangs a round."""

    def __init__(self, cluster: Cluster, queue: Queue, save: Save) -> None:
        self._cluster, self._queue, self._save = cluster, queue, save
        self.conditions = False
        """Whether the installed PodGroup schema has conditions."""
        self._touched: dict[str, float] = {}
        """Gang -> since when something about it may have changed."""
        self._positions: dict[str, int] = {}
        self._written: dict[str, float] = {}
        self._told: dict[str, tuple[str, str, float]] = {}
        """Gang -> the reason and message that its users were told last, and when."""
        self._told_positions: dict[str, int] = {}
        self._told_claims: dict[str, float] = {}
        """Gang -> since when its claim has not grown, as its plan says."""
        self._told_pods: dict[str, tuple[str, str]] = {}
        self._heard: dict[str, str] = {}
        """Gang -> the reason of its last Event."""
        self._advice: dict[str, Advice] = {}
        self._retold: dict[str, float] = {}
        """Gang -> when its pods were last told."""

    def advise(self, key: str, advice: Advice) -> None:
        """What would let a gang start: written with why it waits."""
        before = self._advice.get(key)
        self._advice[key] = advice
        if before is None or msgspec.structs.replace(before, given=advice.given) != advice:
            self._told.pop(key, None)
            self.touch(key)

    def touch(self, key: str) -> None:
        """Something about this gang may have changed."""
        self._touched.setdefault(key, time.monotonic())

    def touch_waiting(self) -> None:
        """The queue has decided: whoever has another reason now is told."""
        self._positions = {key: i + 1 for i, key in enumerate(self._queue.order)}
        for key, memory in self._queue.waiting.items():
            plan = self._cluster.plans.get(key)
            if plan is not None and memory.reason and may_be_told(plan) and plan.status.reason != memory.reason:
                self._told.pop(key, None)  # what was told was written over when the gang started
            said = self._told.get(key, ("", "", 0.0))[:2]
            if (
                said != (memory.reason, memory.message)
                or self._position_is_stale(key)
                or self._claims_anew(key, memory)
            ):
                self.touch(key)

    def _position_is_stale(self, key: str) -> bool:
        """Near the head every step is told; far from it, where all move with every start, only half the way."""
        told, now = self._told_positions.get(key), self._positions.get(key, 0)
        if told is None or told == now:
            return False
        return min(told, now) <= NEAR_THE_HEAD or not told / 2 < now < told * 2

    def _claims_anew(self, key: str, memory: Waiting) -> bool:
        """Whether a head's claim is not the one that was told."""
        return memory.reserved_at is not None and self._told_claims.get(key) != memory.reserved_at

    async def run(self, binder: Binder) -> None:
        """Until cancelled. Raises LeadershipLost."""
        forget_at = time.monotonic() + FORGET_SECONDS
        while True:
            await asyncio.sleep(ROUND_SECONDS)
            now = time.monotonic()
            if now >= forget_at:
                self._forget_gone()
                forget_at = now + FORGET_SECONDS
            due = [k for k, since in self._touched.items() if self._is_due(k, since, now)][:GROUPS_A_ROUND]
            for key in due:
                del self._touched[key]
                self._written[key] = now
            await asyncio.gather(*(self._tell(binder, key) for key in due))

    def _is_due(self, key: str, since: float, now: float) -> bool:
        if now - self._written.get(key, float("-inf")) < AGAIN_SECONDS:
            return False
        plan = self._cluster.plans.get(key)
        return plan is None or plan.status.phase not in OPEN_PHASES or now - since >= STARTING_SECONDS

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
        self.touch(key)

    async def _tell_group(self, binder: Binder, key: str) -> None:
        group = self._cluster.groups.get(key)
        if group is None:
            self._written.pop(key, None)
            return
        pods = self._cluster.pods_of(key)
        if not any(p.spec.scheduler_name in self._queue.settings.schedulers for p in pods) and (
            pods or (group.status.phase not in ("", "Pending") and key not in self._cluster.plans)
        ):
            return  # another scheduler's group
        status = DIALECT.status(group, pods)
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
            if reason == "SurplusWaits":  # the quorum runs
                scheduled = "True"
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
            self._told_positions.pop(key, None)
            self._told_claims.pop(key, None)
            self._heard.pop(key, None)
            await self._no_longer_waits(key)
            return
        told_reason, told_message, at = self._told.get(key, ("", "", 0.0))
        now, failure = time.monotonic(), None
        stale = told_message != memory.message or self._position_is_stale(key)  # numbers change all the time
        stale = stale or self._claims_anew(key, memory)
        if told_reason != memory.reason or (stale and now - at >= MESSAGE_SECONDS):
            self._told[key] = (memory.reason, memory.message, now)
            try:
                await self._tell_plan(key, memory)
            except (ApiError, Unreachable) as error:
                failure = error  # its pods are told all the same
        await self._tell_pods(binder, key, memory)
        if failure is not None:
            self._told.pop(key, None)
            raise failure

    async def _tell_pods(self, binder: Binder, key: str, memory: Waiting) -> None:
        """An Event, and on the pods why they wait: the reason to those that have not heard it, later the numbers."""
        if is_group(key) and now_seconds() - memory.members_at < SETTLED_SECONDS:
            self.touch(key)
            return
        if self._heard.get(key) != memory.reason:
            self._heard[key] = memory.reason
            await self._tell_event(binder, key, memory)
        reason, now = "Unschedulable" if memory.capacity else memory.reason, time.monotonic()
        waiting = [
            p
            for p in self._cluster.pods_of(key)
            if not p.spec.node_name and not p.terminal and p.metadata.uid not in self._cluster.planned
        ]
        due = [p for p in waiting if self._told_pods.get(p.metadata.uid, ("", ""))[0] != reason]
        if not due:
            due = [p for p in waiting if self._told_pods[p.metadata.uid][1] != memory.message]
            if due and now - self._retold.get(key, 0.0) < MESSAGE_SECONDS:
                self.touch(key)
                return
        for pod in due[:PODS_AT_ONCE]:
            await binder.tell_pod(pod, reason, memory.message)
            self._told_pods[pod.metadata.uid] = (reason, memory.message)
        if len(due) > PODS_AT_ONCE:
            self.touch(key)
        elif due:
            self._retold[key] = now

    async def _no_longer_waits(self, key: str) -> None:
        """A plan that still says that its gang waits, or has started, though that is so no longer."""
        plan, group = self._cluster.plans.get(key), self._cluster.groups.get(key)
        if plan is None or group is None or not may_be_told(plan):
            return
        if not self._cluster.members.get(key):  # it has no pods any more: nobody waits, and nobody runs
            if plan.status.reason:
                await self._save(key, GangPlanStatus(phase="Waiting"))
            return
        if not plan.status.waits:
            return
        members = sort_members(self._cluster.pods_of(key), self._queue.settings.schedulers)
        if key not in self._queue.waiting and members.satisfied >= group.spec.min_member:
            await self._save(key, GangPlanStatus(phase="Running", reason="Started", message="the quorum is there"))

    def _forget_gone(self) -> None:
        self._told_pods = {uid: told for uid, told in self._told_pods.items() if uid in self._cluster.pods}
        known = self._cluster.groups.keys() | self._cluster.members.keys()
        self._written = {key: at for key, at in self._written.items() if key in known}
        self._retold = {key: at for key, at in self._retold.items() if key in known}
        self._advice = {key: advice for key, advice in self._advice.items() if key in self._queue.waiting}

    def _about(self, key: str) -> PodGroup | Pod | None:
        """The object that a gang's users look at."""
        group, pods = self._cluster.groups.get(key), self._cluster.pods_of(key)
        return group if group is not None else pods[0] if pods else None

    async def _tell_event(self, binder: Binder, key: str, memory: Waiting) -> None:
        about = self._about(key)
        if about is not None:
            warning = memory.capacity or isinstance(about, Pod)
            await binder.event(about, memory.reason, memory.message, warning=warning)

    async def _tell_plan(self, key: str, memory: Waiting) -> None:
        about, group = self._about(key), self._cluster.groups.get(key)
        if about is None or not is_group(key):
            return
        status = GangPlanStatus(
            phase="Running" if memory.reason == "SurplusWaits" else "Waiting",
            reason=memory.reason,
            message=memory.message,
            position=self._positions.get(key, 0),
            waiting_since=time_text(memory.since),
            advice=self._advice.get(key) if memory.reason == "Unschedulable" else None,
            observed_generation=group.metadata.generation if group is not None else 0,
        )
        await self._save(key, status)
        self._told_positions[key] = status.position
        if memory.reserved_at is not None:
            self._told_claims[key] = memory.reserved_at


def may_be_told(plan: GangPlan | None) -> bool:
    """Whether a plan is at rest, so that its status may say why the gang waits."""
    return plan is None or plan.status.phase not in CARRIED_ON


def empty_plan(key: str) -> GangPlan:
    """The plan of a gang for which nothing is planned yet."""
    namespace, _, name = key.partition("/")
    return GangPlan(metadata=ObjectMeta(name=name, namespace=namespace))


def _same(now: PodGroupStatus, before: PodGroupStatus) -> bool:
    return msgspec.structs.replace(now, schedule_start_time=before.schedule_start_time) == before
