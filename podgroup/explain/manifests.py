"""The pods that a manifest would make: what `what-if` asks about.

Pods, PodGroups, and the workloads whose pods are known beforehand: Job, JobSet, Deployment, ReplicaSet, StatefulSet,
LeaderWorkerSet, kubeflow's jobs (`*ReplicaSpecs`), RayCluster, RayJob and Volcano's Job. A workload of several roles
becomes one gang of all its pods, as its operator makes it, unless its pods name a group. Other documents are passed
over, and that is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from colocate.errors import BadInput
from colocate.objects import (
    Claim,
    ClaimSource,
    ClaimTemplate,
    ObjectMeta,
    OwnerReference,
    Pod,
    PodSpec,
    PriorityClass,
    Volume,
)
from podgroup.api import POD_GROUP_LABEL, PodGroup, PodGroupSpec
from podgroup.state.shape import requests_of

MAX_PODS = 50_000
VOLCANO = "batch.volcano.sh"
ALONE = ("Pod", "Job", "Deployment", "ReplicaSet", "StatefulSet")
"""Their pods are gangs of one, unless they name a group."""
WITHOUT_PODS = frozenset(
    [
        *("v1", "apps", "batch", "policy", "autoscaling", "networking.k8s.io", "rbac.authorization.k8s.io"),
        *("storage.k8s.io", "scheduling.k8s.io", "apiextensions.k8s.io", "admissionregistration.k8s.io"),
        "coordination.k8s.io",
    ]
)
"""APIs whose other kinds make no pods, but for these, whose pods are not known beforehand."""
LATER = ("CronJob", "DaemonSet")


class _Template(NamedTuple):
    role: str
    replicas: int
    template: Mapping[str, Any]


class _Role(NamedTuple):
    role: str
    replicas: int
    template: Mapping[str, Any]
    gang: str = ""
    """What its name has beyond the workload's."""
    scheduler: str = ""
    """Where the template names none."""
    claims: tuple[str, ...] = ()
    """Templates of claims of which each pod gets one."""


class _PodTemplate(msgspec.Struct):
    metadata: ObjectMeta = ObjectMeta()
    spec: PodSpec = PodSpec()


class Manifest(NamedTuple):
    """A document of a file."""

    file: str
    number: int
    content: Any

    @property
    def where(self) -> str:
        """For messages."""
        kind = self.content.get("kind") if isinstance(self.content, dict) else None
        return f"{self.file}: document {self.number}" + (f" ({kind})" if kind else "")


class Asked(NamedTuple):
    """What manifests would make."""

    pods: list[Pod]
    groups: list[PodGroup]
    claims: list[Claim]
    passed_over: list[str]
    """Documents that make no pods, or none that are known beforehand, in words."""


def pods_of(
    manifests: Sequence[Manifest],
    namespace: str,
    schedulers: tuple[str, ...],
    now: str,
    classes: Sequence[PriorityClass] = (),
) -> Asked:
    """Pods and groups of these manifests, as if they were created now. Raises BadInput that names the place.

    `classes` give the pods that name one their priority, as the API server's admission would. A null is absent, as the
    API server has it.
    """
    asked = Asked([], [], [], [])
    for one in _flat(manifests):
        content = _without_nulls(one.content)
        if not isinstance(content, dict) or not isinstance(content.get("kind"), str):
            raise BadInput(f"{one.where}: not a Kubernetes object: it has no kind")
        try:
            before = len(asked.pods)
            _add(content, namespace, schedulers, now, asked)
            asked.pods[before:] = [_with_priority(pod, classes) for pod in asked.pods[before:]]
        except (BadInput, msgspec.ValidationError) as error:
            raise BadInput(f"{one.where}: {error}") from error
        except (AttributeError, TypeError) as error:
            raise BadInput(
                f"{one.where}: a field that must be an object or a list is something else: {error}"
            ) from error
    if not asked.pods:
        raise BadInput("; ".join(["there are no pods to ask about", *asked.passed_over]))
    names = [f"{p.metadata.namespace}/{p.metadata.name}" for p in asked.pods]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(names) < 1000 else []
    if twice:
        raise BadInput(f"two pods are called {twice[0]}: the API server would refuse the second")
    return asked


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value if v is not None] if isinstance(value, list) else value


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


