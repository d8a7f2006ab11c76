"""The file port: every look at and every touch of the kernel goes through it, so that the kernel model can stand in.

A *hierarchy* is one cgroup mount: on v1 one per controller set, on v2 the single `unified` one; a v1 host may mount
`unified` beside them for PSI, freeze and kill. A directory is known by its inode: the port keeps a descriptor of each
directory it has met, so a reading or a write "for the same name, made anew" fails instead of hitting a stranger.
Sources: Documentation/admin-guide/cgroup-v1/cgroups.rst, cgroup-v2.rst; the held descriptor is oomd's lesson.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
import threading
from collections import OrderedDict
from typing import Protocol

import msgspec

UNIFIED = "unified"
STEPPED_ASIDE = "colocate-self"
"""The leaf of an ordinary user's delegated cgroup into which we step aside; what is delegated is its parent."""
_GONE = (errno.ENOENT, errno.ENODEV, errno.ESTALE)
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_NOT_OFFERED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENXIO)
_KEPT_DIRECTORIES = 4096
_KEPT_FILES = 4096
_HOT = frozenset({"cpuacct.usage", "cpu.stat", "memory.usage_in_bytes", "memory.current", "memory.stat"})
_HOT |= {"cpu.pressure", "memory.pressure"}
"""Read every tick: their descriptors are kept, which saves two of three system calls."""


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


class CgroupGone(OSError):  # noqa: N818 - named like FileNotFoundError's meaning, not its suffix
    """The directory that was meant no longer exists (or its name now belongs to another)."""


class FilePort(Protocol):
    """What the rest of the program may ask of a kernel."""

    layout: Layout

    def inode(self, hierarchy: str, path: str) -> int | None:
        """The inode of a cgroup directory, None if there is none."""

    def read(self, hierarchy: str, path: str, file: str, inode: int | None = None) -> str | None:
        """The content of a control file, None if the directory is gone or the kernel does not offer the file."""

    def write(self, hierarchy: str, path: str, file: str, value: str, inode: int | None = None) -> None:
        """Write a control file. Raises CgroupGone, or OSError with the kernel's errno."""

    def children(self, hierarchy: str, path: str) -> dict[str, int]:
        """Names of the child cgroups, sorted, with their inodes; empty if the directory is gone."""

    def mkdir(self, hierarchy: str, path: str) -> int:
        """Make a cgroup; its inode. Raises FileExistsError and OSError."""

    def rmdir(self, hierarchy: str, path: str, inode: int | None = None) -> bool:
        """Remove an empty cgroup; False if it is occupied. True also if it is gone."""

    def proc(self, path: str) -> str | None:
        """The content of a file below /proc or /sys, None if it is not there."""

    def proc_list(self, path: str) -> list[str]:
        """The names in a directory below /proc or /sys; empty if it is not there."""

    def kill(self, pid: int, signal_number: int) -> bool:
        """Send a signal; False if the process is gone."""


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


