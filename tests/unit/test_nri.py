"""NRI: frames however they are cut, the conversation with a runtime that is played here, and what is not NRI.

The other side writes and reads its protobuf with the few functions below, and not with the code that is tested.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colocate.nri import Adjustment, Container, Limits, NotNri, Plugin, Pod, Refused, Update
from colocate.nri.framing import FROM_RUNTIME, MOST_BYTES, TO_RUNTIME, Decoder, Frame, encode

REQUEST, RESPONSE = 1, 2


# the runtime's protobuf


def varint(n: int) -> bytes:
    n &= (1 << 64) - 1
    out = b""
    while True:
        out += bytes([n & 127 | (128 if n > 127 else 0)])
        n >>= 7
        if not n:
            return out


def field(number: int, value: Any) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def mapped(number: int, values: dict[str, str]) -> bytes:
    return b"".join(field(number, field(1, k) + field(2, v)) for k, v in values.items())


def parse(data: bytes) -> dict[int, list[Any]]:
    def number(at: int) -> tuple[int, int]:
        n = shift = 0
        while True:
            byte = data[at]
            n, shift, at = n | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                return n, at

    found: dict[int, list[Any]] = {}
    at = 0
    while at < len(data):
        key, at = number(at)
        value: Any
        value, at = number(at)
        if key & 7 == 2:
            value, at = data[at : at + value], at + value
        found.setdefault(key >> 3, []).append(value)
    return found


POD = field(1, "sandbox") + field(2, "train-0") + field(3, "uid-1") + field(4, "ml")
POD += (
    mapped(5, {"colocate.io/qos": "batch"})
    + mapped(6, {"a": "b"})
    + field(8, field(3, "/kubepods/besteffort/poduid-1"))
)
CPU = field(1, field(1, 2)) + field(2, field(1, -1)) + field(3, field(1, 100_000))
RESOURCES = field(1, field(1, field(1, 1 << 33))) + field(2, CPU) + mapped(6, {"memory.high": "max"})
CONTAINER = field(1, "c1") + field(2, "sandbox") + field(3, "main") + field(4, 3) + field(12, 4711)
CONTAINER += field(7, "sleep") + field(7, "1")  # args, which nobody here reads
DEVICE = field(1, "/dev/dri/renderD128") + field(2, "c") + field(3, 226) + field(4, 128)
CONTAINER += field(11, field(2, DEVICE) + field(3, RESOURCES) + field(5, "/kubepods/besteffort/poduid-1/c1"))


class Taken:
    """A handler that keeps what it is told, and answers as it is told to."""

    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.answer: Callable[[], Adjustment | None] = lambda: None
        self.updates: list[Update] = []

    def synchronize(self, pods: list[Pod], containers: list[Container]) -> Iterable[Update]:
        self.heard.append(("synchronize", pods, containers))
        return self.updates

    def create_container(self, pod: Pod, container: Container) -> Adjustment | None:
        self.heard.append(("create", pod, container))
        return self.answer()

    def container_removed(self, pod: Pod, container: Container) -> None:
        self.heard.append(("removed", container.id))

    def pod_removed(self, pod: Pod) -> None:
        self.heard.append(("pod removed", pod.uid))

    def away(self) -> None:
        self.heard.append(("away",))


class Runtime:
    """The other side of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer, self._stream = reader, writer, 1
        self.registered: dict[int, list[Any]] = {}

    async def frame(self) -> tuple[int, int, int, bytes]:
        connection, length = struct.unpack(">II", await self.reader.readexactly(8))
        body = await self.reader.readexactly(length)
        size, stream, kind, flags = struct.unpack(">IIBB", body[:10])
        assert (size, flags) == (len(body) - 10, 0)
        return connection, stream, kind, body[10:]

    def send(self, connection: int, stream: int, kind: int, payload: bytes) -> None:
        body = struct.pack(">IIBB", len(payload), stream, kind, 0) + payload
        for i in range(0, len(body), 7):  # a frame may span frames of the trunk
            part = body[i : i + 7]
            self.writer.write(struct.pack(">II", connection, len(part)) + part)

    async def call(self, method: str, payload: bytes) -> dict[int, list[Any]]:
        stream, self._stream = self._stream, self._stream + 2
        whole = field(1, "nri.pkg.api.v1alpha1.Plugin") + field(2, method) + field(3, payload) + field(4, 2_000_000_000)
        self.send(FROM_RUNTIME, stream, REQUEST, whole)
        while True:
            connection, answered, kind, body = await asyncio.wait_for(self.frame(), 5)
            if connection == FROM_RUNTIME:
                assert (answered, kind) == (stream, RESPONSE)
                return parse(body)
            await self.serve(answered, body)

    async def serve(self, stream: int, body: bytes, answer: bytes = b"") -> dict[int, list[Any]]:
        """Answer a call of the plugin's."""
        asked = parse(body)
        assert asked[1] == [b"nri.pkg.api.v1alpha1.Runtime"]
        if asked[2] == [b"RegisterPlugin"]:
            self.registered = parse(asked[3][0])
        self.send(TO_RUNTIME, stream, RESPONSE, answer)
        return asked

    async def hang_up(self) -> None:
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()

    async def greet(self) -> int:
        """As containerd does it: it asks for the configuration before it answers the registration."""
        said = field(2, "containerd") + field(3, "v2.4.2") + field(4, 5000) + field(5, 2000) + field(6, "v0.12.3")
        answer = await self.call("Configure", said)
        return int(parse(answer[2][0])[2][0])


