"""colocate power sweep --job: a Job of a cluster under several power caps, one after the other.

Each is made from the file's, asks for its watts, and starts as a gang, so that budgets hold it up and not half of it.
How long it took is from the start of its first container to the end of its last one, as kubelet tells it, in whole
seconds.
Each is removed once it has been written down, and so is one that is under way when the sweep is broken off.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import yaml

from colocate.cluster.api import GANGS, POWER, POWER_RESOURCES
from colocate.errors import BadInput, ColocateError
from colocate.kube.client import PODS, Api, ApiError, path_of
from colocate.units import seconds_of

JOBS, POD_GROUPS = "/apis/batch/v1/jobs", "/apis/scheduling.x-k8s.io/v1alpha1/podgroups"
LOOK_SECONDS = 1.0
MOST_NAME = 50
"""Of the Job's name: ours are longer, and a pod's name has 63."""
Manifest = dict[str, Any]


CAP_IN_TEXT = "$POWERCAP"
"""What stands for the cap in a template, as in the power sweep of the talk that GEOPM's authors gave."""
TABBED_COMMENT = re.compile(r"^ *\t[ \t]*#.*$", re.MULTILINE)
"""Which kubectl takes and YAML does not."""


def read_job(path: Path) -> Manifest:
    """The one Job of a file, which may have other objects that are there already. Raises BadInput."""
    try:
        text = TABBED_COMMENT.sub("", path.read_text())
        found = [document for document in yaml.safe_load_all(text) if document]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadInput(f"--job: {path} cannot be read: {error}") from error
    jobs = [d for d in found if isinstance(d, dict) and (d.get("apiVersion"), d.get("kind")) == ("batch/v1", "Job")]
    if len(jobs) != 1:
        have = f"{len(found)} objects, {len(jobs)} of them Jobs of batch/v1"
        raise BadInput(f"--job: {path} has {have}: one is needed")
    others = [f"{d.get('kind')} {(d.get('metadata') or {}).get('name')}" for d in found if isinstance(d, dict)]
    others.remove(f"Job {(jobs[0].get('metadata') or {}).get('name')}")
    if others:
        print(f"colocate: {path}: {', '.join(others)} must be there already: only the Job is made", file=sys.stderr)
    job: Manifest = jobs[0]
    name = (job.get("metadata") or {}).get("name")
    if not isinstance(name, str) or not 0 < len(name) <= MOST_NAME:
        raise BadInput(f"--job: {path}: metadata.name is {name!r}: from 1 to {MOST_NAME} characters are needed")
    try:
        containers = job["spec"]["template"]["spec"]["containers"]
        if not containers or not all(isinstance(c, dict) for c in containers):
            raise TypeError
    except (KeyError, TypeError) as error:
        raise BadInput(f"--job: {path}: spec.template.spec.containers is not there") from error
    return job


def made_from(job: Manifest, cap: int, index: int, scheduler: str) -> Manifest:
    """The Job of one run: its name, its watts, its gang, and no second try."""
    made: Manifest = _with_cap(job, str(cap))
    name = f"{made['metadata']['name']}-{cap}w-{index}"
    made["metadata"] = {**made["metadata"], "name": name}
    made["spec"] |= {"backoffLimit": 0, "suspend": False}
    template = made["spec"]["template"]
    meta = template["metadata"] = template.get("metadata") or {}
    meta["labels"] = {**(meta.get("labels") or {}), GANGS[0]: name}
    spec = template["spec"]
    spec.setdefault("schedulerName", scheduler)
    spec.setdefault("restartPolicy", "Never")
    asking, resource = _who_asks(spec)
    for container in _containers(spec):
        for part in ("requests", "limits"):
            asked = (container.get("resources") or {}).get(part) or {}
            for known in POWER_RESOURCES:
                asked.pop(known, None)
    resources = asking["resources"] = asking.get("resources") or {}
    for part in ("requests", "limits"):
        resources[part] = {**(resources.get(part) or {}), resource: str(cap)}
    return made


def _with_cap(part: Any, cap: str) -> Any:
    """A copy in which texts have the cap where they stand for it."""
    if isinstance(part, dict):
        return {key: _with_cap(value, cap) for key, value in part.items()}
    if isinstance(part, list):
        return [_with_cap(value, cap) for value in part]
    return part.replace(CAP_IN_TEXT, cap) if isinstance(part, str) else part


def _containers(spec: Manifest) -> list[Manifest]:
    return [*spec["containers"], *(spec.get("initContainers") or [])]


