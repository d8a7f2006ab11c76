"""Plans that are under way: how a start becomes a plan, and each look at one its next writes.

`commit.protocol` says what follows from a plan and its pods; here its steps are handed to the writes, as many at a time
as they take, and what is known of time and of former leaders is kept.
"""

from __future__ import annotations

import uuid
from collections import OrderedDict
from collections.abc import Coroutine, Iterable, Mapping, Set
from typing import Any

import msgspec
import structlog

from colocate.objects import Pod
from colocate.units import seconds_of
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
from podgroup.controller.alone import Alone
from podgroup.controller.binder import now_text
from podgroup.controller.status import empty_plan
from podgroup.controller.watches import Feed, now_seconds
from podgroup.controller.writes import Hands
from podgroup.queue.decisions import Start
from podgroup.queue.queue import Queue
from podgroup.state.cluster import CARRIED_ON, OPEN_PHASES, Cluster
from podgroup.state.gangs import is_group, sort_members, without_former_runs
from podgroup.state.storage import Progress, has_claims

CONFIRM_SECONDS = 5.0
"""That a gang is bound whole is written down only if its kubelets have not all answered after so long: whoever takes
over sees it from the pods."""
ROLL_BACK_SECONDS = 1.0
"""A gang that is being taken back is looked at again after so long."""
log = structlog.get_logger()


def _time_of(plan: GangPlan) -> float:
    """For how long a plan may be as it is."""
    return VOLUME_SECONDS if plan.status.phase == "Provisioning" else plan.spec.timeout_seconds


