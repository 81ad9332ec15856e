"""Jobs on their way through a Batcher: entries, the queue they wait in, the batches they form."""

from __future__ import annotations

import heapq
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


class Pending(Protocol):
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
    pending: Pending | None = None
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
class Turn:
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
