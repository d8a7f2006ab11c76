"""What has to hold at every moment of a simulation, of failures, priorities, shared GPUs and growing jobs together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_at_every_moment_nobody_has_what_somebody_else_has_and_nobody_is_forgotten():
    """The engine as plain Python, so that it can be looked at."""
    command = [sys.executable, "-m", "tests.simulate_moments", "400"]
    env = os.environ | {"NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 1500
