"""Heatlens beside LitServe, mosec and plain FastAPI: one picture in, top-5 and a heatmap picture out.

    python -m benchmarks.peers
    python -m benchmarks.peers --quick

Each peer twice: with pytorch-grad-cam as its README shows, and tuned as an expert would
(`explainers.py`). Same pictures, same weights, the same layer; every server is a process of its
own, started and ended in each round, so that none idles beside another. Cases are interleaved in
rounds, beginning with another one each time; ratios are taken within a round, and the table shows
medians over the rounds.

Takes rounds x models x (8 starts of about 10 s, and 12 rows x 3 loads x (2 s + duration)): about 40
minutes as it stands, 6 minutes with --quick; at most 40 s more a load if a server hangs.
"""

from __future__ import annotations

import asyncio
import statistics
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.loading import TIMEOUT_S, images_of, measure
from benchmarks.peers.answers import first_class
from benchmarks.peers.cases import Asking, Case, cases
from benchmarks.servers import Server, ServerFailed
from benchmarks.timing import machine_line
from models.types import Struct
from service.cli.bench.client import Client, NoResponse
from service.cli.bench.load import Bounds, Closed, Summary, run_in_loop
from service.cli.bench.requests import Request

CLIENTS = (1, 8, 32)
WARMUP_S = 2.0  # the first answers of a full queue come late
AGREEING = 8  # pictures whose first class is compared
_START_S = 120.0


class Row(Struct):
    """One row of the table: a summary by number of clients, for each round."""

    name: str
    group: str
    rounds: list[dict[int, Summary]]
    classes: list[int]


def main(
    *,
    models: Annotated[str, typer.Option(help="Comma-separated.")] = "resnet50,efficientnet_lite0",
    precisions: Annotated[str, typer.Option(help="Of Heatlens.")] = "fp32,bf16",
    runtimes: Annotated[str, typer.Option(help="Of Heatlens: auto, torch, openvino.")] = "auto",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    duration: Annotated[float, typer.Option(help="Seconds of each load.")] = 6.0,
    only: Annotated[
        str, typer.Option(help="Parts of the names of the cases to run, comma-separated.")
    ] = "",
    pictures: Annotated[Path | None, typer.Option(help="Folder; drawn without.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One round, one model, 2 s.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers.")] = None,
) -> None:
    """Measure and print one table for each model."""
    console = Console(width=140)
    if quick:
        models, rounds, duration = models.rpartition(",")[2], 1, 2.0
    bounds = Bounds(warmup_s=WARMUP_S, duration_s=duration)
    data = images_of(pictures)
    document: dict[str, list[Row]] = {}
    with Progress(console=Console(stderr=True)) as progress:
        for model in models.split(","):
            found = cases(model, precisions.split(","), runtimes.split(","))
            chosen = [c for c in found if any(part in c.name for part in only.split(","))]
            task = progress.add_task(model, total=rounds * len(chosen))
            rows: dict[str, Row] = {}
            for number in range(rounds):
                shift = number % len(chosen)
                for case in chosen[shift:] + chosen[:shift]:
                    progress.update(task, description=f"{model}: {case.name}")
                    _run_case(case, data, bounds, rows)
                    progress.advance(task)
            document[model] = list(rows.values())
            console.print(f"\n[bold]{model}[/]")
            console.print(results_table(document[model]))
            console.print(_agreement(document[model]), highlight=False)
    console.print(f"\n{machine_line('torch', 'grad-cam', 'torchcam', 'litserve', 'mosec')}")
    console.print(f"median of {rounds} rounds of {duration:g} s; answers/s (p50 / p99 ms)")
    if json_file is not None:
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=2))


def _run_case(case: Case, data: list[bytes], bounds: Bounds, rows: dict[str, Row]) -> None:
    with case.start() as server:
        server.wait_ready(timeout_s=_START_S)
        for name, asking in case.asked.items():
            summaries, classes = run_in_loop(_measure(server, asking, data, bounds))
            row = rows.setdefault(
                name, Row(name=name, group=case.group, rounds=[], classes=classes)
            )
            row.rounds.append(summaries)


async def _measure(
    server: Server, asking: Asking, data: list[bytes], bounds: Bounds
) -> tuple[dict[int, Summary], list[int]]:
    requests = asking(data)
    await _wait_for_answer(server, requests[0])
    async with Client(server.url(), timeout_s=TIMEOUT_S) as client:
        classes = [first_class((await client.send(r)).body) for r in requests[:AGREEING]]
    summaries = {}
    for clients in CLIENTS:
        measured = await measure(server, requests, Closed(clients=clients), bounds)
        summaries[clients] = measured.summary
    return summaries, classes


async def _wait_for_answer(server: Server, request: Request) -> None:
    """Wait for the first answer: some servers listen before their workers have loaded the model.

    Raises:
        ServerFailed: it does not come.
    """
    last = "no answer"
    async with Client(server.url(), timeout_s=5.0) as client:
        for _ in range(round(_START_S)):
            try:
                response = await client.send(request)
            except NoResponse:
                pass
            else:
                if response.status == 200:
                    return
                last = f"status {response.status}"
            await asyncio.sleep(1.0)
    raise ServerFailed(f"{server.name} does not explain: {last}.\n{server.log_end()}")


def results_table(rows: list[Row]) -> Table:
    """Throughput and latency of every row, and the rows of Heatlens over the best documented and tuned peer."""
    table = Table(box=box.MARKDOWN)
    table.add_column("")
    for clients in CLIENTS:
        table.add_column(f"{clients} client{'s' if clients > 1 else ''}", justify="right")
    ours = [row for row in rows if row.name.startswith("Heatlens")]
    for row in [r for r in rows if r not in ours] + ours:
        table.add_row(row.name, *(_cell(row, clients) for clients in CLIENTS))
    for row in ours:
        for group in ("documented", "tuned"):
            peers = [peer for peer in rows if peer.group == group]
            if peers:
                ratios = (ratio(row, peers, clients) for clients in CLIENTS)
                table.add_row(f"{row.name} / best {group}", *(f"{r:.2f}x" for r in ratios))
    return table


def ratio(row: Row, peers: list[Row], clients: int) -> float:
    """Median over the rounds of (throughput of the row / that of the round's best peer)."""
    found = []
    for number, mine in enumerate(row.rounds):
        best = max(peer.rounds[number][clients].throughput for peer in peers)
        found.append(mine[clients].throughput / best if best else float("inf"))
    return statistics.median(found)


def _cell(row: Row, clients: int) -> str:
    summaries = [by_clients[clients] for by_clients in row.rounds]
    throughput = statistics.median(s.throughput for s in summaries)
    latencies = [s.latency for s in summaries if s.latency]
    failed = sum(s.failed for s in summaries)
    if not latencies:
        return "no answer"
    p50 = statistics.median(latency.p50 for latency in latencies)
    p99 = statistics.median(latency.p99 for latency in latencies)
    return f"{throughput:.1f} ({p50:.0f} / {p99:.0f}){f' {failed} failed' if failed else ''}"


def _agreement(rows: list[Row]) -> str:
    """How often the rows name the same first class as the first row."""
    reference = rows[0].classes
    lines = []
    for row in rows[1:]:
        agreeing = sum(a == b for a, b in zip(row.classes, reference, strict=True))
        if agreeing < len(reference):
            lines.append(f"{row.name}: {agreeing} of {len(reference)}")
    return "same first class on all pictures asked" if not lines else "; ".join(lines)


if __name__ == "__main__":
    typer.run(main)
