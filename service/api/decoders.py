"""Decoders in processes of their own, which are killed and replaced when an image costs too much."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from models.errors import ImageTooLarge, ImageUndecodable
from models.imaging.decode import DecodeLimits
from models.imaging.headers import Header
from models.imaging.prepare import Canvas, PreparedImage
from models.types import Preprocess
from service.api import decoder
from service.api.decoder import Prepared, Task
from service.devices import messages

log = logging.getLogger("heatlens.decoders")

COMMAND = (sys.executable, "-P", "-m", "service.api.decoder")

_LARGE_PIXELS = 16_000_000

# What a Python process needs to start. Settings, and so keys, do not reach it.
_PASSED = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "TMPDIR")
_OWN = {
    # Unused threads of a BLAS count as memory.
    "OPENBLAS_NUM_THREADS": "1",
    # Freed images go back to the system.
    "MALLOC_MMAP_THRESHOLD_": "1048576",
    "MALLOC_ARENA_MAX": "1",
}


@dataclass(slots=True)
class _Run:
    """One task on its way; `process` is the one that works on it."""

    process: subprocess.Popen[bytes] | None = None
    cancelled: bool = False


@dataclass(slots=True)
class Decoders:
    """A few processes that decode, each started when it is first needed.

    Attributes:
        count: processes at most.
        memory_bytes: of one process.
        cpu_s: processor time for one image.
    """

    count: int
    memory_bytes: int
    cpu_s: float
    _idle: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _threads: ThreadPoolExecutor = field(init=False)
    _large: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))

    def __post_init__(self) -> None:
        self._threads = ThreadPoolExecutor(self.count, "decoders")

    async def prepare(
        self, data: bytes, *, header: Header, limits: DecodeLimits, spec: Preprocess, canvas: Canvas
    ) -> PreparedImage:
        """Prepare an image; cancelling this kills the process that works on it.

        Raises:
            ImageTooLarge: it takes too much time or memory.
            ImageUndecodable: it ended the process in another way.
            HeatlensError: see `models.imaging.decode`.
        """
        task = Task(data=data, limits=limits, spec=spec, canvas=canvas, cpu_s=self.cpu_s)
        if header.pixels <= _LARGE_PIXELS:
            reply = await self._submit(task)
        else:
            # One at a time, or each process would hold its gigabyte.
            async with self._large:
                reply = await self._submit(task)
        if reply.image is None:
            assert reply.failure is not None
            raise messages.from_wire(reply.failure)
        return reply.image

    async def _submit(self, task: Task) -> Prepared:
        run = _Run()
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._threads, self._run, task, run
            )
        except asyncio.CancelledError:
            run.cancelled = True
            if run.process is not None:
                run.process.kill()
            raise

    def close(self) -> None:
        """End the processes that wait; one that works ends with its task."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        while self._idle:
            _end(self._idle.pop())

    def _run(self, task: Task, run: _Run) -> Prepared:
        process = self._idle.pop() if self._idle else self._start()
        run.process = process
        if run.cancelled:
            process.kill()
        reply = _ask(process, task)
        run.process = None
        if reply is not None and not run.cancelled:
            self._idle.append(process)
            return reply
        code = _end(process)
        if code == decoder.LATE:
            raise ImageTooLarge("The image takes too much time to decode.")
        log.error("a decoder ended", extra={"fields": {"exit_code": code}})
        raise ImageUndecodable("The image cannot be decoded.")

    def _start(self) -> subprocess.Popen[bytes]:
        passed = {name: os.environ[name] for name in _PASSED if name in os.environ}
        return subprocess.Popen(  # noqa: S603
            [*COMMAND, "--memory", str(self.memory_bytes), "--parent", str(os.getpid())],
            env=passed | _OWN,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # libtiff writes a line for each fault that it finds, thousands for one file.
            stderr=subprocess.DEVNULL,
            cwd=Path("/"),
            process_group=0,
        )


def _ask(process: subprocess.Popen[bytes], task: Task) -> Prepared | None:
    """The reply of a process; None if it has ended instead."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        decoder.write(process.stdin, task)  # type: ignore[arg-type]
        return decoder.read(process.stdout, Prepared)  # type: ignore[arg-type]
    except (EOFError, OSError, messages.MalformedMessage):
        return None


def _end(process: subprocess.Popen[bytes]) -> int:
    """Kill a process, unless it has ended, and tell its exit code."""
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    return process.wait()
