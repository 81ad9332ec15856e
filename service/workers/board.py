"""What a device worker is doing right now, readable from outside and after its death.

The compute thread writes its board before it touches the device. So the supervisor sees a hang
without asking, and after a crash knows which jobs were on the device; HTTP processes see when the
last real pass was.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from models.types import Struct
from service.workers.shared_record import SharedRecord

Activity = Literal["idle", "batch", "canary", "load"]

_CAPACITY = 128 * 1024


class RunningJob(Struct):
    """A job that is on the device.

    Attributes:
        deaths: worker deaths it was part of before.
        request_id: of the request that it is part of.
    """

    id: str
    digest: str
    deaths: int
    request_id: str = ""


class BatchCount(Struct):
    """How many batches of a model this worker has started, by the reason for their size; see `BatchReason`."""

    model: str
    version: str
    reason: str
    batches: int = 0
    images: int = 0


class Board(Struct):
    """One device worker, as its compute thread last described it; times are `time.monotonic`.

    Attributes:
        ready: whether every configured model was tried and a real pass succeeded since.
        activity: what the device is doing.
        since: when it began to.
        predicted_s: how long that should take.
        subject: the model that is running or being loaded, as `name@version`.
        jobs: what is on the device.
        last_pass: end of the last real pass; 0 = never.
        queue_depth: jobs waiting and running.
        wait_ms: estimated wait of a new job.
        models: models that are warm, as `name@version`.
        memory_bytes: memory that the worker holds on its device.
        batches: what it has run since it started.
    """

    ready: bool = False
    activity: Activity = "idle"
    since: float = 0.0
    predicted_s: float = 0.0
    subject: str = ""
    jobs: tuple[RunningJob, ...] = ()
    last_pass: float = 0.0
    queue_depth: int = 0
    wait_ms: float = 0.0
    models: tuple[str, ...] = ()
    memory_bytes: int = 0
    batches: tuple[BatchCount, ...] = ()


class BoardFile:
    """A board in a file: made by the supervisor, written by one worker, read by everyone."""

    def __init__(self, record: SharedRecord) -> None:
        self._record = record
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Board)

    @classmethod
    def create(cls, path: Path) -> BoardFile:
        """Make the file, with nothing on it."""
        return cls(SharedRecord.create(path, capacity=_CAPACITY))

    @classmethod
    def open(cls, path: Path) -> BoardFile:
        """Map a file that exists."""
        return cls(SharedRecord(path))

    def write(self, board: Board) -> None:
        """Replace what the board says."""
        self._record.write(self._encoder.encode(board))

    def read(self) -> Board | None:
        """What the board says; None if nothing was written yet."""
        record = self._record.read()
        return None if record is None else self._decoder.decode(record)

    def close(self) -> None:
        """Unmap the file."""
        self._record.close()


def is_hung(
    board: Board, *, now: float, floor_s: float, factor: float, load_timeout_s: float
) -> bool:
    """Whether the device has been at one thing for far longer than predicted.

    Args:
        board: what the worker says.
        now: `time.monotonic()`.
        floor_s: a batch younger than this is never hung.
        factor: times the predicted duration after which a batch is hung.
        load_timeout_s: after which the loading of a model is hung.
    """
    if board.activity == "idle":
        return False
    limit = load_timeout_s if board.activity == "load" else max(floor_s, factor * board.predicted_s)
    return now - board.since > limit
