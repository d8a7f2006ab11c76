"""What gang scheduling is measured by, for Prometheus; every start and every failure to start leaves a trace here."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from podgroup.api import GangPlan
from podgroup.queue.queue import Queue

WAITING = "colocate_gang_waiting"
BINDS = "colocate_gang_binds"
STARTS = "colocate_gang_starts"
ROLLBACKS = "colocate_gang_rollbacks"
PREEMPTED = "colocate_gang_preempted_pods"
REJECTIONS = "colocate_gang_kubelet_rejections"
LOST_NODES = "colocate_gang_lost_nodes"
NODE_LOSS_HALTED = "colocate_gang_node_loss_halted"
LOST_MEMBERS = "colocate_gang_lost_members"
UNSCHEDULABLE = "colocate_gang_admitted_but_unschedulable"
CAPACITY_TO_START = "colocate_gang_capacity_to_start_seconds"
BIND_SPREAD = "colocate_gang_bind_spread_seconds"
PARTIAL_HOLD = "colocate_gang_partial_hold_seconds"
DECIDE = "colocate_gang_decide_seconds"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """One controller's."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.waiting = Gauge(WAITING, "gangs that wait, by reason", ["reason"], registry=registry)
        self.binds = Counter(BINDS, "binds, by what came of them", ["result"], registry=registry)
        self.starts = Counter(STARTS, "gangs whose quorum was taken by the kubelets", registry=registry)
        self.rollbacks = Counter(ROLLBACKS, "gangs that were taken back, by reason", ["reason"], registry=registry)
        self.preempted = Counter(PREEMPTED, "pods deleted to make room", registry=registry)
        self.rejections = Counter(
            REJECTIONS, "members that a kubelet refused, by its reason", ["reason"], registry=registry
        )
        self.lost_nodes = Gauge(LOST_NODES, "vanished nodes with members of gangs on them", registry=registry)
        self.node_loss_halted = Gauge(
            NODE_LOSS_HALTED, "1 while so many nodes have vanished that none is given up", registry=registry
        )
        self.lost_members = Counter(LOST_MEMBERS, "members deleted because their node was gone", registry=registry)
        self.unschedulable = Counter(UNSCHEDULABLE, "gangs that were planned and could not be bound", registry=registry)
        self.capacity_to_start = self._histogram(
            CAPACITY_TO_START, "from the change that let a gang start to its last bind"
        )
        self.bind_spread = self._histogram(BIND_SPREAD, "from the first bind of a gang to its last")
        self.partial_hold = self._histogram(PARTIAL_HOLD, "for how long a gang held room without running whole")
        self.decide = self._histogram(DECIDE, "one cycle of the queue")
        self._planned: dict[str, float] = {}
        self._bound: dict[str, float] = {}

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, buckets=SECONDS, registry=self._registry)

    def moved(self, key: str, plan: GangPlan, now: float, woken: float) -> None:
        """A plan has been saved in another phase. `woken` is when the change came that let it start."""
        phase = plan.status.phase
        if phase == "Binding":
            self._planned[key], self._bound[key] = woken, now
        elif phase == "Confirming" and key in self._planned:
            self.capacity_to_start.observe(max(now - self._planned.pop(key), 0.0))
            self.bind_spread.observe(max(now - self._bound[key], 0.0))
        elif phase == "Running":
            self.starts.inc()
            self._ended(key, now)
        elif phase == "RollingBack":
            self.rollbacks.labels(plan.status.reason).inc()
            if plan.status.reason == "BindTimeout":
                self.unschedulable.inc()
        elif phase == "Waiting":
            self._ended(key, now)

    def _ended(self, key: str, now: float) -> None:
        self._planned.pop(key, None)
        if key in self._bound:
            self.partial_hold.observe(max(now - self._bound.pop(key), 0.0))

    def text(self, queue: Queue) -> bytes:
        """For /metrics."""
        self.waiting.clear()
        for memory in queue.waiting.values():
            if memory.reason:
                self.waiting.labels(memory.reason).inc()
        return generate_latest(self._registry)
