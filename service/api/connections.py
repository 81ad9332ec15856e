"""The connections of a process: how many there are, from where, and what they keep in memory.

uvicorn accepts connections until the process has no descriptor left. Here the client that has
waited longest without sending a request makes room for a new one.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from typing import Protocol

from service.hardware import raise_descriptor_limit
from service.settings import ConnectionSettings

_SWEEP_S = 1.0

# Descriptors for everything that is not a connection of a client.
_RESERVED_DESCRIPTORS = 128

# A small body is still taken when large ones have filled the room for bodies.
_SMALL_BODY = 1_000_000
_SMALL_BODIES_SHARE = 1.25


class Connection(Protocol):
    """What the table knows of a connection.

    Attributes:
        address: of the client; a network of IPv6, all of which one client may have.
        since: monotonic time at which it began what it does.
    """

    loop: asyncio.AbstractEventLoop
    address: str
    since: float

    @property
    def waits(self) -> bool:
        """Whether the client has not sent a request, or not all of its headers."""

    def check(self, now: float) -> None:
        """Refuse a client that is too slow."""

    def abort(self) -> None:
        """End it at once."""


class Connections:
    """The connections of a process.

    Attributes:
        limits: tells the limits in force.
        buffered_bytes: bodies of all requests in progress.
    """

    def __init__(self, read_limits: Callable[[], ConnectionSettings]) -> None:
        self.limits = read_limits
        self._open: set[Connection] = set()
        self._addresses: Counter[str] = Counter()
        self._descriptors = max(1, raise_descriptor_limit() - _RESERVED_DESCRIPTORS)
        self._sweeping: asyncio.TimerHandle | None = None
        self.buffered_bytes = 0

    def admit(self, connection: Connection) -> bool:
        """Take a new connection in, for which the one that waits longest may have to go.

        Returns:
            Whether there is a place.
        """
        self._open.add(connection)
        self._addresses[connection.address] += 1
        if self._sweeping is None:
            self._sweeping = connection.loop.call_later(_SWEEP_S, self._sweep)
        limits = self.limits()
        if self._addresses[connection.address] > limits.max_per_address:
            return self._make_room(connection, address=connection.address)
        if len(self._open) > min(limits.max_connections, self._descriptors):
            return self._make_room(connection, address=None)
        return True

    def forget(self, connection: Connection) -> None:
        """Drop a connection that was lost."""
        if connection in self._open:
            self._open.remove(connection)
            self._addresses[connection.address] -= 1
            if not self._addresses[connection.address]:
                del self._addresses[connection.address]

    def has_room(self, body_bytes: int) -> bool:
        """Whether a body that has grown to a size may be kept in addition to the others."""
        most = self.limits().max_buffered_bytes
        if body_bytes <= _SMALL_BODY:
            most = int(_SMALL_BODIES_SHARE * most)
        return self.buffered_bytes <= most

    def _make_room(self, new: Connection, *, address: str | None) -> bool:
        waiting = [
            other
            for other in self._open
            if other is not new and other.waits and address in (None, other.address)
        ]
        if not waiting:
            return False
        oldest = min(waiting, key=lambda other: other.since)
        self.forget(oldest)
        oldest.abort()
        return True

    def _sweep(self) -> None:
        now, self._sweeping = time.monotonic(), None
        for connection in tuple(self._open):
            connection.check(now)
        if self._open:
            loop = next(iter(self._open)).loop
            self._sweeping = loop.call_later(_SWEEP_S, self._sweep)