@asynccontextmanager
async def connected(tmp_path: Path, handler: Taken) -> AsyncIterator[tuple[Plugin, asyncio.Queue[Runtime]]]:
    """A plugin that connects to a runtime that is played; each connection of its comes into the queue."""
    came: asyncio.Queue[Runtime] = asyncio.Queue()
    path, made = str(tmp_path / "nri.sock"), []

    def comes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        made.append(Runtime(reader, writer))
        came.put_nowait(made[-1])

    server = await asyncio.start_unix_server(comes, path)
    plugin = Plugin("colocate", "50", handler, path)
    running = asyncio.create_task(plugin.run())
    try:
        yield plugin, came
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        server.close()
        for runtime in made:
            await runtime.hang_up()


async def next_of(came: asyncio.Queue[Runtime]) -> Runtime:
    return await asyncio.wait_for(came.get(), 10)


async def test_a_plugin_registers_is_configured_and_adopts_what_runs_in_parts(tmp_path: Path):
    handler = Taken()
    handler.updates = [Update("c1", Limits(cpu_shares=2, memory_bytes=1 << 30))]
    async with connected(tmp_path, handler) as (plugin, came):
        runtime = await next_of(came)
        mask = await runtime.greet()
        assert runtime.registered == {1: [b"colocate"], 2: [b"50"], 3: [b"v0.12.3"]}
        assert mask == sum(1 << (n - 1) for n in (3, 4, 11)), "removed pods, created and removed containers"
        assert plugin.runtime == "containerd v2.4.2"
        part = await runtime.call("Synchronize", field(1, POD) + field(3, 1))
        assert (parse(part[2][0]), handler.heard, plugin.connected) == ({2: [1]}, [], False)
        whole = await runtime.call("Synchronize", field(2, CONTAINER))
        ((what, pods, containers),) = handler.heard
        assert what == "synchronize"
        assert plugin.connected
        pod = Pod(
            "sandbox",
            "train-0",
            "uid-1",
            "ml",
            {"colocate.io/qos": "batch"},
            {"a": "b"},
            "/kubepods/besteffort/poduid-1",
        )
        limits = Limits(2, -1, 100_000, 1 << 33, {"memory.high": "max"})
        where = "/kubepods/besteffort/poduid-1/c1"
        files = ("/dev/dri/renderD128",)
        made = Container("c1", "sandbox", "main", True, {}, {}, where, 4711, limits, files=files)
        assert (pods, containers) == ([pod], [made])
        (update,) = parse(whole[2][0])[1]
        resources = parse(parse(parse(update)[2][0])[1][0])
        assert parse(update)[1] == [b"c1"]
        assert (parse(resources[1][0])[1], parse(resources[2][0])[1]) == ([field(1, 1 << 30)], [field(1, 2)])