def _flat(manifests: Sequence[Manifest]) -> Iterator[Manifest]:
    """The documents that are not empty, and the items of lists."""
    for one in manifests:
        content = one.content
        if isinstance(content, dict) and content.get("kind") == "List" and isinstance(content.get("items"), list):
            yield from _flat([one._replace(content=item) for item in content["items"]])
        elif content is not None:
            yield one


def _add(manifest: dict[str, Any], namespace: str, schedulers: tuple[str, ...], now: str, asked: Asked) -> None:
    kind, meta = manifest["kind"], msgspec.convert(manifest.get("metadata", {}), ObjectMeta)
    api, prefix = (
        str(manifest.get("apiVersion", "")).partition("/")[0],
        manifest.get("metadata", {}).get("generateName"),
    )
    name = meta.name or (f"{prefix}{len(asked.pods)}" if prefix else kind.lower())
    namespace = meta.namespace or namespace
    if kind == "PodGroup":
        asked.groups.append(_group(manifest, meta, name, namespace, now))
        return
    if kind == "PersistentVolumeClaim":
        template = msgspec.convert(manifest, ClaimTemplate)
        asked.claims.append(_claim(template, name, namespace, now))
        return
    roles = list(_roles(kind, api, manifest))
    if not roles:
        known = api in WITHOUT_PODS and kind not in LATER
        told = "makes no pods" if known else f"of {api or 'no API'}: its pods are not known beforehand"
        asked.passed_over.append(f"{kind} {name} {told}; it is passed over")
        return
    if kind == "StatefulSet":
        roles = [_with_claims(role, manifest, name, namespace, now, asked) for role in roles]
    total = sum(t.replicas for t in roles)
    if total + len(asked.pods) > MAX_PODS:
        raise BadInput(f"{total} pods: at most {MAX_PODS} can be asked about")
    together = kind not in ALONE or api == VOLCANO
    named = POD_GROUP_LABEL in meta.labels or any(g.metadata.name == name for g in asked.groups)
    for gang in dict.fromkeys(t.gang for t in roles):
        its = [t for t in roles if t.gang == gang]
        group = name + gang if together else ""
        labelled = False
        for role in its:
            made = _pods(role, kind, name, namespace, schedulers, now, group)
            labelled = labelled or any(p.metadata.labels.get(POD_GROUP_LABEL, group) != group for p in made)
            asked.pods.extend(made)
            asked.claims.extend(_claims_of(made, now))
        if together and not (named or labelled):
            of_it = ObjectMeta(name=group, namespace=namespace, creation_timestamp=now, uid=f"what-if/{group}")
            least = sum(t.replicas for t in its)
            if api == VOLCANO:
                least = min(_count(manifest["spec"].get("minAvailable", least), "spec.minAvailable"), least)
            asked.groups.append(PodGroup(metadata=of_it, spec=PodGroupSpec(min_member=max(least, 1))))


def _claim(template: ClaimTemplate, name: str, namespace: str, now: str, pod: Pod | None = None) -> Claim:
    """A claim as it is just after it was made: not bound to any volume."""
    owners = [OwnerReference(kind="Pod", name=pod.metadata.name, uid=pod.metadata.uid, controller=True)] if pod else []
    meta = msgspec.structs.replace(
        template.metadata,
        name=name,
        namespace=namespace,
        uid=f"what-if/{namespace}/{name}",
        creation_timestamp=now,
        owner_references=owners,
    )
    return Claim(metadata=meta, spec=template.spec)


def _claims_of(pods: list[Pod], now: str) -> Iterator[Claim]:
    """The claims of their ephemeral volumes."""
    for pod in pods:
        for volume in pod.spec.volumes:
            template = volume.ephemeral.volume_claim_template if volume.ephemeral is not None else None
            if template is not None:
                yield _claim(template, volume.claim(pod.metadata.name), pod.metadata.namespace, now, pod)


