"""Which containers and jobs used CPU time: every container of every pod of this node, and the jobs of the tier.

A pod's directory is known by kubelet's name for it, a container's by the runtime's: `cri-containerd-ID.scope`,
`crio-ID.scope`, `docker-ID.scope` under systemd's driver, the bare id under cgroupfs's (kubelet pkg/kubelet/cm,
containerd internal/cri, cri-o internal/config/cgmgr).
"""

from __future__ import annotations

import re
from typing import NamedTuple

from colocate.cgroup.port import FilePort
from colocate.cgroup.tree import Tree, joined, main_hierarchy
from colocate.observe.neighbourhood import usage_us
from colocate.observe.workloads import pod_uid

SCOPE = re.compile(r"(?:(cri-containerd|crio|docker)-)?([0-9a-f]{64})(?:\.scope)?\Z")
RUNTIMES = {"cri-containerd": "containerd", "crio": "crio", "docker": "docker"}
LEVELS = 2
"""kubepods/QOS/POD."""


class Consumer(NamedTuple):
    """A container, or a job of the tier."""

    key: str
    """Of this one and no later one of its name."""
    cpu_us: int
    """Used since it was made."""
    job: str = ""
    pod_uid: str = ""
    container_id: str = ""
    runtime: str = ""
    """Where its directory's name tells it."""


def consumer_of(path: str, tree: Tree) -> Consumer | None:
    """Whose a process in this cgroup is; None where it is neither a container's nor a job's."""
    in_tier = _below(path, tree.tier_path)
    parts = in_tier or _below(path, tree.kubepods)
    uid = next((found for part in parts if (found := pod_uid(part)) is not None), None)
    if uid is not None:
        of = next((match for part in reversed(parts) if (match := SCOPE.match(part)) is not None), None)
        return None if of is None else Consumer(of[2], 0, "", uid, of[2], RUNTIMES.get(of[1] or "", ""))
    return Consumer(f"job {in_tier[0]}", 0, job=in_tier[0]) if in_tier else None


def _below(path: str, parent: str | None) -> list[str]:
    """The parts of a path below another; none where it is not."""
    start = f"{(parent or path).rstrip('/')}/"
    return path.removeprefix(start).split("/") if path.startswith(start) else []


def read_consumers(port: FilePort, tree: Tree) -> list[Consumer]:
    """All that are there now, and what each has used."""
    hierarchy = port.layout.hierarchy("cpuacct") or main_hierarchy(port)
    found: list[Consumer] = []
    pods: list[str] = []
    waiting = [(tree.kubepods, 0)] if tree.kubepods is not None else []
    while waiting:
        parent, level = waiting.pop()
        for child in port.children(hierarchy, parent):
            path = joined(parent, child)
            if pod_uid(child) is not None:
                pods.append(path)
            elif path != tree.tier_path and level < LEVELS:
                waiting.append((path, level + 1))
    for child, inode in port.children(hierarchy, tree.tier_path).items():
        path = joined(tree.tier_path, child)
        if pod_uid(child) is not None:
            pods.append(path)
        elif (used := usage_us(port, path)) is not None:
            found.append(Consumer(f"{path}@{inode}", used, job=child))
    for pod in pods:
        uid = pod_uid(pod.rpartition("/")[2]) or ""
        for child, inode in port.children(hierarchy, pod).items():
            of, used = SCOPE.match(child), usage_us(port, joined(pod, child))
            if of is not None and used is not None:
                runtime = RUNTIMES.get(of[1] or "", "")
                found.append(Consumer(f"{of[2]}@{inode}", used, "", uid, of[2], runtime))
    return found
