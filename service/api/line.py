"""The line of admitted requests: how long a new one would wait, and when to come again."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator

from models.errors import Overloaded

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


class Line:
    """Work between admission and answer, in whichever stage it is.

    Decoding, devices and drawing may share cores, and other processes may share the devices, so
    that neither the sum of their waits nor the longest of them is the wait of a request. The line
    learns how fast answers came of late while it was not empty, whatever it was that took the time.

    Args:
        max_wait_s: estimated wait beyond which a request is refused.
    """

    def __init__(self, *, max_wait_s: float) -> None:
        self._max_wait_s = max_wait_s
        self._places = 0
        self._work_ms = 0.0
        self._usual_ms = _HOST_MS
        self._seen_ms, self._seen_s = _BELIEVED_MS, _BELIEVED_MS / 1000
        self._moved_at, self._is_first = 0.0, True
        self._promised_until = 0.0

    @property
    def wait_s(self) -> float:
        """Estimated time until the requests in the line have their answers."""
        return self._work_ms * self._pace if self._places else 0.0

    def admit(self, wait_s: float, *, patience_s: float) -> None:
        """Refuse a request that would wait for too long.

        Args:
            wait_s: its estimated wait; `wait_s` of the line, or what else it waits for.
            patience_s: the longest wait with which it is accepted.

        Raises:
            Overloaded: with the time after which there is room for it, and for all who were told a
                time before, unless many others come meanwhile.
        """
        now = time.monotonic()
        if self.wait_s < self._max_wait_s / 2:
            # Who was told to come again has come, or does not.
            self._promised_until = now
        if wait_s <= patience_s:
            return
        free_at = max(self._promised_until, now + wait_s - patience_s)
        retry_after_s = min(_LONGEST_RETRY_S, free_at - now)
        self._promised_until = now + retry_after_s + _TURN * self._usual_ms * self._pace
        raise Overloaded("The service is at its limit.", retry_after_s=retry_after_s)

    @contextlib.contextmanager
    def place(self, device_ms: float) -> Iterator[None]:
        """Stand in the line until the answer is made or given up."""
        work_ms = _HOST_MS + device_ms
        self._usual_ms += _SMOOTHING * (work_ms - self._usual_ms)
        if not self._places:
            self._work_ms, self._moved_at, self._is_first = 0.0, time.monotonic(), True
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
        now = time.monotonic()
        taken_s = now - self._moved_at
        weight = _ALONE if self._is_first and taken_s > work_ms * self._pace else 1.0
        kept = math.exp(-weight * work_ms / _MEMORY_MS)
        self._seen_ms = kept * self._seen_ms + weight * work_ms
        self._seen_s = kept * self._seen_s + weight * taken_s
        self._moved_at, self._is_first = now, False
