"""The shell of gang scheduling: watches feed the cluster, the queue decides, plans are persisted and carried out.

    watch -> Cluster -> Queue.cycle -> GangPlan (persisted) -> commit.advance -> bind, delete -> watch -> ...

One task decides; writes run beside it, a pod or a plan never in two at once. Nothing that is held in memory is needed
after a crash: plans, pods and groups are read anew, and open plans are carried on before anything new is decided.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Iterable
from functools import partial
from typing import Any

import msgspec
import structlog

from colocate.kube.client import DEFINITIONS, Api, ApiError, Unreachable
from colocate.kube.lease import Election, LeadershipLost
from colocate.kube.reflector import Reflector
from colocate.objects import Pod
from colocate.units import time_text
from podgroup.api import PowerBudget
from podgroup.controller.advisor import Advisor
from podgroup.controller.announcements import AT_ONCE
from podgroup.controller.binder import EPOCH, Binder
from podgroup.controller.losses import GIVE_UP_AGAIN_SECONDS, Losses
from podgroup.controller.metrics import Metrics
from podgroup.controller.open_plans import OpenPlans
from podgroup.controller.power_budgets import PowerBudgets
from podgroup.controller.power_shares import PowerShares
from podgroup.controller.status import StatusWriter
from podgroup.controller.watches import Feed, now_seconds
from podgroup.controller.writes import PREEMPTED, Hands
from podgroup.dialects.scheduling_sigs import DIALECT
from podgroup.explain.snapshot import ClusterSnapshot, taken_of, verdicts_of
from podgroup.policy import policy_named
from podgroup.queue.decisions import Decisions, PlaceInTurn
from podgroup.queue.entry import Settings
from podgroup.queue.queue import Queue
from podgroup.state.cluster import CARRIED_ON, Cluster

LARGE, LOOK_SECONDS = 200, 2e-5
"""A gang of at least so many members is looked at again only after so long for each of them."""
BINDING_SECONDS = 0.05
"""A gang whose members are being bound is looked at once for the answers of so long."""
GATHER_SECONDS = 0.005
"""Changes that come together are decided together."""
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
        self.reflectors: list[Reflector[Any]] = []
        self._look_at = float("inf")
        """When open plans are looked at whatever the watches tell."""
        self._not_before: dict[str, float] = {}
        """Large gang -> when it is looked at again."""
        self._said: dict[str, str] = {}
        """Gang -> the defect that was logged of it."""
        self._wanted: asyncio.Future[ClusterSnapshot] | None = None
        """Whoever wants to see what a cycle goes by and decides."""
        self._plans = OpenPlans(self.cluster, self.queue, self.feed, self._hands)
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
                budgets = PowerBudgets(self._api, self._election, self.cluster.ledger, self._power_budgets)
                self._tasks.create_task(budgets.run())
                shares = PowerShares(self._api, self._election, self.cluster.ledger, self._power_budgets)
                self._tasks.create_task(shares.run())
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

    def _power_budgets(self) -> Iterable[PowerBudget]:
        return (o for r in self.reflectors for o in r.objects.values() if isinstance(o, PowerBudget))

    def _refused(self, reason: str) -> None:
        self.metrics.rejections.labels(reason).inc()

    # taking over

    async def _take_over(self) -> None:
        """Fence off a predecessor that may still be writing: afterwards its binds fail on the pods' resourceVersion.

        A lease that somebody deleted tells of no predecessor and counts from 0 again; plans and marks of pods tell.
        """
        self._plans.inherit()
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
            self.feed.dirty.update(self._plans.keys())
        self._hands.woken = now_seconds()
        await asyncio.sleep(max(GATHER_SECONDS, self._spent))
        self.feed.wake.clear()
        dirty = self._due()
        self._read_back_unseen()
        self._losses.give_up()
        self._plans.carry_on(dirty)
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
            self._plans.begin(start)
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
            elif members > 1 and (
                self._plans.is_open(key) or not self._busy.keys().isdisjoint(self.cluster.members[key])
            ):
                self._not_before[key] = now + BINDING_SECONDS
        return dirty - self.feed.dirty

    def _next_look(self) -> float:
        now = now_seconds()
        due = [at - now for key, at in self._not_before.items() if key in self.feed.dirty]
        due += [at + UNSEEN_SECONDS - now for uid, at in self._busy.items() if uid in self.cluster.planned]
        due += self._plans.due(now)
        look = self.queue.next_look(now)
        lost = self.feed.lost_nodes.next_due(now)
        due += [lost] if lost is not None else []
        due += [GIVE_UP_AGAIN_SECONDS] if self.feed.lost_nodes.names else []
        return min([*(max(d, 0.05) for d in due), *([look] if look is not None else []), 30.0])

    def _read_back_unseen(self) -> None:
        """A bind whose success the watch does not show is asked for."""
        now = now_seconds()
        for uid, began in list(self._busy.items()):
            pod = self.cluster.pods.get(uid)
            if pod is not None and now - began >= UNSEEN_SECONDS and uid in self.cluster.planned:
                self._busy[uid] = now
                self._tasks.create_task(self._hands.read(pod))
