"""Builds the operators whose jobs are played against the controller, each from its own module.

`python -m tools.operators [NAME...]` builds what is missing. They are not part of the usual tests: a build takes
minutes, once. What is built lies in the cache, by name and version.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

from colocate.errors import HostUnfit
from colocate.localcluster.controlplane import cache_folder


class Module(NamedTuple):
    """A Go module at a version, the package of its operator, and its custom resources."""

    path: str
    version: str
    package: str
    resources: tuple[str, ...]
    """Files of CustomResourceDefinitions within the module."""
    webhooks: str = ""
    """The file of its webhook configurations."""
    python: str = ""
    """What of PyPI it starts, pinned: it is put beside it."""
    apart: bool = True
    """Whether its webhooks need a `/tmp` of their own."""
    header: str = ""
    """A C header that its build needs, and the Debian package that has it."""


OPERATORS = {
    "mpi-operator": Module(
        "github.com/kubeflow/mpi-operator",
        "v0.7.0",
        "./cmd/mpi-operator",
        ("manifests/base/kubeflow.org_mpijobs.yaml",),
    ),
    "kuberay": Module(
        "github.com/ray-project/kuberay/ray-operator",
        "v1.5.0",
        ".",
        tuple(f"config/crd/bases/ray.io_{plural}.yaml" for plural in ("rayclusters", "rayjobs", "rayservices")),
    ),
    "training-operator": Module(
        "github.com/kubeflow/training-operator",
        "v1.9.3",
        "./cmd/training-operator.v1",
        ("manifests/base/crds/kubeflow.org_pytorchjobs.yaml",),
        "manifests/base/webhook/manifests.yaml",
    ),
    "jobset": Module(
        "sigs.k8s.io/jobset",
        "v0.10.1",
        ".",
        ("config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml",),
        "config/components/webhook/manifests.yaml",
    ),
    "lws": Module(
        "sigs.k8s.io/lws",
        "v0.7.0",
        "./cmd",
        ("config/crd/bases/leaderworkerset.x-k8s.io_leaderworkersets.yaml",),
        "config/webhook/manifests.yaml",
    ),
    "spark-operator": Module(
        "github.com/kubeflow/spark-operator/v2",
        "v2.3.0",
        "./cmd/operator",
        tuple(
            f"config/crd/bases/sparkoperator.k8s.io_{plural}.yaml"
            for plural in ("sparkapplications", "scheduledsparkapplications", "sparkconnects")
        ),
        "config/webhook/manifests.yaml",
        python="pyspark==3.5.5",
        apart=False,
    ),
    "kueue": Module(
        "sigs.k8s.io/kueue",
        "v0.17.0",
        "./cmd/kueue",
        tuple(
            f"config/components/crd/bases/kueue.x-k8s.io_{plural}.yaml"
            for plural in (
                "workloads",
                "localqueues",
                "workloadpriorityclasses",
                "cohorts",
                "topologies",
                "clusterqueues",
                "provisioningrequestconfigs",
                "admissionchecks",
                "resourceflavors",
                "multikueueclusters",
                "multikueueconfigs",
            )
        ),
        "config/components/webhook/manifests.yaml",
    ),
}

BESIDE = {
    "coscheduling": Module("sigs.k8s.io/scheduler-plugins", "v0.33.5", "./cmd/scheduler", ()),
    "koordlet": Module(
        "github.com/koordinator-sh/koordinator",
        "v1.7.0",
        "./cmd/koordlet",
        (
            "config/crd/bases/slo.koordinator.sh_nodeslos.yaml",
            "config/crd/bases/slo.koordinator.sh_nodemetrics.yaml",
            "config/crd/bases/topology.node.k8s.io_noderesourcetopologies.yaml",
        ),
        header="/usr/include/perfmon/pfmlib.h libpfm4-dev",
    ),
}
"""What benchmarks run beside our controller; built by name."""
ALL = {**OPERATORS, **BESIDE}


def built(name: str) -> Path | None:
    """The folder with an operator's binary `operator` and its custom resources `crds/`; None if it is not built."""
    folder, module = _folder(name), ALL[name]
    wanted = ["operator", *(f"crds/{Path(r).name}" for r in module.resources), *(["python"] if module.python else [])]
    return folder if all((folder / file).exists() for file in wanted) else None