@pytest.mark.parametrize(
    ("answer", "adjust"),
    [
        pytest.param(None, {}, id="nothing is to be changed"),
        pytest.param(
            Adjustment("/kubepods/batch/poduid-1/c1"),
            {6: [field(3, "/kubepods/batch/poduid-1/c1")]},
            id="into the tier, with the cgroupfs driver",
        ),
        pytest.param(
            Adjustment("kubepods-batch-poduid_1.slice:cri-containerd:c1", oom_score_adj=1000),
            {6: [field(3, "kubepods-batch-poduid_1.slice:cri-containerd:c1") + field(4, field(1, 1000))]},
            id="into the tier, with the systemd driver, and first to go",
        ),
        pytest.param(
            Adjustment(limits=Limits(unified={"memory.high": "83886080"}), env={"A": "b"}),
            {4: [field(1, "A") + field(2, "b")], 6: [field(2, mapped(6, {"memory.high": "83886080"}))]},
            id="a file of cgroup v2, and an environment variable",
        ),
    ],
)
async def test_what_a_handler_wants_of_a_new_container_is_what_the_runtime_reads(
    tmp_path: Path, answer: Any, adjust: Any
):
    handler = Taken()
    handler.answer = lambda: answer
    async with connected(tmp_path, handler) as (_, came):
        runtime = await next_of(came)
        await runtime.greet()
        said = await runtime.call("CreateContainer", field(1, POD) + field(2, CONTAINER))
        assert 1 not in said
        made = parse(parse(said[2][0])[1][0]) if said.get(2, [b""])[0] else {}
        assert made == adjust
        await runtime.call("RemoveContainer", field(1, POD) + field(2, CONTAINER))
        await runtime.call("RemovePodSandbox", field(1, POD))
        await runtime.call("StateChange", field(1, 9) + field(2, POD))
        assert handler.heard[1:] == [("removed", "c1"), ("pod removed", "uid-1")]


def boom() -> Adjustment:
    raise RuntimeError("a defect of ours")


def refuse() -> Adjustment:
    raise Refused("the tier is full")


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        pytest.param(boom, None, id="our own defect lets the container start where kubelet put it"),
        pytest.param(refuse, {1: [2], 2: [b"the tier is full"]}, id="a refusal is told"),
    ],
)
async def test_what_a_handler_raises(tmp_path: Path, answer: Any, status: Any, caplog: pytest.LogCaptureFixture):
    handler = Taken()
    handler.answer = answer
    async with connected(tmp_path, handler) as (_, came):
        runtime = await next_of(came)
        await runtime.greet()
        said = await runtime.call("CreateContainer", field(1, POD) + field(2, CONTAINER))
        assert (parse(said[1][0]) if 1 in said else None) == status
        unknown = await runtime.call("ValidateContainerAdjustment", b"")
        assert parse(unknown[1][0])[1] == [12], "what is not subscribed to is said to be unknown"
    assert ("a defect of ours" in caplog.text) == (status is None)


async def test_containers_that_run_are_changed_and_those_that_could_not_are_told(tmp_path: Path):
    async with connected(tmp_path, Taken()) as (plugin, came):
        runtime = await next_of(came)
        await runtime.greet()
        wanted = [Update("c1", Limits(cpu_quota_us=-1)), Update("c2", Limits(cpu_quota_us=5000), ignore_failure=True)]
        asking = asyncio.create_task(plugin.update(wanted))
        _, stream, _, body = await asyncio.wait_for(runtime.frame(), 5)
        asked = await runtime.serve(stream, body, field(2, field(1, field(1, "c2"))))
        first, second = (parse(one) for one in parse(asked[3][0])[1])
        assert (first[1], second[1], 3 in first, second[3]) == ([b"c1"], [b"c2"], False, [1])
        assert await asking == ["c2"]
    with pytest.raises(ConnectionError):
        await plugin.update(wanted)


