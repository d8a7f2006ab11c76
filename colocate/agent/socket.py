"""The agent's socket: JSON lines. Jobs are registered, explained and told of their eviction, never started by us.

Mode 0660 with the group `colocate` where it exists. A job's connection stays open as long as its caller lives; when it
closes, what the job left behind is told to end. After a restart of the agent a caller attaches to its job again. What
may block (fsync of a job's journal entries) runs in a thread: a thousand callers cannot keep the loop from the
services.
"""

from __future__ import annotations

import asyncio
import contextlib
import grp
import os
import signal
import socket
from pathlib import Path
from typing import Any

import msgspec
import structlog

from colocate.actuate.restore import kill_below, thaw_below
from colocate.actuate.tier import Placement, check_job_name
from colocate.agent.loop import Agent, Tick
from colocate.agent.peer import Peer, check_child, identify
from colocate.agent.registry import Job, Wanted
from colocate.cgroup.tree import has_ended, inodes_of, joined, processes_anywhere, start_time
from colocate.decide.pipeline import OFF_FROZEN, OFF_UNMANAGED
from colocate.errors import BadInput, ColocateError
from colocate.observe.cgroup import oom_kills
from colocate.policy.schema import SIGNALS
from colocate.units import format_bytes

log = structlog.get_logger()
OPS = ("arm", "attach", "run", "checkpointed", "progress", "ended", "explain", "records", "status")
GROUP = "colocate"
CONNECTIONS_A_USER = 512
CARDS_SECONDS = 5.0
"""For so long a job that asks for watts waits for an agent that has just begun to know its GPUs."""
ARM_LATE_SECONDS = 10.0
"""An evaluation whose caller does not say in time how it goes on is ended."""


class RunRequest(Wanted, kw_only=True, forbid_unknown_fields=True):
    """The line that asks for it."""

    op: str
    pid: int


class ArmRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The line that begins an evaluation's window."""

    op: str
    arm: str = ""
    seconds: float = 0.0
    """How long the window is."""


