"""The plugin's side of the conversation: register, be configured, adopt what runs, answer, and begin anew.

The runtime drops a plugin that does not answer in time (2 s by default), and refuses a container whose plugin answers
with an error. So a handler's own mistake is logged and answered with "nothing to change": the container then starts
where kubelet put it. A handler that wants a container refused raises `Refused`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any, Protocol

from colocate.nri import messages
from colocate.nri.framing import FROM_RUNTIME, REQUEST, RESPONSE, TO_RUNTIME, Decoder, Frame, NotNri, encode
from colocate.nri.messages import Adjustment, Container, Pod, Update

SOCKET = "/var/run/nri/nri.sock"
ANSWER_SECONDS = 5.0
"""For our own calls: registration, updates."""
AGAIN_SECONDS, AGAIN_MOST_SECONDS = 0.1, 5.0
READ_BYTES = 1 << 16
UNKNOWN, UNIMPLEMENTED = 2, 12
"""gRPC's codes."""
log = logging.getLogger(__name__)


class Refused(Exception):  # noqa: N818
    """The container may not be made; the message is what its user is told."""


class Handler(Protocol):
    """Decides; each call must return within milliseconds."""

    def synchronize(self, pods: list[Pod], containers: list[Container]) -> Iterable[Update]:
        """The plugin has registered: all that is there. What is to be changed of it."""

    def create_container(self, pod: Pod, container: Container) -> Adjustment | Awaitable[Adjustment | None] | None:
        """A container is about to be made. What is to be changed of it, now or within two seconds. Raises Refused."""

    def container_removed(self, pod: Pod, container: Container) -> None:
        """It is no more."""

    def pod_removed(self, pod: Pod) -> None:
        """The pod is no more."""

    def away(self) -> None:
        """The runtime is not there: containers start without being asked about, until it is back."""


class Plugin:
    """One registration, renewed for as long as `run` runs."""

    def __init__(self, name: str, index: str, handler: Handler, socket: str = SOCKET) -> None:
        """`index`, two digits, is the plugin's place in the order in which the runtime asks its plugins."""
        if len(index) != 2 or not index.isdigit():
            raise ValueError(f"index: two digits, not {index!r}")
        self.name, self.index, self.socket = name, index, socket
        self._handler = handler
        self._session: _Session | None = None

    @property
    def runtime(self) -> str:
        """Name and version of the runtime, once it has configured the plugin; empty while it is not there."""
        return self._session.runtime if self._session is not None else ""

    @property
    def connected(self) -> bool:
        """Whether the runtime asks us."""
        return self._session is not None and self._session.synchronized

    async def run(self) -> None:
        """Until cancelled: connect, serve, and connect again when the runtime has gone or does not speak NRI."""
        pause, said = AGAIN_SECONDS, ""
        while True:
            served, why = False, "the runtime has hung up"
            try:
                served = await self._serve()
            except (OSError, NotNri, TimeoutError) as error:
                why = f"{type(error).__name__}: {error}"
            if why != said or served:  # not again and again
                log.warning("NRI at %s: %s", self.socket, why)
                said = why
            pause = AGAIN_SECONDS if served else min(pause * 2, AGAIN_MOST_SECONDS)
            await asyncio.sleep(pause)

    async def _serve(self) -> bool:
        """One connection, from its making to its end; whether the runtime had asked us what is to be done."""
        reader, writer = await asyncio.open_unix_connection(self.socket)
        session = self._session = _Session(writer, self._handler)
        listening = asyncio.ensure_future(session.listen(reader))
        registering = asyncio.ensure_future(session.register(self.name, self.index))
        try:
            await asyncio.wait([listening, registering], return_when=asyncio.FIRST_COMPLETED)
            if not listening.done():
                await registering
            await listening
        finally:
            self._session = None
            for task in (listening, registering):
                task.cancel()
            await asyncio.gather(listening, registering, return_exceptions=True)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            if session.synchronized:
                self._handler.away()
        return session.synchronized

    async def update(self, wanted: Iterable[Update]) -> list[str]:
        """Change containers that run; the ids of those for which it failed. Raises ConnectionError, TimeoutError."""
        if self._session is None:
            raise ConnectionError("the runtime is not connected")
        payload = messages.encoded("UpdateContainersRequest", update=messages.updates(wanted))
        answer = await self._session.call("UpdateContainers", payload)
        found = messages.parse("UpdateContainersResponse", answer)
        return [failed.container_id for failed in found.failed]


