"""An API server by a kubeconfig, as `kubernetes.aio` reads it: exec plugins, OIDC, client certificates, proxies."""

from __future__ import annotations

from typing import Any

import aiohttp
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration
from kubernetes.aio.config import list_kube_config_contexts, load_kube_config

from colocate.kube.access import CONNECTIONS


class Kubeconfig:
    """See Access."""

    def __init__(self, path: str | None, context: str | None) -> None:
        """To be opened before it is used; `path` None: `~/.kube/config`."""
        self._path, self._context = path, context
        self._configuration = Configuration()
        self._client: ApiClient
        self.options: dict[str, Any] = {}
        self.server = self.namespace = ""

    async def open(self) -> None:
        """Raises ValueError, and whatever the library and its plugins raise."""
        configuration = self._configuration
        await self.renew()
        if not configuration.host.startswith(("http://", "https://")):
            raise ValueError(f"cluster.server is {configuration.host!r}, not a URL")
        configuration.connection_pool_maxsize = CONNECTIONS
        configuration.client_session_kwargs = {"trust_env": False}  # a proxy of the environment is not for this traffic
        configuration.retries = None
        self._client = ApiClient(configuration)
        rest = self._client.rest_client
        if configuration.tls_server_name:
            self.options["server_hostname"] = configuration.tls_server_name
        if rest.proxy:
            self.options |= {"proxy": rest.proxy, "proxy_headers": rest.proxy_headers or None}
        contexts, active = list_kube_config_contexts(self._path)  # type: ignore[no-untyped-call]
        chosen = next((c for c in contexts if c["name"] == self._context), active)
        self.server, self.namespace = configuration.host, str(chosen["context"].get("namespace") or "")

    def session(self) -> aiohttp.ClientSession:
        """The library's; its own `request` would take every body apart and encode it more slowly."""
        rest = self._client.rest_client
        if rest.pool_manager is None:
            rest.pool_manager = rest._create_pool_manager()  # noqa: SLF001 - made at the first request, which is ours
        session: aiohttp.ClientSession = rest.pool_manager
        return session

    async def authorize(self, headers: dict[str, str]) -> None:
        """See Access."""
        await self._client.update_params_for_auth(headers, [], ["BearerToken"], "", "GET", None)

    async def renew(self) -> None:
        """Read it again, which asks a plugin for a new token; those that the clouds give live for minutes."""
        await load_kube_config(self._path, self._context, self._configuration, False)  # type: ignore[no-untyped-call]

    async def close(self) -> None:
        """See Access."""
        await self._client.close()  # type: ignore[no-untyped-call]
