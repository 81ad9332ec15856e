"""Tens of thousands of mixed requests with everything that goes wrong: does anything get lost, does anything grow?

    python -m benchmarks.soak
    python -m benchmarks.soak --requests 2000 --clients 8

Sends predictions, explanations and features, bad bodies and options, requests without time left,
and clients that leave in the middle of the body or while they wait; loads and unloads models
through the administration; kills one device worker half way. Samples resident memory, open files
and sockets of every process of the service, and reports their slopes without the first third of
each process's life.

Exit code 1 if the ledger does not balance: every request must end as an answer, a typed error, or a
client that left; no answer may be another request's; and the service must have counted as many
requests as were sent. Ends after --minutes at the latest, and up to 2 minutes for the last answers
and the killed worker's successor.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import httpx
import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.loading import images_of
from benchmarks.resources import Process, Sampler, slope_per_10k
from benchmarks.servers import Server, heatlens, model_entry, role_of
from benchmarks.soak_client import Ledger, Soaker
from benchmarks.soak_requests import draw, mixture
from service.cli.bench.load import run_in_loop

ADMIN_KEY = "soak"
SECOND_MODEL = "resnet18"
_SAMPLE_S = 2.0
_SETTLE_S = 10.0
_POLL_S = 0.2
_RECOVERY_S = 60.0
_COUNTED = re.compile(
    r'^http_request_duration_seconds_count\{method="POST",route="(?!/v2)[^"]*",'
    r'status="(\d+)"\} ([\d.e+]+)',
    re.MULTILINE,
)


def main(
    *,
    requests: Annotated[int, typer.Option(min=10)] = 50_000,
    clients: Annotated[int, typer.Option(min=1, max=256)] = 16,
    minutes: Annotated[float, typer.Option(help="Send nothing new after this time.")] = 30.0,
    loads: Annotated[int, typer.Option(help="Hot loads, spread over the run.")] = 10,
    http_workers: Annotated[str, typer.Option(help="As of heatlens serve.")] = "2",
    precision: Annotated[str, typer.Option()] = "fp32",
    pictures: Annotated[Path | None, typer.Option(help="Folder; drawn without.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Soak the service, report, and judge."""
    console = Console(width=120)
    models = [model_entry("efficientnet_lite0", precision=precision), model_entry(SECOND_MODEL)]
    with heatlens(
        models=models,
        server={"http-workers": http_workers},
        settings={"SECURITY__ADMIN_KEYS": ADMIN_KEY, "LIMITS__MAX_WAIT_S": "2"},
    ) as server:
        server.wait_ready()
        kinds = mixture(images_of(pictures, count=32))
        chosen = draw(kinds, requests, seed=seed)
        with Progress(console=Console(stderr=True)) as progress:
            task = progress.add_task("soaking", total=requests)
            soak = Soak(server, progress=lambda done: progress.update(task, completed=done))
            soaker = Soaker(
                server.url(), chosen, end=time.monotonic() + 60 * minutes, watch=soak.watch
            )
            run_in_loop(soak.run(soaker, clients=clients, loads=loads, requests=requests))
        ledger = soaker.ledger
        counted = settled_count(server, expected=ledger.sent)
        for table in (ledger_table(ledger, counted), growth_table(soak.sampler)):
            console.print(table)
        console.print(f"hot loads: {dict(soak.loads)}; {soak.kill}", highlight=False)
        balanced = ledger.balances and sum(counted.values()) == ledger.sent
    console.print("the ledger balances" if balanced else "[red]the ledger does not balance[/]")
    raise typer.Exit(0 if balanced else 1)


