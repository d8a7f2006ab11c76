"""The documented commands, typed into a real kubectl."""

from __future__ import annotations

import asyncio
import base64
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from colocate.errors import HostUnfit
from colocate.localcluster.controlplane import MANIFESTS, ControlPlane, binaries
from tests.cluster.conftest import World, leader
from tools import chart

DOCS = (MANIFESTS.parent / "docs" / "gangs.md").read_text()
Kubectl = Callable[..., str]


@pytest.fixture
def kubectl(plane: ControlPlane, tmp_path: Path) -> Kubectl:
    """Runs kubectl as the administrator, our plugin in its path; what it prints. A failure fails the test."""
    try:
        program = binaries("kubectl") / "kubectl"
    except HostUnfit as error:
        pytest.skip(str(error))
    plugins = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    surroundings = {"KUBECONFIG": str(plane.kubeconfig()), "HOME": str(tmp_path), "PATH": plugins}

    def run(*arguments: str, code: int = 0) -> str:
        found = subprocess.run([program, *arguments], env=surroundings, capture_output=True, text=True, timeout=60)
        assert found.returncode == code, found.stderr
        return found.stdout

    return run


@pytest.mark.parametrize("which", ["base", "overlays/shadow", "overlays/gpu"])
def test_the_manifests_are_what_an_api_server_takes(kubectl: Kubectl, world: World, which: str) -> None:
    """Strictly: an unknown or doubled field is refused."""
    kubectl("apply", "-f", str(MANIFESTS / "controller" / "namespace.yaml"))
    taken = kubectl("apply", "-k", str(MANIFESTS / which), "--dry-run=server", "--validate=strict", "-o", "name")
    assert {"deployment.apps/colocate-controller", "daemonset.apps/colocate-agent"} <= set(taken.split())
    assert "clusterrole.rbac.authorization.k8s.io/colocate-controller" in taken.split()
    assert "customresourcedefinition.apiextensions.k8s.io/gangplans.colocate.io" in taken.split()


CHART = str(MANIFESTS / "helm" / "colocate")


@pytest.fixture
def helm(tmp_path: Path) -> Callable[..., dict[tuple[str, str], Any]]:
    """The objects of the chart with these values, by kind and name; with a code, what is said of them instead."""
    try:
        program = binaries("helm") / "helm"
    except HostUnfit as error:
        pytest.skip(str(error))

    def template(*values: str, code: int = 0) -> Any:
        command: list[str | Path] = [
            program,
            "template",
            "colocate",
            CHART,
            *(word for value in values for word in ("--set", value)),
        ]
        found = subprocess.run(command, env={"HOME": str(tmp_path)}, capture_output=True, text=True, timeout=60)
        assert found.returncode == code, found.stderr
        return found.stderr if code else objects_of(found.stdout)

    return template


def objects_of(text: str) -> dict[tuple[str, str], Any]:
    found = [document for document in yaml.safe_load_all(text) if document]
    return {(one["kind"], one["metadata"]["name"]): one for one in found}


@pytest.mark.parametrize("name", sorted(chart.TEMPLATES))
def test_the_chart_is_written_from_the_manifests(name: str) -> None:
    assert (chart.CHART / "templates" / name).read_text() == chart.template(name), "python -m tools.chart"


def test_the_chart_is_what_the_manifests_are(kubectl: Kubectl, helm: Any) -> None:
    base = objects_of(kubectl("kustomize", str(MANIFESTS / "base")))
    chosen = helm()
    policies = [found.pop(("ConfigMap", "colocate-policy"))["data"] for found in (base, chosen)]
    assert chosen == base
    assert yaml.safe_load(policies[0]["policy.yaml"]) == yaml.safe_load(policies[1]["policy.yaml"])
    shadow = objects_of(kubectl("kustomize", str(MANIFESTS / "overlays" / "shadow")))
    agent = ("DaemonSet", "colocate-agent")
    assert helm("agent.shadow=true")[agent] == shadow[agent]


def test_the_charts_values_are_where_they_belong(helm: Any) -> None:
    found = helm(
        *("image=registry.example/colocate:1", "imagePullPolicy=Always", "imagePullSecrets[0].name=key"),
        *("namespace.create=false", "controller.enabled=false", "publication.replicas=1"),
        *("policy.cpu.reserve=7%", "agent.nodeSelector.pool=batch", "agent.resources.limits.memory=1Gi"),
    )
    assert not [key for key in found if "controller" in key[1] or key[0] == "Namespace"]
    assert ("CustomResourceDefinition", "gangplans.colocate.io") in found, "plans outlive a change of values"
    deployed = found["Deployment", "colocate-publication"]["spec"]
    pods = [found["DaemonSet", "colocate-agent"]["spec"]["template"]["spec"], deployed["template"]["spec"]]
    for pod in pods:
        (container,) = pod["containers"]
        assert (container["image"], container["imagePullPolicy"]) == ("registry.example/colocate:1", "Always")
        assert pod["imagePullSecrets"] == [{"name": "key"}]
    assert deployed["replicas"] == 1
    assert pods[0]["nodeSelector"] == {"kubernetes.io/os": "linux", "pool": "batch"}
    assert pods[0]["containers"][0]["resources"]["limits"] == {"memory": "1Gi"}
    policy = yaml.safe_load(found["ConfigMap", "colocate-policy"]["data"]["policy.yaml"])
    assert policy["spec"] == {"http": {"host": "0.0.0.0"}, "cpu": {"reserve": "7%"}}


