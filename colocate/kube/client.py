"""Requests to an API server.

How the server is reached is another's (access.py, kubeconfig.py); bodies are lean structs, and an answer is bytes that
the caller decodes.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote, urlencode

import aiohttp
import msgspec
import structlog

from colocate.errors import BadInput, ColocateError
from colocate.kube.access import SERVICE_ACCOUNT, Access, ServiceAccount
from colocate.objects import Lean, ObjectMeta
from colocate.units import seconds_of

T = TypeVar("T")

JSON = "application/json"
MERGE = "application/merge-patch+json"
STRATEGIC = "application/strategic-merge-patch+json"
TIMEOUT_SECONDS = 30.0
BUSY_ATTEMPTS = 5
PAGE = 500
RENEW_SECONDS = 10.0
log = structlog.get_logger()

PODS, NODES, EVENTS = "/api/v1/pods", "/api/v1/nodes", "/api/v1/events"
NAMESPACES = "/api/v1/namespaces"
CLAIMS, VOLUMES = "/api/v1/persistentvolumeclaims", "/api/v1/persistentvolumes"
CLASSES = "/apis/scheduling.k8s.io/v1/priorityclasses"
STORAGE = "/apis/storage.k8s.io/v1"
STORAGE_CLASSES, CSI_DRIVERS, CSI_NODES = f"{STORAGE}/storageclasses", f"{STORAGE}/csidrivers", f"{STORAGE}/csinodes"
STORAGE_CAPACITIES, ATTACHMENTS = f"{STORAGE}/csistoragecapacities", f"{STORAGE}/volumeattachments"
BUDGETS = "/apis/policy/v1/poddisruptionbudgets"
LEASES = "/apis/coordination.k8s.io/v1/leases"
DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


SUBDOMAIN = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")
"""What objects may be called (RFC 1123): nothing else is put into a path."""


class ApiError(ColocateError):
    """The API server answered with an error. `status` is the HTTP status, `reason` the CamelCase word of its Status."""

    def __init__(self, status: int, reason: str, message: str, retry_after: float | None = None) -> None:
        self.status, self.reason, self.message, self.retry_after = status, reason, message, retry_after
        super().__init__(f"the API server says {status} {reason}: {message}")


class Unreachable(ColocateError):  # noqa: N818
    """No answer: what was asked for may have been done or not."""


class TooLong(Unreachable):
    """A line of a watch is longer than anybody reads: the objects are to be had by pages."""


class _Status(Lean, frozen=True):
    metadata: ObjectMeta = ObjectMeta()
    reason: str = ""
    message: str = ""


class Executed(NamedTuple):
    """What a command in a container did."""

    code: int
    out: bytes
    err: str


_STDOUT, _STDERR, _OUTCOME = 1, 2, 3
"""Streams of remote commands."""


class _Cause(Lean, frozen=True):
    reason: str = ""
    message: str = ""


class _Details(Lean, frozen=True):
    causes: tuple[_Cause, ...] = ()


class _Outcome(Lean, frozen=True):
    """How a remote command ended (metav1.Status)."""

    status: str = ""
    reason: str = ""
    message: str = ""
    details: _Details = _Details()


def age_of(text: str | None) -> float:
    """Seconds since a time in RFC 3339; for ever if it is none."""
    began = seconds_of(text)
    return time.time() - began if began is not None else float("inf")


def path_of(collection: str, namespace: str = "", name: str = "", subresource: str = "") -> str:
    """The path of an object, or of a namespace's collection: `/api/v1/namespaces/NS/pods/NAME/binding`."""
    head, _, plural = collection.rpartition("/")
    parts = [head, *(["namespaces", quote(namespace, safe="")] if namespace else []), plural]
    return "/".join([*parts, *(quote(p, safe="") for p in (name, subresource) if p)])


class Page(Lean, frozen=True):
    """A part of a list."""

    class Meta(Lean, frozen=True):
        """Where it goes on."""

        resource_version: str = ""
        continue_: str = msgspec.field(default="", name="continue")

    metadata: Meta = Meta()
    items: list[msgspec.Raw] | None = None


def page_query(more: str) -> dict[str, str]:
    """What asks for the page where the one before goes on, or for the first."""
    return {"limit": str(PAGE), **({"continue": more} if more else {})}


