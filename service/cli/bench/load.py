"""Closed and open loops of requests, the sweep over both, and the summary of a run."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import numpy as np

from models.types import Struct

SWEEP_CLIENTS = (1, 8, 16, 32, 64)
SWEEP_SHARES = (0.5, 0.8, 1.2, 2.0)
"""Rates of the sweep's open loops, relative to the best throughput of its closed loops."""
SWEEP_STAGES = len(SWEEP_CLIENTS) + len(SWEEP_SHARES)

_MAX_IN_FLIGHT = 4096

Result = TypeVar("Result")


class Closed(Struct):
    """Clients that each send their next request when the last one has ended."""

    clients: int

    def __str__(self) -> str:
        return f"{self.clients} client{'s' if self.clients > 1 else ''}"


class Open(Struct):
    """Poisson arrivals at a mean rate per second, regardless of the requests in flight.

    Latency counts from the due time: a slow response delays others, and users wait for that too. A
    closed loop sends nothing meanwhile and so hides the delay ("coordinated omission").
    """

    rate: float
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.rate:.1f}/s"


Load = Closed | Open


class Bounds(Struct):
    """The end of a run: `requests` limits all requests, those of the warm-up included."""

    warmup_s: float
    duration_s: float
    requests: int | None = None


class Sample(Struct):
    """One request; times are seconds on the monotonic clock.

    Attributes:
        due: when it should have been sent.
        ended: when its response was complete, or the request had failed.
        status: HTTP status; 0 without a response.
        code: empty on success; otherwise the service's error code, `http_STATUS` if the response
            has none, or one of `client.py`.
        size: bytes of the response's body.
        attempts: how often it was sent; more than once if it was refused before.
    """

    due: float
    sent: float
    ended: float
    status: int = 0
    code: str = ""
    size: int = 0
    attempts: int = 1

    @property
    def latency(self) -> float:
        """Seconds from the due time to the end."""
        return self.ended - self.due

    @property
    def ok(self) -> bool:
        """Whether the request succeeded."""
        return not self.code


class Run(Struct):
    """The samples of a load, and its measured window from `start` to `end`.

    Attributes:
        client_cpu_s: processor time of this process during the run.
        wall_s: length of the run, warm-up and last responses included.
    """

    load: Load
    samples: list[Sample]
    start: float
    end: float
    client_cpu_s: float
    wall_s: float


async def run_load(
    call: Callable[[float | None], Awaitable[Sample]],
    load: Load,
    bounds: Bounds,
    *,
    watch: Callable[[Sample], None] | None = None,
) -> Run:
    """Send requests until a bound is reached, then wait for the last responses.

    Args:
        call: sends a request that is due at this time (None: now), see `Client.call`.
        load: a closed or open loop.
        bounds: the end of the run.
        watch: called with each sample.
    """
    samples: list[Sample] = []
    begun, cpu = time.monotonic(), time.process_time()
    start = begun + bounds.warmup_s
    end = start + bounds.duration_s
    numbers = iter(range(bounds.requests)) if bounds.requests else itertools.count()

    def may_send(now: float) -> bool:
        return now < end and next(numbers, None) is not None

    async def send(due: float | None = None) -> None:
        sample = await call(due)
        samples.append(sample)
        if watch is not None:
            watch(sample)

    if isinstance(load, Closed):
        await _run_closed(send, load, may_send)
    else:
        await _run_open(send, load, may_send)
    if len(samples) == bounds.requests:
        # The number of requests ended the run, so the window closes with the last response.
        end = max(start, min(end, max(sample.ended for sample in samples)))
    return Run(
        load=load,
        samples=samples,
        start=start,
        end=end,
        client_cpu_s=time.process_time() - cpu,
        wall_s=time.monotonic() - begun,
    )


async def _run_closed(
    send: Callable[[], Awaitable[None]], load: Closed, may_send: Callable[[float], bool]
) -> None:
    async def client() -> None:
        while may_send(time.monotonic()):
            await send()

    async with asyncio.TaskGroup() as group:
        for _ in range(load.clients):
            group.create_task(client())


