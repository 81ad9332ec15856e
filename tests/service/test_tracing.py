"""Spans as an in-memory exporter sees them; no SDK is imported where tracing is off."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest
from msgspec import structs
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from models.types import Job, JobOptions
from service import tracing
from service.devices.messages import Submission
from service.settings import Settings, TracingSettings
from service.supervisor import supervisor
from service.tracing import HttpTracing, make_provider
from service.worker.queue import Batch, BatchReason, Entry
from service.worker.tracing import DeviceTracing

INBOUND = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


class Memory:
    """A provider that keeps its spans in memory."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans if span.name == name]


@pytest.fixture
def memory() -> Iterator[Memory]:
    made = Memory()
    yield made
    made.provider.shutdown()


# ---------------------------------------------------------------- off and on


def test_nothing_is_imported_where_it_is_off() -> None:
    program = """
import asyncio, sys
from service.api.app import create_app
from service.settings import Settings
from service.worker import process as worker
from tests.fakes import FakePool
app = create_app(Settings(), FakePool())
async def live():
    async with app.router.lifespan_context(app):
        assert app.state.tracing is None
asyncio.run(live())
heavy = ("opentelemetry.sdk", "opentelemetry.exporter")
sys.exit(any(name.startswith(heavy) for name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize(
    ("settings", "environ", "on"),
    [
        ({}, {}, False),
        ({"enabled": True}, {}, True),
        ({"endpoint": "http://127.0.0.1:4318"}, {}, True),
        ({"enabled": False, "endpoint": "http://127.0.0.1:4318"}, {}, False),
        ({}, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}, True),
        ({}, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:4318"}, True),
        ({"enabled": False}, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}, False),
        ({}, {"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
    ],
)
def test_when_it_is_on(
    monkeypatch: pytest.MonkeyPatch, settings: dict, environ: dict, on: bool
) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.setenv(name, environ.get(name, ""))
    assert tracing.is_on(TracingSettings(**settings)) is on


def test_without_the_extra_only_an_explicit_wish_is_an_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracing, "is_installed", lambda: False)
    monkeypatch.setattr(supervisor, "configure_logging", lambda _: None)
    monkeypatch.setattr(supervisor, "_listen", lambda *_: pytest.fail("it started"))
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    assert not tracing.is_on(TracingSettings())
    settings = Settings(tracing={"enabled": True}, server={"devices": ["cpu"]})
    assert supervisor.Supervisor(settings).run() == 1
    assert "pip install 'heatlens[otel]'" in caplog.text


def test_the_service_is_named_unless_a_variable_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def name() -> object:
        provider = make_provider(TracingSettings(endpoint="http://127.0.0.1:9"), process="http")
        provider.shutdown()
        assert provider.resource.attributes["heatlens.process"] == "http"
        return provider.resource.attributes["service.name"]

    monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)
    assert name() == "heatlens"
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    assert name() == "mine"
    assert Resource.create({}).attributes["service.name"] == "mine"


# ---------------------------------------------------------------- requests


def test_a_request_is_part_of_the_trace_it_names(memory: Memory) -> None:
    http = HttpTracing(memory.provider)
    now = time.monotonic()
    request = http.request({"traceparent": INBOUND})
    request.stage("decode", began=now - 0.5, ended=now - 0.2)
    request.end(method="POST", route="/v1/explain", status=500, code="internal")
    decode, span = memory.spans
    assert span.name == "POST /v1/explain"
    assert f"{span.context.trace_id:032x}" == INBOUND.split("-")[1]
    assert f"{span.parent.span_id:016x}" == INBOUND.split("-")[2]
    assert request.traceparent == f"00-{INBOUND.split('-')[1]}-{span.context.span_id:016x}-01"
    assert span.attributes["error.type"] == "internal"
    assert not span.status.is_ok
    assert decode.parent.span_id == span.context.span_id
    assert (decode.end_time - decode.start_time) / 1e9 == pytest.approx(0.3, abs=1e-3)
    assert time.time() - decode.start_time / 1e9 == pytest.approx(0.5, abs=0.2)


@pytest.mark.parametrize("header", ["", "nonsense", INBOUND.replace("4bf9", "zzzz")])
def test_a_wrong_header_begins_a_trace_of_its_own(memory: Memory, header: str) -> None:
    request = HttpTracing(memory.provider).request({"traceparent": header})
    request.end(method="GET", route="/", status=200, code="")
    assert memory.spans[0].parent is None
    assert memory.spans[0].status.is_unset


# ---------------------------------------------------------------- batches


def traceparent(number: int) -> str:
    return f"00-{number + 1:032x}-{number + 1:016x}-01"


def entry(number: int, *, traced: bool = True, arrived: float = 0.0) -> Entry:
    job = Job(
        id=str(number),
        operation="predict",
        model="m",
        version="1",
        input=np.zeros((1, 1, 3), dtype=np.uint8),
        options=JobOptions(),
    )
    submission = Submission(
        job=job, deadline=1e9, traceparent=traceparent(number) if traced else ""
    )
    made = Entry(submission=submission, job_class="interactive", arrived=arrived)
    made.batches = 1
    return made


def batch(*entries: Entry, started: float, reason: BatchReason = "full") -> Batch:
    return Batch(
        key=("m", "1"),
        job_class="interactive",
        entries=entries,
        images=len(entries),
        predicted_s=0.01,
        started=started,
        reason=reason,
    )


def test_each_job_of_a_batch_has_its_spans_and_links_to_the_others(memory: Memory) -> None:
    now = time.monotonic()
    entries = [entry(n, traced=n != 2, arrived=now - 1) for n in range(4)]
    device = DeviceTracing(memory.provider, device="cpu:1")
    device.ran(batch(*entries, started=now - 0.4), began=now - 0.3, ended=now - 0.1, done=now)
    queues, batches = memory.named("queue"), memory.named("batch")
    devices = memory.named("device")
    assert len(queues) == len(batches) == len(devices) == 3, "the untraced job has none"
    for span in (*queues, *batches):
        assert span.context.trace_id == span.parent.trace_id
        assert span.parent.span_id == span.context.trace_id  # our own numbering of requests
    assert {span.parent.span_id for span in devices} == {s.context.span_id for s in batches}
    for span in batches:
        linked = {link.context.span_id for link in span.links}
        assert linked == {1, 2, 4} - {span.parent.span_id}
        assert span.attributes["heatlens.batch.size"] == 4
        assert span.attributes["heatlens.batch.reason"] == "full"
    assert (queues[0].end_time - queues[0].start_time) / 1e9 == pytest.approx(0.6, abs=1e-3)
    assert (batches[0].end_time - batches[0].start_time) / 1e9 == pytest.approx(0.4, abs=1e-3)
    assert (devices[0].end_time - devices[0].start_time) / 1e9 == pytest.approx(0.2, abs=1e-3)
    assert devices[0].attributes["heatlens.device"] == "cpu:1"


def test_images_of_one_request_do_not_link_to_it(memory: Memory) -> None:
    first, second = entry(0), entry(1)
    second.submission = structs.replace(second.submission, traceparent=first.submission.traceparent)
    now = time.monotonic()
    device = DeviceTracing(memory.provider, device="cpu")
    device.ran(batch(first, second, started=now), began=now, ended=now, done=now)
    assert [span.links for span in memory.named("batch")] == [(), ()]


def test_a_long_job_does_not_bury_its_trace(memory: Memory) -> None:
    item = entry(0)
    device = DeviceTracing(memory.provider, device="cpu")
    now = time.monotonic()
    for number in range(1, 100):
        item.batches = number
        reason = "full" if number == 1 else "step"
        device.ran(batch(item, started=now, reason=reason), began=now, ended=now, done=now)
    assert len(memory.named("batch")) == 16
    assert len(memory.named("queue")) == 1


def test_who_expires_in_the_queue_shows_how_long_it_waited(memory: Memory) -> None:
    now = time.monotonic()
    device = DeviceTracing(memory.provider, device="cpu")
    device.expired(entry(0, arrived=now - 2), now=now)
    between = entry(1)
    between.started = now
    device.expired(between, now=now)
    (span,) = memory.spans
    assert (span.end_time - span.start_time) / 1e9 == pytest.approx(2, abs=1e-3)
    assert span.status.description == "deadline_exceeded"


def test_what_is_not_sampled_is_not_recorded(memory: Memory) -> None:
    item = entry(0)
    unsampled = traceparent(0).removesuffix("01") + "00"
    item.submission = structs.replace(item.submission, traceparent=unsampled)
    device = DeviceTracing(memory.provider, device="cpu")
    now = time.monotonic()
    device.ran(batch(item, started=now), began=now, ended=now, done=now)
    assert memory.spans == []
