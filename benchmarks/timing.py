"""Side-by-side timing on a noisy machine: interleaved rounds, ratios within a round, medians over rounds."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

Case = Callable[[], object]


@dataclass(frozen=True)
class Comparison:
    """One case against the baseline.

    Attributes:
        seconds: median seconds of one call.
        ratio: median over the rounds of (seconds of the case / seconds of the baseline in the same
            round).
        low, high: the quartiles of those ratios.
    """

    seconds: float
    ratio: float
    low: float
    high: float


def rounds_of(
    cases: Mapping[str, Case],
    *,
    rounds: int,
    budget_s: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[dict[str, float]]:
    """Time every case once a round and yield the round's seconds per call.

    A case is repeated for about `budget_s` in each round. Rounds start with another case each time,
    so that none always runs on what its neighbour left in the caches. The first calls warm up and
    are not counted.
    """
    repeats = {}
    for name, case in cases.items():
        case()
        started = clock()
        case()
        repeats[name] = max(1, round(budget_s / max(clock() - started, 1e-7)))
    names = list(cases)
    for number in range(rounds):
        seconds = {}
        for name in names[number % len(names) :] + names[: number % len(names)]:
            started = clock()
            for _ in range(repeats[name]):
                cases[name]()
            seconds[name] = (clock() - started) / repeats[name]
        yield seconds


def compare(rounds: Sequence[Mapping[str, float]], *, baseline: str) -> dict[str, Comparison]:
    """Reduce rounds to one comparison a case, in the order of the first round."""
    result = {}
    for name in rounds[0]:
        ratios = [seconds[name] / seconds[baseline] for seconds in rounds]
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        result[name] = Comparison(
            seconds=statistics.median(seconds[name] for seconds in rounds),
            ratio=statistics.median(ratios),
            low=low,
            high=high,
        )
    return result


def machine_line(*packages: str) -> str:
    """Describe processor, cores, Python and the versions of `packages` in one line."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_processor()}, {cores} cores, Python {platform.python_version()}, {versions}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
