"""A whole picture of a service: throughput against clients, then latency against the rate of arrivals."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

from service.cli.bench.loops import Closed, Open
from service.cli.bench.summary import Summary

CLIENTS = (1, 8, 16, 32, 64)
SHARES = (0.5, 0.8, 1.2)
"""Of the greatest throughput that any number of clients reached."""

STAGES = len(CLIENTS) + len(SHARES)

Measure = Callable[[Closed | Open], Awaitable[Summary]]


async def sweep(measure: Measure) -> AsyncIterator[Summary]:
    """Measure each number of clients, then each share of the best throughput found as a rate of arrivals.

    Rates are left out where no client was answered.
    """
    best = 0.0
    for clients in CLIENTS:
        summary = await measure(Closed(clients=clients))
        best = max(best, summary.throughput)
        yield summary
    if best > 0:
        for number, share in enumerate(SHARES):
            yield await measure(Open(rate=share * best, seed=number))
