"""Where the cgroup hierarchies of a host are mounted, and which controller lives in which.

A *hierarchy* is one cgroup mount: on v1 one per controller set, on v2 the single `unified` one; a v1 host may mount
`unified` beside them for PSI, freeze and kill. Sources: Documentation/admin-guide/cgroup-v1/cgroups.rst, cgroup-v2.rst.
"""

from __future__ import annotations

import os

import msgspec

from colocate.errors import BadInput

UNIFIED = "unified"
HOST_CGROUP = "COLOCATE_HOST_CGROUP"
"""In a container: the directory at which the host's /sys/fs/cgroup is mounted."""
STEPPED_ASIDE = "colocate-self"
"""The leaf of an ordinary user's delegated cgroup into which we step aside; what is delegated is its parent."""


class Layout(msgspec.Struct, frozen=True):
    """Where the hierarchies are mounted and which controller lives in which."""

    mounts: dict[str, str]
    """hierarchy -> mount point"""
    controllers: dict[str, str]
    """controller -> hierarchy; besides kernel controllers `psi`, `freeze` and `kill`"""
    namespace: str = "/"
    """Which cgroup of the unified hierarchy is `/` in our /proc/<pid>/cgroup (cgroup_namespaces(7))."""

    @property
    def version(self) -> int:
        """2 if the CPU controller is in the unified hierarchy, else 1."""
        return 2 if self.controllers.get("cpu", UNIFIED) == UNIFIED else 1

    def hierarchy(self, controller: str) -> str | None:
        """The hierarchy of a controller, None if the kernel does not offer it."""
        return self.controllers.get(controller)


def parse_mounts(text: str, below: str = "") -> Layout:
    """The layout that a /proc/mounts text describes: of each hierarchy the first mount, at or `below` a directory."""
    mounts: dict[str, str] = {}
    controllers: dict[str, str] = {}
    known = {"cpu", "cpuacct", "cpuset", "memory", "freezer", "blkio", "pids", "devices", "hugetlb", "net_cls"}
    for line in text.splitlines():
        fields = line.split()
        if len(fields) < 4 or fields[2] not in ("cgroup", "cgroup2"):
            continue
        where = fields[1].replace("\\040", " ")
        if below and not f"{where}/".startswith(f"{below.rstrip('/')}/"):
            continue  # a container's own view of its own cgroups comes first
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


def discover_layout(mounts_text: str, own_path: str = "/", below: str = "") -> Layout:
    """The layout of this host, with what the unified hierarchy offers: its controllers, PSI, freeze and kill.

    `own_path` is the caller's own cgroup there for an ordinary user, who has the controllers delegated to it at most;
    `below` is where the host's hierarchies are mounted in a container. Raises BadInput if none is.
    """
    layout = parse_mounts(mounts_text, below)
    if below and not layout.mounts:
        raise BadInput(f"{HOST_CGROUP}={below}: no cgroup hierarchy is mounted there: mount the host's /sys/fs/cgroup")
    if UNIFIED not in layout.mounts:
        if below:
            namespace_root(next(iter(layout.mounts.values())), "/")  # whether we see ourselves there
        return layout
    root = layout.mounts[UNIFIED]
    controllers = dict(layout.controllers)
    try:
        with open(f"{root}{'' if below else own_path.rstrip('/')}/cgroup.controllers") as file:
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
    namespace = namespace_root(root, own_path) if below else "/"
    return Layout(layout.mounts, controllers, namespace)


def namespace_root(root: str, own_path: str) -> str:
    """Where in the tree mounted at `root` our cgroup namespace begins, whose `own_path` is our cgroup in its words.

    The kernel tells nobody inside; but where our process is listed there we are. Raises BadInput if it is nowhere.
    """
    wanted = str(os.getpid())
    for folder, _, files in os.walk(root):
        if "cgroup.procs" not in files:
            continue
        try:
            with open(f"{folder}/cgroup.procs") as file:
                listed = file.read().split()
        except OSError:  # a threaded one has no processes to tell
            continue
        if wanted in listed:
            return folder.removeprefix(root).removesuffix(own_path.rstrip("/")) or "/"
    raise BadInput(f"process {wanted} is in no cgroup below {root}: the pod needs hostPID: true")
