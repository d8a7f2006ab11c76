"""The shell of gang scheduling: watches feed the cluster, the queue decides, plans are persisted and carried out.

    watch -> Cluster -> Queue.cycle -> GangPlan (persisted) -> commit.advance -> bind, delete -> watch -> ...

One task decides; writes run beside it, a pod or a plan never in two at once. Nothing that is held in memory is needed
after a crash: plans, pods and groups are read anew, and open plans are carried on before anything new is decided.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import uuid
from collections.abc import Coroutine, Mapping
from functools import partial
from typing import Any

import msgspec
import structlog

from colocate.kube.client import DEFINITIONS, Api, ApiError, Unreachable
from colocate.kube.lease import Election, LeadershipLost
from colocate.kube.reflector import Reflector
from colocate.objects import Pod
from colocate.units import seconds_of, time_text
from podgroup.api import GangPlan, GangPlanSpec, GangPlanStatus, PlannedMember, PlanPhase, PodGroup
from podgroup.commit.protocol import (
    VOLUME_SECONDS,
    Bind,
    BindVolumes,
    Delete,
    Step,
    advance,
    displaced,
    moved,
    take_back,
)
from podgroup.controller.advisor import Advisor
from podgroup.controller.alone import Alone
from podgroup.controller.announcements import AT_ONCE
from podgroup.controller.binder import EPOCH, Binder, now_text
from podgroup.controller.losses import GIVE_UP_AGAIN_SECONDS, Losses
from podgroup.controller.metrics import Metrics
from podgroup.controller.status import StatusWriter, empty_plan
from podgroup.controller.watches import Feed, now_seconds
from podgroup.controller.writes import PREEMPTED, Hands
from podgroup.dialects.scheduling_sigs import DIALECT
from podgroup.explain.snapshot import ClusterSnapshot, taken_of, verdicts_of
from podgroup.policy import policy_named
from podgroup.queue.decisions import Decisions, PlaceInTurn, Start
from podgroup.queue.entry import Settings
from podgroup.queue.queue import Queue
from podgroup.state.cluster import CARRIED_ON, OPEN_PHASES, Cluster
from podgroup.state.gangs import is_group, sort_members, without_former_runs
from podgroup.state.storage import Progress, has_claims

LARGE, LOOK_SECONDS = 200, 2e-5
"""A gang of at least so many members is looked at again only after so long for each of them."""
BINDING_SECONDS = 0.02
"""A gang whose members are being bound is looked at once for the answers of so long."""
GATHER_SECONDS = 0.005
"""Changes that come together are decided together."""
ROLL_BACK_SECONDS = 1.0
"""A gang that is being taken back is looked at again after so long."""
SEARCHES_A_CYCLE = 16
"""For so many gangs victims are looked for in one go: watches and the lease must not wait."""
UNSEEN_SECONDS = 5.0
"""A bind that succeeded and is not seen in the watch for so long is read back."""
log = structlog.get_logger()


def settle_memory() -> None:
    """What has been listed stays: the garbage collector need not look at it again and again (gc.freeze, CPython)."""
    gc.unfreeze()  # what an earlier time in office left
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


CYCLE_SECONDS = 0.02
"""How long a look at the queue may take before watches, the lease and writes have their turn."""


def _time_of(plan: GangPlan) -> float:
    """For how long a plan may be as it is."""
    return VOLUME_SECONDS if plan.status.phase == "Provisioning" else plan.spec.timeout_seconds


class Controller:
    """One leader's time in office."""

    def __init__(
        self, api: Api, settings: Settings, election: Election, place_in_turn: PlaceInTurn | None = None
    ) -> None:
        self._api, self.settings, self._election = api, settings, election
        self.cluster = Cluster(policy_named(settings.policy))
        self.queue = Queue(settings, SEARCHES_A_CYCLE, place_in_turn)
        self.metrics = Metrics()
        self._hands = Hands(self.cluster, self.queue, Binder(api, 0, election), self.metrics)
        self._status = StatusWriter(self.cluster, self.queue, self._hands.save_waiting)
        self.feed = Feed(self.cluster, self.queue, self._status.touch, self._refused)
        self._hands.connect(self.feed, self._status.touch)
        self._busy = self.feed.busy
        self._began: dict[str, float] = {}
        """plan id -> monotonic time of its making, as far as this process can tell."""
        self.reflectors: list[Reflector[Any]] = []
        self._look_at = float("inf")
        """When open plans are looked at whatever the watches tell."""
        self._not_before: dict[str, float] = {}
        """Large gang -> when it is looked at again."""
        self._inherited: set[str] = set()
        """The plans that were there when its time in office began."""
        self._said: dict[str, str] = {}
        """Gang -> the defect that was logged of it."""
        self._wanted: asyncio.Future[ClusterSnapshot] | None = None
        """Whoever wants to see what a cycle goes by and decides."""
        self._alone = Alone(self.cluster, self.queue, self.feed, self._hands)
        self._losses = Losses(self.cluster, self.feed, self._hands, self.metrics, settings)
        self._tasks: asyncio.TaskGroup
        self._spent = 0.0
        """Of the last look at the queue: for as long the next changes are gathered, so that watches are read too."""
        self.alive_at: float | None = None
        """When the queue was last looked at, or its time in office began; None while it stands by."""

    @property
    def synced(self) -> bool:
        """Whether everything that is watched has been listed."""
        return bool(self.reflectors) and all(r.synced.is_set() for r in self.reflectors)

    async def run(self, epoch: int) -> None:
        """Lead until cancelled. Raises LeadershipLost."""
        self._hands.binder.epoch, self.alive_at = epoch, now_seconds()
        try:
            async with asyncio.TaskGroup() as self._tasks:
                self._hands.tasks = self._tasks
                await self._watch()
                settle_memory()
                await self._take_over()
                self.queue.remember(self.cluster, now_seconds())
                self._status.conditions = await self._schema_has_conditions()
                self._tasks.create_task(self._status.run(self._hands.binder))
                for _ in range(AT_ONCE):
                    self._tasks.create_task(self._hands.announcements.run(self._hands.binder))
                self._tasks.create_task(Advisor(self.cluster, self.queue, self._status.advise).run())
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
        (group, version), plural = DIALECT.api.split("/"), DIALECT.groups.path.rpartition("/")[2]
        try:
            definition = msgspec.json.decode(await self._api.request("GET", f"{DEFINITIONS}/{plural}.{group}"))
        except (ApiError, Unreachable) as error:
            log.warning("podgroup_schema_unknown", error=str(error))
            return False
        for served in definition["spec"]["versions"]:
            fields = served["schema"]["openAPIV3Schema"]["properties"].get("status", {}).get("properties", {})
            if served["name"] == version:
                return "conditions" in fields and "observedGeneration" in fields
        return False

    def _refused(self, reason: str) -> None:
        self.metrics.rejections.labels(reason).inc()

    # taking over

    async def _take_over(self) -> None:
        """Fence off a predecessor that may still be writing: afterwards its binds fail on the pods' resourceVersion.

        A lease that somebody deleted tells of no predecessor and counts from 0 again; plans and marks of pods tell.
        """
        self._inherited = {p.spec.plan_id for p in self.cluster.plans.values()}
        binder, latest = self._hands.binder, max((p.spec.epoch for p in self.cluster.plans.values()), default=-1)
        binder.epoch = max(binder.epoch, latest + 1)
        led_before = any(EPOCH in p.metadata.annotations for p in self.cluster.pods.values())
        if not self._election.predecessor and not (self._election.made and (led_before or latest >= 0)):
            self._election.settled = True
            return
        pending = [
            p
            for p in self.cluster.pods.values()
            if p.spec.scheduler_name in self.settings.schedulers and not p.spec.node_name and not p.terminal
        ]
        since = now_seconds()
        log.info("fencing", predecessor=self._election.predecessor, pods=len(pending))

        async def fence(pod: Pod) -> None:
            await self._hands.limited(self._hands.fence(pod, since))
            self.alive_at = now_seconds()

        await asyncio.gather(*(fence(p) for p in pending))
        self._election.settled = True

    # deciding

    async def _decide(self) -> None:
        """One round: wait for a change, carry on what is open, decide what can start."""
        self._look_at = min(self._look_at, now_seconds() + self._next_look())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(self._look_at - now_seconds(), 0.0)):
                await self.feed.wake.wait()
        if now_seconds() >= self._look_at:  # also in a cluster that is never silent
            self._look_at = float("inf")
            self.feed.dirty.update(k for k, p in self.cluster.plans.items() if p.status.phase in CARRIED_ON)
            self.feed.dirty.update(self._alone.keys())
        self._hands.woken = now_seconds()
        await asyncio.sleep(max(GATHER_SECONDS, self._spent))
        self.feed.wake.clear()
        dirty = self._due()
        self._read_back_unseen()
        self._losses.give_up()
        for key in dirty:
            self._carry_on(key)
        began = now_seconds()
        if self._wanted is not None:
            decided = self._decide_for(self._wanted, dirty, began)
        else:
            later = self.feed.dirty & self._not_before.keys()
            decided = self.queue.cycle(self.cluster, dirty, began, later, lambda: now_seconds() - began > CYCLE_SECONDS)
        for key, error in decided.failures:
            if self._said.get(key) != repr(error):
                self._said[key] = repr(error)
                log.error("gang_not_decided", gang=key, exc_info=error)
        self.alive_at = now_seconds()
        self._spent = self.alive_at - began
        self.metrics.decide.observe(self._spent)
        for start in decided.starts:
            self._begin(start)
        for eviction in decided.evictions:
            self.metrics.preempted.inc(len(eviction.preemption.victims))
            for victim in eviction.preemption.victims:
                text = f"made room for {eviction.key}, which is more important"
                wanted = partial(self.queue.makes_room, eviction.key)
                deletion = self._hands.delete(victim, PREEMPTED, text, wanted)
                self._hands.spawn(victim.metadata.uid, deletion)
        self._write_kept_places()
        self._status.touch_waiting()
        if self.queue.unfinished or self.queue.victims.unfinished:
            self.feed.wake.set()

    async def snapshot(self) -> ClusterSnapshot:
        """The cluster, what the queue remembers, and what the next cycle, which looks at every gang, decides on it."""
        if self._wanted is None:
            self._wanted = asyncio.get_running_loop().create_future()
        self.feed.wake.set()
        return await asyncio.shield(self._wanted)

    def _decide_for(self, wanted: asyncio.Future[ClusterSnapshot], dirty: set[str], now: float) -> Decisions:
        taken = taken_of(self.cluster, self.settings, time_text(now))
        memory = self.queue.memory(self.cluster, now)
        everybody = {*dirty, *self.cluster.members, *self.cluster.groups, *self.queue.waiting}
        decided = self.queue.cycle(self.cluster, everybody, now)
        verdicts = verdicts_of(self.cluster, self.queue, decided)
        self._wanted = None
        if not wanted.done():
            wanted.set_result(msgspec.structs.replace(taken, memory=memory, verdicts=verdicts))
        return decided

    def _write_kept_places(self) -> None:
        """Plans at rest say which places are kept for lost members; the others are written anyhow."""
        for key in self.feed.lost_members - self._busy.keys():
            self.feed.lost_members.discard(key)
            plan = self.cluster.plans.get(key)
            if plan is not None and plan.status.phase not in CARRIED_ON and self.queue.holds.places(self.cluster, key):
                self._hands.spawn(key, self._hands.save(key, plan))

    def _due(self) -> set[str]:
        """The gangs to be looked at now: not each of them after each bind of one of its members."""
        dirty, self.feed.dirty, now = self.feed.dirty, set(), now_seconds()
        self._not_before = {key: at for key, at in self._not_before.items() if at > now}
        for key in dirty:
            members = len(self.cluster.members.get(key, ()))
            if key in self._not_before:
                self.feed.dirty.add(key)
            elif members >= LARGE:
                self._not_before[key] = now + members * LOOK_SECONDS
            elif members > 1 and not self._busy.keys().isdisjoint(self.cluster.members[key]):
                self._not_before[key] = now + BINDING_SECONDS
        return dirty - self.feed.dirty

    def _next_look(self) -> float:
        now = now_seconds()
        due = [at - now for key, at in self._not_before.items() if key in self.feed.dirty]
        due += [at + UNSEEN_SECONDS - now for uid, at in self._busy.items() if uid in self.cluster.planned]
        open_plans = [p for p in self.cluster.plans.values() if p.status.phase in (*OPEN_PHASES, "Repairing")]
        due += [ROLL_BACK_SECONDS for p in self.cluster.plans.values() if p.status.phase == "RollingBack"]
        due += [_time_of(plan) - self._elapsed(plan) for plan in open_plans]
        due += self._alone.due(now)
        look = self.queue.next_look(now)
        lost = self.feed.lost_nodes.next_due(now)
        due += [lost] if lost is not None else []
        due += [GIVE_UP_AGAIN_SECONDS] if self.feed.lost_nodes.names else []
        return min([*(max(d, 0.05) for d in due), *([look] if look is not None else []), 30.0])

    def _elapsed(self, plan: GangPlan) -> float:
        """Seconds since the plan was made; the wall clock is asked once, for plans of a former leader."""
        now = now_seconds()
        if plan.spec.plan_id not in self._began:
            age = 0.0
            if plan.spec.created and plan.spec.epoch != self._hands.binder.epoch:
                age = now - (seconds_of(plan.spec.created) or now)
            self._began[plan.spec.plan_id] = now - min(max(age, 0.0), plan.spec.timeout_seconds)
        return now - self._began[plan.spec.plan_id]

    def _begin(self, start: Start) -> None:
        """A gang can start: persist the plan, then bind. A pod that is alone needs no plan: one bind is atomic."""
        if not is_group(start.key):
            ((member, node),) = start.placed
            if member.uid not in self.cluster.pods:
                return
            if self.cluster.volumes_of(member.uid).state == "Bound":
                self._hands.spawn(member.uid, self._hands.bind(self.cluster.pods[member.uid], node, ""))
            else:
                self._alone.begin(start.key, member.uid)
            return
        group, before = self.cluster.groups.get(start.key), self.cluster.plans.get(start.key)
        if group is None:  # it went while its gang was put off
            for member, _ in start.placed:
                self.cluster.withdraw(member.uid)
            return
        if before is not None and before.spec.pod_group_uid not in ("", group.metadata.uid):
            before = msgspec.structs.replace(before, spec=GangPlanSpec(), status=GangPlanStatus())  # another gang's
        chosen = self.cluster.storage.written_in_plan
        members = [PlannedMember(name=m.name, uid=m.uid, node=node, volumes=chosen(m.uid)) for m, node in start.placed]
        if before is not None and before.status.phase == "Repairing":
            still = [self.cluster.pods.get(m.uid) for m in before.spec.members]
            alive = {p.metadata.uid for p in still if p is not None and not p.terminal}
            members = [m for m in before.spec.members if m.uid in alive] + members
        plan, plan_id, created = before or empty_plan(start.key), uuid.uuid4().hex[:12], now_text()
        if before is not None and before.status.phase == "Repairing":  # one time for all attempts: it must end
            created = before.spec.created or created
            self._began[plan_id] = now_seconds() - self._elapsed(before)
            self._began.pop(before.spec.plan_id, None)
        spec = GangPlanSpec(
            pod_group=group.metadata.name,
            pod_group_uid=group.metadata.uid,
            plan_id=plan_id,
            epoch=self._hands.binder.epoch,
            created=created,
            began=(before.spec.began if before is not None and self._lives(start.key) else None) or now_text(),
            timeout_seconds=group.spec.schedule_timeout_seconds or self.settings.timeout_seconds,
            min_member=self._quorum(start, group),
            note=start.note,
            members=members,
        )
        waits = [m.name for m, _ in start.placed if self.cluster.volumes_of(m.uid).state != "Bound"]
        phase: PlanPhase = "Provisioning" if waits else "Binding"
        message = start.note or f"binding {len(start.placed)} members"
        if waits:
            message = f"before anybody is bound, {len(waits)} members get their volumes: {', '.join(waits[:3])}"
            message += ", ..." if len(waits) > 3 else ""
        status = msgspec.structs.replace(
            plan.status, phase=phase, reason=phase, message=message, position=0, waiting_since=None
        )
        self._hands.spawn(
            start.key, self._hands.save(start.key, msgspec.structs.replace(plan, spec=spec, status=status))
        )

    def _lives(self, key: str) -> bool:
        """Whether a gang has members on nodes: what is planned now belongs to the same run."""
        return any(p.spec.node_name and not p.terminal for p in self.cluster.pods_of(key))

    def _quorum(self, start: Start, group: PodGroup) -> int:
        """What must be there in the end; less where members are made only after the others run."""
        satisfied = sort_members(self.cluster.pods_of(start.key), self.settings.schedulers).satisfied
        return min(group.spec.min_member, satisfied + len(start.placed)) if start.note else group.spec.min_member

    def _awake(self, member: PlannedMember) -> bool:
        """Whether a member's node is ready, or the member does not mind."""
        ledger, pod = self.cluster.ledger, self.cluster.pods.get(member.uid)
        tolerations = self.cluster.shape(pod).tolerations if pod is not None else ()
        return bool(ledger.awake(tolerations)[ledger.rows[member.node]])

    def _carry_on(self, key: str) -> None:
        """The next steps of an open plan; an intent is persisted before it is acted on."""
        if not is_group(key):
            self._alone.carry_on(key)
            return
        plan = self.cluster.plans.get(key)
        if plan is None or key in self._busy:
            return
        gone = key not in self.cluster.groups and not self.cluster.members.get(key)
        if plan.status.phase not in CARRIED_ON or (gone and plan.status.phase == "Repairing"):
            if gone:
                self._hands.spawn(key, self._hands.forget(key, plan))
            return
        ledger, planned = self.cluster.ledger, {m.uid for m in plan.spec.members}
        pods = {uid: p for uid in planned if (p := self.cluster.pods.get(uid)) is not None}
        alive = {m.node: self._awake(m) for m in plan.spec.members if m.node in ledger.rows}
        overfull = self.cluster.overfull({m.uid: m.node for m in plan.spec.members if m.uid in self.cluster.planned})
        elsewhere = displaced(plan, pods, alive, overfull)
        if elsewhere and self._moves(key, plan, elsewhere):
            return
        beside = sum(
            p.metadata.uid not in planned
            and not p.deleting
            and (p.status.phase == "Succeeded" or bool(p.spec.node_name and not p.terminal))
            for p in without_former_runs(self.cluster.pods_of(key))
        )
        if (
            plan.status.phase in ("Provisioning", "Binding")
            and self._late(plan)
            and not any(p.spec.node_name for p in pods.values())
        ):
            self._hands.spawn(key, self._hands.save(key, take_back(plan)))
            return
        volumes = {
            uid: self.cluster.volumes_of(uid) for uid, p in pods.items() if has_claims(p) and not p.spec.node_name
        }
        after = advance(plan, pods, alive, beside, self._elapsed(plan), volumes, overfull)
        if after.plan is not plan:
            if after.plan.status.phase == "Waiting":
                self._began.pop(plan.spec.plan_id, None)
                if planned & self._busy.keys():
                    return  # a bind is still on its way: its room is kept until it is known what came of it
                self.queue.back_off(key, now_seconds(), plan.spec.plan_id)
                unbound = [p for p in pods.values() if not p.spec.node_name and not p.terminal]
                self._hands.spawn(key, self._hands.save_fenced(key, after.plan, unbound))
                return
            if after.plan.status.phase == "Running":
                self.queue.forget_back_off(key)
                self._began.pop(plan.spec.plan_id, None)
            self._release_of_dropped(plan, after.plan, volumes)
            self._hands.spawn(key, self._hands.save(key, self._timed(plan, after.plan)))
            return
        for step in after.steps:
            uid = step.pod.metadata.uid
            if uid in self._busy:
                continue
            if self._hands.full:
                self.feed.dirty.add(key)  # the rest with the next look: what is under way wakes us
                break
            self._hands.spawn(uid, self._do(step, plan, volumes))

    def _moves(self, key: str, plan: GangPlan, members: list[Pod]) -> bool:
        """Other places for members that cannot be bound where the plan has them; whether that is under way."""
        uids = {p.metadata.uid for p in members}
        if uids & self._busy.keys():
            return True  # what comes of a bind that is on its way must be known first
        if any(self.cluster.shape(p).unbound for p in members):
            return False  # a volume may be on its way to where it is
        placed = self.queue.place_again(self.cluster, key, members)
        before = {m.uid: m.node for m in plan.spec.members}
        if placed is None or all(before[m.uid] == node for m, node in placed):
            return False
        after = moved(plan, {m.uid: node for m, node in placed})
        log.info("members_moved", gang=key, members=sorted(m.name for m, _ in placed))
        left = [self.cluster.ledger.holdings[uid]._replace(uid=f"left:{uid}", kept=True) for uid in uids]
        for holding in left:  # until a bind that is still on its way can no longer land there
            self.cluster.ledger.hold(holding)
        self.cluster.promise_all((member.uid, node) for member, node in placed)
        self._hands.spawn(key, self._hands.save_moved(key, after, members, [h.uid for h in left]))
        return True

    def _release_of_dropped(self, before: GangPlan, now: GangPlan, volumes: Mapping[str, Progress]) -> None:
        """Members that a plan goes on without: their volumes are asked for no more, but for what others share."""
        left = {m.uid for m in now.spec.members}
        for uid in {m.uid for m in before.spec.members} - left if now.status.phase == "Provisioning" else ():
            storage, pod = self.cluster.storage, self.cluster.pods.get(uid)
            mine = tuple(
                todo
                for todo in volumes.get(uid, Progress()).written
                if not left & storage.wanting(f"{todo.claim.metadata.namespace}/{todo.claim.metadata.name}")
            )
            if mine and pod is not None and uid not in self._busy:
                self._hands.spawn(uid, self._hands.release_volumes(pod, mine))

    def _do(self, step: Step, plan: GangPlan, volumes: Mapping[str, Progress]) -> Coroutine[Any, Any, None]:
        if isinstance(step, Bind):
            return self._hands.bind(step.pod, step.node, plan.spec.plan_id)
        if isinstance(step, Delete):
            return self._hands.delete(step.pod, step.reason, plan.status.message)
        if isinstance(step, BindVolumes):
            return self._hands.bind_volumes(step.pod, step.node)
        return self._hands.release_volumes(step.pod, volumes[step.pod.metadata.uid].written)

    def _timed(self, before: GangPlan, now: GangPlan) -> GangPlan:
        """The time for binding begins when all volumes are there."""
        if (before.status.phase, now.status.phase) != ("Provisioning", "Binding"):
            return now
        self._began[before.spec.plan_id] = now_seconds()
        return msgspec.structs.replace(now, spec=msgspec.structs.replace(now.spec, created=now_text()))

    def _late(self, plan: GangPlan) -> bool:
        """Whether a plan was written when nobody reckoned with it any more: a request that was long under way."""
        former = plan.spec.epoch < self._hands.binder.epoch and plan.spec.plan_id not in self._inherited
        return former or plan.spec.plan_id in self._hands.abandoned

    def _read_back_unseen(self) -> None:
        """A bind whose success the watch does not show is asked for."""
        now = now_seconds()
        for uid, began in list(self._busy.items()):
            pod = self.cluster.pods.get(uid)
            if pod is not None and now - began >= UNSEEN_SECONDS and uid in self.cluster.planned:
                self._busy[uid] = now
                self._tasks.create_task(self._hands.read(pod))
