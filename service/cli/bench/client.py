"""Sends requests one by one and makes a sample of what became of each."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence

import msgspec

from models.types import Struct
from service.cli.bench.address import Address
from service.cli.bench.connection import Completions, Connection, ConnectionLost
from service.cli.bench.requests import Request

Check = Callable[[int, bytes], bool]
"""Whether this body answers the picture of this number."""

TIMEOUT = "client_timeout"
CONNECTION_LOST = "connection_lost"
WRONG_ANSWER = "wrong_answer"
FOREIGN_ANSWER = "foreign_answer"

_IDLE_S = 2.0  # servers commonly close a connection after 5 idle seconds


class Sample(Struct):
    """One request: what it was due, and what became of it. Times are of the monotonic clock, in seconds.

    Attributes:
        due: when it should have been sent; latency counts from here.
        sent: when it was.
        ended: when its answer was whole, or given up.
        status: of the answer; 0 without one.
        code: empty if it is answered; else the service's error code, `http_STATUS` of an answer
            that has none, or `client_timeout`, `connection_lost`, `wrong_answer` (of another
            picture), `foreign_answer` (of another request, by its id).
        size: bytes of the answer's body.
    """

    due: float
    sent: float
    ended: float
    status: int
    code: str
    size: int

    @property
    def latency(self) -> float:
        """Seconds from the due time to the end."""
        return self.ended - self.due

    @property
    def ok(self) -> bool:
        """Whether it got its answer."""
        return not self.code


class Client:
    """Cycles through requests, over connections that are kept for the next one.

    Args:
        address: where to.
        requests: sent in turn, again and again.
        timeout_s: time after which an answer is given up.
        check: called with each good answer.
    """

    def __init__(
        self,
        address: Address,
        requests: Sequence[Request],
        *,
        timeout_s: float,
        check: Check | None = None,
    ) -> None:
        self._address = address
        self._requests = requests
        self._timeout_s = timeout_s
        self._check = check
        self._idle: list[Connection] = []
        self._run = uuid.uuid4().hex[:12]
        self._count = 0

    async def call(self, due: float | None = None) -> Sample:
        """Send the next request and wait for its answer."""
        number = self._count
        self._count += 1
        request = self._requests[number % len(self._requests)]
        request_id = f"bench-{self._run}-{number}"
        connection = self._connection()
        sent = time.monotonic()
        status, size = 0, 0
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await connection.exchange(request.with_id(request_id))
        except TimeoutError:
            code = TIMEOUT
            connection.close()
        except ConnectionLost:
            code = CONNECTION_LOST
            connection.close()
        else:
            status, size = answer.status, len(answer.body)
            code = self._judge(answer, request, request_id)
            self._keep(connection)
        return Sample(
            due=sent if due is None else due,
            sent=sent,
            ended=time.monotonic(),
            status=status,
            code=code,
            size=size,
        )

    async def ask(self, request: Request) -> Completions:
        """Send one request out of turn.

        Raises:
            ConnectionLost: there is no answer in time.
        """
        connection = Connection(self._address)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await connection.exchange(request.with_id(f"bench-{self._run}-alone"))
        except TimeoutError:
            raise ConnectionLost("no answer in time") from None
        finally:
            connection.close()

    def close(self) -> None:
        """Close the connections that are kept."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    def _connection(self) -> Connection:
        now = time.monotonic()
        while self._idle:
            connection = self._idle.pop()
            if now - connection.last_used < _IDLE_S:
                return connection
            connection.close()
        return Connection(self._address)

    def _keep(self, connection: Connection) -> None:
        if connection.reusable:
            self._idle.append(connection)
        else:
            connection.close()

    def _judge(self, answer: Completions, request: Request, request_id: str) -> str:
        if answer.headers.get("x-request-id", request_id) != request_id:
            return FOREIGN_ANSWER
        if not 200 <= answer.status < 300:
            return error_code(answer)
        if self._check is not None and not self._check(request.picture, answer.body):
            return WRONG_ANSWER
        return ""


class _ErrorBody(msgspec.Struct):
    code: str


def error_code(answer: Completions) -> str:
    """The service's own code of a failed request, or `http_STATUS`."""
    try:
        return msgspec.json.decode(answer.body, type=_ErrorBody).code
    except msgspec.DecodeError:
        return f"http_{answer.status}"
