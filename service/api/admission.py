"""Admission: what an HTTP process refuses because it has too much to do, and when to come again.

`docs/architecture.md` has the table of all limits on load, those of connections and devices included.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from fastapi import Request

from models.errors import Overloaded
from service import logs
from service.api.body import BYTES
from service.api.key_counts import KeyCounts
from service.api.plan import Plan
from service.devices.pool import DevicePool

# Answers of the largest size that may be in the making at once.
_ANSWERS = 3
_SHORTLY_S = 1.0

# Whether the request was let in before its body was read. While that arrives others are let in too.
_is_let_in: ContextVar[bool] = ContextVar("is_let_in", default=False)
# Times the limit that a request may wait which was let in, or comes again when it was told to.
_RIGHT_OF_WAY = 1.5

# To read a larger body costs more than it is worth to find out that its job is a long one.
_SMALL_BODY = 1_000_000
_IMAGES = ("image/", BYTES, "application/x-image")
# At the limit so many others a second, and so many at once, are read to find that out. To read and
# parse a form costs as much as several refusals by the head, and most forms ask for nothing long.
_LOOKS_PER_S = 20.0
_LOOKS = 20
_LONG_OPTIONS = frozenset({"methods", "faithfulness", "kinds", "layers", "targets"})

# Decoding and drawing an image, about; only its proportion to the time on a device matters.
_HOST_MS = 5.0
# After so much work, what was learnt before counts a third.
_MEMORY_MS = 500.0
# Part of an answer that the first one after a pause counts: it tells how long one takes alone.
_ALONE = 0.1
# What is believed before anything is known: that so much work takes as long as it says.
_BELIEVED_MS = 100.0
_SMOOTHING = 0.1
_LONGEST_RETRY_S = 60.0
# Over the time that one answer takes: others come meanwhile, who were never refused.
_TURN = 1.25
# Time for which a request that was told to come again has the right of way, and how many have it.
_GRACE_S = 5.0
_MOST_DUE = 10_000


class Admission:
    """Admits requests to an HTTP process, or refuses them with the time to come again.

    Args:
        pool: the devices, whose waits count as well.
        max_wait_s: estimated wait beyond which a request is refused.
        max_answer_bytes: estimated size of one answer; all that are being made together have at
            most three times as much.
        key_counts: requests in flight by key; None = of this process alone.
    """

    def __init__(
        self,
        pool: DevicePool,
        *,
        max_wait_s: float = math.inf,
        max_answer_bytes: int = 32_000_000,
        key_counts: KeyCounts | None = None,
    ) -> None:
        self.max_answer_bytes = max_answer_bytes
        self._pool = pool
        self._max_wait_s = max_wait_s
        self._key_counts = key_counts or KeyCounts(None)
        self._line = Line(max_wait_s=max_wait_s)
        self._answer_bytes = 0
        self._next_look_at = 0.0

    @property
    def is_full(self) -> bool:
        """Whether a request for one image would wait for too long."""
        return self._line.wait_s > self._max_wait_s

    def check_unread(self, request: Request) -> None:
        """Refuse a request for images at the limit before its body is read.

        Raises:
            Overloaded: whatever it is, it would wait for too long.
        """
        _is_let_in.set(False)
        if request.method != "POST":
            return
        if self.is_full and _may_be_long(request) and (self._line.is_due() or self._may_look()):
            # Long jobs have their own share of a device; the plan will tell what it is.
            wait_s = min(self._line.wait_s, self._device_wait_s(long=True))
            self._line.check(wait_s, patience_s=self._max_wait_s)
            return
        patience_s = self._max_wait_s
        if self._line.is_due():
            patience_s *= _RIGHT_OF_WAY
        self._line.check(self._line.wait_s, patience_s=patience_s)
        _is_let_in.set(True)

    def _may_look(self) -> bool:
        now = time.monotonic()
        look_at = max(self._next_look_at, now - _LOOKS / _LOOKS_PER_S)
        if look_at > now:
            return False
        self._next_look_at = look_at + 1 / _LOOKS_PER_S
        return True

    @contextlib.contextmanager
    def key_slot(self, key: str, *, limit: int) -> Iterator[None]:
        """Count a request of a key while it is in flight.

        Raises:
            Overloaded: the key has reached its limit.
        """
        with self._key_counts.count(key) as in_flight:
            if in_flight > limit:
                text = f"A key may have at most {limit} requests in flight."
                raise Overloaded(text, retry_after_s=_SHORTLY_S)
            yield

    @contextlib.contextmanager
    def place(self, plan: Plan) -> Iterator[None]:
        """Count a plan from before its images are decoded until its answer is made or given up.

        Raises:
            Overloaded: it would wait for too long, or there is no room for its answer.
        """
        answer_bytes, is_long = plan.answer_bytes, plan.is_long
        room = _ANSWERS * self.max_answer_bytes - answer_bytes
        if self._answer_bytes and self._answer_bytes > room:
            text = "Too many large answers are being made."
            raise Overloaded(text, retry_after_s=_SHORTLY_S)
        wait_s = self._device_wait_s(plan.info.card.full_name, long=is_long)
        if not is_long:
            wait_s = max(wait_s, self._line.wait_s)
        patience_s = plan.patience_s(self._max_wait_s)
        if _is_let_in.get() or self._line.is_due():
            patience_s *= _RIGHT_OF_WAY
        patience_s = min(patience_s, plan.deadline - time.monotonic())
        self._line.check(wait_s, patience_s=max(0.0, patience_s))
        work_ms = _HOST_MS * len(plan.images) + plan.device_ms
        # A long job has its own share of a device, for which it waits there.
        standing = contextlib.nullcontext() if is_long else self._line.place(work_ms)
        self._answer_bytes += answer_bytes
        try:
            with standing:
                yield
        finally:
            self._answer_bytes -= answer_bytes

    def _device_wait_s(self, model: str | None = None, *, long: bool) -> float:
        """Wait for the freest device that is ready; of one model's devices, if it is given."""
        waits = (
            device.long_wait_ms if long else device.wait_ms
            for device in self._pool.devices()
            if device.state == "ready" and (model is None or model in device.models)
        )
        return min(waits, default=0.0) / 1000


