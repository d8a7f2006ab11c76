"""What was there before us, on disk before we change it: identity, file, value found, value wanted, reason, boot id.

The file is preallocated, so that a full disk cannot stop an entry, and every entry is synced before the write that it
covers. A line is `crc32 json`; the first line that fails its checksum ends the journal, so a torn one is harmless. Each
cgroup belongs to one boot: entries of another boot are dropped.
"""

from __future__ import annotations

import contextlib
import os
import threading
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import msgspec

from colocate.errors import JournalBroken, StateTooNew
from colocate.knob import same

JOURNAL_VERSION = 3
PREALLOCATED_BYTES = 1 << 20
NAME = "journal"
COMPACT_FROM_ENTRIES = 1000
KEPT_OF_A_FILE = 4


SINCE = {"process": 2, "setting": 2, "cap": 3}
"""The first version that knows a kind; the others were always there."""
DRIVER_KINDS = frozenset(SINCE)

Key = tuple[str, str, int, str]
"""A file of one cgroup: hierarchy, path, inode, file name."""


class Entry(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One fact to undo.

    `value`: a file of a directory that is not ours; `made`: a directory of ours (inode 0: about to be made);
    `moved`: a process; `process`: one that a GPU driver holds; `setting`: of a card (`file` names it) for a cgroup;
    `cap`: the power limit of a device (`file`), kept for as long as a cgroup is occupied.
    """

    kind: Literal["value", "made", "moved", "process", "setting", "cap"]
    boot_id: str
    hierarchy: str
    path: str
    inode: int = 0
    file: str = ""
    found: str = ""
    wanted: str = ""
    reason: str = ""
    pid: int = 0
    start_time: int = 0
    library: str = ""
    """Of a GPU driver, where it is not found by itself."""
    version: int = 0
    """Of the format, in the file: the first that knows its kind; 0 here, for a default would not be written."""

    @property
    def key(self) -> Key:
        """Which file it is about."""
        return self.hierarchy, self.path, self.inode, self.file


def boot_id() -> str:
    """This boot's id, from /proc/sys/kernel/random/boot_id."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _line(entry: Entry) -> bytes:
    since = SINCE.get(entry.kind, 1)  # what was always there an older program undoes too
    body = msgspec.json.encode(msgspec.structs.replace(entry, version=entry.version or since))
    return b"%08x %s\n" % (zlib.crc32(body), body)


def read_entries(path: Path) -> tuple[list[Entry], int]:
    """The intact entries of a journal file and the offset after the last one. Raises StateTooNew."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    entries, offset = [], 0
    while (end := content.find(b"\n", offset)) >= 0:
        checksum, _, body = content[offset:end].partition(b" ")
        try:
            if int(checksum, 16) != zlib.crc32(body):
                break
            entry = msgspec.json.decode(body, type=Entry)
        except (ValueError, msgspec.MsgspecError):
            break
        if entry.version > JOURNAL_VERSION:
            raise StateTooNew(f"{path} was written by a newer colocate (journal version {entry.version})")
        entries.append(msgspec.structs.replace(entry, version=0))
        offset = end + 1
    return entries, offset


def newest_found(entries: Iterable[Entry]) -> tuple[dict[Key, Entry], dict[Key, dict[str, None]]]:
    """Per file the entry with the value to put back, and all values that we wrote, in their order.

    What is found between two of our writings and is none of ours, somebody else wrote: theirs is the newest.
    """
    found: dict[Key, Entry] = {}
    ours: dict[Key, dict[str, None]] = {}
    for entry in entries:
        key = entry.key
        wanted = ours.setdefault(key, {})
        known = entry.found.strip() in wanted or any(same(entry.file, w, entry.found) for w in reversed(wanted))
        if key not in found or not known:
            found[key] = entry
        wanted[entry.wanted] = None
    return found, ours


def compacted(entries: list[Entry]) -> list[Entry]:
    """The same undo in fewer entries: per file what we wrote last, each with the value to put back."""
    found, _ = newest_found(e for e in entries if e.kind == "value")
    last: dict[Key, list[Entry]] = {}
    for entry in entries:
        if entry.kind == "value":
            last.setdefault(entry.key, []).append(entry)
    replace = msgspec.structs.replace
    values = [replace(e, found=found[key].found) for key, recent in last.items() for e in recent[-KEPT_OF_A_FILE:]]
    return [e for e in entries if e.kind != "value"] + values


class Journal:
    """The journal of one state directory."""

    def __init__(self, directory: Path, boot: str) -> None:
        self.path = directory / NAME
        self.boot_id = boot
        self.broken = ""
        entries, self._offset = read_entries(self.path)
        self.entries = [e for e in entries if e.boot_id == boot]
        self._compacted = 0
        """How many entries the last compaction left."""
        self._fd = -1
        self._lock = threading.RLock()  # workers of several targets add entries

    def _open(self) -> None:
        """Rewrite the file with the entries that still count, preallocated, and put it in place atomically."""
        fresh = self.path.with_suffix(".new")
        fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            body = b"".join(_line(e) for e in self.entries)
            os.posix_fallocate(fd, 0, max(PREALLOCATED_BYTES, 2 * len(body)))
            os.pwrite(fd, body, 0)
            os.fsync(fd)
            os.replace(fresh, self.path)
            directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError:
            os.close(fd)
            raise
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._offset = fd, len(body)

    def add(self, *entries: Entry) -> None:
        """Append entries and sync them once. Raises JournalBroken; then the change must not be made."""
        with self._lock:
            self._add(entries)

    def _add(self, entries: tuple[Entry, ...]) -> None:
        line = b"".join(_line(entry) for entry in entries)
        try:
            if self._fd < 0 or self._offset + len(line) > os.fstat(self._fd).st_size:
                self._open()
            os.pwrite(self._fd, line, self._offset)
            os.fdatasync(self._fd)
        except OSError as error:
            self.broken = f"{self.path}: {error.strerror}"
            raise JournalBroken(f"the journal {self.path} cannot be written: {error.strerror}") from error
        self.broken = ""
        self._offset += len(line)
        self.entries.extend(entries)
        if len(self.entries) > max(COMPACT_FROM_ENTRIES, 2 * self._compacted):
            with contextlib.suppress(JournalBroken):  # the entries are safe all the same, only not fewer
                self.replace(compacted(self.entries))
            self._compacted = len(self.entries)

    def keep(self, kept: Callable[[Entry], bool], *more: Entry) -> None:
        """Only the entries of which that is true now, and these; what others add stays. Raises JournalBroken."""
        with self._lock:
            self._replace([*filter(kept, self.entries), *more])

    def replace(self, entries: Iterable[Entry]) -> None:
        """Only these entries, where nobody else adds any."""
        with self._lock:
            self._replace(list(entries))

    def _replace(self, entries: list[Entry]) -> None:
        self.entries = entries
        try:
            self._open()
        except OSError as error:
            self.broken = f"{self.path}: {error.strerror}"
            raise JournalBroken(f"the journal {self.path} cannot be written: {error.strerror}") from error

    def astray(self) -> bool:
        """Whether the file that is written is not the one at its path: somebody emptied or moved the directory."""
        if self._fd < 0:
            return False
        try:
            return os.fstat(self._fd).st_ino != os.stat(self.path).st_ino
        except OSError:
            return True

    def rewrite(self) -> None:
        """Write all entries anew to its path. Raises JournalBroken."""
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
        self.replace(self.entries)

    def close(self) -> None:
        """Close the file; an empty journal is removed."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if not self.entries:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)
