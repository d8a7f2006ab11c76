"""Simulated cards, and real processes on them."""

from __future__ import annotations

import contextlib
import ctypes
import json
import subprocess
import sys
import time

from colocate.actuate.driver_worker import STATES
from colocate.cgroup.knobfiles import read_knob
from colocate.cgroup.tree import inodes_of, joined
from colocate.fakecard.shared import CUDA, FAULTS, LIBRARY, attach
from tests.kernel.conftest import PATIENCE, wait_for

CLI = [sys.executable, "-m", "colocate.cli.main"]
CLIENT = [sys.executable, "-P", "-m", "colocate.fakecard.client"]
SERVICE = """
import sys, time
from colocate.fakecard.client import Device
device = Device(sys.argv[1])
every = float(sys.argv[2])
assert device.malloc(int(sys.argv[3]))
print("on the card", flush=True)
while True:
    time.sleep(every)
    device.launch(20, 1e6)
    device.sync(spins=True)
"""
POLICY = "gpu: {{nvmlLibrary: {}}}"


def line_of(process):
    assert process.stdout is not None
    return process.stdout.readline().strip()


class FakeCards:
    """A daemon and whoever was put on its cards."""

    def __init__(self, folder, node, *options):
        self.folder, self._node = folder, node
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-P", "-m", "colocate.fakecard.daemon", str(folder), *options]
        self.daemon = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert line_of(self.daemon) == "ready"
        self.state = attach(folder)
        self.processes = []
        self._cuda = None

    @property
    def library(self):
        return self.folder / LIBRARY

    @property
    def busy_ns(self):
        return self.state.devices[0].busy_ns

    def start(self, child, *command):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.processes.append(process)
        self._node.scratch.enter(process.pid, joined(self._node.path, child))
        assert line_of(process) == "on the card"
        return process

    def service(self, child="web", every=0.15, memory=0):
        return self.start(child, sys.executable, "-P", "-c", SERVICE, str(self.folder), str(every), str(memory))

    def batch(self, child, program, *options):
        return self.start(child, *CLIENT, str(self.folder), program, *options)

    def held(self, pid):
        """How the driver holds a process."""
        if self._cuda is None:
            self._cuda = ctypes.CDLL(str(self.folder / CUDA))
            assert self._cuda.cuInit(0) == 0
        found = ctypes.c_int()
        self._cuda.cuCheckpointProcessGetState(pid, ctypes.byref(found))
        return STATES[found.value]

    def wrong(self, *lines):
        (self.folder / FAULTS).write_text("".join(f"{line}\n" for line in lines))

    def close(self):
        for process in self.processes:
            process.kill()
            process.communicate()
        self.daemon.communicate(timeout=10 * PATIENCE)  # its standard input closes


def frozen(node, path):
    return read_knob(node.port, path, "cgroup.freeze", inodes_of(node.port, path)) == "1"


def states_of(node, path, looks):
    """Whether it is stopped, a hundred times a second."""
    for _ in range(looks):
        time.sleep(0.01)
        yield frozen(node, path)


def pulsing(node, running, path, seconds=60.0):
    """Whether the job is stopped and let go; where it is not, pytest prints what the agent says of its card."""
    seen = set()

    def both():
        seen.add(frozen(node, path))
        return len(seen) == 2

    if wait_for(both, seconds):
        return True
    print(f"{path}: frozen was only ever {seen}")
    if running is not None:
        said = running.ask("explain")
        print(json.dumps({"verdicts": said["plan"]["verdicts"], "cards": said["snapshot"].get("cards")}, indent=1))
    return False


def end(job):
    with contextlib.suppress(ProcessLookupError):
        job.terminate()
    try:
        job.wait(20 * PATIENCE)
    except subprocess.TimeoutExpired:
        job.kill()
        job.wait()
