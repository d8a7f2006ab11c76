"""`colocate demo power`: everything that it promises, in the words of its JSON."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.kernel.conftest import colocate

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("cc") is None, reason="the fake NVML needs a C compiler (cc)"),
]


def test_the_demonstration_of_power_keeps_what_it_promises(dirs):
    found = colocate("demo", "power", "-o", "json", "--report", str(dirs / "report.html"))
    assert found.stdout, found.stderr
    said = json.loads(found.stdout)
    assert (said["gangs_started"], list(said["gangs_waiting"])) == (2, ["other"])
    assert "budget cluster" in said["gangs_waiting"]["other"]
    assert said["budget_exceeded_samples"] == 0 < said["samples"]
    assert said["kept_without_agent"]
    assert said["restored"]
    assert 150 < said["recommended_cap_watts"] < 300
    assert abs(said["predicted_slowdown"] - said["measured_slowdown"]) < 0.1
    assert sum(cut["cap_watts"] for cut in said["cuts"]) <= said["cut_to_watts"]
    assert said["worst_slowdown"] < said["equal_slowdown"]
    assert said["host_unchanged"], said["changes"]
    assert found.returncode == 0
    page = (dirs / "report.html").read_text()
    assert "SIMULATED CARD" in page
    assert "budget exceeded" in page
