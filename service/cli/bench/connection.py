"""One keep-alive HTTP/1.1 connection on asyncio streams: bytes out, status, headers and body in.

A general client library spends about a millisecond of processor time on a request; on a machine
that the service shares with its load that is what would be measured.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress

from models.types import Struct
from service.cli.bench.address import Address

MAX_BODY_BYTES = 256 * 1024 * 1024
_BUFFER_BYTES = 1 << 20

_BODILESS = frozenset({204, 304})


class ConnectionLost(Exception):
    """The connection ended, or what came over it is no HTTP, before the answer was whole."""


class Completions(Struct):
    """A whole answer; the names of its headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Connection:
    """Opens itself with the first exchange; after a failed one it must be closed and thrown away.

    Args:
        address: where to.
    """

    def __init__(self, address: Address) -> None:
        self._address = address
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self.reusable = True
        self.last_used = time.monotonic()

    async def exchange(self, request: bytes) -> Completions:
        """Send one request and read its answer.

        Raises:
            ConnectionLost: there is no whole answer.
        """
        try:
            reader, writer = await self._open()
            writer.write(request)
            answer = await self._read(reader)
        except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
            raise ConnectionLost(type(error).__name__) from None
        self.last_used = time.monotonic()
        return answer

    def close(self) -> None:
        """Close without waiting for the other side."""
        if self._writer is not None:
            with suppress(RuntimeError):  # the loop is already closed
                self._writer.close()

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._reader is None or self._writer is None:
            self._reader, self._writer = await asyncio.open_connection(
                self._address.ip,
                self._address.port,
                limit=_BUFFER_BYTES,
                ssl=self._address.tls or None,
                server_hostname=self._address.host if self._address.tls else None,
            )
        return self._reader, self._writer

    async def _read(self, reader: asyncio.StreamReader) -> Completions:
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        protocol, status, *_ = first.split(" ")
        headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        body = await _read_body(reader, int(status), headers)
        keeps = headers.get("connection", "").lower() != "close" and protocol != "HTTP/1.0"
        framed = "content-length" in headers or "transfer-encoding" in headers
        self.reusable = keeps and (framed or int(status) in _BODILESS)
        return Completions(status=int(status), headers=headers, body=body)


async def _read_body(
    reader: asyncio.StreamReader, status: int, headers: Mapping[str, str]
) -> bytes:
    if status in _BODILESS:
        return b""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        return await _read_chunks(reader)
    if "content-length" in headers:
        return await reader.readexactly(_checked(int(headers["content-length"])))
    return await reader.read()


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    parts = []
    total = 0
    while True:
        line = await reader.readuntil(b"\r\n")
        size = int(line.partition(b";")[0], 16)
        total = _checked(total + size)
        if size == 0:
            break
        parts.append(await reader.readexactly(size))
        await reader.readexactly(2)
    while await reader.readuntil(b"\r\n") != b"\r\n":  # trailers
        pass
    return b"".join(parts)


def _checked(size: int) -> int:
    if not 0 <= size <= MAX_BODY_BYTES:
        raise ValueError("an answer of this size is none")
    return size
