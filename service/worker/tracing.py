"""Trace spans of the batches of a device worker."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.context import Context

from service.settings import TracingSettings
from service.tracing import PROPAGATOR, epoch_ns, is_on, make_provider
from service.worker.queue import Batch, Entry

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

_MAX_BATCHES = 16
"""Batches recorded of one job: a long method has thousands of steps."""

_MAX_LINKS = 32


class DeviceTracing:
    """Makes the spans of a device worker.

    A job has a `queue` span, and for each of its batches a `batch` span with links to the other
    requests in the batch, and inside it a `device` span. All are children of the request's span,
    which the HTTP process makes.
    """

    def __init__(self, provider: TracerProvider, *, device: str) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("heatlens.worker")
        self._device = device

    def ran(self, batch: Batch, *, began: float, ended: float, done: float) -> None:
        """Record a batch; times are `time.monotonic`.

        Args:
            batch: the batch.
            began: start of its run on the device.
            ended: end of its run on the device.
            done: time at which its results were ready.
        """
        parents = [(entry, _parent(entry)) for entry in batch.entries if _is_shown(entry)]
        requests = {_request(parent).span_id: _request(parent) for _, parent in parents}
        for entry, parent in parents:
            if not batch.is_step:
                self._span("queue", parent, began=entry.arrived, ended=batch.started)
            span = self._tracer.start_span(
                "batch",
                context=parent,
                links=_links(requests.values(), own=_request(parent)),
                start_time=epoch_ns(batch.started),
                attributes={
                    "heatlens.model": "@".join(batch.key),
                    "heatlens.batch.size": len(batch.entries),
                    "heatlens.batch.images": batch.images,
                    "heatlens.batch.reason": batch.reason,
                },
            )
            self._span("device", trace.set_span_in_context(span), began=began, ended=ended)
            span.end(epoch_ns(done))

    def expired(self, entry: Entry, *, now: float) -> None:
        """Record a job whose deadline passed while it waited."""
        if entry.started is None and _is_shown(entry):
            code = "deadline_exceeded"
            self._span("queue", _parent(entry), began=entry.arrived, ended=now, code=code)

    def close(self) -> None:
        """Send the remaining spans."""
        self._provider.shutdown()

    def _span(
        self, name: str, parent: Context, *, began: float, ended: float, code: str = ""
    ) -> None:
        span = self._tracer.start_span(name, context=parent, start_time=epoch_ns(began))
        span.set_attribute("heatlens.device", self._device)
        if code:
            span.set_status(trace.Status(trace.StatusCode.ERROR, code))
        span.end(epoch_ns(ended))


def device_tracing(settings: TracingSettings, *, device: str) -> DeviceTracing | None:
    """Tracing of a device worker; None if it is off."""
    if not is_on(settings):
        return None
    return DeviceTracing(make_provider(settings, process="worker"), device=device)


def _is_shown(entry: Entry) -> bool:
    return bool(entry.submission.traceparent) and entry.batches <= _MAX_BATCHES


def _parent(entry: Entry) -> Context:
    return PROPAGATOR.extract({"traceparent": entry.submission.traceparent})


def _request(parent: Context) -> trace.SpanContext:
    return trace.get_current_span(parent).get_span_context()


def _links(requests: Iterable[trace.SpanContext], *, own: trace.SpanContext) -> list[trace.Link]:
    others = [trace.Link(request) for request in requests if request.span_id != own.span_id]
    return others[:_MAX_LINKS]
