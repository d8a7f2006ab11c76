"""Processes of our own that talk to a driver, which may hang in it: the start and the end of one."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path


def start_child(module: str, library: str = "") -> subprocess.Popen[bytes]:
    """Run a module with pipes to it. Shared libraries are looked for beside `library` first, where one is named."""
    environment = dict(os.environ)
    if library:
        folder, before = str(Path(library).parent), environment.get("LD_LIBRARY_PATH")
        environment["LD_LIBRARY_PATH"] = folder if not before else f"{folder}:{before}"
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd="/",
        env=environment,
        start_new_session=True,
    )


def end_child(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Close its input, by which it puts back what it did, and see to it that it ends; whether it did in time."""
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.close()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return False
    return True
