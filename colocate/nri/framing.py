"""The bytes on the runtime's socket: connections multiplexed over one stream, and ttrpc's frames within each.

A trunk frame is {connection, length} and so many bytes; a ttrpc frame is {length, stream, kind, flags} and so many
bytes, and may span trunk frames. All integers are big-endian (containerd/nri `pkg/net/multiplex`, ttrpc PROTOCOL.md).
"""

from __future__ import annotations

import struct
from typing import NamedTuple

FROM_RUNTIME, TO_RUNTIME = 1, 2
"""The connection on which the runtime calls the plugin, and that on which the plugin calls the runtime."""
REQUEST, RESPONSE, DATA = 1, 2, 3
MOST_BYTES = 4 << 20
"""Of a message (ttrpc)."""
TRUNK = struct.Struct(">II")
HEADER = struct.Struct(">IIBB")


class NotNri(Exception):  # noqa: N818  it is what the other side is
    """What came is not this protocol: the stream cannot be read any further."""


class Frame(NamedTuple):
    """One message of one call."""

    connection: int
    stream: int
    kind: int
    payload: bytes


def encode(frame: Frame) -> bytes:
    """The frame as one trunk frame. Raises ValueError for a message of more than `MOST_BYTES`."""
    if len(frame.payload) > MOST_BYTES:
        raise ValueError(f"a message has at most {MOST_BYTES} bytes, not {len(frame.payload)}")
    body = HEADER.pack(len(frame.payload), frame.stream, frame.kind, 0) + frame.payload
    return TRUNK.pack(frame.connection, len(body)) + body


class Decoder:
    """Frames out of bytes, however these are cut."""

    def __init__(self) -> None:
        self._trunk = bytearray()
        self._of = {FROM_RUNTIME: bytearray(), TO_RUNTIME: bytearray()}

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that are whole now. Raises NotNri."""
        self._trunk += data
        found: list[Frame] = []
        while len(self._trunk) >= TRUNK.size:
            connection, length = TRUNK.unpack_from(self._trunk)
            if connection not in self._of:
                raise NotNri(f"there is no connection {connection}: {bytes(self._trunk[:32])!r}")
            if length > MOST_BYTES + HEADER.size:
                raise NotNri(f"a trunk frame of {length} bytes")
            if len(self._trunk) < TRUNK.size + length:
                break
            self._of[connection] += self._trunk[TRUNK.size : TRUNK.size + length]
            del self._trunk[: TRUNK.size + length]
            found += self._frames(connection)
        return found

    def _frames(self, connection: int) -> list[Frame]:
        found, stream_of = [], self._of[connection]
        while len(stream_of) >= HEADER.size:
            length, stream, kind, _flags = HEADER.unpack_from(stream_of)
            if length > MOST_BYTES or kind not in (REQUEST, RESPONSE, DATA):
                raise NotNri(f"a frame of kind {kind} and {length} bytes")
            if len(stream_of) < HEADER.size + length:
                break
            found.append(Frame(connection, stream, kind, bytes(stream_of[HEADER.size : HEADER.size + length])))
            del stream_of[: HEADER.size + length]
        return found
