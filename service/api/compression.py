"""Compressed bodies: requests are inflated within a cap, responses as their client asks."""

from __future__ import annotations

import asyncio
import gzip
import re
import zlib
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Executor

from fastapi import Response

from models.errors import BodyTooLarge, MalformedBody, UnsupportedMediaType

# Recognises the header of gzip and that of zlib, which HTTP calls deflate.
_GZIP_OR_ZLIB = zlib.MAX_WBITS | 32

# A stronger compression takes three times as long for a few percent.
_LEVEL = 1
_WORTHWHILE_BYTES = 1000

_ENCODERS: Mapping[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, _LEVEL, mtime=0),
    "deflate": lambda data: zlib.compress(data, _LEVEL),
}
"""Content encodings, the preferred one first."""

_REFUSED = re.compile(r"q\s*=\s*0(?:\.0*)?")


async def inflate(
    chunks: AsyncIterator[bytes], *, encoding: str, max_bytes: int, threads: Executor
) -> AsyncIterator[bytes]:
    """Inflate a body chunk by chunk.

    Raises:
        UnsupportedMediaType: the encoding is unknown, or the body is of another one.
        BodyTooLarge: it inflates to more than `max_bytes`; no more than that is ever in memory.
        MalformedBody: it is damaged or truncated.
    """
    if encoding not in _ENCODERS:
        allowed = ", ".join(_ENCODERS)
        raise UnsupportedMediaType(f"The content encoding is not accepted. Allowed: {allowed}.")
    stream = zlib.decompressobj(_GZIP_OR_ZLIB)
    loop, room = asyncio.get_running_loop(), max_bytes
    async for chunk in chunks:
        try:
            data = await loop.run_in_executor(threads, stream.decompress, chunk, room + 1)
        except zlib.error as error:
            if room == max_bytes:
                raise UnsupportedMediaType(
                    f"The body is not in {encoding}, as its Content-Encoding says."
                ) from error
            raise MalformedBody(f"The body is not valid {encoding}.") from error
        room -= len(data)
        if room < 0:
            raise BodyTooLarge(f"The body inflates to more than {max_bytes} bytes.")
        yield data
    if not stream.eof or stream.unused_data:
        raise MalformedBody(f"The body is not one whole {encoding} stream.")


async def compressed(response: Response, *, accept_encoding: str) -> Response:
    """Compress a response if its client takes that and it is worth it."""
    response.headers["Vary"] = "Accept-Encoding"
    encoding = _preferred(accept_encoding)
    if encoding is None or len(response.body) < _WORTHWHILE_BYTES:
        return response
    response.body = await asyncio.to_thread(_ENCODERS[encoding], bytes(response.body))
    response.headers["Content-Encoding"] = encoding
    response.headers["Content-Length"] = str(len(response.body))
    return response


def _preferred(accept_encoding: str) -> str | None:
    """The encoding to use; None if the header names none of ours."""
    items = [item.partition(";") for item in accept_encoding.lower().split(",")]
    accepted = {name.strip() for name, _, q in items if not _REFUSED.fullmatch(q.strip())}
    return next((name for name in _ENCODERS if name in accepted), None)