class Soak:
    """What happens beside the requests: samples, hot loads, and the death of a worker."""

    def __init__(self, server: Server, *, progress: Callable[[int], None]) -> None:
        self.sampler = Sampler(server)
        self.loads: Counter[str] = Counter()
        self.kill = "no worker was killed"
        self._server = server
        self._progress = progress
        self._done = 0
        self._milestones: list[tuple[int, asyncio.Event]] = []

    def watch(self, done: int) -> None:
        """Note how far the requests are."""
        self._done = done
        self._progress(done)
        for milestone, reached in self._milestones:
            if done >= milestone:
                reached.set()

    async def _until(self, done: int) -> None:
        """Wait until so many requests are done."""
        reached = asyncio.Event()
        self._milestones.append((done, reached))
        await reached.wait()

    async def run(self, soaker: Soaker, *, clients: int, loads: int, requests: int) -> None:
        """Send everything; what happens beside it ends with it."""
        kill = asyncio.create_task(self._kill_at(requests // 2))
        beside = [
            asyncio.create_task(self._sample()),
            asyncio.create_task(self._load(loads, requests)),
            kill,
        ]
        try:
            await soaker.run(clients)
            await asyncio.wait([kill], timeout=_RECOVERY_S if self._done >= requests // 2 else 0)
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
            self.sampler.look(self._done)

    async def _sample(self) -> None:
        while True:
            await asyncio.to_thread(self.sampler.look, self._done)
            await asyncio.sleep(_SAMPLE_S)

    async def _load(self, loads: int, requests: int) -> None:
        """Swap the model that is being asked, and unload and load another one, in turns."""
        verbs = (("efficientnet_lite0", "load"), (SECOND_MODEL, "unload"), (SECOND_MODEL, "load"))
        headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
        async with httpx.AsyncClient(trust_env=False, timeout=120, headers=headers) as client:
            for number in range(loads):
                await self._until((number + 1) * requests // (loads + 1))
                model, verb = verbs[number % len(verbs)]
                url = self._server.url(f"/v2/repository/models/{model}/{verb}")
                try:
                    answer = await client.post(url)
                    end = answer.json().get("code", str(answer.status_code))
                except (httpx.TransportError, ValueError) as error:
                    end = type(error).__name__
                self.loads[f"{verb}: {end}"] += 1

    async def _kill_at(self, done: int) -> None:
        """Kill one device worker, and measure how long it takes until another is in its place."""
        await self._until(done)
        workers = [p for p in self._server.processes() if role_of(p) == "device"]
        if not workers:
            return
        os.kill(workers[0].pid, signal.SIGKILL)  # a child of the service that this run started
        begun = time.monotonic()
        self.kill = "the killed worker was not replaced"
        async with httpx.AsyncClient(trust_env=False) as client:
            while True:
                await asyncio.sleep(_POLL_S)
                with suppress(httpx.TransportError):
                    ready = (await client.get(self._server.url("/readyz"))).json()
                    devices = ready["devices"]
                    if all(d["ready"] for d in devices) and any(d["restarts"] for d in devices):
                        seconds = time.monotonic() - begun
                        self.kill = f"the killed worker was replaced after {seconds:.1f} s"
                        return


def settled_count(server: Server, *, expected: int) -> Counter[str]:
    """Requests that the service has counted, by status; waits a little for those under way."""
    counted: Counter[str] = Counter()
    end = time.monotonic() + _SETTLE_S
    while time.monotonic() < end:
        text = httpx.get(server.url("/metrics"), trust_env=False).text
        counted = Counter()
        for status, number in _COUNTED.findall(text):
            counted[status] += int(float(number))
        if sum(counted.values()) >= expected:
            break
        time.sleep(_SAMPLE_S / 4)
    return counted


def ledger_table(ledger: Ledger, counted: Counter[str]) -> Table:
    """Where every request went, as the clients saw it and as the service counted it."""
    table = Table(box=box.MARKDOWN)
    table.add_column("ledger")
    table.add_column("requests", justify="right")
    rows: list[tuple[str, object]] = [
        ("sent", ledger.sent),
        ("answered", ledger.answered),
        ("typed errors", ledger.typed),
        *((f"- {code}", number) for code, number in ledger.codes.most_common()),
        ("left by themselves", ledger.gone),
        ("lost", ledger.lost.total()),
        *((f"- {why}", number) for why, number in ledger.lost.most_common()),
        ("unexpected", ledger.unexpected.total()),
        *((f"- {why}", number) for why, number in ledger.unexpected.most_common()),
        ("another request's answer", ledger.foreign),
        ("counted by the service", sum(counted.values())),
        *((f"- status {status}", number) for status, number in sorted(counted.items())),
    ]
    for name, number in rows:
        table.add_row(name, str(number))
    return table


def growth_table(sampler: Sampler) -> Table:
    """Memory, files and sockets of every process: at the end, and how they grow in 10,000 requests."""
    table = Table(box=box.MARKDOWN)
    table.add_column("process")
    for name in ("samples", "MB", "MB / 10k", "files", "files / 10k", "sockets", "sockets / 10k"):
        table.add_column(name, justify="right")
    for process in sampler.processes.values():
        last = process.samples[-1]
        table.add_row(
            f"{process.role} {process.pid}",
            str(len(process.samples)),
            f"{last.rss_mb:.1f}",
            _slope(process, "rss_mb"),
            str(last.files),
            _slope(process, "files"),
            str(last.sockets),
            _slope(process, "sockets"),
        )
    return table


def _slope(process: Process, attribute: str) -> str:
    return f"{slope_per_10k(process, attribute):+.2f}"


if __name__ == "__main__":
    typer.run(main)
