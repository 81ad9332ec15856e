"""Where the load goes: a URL, resolved once and checked, so that nobody loads a stranger's machine by a slip."""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit

from models.types import Struct

_PORTS = {"http": 80, "https": 443}


class AddressRefused(ValueError):
    """The URL cannot be used; the text says why."""


class Address(Struct):
    """A resolved URL.

    Attributes:
        host: name for the `Host` header and for TLS.
        ip: address to connect to; resolved once, so that it is the one that was checked.
        path: prefix of every path, without a slash at its end.
    """

    host: str
    ip: str
    port: int
    tls: bool = False
    path: str = ""

    @property
    def authority(self) -> str:
        """Value of the `Host` header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return (
            host if self.port == _PORTS["https" if self.tls else "http"] else f"{host}:{self.port}"
        )


def parse_url(url: str, *, allow_remote: bool = False) -> Address:
    """Resolve a URL such as `http://127.0.0.1:8000` or `localhost:8000`.

    Args:
        url: scheme (`http` unless given), host, port, and a prefix of the path.
        allow_remote: accept hosts other than this machine.

    Raises:
        AddressRefused: not an HTTP URL, an unknown host, or one that is not this machine.
    """
    split = urlsplit(url if "://" in url else f"http://{url}")
    try:
        port = split.port or _PORTS.get(split.scheme, 0)
    except ValueError:
        port = 0
    if split.scheme not in _PORTS or not split.hostname or not port:
        raise AddressRefused("A URL is http://HOST:PORT.")
    ips = _resolve(split.hostname, port)
    if not allow_remote and not all(ipaddress.ip_address(ip).is_loopback for ip in ips):
        raise AddressRefused(
            f"{split.hostname} is not this machine; --allow-remote loads it nevertheless."
        )
    return Address(
        host=split.hostname,
        ip=ips[0],
        port=port,
        tls=split.scheme == "https",
        path=split.path.rstrip("/"),
    )


def _resolve(host: str, port: int) -> list[str]:
    """Addresses of a host, IPv4 first: services bind that one by habit."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        raise AddressRefused(f"{host} cannot be resolved.") from None
    found.sort(key=lambda row: row[0] != socket.AF_INET)
    return [str(row[4][0]).partition("%")[0] for row in found]
