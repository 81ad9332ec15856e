"""The outermost middleware: request id, timings, access log, metrics and trace of every request."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import logs, tracing
from service.api.errors import CLIENT_GONE, error_response, internal_error
from service.api.metrics import Metrics, child_of
from service.api.record import RequestRecord
from service.api.schemas import STAGES, Timings
from service.logs import request_id_of
from service.tracing import HttpTracing, RequestTrace

_access = logging.getLogger("heatlens.access")
_log = logging.getLogger(__name__)

_QUIET = frozenset(
    {"/livez", "/readyz", "/healthz", "/metrics", "/ping", "/v2/health/live", "/v2/health/ready"}
)
# A page brings its own policy; nothing else is a page.
_SECURITY_HEADERS = (
    ("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'"),
    ("X-Content-Type-Options", "nosniff"),
)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class RouteAliases:
    """Pure ASGI middleware that serves routes under other paths as well; see `server.aliases`."""

    def __init__(self, app: ASGIApp, *, aliases: Mapping[str, str]) -> None:
        self._app = app
        self._aliases = aliases

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        route = self._aliases.get(scope.get("path", ""))
        if route is not None:
            scope = {**scope, "path": route, "raw_path": route.encode()}
        await self._app(scope, receive, send)


class RequestContext:
    """Pure ASGI middleware that records every request; only typed errors leave it."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(request_id_of(Headers(scope=scope).get("x-request-id")))
        record.attach(scope)
        token = logs.request_id.set(record.request_id)
        trace = _trace(scope)
        traced = tracing.current.set(trace)
        started = time.perf_counter()

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = MutableHeaders(scope=message)
                add_headers(headers, record, duration_ms=_since(started))
                if trace is not None:
                    headers["traceparent"] = trace.traceparent
            await send(message)

        self._metrics.inflight.inc()
        try:
            await self._app(scope, receive, send_with_headers)
        except ClientDisconnect:
            record.status = CLIENT_GONE
        except Exception:  # noqa: BLE001 # the last line of defence
            _log.exception("A request failed unexpectedly.")
            record.error_code = "internal"
            if record.status is None:
                response = error_response(internal_error(), request_id=record.request_id)
                await response(scope, receive, send_with_headers)
        finally:
            self._metrics.inflight.dec()
            route = getattr(scope.get("route"), "path", "unmatched")
            finish(scope, record, self._metrics, trace, route=route, duration_ms=_since(started))
            tracing.current.reset(traced)
            logs.request_id.reset(token)


def add_headers(headers: MutableHeaders, record: RequestRecord, *, duration_ms: float) -> None:
    """Add the headers that every response has."""
    headers["X-Request-ID"] = record.request_id
    for name, value in _SECURITY_HEADERS:
        headers.setdefault(name, value)
    headers["Server-Timing"] = _server_timing(record.timings, duration_ms)


def finish(
    scope: Scope,
    record: RequestRecord,
    metrics: Metrics,
    trace: RequestTrace | None = None,
    *,
    route: str,
    duration_ms: float,
) -> None:
    """Count, trace and log a request that has its response, or whose client has left."""
    status = record.status or CLIENT_GONE
    if status == CLIENT_GONE:
        record.error_code = "cancelled"
    code, seconds = record.error_code, duration_ms / 1000
    # Clients choose the method's name: only known ones may become a label.
    method = scope["method"] if scope["method"] in _METHODS else "other"
    if trace is not None:
        trace.end(method=method, route=route, status=status, code=code)
    if record.served is not None:
        metrics.observe_request(record.served, code=code, seconds=seconds)
    child_of(metrics.request_seconds, method, route, str(status)).observe(seconds)
    if status == CLIENT_GONE:
        metrics.cancelled.inc()
    elif code:
        metrics.rejected.labels(code).inc()
    fields: dict[str, Any] = {
        "method": scope["method"],
        "path": scope["path"],
        "route": route,
        "status": status,
        "duration_ms": round(duration_ms, 3),
        **record.log_fields(),
    }
    level = logging.DEBUG if route in _QUIET else logging.INFO
    _access.log(level, "request", extra={"fields": fields})


def _trace(scope: Scope) -> RequestTrace | None:
    """The request's span if tracing is on; probes and scrapes have none."""
    maker: HttpTracing | None = getattr(scope["app"].state, "tracing", None)
    return None if maker is None or scope["path"] in _QUIET else maker.request(Headers(scope=scope))


def _since(started: float) -> float:
    return (time.perf_counter() - started) * 1000


def _server_timing(timings: Timings | None, total_ms: float) -> str:
    stages = [(name, getattr(timings, name)) for name in STAGES] if timings else []
    return ", ".join(f"{name};dur={ms:.3f}" for name, ms in [*stages, ("total", total_ms)])
