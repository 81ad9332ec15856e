"""Two forms of a network timed in turns, on a machine that may be busy."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.extractor import Extractor, Tap
from models.reductions import reduce

WORTHWHILE = 1.03
"""Least gain that counts: what is measured on a busy machine moves."""

LARGE_BATCHES = (8, 4, 2)
LIMIT_S = 2.5
"""Time for the rounds of one batch size; of larger batches, those are left out that take longer."""

ROUNDS = 3, 9

Pass = Callable[[Tensor], object]


@dataclass(frozen=True, kw_only=True)
class Race:
    """What passes took, measured in turns.

    Attributes:
        torch_ms, other_ms: milliseconds by batch size, on torch and on the other runtime.
        gain: by how much the other one is faster, over all batch sizes.
    """

    torch_ms: dict[int, float]
    other_ms: dict[int, float]
    gain: float

    @property
    def won(self) -> bool:
        """Whether the other runtime is clearly faster."""
        return self.gain >= WORTHWHILE

    def __str__(self) -> str:
        """The times, for the model card."""
        sizes = " / ".join(map(str, self.torch_ms))
        ours, theirs = (
            " / ".join(f"{ms:.1f}" for ms in times.values())
            for times in (self.torch_ms, self.other_ms)
        )
        return f"{self.gain:.2f}x torch ({theirs} ms at batch {sizes}, torch {ours})"


def race(ours: Pass, theirs: Pass, images: Tensor) -> Race:
    """Time two forms of a network in turns, for a single image and for as large a batch as is quick.

    The gain is the median of the ratios within rounds, which other work on the machine changes
    little. `images` are (N, 3, H, W), the input of both.
    """
    times = {1: _rounds(ours, theirs, images[:1])}
    single_s = sum(map(statistics.median, times[1]))
    for size in LARGE_BATCHES:
        # One round is not measured.
        if size * single_s * (1 + ROUNDS[0]) <= LIMIT_S:
            batch = images.repeat(-(-size // len(images)), 1, 1, 1)[:size]
            times[size] = _rounds(ours, theirs, batch.contiguous(memory_format=torch.channels_last))
            break
    gains = [
        statistics.median(a / b for a, b in zip(*both, strict=True)) for both in times.values()
    ]
    torch_ms, other_ms = (
        {size: round(1000 * statistics.median(both[side]), 2) for size, both in times.items()}
        for side in (0, 1)
    )
    return Race(torch_ms=torch_ms, other_ms=other_ms, gain=math.prod(gains) ** (1 / len(gains)))


def reading(module: nn.Module, layers: Sequence[str]) -> Pass:
    """A pass that describes some layers of a network, as requests for their statistics do."""
    taps = [Tap(layer, "output", reduce, shares_memory=False) for layer in layers]

    def run(images: Tensor) -> None:
        with Extractor(module, taps) as extractor:
            extractor.forward(images)

    return run


def pass_ms(module: nn.Module, images: Tensor) -> float:
    """Milliseconds of the fastest of a few passes of a network."""
    run = reading(module, ())
    run(images)
    return 1000 * min(_seconds(run, images) for _ in range(ROUNDS[0]))


def _rounds(ours: Pass, theirs: Pass, images: Tensor) -> tuple[list[float], list[float]]:
    """Seconds of the passes of each, round by round; the first round is left out."""
    least, most = ROUNDS
    times: tuple[list[float], list[float]] = ([], [])
    for run in (ours, theirs):
        run(images)
    began = time.perf_counter()
    while len(times[0]) < least or (
        len(times[0]) < most and time.perf_counter() - began < LIMIT_S / 4
    ):
        for run, seconds in zip((ours, theirs), times, strict=True):
            seconds.append(_seconds(run, images))
    return times


def _seconds(run: Pass, images: Tensor) -> float:
    began = time.perf_counter()
    run(images)
    return time.perf_counter() - began


def processor(device: torch.device) -> str:
    """What runs on a device takes its time from."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{capability}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