class JobServer:
    """Serves the socket for one agent."""

    def __init__(self, agent: Agent, path: Path) -> None:
        self._agent, self.path = agent, path
        self._server: asyncio.Server | None = None
        self._connections: dict[str, asyncio.StreamWriter] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._serving: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._callers: dict[asyncio.Task[None], int] = {}
        self._closing = False
        self._taken: set[str] = set()
        """Names of jobs that are just being placed."""
        self._placing = asyncio.Lock()
        self._evaluating: asyncio.StreamWriter | None = None
        self._arm_until = 0.0
        agent.on_evicted.append(self._tell_evicted)
        agent.on_tick.append(self._reap)

    @property
    def busy(self) -> bool:
        """Whether a job is known or is being cleaned up."""
        return bool(self._agent.registry.jobs or self._ending or self._taken)

    async def start(self) -> None:
        """Listen; a socket that nobody listens on any more is replaced. Raises BadInput if the path cannot be used."""
        self._refuse_if_alive()
        old = os.umask(0o117)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
            self._server = await asyncio.start_unix_server(self._serve, str(self.path))
        except OSError as error:
            raise BadInput(f"the socket {self.path} cannot be made: {error}") from error
        finally:
            os.umask(old)
        with contextlib.suppress(KeyError, PermissionError):
            os.chown(self.path, -1, grp.getgrnam(GROUP).gr_gid)

    def _refuse_if_alive(self) -> None:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(str(self.path))
            except (TimeoutError, BlockingIOError):
                pass  # somebody listens, but hangs
            except OSError:
                return
        raise BadInput(f"another agent answers on {self.path}: stop it first, or give another --socket")

    async def close(self) -> None:
        """Stop listening; jobs go on."""
        self._closing = True
        for writer in self._serving.values():
            # Its task ends by itself then. Not cancel(): asyncio would report it. Not close(): a client that does not
            # read what was sent to it would keep us from undoing.
            writer.transport.abort()
        for task in self._ending:
            task.cancel()
        if self._server is not None:
            self._server.close()
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()
        await asyncio.gather(*self._serving, *self._ending, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving[task] = writer
        job = ""
        try:
            sock: socket.socket = writer.get_extra_info("socket")
            peer = identify(sock, self._agent.port)
            self._callers[task] = peer.uid
            if peer.uid and list(self._callers.values()).count(peer.uid) > CONNECTIONS_A_USER:
                writer.write(msgspec.json.encode({"error": f"over {CONNECTIONS_A_USER} connections of yours"}) + b"\n")
                return  # one user must not use up the descriptors of everybody's agent
            while line := await reader.readline():
                try:
                    answer = await self._answer(line, peer, writer, job)
                except (ColocateError, msgspec.MsgspecError) as error:
                    answer = {"error": str(error)}
                except OSError as error:
                    answer = {"error": f"the kernel refused: {error.strerror}"}
                if answer.get("job"):
                    job = str(answer["job"])
                    self._connections[job] = writer
                writer.write(msgspec.json.encode(answer) + b"\n")
                await writer.drain()
        except (ConnectionError, BadInput, ValueError):
            pass
        finally:
            self._serving.pop(task, None)
            self._callers.pop(task, None)
            if self._evaluating is writer:
                self._set_arm("", None)  # an evaluation ends with its caller, however that ended
            if job:
                self._connections.pop(job, None)
                self._end(job)
            writer.close()

    async def _answer(self, line: bytes, peer: Peer, writer: asyncio.StreamWriter, job: str) -> dict[str, Any]:
        """The answer to one request; `job` is the one that this connection runs."""
        request = msgspec.json.decode(line, type=dict[str, Any])
        op = request.get("op")
        if op == "run":
            return await self._run(msgspec.convert(request, RunRequest), peer, job)
        if op == "attach":
            return self._attach(str(request.get("job")), peer, job)
        if op == "checkpointed":
            known = self._of_peer(request, peer)
            last = self._agent.last
            seen = last.snapshot.workloads.get(f"job:{known.name}") if last is not None else None
            self._agent.registry.checkpointed(known, round(self._agent.clock.monotonic(), 3), seen)
            self._agent.wake(f"checkpoint of {known.name}")  # whoever waits for it loses work meanwhile
            return {"ok": True}
        if op == "progress":
            known, ratio = self._of_peer(request, peer), request.get("ratio")
            if not isinstance(ratio, int | float) or not 0.0 <= ratio <= 1.0:
                raise BadInput(f"ratio {ratio!r}: how much of the work is done is 0 to 1")
            self._agent.registry.progressed(known, float(ratio), round(self._agent.clock.monotonic(), 3))
            return {"ok": True}
        if op == "ended":
            return self._ended(job)
        if op == "explain":
            return {**self._agent.explain(), "jobs": msgspec.to_builtins(list(self._agent.registry.jobs.values()))}
        if op == "status":
            return self._status()
        if op == "records":
            if peer.uid not in (0, os.geteuid()):
                raise BadInput("records show every workload of the node: only root or the agent's user may read them")
            return {"lines": [line.decode() for line in self._agent.recorder.recent]}
        if op == "arm":
            return self._arm(msgspec.convert(request, ArmRequest), peer, writer)
        raise BadInput(f"unknown op {op!r}; known: {', '.join(OPS)}")

    def _of_peer(self, request: dict[str, Any], peer: Peer) -> Job:
        """The job that a request names. Raises BadInput where the peer has none of that name."""
        known = self._agent.registry.jobs.get(str(request.get("job")))
        if known is None or peer.uid not in (0, known.uid):
            raise BadInput(f"no job {request.get('job')!r} of yours")
        return known

    def _ended(self, name: str) -> dict[str, Any]:
        """Whether the kernel's OOM killer was at work in a job, and by which limit."""
        job, port = self._agent.registry.jobs.get(name), self._agent.port
        if job is None:
            return {"oom_kills": 0}
        kills, own_limit = oom_kills(port, job.path, inodes_of(port, job.path))
        why = "the tier or the node was out of memory"
        if own_limit and job.memory_bytes:
            why = f"over its --memory of {format_bytes(job.memory_bytes)}"
        return {"oom_kills": kills, "why": why}

    def _status(self) -> dict[str, Any]:
        agent = self._agent
        last = agent.last
        return {
            "pid": os.getpid(),
            "node_root": agent.policy.spec.node_root,
            "policy": agent.policy.metadata.name,
            "tier": agent.observer.tree.tier_path,
            "state_dir": str(agent.state.path) if agent.state is not None else "",
            "cgroup_version": agent.port.layout.version,
            "shadow": agent.shadow,
            "ticks": last.snapshot.sequence if last else 0,
            "age_seconds": agent.clock.monotonic() - last.snapshot.monotonic_seconds if last else None,
            "jobs": len(agent.registry.jobs),
            "problems": agent.problems(),
            "records": agent.recorder.degraded or "ok",
            "journal": agent.journal.broken or "ok",
        }

    def _arm(self, request: ArmRequest, peer: Peer, writer: asyncio.StreamWriter) -> dict[str, Any]:
        """An evaluation's window begins; the empty arm ends the evaluation."""
        arm = request.arm
        if self._agent.shadow and arm:
            raise BadInput("the agent runs with --shadow and writes nothing, so both arms would be the same")
        if peer.uid not in (0, os.geteuid()):
            raise BadInput("an evaluation changes the node for everybody: only root or the agent's user may start one")
        if arm not in ("", "on", OFF_FROZEN, OFF_UNMANAGED):
            raise BadInput(f"unknown arm {arm!r}")
        if self._evaluating not in (None, writer):
            raise BadInput("another evaluation is running")
        self._set_arm(arm, writer if arm else None)
        self._arm_until = self._agent.clock.monotonic() + request.seconds + ARM_LATE_SECONDS
        return {"ok": True}

    def _set_arm(self, arm: str, writer: asyncio.StreamWriter | None) -> None:
        self._evaluating = writer
        self._agent.recorder.arm = arm
        self._agent.recorder.window += 1
        self._agent.wake(f"evaluation arm {arm}")

    def _attach(self, name: str, peer: Peer, running: str) -> dict[str, Any]:
        """The caller of a job of before our restart is there again."""
        known = self._agent.registry.jobs.get(name)
        if known is None or peer.uid not in (0, known.uid):
            raise BadInput(f"no job {name!r} of yours")
        if running or name in self._connections:
            raise BadInput(f"the job {name!r} has its caller")
        if check_child(self._agent.port, peer, known.pid) != known.start_time:
            raise BadInput(f"process {known.pid} is another by now")
        return {"job": name, "path": known.path, "evicted": known.evicted}

    async def _run(self, request: RunRequest, peer: Peer, running: str) -> dict[str, Any]:
        agent = self._agent
        if agent.shadow:
            raise BadInput("the agent runs with --shadow and writes nothing, so it cannot take a job")
        name = check_job_name(request.name or f"job-{request.pid}")
        if peer.uid not in (0, os.geteuid()):
            name = check_job_name(f"{name}.{peer.uid}")  # names of one user are no business of another's
        if name in agent.registry.jobs or name in self._taken:
            known = agent.registry.jobs.get(name)
            raise BadInput(f"--name {name!r} is taken by a running job" + (f" (pid {known.pid})" if known else ""))
        if request.checkpoint_signal not in ("", *SIGNALS):
            what = f"--checkpoint-signal {request.checkpoint_signal!r}"
            raise BadInput(f"{what} is no signal that a job can handle; known: {', '.join(SIGNALS)}")
        if running:
            raise BadInput(f"this connection runs {running!r} already: a job ends with its own connection")
        start = check_child(agent.port, peer, request.pid)
        self._taken.add(name)
        try:
            if request.power_watts is not None or request.max_slowdown is not None:
                await agent.watts.read(CARDS_SECONDS)
            because = ""
            if request.max_slowdown is not None:
                class_, visible = request.power_class, request.visible_gpus
                request.power_watts, because = agent.watts.of_outcome(request.max_slowdown, class_, visible)
            async with self._placing:
                placement = await asyncio.to_thread(self._place, name, request, start)
        finally:
            self._taken.discard(name)
        agent.registry.add(
            Job(
                **{**{f: getattr(request, f) for f in Wanted.__struct_fields__}, "name": name},
                path=placement.path,
                uid=peer.uid,
                pid=request.pid,
                start_time=start,
                started_seconds=round(agent.clock.monotonic(), 3),
            )
        )
        agent.wake(f"job {name}")
        log.info("job_started", job=name, uid=peer.uid, pid=request.pid, path=placement.path, by_pidfd=peer.by_pidfd)
        return {"job": name, "path": placement.path, "capped": because}

    def _place(self, name: str, request: RunRequest, start: int) -> Placement:
        """Make the job's directory and move its process there; runs in a thread."""
        tier = self._agent.tier
        placement = tier.ensure_job(name)
        try:
            if request.memory_bytes is not None:
                tier.set_job_knob(placement, "memory.max", str(request.memory_bytes))
            if request.power_watts is not None:
                watts = self._agent.watts
                watts.before_job(name, placement.path, request.power_watts, request.visible_gpus)
            tier.move(request.pid, placement, start)
        except (OSError, BadInput):
            self._agent.watts.ended(f"job:{name}", placement.path)
            tier.remove_job(placement.path)
            raise
        return placement

    def _tell_evicted(self, job: Job) -> None:
        writer = self._connections.get(job.name)
        log.warning("job_evicted", job=job.name, why=job.evicted)
        if writer is not None:
            writer.write(msgspec.json.encode({"evicted": job.evicted}) + b"\n")

    def _reap(self, _tick: Tick) -> None:
        """End jobs that have no caller any more (their connection was to a predecessor)."""
        if self._evaluating is not None and self._agent.clock.monotonic() > self._arm_until:
            log.warning("evaluation_overdue", arm=self._agent.recorder.arm)  # its caller is stopped, say by ctrl-Z
            self._set_arm("", None)
        for name, job in list(self._agent.registry.jobs.items()):
            if name not in self._connections and start_time(self._agent.port, job.pid) != job.start_time:
                self._end(name)

    def _end(self, name: str) -> None:
        job = self._agent.registry.jobs.get(name)
        if self._closing:
            return  # the connection closed because we end, not because the job's caller did
        if job is not None and not any(t.get_name() == name for t in self._ending):
            task = asyncio.create_task(self._clean(job), name=name)
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

    async def _clean(self, job: Job) -> None:
        """What the job left: SIGTERM, the grace period, SIGKILL; then its directories."""
        agent, port = self._agent, self._agent.port

        def left() -> set[int]:
            return processes_anywhere(port, job.path)

        if start_time(port, job.pid) == job.start_time and not has_ended(port, job.pid) and not left():
            agent.registry.remove(job.name)
            return
        if left():
            thaw_below(port, job.path)
            for pid in left():
                port.kill(pid, signal.SIGTERM)
            deadline = agent.clock.monotonic() + agent.policy.spec.memory.termination_grace
            while left() and agent.clock.monotonic() < deadline:
                await asyncio.sleep(0.05)
        while left():
            kill_below(port, job.path, inodes_of(port, job.path))
            await asyncio.sleep(0.05)
        while not agent.tier.remove_job(joined(job.path)):
            await asyncio.sleep(0.05)
        agent.registry.remove(job.name)
        agent.watts.ended(f"job:{job.name}", job.path)
        agent.forget_made(job.path)
        log.info("job_ended", job=job.name)
