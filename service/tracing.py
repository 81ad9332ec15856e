"""Traces of requests by OpenTelemetry's API; its SDK is imported only if tracing is on.

The span of a request is started here rather than by OpenTelemetry's ASGI instrumentation, which
names spans by raw path instead of route, records whole URLs, uses outdated attribute names unless
an environment variable asks for the stable ones, and cannot know the error codes of the API.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Mapping
from contextvars import ContextVar
from importlib.metadata import version
from typing import TYPE_CHECKING

from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from service.settings import TracingSettings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

_ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")

EXTRA_MISSING = "Tracing is on, but OpenTelemetry is not installed: pip install 'heatlens[otel]'."

PROPAGATOR = TraceContextTextMapPropagator()


class RequestTrace:
    """The span of one HTTP request.

    Attributes:
        traceparent: W3C trace context of the span, for the response and for other processes.
    """

    def __init__(self, tracer: Tracer, headers: Mapping[str, str]) -> None:
        inbound = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        self._tracer = tracer
        self._span = tracer.start_span(
            "request", context=PROPAGATOR.extract(inbound), kind=SpanKind.SERVER
        )
        self._context = set_span_in_context(self._span)
        outbound: dict[str, str] = {}
        PROPAGATOR.inject(outbound, self._context)
        self.traceparent = outbound.get("traceparent", "")

    def stage(self, name: str, *, began: float, ended: float) -> None:
        """Record a part of the request's work; times are `time.monotonic`."""
        span = self._tracer.start_span(name, context=self._context, start_time=epoch_ns(began))
        span.end(epoch_ns(ended))

    def end(self, *, method: str, route: str, status: int, code: str) -> None:
        """End the span; `code` is the error code, empty on success."""
        self._span.update_name(f"{method} {route}")
        self._span.set_attributes(
            {
                "http.request.method": method,
                "http.route": route,
                "http.response.status_code": status,
            }
        )
        if code:
            self._span.set_attribute("error.type", code)
        if status >= 500:
            self._span.set_status(Status(StatusCode.ERROR, code))
        self._span.end()


class HttpTracing:
    """Makes the spans of an HTTP process."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("heatlens.http")

    def request(self, headers: Mapping[str, str]) -> RequestTrace:
        """Start a request's span, in the trace named by its headers, if any."""
        return RequestTrace(self._tracer, headers)

    def close(self) -> None:
        """Send the remaining spans."""
        self._provider.shutdown()


current: ContextVar[RequestTrace | None] = ContextVar("request_trace", default=None)
"""Trace of the request that the running task handles; None if it is not traced."""


def traceparent() -> str:
    """W3C trace context of the running request, empty if it is not traced."""
    trace = current.get()
    return trace.traceparent if trace is not None else ""


def stage(name: str, *, began: float, ended: float) -> None:
    """Record a part of the running request's work, if it is traced."""
    trace = current.get()
    if trace is not None:
        trace.stage(name, began=began, ended=ended)


def is_on(settings: TracingSettings) -> bool:
    """Whether spans are made: by default if a collector is configured.

    A collector that only OpenTelemetry's own variables name counts if the SDK is installed.
    """
    if settings.enabled is not None:
        return settings.enabled
    named = any(os.environ.get(name) for name in _ENDPOINT_VARIABLES)
    return bool(settings.endpoint) or (named and is_installed())


def is_installed() -> bool:
    """Whether the SDK and its exporter can be imported."""
    try:
        return importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ModuleNotFoundError:
        return False


def http_tracing(settings: TracingSettings) -> HttpTracing | None:
    """Tracing of an HTTP process; None if it is off."""
    return HttpTracing(make_provider(settings, process="http")) if is_on(settings) else None


def make_provider(settings: TracingSettings, *, process: str) -> TracerProvider:
    """Make the provider that sends spans to an OTLP collector over HTTP, in the background.

    It is not made the global provider, for which FastAPI would make spans of its own.

    Args:
        settings: without an endpoint, OpenTelemetry's own variables name the collector.
        process: `http` or `worker`.
    """
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({"heatlens.process": process})
    if str(resource.attributes.get("service.name", "")).startswith("unknown_service"):
        names = {"service.name": "heatlens", "service.version": version("heatlens")}
        resource = resource.merge(Resource(names))
    provider = TracerProvider(resource=resource)
    endpoint = settings.endpoint and settings.endpoint.rstrip("/") + "/v1/traces"
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return provider


def epoch_ns(monotonic_s: float) -> int:
    """Convert a moment of the monotonic clock to the wall clock."""
    return time.time_ns() - round((time.monotonic() - monotonic_s) * 1e9)
