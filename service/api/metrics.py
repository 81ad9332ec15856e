"""Prometheus metrics of one HTTP process, or of all of them together.

With `PROMETHEUS_MULTIPROC_DIR` set before this module is imported (the supervisor does so), values
are kept in files of that folder and a scrape of any process reports all. What is known of devices
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

from models.types import Operation, Struct
from service.api.nv_aliases import nv_families
from service.api.pipeline import Reply
from service.api.readiness import is_up
from service.devices.pool import DevicePool, DeviceStatus

CONTENT_TYPE = CONTENT_TYPE_LATEST
MULTIPROCESS_DIR = "PROMETHEUS_MULTIPROC_DIR"

_REQUEST_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_STAGE_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
_STAGES = ("decode", "queue", "device", "render")
_RESTART_REASONS = ("hang", "device_lost", "crash", "exit")

Sample = tuple[tuple[str, ...], float]


class Served(Struct):
    """Who serves a request, and how: known once its options are resolved."""

    model: str
    version: str
    operation: Operation


class Metrics:
    """Everything that is counted.

    Args:
        pool: asked for the state of the devices at each scrape.
        ready_within_s: age of its last pass up to which a device counts as up.
        nv_aliases: whether to add Triton's names.
    """

    def __init__(
        self, pool: DevicePool, *, ready_within_s: float = 30.0, nv_aliases: bool = False
    ) -> None:
        self._pool = pool
        self._nv_aliases = nv_aliases
        self._multiprocess = MULTIPROCESS_DIR in os.environ
        self._registry = own = CollectorRegistry()
        self.ready_within_s = ready_within_s
        self.request_seconds = Histogram(
            "http_request_duration_seconds",
            "Duration of requests by route template.",
            ["method", "route", "status"],
            buckets=_REQUEST_SECONDS,
            registry=own,
        )
        self.model_request_seconds = Histogram(
            "heatlens_request_duration_seconds",
            "Duration of requests for images by model, operation and error code (ok = none).",
            ["model", "version", "operation", "code"],
            buckets=_REQUEST_SECONDS,
            registry=own,
        )
        self.stage_seconds = Histogram(
            "heatlens_stage_duration_seconds",
            "Duration of each stage of an image.",
            ["stage", "model", "version", "operation"],
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

    def observe(self, reply: Reply, served: Served) -> None:
        """Count what a reply's images took."""
        model = served.model
        run = self._model_seconds["explain" if served.operation == "explain" else "predict"]
        by_stage = [
            (stage, self.stage_seconds.labels(stage, model, served.version, served.operation))
            for stage in _STAGES
        ]
        for image in reply.images:
            for stage, seconds in by_stage:
                seconds.observe(getattr(image, stage) / 1000)
            self.batch_size.observe(image.batch_size)
            self._model_seconds["preprocess"].labels(model).observe(image.decode / 1000)
            run.labels(model).observe((image.queue + image.device) / 1000)
            self._model_seconds["postprocess"].labels(model).observe(image.render / 1000)

    def observe_request(self, served: Served, *, code: str, seconds: float) -> None:
        """Count a request for images that has ended; `code` is its error's, empty if there was none."""
        labels = (served.model, served.version, served.operation, code or "ok")
        self.model_request_seconds.labels(*labels).observe(seconds)

    def exposition(self) -> bytes:
        """All metrics in Prometheus's text format."""
        counted = list(self._counted().collect())
        known = list(_DeviceCollector(self._pool, self.ready_within_s).collect())
        if self._nv_aliases:
            known += nv_families(counted, self._pool.devices())
        registry = CollectorRegistry()
        registry.register(_Collected([*counted, *known]))
        return generate_latest(registry)

    def _counted(self) -> CollectorRegistry:
        if not self._multiprocess:
            return self._registry
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call] # untyped in the library
        return registry


class _Collected(Collector):
    """What has been collected already."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


class _DeviceCollector(Collector):
    """Reads the devices when scraped: every HTTP process sees the same, so nothing needs to be summed."""

    def __init__(self, pool: DevicePool, ready_within_s: float) -> None:
        self._pool = pool
        self._ready_within_s = ready_within_s

    def collect(self) -> Iterable[Metric]:
        yield _gauge(
            "heatlens_build_info", "Version.", [((version("heatlens"),), 1.0)], labels=["version"]
        )
        cards = [info.card for info in self._pool.models()]
        yield _gauge(
            "heatlens_model_ready",
            "Whether a model version answers requests.",
            [((card.name, card.version), float(card.ready)) for card in cards],
            labels=["model", "version"],
        )
        statuses = self._pool.devices()
        yield from self._gauges(statuses)
        yield from _counters(statuses)

    def _gauges(self, statuses: Sequence[DeviceStatus]) -> Iterable[Metric]:
        within = self._ready_within_s
        rows = [
            (
                "heatlens_device_up",
                "Whether a device completed a pass recently.",
                [float(is_up(status, within_s=within)) for status in statuses],
            ),
            (
                "heatlens_queue_depth",
                "Jobs waiting or running on a device.",
                [float(status.queue_depth) for status in statuses],
            ),
            (
                "heatlens_device_wait_seconds",
                "Estimated wait of a new job.",
                [status.wait_ms / 1000 for status in statuses],
            ),
            (
                "heatlens_device_memory_bytes",
                "Memory that a worker holds: on its GPU, or of its process on a CPU.",
                [float(status.memory_bytes) for status in statuses],
            ),
        ]
        devices = [(status.device,) for status in statuses]
        for name, text, values in rows:
            yield _gauge(name, text, list(zip(devices, values, strict=True)), labels=["device"])


def _counters(statuses: Sequence[DeviceStatus]) -> Iterable[Metric]:
    restarts = CounterMetricFamily(
        "heatlens_worker_restarts",
        "Restarts of device workers by why they had ended.",
        labels=["device", "reason"],
    )
    labels = ["device", "model", "version", "reason"]
    batches = CounterMetricFamily(
        "heatlens_batches", "Batches by what set their size.", labels=labels
    )
    images = CounterMetricFamily("heatlens_batch_images", "Images in these batches.", labels=labels)
    for status in statuses:
        for reason in _RESTART_REASONS:
            restarts.add_metric([status.device, reason], status.restart_reasons.get(reason, 0))
        for count in status.batches:
            values = [status.device, count.model, count.version, count.reason]
            batches.add_metric(values, count.batches)
            images.add_metric(values, count.images)
    return restarts, batches, images


def _gauge(
    name: str, text: str, samples: Sequence[Sample], *, labels: Sequence[str]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family
