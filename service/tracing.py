"""Traces: what the service says of its work, and to whom. OpenTelemetry itself is imported in `otel.py`, when on."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

from service.settings import TracingSettings

if TYPE_CHECKING:
    from service.worker.queue import Batch, Entry

ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")

EXTRA_MISSING = "Tracing is on, but OpenTelemetry is not installed: pip install 'heatlens[otel]'."


class RequestTrace(Protocol):
    """The span of one HTTP request."""

    traceparent: str
    """W3C trace context of the span, for the answer and for what is done elsewhere."""

    def stage(self, name: str, *, began: float, ended: float) -> None:
        """Record a part of the request's work; times are `time.monotonic`."""
        ...

    def end(self, *, method: str, route: str, status: int, code: str) -> None:
        """End the span; `code` is the error's, empty if there was none."""
        ...


class HttpTracing(Protocol):
    """Makes the spans of an HTTP process."""

    def request(self, headers: Mapping[str, str]) -> RequestTrace:
        """Begin a request's span, as a part of the trace that its headers name, if they do."""
        ...

    def close(self) -> None:
        """Send what is left."""
        ...


class DeviceTracing(Protocol):
    """Makes the spans of a device worker, as parts of the traces of the requests it works for."""

    def ran(self, batch: Batch, *, began: float, ended: float, done: float) -> None:
        """Record a batch: on the device from `began` to `ended`, sorted out by `done`."""
        ...

    def expired(self, entry: Entry, *, now: float) -> None:
        """Record a job whose deadline passed while it waited."""
        ...

    def close(self) -> None:
        """Send what is left."""
        ...


current: ContextVar[RequestTrace | None] = ContextVar("request_trace", default=None)
"""Trace of the request that the running task answers; None outside of requests and where tracing is off."""


def traceparent() -> str:
    """W3C context of the running request's trace, empty where there is none."""
    trace = current.get()
    return trace.traceparent if trace is not None else ""


def stage(name: str, *, began: float, ended: float) -> None:
    """Record a part of the running request's work, where it is traced."""
    trace = current.get()
    if trace is not None:
        trace.stage(name, began=began, ended=ended)


def is_on(settings: TracingSettings, environ: Mapping[str, str] | None = None) -> bool:
    """Whether spans are made: as configured, else if OpenTelemetry is there and its variables name a collector."""
    if settings.enabled is not None:
        return settings.enabled
    environ = os.environ if environ is None else environ
    named = any(environ.get(name) for name in ENDPOINT_VARIABLES)
    return bool(settings.endpoint) or (named and is_installed())


def is_installed() -> bool:
    """Whether OpenTelemetry is there to be imported."""
    try:
        return importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ModuleNotFoundError:
        return False


def http_tracing(settings: TracingSettings) -> HttpTracing | None:
    """Tracing of an HTTP process; None where it is off."""
    if not is_on(settings):
        return None
    from service.worker.tracing import OtelHttpTracing, make_provider

    return OtelHttpTracing(make_provider(settings.endpoint, process="http"))


def device_tracing(settings: TracingSettings, *, device: str) -> DeviceTracing | None:
    """Tracing of a device worker; None where it is off."""
    if not is_on(settings):
        return None
    from service.worker.tracing import OtelDeviceTracing, make_provider

    return OtelDeviceTracing(make_provider(settings.endpoint, process="worker"), device=device)
