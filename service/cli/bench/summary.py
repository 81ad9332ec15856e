"""From samples to numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from models.types import Struct
from service.cli.bench.client import Sample
from service.cli.bench.loops import Closed, Run


class Latency(Struct):
    """Milliseconds, percentiles by nearest rank."""

    p50: float
    p95: float
    p99: float
    max: float


class Summary(Struct):
    """One run in numbers. Everything but `sent_in_all` is of the measured window.

    Attributes:
        load: `8 clients` or `50.0/s`.
        throughput: good answers a second that came within the window.
        latency: of good answers to requests that were due within the window; None without any.
        refused_latency: of all others.
        answered, failed: requests due within the window, by what became of them.
        statuses: the same by HTTP status; 0 is no answer.
        codes: failures by code.
        megabytes: mean size of a good answer.
        client_cores: processor cores that the generator itself kept busy; near 1 the numbers are
            its own.
        lag_ms: 99th percentile of how late requests were sent, by the generator's own fault.
        sent_in_all: warm-up included.
    """

    load: str
    clients: int | None
    rate: float | None
    seconds: float
    throughput: float
    latency: Latency | None
    refused_latency: Latency | None
    answered: int
    failed: int
    statuses: dict[str, int]
    codes: dict[str, int]
    megabytes: float
    client_cores: float
    lag_ms: float
    sent_in_all: int


def summarise(run: Run) -> Summary:
    """Reduce a run to its numbers."""
    due = [sample for sample in run.samples if run.start <= sample.due <= run.end]
    good = [sample for sample in due if sample.ok]
    bad = [sample for sample in due if not sample.ok]
    came = sum(1 for s in run.samples if s.ok and run.start <= s.ended <= run.end)
    seconds = run.end - run.start
    closed = isinstance(run.load, Closed)
    return Summary(
        load=_name(run),
        clients=run.load.clients if isinstance(run.load, Closed) else None,
        rate=None if isinstance(run.load, Closed) else run.load.rate,
        seconds=seconds,
        throughput=came / seconds if seconds > 0 else 0.0,
        latency=latency_of(good),
        refused_latency=latency_of(bad),
        answered=len(good),
        failed=len(bad),
        statuses=_counted(str(sample.status) for sample in due),
        codes=_counted(sample.code for sample in bad),
        megabytes=sum(sample.size for sample in good) / max(len(good), 1) / 1e6,
        client_cores=run.client_cpu_s / max(run.wall_s, 1e-9),
        lag_ms=0.0 if closed else 1000 * percentile([s.sent - s.due for s in due], 99),
        sent_in_all=len(run.samples),
    )


def latency_of(samples: Sequence[Sample]) -> Latency | None:
    """Percentiles of samples; None of none."""
    if not samples:
        return None
    values = [1000 * sample.latency for sample in samples]
    return Latency(
        p50=percentile(values, 50),
        p95=percentile(values, 95),
        p99=percentile(values, 99),
        max=max(values),
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """Nearest rank: the least value that `percent` of them do not exceed; 0 of none."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def _counted(names: Iterable[str]) -> dict[str, int]:
    return dict(Counter(names).most_common())


def _name(run: Run) -> str:
    if isinstance(run.load, Closed):
        return f"{run.load.clients} client{'s' if run.load.clients > 1 else ''}"
    return f"{run.load.rate:.1f}/s"
