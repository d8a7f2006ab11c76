"""controller, queue: the commands about a cluster."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import uuid
from datetime import UTC, datetime
from typing import Any

import msgspec
import structlog

from colocate.cli.host import configure_logs
from colocate.cli.output import DATA_FORMS, print_data, print_table
from colocate.errors import BadInput
from colocate.kube.client import LEASES, PLANS, Api, path_of
from colocate.kube.lease import Election, LeadershipLost
from colocate.objects import GangPlan, Lease
from colocate.podgroup.controller import Controller
from colocate.podgroup.entries import Settings
from colocate.units import format_duration

UPSTREAM = "scheduler-plugins-scheduler"
UPSTREAM_LEASES = (UPSTREAM, "sig-scheduling")
log = structlog.get_logger()


class _Leases(msgspec.Struct):
    items: list[Lease]


class _Plans(msgspec.Struct):
    items: list[GangPlan]


def controller(options: argparse.Namespace) -> int:
    """Lead, or wait to; until SIGTERM."""
    configure_logs()
    return asyncio.run(_controller(options))


async def _controller(options: argparse.Namespace) -> int:
    names = {options.scheduler_name, *options.also_answer_to}
    settings = Settings(schedulers=frozenset(names), timeout_seconds=options.timeout)
    identity = f"{os.environ.get('POD_NAME') or socket.gethostname()}_{uuid.uuid4().hex[:8]}"
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with Api.connect(options.kubeconfig, options.context) as api:
        if UPSTREAM in names:
            await _refuse_beside_upstream(api)
        while not stop.is_set():
            election = Election(api, options.lease_namespace, options.lease_name, identity, options.lease_duration)
            leading = asyncio.ensure_future(election.lead(Controller(api, settings, election).run))
            stopped = asyncio.ensure_future(stop.wait())
            await asyncio.wait([leading, stopped], return_when=asyncio.FIRST_COMPLETED)
            stopped.cancel()
            leading.cancel()
            try:
                await leading
            except asyncio.CancelledError:
                continue
            except LeadershipLost as lost:
                log.warning("leadership_lost", error=str(lost))
    return 0


async def _refuse_beside_upstream(api: Api) -> None:
    """Two schedulers of one name would split gangs between them."""
    for lease in msgspec.json.decode(await api.request("GET", LEASES), type=_Leases).items:
        meta, spec = lease.metadata, lease.spec
        alive = bool(spec.holder_identity) and _age(spec.renew_time) < (spec.lease_duration_seconds or 15)
        if meta.name in UPSTREAM_LEASES and alive:
            raise BadInput(
                f"--also-answer-to {UPSTREAM}: that scheduler is alive (lease {meta.namespace}/{meta.name}, held by "
                f"{spec.holder_identity}); stop it first"
            )


def _age(text: str | None) -> float:
    """Seconds since a time of the API server; for ever if it is not known."""
    return (datetime.now(UTC) - datetime.fromisoformat(text)).total_seconds() if text else float("inf")


def queue(options: argparse.Namespace) -> int:
    """The gangs that wait, in their order."""
    return asyncio.run(_queue(options))


async def _queue(options: argparse.Namespace) -> int:
    async with Api.connect(options.kubeconfig, options.context) as api:
        path = path_of(PLANS, options.namespace) if options.namespace else PLANS
        plans = msgspec.json.decode(await api.request("GET", path), type=_Plans).items
    waiting = [p for p in plans if p.status.phase == "Waiting" and p.status.reason]
    waiting.sort(key=lambda p: (p.status.position or 1 << 30, p.status.waiting_since or "", p.metadata.name))
    if options.output in DATA_FORMS:
        print_data([_row(p) for p in waiting], options.output)
        return 0
    rows = [
        (
            str(p.status.position or "-"),
            p.metadata.namespace,
            p.metadata.name,
            format_duration(_age(p.status.waiting_since)),
            p.status.reason,
            p.status.message,
        )
        for p in waiting
    ]
    print_table(("position", "namespace", "podgroup", "waiting", "reason", "message"), rows)
    return 0


def _row(plan: GangPlan) -> dict[str, Any]:
    status = plan.status
    return {
        "position": status.position,
        "namespace": plan.metadata.namespace,
        "podgroup": plan.metadata.name,
        "waiting_since": status.waiting_since,
        "reason": status.reason,
        "message": status.message,
    }
