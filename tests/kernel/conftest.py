"""Fixtures of the suite on this machine's own cgroups: scratch nodes that are gone after each test."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from colocate.actuate.scratch import ScratchNode, sweep
from colocate.cgroup.knobfiles import write_knob
from colocate.cgroup.port import KernelPort
from colocate.cgroup.tree import inodes_of, joined

PATIENCE = float(os.environ.get("COLOCATE_TEST_PATIENCE", "1"))
HOG = "while True: pass"
# A moment without the machine costs at most a second of backlog: the median is of the scheduler, not of the moment.
DUTY = """
import sys, time
busy, period = float(sys.argv[1]), 0.01
late = []
due = time.perf_counter()
end = due + float(sys.argv[2])
while due < end:
    until = time.thread_time() + busy * period
    while time.thread_time() < until: pass
    late.append(time.perf_counter() - due)
    due = max(due + period, time.perf_counter() - 1)
    time.sleep(max(due - time.perf_counter(), 0))
late.sort()
print(late[len(late) // 2], late[int(0.99 * len(late))])
"""


@pytest.fixture
def port() -> Iterator[KernelPort]:
    made = KernelPort()
    yield made
    made.close()


class Node:
    """A scratch node with helpers to put real processes into its cgroups."""

    def __init__(self, port: KernelPort, scratch: ScratchNode) -> None:
        self.port, self.scratch, self.path = port, scratch, scratch.path
        self.processes: list[subprocess.Popen[str]] = []

    def make(self, child: str, *, inner: bool = False) -> str:
        return (self.scratch.make_inner if inner else self.scratch.make)(child)

    def knob(self, child: str, knob: str, value: str) -> None:
        path = joined(self.path, child)
        write_knob(self.port, path, knob, value, inodes_of(self.port, path))

    def start(self, child: str, code: str, *arguments: str, cpu: int | None = None) -> subprocess.Popen[str]:
        prefix = f"import os; os.sched_setaffinity(0, {{{cpu}}})\n" if cpu is not None else ""
        process = subprocess.Popen(
            [sys.executable, "-ISc", f"import sys; sys.stdin.readline()\n{prefix}{code}", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        self.scratch.enter(process.pid, joined(self.path, child))
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        return process

    def cpu_seconds(self, process: subprocess.Popen[str]) -> float:
        stat = self.port.proc(f"/proc/{process.pid}/stat") or ""
        fields = stat.rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture
def node(port: KernelPort) -> Iterator[Node]:
    sweep(port)
    with ScratchNode(port, "test", 1 << 30) as scratch:
        made = Node(port, scratch)
        try:
            yield made
        finally:
            made.close()


@pytest.fixture
def dirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state and runtime directory of the test's own, also for the processes it starts."""
    monkeypatch.setenv("COLOCATE_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("COLOCATE_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("COLOCATE_JIT", "off")
    return tmp_path


@pytest.fixture
def elsewhere() -> Iterator[None]:
    """Whoever watches, and what it starts, stays off CPU 0, where there is another: it is no part of the node."""
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus - {0} or cpus)
    yield
    os.sched_setaffinity(0, cpus)


def colocate(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run the command line."""
    command = [sys.executable, "-m", "colocate.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120 * PATIENCE, **options)  # type: ignore[call-overload, no-any-return]


def wait_for(condition: object, seconds: float = 30.0) -> bool:
    """Poll a condition: long enough for a busy machine, longer for an emulated one. How fast is for the benchmarks."""
    assert callable(condition)
    deadline = time.monotonic() + seconds * PATIENCE
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return bool(condition())


POLICY = """
apiVersion: colocate.io/v1alpha1
kind: ColocationPolicy
metadata: {{name: test}}
spec:
  nodeRoot: {root}
  tick: {tick}
  calibrate: false
  services: [{{name: web, selector: {{cgroup: /web}}}}]
  {more}
  http: {{port: 0, enabled: false}}
"""


class AgentProcess:
    """A real `colocate agent`."""

    def __init__(self, node, directory, tick="250ms", more="", options=(), within=()):
        """`within`: the start of its command line, which says in what surroundings it runs."""
        self.node, self.directory = node, directory
        self.config = directory / "policy.yaml"
        self.config.write_text(POLICY.format(root=node.path, tick=tick, more=more))
        command = [*within, sys.executable, "-m", "colocate.cli.main", "agent", "--config", str(self.config), *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.socket = directory / "run" / "agent.sock"
        assert wait_for(self.socket.exists), self.process.stderr.read() if self.process.stderr else ""

    def ask(self, command, *arguments):
        found = colocate(command, "-o", "json", *arguments)
        if found.returncode:
            raise AssertionError(f"{found.stderr}the agent: {self._last_words()}")
        return json.loads(found.stdout)

    def _last_words(self):
        """Why it ended, where it has, or is about to."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5 * PATIENCE)
        assert self.process.stderr is not None
        return "it runs" if self.process.poll() is None else self.process.stderr.read()

    def stop(self, number=signal.SIGTERM):
        if self.process.poll() is None:
            self.process.send_signal(number)
        assert self.process.stderr is not None
        said = self.process.stderr.read()
        self.process.wait(20 * PATIENCE)
        self.process.stderr.close()
        return said


def end_guardians(state):
    """Those of killed agents: a card's driver that is gone with its test they would ask for five minutes."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"colocate.actuate.guardian\0" + os.fsencode(state) + b"\0" in (process / "cmdline").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)


@pytest.fixture
def agent(node, dirs):
    node.make("web")
    made = []

    def start(**options):
        made.append(AgentProcess(node, dirs, **options))
        return made[-1]

    yield start
    for one in made:
        if one.process.returncode is None:
            one.process.send_signal(signal.SIGCONT)  # a test may have stopped it
            one.stop(signal.SIGKILL)
    end_guardians(dirs / "state")


def tier_of(node):
    return joined(node.path, "colocate-batch")


@pytest.fixture
def cards(node, tmp_path):
    """Starts simulated cards with options of their daemon."""
    from tests.kernel.fake_cards import FakeCards

    made = []

    def start(*options):
        made.append(FakeCards(tmp_path / "cards", node, *options))
        return made[-1]

    yield start
    for one in made:
        one.close()


@pytest.fixture
def start_job():
    """`colocate run` of a program on a simulated card, ended with the test."""
    from tests.kernel.fake_cards import CLI, CLIENT, end

    started = []

    def start(name, fake, *program):
        command = [*CLI, "run", "--name", name, "--", *CLIENT, str(fake.folder), *program]
        started.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        return started[-1]

    yield start
    for job in started:
        end(job)
