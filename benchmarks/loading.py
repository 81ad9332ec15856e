"""What the benchmarks of servers share: pictures, one measured load, and its cost in core-milliseconds."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.servers import Server, Usage
from service.cli.bench.client import Check, Client
from service.cli.bench.loops import Bounds, Closed, Open, run_load
from service.cli.bench.pictures import draw_pictures, read_pictures
from service.cli.bench.requests import Request
from service.cli.bench.session import loop_factory
from service.cli.bench.summary import Summary, summarise

TIMEOUT_S = 40.0

Result = TypeVar("Result")


@dataclass(frozen=True)
class Measured:
    """A load and what it cost.

    Attributes:
        core_ms: processor milliseconds of the server for each good answer, the whole run counted; 0
            without any.
        by_role: the same by role of the process.
    """

    summary: Summary
    core_ms: float
    by_role: dict[str, float]
    usage: Usage


def pictures_of(folder: Path | None, *, count: int = 64) -> list[bytes]:
    """Pictures of a folder, or drawn ones."""
    return draw_pictures(count) if folder is None else read_pictures(folder, most=count)


def in_loop(work: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine on the fastest event loop that is installed."""
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(work)


async def measure(
    server: Server,
    requests: Sequence[Request],
    load: Closed | Open,
    bounds: Bounds,
    *,
    check: Check | None = None,
) -> Measured:
    """Load a server and sum up what came and what it cost."""
    client = Client(server.address, requests, timeout_s=TIMEOUT_S, check=check)
    before = server.usage()
    try:
        run = await run_load(client, load, bounds)
    finally:
        client.close()
    after = server.usage()
    good = sum(sample.ok for sample in run.samples)
    by_role = {
        role: 1000 * (seconds - before.cpu_s.get(role, 0.0)) / good if good else 0.0
        for role, seconds in after.cpu_s.items()
    }
    return Measured(
        summary=summarise(run), core_ms=sum(by_role.values()), by_role=by_role, usage=after
    )
