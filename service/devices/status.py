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
from service.devices.shared_record import SharedRecord

Activity = Literal["idle", "batch", "canary", "load"]

_STATUS_CAPACITY = 128 * 1024


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


class WorkerStatus(Struct):
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


class WorkerStatusFile:
    """A board in a file: made by the supervisor, written by one worker, read by everyone."""

    def __init__(self, record: SharedRecord) -> None:
        self._record = record
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(WorkerStatus)

    @classmethod
    def create(cls, path: Path) -> WorkerStatusFile:
        """Make the file, with nothing on it."""
        return cls(SharedRecord.create(path, capacity=_STATUS_CAPACITY))

    @classmethod
    def open(cls, path: Path) -> WorkerStatusFile:
        """Map a file that exists."""
        return cls(SharedRecord(path))

    def write(self, board: WorkerStatus) -> None:
        """Replace what the board says."""
        self._record.write(self._encoder.encode(board))

    def read(self) -> WorkerStatus | None:
        """What the board says; None if nothing was written yet."""
        record = self._record.read()
        return None if record is None else self._decoder.decode(record)

    def close(self) -> None:
        """Unmap the file."""
        self._record.close()


def is_hung(
    board: WorkerStatus, *, now: float, floor_s: float, factor: float, load_timeout_s: float
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


# ---------------------------------------------------------------- fleet


_STATES_CAPACITY = 512 * 1024

MAX_EXITS = 8
MAX_QUARANTINED = 1024

ProcessState = Literal["up", "down", "given_up"]


class WorkerExit(Struct):
    """How one incarnation of a worker ended.

    Attributes:
        suspects: ids of the jobs that were on the device.
    """

    incarnation: int
    reason: str
    suspects: tuple[str, ...] = ()


class DeviceState(Struct):
    """One device worker as a process.

    Attributes:
        incarnation: number of the process that is running, or ran last; 0 = none yet.
        life: `down` while a restart is due, `given_up` when the restart budget is spent.
        restarts: times it was started again.
        restart_reasons: the same by why it had ended: `hang`, `device_lost`, `crash` (a signal),
            `exit`.
        deaths: the last few, oldest first.
    """

    device: str
    incarnation: int = 0
    life: ProcessState = "down"
    restarts: int = 0
    restart_reasons: dict[str, int] = {}
    deaths: tuple[WorkerExit, ...] = ()


class DeviceStates(Struct):
    """Every device, and what concerns all.

    Attributes:
        draining: whether the service is stopping.
        quarantined: digests of inputs that were on the device in two deaths, oldest first.
        refused_models: `name@version` of models whose loading killed workers; not to be tried
            again.
    """

    devices: tuple[DeviceState, ...] = ()
    draining: bool = False
    quarantined: tuple[str, ...] = ()
    refused_models: tuple[str, ...] = ()


class DeviceStatesFile:
    """The fleet in a file: written by the supervisor, polled by everyone."""

    def __init__(self, record: SharedRecord) -> None:
        self._record = record
        self._decoder = msgspec.msgpack.Decoder(DeviceStates)
        self._seen = -1
        self._fleet = DeviceStates()

    @classmethod
    def create(cls, path: Path) -> DeviceStatesFile:
        """Make the file, with nothing in it."""
        return cls(SharedRecord.create(path, capacity=_STATES_CAPACITY))

    @classmethod
    def open(cls, path: Path) -> DeviceStatesFile:
        """Map a file that exists."""
        return cls(SharedRecord(path))

    def write(self, fleet: DeviceStates) -> None:
        """Replace the record."""
        self._record.write(msgspec.msgpack.encode(fleet))

    def read(self) -> DeviceStates:
        """The current record; decoded only when it has changed."""
        version = self._record.version()
        if version != self._seen:
            record = self._record.read()
            if record is not None:
                self._fleet = self._decoder.decode(record)
                self._seen = version
        return self._fleet

    def close(self) -> None:
        """Unmap the file."""
        self._record.close()