async def _run_open(
    send: Callable[[float], Awaitable[None]], load: Open, may_send: Callable[[float], bool]
) -> None:
    arrivals = random.Random(load.seed)  # noqa: S311 - not for secrets
    in_flight = asyncio.Semaphore(_MAX_IN_FLIGHT)

    async def client(due: float) -> None:
        try:
            await send(due)
        finally:
            in_flight.release()

    due = time.monotonic() + arrivals.expovariate(load.rate)
    async with asyncio.TaskGroup() as group:
        while may_send(due):
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            await in_flight.acquire()
            group.create_task(client(due))
            due += arrivals.expovariate(load.rate)


class Latency(Struct):
    """Latency in milliseconds; percentiles by nearest rank."""

    p50: float
    p95: float
    p99: float
    max: float


class Summary(Struct):
    """The numbers of a run; latencies and counts are of the requests due within its window.

    Attributes:
        load: `8 clients` or `50.0/s`.
        throughput: successful responses per second that arrived within the window.
        latency: of successful requests; None without any.
        refused_latency: of failed requests.
        answered: number of successful requests.
        statuses: number of requests by HTTP status; 0 stands for a missing response.
        codes: number of failed requests by code.
        megabytes: mean size of a successful response.
        client_cores: processor cores that the load generator used; near 1 it is itself the limit.
        lag_ms: 99th percentile of how late an open loop sent its requests.
        sent_in_all: number of requests, warm-up included.
        attempts: number of successful requests by the attempt that succeeded.
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
    attempts: dict[str, int] = {}


def summarise(run: Run) -> Summary:
    """Reduce a run to its numbers."""
    due = [sample for sample in run.samples if run.start <= sample.due <= run.end]
    good = [sample for sample in due if sample.ok]
    bad = [sample for sample in due if not sample.ok]
    arrived = sum(s.ok and run.start <= s.ended <= run.end for s in run.samples)
    seconds = run.end - run.start
    clients = run.load.clients if isinstance(run.load, Closed) else None
    rate = run.load.rate if isinstance(run.load, Open) else None
    return Summary(
        load=str(run.load),
        clients=clients,
        rate=rate,
        seconds=seconds,
        throughput=arrived / seconds if seconds > 0 else 0.0,
        latency=_latency(good),
        refused_latency=_latency(bad),
        answered=len(good),
        failed=len(bad),
        statuses=dict(Counter(str(sample.status) for sample in due).most_common()),
        codes=dict(Counter(sample.code for sample in bad).most_common()),
        megabytes=sum(sample.size for sample in good) / max(len(good), 1) / 1e6,
        client_cores=run.client_cpu_s / max(run.wall_s, 1e-9),
        lag_ms=1000 * percentile([s.sent - s.due for s in due], 99) if rate else 0.0,
        sent_in_all=len(run.samples),
        attempts={str(k): n for k, n in sorted(Counter(s.attempts for s in good).items())},
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """Percentile by nearest rank; 0 without values."""
    return float(np.percentile(values, percent, method="inverted_cdf")) if values else 0.0


def _latency(samples: Sequence[Sample]) -> Latency | None:
    if not samples:
        return None
    values = [1000 * sample.latency for sample in samples]
    p50, p95, p99 = (percentile(values, percent) for percent in (50, 95, 99))
    return Latency(p50=p50, p95=p95, p99=p99, max=max(values))


async def run_sweep(measure: Callable[[Load], Awaitable[Summary]]) -> AsyncIterator[Summary]:
    """Measure closed loops, then open loops at shares of their best throughput.

    The open loops are left out if no closed loop had a successful response.
    """
    best = 0.0
    for clients in SWEEP_CLIENTS:
        summary = await measure(Closed(clients=clients))
        best = max(best, summary.throughput)
        yield summary
    if best > 0:
        for seed, share in enumerate(SWEEP_SHARES):
            yield await measure(Open(rate=share * best, seed=seed))


def run_in_loop(work: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine on uvloop where it is installed, otherwise on asyncio's own loop."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        return asyncio.run(work)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(work)
