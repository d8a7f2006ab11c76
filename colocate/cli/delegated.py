"""An ordinary user's own piece of the cgroup tree: a scope of the user's systemd, delegated (cgroup v2).

Source: systemd's CGROUP_DELEGATION.md; a process may be moved only below a common ancestor that the user owns, so a job
too must be started in such a scope, not in the login session's.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

DELEGATED = "COLOCATE_DELEGATED"


def enter_delegated_scope() -> None:
    """Start this command again in a delegated scope, where its user may make cgroups; back if that cannot be had."""
    run = shutil.which("systemd-run")
    if os.geteuid() == 0 or DELEGATED in os.environ or run is None or not os.environ.get("XDG_RUNTIME_DIR"):
        return
    if not Path(os.environ["XDG_RUNTIME_DIR"], "systemd").exists() or not Path("/sys/fs/cgroup/cgroup.procs").exists():
        return
    scope = [run, "--user", "--scope", "--quiet", "-p", "Delegate=yes", "--"]
    command = [*scope, sys.executable, "-P", "-m", "colocate.cli.main", *sys.argv[1:]]
    os.execve(run, command, {**os.environ, DELEGATED: "1"})
