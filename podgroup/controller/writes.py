"""What the controller does to the world: each write is a task of its own, and no pod or plan is in two at once.

Intents are persisted before they are acted on. A write that fails or is not answered is followed by a look at what is
there; nothing is assumed of it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from itertools import count, takewhile
from typing import Any

import msgspec
import structlog

from colocate.kube.client import SUBDOMAIN, TIMEOUT_SECONDS, ApiError, Unreachable, pause
from colocate.kube.lease import LeadershipLost
from colocate.objects import Claim, Condition, PersistentVolume, Pod
from podgroup.api import GangPlan, GangPlanSpec, GangPlanStatus
from podgroup.controller.announcements import Announcements
from podgroup.controller.binder import Binder, now_text
from podgroup.controller.metrics import Metrics
from podgroup.controller.status import empty_plan, may_be_told
from podgroup.controller.watches import Feed, now_seconds
from podgroup.queue.queue import Queue
from podgroup.state.cluster import HOLDING_PHASES, OPEN_PHASES, Cluster
from podgroup.state.gangs import gang_key, is_group
from podgroup.state.storage import Todo

WRITES_AT_ONCE = 128
PREEMPTED = "PreemptionByScheduler"
"""Of a pod's DisruptionTarget condition (KEP-3329)."""
FENCE_ATTEMPTS, REFUSED = 5, (400, 403, 422)
FENCE_SECONDS = 2 * TIMEOUT_SECONDS
BACKLOG = 512
"""Writes that wait or are under way."""
BIND_ATTEMPTS = DELETE_ATTEMPTS = RELEASE_ATTEMPTS = 8
log = structlog.get_logger()


