"""Image URLs: allowed hosts, allowed addresses, and the caps on size and time."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import pytest

from models.errors import HeatlensError, ImageTooLarge, ImageUndecodable, UrlInputDisabled
from service.api.fetch import UrlFetcher, is_public, resolve

pytestmark = pytest.mark.anyio

Handler = Callable[[str, asyncio.StreamWriter], Awaitable[None]]


def looks_up(*addresses: str) -> Callable[[str, int], Awaitable[Sequence[str]]]:
    async def find(host: str, port: int) -> Sequence[str]:
        return addresses

    return find


@asynccontextmanager
async def server(handler: Handler) -> AsyncIterator[int]:
    """A plain HTTP server on the loopback; passes request heads to `handler`, yields its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        try:
            await handler(head.decode(), writer)
            await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listening:
        yield listening.sockets[0].getsockname()[1]


@asynccontextmanager
async def fetcher(*hosts: str, **kwargs: object) -> AsyncIterator[UrlFetcher]:
    """A fetcher that may connect to the loopback, where every name is found."""
    options = {
        "resolve": looks_up("127.0.0.1"),
        "allow": lambda _: True,
        "allow_http": True,
        **kwargs,
    }
    made = UrlFetcher(hosts, **options)
    try:
        yield made
    finally:
        await made.close()


def respond(
    writer: asyncio.StreamWriter, body: bytes, *, head: str = "", status: int = 200
) -> None:
    writer.write(f"HTTP/1.1 {status} X\r\n{head}Connection: close\r\n\r\n".encode() + body)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.0.1", False),
        ("169.254.169.254", False),
        ("168.63.129.16", False),
        ("::ffff:168.63.129.16", False),
        ("192.0.0.192", False),
        ("100.100.100.200", False),
        ("fd00:ec2::254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:93.184.216.34", True),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("2001:0:4136:e378:8000:63bf:3fff:fdd2", False),
        ("nonsense", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) is public


async def test_fetches_with_the_name_from_the_pinned_address() -> None:
    heads = []

    async def handler(head: str, writer: asyncio.StreamWriter) -> None:
        heads.append(head)
        respond(writer, b"image")

    async with server(handler) as port, fetcher(f"pics.example:{port}") as made:
        url = f"http://pics.example:{port}/a/cat.jpg?size=2"
        assert await made.fetch(url, max_bytes=100) == b"image"
    (head,) = heads
    assert head.startswith("GET /a/cat.jpg?size=2 HTTP/1.1\r\n")
    assert f"host: pics.example:{port}\r\n" in head.lower()
    assert "accept-encoding: identity\r\n" in head.lower()


async def test_resolves_once() -> None:
    asked = []

    async def find(host: str, port: int) -> Sequence[str]:
        asked.append((host, port))
        return ["127.0.0.1"]

    async def handler(head: str, writer: asyncio.StreamWriter) -> None:
        respond(writer, b"image")

    async with server(handler) as port, fetcher(f"a.example:{port}", resolve=find) as made:
        await made.fetch(f"http://a.example:{port}/", max_bytes=100)
    assert asked == [("a.example", port)]


@pytest.mark.parametrize(
    "url",
    [
        "https://evil.example/cat.jpg",
        "https://pics.example.evil.example/",
        "https://pics.example:8443/",
        "https://xpics.example/",
        "https://deep.example/",
        "ftp://pics.example/",
        "file:///etc/passwd",
        "data:image/png;base64,aaaa",
        "//pics.example/",
        "/etc/passwd",
        "",
        "https://user@pics.example/",
        "https://user:pass@pics.example/",
        "https://",
        "https://pics.example\\@evil.example/",
        "https://evil.example#@pics.example/",
        "https://[::1]/",
        "https://[bad/",
        "https://pics.example:99999/",
        "https://pics.example:x/",
        "http://\x00pics.example/",
    ],
)
async def test_refused_urls(url: str) -> None:
    async def find(host: str, port: int) -> Sequence[str]:
        raise AssertionError("looked up")

    async with fetcher("pics.example", "*.deep.example", resolve=find) as made:
        with pytest.raises(UrlInputDisabled):
            await made.fetch(url, max_bytes=100)


