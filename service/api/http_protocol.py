"""HTTP/1.1 within limits: what a client may send, how slowly, and how slowly it may read.

uvicorn's protocol knows a timeout for idle connections and no other limit: headers without end,
trickling bodies and clients that never read are held for ever. The rest is in one subclass here.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, cast

import httptools
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from models import errors
from models.errors import HeatlensError
from service import logs
from service.api.connections import Connections
from service.api.errors import STATUS, error_response
from service.settings import ConnectionSettings

log = logging.getLogger("heatlens.connections")

# uvicorn copies what it holds of a body for each piece that comes.
_FREE_PIECES = 4096
_LEAST_PIECE_BYTES = 64

# A client that has its response early may send so much of the body all the same.
_LITTLE_BYTES = 1_000_000
_LINGER_S = 2.0
_LINGER_BYTES = 32_000_000

_VERSIONS = ("1.0", "1.1")
_UPGRADE_HEADERS = frozenset((b"upgrade", b"http2-settings"))

_Phase = Literal["idle", "headers", "body", "response"]


Refuse = Callable[[Scope], tuple[Response, float] | None]
"""The response to a request that the application is not to see, and the seconds until it is sent."""


def let_in(_: Scope) -> tuple[Response, float] | None:
    """Refuse no request."""
    return None


def protocol(table: Connections, refuse: Refuse = let_in) -> type[asyncio.Protocol]:
    """What uvicorn makes the connections of a table with."""
    return cast("type[asyncio.Protocol]", partial(_Connection, table=table, refuse=refuse))


class _Progress:
    """Whether bytes move fast enough: each stretch of time must see its share of them."""

    def __init__(self, now: float) -> None:
        self._since = now
        self._bytes = 0

    def add(self, count: int) -> None:
        self._bytes += count

    def is_stalled(self, now: float, limits: ConnectionSettings) -> bool:
        if self._bytes >= limits.min_bytes_per_s * (now - self._since):
            self._since, self._bytes = now, 0
        return now - self._since > limits.stall_timeout_s


class _Connection(HttpToolsProtocol):
    """One connection, as `Connections` knows it."""

    def __init__(self, *args: Any, table: Connections, refuse: Refuse, **options: Any) -> None:
        super().__init__(*args, **options)
        self._table = table
        self._refuse_early = refuse
        self._has_refused = False
        self._refusing: RequestResponseCycle | None = None
        self._limits = table.limits()
        self.timeout_keep_alive = math.ceil(self._limits.idle_timeout_s)
        self.address = ""
        self.since = time.monotonic()
        self._phase: _Phase = "headers"
        self._messages = 0
        self._header_bytes = 0
        self._body_bytes = self._body_pieces = self._discarded_bytes = 0
        self._received, self._sent = _Progress(self.since), _Progress(self.since)
        self._unsent_bytes = 0
        self._fault: HeatlensError | None = None
        self._is_last = self._lingers = False

    @property
    def waits(self) -> bool:
        """Whether the client has not sent a request, or not all of its headers."""
        cycle: RequestResponseCycle | None = self.cycle
        return (cycle is None or cycle.response_complete) and self._phase in ("idle", "headers")

    # ---------------------------------------------------------------- the transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Answer a connection for which there is no place, and end it."""
        super().connection_made(transport)
        self.address = _address(self.client)
        if not self._table.admit(self):
            self._refuse(errors.Overloaded("The service has too many connections."))

    def connection_lost(self, exc: Exception | None) -> None:
        self._table.forget(self)
        self._release_body()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._received.add(len(data))
        self._has_refused = False
        if self._lingers:
            self._discarded_bytes += len(data)
            if self._discarded_bytes > _LINGER_BYTES:
                self.abort()
            return
        self._unset_keepalive_if_required()
        messages = self._messages
        try:
            self._parse(data)
        except httptools.HttpParserError:
            self._refuse(self._fault or errors.MalformedBody("The HTTP request is malformed."))
            return
        if self._phase == "headers" and not self._lingers:
            self._header_bytes = 0 if messages != self._messages else self._header_bytes + len(data)
            if self._header_bytes > self._limits.max_header_bytes:
                self._refuse(_too_large(self._limits))

    def _parse(self, data: bytes) -> None:
        rest = memoryview(data)
        while True:
            try:
                self.parser.feed_data(rest)
            except httptools.HttpParserUpgrade as upgrade:
                # The parser leaves what follows to another protocol, which a server need not speak
                # (RFC 9110, 7.8): the request is read again as one that does not ask for it.
                rest = rest[upgrade.args[0] :]
                self._read_without_upgrade()
            else:
                return

    def _read_without_upgrade(self) -> None:
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        if method == b"CONNECT":
            raise httptools.HttpParserError("a tunnel")
        lines = [b"%s %s HTTP/%s" % (method, self.url, version)]
        for name, value in self.headers:
            if name == b"connection":
                tokens = (token.strip() for token in value.split(b","))
                kept = b", ".join(t for t in tokens if t.lower() not in _UPGRADE_HEADERS)
                lines.append(b"connection: %s" % kept)
            elif name not in _UPGRADE_HEADERS:
                lines.append(b"%s: %s" % (name, value))
        self.parser = httptools.HttpRequestParser(self)
        self.parser.feed_data(b"\r\n".join((*lines, b"", b"")))

    # ---------------------------------------------------------------- the parser

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._enter("headers")
        self._messages += 1
        self._header_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header within the limits; trailers are of no use here."""
        limits = self._limits
        self._header_bytes += len(name) + len(value)
        too_many = len(self.headers) >= limits.max_headers
        if too_many or self._header_bytes + len(self.url) > limits.max_header_bytes:
            self._fault = _too_large(limits)
            raise self._fault
        if self._phase == "headers":
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._lingers or self.parser.should_upgrade():
            return
        if self.parser.get_http_version() not in _VERSIONS:
            raise httptools.HttpParserError("another version")
        super().on_headers_complete()
        self._enter("body")
        self._received = _Progress(self.since)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGIApp) -> None:  # type: ignore[override]
        # One of those that came together: the others must not hold up the loop.
        may_refuse = cycle is self.cycle and not self._has_refused and not self.flow.write_paused
        refused = self._refuse_early(cast("Scope", cycle.scope)) if may_refuse else None
        if refused is None:
            app = self._closing_if_early(cycle, app)
            super()._start_asgi_task(cycle, app)  # type: ignore[arg-type]
            return
        response, delay_s = refused
        self._has_refused, self._refusing = True, cycle
        if delay_s:
            self.flow.pause_reading()
            self.loop.call_later(delay_s, self._respond_early, cycle, response)
        else:
            self._respond_early(cycle, response)

    def _closing_if_early(self, cycle: RequestResponseCycle, app: ASGIApp) -> ASGIApp:
        """The application, after whose response no rest of a large body is waited for."""

        async def run(scope: Scope, receive: Receive, send: Send) -> None:
            async def send_and_close(message: Message) -> None:
                is_start = message["type"] == "http.response.start"
                if not is_start or not cycle.more_body or _is_little(cycle):
                    await send(message)
                    return
                # What the client still sends belongs to the request that has its response already.
                headers = [*message.get("headers", ()), (b"connection", b"close")]
                await send({**message, "headers": headers})
                # uvicorn would close at once, before the client can read.
                cycle.keep_alive = self._is_last = True

            await app(scope, receive, send_and_close)

        return run

    def _respond_early(self, cycle: RequestResponseCycle, response: Response) -> None:
        self._refusing = None
        if self._lingers or self.transport.is_closing():
            return
        cycle.response_complete = True
        self._is_last = not cycle.keep_alive or (cycle.more_body and not _is_little(cycle))
        self._write(response, is_last=self._is_last)
        self.on_response_complete()

    def on_body(self, body: bytes) -> None:
        if self._lingers or self._refusing is self.cycle or self.cycle.response_complete:
            return
        self._body_pieces += 1
        self._body_bytes += len(body)
        self._table.buffered_bytes += len(body)
        if self._body_pieces > max(_FREE_PIECES, self._body_bytes // _LEAST_PIECE_BYTES):
            self._refuse(errors.MalformedBody("The body comes in too many small pieces."))
            return
        if not self._table.has_room(self._body_bytes):
            self._refuse(errors.Overloaded("The service holds too many bodies of requests."))
            return
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._lingers or self.parser.should_upgrade():
            return
        super().on_message_complete()
        if self.cycle.response_complete:
            self._enter("idle")
        else:
            self._phase = "response"

    def on_response_complete(self) -> None:
        self._release_body()
        if self._is_last:
            self.linger()
            return
        if self._phase == "response":
            self._enter("response" if self.pipeline else "idle")
        super().on_response_complete()

    # ---------------------------------------------------------------- limits

    def check(self, now: float) -> None:
        limits = self._limits = self._table.limits()
        waited = now - self.since
        if self._is_unread(now):
            log.info("a client did not read its response", extra=self._fields())
            self.abort()
        elif self._lingers:
            if waited > _LINGER_S:
                self.abort()
        elif self._phase == "idle" and waited > limits.idle_timeout_s:
            self.transport.close()
        elif self.waits and waited > limits.header_timeout_s:
            if self._messages:
                self._refuse(
                    errors.RequestTimeout("The headers of the request did not arrive in time.")
                )
            else:
                self.transport.close()
        elif (
            self._phase == "body"
            and not self.flow.read_paused
            and self._received.is_stalled(now, limits)
        ):
            if self.cycle.response_complete:
                self.abort()
            else:
                self._refuse(errors.RequestTimeout("The body of the request arrives too slowly."))

    def abort(self) -> None:
        self.transport.abort()

    def linger(self) -> None:
        """Close, but let the client read the response first.

        Closing while its bytes are under way would reset the connection, and a reset discards what
        the client has not read.
        """
        if self._lingers:
            return
        self._lingers = self._is_last = True
        self.since = time.monotonic()
        self._release_body()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()

    def _refuse(self, error: HeatlensError) -> None:
        """Answer what the application does not see, and end the connection."""
        if self._lingers or self.transport.is_closing():
            return
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is not None and not cycle.response_complete:
            if cycle.response_started:
                self.abort()
                return
            if not cycle.more_body:
                # An earlier request is being answered: the connection ends with its response.
                cycle.keep_alive = False
                return
            cycle.disconnected = True
            cycle.message_event.set()
        request_id = logs.request_id_of(self._inbound_id())
        response = error_response(error, request_id=request_id)
        response.headers["X-Request-ID"] = request_id
        self._write(response, is_last=True)
        fields = {"code": error.code, "status": STATUS[error.code], "request_id": request_id}
        log.info(error.message, extra=self._fields(**fields))
        self.linger()

    def _inbound_id(self) -> str | None:
        """The id that the client gave the request which it sends, as far as that has come."""
        headers = () if self._phase == "idle" else self.headers or ()
        return dict(headers).get(b"x-request-id", b"").decode("latin-1") or None

    def _write(self, response: Response, *, is_last: bool) -> None:
        headers = [*self.server_state.default_headers, *response.raw_headers]
        if is_last:
            headers.append((b"connection", b"close"))
        lines = (STATUS_LINE[response.status_code], *(b"%s: %s\r\n" % line for line in headers))
        self.transport.write(b"".join((*lines, b"\r\n", bytes(response.body))))

    def _is_unread(self, now: float) -> bool:
        """Whether what was written has not left for too long."""
        unsent = self.transport.get_write_buffer_size()
        if not self._unsent_bytes:
            self._sent = _Progress(now)
        self._sent.add(max(0, self._unsent_bytes - unsent))
        self._unsent_bytes = unsent
        return unsent > 0 and self._sent.is_stalled(now, self._limits)

    def _enter(self, phase: _Phase) -> None:
        self._phase, self.since = phase, time.monotonic()

    def _release_body(self) -> None:
        self._table.buffered_bytes -= self._body_bytes
        self._body_bytes = self._body_pieces = 0

    def _fields(self, **more: object) -> dict[str, object]:
        return {"fields": {"client": self.client[0] if self.client else "", **more}}


def _address(client: tuple[str, int] | None) -> str:
    if client is None:
        return ""
    if ":" not in client[0]:
        return client[0]
    return str(ipaddress.ip_network((client[0].partition("%")[0], 64), strict=False))


def _is_little(cycle: RequestResponseCycle) -> bool:
    """Whether the rest of a body is read in less time than a new connection takes."""
    length = dict(cycle.scope["headers"]).get(b"content-length", b"")
    is_sent = length.isdigit() and not cycle.waiting_for_100_continue
    return is_sent and int(length) <= _LITTLE_BYTES


def _too_large(limits: ConnectionSettings) -> errors.HeadersTooLarge:
    return errors.HeadersTooLarge(
        f"A request has at most {limits.max_headers} headers of {limits.max_header_kb:g} kB in all."
    )
