"""The model's file port: the tree of cgroups in each hierarchy, its files, and /proc.

`hook` is called before every write with its number, so that a test can end the agent there as SIGKILL would.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from colocate.cgroup.layout import UNIFIED, Layout
from colocate.cgroup.port import CgroupGone
from colocate.kernelmodel.group import PAGE, Group, refuse
from colocate.kernelmodel.machine import Machine, Task

V1_HIERARCHIES = ("cpu", "cpuacct", "cpuset", "memory", "freezer", "blkio", "pids")
KNOWN_CONTROLLERS = ("cpuset", "cpu", "io", "memory", "pids", "rdma", "hugetlb", "misc")
V2_CONTROLLERS = ("cpuset", "cpu", "io", "memory", "pids")
_V2_FILES = {
    "cpu": ("cpu.weight", "cpu.idle", "cpu.max"),
    "cpuset": ("cpuset.cpus", "cpuset.mems", "cpuset.cpus.effective"),
    "memory": ("memory.max", "memory.high", "memory.current", "memory.stat", "memory.reclaim", "memory.events"),
}
_V1_FILES = {
    "cpu": ("cpu.shares", "cpu.idle", "cpu.cfs_quota_us", "cpu.cfs_period_us", "cpu.stat"),
    "cpuacct": ("cpuacct.usage",),
    "cpuset": ("cpuset.cpus", "cpuset.mems", "cpuset.effective_cpus"),
    "memory": (
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "memory.stat",
        "memory.force_empty",
        "memory.failcnt",
    ),
    "freezer": ("freezer.state",),
}
_PRESSURE = ("cpu.pressure", "memory.pressure", "io.pressure")


class Usage:
    """Cumulative figures of a path, over all its tasks, also those that have ended."""

    def __init__(self) -> None:
        self.cpu = self.throttled = self.cpu_pressure = self.memory_pressure = 0.0
        self.limit_hits = 0
        self.budget = 0.0
        self.period_start = 0.0


class ModelFiles:
    """The cgroup trees and files of v1 (and the unified hierarchy beside it) or v2, and /proc."""

    def __init__(self, version: int = 2, cpus: int = 2, memory_bytes: int = 1 << 30, seed: int = 1) -> None:
        names = (UNIFIED,) if version == 2 else (*V1_HIERARCHIES, UNIFIED)
        controllers = dict.fromkeys(V1_HIERARCHIES, UNIFIED) if version == 2 else {h: h for h in V1_HIERARCHIES}
        extra = {"psi": UNIFIED, "freeze": UNIFIED, "kill": UNIFIED}
        self.layout = Layout({h: f"model:{h}" for h in names}, {**controllers, **extra})
        self.machine = Machine(cpus, memory_bytes, seed)
        self.roots = {h: Group(None, i + 1, h == UNIFIED, self.machine.cpus) for i, h in enumerate(names)}
        self._inode = 100
        self._usage: dict[str, Usage] = {}
        self.writes = 0
        self.hook: Callable[[int, str, str, str], None] = lambda _n, _p, _f, _v: None
        self.actors: list[Callable[[float], None]] = []
        self.page_cache_bytes = 0

    def _enforce_memory(self) -> None:
        """What happens when a limit falls below the usage; the machine's part."""

    # -- the tree ----------------------------------------------------------------------------------------------

    def group(self, hierarchy: str, path: str) -> Group | None:
        """The cgroup at a path."""
        found: Group | None = self.roots.get(hierarchy)
        for part in path.strip("/").split("/") if path != "/" else ():
            found = found.children.get(part) if found is not None else None
        return found

    def _need(self, hierarchy: str, path: str, inode: int | None) -> Group:
        found = self.group(hierarchy, path)
        if found is None:
            raise CgroupGone(errno.ENOENT, f"no cgroup {path} in {hierarchy}")
        if inode is not None and found.inode != inode:
            raise CgroupGone(errno.ESTALE, f"{path} in {hierarchy} is not the cgroup it was")
        return found

    def usage(self, path: str) -> Usage:
        """The cumulative figures of a path."""
        return self._usage.setdefault(path, Usage())

    def tasks_in(self, hierarchy: str, path: str, below: bool = False) -> list[Task]:
        """Tasks directly in a cgroup, or also in its descendants."""
        prefix = path.rstrip("/") + "/"
        return [
            t
            for t in self.machine.tasks.values()
            if t.where.get(hierarchy, "/") == path or (below and t.where.get(hierarchy, "/").startswith(prefix))
        ]

    def inode(self, hierarchy: str, path: str) -> int | None:
        """See FilePort."""
        found = self.group(hierarchy, path)
        return None if found is None else found.inode

    def children(self, hierarchy: str, path: str) -> dict[str, int]:
        """See FilePort."""
        found = self.group(hierarchy, path)
        return {name: child.inode for name, child in sorted(found.children.items())} if found is not None else {}

    def mkdir(self, hierarchy: str, path: str) -> int:
        """See FilePort."""
        self._count(path, "mkdir", hierarchy)
        parent_path, _, name = path.rpartition("/")
        parent = self.group(hierarchy, parent_path or "/")
        if parent is None:
            raise FileNotFoundError(errno.ENOENT, path)
        if name in parent.children:
            raise FileExistsError(errno.EEXIST, path)
        self._inode += 1
        parent.children[name] = Group(parent, self._inode, hierarchy == UNIFIED, self.machine.cpus)
        return self._inode

    def rmdir(self, hierarchy: str, path: str, inode: int | None = None) -> bool:
        """See FilePort."""
        found = self.group(hierarchy, path)
        if found is None or found.parent is None or (inode is not None and found.inode != inode):
            return found is None or found.parent is not None
        if found.children or self.tasks_in(hierarchy, path):
            return False
        self._count(path, "rmdir", hierarchy)
        del found.parent.children[path.rpartition("/")[2]]
        return True

    # -- files -------------------------------------------------------------------------------------------------

    def _exists(self, hierarchy: str, group: Group, file: str) -> bool:
        if file == "cgroup.procs":
            return True
        if hierarchy != UNIFIED:
            return file in _V1_FILES.get(hierarchy, ())
        if file in ("cgroup.controllers", "cgroup.subtree_control", "cpu.stat", *_PRESSURE):
            return True
        if file in ("cgroup.freeze", "cgroup.kill"):
            return group.parent is not None
        if self.layout.version == 1:
            return False
        controller = next((c for c, files in _V2_FILES.items() if file in files), None)
        if controller is None:
            return False
        if group.parent is None:
            return file in ("cpuset.cpus.effective", "memory.stat")
        return controller in group.parent.controllers

    def read(self, hierarchy: str, path: str, file: str, inode: int | None = None) -> str | None:
        """See FilePort."""
        try:
            group = self._need(hierarchy, path, inode)
        except CgroupGone:
            return None
        if not self._exists(hierarchy, group, file):
            return None
        if file == "cgroup.procs":
            return "".join(f"{t.pid}\n" for t in self.tasks_in(hierarchy, path))
        if file == "cgroup.controllers":
            if self.layout.version == 1:
                return ""
            offered = (
                V2_CONTROLLERS if group.parent is None else [c for c in V2_CONTROLLERS if c in group.parent.controllers]
            )
            return f"{' '.join(offered)}\n" if offered else ""
        if file == "cgroup.subtree_control":
            return f"{' '.join(c for c in V2_CONTROLLERS if c in group.controllers)}\n" if group.controllers else ""
        counter = self._read_counter(hierarchy, path, file)
        return counter if counter is not None else group.read_setting(file)

    def _read_counter(self, hierarchy: str, path: str, file: str) -> str | None:
        usage = self.usage(path)
        if file == "cpu.stat":
            if hierarchy == UNIFIED:
                return f"usage_usec {int(usage.cpu * 1e6)}\nthrottled_usec {int(usage.throttled * 1e6)}\n"
            return f"nr_periods 0\nnr_throttled 0\nthrottled_time {int(usage.throttled * 1e9)}\n"
        if file == "cpuacct.usage":
            return f"{int(usage.cpu * 1e9)}\n"
        if file in ("memory.current", "memory.usage_in_bytes"):
            return f"{self.memory_usage(hierarchy, path)}\n"
        if file == "memory.events":
            return f"low 0\nhigh {usage.limit_hits}\nmax 0\noom 0\noom_kill 0\n"
        if file == "memory.failcnt":
            return f"{usage.limit_hits}\n"
        if file == "memory.stat":
            key = "inactive_file" if hierarchy == UNIFIED else "total_inactive_file"
            return f"{key} {self.page_cache_bytes if path == '/' else 0}\n"
        if file in _PRESSURE:
            total = {"cpu.pressure": usage.cpu_pressure, "memory.pressure": usage.memory_pressure}.get(file, 0.0)
            line = f"avg10=0.00 avg60=0.00 avg300=0.00 total={int(total * 1e6)}\n"
            return f"some {line}full {line}"
        return None

    def memory_usage(self, hierarchy: str, path: str) -> int:
        """Bytes charged to a cgroup and its descendants."""
        return self.machine.memory_of(self.tasks_in(hierarchy, path, below=True)) // PAGE * PAGE

    def _count(self, path: str, file: str, value: str) -> None:
        self.writes += 1
        self.hook(self.writes, path, file, value)

    def write(self, hierarchy: str, path: str, file: str, value: str, inode: int | None = None) -> None:
        """See FilePort."""
        group = self._need(hierarchy, path, inode)
        if not self._exists(hierarchy, group, file):
            raise FileNotFoundError(errno.ENOENT, f"{path}/{file}")
        self._count(path, file, value)
        if not value:
            return  # a write of no bytes never reaches the file's handler
        if file == "cgroup.procs":
            self._attach(hierarchy, path, group, value)
        elif file == "cgroup.subtree_control":
            self._control(hierarchy, path, group, value)
        elif file == "cgroup.kill":
            for task in self.tasks_in(hierarchy, path, below=True):
                self.machine.kill(task.pid, 9)
        elif file in ("memory.reclaim", "memory.force_empty"):
            self.page_cache_bytes = 0
        elif file in ("cpuset.cpus", "cpuset.mems"):
            occupied = bool(self.tasks_in(hierarchy, path))
            (group.write_cpus if file == "cpuset.cpus" else group.write_mems)(value, occupied)
        elif file in ("memory.max", "memory.limit_in_bytes"):
            group.write_memory_max(value, self.memory_usage(hierarchy, path))
            self._enforce_memory()
        else:
            writers: dict[str, Callable[[str], None]] = {
                "cpu.weight": group.write_weight,
                "cpu.shares": group.write_shares,
                "cpu.idle": group.write_idle,
                "cpu.max": group.write_max,
                "cpu.cfs_quota_us": group.write_quota,
                "cpu.cfs_period_us": group.write_period,
                "memory.high": group.write_memory_high,
                "cgroup.freeze": group.write_freeze,
                "freezer.state": group.write_freezer_state,
            }
            if file not in writers:
                raise refuse(errno.EINVAL, f"{file} is read-only")
            writers[file](value)

    def _attach(self, hierarchy: str, path: str, group: Group, value: str) -> None:
        task = self.machine.tasks.get(int(value) if value.strip().isdigit() else -1)
        if task is None:
            raise ProcessLookupError(errno.ESRCH, value)
        if hierarchy == UNIFIED and group.controllers and group.parent is not None:
            raise refuse(errno.EBUSY, "a cgroup with controllers for its children holds no processes")
        if hierarchy == "cpuset" and not (group.cpus and group.mems):
            raise refuse(errno.ENOSPC, "a cpuset without CPUs or memory nodes")
        task.where[hierarchy] = path

    def _control(self, hierarchy: str, path: str, group: Group, value: str) -> None:
        offered = V2_CONTROLLERS if group.parent is None else group.parent.controllers
        wanted = set(group.controllers)
        for word in value.split():
            if word[0] not in "+-" or word[1:] not in KNOWN_CONTROLLERS:
                raise refuse(errno.EINVAL, f"{word}: no controller")
            if word[0] == "+" and word[1:] not in offered:
                raise refuse(errno.ENOENT, f"{word}: not offered here")
            if word[0] == "-" and any(word[1:] in c.controllers for c in group.children.values()):
                raise refuse(errno.EBUSY, "a child uses it")
            (wanted.add if word[0] == "+" else wanted.discard)(word[1:])
        if wanted and group.parent is not None and self.tasks_in(hierarchy, path):
            raise refuse(errno.EBUSY, "a cgroup with processes gives its children no controllers")
        group.controllers = wanted

    # -- /proc -------------------------------------------------------------------------------------------------

    def proc(self, path: str) -> str | None:
        """See FilePort."""
        machine = self.machine
        parts = path.strip("/").split("/")
        if path == "/proc/stat":
            lines = []
            for cpu in machine.cpus:
                busy, idle = int(machine.busy_seconds[cpu] * 100), int(machine.idle_seconds[cpu] * 100)
                lines.append(f"cpu{cpu} {busy} 0 0 {idle} 0 0 0 0 0 0\n")
            return "cpu 0 0 0 0 0 0 0 0 0 0\n" + "".join(lines) + "intr 0\n"
        if path == "/proc/meminfo":
            free = machine.memory_bytes - machine.memory_of(machine.tasks.values())
            total_kb = machine.memory_bytes // 1024
            return f"MemTotal: {total_kb} kB\nMemAvailable: {max(free, 0) // 1024} kB\nSwapFree: 0 kB\n"
        if path == "/sys/devices/system/cpu/online":
            return f"0-{len(machine.cpus) - 1}\n"
        if len(parts) >= 3 and parts[0] == "proc" and parts[1].isdigit():
            task = machine.tasks.get(int(parts[1]))
            return None if task is None else self._proc_of(task, parts[-1])
        return None

    def _proc_of(self, task: Task, file: str) -> str | None:
        if file == "stat":
            return f"{task.pid} ({task.command}) R {task.ppid} " + "0 " * 17 + f"{task.start_time} 0\n"
        if file == "cgroup":
            return "".join(
                f"0::{task.where.get(h, '/')}\n" if h == UNIFIED else f"1:{h}:{task.where.get(h, '/')}\n"
                for h in self.layout.mounts
            )
        if file == "cmdline":
            return task.command.replace(" ", "\0")
        if file == "status":
            caught = sum(1 << (number - 1) for number in task.handlers)
            return f"Name:\t{task.command}\nPPid:\t{task.ppid}\nUid:\t{task.uid}\nSigCgt:\t{caught:016x}\n"
        if file == "schedstat":
            return f"{int(task.usage_seconds * 1e9)} {int(task.waited_seconds * 1e9)} 1\n"
        return None

    def tidy(self) -> None:
        """See FilePort: nothing is kept."""

    def proc_list(self, path: str) -> list[str]:
        """See FilePort."""
        if path == "/proc":
            return [str(p) for p in self.machine.tasks]
        parts = path.strip("/").split("/")
        return [parts[1]] if len(parts) == 3 and parts[2] == "task" and int(parts[1]) in self.machine.tasks else []

    def kill(self, pid: int, signal_number: int) -> bool:
        """See FilePort; a frozen task gets only SIGKILL, and on v1's own freezer not even that."""
        task = self.machine.tasks.get(pid)
        if task is not None and self.frozen(task) and signal_number != 9:
            return True
        return self.machine.kill(pid, signal_number)

    def frozen(self, task: Task) -> bool:
        """Whether a task is held by either freezer."""
        for hierarchy in ("freezer", UNIFIED):
            group = self.group(hierarchy, task.where.get(hierarchy, "/")) if hierarchy in self.roots else None
            if group is not None and group.frozen_here():
                return True
        return False
