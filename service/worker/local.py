"""`LocalPool`: one device in this process, for notebooks, the command line and replicas of other frameworks.

The same Batcher and compute thread as in a device worker, without processes: a crash of the device
ends the caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence

import msgspec

from models.catalog import ModelSpec
from models.errors import (
    DeadlineExceeded,
    Draining,
    HeatlensError,
    ModelLoadFailed,
    NotReady,
    WorkerLost,
)
from models.types import Failure, Job, ModelInfo, Outcome
from service.devices.messages import from_wire, to_wire
from service.devices.model_state import loading_model, merge
from service.devices.pool import DeviceStatus
from service.devices.status import WorkerStatus
from service.hardware import available_cores, resolve_devices
from service.settings import Settings
from service.worker.backend import Backend, make_engine_backend
from service.worker.batcher import Batcher
from service.worker.compute import ComputeThread
from service.worker.tracing import device_tracing

log = logging.getLogger("heatlens.local")

_CANARY_S = 3600.0


class LocalPool:
    """Implements `DevicePool` with one compute thread.

    It belongs to the event loop in which `start` was awaited.

    Args:
        settings: models, limits, and devices, of which the first one is used; `auto` is the first
            GPU, or the CPU with all its cores.
        make_backend: makes the engine in the compute thread; None = the real one.
    """

    def __init__(
        self, settings: Settings, *, make_backend: Callable[[], Backend] | None = None
    ) -> None:
        self._device = device = resolve_devices(settings.server.devices, cores=1)[0]
        threads = settings.workers.threads or available_cores()
        specs = sorted(settings.models, key=lambda spec: spec.name != settings.default_model)
        self._ends: dict[str, asyncio.Future[Outcome | Failure]] = {}
        self._changed = asyncio.Event()
        self._infos: Sequence[ModelInfo] = [loading_model(spec) for spec in specs]
        self._board = WorkerStatus()
        self._lost = False
        self._closed = False
        self._tracing = device_tracing(settings.tracing, device=device)
        self._compute = ComputeThread(
            batcher=Batcher(max_wait_s=settings.limits.max_wait_s),
            make_backend=make_backend
            or (lambda: make_engine_backend(device, base_dir=settings.base_dir, threads=threads)),
            specs=specs,
            listener=self,
            write_status=self._post,
            canary_s=_CANARY_S,
            tracing=self._tracing,
        )

    async def start(self) -> None:
        """Start loading; returns before any model is ready."""
        self._loop = asyncio.get_running_loop()
        self._compute.start()

    async def wait_ready(self) -> None:
        """Wait until every configured model was tried and a real pass succeeded.

        Raises:
            ModelLoadFailed: none of the models could be loaded; the text is the first one's reason.
            WorkerLost: the device failed.
        """
        while not self._board.ready:
            if self._lost:
                raise WorkerLost("The device failed; the log says why.")
            states = {info.card.state for info in self._infos}
            if self._infos and states <= {"unavailable"}:
                reason = self._infos[0].card.reason
                raise ModelLoadFailed(reason or "The model could not be loaded.")
            self._changed.clear()
            await self._changed.wait()
        await asyncio.sleep(0)  # what the thread said before it was ready is heard first

    async def close(self) -> None:
        """Fail outstanding jobs with `Draining`, and end the compute thread after what it runs."""
        self._closed = True
        self._fail_all(Draining("The pool is closed."))
        await asyncio.to_thread(self._compute.stop)
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)

    async def submit(self, job: Job) -> Outcome:
        """Run one job; see `DevicePool.submit`."""
        if self._closed:
            raise Draining("The pool is closed.")
        if self._lost:
            raise WorkerLost("The device failed; the log says why.")
        await self._wait_for_model(job)
        end: asyncio.Future[Outcome | Failure] = self._loop.create_future()
        self._ends[job.id] = end
        try:
            self._compute.submit(job)
            async with asyncio.timeout(job.deadline - time.monotonic()):
                result = await end
        except TimeoutError:
            raise DeadlineExceeded("The deadline passed before the answer was ready.") from None
        finally:
            del self._ends[job.id]
            self._compute.cancel(job.id)  # no-op for a job that has ended
        if isinstance(result, Failure):
            raise from_wire(result)
        return msgspec.structs.replace(result, device=self._device)

    def models(self) -> Sequence[ModelInfo]:
        """Every configured model version."""
        devices = () if self._lost else (self._device,)
        return merge({self._device: self._infos}, connected=devices, coming=devices)

    def devices(self) -> Sequence[DeviceStatus]:
        """The one device."""
        depth, wait_ms = self._compute.load_state()
        state = "ready" if self._board.ready else "starting"
        state = "draining" if self._closed else state
        last_pass = self._board.last_pass
        return [
            DeviceStatus(
                device=self._device,
                state="lost" if self._lost else state,
                last_pass_s=time.monotonic() - last_pass if last_pass else None,
                queue_depth=depth,
                wait_ms=wait_ms,
                models=self._board.models,
                memory_bytes=self._board.memory_bytes,
                batches=self._board.batches,
            )
        ]

    async def load(self, spec: ModelSpec) -> None:
        """Load or replace a model version; see `DevicePool.load`."""
        await self._order(lambda done: self._compute.load(spec, done))

    async def unload(self, name: str, version: str | None = None) -> None:
        """Let a model (version) finish its jobs, then drop it; see `DevicePool.unload`."""
        await self._order(lambda done: self._compute.unload(name, version, done))

    async def _wait_for_model(self, job: Job) -> None:
        """Wait while the job's model is being loaded.

        Raises:
            DeadlineExceeded: that took too long.
            NotReady: the model is unavailable.
        """
        key = (job.model, job.version)
        try:
            async with asyncio.timeout(job.deadline - time.monotonic()):
                while True:
                    cards = {(i.card.name, i.card.version): i.card for i in self._infos}
                    card = cards.get(key)
                    if card is not None and card.state == "unavailable":
                        raise NotReady(card.reason or "The model is unavailable.")
                    if card is None or card.ready or self._lost:
                        return
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise DeadlineExceeded("The deadline passed while the model was loaded.") from None

    async def _order(self, give: Callable[[Callable[[HeatlensError | None], None]], None]) -> None:
        end: asyncio.Future[HeatlensError | None] = self._loop.create_future()

        def settle(error: HeatlensError | None) -> None:
            if not end.done():
                end.set_result(error)

        give(lambda error: self._from_thread(settle, error))
        error = await end
        if error is not None:
            raise error

    # ---------------------------------------------------------------- from the compute thread

    def answered(self, results: Sequence[Outcome | Failure]) -> None:
        """Hand ends of jobs to those who await them."""
        self._from_thread(self._settle, results)

    def models_changed(self, infos: Sequence[ModelInfo]) -> None:
        """Take over what there is."""
        self._from_thread(self._take_infos, infos)

    def lost(self, reason: str) -> None:
        """Fail everything: there is no other process."""
        log.error("the device is lost: %s", reason)
        self._from_thread(self._on_disconnect)

    def _post(self, board: WorkerStatus) -> None:
        became_ready = board.ready and not self._board.ready
        self._board = board
        if became_ready:
            self._from_thread(self._changed.set)

    def _from_thread(self, call: Callable[..., object], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody awaits anything
            self._loop.call_soon_threadsafe(call, *arguments)

    def _settle(self, results: Sequence[Outcome | Failure]) -> None:
        for result in results:
            end = self._ends.get(result.id)
            if end is not None and not end.done():
                end.set_result(result)

    def _take_infos(self, infos: Sequence[ModelInfo]) -> None:
        self._infos = infos
        self._changed.set()

    def _on_disconnect(self) -> None:
        self._lost = True
        self._changed.set()
        self._fail_all(WorkerLost("The device failed; the log says why."))

    def _fail_all(self, error: HeatlensError) -> None:
        self._settle([to_wire(job_id, error) for job_id in self._ends])
