"""A decoder process: one image after another from a pipe, within limits that the kernel keeps.

python -P -m service.api.decoder --memory BYTES --parent PID

Memory beyond the limit fails as any allocation may; a task that takes too much processor time ends
the process. It opens no socket, writes no file, and gets none of the service's settings.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import struct
import sys
import warnings
from importlib import import_module
from typing import BinaryIO, TypeVar

from PIL import Image

from models.errors import HeatlensError, InternalError
from models.imaging.decode import DecodeLimits
from models.imaging.prepare import Canvas, PreparedImage, prepare
from models.types import Failure, Preprocess
from service.devices import messages
from service.devices.lifeline import die_with_parent
from service.devices.messages import Frame, Message

LATE = -signal.SIGPROF
"""Exit code of a process whose task took too much processor time."""

MessageT = TypeVar("MessageT", bound=Message)

_NICENESS = 5
_LENGTH = struct.Struct(">I")


class Task(Message, frozen=True, kw_only=True):
    """An image to prepare; see `models.imaging.prepare`."""

    data: bytes
    limits: DecodeLimits
    spec: Preprocess
    canvas: Canvas
    cpu_s: float


class Prepared(Message, frozen=True, kw_only=True):
    """The image, or why there is none."""

    image: PreparedImage | None = None
    failure: Failure | None = None


def write(stream: BinaryIO, message: Message) -> None:
    """Send a message."""
    frames = messages.encode(message)
    sizes = [len(frames), *(memoryview(frame).nbytes for frame in frames)]
    stream.write(struct.pack(f">{len(sizes)}I", *sizes))
    stream.writelines(frames)
    stream.flush()


def read(stream: BinaryIO, kind: type[MessageT]) -> MessageT:
    """Receive a message.

    Raises:
        EOFError: the other side has closed the pipe.
    """
    (count,) = _LENGTH.unpack(_exactly(stream, _LENGTH.size))
    sizes = struct.unpack(f">{count}I", _exactly(stream, count * _LENGTH.size))
    # Torch wants arrays that may be written to.
    frames: list[Frame] = [bytearray(_exactly(stream, size)) for size in sizes]
    message: MessageT = messages.decode(frames, kind)
    return message


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


def _prepare(task: Task) -> Prepared:
    signal.setitimer(signal.ITIMER_PROF, task.cpu_s)
    try:
        image = prepare(task.data, limits=task.limits, spec=task.spec, canvas=task.canvas)
    except HeatlensError as error:
        return Prepared(failure=Failure.of("", error))
    except Exception:  # noqa: BLE001 # the text may hold addresses of memory
        return Prepared(failure=Failure.of("", InternalError("The image could not be decoded.")))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return Prepared(image=image)


def _limit(memory: int) -> None:
    warnings.simplefilter("ignore")
    os.nice(_NICENESS)
    for kind, most in (
        (resource.RLIMIT_DATA, memory),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(kind, (most, hard))
    # Their import is part of the start, not of the first image.
    Image.preinit()
    for name in ("TiffImagePlugin", "WebPImagePlugin"):
        import_module(f"PIL.{name}")


def main() -> None:
    """Prepare images until the pipe is closed."""
    parser = argparse.ArgumentParser(prog="heatlens decoder")
    for name in ("memory", "parent"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    die_with_parent(options.parent)
    _limit(options.memory)
    tasks, results = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    # Whatever a library prints must not get among the results.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    while True:
        try:
            task = read(tasks, Task)
        except EOFError:
            return
        write(results, _prepare(task))


if __name__ == "__main__":
    main()