@pytest.mark.parametrize("host", ["a.deep.example", "a.b.deep.example", "A.DEEP.example"])
async def test_wildcards(host: str) -> None:
    async with fetcher("*.deep.example", resolve=looks_up()) as made:
        with pytest.raises(UrlInputDisabled, match="public internet"):  # named, but not found
            await made.fetch(f"https://{host}/", max_bytes=100)


@pytest.mark.parametrize(
    "addresses",
    [("10.0.0.1",), ("93.184.216.34", "10.0.0.1"), ("168.63.129.16",), ("192.0.0.192",), ()],
)
async def test_private_addresses_are_not_connected_to(addresses: tuple[str, ...]) -> None:
    find = looks_up(*addresses)
    async with fetcher("a.example", resolve=find, allow=is_public) as made:
        with pytest.raises(UrlInputDisabled, match="public internet"):
            await made.fetch("http://a.example/", max_bytes=100)


async def test_redirects_are_checked_again() -> None:
    async def handler(head: str, writer: asyncio.StreamWriter) -> None:
        path = head.split()[1]
        targets = {"/away": "http://169.254.169.254/", "/round": "/round", "/near": "/there"}
        if path in targets:
            respond(writer, b"", head=f"Location: {targets[path]}\r\n", status=302)
        else:
            respond(writer, b"image")

    async with server(handler) as port, fetcher(f"a.example:{port}") as made:
        base = f"http://a.example:{port}"
        assert await made.fetch(f"{base}/near", max_bytes=100) == b"image"
        with pytest.raises(UrlInputDisabled, match="host"):
            await made.fetch(f"{base}/away", max_bytes=100)
        with pytest.raises(ImageUndecodable, match="redirects"):
            await made.fetch(f"{base}/round", max_bytes=100)


