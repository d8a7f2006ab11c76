"""`make test`: runs every suite whose prerequisites exist, and names the others with what they lack."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from colocate.cgroup.port import KernelPort
from colocate.demo.gang.controlplane import binaries
from colocate.errors import HostUnfit
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


def main(arguments: list[str]) -> int:
    """Run pytest once over all suites that can run; pytest's own exit code."""
    lacks = {suite: lack() for suite, lack in SUITES.items()}
    chosen = [str(ROOT / "tests" / suite) for suite, lack in lacks.items() if not lack]
    code = subprocess.run([sys.executable, "-m", "pytest", "-q", "-ra", *arguments, *chosen], cwd=ROOT).returncode
    for suite, lack in lacks.items():
        print(f"suite {suite}: {'ran' if not lack else 'did not run, it lacks ' + lack}")
    if not os.environ.get("COLOCATE_TRACES"):
        print("COLOCATE_TRACES is not set: no test needs it yet")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
