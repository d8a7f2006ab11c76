"""A proxy in front of the API server that can hurt requests: the ways in which a network and a server fail."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

import aiohttp
from aiohttp import web

from colocate.localcluster.controlplane import ControlPlane

BEHIND_SECONDS = 1.5
WRITES = ("POST", "PUT", "PATCH", "DELETE")


class Request(NamedTuple):
    """One request as the proxy sees it."""

    number: int
    """Among the writes, from 0; -1 for a read, and for what is about the lease."""
    method: str
    path: str
    query: str
    reads: int
    """How many requests that are no writes came before."""


Fault = Callable[[Request], Awaitable[str]]
"""What to do with a request: `pass`; `drop` it unseen; `act` on it and drop the answer; ask `twice`; `echo` each line
of the answer; send a watch `back`: what was told of it before comes again, first how all objects began, a moment later
the rest; or answer a status."""


async def healthy(_: Request) -> str:
    return "pass"


class Hold:
    """A fault that holds back the requests whose path ends so, until they are released."""

    def __init__(self, end: str) -> None:
        self._end = end
        self.held, self.release = asyncio.Event(), asyncio.Event()

    async def __call__(self, request: Request) -> str:
        if request.path.endswith(self._end):
            self.held.set()
            await self.release.wait()
        return "pass"


class Proxy:
    """Listens on loopback while it is entered."""

    def __init__(self, plane: ControlPlane, directory: Path) -> None:
        self._plane, self._directory = plane, directory
        self.fault: Fault = healthy
        self.answers: list[tuple[Request, int]] = []
        self._writes = self._reads = 0
        self._streams: list[web.Request] = []
        self._told: dict[str, list[bytes]] = {}
        """Path -> the lines of its watches so far."""
        self.port = 0

    async def __aenter__(self) -> Proxy:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        timeout = aiohttp.ClientTimeout(total=None)
        connector = aiohttp.TCPConnector(ssl=context, limit=0)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False)
        app = web.Application(client_max_size=1 << 26)
        app.router.add_route("*", "/{path:.*}", self._forward)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.port = int(self._runner.addresses[0][1])
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()
        await self._session.close()

    def kubeconfig(self) -> Path:
        config = json.loads(self._plane.kubeconfig().read_text())
        config["clusters"][0]["cluster"] = {"server": f"http://127.0.0.1:{self.port}"}
        path = self._directory / "proxy.kubeconfig"
        path.write_text(json.dumps(config))
        return path

    async def _forward(self, incoming: web.Request) -> web.StreamResponse:
        number = -1
        if incoming.method in WRITES and "/leases" not in incoming.path:
            number, self._writes = self._writes, self._writes + 1
        request = Request(number, incoming.method, incoming.path, incoming.query_string, self._reads)
        self._reads += number < 0
        body = await incoming.read()
        what = await self.fault(request)
        if what == "drop":
            return self._cut(incoming)
        if what.isdigit():
            reason = {"400": "BadRequest", "410": "Expired", "429": "TooManyRequests", "500": "InternalError"}[what]
            busy = {"Retry-After": "1"} if what == "429" else {}
            return web.json_response(
                {"kind": "Status", "code": int(what), "reason": reason}, status=int(what), headers=busy
            )
        for _ in range(2 if what == "twice" else 1):
            answer = await self._ask(incoming, body)
        async with answer:
            self.answers.append((request, answer.status))
            if what == "act":
                return self._cut(incoming)
            response = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.content_type})
            await response.prepare(incoming)
            self._streams.append(incoming)
            try:
                if what == "back":
                    await self._tell_again(response, request.path)
                if "watch=true" in request.query:
                    async for line in answer.content:
                        self._told.setdefault(request.path, []).append(line)
                        await response.write(line * (2 if what == "echo" else 1))
                async for chunk in answer.content.iter_any():
                    await response.write(chunk)
            except ConnectionError:
                return response  # the client has gone, or its stream was cut
            finally:
                self._streams.remove(incoming)
            return response

    async def _tell_again(self, response: web.StreamResponse, path: str) -> None:
        """What a server says that is behind, and then catches up."""
        lines = [line for line in self._told.get(path, []) if not line.startswith(b'{"type":"BOOKMARK"')]
        began = [line for line in lines if line.startswith(b'{"type":"ADDED"')]
        await response.write(b"".join(began))
        await asyncio.sleep(BEHIND_SECONDS)
        await response.write(b"".join(lines))

    def cut_streams(self) -> None:
        """Every answer that is still on its way breaks."""
        for incoming in list(self._streams):
            if incoming.transport is not None:
                incoming.transport.abort()

    async def _ask(self, incoming: web.Request, body: bytes) -> aiohttp.ClientResponse:
        url = f"https://127.0.0.1:{self._plane.port}{incoming.raw_path}"
        kept = {k: v for k, v in incoming.headers.items() if k in ("Authorization", "Content-Type", "Accept")}
        return await self._session.request(incoming.method, url, data=body or None, headers=kept)

    def _cut(self, incoming: web.Request) -> web.StreamResponse:
        """The connection ends without an answer."""
        if incoming.transport is not None:
            incoming.transport.abort()
        raise asyncio.CancelledError
