"""The two ways to load a service: as so many clients that wait for their answers, or as a rate that waits for none."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable

from models.types import Struct
from service.cli.bench.client import Client, Sample

MAX_IN_FLIGHT = 4096

Watch = Callable[[Sample], None]


class Closed(Struct):
    """`clients` callers, each of which sends its next request when it has the answer to its last."""

    clients: int


class Open(Struct):
    """Poisson arrivals of `rate` requests a second, sent when they are due whatever became of those before them.

    Latency counts from the due time: what a slow answer holds up is part of what users wait for. (A
    closed loop stops asking while the service is slow, and so hides it: "coordinated omission".)
    """

    rate: float
    seed: int = 0


class Bounds(Struct):
    """When a run ends.

    Attributes:
        warmup_s: time before the measured window; its requests are sent and forgotten.
        duration_s: length of the measured window; after it nothing new is sent.
        requests: most requests to send in all; None = as many as fit.
    """

    warmup_s: float
    duration_s: float
    requests: int | None = None


class Run(Struct):
    """All samples of a run, and its measured window from `start` to `end` on the monotonic clock.

    Attributes:
        client_cpu_s: processor time that this process used within the run.
        wall_s: length of the run, warm-up and last answers included.
    """

    load: Closed | Open
    samples: list[Sample]
    start: float
    end: float
    client_cpu_s: float
    wall_s: float


async def run_load(
    client: Client, load: Closed | Open, bounds: Bounds, *, watch: Watch | None = None
) -> Run:
    """Load the service until a bound is reached, and wait for the last answers."""
    samples: list[Sample] = []
    begun, cpu = time.monotonic(), time.process_time()
    gate = _Gate(begun + bounds.warmup_s + bounds.duration_s, bounds.requests)

    async def call(due: float | None = None) -> None:
        sample = await client.call(due)
        samples.append(sample)
        if watch is not None:
            watch(sample)

    if isinstance(load, Closed):
        await _closed(call, load.clients, gate)
    else:
        await _open(call, load, gate)
    last = max((sample.ended for sample in samples), default=begun)
    # A run that its number of requests ended was measured until its last answer.
    end = min(gate.end, last) if gate.exhausted else gate.end
    return Run(
        load=load,
        samples=samples,
        start=begun + bounds.warmup_s,
        end=max(end, begun + bounds.warmup_s),
        client_cpu_s=time.process_time() - cpu,
        wall_s=time.monotonic() - begun,
    )


class _Gate:
    """Lets requests pass until the time or their number is over."""

    def __init__(self, end: float, requests: int | None) -> None:
        self.end = end
        self._left = requests
        self.exhausted = False

    def passes(self, now: float) -> bool:
        if now >= self.end:
            return False
        if self._left is not None:
            if self._left == 0:
                self.exhausted = True
                return False
            self._left -= 1
        return True


async def _closed(call: Callable[[], Awaitable[None]], clients: int, gate: _Gate) -> None:
    async def caller() -> None:
        while gate.passes(time.monotonic()):
            await call()

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(caller())


async def _open(call: Callable[[float], Awaitable[None]], load: Open, gate: _Gate) -> None:
    arrivals = random.Random(load.seed)  # noqa: S311 - arrivals, no secrets
    room = asyncio.Semaphore(MAX_IN_FLIGHT)

    async def caller(due: float) -> None:
        try:
            await call(due)
        finally:
            room.release()

    due = time.monotonic()
    async with asyncio.TaskGroup() as group:
        while True:
            due += arrivals.expovariate(load.rate)
            if not gate.passes(due):
                return
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            await room.acquire()
            group.create_task(caller(due))
