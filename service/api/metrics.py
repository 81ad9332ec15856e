"""Prometheus metrics of one HTTP process, or of all of them together.

If `PROMETHEUS_MULTIPROC_DIR` is set before this module is imported, as the supervisor does, values
are kept in files of that folder and a scrape of any process reports all. The state of the devices
comes from the pool at the moment of the scrape.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from service.api.pipeline import Reply
from service.api.readiness import is_up
from service.api.record import Served
from service.devices.pool import DevicePool, DeviceStatus

CONTENT_TYPE = CONTENT_TYPE_LATEST
MULTIPROCESS_DIR = "PROMETHEUS_MULTIPROC_DIR"

_REQUEST_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_STAGE_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
_STAGES = ("decode", "queue", "device", "render")
_RESTART_REASONS = ("hang", "device_lost", "crash", "exit")
_DEVICE_GAUGES = {
    "device_up": "1 if the device completed a pass recently, otherwise 0.",
    "queue_depth": "Jobs waiting or running on the device.",
    "device_wait_seconds": "Estimated wait of a new job for the device.",
    "device_memory_bytes": "Memory of the device worker: on its GPU, or of its process on a CPU.",
}


class Metrics:
    """All metrics of the service.

    Args:
        pool: reports the state of the devices at each scrape.
        ready_within_s: age of its last pass up to which a device counts as up.

    Attributes:
        devices: the metrics of the devices.
    """

    def __init__(self, pool: DevicePool, *, ready_within_s: float = 30.0) -> None:
        self.devices = DeviceCollector(pool, ready_within_s=ready_within_s)
        registry = CollectorRegistry()
        self._exposed = registry
        if MULTIPROCESS_DIR in os.environ:
            self._exposed = CollectorRegistry()
            MultiProcessCollector(self._exposed)  # type: ignore[no-untyped-call] # untyped in the library
        self._exposed.register(self.devices)
        self.request_seconds = Histogram(
            "http_request_duration_seconds",
            "Duration of requests by route template.",
            ["method", "route", "status"],
            buckets=_REQUEST_SECONDS,
            registry=registry,
        )
        self.model_request_seconds = Histogram(
            "heatlens_request_duration_seconds",
            "Duration of image requests by model, operation and error code (ok if none).",
            ["model", "version", "operation", "code"],
            buckets=_REQUEST_SECONDS,
            registry=registry,
        )
        self.stage_seconds = Histogram(
            "heatlens_stage_duration_seconds",
            "Duration of the stages of an image.",
            ["stage", "model", "version", "operation"],
            buckets=_STAGE_SECONDS,
            registry=registry,
        )
        self.batch_size = Histogram(
            "heatlens_batch_size",
            "Size of the batch that each image ran in.",
            buckets=_BATCH_SIZES,
            registry=registry,
        )
        self.inflight = Gauge(
            "heatlens_inflight",
            "Requests in progress.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.rejected = Counter(
            "heatlens_rejected", "Failed requests by error code.", ["reason"], registry=registry
        )
        self.cancelled = Counter(
            "heatlens_cancelled",
            "Requests whose client disconnected before the response.",
            registry=registry,
        )
        self._model_seconds = {
            name: Histogram(
                f"request_{name}_seconds",
                f"Duration of the {name} stage, under KServe's name.",
                ["model_name"],
                buckets=_STAGE_SECONDS,
                registry=registry,
            )
            for name in ("preprocess", "predict", "explain", "postprocess")
        }

    def observe(self, reply: Reply, served: Served) -> None:
        """Record the stage durations and batch sizes of a reply's images."""
        model = served.model
        computing = self._model_seconds["explain" if served.operation == "explain" else "predict"]
        by_stage = [
            (stage, self.stage_seconds.labels(stage, model, served.version, served.operation))
            for stage in _STAGES
        ]
        for run in reply.runs:
            for stage, seconds in by_stage:
                seconds.observe(getattr(run.timings, stage) / 1000)
            self.batch_size.observe(run.batch_size)
            self._model_seconds["preprocess"].labels(model).observe(run.timings.decode / 1000)
            computing.labels(model).observe((run.timings.queue + run.timings.device) / 1000)
            self._model_seconds["postprocess"].labels(model).observe(run.timings.render / 1000)

    def observe_request(self, served: Served, *, code: str, seconds: float) -> None:
        """Record a finished image request; `code` is its error code, empty if there is none."""
        labels = (served.model, served.version, served.operation, code or "ok")
        self.model_request_seconds.labels(*labels).observe(seconds)

    def exposition(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self._exposed)


class DeviceCollector(Collector):
    """Reads the state of the devices at a scrape.

    Every HTTP process sees the same state, so nothing is summed over processes.

    Attributes:
        ready_within_s: age of its last pass up to which a device counts as up.
    """

    def __init__(self, pool: DevicePool, *, ready_within_s: float) -> None:
        self.ready_within_s = ready_within_s
        self._pool = pool

    def collect(self) -> Iterable[Metric]:
        """The state of build, models and devices as it is now."""
        build = GaugeMetricFamily(
            "heatlens_build_info", "Version of the service.", labels=["version"]
        )
        build.add_metric([version("heatlens")], 1)
        ready = GaugeMetricFamily(
            "heatlens_model_ready",
            "1 if the model version answers requests, otherwise 0.",
            labels=["model", "version"],
        )
        for info in self._pool.models():
            ready.add_metric([info.card.name, info.card.version], info.card.ready)
        statuses = self._pool.devices()
        return build, ready, *self._gauges(statuses), *_counters(statuses)

    def _gauges(self, statuses: Sequence[DeviceStatus]) -> Iterable[Metric]:
        up, depth, wait, memory = (
            GaugeMetricFamily(f"heatlens_{name}", text, labels=["device"])
            for name, text in _DEVICE_GAUGES.items()
        )
        for status in statuses:
            device = [status.device]
            up.add_metric(device, is_up(status, within_s=self.ready_within_s))
            depth.add_metric(device, status.queue_depth)
            wait.add_metric(device, status.wait_ms / 1000)
            memory.add_metric(device, status.memory_bytes)
        return up, depth, wait, memory


def _counters(statuses: Sequence[DeviceStatus]) -> Iterable[Metric]:
    restarts = CounterMetricFamily(
        "heatlens_worker_restarts",
        "Restarts of device workers by exit reason.",
        labels=["device", "reason"],
    )
    labels = ["device", "model", "version", "reason"]
    batches = CounterMetricFamily(
        "heatlens_batches", "Batches by the reason for their size.", labels=labels
    )
    images = CounterMetricFamily(
        "heatlens_batch_images",
        "Images in batches by the reason for the batch size.",
        labels=labels,
    )
    for status in statuses:
        for reason in _RESTART_REASONS:
            restarts.add_metric([status.device, reason], status.restart_reasons.get(reason, 0))
        for count in status.batches:
            values = [status.device, count.model, count.version, count.reason]
            batches.add_metric(values, count.batches)
            images.add_metric(values, count.images)
    return restarts, batches, images
