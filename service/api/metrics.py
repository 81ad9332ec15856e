"""Prometheus metrics of one HTTP process, or of all of them together.

If `PROMETHEUS_MULTIPROC_DIR` is set before this module is imported, as the supervisor does, values
are kept in files of that folder and a scrape of any process reports all. The state of the devices
comes from the pool at the moment of the scrape.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import lru_cache, partial
from importlib.metadata import version
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from service.api.pipeline import Reply
from service.api.record import Served
from service.api.schemas import STAGES
from service.devices.pool import DevicePool

CONTENT_TYPE = CONTENT_TYPE_LATEST
MULTIPROCESS_DIR = "PROMETHEUS_MULTIPROC_DIR"

REQUEST_SECONDS = "heatlens_request_duration_seconds"
STAGE_SECONDS = "heatlens_stage_duration_seconds"
LAST_REQUEST = "heatlens_last_request_timestamp_seconds"

_REQUEST_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_STAGE_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
_RESTART_REASONS = ("hang", "device_lost", "crash", "exit")
_GAUGES = {
    "build_info": ("Version of the service.", ["version"]),
    "model_ready": ("1 if the model version answers requests, otherwise 0.", ["model", "version"]),
    "device_up": ("1 if the device completed a pass recently, otherwise 0.", ["device"]),
    "queue_depth": ("Jobs waiting or running on the device.", ["device"]),
    "device_wait_seconds": ("Estimated wait of a new job for the device.", ["device"]),
    "device_memory_bytes": (
        "Memory of the device worker: on its GPU, or of its process on a CPU.",
        ["device"],
    ),
}
_BATCH_LABELS = ["device", "model", "version", "reason"]
_COUNTERS = {
    "worker_restarts": ("Restarts of device workers by exit reason.", ["device", "reason"]),
    "batches": ("Batches by the reason for their size.", _BATCH_LABELS),
    "batch_images": ("Images in batches by the reason for the batch size.", _BATCH_LABELS),
}


MetricT = TypeVar("MetricT", Counter, Gauge, Histogram)


class Metrics:
    """All metrics of the service.

    Args:
        pool: reports the state of the devices at each scrape.
    """

    def __init__(self, pool: DevicePool) -> None:
        registry = CollectorRegistry()
        self._exposed = registry
        if MULTIPROCESS_DIR in os.environ:
            self._exposed = CollectorRegistry()
            MultiProcessCollector(self._exposed)  # type: ignore[no-untyped-call] # untyped in the library
        self._exposed.register(DeviceCollector(pool))
        histogram = partial(Histogram, registry=registry)
        counter = partial(Counter, registry=registry)
        self.request_seconds = histogram(
            "http_request_duration_seconds",
            "Duration of requests by route template.",
            ["method", "route", "status"],
            buckets=_REQUEST_SECONDS,
        )
        self.model_request_seconds = histogram(
            REQUEST_SECONDS,
            "Duration of image requests by model, operation and error code (ok if none).",
            ["model", "version", "operation", "code"],
            buckets=_REQUEST_SECONDS,
        )
        self.stage_seconds = histogram(
            STAGE_SECONDS,
            "Duration of the stages of an image.",
            ["stage", "model", "version", "operation"],
            buckets=_STAGE_SECONDS,
        )
        self.batch_size = histogram(
            "heatlens_batch_size", "Size of the batch that each image ran in.", buckets=_BATCH_SIZES
        )
        self.inflight = Gauge(
            "heatlens_inflight",
            "Requests in progress.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.last_request = Gauge(
            LAST_REQUEST,
            "Time of the last answered image request, in seconds since the epoch.",
            ["model", "version"],
            registry=registry,
            multiprocess_mode="mostrecent",
        )
        self.rejected = counter("heatlens_rejected", "Failed requests by error code.", ["reason"])
        self.cancelled = counter(
            "heatlens_cancelled", "Requests whose client disconnected before the response."
        )
        self._model_seconds = {
            name: histogram(
                f"request_{name}_seconds",
                f"Duration of the {name} stage, under KServe's name.",
                ["model_name"],
                buckets=_STAGE_SECONDS,
            )
            for name in ("preprocess", "predict", "explain", "postprocess")
        }

    def observe(self, reply: Reply, served: Served) -> None:
        """Record the stage durations and batch sizes of a reply's images."""
        model, operation = served.model, served.operation
        child_of(self.last_request, model, served.version).set_to_current_time()
        by_stage = {
            stage: child_of(self.stage_seconds, stage, model, served.version, operation)
            for stage in STAGES
        }
        computing = "explain" if operation in ("explain", "compare") else "predict"
        decode, compute, render = (
            child_of(self._model_seconds[name], model)
            for name in ("preprocess", computing, "postprocess")
        )
        for run in reply.runs:
            timings = run.timings
            for stage, seconds in by_stage.items():
                seconds.observe(getattr(timings, stage) / 1000)
            decode.observe(timings.decode / 1000)
            compute.observe((timings.queue + timings.device) / 1000)
            render.observe(timings.render / 1000)
            self.batch_size.observe(run.batch_size)

    def observe_request(self, served: Served, *, code: str, seconds: float) -> None:
        """Record a finished image request; `code` is its error code, empty if there is none."""
        labels = (served.model, served.version, served.operation, code or "ok")
        child_of(self.model_request_seconds, *labels).observe(seconds)

    def exposition(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self._exposed)

    def collect(self) -> Iterable[Metric]:
        """The same, as families of samples."""
        return self._exposed.collect()


@lru_cache(maxsize=4096)
def child_of(metric: MetricT, *labels: str) -> MetricT:
    """`metric.labels(*labels)`, which takes longer than what is then done with the child."""
    return metric.labels(*labels)


class DeviceCollector(Collector):
    """Reads the state of the devices at a scrape.

    Every HTTP process sees the same state, so nothing is summed over processes.
    """

    def __init__(self, pool: DevicePool) -> None:
        self._pool = pool

    def collect(self) -> Iterable[Metric]:
        """The state of build, models and devices as it is now."""
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {
            name: GaugeMetricFamily(f"heatlens_{name}", text, labels=labels)
            for name, (text, labels) in _GAUGES.items()
        }
        for name, (text, labels) in _COUNTERS.items():
            families[name] = CounterMetricFamily(f"heatlens_{name}", text, labels=labels)

        def add(name: str, value: float, *labels: str) -> None:
            families[name].add_metric(labels, value)

        add("build_info", 1, version("heatlens"))
        for info in self._pool.models():
            add("model_ready", info.card.ready, info.card.name, info.card.version)
        for status in self._pool.devices():
            device = status.device
            add("device_up", status.state == "ready", device)
            add("queue_depth", status.queue_depth, device)
            add("device_wait_seconds", status.wait_ms / 1000, device)
            add("device_memory_bytes", status.memory_bytes, device)
            for reason in _RESTART_REASONS:
                add("worker_restarts", status.restart_reasons.get(reason, 0), device, reason)
            for count in status.batches:
                batch = (device, count.model, count.version, count.reason)
                add("batches", count.batches, *batch)
                add("batch_images", count.images, *batch)
        return families.values()