def _folder(name: str) -> Path:
    return cache_folder("operators") / f"{name}-{ALL[name].version}"


def lacks(name: str) -> str:
    """What is missing before an operator can be played; empty if nothing is."""
    if built(name) is None:
        return f"{name} is not built: make test-operators builds it (Go, some minutes, once)"
    if ALL[name].python and shutil.which("java") is None:
        return f"{name} submits with Java, which is not here"
    if ALL[name].webhooks and ALL[name].apart and not _may_unshare():
        return f"{name} needs a mount namespace, which this user may not have here: run it as root"
    return ""


@cache
def _may_unshare() -> bool:
    command = ["unshare", "--map-root-user", "--mount", "true"]
    return (
        shutil.which("unshare") is not None
        and subprocess.run(command, capture_output=True, check=False).returncode == 0
    )


def build(name: str) -> Path:
    """Build an operator, unless it is there. Raises HostUnfit."""
    there = built(name)
    if there is not None:
        return there
    module = ALL[name]
    if shutil.which("go") is None:
        raise HostUnfit("there is no Go here", "install Go (https://go.dev/dl)")
    header, _, package = module.header.partition(" ")
    if header and not Path(header).exists():
        raise HostUnfit(f"there is no {header} here", f"apt-get install {package}")
    told = _go("mod", "download", "-json", f"{module.path}@{module.version}", where=Path("/"))
    source = Path(json.loads(told)["Dir"])
    folder = _folder(name)
    (folder / "crds").mkdir(parents=True, exist_ok=True)
    for resource in module.resources:
        shutil.copyfile(source / resource, folder / "crds" / Path(resource).name)
    if module.webhooks:
        shutil.copyfile(source / module.webhooks, folder / "webhooks.yaml")
    if not (folder / "operator").exists():
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            copy, made = Path(temporary) / "source", Path(temporary) / "operator"
            shutil.copytree(source, copy, copy_function=shutil.copyfile)
            for path in (copy, *copy.rglob("*")):
                path.chmod(0o755 if path.is_dir() else 0o644)  # the module cache is read-only
            arguments = ["-trimpath", "-ldflags", "-s -w", "-o", str(made), module.package]
            _go("build", *arguments, where=copy, c=bool(header))
            made.rename(folder / "operator")  # whole or not at all
    if module.python and not (folder / "python").exists():
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            into = Path(temporary) / "python"
            command = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-deps",
                "--no-compile",
                "--target",
                str(into),
            ]
            subprocess.run([*command, module.python], check=True)
            into.rename(folder / "python")
    return folder


def _go(*arguments: str, where: Path, c: bool = False) -> str:
    environment = {**os.environ, "CGO_ENABLED": str(int(c)), "GOFLAGS": "-mod=mod"}
    ran = subprocess.run(["go", *arguments], cwd=where, env=environment, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise HostUnfit(f"go {arguments[0]} failed: {ran.stderr.strip()[-2000:]}", "see the message of Go")
    return ran.stdout


def main(names: list[str]) -> int:
    """Build what is missing, of these or of all operators."""
    for name in names or OPERATORS:
        if name not in ALL:
            print(f"operators: {name} is not known; known: {', '.join(ALL)}", file=sys.stderr)
            return 2
        if built(name) is None:
            print(f"operators: building {name} {ALL[name].version} ...", flush=True)
        try:
            build(name)
        except HostUnfit as error:
            print(f"operators: {name}: {error}: {error.mend}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
