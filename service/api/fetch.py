"""Fetching images by URL, guarded against server-side request forgery.

Hosts are allow-listed. One parser reads the URL for the check and for the request, the name is
resolved once, every address must be public, and the connection goes to the address that was
checked. Redirects pass the same checks.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Sequence

import httpx

from models.errors import HeatlensError, ImageTooLarge, ImageUndecodable, UrlInputDisabled


def _networks(*texts: str) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    return tuple(map(ipaddress.ip_network, texts))


Resolve = Callable[[str, int], Awaitable[Sequence[str]]]

_MAX_REDIRECTS = 3
_PORTS = {"http": 80, "https": 443}
# What is special within the space of addresses that are unicast and global. IANA's registries of
# special-purpose addresses (RFC 6890, as of 2025), multicast, and the metadata services of clouds
# at addresses that count as public.
_GLOBAL_V6 = ipaddress.ip_network("2000::/3")
_SPECIAL_V6 = _networks(
    "2001::/23",  # IETF protocols: Teredo, benchmarking, ORCHID, drone identities
    "2001:db8::/32",
    "2002::/16",  # 6to4
    "2620:4f:8000::/48",  # AS112
    "3fff::/20",
)
_SPECIAL_V4 = _networks(
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "168.63.129.16/32",  # Azure
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.31.196.0/24",  # AS112
    "192.52.193.0/24",  # AMT
    "192.88.99.0/24",  # 6to4 relays
    "192.168.0.0/16",
    "192.175.48.0/24",  # AS112
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "224.0.0.0/4",
    "240.0.0.0/4",
)


async def resolve(host: str, port: int) -> Sequence[str]:
    """Resolve a host to its addresses without blocking the loop."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


def is_public(address: str) -> bool:
    """Whether an address is on the public internet, and not a special or tunnelled one."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        # Scoped addresses such as fe80::1%eth0.
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        # Translated and compatible forms of IPv4 addresses lie outside of that space.
        return ip in _GLOBAL_V6 and not any(ip in network for network in _SPECIAL_V6)
    return not any(ip in network for network in _SPECIAL_V4)


class UrlFetcher:
    """Fetches images over HTTP and HTTPS.

    Args:
        hosts: the allowed hosts: `example.org`, `*.example.org` (any name below it), each with
            `:port` if it is not the default port of the scheme.
        allow_http: whether plain `http` is allowed.
        timeout_s: for one image, redirects included.
        resolve: finds the addresses of a host.
        allow: whether an address may be connected to.
    """

    def __init__(
        self,
        hosts: Sequence[str],
        *,
        allow_http: bool = False,
        timeout_s: float = 10.0,
        resolve: Resolve = resolve,
        allow: Callable[[str], bool] = is_public,
    ) -> None:
        self._schemes = _PORTS.keys() if allow_http else {"https"}
        self._hosts = frozenset(host.lower() for host in hosts)
        self._timeout_s = timeout_s
        self._resolve = resolve
        self._allow = allow
        # No proxy or netrc from the environment, no unchecked redirects, no decompression, and no
        # connection kept: a pool by address would mix up hosts.
        self._client = httpx.AsyncClient(
            trust_env=False,
            follow_redirects=False,
            timeout=timeout_s,
            limits=httpx.Limits(max_keepalive_connections=0),
            headers={"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "heatlens"},
        )

    async def close(self) -> None:
        """Close idle connections."""
        await self._client.aclose()

    async def fetch(self, url: str, *, max_bytes: int) -> bytes:
        """Fetch the bytes behind a URL; the errors have no field.

        Raises:
            UrlInputDisabled: the host, its address or a redirect is not allowed.
            ImageTooLarge: more than `max_bytes`.
            ImageUndecodable: no image arrived in time.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._follow(httpx.URL(url), max_bytes)
        except HeatlensError:
            raise
        except httpx.InvalidURL as error:
            raise UrlInputDisabled("The URL is malformed.") from error
        except (httpx.HTTPError, OSError, UnicodeError, TimeoutError) as error:
            raise ImageUndecodable("The URL could not be fetched.") from error

    async def _follow(self, url: httpx.URL, max_bytes: int) -> bytes:
        for _ in range(_MAX_REDIRECTS + 1):
            self._check(url)
            async with self._client.stream(
                "GET",
                url.copy_with(host=await self._address(url)),
                headers={"Host": url.netloc.decode("ascii")},
                extensions={"sni_hostname": url.raw_host.decode("ascii")},
            ) as response:
                if response.has_redirect_location:
                    url = url.join(response.headers["location"])
                    continue
                if response.status_code != 200 or "content-encoding" in response.headers:
                    raise ImageUndecodable("The URL did not answer with an image.")
                return await _read(response, max_bytes)
        raise ImageUndecodable("The URL redirects too often.")

    def _check(self, url: httpx.URL) -> None:
        if url.scheme not in self._schemes or not url.raw_host or url.userinfo:
            allowed = " and ".join(sorted(self._schemes))
            raise UrlInputDisabled(f"Only {allowed} URLs without credentials are allowed.")
        host = url.raw_host.decode("ascii").lower()
        port = "" if url.port in (None, _PORTS[url.scheme]) else f":{url.port}"
        labels = host.split(".")
        wildcards = {f"*.{'.'.join(labels[i:])}{port}" for i in range(1, len(labels))}
        if self._hosts.isdisjoint({host + port, *wildcards}):
            raise UrlInputDisabled("The host of this URL is not allowed.")

    async def _address(self, url: httpx.URL) -> str:
        host = url.raw_host.decode("ascii")
        addresses = await self._resolve(host, url.port or _PORTS[url.scheme])
        if not addresses or not all(map(self._allow, addresses)):
            raise UrlInputDisabled("The host of this URL is not on the public internet.")
        return addresses[0]


async def _read(response: httpx.Response, max_bytes: int) -> bytes:
    data = bytearray()
    async for chunk in response.aiter_raw():
        data += chunk
        if len(data) > max_bytes:
            raise ImageTooLarge(f"The image has more than {max_bytes} bytes.")
    return bytes(data)
