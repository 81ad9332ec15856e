"""A small HTTP server with responses written by each test."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest

Handler = Callable[["Seen"], Awaitable[bytes]]


class Seen:
    """One request as the server saw it; `connection` numbers the connections."""

    def __init__(self, head: str, body: bytes, connection: int) -> None:
        self.line, *lines = head.split("\r\n")
        self.headers = dict(line.lower().split(": ", 1) for line in lines if ": " in line)
        self.body = body
        self.connection = connection


def http(
    body: bytes | dict, *, status: int = 200, headers: str = "", seen: Seen | None = None
) -> bytes:
    """A response with its length; echoes the id of the request `seen`."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    echo = f"X-Request-ID: {seen.headers['x-request-id']}\r\n" if seen else ""
    head = f"HTTP/1.1 {status} Fine\r\nContent-Length: {len(content)}\r\n{echo}{headers}\r\n"
    return head.encode() + content


class Server:
    """Sends what the handler returns; an empty response closes the connection."""

    def __init__(self, handler: Handler) -> None:
        self.seen: list[Seen] = []
        self._handler = handler
        self._writers: list[asyncio.StreamWriter] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        number = len(self._writers)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().removesuffix("\r\n\r\n")
                length = int(head.lower().partition("content-length: ")[2].split("\r\n")[0])
                seen = Seen(head, await reader.readexactly(length), number)
                self.seen.append(seen)
                response = await self._handler(seen)
                writer.write(response)
                await writer.drain()
                if not response or b"connection: close" in response.lower():
                    break
        writer.close()

    async def end(self) -> None:
        """Close the connections that clients left open."""
        for writer in self._writers:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


@contextlib.asynccontextmanager
async def running(handler: Handler) -> AsyncIterator[tuple[Server, str]]:
    server = Server(handler)
    listening = await asyncio.start_server(server, "127.0.0.1", 0)
    try:
        port = listening.sockets[0].getsockname()[1]
        yield server, f"http://127.0.0.1:{port}"
    finally:
        listening.close()
        await server.end()


@pytest.fixture
def serve() -> Callable[[Handler], contextlib.AbstractAsyncContextManager]:
    """Start a server in the test's own loop; gives it and its URL."""
    return running


@pytest.fixture
def serve_apart() -> Iterator[Callable[[Handler], tuple[Server, str]]]:
    """Start a server in a thread of its own, for code that runs a loop itself."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    stack = contextlib.AsyncExitStack()

    def start(handler: Handler) -> tuple[Server, str]:
        entered = asyncio.run_coroutine_threadsafe(
            stack.enter_async_context(running(handler)), loop
        )
        return entered.result(5)

    yield start
    asyncio.run_coroutine_threadsafe(stack.aclose(), loop).result(5)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(5)
    loop.close()


@pytest.fixture
def respond() -> Callable[..., bytes]:
    """Build an HTTP response."""
    return http
