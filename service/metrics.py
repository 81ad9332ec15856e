"""Prometheus metrics of one HTTP process, or of all of them together.

With `PROMETHEUS_MULTIPROC_DIR` set before this module is imported (the supervisor does so), values are kept in files
of that folder and a scrape of any process reports all. What is known of devices comes from the pool at the moment of
the scrape.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from models.types import Operation
from service.pipeline import Reply
from service.readiness import is_up
from service.workers.pool import DevicePool

CONTENT_TYPE = CONTENT_TYPE_LATEST
MULTIPROCESS_DIR = "PROMETHEUS_MULTIPROC_DIR"

_REQUEST_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_STAGE_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)


class Metrics:
    """Everything that is counted.

    Args:
        pool: asked for the state of the devices at each scrape.
        ready_within_s: age of its last pass up to which a device counts as up.
    """

    def __init__(self, pool: DevicePool, *, ready_within_s: float) -> None:
        self._multiprocess = MULTIPROCESS_DIR in os.environ
        self._registry = CollectorRegistry()
        self._devices = _DeviceCollector(pool, ready_within_s)
        own = self._registry
        self.request_seconds = Histogram(
            "http_request_duration_seconds",
            "Duration of requests by route template.",
            ["method", "route", "status"],
            buckets=_REQUEST_SECONDS,
            registry=own,
        )
        self.stage_seconds = Histogram(
            "heatlens_stage_duration_seconds",
            "Duration of each stage of an image.",
            ["stage"],
            buckets=_STAGE_SECONDS,
            registry=own,
        )
        self.batch_size = Histogram(
            "heatlens_batch_size",
            "Images in the device's batch, as each image met it.",
            buckets=_BATCH_SIZES,
            registry=own,
        )
        self.inflight = Gauge(
            "heatlens_inflight",
            "Requests being answered.",
            registry=own,
            multiprocess_mode="livesum",
        )
        self.rejected = Counter(
            "heatlens_rejected", "Requests that failed, by error code.", ["reason"], registry=own
        )
        self.cancelled = Counter(
            "heatlens_cancelled", "Requests whose client left before the answer.", registry=own
        )
        self._model_seconds = {
            name: Histogram(
                f"request_{name}_seconds",
                f"KServe's name for the {name} stage.",
                ["model_name"],
                buckets=_STAGE_SECONDS,
                registry=own,
            )
            for name in ("preprocess", "predict", "explain", "postprocess")
        }

    def observe(self, reply: Reply, *, operation: Operation, model: str) -> None:
        """Count what a reply's images took."""
        run = self._model_seconds["explain" if operation == "explain" else "predict"]
        for image in reply.images:
            for stage in ("decode", "queue", "device", "render"):
                self.stage_seconds.labels(stage).observe(getattr(image, stage) / 1000)
            self.batch_size.observe(image.batch_size)
            self._model_seconds["preprocess"].labels(model).observe(image.decode / 1000)
            run.labels(model).observe((image.queue + image.device) / 1000)
            self._model_seconds["postprocess"].labels(model).observe(image.render / 1000)

    def exposition(self) -> bytes:
        """All metrics in Prometheus's text format."""
        if not self._multiprocess:
            return generate_latest(self._registry) + generate_latest(self._devices_registry())
        registry = self._devices_registry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call] # untyped in the library
        return generate_latest(registry)

    def _devices_registry(self) -> CollectorRegistry:
        registry = CollectorRegistry()
        registry.register(self._devices)
        return registry


class _DeviceCollector(Collector):
    """Reads the devices when scraped: every HTTP process sees the same, so nothing needs to be summed."""

    def __init__(self, pool: DevicePool, ready_within_s: float) -> None:
        self._pool = pool
        self._ready_within_s = ready_within_s

    def collect(self) -> Iterable[Metric]:
        statuses = self._pool.devices()
        within = self._ready_within_s
        up = [(status.device, float(is_up(status, within_s=within))) for status in statuses]
        yield _gauge("heatlens_device_up", "Whether a device completed a pass recently.", up)
        yield _gauge(
            "heatlens_queue_depth",
            "Jobs waiting or running on a device.",
            [(status.device, float(status.queue_depth)) for status in statuses],
        )
        yield _gauge(
            "heatlens_device_wait_seconds",
            "Estimated wait of a new job.",
            [(status.device, status.wait_ms / 1000) for status in statuses],
        )
        restarts = CounterMetricFamily(
            "heatlens_worker_restarts", "Restarts of device workers.", labels=["device"]
        )
        for status in statuses:
            restarts.add_metric([status.device], status.restarts)
        yield restarts


def _gauge(name: str, text: str, values: Sequence[tuple[str, float]]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=["device"])
    for device, value in values:
        family.add_metric([device], value)
    return family
