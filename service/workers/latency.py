"""How long a batch of n takes on a device: measured at warm-up, corrected as it runs."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping

_UNKNOWN_MS = 50.0


class LatencyModel:
    """Milliseconds by batch size: measured points, straight lines between them.

    Each observation moves the point of its size by `smoothing` of the difference (an exponentially
    weighted moving average), so that one slow batch is soon forgotten. Beyond the largest point the
    time grows in proportion to the size.
    """

    def __init__(
        self, latency_ms: Mapping[int, float] | None = None, *, smoothing: float = 0.2
    ) -> None:
        self._points = dict(latency_ms or {})
        self._sizes = sorted(self._points)
        self._smoothing = smoothing

    def predict_ms(self, size: int) -> float:
        """Expected duration of a batch of `size` (from 1); a guess of 50 ms while nothing is known."""
        if not self._sizes:
            return _UNKNOWN_MS
        i = bisect_left(self._sizes, size)
        if i == len(self._sizes):
            largest = self._sizes[-1]
            return self._points[largest] * size / largest
        right = self._sizes[i]
        if i == 0 or right == size:
            return self._points[right]
        left = self._sizes[i - 1]
        share = (size - left) / (right - left)
        return self._points[left] + share * (self._points[right] - self._points[left])

    def observe(self, size: int, duration_ms: float) -> None:
        """Learn from a batch that ran."""
        if size not in self._points:
            known = self.predict_ms(size) if self._sizes else duration_ms
            self._sizes.insert(bisect_left(self._sizes, size), size)
            self._points[size] = known
        self._points[size] += self._smoothing * (duration_ms - self._points[size])
