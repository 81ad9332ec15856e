"""The device worker: a process that owns one device, its models and its queue.

    python -P -m service.worker.process --runtime DIR --device cpu:0 --incarnation 1 --threads 1 \
        --parent PID

The event loop talks to the HTTP processes; the compute thread does everything else. When the device
is lost, the process exits with `EXIT_DEVICE_LOST` and leaves its jobs unfinished: its status names
those on the device, and clients retry them in a new process.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import signal
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import uvloop
import zmq
from pydantic import ValidationError

from models.catalog import ModelSpec
from models.errors import HeatlensError, ModelLoadFailed
from models.heap import end_start, keep_heap
from models.types import Failure, ModelInfo
from service.devices.lifeline import die_with_parent, name_process
from service.devices.message_socket import MessageSocket
from service.devices.messages import (
    Ack,
    Cancel,
    Completion,
    Hello,
    JobProgress,
    JobResult,
    Load,
    MalformedMessage,
    Message,
    Models,
    Results,
    Submission,
    ToWorker,
    Unload,
    decode,
    encode,
)
from service.devices.runtime_dir import RuntimeDir, holds
from service.devices.status import (
    EXIT_DEVICE_LOST,
    DeviceStates,
    DeviceStatesFile,
    WorkerStatusFile,
)
from service.logs import configure_logging
from service.settings import Settings
from service.worker.backend import Backend, make_engine_backend
from service.worker.batcher import Batcher
from service.worker.compute import ComputeThread
from service.worker.tasks import Done
from service.worker.tracing import device_tracing

log = logging.getLogger("heatlens.worker")

_LINGER_MS = 1000
_NICE = 6
# HTTP processes refuse by the wait for the whole answer, before they decode. What they let in is
# refused here only if together they let in far too much.
_LATE = 2.0

Identity = bytes
MakeBackend = Callable[["WorkerOptions", Settings], Backend]


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """The command-line arguments of a worker.

    Attributes:
        threads: torch threads, for CPU devices.
        parent: process id of the supervisor.
    """

    runtime: RuntimeDir
    device: str
    incarnation: int
    threads: int
    parent: int


class Worker:
    """Carries messages between the HTTP processes and the compute thread, as its `Listener`."""

    def __init__(
        self, *, options: WorkerOptions, settings: Settings, make_backend: MakeBackend
    ) -> None:
        self._options = options
        self._settings = settings
        self._make_backend = make_backend
        self._owners: dict[str, Identity] = {}
        self._clients: set[Identity] = set()
        self._stop = asyncio.Event()
        self._exit_code = 0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._status = WorkerStatusFile.open(
            options.runtime.status_file(options.device, options.incarnation)
        )
        self._tracing = device_tracing(settings.tracing, device=options.device)
        self._compute = self._make_compute()

    def _make_compute(self) -> ComputeThread:
        options, settings = self._options, self._settings
        with contextlib.closing(DeviceStatesFile.open(options.runtime.states_file)) as file:
            states = file.read() or DeviceStates()
        specs = [spec for spec in options.runtime.read_catalog() if holds(spec, options.device)]
        specs.sort(key=lambda spec: spec.name != settings.default_model)
        return ComputeThread(
            batcher=Batcher(max_wait_s=_LATE * settings.limits.max_wait_s),
            make_backend=lambda: self._make_backend(options, settings),
            specs=specs,
            refused=states.refused_models,
            listener=self,
            write_status=self._status.write,
            device=options.device,
            canary_s=settings.workers.canary_s,
            tracing=self._tracing,
        )

    async def run(self) -> int:
        """Serve until told to stop or the device is lost; returns the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._stop.set)
        options = self._options
        socket = self._context.socket(zmq.ROUTER)
        # Never drop a message: admission bounds the queues.
        socket.set(zmq.SNDHWM, 0)
        socket.set(zmq.RCVHWM, 0)
        socket.bind(options.runtime.socket_url(options.device, options.incarnation))
        self._socket = MessageSocket(socket, self._receive)
        self._compute.start()
        await self._stop.wait()
        if self._exit_code == 0:
            await asyncio.to_thread(self._compute.stop)
            if self._tracing is not None:
                await asyncio.to_thread(self._tracing.close)
            # The thread's last messages are sent.
            await asyncio.sleep(0)
        self._context.destroy(linger=_LINGER_MS)
        return self._exit_code

    # ---------------------------------------------------------------- from clients

    def _receive(self, frames: Sequence[zmq.Frame]) -> None:
        try:
            message = decode([frame.buffer for frame in frames[1:]], ToWorker)
        except MalformedMessage:
            log.exception("a client sent a malformed message")
            return
        try:
            self._handle(frames[0].bytes, message)
        except Exception:
            # A new process answers the jobs that this one would forget.
            log.exception("a message could not be handled")
            self._exit_code = 1
            self._stop.set()

    def _handle(self, identity: Identity, message: ToWorker) -> None:
        match message:
            case Submission():
                self._submit(identity, message)
            case Cancel(job_id=job_id):
                if self._owners.pop(job_id, None) is not None:
                    self._compute.cancel(job_id)
            case Hello():
                self._clients.add(identity)
                if self._compute.infos:
                    self._send([identity], Models(infos=self._compute.infos))
            case Load(request_id=request_id, spec=spec):
                self._load(spec, self._acknowledge(identity, request_id))
            case Unload(request_id=request_id, name=name, version=version):
                self._compute.unload(name, version, self._acknowledge(identity, request_id))

    def _submit(self, identity: Identity, submission: Submission) -> None:
        self._owners[submission.job.id] = identity
        try:
            self._compute.submit(submission)
        except HeatlensError as error:
            self.on_results([Failure.of(submission.job.id, error)])

    def _load(self, spec: str, done: Done) -> None:
        try:
            self._compute.load(ModelSpec.model_validate_json(spec), done)
        except ValidationError:
            done(ModelLoadFailed("The model's entry is not valid."))

    def _acknowledge(self, identity: Identity, request_id: str) -> Done:
        def done(error: HeatlensError | None) -> None:
            failure = None if error is None else Failure.of(request_id, error)
            self._send([identity], Ack(request_id=request_id, failure=failure))

        return done

    # ---------------------------------------------------------------- to clients

    def on_models(self, infos: Sequence[ModelInfo]) -> None:
        """Send the models to every client."""
        if any(info.card.state != "loading" for info in infos):
            end_start()
        self._send(self._clients, Models(infos=tuple(infos)))

    def on_device_lost(self, reason: str) -> None:
        """Exit; clients retry the jobs that are named by the status elsewhere."""
        log.error("the device is lost: %s", reason)
        self._exit_code = EXIT_DEVICE_LOST
        self._stop.set()

    def on_results(self, results: Sequence[JobResult]) -> None:
        """Send results of jobs to their clients."""
        by_owner: dict[Identity, list[JobResult]] = {}
        for result in results:
            owner = self._owners.pop(result.id, None)
            if owner is not None:
                by_owner.setdefault(owner, []).append(result)
        depth, wait_ms, _ = self._compute.load_state()
        for owner, own in by_owner.items():
            mine = sum(identity == owner for identity in self._owners.values())
            others = max(0, depth - mine) / depth if depth else 0.0
            message = Results(
                completions=tuple(r for r in own if isinstance(r, Completion)),
                failures=tuple(r for r in own if isinstance(r, Failure)),
                others_ms=wait_ms * others,
            )
            self._send([owner], message)

    def on_progress(self, news: Sequence[JobProgress]) -> None:
        """Send news of running jobs to their clients."""
        for item in news:
            if item.job_id in self._owners:
                self._send([self._owners[item.job_id]], item)

    def _send(self, identities: Iterable[Identity], message: Message) -> None:
        frames = encode(message)
        for identity in identities:
            # Clients that are gone are skipped.
            self._socket.send([identity, *frames])