def _with_claims(role: _Role, manifest: Mapping[str, Any], name: str, namespace: str, now: str, asked: Asked) -> _Role:
    """A StatefulSet makes a claim of each template for each pod, and a volume of the template's name in it."""
    templates = msgspec.convert((manifest.get("spec") or {}).get("volumeClaimTemplates", []), list[ClaimTemplate])
    for template in templates:
        for i in range(role.replicas):
            asked.claims.append(_claim(template, f"{template.metadata.name}-{name}-{i}", namespace, now))
    return role._replace(claims=tuple(t.metadata.name for t in templates))


def _group(manifest: Mapping[str, Any], meta: ObjectMeta, name: str, namespace: str, now: str) -> PodGroup:
    spec = msgspec.convert(manifest.get("spec", {}), PodGroupSpec)
    unknown = sorted(set(manifest.get("spec") or {}) - {"minMember", "minResources", "scheduleTimeoutSeconds"})
    if unknown:
        raise BadInput(
            f"spec.{unknown[0]} is not a field of a PodGroup: minMember, minResources, scheduleTimeoutSeconds"
        )
    if spec.min_member < 1:
        raise BadInput(f"spec.minMember is {spec.min_member}: it must be at least 1")
    made = msgspec.structs.replace(meta, name=name, namespace=namespace, creation_timestamp=now, uid=f"what-if/{name}")
    return PodGroup(metadata=made, spec=spec)


def _pods(
    role: _Role, kind: str, name: str, namespace: str, schedulers: tuple[str, ...], now: str, group: str
) -> list[Pod]:
    """The pods of one role."""
    shape = msgspec.convert(role.template, _PodTemplate)
    if not shape.spec.containers:
        raise BadInput("a pod template without containers: write spec.template.spec.containers")
    try:
        requests_of(Pod(metadata=shape.metadata, spec=shape.spec))
    except ValueError as error:
        raise BadInput(f"resources: {error}") from error
    labels = {**({POD_GROUP_LABEL: group} if group else {}), **shape.metadata.labels}
    said = (role.template.get("spec") or {}).get("schedulerName", role.scheduler or schedulers[0])
    if said not in schedulers:
        raise BadInput(f"spec.schedulerName is {said!r}: that scheduler places these pods; ours: {schedulers[0]}")
    spec = msgspec.structs.replace(shape.spec, scheduler_name=said, node_name="")
    found = []
    for i in range(role.replicas):
        one = name if kind == "Pod" else "-".join(filter(None, (name + role.gang, role.role, str(i))))
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
        own = [Volume(name=c, persistent_volume_claim=ClaimSource(claim_name=f"{c}-{one}")) for c in role.claims]
        volumes = [*(v for v in spec.volumes if v.name not in role.claims), *own]
        found.append(Pod(metadata=made, spec=msgspec.structs.replace(spec, volumes=volumes)))
    return found


def _roles(kind: str, api: str, manifest: Mapping[str, Any]) -> Iterator[_Role]:
    spec = manifest.get("spec") or {}
    if api == VOLCANO:
        for task in spec.get("tasks", []) if kind == "Job" else ():
            count = _count(task.get("replicas", 1), "spec.tasks[].replicas")
            scheduler = spec.get("schedulerName", "volcano")
            yield _Role(str(task.get("name", "task")), count, task.get("template", {}), scheduler=scheduler)
    elif kind == "LeaderWorkerSet":
        yield from _of_leader_and_workers(spec)
    elif kind == "Pod" or (kind in ALONE and api in ("", "batch", "apps")) or api not in WITHOUT_PODS:
        for role, replicas, template in _templates(kind, manifest):
            yield _Role(role, replicas, template)


def _of_leader_and_workers(spec: Mapping[str, Any]) -> Iterator[_Role]:
    """A gang for each replica: a leader, and one worker less than its size."""
    of = spec.get("leaderWorkerTemplate", {})
    size, replicas = (
        _count(of.get("size", 1), "spec.leaderWorkerTemplate.size"),
        _count(spec.get("replicas", 1), "spec.replicas"),
    )
    workers = of.get("workerTemplate", {})
    for i in range(replicas):
        gang = f"-{i}" if replicas > 1 else ""
        yield _Role("", 1, of.get("leaderTemplate", workers), gang)
        if size > 1:
            yield _Role("worker", size - 1, workers, gang)


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
