"""Makes the batch tier and the jobs' directories in it, in every hierarchy, at the least weight before anything enters.

A new cgroup has weight 100 (shares 1024), more than BestEffort: so the weight is written at once, and only then is the
directory told to anybody. On v2 every controller is enabled from the node root down; on v1 a cpuset directory must get
its CPUs and memory nodes before it accepts a process. designs/0004-tier.md.
"""

from __future__ import annotations

import contextlib
import errno
import re
from pathlib import Path

import msgspec
import structlog

from colocate.actuate.journal import Entry, Journal
from colocate.actuate.units import tell_systemd
from colocate.cgroup.knobfiles import file_writes, read_knob, write_knob
from colocate.cgroup.layout import UNIFIED
from colocate.cgroup.port import CgroupGone, FilePort
from colocate.cgroup.tree import Tree, cgroup_of, joined, processes_anywhere, rmdir_tree, start_time
from colocate.errors import BadInput, HostUnfit, JournalBroken, refuse

log = structlog.get_logger()
MEND = "run as root, with cgroups mounted for writing, or let root run an agent and join its group"
WANTED_CONTROLLERS = ("cpu", "cpuset", "memory", "io", "pids")
REHOME_ROUNDS = 20
SKIPPED_V1 = ("devices", "hugetlb", "net_cls")
_FILE_FAMILIES = {"cgroup", "cpu", "cpuacct", "cpuset", "memory", "io", "blkio", "pids", "freezer", "hugetlb", "tasks"}
_FILE_FAMILIES |= {"notify_on_release", "release_agent", "rdma", "misc", "devices", "net_cls", "net_prio", "irq"}
_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?")


class Placement(msgspec.Struct, frozen=True):
    """A directory of ours: its path and its inode in each hierarchy."""

    path: str
    inodes: dict[str, int]


def check_job_name(name: str) -> str:
    """The name, if it can be a directory in the tier. Raises BadInput."""
    if not _NAME.fullmatch(name) or "pod" in name or name.split(".")[0] in _FILE_FAMILIES:
        raise BadInput(
            f"--name {name!r}: use at most 63 lower-case letters, digits, '-' and '.', starting and ending with a "
            "letter or digit, without 'pod' (kubelet removes such directories), and not like a control file"
        )
    return name


