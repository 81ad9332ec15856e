"""What one long request does to short ones: predictions beside a 4,000-mask RISE, and the device after it is given up.

    python -m benchmarks.interference                        # starts the service itself
    python -m benchmarks.interference --url http://127.0.0.1:8000

Predictions arrive at a light steady rate (Poisson; latency counts from the due time), first alone,
then while RISE runs all the time. Between its steps the device serves them, so that their 99th
percentile should rise by one step at most. Then RISE is sent again and its connection dropped: what
passes until the end of the device's last batch is the time of noticing and of the step it was in.
Takes about 2 x (warm-up + duration) + 60 s.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import statistics
import time
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.loading import images_of
from benchmarks.servers import heatlens
from benchmarks.timing import machine_line
from service.cli.bench.client import Client, NoResponse, parse_url
from service.cli.bench.load import Bounds, Open, Summary, run_in_loop, run_load, summarise
from service.cli.bench.requests import Request, image_requests

_TIMEOUT_S = 300.0
_LEAVES = 5
_POLL_S = 0.01
_QUIET_S = 1.0  # longer than a step, shorter than the pause before a device proves itself by a pass
_BUSY_S = 1.0


def main(
    *,
    url: Annotated[str, typer.Option(help="A running service; started here without.")] = "",
    rate: Annotated[float, typer.Option(help="Predictions a second.")] = 4.0,
    duration: Annotated[float, typer.Option(help="Seconds of each load.")] = 30.0,
    warmup: Annotated[float, typer.Option(help="Seconds before that.")] = 2.0,
    masks: Annotated[int, typer.Option(help="Of RISE.")] = 4000,
) -> None:
    """Measure and print a small table."""
    console, bounds = Console(width=100), Bounds(warmup_s=warmup, duration_s=duration)

    def work(base: str) -> None:
        run_in_loop(_measure(console, base, Open(rate=rate), bounds, masks=masks))

    if url:
        work(parse_url(url))
    else:
        with heatlens() as server:
            server.wait_ready()
            work(server.url())
    console.print(machine_line("torch"))


async def _measure(console: Console, url: str, load: Open, bounds: Bounds, *, masks: int) -> None:
    images = images_of(None, count=16)
    long = _rise(images[0], masks)
    requests = image_requests(images, operation="predict")
    async with Client(url, requests, timeout_s=_TIMEOUT_S) as client:
        step_ms = await _step_ms(client)
        alone = summarise(await run_load(client.call, load, bounds))
        async with _kept_busy(client, long) as sent:
            await asyncio.sleep(_BUSY_S)
            beside = summarise(await run_load(client.call, load, bounds))
        freed = [await _leave(client, long) for _ in range(_LEAVES)]
    table = Table("predictions", "answered", "failed", "p50 ms", "p99 ms", "max ms")
    for title, found in (("alone", alone), (f"beside RISE ({sent[0]} sent)", beside)):
        table.add_row(title, str(found.answered), str(found.failed), *_milliseconds(found))
    console.print(table)
    if alone.latency and beside.latency:
        rise = beside.latency.p99 - alone.latency.p99
        console.print(f"99th percentile: {rise:+.1f} ms; one step of RISE: {step_ms:.1f} ms")
    console.print(
        f"freed after the client left: median {statistics.median(freed):.1f} ms, "
        f"longest {max(freed):.1f} ms of {_LEAVES}"
    )


def _milliseconds(found: Summary) -> list[str]:
    if found.latency is None:
        return ["-"] * 3
    return [f"{value:.1f}" for value in (found.latency.p50, found.latency.p99, found.latency.max)]


def _rise(image: bytes, masks: int) -> Request:
    query = f"methods=rise&samples={masks}&outputs=values&timeout_s={_TIMEOUT_S}"
    return Request(path=f"/v1/explain?{query}", body=image)


async def _step_ms(client: Client) -> float:
    """What the service itself measured for a batch of the best size, which is a step."""
    listing = await _get(client, "/v1/models")
    models: dict[str, Any] = json.loads(listing)
    card = next(c for c in models["cards"] if c["name"] == models["default"])
    return float(card["latency_ms"][str(card["best_batch"])])


async def _get(client: Client, path: str) -> bytes:
    return (await client.send(Request(path=path, method="GET"))).body


@contextlib.asynccontextmanager
async def _kept_busy(client: Client, long: Request) -> Any:
    """Sends the long request again whenever it is answered; yields how often, in a list of one."""
    sent = [0]

    async def again() -> None:
        while True:
            sent[0] += 1
            try:
                await client.send(long)
            except NoResponse:
                await asyncio.sleep(_POLL_S)

    task = asyncio.create_task(again())
    try:
        yield sent
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _leave(client: Client, long: Request) -> float:
    """Milliseconds from the end of the long request's connection to that of the last batch."""
    await _until(client, busy=False)
    task = asyncio.create_task(client.send(long))
    await _until(client, busy=True)
    await asyncio.sleep(_BUSY_S)
    batches = await _metric(client, "heatlens_batches_total")
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    begun = last = time.monotonic()
    while time.monotonic() - last < _QUIET_S:
        await asyncio.sleep(_POLL_S)
        found = await _metric(client, "heatlens_batches_total")
        if found > batches:
            batches, last = found, time.monotonic()
    return 1000 * (last - begun)


async def _until(client: Client, *, busy: bool) -> None:
    """Wait until the devices have jobs, or none."""
    async with asyncio.timeout(_TIMEOUT_S):
        while (await _metric(client, "heatlens_queue_depth") > 0) != busy:  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)


async def _metric(client: Client, name: str) -> float:
    """Sum of a metric over its labels."""
    text = (await _get(client, "/metrics")).decode()
    return sum(map(float, re.findall(rf"^{name}\{{[^}}]*\}} (\S+)", text, re.MULTILINE)))


if __name__ == "__main__":
    typer.run(main)
