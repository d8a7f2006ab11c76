"""S2.8: watts asked for by what they may cost, "at most 5 % slower"."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from colocate.cli.main import main
from colocate.cluster.outcomes import outcomes
from colocate.decide.outcome import watts_for
from colocate.errors import BadInput
from colocate.policy.schema import API_VERSION, PowerModel, PowerPoint
from tests.unit.test_power_caps import HARDLY, MUCH


@pytest.mark.parametrize(
    ("model", "slowdown", "watts"),
    [
        pytest.param(MUCH, 0.0, 300, id="not slower at all"),
        pytest.param(MUCH, 0.067, 240, id="a point of the model"),
        pytest.param(MUCH, 0.05, 256, id="between two points, rounded up"),
        pytest.param(MUCH, 0.5, 167, id="much slower"),
        pytest.param(MUCH, 5.0, 120, id="more than it ever is: the least that was tried, none below"),
        pytest.param(HARDLY, 0.05, 100, id="a job that hardly feels it"),
        pytest.param(
            PowerModel(name="x", points=(PowerPoint(watts=100, slowdown=0.4), PowerPoint(watts=200, slowdown=0.1))),
            0.05,
            None,
            id="the greatest cap of the model is slower",
        ),
    ],
)
def test_s2_8_the_least_watts_that_keep_a_slowdown(model: PowerModel, slowdown: float, watts: int | None) -> None:
    assert watts_for(model, slowdown) == watts


def model_of(pairs: list[tuple[int, float]]) -> PowerModel:
    watts, slowdowns = sorted(w for w, _ in pairs), sorted((s for _, s in pairs), reverse=True)
    points = tuple(PowerPoint(watts=w, slowdown=s) for w, s in zip(watts, slowdowns, strict=True))
    return PowerModel(name="x", points=points)


PAIRS = st.tuples(st.integers(50, 700), st.floats(0, 3))
MODELS = st.lists(PAIRS, min_size=2, max_size=8, unique_by=lambda pair: pair[0]).map(model_of)


@given(MODELS, st.floats(0, 3))
def test_s2_8_they_keep_it_and_are_within_the_model(model: PowerModel, slowdown: float) -> None:
    found = watts_for(model, slowdown)
    watts, slowdowns = np.array([(p.watts, p.slowdown) for p in model.points], dtype=float).T
    if found is None:
        assert slowdowns[-1] > slowdown
    else:
        assert watts[0] <= found <= watts[-1]
        assert np.interp(found, watts, slowdowns) <= slowdown + 1e-6
        assert found == watts[0] or np.interp(found - 1, watts, slowdowns) >= slowdown - 1e-6, "no watt too much"


def test_s2_8_without_a_model_there_are_no_policies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadInput, match=r"spec\.power\.models is empty"):
        outcomes(())
    file = tmp_path / "policy.yaml"
    file.write_text(f"apiVersion: {API_VERSION}\nkind: ColocationPolicy\nspec: {{}}\n")
    assert main(["power", "outcomes", "--config", str(file)]) == 2
    assert "spec.power.models is empty" in capsys.readouterr().err


def test_s2_8_the_command_prints_what_kubectl_applies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "policy.yaml"
    points = "[{watts: 100, slowdown: 0.2}, {watts: 300, slowdown: 0}]"
    spec = f"{{power: {{models: [{{name: bert, points: {points}}}]}}}}"
    file.write_text(f"apiVersion: {API_VERSION}\nkind: ColocationPolicy\nspec: {spec}\n")
    assert main(["power", "outcomes", "--config", str(file)]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("kind: ")] == [
        "kind: MutatingAdmissionPolicy",
        "kind: MutatingAdmissionPolicyBinding",
        "kind: ValidatingAdmissionPolicy",
        "kind: ValidatingAdmissionPolicyBinding",
    ]
