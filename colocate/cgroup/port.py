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

from colocate.cgroup.layout import HOST_CGROUP, STEPPED_ASIDE, Layout, discover_layout

_GONE = (errno.ENOENT, errno.ENODEV, errno.ESTALE)
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_NOT_OFFERED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENXIO)
_KEPT_DIRECTORIES = 4096
_KEPT_FILES = 4096
_LOOKED_AT_TOGETHER = 64
_HOT = frozenset({"cpuacct.usage", "cpu.stat", "memory.usage_in_bytes", "memory.current", "memory.stat"})
_HOT |= {"cpu.pressure", "memory.pressure"}
_HOT |= {"cpu.weight", "cpu.idle", "cpu.max", "memory.high", "memory.max", "cpuset.cpus", "cgroup.freeze"}
_HOT |= {"cpu.shares", "cpu.cfs_quota_us", "cpu.cfs_period_us", "memory.limit_in_bytes", "freezer.state"}
"""Read every tick: their descriptors are kept, which saves two of three system calls."""


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

    def tidy(self) -> None:
        """Let go of a part of what is kept of cgroups that are gone. To be called often: it is short."""


class KernelPort:
    """The real kernel behind the file port."""

    def __init__(self, layout: Layout | None = None) -> None:
        if layout is None:
            with open("/proc/self/mounts") as mounts, open("/proc/self/cgroup") as own:
                path = next((line.strip().split(":", 2)[2] for line in own if line.startswith("0::")), "/")
                below = os.environ.get(HOST_CGROUP, "")
                if os.geteuid() == 0 and not below:
                    path = "/"
                layout = discover_layout(mounts.read(), path.removesuffix(f"/{STEPPED_ASIDE}") or "/", below)
        self.layout = layout
        self._directories: OrderedDict[tuple[str, str], tuple[int, int]] = OrderedDict()
        self._lock = (
            threading.RLock()
        )  # writes that may block run in threads; a descriptor must not be closed under them
        self._files: OrderedDict[tuple[str, str, str], tuple[int, int]] = OrderedDict()
        self._to_look_at: list[tuple[str, str]] = []
        """Of those whose descriptors are kept, who may be gone."""
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
            for file in _HOT:
                if (held := self._files.pop((hierarchy, path, file), None)) is not None:
                    os.close(held[0])

    def tidy(self) -> None:
        """See FilePort. Whoever comes and goes all day must not leave descriptors, which pin what they are of."""
        with self._lock:
            if not self._to_look_at:
                files = {(hierarchy, path) for hierarchy, path, _ in self._files}
                self._to_look_at = sorted(files | self._directories.keys())
            for _ in range(min(_LOOKED_AT_TOGETHER, len(self._to_look_at))):
                self.inode(*self._to_look_at.pop())

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
