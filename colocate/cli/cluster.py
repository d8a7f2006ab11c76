"""publish: the command above nodes."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import uuid

import structlog

from colocate.cli.logs import configure_logs
from colocate.cluster.publication import Publication
from colocate.errors import ColocateError
from colocate.kube.client import Api
from colocate.kube.lease import Election

log = structlog.get_logger()


def publish(options: argparse.Namespace) -> int:
    """Lead, or wait to; until SIGTERM."""
    configure_logs()
    return asyncio.run(_publish(options))


async def _publish(options: argparse.Namespace) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    identity = f"{os.environ.get('POD_NAME') or socket.gethostname()}_{uuid.uuid4().hex[:8]}"
    async with Api.connect(options.kubeconfig, options.context) as api:
        while not stop.is_set():
            election = Election(api, options.lease_namespace, options.lease_name, identity, options.lease_duration)
            leading = asyncio.ensure_future(election.lead(Publication(api, election).run))
            stopped = asyncio.ensure_future(stop.wait())
            await asyncio.wait([leading, stopped], return_when=asyncio.FIRST_COMPLETED)
            stopped.cancel()
            leading.cancel()
            try:
                await leading
            except asyncio.CancelledError:
                continue
            except ColocateError as lost:
                log.warning("leadership_lost", error=str(lost))
                await asyncio.sleep(1.0)
    return 0
