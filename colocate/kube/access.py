"""Who we are to an API server, and how it is reached: what a client needs of a kubeconfig or of a pod's account."""

from __future__ import annotations

import asyncio
import os
import ssl
from pathlib import Path
from typing import Any, Protocol

import aiohttp

CONNECTIONS = 160
"""A few more than the controller has writes under way."""
BUFFER_BYTES = 2 << 20
"""Of a connection; a line of a watch may have twice as much."""
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TOKEN_SECONDS = 60.0
"""A bound token lives for an hour, and kubelet writes another into the file before (KEP-1205)."""


class Access(Protocol):
    """A way to one API server."""

    @property
    def server(self) -> str:
        """Its URL, without a path."""

    @property
    def namespace(self) -> str:
        """Where commands look if none is named; empty if nothing says."""

    @property
    def options(self) -> dict[str, Any]:
        """What is told with every request: a proxy, a name for TLS."""

    def session(self) -> aiohttp.ClientSession:
        """The pool of connections; to be called where a loop runs."""

    async def authorize(self, headers: dict[str, str]) -> None:
        """Add who we are."""

    async def renew(self) -> None:
        """The server does not know us any more: find out anew who we are. May raise anything."""

    async def close(self) -> None:
        """Let the connections go."""


class ServiceAccount:
    """A pod's own: a token, a certificate and two variables, without the library that reads kubeconfigs.

    That takes 20 MiB for the models of its other client, on every node.
    """

    def __init__(self, folder: Path) -> None:
        """Raises KeyError, OSError, ssl.SSLError."""
        host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
        self.server = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
        self._folder, self._token, self._read_at = folder, "", float("-inf")
        self._tls = ssl.create_default_context(cafile=str(folder / "ca.crt"))
        self.options: dict[str, Any] = {}
        file = folder / "namespace"
        self.namespace = file.read_text().strip() if file.exists() else ""
        self._session: aiohttp.ClientSession | None = None

    def session(self) -> aiohttp.ClientSession:
        """See Access."""
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=CONNECTIONS, ssl=self._tls)
            self._session = aiohttp.ClientSession(connector=connector, trust_env=False, read_bufsize=BUFFER_BYTES)
        return self._session

    async def authorize(self, headers: dict[str, str]) -> None:
        """See Access. Raises OSError."""
        if asyncio.get_running_loop().time() - self._read_at >= TOKEN_SECONDS:
            await self.renew()
        headers["Authorization"] = f"Bearer {self._token}"

    async def renew(self) -> None:
        """See Access. Raises OSError."""
        self._token = (self._folder / "token").read_text().strip()
        self._read_at = asyncio.get_running_loop().time()

    async def close(self) -> None:
        """See Access."""
        if self._session is not None:
            await self._session.close()
