"""Shared by the benchmarks of servers: images, one measured load, and its processor time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.servers import Server, Usage
from service.cli.bench.client import Check, Client
from service.cli.bench.load import Bounds, Load, Summary, run_load, summarise
from service.cli.bench.requests import Request, draw_images, read_images

TIMEOUT_S = 40.0


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


def images_of(folder: Path | None, *, count: int = 64) -> list[bytes]:
    """Images of a folder, or drawn ones."""
    return draw_images(count) if folder is None else read_images(folder, limit=count)


async def measure(
    server: Server,
    requests: Sequence[Request],
    load: Load,
    bounds: Bounds,
    *,
    check: Check | None = None,
) -> Measured:
    """Load a server and sum up what came and what it cost."""
    before = server.usage()
    async with Client(server.url(), requests, timeout_s=TIMEOUT_S, check=check) as client:
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
