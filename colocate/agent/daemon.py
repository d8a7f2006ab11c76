"""The agent as a long-running program: lock, socket, HTTP, signals, hot reload, and an end in order."""

from __future__ import annotations

import asyncio
import os
import platform
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from colocate.actuate.guardian import Guardian
from colocate.actuate.journal import Journal, boot_id
from colocate.actuate.restore import Report
from colocate.actuate.statedir import Lock, StateDirectory
from colocate.actuate.units import units_folder
from colocate.agent.loop import Agent, Tick
from colocate.agent.node_power import PowerWatch
from colocate.agent.numba_cache import load_compiled, prepare
from colocate.agent.policies import Policies
from colocate.agent.socket import JobServer
from colocate.calibrate.measure import ensure_calibration, load_calibration
from colocate.cgroup.port import KernelPort
from colocate.errors import BadInput, ColocateError
from colocate.model import kernels
from colocate.observe.energy import Account, read_users
from colocate.policy.schema import ColocationPolicy
from colocate.report.record import Recorder

if TYPE_CHECKING:
    from aiohttp import web

    from colocate.agent.publisher import Publisher
    from colocate.report.metrics import Status

log = structlog.get_logger()
EMBEDDED_LINGER_SECONDS = 3.0
NRI_INDEX = "90"
"""Late among the runtime's plugins: what others decide of a container's resources is kept."""


