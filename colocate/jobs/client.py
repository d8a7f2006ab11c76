"""`colocate run`: the command is a child of the caller; stdio is inherited, signals and the exit code pass through.

The child waits on a pipe until the agent has moved it into the tier, and only then becomes the command, with its job's
name and the agent's socket in COLOCATE_JOB and COLOCATE_SOCKET. The kernel's OOM killer is told to take it first, as it
is told of a BestEffort pod. Exit codes:
the command's own, 128+n if a signal ended it, 75 (EX_TEMPFAIL of sysexits.h) if it was evicted, 125 if the agent
refused, 126/127 as shells use them.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from colocate.actuate.statedir import default_state_dir
from colocate.errors import ColocateError, NotAnswering

EXIT_EVICTED = 75
EXIT_REFUSED = 125
EXIT_NOT_EXECUTABLE = 126
EXIT_NOT_FOUND = 127
EMBEDDED_START_SECONDS = 60.0
ANSWER_SECONDS = 10.0
ATTACH_MILLISECONDS = 500
JOB_VARIABLE, SOCKET_VARIABLE = "COLOCATE_JOB", "COLOCATE_SOCKET"
OOM_SCORE_ADJ = "1000"
"""What kubelet gives a BestEffort pod."""
LAST_WORD_SECONDS = 3.0
"""How long an agent is looked for that may have killed the child."""
_FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH)
_FROM_TERMINAL = (signal.SIGINT, signal.SIGQUIT)


class Connection:
    """JSON lines to and from an agent. Raises NotAnswering."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self.socket.settimeout(ANSWER_SECONDS)
        try:
            self.socket.connect(str(path))
        except PermissionError as error:
            self.socket.close()
            raise NotAnswering(
                f"no permission for the agent's socket {path}: join the group colocate (usermod -aG colocate $USER)"
            ) from error
        except OSError as error:
            self.socket.close()
            raise NotAnswering(f"no agent answers on {path}: start one with `colocate agent`") from error
        self.path = path
        self._buffer = b""

    def read_line(self) -> dict[str, Any] | None:
        """The next message; None if the agent has gone. Raises NotAnswering if it is silent, or is no agent."""
        while b"\n" not in self._buffer:
            try:
                chunk = self.socket.recv(1 << 16)
            except TimeoutError as error:
                raise NotAnswering(f"the agent on {self.path} has not answered for {ANSWER_SECONDS:g} s") from error
            except OSError:
                return None
            if not chunk:
                return None
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            return msgspec.json.decode(line, type=dict[str, Any])
        except msgspec.MsgspecError as error:
            raise NotAnswering(f"what answers on {self.path} is no colocate agent") from error

    @property
    def has_line(self) -> bool:
        """Whether a message has been received already."""
        return b"\n" in self._buffer

    def ask(self, **message: Any) -> dict[str, Any]:
        """Send a request and wait for its answer. Raises NotAnswering, and ColocateError with the agent's words."""
        try:
            self.socket.sendall(msgspec.json.encode(message) + b"\n")
        except OSError as error:
            raise NotAnswering(f"the agent on {self.path} has ended") from error
        answer = self.read_line()
        if answer is None:
            raise NotAnswering(f"the agent on {self.path} closed the connection")
        if "error" in answer:
            raise ColocateError(str(answer["error"]))
        return answer

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()


