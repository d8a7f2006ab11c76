"""`colocate controller`: leads, or waits to, until SIGTERM; /metrics, /healthz, /readyz and /snapshot."""

from __future__ import annotations

import argparse
import asyncio
import os
from functools import partial

import msgspec
import structlog
import uvloop
from aiohttp import web

from colocate.cli.logs import configure_logs
from colocate.errors import BadInput
from colocate.kube.client import LEASES, Api, age_of
from colocate.kube.lease import Candidate, Election, identity_of, lead_until, stop_on_signals
from colocate.objects import Lease
from podgroup.api import ORDER, SCHEDULERS
from podgroup.controller.loop import Controller
from podgroup.controller.watches import now_seconds
from podgroup.policy import policy_named
from podgroup.queue.decisions import PlaceInTurn
from podgroup.queue.entry import Settings
from podgroup.queue.queue import Queue

SILENT_SECONDS, SNAPSHOT_SECONDS, SNAPSHOT_AGAIN_SECONDS = 120.0, 30.0, 5.0
UPSTREAM = "scheduler-plugins-scheduler"
UPSTREAM_LEASES = (UPSTREAM, "sig-scheduling")
log = structlog.get_logger()


def controller(options: argparse.Namespace) -> int:
    """Lead, or wait to; until SIGTERM."""
    configure_logs()
    return uvloop.run(_controller(options))


async def _controller(options: argparse.Namespace) -> int:
    if options.lease_duration < 1:
        raise BadInput(f"--lease-duration: {options.lease_duration:g} s is too short: at least 1 s")
    names = {options.scheduler_name, *options.also_answer_to}
    policy_named(options.order)
    settings = Settings(
        schedulers=tuple(sorted(names)),
        policy=options.order,
        timeout_seconds=options.timeout,
        node_loss_grace_seconds=options.node_loss_grace,
    )
    stop, identity = stop_on_signals(), identity_of()
    compiling = asyncio.ensure_future(asyncio.to_thread(_compiled))  # it leads meanwhile, and decides one by one
    async with Api.connect(options.kubeconfig, options.context) as api:
        if UPSTREAM in names:
            await _refuse_beside_upstream(api)
        health = Health()
        runner = await health.serve(options.http)

        def candidate() -> Candidate:
            says = {SCHEDULERS: ",".join(settings.schedulers), ORDER: settings.policy}
            where = (options.lease_namespace, options.lease_name)
            election = Election(api, *where, identity, options.lease_duration, says)
            led = Controller(api, settings, election, compiling.result() if compiling.done() else None)
            compiling.add_done_callback(partial(_use, led.queue))
            health.controller = led
            return election, led.run

        await lead_until(stop, candidate)
        if runner is not None:
            await runner.cleanup()
    return 0


def _compiled() -> PlaceInTurn | None:
    """The compiled solver of simple gangs; None where numba is not usable, and they are decided one by one."""
    try:
        from podgroup.solve import sequence

        sequence.compile_all()
    except (ImportError, RuntimeError, OSError) as error:
        log.warning("kernels_not_compiled", error=str(error))
        return None
    return sequence.place_in_turn


def _use(queue: Queue, compiled: asyncio.Future[PlaceInTurn | None]) -> None:
    if not compiled.cancelled() and compiled.exception() is None:
        queue.place_in_turn = compiled.result()


class Health:
    """/metrics, /healthz, /readyz and /snapshot of a controller that leads or stands by."""

    def __init__(self) -> None:
        self.controller: Controller | None = None
        self._snapshot_at = float("-inf")

    async def serve(self, address: str) -> web.AppRunner | None:
        """Listen on `HOST:PORT`; nothing if that is empty. Raises BadInput."""
        if not address:
            return None
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or int(port) > 65535:
            raise BadInput(f"--http: {address!r} is not HOST:PORT")
        app = web.Application()
        pages = {
            "/metrics": self._metrics,
            "/healthz": self._healthz,
            "/readyz": self._readyz,
            "/snapshot": self._snapshot,
        }
        for path, handler in pages.items():
            app.router.add_get(path, handler)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, int(port)).start()
        except OSError as error:
            await runner.cleanup()
            raise BadInput(f"--http: {address} cannot be listened on: {os.strerror(error.errno or 0)}") from error
        return runner

    async def _metrics(self, _: web.Request) -> web.Response:
        text = self.controller.metrics.text(self.controller.queue) if self.controller is not None else b""
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _healthz(self, _: web.Request) -> web.Response:
        """A leader that decides, or somebody who stands by."""
        alive = self.controller.alive_at if self.controller is not None else None
        silent = 0.0 if alive is None else now_seconds() - alive
        return web.Response(status=200 if silent < SILENT_SECONDS else 500, text=f"last decision {silent:.1f} s ago\n")

    async def _snapshot(self, _: web.Request) -> web.Response:
        """For `colocate snapshot --from`."""
        if self.controller is None or not self.controller.synced:
            return web.Response(status=503, text="this replica stands by: ask the one that leads\n")
        now = now_seconds()
        if now - self._snapshot_at < SNAPSHOT_AGAIN_SECONDS:
            return web.Response(status=429, text=f"once in {SNAPSHOT_AGAIN_SECONDS:g} s: it looks at every gang\n")
        self._snapshot_at = now
        try:
            taken = await asyncio.wait_for(self.controller.snapshot(), SNAPSHOT_SECONDS)
        except TimeoutError:
            return web.Response(status=503, text="nothing is decided now: ask again\n")
        return web.Response(body=await asyncio.to_thread(msgspec.json.encode, taken), content_type="application/json")

    async def _readyz(self, _: web.Request) -> web.Response:
        leads = self.controller is not None and self.controller.synced
        return web.Response(text="leading\n" if leads else "standing by\n")


async def _refuse_beside_upstream(api: Api) -> None:
    """Two schedulers of one name would split gangs between them."""
    for lease in await api.all(Lease, LEASES):
        meta, spec = lease.metadata, lease.spec
        alive = bool(spec.holder_identity) and age_of(spec.renew_time) < (spec.lease_duration_seconds or 15)
        if meta.name in UPSTREAM_LEASES and alive:
            raise BadInput(
                f"--also-answer-to {UPSTREAM}: that scheduler is alive (lease {meta.namespace}/{meta.name}, held by "
                f"{spec.holder_identity}); stop it first"
            )
