"""The connection speaks HTTP/1.1: framing, keep-alive, and what is no answer."""

from __future__ import annotations

import pytest

from service.cli.bench.address import Address, AddressRefused, parse_url
from service.cli.bench.connection import Connection, ConnectionLost
from service.cli.bench.requests import make_request, picture_requests

pytestmark = pytest.mark.anyio

PING = b"POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n"


async def test_requests_arrive_whole_and_in_order_on_one_connection(serve, answer) -> None:
    async def echo(seen):
        return answer(seen.body)

    async with serve(echo) as (server, address):
        requests = picture_requests(
            address,
            [b"first", b"second" * 50_000],
            options={"methods": "gradcam,layercam"},
            key="k",
        )
        connection = Connection(address)
        bodies = [(await connection.exchange(r.with_id("id-1"))).body for r in requests]
        connection.close()
    assert bodies == [b"first", b"second" * 50_000]
    seen = server.seen[1]
    assert seen.line == "POST /v1/explain?methods=gradcam%2Clayercam HTTP/1.1"
    assert seen.headers["x-request-id"] == "id-1"
    assert seen.headers["authorization"] == "bearer k"
    assert seen.headers["host"] == f"127.0.0.1:{address.port}"
    assert {seen.connection for seen in server.seen} == {1}


async def test_chunks_are_put_together_and_the_next_answer_still_fits(serve, answer) -> None:
    chunked = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"3;name=value\r\nabc\r\nA\r\n0123456789\r\n0\r\nX-Trailer: yes\r\n\r\n"
    )

    async def alternate(_seen):
        return chunked if len(server.seen) % 2 else answer(b"plain")

    async with serve(alternate) as (server, address):
        connection = Connection(address)
        bodies = [(await connection.exchange(PING)).body for _ in range(3)]
        connection.close()
    assert bodies == [b"abc0123456789", b"plain", b"abc0123456789"]


@pytest.mark.parametrize(
    ("raw", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", b"ok"),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok", b"ok"),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nuntil the end", b"until the end"),
    ],
)
async def test_closing_answers_are_read_and_not_reused(serve, raw: bytes, body: bytes) -> None:
    async def close(_seen):
        return raw

    async with serve(close) as (_, address):
        connection = Connection(address)
        assert (await connection.exchange(PING)).body == body
        assert not connection.reusable
        connection.close()


async def test_an_answer_without_a_body_keeps_the_connection(serve) -> None:
    async def nothing(_seen):
        return b"HTTP/1.1 204 No Content\r\n\r\n"

    async with serve(nothing) as (_, address):
        connection = Connection(address)
        answer = await connection.exchange(PING)
        assert (answer.status, answer.body, connection.reusable) == (204, b"", True)
        connection.close()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\nConnection: close\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
    ],
)
async def test_what_is_no_answer_is_a_lost_connection(serve, raw: bytes) -> None:
    async def broken(_seen):
        return raw

    async with serve(broken) as (_, address):
        connection = Connection(address)
        with pytest.raises(ConnectionLost):
            await connection.exchange(PING)
        connection.close()


async def test_nobody_listens() -> None:
    connection = Connection(Address(host="127.0.0.1", ip="127.0.0.1", port=9))
    with pytest.raises(ConnectionLost, match="ConnectionRefusedError"):
        await connection.exchange(PING)


# ---------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("url", "authority", "path"),
    [
        ("http://127.0.0.1:8000", "127.0.0.1:8000", ""),
        ("127.0.0.1:81", "127.0.0.1:81", ""),
        ("localhost", "localhost", ""),
        ("http://[::1]:8000/service/", "[::1]:8000", "/service"),
        ("https://127.0.0.1", "127.0.0.1", ""),
    ],
)
def test_urls_of_this_machine(url: str, authority: str, path: str) -> None:
    address = parse_url(url)
    assert (address.authority, address.path) == (authority, path)
    assert make_request(address, "/x", b"").before.startswith(f"POST {path}/x HTTP/1.1".encode())


@pytest.mark.parametrize("url", ["http://192.0.2.1:80", "http://8.8.8.8", "http://0.0.0.0:80"])
def test_other_machines_need_leave(url: str) -> None:
    with pytest.raises(AddressRefused, match="--allow-remote"):
        parse_url(url)
    assert parse_url(url, allow_remote=True).port == 80


@pytest.mark.parametrize(
    "url", ["ftp://127.0.0.1", "http://", "http://127.0.0.1:99999", "http://h:x"]
)
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(AddressRefused):
        parse_url(url)
