"""A parent cgroup of our own that stands for a node: for the demo, calibration and tests.

It is named `colocate-<purpose>-<pid>-<start time>-<pid namespace>`, so that the next run can tell whose owner has gone
and sweep it; of an owner in another pid namespace nobody can tell. On v1 it is made at each hierarchy's root; on v2 at
the root, or for an ordinary user inside its delegated cgroup.
"""

from __future__ import annotations

import contextlib
import os
import re
import time

from colocate.actuate.restore import kill_below
from colocate.cgroup.knobfiles import write_knob
from colocate.cgroup.layout import STEPPED_ASIDE, UNIFIED
from colocate.cgroup.port import FilePort
from colocate.cgroup.tree import cgroup_of, inodes_of, joined, processes, processes_anywhere, rmdir_tree, start_time
from colocate.errors import refuse

_NAME = re.compile(r"colocate-(?:demo|plane|calibrate|test|bench)-(\d+)-(\d+)-(\d+)")
_SKIPPED = ("devices", "hugetlb", "net_cls")
DELEGATE = "run as root, or in a delegated scope: systemd-run --user --scope -p Delegate=yes -- colocate demo"
CONTROLLERS = ("cpu", "cpuset", "memory", "io", "pids")


def namespace_of_pids() -> str:
    """The inode of our pid namespace (namespaces(7)): in another one our pids are somebody else's."""
    return os.readlink("/proc/self/ns/pid").strip("pid:[]")


def owned(port: FilePort, purpose: str, pid: int) -> str:
    """The name of a scratch node of a process."""
    return f"colocate-{purpose}-{pid}-{start_time(port, pid)}-{namespace_of_pids()}"


def base_path(port: FilePort) -> str:
    """Where a scratch node may be made: the root for root, else the caller's own (delegated) cgroup on v2."""
    if os.geteuid() == 0 or port.layout.version == 1:
        return "/"
    own = cgroup_of(port, os.getpid(), UNIFIED) or "/"
    return own.rpartition("/")[0] or "/" if own.endswith(f"/{STEPPED_ASIDE}") else own


def step_aside(port: FilePort, path: str) -> str:
    """Move what runs directly in a cgroup into a leaf of it; the leaf's path, empty if nothing was to be moved.

    cgroup v2 allows no processes beside child groups with controllers. Raises PermissionMissing, HostUnfit.
    """
    if not processes(port, UNIFIED, path):
        return ""
    leaf = joined(path, STEPPED_ASIDE)
    _mkdir(port, UNIFIED, leaf)
    for pid in processes(port, UNIFIED, path):
        with contextlib.suppress(OSError):
            port.write(UNIFIED, leaf, "cgroup.procs", str(pid))
    return leaf


def _mkdir(port: FilePort, hierarchy: str, path: str) -> bool:
    """Make a cgroup; False if it is there already. Raises PermissionMissing, HostUnfit."""
    try:
        port.mkdir(hierarchy, path)
    except FileExistsError:
        return False
    except OSError as error:
        refuse(path, error, DELEGATE, DELEGATE)
    return True


def sweep(port: FilePort) -> list[str]:
    """Remove scratch nodes whose owner has gone, with the processes in them; what was removed."""
    swept, ours = set(), namespace_of_pids()
    for hierarchy in port.layout.mounts:
        for base in {"/", base_path(port)}:
            for name in port.children(hierarchy, base):
                match = _NAME.fullmatch(name)
                if match is None or match[3] != ours:
                    continue
                if start_time(port, int(match[1])) != int(match[2]):
                    with contextlib.suppress(OSError):
                        if remove_tree(port, joined(base, name)):
                            swept.add(joined(base, name))
    return sorted(swept)


def remove_tree(port: FilePort, path: str, patience_seconds: float = 5.0) -> bool:
    """Kill what is in the tree and remove it in every hierarchy; False if something would not go."""
    deadline = time.monotonic() + patience_seconds
    while processes_anywhere(port, path):
        kill_below(port, path, inodes_of(port, path))
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)

    while True:
        left = [h for h in port.layout.mounts if not rmdir_tree(port, h, path)]
        if not left:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)  # the kernel lets go of a killed process's cgroup a moment later


class ScratchNode:
    """A parent group with children; use as a context manager."""

    def __init__(self, port: FilePort, purpose: str, memory_bytes: int | None = None) -> None:
        self._port = port
        self.path = joined(base_path(port), owned(port, purpose, os.getpid()))
        self._memory_bytes = memory_bytes
        self._enabled: dict[str, list[str]] = {}
        """Controllers that we enabled in directories that are not ours."""
        self._leaves: list[str] = []
        """Where processes stepped aside to."""

    def __enter__(self) -> ScratchNode:
        """Make the node. Raises PermissionMissing, HostUnfit."""
        try:
            if self._port.layout.version == 2:
                self._enable(self.path.rpartition("/")[0] or "/")
            self.make("/")
            if self._port.layout.version == 2:
                self._enable(self.path)
            if self._memory_bytes is not None:
                write_knob(
                    self._port, self.path, "memory.max", str(self._memory_bytes), inodes_of(self._port, self.path)
                )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Kill what is in it, remove it, and give back the controllers that were enabled for it."""
        port = self._port
        remove_tree(port, self.path)
        for path, controllers in self._enabled.items():
            for controller in controllers:
                with contextlib.suppress(OSError):  # by now somebody else may use it
                    port.write(UNIFIED, path, "cgroup.subtree_control", f"-{controller}")
        for leaf in self._leaves:
            for pid in processes(port, UNIFIED, leaf):
                with contextlib.suppress(OSError):
                    port.write(UNIFIED, leaf.rpartition("/")[0] or "/", "cgroup.procs", str(pid))
            with contextlib.suppress(OSError):
                port.rmdir(UNIFIED, leaf)

    def _enable(self, path: str) -> None:
        port = self._port
        if path != "/" and (leaf := step_aside(port, path)):
            self._leaves.append(leaf)
        offered = (port.read(UNIFIED, path, "cgroup.controllers") or "").split()
        enabled = (port.read(UNIFIED, path, "cgroup.subtree_control") or "").split()
        for controller in CONTROLLERS:
            if controller in offered and controller not in enabled:
                try:
                    port.write(UNIFIED, path, "cgroup.subtree_control", f"+{controller}")
                except OSError as error:
                    refuse(path, error, DELEGATE, DELEGATE)
                if not path.startswith(self.path):
                    self._enabled.setdefault(path, []).append(controller)

    def make(self, child: str) -> str:
        """Make a child group (and on v2 enable controllers for its own children); its full path."""
        port, path = self._port, joined(self.path, child)
        for hierarchy in port.layout.mounts:
            if hierarchy in _SKIPPED or hierarchy.startswith("name="):
                continue
            if not _mkdir(port, hierarchy, path):
                continue
            if port.layout.hierarchy("cpuset") == hierarchy and hierarchy != UNIFIED:
                parent = path.rpartition("/")[0] or "/"
                for file in ("cpuset.mems", "cpuset.cpus"):
                    port.write(hierarchy, path, file, (port.read(hierarchy, parent, file) or "").strip())
        return path

    def make_inner(self, child: str) -> str:
        """Make a child group that will itself have children."""
        path = self.make(child)
        if self._port.layout.version == 2:
            self._enable(path)
        return path

    def enter(self, pid: int, path: str) -> None:
        """Move a process into one of the groups, in every hierarchy."""
        for hierarchy, inode in inodes_of(self._port, path).items():
            self._port.write(hierarchy, path, "cgroup.procs", str(pid), inode)
