"""Waiting for conditions: polls, because processes and sockets offer no events."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException
from urllib.parse import urlsplit


def until(
    condition: Callable[[], object], *, timeout_s: float = 20.0, every_s: float = 0.01
) -> float:
    """Wait until a condition holds, looking every so often; returns the seconds that took."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < timeout_s, "it did not happen in time"
        time.sleep(every_s)
    return time.monotonic() - begun


def answers(url: str) -> bool:
    """Whether a GET is answered with 200, at little cost to a service that is starting."""
    address = urlsplit(url)
    connection = HTTPConnection(address.netloc, timeout=30)
    with contextlib.closing(connection), contextlib.suppress(OSError, HTTPException):
        connection.request("GET", address.path)
        return connection.getresponse().status == 200
    return False


async def eventually(condition: Callable[[], object], *, timeout_s: float = 20.0) -> float:
    """The same, while the event loop runs."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < timeout_s, "it did not happen in time"
        await asyncio.sleep(0.005)
    return time.monotonic() - begun