class Api:
    """One connection pool to one API server."""

    def __init__(self, access: Access) -> None:
        self._access, self._renewed, self._has_token = access, float("-inf"), False
        self._renewing = asyncio.Lock()
        self.server: str = access.server
        self.namespace = access.namespace or "default"
        """The context's, or the pod's."""

    @classmethod
    @asynccontextmanager
    async def connect(cls, kubeconfig: str | None = None, context: str | None = None) -> AsyncIterator[Api]:
        """By the kubeconfig named, `$KUBECONFIG`, the service account of this pod, or `~/.kube/config`."""
        named = kubeconfig or os.environ.get("KUBECONFIG") or None
        access = _of_this_pod() if named is None and (SERVICE_ACCOUNT / "token").exists() else None
        if access is None:
            access = await _by_kubeconfig(named, context)
        try:
            yield cls(access)
        finally:
            await access.close()

    async def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        query: Mapping[str, str] | None = None,
        content_type: str = JSON,
        timeout_seconds: float = TIMEOUT_SECONDS,
        *,
        patient: bool = True,
    ) -> bytes:
        """The body of the answer. Raises ApiError, Unreachable.

        A server that is too busy (429) has done nothing; if `patient`, it is asked again when it says.
        """
        for attempt in range(BUSY_ATTEMPTS if patient else 0):
            try:
                return await self._once(method, path, body, query, content_type, timeout_seconds)
            except ApiError as error:
                if error.status != 429:
                    raise
                await pause(error, attempt, random.random())
        return await self._once(method, path, body, query, content_type, timeout_seconds)

    async def _once(
        self,
        method: str,
        path: str,
        body: Any,
        query: Mapping[str, str] | None,
        content_type: str,
        timeout_seconds: float,
    ) -> bytes:
        timeout = aiohttp.ClientTimeout(timeout_seconds)
        for again in (False, True):
            try:
                response = await self._send(method, path, body, query, content_type, timeout)
                async with response:
                    content = await response.read()
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                raise Unreachable(f"{self.server} does not answer: {error or type(error).__name__}") from error
            if response.status != 401 or again or not await self._has_renewed():
                break  # what was answered with 401 was not done
        if response.status >= 400:
            raise _error(response, content)
        return content

    async def _has_renewed(self) -> bool:
        """Find out anew who we are, at most every few seconds."""
        async with self._renewing:
            now = asyncio.get_running_loop().time()
            if now - self._renewed >= RENEW_SECONDS:  # else somebody has asked while we waited
                self._renewed = now
                try:
                    await self._access.renew()
                    self._has_token = True
                except Exception as error:  # noqa: BLE001 - a plugin may fail in any way
                    self._has_token = False
                    log.warning("token_not_renewed", error=" ".join(str(error).split()))
            return self._has_token

    async def all(self, kind: type[T], path: str, query: Mapping[str, str] | None = None) -> list[T]:
        """All objects of a collection, as they were at one time; page by page."""
        found: list[T] = []
        more = ""
        while True:
            answer = await self.request("GET", path, query={**(query or {}), **page_query(more)})
            page = msgspec.json.decode(answer, type=Page)
            found += [msgspec.json.decode(raw, type=kind) for raw in page.items or []]
            more = page.metadata.continue_
            if not more:
                return found

    async def get(self, kind: type[T], path: str) -> T:
        """One object."""
        return msgspec.json.decode(await self.request("GET", path), type=kind)

    async def execute(self, path: str, command: Sequence[str], timeout_seconds: float = TIMEOUT_SECONDS) -> Executed:
        """Run a command in a container; `path` is its pod's. Raises ApiError, Unreachable.

        By a WebSocket whose messages begin with the number of a stream (v4.channel.k8s.io, pkg/kubelet/remotecommand).
        """
        query = [("stdout", "true"), ("stderr", "true"), *(("command", word) for word in command)]
        headers = {"User-Agent": "colocate"}
        await self._access.authorize(headers)
        streams: dict[int, bytearray] = {_STDOUT: bytearray(), _STDERR: bytearray(), _OUTCOME: bytearray()}
        try:
            async with asyncio.timeout(timeout_seconds):
                connection = self._access.session().ws_connect(
                    f"{self.server}{path}/exec?{urlencode(query)}",
                    protocols=("v4.channel.k8s.io",),
                    headers=headers,
                    max_msg_size=0,
                    **self._access.options,
                )
                async with connection as socket:
                    async for message in socket:
                        if message.type is aiohttp.WSMsgType.BINARY and message.data:
                            streams.setdefault(message.data[0], bytearray()).extend(message.data[1:])
        except aiohttp.WSServerHandshakeError as error:
            reason = "Forbidden" if error.status == 403 else ""
            raise ApiError(error.status, reason, f"no command may be run by {path}/exec (pods/exec)") from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Unreachable(f"{self.server} does not answer: {error or type(error).__name__}") from error
        outcome = msgspec.json.decode(streams[_OUTCOME] or b"{}", type=_Outcome)
        if outcome.status == "Success":
            code = 0
        else:
            codes = [c.message for c in outcome.details.causes if c.reason == "ExitCode"]
            if not codes or not codes[0].isdigit():
                raise ApiError(500, outcome.reason, outcome.message or f"{path}/exec ended without a word")
            code = int(codes[0])
        return Executed(code, bytes(streams[_STDOUT]), streams[_STDERR].decode(errors="replace"))

    async def lines(self, path: str, query: Mapping[str, str], idle_seconds: float) -> AsyncIterator[bytes]:
        """The lines of a watch until the server ends it; an empty one first, once it has begun to answer.

        Raises ApiError, and Unreachable when nothing comes.
        """
        try:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT_SECONDS, sock_read=idle_seconds)
            response = await self._send("GET", path, None, query, JSON, timeout)
            async with response:
                if response.status == 401:
                    await self._has_renewed()  # for the next attempt
                if response.status >= 400:
                    raise _error(response, await response.read())
                yield b""
                async for line in response.content:
                    yield line
        except aiohttp.http_exceptions.HttpProcessingError as error:
            raise TooLong(f"the watch of {path} has a line that is too long") from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Unreachable(f"the watch of {path} broke: {error or type(error).__name__}") from error

    async def _send(
        self,
        method: str,
        path: str,
        body: Any,
        query: Mapping[str, str] | None,
        content_type: str,
        timeout: aiohttp.ClientTimeout,
    ) -> aiohttp.ClientResponse:
        headers = {"Accept": JSON, "Content-Type": content_type, "User-Agent": "colocate"}
        await self._access.authorize(headers)
        url = self.server + path + (f"?{urlencode(query)}" if query else "")
        data = msgspec.json.encode(body) if body is not None else None
        session = self._access.session()
        return await session.request(method, url, headers=headers, data=data, timeout=timeout, **self._access.options)