class KernelPort:
    """The real kernel behind the file port."""

    def __init__(self, layout: Layout | None = None) -> None:
        if layout is None:
            with open("/proc/self/mounts") as mounts, open("/proc/self/cgroup") as own:
                path = next((line.strip().split(":", 2)[2] for line in own if line.startswith("0::")), "/")
                path = path.removesuffix(f"/{STEPPED_ASIDE}") or "/"
                layout = discover_layout(mounts.read(), "/" if os.geteuid() == 0 else path)
        self.layout = layout
        self._directories: OrderedDict[tuple[str, str], tuple[int, int]] = OrderedDict()
        self._lock = (
            threading.RLock()
        )  # writes that may block run in threads; a descriptor must not be closed under them
        self._files: OrderedDict[tuple[str, str, str], tuple[int, int]] = OrderedDict()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = _KEPT_DIRECTORIES + _KEPT_FILES + 1024
        if soft < wanted:
            soft = min(wanted, hard) if hard != resource.RLIM_INFINITY else wanted
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        self._most_kept = max(min(_KEPT_FILES, (soft - 512) // 2), 16)

    def _real(self, hierarchy: str, path: str) -> str:
        return self.layout.mounts[hierarchy] + ("" if path == "/" else path)

    def _forget(self, hierarchy: str, path: str) -> None:
        with self._lock:
            kept = self._directories.pop((hierarchy, path), None)
            if kept is not None:
                os.close(kept[0])

    def _directory(self, hierarchy: str, path: str, inode: int | None = None) -> int:
        """A descriptor of the directory, whose inode is the wanted one. Raises CgroupGone."""
        key = (hierarchy, path)
        kept = self._directories.get(key)
        if kept is None:
            try:
                fd = os.open(self._real(hierarchy, path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    raise  # tells nothing of the cgroup
                raise CgroupGone(error.errno, f"no cgroup {path} in {hierarchy}") from error
            kept = self._directories[key] = (fd, os.fstat(fd).st_ino)
            if len(self._directories) > self._most_kept:
                _, (old, _) = self._directories.popitem(last=False)
                os.close(old)
        if inode is not None and kept[1] != inode:
            self._forget(hierarchy, path)
            raise CgroupGone(errno.ESTALE, f"{path} in {hierarchy} is not the cgroup it was")
        return kept[0]

    def inode(self, hierarchy: str, path: str) -> int | None:
        """See FilePort."""
        if hierarchy not in self.layout.mounts:
            return None
        try:
            info = os.stat(self._real(hierarchy, path))
            if not stat.S_ISDIR(info.st_mode):
                return None
            found = info.st_ino
        except OSError:
            self._forget(hierarchy, path)
            return None
        kept = self._directories.get((hierarchy, path))
        if kept is not None and kept[1] != found:
            self._forget(hierarchy, path)
        return found

    def read(self, hierarchy: str, path: str, file: str, inode: int | None = None) -> str | None:
        """See FilePort."""
        with self._lock:
            return (
                self._read_kept(hierarchy, path, file, inode)
                if file in _HOT
                else self._read(hierarchy, path, file, inode)
            )

    def _read_kept(self, hierarchy: str, path: str, file: str, inode: int | None) -> str | None:
        kept = self._files.get((hierarchy, path, file))
        if kept is not None and inode in (None, kept[1]):
            try:
                content = os.pread(kept[0], 65536, 0)
                if len(content) < 65536:
                    return content.decode()
            except OSError:
                pass  # the cgroup is gone, or its name belongs to another: the slow way will tell
        if kept is not None:
            os.close(self._files.pop((hierarchy, path, file))[0])
        return self._read(hierarchy, path, file, inode)

    def _keep(self, hierarchy: str, path: str, file: str, fd: int) -> None:
        """Keep the descriptor of a hot file, with the inode of its directory."""
        self._files[hierarchy, path, file] = (fd, self._directories[hierarchy, path][1])
        if len(self._files) > self._most_kept:
            _, (old, _) = self._files.popitem(last=False)
            os.close(old)

    def _read(self, hierarchy: str, path: str, file: str, inode: int | None) -> str | None:
        for attempt in (0, 1):
            try:
                fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._directory(hierarchy, path, inode))
            except CgroupGone:
                return None
            except OSError as error:
                if error.errno in _GONE:
                    # The directory may have been removed and made anew since we opened it: look once more.
                    self._forget(hierarchy, path)
                    if attempt == 0 and inode is None:
                        continue
                    return None
                raise
            keep = False
            try:
                content = os.read(fd, 65536)
                if len(content) == 65536:
                    while more := os.read(fd, 65536):
                        content += more
                keep = file in _HOT
                return content.decode()
            except OSError as error:
                if error.errno in _GONE or error.errno in _NOT_OFFERED:
                    return None
                raise
            finally:
                if keep:
                    self._keep(hierarchy, path, file, fd)
                else:
                    os.close(fd)
        return None

    def write(self, hierarchy: str, path: str, file: str, value: str, inode: int | None = None) -> None:
        """See FilePort."""
        try:
            with self._lock:
                fd = os.open(file, os.O_WRONLY | os.O_CLOEXEC, dir_fd=self._directory(hierarchy, path, inode))
        except OSError as error:
            if error.errno in _GONE and self.inode(hierarchy, path) is None:
                raise CgroupGone(error.errno, f"{path} in {hierarchy} is gone") from error
            self._forget(hierarchy, path)
            raise
        try:
            os.write(fd, value.encode())
        except OSError as error:
            if error.errno == errno.ENODEV:
                raise CgroupGone(error.errno, f"{path} in {hierarchy} is gone") from error
            raise
        finally:
            os.close(fd)

    def children(self, hierarchy: str, path: str) -> dict[str, int]:
        """See FilePort. kernfs lists the same inodes that stat(2) gives, which saves a call a child."""
        try:
            with os.scandir(self._real(hierarchy, path)) as entries:
                return dict(sorted((e.name, e.inode()) for e in entries if e.is_dir(follow_symlinks=False)))
        except OSError:
            return {}

    def mkdir(self, hierarchy: str, path: str) -> int:
        """See FilePort."""
        os.mkdir(self._real(hierarchy, path))
        found = self.inode(hierarchy, path)
        if found is None:
            raise CgroupGone(errno.ENOENT, f"{path} in {hierarchy} vanished while it was made")
        return found

    def rmdir(self, hierarchy: str, path: str, inode: int | None = None) -> bool:
        """See FilePort."""
        if hierarchy not in self.layout.mounts:
            return True
        found = self.inode(hierarchy, path)
        if found is None or (inode is not None and found != inode):
            return True
        self._forget(hierarchy, path)
        try:
            os.rmdir(self._real(hierarchy, path))
        except OSError as error:
            if error.errno in (errno.EBUSY, errno.ENOTEMPTY):
                return False
            if error.errno != errno.ENOENT:
                raise
        return True

    def proc(self, path: str) -> str | None:
        """See FilePort."""
        try:
            with open(path, "rb", buffering=0) as file:
                return file.read().decode(errors="replace")
        except OSError:
            return None

    def proc_list(self, path: str) -> list[str]:
        """See FilePort."""
        try:
            return os.listdir(path)
        except OSError:
            return []

    def kill(self, pid: int, signal_number: int) -> bool:
        """See FilePort."""
        try:
            os.kill(pid, signal.Signals(signal_number))
        except ProcessLookupError:
            return False
        return True

    def close(self) -> None:
        """Close the kept descriptors."""
        while self._files:
            os.close(self._files.popitem()[1][0])
        for hierarchy, path in list(self._directories):
            self._forget(hierarchy, path)


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
    """A process's start in clock ticks since boot (field 22 of /proc/<pid>/stat): with the pid, its identity."""
    stat = port.proc(f"/proc/{pid}/stat")
    return int(stat.rpartition(")")[2].split()[19]) if stat else None
