"""Who is who: which cgroups are services, which is BestEffort, which are batch, and where the tier belongs.

On a Kubernetes node the tree is found wherever it is nested (kind puts it below `kubelet.slice`); Guaranteed and
Burstable pods are services, the BestEffort group is one workload, and the tier is BestEffort's sibling. On a plain
host the policy's selectors say it. Sources: kubelet pkg/kubelet/cm (names and levels), ../designs/0004-tier.md.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import os
import os.path
from collections.abc import Mapping, Set
from typing import Any, NamedTuple, Protocol

import msgspec

from colocate.cgroup.port import FilePort
from colocate.cgroup.tree import Tree, cgroup_of, joined, main_hierarchy, processes_below
from colocate.observe.pods import Pod
from colocate.policy.schema import CLUSTER_NAMESPACES, BatchPolicy, PolicySpec, Selector, ServicePolicy
from colocate.snapshot import Objective

SEARCH_AGAIN_SECONDS = 5.0
UNIT_SUFFIXES = (".service", ".scope", ".slice", ".socket", ".mount", ".swap")
ONLOOKERS = frozenset(
    {"vi", "vim", "nvim", "nano", "emacs", "less", "more", "tail", "head", "cat", "grep", "awk", "sed", "man", "watch"}
    | {"journalctl", "ps", "pgrep", "pkill", "top", "htop", "strace", "gdb", "perf", "ssh", "sudo", "su", "git"}
)
"""Programs that only look at what their arguments name."""
WRAPPERS = frozenset({"sh", "bash", "dash", "busybox", "tini", "dumb-init", "docker-init", "catatonit", "s6-svscan"})
"""What stands above a command in a service or container of its own."""


class Target(msgspec.Struct, frozen=True):
    """A workload that was found, before its figures are read."""

    id: str
    name: str
    tier: str
    path: str
    inodes: dict[str, int]
    known: dict[str, Any] = {}
    entry: str = ""
    """The policy entry that chose it: its latency and objective are those of all that the entry chose."""
    pids: tuple[int, ...] | None = None
    """Processes whose run delay is read; None: those of the cgroup."""

    @property
    def in_place(self) -> bool:
        """Whether it is batch that is governed where it is."""
        return bool(self.known.get("in_place"))


class Inodes(Protocol):
    """Looks the inodes of a cgroup up; the main hierarchy's may be known from a listing."""

    def __call__(self, path: str, main_inode: int | None = None) -> dict[str, int]:
        """hierarchy -> inode."""


@functools.lru_cache(maxsize=4096)
def pod_uid(name: str) -> str | None:
    """The pod uid in a cgroup directory's name, as kubelet reads it: exactly two parts around `pod`.

    `podABC` and `kubepods-burstable-podABC.slice` are pods; `batch` and `xpodypod` are not; `batchpods` would be one
    with the uid `s`, and kubelet would kill it, which is why our tier's name must not contain `pod`.
    """
    if name.endswith(".slice"):
        name = name.removesuffix(".slice").rpartition("-")[2]  # the last part of a slice's name is its own
    parts = name.split("pod")
    return parts[1].replace("_", "-") if len(parts) == 2 and parts[1] else None


def _glob(port: FilePort, hierarchy: str, root: str, pattern: str) -> list[str]:
    found = [root]
    for part in pattern.strip("/").split("/"):
        if any(c in part for c in "*?["):
            found = [joined(p, c) for p in found for c in port.children(hierarchy, p) if fnmatch.fnmatch(c, part)]
        else:
            found = [joined(p, part) for p in found]
    return [p for p in found if port.inode(hierarchy, p) is not None]