def default_backend(options: WorkerOptions, settings: Settings) -> Backend:
    """The real engine on the device."""
    return make_engine_backend(options.device, base_dir=settings.base_dir, threads=options.threads)


def main(
    arguments: Sequence[str] | None = None, *, make_backend: MakeBackend = default_backend
) -> int:
    """Run one device worker; returns its exit code."""
    gc.disable()
    parser = argparse.ArgumentParser(prog="heatlens device worker")
    parser.add_argument("--runtime", type=lambda path: RuntimeDir(Path(path)), required=True)
    parser.add_argument("--device", required=True)
    for name in ("--incarnation", "--threads", "--parent"):
        parser.add_argument(name, type=int, required=True)
    options = WorkerOptions(**vars(parser.parse_args(arguments)))
    die_with_parent(options.parent)
    name_process(f"worker {options.device}")
    settings = options.runtime.read_settings()
    configure_logging(settings.server.log_level)
    if options.device.startswith("cpu"):
        # HTTP processes share the cores: they admit, refuse and hand over at once, for little time.
        os.nice(_NICE)
        if settings.workers.keep_heap:
            keep_heap()

    async def serve() -> int:
        return await Worker(options=options, settings=settings, make_backend=make_backend).run()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(serve())


if __name__ == "__main__":
    # Interpreter shutdown would wait for torch's threads and for a hanging compute thread.
    os._exit(main())
