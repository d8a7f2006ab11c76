"""Walking the cgroup trees: where kubelet's groups and our tier are, who is in a cgroup, and which one a process is in.

On a Kubernetes node the tree is found wherever it is nested (kind puts it below `kubelet.slice`); the tier is
BestEffort's sibling. On a plain host it is a directory below the node root. Source: kubelet pkg/kubelet/cm.
"""

from __future__ import annotations

import os.path

import msgspec

from colocate.cgroup.layout import UNIFIED
from colocate.cgroup.port import FilePort
from colocate.errors import HostUnfit

MAX_SEARCH_DEPTH = 3
PLAIN_TIER = "colocate-batch"


def joined(*parts: str) -> str:
    """A cgroup path of its parts: absolute, without double or trailing slashes."""
    return "/" + "/".join(p.strip("/") for p in parts if p.strip("/"))


def processes(port: FilePort, hierarchy: str, path: str, inode: int | None = None) -> list[int]:
    """The processes directly in a cgroup, from cgroup.procs; not those of other pid namespaces, which are 0 there."""
    text = port.read(hierarchy, path, "cgroup.procs", inode)
    return [int(p) for p in text.split() if p != "0"] if text else []


def processes_below(port: FilePort, hierarchy: str, path: str) -> list[int]:
    """The processes of a cgroup and of all its descendants."""
    found = processes(port, hierarchy, path)
    for child in port.children(hierarchy, path):
        found.extend(processes_below(port, hierarchy, joined(path, child)))
    return found


def processes_anywhere(port: FilePort, path: str) -> set[int]:
    """The processes below a path in any hierarchy: a job may have left one of them by itself."""
    return {pid for hierarchy in port.layout.mounts for pid in processes_below(port, hierarchy, path)}


def rmdir_tree(port: FilePort, hierarchy: str, path: str) -> bool:
    """Remove a tree without processes, children first; False if it is occupied. True also if it is gone."""
    for child in port.children(hierarchy, path):
        rmdir_tree(port, hierarchy, joined(path, child))
    return port.rmdir(hierarchy, path)


def start_time(port: FilePort, pid: int) -> int | None:
    """A process's start in clock ticks since boot (field 22 of /proc/<pid>/stat): with the pid, its identity.

    Also of one that has ended, as long as nobody has waited for it.
    """
    stat = port.proc(f"/proc/{pid}/stat")
    return int(stat.rpartition(")")[2].split()[19]) if stat else None


def has_ended(port: FilePort, pid: int) -> bool:
    """Whether a process is no more, also where nobody has waited for it yet (`Z`): it is in no cgroup any more."""
    fields = (port.proc(f"/proc/{pid}/stat") or "").rpartition(")")[2].split()
    return not fields or fields[0] in ("Z", "X")


def inodes_of(port: FilePort, path: str) -> dict[str, int]:
    """The inode of a cgroup in each hierarchy in which it exists."""
    found = {h: port.inode(h, path) for h in port.layout.mounts}
    return {h: i for h, i in found.items() if i is not None}


def cgroup_of(port: FilePort, pid: int, hierarchy: str) -> str | None:
    """The path of a process's cgroup in a hierarchy, from /proc/<pid>/cgroup."""
    for line in (port.proc(f"/proc/{pid}/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if (hierarchy == UNIFIED and not controllers) or (controllers and controllers == hierarchy):
            return os.path.normpath(joined(port.layout.namespace, path) if hierarchy == UNIFIED else path)
    return None


class Tree(msgspec.Struct, frozen=True):
    """Where things are on this node."""

    root: str
    kubepods: str | None
    systemd_driver: bool
    tier_path: str

    @property
    def besteffort(self) -> str | None:
        """kubelet's BestEffort group."""
        return self.kubepods and joined(self.kubepods, self._level("besteffort"))

    @property
    def burstable(self) -> str | None:
        """kubelet's Burstable group."""
        return self.kubepods and joined(self.kubepods, self._level("burstable"))

    def _level(self, name: str) -> str:
        if not self.systemd_driver or self.kubepods is None:
            return name
        return f"{self.kubepods.rpartition('/')[2].removesuffix('.slice')}-{name}.slice"


def main_hierarchy(port: FilePort) -> str:
    """The hierarchy that is searched: the CPU controller's, else any."""
    return port.layout.hierarchy("cpu") or next(iter(port.layout.mounts))


def _named_kubepods(port: FilePort, root: str) -> list[str]:
    """Every cgroup near the root that has the name of kubelet's tree, breadth first."""
    hierarchy, level, found = main_hierarchy(port), [root], []
    for _ in range(MAX_SEARCH_DEPTH):
        following = []
        for path in level:
            for child in port.children(hierarchy, path):
                base = child.removesuffix(".slice")
                if base == "kubepods" or base.endswith("-kubepods"):
                    found.append(joined(path, child))
                else:
                    following.append(joined(path, child))
        level = following
    return found


def find_kubepods(port: FilePort, root: str) -> str | None:
    """The path of kubelet's tree below the root; None on a plain host. Raises HostUnfit if two trees have pods.

    A kubelet that went from one cgroup driver to the other leaves its old tree behind until the next boot, empty.
    """
    found = _named_kubepods(port, root)
    if len(found) > 1:
        alive = [path for path in found if processes_below(port, main_hierarchy(port), path)]
        if len(alive) > 1:
            raise HostUnfit(
                f"pods run in two trees: {' and '.join(alive)}",
                "reboot the node, or name one by nodeRoot: a tier can be below BestEffort in one of them only",
            )
        found = alive or found
    return found[0] if found else None


def find_tree(port: FilePort, root: str) -> Tree:
    """Where kubelet's groups and our tier are, or belong."""
    kubepods = find_kubepods(port, root)
    if kubepods is None:
        return Tree(root, None, systemd_driver=False, tier_path=joined(root, PLAIN_TIER))
    systemd = kubepods.endswith(".slice")
    base = kubepods.rpartition("/")[2].removesuffix(".slice")
    tier = joined(kubepods, f"{base}-batch.slice" if systemd else "batch")
    return Tree(root, kubepods, systemd, tier)
