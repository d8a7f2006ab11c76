"""Queue, solver, ledger and commit against a model of API server and kubelets that act in any order, and with crashes.

The controller is what is left of it without a network: it decides on what it knows, persists a plan, and takes the
steps that the plan asks for. A crash forgets everything but the server's objects.
"""

from __future__ import annotations

from itertools import count

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from colocate.objects import ContainerStatus, ObjectMeta, Pod, PodStatus
from podgroup.api import GangPlan, GangPlanSpec, PlannedMember
from podgroup.commit.protocol import Bind, advance
from podgroup.queue.entry import Settings
from podgroup.queue.queue import Queue
from podgroup.state.cluster import CARRIED_ON, Cluster
from podgroup.state.gangs import gang_key
from tests.unit.test_gang_snapshot import group, node, pod

replace = msgspec.structs.replace
TIMEOUT = 60
TURNS = 200


class Server:
    """The objects, as they outlive a controller."""

    def __init__(self) -> None:
        self.nodes: dict[str, int] = {}
        self.pods: dict[str, Pod] = {}
        self.plans: dict[str, GangPlan] = {}
        self.gangs: dict[str, tuple[int, int, int]] = {}
        """name -> size, quorum, CPUs of a member."""
        self.started: set[str] = set()
        """Gangs that ran once: what they lose later for good leaves the others running."""
        self.names = count()

    def used(self, name: str) -> int:
        return sum(
            self.gangs[p.metadata.name.partition("-")[0]][2]
            for p in self.pods.values()
            if p.spec.node_name == name and not p.terminal
        )


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.server, self.now = Server(), 0.0
        self.server.nodes.update({"n-a": 4, "n-b": 4})
        self.crash()

    # the controller

    @rule()
    def crash(self) -> None:
        """A new leader knows what the server has, and nothing else."""
        self.cluster, self.queue = Cluster(), Queue(Settings(reserve_after_seconds=1e9, slot_seconds=0.0))
        for name, cpu in self.server.nodes.items():
            self.cluster.set_node(node(name, cpu))
        for name, (_, least, _) in self.server.gangs.items():
            self.cluster.groups[f"ns/{name}"] = group(name, least)
        for one in self.server.pods.values():
            self.cluster.set_pod(one)
        for key, plan in self.server.plans.items():
            self.cluster.set_plan(key, plan)
        self.dirty = {f"ns/{name}" for name in self.server.gangs}
        self.began: dict[str, float] = {}

    def persist(self, key: str, plan: GangPlan) -> None:
        self.server.plans[key] = plan
        if plan.status.phase == "Running":
            self.server.started.add(key.removeprefix("ns/"))
        self.cluster.set_plan(key, plan)
        self.dirty.add(key)

    def tell(self, one: Pod) -> None:
        """The watch tells of a pod."""
        self.server.pods[one.metadata.uid] = one
        self.cluster.set_pod(one)
        self.dirty.add(gang_key(one))

    @rule()
    def decide(self) -> None:
        dirty, self.dirty = self.dirty, set()
        for start in self.queue.cycle(self.cluster, dirty, self.now).starts:
            before = self.cluster.plans.get(start.key)
            members = [PlannedMember(name=m.name, uid=m.uid, node=where) for m, where in start.placed]
            if before is not None and before.status.phase == "Repairing":
                members = [m for m in before.spec.members if m.uid in self.cluster.pods] + members
            name = start.key.removeprefix("ns/")
            plan = before or GangPlan(metadata=ObjectMeta(name=name, namespace="ns", uid=f"plan-{name}"))
            spec = GangPlanSpec(
                plan_id=f"plan-{next(self.server.names)}",
                timeout_seconds=TIMEOUT,
                min_member=self.server.gangs[name][1],
                members=members,
            )
            self.persist(start.key, replace(plan, spec=spec, status=replace(plan.status, phase="Binding")))

    @precondition(lambda self: self.open())
    @rule(data=st.data(), most=st.integers(1, 2))
    def carry_on(self, data: st.DataObject, most: int) -> None:
        key = data.draw(st.sampled_from(self.open()))
        for step in data.draw(st.permutations(self.look(key)))[:most]:
            self.do(step)

    def open(self) -> list[str]:
        return [key for key, plan in self.cluster.plans.items() if plan.status.phase in CARRIED_ON]

    def look(self, key: str) -> list[object]:
        """What a plan asks for now; a plan that has moved on is persisted instead."""
        plan = self.cluster.plans[key]
        planned = {m.uid for m in plan.spec.members}
        pods = {uid: p for uid in planned if (p := self.cluster.pods.get(uid)) is not None}
        alive = {m.node: m.node in self.server.nodes for m in plan.spec.members}
        others = [p for p in self.cluster.pods_of(key) if p.metadata.uid not in planned]
        beside = sum(bool(p.spec.node_name) and not p.terminal for p in others)
        elapsed = self.now - self.began.setdefault(plan.spec.plan_id, self.now)
        after = advance(plan, pods, alive, beside, elapsed)
        if after.plan is plan:
            return list(after.steps)
        self.persist(key, after.plan)
        return []

    def do(self, step: object) -> None:
        assert isinstance(step, tuple)
        one = self.server.pods.get(step.pod.metadata.uid)  # type: ignore[attr-defined]
        if one is None:
            return
        if not isinstance(step, Bind):
            self.lose(one)
        elif not one.spec.node_name:
            self.tell(replace(one, spec=replace(one.spec, node_name=step.node)))

    def lose(self, one: Pod) -> None:
        self.server.pods.pop(one.metadata.uid)
        self.cluster.remove_pod(one.metadata.uid)
        self.dirty.add(gang_key(one))

    # the world

    @rule(cpu=st.integers(1, 4))
    def add_node(self, cpu: int) -> None:
        name = f"n{next(self.server.names)}"
        self.server.nodes[name] = cpu
        self.cluster.set_node(node(name, cpu))

    @precondition(lambda self: len(self.server.nodes) > 2)
    @rule(data=st.data())
    def remove_node(self, data: st.DataObject) -> None:
        """A node goes, and its pods with it."""
        name = data.draw(st.sampled_from(sorted(self.server.nodes)))
        del self.server.nodes[name]
        self.cluster.remove_node(name)
        for one in [p for p in self.server.pods.values() if p.spec.node_name == name]:
            self.lose(one)
        self.dirty |= {key for key, plan in self.cluster.plans.items() if plan.status.phase in CARRIED_ON}

    @precondition(lambda self: len(self.server.gangs) < 5)
    @rule(size=st.integers(2, 4), least=st.integers(1, 4), cpu=st.integers(1, 2))
    def add_gang(self, size: int, least: int, cpu: int) -> None:
        name = f"g{next(self.server.names)}"
        self.server.gangs[name] = (size, min(least, size), cpu)
        self.cluster.groups[f"ns/{name}"] = group(name, min(least, size))
        self.replace_members()
        self.decide()

    @rule()
    def replace_members(self) -> None:
        """Owners make anew what is gone or has failed."""
        for name, (size, _, cpu) in self.server.gangs.items():
            alive = [p for p in self.server.pods.values() if gang_key(p) == f"ns/{name}" and not p.terminal]
            for _ in range(size - len(alive)):
                self.tell(pod(f"{name}-{next(self.server.names)}", name, cpu))

    @precondition(lambda self: self.unanswered())
    @rule(data=st.data(), takes=st.sampled_from([True, True, False]))
    def kubelet(self, data: st.DataObject, takes: bool) -> None:
        self.answer(data.draw(st.sampled_from(self.unanswered())), takes)

    def unanswered(self) -> list[Pod]:
        return [p for p in self.server.pods.values() if p.spec.node_name and p.status.phase == "Pending"]

    def answer(self, one: Pod, takes: bool) -> None:
        taken = PodStatus(phase="Running", container_statuses=[ContainerStatus(name="c")])
        self.tell(replace(one, status=taken if takes else PodStatus(phase="Failed", reason="OutOfcpu")))

    @precondition(lambda self: self.server.pods)
    @rule(data=st.data())
    def a_user_deletes(self, data: st.DataObject) -> None:
        self.lose(data.draw(st.sampled_from(list(self.server.pods.values()))))

    @rule()
    def time_passes(self) -> None:
        """Too much for what is open."""
        for key in self.open():
            self.look(key)
        self.now += TIMEOUT
        for key in self.open():
            self.look(key)

    # what must hold

    @invariant()
    def no_node_is_overcommitted(self) -> None:
        for name, cpu in self.server.nodes.items():
            assert self.server.used(name) <= cpu, f"{name} is overcommitted"

    @invariant()
    def a_gang_that_was_taken_back_holds_nothing(self) -> None:
        for key, plan in self.server.plans.items():
            name = key.removeprefix("ns/")
            if plan.status.phase == "Waiting" and name not in self.server.started:
                left = [p for p in self.server.pods.values() if gang_key(p) == key and p.spec.node_name]
                assert all(p.terminal for p in left), f"{name} was taken back, but not all of it"

    def teardown(self) -> None:
        """When nothing more goes wrong, every gang comes to run whole or to hold nothing."""
        for _ in range(TURNS):
            self.replace_members()
            self.now += 1.0
            self.dirty |= {f"ns/{name}" for name in self.server.gangs}
            self.decide()
            for key in self.open():
                for step in self.look(key):
                    self.do(step)
            for one in self.unanswered():
                self.answer(one, takes=True)
            self.no_node_is_overcommitted()
        assert self.open() == []
        for name, (_, least, _) in self.server.gangs.items():
            bound = [p for p in self.server.pods.values() if gang_key(p) == f"ns/{name}" and p.spec.node_name]
            alive = sum(not p.terminal for p in bound)
            waits = self.queue.waiting.get(f"ns/{name}")
            mourns = name in self.server.started and waits is not None and waits.reason == "Unschedulable"
            assert alive == 0 or alive >= least or mourns, f"{name} is bound in part"


Machine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestMachine = Machine.TestCase
