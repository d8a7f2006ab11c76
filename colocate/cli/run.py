"""colocate run."""

from __future__ import annotations

import argparse

from colocate.cli.host import socket_path
from colocate.errors import BadInput
from colocate.jobs.client import connect_or_embed
from colocate.jobs.client import run as run_job


def run(options: argparse.Namespace) -> int:
    """Run the command as a batch job; its exit code."""
    command = options.argv[1:] if options.argv[:1] == ["--"] else options.argv
    if not command:
        raise BadInput("no command given: colocate run [options] -- CMD ...")
    request = {
        "name": options.name,
        "cores": options.cpus,
        "memory_bytes": options.memory,
        "priority": options.priority,
        "gang": options.gang,
        "checkpoint_signal": options.checkpoint_signal,
        "max_runtime_seconds": options.max_runtime,
    }
    connection = connect_or_embed(socket_path(options), options.config)
    return run_job(command, connection, {k: v for k, v in request.items() if v is not None})
