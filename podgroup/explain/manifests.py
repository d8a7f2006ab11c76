"""The pods that a manifest would make: what `what-if` asks about.

Pods, PodGroups, and the workloads whose pods are known beforehand: Job, JobSet, Deployment, ReplicaSet, StatefulSet,
kubeflow's jobs (`*ReplicaSpecs`), RayCluster and RayJob. A workload of several roles becomes one gang of all its pods,
as its operator makes it, unless its pods name a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from colocate.errors import BadInput
from colocate.objects import ObjectMeta, OwnerReference, Pod, PodSpec, PriorityClass
from podgroup.api import POD_GROUP_LABEL, PodGroup, PodGroupSpec
from podgroup.state.shape import requests_of

MAX_PODS = 50_000


class _Template(NamedTuple):
    role: str
    replicas: int
    template: Mapping[str, Any]


class _PodTemplate(msgspec.Struct):
    metadata: ObjectMeta = ObjectMeta()
    spec: PodSpec = PodSpec()


def pods_of(
    manifests: list[Any], namespace: str, schedulers: tuple[str, ...], now: str, classes: Sequence[PriorityClass] = ()
) -> tuple[list[Pod], list[PodGroup]]:
    """Pods and groups of these manifests, as if they were created now. Raises BadInput that names the place.

    `classes` give the pods that name one their priority, as the API server's admission would.
    """
    pods: list[Pod] = []
    groups: list[PodGroup] = []
    for i, manifest in enumerate(_flat(manifests)):
        if not isinstance(manifest, dict) or not isinstance(manifest.get("kind"), str):
            raise BadInput(f"document {i + 1}: not a Kubernetes object: it has no kind")
        where = f"document {i + 1} ({manifest['kind']})"
        try:
            before = len(pods)
            _add(manifest, namespace, schedulers, now, pods, groups)
            pods[before:] = [_with_priority(pod, classes) for pod in pods[before:]]
        except BadInput as error:
            raise BadInput(f"{where}: {error}") from error
        except msgspec.ValidationError as error:
            raise BadInput(f"{where}: {error}") from error
        except (AttributeError, TypeError) as error:
            raise BadInput(f"{where}: a field that must be an object or a list is something else: {error}") from error
    if not pods:
        raise BadInput("the file has no pods to ask about")
    names = [f"{p.metadata.namespace}/{p.metadata.name}" for p in pods]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(names) < 1000 else []
    if twice:
        raise BadInput(f"two pods are called {twice[0]}: the API server would refuse the second")
    return pods, groups


def _with_priority(pod: Pod, classes: Sequence[PriorityClass]) -> Pod:
    """What the Priority admission plugin makes of a pod."""
    name = pod.spec.priority_class_name
    found = next((c for c in classes if (c.metadata.name == name if name else c.global_default)), None)
    if found is None and name:
        known = ", ".join(sorted(c.metadata.name for c in classes)) or "none"
        raise BadInput(f"spec.priorityClassName {name!r} does not exist; known: {known}")
    if found is None:
        return pod
    policy = found.preemption_policy
    spec = msgspec.structs.replace(pod.spec, priority=found.value, preemption_policy=policy)
    return msgspec.structs.replace(pod, spec=spec)


def _flat(manifests: list[Any]) -> Iterator[Any]:
    """The documents that are not empty, and the items of lists."""
    for manifest in manifests:
        if isinstance(manifest, dict) and manifest.get("kind") == "List" and isinstance(manifest.get("items"), list):
            yield from _flat(manifest["items"])
        elif manifest is not None:
            yield manifest


def _add(
    manifest: dict[str, Any],
    namespace: str,
    schedulers: tuple[str, ...],
    now: str,
    pods: list[Pod],
    groups: list[PodGroup],
) -> None:
    kind, meta = manifest["kind"], msgspec.convert(manifest.get("metadata", {}), ObjectMeta)
    name = meta.name or kind.lower()
    namespace = meta.namespace or namespace
    if kind == "PodGroup":
        spec = msgspec.convert(manifest.get("spec", {}), PodGroupSpec)
        unknown = sorted(set(manifest.get("spec") or {}) - {"minMember", "minResources", "scheduleTimeoutSeconds"})
        if unknown:
            raise BadInput(
                f"spec.{unknown[0]} is not a field of a PodGroup: minMember, minResources, scheduleTimeoutSeconds"
            )
        if spec.min_member < 1:
            raise BadInput(f"spec.minMember is {spec.min_member}: it must be at least 1")
        made = msgspec.structs.replace(
            meta, name=name, namespace=namespace, creation_timestamp=now, uid=f"what-if/{name}"
        )
        groups.append(PodGroup(metadata=made, spec=spec))
        return
    templates = list(_templates(kind, manifest))
    if not templates:
        known = (
            "Pod, PodGroup, Job, JobSet, Deployment, ReplicaSet, StatefulSet, *ReplicaSpecs jobs, RayCluster, RayJob"
        )
        raise BadInput(f"{kind} {name}: its pods are not known beforehand; known kinds: {known}")
    total = sum(t.replicas for t in templates)
    if total + len(pods) > MAX_PODS:
        raise BadInput(f"{total} pods: at most {MAX_PODS} can be asked about")
    named = False
    together = kind not in ("Pod", "Job", "Deployment", "ReplicaSet", "StatefulSet")
    for role, replicas, template in templates:
        shape = msgspec.convert(template, _PodTemplate)
        if not shape.spec.containers:
            raise BadInput("a pod template without containers: write spec.template.spec.containers")
        try:
            requests_of(Pod(metadata=shape.metadata, spec=shape.spec))
        except ValueError as error:
            raise BadInput(f"resources: {error}") from error
        labels = dict(shape.metadata.labels)
        named = named or POD_GROUP_LABEL in labels
        if together:
            labels.setdefault(POD_GROUP_LABEL, name)
        said = (template.get("spec") or {}).get("schedulerName", schedulers[0])  # operators fill in what is not said
        if said not in schedulers:
            raise BadInput(f"spec.schedulerName is {said!r}: that scheduler places these pods; ours: {schedulers[0]}")
        for i in range(replicas):
            one = name if kind == "Pod" else "-".join(filter(None, (name, role, str(i))))
            whose = OwnerReference(kind=kind, name=name, uid=f"what-if/{name}", controller=True)
            made = msgspec.structs.replace(
                shape.metadata,
                name=one,
                namespace=namespace,
                uid=f"what-if/{namespace}/{one}",
                labels=labels,
                creation_timestamp=now,
                deletion_timestamp=None,
                owner_references=[] if kind == "Pod" else [whose],
            )
            spec_of_pod = msgspec.structs.replace(shape.spec, scheduler_name=said, node_name="")
            pods.append(Pod(metadata=made, spec=spec_of_pod))
    named = named or POD_GROUP_LABEL in meta.labels or any(g.metadata.name == name for g in groups)
    if together and not named:
        group = ObjectMeta(name=name, namespace=namespace, creation_timestamp=now, uid=f"what-if/{name}")
        groups.append(PodGroup(metadata=group, spec=PodGroupSpec(min_member=max(total, 1))))


def _templates(kind: str, manifest: Mapping[str, Any]) -> Iterator[_Template]:
    spec = manifest.get("spec") or {}
    if kind == "Pod":
        yield _Template("", 1, {"metadata": manifest.get("metadata", {}), "spec": spec})
    elif kind == "Job":
        yield from _of_job("", 1, spec)
    elif kind in ("Deployment", "ReplicaSet", "StatefulSet"):
        yield _Template("", _count(spec.get("replicas", 1), "spec.replicas"), spec.get("template", {}))
    elif kind == "JobSet":
        for job in spec.get("replicatedJobs", []):
            replicas = _count(job.get("replicas", 1), "spec.replicatedJobs[].replicas")
            yield from _of_job(str(job.get("name", "")), replicas, job.get("template", {}).get("spec", {}))
    elif kind in ("RayCluster", "RayJob"):
        cluster = spec.get("rayClusterSpec", {}) if kind == "RayJob" else spec
        yield _Template("head", 1, cluster.get("headGroupSpec", {}).get("template", {}))
        for group in cluster.get("workerGroupSpecs", []):
            replicas = _count(group.get("replicas", 1), "workerGroupSpecs[].replicas")
            yield _Template(str(group.get("groupName", "worker")), replicas, group.get("template", {}))
    else:
        for field, roles in spec.items():
            if field.endswith("ReplicaSpecs") and isinstance(roles, dict):
                for role, of in roles.items():
                    yield _Template(
                        role.lower(), _count(of.get("replicas", 1), f"spec.{field}.{role}"), of.get("template", {})
                    )


def _of_job(role: str, replicas: int, spec: Mapping[str, Any]) -> Iterator[_Template]:
    parallel = _count(spec.get("parallelism", 1), "spec.parallelism")
    completions = spec.get("completions")
    if completions is not None:
        parallel = min(parallel, _count(completions, "spec.completions"))
    yield _Template(role, replicas * parallel, spec.get("template", {}))


def _count(value: Any, field: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_PODS:
        raise BadInput(f"{field} is {value!r}: it must be a whole number from 0 to {MAX_PODS}")
    return value