class _Session:
    """One connection."""

    def __init__(self, writer: asyncio.StreamWriter, handler: Handler) -> None:
        self._writer, self._handler = writer, handler
        self._decoder = Decoder()
        self._stream = 1
        self._asked: dict[int, asyncio.Future[bytes]] = {}
        self._pods: list[Pod] = []
        self._containers: list[Container] = []
        self.synchronized, self.runtime = False, ""
        self._later: set[asyncio.Task[None]] = set()
        self._answers: dict[str, Callable[[bytes], bytes | Awaitable[bytes]]] = {
            "Configure": self._configure,
            "Synchronize": self._synchronize,
            "CreateContainer": self._create_container,
            "RemoveContainer": self._remove_container,
            "RemovePodSandbox": self._remove_pod,
            "StateChange": lambda _payload: b"",
        }

    async def listen(self, reader: asyncio.StreamReader) -> None:
        """Until the other side hangs up. Raises NotNri."""
        while data := await reader.read(READ_BYTES):
            for frame in self._decoder.feed(data):
                if frame.connection == FROM_RUNTIME and frame.kind == REQUEST:
                    self._answer(frame)
                elif frame.connection == TO_RUNTIME and frame.kind == RESPONSE:
                    self._heard(frame)
                else:
                    raise NotNri(f"a frame of kind {frame.kind} on connection {frame.connection}")
            await self._writer.drain()

    async def register(self, name: str, index: str) -> None:
        """Raises NotNri if the runtime refuses, TimeoutError."""
        said = {"plugin_name": name, "plugin_idx": index, "NRI_version": messages.VERSION}
        await self.call("RegisterPlugin", messages.encoded("RegisterPluginRequest", **said))

    async def call(self, method: str, payload: bytes) -> bytes:
        """One call of the runtime. Raises NotNri for an answer that is an error, TimeoutError."""
        stream, self._stream = self._stream, self._stream + 2  # a caller's are odd and rise
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._asked[stream] = answer
        fields = {"service": f"{messages.SERVICE}Runtime", "method": method, "payload": payload}
        whole = messages.encoded("Request", timeout_nano=int(ANSWER_SECONDS * 1e9), **fields)
        self._writer.write(encode(Frame(TO_RUNTIME, stream, REQUEST, whole)))
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await answer
        finally:
            self._asked.pop(stream, None)

    def _heard(self, frame: Frame) -> None:
        found, answer = messages.parse("Response", frame.payload), self._asked.get(frame.stream)
        if answer is None or answer.done():
            return  # nobody waits for it any more
        if found.status.code:
            answer.set_exception(NotNri(f"the runtime refuses: {found.status.message} ({found.status.code})"))
        else:
            answer.set_result(found.payload)

    def _answer(self, frame: Frame) -> None:
        request = messages.parse("Request", frame.payload)
        response = messages.message("Response")
        work = self._answers.get(request.method)
        with self._as_status(response, request.method):
            if work is None:
                response.status.code, response.status.message = UNIMPLEMENTED, f"{request.method} is not subscribed to"
            else:
                found = work(request.payload)
                if not isinstance(found, bytes):
                    task = asyncio.ensure_future(self._answer_later(frame, request.method, found))
                    self._later.add(task)
                    task.add_done_callback(self._later.discard)
                    return
                response.payload = found
        self._respond(frame, response)

    async def _answer_later(self, frame: Frame, method: str, work: Awaitable[bytes]) -> None:
        """What takes a while holds up nobody else's answer."""
        response = messages.message("Response")
        with self._as_status(response, method):
            response.payload = await work
        self._respond(frame, response)

    def _respond(self, frame: Frame, response: Any) -> None:
        self._writer.write(encode(Frame(FROM_RUNTIME, frame.stream, RESPONSE, response.SerializeToString())))

    @contextlib.contextmanager
    def _as_status(self, response: Any, method: str) -> Iterator[None]:
        """What goes wrong, as the runtime is told of it."""
        try:
            yield
        except Refused as refused:
            response.status.code, response.status.message = UNKNOWN, str(refused)
        except NotNri:
            raise
        except Exception:  # a container must not fail to start because of us
            log.exception("NRI: %s was answered with nothing to change", method)

    def _configure(self, payload: bytes) -> bytes:
        asked = messages.parse("ConfigureRequest", payload)
        self.runtime = f"{asked.runtime_name} {asked.runtime_version}"
        wanted = self._answers.keys() & messages.EVENTS.keys()
        mask = sum(1 << (messages.EVENTS[name] - 1) for name in wanted)
        return messages.encoded("ConfigureResponse", events=mask)

    def _synchronize(self, payload: bytes) -> bytes:
        """What is there comes in parts where it is much; the last one is answered with what is to be changed."""
        part = messages.parse("SynchronizeRequest", payload)
        self._pods += map(messages.pod_of, part.pods)
        self._containers += map(messages.container_of, part.containers)
        wanted: list[Any] = []
        if not part.more:
            pods, self._pods = self._pods, []
            containers, self._containers = self._containers, []
            self.synchronized = True
            wanted = messages.updates(self._handler.synchronize(pods, containers))
        return messages.encoded("SynchronizeResponse", update=wanted, more=part.more)

    def _create_container(self, payload: bytes) -> bytes | Awaitable[bytes]:
        event = messages.parse("Event", payload)
        wanted = self._handler.create_container(messages.pod_of(event.pod), messages.container_of(event.container))

        def encoded(found: Adjustment | None) -> bytes:
            if found is None:
                return b""
            return messages.encoded("CreateContainerResponse", adjust=messages.adjustment(found))

        async def later(found: Awaitable[Adjustment | None]) -> bytes:
            return encoded(await found)

        return encoded(wanted) if wanted is None or isinstance(wanted, Adjustment) else later(wanted)

    def _remove_container(self, payload: bytes) -> bytes:
        event = messages.parse("Event", payload)
        self._handler.container_removed(messages.pod_of(event.pod), messages.container_of(event.container))
        return b""

    def _remove_pod(self, payload: bytes) -> bytes:
        self._handler.pod_removed(messages.pod_of(messages.parse("Event", payload).pod))
        return b""
