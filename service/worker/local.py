"""`LocalPool`: one device in this process, for notebooks and the command line.

It has the same batcher and compute thread as a device worker, but a crash of the device ends the
caller's process.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Callable, Sequence

from msgspec import structs

from models.catalog import ModelSpec
from models.errors import (
    DeadlineExceeded,
    Draining,
    HeatlensError,
    ModelLoadFailed,
    NotReady,
    WorkerLost,
)
from models.types import Failure, ModelInfo
from service.devices.messages import Completion, JobProgress, JobResult, Submission
from service.devices.model_state import loading_model, merge
from service.devices.pool import DeviceStatus, OnProgress, device_status, ignore, wait_for
from service.devices.status import DeviceState, WorkerStatus
from service.hardware import available_cores, resolve_devices
from service.settings import Settings
from service.worker.backend import Backend, make_engine_backend
from service.worker.batcher import Batcher
from service.worker.compute import ComputeThread
from service.worker.tasks import Done
from service.worker.tracing import device_tracing

log = logging.getLogger("heatlens.local")

_LOST = "The device failed; see the log for the reason."


class LocalPool:
    """Implements `DevicePool` with one compute thread.

    It belongs to the event loop in which `start` was awaited.

    Args:
        settings: models, limits, and devices, of which the first one is used; `auto` is the first
            GPU, or the CPU with all its cores.
        make_backend: makes the engine in the compute thread; None = the real one.
        canary_s: idle time after which the device proves itself by a pass.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        make_backend: Callable[[], Backend] | None = None,
        canary_s: float = 3600.0,
    ) -> None:
        self._device = device = resolve_devices(settings.server.devices, cores=1)[0]
        threads = settings.workers.threads or available_cores()
        specs = sorted(settings.models, key=lambda spec: spec.name != settings.default_model)
        self._in_flight: dict[str, asyncio.Future[JobResult]] = {}
        self._on_progress: dict[str, OnProgress] = {}
        self._changed = asyncio.Event()
        self._infos: Sequence[ModelInfo] = [loading_model(spec) for spec in specs]
        self._status = WorkerStatus()
        self._ready_within_s = canary_s + settings.server.ready_within_s
        self._lost = False
        self._closed = False
        self._tracing = device_tracing(settings.tracing, device=device)
        self._compute = ComputeThread(
            batcher=Batcher(max_wait_s=settings.limits.max_wait_s),
            make_backend=make_backend
            or (lambda: make_engine_backend(device, base_dir=settings.base_dir, threads=threads)),
            specs=specs,
            listener=self,
            write_status=self._write_status,
            device=device,
            canary_s=canary_s,
            tracing=self._tracing,
        )

    async def start(self) -> None:
        """Start loading; returns before any model is ready."""
        self._loop = asyncio.get_running_loop()
        self._compute.start()

    async def wait_loaded(self) -> None:
        """Wait until every configured model was tried.

        Raises:
            WorkerLost: the device failed.
        """
        await self._wait_while(lambda: any(i.card.state == "loading" for i in self._infos))

    async def wait_ready(self) -> None:
        """Wait until every configured model was tried and a real pass succeeded.

        Raises:
            ModelLoadFailed: none of the models could be loaded; the text is the first one's reason.
            WorkerLost: the device failed.
        """
        await self.wait_loaded()
        if self._infos and all(info.card.state == "unavailable" for info in self._infos):
            reason = self._infos[0].card.reason
            raise ModelLoadFailed(reason or "The model could not be loaded.")
        await self._wait_while(lambda: not self._status.ready)

    async def _wait_while(self, condition: Callable[[], bool]) -> None:
        while not self._lost and condition():
            self._changed.clear()
            await self._changed.wait()
        if self._lost:
            raise WorkerLost(_LOST)

    async def close(self) -> None:
        """Fail outstanding jobs with `Draining`, and end the thread after the running batch."""
        self._closed = True
        self._fail_all(Draining("The pool is closed."))
        await asyncio.to_thread(self._compute.stop)
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)

    async def submit(
        self, submission: Submission, *, on_progress: OnProgress = ignore
    ) -> Completion:
        """Run one job; see `DevicePool.submit`."""
        if self._closed:
            raise Draining("The pool is closed.")
        if self._lost:
            raise WorkerLost(_LOST)
        await self._wait_for_model(submission)
        job_id = submission.job.id
        self._in_flight[job_id] = result = self._loop.create_future()
        self._on_progress[job_id] = on_progress
        try:
            self._compute.submit(submission)
            return await wait_for(result, deadline=submission.deadline)
        finally:
            del self._in_flight[job_id], self._on_progress[job_id]
            # No effect on a finished job.
            self._compute.cancel(job_id)

    def models(self) -> Sequence[ModelInfo]:
        """Every configured model version."""
        devices = () if self._lost else (self._device,)
        return merge({self._device: self._infos}, connected=devices, coming=devices)

    def devices(self) -> Sequence[DeviceStatus]:
        """The one device."""
        depth, wait_ms, long_wait_ms = self._compute.load_state()
        worker = structs.replace(
            self._status, queue_depth=depth, wait_ms=wait_ms, long_wait_ms=long_wait_ms
        )
        state = DeviceState(device=self._device, state="running")
        status = device_status(state, worker, ready_within_s=self._ready_within_s)
        if self._lost or self._closed:
            status = structs.replace(status, state="lost" if self._lost else "draining")
        return [status]

    async def load(self, spec: ModelSpec) -> None:
        """Load or replace a model version; see `DevicePool.load`."""
        await self._command(functools.partial(self._compute.load, spec))

    async def unload(self, name: str, version: str | None = None) -> None:
        """Let a model (version) finish its jobs, then drop it; see `DevicePool.unload`."""
        await self._command(functools.partial(self._compute.unload, name, version))

    async def _wait_for_model(self, submission: Submission) -> None:
        """Wait while the job's model is being loaded.

        Raises:
            DeadlineExceeded: that took too long.
            NotReady: the model is unavailable.
        """
        key = submission.job.model_key
        try:
            async with asyncio.timeout(submission.deadline - time.monotonic()):
                while True:
                    cards = {info.card.key: info.card for info in self._infos}
                    card = cards.get(key)
                    if card is not None and card.state == "unavailable":
                        raise NotReady(card.reason or "The model is unavailable.")
                    if card is None or card.ready or self._lost:
                        return
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise DeadlineExceeded("The deadline passed while the model was loaded.") from None

    async def _command(self, start: Callable[[Done], None]) -> None:
        """Start a load or unload and wait for it."""
        result: asyncio.Future[HeatlensError | None] = self._loop.create_future()
        start(lambda error: None if result.done() else result.set_result(error))
        error = await result
        if error is not None:
            raise error

    # ---------------------------------------------------------------- from the compute thread

    def on_results(self, results: Sequence[JobResult]) -> None:
        """Pass results to the waiting callers."""
        for result in results:
            future = self._in_flight.get(result.id)
            if future is not None and not future.done():
                future.set_result(result)

    def on_progress(self, news: Sequence[JobProgress]) -> None:
        """Pass news of running jobs to their callers."""
        for item in news:
            self._on_progress.get(item.job_id, ignore)(item)

    def on_models(self, infos: Sequence[ModelInfo]) -> None:
        """Remember the models."""
        self._infos = infos
        self._changed.set()

    def on_device_lost(self, reason: str) -> None:
        """Fail all jobs."""
        log.error("the device is lost: %s", reason)
        self._lost = True
        self._changed.set()
        self._fail_all(WorkerLost(_LOST))

    def _write_status(self, status: WorkerStatus) -> None:
        # Called in the compute thread; the loop may have ended.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._on_status, status)

    def _on_status(self, status: WorkerStatus) -> None:
        self._status = status
        self._changed.set()

    def _fail_all(self, error: HeatlensError) -> None:
        self.on_results([Failure.of(job_id, error) for job_id in self._in_flight])
