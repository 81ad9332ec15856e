"""Messages between HTTP processes and device workers, and their encoding as frames.

A message is one msgpack header frame and one raw frame per array. In the header an array is a
reference (frame, dtype, shape) that is checked against the frame before a view is made of it:
nothing on the wire is executed, and no frame is read beyond its end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
import numpy as np

from models.errors import ERRORS, HeatlensError, InternalError
from models.price import Price
from models.types import Failure, Job, ModelInfo, Outcome, Progress, Struct

News = Literal["none", "progress", "maps"]
Frame = bytes | bytearray | memoryview

MAX_DIMENSIONS = 4
_DTYPES: dict[str, np.dtype[Any]] = {"uint8": np.dtype(np.uint8), "float32": np.dtype("<f4")}
# numpy derives the name of a type anew each time.
_NAMES = {dtype: name for name, dtype in _DTYPES.items()} | {np.dtype(">f4"): "float32"}


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of all messages; each kind is tagged with its name."""


# ---------------------------------------------------------------- to a worker


class Hello(Message, frozen=True, kw_only=True):
    """A client has connected and subscribes to the device's models."""


class Submission(Message, frozen=True, kw_only=True):
    """A job with the data to schedule, retry and trace it.

    Attributes:
        deadline: monotonic time after which the result is useless.
        price: what the job is expected to cost.
        digest: what identifies a job that was part of a worker's exit; empty if it was not.
        worker_exits: worker exits that this job was already part of; such a job runs alone.
        traceparent: W3C trace context, empty when tracing is off.
        request_id: id of the HTTP request, for logs.
        fingerprint: `ModelInfo.fingerprint` that the options were resolved against; empty = any.
        news: what the client wants to hear before the result: nothing, how far the job has come, or
            what its maps show so far as well.
    """

    job: Job
    deadline: float
    price: Price = Price()
    digest: str = ""
    worker_exits: int = 0
    traceparent: str = ""
    request_id: str = ""
    fingerprint: str = ""
    news: News = "none"


class Cancel(Message, frozen=True, kw_only=True):
    """The client no longer waits for this job."""

    job_id: str


class Load(Message, frozen=True, kw_only=True):
    """Load or replace a model version; `spec` is a `ModelSpec` as JSON."""

    request_id: str
    spec: str


class Unload(Message, frozen=True, kw_only=True):
    """Drop a model version, or all versions, once their jobs have finished."""

    request_id: str
    name: str
    version: str | None = None


# ---------------------------------------------------------------- from a worker


class Completion(Struct):
    """The outcome of a job and the conditions of its run.

    Attributes:
        queue_ms: time from arrival in the worker to the start of its first batch.
        device_ms: time its batches occupied the device.
        batch_size: jobs in its first batch.
    """

    outcome: Outcome
    queue_ms: float = 0.0
    device_ms: float = 0.0
    batch_size: int = 1
    device: str = ""

    @property
    def id(self) -> str:
        """The job's id."""
        return self.outcome.id


JobResult = Completion | Failure


class Results(Message, frozen=True, kw_only=True):
    """Results of jobs of the receiving client.

    Attributes:
        others_ms: estimated device time of the jobs that other clients have queued.
    """

    completions: tuple[Completion, ...] = ()
    failures: tuple[Failure, ...] = ()
    others_ms: float = 0.0


class JobProgress(Message, frozen=True, kw_only=True):
    """A job of many steps that is not done yet.

    Attributes:
        seconds_left: expected time until its result; None while that is not known.
    """

    job_id: str
    progress: Progress
    seconds_left: float | None = None

    @classmethod
    def queued(cls, job_id: str) -> JobProgress:
        """A job that waits for a device, or waits again."""
        return cls(job_id=job_id, progress=Progress(what="queued", done=0, total=0))


class Models(Message, frozen=True, kw_only=True):
    """Every model version of the device, unavailable ones included."""

    infos: tuple[ModelInfo, ...]


class Ack(Message, frozen=True, kw_only=True):
    """A load or unload has finished; `failure` is None on success."""

    request_id: str
    failure: Failure | None = None


ToWorker = Hello | Submission | Cancel | Load | Unload
FromWorker = Results | JobProgress | Models | Ack


class MalformedMessage(Exception):
    """The frames are not a message."""


class _ArrayRef(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    frame: int
    dtype: str
    shape: tuple[int, ...]


def encode(message: Message) -> list[Frame]:
    """Encode a message as frames: the header, then one for each array (uint8 or float32).

    Contiguous arrays are sent as views.

    Raises:
        TypeError: an array of another dtype, or of more than four dimensions.
    """
    frames: list[Frame] = [b""]

    def reference(value: object) -> _ArrayRef:
        if not isinstance(value, np.ndarray):
            raise TypeError(f"{type(value).__name__} cannot be sent")
        name = _NAMES.get(value.dtype)
        if name is None or value.ndim > MAX_DIMENSIONS:
            raise TypeError(f"an array of {value.dtype} and shape {value.shape} cannot be sent")
        little_endian = np.ascontiguousarray(value, dtype=_DTYPES[name])
        frames.append(little_endian.reshape(-1).view(np.uint8).data)
        return _ArrayRef(len(frames) - 1, name, value.shape)

    frames[0] = msgspec.msgpack.Encoder(enc_hook=reference).encode(message)
    return frames


def decode(frames: Sequence[Frame], kinds: Any) -> Any:
    """Read a message of one of `kinds`: `ToWorker` or `FromWorker`.

    Its arrays are read-only views of the frames.

    Raises:
        MalformedMessage: the frames are not such a message.
    """

    def array(expected: type, value: object) -> np.ndarray:
        if expected is not np.ndarray:
            raise MalformedMessage(f"no decoder for {expected}")
        return _view(msgspec.convert(value, _ArrayRef), frames)

    try:
        return msgspec.msgpack.Decoder(kinds, dec_hook=array).decode(frames[0])
    except (msgspec.MsgspecError, IndexError, ValueError) as error:
        raise MalformedMessage("the frames are not a message") from error


def _view(ref: _ArrayRef, frames: Sequence[Frame]) -> np.ndarray:
    dtype = _DTYPES.get(ref.dtype)
    if dtype is None or not 0 < ref.frame < len(frames) or len(ref.shape) > MAX_DIMENSIONS:
        raise ValueError("an array reference that is out of range")
    if math.prod(ref.shape) * dtype.itemsize != memoryview(frames[ref.frame]).nbytes:
        raise ValueError("an array that does not fill its frame")
    return np.frombuffer(frames[ref.frame], dtype=dtype).reshape(ref.shape)


# ---------------------------------------------------------------- errors as data


def from_wire(failure: Failure) -> HeatlensError:
    """Rebuild the exception from a failure; an unknown code is an internal error."""
    kind = ERRORS.get(failure.code, InternalError)
    return kind(failure.message, field=failure.field, retry_after_s=failure.retry_after_s)
