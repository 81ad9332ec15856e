"""Ids of requests: inbound ones if they are sane, else new ones that sort by time."""

from __future__ import annotations

import re
import secrets
import time

_SANE = re.compile(r"[A-Za-z0-9._:@/+=-]{1,128}", re.ASCII)
_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def request_id_of(inbound: str | None) -> str:
    """Keep an inbound id that can stand in a header and a log line; otherwise make one."""
    return inbound if inbound and _SANE.fullmatch(inbound) else new_id()


def new_id() -> str:
    """A ULID: 48 bits of milliseconds and 80 random bits, as 26 characters of Crockford's base 32."""
    number = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(80)
    return "".join(_ALPHABET[number >> shift & 31] for shift in range(125, -1, -5))
