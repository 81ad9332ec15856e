"""Runs batches through the engine and isolates faulty jobs and shortages of memory."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from models.errors import HeatlensError, InternalError, Overloaded
from models.types import Failure, Job, JobOptions, ModelInfo
from service.devices.status import Activity, BatchCount, RunningJob, WorkerStatus
from service.worker.backend import Backend, DeviceLost, Result, classify_exception
from service.worker.queue import Batch, Entry

log = logging.getLogger("heatlens.compute")

_MEMORY_RETRY_S = 1.0
_MEASURE_INTERVAL_S = 1.0
_BEAT_S = 0.5
# Memory over the least that an idle device had, from which on it is worth a walk through the heap.
_SETTLED = 1.25


@dataclass(frozen=True, slots=True)
class BatchRun:
    """The results of a batch.

    Attributes:
        results: one for each entry, in order.
        largest_fit: jobs that the device had memory for; None if the batch fitted.
    """

    results: list[Result]
    largest_fit: int | None = None


class Runner:
    """Runs batches and canary passes, and publishes the worker's status before each."""

    def __init__(self, backend: Backend, *, write_status: Callable[[WorkerStatus], None]) -> None:
        self._backend = backend
        backend.engine.beat = self._beat
        self._write_status = write_status
        self._counts: dict[tuple[str, str, str], BatchCount] = {}
        self._measured_at = -math.inf
        self._least_bytes: int | None = None
        self.status = WorkerStatus()

    def publish(
        self, activity: Activity, *, jobs: tuple[RunningJob, ...] = (), **changes: object
    ) -> None:
        """Publish the status with a new activity; fields not in `changes` stay as they were."""
        self.status = msgspec.structs.replace(
            self.status, activity=activity, since=time.monotonic(), jobs=jobs, **changes
        )
        self._write_status(self.status)

    def _beat(self) -> None:
        """Show that the activity makes progress, whatever it was predicted to take."""
        now = time.monotonic()
        if now - self.status.since > _BEAT_S:
            self.status = msgspec.structs.replace(self.status, since=now)
            self._write_status(self.status)

    def run(self, batch: Batch) -> BatchRun:
        """Run a batch.

        Raises:
            DeviceLost: the device needs a new process; the status still names the jobs.
        """
        self._count(batch)
        done = self._attempt(batch.entries, batch)
        self._publish_end(done.results)
        if any(isinstance(r, Failure) and r.code == Overloaded.code for r in done.results):
            # One job is too large by itself: smaller batches would not help.
            return BatchRun(results=done.results)
        return done

    def canary(self, info: ModelInfo) -> float | None:
        """Run a black image through a model; returns the milliseconds it took, None if it failed.

        Raises:
            DeviceLost: the device needs a new process.
        """
        card = info.card
        shape = (224, 224, 3) if card.input is None else (*card.input.crop, card.input.channels)
        job = Job(
            id="canary",
            operation="predict",
            model=card.name,
            version=card.version,
            input=np.zeros(shape, dtype=np.uint8),
            options=JobOptions(top_k=1),
        )
        predicted_s = card.latency_ms.get(1, 0.0) / 1000
        self.publish("canary", subject=card.full_name, predicted_s=predicted_s)
        began = time.monotonic()
        results = self._call(self._backend.engine.run, [job], {})
        taken_ms = 1000 * (time.monotonic() - began)
        self._settle()
        passed = self._publish_end([] if isinstance(results, HeatlensError) else results)
        return taken_ms if passed else None

    def _settle(self) -> None:
        """Release memory that earlier work has left, while the device is idle."""
        held, least = self._backend.memory_bytes(), self._least_bytes
        if least is None or held > _SETTLED * least:
            self._backend.free_memory()
            held = self._backend.memory_bytes()
        self._least_bytes = held if least is None else min(least, held)

    def _attempt(self, entries: Sequence[Entry], batch: Batch) -> BatchRun:
        """Run entries together; on failure run each half by itself, down to the faulty entry."""
        self.publish(
            "batch",
            jobs=tuple(map(_running, entries)),
            subject="@".join(batch.key),
            predicted_s=batch.predicted_s,
            batches=tuple(self._counts.values()),
        )
        engine, extra = self._backend.engine, _request_ids(entries)
        if batch.is_step:
            results = self._call(engine.advance, [e.suspended for e in entries], extra)
        else:
            results = self._call(engine.run, [e.job for e in entries], extra)
        if not isinstance(results, HeatlensError):
            return BatchRun(results=results)
        fit: int | None = None
        if isinstance(results, Overloaded):
            self._backend.free_memory()
            fit = max(1, len(entries) // 2)
        if len(entries) == 1:
            return BatchRun(results=[Failure.of(entries[0].job.id, results)], largest_fit=fit)
        half = len(entries) // 2
        parts = [self._attempt(part, batch) for part in (entries[:half], entries[half:])]
        fits = [part.largest_fit for part in parts if part.largest_fit is not None]
        return BatchRun(
            results=[result for part in parts for result in part.results],
            largest_fit=fits[-1] if fits else fit,
        )

    def _call(
        self, call: Callable[[Sequence[Any]], Sequence[Result]], items: Sequence[Any], extra: Any
    ) -> list[Result] | HeatlensError:
        """Call the engine and return its results, or the error that ends a single item.

        The exception is dropped: its traceback holds tensors.
        """
        try:
            results = list(call(items))
        except HeatlensError as error:
            return error.alone()
        except Exception as error:
            # Any error of a model must end its own jobs only.
            fault = classify_exception(error)
            log.exception("a batch of %d failed: %s", len(items), fault, extra=extra)
            if fault == "device":
                raise DeviceLost("device error") from None
            if fault == "memory":
                return Overloaded(
                    "The device has no memory left for this request.", retry_after_s=_MEMORY_RETRY_S
                )
            return InternalError("The model failed on this request.")
        if len(results) == len(items) and all(result is not None for result in results):
            return results
        counts = (len(results), len(items))
        log.error("the engine returned %d results for %d jobs", *counts, extra=extra)
        return InternalError("The model failed on this request.")

    def _publish_end(self, results: Sequence[Result]) -> bool:
        passed = any(not isinstance(result, Failure) for result in results)
        now = time.monotonic()
        if now - self._measured_at > _MEASURE_INTERVAL_S:
            memory_bytes = self._backend.memory_bytes()
            self.status = msgspec.structs.replace(self.status, memory_bytes=memory_bytes)
            self._measured_at = now
        self.publish("idle", last_pass=now if passed else self.status.last_pass)
        return passed

    def _count(self, batch: Batch) -> None:
        name, version, reason = key = (*batch.key, batch.reason)
        known = self._counts.get(key, BatchCount(model=name, version=version, reason=reason))
        self._counts[key] = msgspec.structs.replace(
            known, batches=known.batches + 1, images=known.images + batch.images
        )


def _running(entry: Entry) -> RunningJob:
    submission = entry.submission
    return RunningJob(
        id=entry.job.id,
        digest=submission.digest,
        worker_exits=submission.worker_exits,
        request_id=submission.request_id,
    )


def _request_ids(entries: Sequence[Entry]) -> dict[str, Any]:
    """The ids of the requests in a batch, as `extra` for the logger."""
    ids = tuple(dict.fromkeys(e.submission.request_id for e in entries if e.submission.request_id))
    if len(ids) == 1:
        return {"fields": {"request_id": ids[0]}}
    return {"fields": {"request_ids": ids}} if ids else {}