async def test_bytes_are_capped() -> None:
    sent = 0

    async def handler(head: str, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        respond(writer, b"")
        for _ in range(100_000):
            writer.write(bytes(1000))
            sent += 1000
            await writer.drain()

    async with server(handler) as port, fetcher(f"a.example:{port}") as made:
        with pytest.raises(ImageTooLarge):
            await made.fetch(f"http://a.example:{port}/", max_bytes=5_000)
    assert sent < 50_000_000


async def test_time_is_capped() -> None:
    async def handler(head: str, writer: asyncio.StreamWriter) -> None:
        respond(writer, b"")
        for _ in range(100):
            writer.write(b"x")
            await asyncio.sleep(0.02)

    async with server(handler) as port, fetcher(f"a.example:{port}", timeout_s=0.2) as made:
        with pytest.raises(ImageUndecodable, match="fetched"):
            await made.fetch(f"http://a.example:{port}/", max_bytes=5_000)


@pytest.mark.parametrize(
    ("status", "head"), [(404, ""), (500, ""), (304, ""), (200, "Content-Encoding: gzip\r\n")]
)
async def test_other_responses(status: int, head: str) -> None:
    async def handler(_: str, writer: asyncio.StreamWriter) -> None:
        respond(writer, b"secret text", head=head, status=status)

    async with server(handler) as port, fetcher(f"a.example:{port}") as made:
        with pytest.raises(ImageUndecodable) as caught:
            await made.fetch(f"http://a.example:{port}/", max_bytes=5_000)
    assert "secret" not in caught.value.message


@pytest.mark.parametrize("error", [OSError("secret"), UnicodeError("secret")])
async def test_failures_reveal_nothing(error: Exception) -> None:
    async def find(host: str, port: int) -> Sequence[str]:
        raise error

    async with fetcher("a.example", resolve=find) as made:
        with pytest.raises(HeatlensError) as caught:
            await made.fetch("http://a.example/", max_bytes=10)
    assert "secret" not in caught.value.message


async def test_refused_connection() -> None:
    async with fetcher("a.example:9") as made:
        with pytest.raises(ImageUndecodable):
            await made.fetch("http://a.example:9/", max_bytes=10)


async def test_the_environments_proxy_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async def handler(head: str, writer: asyncio.StreamWriter) -> None:
        respond(writer, b"image")

    async with server(handler) as port:
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
        async with fetcher(f"a.example:{port}") as made:
            assert await made.fetch(f"http://a.example:{port}/", max_bytes=100) == b"image"


async def test_resolve_finds_the_loopback() -> None:
    assert "127.0.0.1" in await resolve("localhost", 80)


# Every block of IANA's registries of special-purpose addresses that is not global, multicast,
# site-local and compatible addresses, and metadata services of clouds.
SPECIAL = """
0.0.0.0/8 0.0.0.0/32 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12
192.0.0.0/24 192.0.0.0/29 192.0.0.8/32 192.0.0.9/32 192.0.0.10/32 192.0.0.170/32 192.0.0.171/32
192.0.2.0/24 192.31.196.0/24 192.52.193.0/24 192.88.99.0/24 192.88.99.2/32 192.168.0.0/16
192.175.48.0/24 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/4 240.0.0.0/4
255.255.255.255/32 168.63.129.16/32 192.0.0.192/32 169.254.169.254/32 169.254.170.2/32
100.100.100.200/32 ::1/128 ::/128 ::ffff:0:0/96 ::/96 64:ff9b::/96 64:ff9b:1::/48 100::/64
100:0:0:1::/64 2001::/23 2001::/32 2001:1::1/128 2001:1::2/128 2001:1::3/128 2001:2::/48
2001:3::/32 2001:4:112::/48 2001:10::/28 2001:20::/28 2001:30::/28 2001:db8::/32 2002::/16
2620:4f:8000::/48 3fff::/20 5f00::/16 fc00::/7 fe80::/10 fec0::/10 ff00::/8 fd00:ec2::254/128
"""


@pytest.mark.parametrize("block", SPECIAL.split())
async def test_no_address_of_a_special_block_is_public(block: str) -> None:
    network = ipaddress.ip_network(block)
    assert not is_public(str(network[0]))
    assert not is_public(str(network[-1]))


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "8.8.8.8", "193.0.6.139", "2606:4700::1111", "2a00::1"]
)
async def test_other_addresses_are_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address", ["127.1", "0x7f000001", "2130706433", "fe80::1%eth0", "localhost", ""]
)
async def test_what_is_no_plain_address_is_not_public(address: str) -> None:
    assert not is_public(address)


async def test_plain_http_is_refused_unless_it_is_allowed() -> None:
    async with fetcher("images.example", allow_http=False) as made:
        with pytest.raises(UrlInputDisabled, match="https"):
            await made.fetch("http://images.example/", max_bytes=10)


async def test_a_redirect_to_plain_http_is_refused() -> None:
    async def handler(_: str, writer: asyncio.StreamWriter) -> None:
        respond(writer, b"", head="Location: ftp://images.example/\r\n", status=302)

    async with server(handler) as port, fetcher(f"images.example:{port}") as made:
        with pytest.raises(UrlInputDisabled, match="Only"):
            await made.fetch(f"http://images.example:{port}/", max_bytes=10)


async def test_a_name_that_changes_its_address_is_looked_up_once() -> None:
    """Rebinding: the address that was checked is the one that is connected to."""
    asked: list[str] = []

    async def rebinding(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["169.254.169.254"]

    async def handler(_: str, writer: asyncio.StreamWriter) -> None:
        respond(writer, b"image")

    async with (
        server(handler) as port,
        fetcher(
            f"images.example:{port}", resolve=rebinding, allow=lambda a: a == "127.0.0.1"
        ) as made,
    ):
        url = f"http://images.example:{port}/"
        assert await made.fetch(url, max_bytes=10) == b"image"
        assert asked == ["images.example"]
        with pytest.raises(UrlInputDisabled, match="public"):
            await made.fetch(url, max_bytes=10)
