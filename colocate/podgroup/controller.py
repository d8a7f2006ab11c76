"""The shell of gang scheduling: watches feed the cluster, the queue decides, plans are persisted and carried out.

    watch -> Cluster -> Queue.cycle -> GangPlan (persisted) -> commit.advance -> bind, delete -> watch -> ...

One task decides; writes run beside it, a pod or a plan never in two at once. Nothing that is held in memory is needed
after a crash: plans, pods and groups are read anew, and open plans are carried on before anything new is decided.
"""

from __future__ import annotations

import asyncio
import gc
import random
import uuid
from collections.abc import Coroutine
from itertools import count
from typing import Any

import msgspec
import structlog

from colocate.kube.client import Api, ApiError, Unreachable, pause
from colocate.kube.lease import Election, LeadershipLost
from colocate.kube.reflector import Reflector
from colocate.objects import (
    POD_GROUP_API,
    Condition,
    GangPlan,
    GangPlanSpec,
    GangPlanStatus,
    PlannedMember,
    Pod,
    PodGroup,
)
from colocate.podgroup.binder import Binder, now_text
from colocate.podgroup.cluster import OPEN_PHASES, Cluster
from colocate.podgroup.commit import Bind, advance, owned
from colocate.podgroup.entries import Settings
from colocate.podgroup.feed import CARRIED_ON, Feed, now_seconds
from colocate.podgroup.gangs import gang_key, is_group, sort_members
from colocate.podgroup.metrics import Metrics
from colocate.podgroup.queue import Queue, Start
from colocate.podgroup.status import StatusWriter, empty_plan, may_be_told
from colocate.units import parse_time

GATHER_SECONDS = 0.005
"""Changes that come together are decided together."""
WRITES_AT_ONCE = 64
BIND_ATTEMPTS = 8
UNSEEN_SECONDS = 5.0
"""A bind that succeeded and is not seen in the watch for so long is read back."""
DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
log = structlog.get_logger()


def settle_memory() -> None:
    """What has been listed stays: the garbage collector need not look at it again and again (gc.freeze, CPython)."""
    gc.unfreeze()  # what an earlier time in office left
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


