"""Prometheus metrics from the latest tick, and the small HTTP server that offers them on loopback.

A custom collector has no stale series when a workload goes. /healthz is about the age of the last tick, /readyz about
the first one, /debug/plan shows the whole last decision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from colocate.model.forecast import Forecast
from colocate.observe.energy import Account
from colocate.observe.pods import Pod
from colocate.plan import Plan
from colocate.report.energy import card_families, energy_families
from colocate.snapshot import NodeSnapshot

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
HEALTHY_TICKS = 5


class Status(NamedTuple):
    """What the server needs of the agent at one instant."""

    snapshot: NodeSnapshot | None
    forecast: Forecast | None
    plan: Plan | None
    tick_seconds: float
    age_seconds: float
    period_seconds: float
    actions: dict[tuple[str, str], int]
    vanished: int
    lost_records: int
    journal_broken: bool
    drifts: int
    explanation: Callable[[], dict[str, Any]]
    energy: Account = Account()
    card_energy: Account = Account()
    pods: Mapping[str, Pod] = {}
    node: str = ""


class NodeCollector(Collector):
    """The series of one node."""

    def __init__(self, status: Callable[[], Status]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """All families, from the latest tick."""
        status = self._status()
        actions = CounterMetricFamily("colocate_action", "Actions by reason and outcome", labels=("reason", "outcome"))
        for (reason, outcome), count in sorted(status.actions.items()):
            actions.add_metric((reason, outcome), count)
        yield actions
        for name, text, value in (
            ("colocate_tick_seconds", "How long the last tick took", status.tick_seconds),
            ("colocate_tick_age_seconds", "Age of the last tick", status.age_seconds),
            ("colocate_journal_broken", "1 if before-values cannot be kept", float(status.journal_broken)),
        ):
            yield GaugeMetricFamily(name, text, value)
        for name, text, count in (
            ("colocate_vanished", "Cgroups that vanished between listing and reading", status.vanished),
            ("colocate_records_lost", "Records that the disk refused", status.lost_records),
            ("colocate_drift", "Knobs of ours that somebody else wrote", status.drifts),
        ):
            yield CounterMetricFamily(name, text, count)
        if status.snapshot is not None and status.forecast is not None and status.plan is not None:
            yield from self._of_tick(status.snapshot, status.forecast, status.plan)
        yield from energy_families(status.energy, status.pods, status.node)
        cards = status.snapshot.cards if status.snapshot is not None else {}
        yield from card_families(status.card_energy, cards, status.pods, status.node)

    def _of_tick(self, snapshot: NodeSnapshot, forecast: Forecast, plan: Plan) -> Iterator[Metric]:
        node = GaugeMetricFamily("colocate_node_cpu_cores", "CPU use of the node by tier", labels=("tier",))
        for tier, cores in (
            ("service", forecast.services_cores),
            ("besteffort", forecast.besteffort_cores),
            ("batch", forecast.batch_cores),
            ("system", forecast.system_cores),
            ("idle", forecast.idle_cores),
        ):
            if cores is not None:
                node.add_metric((tier,), cores)
        yield node
        yield GaugeMetricFamily("colocate_node_capacity_cores", "CPUs of the node", forecast.node_cores)
        yield GaugeMetricFamily(
            "colocate_services_peak_cores", "Forecast peak of all services", forecast.services_peak_cores
        )
        slack = GaugeMetricFamily("colocate_service_slack_ratio", "(target - p99) / target", labels=("service",))
        p99 = GaugeMetricFamily("colocate_service_p99_seconds", "p99 of the window", labels=("service",))
        waiting = GaugeMetricFamily(
            "colocate_service_cpu_waiting_ratio", "Share of time waiting for a CPU", labels=("service",)
        )
        pressure = GaugeMetricFamily(
            "colocate_service_cpu_pressure_ratio", "The same with waits too short to be felt", labels=("service",)
        )
        families = (slack, p99, waiting, pressure)
        for workload in snapshot.of("service"):
            now = forecast.workloads[workload.id]
            values = (now.slack, now.p99_seconds, now.cpu_waiting_ratio, now.cpu_pressure_ratio)
            for family, value in zip(families, values, strict=True):
                if value is not None:
                    family.add_metric((workload.name,), value)
        yield from families
        jobs = GaugeMetricFamily("colocate_job_cpu_cores", "CPU use of a batch job", labels=("job",))
        frozen = GaugeMetricFamily("colocate_job_frozen", "1 while a batch job is frozen", labels=("job",))
        for workload in snapshot.of("batch"):
            jobs.add_metric((workload.name,), forecast.workloads[workload.id].usage_cores or 0.0)
            frozen.add_metric((workload.name,), float(workload.frozen))
        yield from (jobs, frozen)
        laws = GaugeMetricFamily("colocate_law_state", "1 for the state a law is in", labels=("law", "state", "reason"))
        for verdict in plan.verdicts:
            if not verdict.subject:
                laws.add_metric((verdict.law, verdict.state, verdict.reason), 1.0)
        yield laws
        if snapshot.cards:
            yield from _of_cards(snapshot, plan)


def _of_cards(snapshot: NodeSnapshot, plan: Plan) -> Iterator[Metric]:
    state = GaugeMetricFamily(
        "colocate_gpu_state", "1 for what the law of a card says", labels=("gpu", "state", "reason")
    )
    by_card = {
        "share": ("colocate_gpu_batch_share_ratio", "Of the card's time that batch may have in the dial"),
        "drain_seconds": ("colocate_gpu_drain_seconds", "How long batch goes on after it was stopped, p95"),
        "floor_seconds": ("colocate_gpu_floor_seconds", "What a request that meets batch loses at most"),
        "prediction_error": ("colocate_gpu_prediction_error_ratio", "How far the model of the slowdown was off"),
    }
    families = {key: GaugeMetricFamily(name, text, labels=("gpu",)) for key, (name, text) in by_card.items()}
    for verdict in plan.verdicts:
        if verdict.law == "gpu":
            state.add_metric((verdict.subject, verdict.state, verdict.reason), 1.0)
            for key, family in families.items():
                if key in verdict.numbers:
                    family.add_metric((verdict.subject,), verdict.numbers[key])
    yield from (state, *families.values())
    busy = GaugeMetricFamily(
        "colocate_gpu_busy_ratio", "Share of the last sampling period with kernels", labels=("gpu",)
    )
    memory = GaugeMetricFamily("colocate_gpu_memory_bytes", "Of the card, used and total", labels=("gpu", "kind"))
    reaction = GaugeMetricFamily(
        "colocate_gpu_reaction_seconds", "From a request to batch stopped, p95", labels=("gpu",)
    )
    jobs = GaugeMetricFamily(
        "colocate_gpu_workload_busy_ratio", "The same, of one workload's kernels", labels=("gpu", "workload", "tier")
    )
    for uuid, card in sorted(snapshot.cards.items()):
        if card.percent is not None:
            busy.add_metric((uuid,), card.percent / 100)
        for kind, value in (("used", card.memory_used_bytes), ("total", card.memory_bytes)):
            if value is not None:
                memory.add_metric((uuid, kind), float(value))
        if card.reaction_seconds is not None:
            reaction.add_metric((uuid,), card.reaction_seconds)
        for id_, user in sorted(card.users.items()):
            workload = snapshot.workloads.get(id_)
            if workload is not None and user.percent is not None:
                jobs.add_metric((uuid, workload.name, workload.tier), user.percent / 100)
    yield from (busy, memory, reaction, jobs)
    yield from _recorded(snapshot)


def _recorded(snapshot: NodeSnapshot) -> Iterator[Metric]:
    """What is told of cards and nothing is decided by."""
    watts = GaugeMetricFamily("colocate_gpu_power_watts", "What the card draws, and its limit", labels=("gpu", "kind"))
    pcie = GaugeMetricFamily("colocate_gpu_pcie_bytes_per_second", "To the card and from it", labels=("gpu", "way"))
    for uuid, card in sorted(snapshot.cards.items()):
        for kind, value in (("draw", card.watts), ("limit", card.limit_watts)):
            if value is not None:
                watts.add_metric((uuid, kind), value)
        for way, value in zip(("to", "from"), card.pcie_bytes_per_second or (), strict=False):
            pcie.add_metric((uuid, way), value)
    yield from (watts, pcie)


def make_application(status: Callable[[], Status]) -> web.Application:
    """The routes /metrics, /healthz, /readyz and /debug/plan."""
    registry = CollectorRegistry()
    registry.register(NodeCollector(status))

    async def metrics(_request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE})

    async def healthz(_request: web.Request) -> web.Response:
        now = status()
        limit = HEALTHY_TICKS * now.period_seconds
        healthy = now.snapshot is not None and now.age_seconds <= limit
        text = f"last tick {now.age_seconds:.1f} s ago (healthy up to {limit:.1f} s)\n"
        return web.Response(text=text, status=200 if healthy else 503)

    async def readyz(_request: web.Request) -> web.Response:
        ready = status().snapshot is not None
        return web.Response(text="ready\n" if ready else "no tick yet\n", status=200 if ready else 503)

    async def plan(_request: web.Request) -> web.Response:
        body = msgspec.json.format(msgspec.json.encode(status().explanation()), indent=2)
        return web.Response(body=body, content_type="application/json")

    application = web.Application()
    application.add_routes(
        [
            web.get("/metrics", metrics),
            web.get("/healthz", healthz),
            web.get("/readyz", readyz),
            web.get("/debug/plan", plan),
        ]
    )
    return application
