"""Where the cgroup hierarchies of a host are mounted, and which controller lives in which.

A *hierarchy* is one cgroup mount: on v1 one per controller set, on v2 the single `unified` one; a v1 host may mount
`unified` beside them for PSI, freeze and kill. Sources: Documentation/admin-guide/cgroup-v1/cgroups.rst, cgroup-v2.rst.
"""

from __future__ import annotations

import os

import msgspec

UNIFIED = "unified"
STEPPED_ASIDE = "colocate-self"
"""The leaf of an ordinary user's delegated cgroup into which we step aside; what is delegated is its parent."""


class Layout(msgspec.Struct, frozen=True):
    """Where the hierarchies are mounted and which controller lives in which."""

    mounts: dict[str, str]
    """hierarchy -> mount point"""
    controllers: dict[str, str]
    """controller -> hierarchy; besides kernel controllers `psi`, `freeze` and `kill`"""

    @property
    def version(self) -> int:
        """2 if the CPU controller is in the unified hierarchy, else 1."""
        return 2 if self.controllers.get("cpu", UNIFIED) == UNIFIED else 1

    def hierarchy(self, controller: str) -> str | None:
        """The hierarchy of a controller, None if the kernel does not offer it."""
        return self.controllers.get(controller)


def parse_mounts(text: str) -> Layout:
    """The layout that a /proc/self/mountinfo or /proc/mounts text describes. The first mount of a hierarchy counts."""
    mounts: dict[str, str] = {}
    controllers: dict[str, str] = {}
    known = {"cpu", "cpuacct", "cpuset", "memory", "freezer", "blkio", "pids", "devices", "hugetlb", "net_cls"}
    for line in text.splitlines():
        fields = line.split()
        if len(fields) < 4 or fields[2] not in ("cgroup", "cgroup2"):
            continue
        where = fields[1].replace("\\040", " ")
        if fields[2] == "cgroup2":
            mounts.setdefault(UNIFIED, where)
            continue
        here = [o for o in fields[3].split(",") if o in known]
        named = [o.removeprefix("name=") for o in fields[3].split(",") if o.startswith("name=")]
        if here or named:
            name = ",".join(here) or f"name={named[0]}"
            if name not in mounts:
                mounts[name] = where
                controllers.update({c: name for c in here if c not in controllers})
    if "freezer" in controllers:
        controllers["freeze"] = controllers["freezer"]
    return Layout(mounts, controllers)


def discover_layout(mounts_text: str, own_path: str = "/") -> Layout:
    """The layout of this host, with what the unified hierarchy offers: its controllers, PSI, freeze and kill.

    `own_path` is the caller's own cgroup there for an ordinary user, who has the controllers delegated to it at most.
    """
    layout = parse_mounts(mounts_text)
    if UNIFIED not in layout.mounts:
        return layout
    root = layout.mounts[UNIFIED]
    controllers = dict(layout.controllers)
    try:
        with open(f"{root}{own_path.rstrip('/')}/cgroup.controllers") as file:
            offered = file.read().split()
    except OSError:
        offered = []
    for controller in offered:
        name = "blkio" if controller == "io" else controller
        controllers.setdefault(name, UNIFIED)
    if os.path.exists("/proc/pressure/cpu"):
        controllers["psi"] = UNIFIED
    controllers["freeze"] = UNIFIED  # v1's freezer holds back SIGKILL; cgroup.freeze does not
    release = tuple(int(p) for p in os.uname().release.split("-")[0].split(".")[:2])
    if release >= (5, 14):
        controllers["kill"] = UNIFIED
    if controllers.get("cpu") == UNIFIED:
        controllers.setdefault("cpuacct", UNIFIED)
    return Layout(layout.mounts, controllers)