class Hands:
    """The writes of one leader."""

    def __init__(self, cluster: Cluster, queue: Queue, binder: Binder, metrics: Metrics) -> None:
        self.cluster, self.queue, self.binder, self.metrics = cluster, queue, binder, metrics
        self.tasks: asyncio.TaskGroup
        self.woken = 0.0
        """When the change came that is decided on."""
        self.abandoned: set[str] = set()
        """Plans whose saving was not answered and had not been done when it was looked at: it may be done yet."""
        self._locks: dict[str, asyncio.Lock] = {}
        """Of plans: one write at a time."""
        self._releases: dict[str, int] = {}
        """uid -> how often what was written for its volumes was to be taken back."""
        self._slots = asyncio.Semaphore(WRITES_AT_ONCE)
        self.announcements = Announcements(lambda: bool(self._busy))

    def connect(self, feed: Feed, touched: Callable[[str], None]) -> None:
        """What is to be told of what was done."""
        self.feed, self.touched, self._busy = feed, touched, feed.busy

    async def fence(self, pod: Pod, since: float | None = None) -> Pod | None:
        """Stamp an unbound pod, however long the API server is away; the pod as it is then.

        One that it answers with an error, so long after `since` (now) that no request can still be under way, is left.
        """
        began = since or now_seconds()
        for attempt in count():
            try:
                now = await self.binder.stamp(pod)
                break
            except (ApiError, Unreachable) as error:
                refused = isinstance(error, ApiError) and error.status in REFUSED and attempt >= FENCE_ATTEMPTS
                if refused or (isinstance(error, ApiError) and now_seconds() - began >= FENCE_SECONDS):
                    log.error("pod_not_fenced", pod=pod.metadata.name, error=str(error))
                    return None  # one pod that nobody may change must not keep everybody waiting
                await pause(error, min(attempt, 6), random.random())
        self.answered(now)
        return now

    def answered(self, now: Pod | None) -> None:
        """An answer says how a pod is; of a pod whose end the watch has told of it says nothing new."""
        if now is not None and now.metadata.uid in self.cluster.pods:
            self.feed.on_pod(self.cluster.pods[now.metadata.uid], now)

    @property
    def full(self) -> bool:
        """Whether there is work enough for a while."""
        return len(self._busy) >= BACKLOG

    def spawn(self, what: str, work: Coroutine[Any, Any, None]) -> None:
        """Do this beside everything else; `what` is busy until it is done."""
        self._busy[what] = now_seconds()
        self.tasks.create_task(self.limited(work))

    async def limited(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Do this when fewer than WRITES_AT_ONCE writes are under way."""
        async with self._slots:
            return await work

    async def bind(self, pod: Pod, node: str, plan_id: str) -> None:
        """Bind a pod, as long as that is wanted; what came of it is told by the watch, or settled here."""
        uid, key = pod.metadata.uid, gang_key(pod)
        now: Pod | None = pod
        for attempt in range(BIND_ATTEMPTS):
            if not self._still_planned(key, uid, plan_id) or (attempt and self.cluster.overfull({uid: node})):
                break
            try:
                now = await self.binder.bind(pod, node, plan_id)
            except (ApiError, Unreachable) as error:
                log.warning("bind_failed", pod=pod.metadata.name, node=node, error=str(error))
                self.metrics.binds.labels("failed").inc()
                if isinstance(error, ApiError) and error.status == 403:
                    await self._forbidden(key, error)
                await pause(error, attempt, random.random())
                continue
            if now is None or now.spec.node_name:
                self.metrics.binds.labels("gone" if now is None else "bound").inc()
                if now is not None and now.spec.node_name == node:
                    meta = pod.metadata
                    self.announcements.add(pod, "Scheduled", f"assigned {meta.namespace}/{meta.name} to {node}")
                break
            self.metrics.binds.labels("conflict").inc()
            await asyncio.sleep(0.02 * 2**attempt)
            pod = now  # it has changed since it was decided on, but not in a way that matters: once more
            if pod.deleting or pod.spec.scheduling_gates:
                break
        else:
            if not is_group(key):
                self.queue.back_off(key, now_seconds())
        self._settle(uid, key, now)

    async def bind_volumes(self, pod: Pod, node: str) -> None:
        """Write what is still to be written for the volumes of a pod that is planned on a node."""
        uid, key = pod.metadata.uid, gang_key(pod)
        for todo in self.cluster.volumes_of(uid).todo:
            claim = f"{todo.claim.metadata.namespace}/{todo.claim.metadata.name}"
            try:
                if todo.volume is not None:
                    self._heard(await self.binder.keep_volume(todo.volume, todo.claim))
                else:
                    self._heard(await self.binder.select_node(todo.claim, node))
                self.cluster.storage.asked(uid, claim)
            except (ApiError, Unreachable) as error:
                await self._volume_failed(key, pod, error)
        self._done(uid, key)

    async def release_volumes(self, pod: Pod, written: tuple[Todo, ...]) -> None:
        """Take back what was written for volumes of a pod that there are none of yet; what is refused stays."""
        uid, key = pod.metadata.uid, gang_key(pod)
        tries = self._releases[uid] = self._releases.get(uid, 0) + 1
        for todo in written:
            try:
                if todo.volume is not None:
                    self._heard(await self.binder.free_volume(todo.volume))
                else:
                    self._heard(await self.binder.select_node(todo.claim, None))
            except (ApiError, Unreachable) as error:
                refused = isinstance(error, ApiError) and error.status in (*REFUSED, 404)
                if refused or tries >= RELEASE_ATTEMPTS:
                    self.cluster.storage.leave(uid)
                await self._volume_failed(key, pod, error)
        if not self.cluster.volumes_of(uid).written:
            self._releases.pop(uid, None)
        self._done(uid, key)

    def _heard(self, now: Claim | PersistentVolume) -> None:
        """An answer says how a claim or a volume is; of one whose end the watch has told of it says nothing new."""
        meta, storage = now.metadata, self.cluster.storage
        if isinstance(now, Claim):
            claim = storage.claims.get(f"{meta.namespace}/{meta.name}")
            if claim is not None and claim.metadata.uid == meta.uid:
                self.feed.on_claim(claim, now)
        else:
            volume = storage.volumes.get(meta.name)
            if volume is not None and volume.metadata.uid == meta.uid:
                self.feed.on_volume(volume, now)

    async def _volume_failed(self, key: str, pod: Pod, error: ApiError | Unreachable) -> None:
        log.warning("volume_not_written", pod=pod.metadata.name, error=str(error))
        if isinstance(error, ApiError) and error.status == 403:
            await self._forbidden(key, error)
        await pause(error, 2, random.random())  # what has changed meanwhile the watch tells

    def _still_planned(self, key: str, uid: str, plan_id: str) -> bool:
        """Whether a bind is still wanted: its plan has not been taken back meanwhile."""
        plan = self.cluster.plans.get(key)
        if not plan_id:
            return uid in self.cluster.planned
        return plan is not None and plan.spec.plan_id == plan_id and plan.status.phase in OPEN_PHASES

    async def _forbidden(self, key: str, error: ApiError) -> None:
        """A verb that we may not use is named where the gang's users look."""
        async with self._lock(key):
            plan = self.cluster.plans.get(key)
            if plan is None or any(c.type == "Permitted" for c in plan.status.conditions):
                return
            said = Condition(
                type="Permitted",
                status="False",
                reason="Forbidden",
                message=error.message,
                last_transition_time=now_text(),
            )
            status = msgspec.structs.replace(plan.status, conditions=[*plan.status.conditions, said])
            try:
                self.cluster.set_plan(key, await self.binder.save(msgspec.structs.replace(plan, status=status)))
            except (ApiError, Unreachable) as failed:
                log.warning("plan_not_saved", gang=key, error=str(failed))

    def _settle(self, uid: str, key: str, now: Pod | None) -> None:
        """What a bind has come to; where it was bound, the watch is waited for."""
        seen = self.cluster.pods.get(uid)
        if now is not None and now.spec.node_name and seen is not None and not seen.spec.node_name:
            self._busy[uid] = now_seconds()
            return
        self._busy.pop(uid, None)
        if now is not None and now.spec.node_name:
            return
        if now is None:
            self.cluster.remove_pod(uid)
        elif not is_group(key):
            self.cluster.withdraw(uid)
        self.feed.dirty.add(key)
        self.feed.wake.set()

    async def read(self, pod: Pod) -> None:
        """Read a pod back."""
        try:
            now = await self.binder.read(pod)
        except (ApiError, Unreachable) as error:
            log.warning("read_failed", pod=pod.metadata.name, error=str(error))
            return
        if now is not None:
            self.answered(now)
        elif pod.metadata.uid in self.cluster.pods:
            self.feed.on_pod(pod, None)

    async def delete(self, pod: Pod, reason: str, message: str, wanted: Callable[[], bool] = lambda: False) -> None:
        """Ask for the end of a pod; again only while it is `wanted`. One that could not be asked for is no victim."""
        for attempt in takewhile(lambda i: i == 0 or wanted(), range(DELETE_ATTEMPTS)):
            # Without a grace period only where no kubelet can be there: a vanished node alone is no proof of that.
            rows = self.cluster.ledger.rows
            gone = self.feed.lost_nodes.due(now_seconds(), len(rows))
            at_once = pod.spec.node_name not in rows and pod.spec.node_name in gone
            try:
                asked = await self.binder.delete(pod, reason, message, at_once=at_once)
                if asked and reason == PREEMPTED:
                    self.announcements.add(pod, "Preempted", message)
                break
            except (ApiError, Unreachable) as error:
                log.warning("delete_failed", pod=pod.metadata.name, error=str(error))
                await pause(error, attempt, random.random())
        else:
            self.queue.victims.spared(pod.metadata.uid)
        self._done(pod.metadata.uid, gang_key(pod))

    async def save_fenced(self, key: str, plan: GangPlan, unbound: list[Pod]) -> None:
        """A plan that gives up places of these: a bind that was never answered must not land after that."""
        stamped = await asyncio.gather(*(self.fence(pod) for pod in unbound))
        if any(pod is not None and pod.spec.node_name for pod in stamped):
            self._done(key, key)  # it had landed: there is more to take back
        else:
            await self.save(key, plan)

    async def save_moved(self, key: str, plan: GangPlan, members: list[Pod], left: list[str]) -> None:
        """Members are planned elsewhere; the places that they have `left` are held until they are fenced."""
        try:
            await self.save_fenced(key, plan, members)
        finally:
            known = self.cluster.plans.get(key)
            if known is not None:  # what was not saved is not promised either
                self.cluster.set_plan(key, known)
            for uid in left:
                self.cluster.release_hold(uid)
            self.feed.wake.set()

    async def save(self, key: str, plan: GangPlan) -> None:
        """Persist a plan; on failure go on from the one that is there."""
        async with self._lock(key):
            known = self.cluster.plans.get(key)
            if known is not None and known.spec.epoch > self.binder.epoch:
                raise LeadershipLost(f"plan {key} is of epoch {known.spec.epoch}: another leads")
            if known is not None:
                plan = msgspec.structs.replace(plan, metadata=known.metadata)
            if plan.status.phase == "Running":  # what was forbidden is permitted by now
                allowed = [c for c in plan.status.conditions if c.type != "Permitted"]
                plan = msgspec.structs.replace(plan, status=msgspec.structs.replace(plan.status, conditions=allowed))
            plan = msgspec.structs.replace(plan, status=self.queue.in_plan(self.cluster, key, plan.status))
            try:
                self.cluster.set_plan(key, await self.binder.save(plan))
                if known is None or known.status.phase != plan.status.phase:
                    self.metrics.moved(key, plan, now_seconds(), self.woken)
            except (ApiError, Unreachable) as error:
                log.warning("plan_not_saved", gang=key, error=str(error))
                await pause(error, 2, random.random())
                await self._reread_plan(key, plan)
        self._done(key, key)
        self.touched(key)

    async def save_waiting(self, key: str, status: GangPlanStatus) -> None:
        """Say in a plan at rest why its gang waits; a gang that has begun to start meanwhile is not touched."""
        async with self._lock(key):
            group, plan = self.cluster.groups.get(key), self.cluster.plans.get(key)
            still = (key in self.queue.waiting) == status.waits
            if key in self._busy or not still or not may_be_told(plan):
                return
            if (
                plan is None
                and group is None
                and not (self.cluster.members.get(key) and SUBDOMAIN.fullmatch(key.partition("/")[2]))
            ):
                return  # a label may be what no object can be called
            plan = plan if plan is not None else empty_plan(key)
            uid = group.metadata.uid if group is not None else plan.spec.pod_group_uid
            spec = GangPlanSpec(
                pod_group=plan.metadata.name,
                pod_group_uid=uid,
                epoch=self.binder.epoch,
                began=plan.spec.began,
                min_member=plan.spec.min_member,
            )
            status = self.queue.in_plan(self.cluster, key, status)
            saved = await self.binder.save(msgspec.structs.replace(plan, spec=spec, status=status))
            self.cluster.set_plan(key, saved)

    def _lock(self, key: str) -> asyncio.Lock:
        return self._locks.setdefault(key, asyncio.Lock())

    async def _reread_plan(self, key: str, plan: GangPlan) -> None:
        """Go on from the plan that is there; what the failed one promised is void unless it was saved after all."""
        for attempt in count():
            try:
                self.cluster.set_plan(key, await self.binder.reload(plan))
                break
            except (ApiError, Unreachable) as error:
                if isinstance(error, ApiError) and error.status == 404:
                    self.cluster.remove_plan(key)
                    break
                await pause(error, min(attempt, 6), random.random())
        kept = self.cluster.plans.get(key)
        if kept is None or kept.spec.plan_id != plan.spec.plan_id:
            self.abandoned.add(plan.spec.plan_id)
            holds = kept is not None and kept.status.phase in HOLDING_PHASES
            held = {m.uid for m in kept.spec.members} if kept is not None and holds else set()
            for member in plan.spec.members:
                if member.uid not in held:
                    self.cluster.withdraw(member.uid)

    async def forget(self, key: str, plan: GangPlan) -> None:
        """Remove the plan of a group that is gone."""
        async with self._lock(key):
            try:
                await self.binder.forget(plan)
            except (ApiError, Unreachable) as error:
                log.warning("plan_not_forgotten", gang=key, error=str(error))
        self._locks.pop(key, None)
        self._done(key, key)

    def _done(self, what: str, key: str) -> None:
        self._busy.pop(what, None)
        self.feed.dirty.add(key)
        self.feed.wake.set()
