"""What decides how large a batch becomes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from models.types import Job
from service.workers.entries import Batch, BatchReason, Entry
from service.workers.latency import LatencyModel


@dataclass(slots=True)
class QueuedModel:
    """A model as the batcher knows it.

    Attributes:
        best_batch: jobs that are best taken at once.
        passes: duration of first passes.
        steps: duration of steps of long jobs.
        revision: see `ModelCard`; empty = unknown.
        long_ms: device time of a long job, on average.
        closing: whether it takes no more jobs.
        batch_cap: jobs that may be taken at once until `cap_until`.
    """

    best_batch: int
    passes: LatencyModel
    steps: LatencyModel
    revision: str = ""
    long_ms: float = 0.0
    closing: bool = False
    batch_cap: int = 0
    cap_until: float = -math.inf

    def batch_limit(self, now: float) -> int:
        """Jobs that may be taken at once."""
        return min(self.best_batch, self.batch_cap) if now < self.cap_until else self.best_batch

    def has_replaced(self, job: Job) -> bool:
        """Whether a job was resolved against another revision; without one it fits any."""
        return bool(job.revision and self.revision) and job.revision != self.revision


def make_batch(
    entries: list[Entry], *, images: int, predicted_ms: float, now: float, reason: BatchReason
) -> Batch:
    """The batch of entries that were chosen."""
    return Batch(
        key=entries[0].key,
        job_class=entries[0].job_class,
        entries=tuple(entries),
        images=images,
        predicted_s=predicted_ms / 1000,
        started=now,
        reason=reason,
    )


def may_join(entries: list[Entry], entry: Entry | None) -> bool:
    """A job that was on the device when a worker died runs alone."""
    return entry is not None and entry.job.deaths == 0 and entries[0].job.deaths == 0


def cost(entry: Entry) -> int:
    """Images in a long job's next step."""
    return max(1, entry.pending.cost) if entry.pending is not None else 1


def fit(size: int, latency: LatencyModel, *, slack_s: float) -> int:
    """The largest batch that ends by the earliest deadline; `size` if not even one job would."""
    if latency.predict_ms(1) > 1000 * slack_s:
        return size
    while size > 1 and latency.predict_ms(size) > 1000 * slack_s:
        size -= 1
    return size
