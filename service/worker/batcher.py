"""Decides which jobs run next on one device. Pure: without threads, clock or torch.

Work-conserving: a free device takes the waiting jobs at once, up to the model's best batch size.
*Interactive* jobs need one pass; *long* jobs take many bounded steps, between which interactive
batches run. The two classes share device time by start-time fair queueing (Goyal et al. 1996): each
has a virtual finish time that grows by duration / share, the lower one runs next, and a class earns
no credit while it is idle. Within a class the earliest deadline runs first, batched with jobs of
the same model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from models.errors import DeadlineExceeded, ModelReplaced, NotReady, Overloaded, UnknownModel
from models.shares import LONG_SHARE
from models.types import STEP_BYTES, STEP_MS, ModelKey
from service.devices.messages import Submission
from service.worker.pace import Suspended
from service.worker.queue import (
    Batch,
    BatchReason,
    Decision,
    Entry,
    EntryQueue,
    JobClass,
    LatencyModel,
    QueuedModel,
    can_share_batch,
)

_BATCH_BYTES = 2 * STEP_BYTES
_SUSPENDED_BYTES = 4 * STEP_BYTES
# Time over which the use of the device is averaged.
_RECENT_S = 10.0

_CLASSES: tuple[JobClass, JobClass] = ("interactive", "long")


class Batcher:
    """The queue of one device.

    Args:
        max_wait_s: estimated wait beyond which a job is refused; see `Price.patience_s`.
        interactive_share: share of device time of interactive jobs while long ones wait too,
            between 0 and 1.
        max_suspended: limit of long jobs suspended between steps; each keeps device memory.
    """

    def __init__(
        self,
        *,
        max_wait_s: float = 10.0,
        interactive_share: float = 1 - LONG_SHARE,
        max_suspended: int = 16,
    ) -> None:
        self._max_wait_s = max_wait_s
        self._max_suspended = max_suspended
        self._share: dict[JobClass, float] = {
            "interactive": interactive_share,
            "long": 1 - interactive_share,
        }
        self._models: dict[ModelKey, QueuedModel] = {}
        self._queues: dict[tuple[ModelKey, JobClass], EntryQueue] = {}
        self._entries: dict[str, Entry] = {}
        self._suspended: dict[str, Entry] = {}
        self._count: dict[JobClass, int] = {"interactive": 0, "long": 0}
        self._finish: dict[JobClass, float] = {"interactive": 0.0, "long": 0.0}
        self._used_s: dict[JobClass, float] = {"interactive": 0.0, "long": 0.0}
        self._used_at = 0.0
        self._virtual_now = 0.0
        self._running: Batch | None = None
        self._sequence = 0

    # ---------------------------------------------------------------- models

    def set_model(
        self,
        key: ModelKey,
        *,
        best_batch: int,
        latency_ms: Mapping[int, float],
        fingerprint: str = "",
    ) -> list[Entry]:
        """Admit jobs for a warm model, or adopt the measurements of its reload.

        Returns:
            Dropped entries, which waited for a model with another fingerprint; tell their clients.
        """
        self._models[key] = model = QueuedModel(
            best_batch=max(1, best_batch),
            passes=LatencyModel(latency_ms),
            steps=LatencyModel(latency_ms),
            fingerprint=fingerprint,
        )
        waiting = [e for e in self._entries.values() if e.key == key and e.started is None]
        stale = [entry for entry in waiting if model.has_replaced(entry.submission.fingerprint)]
        for entry in stale:
            self.cancel(entry.job.id)
        return stale

    def latency_ms(self, key: ModelKey) -> dict[int, float]:
        """What undisturbed plain predictions take, by batch size; empty for an unknown model."""
        model = self._models.get(key)
        return model.passes.undisturbed_ms if model is not None else {}

    def observe_prediction(self, key: ModelKey, duration_ms: float) -> None:
        """Learn from a plain prediction that was made outside of the queue."""
        if key in self._models:
            self._models[key].passes.observe(1, duration_ms)

    def close_model(self, key: ModelKey) -> None:
        """Admit no more jobs for a model; waiting ones are still run."""
        if key in self._models:
            self._models[key].closing = True

    def drop_model(self, key: ModelKey) -> None:
        """Forget a model that has no jobs left."""
        self._models.pop(key, None)
        for job_class in _CLASSES:
            self._queues.pop((key, job_class), None)

    def has_jobs(self, key: ModelKey) -> bool:
        """Whether any job of the model waits or runs."""
        return any(entry.key == key for entry in self._entries.values())

    def lower_batch(self, key: ModelKey, size: int, *, until: float) -> None:
        """Limit batches to `size` jobs until then: the device had no memory for more."""
        model = self._models.get(key)
        if model is not None:
            model.batch_cap, model.cap_until = max(1, size), until

    # ---------------------------------------------------------------- jobs

    def add(self, submission: Submission, now: float) -> None:
        """Queue a job.

        Raises:
            UnknownModel: its model is not on this device.
            NotReady: its model is being unloaded.
            ModelReplaced: the model it was resolved against was replaced or is being unloaded.
            DeadlineExceeded: its deadline has passed.
            Overloaded: the estimated wait exceeds the limit, or the job would not end before its
                deadline.
        """
        job, fingerprint, deadline = submission.job, submission.fingerprint, submission.deadline
        model = self._models.get(job.model_key)
        if fingerprint and (model is None or model.closing or model.has_replaced(fingerprint)):
            raise ModelReplaced("The model was replaced or unloaded meanwhile.")
        if model is None:
            raise UnknownModel("The model is not loaded on this device.", field="model")
        if model.closing:
            raise NotReady("The model is being unloaded.")
        if deadline <= now:
            raise DeadlineExceeded("The deadline passed before the job reached a device.")
        job_class: JobClass = "long" if submission.price.long else "interactive"
        wait_s = self.wait_ms(now, job_class) / 1000
        patience_s = submission.price.patience_s(self._max_wait_s)
        excess_s = wait_s - min(patience_s, self._slack_s(submission, model, now))
        if excess_s > 0:
            raise Overloaded("The service is at its limit.", retry_after_s=excess_s)
        entry = Entry(submission=submission, job_class=job_class, arrived=now)
        self._keep(entry)
        self._sequence += 1
        self._queues.setdefault((entry.key, job_class), EntryQueue()).push(entry, self._sequence)

    def _slack_s(self, submission: Submission, model: QueuedModel, now: float) -> float:
        """Time that a job may wait so that it ends before its deadline."""
        price = submission.price
        alone_ms = model.pass_ms(1, price.extra_ms)
        own_ms = alone_ms
        if price.long:
            own_ms = model.long_pace * price.device_ms / self._available("long", now)
        return max(0.0, submission.deadline - now - own_ms / 1000)

    def cancel(self, job_id: str) -> Entry | None:
        """Drop a job.

        A job on the device runs to the end of its batch or step. A suspended one is dropped by the
        next call of `next`, so that its memory is released by the thread that uses the device.

        Returns:
            The entry; None for an unknown job.
        """
        entry = self._entries.get(job_id)
        if entry is None or entry.gone:
            return None
        entry.gone = True
        if entry.started is None:
            self._queues[entry.key, entry.job_class].dismiss(entry)
            self._forget(entry)
        return entry

    def next(self, now: float) -> Decision:
        """Purge expired entries and choose the batch to run; the device must be free."""
        expired = tuple(self._purge(now))
        ready = [c for c in _CLASSES if self._candidates(c)]
        if not ready:
            return Decision(None, expired)
        # A tie goes to the interactive class.
        chosen = min(ready, key=lambda c: self._finish[c])
        self._virtual_now = max(self._virtual_now, self._finish[chosen])
        first = min(self._candidates(chosen), key=lambda entry: entry.deadline)
        take = self._take_steps if first.suspended is not None else self._take_fresh
        self._running = take(first, now)
        return Decision(self._running, expired)

    def done(
        self, now: float, *, suspended: Iterable[Suspended] = (), succeeded: bool = True
    ) -> None:
        """Account for the finished batch; its `suspended` jobs have further steps, others end.

        Its time tells nothing unless it has `succeeded`.
        """
        batch, self._running = self._running, None
        if batch is None:
            return
        duration_s = max(0.0, now - batch.started)
        self._use(batch.job_class, duration_s, now)
        self._finish[batch.job_class] += duration_s / self._share[batch.job_class]
        states = {item.job.id: item for item in suspended}
        model = self._models.get(batch.key) if succeeded else None
        if model is not None and batch.is_step:
            model.steps.observe(batch.images, 1000 * duration_s)
        elif model is not None:
            model.observe_pass(batch.images, batch.extra_ms, 1000 * duration_s)
        for entry in batch.entries:
            entry.own_ms += 1000 * duration_s * entry.cost / batch.images
            entry.device_s += duration_s
            entry.batches += 1
            entry.suspended = states.get(entry.job.id)
            if entry.suspended is not None and not entry.gone:
                self._hold(entry)
                continue
            self._forget(entry)
            if entry.job_class == "long" and model is not None and not entry.gone:
                model.observe_long(entry)

    # ---------------------------------------------------------------- load

    @property
    def depth(self) -> int:
        """Jobs that wait, run or are suspended."""
        return len(self._entries)

    def wait_ms(self, now: float, job_class: JobClass = "interactive") -> float:
        """Estimated time until a new job of that class would start.

        It is the rest of the running batch and the queue of its class, during which the other class
        gets its share of the device, or less if it has less work and used less of late.
        """
        running_ms = 0.0
        if self._running is not None:
            running_ms = max(0.0, 1000 * (self._running.started + self._running.predicted_s - now))
        other: JobClass = "long" if job_class == "interactive" else "interactive"
        own_ms, other_ms = self._work_ms(job_class, now), self._work_ms(other, now)
        queued_ms = min(own_ms / self._share[job_class], own_ms + other_ms)
        return running_ms + max(queued_ms, own_ms / self._available(job_class, now))

    def _available(self, job_class: JobClass, now: float) -> float:
        """The share of the device that a class can count on: what the other one leaves of late."""
        other: JobClass = "long" if job_class == "interactive" else "interactive"
        used = self._used_s[other] * math.exp((self._used_at - now) / _RECENT_S) / _RECENT_S
        return max(self._share[job_class], 1 - used)

    def _use(self, job_class: JobClass, duration_s: float, now: float) -> None:
        kept = math.exp((self._used_at - now) / _RECENT_S)
        self._used_s = {name: kept * seconds for name, seconds in self._used_s.items()}
        self._used_s[job_class] += duration_s
        self._used_at = now

    def _work_ms(self, job_class: JobClass, now: float) -> float:
        """Device time queued in a class; a long job counts with what is left of its price."""
        if job_class == "long":
            paces = {key: model.long_pace for key, model in self._models.items()}
            return sum(
                max(0.0, paces[entry.key] * entry.price.device_ms - entry.own_ms)
                for entry in self._entries.values()
                if entry.job_class == "long" and entry.key in paces
            )
        total = 0.0
        for (key, queued_class), queue in self._queues.items():
            model = self._models.get(key)
            if queued_class == job_class and queue and model is not None:
                full, rest = divmod(len(queue), model.batch_limit(now))
                total += full * model.passes.predict_ms(model.batch_limit(now))
                total += model.passes.predict_ms(rest) if rest else 0.0
                total += model.extra_pace * queue.extra_ms
        return total

    # ---------------------------------------------------------------- forming a batch

    def _purge(self, now: float) -> Iterable[Entry]:
        for queue in self._queues.values():
            while (head := queue.head()) is not None and head.deadline <= now:
                queue.pop()
                self._forget(head)
                yield head
        for entry in list(self._suspended.values()):
            if entry.gone:
                self._forget(entry)
            elif entry.deadline <= now:
                self._forget(entry)
                yield entry

    def _candidates(self, job_class: JobClass) -> list[Entry]:
        """The head of each queue of the class, and for the long class the suspended jobs."""
        suspended = list(self._suspended.values()) if job_class == "long" else []
        if job_class == "long" and not self._has_room():
            return suspended
        heads = [
            q.head() for (_, queued_class), q in self._queues.items() if queued_class == job_class
        ]
        return [*suspended, *(head for head in heads if head is not None)]

    def _take_fresh(self, first: Entry, now: float) -> Batch:
        model, queue = self._models[first.key], self._queues[first.key, first.job_class]
        limit, reason = self._limit(first, now)
        waiting = len(queue)
        if waiting < limit:
            limit, reason = waiting, "idle"
        fitting = model.passes.largest_within(first.deadline - now, limit)
        if fitting < limit:
            limit, reason = fitting, "deadline"
        entries = [queue.pop()]
        while len(entries) < limit and (head := queue.head()) is not None:
            if not can_share_batch(entries[0], head):
                reason = "alone"
                break
            if not _is_affordable([*entries, head], model):
                reason = "costly"
                break
            entries.append(queue.pop())
        if first.submission.worker_exits:
            reason = "alone"
        for entry in entries:
            entry.started = now
            entry.batch_size = len(entries)
        predicted_ms = model.pass_ms(len(entries), sum(e.price.extra_ms for e in entries))
        return Batch.of(entries, predicted_ms=predicted_ms, now=now, reason=reason)

    def _limit(self, first: Entry, now: float) -> tuple[int, BatchReason]:
        """The maximum number of jobs in a first pass, and the reason for it."""
        model = self._models[first.key]
        limit = model.batch_limit(now)
        reason: BatchReason = "memory" if limit < model.best_batch else "full"
        held = self._max_suspended - len(self._suspended)
        if first.job_class == "long" and held < limit:
            return held, "held"
        return limit, reason

    def _take_steps(self, first: Entry, now: float) -> Batch:
        model = self._models[first.key]
        entries, images = [first], first.cost
        others = (e for e in self._suspended.values() if e.key == first.key and e is not first)
        for entry in sorted(others, key=lambda e: e.deadline):
            fits = images + entry.cost <= model.batch_limit(now)
            if fits and can_share_batch(first, entry):
                entries.append(entry)
                images += entry.cost
        for entry in entries:
            del self._suspended[entry.job.id]
        predicted_ms = model.steps.predict_ms(images)
        return Batch.of(entries, predicted_ms=predicted_ms, now=now, reason="step")

    def _has_room(self) -> bool:
        """Whether another long job may begin: each keeps memory until it has finished."""
        held = sum(entry.price.device_bytes for entry in self._suspended.values())
        return len(self._suspended) < self._max_suspended and held < _SUSPENDED_BYTES

    # ---------------------------------------------------------------- bookkeeping

    def _keep(self, entry: Entry) -> None:
        # No credit for the time that the class was idle.
        if self._count[entry.job_class] == 0:
            finish = self._finish[entry.job_class]
            self._finish[entry.job_class] = max(finish, self._virtual_now)
        self._entries[entry.job.id] = entry
        self._count[entry.job_class] += 1

    def _hold(self, entry: Entry) -> None:
        """Suspend a job between two steps; from then on it is a long one."""
        if entry.job_class != "long":
            self._forget(entry)
            entry.job_class = "long"
            self._keep(entry)
        self._suspended[entry.job.id] = entry

    def _forget(self, entry: Entry) -> None:
        del self._entries[entry.job.id]
        self._suspended.pop(entry.job.id, None)
        self._count[entry.job_class] -= 1


def _is_affordable(entries: Sequence[Entry], model: QueuedModel) -> bool:
    """Whether a first pass of these entries is a step that others can wait for."""
    extra_ms = sum(entry.price.extra_ms for entry in entries)
    size = sum(entry.price.device_bytes for entry in entries)
    return model.extra_pace * extra_ms <= STEP_MS and size <= _BATCH_BYTES