def test_the_charts_agent_is_probed_where_it_listens(helm: Any) -> None:
    def agent(*values: str) -> Any:
        return helm(*values)["DaemonSet", "colocate-agent"]["spec"]["template"]["spec"]["containers"][0]

    for unreachable in ("policy.http.enabled=false", "policy.http.host=127.0.0.1"):
        assert not {"ports", "readinessProbe", "livenessProbe"} & agent(unreachable).keys()
    assert agent("policy.http.port=9999")["ports"] == [{"name": "http", "containerPort": 9999}]
    policy = helm("policy=null")["ConfigMap", "colocate-policy"]["data"]["policy.yaml"]
    assert yaml.safe_load(policy)["spec"] == {"http": {"host": "0.0.0.0"}}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        pytest.param("agents.shadow=true", "agents", id="a value that there is not"),
        pytest.param("agent.shadow=perhaps", "shadow", id="no truth"),
        pytest.param("publication.replicas=-1", "replicas", id="fewer than none"),
    ],
)
def test_a_wrong_value_of_the_chart_is_named(helm: Any, value: str, says: str) -> None:
    assert says in helm(value, code=1)


AS_ITS_POD = """
mount --make-rprivate / && mount -t tmpfs tmpfs /var/run && mkdir -p /var/run/secrets/kubernetes.io || exit 9
cp -r $ACCOUNT /var/run/secrets/kubernetes.io/serviceaccount && mount -o remount,bind,ro / || exit 9
for made in /tmp /var/tmp /dev/shm; do mount --bind $made $made && mount -o remount,bind,ro $made || exit 9; done
exec "$@"
"""
"""A read-only file system with the service account's files: what manifests/controller asks for."""
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs", "--bounding-set=-all"]


@pytest.fixture
def _as_nobody() -> None:
    look = ["unshare", "-m", *NOBODY, sys.executable, "-c", "import colocate.cli.main"]
    if os.geteuid() != 0 or subprocess.run(look, cwd=MANIFESTS.parent, capture_output=True).returncode:
        pytest.skip("needs root, a mount namespace, and a checkout and a Python that every user may read")


@pytest.mark.usefixtures("_as_nobody", "limited")
async def test_the_controller_leads_as_its_pod_runs_it(world: World, plane: ControlPlane, tmp_path: Path) -> None:
    (cluster,), (user,) = (yaml.safe_load(plane.kubeconfig("colocate").read_text())[k] for k in ("clusters", "users"))
    host, _, port = cluster["cluster"]["server"].removeprefix("https://").rpartition(":")
    account = tmp_path / "serviceaccount"
    account.mkdir(mode=0o755)
    (account / "token").write_text(user["user"]["token"])
    (account / "ca.crt").write_bytes(base64.b64decode(cluster["cluster"]["certificate-authority-data"]))
    surroundings = {"PATH": os.environ["PATH"], "ACCOUNT": str(account)}
    surroundings |= {
        "KUBERNETES_SERVICE_HOST": host,
        "KUBERNETES_SERVICE_PORT": port,
        "PYTHONPATH": str(MANIFESTS.parent),
    }
    program = [*NOBODY, sys.executable, "-m", "colocate.cli.main", "controller"]
    command = ["unshare", "-m", "sh", "-c", AS_ITS_POD, "sh", *program]
    running = await asyncio.create_subprocess_exec(*command, env=surroundings, stderr=asyncio.subprocess.PIPE)
    try:
        await world.node("n", cpu=2, memory="1Gi")
        await world.group("g", 2)
        for name in ("a", "b"):
            await world.pod(name, "g", cpu=1)
        await world.until_bound("a", "b")
    finally:
        running.terminate()
        _, said = await asyncio.wait_for(running.communicate(), 30)
    assert running.returncode == 0, said.decode()


def documented(after: str) -> list[str]:
    """The lines of the first block after these words."""
    return re.split(r"\n?```[a-z]*\n", DOCS.partition(after)[2])[1].splitlines()


async def test_the_documented_gang_waits_is_explained_and_runs(world: World, kubectl: Kubectl, tmp_path: Path) -> None:
    for i in range(8):
        await world.node(f"n{i}", cpu=8, memory="32Gi", nvidia_com__gpu=8)
    kubectl("cordon", "n7")
    train = tmp_path / "train.yaml"
    train.write_text("\n".join(documented("## Use")))
    inside, told = ("-n", world.namespace), documented("three of them used by another gang")
    async with leader(world):
        await world.group("other", 3)
        for i in range(3):
            runs = {"colocate.io/expected-runtime-seconds": "1800"}
            await world.pod(f"other-{i}", "other", annotations=runs, nvidia_com__gpu=8)
        await world.until_bound("other-0", "other-1", "other-2")
        kubectl("apply", "-f", str(train), *inside)

        async def explained() -> list[str]:
            said = await asyncio.to_thread(kubectl, "colocate", "explain", "podgroup", "train", *inside)
            lines = said.replace(f"{world.namespace}/", "ml/").splitlines()
            return lines if lines == told[1:-3] else []

        await world.until(explained, "the gang is explained as documented")
        await world.told("train", "Unschedulable")
        kubectl("uncordon", "n7")

        async def running() -> str:
            row = kubectl("get", "podgroup", "train", *inside).splitlines()[1]
            return row if row.split()[1:4] == ["Running", "5", "5"] else ""

        await world.until(running, "the gang runs")
        said = await asyncio.to_thread(kubectl, "colocate", "explain", "podgroup", "train", *inside)
        said = said.replace(f"{world.namespace}/", "ml/")
        assert said.strip() == told[-1]
        assert "Started" in kubectl("get", "gangplans", *inside, "-o", "yaml")
        kubectl("delete", "-f", str(train), *inside)
