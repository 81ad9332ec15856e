"""The thread that owns a device: loads models, runs batches, publishes results.

Used by the device worker and by `LocalPool`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import msgspec

from models.catalog import ModelSpec
from models.errors import (
    DeadlineExceeded,
    HeatlensError,
    ModelLoadFailed,
    ModelReplaced,
    UnknownModel,
)
from models.types import Failure, ModelInfo, ModelKey, Outcome
from service.devices.messages import Completion, JobProgress, JobResult, Submission
from service.devices.model_state import loading_model, with_fingerprint
from service.devices.status import WorkerStatus
from service.worker.backend import Backend, DeviceLost, Result, load_model
from service.worker.batcher import Batcher
from service.worker.queue import Batch, Decision, Entry
from service.worker.runner import Runner
from service.worker.tasks import Done, LoadTask, Task, TaskQueue, UnloadTask
from service.worker.tracing import DeviceTracing

log = logging.getLogger("heatlens.compute")

_BATCH_CAP_S = 60.0
_LATENCIES_S = 2.0
# Factor by which a latency may differ from the one in the card.
_DRIFT = 1.25


class Listener(Protocol):
    """Receives results, in the event loop."""

    def on_results(self, results: Sequence[JobResult]) -> None:
        """Jobs have finished."""

    def on_progress(self, news: Sequence[JobProgress]) -> None:
        """Steps of jobs have run whose clients want to know."""

    def on_models(self, infos: Sequence[ModelInfo]) -> None:
        """Models were loaded, dropped or found broken."""

    def on_device_lost(self, reason: str) -> None:
        """The device needs a new process; the thread has ended and left its jobs unfinished."""


class ComputeThread:
    """Runs the batches of a `Batcher` on one device, in one thread.

    Methods may be called from any thread, except for `start`.

    Args:
        batcher: the device's queue, owned by this object from now on.
        make_backend: makes registry and engine; called in the thread, so that torch is imported
            there.
        specs: models to load, in this order.
        refused: `name@version` of models that must not be loaded because that ended workers.
        listener: receives results, in the event loop.
        write_status: publishes the status before the device is used; called in the thread.
        device: name of the device, for results.
        canary_s: idle time after which a real pass is made, so that readiness means something.
        tracing: records batches, in the thread; None = tracing is off.
    """

    def __init__(
        self,
        *,
        batcher: Batcher,
        make_backend: Callable[[], Backend],
        specs: Sequence[ModelSpec],
        listener: Listener,
        write_status: Callable[[WorkerStatus], None],
        device: str = "",
        refused: Collection[str] = (),
        canary_s: float = 5.0,
        tracing: DeviceTracing | None = None,
    ) -> None:
        self._batcher = batcher
        self._make_backend = make_backend
        self._listener = listener
        self._write_status = write_status
        self._device = device
        self._refused = frozenset(refused)
        self._canary_s = canary_s
        self._tracing = tracing
        self._closing: set[ModelKey] = set()
        self._canary_at = 0.0
        self._changed = threading.Condition()
        self._tasks = TaskQueue(specs)
        self._tasks_turn = True
        self._stopping = False
        self._published = (0, 0.0, 0.0)
        self._latencies_at = 0.0
        self._infos: tuple[ModelInfo, ...] = ()
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)

    # ---------------------------------------------------------------- for other threads

    def start(self) -> None:
        """Start the thread and the loading of models; results go to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """End the thread after the running batch and leave waiting jobs unfinished."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def submit(self, submission: Submission) -> None:
        """Queue a job.

        Raises:
            HeatlensError: as `Batcher.add`.
        """
        with self._changed:
            self._batcher.add(submission, time.monotonic())
            self._changed.notify()

    def cancel(self, job_id: str) -> None:
        """Drop a job, if it is still here."""
        with self._changed:
            self._batcher.cancel(job_id)
            self._changed.notify()

    def load(self, spec: ModelSpec, done: Done) -> None:
        """Load or replace a model version between batches; `done` is called in the event loop."""
        self._schedule(LoadTask(spec, done))

    def unload(self, name: str, version: str | None, done: Done) -> None:
        """Drop a model version (None: all) after its jobs; `done` is called in the event loop."""
        known = (info.card.key for info in self._infos)
        keys = tuple(key for key in known if key[0] == name and version in {None, key[1]})
        with self._changed:
            for key in keys:
                self._batcher.close_model(key)
            self._closing |= set(keys)
            self._infos = tuple(map(self._mark_closing, self._infos))
        self._notify(self._listener.on_models, self._infos)
        self._schedule(UnloadTask(keys, done))

    @property
    def infos(self) -> tuple[ModelInfo, ...]:
        """Every model version, as of the last change."""
        return self._infos

    def load_state(self) -> tuple[int, float, float]:
        """Number of jobs here, and the estimated waits of a new one and of a long one, in ms."""
        with self._changed:
            now = time.monotonic()
            waits = (self._batcher.wait_ms(now), self._batcher.wait_ms(now, "long"))
            return self._batcher.depth, *waits

    def _schedule(self, task: Task) -> None:
        with self._changed:
            self._tasks.add(task)
            self._changed.notify()

    def _notify(self, call: Callable[..., object], *arguments: object) -> None:
        """Call a function in the event loop, if that still runs."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call, *arguments)

    # ---------------------------------------------------------------- the thread

    def _run(self) -> None:
        try:
            self._announce(())
            self._backend = self._make_backend()
            self._runner = Runner(self._backend, write_status=self._publish)
            while not self._stopping:
                match self._next():
                    case LoadTask() as task:
                        self._load(task)
                    case UnloadTask() as task:
                        self._unload(task)
                    case Decision() as decision:
                        self._execute(decision)
                    case ModelInfo() as model:
                        self._run_canary(model)
        except DeviceLost as fault:
            self._notify(self._listener.on_device_lost, str(fault))
        except Exception:
            log.exception("the compute thread failed")
            self._notify(self._listener.on_device_lost, "compute thread failed")

    def _next(self) -> Task | Decision | ModelInfo | None:
        """A model task, a batch, or a model that is due for a canary pass; waits if there is none.

        Tasks and batches take turns, so that neither starves the other.
        """
        with self._changed:
            if self._stopping:
                return None
            task = self._tasks.ready(self._batcher.has_jobs)
            if task is None or not self._tasks_turn:
                self._tasks_turn = True
                decision = self._batcher.next(time.monotonic())
                if decision.batch is not None or decision.expired:
                    return decision
            if task is not None:
                self._tasks_turn = False
                self._tasks.take(task)
                return task
            wait_s = self._canary_at - time.monotonic()
            model = next((info for info in self._infos if info.card.ready), None)
            if model is not None and wait_s <= 0:
                return model
            if self._published != self.load_state():
                # Jobs that finished since the last batch began are no longer counted.
                self._publish(self._runner.status)
            self._changed.wait(timeout=None if model is None else wait_s)
            return None

    # ---------------------------------------------------------------- batches

    def _execute(self, decision: Decision) -> None:
        expired = DeadlineExceeded("The deadline passed while the job waited for a device.")
        results: list[JobResult] = [Failure.of(e.job.id, expired) for e in decision.expired]
        if self._tracing is not None:
            for entry in decision.expired:
                self._tracing.expired(entry, now=time.monotonic())
        if decision.batch is not None:
            results += self._run_batch(decision.batch)
        if results:
            self._notify(self._listener.on_results, results)

    def _run_batch(self, batch: Batch) -> list[JobResult]:
        """Run a batch; the results of its finished jobs."""
        began = time.monotonic()
        run = self._runner.run(batch)
        now = time.monotonic()
        suspended = [r for r in run.results if not isinstance(r, Outcome | Failure)]
        self._canary_at = now + self._canary_s
        failed = [isinstance(result, Failure) for result in run.results]
        if not all(failed):
            self._mark_ready()
        with self._changed:
            self._batcher.done(now, suspended=suspended, succeeded=not any(failed))
            if run.largest_fit is not None:
                self._batcher.lower_batch(batch.key, run.largest_fit, until=now + _BATCH_CAP_S)
        if news := [item for entry in batch.entries if (item := entry.news(now))]:
            self._notify(self._listener.on_progress, news)
        pairs = zip(batch.entries, run.results, strict=True)
        results = [found for pair in pairs if (found := self._result(*pair)) is not None]
        self._tell_latencies()
        if self._tracing is not None:
            self._tracing.ran(batch, began=began, ended=now, done=time.monotonic())
        return results

    def _result(self, entry: Entry, result: Result) -> JobResult | None:
        """The result for an entry's client; None while it is suspended or when it was cancelled."""
        if entry.gone:
            return None
        if isinstance(result, Outcome):
            return Completion(
                outcome=result,
                queue_ms=1000 * ((entry.started or entry.arrived) - entry.arrived),
                device_ms=1000 * entry.device_s,
                batch_size=entry.batch_size,
                device=self._device,
            )
        return result if isinstance(result, Failure) else None

    def _run_canary(self, model: ModelInfo) -> None:
        self._canary_at = time.monotonic() + self._canary_s
        taken_ms = self._runner.canary(model)
        if taken_ms is None:
            log.error("the canary pass of %s failed", model.card.name)
            return
        # The first one pays for what a start has left to do.
        if self._runner.status.ready:
            with self._changed:
                self._batcher.observe_prediction(model.card.key, taken_ms)
            self._tell_latencies()
        self._mark_ready()

    def _tell_latencies(self) -> None:
        """Correct the latencies in the models' cards, from which requests are priced.

        What was measured while a model was loaded may be far from what it takes now.
        """
        now = time.monotonic()
        if now < self._latencies_at:
            return
        self._latencies_at = now + _LATENCIES_S
        with self._changed:
            infos = tuple(map(self._with_latency, self._infos))
            if all(info is old for info, old in zip(infos, self._infos, strict=True)):
                return
            self._infos = infos
        self._notify(self._listener.on_models, infos)

    def _with_latency(self, info: ModelInfo) -> ModelInfo:
        found, card = self._batcher.latency_ms(info.card.key), info.card
        known_ms = card.latency_ms.get(card.best_batch)
        if not known_ms or 1 / _DRIFT < found.get(card.best_batch, known_ms) / known_ms < _DRIFT:
            return info
        return msgspec.structs.replace(info, card=msgspec.structs.replace(card, latency_ms=found))

    def _mark_ready(self) -> None:
        """A real pass makes the device ready once every configured model was tried."""
        if not self._runner.status.ready and not self._tasks.initial_specs():
            self._runner.publish("idle", ready=True)

    # ---------------------------------------------------------------- models

    def _load(self, task: LoadTask) -> None:
        spec, subject = task.spec, task.spec.full_name
        stale: list[Entry] = []
        error: HeatlensError | None = None
        if subject in self._refused:
            error = ModelLoadFailed("Loading this model ended device workers; it is not retried.")
        else:
            self._runner.publish("load", subject=subject)
            info = load_model(self._backend, spec)
            if isinstance(info, HeatlensError):
                error = info
            else:
                with self._changed:
                    stale = self._batcher.set_model(
                        info.card.key,
                        best_batch=info.card.best_batch,
                        latency_ms=info.card.latency_ms,
                        fingerprint=info.fingerprint,
                    )
        # The first pass of the engine, rather than of the warm-up, makes the device ready.
        self._canary_at = 0.0
        if error is not None and task.initial:
            cause = error.cause if isinstance(error, ModelLoadFailed) else None
            told = f" Cause: {cause}" if cause else ""
            log.error("model %s is unavailable: %s%s", subject, error.message, told)
            self._backend.registry.mark_unavailable(spec, error.message, cause=cause)
        self._refresh()
        if stale:
            # Clients know the new model by now and retry.
            replaced = ModelReplaced("The model was replaced while the request waited.")
            failures = [Failure.of(entry.job.id, replaced) for entry in stale]
            self._notify(self._listener.on_results, failures)
        self._notify(task.done, error)

    def _unload(self, task: UnloadTask) -> None:
        for key in task.keys:
            self._backend.registry.unload(*key)
            with self._changed:
                self._batcher.drop_model(key)
                self._closing.discard(key)
        self._refresh()
        unknown = UnknownModel("No such model is loaded.", field="model")
        self._notify(task.done, None if task.keys else unknown)

    def _refresh(self) -> None:
        infos = [with_fingerprint(info) for info in self._backend.registry.infos()]
        self._announce(infos)
        models = tuple(info.card.full_name for info in self._infos if info.card.ready)
        self._runner.publish("idle", models=models)

    def _announce(self, infos: Sequence[ModelInfo]) -> None:
        """Publish the models, including those still to be loaded."""
        known = {info.card.key for info in infos}
        coming = self._tasks.initial_specs()
        with self._changed:
            self._infos = (
                *map(self._mark_closing, infos),
                *(loading_model(spec) for spec in coming if spec.key not in known),
            )
        self._notify(self._listener.on_models, self._infos)

    def _mark_closing(self, info: ModelInfo) -> ModelInfo:
        """Show a model that takes no more jobs as unloading."""
        if info.card.key not in self._closing:
            return info
        card = msgspec.structs.replace(
            info.card, state="unloading", ready=False, reason="The model is being unloaded."
        )
        return msgspec.structs.replace(info, card=card)

    def _publish(self, status: WorkerStatus) -> None:
        depth, wait_ms, long_wait_ms = self._published = self.load_state()
        self._write_status(
            msgspec.structs.replace(
                status, queue_depth=depth, wait_ms=wait_ms, long_wait_ms=long_wait_ms
            )
        )
