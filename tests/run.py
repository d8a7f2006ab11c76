"""`make test`: runs every suite whose prerequisites exist, and names the others with what they lack."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

from colocate.cgroup.port import KernelPort
from colocate.errors import HostUnfit
from colocate.localcluster.controlplane import binaries
from tools.guest import lacks as guest_lacks

ROOT = Path(__file__).resolve().parent.parent


def kernel_lacks() -> str:
    """What the suite on this machine's own cgroups lacks."""
    layout = KernelPort().layout
    if os.geteuid() != 0:
        return "root"
    if "cpu" not in layout.controllers:
        return "a cgroup hierarchy with the cpu controller"
    if not os.access(layout.mounts[layout.controllers["cpu"]], os.W_OK):
        return "writable cgroups (this looks like a container)"
    return ""


def browser_lacks() -> str:
    """What the suite in a real browser lacks."""
    return "" if shutil.which("chromium") else "the Debian package chromium (make system-packages)"


def cluster_lacks() -> str:
    """What the suite on a real API server lacks."""
    try:
        binaries("etcd", "kube-apiserver", "kube-controller-manager", "kwok")
    except HostUnfit as error:
        return f"{str(error).splitlines()[0]}: {error.mend}"
    return ""


SUITES = {
    "unit": lambda: "",
    "browser": browser_lacks,
    "kernel": kernel_lacks,
    "cluster": cluster_lacks,
    "guest": guest_lacks,
}
QUICK = ((("unit", "browser"), ("cluster",)), (("kernel",),))
"""Turns, each with lanes that run side by side: what measures this machine's own CPUs has them for itself."""
SLOW = ((("guest",), ("unit", "cluster", "browser")), (("kernel",),))
NOTHING_COLLECTED = 5
"""pytest's exit code where no test is chosen."""


def _start(suites: list[str], marker: str, arguments: list[str]) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
    """One pytest over some suites; its output is kept until it has ended."""
    output = tempfile.TemporaryFile()  # noqa: SIM115 - read when the process has ended
    folders = [str(ROOT / "tests" / suite) for suite in suites]
    command = [sys.executable, "-m", "pytest", "-q", "-ra", "-m", marker, *arguments, *folders]
    return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT), output


def main(arguments: list[str]) -> int:
    """Run pytest over all suites that can run; the worst of its exit codes. `--slow`: only what is marked so."""
    slow = "--slow" in arguments
    arguments = [a for a in arguments if a != "--slow"]
    lacks = {suite: lack() for suite, lack in SUITES.items()}
    codes = [0]
    for lanes in SLOW if slow else QUICK:
        able = [[s for s in lane if not lacks[s]] for lane in lanes]
        running = [(lane, *_start(lane, "slow" if slow else "not slow", arguments)) for lane in able if lane]
        for lane, process, output in running:
            code = process.wait()
            codes.append(0 if code == NOTHING_COLLECTED else code)
            output.seek(0)
            print(f"--- {', '.join(lane)}", flush=True)
            shutil.copyfileobj(output, sys.stdout.buffer)
            sys.stdout.buffer.flush()
            output.close()
    chosen = {suite for lanes in (SLOW if slow else QUICK) for lane in lanes for suite in lane}
    for suite, lack in lacks.items():
        ran = "ran" if suite in chosen else "has only slow tests"
        print(f"suite {suite}: {ran if not lack else 'did not run, it lacks ' + lack}")
    if not slow:
        print("what is slow (cgroup v2 in a virtual machine, a death at every write): make test-slow")
    if not os.environ.get("COLOCATE_TRACES"):
        print("COLOCATE_TRACES (a folder of recorded loads) is not set: one unit test was skipped")
    return max(codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
