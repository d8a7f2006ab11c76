"""Clients of NVIDIA's MPS: ended by its control daemon before their processes are, for a client that is killed in the
middle of something faults all others of its server, services among them (MPS documentation; MuxFlow, arXiv 2303.13803).
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Collection

import structlog

log = structlog.get_logger()
CONTROL = "nvidia-cuda-mps-control"
ANSWER_SECONDS = 3.0


def end_clients(pids: Collection[int]) -> str:
    """Have these ended, whichever server has them; why that could not be, or nothing. Takes a moment."""
    if shutil.which(CONTROL) is None:
        return f"{CONTROL} is not installed where the agent runs"
    try:
        for server in _numbers(_ask("get_server_list")):
            for pid in _numbers(_ask(f"get_client_list {server}")) & set(pids):
                _ask(f"terminate_client {server} {pid}")
    except (OSError, subprocess.SubprocessError) as error:
        return f"{CONTROL}: {error}"
    return ""


def _ask(command: str) -> str:
    found = subprocess.run(
        [CONTROL], input=f"{command}\n", capture_output=True, text=True, timeout=ANSWER_SECONDS, check=True
    )
    return found.stdout


def _numbers(text: str) -> set[int]:
    return {int(word) for word in text.split() if word.isdigit()}
