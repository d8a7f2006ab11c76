"""What else is on the node: cgroups of nobody that we know, and CPUs that belong to one workload alone.

Sources: kubelet's static CPU manager gives a Guaranteed pod's containers CPUs of their own, which the cpusets of all
others then lack (pkg/kubelet/cm/cpumanager); isolcpus= is in /sys/devices/system/cpu/isolated.
"""

from __future__ import annotations

from collections.abc import Iterable

from colocate.cgroup.layout import UNIFIED
from colocate.cgroup.port import FilePort
from colocate.cgroup.tree import Tree, joined, main_hierarchy
from colocate.observe.cgroup import parse_flat_keyed
from colocate.observe.workloads import Target
from colocate.units import parse_cpulist

MOST_STRANGERS = 64


def usage_us(port: FilePort, path: str) -> int | None:
    """CPU time that a cgroup and all below it have used; None where that is not known."""
    hierarchy = port.layout.hierarchy("cpuacct")
    if hierarchy is None:
        return None
    if hierarchy == UNIFIED:
        return parse_flat_keyed(port.read(UNIFIED, path, "cpu.stat"), "usage_usec")[0]
    text = port.read(hierarchy, path, "cpuacct.usage")
    return int(text) // 1000 if text else None


def strangers_us(port: FilePort, tree: Tree, known: Iterable[str]) -> dict[str, int]:
    """CPU time of the largest cgroups below the node root in which no known workload is: path -> microseconds."""
    ours = {*known, tree.tier_path, *filter(None, (tree.kubepods,))}
    hierarchy = port.layout.hierarchy("cpuacct") or main_hierarchy(port)
    found: dict[str, int] = {}
    waiting = [tree.root]
    while waiting and len(found) < MOST_STRANGERS:
        parent = waiting.pop()
        for child in port.children(hierarchy, parent):
            path = joined(parent, child)
            if path in ours:
                continue
            if any(o.startswith(f"{path}/") for o in ours):
                waiting.append(path)  # a known workload is in there: look at its neighbours
            elif (usage := usage_us(port, path)) is not None:
                found[path] = usage
    return found


def reserved_cpus(port: FilePort, tree: Tree, cpus: tuple[int, ...], targets: Iterable[Target]) -> tuple[int, ...]:
    """CPUs of the node that belong to one workload alone: exclusive ones of Guaranteed pods, and isolated ones."""
    hierarchy = port.layout.hierarchy("cpuset")
    alone = set(parse_cpulist(port.proc("/sys/devices/system/cpu/isolated") or ""))
    shared: set[int] = set()
    if hierarchy is not None and tree.kubepods is not None:
        owned: list[set[int]] = []
        for pod in sorted({p for t in targets if (p := _pod_of(tree, t.path)) is not None}):
            guaranteed = pod.rpartition("/")[0] == tree.kubepods
            paths = [pod, *(joined(pod, c) for c in port.children(hierarchy, pod))]
            texts = [port.read(hierarchy, path, "cpuset.cpus") or "" for path in paths]
            own = {c for text in texts for c in parse_cpulist(text.strip()) if text.strip()}
            if guaranteed and own and own < set(cpus):
                owned.append(own)
            elif not guaranteed:
                shared |= own
        # CPUs that two Guaranteed pods have are the shared pool's: exclusive ones belong to one.
        for i, own in enumerate(owned):
            alone |= own.difference(*(other for j, other in enumerate(owned) if j != i))
    alone -= shared if shared < set(cpus) else set()
    alone &= set(cpus)
    return tuple(sorted(alone)) if alone != set(cpus) else ()


def _pod_of(tree: Tree, path: str) -> str | None:
    """The pod's cgroup in which a workload is, or which it is."""
    for level in (tree.burstable, tree.besteffort, tree.kubepods):
        if level is not None and path.startswith(f"{level}/"):
            pod = joined(level, path[len(level) + 1 :].split("/")[0])
            return None if pod in (tree.burstable, tree.besteffort, tree.tier_path) else pod
    return None
