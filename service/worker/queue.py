"""Jobs on their way through a Batcher: entries, the queue they wait in, the batches they form."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from models.methods import METHODS
from models.types import Job, JobOptions

JobClass = Literal["interactive", "long"]
BatchReason = Literal["full", "idle", "deadline", "memory", "held", "alone", "step"]
"""Why a batch has the size it has.

`full`: the best batch. `idle`: all that waited was taken. `deadline`: more would have made the
earliest deadline pass. `memory`: the device had no memory for more a while ago. `held`: as many
long jobs are between steps as may be. `alone`: a job that was in a worker's death runs by itself.
`step`: next steps of long jobs.
"""
ModelKey = tuple[str, str]
"""Name and version."""


class Suspended(Protocol):
    """A long job between two steps, as the engine keeps it."""

    @property
    def job(self) -> Job:
        """The job."""
        ...

    @property
    def cost(self) -> int:
        """Images in its next step."""
        ...


@dataclass(slots=True, eq=False)
class Entry:
    """A job in the batcher.

    Attributes:
        arrived: when it was admitted.
        started: when its first batch started; None while it waits for that.
        device_s: device time of its batches so far.
        batch_size: jobs in its first batch.
        batches: that it was part of and that have ended.
        pending: its state between steps.
        gone: whether it was cancelled while it waited.
    """

    job: Job
    job_class: JobClass
    arrived: float
    started: float | None = None
    device_s: float = 0.0
    batch_size: int = 1
    batches: int = 0
    pending: Suspended | None = None
    gone: bool = False

    @property
    def key(self) -> ModelKey:
        """Its model."""
        return (self.job.model, self.job.version)


@dataclass(frozen=True, slots=True)
class Batch:
    """Entries that run together: either all for the first time, or all for their next step."""

    key: ModelKey
    job_class: JobClass
    entries: tuple[Entry, ...]
    images: int
    predicted_s: float
    started: float
    reason: BatchReason

    @property
    def is_step(self) -> bool:
        """Whether the entries are long jobs that have run before."""
        return self.entries[0].pending is not None


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do now: a batch to run, if any, and jobs whose deadline passed while they waited."""

    batch: Batch | None
    expired: tuple[Entry, ...] = ()


@dataclass(slots=True)
class EntryQueue:
    """Entries that wait for their first batch, by deadline, then by arrival; its length leaves out those `gone`."""

    heap: list[tuple[float, int, Entry]] = field(default_factory=list)
    size: int = 0

    def __len__(self) -> int:
        return self.size

    def push(self, entry: Entry, sequence: int) -> None:
        """Add an entry; `sequence` orders those of equal deadline."""
        heapq.heappush(self.heap, (entry.job.deadline, sequence, entry))
        self.size += 1

    def head(self) -> Entry | None:
        """The first entry that is not gone."""
        while self.heap and self.heap[0][2].gone:
            heapq.heappop(self.heap)
        return self.heap[0][2] if self.heap else None

    def pop(self) -> Entry:
        """Take out what `head` showed."""
        self.size -= 1
        return heapq.heappop(self.heap)[2]

    def dismiss(self) -> None:
        """Count out an entry that is `gone`; give back the memory once most of the heap is."""
        self.size -= 1
        if len(self.heap) > 2 * self.size + 8:
            self.heap = [item for item in self.heap if not item[2].gone]
            heapq.heapify(self.heap)


def is_long(options: JobOptions) -> bool:
    """Whether a job takes more than its one pass and head passes."""
    methods = (METHODS[name] for name in options.methods if name in METHODS)
    return bool(options.faithfulness) or any(m.cost in {"passes", "many"} for m in methods)


# ---------------------------------------------------------------- forming


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
    fingerprint: str = ""
    long_ms: float = 0.0
    closing: bool = False
    batch_cap: int = 0
    cap_until: float = -math.inf

    def batch_limit(self, now: float) -> int:
        """Jobs that may be taken at once."""
        return min(self.best_batch, self.batch_cap) if now < self.cap_until else self.best_batch

    def is_stale(self, job: Job) -> bool:
        """Whether a job was resolved against another revision; without one it fits any."""
        return bool(job.fingerprint and self.fingerprint) and job.fingerprint != self.fingerprint


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


def can_share_batch(entries: list[Entry], entry: Entry | None) -> bool:
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


# ---------------------------------------------------------------- latency


_UNKNOWN_MS = 50.0


class LatencyModel:
    """Milliseconds by batch size: measured points, straight lines between them.

    Each observation moves the point of its size by `smoothing` of the difference (an exponentially
    weighted moving average), so that one slow batch is soon forgotten. Beyond the largest point the
    time grows in proportion to the size.
    """

    def __init__(
        self, latency_ms: Mapping[int, float] | None = None, *, smoothing: float = 0.2
    ) -> None:
        self._points = dict(latency_ms or {})
        self._sizes = sorted(self._points)
        self._smoothing = smoothing

    def predict_ms(self, size: int) -> float:
        """Expected duration of a batch of `size` (from 1); a guess of 50 ms while nothing is known."""
        if not self._sizes:
            return _UNKNOWN_MS
        i = bisect_left(self._sizes, size)
        if i == len(self._sizes):
            largest = self._sizes[-1]
            return self._points[largest] * size / largest
        right = self._sizes[i]
        if i == 0 or right == size:
            return self._points[right]
        left = self._sizes[i - 1]
        share = (size - left) / (right - left)
        return self._points[left] + share * (self._points[right] - self._points[left])

    def observe(self, size: int, duration_ms: float) -> None:
        """Learn from a batch that ran."""
        if size not in self._points:
            known = self.predict_ms(size) if self._sizes else duration_ms
            self._sizes.insert(bisect_left(self._sizes, size), size)
            self._points[size] = known
        self._points[size] += self._smoothing * (duration_ms - self._points[size])