class Controller:
    """One leader's time in office."""

    def __init__(self, api: Api, settings: Settings, election: Election) -> None:
        self._api, self.settings, self._election = api, settings, election
        self.cluster, self.queue = Cluster(), Queue(settings)
        self._binder = Binder(api, 0, election.holds)
        self._status = StatusWriter(self.cluster, self.queue, self._save_waiting)
        self._locks: dict[str, asyncio.Lock] = {}
        """Of plans: one write at a time."""
        self.feed = Feed(self.cluster, self.queue, self._status.touch, self._refused)
        self._busy = self.feed.busy
        self._began: dict[str, float] = {}
        """plan id -> monotonic time of its making, as far as this process can tell."""
        self._slots = asyncio.Semaphore(WRITES_AT_ONCE)
        self.reflectors: list[Reflector[Any]] = []
        self._tasks: asyncio.TaskGroup
        self.metrics = Metrics()
        self._woken = 0.0
        """When the change came that is decided on."""
        self._spent = 0.0
        """Of the last look at the queue: for as long the next changes are gathered, so that watches are read too."""
        self.decided_at: float | None = None
        """When the queue was last looked at; None before the first time."""

    @property
    def synced(self) -> bool:
        """Whether everything that is watched has been listed."""
        return bool(self.reflectors) and all(r.synced.is_set() for r in self.reflectors)

    async def run(self, epoch: int) -> None:
        """Lead until cancelled. Raises LeadershipLost."""
        self._binder.epoch = epoch
        try:
            async with asyncio.TaskGroup() as self._tasks:
                await self._watch()
                settle_memory()
                await self._take_over()
                self.queue.remember(self.cluster, now_seconds())
                self._status.conditions = await self._schema_has_conditions()
                self._tasks.create_task(self._status.run(self._binder))
                while True:
                    await self._decide()
        except* LeadershipLost as lost:
            raise lost.exceptions[0] from None
        except* (ApiError, Unreachable) as failed:
            raise failed.exceptions[0] from None

    async def _watch(self) -> None:
        """Start the watches, one after the other, so that nodes are known before the pods on them."""
        for path, kind, handler in self.feed.watched():
            reflector: Reflector[Any] = Reflector(self._api, path, kind, handler)
            self.reflectors.append(reflector)
            self._tasks.create_task(reflector.run())
            await reflector.synced.wait()

    async def _schema_has_conditions(self) -> bool:
        """Whether the installed PodGroup has conditions in its status; upstream's has not, and is left as it is."""
        try:
            definition = msgspec.json.decode(
                await self._api.request("GET", f"{DEFINITIONS}/podgroups.{POD_GROUP_API.split('/')[0]}")
            )
        except (ApiError, Unreachable) as error:
            log.warning("podgroup_schema_unknown", error=str(error))
            return False
        version = POD_GROUP_API.split("/")[1]
        for served in definition["spec"]["versions"]:
            fields = served["schema"]["openAPIV3Schema"]["properties"].get("status", {}).get("properties", {})
            if served["name"] == version:
                return "conditions" in fields and "observedGeneration" in fields
        return False

    def _refused(self, reason: str) -> None:
        self.metrics.rejections.labels(reason).inc()

    # taking over

    async def _take_over(self) -> None:
        """Fence off a predecessor that may still be writing: afterwards its binds fail on the pods' resourceVersion."""
        if not self._election.predecessor:
            return
        pending = [
            p
            for p in self.cluster.pods.values()
            if p.spec.scheduler_name in self.settings.schedulers and not p.spec.node_name and not p.terminal
        ]
        log.info("fencing", predecessor=self._election.predecessor, pods=len(pending))
        await asyncio.gather(*(self._limited(self._fence(p)) for p in pending))
        self._election.settled = True

    async def _fence(self, pod: Pod) -> Pod | None:
        """Stamp an unbound pod, however long that takes; the pod as it is then."""
        for attempt in count():
            try:
                now = await self._binder.stamp(pod)
                break
            except (ApiError, Unreachable) as error:
                await pause(error, min(attempt, 6), random.random())
        self._answered(now)
        return now

    def _answered(self, now: Pod | None) -> None:
        """An answer says how a pod is; of a pod whose end the watch has told of it says nothing new."""
        if now is not None and now.metadata.uid in self.cluster.pods:
            self.feed.on_pod(self.cluster.pods[now.metadata.uid], now)

    # deciding

    async def _decide(self) -> None:
        """One round: wait for a change, carry on what is open, decide what can start."""
        timeout = self._next_look()
        try:
            async with asyncio.timeout(timeout):
                await self.feed.wake.wait()
        except TimeoutError:
            self.feed.dirty.update(k for k, p in self.cluster.plans.items() if p.status.phase in CARRIED_ON)
        self._woken = now_seconds()
        await asyncio.sleep(max(GATHER_SECONDS, self._spent))
        self.feed.wake.clear()
        dirty, self.feed.dirty = self.feed.dirty, set()
        self._read_back_unseen()
        self._bury()
        for key in dirty:
            self._carry_on(key)
        began = now_seconds()
        decided = self.queue.cycle(self.cluster, dirty, began)
        self.decided_at = now_seconds()
        self._spent = self.decided_at - began
        self.metrics.decide.observe(self._spent)
        for start in decided.starts:
            self._begin(start)
        for eviction in decided.evictions:
            self.metrics.preempted.inc(len(eviction.preemption.victims))
            for victim in eviction.preemption.victims:
                text = f"made room for {eviction.key}, which is more important"
                self._spawn(victim.metadata.uid, self._delete(victim, "PreemptionByScheduler", text))
        self._status.touch_waiting()

    def _next_look(self) -> float:
        now = now_seconds()
        due = [at + UNSEEN_SECONDS - now for uid, at in self._busy.items() if uid in self.cluster.planned]
        open_plans = [p for p in self.cluster.plans.values() if p.status.phase in (*OPEN_PHASES, "Repairing")]
        due += [plan.spec.timeout_seconds - self._elapsed(plan) for plan in open_plans]
        look = self.queue.next_look(now)
        return min([*(max(d, 0.05) for d in due), *([look] if look is not None else []), 30.0])

    def _elapsed(self, plan: GangPlan) -> float:
        """Seconds since the plan was made; the wall clock is asked once, for plans of a former leader."""
        now = now_seconds()
        if plan.spec.plan_id not in self._began:
            age = 0.0
            if plan.spec.created and plan.spec.epoch != self._binder.epoch:
                age = now - parse_time(plan.spec.created)
            self._began[plan.spec.plan_id] = now - min(max(age, 0.0), plan.spec.timeout_seconds)
        return now - self._began[plan.spec.plan_id]

    def _begin(self, start: Start) -> None:
        """A gang can start: persist the plan, then bind. A pod that is alone needs no plan: one bind is atomic."""
        if not is_group(start.key):
            ((member, node),) = start.placed
            self._spawn(member.uid, self._bind(self.cluster.pods[member.uid], node, ""))
            return
        group, before = self.cluster.groups[start.key], self.cluster.plans.get(start.key)
        members = [PlannedMember(name=m.name, uid=m.uid, node=node) for m, node in start.placed]
        if before is not None and before.status.phase == "Repairing":
            members = [m for m in before.spec.members if m.uid in self.cluster.pods] + members
        plan = before or empty_plan(group)
        spec = GangPlanSpec(
            pod_group=group.metadata.name,
            pod_group_uid=group.metadata.uid,
            plan_id=uuid.uuid4().hex[:12],
            epoch=self._binder.epoch,
            created=now_text(),
            timeout_seconds=group.spec.schedule_timeout_seconds or self.settings.timeout_seconds,
            min_member=self._quorum(start, group),
            note=start.note,
            members=members,
        )
        message = start.note or f"binding {len(start.placed)} members"
        status = msgspec.structs.replace(
            plan.status, phase="Binding", reason="Binding", message=message, position=0, waiting_since=None
        )
        self._spawn(start.key, self._save(start.key, msgspec.structs.replace(plan, spec=spec, status=status)))

    def _quorum(self, start: Start, group: PodGroup) -> int:
        """What must be there in the end; less where members are made only after the others run."""
        satisfied = sort_members(self.cluster.pods_of(start.key), self.settings.schedulers).satisfied
        return min(group.spec.min_member, satisfied + len(start.placed)) if start.note else group.spec.min_member

    def _carry_on(self, key: str) -> None:
        """The next steps of an open plan; an intent is persisted before it is acted on."""
        plan = self.cluster.plans.get(key)
        if plan is None or key in self._busy:
            return
        if plan.status.phase not in CARRIED_ON:
            if key not in self.cluster.groups and not self.cluster.members.get(key):
                self._spawn(key, self._forget(key, plan))
            return
        ledger, planned = self.cluster.ledger, {m.uid for m in plan.spec.members}
        pods = {uid: p for uid in planned if (p := self.cluster.pods.get(uid)) is not None}
        alive = {m.node: m.node in ledger.rows and bool(ledger.ready[ledger.rows[m.node]]) for m in plan.spec.members}
        beside = sum(
            p.metadata.uid not in planned
            and not p.deleting
            and (p.status.phase == "Succeeded" or bool(p.spec.node_name and not p.terminal))
            for p in self.cluster.pods_of(key)
        )
        after = advance(plan, pods, alive, beside, self._elapsed(plan))
        if after.plan is not plan:
            if after.plan.status.phase == "Waiting":
                if planned & self._busy.keys():
                    return  # a bind is still on its way: its room is kept until it is known what came of it
                self.queue.rest(key, now_seconds())
                unbound = [p for p in pods.values() if not p.spec.node_name and not p.terminal]
                self._spawn(key, self._save_fenced(key, after.plan, unbound))
                return
            if after.plan.status.phase == "Running":
                self.queue.rested(key)
                self._began.pop(plan.spec.plan_id, None)
            self._spawn(key, self._save(key, after.plan))
            return
        for step in after.steps:
            uid = step.pod.metadata.uid
            if uid in self._busy:
                continue
            if isinstance(step, Bind):
                self._spawn(uid, self._bind(step.pod, step.node, plan.spec.plan_id))
            else:
                self._spawn(uid, self._delete(step.pod, step.reason, plan.status.message))

    def _bury(self) -> None:
        """Members on a node that was deleted will never end by themselves: their owners may replace them at once."""
        lost, self.feed.lost_nodes = self.feed.lost_nodes - self.cluster.ledger.rows.keys(), set()
        for pod in list(self.cluster.pods.values()) if lost else ():
            ours = pod.spec.scheduler_name in self.settings.schedulers and is_group(gang_key(pod)) and owned(pod)
            gone = pod.spec.node_name in lost and not pod.terminal and ours
            if gone and pod.metadata.uid not in self._busy:
                text = f"node {pod.spec.node_name} was deleted"
                self._spawn(pod.metadata.uid, self._delete(pod, "DeletionByNodeLoss", text))

    def _read_back_unseen(self) -> None:
        """A bind whose success the watch does not show is asked for."""
        now = now_seconds()
        for uid, began in list(self._busy.items()):
            pod = self.cluster.pods.get(uid)
            if pod is not None and now - began >= UNSEEN_SECONDS and uid in self.cluster.planned:
                self._busy[uid] = now
                self._tasks.create_task(self._read(pod))

    # writing

    def _spawn(self, what: str, work: Coroutine[Any, Any, None]) -> None:
        self._busy[what] = now_seconds()
        self._tasks.create_task(self._limited(work))

    async def _limited(self, work: Coroutine[Any, Any, Any]) -> Any:
        async with self._slots:
            return await work

    async def _bind(self, pod: Pod, node: str, plan_id: str) -> None:
        uid, key = pod.metadata.uid, gang_key(pod)
        now: Pod | None = pod
        for attempt in range(BIND_ATTEMPTS):
            if not self._still_planned(key, uid, plan_id):
                break
            try:
                now = await self._binder.bind(pod, node, plan_id)
            except (ApiError, Unreachable) as error:
                log.warning("bind_failed", pod=pod.metadata.name, node=node, error=str(error))
                self.metrics.binds.labels("failed").inc()
                if isinstance(error, ApiError) and error.status == 403:
                    await self._forbidden(key, error)
                await pause(error, attempt, random.random())
                continue
            if now is None or now.spec.node_name:
                self.metrics.binds.labels("gone" if now is None else "bound").inc()
                break
            self.metrics.binds.labels("conflict").inc()
            await asyncio.sleep(0.02 * 2**attempt)
            pod = now  # it has changed since it was decided on, but not in a way that matters: once more
            if pod.deleting or pod.spec.scheduling_gates:
                break
        else:
            if not is_group(key):
                self.queue.rest(key, now_seconds())
        self._settle(uid, key, now)

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
                self.cluster.set_plan(key, await self._binder.save(msgspec.structs.replace(plan, status=status)))
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

    async def _read(self, pod: Pod) -> None:
        try:
            now = await self._binder.read(pod)
        except (ApiError, Unreachable) as error:
            log.warning("read_failed", pod=pod.metadata.name, error=str(error))
            return
        if now is not None:
            self._answered(now)
        elif pod.metadata.uid in self.cluster.pods:
            self.feed.on_pod(pod, None)

    async def _delete(self, pod: Pod, reason: str, message: str) -> None:
        try:
            await self._binder.delete(pod, reason, message, at_once=pod.spec.node_name not in self.cluster.ledger.rows)
        except (ApiError, Unreachable) as error:
            log.warning("delete_failed", pod=pod.metadata.name, error=str(error))
            await pause(error, 3, random.random())
        self._done(pod.metadata.uid, gang_key(pod))

    async def _save_fenced(self, key: str, plan: GangPlan, unbound: list[Pod]) -> None:
        """The end of a roll-back: a bind that was never answered must not land after its room was given away."""
        stamped = await asyncio.gather(*(self._fence(pod) for pod in unbound))
        if any(pod is not None and pod.spec.node_name for pod in stamped):
            self._done(key, key)  # it had landed: there is more to take back
        else:
            await self._save(key, plan)

    async def _save(self, key: str, plan: GangPlan) -> None:
        async with self._lock(key):
            known = self.cluster.plans.get(key)
            if known is not None and known.spec.epoch > self._binder.epoch:
                raise LeadershipLost(f"plan {key} is of epoch {known.spec.epoch}: another leads")
            if known is not None:
                plan = msgspec.structs.replace(plan, metadata=known.metadata)
            try:
                self.cluster.set_plan(key, await self._binder.save(plan))
                if known is None or known.status.phase != plan.status.phase:
                    self.metrics.moved(key, plan, now_seconds(), self._woken)
            except (ApiError, Unreachable) as error:
                log.warning("plan_not_saved", gang=key, error=str(error))
                await pause(error, 2, random.random())
                await self._reread_plan(key, plan)
        self._done(key, key)
        self._status.touch(key)

    async def _save_waiting(self, key: str, status: GangPlanStatus) -> None:
        """Say in a plan at rest why its gang waits; a gang that has begun to start meanwhile is not touched."""
        async with self._lock(key):
            group, plan = self.cluster.groups.get(key), self.cluster.plans.get(key)
            still = (key in self.queue.waiting) == (status.phase == "Waiting")
            if key in self._busy or not still or not may_be_told(plan):
                return
            if plan is None and group is None:
                return
            plan = plan if plan is not None or group is None else empty_plan(group)
            assert plan is not None
            uid = group.metadata.uid if group is not None else plan.spec.pod_group_uid
            spec = GangPlanSpec(pod_group=plan.metadata.name, pod_group_uid=uid, epoch=self._binder.epoch)
            saved = await self._binder.save(msgspec.structs.replace(plan, spec=spec, status=status))
            self.cluster.set_plan(key, saved)

    def _lock(self, key: str) -> asyncio.Lock:
        return self._locks.setdefault(key, asyncio.Lock())

    async def _reread_plan(self, key: str, plan: GangPlan) -> None:
        """Go on from the plan that is there; what the failed one promised is void unless it was saved after all."""
        for attempt in count():
            try:
                self.cluster.set_plan(key, await self._binder.reload(plan))
                break
            except (ApiError, Unreachable) as error:
                if isinstance(error, ApiError) and error.status == 404:
                    self.cluster.remove_plan(key)
                    break
                await pause(error, min(attempt, 6), random.random())
        kept = self.cluster.plans.get(key)
        if kept is None or kept.spec.plan_id != plan.spec.plan_id:
            for member in plan.spec.members:
                self.cluster.withdraw(member.uid)

    async def _forget(self, key: str, plan: GangPlan) -> None:
        async with self._lock(key):
            try:
                await self._binder.forget(plan)
            except (ApiError, Unreachable) as error:
                log.warning("plan_not_forgotten", gang=key, error=str(error))
        self._done(key, key)

    def _done(self, what: str, key: str) -> None:
        self._busy.pop(what, None)
        self.feed.dirty.add(key)
        self.feed.wake.set()
