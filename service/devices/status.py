"""The state of the device workers, in files that all processes read.

Files rather than messages, so that a process that starts late or was busy misses nothing. Each
worker writes its own `WorkerStatus`; the supervisor writes `DeviceStates` for all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Generic, Literal, Self, TypeVar, cast

import msgspec

from models.types import Struct
from service.devices.shared_record import SharedRecord

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

    It shows the supervisor a hang, and after a crash the jobs that were on the device. HTTP
    processes read the time of the last real pass. Times are `time.monotonic`.

    Attributes:
        ready: whether every configured model was tried and a real pass has succeeded since.
        activity: current activity of the device.
        since: start of that activity, or its last sign of progress.
        predicted_s: expected duration of that activity.
        subject: the model being run or loaded, as `name@version`.
        jobs: jobs on the device.
        last_pass: end of the last real pass; 0 = never.
        queue_depth: jobs waiting and running.
        wait_ms: estimated wait of a new job.
        long_wait_ms: the same of a long job.
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
    long_wait_ms: float = 0.0
    models: tuple[str, ...] = ()
    memory_bytes: int = 0
    batches: tuple[BatchCount, ...] = ()


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
        quarantined: digests of jobs that were on a device in two worker exits, oldest first.
        refused_models: `name@version` of models whose loading ended workers; not to be retried.
    """

    devices: tuple[DeviceState, ...] = ()
    draining: bool = False
    quarantined: tuple[str, ...] = ()
    refused_models: tuple[str, ...] = ()


# ---------------------------------------------------------------- files

State = TypeVar("State", bound=Struct)


class _StateFile(Generic[State]):
    """A state in a `SharedRecord`: written by one process, polled by any number."""

    _kind: ClassVar[type[Struct]]
    _capacity: ClassVar[int]

    def __init__(self, record: SharedRecord) -> None:
        self._record = record
        self._decoder = msgspec.msgpack.Decoder(self._kind)
        self._encoded: bytes | None = None
        self._state: State | None = None

    @classmethod
    def create(cls, path: Path) -> Self:
        """Create an empty file."""
        return cls(SharedRecord.create(path, capacity=cls._capacity))

    @classmethod
    def open(cls, path: Path) -> Self:
        """Map an existing file."""
        return cls(SharedRecord(path))

    def write(self, state: State) -> None:
        """Replace the state."""
        self._record.write(msgspec.msgpack.encode(state))

    def read(self) -> State | None:
        """The current state, the same object until it changes; None before the first write."""
        encoded = self._record.read()
        if encoded is not None and encoded != self._encoded:
            self._encoded, self._state = encoded, cast(State, self._decoder.decode(encoded))
        return self._state

    def close(self) -> None:
        """Unmap the file."""
        self._record.close()


class WorkerStatusFile(_StateFile[WorkerStatus]):
    """A worker's status: created by the supervisor, written by the worker."""

    _kind = WorkerStatus
    _capacity = 128 * 1024


class DeviceStatesFile(_StateFile[DeviceStates]):
    """The states of all devices, written by the supervisor."""

    _kind = DeviceStates
    _capacity = 512 * 1024
