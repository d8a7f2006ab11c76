"""The dashboard asks for what is there: each of its queries beside what the agent and the controller really expose."""

import asyncio
import re

import msgspec
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from colocate.actuate.journal import Journal
from colocate.agent.loop import Agent
from colocate.localcluster.controlplane import MANIFESTS
from colocate.model import kernels
from colocate.policy.schema import ColocationPolicy, RecordPolicy
from colocate.report.metrics import NodeCollector, Status
from colocate.snapshot import Latency, Objective
from podgroup.controller.metrics import Metrics
from podgroup.queue.decisions import Waiting
from podgroup.queue.entry import Settings
from podgroup.queue.queue import Queue
from tests.unit.test_records import a_service_and_a_hog

BOARD = msgspec.json.decode((MANIFESTS / "grafana" / "dashboard.json").read_bytes())
QUERIES = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]
QUERIES += [v["query"] for v in BOARD["templating"]["list"] if v["type"] == "query"]
OF_SCRAPES = {"instance"}
"""Labels that Prometheus adds."""
ASKED = re.compile(r"\b(colocate_\w+)(?:\{([^}]*)\})?")
GROUPED = re.compile(r"\bby \(([^)]*)\)")


def of_an_agent(directory):
    kernel, spec = a_service_and_a_hog(RecordPolicy())
    journal = Journal(directory, "boot")
    agent = Agent(kernel, ColocationPolicy(spec=spec), kernels.load(jit=False), journal, clock=kernel)
    agent.observer.objectives["web"] = Objective(0.02, 10, 3.0)
    agent.open()

    async def live():
        for i in range(12):
            agent.scraper.readings["web"] = Latency((0.01, 0.05), (300.0 * i,) * 3, kernel.monotonic())
            await agent.tick()
            await agent.writer.settle()
            kernel.advance(0.5)
        found = agent.last
        assert found is not None
        status = Status(
            found.snapshot, found.forecast, found.plan, found.seconds, 0.0, 0.5, agent.counts, 0, 0, False, 0, dict
        )
        registry = CollectorRegistry()
        registry.register(NodeCollector(lambda: status))
        text = generate_latest(registry).decode()
        await agent.close()
        return text

    return asyncio.run(live())


def of_a_controller():
    made, queue = Metrics(), Queue(Settings())
    made.rollbacks.labels("BindTimeout").inc()
    queue.waiting["ns/gang"] = Waiting(since=0.0, members_at=0.0, reason="NotEnoughRoom")
    return made.text(queue).decode()


@pytest.fixture(scope="module")
def exposed(tmp_path_factory):
    """Sample -> its labels."""
    found: dict[str, set[str]] = {}
    for text in (of_an_agent(tmp_path_factory.mktemp("agent")), of_a_controller()):
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_asks_for_samples_and_labels_that_there_are(query, exposed):
    asked = ASKED.findall(query)
    assert asked
    for name, matchers in asked:
        assert name in exposed
        wanted = set(re.findall(r"(\w+)\s*(?:=~|!=|=)", matchers))
        assert wanted <= exposed[name] | OF_SCRAPES
    for labels in GROUPED.findall(query):
        assert {label.strip() for label in labels.split(",")} <= set().union(*(exposed[n] for n, _ in asked))


@pytest.mark.parametrize("panel", BOARD["panels"], ids=lambda p: p["title"])
def test_a_legend_names_labels_that_its_query_keeps(panel):
    for target in panel["targets"]:
        kept = {label.strip() for labels in GROUPED.findall(target["expr"]) for label in labels.split(",")}
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= kept