async def test_a_runtime_that_restarts_is_registered_with_again(tmp_path: Path):
    handler = Taken()
    async with connected(tmp_path, handler) as (plugin, came):
        for _ in range(3):
            runtime = await next_of(came)
            await runtime.greet()
            await runtime.call("Synchronize", field(1, POD))
            assert plugin.connected
            await runtime.hang_up()
        runtime = await next_of(came)
        assert not plugin.connected
        assert [heard[0] for heard in handler.heard] == ["synchronize", "away"] * 3


@pytest.mark.parametrize(
    ("said", "told"),
    [
        pytest.param(b"HTTP/1.1 400 Bad Request\r\n\r\n", "there is no connection", id="a web server"),
        pytest.param(struct.pack(">II", 1, 1 << 30), "a trunk frame of", id="a frame of a GiB"),
        pytest.param(struct.pack(">IIIIBB", 1, 10, 0, 1, 9, 0), "a frame of kind 9", id="a kind that there is not"),
        pytest.param(encode(Frame(1, 1, 1, b"\xff\xff")), "no Request", id="what is no protobuf"),
        pytest.param(encode(Frame(2, 1, 2, field(1, field(1, 2) + field(2, "index is taken")))), "index is taken",
                     id="a runtime that refuses the registration"),
        pytest.param(b"", "", id="a socket that hangs up"),
    ],
)  # fmt: skip
async def test_what_does_not_speak_nri_is_said_and_tried_again(
    tmp_path: Path, said: bytes, told: str, caplog: pytest.LogCaptureFixture
):
    handler = Taken()
    async with connected(tmp_path, handler) as (plugin, came):
        runtime = await next_of(came)
        await runtime.frame()  # its registration
        runtime.writer.write(said)
        await runtime.writer.drain()
        if not said:
            await runtime.hang_up()
        again = await next_of(came)
        assert told in caplog.text
        assert not plugin.connected
        await again.greet()
        await again.call("Synchronize", b"")
        assert plugin.connected
    assert handler.heard == [("synchronize", [], []), ("away",)]


async def test_a_socket_that_is_not_there_is_waited_for(tmp_path: Path):
    handler, path = Taken(), tmp_path / "nri.sock"
    running = asyncio.create_task(Plugin("colocate", "50", handler, str(path)).run())
    await asyncio.sleep(0.15)
    came: asyncio.Queue[Runtime] = asyncio.Queue()
    server = await asyncio.start_unix_server(lambda r, w: came.put_nowait(Runtime(r, w)), path)
    runtime = await next_of(came)
    await runtime.greet()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await runtime.hang_up()
    server.close()


def test_an_index_is_two_digits():
    with pytest.raises(ValueError, match="two digits"):
        Plugin("colocate", "5", Taken())


FRAMES = st.lists(
    st.builds(
        Frame, st.sampled_from([1, 2]), st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 3]), st.binary(max_size=300)
    ),
    max_size=8,
)


@given(FRAMES, st.lists(st.integers(1, 50)))
def test_frames_are_the_same_however_the_stream_is_cut(frames: list[Frame], cuts: list[int]):
    whole, decoder = b"".join(map(encode, frames)), Decoder()
    found: list[Frame] = []
    for cut in cuts:
        found += decoder.feed(whole[:cut])
        whole = whole[cut:]
    assert found + decoder.feed(whole) == frames


@settings(max_examples=1000)
@given(st.data())
def test_a_hundred_thousand_damaged_frames_are_refused_or_read_and_never_break_it(data: Any):
    """A thousand examples of a hundred frames, of which some bytes are other ones."""
    rng = data.draw(st.randoms(use_true_random=False))
    decoder = Decoder()
    for _ in range(100):
        made = bytearray(
            encode(Frame(rng.choice([1, 2]), rng.randrange(1 << 16), rng.choice([1, 2]), rng.randbytes(9)))
        )
        for _ in range(rng.randrange(3)):
            made[rng.randrange(len(made))] = rng.randrange(256)
        try:
            for frame in decoder.feed(bytes(made)):
                assert len(frame.payload) <= MOST_BYTES
        except NotNri:
            decoder = Decoder()


def test_a_message_that_is_too_long_is_not_sent():
    with pytest.raises(ValueError, match="at most"):
        encode(Frame(1, 1, 1, bytes(MOST_BYTES + 1)))
