"""Pods become gangs: who belongs to whom, what is satisfied, and what is missing. A pod without a group is one by
itself."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from colocate.objects import Pod
from podgroup.dialects.scheduling_sigs import DIALECT

_SUFFIX = re.compile(r"(-[a-z0-9]{5}|-?\d+)$")
POD = "pod:"
"""A key that begins so, after the namespace, names a pod that is a gang of its own."""


def gang_key(pod: Pod) -> str:
    """`namespace/group`, or `namespace/pod:name` of a pod that is alone."""
    group = DIALECT.group_of(pod)
    return f"{pod.metadata.namespace}/{group}" if group else f"{pod.metadata.namespace}/{POD}{pod.metadata.name}"


def is_group(key: str) -> bool:
    """Whether a key names a PodGroup, not a pod alone."""
    return not key.partition("/")[2].startswith(POD)


def rejected(pod: Pod) -> bool:
    """Whether the kubelet refused the pod (OutOfcpu, Evicted, ...): it failed, and no container ever was."""
    return pod.status.phase == "Failed" and not pod.status.container_statuses


def accepted(pod: Pod) -> bool:
    """Whether the kubelet of its node has taken the pod."""
    return pod.status.phase in ("Running", "Succeeded") or bool(pod.status.container_statuses)


def owned(pod: Pod) -> bool:
    """Whether a controller makes it anew elsewhere when it is deleted; static and DaemonSet pods come back in place.

    An owner that is no controller is there for garbage collection only.
    """
    return any(o.controller and o.kind not in ("Node", "DaemonSet") for o in pod.metadata.owner_references)


class Members(NamedTuple):
    """The pods of one gang, each in one place; in the order of their creation and names."""

    pending: list[Pod]
    """Unbound, free of gates, ours: what may be placed."""
    bound: list[Pod]
    """On a node and alive."""
    succeeded: list[Pod]
    failed: list[Pod]
    gated: list[Pod]
    leaving: list[Pod]
    """Alive and being deleted."""
    foreign: list[Pod]
    """Unbound, and another scheduler's."""

    @property
    def counted(self) -> list[Pod]:
        """Those that count for the group's quorum and minResources."""
        return [*self.pending, *self.bound, *self.succeeded, *self.gated]

    @property
    def satisfied(self) -> int:
        """How many of the quorum are there: what runs and what has completed."""
        return len(self.bound) + len(self.succeeded)

    @property
    def created(self) -> int:
        """How many of the quorum exist at all."""
        return self.satisfied + len(self.pending) + len(self.gated)

    @property
    def priority(self) -> int:
        """Of the group: its most important member's."""
        return max((p.spec.priority for p in (*self.pending, *self.gated, *self.bound)), default=0)


def _run_of(pod: Pod) -> str:
    """Who made the pod for one run: pods of a JobSet have a Job for each role, and a label in common."""
    owner = next((o.uid for o in pod.metadata.owner_references if o.controller), "")
    return pod.metadata.labels.get("jobset.sigs.k8s.io/jobset-uid") or owner


def _of_former_run(done: Pod, runs: set[str], began: str) -> bool:
    """Whether a completed pod is of a run before the living members': over before they were made, and of another owner.

    RFC 3339 times of the API server are in UTC to the second, so their texts are in the order of time.
    """
    ended = next((c.last_transition_time for c in done.status.conditions if c.type == "Ready"), None)
    return _run_of(done) not in runs and ended is not None and ended < began


def family(pod: Pod) -> str:
    """What runs of the same work have in common: namespace, and owner's kind and name without its running number."""
    owners = pod.metadata.owner_references
    if not owners:
        return ""
    return f"{pod.metadata.namespace}/{owners[0].kind}/{_SUFFIX.sub('', owners[0].name)}"


def without_former_runs(pods: Iterable[Pod]) -> list[Pod]:
    """The pods of a gang without those that completed in a former run: a CronJob's runs share one PodGroup.

    Owners of other names may be other roles of the same run: what they have completed counts.
    """
    pods = list(pods)
    if not any(p.status.phase == "Succeeded" for p in pods):
        return pods
    living = [p for p in pods if not p.terminal]
    began = min((p.metadata.creation_timestamp or "" for p in living), default="")
    runs, families = {_run_of(p) for p in living}, {family(p) for p in living} - {""}
    return [
        p
        for p in pods
        if p.status.phase != "Succeeded" or family(p) not in families or not _of_former_run(p, runs, began)
    ]


def sort_members(pods: Iterable[Pod], schedulers: tuple[str, ...]) -> Members:
    """Tell the members of a gang apart; `schedulers` are the names we answer to."""
    found = Members([], [], [], [], [], [], [])
    for pod in sorted(
        without_former_runs(pods), key=lambda p: (-p.spec.priority, p.metadata.creation_timestamp or "", _natural(p))
    ):
        if pod.status.phase == "Succeeded":
            found.succeeded.append(pod)
        elif pod.status.phase == "Failed":
            found.failed.append(pod)
        elif pod.deleting:
            found.leaving.append(pod)
        elif pod.spec.node_name:
            found.bound.append(pod)
        elif pod.spec.scheduler_name not in schedulers:
            found.foreign.append(pod)
        elif not DIALECT.admitted(pod):
            found.gated.append(pod)
        else:
            found.pending.append(pod)
    return found


def _natural(pod: Pod) -> tuple[str, int, str]:
    """`worker-10` after `worker-9`."""
    stem, _, ordinal = pod.metadata.name.rpartition("-")
    return (stem, int(ordinal), "") if ordinal.isdigit() else (pod.metadata.name, 0, "")
