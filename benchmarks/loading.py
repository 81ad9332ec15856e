"""Shared by the benchmarks of servers: images, one measured load, and its processor time."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.servers import Server, Usage
from service.cli.bench.client import Check, Client
from service.cli.bench.load import Bounds, Load, Summary, run_load, summarise
from service.cli.bench.requests import Request, draw_images, of_megapixels, read_images

TIMEOUT_S = 40.0
_SLOW_BYTES_S = 5000
_PRECEDENCE = 5


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


def images_of(
    folder: Path | None, *, count: int = 64, megapixels: float | None = None
) -> list[bytes]:
    """Images of a folder, or drawn ones, which may have a size."""
    if folder is not None:
        return read_images(folder, limit=count)
    return (
        draw_images(count) if megapixels is None else draw_images(8, size=of_megapixels(megapixels))
    )


async def measure(
    server: Server,
    requests: Sequence[Request],
    load: Load,
    bounds: Bounds,
    *,
    check: Check | None = None,
    retries: int = 0,
    slow: int = 0,
) -> Measured:
    """Load a server and sum up what came and what it cost; `slow` clients send beside the load."""
    before = server.usage()
    client = Client(server.url(), requests, timeout_s=TIMEOUT_S, check=check, retries=retries)
    async with client, _trickling(server.port, requests, clients=slow):
        with _first_in_line():
            run = await run_load(client.call, load, bounds)
    after = server.usage()
    good = sum(sample.ok for sample in run.samples)
    by_role = {
        role: 1000 * (seconds - before.cpu_s.get(role, 0.0)) / good if good else 0.0
        for role, seconds in after.cpu_s.items()
    }
    return Measured(
        summary=summarise(run), core_ms=sum(by_role.values()), by_role=by_role, usage=after
    )


@contextlib.contextmanager
def _first_in_line() -> Iterator[None]:
    """Let this thread have a core before the servers have, where that is allowed.

    Clients are elsewhere as a rule: how late this one gets a core is not the server's latency.
    """
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, usual - _PRECEDENCE)
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, usual)


@contextlib.asynccontextmanager
async def _trickling(
    port: int, requests: Sequence[Request], *, clients: int
) -> AsyncIterator[None]:
    """Clients on bad lines, which send their requests a little at a time, over and over."""
    tasks = [
        asyncio.create_task(_trickle(port, requests[n % len(requests)])) for n in range(clients)
    ]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _trickle(port: int, request: Request) -> None:
    head = f"POST {request.path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(request.body)}\r\n\r\n"
    while True:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.suppress(ConnectionError), contextlib.closing(writer):
            writer.write(head.encode())
            for start in range(0, len(request.body), _SLOW_BYTES_S):
                writer.write(request.body[start : start + _SLOW_BYTES_S])
                await asyncio.sleep(1.0)
            await reader.read(1)
        await asyncio.sleep(0.1)
