"""Connections over real sockets: what is too long, too slow or too much is answered or ended in time."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import uvicorn
from starlette.responses import Response

from service.api import connections, http_protocol
from service.api.connections import Connections
from service.settings import ConnectionSettings
from tests.waiting import eventually

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

pytestmark = pytest.mark.anyio

HEAD = b"POST / HTTP/1.1\r\nHost: a\r\n"
GET = b"GET / HTTP/1.1\r\nHost: a\r\n"
LARGE = 8_000_000


async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """Tells the size of the body; `/early` does not wait for it, `/large` sends much."""
    size, more = 0, scope["path"] != "/early"
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size, more = size + len(message["body"]), message["more_body"]
    body = bytes(LARGE) if scope["path"] == "/large" else b"%d bytes" % size
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Server:
    def __init__(self, port: int, table: Connections) -> None:
        self.port, self.table = port, table
        self.writers: list[asyncio.StreamWriter] = []

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writers.append(writer)
        return reader, writer

    async def close(self) -> None:
        for writer in self.writers:
            writer.transport.abort()
            with suppress(ConnectionError):
                await writer.wait_closed()

    async def ask(self, *pieces: bytes) -> bytes:
        """Everything that comes back until the server ends the connection."""
        reader, writer = await self.connect()
        received = asyncio.create_task(_read_all(reader))
        for piece in pieces:
            if received.done():
                break
            writer.write(piece)
            await asyncio.sleep(0.01)
        return await asyncio.wait_for(received, 10)


async def _read_all(reader: asyncio.StreamReader) -> bytes:
    """Until the end, or until the server resets a connection on which more was sent to it."""
    parts = []
    with suppress(ConnectionError):
        while part := await reader.read(65_536):
            parts.append(part)
    return b"".join(parts)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_SWEEP_S", 0.05)
    monkeypatch.setattr(http_protocol, "_LINGER_S", 0.3)


@asynccontextmanager
async def serving(
    *, refuse: http_protocol.Refuse = http_protocol.let_in, **limits: Any
) -> AsyncIterator[Server]:
    table = Connections(lambda: ConnectionSettings(**limits))
    config = uvicorn.Config(
        app, http=http_protocol.protocol(table, refuse), lifespan="off", log_config=None
    )
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    running = asyncio.create_task(server._serve([listener]))
    clients = Server(listener.getsockname()[1], table)
    try:
        await eventually(lambda: server.started)
        yield clients
    finally:
        await clients.close()
        server.should_exit = server.force_exit = True
        await running


def statuses(received: bytes) -> list[int]:
    return [int(found) for found in re.findall(rb"HTTP/1\.1 (\d{3})", received)]


def error_of(received: bytes) -> str:
    """The code of a refusal, which has the shape of all errors."""
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head.lower()
    assert b"connection: close" in head.lower()
    document = json.loads(body)
    assert document["request_id"].encode() in head
    return document["code"]


async def test_requests_are_answered_one_after_another() -> None:
    async with serving() as server:
        received = await server.ask(
            (HEAD + b"Content-Length: 5\r\n\r\nhello") * 20, GET + b"Connection: close\r\n\r\n"
        )
    assert statuses(received) == [200] * 21
    assert received.count(b"5 bytes") == 20


# ---------------------------------------------------------------- headers


@pytest.mark.parametrize(
    "header",
    [b"X: y\r\n" * 200, b"X-A: " + b"a" * 70_000 + b"\r\n", b"X-A: " + b"a" * 5_000_000],
    ids=["many", "long", "endless"],
)
async def test_headers_are_bounded(header: bytes) -> None:
    async with serving() as server:
        received = await server.ask(
            GET, *(header[i : i + 100_000] for i in range(0, len(header), 100_000)), b"\r\n"
        )
    assert statuses(received) == [431]
    assert error_of(received) == "headers_too_large"


async def test_a_url_counts_as_header() -> None:
    async with serving() as server:
        assert statuses(
            await server.ask(b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n")
        ) == [431]


async def test_trailers_are_bounded_and_dropped() -> None:
    chunked = HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n"
    async with serving() as server:
        assert statuses(await server.ask(chunked + b"X: y\r\n" * 40_000 + b"\r\n")) == [431]
        few = await server.ask(chunked + b"X: y\r\n\r\n" + GET + b"Connection: close\r\n\r\n")
    assert statuses(few) == [200, 200]


async def test_what_is_not_http_gets_a_typed_error() -> None:
    async with serving() as server:
        assert error_of(await server.ask(b"\x16\x03\x01\0\xc8 hello\r\n\r\n")) == "malformed_body"


async def test_http_without_a_version_is_refused() -> None:
    async with serving() as server:
        assert error_of(await server.ask(b"GET /\r\n\r\n")) == "malformed_body"


async def test_what_follows_a_refusal_is_not_read_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_protocol, "_LINGER_BYTES", 1_000_000)
    monkeypatch.setattr(http_protocol, "_LINGER_S", 60)
    async with serving() as server:
        _, writer = await server.connect()
        writer.write(b"NONSENSE\r\n\r\n")
        sent = 0
        with suppress(ConnectionError):
            while sent < 100_000_000:
                writer.write(bytes(100_000))
                await writer.drain()
                sent += 100_000
        assert sent < 100_000_000


async def test_a_bad_request_behind_a_good_one_does_not_take_its_response() -> None:
    async with serving() as server:
        received = await server.ask(HEAD + b"Content-Length: 5\r\n\r\nhelloNONSENSE\r\n\r\n")
    assert statuses(received) == [200]
    assert received.endswith(b"5 bytes")


# ---------------------------------------------------------------- upgrades


@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: 5\r\n\r\nhello",
        b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    ],
    ids=["length", "chunked"],
)
@pytest.mark.parametrize("split", [False, True])
async def test_an_upgrade_to_http_2_is_not_taken(framing: bytes, split: bool) -> None:
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
    request = HEAD + upgrade + framing
    pieces = [request[i : i + 7] for i in range(0, len(request), 7)] if split else [request]
    async with serving() as server:
        received = await server.ask(*pieces, GET + b"Connection: close\r\n\r\n")
    assert statuses(received) == [200, 200]
    assert b"5 bytes" in received


async def test_an_upgrade_keeps_the_wish_to_close() -> None:
    async with serving(idle_timeout_s=60) as server:
        received = await server.ask(GET + b"Connection: Upgrade, close\r\nUpgrade: h2c\r\n\r\n")
    assert statuses(received) == [200]


async def test_a_tunnel_is_refused() -> None:
    async with serving() as server:
        assert statuses(await server.ask(b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n")) == [400]


async def test_requests_leave_no_garbage() -> None:
    """To collect it halts all threads: what a request had is freed when it has its response."""
    async with serving() as server:
        await server.ask(LAST)
        gc.collect()
        gc.disable()
        try:
            received = await server.ask((GET + b"\r\n") * 20, *[full(b"")] * 20, LAST)
            garbage = gc.collect()
        finally:
            gc.enable()
    assert len(statuses(received)) == 41
    assert garbage < 41


# ---------------------------------------------------------------- time


async def test_a_connection_that_says_nothing_is_ended() -> None:
    async with serving(header_timeout_s=0.2) as server:
        assert await server.ask() == b""


async def test_headers_that_trickle_are_refused() -> None:
    async with serving(header_timeout_s=0.3) as server:
        received = await server.ask(GET + b"X-A: ", *[b"a"] * 50)
    assert error_of(received) == "request_timeout"


async def test_a_body_that_trickles_is_refused() -> None:
    async with serving(stall_timeout_s=0.3) as server:
        received = await server.ask(HEAD + b"Content-Length: 1000\r\n\r\n", *[b"a"] * 50)
        assert server.table.buffered_bytes == 0
    assert statuses(received) == [408]
    assert error_of(received) == "request_timeout"


async def test_a_refusal_carries_the_id_of_its_request_and_no_other() -> None:
    mine, body = b"X-Request-ID: mine\r\n", b"Content-Length: 1000\r\n\r\n"
    async with serving(stall_timeout_s=0.2, header_timeout_s=0.2) as server:
        assert b"x-request-id: mine" in (await server.ask(HEAD + mine + body, b"a")).lower()
        assert b"x-request-id: mine" in (await server.ask(HEAD + mine + b"X-A: ", b"a")).lower()
        last = await server.ask(full(mine), b"nonsense\r\n\r\n")
    assert statuses(last) == [200, 400]
    assert b": mine" not in last.rpartition(b"HTTP/1.1 ")[2]


async def test_a_slow_body_is_taken_at_the_least_rate() -> None:
    async with serving(stall_timeout_s=0.3, min_bytes_per_s=100) as server:
        received = await server.ask(
            HEAD + b"Connection: close\r\nContent-Length: 250\r\n\r\n", *[b"abcde"] * 50
        )
    assert statuses(received) == [200]


async def test_an_idle_connection_is_ended_whatever_line_ends_it_sends() -> None:
    async with serving(idle_timeout_s=0.3) as server:
        assert statuses(await server.ask(GET + b"\r\n", *[b"\r\n"] * 60)) == [200]


async def test_a_client_that_does_not_read_is_dropped() -> None:
    async with serving(stall_timeout_s=0.3) as server:
        reader, writer = await server.connect()
        reader._transport.pause_reading()
        writer.write(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n")
        await eventually(lambda: server.table._open)
        await eventually(lambda: not server.table._open)


# ---------------------------------------------------------------- number and size


async def test_the_one_that_waits_longest_makes_room() -> None:
    async with serving(max_connections=3) as server:
        waiting = [await server.connect() for _ in range(3)]
        await eventually(lambda: len(server.table._open) == 3)
        received = await server.ask(GET + b"Connection: close\r\n\r\n")
        assert statuses(received) == [200]
        with suppress(ConnectionError):
            assert await asyncio.wait_for(waiting[0][0].read(), 1) == b""
        assert not waiting[2][0].at_eof()


async def test_connections_with_requests_are_not_ended_for_new_ones() -> None:
    async with serving(max_connections=2, max_per_address=2) as server:
        busy = [await server.connect() for _ in range(2)]
        for _, writer in busy:
            writer.write(HEAD + b"Content-Length: 5\r\n\r\nhel")
        await eventually(lambda: server.table.buffered_bytes == 2 * len(b"hel"))
        assert error_of(await server.ask(GET + b"\r\n")) == "overloaded"
        for reader, writer in busy:
            writer.write(b"lo")
            assert statuses(await reader.readuntil(b"bytes")) == [200]


async def test_bodies_have_a_bound_in_all() -> None:
    head = HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n"
    async with serving(max_buffered_mb=4.3) as server:
        others = [await server.connect() for _ in range(3)]
        for _, writer in others:
            writer.write(head % 1_400_001 + bytes(1_400_000))
        await eventually(lambda: server.table.buffered_bytes == 4_200_000)
        assert error_of(await server.ask(head % 2_000_000 + bytes(1_500_000))) == "overloaded"
        assert statuses(await server.ask(head % 300_000 + bytes(300_000))) == [200]
        for reader, writer in others:
            writer.write(b"a")
            assert statuses(await reader.read()) == [200]
        assert server.table.buffered_bytes == 0


@pytest.mark.parametrize(("size", "status"), [(1, 400), (40, 400), (100, 200)])
async def test_a_body_in_many_small_pieces_is_refused(size: int, status: int) -> None:
    head = HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    piece = b"%x\r\n%b\r\n" % (size, bytes(size))
    async with serving() as server:
        received = await server.ask(head, piece * 10_000, b"0\r\n\r\n")
        assert statuses(received) == [status]
        assert server.table.buffered_bytes == 0


async def test_an_early_response_can_be_read_and_ends_the_connection() -> None:
    async with serving() as server:
        reader, writer = await server.connect()
        writer.write(b"POST /early HTTP/1.1\r\nHost: a\r\nContent-Length: 50000000\r\n\r\n")
        with suppress(ConnectionError):
            for _ in range(100):
                writer.write(bytes(100_000))
                await writer.drain()
        received = await asyncio.wait_for(reader.read(), 10)
    assert statuses(received) == [200]
    assert b"connection: close" in received
    assert received.endswith(b"0 bytes")


async def test_a_network_of_ipv6_is_one_address() -> None:
    address = http_protocol._address
    assert address(("2001:db8::1", 1)) == address(("2001:db8::ffff:2", 2))
    assert address(("2001:db8:0:1::1", 1)) != address(("2001:db8::1", 2))
    assert address(("192.0.2.1", 1)) != address(("192.0.2.2", 1))


# ---------------------------------------------------------------- refusals by the head


def refuse(scope: Any) -> tuple[Response, float] | None:
    delay_s = 0.2 if scope["query_string"] else 0.0
    return (Response("full", 429), delay_s) if scope["path"] == "/full" else None


def full(more: bytes) -> bytes:
    return b"POST /full HTTP/1.1\r\nHost: a\r\n" + more + b"\r\n"


LAST = GET + b"Connection: close\r\n\r\n"


@pytest.mark.parametrize("size", [0, 5, 200_000])
async def test_who_is_refused_keeps_the_connection(size: int) -> None:
    """The body that comes all the same is read over, and kept nowhere."""
    async with serving(refuse=refuse, max_buffered_mb=0.001) as server:
        head, body = full(b"Content-Length: %d\r\n" % size), bytes(size)
        received = await server.ask(head, body, head + body, LAST)
        assert statuses(received) == [429, 429, 200]
        assert server.table.buffered_bytes == 0


@pytest.mark.parametrize(
    "more",
    [
        b"Content-Length: 5000000\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Content-Length: 5\r\nExpect: 100-continue\r\n",
        b"Content-Length: 5\r\nConnection: close\r\n",
    ],
)
async def test_the_connection_ends_where_much_may_come(more: bytes) -> None:
    async with serving(refuse=refuse) as server:
        received = await server.ask(full(more), LAST)
    assert statuses(received) == [429]
    assert b"connection: close" in received


async def test_refusals_that_come_together_are_in_order_and_one_at_a_time() -> None:
    refused = []

    def note(scope: Any) -> tuple[Response, float] | None:
        refused.append(scope["path"])
        return refuse(scope)

    request = full(b"Content-Length: 5\r\n") + b"hello"
    async with serving(refuse=note) as server:
        received = await server.ask(request * 20 + LAST)
    assert statuses(received)[0] == 429
    assert len(statuses(received)) == 21
    assert len(refused) == 1, "the others go through the loop one after another"


async def test_a_refusal_that_waits_its_turn_holds_up_nothing_but_its_connection() -> None:
    delayed = full(b"Content-Length: 5\r\n").replace(b"/full", b"/full?later") + b"hello"
    async with serving(refuse=refuse) as server:
        slow = asyncio.create_task(
            server.ask(delayed + HEAD + b"Content-Length: 3\r\n\r\nyou", LAST)
        )
        assert statuses(await server.ask(LAST)) == [200]
        assert not slow.done()
        received = await slow
        assert statuses(received) == [429, 200, 200], "in the order in which they were asked"
        assert b"3 bytes" in received
        assert server.table.buffered_bytes == 0


async def test_who_leaves_before_the_refusal_is_forgotten() -> None:
    async with serving(refuse=refuse) as server:
        _, writer = await server.connect()
        writer.write(full(b"Content-Length: 9\r\n").replace(b"/full", b"/full?later"))
        await eventually(lambda: server.table._open)
        writer.transport.abort()
        await asyncio.sleep(0.3)
        assert statuses(await server.ask(LAST)) == [200]
        await eventually(lambda: not server.table._open)


async def test_a_refused_body_that_trickles_ends_the_connection() -> None:
    async with serving(refuse=refuse, min_bytes_per_s=1000, stall_timeout_s=0.2) as server:
        reader, writer = await server.connect()
        writer.write(full(b"Content-Length: 5000\r\n") + b"a")
        received = await asyncio.wait_for(_read_all(reader), 10)
    assert statuses(received) == [429], "one response and no second one"


async def test_a_connection_is_idle_when_the_rest_of_a_refused_body_has_come() -> None:
    async with serving(refuse=refuse, idle_timeout_s=0.2) as server:
        reader, writer = await server.connect()
        writer.write(full(b"Content-Length: 5\r\n"))
        await reader.readuntil(b"full")
        writer.write(b"hello")
        assert await asyncio.wait_for(reader.read(), 10) == b""