def _of_this_pod() -> Access:
    try:
        return ServiceAccount(SERVICE_ACCOUNT)
    except (KeyError, OSError) as error:  # ssl.SSLError is an OSError
        mend = "set KUBERNETES_SERVICE_HOST and _PORT, and mount the account with its ca.crt; or name a kubeconfig"
        raise BadInput(f"the service account in {SERVICE_ACCOUNT} cannot be used ({error!r}): {mend}") from error


async def _by_kubeconfig(named: str | None, context: str | None) -> Access:
    from colocate.kube.kubeconfig import Kubeconfig  # 20 MiB, which a pod does without

    try:
        access = Kubeconfig(named, context)
        await access.open()
    except Exception as error:
        said = " ".join(str(error).split())
        raise BadInput(f"the kubeconfig {named or '~/.kube/config'} cannot be used: {said}") from error
    return access


def _error(response: aiohttp.ClientResponse, content: bytes) -> ApiError:
    try:
        status = msgspec.json.decode(content, type=_Status)
    except msgspec.DecodeError:
        status = _Status(message=content[:200].decode(errors="replace"))
    after = response.headers.get("Retry-After", "")
    return ApiError(response.status, status.reason, status.message, float(after) if after.isdigit() else None)


async def pause(error: ColocateError, attempt: int, jitter: float) -> None:
    """Wait before the next attempt: as the server asks, else 0.1 s doubling to 10 s, times 0.5 + jitter (0 to 1)."""
    asked = error.retry_after if isinstance(error, ApiError) else None
    await asyncio.sleep(asked if asked is not None else min(0.1 * 2 ** min(attempt, 7), 10.0) * (0.5 + jitter))
