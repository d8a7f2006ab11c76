"""colocate run."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from colocate.amdgpu import shown
from colocate.cli.delegated import enter_delegated_scope
from colocate.cli.host import socket_path
from colocate.errors import BadInput, ColocateError
from colocate.jobs.client import (
    EXIT_REFUSED,
    JOB_VARIABLE,
    SOCKET_VARIABLE,
    connect_or_embed,
    tell_checkpointed,
    tell_progress,
)
from colocate.jobs.client import run as run_job
from colocate.observe.node import has_amd, has_nvidia
from colocate.units import CPU_PERIOD_US, CPU_QUOTA_MIN_US

LEAST_BYTES = 1 << 20


def run(options: argparse.Namespace) -> int:
    """Run the command as a batch job; its exit code, or 125 if no agent takes it. Options that cannot be end with 2."""
    _check(options)
    try:
        return _run(options)
    except ColocateError as error:
        print(f"colocate: {error}", file=sys.stderr)
        return EXIT_REFUSED


def checkpointed(options: argparse.Namespace) -> int:
    """Tell the agent; 1 if none answers."""
    return _tell(options, tell_checkpointed)


def progress(options: argparse.Namespace) -> int:
    """Tell the agent; 1 if none answers."""
    return _tell(options, lambda: tell_progress(options.done))


def _tell(options: argparse.Namespace, tell: Callable[[], bool]) -> int:
    if not os.environ.get(JOB_VARIABLE):
        raise BadInput(f"{JOB_VARIABLE} is not set: run this from inside a job, which `colocate run` starts")
    if options.socket:
        os.environ[SOCKET_VARIABLE] = options.socket
    if tell():
        return 0
    print(f"colocate: no agent answers on {os.environ.get(SOCKET_VARIABLE)}", file=sys.stderr)
    return 1


def _is_roots(socket: Path) -> bool:
    """Whether root's agent listens there; it may move a job from anywhere."""
    return socket.exists() and socket.stat().st_uid == 0


def _check(options: argparse.Namespace) -> None:
    """Raises BadInput for what no agent could do."""
    if options.argv in ([], ["--"]):
        raise BadInput("no command given: colocate run [options] -- CMD ...")
    if options.cpus is not None and options.cpus < CPU_QUOTA_MIN_US / CPU_PERIOD_US:
        raise BadInput(f"--cpus {options.cpus:g}: the kernel gives no less than 10m")
    if options.memory is not None and options.memory < LEAST_BYTES:
        raise BadInput(f"--memory {options.memory}: less than 1Mi runs no process")
    if options.max_runtime == 0:
        raise BadInput("--max-runtime 0: the job would be evicted at once")
    if (options.deadline is None) != (options.work is None):
        raise BadInput("--deadline and --work say something together: by when, and how long it takes at full watts")
    if options.deadline is not None and options.power_cap is None and options.max_slowdown is None:
        raise BadInput("--deadline: only a job that asks for watts is slowed by a budget: give --power-cap as well")
    if 0 in (options.deadline, options.work):
        raise BadInput("--deadline and --work: more than 0")
    for option in ("name", "gang"):
        given = getattr(options, option)
        if given is not None and not given.isprintable():
            raise BadInput(f"--{option} {given!r}: is not printable text")
    if options.config:
        from colocate.policy.file import load_policy

        load_policy(Path(options.config))


def visible_gpus() -> str | None:
    """Those that the command will see: UUIDs and indices as the agent has them."""
    cuda, rocr, hip = (os.environ.get(f"{name}_VISIBLE_DEVICES") for name in ("CUDA", "ROCR", "HIP"))
    if cuda is not None and has_amd() and not has_nvidia():
        cuda, hip = None, cuda if hip is None else hip  # which HIP goes by too
    every = [each for each in (cuda, shown(rocr, hip)) if each is not None]
    return ",".join(every) if every else None


def _run(options: argparse.Namespace) -> int:
    command = options.argv[1:] if options.argv[:1] == ["--"] else options.argv
    capped = options.power_cap is not None or options.max_slowdown is not None
    request = {
        "name": options.name,
        "cores": options.cpus,
        "memory_bytes": options.memory,
        "priority": options.priority,
        "gang": options.gang,
        "checkpoint_signal": options.checkpoint_signal,
        "max_runtime_seconds": options.max_runtime,
        "gpu_memory_bytes": options.gpu_memory,
        "power_watts": options.power_cap,
        "max_slowdown": options.max_slowdown,
        "power_class": options.power_class,
        "deadline_seconds": options.deadline,
        "work_seconds": options.work,
        "visible_gpus": visible_gpus() if capped else None,
    }
    if not _is_roots(socket_path(options)):
        enter_delegated_scope()
    connection = connect_or_embed(socket_path(options), options.config)
    return run_job(command, connection, {k: v for k, v in request.items() if v is not None})