class Line:
    """Work between admission and answer, in whichever stage it is.

    Decoding, devices and drawing may share cores, and other processes may share the devices, so
    that neither the sum of their waits nor the longest of them is the wait of a request. The line
    learns how fast answers came of late while it was not empty, whatever it was that took the time.

    Args:
        max_wait_s: estimated wait beyond which a request is refused.
        clock: tells the time in seconds.
    """

    def __init__(self, *, max_wait_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_wait_s = max_wait_s
        self._clock = clock
        self._places = 0
        self._work_ms = 0.0
        self._usual_ms = _HOST_MS
        self._seen_ms, self._seen_s = _BELIEVED_MS, _BELIEVED_MS / 1000
        self._moved_at, self._is_first = 0.0, True
        self._promised_until = 0.0
        self._due: dict[str, float] = {}

    @property
    def wait_s(self) -> float:
        """Estimated time until the requests in the line have their answers."""
        return self._work_ms * self._pace if self._places else 0.0

    def check(self, wait_s: float, *, patience_s: float) -> None:
        """Refuse a request that would wait for too long.

        Args:
            wait_s: its estimated wait; `wait_s` of the line, or what else it waits for.
            patience_s: the longest wait with which it is accepted.

        Raises:
            Overloaded: with the time after which there is room for it, and for all who were told a
                time before, unless many others come meanwhile.
        """
        now = self._clock()
        if self.wait_s < self._max_wait_s / 2:
            # Who was told to come again has come, or does not.
            self._promised_until = now
        if wait_s <= patience_s:
            return
        due = self._due.get(logs.request_id.get(), 0.0)
        if due <= now:
            due = max(self._promised_until, now + wait_s - patience_s)
            due = min(due, now + _LONGEST_RETRY_S)
            self._promised_until = due + _TURN * self._usual_ms * self._pace
            self._expect(due)
        raise Overloaded("The service is at its limit.", retry_after_s=due - now)

    def is_due(self) -> bool:
        """Whether the current request comes again, with the same id, when it was told to."""
        due = self._due.get(logs.request_id.get(), math.inf)
        return due <= self._clock() < due + _GRACE_S

    def _expect(self, due: float) -> None:
        if request_id := logs.request_id.get():
            self._due.pop(request_id, None)
            self._due[request_id] = due
        if len(self._due) > _MOST_DUE:
            del self._due[next(iter(self._due))]

    @contextlib.contextmanager
    def place(self, work_ms: float) -> Iterator[None]:
        """Stand in the line until the answer is made or given up."""
        self._due.pop(logs.request_id.get(), None)
        self._usual_ms += _SMOOTHING * (work_ms - self._usual_ms)
        if not self._places:
            self._work_ms, self._moved_at, self._is_first = 0.0, self._clock(), True
        self._places += 1
        self._work_ms += work_ms
        try:
            yield
            self._learn(work_ms)
        finally:
            self._places -= 1
            self._work_ms -= work_ms

    @property
    def _pace(self) -> float:
        """Seconds for each millisecond of work."""
        return self._seen_s / self._seen_ms

    def _learn(self, work_ms: float) -> None:
        now = self._clock()
        taken_s = now - self._moved_at
        weight = _ALONE if self._is_first and taken_s > work_ms * self._pace else 1.0
        kept = math.exp(-weight * work_ms / _MEMORY_MS)
        self._seen_ms = kept * self._seen_ms + weight * work_ms
        self._seen_s = kept * self._seen_s + weight * taken_s
        self._moved_at, self._is_first = now, False


def _may_be_long(request: Request) -> bool:
    """Whether a request may ask for a long job: most of its options may be in its body."""
    size = request.headers.get("content-length", "")
    if size.isdecimal() and int(size) > _SMALL_BODY:
        return False
    is_image = request.headers.get("content-type", "").startswith(_IMAGES)
    has_options = "inference-header-content-length" in request.headers
    return not is_image or has_options or not _LONG_OPTIONS.isdisjoint(request.query_params)