def _who_asks(spec: Manifest) -> tuple[Manifest, str]:
    """The container that asks for watts, and by which name: the one that does, or that has GPUs, or the first."""
    asked = [(c, (c.get("resources") or {}).get("limits") or {}) for c in _containers(spec)]
    by_name = next(((c, name) for c, limits in asked for name in POWER_RESOURCES if name in limits), None)
    if by_name is not None:
        return by_name
    gpus = (c for c, limits in asked if any(key.endswith("/gpu") for key in limits))
    return next(gpus, spec["containers"][0]), POWER


def seconds_taken(pods: list[Manifest]) -> float:
    """From the first start of a container to the last end. Raises ColocateError where that is not told."""
    begins, ends = [], []
    for status in (s for pod in pods for s in pod.get("status", {}).get("containerStatuses") or []):
        ended = (status.get("state") or {}).get("terminated") or {}
        begins.append(seconds_of(ended.get("startedAt")))
        ends.append(seconds_of(ended.get("finishedAt")))
    known = [b for b in begins if b is not None], [e for e in ends if e is not None]
    if not begins or len(known[0]) < len(begins) or len(known[1]) < len(ends):
        raise ColocateError("its pods do not tell when they began and ended")
    taken = max(known[1]) - min(known[0])
    if taken < 1.0:
        raise ColocateError("it took less than a second, and that is all that kubelet tells: let it take a minute")
    return taken


async def sweep_jobs(options: argparse.Namespace, job: Manifest, order: list[int]) -> AsyncIterator[tuple[int, float]]:
    """Yields (cap, seconds) of each run, in their order. Raises ColocateError."""
    async with Api.connect(options.kubeconfig, options.context) as api:
        namespace = options.namespace or job["metadata"].get("namespace") or api.namespace
        for index, cap in enumerate(order):
            said = f"colocate: run {index + 1} of {len(order)}, {cap} W"
            print(f"{said} ...", file=sys.stderr)
            seconds = await _one(api, namespace, made_from(job, cap, index, options.scheduler_name), said)
            print(f"{said}: {seconds:.0f} s", file=sys.stderr)
            yield cap, seconds


async def _one(api: Api, namespace: str, made: Manifest, said: str) -> float:
    name, path = made["metadata"]["name"], path_of(JOBS, namespace)
    made["metadata"].pop("namespace", None)
    created = msgspec.json.decode(await api.request("POST", path, made))
    try:
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": created["metadata"]["uid"]}
        group = {
            "apiVersion": "scheduling.x-k8s.io/v1alpha1",
            "kind": "PodGroup",
            "metadata": {"name": name, "ownerReferences": [owner]},
            "spec": {"minMember": min(int(made["spec"].get(key) or 1) for key in ("parallelism", "completions"))},
        }
        await api.request("POST", path_of(POD_GROUPS, namespace), group)
        await _until_ended(api, namespace, name, said)
        query = {"labelSelector": f"batch.kubernetes.io/job-name={name}"}
        pods = msgspec.json.decode(await api.request("GET", path_of(PODS, namespace), query=query))["items"]
        return seconds_taken(pods)
    finally:
        gone = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background"}
        await asyncio.shield(api.request("DELETE", path_of(JOBS, namespace, name), gone))


async def _until_ended(api: Api, namespace: str, name: str, said: str) -> None:
    """Until it is complete. Raises ColocateError where it fails."""
    told = ""
    while True:
        job = msgspec.json.decode(await api.request("GET", path_of(JOBS, namespace, name)))
        conditions = {c["type"]: c for c in job.get("status", {}).get("conditions") or [] if c["status"] == "True"}
        if "Complete" in conditions:
            return
        if failed := conditions.get("Failed"):
            raise ColocateError(f"{said}: the Job {name} failed: {failed.get('reason')}: {failed.get('message')}")
        why = await _waits(api, namespace, name)
        if why != told and why:
            print(f"{said} waits: {why}", file=sys.stderr)
        told = why
        await asyncio.sleep(LOOK_SECONDS)


async def _waits(api: Api, namespace: str, name: str) -> str:
    """Why one of its pods is not on a node; empty: none waits for one."""
    query = {"labelSelector": f"batch.kubernetes.io/job-name={name}"}
    try:
        pods = msgspec.json.decode(await api.request("GET", path_of(PODS, namespace), query=query))["items"]
    except ApiError:
        return ""
    return next(_reasons(pods), "")


def _reasons(pods: list[Manifest]) -> Iterator[str]:
    for condition in (c for pod in pods for c in pod.get("status", {}).get("conditions") or []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            yield str(condition.get("message") or condition.get("reason") or "")
