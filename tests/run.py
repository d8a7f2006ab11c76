"""`make test`: runs every suite whose prerequisites exist, and names the others with what they lack."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

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
QUICK = ((("unit 1 of 2",), ("unit 2 of 2",), ("cluster", "browser")), (("kernel",),))
"""Turns, each with lanes that run side by side: what measures this machine's own CPUs has them for itself. A part of
a suite is every so many of its files."""
SLOW = ((("guest",), ("unit",)), (("cluster", "browser"),), (("kernel",),))
NOTHING_COLLECTED = 5
"""pytest's exit code where no test is chosen."""


TIMED = ("tests/browser/", "tests/kernel/", "tests/cluster/", "tests/guest/", "tests/unit/test_scrapes.py")
"""Where real time passes in real parts: what fails there on a busy machine is tried once more, and named."""
MOST_TRIED_AGAIN = 4
AGAIN_SECONDS = 600.0
"""What has not passed alone within this has failed: a run that is late already does not begin anew."""


def paths_of(suite: str) -> list[str]:
    """Its folder; of a part its files."""
    name, _, part = suite.partition(" ")
    folder = ROOT / "tests" / name
    if not part:
        return [str(folder)]
    number, _, parts = part.partition(" of ")
    return [str(file) for file in sorted(folder.glob("test_*.py"))[int(number) - 1 :: int(parts)]]


class Lane:
    """One pytest over some suites; its output is kept until it has ended."""

    def __init__(self, suites: list[str], marker: str, arguments: list[str], *, again: bool = False) -> None:
        self.suites = suites
        self._cache = ROOT / ".pytest_cache" / "-".join(suites).replace(" ", "")
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - read when the process has ended
        paths = [path for suite in suites for path in paths_of(suite)]
        command = [sys.executable, "-m", "pytest", "-q", "-ra", "-m", marker, *arguments, f"-ocache_dir={self._cache}"]
        which = ["--last-failed", "--last-failed-no-failures=none"] if again else ["--cache-clear"]
        # Real parts have their deadlines: what only computes takes what they leave.
        nice = ["nice", "-n", "10"] if all(suite.startswith("unit") for suite in suites) else []
        self._process = subprocess.Popen(
            [*nice, *command, *which, *paths], cwd=ROOT, stdout=self._output, stderr=subprocess.STDOUT
        )

    def end(self, seconds: float | None = None) -> int:
        """Wait, print what it said; pytest's exit code, 0 where no test is chosen. Interrupted after `seconds`."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGINT)  # fixtures put back what they made
            code = self._process.wait()
        self._output.seek(0)
        print(f"--- {', '.join(self.suites)}", flush=True)
        shutil.copyfileobj(self._output, sys.stdout.buffer)
        sys.stdout.buffer.flush()
        self._output.close()
        return 0 if code == NOTHING_COLLECTED else code

    def failed(self) -> list[str]:
        """The ids of the tests that failed."""
        file = self._cache / "v" / "cache" / "lastfailed"
        return list(json.loads(file.read_text())) if file.exists() else []


def _alone(lane: Lane, code: int, marker: str, arguments: list[str]) -> tuple[int, list[str]]:
    """Try a few failed tests of real time once more, with nothing beside them; the exit code, and which passed."""
    failed = lane.failed()
    if code != 1 or not 0 < len(failed) <= MOST_TRIED_AGAIN or not all(name.startswith(TIMED) for name in failed):
        return code, []
    print(f"once more, alone: {', '.join(failed)}", flush=True)
    code = Lane(lane.suites, marker, arguments, again=True).end(AGAIN_SECONDS)
    return code, [] if code else failed


def main(arguments: list[str]) -> int:
    """Run pytest over all suites that can run; the worst of its exit codes. `--slow`: only what is marked so."""
    slow = "--slow" in arguments
    arguments = [a for a in arguments if a != "--slow"]
    marker = "slow and not rare" if slow else "not slow"
    lacks = {suite: lack() for suite, lack in SUITES.items()}
    codes, unsteady = [0], list[str]()
    for lanes in SLOW if slow else QUICK:
        able = [[s for s in lane if not lacks[s.split()[0]]] for lane in lanes]
        running = [Lane(suites, marker, arguments) for suites in able if suites]
        for lane, first in [(lane, lane.end()) for lane in running]:
            code, passed = _alone(lane, first, marker, arguments)
            codes.append(code)
            unsteady += passed
    chosen = {suite.split()[0] for lanes in (SLOW if slow else QUICK) for lane in lanes for suite in lane}
    for suite, lack in lacks.items():
        ran = "ran" if suite in chosen else "has only slow tests"
        print(f"suite {suite}: {ran if not lack else 'did not run, it lacks ' + lack}")
    if not slow:
        print("what is slow (cgroup v2 in a virtual machine, a death at every write): make test-slow")
    if not os.environ.get("COLOCATE_TRACES"):
        print("COLOCATE_TRACES (a folder of traces) is not set: the tests that read them were skipped, as named above")
    if unsteady:
        print("UNSTEADY, failed once (above) and passed alone:", *unsteady, sep="\n  ")
    return max(codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
