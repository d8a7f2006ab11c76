"""The body of an answer of unknown size, read whole or refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import aiohttp


async def read_body(response: aiohttp.ClientResponse, most_bytes: int) -> bytes:
    """All of it. Raises OSError if it is larger than `most_bytes`: a stranger's page must not fill our memory."""
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > most_bytes:
            raise OSError(f"more than {most_bytes >> 20} MiB of text")
    return bytes(body)