def connect_or_embed(path: Path, policy: str | None) -> Connection:
    """A connection to the agent; if none runs, one is started that ends after its last job. Raises ColocateError."""
    with contextlib.suppress(NotAnswering):
        connection = Connection(path)
        if policy:
            print("colocate: an agent runs already, with its own policy: --config is not used", file=sys.stderr)
        return connection
    if path.exists() and not os.access(path, os.W_OK):
        return Connection(path)  # says which group is missing
    log_path = default_state_dir() / "embedded.log"
    try:
        log_path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
        log = log_path.open("wb")
    except OSError as error:
        mend = "set COLOCATE_STATE_DIR to a directory that you can write"
        raise ColocateError(f"no agent runs, and none can be started: {log_path}: {error.strerror}; {mend}") from error
    arguments = [sys.executable, "-P", "-m", "colocate.cli.main", "agent", "--embedded", "--socket", str(path)]
    with log:
        agent = subprocess.Popen(
            arguments + (["--config", os.path.abspath(policy)] if policy else []),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd="/",
        )
    deadline = time.monotonic() + EMBEDDED_START_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(NotAnswering):
            return Connection(path)
        if agent.poll() is not None:
            # Another `colocate run` may have won the race to start one.
            time.sleep(0.2)
            with contextlib.suppress(NotAnswering):
                return Connection(path)
            said = [
                line for line in log_path.read_text(errors="replace").splitlines() if line and not line.startswith("{")
            ]
            raise ColocateError("no agent runs, and none could be started: " + (" ".join(said) or f"see {log_path}"))
        time.sleep(0.02)
    raise NotAnswering(f"the agent that was started does not answer; see {log_path}")


def tell_checkpointed() -> bool:
    """From inside a job: its state is saved as of now. Whether an agent heard it; False outside of any job.

    Nobody waits for its checkpoint any longer, and what an eviction would lose is counted from here. Raises
    ColocateError where an agent answers that it knows no such job of this user.
    """
    return _tell(op="checkpointed")


def tell_progress(ratio: float) -> bool:
    """From inside a job: how much of its work is done, 0 to 1. Whether an agent heard it; else as `tell_checkpointed`.

    By that, and not by the time that it ran, a job with a deadline gets the watts that it still needs.
    """
    return _tell(op="progress", ratio=ratio)


def _tell(**said: str | float) -> bool:
    job, path = os.environ.get(JOB_VARIABLE), os.environ.get(SOCKET_VARIABLE)
    if not job or not path:
        return False
    try:
        connection = Connection(Path(path))
    except NotAnswering:
        return False
    try:
        connection.ask(**said, job=job)
    except NotAnswering:
        return False
    finally:
        connection.close()
    return True


def _fork(command: list[str], socket_path: Path) -> tuple[int, int]:
    """A child that becomes the command when its job's name arrives on the returned descriptor; it ends if none does."""
    read, write = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid:
        os.close(read)
        return pid, write
    try:
        os.close(write)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and a command would inherit that
            signal.signal(number, signal.SIG_DFL)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):  # until it is the command, its parent's handlers
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        name = os.read(read, 1 << 10).rstrip(b"\n")
        if name:
            with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
                file.write(OOM_SCORE_ADJ)
            os.environb[os.fsencode(JOB_VARIABLE)] = name
            os.environ[SOCKET_VARIABLE] = str(socket_path)
            os.execvp(command[0], command)
    except OSError as error:
        print(f"colocate: {command[0]}: {error.strerror}", file=sys.stderr)
        os._exit(EXIT_NOT_EXECUTABLE)
    os._exit(EXIT_REFUSED)


