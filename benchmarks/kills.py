"""One device worker after another is killed under load: is any request lost?

    python -m benchmarks.kills                 # a kill every 3 s for 60 s
    python -m benchmarks.kills --seconds 20 --clients 2
    python -m benchmarks.kills --recoveries 5  # of one device: seconds from a kill to an answer

Clients wait for their answers in a closed loop; every answer is compared with its own image's.
Nothing may come but answers: a request whose worker dies is sent again to another one. The budget
of restarts is widened for this run, since the service is meant to give up on a device that dies
twenty times a minute.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.loading import TIMEOUT_S, images_of, measure
from benchmarks.servers import Server, heatlens, model_entry, role_of
from benchmarks.timing import machine_line
from service.cli.bench.client import Client
from service.cli.bench.load import Bounds, Closed, Summary, run_in_loop
from service.cli.bench.requests import Request, image_requests
from service.cli.bench.verify import learn


def main(
    *,
    seconds: Annotated[float, typer.Option(help="How long clients send.")] = 60.0,
    every: Annotated[float, typer.Option(help="Seconds from one kill to the next.")] = 3.0,
    clients: Annotated[int, typer.Option(min=1, max=64)] = 4,
    pictures: Annotated[Path | None, typer.Option(help="Folder; drawn without.")] = None,
    recoveries: Annotated[int, typer.Option(help="Only time so many, one after another.")] = 0,
) -> None:
    """Kill, count, and judge: exit code 1 if anything but right answers came."""
    console = Console(width=120)
    requests = image_requests(images_of(pictures, count=16))
    with heatlens(
        models=[model_entry("efficientnet_lite0")],
        server={"http-workers": "1", "devices": "cpu:0" if recoveries else "auto"},
        settings={"WORKERS__RESTARTS": "1000"},
    ) as server:
        ready_s = server.wait_ready()
        console.print(machine_line(), highlight=False)
        if recoveries:
            took = run_in_loop(_recover(server, requests, recoveries))
            console.print(f"ready after {ready_s:.1f} s; from a kill to an answer:", *took)
            return
        load = Closed(clients=clients)
        summary = run_in_loop(_run(server, requests, load, seconds=seconds, every=every))
    console.print(summary, highlight=False)
    raise typer.Exit(1 if summary.failed else 0)


async def _run(
    server: Server, requests: Sequence[Request], load: Closed, *, seconds: float, every: float
) -> Summary:
    async with Client(server.url(), requests, timeout_s=TIMEOUT_S) as client:
        verifier = await learn(client)
    kills = asyncio.create_task(_kill(server, every))
    measured = await measure(
        server, requests, load, Bounds(warmup_s=0, duration_s=seconds), check=verifier.is_right
    )
    kills.cancel()
    with suppress(asyncio.CancelledError):
        await kills
    return measured.summary


async def _recover(server: Server, requests: Sequence[Request], times: int) -> list[str]:
    """Seconds from the death of the only device to the next answer, each time."""
    took = []
    async with Client(server.url(), requests, timeout_s=TIMEOUT_S) as client:
        for _ in range(times):
            await client.check_service()
            _kill_one(server, 0)
            sample = await client.call()
            took.append(f"{sample.latency:.2f} s" if sample.ok else sample.code)
    return took


async def _kill(server: Server, every: float) -> None:
    """Kill device workers in turns."""
    for turn in itertools.count():
        await asyncio.sleep(every)
        _kill_one(server, turn)


def _kill_one(server: Server, turn: int) -> None:
    """Kill a device worker; only processes that this run's service started."""
    workers = sorted((p for p in server.processes() if role_of(p) == "device"), key=lambda p: p.pid)
    if workers:
        os.kill(workers[turn % len(workers)].pid, signal.SIGKILL)


if __name__ == "__main__":
    typer.run(main)
