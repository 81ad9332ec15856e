"""`SocketPool`: gives an HTTP process access to the devices over the workers' sockets."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import zmq

from models.catalog import ModelSpec
from models.errors import (
    Draining,
    HeatlensError,
    InputQuarantined,
    ModelReplaced,
    NotReady,
    Overloaded,
    UnknownModel,
    WorkerLost,
)
from models.types import Failure, Job, ModelInfo
from service.devices.commands import ModelCommands
from service.devices.connection import WorkerConnection
from service.devices.messages import (
    Ack,
    Cancel,
    Completion,
    FromWorker,
    JobProgress,
    JobResult,
    Models,
    Results,
    Submission,
)
from service.devices.model_state import keep_known_models, loading_model, merge
from service.devices.pool import DeviceStatus, OnProgress, device_status, ignore, wait_for
from service.devices.runtime_dir import RuntimeDir, holds
from service.devices.status import DeviceState, DeviceStates, DeviceStatesFile

_POLL_S = 0.02
_MAX_WAITING = 512
_FIRST_MODELS_S = 1.0
_FIRST_MODELS_POLL_S = 0.002
_QUARANTINED = (
    "This image with these options was on a device in two worker exits; it is refused for a while."
)


@dataclass(slots=True, eq=False)
class _InFlight:
    """A submission with an awaiting client; `connection` is None while no device can take it."""

    submission: Submission
    result: asyncio.Future[JobResult]
    on_progress: OnProgress
    connection: WorkerConnection | None = None
    was_sent: bool = False

    @property
    def digest(self) -> str:
        """See `digest_of`."""
        return self.submission.digest or digest_of(self.submission.job)

    def resolve(self, result: JobResult) -> None:
        """Set the result, unless there is one."""
        if not self.result.done():
            self.result.set_result(result)

    def fail(self, error: HeatlensError) -> None:
        """Set an error as the result, unless there is one."""
        self.resolve(Failure.of(self.submission.job.id, error))

    def suspect(self) -> None:
        """Count a worker exit against a job that was on the device; the second one ends it."""
        exits = self.submission.worker_exits + 1
        self.submission = msgspec.structs.replace(
            self.submission, worker_exits=exits, digest=self.digest
        )
        if exits >= 2:
            self.fail(InputQuarantined(_QUARANTINED))


class SocketPool:
    """Implements `DevicePool`: routes jobs to workers and survives their exits.

    A job goes to the device where it waits least, by estimate, of those where its model is warm. When
    a worker exits, its unfinished jobs go to another one or wait for its restart. Jobs that were on
    the device are suspects: each is retried once, alone; if that ends a worker again, the input is
    quarantined.

    Args:
        runtime: the supervisor's folder.
        ready_within_s: maximum age of a device's last pass that counts as proof of its health.
    """

    def __init__(self, runtime: RuntimeDir, *, ready_within_s: float = 30.0) -> None:
        self.ready_within_s = ready_within_s
        self._runtime = runtime
        self._states = DeviceStates()
        self._connections: dict[str, WorkerConnection] = {}
        self._reported: dict[str, Sequence[ModelInfo]] = {}
        self._models: list[ModelInfo] | None = None
        self._in_flight: dict[str, _InFlight] = {}
        self._commands = ModelCommands(runtime)
        self._quarantined: frozenset[str] = frozenset()
        self._closed = False

    async def start(self) -> None:
        """Read the device states and connect; returns once the ready devices sent their models."""
        self._context = zmq.Context()
        self._states_file = DeviceStatesFile.open(self._runtime.states_file)
        specs = self._runtime.read_catalog()
        states = self._states_file.read() or DeviceStates()
        for state in states.devices:
            held = [spec for spec in specs if holds(spec, state.device)]
            self._reported[state.device] = list(map(loading_model, held))
        self._apply(states)
        self._watching = asyncio.create_task(self._watch())
        until = time.monotonic() + _FIRST_MODELS_S
        while time.monotonic() < until and any(map(_awaits_models, self._connections.values())):  # noqa: ASYNC110
            await asyncio.sleep(_FIRST_MODELS_POLL_S)

    async def close(self) -> None:
        """Refuse new jobs, fail the outstanding ones with `Draining`, disconnect."""
        self.refuse()
        self._watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._watching
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()
        self._context.destroy(linger=0)
        self._states_file.close()

    def refuse(self) -> None:
        """Accept no new jobs, and fail the outstanding ones with `Draining` now."""
        self._closed = True
        for request in self._in_flight.values():
            request.fail(Draining("The service is stopping."))

    # ---------------------------------------------------------------- jobs

    async def submit(
        self, submission: Submission, *, on_progress: OnProgress = ignore
    ) -> Completion:
        """Run one job; see `DevicePool.submit`."""
        if self._closed:
            raise Draining("The service is stopping.")
        job_id = submission.job.id
        result: asyncio.Future[JobResult] = asyncio.get_running_loop().create_future()
        request = _InFlight(submission, result, on_progress)
        self._in_flight[job_id] = request
        try:
            self._dispatch(request)
            return await wait_for(request.result, deadline=submission.deadline)
        finally:
            del self._in_flight[job_id]
            if request.connection is not None:
                request.connection.outstanding.pop(job_id, None)
                if not request.result.done() or request.result.cancelled():
                    request.connection.send(Cancel(job_id=job_id))

    def _dispatch(self, request: _InFlight) -> None:
        """Send a job to a device, let it wait for one, or fail it if waiting is pointless."""
        submission, job = request.submission, request.submission.job
        # To digest an image takes a while, and there is hardly ever one in quarantine.
        if self._quarantined and request.digest in self._quarantined:
            request.fail(InputQuarantined(_QUARANTINED))
            return
        key, fingerprint = job.model_key, submission.fingerprint
        ready = [
            connection
            for connection in self._connections.values()
            if key in connection.infos and connection.infos[key].card.ready
        ]
        if not ready:
            hopeless = self._hopeless(request)
            # The model was loaded a moment ago, when the request was resolved against it.
            if isinstance(hopeless, UnknownModel) and fingerprint:
                hopeless = ModelReplaced("The model was unloaded; try again.")
            if hopeless is not None:
                request.fail(hopeless)
            return
        fitting = [c for c in ready if fingerprint in {"", c.infos[key].fingerprint}]
        if not fitting:
            request.fail(ModelReplaced("The model was replaced; try again."))
            return
        price = submission.price
        connection = min(fitting, key=lambda c: c.wait_ms(long=price.long))
        connection.outstanding[job.id] = price
        request.connection, request.was_sent = connection, True
        connection.send(submission)

    def _hopeless(self, request: _InFlight) -> HeatlensError | None:
        """The reason why waiting for a device is pointless; None if it is not."""
        if all(state.state == "given_up" for state in self._states.devices):
            if request.was_sent:
                return WorkerLost("The device worker was lost and will not be restarted.")
            return NotReady("All devices have failed.")
        key = request.submission.job.model_key
        known = {info.card.key: info.card for info in self.models()}
        if key not in known:
            return UnknownModel("No such model is loaded.", field="model")
        if known[key].state == "unavailable":
            return NotReady(known[key].reason or "The model is unavailable.")
        waiting = sum(other.connection is None for other in self._in_flight.values())
        if waiting > _MAX_WAITING:
            return Overloaded("Too many requests wait for a device.", retry_after_s=1.0)
        return None

    def _dispatch_waiting(self) -> None:
        for request in self._in_flight.values():
            if request.connection is None and not request.result.done():
                self._dispatch(request)

    # ---------------------------------------------------------------- connections

    async def _watch(self) -> None:
        while True:
            states = self._states_file.read()
            if states is not None and states is not self._states:
                self._apply(states)
            await asyncio.sleep(_POLL_S)

    def _apply(self, states: DeviceStates) -> None:
        """Drop connections to exited workers, open those to new ones, dispatch waiting jobs."""
        self._states = states
        self._quarantined = frozenset(states.quarantined)
        self._models = None
        for state in states.devices:
            running = state.state == "running"
            connection = self._connections.get(state.device)
            current = connection is not None and connection.incarnation == state.incarnation
            if connection is not None and not (running and current):
                self._on_disconnect(connection, state)
            if running and state.device not in self._connections:
                self._connections[state.device] = WorkerConnection(
                    context=self._context,
                    runtime=self._runtime,
                    device=state.device,
                    incarnation=state.incarnation,
                    on_message=self._on_message,
                )
        self._dispatch_waiting()

    def _on_disconnect(self, connection: WorkerConnection, state: DeviceState) -> None:
        del self._connections[connection.device]
        connection.close()
        exits = [e for e in state.exits if e.incarnation == connection.incarnation]
        suspects = {job_id for worker_exit in exits for job_id in worker_exit.suspects}
        for request in self._in_flight.values():
            if request.connection is connection:
                request.connection = None
                request.on_progress(JobProgress.queued(request.submission.job.id))
                if request.submission.job.id in suspects:
                    request.suspect()
        self._commands.on_disconnect(connection)

    def _on_message(self, connection: WorkerConnection, message: FromWorker) -> None:
        match message:
            case Results(completions=completions, failures=failures, others_ms=others_ms):
                connection.note_others(others_ms)
                results: tuple[JobResult, ...] = (*completions, *failures)
                for result in results:
                    request = self._in_flight.get(result.id)
                    if request is not None and request.connection is connection:
                        request.resolve(result)
            case JobProgress(job_id=job_id):
                request = self._in_flight.get(job_id)
                if request is not None and request.connection is connection:
                    request.on_progress(message)
            case Models(infos=infos):
                connection.infos = {info.card.key: info for info in infos}
                reported = keep_known_models(self._reported[connection.device], infos)
                self._reported[connection.device] = reported
                self._models = None
                self._dispatch_waiting()
            case Ack():
                self._commands.on_ack(message)

    # ---------------------------------------------------------------- state

    def models(self) -> Sequence[ModelInfo]:
        """Every configured model version, merged over the devices."""
        if self._models is None:
            self._models = merge(
                self._reported,
                connected=self._connections,
                coming={s.device for s in self._states.devices if s.state != "given_up"},
            )
        return self._models

    def devices(self) -> Sequence[DeviceStatus]:
        """Every configured device."""
        return [self._status(state) for state in self._states.devices]

    def _status(self, state: DeviceState) -> DeviceStatus:
        connection = self._connections.get(state.device)
        status = device_status(
            state,
            connection.status() if connection is not None else None,
            ready_within_s=self.ready_within_s,
        )
        if self._states.draining:
            status = msgspec.structs.replace(status, state="draining")
        return status

    # ---------------------------------------------------------------- loading

    async def load(self, spec: ModelSpec) -> None:
        """Load or replace a model version on its devices; see `DevicePool.load`."""
        await self._commands.load(spec, self._connections.values())

    async def unload(self, name: str, version: str | None = None) -> None:
        """Let a model (version) finish its jobs, then drop it; see `DevicePool.unload`."""
        await self._commands.unload(name, version, connections=self._connections.values())


def digest_of(job: Job) -> str:
    """Digest of a job's model, input and options, which identifies it after a worker's exit."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update("@".join(job.model_key).encode())
    digest.update(msgspec.msgpack.encode(job.options))
    for array in (job.input, job.areas):
        if array is not None:
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _awaits_models(connection: WorkerConnection) -> bool:
    """Whether a ready device has not sent its models yet, so that they seem to be loading."""
    status = connection.status()
    return status is not None and status.ready and not connection.infos
