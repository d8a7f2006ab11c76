"""The state directory: one owner at a time, versioned files written whole or not at all.

Root uses /var/lib/colocate and /run/colocate, an ordinary user the XDG directories. The lock is a flock, so it goes
with its owner; the file names the owner for the message that a second agent prints.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from pathlib import Path
from typing import Any

import msgspec

from colocate.errors import AlreadyRunning, BadInput, StateTooNew

STATE_VERSION = 1
MODEL_FILE, HANDOVER_FILE = "model.json", "handover.json"
POWER_FILE, SHARE_FILE, CLASSES_FILE = "power.json", "power-share.json", "power-classes.json"
GUARDIAN_PATIENCE_SECONDS = 6.0


def default_state_dir() -> Path:
    """COLOCATE_STATE_DIR, else /var/lib/colocate for root, else $XDG_STATE_HOME/colocate."""
    if given := os.environ.get("COLOCATE_STATE_DIR"):
        return Path(given)
    if os.geteuid() == 0:
        return Path("/var/lib/colocate")
    return Path(os.environ.get("XDG_STATE_HOME", Path.home() / ".local/state")) / "colocate"


def runtime_dir() -> Path:
    """Where the lock and the socket are: COLOCATE_RUNTIME_DIR, else /run/colocate or $XDG_RUNTIME_DIR/colocate.

    Raises BadInput if the last resort, a directory in /tmp, is another user's.
    """
    if given := os.environ.get("COLOCATE_RUNTIME_DIR"):
        return Path(given)
    if os.geteuid() == 0:
        return Path("/run/colocate")
    if given := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(given) / "colocate"
    shared = Path(f"/tmp/colocate-{os.geteuid()}")
    if os.path.lexists(shared) and (shared.lstat().st_uid != os.geteuid() or shared.is_symlink()):
        raise BadInput(f"{shared} belongs to somebody else: set XDG_RUNTIME_DIR or COLOCATE_RUNTIME_DIR")
    return shared / "colocate"


class StateDirectory:
    """What survives a restart."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o750)
        except OSError as error:
            raise BadInput(f"--state-dir {path} cannot be made: {error.strerror}") from error

    def load(self, name: str) -> Any:
        """The content of a JSON file; None if it is not there or was only half written (it is set aside then)."""
        file = self.path / name
        try:
            content = file.read_bytes()
        except OSError:
            return None
        try:
            data = msgspec.json.decode(content, type=dict[str, Any])
            version = msgspec.convert(data.get("stateVersion", 1), int)
        except msgspec.MsgspecError:
            self.set_aside(name)
            return None
        if version > STATE_VERSION:
            raise StateTooNew(
                f"{file} was written by a newer colocate (state version {data['stateVersion']}, this one knows "
                f"{STATE_VERSION}): install the newer version again, or give another --state-dir"
            )
        return data

    def set_aside(self, name: str) -> None:
        """Rename a file that cannot be used, so that it can be looked at and is not met again."""
        file = self.path / name
        with contextlib.suppress(OSError):
            file.replace(file.with_suffix(".broken"))

    def save(self, name: str, data: dict[str, Any]) -> bool:
        """Replace a JSON file atomically; False if the disk refuses, which must not stop protection."""
        file = self.path / name
        part = file.with_suffix(".part")
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o750)  # somebody may have emptied it
            with open(part, "wb") as out:
                out.write(msgspec.json.encode({"stateVersion": STATE_VERSION, **data}))
                out.flush()
                os.fsync(out.fileno())
            part.replace(file)
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            return False
        return True


class Lock:
    """One agent per node root. Raises AlreadyRunning with the owner's pid."""

    def __init__(self, directory: Path, node_root: str, role: str = "agent") -> None:
        name = node_root.strip("/").replace("/", "-") or "node"
        self.path = directory / f"{name}.lock"
        self.node_root = node_root
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o755)
            # 0600: whoever may open the file may lock it, and so keep the agent or its guardian away.
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.fchmod(self._fd, 0o600)
        except OSError as error:
            raise BadInput(f"{self.path} cannot be written: {error.strerror}") from error
        deadline = time.monotonic() + GUARDIAN_PATIENCE_SECONDS
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                pid, owner = self._owner()
                waits = owner in ("guardian", "") and role != "guardian"  # without a name: it is just being taken
                if not waits or time.monotonic() > deadline:
                    os.close(self._fd)
                    what = f"the node {node_root}" if node_root.startswith("/") else f"the state directory {directory}"
                    raise AlreadyRunning(pid, what) from None
                time.sleep(0.05)  # the guardian of an agent that died is just putting things back
        with contextlib.suppress(OSError):  # on a full disk the lock holds all the same, only namelessly
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()} {role}\n".encode(), 0)

    def _owner(self) -> tuple[int, str]:
        fields = os.pread(self._fd, 100, 0).decode().split()
        return (int(fields[0]), fields[1]) if len(fields) == 2 and fields[0].isdigit() else (0, "")

    def release(self) -> None:
        """Give the lock up."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, 0)
            os.close(self._fd)
