"""Traces by OpenTelemetry. Imported only where tracing is on."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode, get_current_span
from opentelemetry.trace.propagation import set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from service.worker.queue import Batch, Entry

_MOST_BATCHES = 16
"""A long job of thousands of steps shows the first few; the rest would bury its trace."""

_MOST_LINKS = 32
_TRACES_PATH = "/v1/traces"


def make_provider(endpoint: str | None, *, process: str) -> TracerProvider:
    """Spans go to an OTLP collector over HTTP, in the background; OTEL_* variables say what is not said here.

    Args:
        endpoint: base address of the collector; None takes OpenTelemetry's own variables.
        process: `http` or `worker`.
    """
    defaults = {"service.name": "heatlens", "service.version": version("heatlens")}
    resource = Resource.create({"heatlens.process": process})
    resource = resource.merge(Resource(defaults)) if _is_unnamed(resource) else resource
    provider = TracerProvider(resource=resource)
    url = None if endpoint is None else endpoint.rstrip("/") + _TRACES_PATH
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
    return provider


class OtelRequestTrace:
    """The span of one request, and of its parts; see `RequestTrace`."""

    def __init__(self, provider: TracerProvider, parent: Context) -> None:
        self._tracer = provider.get_tracer("heatlens.http")
        self._span = self._tracer.start_span("request", context=parent, kind=SpanKind.SERVER)
        self._context = set_span_in_context(self._span)
        self.traceparent = _traceparent(self._context)

    def stage(self, name: str, *, began: float, ended: float) -> None:
        """Record a part of the request's work."""
        span = self._tracer.start_span(name, context=self._context, start_time=_epoch_ns(began))
        span.end(_epoch_ns(ended))

    def end(self, *, method: str, route: str, status: int, code: str) -> None:
        """End the span, named as OpenTelemetry names HTTP servers' spans."""
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


class OtelHttpTracing:
    """Makes the spans of an HTTP process; see `HttpTracing`."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider

    def request(self, headers: Mapping[str, str]) -> OtelRequestTrace:
        """Begin a request's span."""
        inbound = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        return OtelRequestTrace(self._provider, TraceContextTextMapPropagator().extract(inbound))

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


class OtelDeviceTracing:
    """Makes the spans of a device worker; see `DeviceTracing`.

    For each job: `queue`, then for each batch it was part of a `batch` span with links to the other
    requests in it, and in that a `device` span. All are children of the request's span, which lives
    in another process.
    """

    def __init__(self, provider: TracerProvider, *, device: str) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("heatlens.worker")
        self._device = device

    def ran(self, batch: Batch, *, began: float, ended: float, done: float) -> None:
        """Record a batch."""
        contexts = {
            e.job.id: _context(e.submission.traceparent) for e in batch.entries if _is_shown(e)
        }
        for entry in batch.entries:
            parent = contexts.get(entry.job.id)
            if parent is None:
                continue
            if not batch.is_step:
                self._span("queue", parent, began=entry.arrived, ended=batch.started)
            others = [context for job_id, context in contexts.items() if job_id != entry.job.id]
            span = self._tracer.start_span(
                "batch",
                context=parent,
                links=_links(others, besides=parent),
                start_time=_epoch_ns(batch.started),
                attributes={
                    "heatlens.model": "@".join(batch.key),
                    "heatlens.batch.size": len(batch.entries),
                    "heatlens.batch.images": batch.images,
                    "heatlens.batch.reason": batch.reason,
                },
            )
            inside = set_span_in_context(span)
            self._span("device", inside, began=began, ended=ended)
            span.end(_epoch_ns(done))

    def expired(self, entry: Entry, *, now: float) -> None:
        """Record a job whose deadline passed."""
        if entry.started is None and _is_shown(entry):
            parent = _context(entry.submission.traceparent)
            self._span("queue", parent, began=entry.arrived, ended=now, code="deadline_exceeded")

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()

    def _span(
        self, name: str, parent: Context, *, began: float, ended: float, code: str = ""
    ) -> None:
        span = self._tracer.start_span(name, context=parent, start_time=_epoch_ns(began))
        span.set_attribute("heatlens.device", self._device)
        if code:
            span.set_status(Status(StatusCode.ERROR, code))
        span.end(_epoch_ns(ended))


def _is_unnamed(resource: Resource) -> bool:
    """Whether no variable of OpenTelemetry names the service."""
    return str(resource.attributes.get("service.name", "")).startswith("unknown_service")


def _is_shown(entry: Entry) -> bool:
    return bool(entry.submission.traceparent) and entry.batches <= _MOST_BATCHES


def _context(traceparent: str) -> Context:
    return TraceContextTextMapPropagator().extract({"traceparent": traceparent})


def _traceparent(context: Context) -> str:
    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, context)
    return carrier.get("traceparent", "")


def _links(contexts: Sequence[Context], *, besides: Context) -> list[Link]:
    """Links to the spans of other requests, each once."""
    own = _span_of(besides).get_span_context().span_id
    spans = {s.span_id: s for s in (_span_of(c).get_span_context() for c in contexts)}
    return [Link(s) for span_id, s in spans.items() if span_id != own][:_MOST_LINKS]


def _span_of(context: Context) -> Span:
    return get_current_span(context)


def _epoch_ns(monotonic_s: float) -> int:
    """A moment of the monotonic clock on the wall clock."""
    return time.time_ns() - round((time.monotonic() - monotonic_s) * 1e9)