def _by_command(port: FilePort, hierarchy: str, tree: Tree, text: str) -> tuple[list[str], list[int], str]:
    """Cgroups and pids of processes whose command line contains the text, and what else contains it, in words.

    Never what runs in the tier, nor who only looks at a file or another process of that name.
    """
    paths: dict[str, None] = {}
    pids: list[int] = []
    also = ""
    for entry in port.proc_list("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        words = (port.proc(f"/proc/{entry}/cmdline") or "").rstrip("\0").split("\0")
        if text not in " ".join(words):
            continue
        path = cgroup_of(port, int(entry), hierarchy)
        if path is None or path == tree.tier_path or path.startswith(f"{tree.tier_path}/"):
            continue
        program = words[0].rpartition("/")[2]
        if program in ONLOOKERS and text not in program:
            also = f"process {entry} ({' '.join(words)[:60]}) only names it: it is left out"
            continue
        paths[path] = None
        pids.append(int(entry))
    return list(paths), pids, also


class Units:
    """Where the units of systemd are, at any depth: looked for anew at most every few seconds."""

    def __init__(self) -> None:
        self._paths: dict[str, list[str]] = {}
        self._at = float("-inf")

    def _walk(self, port: FilePort, hierarchy: str, root: str) -> None:
        self._paths = {}
        waiting = [root]
        while waiting:
            path = waiting.pop()
            for child in port.children(hierarchy, path):
                where = joined(path, child)
                if child.endswith(UNIT_SUFFIXES):
                    self._paths.setdefault(child, []).append(where)
                waiting.append(where)

    def find(self, port: FilePort, root: str, unit: str, now: float) -> list[str]:
        """The cgroups of a unit, or of all that a pattern means."""
        hierarchy = main_hierarchy(port)
        found = self._known(port, hierarchy, unit)
        if not found and now - self._at >= SEARCH_AGAIN_SECONDS:
            self._at = now
            self._walk(port, hierarchy, root)
            found = self._known(port, hierarchy, unit)
        return found

    def _known(self, port: FilePort, hierarchy: str, unit: str) -> list[str]:
        names = [unit] if unit in self._paths else fnmatch.filter(sorted(self._paths), unit)
        return [p for n in names for p in self._paths[n] if port.inode(hierarchy, p) is not None]

    def near(self, unit: str) -> str:
        """What may be meant by a unit that is not there, in words."""
        stem = unit.partition(".")[0].rstrip("@*")
        begin = [n for n in sorted(self._paths) if n.startswith(stem) and n != unit][:3]
        if begin:
            return f"; units that begin so: {', '.join(begin)}"
        close = difflib.get_close_matches(unit, self._paths, n=1, cutoff=0.6)
        return f"; did you mean {close[0]}?" if close else ""


def _by_labels(port: FilePort, hierarchy: str, tree: Tree, selector: Selector, pods: Mapping[str, Pod]) -> list[str]:
    labels = selector.pod_selector or {}
    wanted = {uid for uid, pod in pods.items() if pod.matches(labels, selector.namespace)}
    levels = filter(None, (tree.kubepods, tree.burstable, tree.besteffort))
    return [f"{level}/{c}" for level in levels for c in port.children(hierarchy, level) if pod_uid(c) in wanted]


class Selected(NamedTuple):
    """What a selector means here."""

    paths: list[str]
    pids: list[int] | None = None
    """Processes, if it chose those."""
    hint: str = ""
    """What to look at if that is not what was meant."""


def select(
    port: FilePort, tree: Tree, selector: Selector, pods: Mapping[str, Pod], units: Units, now: float = 0.0
) -> Selected:
    """The cgroups that a selector means. `pods` are those of this node by uid."""
    root = tree.root
    hierarchy = main_hierarchy(port)
    if selector.cgroup is not None:
        mount = port.layout.mounts.get(hierarchy, "")
        path = selector.cgroup.removeprefix(mount) if mount.startswith("/") else selector.cgroup
        near = "" if not path.startswith("/sys/fs/cgroup") else "; write the path below the mount of the hierarchy"
        return Selected(_glob(port, hierarchy, root, path), hint=near)
    if selector.systemd_unit is not None:
        found = units.find(port, root, selector.systemd_unit, now)
        return Selected(found, hint="" if found else units.near(selector.systemd_unit))
    if selector.command is not None:
        paths, pids, also = _by_command(port, hierarchy, tree, selector.command)
        return Selected(paths, pids, f"; {also}" if also else "")
    return Selected(_by_labels(port, hierarchy, tree, selector, pods))


def _line_of(port: FilePort, pid: int) -> list[int]:
    """A process and its ancestors; empty if it has ended."""
    found: list[int] = []
    while pid > 1 and (stat := port.proc(f"/proc/{pid}/stat")):
        found.append(pid)
        pid = int(stat.rpartition(")")[2].split()[1])
    return found


def _is_wrapper(port: FilePort, pid: int) -> bool:
    """Whether a process only stands above a command: a script or an init, without a terminal (tty_nr, proc(5))."""
    before, _, after = (port.proc(f"/proc/{pid}/stat") or "").rpartition(")")
    return bool(after) and before.partition("(")[2] in WRAPPERS and after.split()[4] == "0"


def _stranger(port: FilePort, path: str, chosen: set[int]) -> int | None:
    """A process of a cgroup that is neither chosen, nor a child of one that is, nor the script that started it.

    In a login session, or on a terminal, the shell is a stranger: its user works there.
    """
    above = {a for pid in chosen for a in _line_of(port, pid)}
    session = path.rpartition("/")[2].startswith("session-")
    for pid in processes_below(port, main_hierarchy(port), path):
        line = _line_of(port, pid)
        started_it = pid in above and not session and _is_wrapper(port, pid)
        if line and not chosen.intersection(line) and not started_it:
            return pid
    return None


def _not_ours_to_govern(path: str, claimed: Mapping[str, str], own: set[str]) -> str:
    """Why a cgroup may not be governed in place; empty if it may. Freezing it would freeze us or a service as well."""
    if path == "/":
        return "runs in the root cgroup, which has no knobs: start it in its own"
    inside = f"{path.rstrip('/')}/"
    if any(where == path or where.startswith(inside) for where in own):
        return f"{path} also holds this agent: start it in a cgroup of its own (colocate run, systemd-run)"
    services = [name for where, name in claimed.items() if where.startswith(inside)]
    return f"{path} also holds {services[0]}: choose a cgroup of its own" if services else ""


def _configured(
    port: FilePort,
    entry: ServicePolicy | BatchPolicy,
    claimed: dict[str, str],
    problems: dict[str, str],
    inodes: Inodes,
    own: set[str],
    on_node: Mapping[str, str],
    governed: Set[str],
    selected: Selected,
    kubernetes: bool,
) -> list[Target]:
    paths, pids, hint = selected
    if not paths:
        where = "on this node" if kubernetes or entry.selector.pod_selector is None else ": there is no kubepods tree"
        problems[entry.name] = f"{entry.name}: its selector matches nothing {where}{hint}"
    elif hint:
        problems[f"{entry.name} (command)"] = f"{entry.name}: {hint.removeprefix('; ')}"
    targets = []
    service = isinstance(entry, ServicePolicy)
    for i, path in enumerate(paths):
        if path in claimed:
            problems[entry.name] = f"{entry.name}: {path} is already claimed by {claimed[path]}; the first one counts"
            continue
        claimed[path] = entry.name
        name = entry.name if len(paths) == 1 else f"{entry.name}-{i}"
        known: dict[str, Any] = {}
        if service and path == "/":
            problems[entry.name] = (
                f"{entry.name}: runs in the root cgroup: the whole machine would be this service; start it in a cgroup "
                "of its own (a systemd unit with CPUAccounting=yes, systemd-run)"
            )
            continue
        if isinstance(entry, ServicePolicy):
            known = {"lends_gpu": True} if entry.lends_gpu else {}
            if entry.slo is not None:
                known["objective"] = Objective(entry.slo.p99, entry.slo.minimum_samples, entry.slo.window)
        elif why := _not_ours_to_govern(path, {**on_node, **claimed}, own):
            problems[entry.name] = f"{entry.name}: {why}"
            continue
        elif pids and path not in governed and (stranger := _stranger(port, path, set(pids))) is not None:
            command = " ".join((port.proc(f"/proc/{stranger}/cmdline") or "?").replace("\0", " ").split())[:60]
            problems[entry.name] = (
                f"{entry.name}: {path} also holds process {stranger} ({command}): start the batch work in a cgroup of "
                "its own (colocate run, systemd-run)"
            )
            continue
        else:
            known = {
                "priority": entry.priority,
                "gang": f"policy/{entry.gang}" if entry.gang else "",
                "checkpoint_signal": entry.checkpoint_signal or "",
                "in_place": True,
            }
        kind = "service" if service else "batch"
        of_processes = tuple(pids) if pids else None
        targets.append(Target(f"{kind}:{name}", name, kind, path, inodes(path), known, entry.name, of_processes))
    return targets


def _pods(port: FilePort, tree: Tree, pods: Mapping[str, Pod], inodes: Inodes) -> list[Target]:
    """The Guaranteed and Burstable pods."""
    hierarchy = main_hierarchy(port)
    targets = []
    others = {tree.tier_path, tree.besteffort, tree.burstable}
    for level in filter(None, (tree.kubepods, tree.burstable)):
        for child, inode in port.children(hierarchy, level).items():
            path = f"{level}/{child}"
            uid = None if path in others else pod_uid(child)
            if uid is not None:
                pod = pods.get(uid)
                name = f"{pod.namespace}/{pod.name}" if pod is not None else f"pod-{uid[:13]}"
                asks = pod.asks if pod is not None else {}
                targets.append(Target(f"pod:{uid}", name, "service", path, inodes(path, inode), asks))
    return targets


def _with_requests(target: Target, pods: Mapping[str, Pod]) -> Target:
    """A service of the policy that is a whole pod, with what that asks for."""
    pod = pods.get(pod_uid(target.path.rpartition("/")[2]) or "") if target.tier == "service" else None
    return target if pod is None else msgspec.structs.replace(target, known={**pod.asks, **target.known})


def _is_or_serves_in(target: Target, pod: str) -> bool:
    return target.path == pod or (target.tier == "service" and target.path.startswith(f"{pod}/"))


def _besteffort(port: FilePort, tree: Tree, claimed: dict[str, str], inodes: Inodes) -> list[Target]:
    hierarchy, targets = main_hierarchy(port), []
    if tree.besteffort and tree.besteffort not in claimed and port.inode(hierarchy, tree.besteffort) is not None:
        path = tree.besteffort
        targets.append(Target("besteffort", "besteffort", "besteffort", path, inodes(path)))
    return targets


def _in_tier(
    port: FilePort,
    tree: Tree,
    jobs: dict[str, dict[str, Any]],
    pods: Mapping[str, Pod],
    inodes: Inodes,
    evictable: bool,
) -> list[Target]:
    """Jobs, and pods whose containers are below them: what a law writes it writes into the pod's own directory."""
    targets = []
    for child, inode in port.children(main_hierarchy(port), tree.tier_path).items():
        path, uid = joined(tree.tier_path, child), pod_uid(child)
        id_, name, known = f"job:{child}", child, jobs.get(child, {})
        if uid is not None:
            pod = pods.get(uid)
            id_, name = f"pod:{uid}", f"{pod.namespace}/{pod.name}" if pod is not None else f"pod-{uid[:13]}"
            known = {"pod": f"?/{uid}"} if evictable else {}
            known = dict(pod.as_batch) if pod is not None else known
        targets.append(Target(id_, name, "batch", path, inodes(path, inode), known))
    return targets


def discover(
    port: FilePort,
    tree: Tree,
    spec: PolicySpec,
    jobs: dict[str, dict[str, Any]],
    inodes: Inodes,
    pods: Mapping[str, Pod],
    governed: Set[str] = frozenset(),
    units: Units | None = None,
    now: float = 0.0,
    *,
    evictable: bool = False,
) -> tuple[list[Target], dict[str, str]]:
    """All workloads of the node, and the problems met, by the name of the policy entry.

    `jobs` has what is known of a job by the name of its directory in the tier, `pods` of a pod by its uid. Batch in the
    cgroups that are `governed` already stays so though a stranger looks in (`docker exec`). Pods are `evictable` by the
    API server where one is to tell of them.
    """
    units = units if units is not None else Units()
    problems: dict[str, str] = {}
    claimed: dict[str, str] = {}
    targets: list[Target] = []
    own = {p for h in port.layout.mounts if (p := cgroup_of(port, os.getpid(), h))} - {"/"} if spec.batch else set()
    entries: list[ServicePolicy | BatchPolicy] = [*spec.services, *spec.batch]
    chooseable = {uid: pod for uid, pod in pods.items() if pod.namespace not in CLUSTER_NAMESPACES}
    found = _pods(port, tree, pods, inodes) if tree.kubepods is not None else []
    on_node = {pod.path: f"the pod {pod.name}" for pod in found}
    for entry in entries:
        among = chooseable if isinstance(entry, BatchPolicy) else pods
        chosen_by = select(port, tree, entry.selector, among, units, now)
        targets.extend(
            _configured(port, entry, claimed, problems, inodes, own, on_node, governed, chosen_by, bool(tree.kubepods))
        )
    targets = [_with_requests(t, pods) for t in targets]
    if tree.kubepods is not None:
        # A pod that is in the policy, or whose service is, counts by that: never twice.
        chosen = [t for t in targets if t.tier == "service" or t.in_place]
        targets.extend(p for p in found if not any(_is_or_serves_in(t, p.path) for t in chosen))
        targets.extend(_besteffort(port, tree, claimed, inodes))
    targets.extend(_in_tier(port, tree, jobs, pods, inodes, evictable))
    return targets, problems
