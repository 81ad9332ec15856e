"""`DevicePool`, the interface between HTTP and devices.

`SocketPool` implements it for the service; `LocalPool` runs one device in this process, for
notebooks, the command line and replicas of other serving frameworks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, Protocol

from msgspec import Meta

from models.catalog import ModelSpec
from models.errors import DeadlineExceeded
from models.types import Failure, ModelInfo, Struct
from service.devices.messages import Completion, JobProgress, JobResult, Submission, from_wire
from service.devices.status import BatchCount, DeviceState, WorkerStatus

DeviceHealth = Literal["starting", "ready", "lost", "draining"]


class DeviceReport(Struct):
    """The state of one device, as readiness reports it.

    Attributes:
        last_pass_s: seconds since the last completed real pass; None before the first.
        queue_depth: jobs waiting or running.
        models: warm models, as `name@version`.
        restarts: restarts of the worker.
    """

    device: str
    state: DeviceHealth
    last_pass_s: Annotated[
        float | None, Meta(description="Seconds since its last completed pass.")
    ] = None
    queue_depth: int = 0
    models: tuple[str, ...] = ()
    restarts: int = 0


class DeviceStatus(DeviceReport):
    """The same, with the numbers for metrics and admission.

    Attributes:
        wait_ms: estimated wait of a new job in device-milliseconds.
        long_wait_ms: the same of a long job.
        restart_reasons: restarts by exit reason; see `DeviceState`.
        memory_bytes: memory that the worker holds on the device.
        batches: batches the worker has run since it started.
    """

    wait_ms: float = 0.0
    long_wait_ms: float = 0.0
    restart_reasons: dict[str, int] = {}
    memory_bytes: int = 0
    batches: tuple[BatchCount, ...] = ()


def device_status(
    state: DeviceState, worker: WorkerStatus | None, *, ready_within_s: float
) -> DeviceStatus:
    """What the supervisor and the worker, if it runs, say of a device.

    It is ready if its last pass ended within `ready_within_s`.
    """
    written = worker or WorkerStatus()
    last_pass_s = time.monotonic() - written.last_pass if written.last_pass else None
    health: DeviceHealth = "starting"
    if worker is None:
        if state.state != "running" and state.incarnation:
            health = "lost"
    elif worker.ready and last_pass_s is not None:
        health = "ready" if last_pass_s <= ready_within_s else "lost"
    return DeviceStatus(
        device=state.device,
        state=health,
        last_pass_s=last_pass_s,
        queue_depth=written.queue_depth,
        wait_ms=written.wait_ms,
        long_wait_ms=written.long_wait_ms,
        models=written.models,
        restarts=state.restarts,
        restart_reasons=state.restart_reasons,
        memory_bytes=written.memory_bytes,
        batches=written.batches,
    )


OnProgress = Callable[[JobProgress], object]


def ignore(_: JobProgress) -> None:
    """Hear of a job's progress and do nothing."""


class DevicePool(Protocol):
    """Runs jobs on devices."""

    async def start(self) -> None:
        """Connect; returns before any device is ready."""

    async def close(self) -> None:
        """Refuse new jobs, fail the outstanding ones with `Draining`, release everything."""

    async def submit(
        self, submission: Submission, *, on_progress: OnProgress = ignore
    ) -> Completion:
        """Run one job. Cancelling the awaiting task cancels the job.

        `on_progress` is called with the news that the submission asks for, while its steps run.

        Raises:
            HeatlensError: the job's typed failure: `Overloaded`, `DeadlineExceeded`, `NotReady`,
                `Draining`, `WorkerLost`, `InputQuarantined`, `UnknownModel`, `ModelReplaced`, or
                an error found by the engine.
        """

    def models(self) -> Sequence[ModelInfo]:
        """Every configured model version, merged over the devices, with the reasons of failures."""

    def devices(self) -> Sequence[DeviceStatus]:
        """Every configured device."""

    async def load(self, spec: ModelSpec) -> None:
        """Load or replace a model version on its devices; it serves requests once it is warm.

        Raises:
            HeatlensError: it could not be loaded; the old version keeps serving.
        """

    async def unload(self, name: str, version: str | None = None) -> None:
        """Let a model (version) finish its jobs, then drop it.

        Raises:
            UnknownModel: it is not loaded.
        """


async def wait_for(result: asyncio.Future[JobResult], *, deadline: float) -> Completion:
    """Wait for a job's result until its deadline, a time of `time.monotonic`.

    Raises:
        DeadlineExceeded: the deadline passed first.
        HeatlensError: the job's failure.
    """
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            outcome = await result
    except TimeoutError:
        raise DeadlineExceeded("The deadline passed before the result was ready.") from None
    if isinstance(outcome, Failure):
        raise from_wire(outcome)
    return outcome
