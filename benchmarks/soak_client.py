"""Clients that send the mixture, leave when they are told to, and keep the ledger."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec

from benchmarks.soak_requests import Kind, Leaving
from service.cli.bench.address import Address
from service.cli.bench.connection import Completions, Connection, ConnectionLost

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

    def enter(self, kind: Kind, answer: Completions, request_id: str) -> None:
        """Enter an answer of any status."""
        if answer.headers.get("x-request-id") != request_id:
            self.foreign += 1
        if answer.status in _ANSWERED:
            self.answered += 1
        else:
            try:
                typed = msgspec.json.decode(answer.body, type=_Typed)
            except msgspec.DecodeError:
                self.lost[f"{kind.name}: status {answer.status} without a typed error"] += 1
                return
            self.typed += 1
            self.codes[typed.code] += 1
        if answer.status not in kind.statuses:
            self.unexpected[f"{kind.name}: status {answer.status}"] += 1


class Soaker:
    """Sends kinds in turn with many clients.

    Args:
        address: the service.
        kinds: what to send.
        end: point on the monotonic clock after which nothing new is sent.
        watch: called after each request with the number that are done.
    """

    def __init__(
        self,
        address: Address,
        kinds: Sequence[Kind],
        *,
        end: float,
        watch: Callable[[int], None],
    ) -> None:
        self.ledger = Ledger()
        self._address = address
        self._kinds = kinds
        self._end = end
        self._watch = watch
        self._done = 0

    async def run(self, clients: int) -> Ledger:
        """Send everything, or what fits the time."""
        waiting = iter(enumerate(self._kinds))
        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                group.create_task(self._client(waiting, random.Random(number)))
        return self.ledger

    async def _client(self, waiting: Iterator[tuple[int, Kind]], chance: random.Random) -> None:
        connection = Connection(self._address)
        for number, kind in waiting:
            if time.monotonic() > self._end:
                break
            self.ledger.sent += 1
            if kind.leaving is Leaving.STAYS:
                connection = await self._ask(connection, kind, f"soak-{number}")
            else:
                await self._leave(kind, f"soak-{number}", chance)
            self._done += 1
            self._watch(self._done)
        connection.close()

    async def _ask(self, connection: Connection, kind: Kind, request_id: str) -> Connection:
        """Ask, enter what came, and give the connection for the next request."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                answer = await connection.exchange(kind.request.with_id(request_id))
        except (ConnectionLost, TimeoutError) as error:
            self.ledger.lost[f"{kind.name}: {type(error).__name__} {error}"] += 1
        else:
            self.ledger.enter(kind, answer, request_id)
            if connection.reusable:
                return connection
        connection.close()
        return Connection(self._address)

    async def _leave(self, kind: Kind, request_id: str, chance: random.Random) -> None:
        """Send a request, or the first half of its body, and hang up."""
        data = kind.request.with_id(request_id)
        if kind.leaving is Leaving.IN_BODY:
            data = data[: len(data) - len(kind.request.after) // 2]
        with suppress(OSError):
            _, writer = await asyncio.open_connection(self._address.ip, self._address.port)
            writer.write(data)
            await writer.drain()
            await asyncio.sleep(chance.uniform(0.0, _LONGEST_WAIT_S))
            writer.close()
            await writer.wait_closed()
        self.ledger.gone += 1
