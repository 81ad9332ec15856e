"""Shared records of the state of the device workers.

A record, not messages: a process that starts late or was busy reads the same truth as the others
and cannot have missed anything. Each worker writes its own `WorkerStatus`; the supervisor writes
`DeviceStates` for all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from models.types import Struct
from service.devices.shared_record import SharedRecord

_STATUS_CAPACITY = 128 * 1024
_STATES_CAPACITY = 512 * 1024

MAX_EXITS = 8
MAX_QUARANTINED = 1024

EXIT_DEVICE_LOST = 70
"""Exit code of a worker whose device needs a new process."""

Activity = Literal["idle", "batch", "canary", "load"]
ProcessState = Literal["running", "restarting", "given_up"]


# ---------------------------------------------------------------- written by a worker


class RunningJob(Struct):
    """A job on the device.

    Attributes:
        worker_exits: worker exits that it was part of before.
        request_id: id of its HTTP request.
    """

    id: str
    digest: str
    worker_exits: int
    request_id: str = ""


class BatchCount(Struct):
    """Batches of one model started by this worker, by `BatchReason`."""

    model: str
    version: str
    reason: str
    batches: int = 0
    images: int = 0


class WorkerStatus(Struct):
    """The state of one device worker, written by its compute thread before it uses the device.

    So the supervisor detects a hang without asking, and knows after a crash which jobs were on the
    device; HTTP processes see the time of the last real pass. Times are `time.monotonic`.

    Attributes:
        ready: whether every configured model was tried and a real pass has succeeded since.
        activity: current activity of the device.
        since: start of that activity.
        predicted_s: expected duration of that activity.
        subject: the model being run or loaded, as `name@version`.
        jobs: jobs on the device.
        last_pass: end of the last real pass; 0 = never.
        queue_depth: jobs waiting and running.
        wait_ms: estimated wait of a new job.
        models: warm models, as `name@version`.
        memory_bytes: memory that the worker holds on its device.
        batches: batches run since the worker started.
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
    """A worker's status: created by the supervisor, written by the worker, read by everyone."""

    def __init__(self, record: SharedRecord) -> None:
        self._record = record
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(WorkerStatus)

    @classmethod
    def create(cls, path: Path) -> WorkerStatusFile:
        """Create an empty file."""
        return cls(SharedRecord.create(path, capacity=_STATUS_CAPACITY))

    @classmethod
    def open(cls, path: Path) -> WorkerStatusFile:
        """Map an existing file."""
        return cls(SharedRecord(path))

    def write(self, status: WorkerStatus) -> None:
        """Replace the status."""
        self._record.write(self._encoder.encode(status))

    def read(self) -> WorkerStatus | None:
        """The current status; None if nothing has been written yet."""
        record = self._record.read()
        return None if record is None else self._decoder.decode(record)

    def close(self) -> None:
        """Unmap the file."""
        self._record.close()


def is_hung(
    status: WorkerStatus, *, now: float, floor_s: float, factor: float, load_timeout_s: float
) -> bool:
    """Whether the device's current activity has taken far longer than predicted.

    Args:
        status: the worker's status.
        now: `time.monotonic()`.
        floor_s: minimum age of a hung batch.
        factor: multiple of the predicted duration after which a batch counts as hung.
        load_timeout_s: time after which the loading of a model counts as hung.
    """
    if status.activity == "idle":
        return False
    batch_limit = max(floor_s, factor * status.predicted_s)
    limit = load_timeout_s if status.activity == "load" else batch_limit
    return now - status.since > limit


# ---------------------------------------------------------------- written by the supervisor


class WorkerExit(Struct):
    """The end of one incarnation of a worker.

    Attributes:
        suspects: ids of the jobs that were on the device.
    """

    incarnation: int
    reason: str
    suspects: tuple[str, ...] = ()


class DeviceState(Struct):
    """One device worker as a process.

    Attributes:
        incarnation: number of the current or last process; 0 = none yet.
        state: `restarting` while a start is due, `given_up` when the restart budget is spent.
        restarts: number of restarts.
        restart_reasons: restarts by exit reason: `hang`, `device_lost`, `crash` (a signal), `exit`.
        exits: the last few, oldest first.
    """

    device: str
    incarnation: int = 0
    state: ProcessState = "restarting"
    restarts: int = 0
    restart_reasons: dict[str, int] = {}
    exits: tuple[WorkerExit, ...] = ()


class DeviceStates(Struct):
    """The state of all devices.

    Attributes:
        draining: whether the service is stopping.
        quarantined: digests of inputs that were on a device in two worker exits, oldest first.
        refused_models: `name@version` of models whose loading ended workers; not to be retried.
    """

    devices: tuple[DeviceState, ...] = ()
    draining: bool = False
    quarantined: tuple[str, ...] = ()
    refused_models: tuple[str, ...] = ()


class DeviceStatesFile:
    """`DeviceStates` in a file: written by the supervisor, polled by everyone."""

    def __init__(self, record: SharedRecord) -> None:
        self._record = record
        self._decoder = msgspec.msgpack.Decoder(DeviceStates)
        self._version = -1
        self._states = DeviceStates()

    @classmethod
    def create(cls, path: Path) -> DeviceStatesFile:
        """Create an empty file."""
        return cls(SharedRecord.create(path, capacity=_STATES_CAPACITY))

    @classmethod
    def open(cls, path: Path) -> DeviceStatesFile:
        """Map an existing file."""
        return cls(SharedRecord(path))

    def write(self, states: DeviceStates) -> None:
        """Replace the record."""
        self._record.write(msgspec.msgpack.encode(states))

    def read(self) -> DeviceStates:
        """The current record, decoded only when it has changed."""
        version = self._record.version()
        if version != self._version:
            record = self._record.read()
            if record is not None:
                self._states = self._decoder.decode(record)
                self._version = version
        return self._states

    def close(self) -> None:
        """Unmap the file."""
        self._record.close()
