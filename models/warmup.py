"""Warm-up: the latency of a model by batch size on its device, and the batch size that answers most pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

BATCH_SIZES = (1, 2, 4, 8, 16)
REPEATS = 3
WORTHWHILE = 0.97


def measure_latencies(
    run: Callable[[int], object], device: torch.device, *, budget_s: float
) -> dict[int, float]:
    """Time passes of growing batch size; each size runs once unmeasured before.

    A size is left out, and with it all larger ones, when its passes would exceed what is left of
    the time.

    Args:
        run: runs one pass of that many pictures.
        device: where it runs; work queued there is waited for.
        budget_s: about how long all passes may take; batch size 1 is measured in any case.

    Returns:
        Milliseconds of the fastest of up to 3 passes, by batch size.
    """
    deadline = time.monotonic() + budget_s
    latencies: dict[int, float] = {}
    for size in BATCH_SIZES:
        # A batch twice as large takes at most about twice as long; one pass to warm up and one to
        # measure.
        least_s = 2 * 2 * latencies[size // 2] / 1000 if latencies else 0.0
        if time.monotonic() + least_s > deadline and latencies:
            break
        _timed(run, size, device)
        times = [_timed(run, size, device)]
        while len(times) < REPEATS and time.monotonic() + times[0] < deadline:
            times.append(_timed(run, size, device))
        latencies[size] = 1000 * min(times)
    return latencies


def best_batch(latency_ms: Mapping[int, float]) -> int:
    """Return the smallest batch size whose pictures per second come within 3 % of the best."""
    rates = {size: size / latency for size, latency in latency_ms.items()}
    enough = WORTHWHILE * max(rates.values())
    return min(size for size, rate in rates.items() if rate >= enough)


def _timed(run: Callable[[int], object], size: int, device: torch.device) -> float:
    """Seconds of one pass."""
    _synchronise(device)
    started = time.perf_counter()
    run(size)
    _synchronise(device)
    return time.perf_counter() - started


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
