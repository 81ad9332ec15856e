"""Runs batches through the engine and keeps one bad job, or too little memory, from harming its neighbours."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np

from models.errors import HeatlensError, InternalError, Overloaded
from models.types import Failure, Job, JobOptions, ModelInfo
from service.devices.messages import to_wire
from service.devices.status import Activity, BatchCount, RunningJob, WorkerStatus
from service.worker.backend import Backend, DeviceLost, Result, classify_exception
from service.worker.queue import Batch, Suspended

log = logging.getLogger("heatlens.compute")

Call = Callable[[Sequence[Any]], Sequence[Result]]

_MEMORY_RETRY_S = 1.0
_MEASURE_S = 1.0


class Runner:
    """Runs batches and canary passes; says on the board what it does before it does it.

    Args:
        backend: the engine.
        write_board: publishes a board.
    """

    def __init__(self, backend: Backend, *, write_status: Callable[[WorkerStatus], None]) -> None:
        self._backend = backend
        self._write_board = write_status
        self._largest_fit: int | None = None
        self._counts: dict[tuple[str, str, str], BatchCount] = {}
        self._measured = -math.inf
        self.board = WorkerStatus()

    @property
    def largest_fit(self) -> int | None:
        """Items that the last batch was cut down to for want of memory; None if it fitted."""
        return self._largest_fit

    def post(
        self, activity: Activity, *, jobs: tuple[RunningJob, ...] = (), **changes: object
    ) -> None:
        """Write the board; what `changes` does not name stays as it was."""
        self.board = msgspec.structs.replace(
            self.board, activity=activity, since=time.monotonic(), jobs=jobs, **changes
        )
        self._write_board(self.board)

    def run(self, batch: Batch) -> list[Result]:
        """Run a batch; a result for each entry, in order.

        Raises:
            DeviceLost: the device needs a new process; the board still names the jobs.
        """
        self._largest_fit = None
        self._count(batch)
        engine = self._backend.engine
        if batch.is_step:
            results = self._attempt(engine.advance, [e.pending for e in batch.entries], batch)
        else:
            results = self._attempt(engine.run, [e.job for e in batch.entries], batch)
        self._post_end(results)
        if any(isinstance(r, Failure) and r.code == Overloaded.code for r in results):
            self._largest_fit = (
                None  # one job is too large by itself: smaller batches would not help
            )
        return results

    def canary(self, info: ModelInfo) -> bool:
        """Run a black picture through a model; whether that succeeded.

        Raises:
            DeviceLost: the device needs a new process.
        """
        card = info.card
        height, width = card.input.crop if card.input is not None else (224, 224)
        job = Job(
            id="canary",
            operation="predict",
            model=card.name,
            version=card.version,
            input=np.zeros((height, width, 3), dtype=np.uint8),
            options=JobOptions(top_k=1),
            deadline=float("inf"),
        )
        predicted_s = card.latency_ms.get(1, 0.0) / 1000
        self.post("canary", subject=f"{card.name}@{card.version}", predicted_s=predicted_s)
        results, _ = self._call(self._backend.engine.run, [job])
        return self._post_end(results or [])

    def _attempt(self, call: Call, items: Sequence[Any], batch: Batch) -> list[Result]:
        """Run items together; where that fails, each half by itself, down to the one that is to blame."""
        self.post(
            "batch",
            jobs=tuple(_running(item) for item in items),
            subject="@".join(batch.key),
            predicted_s=batch.predicted_s,
            batches=tuple(self._counts.values()),
        )
        results, error = self._call(call, items)
        if results is not None:
            return results
        if isinstance(error, Overloaded):
            self._backend.free_memory()
            self._largest_fit = max(1, len(items) // 2)
        if len(items) == 1:
            return [to_wire(_job(items[0]).id, error)]
        half = len(items) // 2
        return [
            *self._attempt(call, items[:half], batch),
            *self._attempt(call, items[half:], batch),
        ]

    def _call(self, call: Call, items: Sequence[Any]) -> tuple[list[Result] | None, HeatlensError]:
        """Call the engine: its results, or None and the error that each item alone would end with.

        The exception and its traceback, which holds tensors, are gone when this returns.
        """
        try:
            results = list(call(items))
            if len(results) == len(items) and all(result is not None for result in results):
                return results, InternalError("")
            log.error(
                "the engine gave %d results for %d jobs",
                len(results),
                len(items),
                extra=_requests(items),
            )
        except HeatlensError as error:
            return None, type(error)(
                error.message, field=error.field, retry_after_s=error.retry_after_s
            )
        except Exception as error:  # whatever a model raises must end its own jobs only
            fault = classify_exception(error)
            log.exception("a batch of %d failed: %s", len(items), fault, extra=_requests(items))
            if fault == "device":
                raise DeviceLost("device error") from None
            if fault == "memory":
                return None, Overloaded(
                    "The device has no memory left for this request.", retry_after_s=_MEMORY_RETRY_S
                )
        return None, InternalError("The model failed on this request.")

    def _post_end(self, results: Sequence[Result]) -> bool:
        passed = any(not isinstance(result, Failure) for result in results)
        now = time.monotonic()
        if now - self._measured > _MEASURE_S:
            memory_bytes = self._backend.memory_bytes()
            self.board = msgspec.structs.replace(self.board, memory_bytes=memory_bytes)
            self._measured = now
        self.post("idle", last_pass=now if passed else self.board.last_pass)
        return passed

    def _count(self, batch: Batch) -> None:
        key = (*batch.key, batch.reason)
        name, version, reason = key
        known = self._counts.get(key, BatchCount(model=name, version=version, reason=reason))
        self._counts[key] = msgspec.structs.replace(
            known, batches=known.batches + 1, images=known.images + batch.images
        )


def _job(item: Job | Suspended) -> Job:
    return item if isinstance(item, Job) else item.job


def _running(item: Job | Suspended) -> RunningJob:
    job = _job(item)
    return RunningJob(id=job.id, digest=job.digest, deaths=job.deaths, request_id=job.request_id)


def _requests(items: Sequence[Job | Suspended]) -> dict[str, Any]:
    """Whose requests a line of the log is about: `extra` for the logger."""
    ids = tuple(dict.fromkeys(_job(item).request_id for item in items if _job(item).request_id))
    if len(ids) == 1:
        return {"fields": {"request_id": ids[0]}}
    return {"fields": {"request_ids": ids}} if ids else {}
