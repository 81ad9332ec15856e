"""The HTTP client of the load generator: sends requests in turn and times each of them."""

from __future__ import annotations

import asyncio
import io
import ipaddress
import math
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Self
from urllib.parse import urlsplit

import aiohttp
import msgspec

from models.types import Struct
from service.cli.bench.load import Sample
from service.cli.bench.requests import BenchError, Request, Unreachable

TIMEOUT = "client_timeout"
CONNECTION_LOST = "connection_lost"
WRONG_RESPONSE = "wrong_response"
FOREIGN_RESPONSE = "foreign_response"

_REFUSED = 429

# Servers commonly close a connection after 5 idle seconds.
KEEPALIVE_S = 2.0

Check = Callable[[int, bytes], bool]
"""Whether a body is the response to the image of this number."""


class NoResponse(Exception):
    """A request without a complete response; `code` is the sample's."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class Response(Struct):
    """A complete response; header names are case-insensitive."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def error_code(self) -> str:
        """The service's code of a failed request, or `http_STATUS` if the body has none."""
        try:
            return msgspec.json.decode(self.body, type=_ErrorBody).code
        except msgspec.DecodeError:
            return f"http_{self.status}"


class _ErrorBody(msgspec.Struct):
    code: str


class Client:
    """Sends requests in turn over kept-alive connections, within `async with`.

    Args:
        url: base URL without a slash at its end, see `parse_url`.
        requests: repeated from the start when all are sent.
        timeout_s: time limit of a whole request.
        check: called with each good response.
        retries: how often a refused request (429) comes again, each time after its `Retry-After`.
    """

    def __init__(
        self,
        url: str,
        requests: Sequence[Request] = (),
        *,
        timeout_s: float,
        check: Check | None = None,
        retries: int = 0,
    ) -> None:
        self.requests = requests
        self.check = check
        self._url = url
        self._retries = retries
        # The default rounds timeouts of 5 s and more up to whole seconds.
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, ceil_threshold=math.inf)
        self._prefix = f"bench-{uuid.uuid4().hex[:12]}-"
        self._count = 0

    async def __aenter__(self) -> Self:
        """Open the connection pool."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
            timeout=self._timeout,
            auto_decompress=False,
            skip_auto_headers=("Accept-Encoding",),
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close all connections."""
        await self._session.close()

    async def check_service(self) -> None:
        """Send the first request out of turn.

        Raises:
            Unreachable: it gets no response.
            BenchError: it does not succeed.
        """
        try:
            response = await self.send(self.requests[0])
        except NoResponse as error:
            raise Unreachable(f"The service does not respond: {error}.") from None
        if response.status != 200:
            code = response.error_code()
            raise BenchError(f"The service responds with {response.status} {code}.")

    async def call(self, due: float | None = None) -> Sample:
        """Send the next request and wait for its response; `due` is now if not given."""
        number = self._count
        self._count += 1
        request = self.requests[number % len(self.requests)]
        request_id = f"{self._prefix}{number}"
        sent = time.monotonic()
        due = sent if due is None else due
        attempts = 1
        try:
            response = await self.send(request, request_id=request_id)
            while response.status == _REFUSED and attempts <= self._retries:
                await asyncio.sleep(float(response.headers.get("Retry-After", 1)))
                response = await self.send(request, request_id=request_id)
                attempts += 1
        except NoResponse as error:
            return Sample(due=due, sent=sent, ended=time.monotonic(), code=error.code)
        return Sample(
            due=due,
            sent=sent,
            ended=time.monotonic(),
            status=response.status,
            code=self._code(response, request, request_id),
            size=len(response.body),
            attempts=attempts,
        )

    async def send(self, request: Request, *, request_id: str = "bench") -> Response:
        """Send one request; redirects are not followed.

        Raises:
            NoResponse: the connection failed, or the time is over.
        """
        try:
            async with self._session.request(
                request.method,
                self._url + request.path,
                data=io.BytesIO(request.body),
                headers={**request.headers, "X-Request-ID": request_id},
                allow_redirects=False,
            ) as response:
                body = await response.read()
        except TimeoutError:
            raise NoResponse(TIMEOUT, "no response in time") from None
        except (aiohttp.ClientError, OSError) as error:
            raise NoResponse(CONNECTION_LOST, str(error) or type(error).__name__) from None
        return Response(status=response.status, headers=response.headers, body=body)

    def _code(self, response: Response, request: Request, request_id: str) -> str:
        is_good, found = 200 <= response.status < 300, response.headers.get("X-Request-ID")
        # A connection that is refused before it has sent anything is told an id that nobody has.
        if found not in (None, request_id) and (is_good or found.startswith(self._prefix)):
            return FOREIGN_RESPONSE
        if not is_good:
            return response.error_code()
        if self.check is not None and not self.check(request.image, response.body):
            return WRONG_RESPONSE
        return ""


def parse_url(text: str, *, allow_remote: bool = False) -> str:
    """Complete and check a base URL such as `http://127.0.0.1:8000` or `localhost:8000`.

    Raises:
        BenchError: it is not an HTTP URL, its host is unknown, or its host is not this machine
            and `allow_remote` is off.
    """
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        host, port = parts.hostname, parts.port or parts.scheme
    except ValueError:
        host, port = None, ""
    if not host or parts.scheme not in {"http", "https"}:
        raise BenchError("The URL must look like http://HOST:PORT.")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        raise BenchError(f"{host} cannot be resolved.") from None
    if not allow_remote and not all(ipaddress.ip_address(row[4][0]).is_loopback for row in found):
        raise BenchError(f"{host} is not this machine; --allow-remote permits it.")
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