class OpenPlans:
    """Of one leader."""

    def __init__(self, cluster: Cluster, queue: Queue, feed: Feed, hands: Hands) -> None:
        self._cluster, self._queue, self._feed, self._hands = cluster, queue, feed, hands
        self._alone = Alone(cluster, queue, feed, hands)
        self._began: dict[str, float] = {}
        """plan id -> monotonic time of its making, as far as this process can tell."""
        self._inherited: set[str] = set()
        """The plans that were there when its time in office began."""
        self._backlog: OrderedDict[str, None] = OrderedDict()
        """The gangs whose next steps wait until there is less under way; what is under way wakes us."""
        self._unwritten: dict[str, float] = {}
        """Gang that is bound whole, which is not written down yet -> until when."""

    def inherit(self) -> None:
        """The plans that are there are a former leader's."""
        self._inherited = {p.spec.plan_id for p in self._cluster.plans.values()}

    def is_open(self, key: str) -> bool:
        """Whether a gang is being started."""
        plan = self._cluster.plans.get(key)
        return plan is not None and plan.status.phase in OPEN_PHASES

    def keys(self) -> set[str]:
        """The gangs that must be looked at in time, whatever the watches tell."""
        return {k for k, p in self._cluster.plans.items() if p.status.phase in CARRIED_ON} | self._alone.keys()

    def due(self, now: float) -> list[float]:
        """In how many seconds each must be."""
        plans = self._cluster.plans.values()
        open_plans = [p for p in plans if p.status.phase in (*OPEN_PHASES, "Repairing")]
        self._unwritten = {key: at for key, at in self._unwritten.items() if self.is_open(key)}
        due = [at - now for at in self._unwritten.values()]
        due += [ROLL_BACK_SECONDS for p in plans if p.status.phase == "RollingBack"]
        due += [_time_of(plan) - self._elapsed(plan) for plan in open_plans]
        return due + self._alone.due(now)

    def carry_on(self, dirty: Iterable[str]) -> None:
        """The next steps of these, and of those for which there was too much under way."""
        for key in dirty:
            self._carry_on(key)
        while self._backlog and not self._hands.full:
            self._carry_on(self._backlog.popitem(last=False)[0])

    def _elapsed(self, plan: GangPlan) -> float:
        """Seconds since the plan was made; the wall clock is asked once, for plans of a former leader."""
        now = now_seconds()
        if plan.spec.plan_id not in self._began:
            age = 0.0
            if plan.spec.created and plan.spec.epoch != self._hands.binder.epoch:
                age = now - (seconds_of(plan.spec.created) or now)
            self._began[plan.spec.plan_id] = now - min(max(age, 0.0), plan.spec.timeout_seconds)
        return now - self._began[plan.spec.plan_id]

    def begin(self, start: Start) -> None:
        """A gang can start: persist the plan, then bind. A pod that is alone needs no plan: one bind is atomic."""
        if not is_group(start.key):
            ((member, node),) = start.placed
            if member.uid not in self._cluster.pods:
                return
            if self._cluster.volumes_of(member.uid).state == "Bound":
                self._hands.spawn(member.uid, self._hands.bind(self._cluster.pods[member.uid], node, ""))
            else:
                self._alone.begin(start.key, member.uid)
            return
        group, before = self._cluster.groups.get(start.key), self._cluster.plans.get(start.key)
        if group is None:  # it went while its gang was put off
            for member, _ in start.placed:
                self._cluster.withdraw(member.uid)
            return
        if before is not None and before.spec.pod_group_uid not in ("", group.metadata.uid):
            before = msgspec.structs.replace(before, spec=GangPlanSpec(), status=GangPlanStatus())  # another gang's
        chosen = self._cluster.storage.written_in_plan
        members = [PlannedMember(name=m.name, uid=m.uid, node=node, volumes=chosen(m.uid)) for m, node in start.placed]
        if before is not None and before.status.phase == "Repairing":
            still = [self._cluster.pods.get(m.uid) for m in before.spec.members]
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
            timeout_seconds=group.spec.schedule_timeout_seconds or self._queue.settings.timeout_seconds,
            min_member=self._quorum(start, group),
            note=start.note,
            members=members,
        )
        waits = [m.name for m, _ in start.placed if self._cluster.volumes_of(m.uid).state != "Bound"]
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
        return any(p.spec.node_name and not p.terminal for p in self._cluster.pods_of(key))

    def _quorum(self, start: Start, group: PodGroup) -> int:
        """What must be there in the end; less where members are made only after the others run."""
        satisfied = sort_members(self._cluster.pods_of(start.key), self._queue.settings.schedulers).satisfied
        return min(group.spec.min_member, satisfied + len(start.placed)) if start.note else group.spec.min_member

    def _alive(self, plan: GangPlan) -> dict[str, bool]:
        """Of the members' nodes those that are there, and whether they are ready or their members do not mind."""
        ledger = self._cluster.ledger
        there = [(m, row) for m in plan.spec.members if (row := ledger.rows.get(m.node)) is not None]
        return {m.node: bool(ledger.ready[row]) or self._minds_nothing(m, row) for m, row in there}

    def _minds_nothing(self, member: PlannedMember, row: int) -> bool:
        pod = self._cluster.pods.get(member.uid)
        return pod is not None and bool(self._cluster.ledger.awake(self._cluster.shape(pod).tolerations)[row])

    def _carry_on(self, key: str) -> None:
        """The next steps of an open plan; an intent is persisted before it is acted on."""
        if not is_group(key):
            self._alone.carry_on(key)
            return
        plan = self._cluster.plans.get(key)
        if plan is None or key in self._feed.busy:
            return
        gone = key not in self._cluster.groups and all(p.terminal for p in self._cluster.pods_of(key))
        if plan.status.phase not in CARRIED_ON or (gone and plan.status.phase == "Repairing"):
            if gone:
                self._hands.spawn(key, self._hands.forget(key, plan))
            return
        planned = {m.uid for m in plan.spec.members}
        pods = {uid: p for uid in planned if (p := self._cluster.pods.get(uid)) is not None}
        alive = self._alive(plan)
        overfull = self._cluster.overfull({m.uid: m.node for m in plan.spec.members if m.uid in self._cluster.planned})
        elsewhere = displaced(plan, pods, alive, overfull)
        if elsewhere and self._moves(key, plan, elsewhere):
            return
        if (
            plan.status.phase in ("Provisioning", "Binding")
            and self._late(plan)
            and not any(p.spec.node_name for p in pods.values())
        ):
            self._hands.spawn(key, self._hands.save(key, take_back(plan)))
            return
        volumes = {
            uid: self._cluster.volumes_of(uid) for uid, p in pods.items() if not p.spec.node_name and has_claims(p)
        }
        after = advance(plan, pods, alive, self._beside(key, planned), self._elapsed(plan), volumes, overfull)
        if after.plan is not plan:
            self._becomes(key, plan, after.plan, pods, volumes)
            return
        if now_seconds() >= self._unwritten.get(key, float("inf")):
            del self._unwritten[key]
            self._hands.spawn(key, self._hands.save(key, plan))
            return
        for step in after.steps:
            uid = step.pod.metadata.uid
            if uid in self._feed.busy:
                continue
            if self._hands.full:
                self._backlog[key] = None
                break
            self._hands.spawn(uid, self._do(step, plan, volumes))

    def _beside(self, key: str, planned: Set[str]) -> int:
        """How many members are satisfied that are not part of the plan."""
        return sum(
            p.metadata.uid not in planned
            and not p.deleting
            and (p.status.phase == "Succeeded" or bool(p.spec.node_name and not p.terminal))
            for p in without_former_runs(self._cluster.pods_of(key))
        )

    def _becomes(
        self, key: str, plan: GangPlan, now: GangPlan, pods: Mapping[str, Pod], volumes: Mapping[str, Progress]
    ) -> None:
        """A plan has come further: what must be known of that is written down."""
        members = {m.uid for m in plan.spec.members}
        if now.status.phase == "Waiting":
            self._began.pop(plan.spec.plan_id, None)
            if members & self._feed.busy.keys():
                return  # a bind is still on its way: its room is kept until it is known what came of it
            self._queue.back_off(key, now_seconds(), plan.spec.plan_id)
            unbound = [p for p in pods.values() if not p.spec.node_name and not p.terminal]
            self._hands.spawn(key, self._hands.save_fenced(key, now, unbound))
            return
        if now.status.phase == "Running":
            self._queue.forget_back_off(key)
            self._began.pop(plan.spec.plan_id, None)
        self._release_of_dropped(plan, now, volumes)
        if (plan.status.phase, now.status.phase) == ("Binding", "Confirming"):
            self._unwritten[key] = now_seconds() + CONFIRM_SECONDS
            self._hands.metrics.moved(key, now, now_seconds(), self._hands.woken)
            self._cluster.set_plan(key, now)
            self._feed.look_again(key)
            return
        self._unwritten.pop(key, None)
        self._hands.spawn(key, self._hands.save(key, self._timed(plan, now)))

    def _moves(self, key: str, plan: GangPlan, members: list[Pod]) -> bool:
        """Other places for members that cannot be bound where the plan has them; whether that is under way."""
        uids = {p.metadata.uid for p in members}
        if uids & self._feed.busy.keys():
            return True  # what comes of a bind that is on its way must be known first
        if any(self._cluster.shape(p).unbound for p in members):
            return False  # a volume may be on its way to where it is
        placed = self._queue.place_again(self._cluster, key, members)
        before = {m.uid: m.node for m in plan.spec.members}
        if placed is None or all(before[m.uid] == node for m, node in placed):
            return False
        after = moved(plan, {m.uid: node for m, node in placed})
        log.info("members_moved", gang=key, members=sorted(m.name for m, _ in placed))
        left = [self._cluster.ledger.holdings[uid]._replace(uid=f"left:{uid}", kept=True) for uid in uids]
        for holding in left:  # until a bind that is still on its way can no longer land there
            self._cluster.ledger.hold(holding)
        self._cluster.promise_all((member.uid, node) for member, node in placed)
        self._hands.spawn(key, self._hands.save_moved(key, after, members, [h.uid for h in left]))
        return True

    def _release_of_dropped(self, before: GangPlan, now: GangPlan, volumes: Mapping[str, Progress]) -> None:
        """Members that a plan goes on without: their volumes are asked for no more, but for what others share."""
        left = {m.uid for m in now.spec.members}
        for uid in {m.uid for m in before.spec.members} - left if now.status.phase == "Provisioning" else ():
            storage, pod = self._cluster.storage, self._cluster.pods.get(uid)
            mine = tuple(
                todo
                for todo in volumes.get(uid, Progress()).written
                if not left & storage.wanting(f"{todo.claim.metadata.namespace}/{todo.claim.metadata.name}")
            )
            if mine and pod is not None and uid not in self._feed.busy:
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
