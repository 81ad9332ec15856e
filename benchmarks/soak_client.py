"""Clients that send the mixture, leave when they are told to, and keep the ledger."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import msgspec

from benchmarks.soak_requests import Kind, Leaving
from service.cli.bench.client import Client, NoResponse, Response
from service.cli.bench.requests import Request

TIMEOUT_S = 60.0
_LONGEST_WAIT_S = 0.1
_ANSWERED = range(200, 300)


class _Typed(msgspec.Struct):
    """The contract's error body."""

    error: str
    code: str
    request_id: str
    retryable: bool


@dataclass
class Ledger:
    """What became of every request that was sent.

    Attributes:
        answered, typed, gone: the three good ends: an answer, a typed error, a client that left by
            itself.
        lost: no answer, or an error that is not typed, by kind and reason. Must stay empty.
        unexpected: typed, but not what this kind of request should get. Must stay empty.
        foreign: answers that carried another request's id. Must stay 0.
        codes: typed errors by code.
    """

    sent: int = 0
    answered: int = 0
    typed: int = 0
    gone: int = 0
    foreign: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    unexpected: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)

    @property
    def balances(self) -> bool:
        """Whether every request ended in one of the three good ways."""
        accounted = self.answered + self.typed + self.gone
        return accounted == self.sent and not (self.lost or self.unexpected or self.foreign)

    def enter(self, kind: Kind, response: Response, request_id: str) -> None:
        """Enter a response of any status."""
        if response.headers.get("x-request-id") != request_id:
            self.foreign += 1
        if response.status in _ANSWERED:
            self.answered += 1
        else:
            try:
                typed = msgspec.json.decode(response.body, type=_Typed)
            except msgspec.DecodeError:
                self.lost[f"{kind.name}: status {response.status} without a typed error"] += 1
                return
            self.typed += 1
            self.codes[typed.code] += 1
        if response.status not in kind.statuses:
            self.unexpected[f"{kind.name}: status {response.status}"] += 1


class Soaker:
    """Sends kinds in turn with many clients.

    Args:
        url: base URL of the service.
        kinds: what to send.
        end: point on the monotonic clock after which nothing new is sent.
        watch: called after each request with the number that are done.
    """

    def __init__(
        self,
        url: str,
        kinds: Sequence[Kind],
        *,
        end: float,
        watch: Callable[[int], None],
    ) -> None:
        self.ledger = Ledger()
        self._url = url
        self._kinds = kinds
        self._end = end
        self._watch = watch
        self._done = 0

    async def run(self, clients: int) -> Ledger:
        """Send everything, or what fits the time."""
        waiting = iter(enumerate(self._kinds))
        async with Client(self._url, timeout_s=TIMEOUT_S) as client, asyncio.TaskGroup() as group:
            for number in range(clients):
                group.create_task(self._take_turns(client, waiting, random.Random(number)))
        return self.ledger

    async def _take_turns(
        self, client: Client, waiting: Iterator[tuple[int, Kind]], chance: random.Random
    ) -> None:
        for number, kind in waiting:
            if time.monotonic() > self._end:
                break
            self.ledger.sent += 1
            if kind.leaving is Leaving.STAYS:
                await self._ask(client, kind, f"soak-{number}")
            else:
                await self._leave(kind, f"soak-{number}", chance)
            self._done += 1
            self._watch(self._done)

    async def _ask(self, client: Client, kind: Kind, request_id: str) -> None:
        """Send a request and enter its response."""
        try:
            response = await client.send(kind.request, request_id=request_id)
        except NoResponse as error:
            self.ledger.lost[f"{kind.name}: {error}"] += 1
        else:
            self.ledger.enter(kind, response, request_id)

    async def _leave(self, kind: Kind, request_id: str, chance: random.Random) -> None:
        """Send a request, or the first half of its body, and hang up."""
        body = kind.request.body
        if kind.leaving is Leaving.IN_BODY:
            body = body[: len(body) // 2]
        url = urlsplit(self._url)
        with suppress(OSError):
            _, writer = await asyncio.open_connection(url.hostname, url.port)
            writer.write(_head(kind.request, url.netloc, request_id) + body)
            await writer.drain()
            await asyncio.sleep(chance.uniform(0.0, _LONGEST_WAIT_S))
            writer.close()
            await writer.wait_closed()
        self.ledger.gone += 1


def _head(request: Request, host: str, request_id: str) -> bytes:
    """The request up to its body, for clients that do not wait for a response."""
    lines = (
        f"{request.method} {request.path} HTTP/1.1",
        f"Host: {host}",
        "Content-Type: application/octet-stream",
        f"Content-Length: {len(request.body)}",
        f"X-Request-ID: {request_id}",
    )
    return "\r\n".join((*lines, "", "")).encode("ascii")
