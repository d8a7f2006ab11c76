"""Sweeps: which caps and in which order, and what becomes of a Job for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from colocate.cli.sweep import caps_of, in_turn
from colocate.cli.sweep_jobs import made_from, read_job, seconds_taken
from colocate.errors import BadInput, ColocateError


@pytest.mark.parametrize(
    ("text", "caps"),
    [
        pytest.param("100:300:100", [100, 200, 300], id="both ends"),
        pytest.param("100:290:100", [100, 200, 290], id="the last step is shorter"),
        pytest.param("300,150,150", [150, 300], id="a list, each once"),
    ],
)
def test_which_caps(text: str, caps: list[int]) -> None:
    assert caps_of(text) == caps
    assert in_turn(caps, 3) == [*caps, *caps[::-1], *caps]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        pytest.param("300", "these are 1 caps", id="one"),
        pytest.param("300:100:10", "these are 0 caps", id="from the top"),
        pytest.param("1:100000:1", "these are 100000 caps", id="absurdly many"),
        pytest.param("100:300:0", "write whole watts", id="no step"),
        pytest.param("a:b:c", "write whole watts", id="no numbers"),
        pytest.param("100:300", "these are 0 caps", id="two of three"),
    ],
)
def test_caps_that_are_no_sweep(text: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        caps_of(text)


def job(*containers: dict[str, Any], **spec: Any) -> dict[str, Any]:
    inside: dict[str, Any] = {"containers": list(containers), **spec}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "train", "namespace": "ml"},
        "spec": {"template": {"spec": inside}},
    }


def asks(name: str, **limits: Any) -> dict[str, Any]:
    return {
        "name": name,
        "resources": {"limits": {k.replace("__", "/").replace("_", "."): v for k, v in limits.items()}},
    }


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param(job({"name": "a"}), {"a": {"colocate.io/power": "150"}}, id="one container"),
        pytest.param(
            job({"name": "side"}, asks("app", nvidia_com__gpu=1)),
            {"side": {}, "app": {"nvidia.com/gpu": 1, "colocate.io/power": "150"}}, id="the one with a GPU",
        ),
        pytest.param(
            job(asks("app", nvidia_com__gpu=1), asks("geopm-client", intel_com__power="$POWERCAP")),
            {"app": {"nvidia.com/gpu": 1}, "geopm-client": {"intel.com/power": "150"}},
            id="the talk's sidecar, by its own name for watts",
        ),
        pytest.param(
            job({"name": "app"}, initContainers=[asks("mpi-prefix", intel_com__power=7)]),
            {"app": {}, "mpi-prefix": {"intel.com/power": "150"}}, id="the talk's sidecar among the first",
        ),
    ],
)  # fmt: skip
def test_who_asks_for_the_watts(given: dict[str, Any], expected: dict[str, Any]) -> None:
    before = yaml.safe_dump(given)
    made = made_from(given, 150, 3, "colocate")
    spec = made["spec"]["template"]["spec"]
    every = [*spec["containers"], *spec.get("initContainers", [])]
    assert {c["name"]: (c.get("resources") or {}).get("limits", {}) for c in every} == expected
    assert (made["metadata"]["name"], made["spec"]["backoffLimit"]) == ("train-150w-3", 0)
    labels = made["spec"]["template"]["metadata"]["labels"]
    assert (labels, spec["schedulerName"]) == ({"scheduling.x-k8s.io/pod-group": "train-150w-3"}, "colocate")
    assert yaml.safe_dump(given) == before, "the file's own is left as it is"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        pytest.param("kind: Pod", "has 1 objects, 0 of them Jobs", id="no Job"),
        pytest.param("", "has 0 objects", id="nothing"),
        pytest.param("a: [", "cannot be read", id="no YAML"),
        pytest.param(
            f"{yaml.safe_dump(job({'name': 'a'}))}---\n{yaml.safe_dump(job({'name': 'a'}))}", "has 2", id="two"
        ),
        pytest.param(yaml.safe_dump(job()), "containers is not there", id="no container"),
        pytest.param("apiVersion: batch/v1\nkind: Job\nspec: {}", "metadata.name is None", id="no name"),
    ],
)
def test_a_file_that_is_no_job_is_refused(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(text)
    with pytest.raises(BadInput, match=says):
        read_job(file)


def pod(*times: tuple[str, str] | None) -> dict[str, Any]:
    day = "2026-01-01T00:"
    states: list[Any] = [
        {"running": {}} if t is None else {"terminated": {"startedAt": f"{day}{t[0]}Z", "finishedAt": f"{day}{t[1]}Z"}}
        for t in times
    ]
    return {"status": {"containerStatuses": [{"state": state} for state in states]}}


def test_how_long_a_run_took() -> None:
    assert seconds_taken([pod(("00:05", "01:00")), pod(("00:02", "00:50"), ("00:03", "01:02"))]) == 60.0
    with pytest.raises(ColocateError, match="do not tell when"):
        seconds_taken([pod(("00:05", "01:00")), pod(None)])
    with pytest.raises(ColocateError, match="do not tell when"):
        seconds_taken([])
    with pytest.raises(ColocateError, match="less than a second"):
        seconds_taken([pod(("00:05", "00:05"))])


TEMPLATE = """---
# A template of a sweep: what it mounts is in the same file.
apiVersion: batch/v1
kind: Job
metadata:
  name: tagger-$POWERCAP
  labels: {jobgroup: tagger}
spec:
  template:
    spec:
      restartPolicy: Never
      containers:
      - name: app
        image: registry.example/app:1
        workingDir: /data/powercap-$POWERCAP
        command: [train, "run.id=run-$POWERCAP"]
\t# a comment after a tab, which kubectl takes
        resources:
          limits: {nvidia.com/gpu: 4}
      - name: geopm-client
        image: registry.example/geopm:1
        resources:
          limits:
\t    # and another
            intel.com/power: $POWERCAP
        command: ["sh", "-c", "echo $USER_POWER_CAP"]
...
---
kind: PersistentVolumeClaim
apiVersion: v1
metadata: {name: data}
"""


def test_s2_4_a_sweeps_template_as_the_talk_has_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(TEMPLATE)
    made = made_from(read_job(file), 600, 1, "colocate")
    assert "PersistentVolumeClaim data must be there already" in capsys.readouterr().err
    assert made["metadata"]["name"] == "tagger-600-600w-1"
    app, sidecar = made["spec"]["template"]["spec"]["containers"]
    assert app["workingDir"] == "/data/powercap-600"
    assert app["command"] == ["train", "run.id=run-600"]
    assert sidecar["resources"]["limits"] == {"intel.com/power": "600"}
    assert sidecar["command"][-1] == "echo $USER_POWER_CAP"
