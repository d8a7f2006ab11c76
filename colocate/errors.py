"""The exception tree: what a user can be told, with the exit code that goes with it.

- ColocateError            exit 1
    - BadInput             exit 2: names the field and the mend
        - ConfigError      a policy file: `path` is the exact place
    - HostUnfit            exit 1: the host lacks what is asked for, with the mend
        - PermissionMissing
    - AlreadyRunning       exit 1: another agent owns this node
    - StateTooNew          exit 1: a state directory written by a newer version
    - StateTooOld          exit 1: a state or record of an older version
    - JournalBroken        exit 1: before-values cannot be kept

Everything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import errno
from typing import NoReturn


class ColocateError(Exception):
    """A failure that a user can act on; printed without a traceback."""

    exit_code = 1


class BadInput(ColocateError):  # noqa: N818 - reads better than BadInputError at every raise
    """Input that cannot be used; nothing was changed."""

    exit_code = 2


class ConfigError(BadInput):
    """A field of the policy is unknown, mistyped or impossible. `path` is JSONPath-like: `$.spec.services[0].slo`."""

    def __init__(self, path: str, message: str, mend: str = "") -> None:
        self.path, self.message, self.mend = path, message, mend
        super().__init__(f"{path}: {message}" + (f" ({mend})" if mend else ""))


class HostUnfit(ColocateError):  # noqa: N818
    """The host lacks a prerequisite."""

    def __init__(self, message: str, mend: str = "") -> None:
        self.mend = mend
        super().__init__(message + (f"\n  mend: {mend}" if mend else ""))


class PermissionMissing(HostUnfit):
    """The cgroup hierarchies exist but may not be written by this user."""


def refuse(what: str, error: OSError, mend: str, otherwise: str = "") -> NoReturn:
    """Raise what the kernel refused for a cgroup in a user's words: PermissionMissing with the mend, else HostUnfit."""
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        raise PermissionMissing(f"the cgroup {what} cannot be written: {error.strerror}", mend) from error
    raise HostUnfit(f"the cgroup {what} refuses: {error.strerror}", otherwise) from error


class AlreadyRunning(ColocateError):  # noqa: N818
    """Another agent owns this node."""

    def __init__(self, pid: int, what: str) -> None:
        self.pid = pid
        who = f"another colocate agent (pid {pid})" if pid else "another process"
        mend = f"kill -TERM {pid}" if pid else "find it with fuser or lslocks"
        super().__init__(f"{who} already owns {what}; stop it first: {mend}")


class StateTooNew(ColocateError):  # noqa: N818
    """The state directory was written by a newer version; going on would lose what it knows."""


class StateTooOld(ColocateError):  # noqa: N818
    """A state of an older version, which this program does not read: what it learnt is learnt anew."""


class JournalBroken(ColocateError):  # noqa: N818
    """The journal of before-values cannot be written or read."""


class NotAnswering(ColocateError):  # noqa: N818
    """No agent answers on the socket."""