@contextlib.contextmanager
def _passing_signals(child: int) -> Iterator[None]:
    """What we are told meanwhile the child is told; afterwards all is as it was, for its pid may be another's."""

    def forward(number: int, _frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    # A terminal sends these to the whole foreground group, so the child has had them already.
    of_a_terminal = signal.SIG_IGN if os.isatty(0) else forward
    handlers = {**dict.fromkeys(_FORWARDED, forward), **dict.fromkeys(_FROM_TERMINAL, of_a_terminal)}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Watch:
    """Waits for the end of the child, and listens to the agent meanwhile; to its successor, if it has gone."""

    def __init__(self, child: int, connection: Connection, job: str) -> None:
        self.child, self.job = child, job
        self.connection: Connection | None = connection
        self.path, self.evicted = connection.path, ""

    def _attach(self) -> None:
        """Be the job's caller again, if an agent answers. Whatever fails is tried again."""
        with contextlib.suppress(ColocateError):
            connection = Connection(self.path)
            try:
                self.evicted = str(connection.ask(op="attach", job=self.job).get("evicted") or self.evicted)
            except ColocateError:
                connection.close()
                raise
            self.connection = connection

    def _hear(self) -> None:
        assert self.connection is not None
        message = None
        with contextlib.suppress(NotAnswering):
            message = self.connection.read_line()
        if message is None:
            self.connection.close()
            self.connection = None  # the agent has gone; the job goes on
        elif "evicted" in message:
            self.evicted = str(message["evicted"])

    def _last_word(self, pidfd: int) -> None:
        """The child has ended while no agent was heard. A successor may have evicted it: ask while it is known."""
        ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT)  # not reaped, so that its pid still is its own
        killed = ended is not None and ended.si_code != os.CLD_EXITED
        deadline = time.monotonic() + (LAST_WORD_SECONDS if killed else 0.0)
        self._attach()
        while self.connection is None and time.monotonic() < deadline:
            time.sleep(0.1)
            self._attach()

    def wait(self) -> int:
        """The child's wait status."""
        pidfd = os.pidfd_open(self.child)
        try:
            while True:
                poll = select.poll()
                poll.register(pidfd, select.POLLIN)
                known = self.connection
                if known is not None:
                    poll.register(known.socket, select.POLLIN)
                waits = None if known is not None else ATTACH_MILLISECONDS
                ready = dict(poll.poll(0 if known is not None and known.has_line else waits))
                if known is not None and (known.has_line or known.socket.fileno() in ready):
                    self._hear()
                elif pidfd in ready:
                    if known is None:
                        self._last_word(pidfd)
                    return os.waitpid(self.child, 0)[1]
                elif known is None:
                    self._attach()
        finally:
            os.close(pidfd)


def _tell_oom(connection: Connection | None) -> None:
    """Say so if the OOM killer was at work in the job: the exit code is that of whoever outlived its victim."""
    if connection is not None:
        with contextlib.suppress(ColocateError):
            told = connection.ask(op="ended")
            if told.get("oom_kills"):
                print(f"colocate: killed by the kernel: {told['why']}", file=sys.stderr)


def run(command: list[str], connection: Connection, request: dict[str, Any]) -> int:
    """Run the command as a batch job; the exit code to end with. Raises ColocateError if the agent refuses."""
    if shutil.which(command[0]) is None:
        exists = os.path.exists(command[0])
        print(f"colocate: {command[0]}: {'not executable' if exists else 'command not found'}", file=sys.stderr)
        return EXIT_NOT_EXECUTABLE if exists else EXIT_NOT_FOUND
    shown = os.fsencode(" ".join(command))[:200].decode(errors="replace")
    child, go = _fork(command, connection.path.absolute())
    try:
        # A signal in this moment ends us and so the child, which is still waiting for its go.
        answer = connection.ask(op="run", pid=child, command=shown, **request)
        job = str(answer["job"])
        if capped := answer.get("capped"):
            print(f"colocate: {capped}", file=sys.stderr)
    except ColocateError:
        os.close(go)
        os.waitpid(child, 0)
        raise
    watch = _Watch(child, connection, job)
    with _passing_signals(child):
        with contextlib.suppress(BrokenPipeError):  # a child that has been killed meanwhile has a status of its own
            os.write(go, os.fsencode(f"{job}\n"))
        os.close(go)
        status = watch.wait()
    _tell_oom(watch.connection)
    if watch.connection is not None:
        watch.connection.close()
    if watch.evicted:
        print(f"colocate: evicted: {watch.evicted}", file=sys.stderr)
        return EXIT_EVICTED
    if os.WIFSIGNALED(status):
        return 128 + os.WTERMSIG(status)
    return os.WEXITSTATUS(status)
