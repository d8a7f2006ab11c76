"""The docs say what the code does: every command, field, metric and reason is in them."""

import ast
import re
from pathlib import Path

import pytest

from colocate.actuate import tier
from colocate.cli.main import build_parser
from colocate.decide import pipeline
from colocate.report import metrics
from podgroup.controller import metrics as gang_metrics
from tools import policy_reference

ROOT = Path(__file__).resolve().parents[2]
DOCS = "".join(f.read_text() for f in [*ROOT.glob("docs/*.md"), ROOT / "README.md"])
REFERENCE = (ROOT / "docs" / "reference.md").read_text()


def constants(*files):
    return {
        node.value
        for file in files
        for node in ast.walk(ast.parse(Path(file).read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def reasons():
    files = [*Path(pipeline.__file__).parent.glob("*.py"), *Path(tier.__file__).parent.glob("*.py")]
    return sorted(c for c in constants(*files) if re.fullmatch(r"([A-Z][a-z]+)+", c))


def test_the_policy_page_is_what_the_schema_says():
    assert policy_reference.TARGET.read_text() == policy_reference.generate(), "python -m tools.policy_reference"


@pytest.mark.parametrize("reason", reasons())
def test_every_reason_is_explained(reason):
    assert f"`{reason}`" in REFERENCE


@pytest.mark.parametrize("metric", sorted(c for c in constants(metrics.__file__) if c.startswith("colocate_")))
def test_every_metric_is_listed(metric):
    assert f"`{metric}`" in REFERENCE or f"`{metric}_total`" in REFERENCE


def test_every_command_is_in_the_docs():
    commands = next(a for a in build_parser()._actions if a.dest == "command").choices
    assert commands
    assert [name for name in commands if not re.search(rf"`(colocate )?{name}[ `]|colocate {name}\b", DOCS)] == []


PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("designs/*.md")]


@pytest.mark.parametrize("page", sorted(p.relative_to(ROOT) for p in PAGES), ids=str)
def test_links_between_pages_lead_somewhere(page):
    text = (ROOT / page).read_text()
    targets = [t.split("#")[0] for t in re.findall(r"\]\(([^)]+)\)", text) if not t.startswith(("http", "#"))]
    assert [t for t in targets if t and not (ROOT / page).parent.joinpath(t).exists()] == []


GANGS = (ROOT / "docs" / "gangs.md").read_text()
SAID = re.compile(r'(?:return |reason=|_in\([a-z]+, "[A-Za-z]+", |_begin_roll_back\(plan, )\(?"([A-Z][a-z]+[A-Za-z]+)"')


def test_every_reason_of_a_gang_is_explained():
    sources = [ROOT / "podgroup" / f"{name}.py" for name in ("queue/entry", "queue/queue", "commit/protocol")]
    said = {reason for source in sources for reason in SAID.findall(source.read_text())}
    assert {"NotEnoughMembers", "BackingOff", "BindTimeout", "Started"} <= said
    assert [reason for reason in sorted(said) if f"`{reason}`" not in GANGS] == []


@pytest.mark.parametrize("metric", sorted(c for c in constants(gang_metrics.__file__) if c.startswith("colocate_")))
def test_every_metric_of_gangs_is_listed(metric):
    assert f"`{metric}`" in GANGS or f"`{metric}_total`" in GANGS