class TierMaker:
    """Makes and removes directories of ours below the node root."""

    def __init__(self, port: FilePort, journal: Journal, tree: Tree) -> None:
        self._port, self._journal, self.tree = port, journal, tree
        self.holds_pods = False
        """A runtime puts containers below the tier, and makes them directories in every hierarchy: so must the tier be
        there in each, or what the runtime made of it would be nobody's to remove."""
        self.units: Path | None = None
        """Where systemd is told of the tier, if it makes the runtime's cgroups."""

    def hierarchies(self) -> list[str]:
        """Those that a directory is made in: all whose controllers we use or read."""
        return [h for h in self._port.layout.mounts if h not in SKIPPED_V1 and not h.startswith("name=")]

    def ensure_tier(self) -> Placement:
        """The tier, made if it is not there. Raises PermissionMissing, HostUnfit."""
        if "cpu" not in self._port.layout.controllers:
            raise HostUnfit(
                "no CPU controller is offered in any cgroup hierarchy", "mount cgroup v2, or v1's cpu controller"
            )
        if self.units is not None and self.tree.systemd_driver:
            tell_systemd(self.units, self.tree.tier_path.rpartition("/")[2])
        if self._port.layout.version == 2:
            self._enable_controllers(self.tree.tier_path)
        placement = self._ensure(self.tree.tier_path, list(self._port.layout.mounts) if self.holds_pods else None)
        try:
            # An idle group is below every weight, and the kernel refuses it one.
            if read_knob(self._port, placement.path, "cpu.idle", placement.inodes) != "1":
                write_knob(self._port, placement.path, "cpu.weight", "1", placement.inodes)
        except OSError as error:
            refuse(placement.path, error, MEND)
        if self._port.layout.version == 2:
            self._enable_in(placement.path)
        return placement

    def ensure_job(self, name: str) -> Placement:
        """A job's directory in the tier. Raises BadInput if the name is taken by a running job."""
        path = joined(self.tree.tier_path, check_job_name(name))
        self.ensure_tier()
        return self._ensure(path)

    def _ensure(self, path: str, hierarchies: list[str] | None = None) -> Placement:
        inodes: dict[str, int] = {}
        hierarchies = hierarchies or self.hierarchies()
        noted = {(e.hierarchy, e.path, e.inode) for e in self._journal.entries if e.kind == "made"}
        missing = [h for h in hierarchies if self._port.inode(h, path) is None]
        self._note_made(path, dict.fromkeys(missing, 0))
        for hierarchy in hierarchies:
            try:
                inode = self._port.mkdir(hierarchy, path)
            except FileExistsError:
                found = self._port.inode(hierarchy, path)
                if found is None:
                    continue
                inode = found
            except OSError as error:
                if error.errno == errno.ENOENT:
                    continue  # the parent does not exist in this hierarchy
                refuse(f"{hierarchy}:{path}", error, MEND)
            else:
                self._inherit_cpuset(hierarchy, path)
            inodes[hierarchy] = inode
        # One that was there already is adopted, since the name is ours: it will be removed like the others.
        self._note_made(path, {h: i for h, i in inodes.items() if (h, path, i) not in noted})
        return Placement(path, inodes)

    def _note_made(self, path: str, inodes: dict[str, int]) -> None:
        boot = self._journal.boot_id
        entries = [Entry(kind="made", boot_id=boot, hierarchy=h, path=path, inode=i) for h, i in inodes.items()]
        with contextlib.suppress(JournalBroken):  # our own directories may be used without a journal (rule 4)
            if entries:
                self._journal.add(*entries)

    def _inherit_cpuset(self, hierarchy: str, path: str) -> None:
        if hierarchy == UNIFIED or self._port.layout.hierarchy("cpuset") != hierarchy:
            return
        parent = path.rpartition("/")[0] or "/"
        for file in ("cpuset.mems", "cpuset.cpus"):
            value = self._port.read(hierarchy, parent, file)
            if value and value.strip():
                self._port.write(hierarchy, path, file, value.strip())

    def enable_for(self, path: str) -> None:
        """Let a cgroup that is not ours have the controllers that its parents were offered. Raises HostUnfit."""
        if self._port.layout.version == 2:
            self._enable_controllers(path)

    def _enable_controllers(self, path: str) -> None:
        """Enable what is offered from the node root down, journaled: those directories are not ours."""
        root = self.tree.root.rstrip("/")
        parts = [p for p in path.removeprefix(root).split("/") if p][:-1]
        for depth in range(len(parts) + 1):
            self._enable_in(joined(root, *parts[:depth]))

    def _enable_in(self, path: str) -> None:
        port = self._port
        offered = (port.read(UNIFIED, path, "cgroup.controllers") or "").split()
        enabled = port.read(UNIFIED, path, "cgroup.subtree_control")
        if enabled is None:
            return
        missing = [c for c in WANTED_CONTROLLERS if c in offered and c not in enabled.split()]
        inode = port.inode(UNIFIED, path)
        if not missing or inode is None:
            return
        if not self._note_controllers(path, inode, enabled, missing):
            return
        for controller in missing:
            try:
                port.write(UNIFIED, path, "cgroup.subtree_control", f"+{controller}", inode)
            except OSError as error:
                if error.errno == errno.EBUSY:
                    raise HostUnfit(
                        f"{path} has processes of its own, so its children cannot get controllers (no internal "
                        "process constraint of cgroup v2)",
                        "start the agent in a child cgroup, or name another nodeRoot",
                    ) from error
                refuse(f"{path}/cgroup.subtree_control", error, MEND)

    def _note_controllers(self, path: str, inode: int, enabled: str, missing: list[str]) -> bool:
        """Journal the controllers of a directory that is not ours; False if that cannot be done."""
        if any((e.kind, e.hierarchy, e.path) == ("made", UNIFIED, path) for e in self._journal.entries):
            return True
        entry = Entry(
            kind="value",
            boot_id=self._journal.boot_id,
            hierarchy=UNIFIED,
            path=path,
            inode=inode,
            file="cgroup.subtree_control",
            found=enabled,
            wanted=" ".join([*enabled.split(), *missing]),
            reason="EnableControllers",
        )
        try:
            self._journal.add(entry)
        except JournalBroken as error:
            log.error("journal_broken", error=str(error))
            return False
        return True

    def move(self, pid: int, placement: Placement, expected_start: int | None = None) -> None:
        """Move a process into a directory of ours, its former cgroups journaled. Raises CgroupGone if it has ended.

        With `expected_start`, also if the pid belongs to another process by now; one that came in between goes back.
        """
        start = start_time(self._port, pid)
        if start is None or expected_start not in (None, start):
            raise CgroupGone(errno.ESRCH, f"process {pid} has ended")
        boot = self._journal.boot_id
        former = {h: cgroup_of(self._port, pid, h) for h in placement.inodes}
        ours = {(e.hierarchy, e.path) for e in self._journal.entries if e.kind == "made"}
        entries = [
            Entry(kind="moved", boot_id=boot, hierarchy=h, path=path, pid=pid, start_time=start)
            for h, path in former.items()
            if path is not None and (h, path) not in ours
        ]
        with contextlib.suppress(JournalBroken):
            if entries:
                self._journal.add(*entries)
        for hierarchy, inode in placement.inodes.items():
            try:
                self._port.write(hierarchy, placement.path, "cgroup.procs", str(pid), inode)
            except OSError as error:
                if error.errno == errno.ESRCH:
                    raise CgroupGone(errno.ESRCH, f"process {pid} has ended") from error
                raise
        if start_time(self._port, pid) != start:
            for hierarchy, path in former.items():
                if path is not None:
                    with contextlib.suppress(OSError):
                        self._port.write(hierarchy, path, "cgroup.procs", str(pid))
            raise CgroupGone(errno.ESRCH, f"process {pid} has ended")

    def rehome(self, name: str, former: str, memory_bytes: int | None) -> Placement:
        """Move a job from `former`, its directory in a tier of earlier times, into the tier.

        Raises what `ensure_job` raises, and OSError.
        """
        placement = self.ensure_job(name)
        if memory_bytes is not None:
            self.set_job_knob(placement, "memory.max", str(memory_bytes))
        for _ in range(REHOME_ROUNDS):  # what was forked meanwhile is found in the next round
            left = processes_anywhere(self._port, former)
            for pid in left:
                with contextlib.suppress(CgroupGone):
                    self.move(pid, placement)
            if not left:
                break
        return placement

    def set_job_knob(self, placement: Placement, knob: str, value: str) -> None:
        """Write a job's own limit. Raises OSError with the kernel's errno."""
        for write in file_writes(self._port.layout, knob, value, placement.inodes):
            if write.hierarchy in placement.inodes:
                self._port.write(
                    write.hierarchy, placement.path, write.file, write.value, placement.inodes[write.hierarchy]
                )

    def remove_job(self, path: str) -> bool:
        """Remove a job's directory, with what the job made below it, in every hierarchy; False if it is occupied."""
        done = True
        for hierarchy in self._port.layout.mounts:
            done = rmdir_tree(self._port, hierarchy, path) and done
        return done