def notify_systemd(message: str) -> None:
    """sd_notify(3), when run as a unit of Type=notify."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(message.encode(), "\0" + address[1:] if address.startswith("@") else address)


class Service:
    """Everything around the Agent."""

    def __init__(
        self,
        policy: ColocationPolicy,
        state_dir: Path,
        runtime: Path,
        socket_path: Path,
        *,
        policy_path: Path | None = None,
        shadow: bool = False,
        embedded: bool = False,
        handover: bool = False,
        nri: str = "",
        node: str = "",
    ) -> None:
        self._policy, self._policy_path, self._runtime, self._socket_path = policy, policy_path, runtime, socket_path
        self._shadow, self._embedded, self._handover = shadow, embedded, handover
        self._nri, self._node = nri, node
        self._state = StateDirectory(state_dir)
        self._state_lock = Lock(state_dir, "state")
        try:
            self._lock = Lock(runtime, policy.spec.node_root)
        except ColocateError:
            self._state_lock.release()
            raise
        self._drifts, self._compiles = 0, False
        self.stop = asyncio.Event()

    def _make_agent(self) -> Agent:
        port = KernelPort()
        policy, state = self._policy, self._state
        if all(port.inode(h, policy.spec.node_root) is None for h in port.layout.mounts):
            raise BadInput(f"$.spec.nodeRoot: there is no cgroup {policy.spec.node_root} on this host")
        self._compiles = prepare(state.path)
        recorder = Recorder(state.path / "records", policy.spec.records, "numpy", threaded=True)
        root = policy.spec.node_root
        guardian = None if self._shadow else Guardian(state.path, self._runtime, root)
        agent = Agent(
            port,
            policy,
            kernels.load(jit=False),
            Journal(state.path, boot_id()),
            state=state,
            calibration=load_calibration(state, port),
            recorder=recorder,
            guardian=guardian,
            shadow=self._shadow,
        )
        agent.tier.holds_pods = bool(self._nri)
        agent.tier.units = units_folder() if self._nri else None
        return agent

    def _status(self, agent: Agent, power: PowerWatch) -> Status:
        from colocate.report.metrics import Status

        last = agent.last
        return Status(
            snapshot=last.snapshot if last else None,
            forecast=last.forecast if last else None,
            plan=last.plan if last else None,
            tick_seconds=last.seconds if last else 0.0,
            age_seconds=agent.clock.monotonic() - last.snapshot.monotonic_seconds if last else 0.0,
            period_seconds=agent.policy.spec.tick,
            actions=agent.counts,
            vanished=agent.observer.vanished,
            lost_records=agent.recorder.lost_lines,
            journal_broken=bool(agent.journal.broken),
            drifts=self._drifts,
            explanation=agent.explain,
            energy=power.energy.account if agent.policy.spec.power.attribution else Account(),
            card_energy=agent.card_energy,
            pods=agent.observer.lister.pods,
            node=self._node or platform.node(),
        )

    async def _compile(self, agent: Agent) -> None:
        """Let the compiled kernels take over from their numpy twins: protection does not wait for them."""
        if not self._compiles:
            return
        agent.warming = True
        try:
            agent.set_kernels(await asyncio.to_thread(load_compiled), "numba")
        except Exception:
            log.exception("kernels_not_compiled", effect="the numpy twins stay")
        finally:
            agent.warming = False

    async def _linger(self, server: JobServer) -> None:
        """An embedded agent ends when nobody has needed it for a while."""
        idle = 0.0
        while idle < EMBEDDED_LINGER_SECONDS:
            await asyncio.sleep(0.25)
            idle = 0.0 if server.busy else idle + 0.25
        self.stop.set()

    async def run(self) -> Report:
        """Until SIGTERM or SIGINT (or, embedded, until the last job has ended); the undo's report."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop.set)
        # The policy is read again by itself when it changes; a terminal that closes ends what was started on it.
        loop.add_signal_handler(signal.SIGHUP, self.stop.set if os.isatty(0) else lambda: log.info("hangup_ignored"))
        try:
            agent = self._make_agent()
            return await self._run(agent)
        finally:
            self._state_lock.release()
            self._lock.release()

    async def _run(self, agent: Agent) -> Report:
        report = agent.open()
        if not report.clean or report.restored:
            log.info("undone", restored=report.restored, occupied=report.occupied, failed=report.failed)
        if not self._embedded and not self._shadow:
            agent.calibration = await ensure_calibration(self._state, agent.port, self._policy)
        agent.on_tick.append(self._count)
        policies = Policies(agent, self._policy_path)
        power = self._power_watch(agent)
        publisher = self._publisher(agent, policies, power)
        server = JobServer(agent, self._socket_path)
        runner: web.AppRunner | None = None
        report = Report()
        try:
            await server.start()
            await agent.tick()  # protection first: the HTTP server's imports alone take a tenth of a second
            if agent.policy.spec.http.enabled and not self._embedded:
                runner = await self._serve_http(agent, power)
            notify_systemd("READY=1")
            async with asyncio.TaskGroup() as tasks:
                others = [tasks.create_task(policies.watch_file()), tasks.create_task(self._compile(agent))]
                if self._embedded:
                    others.append(tasks.create_task(self._linger(server)))
                if publisher is not None:
                    others.append(tasks.create_task(publisher.run()))
                if self._nri:
                    others.append(tasks.create_task(self._place_pods(agent)))
                await agent.run(self.stop)
                for task in others:
                    task.cancel()
        finally:
            notify_systemd("STOPPING=1")
            try:
                await server.close()
                if runner is not None:
                    await runner.cleanup()
                await power.settle()
                if publisher is not None:
                    await publisher.stopped()
            finally:
                # Only an end that was asked for is a handover; a crash must be undone.
                report = await agent.close(handover=self._handover and self.stop.is_set())
        return report

    def _publisher(self, agent: Agent, policies: Policies, power: PowerWatch) -> Publisher | None:
        if not self._node:
            return None
        from colocate.agent.publisher import Publisher

        return Publisher(agent, policies, self._node, power, shadow=self._shadow)

    def _power_watch(self, agent: Agent) -> PowerWatch:
        port = KernelPort()  # of its own: it reads beside the tick
        power = PowerWatch(
            lambda: agent.policy.spec.power, agent.state, users=lambda: read_users(port, agent.observer.tree)
        )
        agent.on_tick.append(lambda tick: power.look(tick.snapshot))
        return power

    async def _place_pods(self, agent: Agent) -> None:
        """Be asked by the container runtime where a pod's containers go."""
        from colocate.agent.lending import Lending
        from colocate.agent.placement import Placement
        from colocate.nri import Plugin

        observer = agent.observer
        ensure = agent.tier.ensure_tier
        lending = Lending(
            lambda: (agent.last.snapshot if agent.last is not None else None, agent.policy.spec),
            lambda: set(observer.lister.pods),
        )
        placement = Placement(
            agent.port,
            lambda: observer.tree,
            observer.lister,
            ensure,
            shadow=self._shadow,
            lend=lending.lend,
            watts=agent.watts,
        )
        await Plugin("colocate", NRI_INDEX, placement, self._nri).run()

    async def _serve_http(self, agent: Agent, power: PowerWatch) -> web.AppRunner:
        """/metrics, /healthz, /readyz and /debug/plan. Raises BadInput if the port cannot be used."""
        from aiohttp import web

        from colocate.report.metrics import make_application

        http = agent.policy.spec.http
        runner = web.AppRunner(make_application(lambda: self._status(agent, power)), access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, http.host, http.port).start()
        except OSError as error:
            await runner.cleanup()
            raise BadInput(f"$.spec.http.port: {http.host}:{http.port} cannot be used: {error.strerror}") from error
        return runner

    def _count(self, tick: Tick) -> None:
        self._drifts += len(tick.drifts)
        if "WATCHDOG_USEC" in os.environ:
            notify_systemd("WATCHDOG=1")
