"""What an answer costs beside the network: each stage, and the whole beside the least server.

    python -m benchmarks.host
    python -m benchmarks.host --models efficientnet_lite0,resnet50 --precisions fp32,bf16 --pictures FOLDER

First table: processor time of each stage of an answer with default options (heatmap, overlay,
statistics), in one thread, beside the calls of the libraries that no server can do without, for the
same bytes. Second table: the service and a minimal server (`peers/minimal_server.py`), both running,
loaded in turns by 1, 8 and 32 clients; ratios are taken within a round. The minimal server checks
nothing, and resizes less exactly.

Takes about a minute, and 3 minutes for each model and precision.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.host_stages import Stage, pictures_of, stages_of
from benchmarks.loading import Measured, images_of, measure
from benchmarks.servers import Server, free_port, heatlens, model_entry
from benchmarks.timing import machine_line, rounds_of
from service.cli.bench.load import Bounds, Closed, run_in_loop
from service.cli.bench.requests import Request, image_requests
from service.hardware import available_cores

CLIENTS = (1, 8, 32)
ANSWERS: Mapping[str, tuple[dict[str, str], str]] = {
    "heatmap": ({"outputs": "heatmap", "statistics": "false"}, "/explain"),
    "defaults": ({}, "/explain?defaults=1"),
}
"""What both servers are asked for: the options of Heatlens, and the path of the minimal server."""

WARMUP_S = 1.0
_READY_S = 120.0


def stages_table(rounds: Sequence[Mapping[str, float]], stages: Mapping[str, Stage]) -> Table:
    """Milliseconds an answer of each stage and its floor, and their ratio within the rounds."""
    table = Table("stage", "core-ms", "floor", "ratio (quartiles)", box=box.MARKDOWN)
    for name in stages:
        _add(table, name, [r[name] for r in rounds], [r.get(_floor(name), 0.0) for r in rounds])
    floors = [_floor(name) for name, stage in stages.items() if stage.floor]
    ours = [sum(r[name] for name in stages) for r in rounds]
    _add(table, "all", ours, [sum(r[name] for name in floors) for r in rounds])
    return table


def _floor(name: str) -> str:
    return f"{name}, floor"


def _add(table: Table, name: str, ours: Sequence[float], floor: Sequence[float]) -> None:
    cells = [f"{1000 * statistics.median(ours):.3f}", "-", "-"]
    if any(floor):
        cells[1] = f"{1000 * statistics.median(floor):.3f}"
        cells[2] = spread([a / b for a, b in zip(ours, floor, strict=True)])
    table.add_row(name, *cells)


def spread(ratios: Sequence[float]) -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else list(ratios) * 3
    return f"{middle:.2f}x ({low:.2f}-{high:.2f})"


@dataclass(frozen=True, slots=True)
class Row:
    """One answer of one model at one number of clients, of both servers, by round."""

    ours: list[Measured] = field(default_factory=list)
    least: list[Measured] = field(default_factory=list)


def minimal(model: str, precision: str) -> Server:
    """The minimal server, not started yet."""
    port = str(free_port())
    return Server(
        "the minimal server",
        [sys.executable, "-m", "benchmarks.peers.minimal_server", port, str(available_cores())],
        port=int(port),
        ready_path="/health",
        env={"PEER_MODEL": model, "PEER_PRECISION": precision, "OMP_NUM_THREADS": "1"},
    )


def measure_servers(
    model: str, precision: str, images: Sequence[bytes], *, rounds: int, bounds: Bounds
) -> dict[tuple[str, int], Row]:
    """Load both servers in turns, the other one first in every other round."""
    entry = model_entry(model, precision=precision)
    rows: dict[tuple[str, int], Row] = {}
    with heatlens(models=[entry], settings={"LIMITS__MAX_WAIT_S": "60"}) as ours:
        ours.wait_ready(timeout_s=_READY_S)
        with minimal(model, precision) as least:
            least.wait_ready(timeout_s=_READY_S)
            for number in range(rounds):
                for name, (options, path) in ANSWERS.items():
                    asked = image_requests(images, options=options)
                    plain = [Request(path=path, body=data) for data in images]
                    for clients in CLIENTS:
                        row = rows.setdefault((name, clients), Row())
                        turns = [(ours, asked, row.ours), (least, plain, row.least)]
                        for server, requests, found in turns[:: 1 if number % 2 else -1]:
                            load = Closed(clients=clients)
                            found.append(run_in_loop(measure(server, requests, load, bounds)))
    return rows


def servers_table(rows: Mapping[tuple[str, int], Row]) -> Table:
    """Answers per second, latency and processor time of both, and the ratio of the latter two."""
    columns = ("answer", "clients", "answers/s", "minimal", "ratio", "p50 ms", "minimal")
    more = ("core-ms", "device", "HTTP", "minimal", "ratio (quartiles)")
    table = Table(*columns, *more, box=box.MARKDOWN)
    for (name, clients), row in rows.items():
        ours, least = row.ours, row.least
        pairs = list(zip(ours, least, strict=True))
        faster = [a.summary.throughput / b.summary.throughput for a, b in pairs]
        table.add_row(
            name,
            str(clients),
            f"{statistics.median(m.summary.throughput for m in ours):.1f}",
            f"{statistics.median(m.summary.throughput for m in least):.1f}",
            spread(faster),
            f"{_p50(ours):.1f}",
            f"{_p50(least):.1f}",
            f"{statistics.median(m.core_ms for m in ours):.2f}",
            f"{statistics.median(m.by_role.get('device', 0.0) for m in ours):.2f}",
            f"{statistics.median(m.by_role.get('http', 0.0) for m in ours):.2f}",
            f"{statistics.median(m.core_ms for m in least):.2f}",
            spread([a.core_ms / b.core_ms for a, b in pairs]),
        )
    return table


def _p50(found: Sequence[Measured]) -> float:
    return statistics.median(m.summary.latency.p50 for m in found if m.summary.latency)


def main(
    *,
    models: Annotated[
        str, typer.Option(help="Comma-separated; empty = stages only.")
    ] = "efficientnet_lite0",
    precisions: Annotated[str, typer.Option(help="Of fp32, bf16, fp16.")] = "fp32",
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    duration: Annotated[float, typer.Option(help="Seconds of each load.")] = 2.0,
    pictures: Annotated[Path | None, typer.Option(help="Folder; drawn without.")] = None,
) -> None:
    """Measure and print one table of stages, and one of servers for each model and precision."""
    console = Console(width=200)
    images = images_of(pictures, count=16 if pictures is None else 64)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("stages", total=None)
        stages = stages_of(pictures_of(images))
        cases = {name: stage.ours for name, stage in stages.items()}
        cases |= {_floor(name): stage.floor for name, stage in stages.items() if stage.floor}
        timed = rounds_of(cases, rounds=3 * rounds, budget_s=0.05, clock=time.process_time)
        per_answer = [{k: v / len(images) for k, v in r.items()} for r in timed]
        console.print(stages_table(per_answer, stages))
        bounds = Bounds(warmup_s=WARMUP_S, duration_s=duration)
        for model in filter(None, models.split(",")):
            for precision in precisions.split(","):
                progress.update(task, description=f"{model} {precision}")
                rows = measure_servers(model, precision, images, rounds=rounds, bounds=bounds)
                console.print(f"\n[bold]{model} {precision}[/]")
                console.print(servers_table(rows))
    console.print(f"\n{machine_line('torch', 'pillow', 'numpy')}")
    console.print(f"medians of {rounds} interleaved rounds of {duration:g} s, {len(images)} images")


if __name__ == "__main__":
    typer.run(main)
