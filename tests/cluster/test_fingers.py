"""What fingers used to kubectl type: the same as there, or words that say what to type instead."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import yaml

from colocate.kube.client import NAMESPACES, PODS, path_of
from colocate.localcluster.controlplane import MANIFESTS, ControlPlane
from podgroup.api import POD_GROUPS
from tests.cluster.conftest import World, leader

GROUP = """
apiVersion: scheduling.x-k8s.io/v1alpha1
kind: PodGroup
metadata: {name: asked}
spec: {minMember: 1}
"""
JOB = """
apiVersion: batch/v1
kind: Job
metadata: {name: asked}
spec:
  template:
    metadata: {labels: {scheduling.x-k8s.io/pod-group: asked}}
    spec: {restartPolicy: Never, containers: [{name: c, image: i, resources: {requests: {cpu: "1"}}}]}
"""
Typed = Callable[[str], str]


@pytest.fixture
async def typed(world: World, plane: ControlPlane, tmp_path: Path) -> AsyncIterator[Typed]:
    """A gang `big` waits in the context's namespace, `small` in another one; what is typed -> what is printed."""
    other = f"{world.namespace}-other"
    await world.api.request("POST", NAMESPACES, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": other}})
    config = yaml.safe_load(plane.kubeconfig().read_text())
    for context in config["contexts"]:
        context["context"]["namespace"] = world.namespace
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    (tmp_path / "files").mkdir()
    for name, text in (("group.yaml", GROUP), ("job.yaml", JOB)):
        (tmp_path / "files" / name).write_text(text)
    surroundings = {**os.environ, "PYTHONPATH": str(MANIFESTS.parent), "KUBECONFIG": str(tmp_path / "kubeconfig")}

    def run(line: str) -> str:
        command = [sys.executable, "-m", "colocate.cli.main", *line.split()]
        both = f"{GROUP}---{JOB}"
        ran = subprocess.run(
            command, env=surroundings, cwd=tmp_path / "files", input=both, capture_output=True, text=True, timeout=60
        )
        return f"{ran.stdout}{ran.stderr}rc {ran.returncode}".replace(other, "OTHER").replace(world.namespace, "MINE")

    await world.node("n", cpu=4, memory="1Gi")
    async with leader(world):
        await world.group("big", 3)
        await world.group("small", 3, namespace=other)
        for i in range(3):
            await world.pod(f"big-{i}", "big", cpu=3)
            await world.pod(f"small-{i}", "small", namespace=other, cpu=3)
        await world.told("big", "Unschedulable")

        async def told() -> bool:
            return "small" in await asyncio.to_thread(run, "queue -A")

        await world.until(told, "the other gang waits too")
        yield run
    for collection in (PODS, POD_GROUPS):
        body = {"kind": "DeleteOptions", "apiVersion": "v1", "gracePeriodSeconds": 0}
        await world.api.request("DELETE", path_of(collection, other), body)
    await world.api.request("DELETE", f"{NAMESPACES}/{other}")


EXPLAINED = r"MINE/big: Wait \(Unschedulable\), position \d\n.*\n  it would start if (.|\n)*rc 0"
TYPED = {
    "explain podgroup big": EXPLAINED,
    "explain podgroup/big": EXPLAINED,
    "explain pg big -n MINE": EXPLAINED,
    "explain podgroups big": EXPLAINED,
    "explain podgroup big --anew": EXPLAINED,
    "explain podgroup big -o name": r"choose from .*table(.|\n)*rc 2",
    "explain podgroup big small": r"name one(.|\n)*rc 2",
    "explain podgroup none": r"no PodGroup MINE/none; known: big(.|\n)*rc 2",
    "explain podgroup small -n OTHER": r"OTHER/small: Wait",
    "queue": r"(?!(.|\n)*OTHER)(.|\n)*MINE +big(.|\n)*rc 0",
    "queue -A": r"(.|\n)*(MINE +big(.|\n)*OTHER +small|OTHER +small(.|\n)*MINE +big)",
    "queue --all-namespaces": r"(.|\n)*OTHER +small",
    "queue -A -n MINE": r"not allowed with(.|\n)*rc 2",
    "what-if -f group.yaml -f job.yaml": r"MINE/asked +Start(.|\n)*rc 0",
    "what-if -f ./": r"MINE/asked +Start(.|\n)*rc 0",
    "what-if -f -": r"MINE/asked +Start(.|\n)*rc 0",
    "what-if -f job.yaml": r"MINE/asked +Wait +PodGroupNotFound(.|\n)*rc 1",
}


async def test_what_is_typed_is_understood_or_answered_with_what_to_type(world: World, typed: Typed) -> None:
    wrong = {}
    for line, printed in TYPED.items():
        real = line.replace("OTHER", f"{world.namespace}-other").replace("MINE", world.namespace)
        said = await asyncio.to_thread(typed, real)
        if not re.search(printed, said):
            wrong[line] = said
    assert not wrong, wrong
