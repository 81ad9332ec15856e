"""The thread that owns a device: it loads models, runs batches, and answers. Shared by worker and LocalPool."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import msgspec

from models.catalog import ModelSpec
from models.errors import HeatlensError, ModelLoadFailed, ModelReplaced, UnknownModel
from models.types import Failure, Job, ModelInfo, Outcome
from service.devices.messages import to_wire
from service.devices.model_state import loading_model, with_fingerprint
from service.devices.status import WorkerStatus
from service.worker.backend import Backend, DeviceLost, Listener, Result, load_model
from service.worker.batcher import Batcher
from service.worker.queue import Batch, Decision, Entry, ModelKey
from service.worker.runner import Runner
from service.worker.tracing import DeviceTracing

log = logging.getLogger("heatlens.compute")

Done = Callable[[HeatlensError | None], None]

_BATCH_CAP_S = 60.0


@dataclass(frozen=True, slots=True)
class _Task:
    """A load (`spec` given) or an unload of `keys`."""

    done: Done
    spec: ModelSpec | None = None
    keys: tuple[ModelKey, ...] = ()
    initial: bool = False


class ComputeThread:
    """Runs a Batcher's batches on one device, in one thread.

    All methods may be called from any thread.

    Args:
        batcher: the device's queue; belongs to this object from now on.
        make_backend: makes registry and engine; called in the thread, so that torch is imported
            there.
        specs: models to load, in this order.
        refused: `name@version` of models that must not be loaded, because that has killed workers.
        listener: hears of results, in the thread.
        write_board: publishes the board before the device is touched.
        canary_s: idle time after which a real pass is made, so that readiness means something.
        tracing: hears of batches, in the thread; None = no one wants to know.
    """

    def __init__(
        self,
        *,
        batcher: Batcher,
        make_backend: Callable[[], Backend],
        specs: Sequence[ModelSpec],
        listener: Listener,
        write_status: Callable[[WorkerStatus], None],
        refused: Collection[str] = (),
        canary_s: float = 5.0,
        tracing: DeviceTracing | None = None,
    ) -> None:
        self._batcher = batcher
        self._make_backend = make_backend
        self._listener = listener
        self._write_board = write_status
        self._refused = frozenset(refused)
        self._canary_s = canary_s
        self._tracing = tracing
        self._stale: list[Entry] = []
        self._closing: set[ModelKey] = set()
        self._canary_at = 0.0
        self._changed = threading.Condition()
        self._tasks = deque(_Task(_ignore, spec=spec, initial=True) for spec in specs)
        self._tasks_turn = True
        self._stopping = False
        self._published = (0, 0.0)
        self._infos: tuple[ModelInfo, ...] = ()
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)

    # ---------------------------------------------------------------- for other threads

    def start(self) -> None:
        """Start the thread; models load from now on."""
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """End the thread after what is running; jobs that wait stay unanswered."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises:
            HeatlensError: as `Batcher.add`.
        """
        with self._changed:
            self._batcher.add(job, time.monotonic())
            self._changed.notify()

    def cancel(self, job_id: str) -> bool:
        """Drop a job; False if no such job waits, runs or is between steps."""
        with self._changed:
            cancelled = self._batcher.cancel(job_id) is not None
            self._changed.notify()
            return cancelled

    def load(self, spec: ModelSpec, done: Done) -> None:
        """Load or replace a model version between batches; `done` is called in the thread."""
        self._order(_Task(done, spec=spec))

    def unload(self, name: str, version: str | None, done: Done) -> None:
        """Drop a model version (None: all of them) after its jobs; `done` is called in the thread."""
        keys = tuple(
            key for key in map(_key, self._infos) if key[0] == name and version in {None, key[1]}
        )
        with self._changed:
            for key in keys:
                self._batcher.close_model(key)
            self._closing |= set(keys)
            self._infos = tuple(map(self._as_seen, self._infos))
        self._listener.models_changed(self._infos)
        self._order(_Task(done, keys=keys))

    @property
    def infos(self) -> tuple[ModelInfo, ...]:
        """Every model version, as of the last change."""
        return self._infos

    def load_state(self) -> tuple[int, float]:
        """Jobs here, and the estimated wait of a new one in milliseconds."""
        with self._changed:
            return self._batcher.depth, self._batcher.wait_ms(time.monotonic())

    def _order(self, task: _Task) -> None:
        with self._changed:
            self._tasks.append(task)
            self._changed.notify()

    # ---------------------------------------------------------------- the thread

    def _run(self) -> None:
        try:
            self._announce(())
            self._backend = self._make_backend()
            self._runner = Runner(self._backend, write_status=self._publish)
            while not self._stopping:
                work = self._next()
                if isinstance(work, _Task):
                    self._perform(work)
                elif isinstance(work, Decision):
                    self._serve(work)
                elif work is not None:
                    self._pass_canary(work)
        except DeviceLost as fault:
            self._listener.lost(str(fault))
        except Exception:
            log.exception("the compute thread failed")
            self._listener.lost("compute thread failed")

    def _next(self) -> _Task | Decision | ModelInfo | None:
        """A model task, a batch, or a model that is due for a canary pass; waits where there is none.

        Tasks and batches take turns, so that neither loading nor load starves the other.
        """
        with self._changed:
            if self._stopping:
                return None
            task = self._ready_task()
            if task is None or not self._tasks_turn:
                self._tasks_turn = True
                turn = self._batcher.next(time.monotonic())
                if turn.batch is not None or turn.expired:
                    return turn
            if task is not None:
                self._tasks_turn = False
                self._tasks.remove(task)
                return task
            wait_s = self._canary_at - time.monotonic()
            model = next((info for info in self._infos if info.card.ready), None)
            if model is not None and wait_s <= 0:
                return model
            if self._published != self.load_state():
                # What ended since the last batch began (answered, cancelled, expired) waits no
                # more.
                self._publish(self._runner.board)
            self._changed.wait(timeout=None if model is None else wait_s)
            return None

    def _ready_task(self) -> _Task | None:
        """The first task that can start: an unload waits for the model's jobs, and what follows it for the unload."""
        waiting: set[ModelKey] = set()
        for task in self._tasks:
            keys = {(task.spec.name, task.spec.version)} if task.spec else set(task.keys)
            busy = any(self._batcher.has_jobs(key) for key in task.keys)
            if not busy and not keys & waiting:
                return task
            waiting |= keys
        return None

    def _serve(self, turn: Decision) -> None:
        answers: list[Outcome | Failure] = [_expired(entry) for entry in turn.expired]
        if self._tracing is not None:
            for entry in turn.expired:
                self._tracing.expired(entry, now=time.monotonic())
        if turn.batch is not None:
            answers += self._run_batch(turn.batch)
        if answers:
            self._listener.answered(answers)

    def _run_batch(self, batch: Batch) -> list[Outcome | Failure]:
        """Run a batch; what the clients of those entries get that have ended."""
        began = time.monotonic()
        results = self._runner.run(batch)
        now = time.monotonic()
        pending = [r for r in results if not isinstance(r, Outcome | Failure)]
        self._canary_at = now + self._canary_s
        if any(not isinstance(result, Failure) for result in results):
            self._prove()
        with self._changed:
            self._batcher.done(now, pending=pending)
            if self._runner.largest_fit is not None:
                self._batcher.lower_batch(
                    batch.key, self._runner.largest_fit, until=now + _BATCH_CAP_S
                )
        pairs = zip(batch.entries, results, strict=True)
        answers = [answer for pair in pairs if (answer := _answer(*pair)) is not None]
        if self._tracing is not None:
            self._tracing.ran(batch, began=began, ended=now, done=time.monotonic())
        return answers

    def _pass_canary(self, model: ModelInfo) -> None:
        self._canary_at = time.monotonic() + self._canary_s
        if self._runner.canary(model):
            self._prove()
        else:
            log.error("the canary pass of %s failed", model.card.name)

    def _prove(self) -> None:
        """A real pass makes the device ready, once every configured model was tried."""
        if not self._runner.board.ready and not any(task.initial for task in self._tasks):
            self._runner.post("idle", ready=True)

    def _perform(self, task: _Task) -> None:
        error: HeatlensError | None = None
        if task.spec is not None:
            error = self._load(task.spec, initial=task.initial)
        else:
            for key in task.keys:
                self._backend.registry.unload(*key)
                with self._changed:
                    self._batcher.drop_model(key)
                    self._closing.discard(key)
            if not task.keys:
                error = UnknownModel("No such model is loaded.", field="model")
        self._refresh()
        self._turn_away()
        task.done(error)

    def _turn_away(self) -> None:
        """End what waited for a model that has been replaced: clients know the new one by now, and ask again."""
        error = ModelReplaced("The model was replaced while the request waited.")
        failures = [to_wire(entry.job.id, error) for entry in self._stale]
        self._stale = []
        if failures:
            self._listener.answered(failures)

    def _load(self, spec: ModelSpec, *, initial: bool) -> HeatlensError | None:
        subject = f"{spec.name}@{spec.version}"
        error = self._try_load(spec, subject)
        self._canary_at = (
            0.0  # the first pass of the engine, rather than of the warm-up, makes it ready
        )
        if error is not None and initial:
            log.error("model %s is unavailable: %s", subject, error.message)
            self._backend.registry.mark_unavailable(spec, error.message)
        return error

    def _try_load(self, spec: ModelSpec, subject: str) -> HeatlensError | None:
        if subject in self._refused:
            return ModelLoadFailed(
                "Loading this model has ended device workers; it is not tried again."
            )
        self._runner.post("load", subject=subject)
        card = load_model(self._backend, spec)
        if isinstance(card, HeatlensError):
            return card
        with self._changed:
            self._stale += self._batcher.set_model(
                (card.name, card.version),
                best_batch=card.best_batch,
                latency_ms=card.latency_ms,
                fingerprint=card.fingerprint,
            )
        return None

    def _refresh(self) -> None:
        infos = [with_fingerprint(info) for info in self._backend.registry.infos()]
        self._announce(infos)
        models = tuple("@".join(_key(info)) for info in self._infos if info.card.ready)
        self._runner.post("idle", models=models)

    def _announce(self, infos: Sequence[ModelInfo]) -> None:
        """Say which models there are, those included that are still to be loaded."""
        known = {_key(info) for info in infos}
        coming = [task.spec for task in self._tasks if task.initial and task.spec is not None]
        with self._changed:
            self._infos = (
                *map(self._as_seen, infos),
                *(loading_model(spec) for spec in coming if (spec.name, spec.version) not in known),
            )
        self._listener.models_changed(self._infos)

    def _as_seen(self, info: ModelInfo) -> ModelInfo:
        """A model as clients are to see it: one that takes no more jobs is not ready."""
        if _key(info) not in self._closing:
            return info
        card = msgspec.structs.replace(
            info.card, state="unloading", ready=False, reason="The model is being unloaded."
        )
        return msgspec.structs.replace(info, card=card)

    def _publish(self, board: WorkerStatus) -> None:
        depth, wait_ms = self._published = self.load_state()
        self._write_board(msgspec.structs.replace(board, queue_depth=depth, wait_ms=wait_ms))


def _answer(entry: Entry, result: Result) -> Outcome | Failure | None:
    """What an entry's client gets; nothing while it goes on, or when it has left."""
    if entry.gone:
        return None
    if isinstance(result, Outcome):
        return msgspec.structs.replace(
            result,
            queue_ms=1000 * ((entry.started or entry.arrived) - entry.arrived),
            device_ms=1000 * entry.device_s,
            batch_size=entry.batch_size,
        )
    return result if isinstance(result, Failure) else None


def _expired(entry: Entry) -> Failure:
    return Failure(
        id=entry.job.id,
        code="deadline_exceeded",
        message="The deadline passed while the job waited for a device.",
    )


def _key(info: ModelInfo) -> ModelKey:
    return (info.card.name, info.card.version)


def _ignore(error: HeatlensError | None) -> None:
    """A model of the configuration has no one who waits for it."""
