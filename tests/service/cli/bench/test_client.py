"""The client against a server that behaves and one that does not, and the URLs that it accepts."""

from __future__ import annotations

import asyncio
import email

import pytest

from service.cli.bench.client import CONNECTION_LOST, TIMEOUT, Client, NoResponse, parse_url
from service.cli.bench.requests import BenchError, Request, image_requests

pytestmark = pytest.mark.anyio

PING = Request(path="/")


async def test_requests_arrive_complete_and_in_order_on_one_connection(serve, respond) -> None:
    async def echo(seen):
        return respond(seen.body)

    images = [b"first", b"second" * 500_000]
    requests = image_requests(images, options={"methods": "gradcam,layercam"}, key="k")
    async with serve(echo) as (server, url), Client(url, timeout_s=2) as client:
        bodies = [(await client.send(r, request_id="id-1")).body for r in requests]
    assert bodies == images
    seen = server.seen[1]
    assert seen.line == "POST /v1/explain?methods=gradcam,layercam HTTP/1.1"
    assert seen.headers["x-request-id"] == "id-1"
    assert seen.headers["authorization"] == "bearer k"
    assert seen.headers["content-type"] == "application/octet-stream"
    assert seen.headers["host"] == url.removeprefix("http://")
    assert {seen.connection for seen in server.seen} == {1}


async def test_chunks_are_put_together_and_the_next_response_still_fits(serve, respond) -> None:
    chunked = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"3;name=value\r\nabc\r\nA\r\n0123456789\r\n0\r\nX-Trailer: yes\r\n\r\n"
    )

    async def alternate(_seen):
        return chunked if len(server.seen) % 2 else respond(b"plain")

    async with serve(alternate) as (server, url), Client(url, timeout_s=2) as client:
        bodies = [(await client.send(PING)).body for _ in range(3)]
    assert bodies == [b"abc0123456789", b"plain", b"abc0123456789"]


@pytest.mark.parametrize(
    ("raw", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", b"ok"),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok", b"ok"),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nuntil the end", b"until the end"),
    ],
)
async def test_a_closed_connection_is_not_used_again(serve, raw: bytes, body: bytes) -> None:
    async def close(_seen):
        return raw

    async with serve(close) as (server, url), Client(url, timeout_s=2) as client:
        for _ in range(2):
            assert (await client.send(PING)).body == body
    assert [seen.connection for seen in server.seen] == [1, 2]


async def test_a_response_without_a_body_keeps_the_connection(serve) -> None:
    async def nothing(_seen):
        return b"HTTP/1.1 204 No Content\r\n\r\n"

    async with serve(nothing) as (server, url), Client(url, timeout_s=2) as client:
        for _ in range(2):
            response = await client.send(PING)
            assert (response.status, response.body) == (204, b"")
    assert [seen.connection for seen in server.seen] == [1, 1]


async def test_redirects_are_not_followed(serve) -> None:
    async def elsewhere(_seen):
        return b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n"

    async with serve(elsewhere) as (server, url), Client(url, timeout_s=2) as client:
        assert (await client.send(PING)).status == 302
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", CONNECTION_LOST),
        (b"nonsense\r\n\r\n", CONNECTION_LOST),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\nConnection: close\r\n\r\nshort",
            CONNECTION_LOST,
        ),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", CONNECTION_LOST),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999\r\n\r\n", TIMEOUT),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", CONNECTION_LOST),
        (b"HTTP/1.1 200 OK\r\n", TIMEOUT),
    ],
)
async def test_a_broken_response_is_a_failure_and_the_next_request_succeeds(
    serve, respond, raw: bytes, code: str
) -> None:
    async def break_first(_seen):
        return raw if len(server.seen) == 1 else respond(b"{}")

    async with serve(break_first) as (server, url), Client(url, timeout_s=0.3) as client:
        with pytest.raises(NoResponse) as failure:
            await client.send(PING)
        assert failure.value.code == code
        assert str(failure.value)
        assert (await client.send(PING)).body == b"{}"
    assert [seen.connection for seen in server.seen] == [1, 2]


async def test_a_late_response_does_not_reach_the_next_request(serve, respond) -> None:
    given_up, is_late = asyncio.Event(), asyncio.Event()

    async def late_once(seen):
        if seen.body == b"slow":
            await given_up.wait()
            is_late.set()
        return respond(seen.body)

    async with serve(late_once) as (_, url), Client(url, timeout_s=0.2) as client:
        with pytest.raises(NoResponse) as failure:
            await client.send(Request(path="/", body=b"slow"))
        assert failure.value.code == TIMEOUT
        given_up.set()
        await is_late.wait()
        assert (await client.send(Request(path="/", body=b"quick"))).body == b"quick"


async def test_no_server() -> None:
    async with Client("http://127.0.0.1:9", timeout_s=2) as client:
        with pytest.raises(NoResponse, match=r"127\.0\.0\.1:9") as failure:
            await client.send(PING)
    assert failure.value.code == CONNECTION_LOST


# ---------------------------------------------------------------- URLs


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("127.0.0.1:81", "http://127.0.0.1:81"),
        ("localhost", "http://localhost"),
        ("http://[::1]:8000/service/", "http://[::1]:8000/service"),
        ("https://127.0.0.1", "https://127.0.0.1"),
        ("http://user:word@127.0.0.1:8000/?query#part", "http://127.0.0.1:8000"),
    ],
)
def test_urls_of_this_machine(text: str, url: str) -> None:
    assert parse_url(text) == url


@pytest.mark.parametrize("url", ["http://192.0.2.1:80", "http://8.8.8.8", "http://0.0.0.0:80"])
def test_other_machines_must_be_allowed(url: str) -> None:
    with pytest.raises(BenchError, match="--allow-remote"):
        parse_url(url)
    assert parse_url(url, allow_remote=True) == url


@pytest.mark.parametrize(
    "url", ["ftp://127.0.0.1", "http://", "http://127.0.0.1:99999", "http://h:x"]
)
def test_invalid_urls(url: str) -> None:
    with pytest.raises(BenchError, match="http://HOST:PORT"):
        parse_url(url)


async def test_a_refused_request_comes_again_when_it_was_told_to(serve, respond) -> None:
    async def busy(seen):
        if len(server.seen) < 4:
            wait = "Retry-After: 0\r\n"
            return respond({"code": "overloaded"}, status=429, headers=wait, seen=seen)
        return respond(b"", seen=seen)

    async with serve(busy) as (server, url):
        async with Client(url, [PING], timeout_s=2, retries=1) as client:
            refused = await client.call()
        async with Client(url, [PING], timeout_s=2, retries=5) as client:
            admitted = await client.call()
    assert (refused.status, refused.attempts, refused.code) == (429, 2, "overloaded")
    assert (admitted.status, admitted.attempts, admitted.code) == (200, 2, "")


async def test_a_form_holds_the_image_as_it_is(serve, respond) -> None:
    parts: list[bytes] = []

    async def keep(seen):
        message = f"Content-Type: {seen.headers['content-type']}\r\n\r\n".encode() + seen.body
        for part in email.message_from_bytes(message).get_payload():
            assert part.get_param("name", header="content-disposition") == "image"
            parts.append(part.get_payload(decode=True))
        return respond(b"")

    images = [b"first", bytes(range(256))]
    async with serve(keep) as (_, url), Client(url, timeout_s=2) as client:
        for request in image_requests(images, form=True):
            await client.send(request)
    assert parts == images
