"""The queue of a device: entries, the batches that they form, and the model of their latency."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from models.price import Price
from models.types import Job, ModelKey
from service.devices.messages import JobProgress, Submission
from service.worker.pace import Pace, Suspended

JobClass = Literal["interactive", "long"]
BatchReason = Literal["full", "idle", "deadline", "costly", "memory", "held", "alone", "step"]
"""The reason for a batch's size.

`full`: the best batch. `idle`: everything that waited was taken. `deadline`: a larger batch would
miss the earliest deadline. `costly`: more would be too much work or memory for one batch. `memory`:
the device recently had no memory for more. `held`: the limit of suspended long jobs is reached.
`alone`: a job that was part of a worker's exit runs by itself.
`step`: next steps of long jobs.
"""

_UNKNOWN_MS = 50.0
# What no pass is faster than.
_LEAST_MS = 1e-3
_SMOOTHING = 0.2
# A pass to which jobs add less than this share says how long plain predictions take.
_PLAIN_SHARE = 0.1
# No estimate is trusted to be further off.
_MAX_PACE = 8.0
# Passes that tell what a device takes when nothing disturbs it.
_RECENT = 32


@dataclass(slots=True, eq=False)
class Entry:
    """A job in the batcher.

    Attributes:
        arrived: time of admission.
        started: start of its first batch; None while it waits for that.
        device_s: device time of its batches so far.
        own_ms: its part of that, by images.
        batch_size: jobs in its first batch.
        batches: finished batches that it was part of.
        suspended: its state between steps.
        gone: whether it was cancelled while it waited.
        pace: of its steps, if its client wants news.
    """

    submission: Submission
    job_class: JobClass
    arrived: float
    started: float | None = None
    device_s: float = 0.0
    own_ms: float = 0.0
    batch_size: int = 1
    batches: int = 0
    suspended: Suspended | None = None
    gone: bool = False
    pace: Pace | None = None

    @property
    def job(self) -> Job:
        """The job."""
        return self.submission.job

    @property
    def price(self) -> Price:
        """What the job is expected to cost."""
        return self.submission.price

    @property
    def deadline(self) -> float:
        """Time after which its result is useless."""
        return self.submission.deadline

    @property
    def key(self) -> ModelKey:
        """Its model."""
        return self.job.model_key

    @property
    def cost(self) -> int:
        """Images in its next step, or 1 for its first pass."""
        return max(1, self.suspended.cost) if self.suspended is not None else 1

    def news(self, now: float) -> JobProgress | None:
        """What to tell its client between two steps; None where it wants no news or has some."""
        if self.suspended is None or self.gone or self.submission.news == "none":
            return None
        self.pace = self.pace or Pace(now)
        return self.pace.news(self.suspended, wanted=self.submission.news, now=now)


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

    @classmethod
    def of(
        cls, entries: Sequence[Entry], *, predicted_ms: float, now: float, reason: BatchReason
    ) -> Batch:
        """Form a batch of entries of one model and class."""
        return cls(
            key=entries[0].key,
            job_class=entries[0].job_class,
            entries=tuple(entries),
            images=sum(entry.cost for entry in entries),
            predicted_s=predicted_ms / 1000,
            started=now,
            reason=reason,
        )

    @property
    def extra_ms(self) -> float:
        """What the entries add to a first pass of plain predictions."""
        return sum(entry.price.extra_ms for entry in self.entries)

    @property
    def is_step(self) -> bool:
        """Whether the entries are long jobs that have run before."""
        return self.reason == "step"


@dataclass(frozen=True, slots=True)
class Decision:
    """A scheduling decision: the batch to run, if any, and the entries that expired."""

    batch: Batch | None
    expired: tuple[Entry, ...] = ()


@dataclass(slots=True)
class EntryQueue:
    """Entries waiting for their first batch, by deadline, then by arrival.

    Its length and its work do not count entries that are `gone`.

    Attributes:
        extra_ms: what the entries add to plain predictions.
    """

    heap: list[tuple[float, int, Entry]] = field(default_factory=list)
    size: int = 0
    extra_ms: float = 0.0

    def __len__(self) -> int:
        return self.size

    def push(self, entry: Entry, sequence: int) -> None:
        """Add an entry; `sequence` orders those of equal deadline."""
        heapq.heappush(self.heap, (entry.deadline, sequence, entry))
        self._count(entry, 1)

    def head(self) -> Entry | None:
        """The first entry that is not gone."""
        while self.heap and self.heap[0][2].gone:
            heapq.heappop(self.heap)
        return self.heap[0][2] if self.heap else None

    def pop(self) -> Entry:
        """Remove and return the entry that `head` showed."""
        entry = heapq.heappop(self.heap)[2]
        self._count(entry, -1)
        return entry

    def dismiss(self, entry: Entry) -> None:
        """Stop counting an entry that is `gone`; compact the heap once most of it is."""
        self._count(entry, -1)
        if len(self.heap) > 2 * self.size + 8:
            self.heap = [item for item in self.heap if not item[2].gone]
            heapq.heapify(self.heap)

    def _count(self, entry: Entry, times: int) -> None:
        self.size += times
        # Rounding must not add up over the life of a queue.
        self.extra_ms = self.extra_ms + times * entry.price.extra_ms if self.size else 0.0


class LatencyModel:
    """Milliseconds by batch size: measured points, linear interpolation between them.

    Each observation moves the expectation of its size by `smoothing` of the difference (an
    exponentially weighted moving average), so that one slow batch is soon forgotten, and those of
    other sizes in proportion: what makes a device slower makes all sizes slower. How far an
    observation is off counts up to a factor of 8. Beyond the largest point the time grows in
    proportion to the size.
    """

    def __init__(
        self, latency_ms: Mapping[int, float] | None = None, *, smoothing: float = _SMOOTHING
    ) -> None:
        self._points = {n: max(_LEAST_MS, ms) for n, ms in (latency_ms or {}).items()}
        self._sizes = sorted(self._points)
        self._smoothing = smoothing
        # What batches take over their points: expected now, and seen of late.
        self._pace = 1.0
        self._recent = deque([1.0] * _RECENT, maxlen=_RECENT)

    def predict_ms(self, size: int) -> float:
        """Expected duration of a batch of `size` (from 1); 50 ms while nothing is known."""
        return self._pace * self._point(size) if self._sizes else _UNKNOWN_MS

    def _point(self, size: int) -> float:
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

    @property
    def undisturbed_ms(self) -> dict[int, float]:
        """Milliseconds of every size that is known while nothing else keeps the device's cores busy.

        What the fastest tenth of recent batches took, since others only make a batch slower; until
        many have run, what was measured counts for those to come.
        """
        pace = sorted(self._recent)[_RECENT // 10]
        return {size: round(pace * self._points[size], 3) for size in self._sizes}

    def largest_within(self, slack_s: float, size: int) -> int:
        """The largest batch up to `size` that ends within `slack_s`; `size` if one job does not."""
        if self.predict_ms(1) > 1000 * slack_s:
            return size
        while size > 1 and self.predict_ms(size) > 1000 * slack_s:
            size -= 1
        return size

    def observe(self, size: int, duration_ms: float) -> None:
        """Learn from a batch that ran."""
        duration_ms = max(_LEAST_MS, duration_ms)
        if size not in self._points:
            self._points[size] = self._point(size) if self._sizes else duration_ms
            insort(self._sizes, size)
        seen = duration_ms / self._points[size]
        self._recent.append(seen)
        self._pace *= 1 + self._smoothing * (_trusted(seen / self._pace) - 1)


@dataclass(slots=True)
class QueuedModel:
    """A model in the batcher.

    Attributes:
        best_batch: best number of jobs in a batch.
        passes: duration of first passes of plain predictions.
        steps: duration of steps of long jobs.
        extra_pace: what jobs add to a first pass, over what was expected.
        long_pace: device time of long jobs, over what was expected.
        fingerprint: see `ModelInfo`; empty = unknown.
        closing: whether it takes no more jobs.
        batch_cap: limit of jobs in a batch until `cap_until`.
    """

    best_batch: int
    passes: LatencyModel
    steps: LatencyModel
    fingerprint: str = ""
    extra_pace: float = 1.0
    long_pace: float = 1.0
    closing: bool = False
    batch_cap: int = 0
    cap_until: float = -math.inf

    def pass_ms(self, images: int, extra_ms: float) -> float:
        """Expected duration of a first pass of jobs that add this much to plain predictions."""
        return self.passes.predict_ms(images) + self.extra_pace * extra_ms

    def observe_pass(self, images: int, extra_ms: float, duration_ms: float) -> None:
        """Learn from a first pass."""
        plain_ms = self.passes.predict_ms(images)
        if self.extra_pace * extra_ms < _PLAIN_SHARE * plain_ms:
            self.passes.observe(images, duration_ms)
        else:
            self.extra_pace = _learnt(self.extra_pace, (duration_ms - plain_ms) / extra_ms)

    def observe_long(self, entry: Entry) -> None:
        """Learn from a long job that has finished."""
        self.long_pace = _learnt(self.long_pace, entry.own_ms / max(1e-3, entry.price.device_ms))

    def batch_limit(self, now: float) -> int:
        """Current limit of jobs in a batch."""
        return min(self.best_batch, self.batch_cap) if now < self.cap_until else self.best_batch

    def has_replaced(self, fingerprint: str) -> bool:
        """Whether a fingerprint is that of another model; an empty one fits any."""
        return bool(fingerprint and self.fingerprint) and fingerprint != self.fingerprint


def _learnt(pace: float, seen: float) -> float:
    return pace + _SMOOTHING * (_trusted(seen) - pace)


def _trusted(pace: float) -> float:
    return min(_MAX_PACE, max(1 / _MAX_PACE, pace))


def can_share_batch(first: Entry, entry: Entry) -> bool:
    """Whether an entry may join a batch: a job that was part of a worker's exit runs alone."""
    return not (first.submission.worker_exits or entry.submission.worker_exits)
