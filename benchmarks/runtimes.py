"""What OpenVINO is worth: the engine on it beside the engine on fused torch, request by request.

    python -m benchmarks.runtimes --threads 1

Both hold the same network in the same process and answer the same jobs in turns. The ratio is the
median over the rounds of torch's time over OpenVINO's within a round: by the processor's time of
all threads, which others on the machine disturb least, and by the clock. What `runtime = "auto"`
makes of it stands below each table.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.engine import engine_case, explained_layer, job_maker, model_spec, ten_layers
from benchmarks.timing import Case, machine_line, rounds_of
from models.engine import Engine
from models.registry import ModelRegistry
from models.types import Job, JobOptions
from models.warm_model import WarmModel

RUNTIMES = ("torch", "openvino")


def jobs_of(warm: WarmModel, batch: int) -> dict[str, list[Job]]:
    """What is asked, by row of the table."""
    make, layer = job_maker(warm, batch), (explained_layer(warm),)
    return {
        "predict": make("predict", JobOptions()),
        "predict + Grad-CAM": make("explain", JobOptions(methods=("gradcam",), layers=layer)),
        "the same + statistics of that layer": make(
            "explain", JobOptions(methods=("gradcam",), layers=layer, statistics=True)
        ),
        "predict + statistics of 10 layers": make("features", JobOptions(layers=ten_layers(warm))),
    }


def measure(
    cases: dict[str, Case], *, rounds: int, budget_s: float, clock: Callable[[], float]
) -> tuple[float, float, float]:
    """Milliseconds of a call on torch and on OpenVINO, and the ratio of the two."""
    found = list(rounds_of(cases, rounds=rounds, budget_s=budget_s, clock=clock))
    ours, theirs = (1000 * statistics.median(r[name] for r in found) for name in RUNTIMES)
    return ours, theirs, statistics.median(r["torch"] / r["openvino"] for r in found)


def main(
    *,
    models: Annotated[str, typer.Option(help="Names, comma-separated.")] = (
        "efficientnet_lite0,resnet50"
    ),
    precisions: Annotated[str, typer.Option(help="Of fp32, bf16.")] = "fp32,bf16",
    batches: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1,8",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in turns.")] = 9,
    budget_s: Annotated[float, typer.Option(help="Seconds for each case in a round.")] = 0.25,
    threads: Annotated[int, typer.Option(min=1, help="Of either runtime.")] = 1,
) -> None:
    """Measure each model and precision, and print one table for each."""
    torch.set_num_threads(threads)
    console = Console(width=160)
    for name in models.split(","):
        for precision in precisions.split(","):
            warm = {r: loaded(name, precision, r) for r in (*RUNTIMES, "auto")}
            engines = {r: engine for r, (engine, _) in warm.items()}
            table = Table(box=box.MARKDOWN)
            table.add_column(f"{name} {precision}: ms a picture, torch / OpenVINO (ratio)")
            sizes = [int(size) for size in batches.split(",")]
            for size in sizes:
                table.add_column(f"batch {size}, processor", justify="right")
                table.add_column(f"batch {size}, clock", justify="right")
            rows = {size: jobs_of(warm["torch"][1], size) for size in sizes}
            for row in rows[sizes[0]]:
                cells = []
                for size in sizes:
                    cases = {r: engine_case(engines[r], rows[size][row]) for r in RUNTIMES}
                    for clock in (time.process_time, time.perf_counter):
                        ours, theirs, ratio = measure(
                            cases, rounds=rounds, budget_s=budget_s, clock=clock
                        )
                        cells.append(f"{ours / size:.2f} / {theirs / size:.2f} ({ratio:.2f}x)")
                table.add_row(row, *cells)
            console.print(table)
            for step in warm["auto"][1].info.card.preparation:
                console.print(f"auto: {step}", highlight=False)
    console.print(f"{machine_line('torch', 'openvino')}, {threads} threads", highlight=False)


def loaded(name: str, precision: str, runtime: str) -> tuple[Engine, WarmModel]:
    """An engine with one model, by one runtime."""
    registry, spec = ModelRegistry("cpu", Path.cwd()), model_spec(name, precision, runtime)
    registry.load(spec)
    return Engine(registry), registry.get(spec.name, spec.version)


if __name__ == "__main__":
    typer.run(main)
