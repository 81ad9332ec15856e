"""What decides on a simulated device which jobs run together: the service's batcher, and others."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from models.errors import HeatlensError
from models.price import Price
from models.types import Job, JobOptions
from service.devices.messages import Submission
from service.worker.batcher import Batcher
from service.worker.queue import LatencyModel

KEY = ("model", "1")
STEPS, STEP_IMAGES = 12, 8
PATIENCE = 0.8
_PIXELS = np.zeros((1, 1, 3), dtype=np.uint8)


@dataclass(slots=True, eq=False)
class Request:
    """A job of the simulation, with what became of it."""

    number: int
    arrived: float
    deadline: float
    extra_ms: float
    long: bool
    ended: float = math.inf
    steps: int = 0

    @property
    def work(self) -> float:
        """What routing counts it for: its images."""
        return 1.0 + (STEPS * STEP_IMAGES if self.long else 0)

    @property
    def cost(self) -> int:
        """Images of a step, as the engine tells the batcher of a suspended job."""
        return STEP_IMAGES

    @property
    def job(self) -> Job:
        """The job that the batcher schedules."""
        return Job(
            id=str(self.number), operation="explain", model=KEY[0], version=KEY[1],
            input=_PIXELS, options=JobOptions(),
        )  # fmt: skip


class Policy(Protocol):
    """What decides on one device which jobs run together."""

    def add(self, request: Request, now: float) -> bool:
        """Queue a request, or refuse it."""

    def next(self, now: float) -> tuple[list[Request], float] | float | None:
        """A batch and its milliseconds, or the time to ask again; None while nothing waits."""

    def done(self, batch: list[Request], now: float, taken_ms: float) -> list[Request]:
        """The requests of a batch that have their answer."""

    def drop(self) -> list[Request]:
        """The device dies: what is to be sent elsewhere."""


class Heatlens:
    """The service's batcher."""

    def __init__(self, curve: Mapping[int, float], best: int, max_wait_s: float) -> None:
        self._curve, self._best, self._max_wait_s = LatencyModel(curve), best, max_wait_s
        self._points = curve
        self._start()

    def _start(self) -> None:
        self._batcher = Batcher(max_wait_s=self._max_wait_s)
        self._batcher.set_model(KEY, best_batch=self._best, latency_ms=self._points)
        self._requests: dict[str, Request] = {}

    def add(self, request: Request, now: float) -> bool:
        """Queue a request, or refuse it."""
        device_ms = self._points[1] + request.extra_ms
        if request.long:
            device_ms += STEPS * self._curve.predict_ms(STEP_IMAGES)
        price = Price(device_ms=device_ms, extra_ms=request.extra_ms, long=request.long)
        job = request.job
        try:
            self._batcher.add(Submission(job=job, deadline=request.deadline, price=price), now)
        except HeatlensError:
            return False
        self._requests[job.id] = request
        return True

    def next(self, now: float) -> tuple[list[Request], float] | float | None:
        """A batch and its milliseconds, or when to ask again."""
        decision = self._batcher.next(now)
        for entry in decision.expired:
            self._requests.pop(entry.job.id, None)
        batch = decision.batch
        if batch is None:
            return None
        chosen = [self._requests[entry.job.id] for entry in batch.entries]
        extra_ms = 0.0 if batch.is_step else batch.extra_ms
        return chosen, self._curve.predict_ms(batch.images) + extra_ms

    def done(self, batch: list[Request], now: float, taken_ms: float) -> list[Request]:
        """The requests of a batch that have their answer."""
        del taken_ms
        for request in batch:
            request.steps += 1
        kept: list[Any] = [r for r in batch if r.long and r.steps <= STEPS]
        self._batcher.done(now, suspended=kept)
        ended = [request for request in batch if request not in kept]
        for request in ended:
            self._requests.pop(str(request.number), None)
        return ended

    def drop(self) -> list[Request]:
        """The device dies: what is sent elsewhere."""
        waiting = list(self._requests.values())
        self._start()
        for request in waiting:
            request.steps = 0
        return waiting


@dataclass
class Queue:
    """Policies that take the oldest first: a window of time, and a size that may adapt."""

    curve: Mapping[int, float]
    size: float
    window_s: float = 0.0
    adapt_ms: float | None = None
    waiting: deque[Request] = field(default_factory=deque)

    def add(self, request: Request, now: float) -> bool:
        """Queue a request, or refuse it."""
        del now
        self.waiting.append(request)
        return True

    def next(self, now: float) -> tuple[list[Request], float] | float | None:
        """A batch and its milliseconds, or when to ask again."""
        if not self.waiting:
            return None
        due = self.waiting[0].arrived + self.window_s
        if len(self.waiting) < int(self.size) and now < due:
            return due
        model = LatencyModel(self.curve)
        batch = [self.waiting.popleft() for _ in range(min(int(self.size), len(self.waiting)))]
        taken_ms = model.predict_ms(len(batch)) + sum(r.extra_ms for r in batch)
        return batch, taken_ms + STEPS * model.predict_ms(STEP_IMAGES) * sum(r.long for r in batch)

    def done(self, batch: list[Request], now: float, taken_ms: float) -> list[Request]:
        """The requests of a batch that have their answer."""
        del now
        if self.adapt_ms is not None:
            # Clipper: one more while within the objective, a tenth less beyond it.
            within = taken_ms <= self.adapt_ms
            self.size = max(1.0, self.size + 1 if within else 0.9 * self.size)
        return batch

    def drop(self) -> list[Request]:
        """The device dies: what is sent elsewhere."""
        self.waiting.clear()
        return []


def policies(
    curve: Mapping[int, float], deadline_s: float, *, patience: float = PATIENCE
) -> dict[str, Callable[[], Policy]]:
    """How a device's policy is made, by name; `patience`: the longest wait, as a share of the deadline."""
    rates = {size: size / ms for size, ms in curve.items()}
    best = min(size for size, rate in rates.items() if rate >= 0.97 * max(rates.values()))
    largest = max(curve)
    return {
        "Heatlens": lambda: Heatlens(curve, best, patience * deadline_s),
        "fixed window, 10 ms": lambda: Queue(curve, largest, 0.010),
        "delay, 0.5 ms": lambda: Queue(curve, best, 0.0005),
        "AIMD": lambda: Queue(curve, 1.0, adapt_ms=1000 * deadline_s / 2),
    }
