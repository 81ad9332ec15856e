"""What explaining costs over classifying: the engine beside the plain forward of the very same network.

    python -m benchmarks.engine --rounds 20

The plain forward is what anyone must do to classify the same uint8 pictures: stack, move, normalise
and run the module that the registry prepared, under `no_grad`, channels last, at the same precision
and batch size. All cases of one model and batch size are interleaved; each number is the median
over the rounds of the ratio within a round.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from msgspec import structs
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.photographs import job_for
from benchmarks.timing import Case, Comparison, compare, machine_line, rounds_of
from models.catalog import ModelSpec, default_spec
from models.engine import Engine
from models.heap import keep_heap
from models.preparation.variant import Needs
from models.registry import ModelRegistry
from models.types import ClassRef, Job, JobOptions, Operation, Outcome, Target
from models.warm_model import WarmModel

PLAIN = "plain forward"
GRADIENT_CAMS = ("gradcam", "gradcam_plus_plus", "xgradcam", "hirescam", "layercam")


def model_spec(name: str, precision: str, runtime: str = "torch") -> ModelSpec:
    """The embedded model by its name, or `source:architecture` with random weights (the time is the same)."""
    if name == default_spec().name:
        return default_spec().model_copy(update={"precision": precision, "runtime": runtime})
    source = name if ":" in name else f"torchvision:{name}"
    short = source.rpartition(":")[2]
    fields = {"name": short, "source": source, "weights": "none"}
    return ModelSpec.model_validate({**fields, "precision": precision, "runtime": runtime})


def job_maker(warm: WarmModel, batch: int) -> Callable[[Operation, JobOptions], list[Job]]:
    """Jobs on `batch` pictures of seeded noise, all with the same options."""
    height, width = warm.input_size
    noise = np.random.default_rng(0)
    pictures = noise.integers(0, 256, (batch, height, width, 3), dtype=np.uint8)

    def make(operation: Operation, options: JobOptions) -> list[Job]:
        jobs = [job_for(warm, picture, options, operation=operation) for picture in pictures]
        return [structs.replace(job, id=str(i)) for i, job in enumerate(jobs)]

    return make


def plain_cases(warm: WarmModel, jobs: list[Job]) -> dict[str, Case]:
    """The network on a ready batch, and the same from uint8 pictures (the baseline)."""
    module = warm.module_for(Needs())

    def ready() -> torch.Tensor:
        stacked = torch.from_numpy(np.stack([job.input for job in jobs]))
        return warm.normalise(stacked.to(warm.device), module=module)

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = module(inputs)
        return logits.float().cpu()  # waits for the device, as reading an answer does

    inputs = ready()
    return {PLAIN: lambda: forward(ready()), "network on a ready batch": lambda: forward(inputs)}


def engine_cases(engine: Engine, warm: WarmModel, batch: int) -> dict[str, Case]:
    """What the engine is asked for, by row of the table."""
    make = job_maker(warm, batch)
    layer = (explained_layer(warm),)
    ranks = tuple(Target(cls=ClassRef(kind="rank", value=rank)) for rank in range(1, 6))

    def explain(
        methods: tuple[str, ...] = ("gradcam",), targets: tuple[Target, ...] = ranks[:1]
    ) -> JobOptions:
        return JobOptions(methods=methods, targets=targets, layers=layer)

    wanted: dict[str, list[Job]] = {
        "predict": make("predict", JobOptions()),
        "predict + Grad-CAM of top-1": make("explain", explain()),
        "predict + five gradient CAMs": make("explain", explain(GRADIENT_CAMS)),
        "predict + Grad-CAM of top-5": make("explain", explain(targets=ranks)),
        "predict + statistics of 10 layers": make("features", JobOptions(layers=ten_layers(warm))),
    }

    return {name: engine_case(engine, jobs) for name, jobs in wanted.items()}


def engine_case(engine: Engine, jobs: list[Job]) -> Case:
    """A call that has the engine answer some jobs, each of which must succeed."""

    def run() -> None:
        for answer in engine.run(jobs):
            if not isinstance(answer, Outcome):
                raise TypeError(f"the engine answered {answer!r}")

    return run


def ten_layers(warm: WarmModel) -> tuple[str, ...]:
    """The stem, eight blocks spread over the depth, and the layer that is explained."""
    rows = [row for row in warm.info.layers if row.spatial and "." in row.name]
    blocks: list[str] = []
    for row in rows:
        inside = any(row.name.startswith(f"{block}.") for block in blocks)
        parent = any(other.name.startswith(f"{row.name}.") for other in rows)
        if parent and not inside and row.type != "Sequential":
            blocks.append(row.name)
    chosen = (blocks[round(i)] for i in np.linspace(0, len(blocks) - 1, 8))
    return (warm.info.feature_layers[0], *chosen, explained_layer(warm))


def explained_layer(warm: WarmModel) -> str:
    """The model's recommended layer."""
    if warm.target_layer is None:
        raise SystemExit(f"{warm.name} has no layer to explain")
    return warm.target_layer


def results_table(rows: dict[tuple[str, int], dict[str, Comparison]], *, order: list[str]) -> Table:
    """One column for each model and batch size: the ratio, its quartiles, and milliseconds a picture."""
    table = Table(box=box.MARKDOWN)
    table.add_column("over the plain forward of the same batch")
    for model, batch in rows:
        table.add_column(f"{model} b{batch}", justify="right")
    for name in order:
        cells = []
        for (_, batch), comparisons in rows.items():
            c = comparisons[name]
            milliseconds = 1000 * c.seconds / batch
            cells.append(f"{c.ratio:.3f}x ({c.low:.2f}-{c.high:.2f}) {milliseconds:.1f} ms")
        table.add_row(name, *cells)
    return table


def main(
    *,
    models: Annotated[
        str, typer.Option(help="Names, comma-separated; source:NAME for other sources.")
    ] = "efficientnet_lite0,resnet50",
    batches: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1,8",
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 15,
    budget_s: Annotated[float, typer.Option(help="Seconds for each case in a round.")] = 0.25,
    device: Annotated[str, typer.Option(help="cpu or cuda:N.")] = "cpu",
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    runtime: Annotated[str, typer.Option(help="torch, openvino or auto.")] = "torch",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Torch threads; torch's own choice without.")
    ] = None,
    processor: Annotated[
        bool, typer.Option(help="By processor time, which others disturb less than the clock.")
    ] = False,
) -> None:
    """Measure explain over the plain forward and print one table."""
    if device == "cpu":
        # As workers do: without it tensors above 32 MB are mapped and faulted in at every call.
        keep_heap()
    if threads is not None:
        torch.set_num_threads(threads)
    clock = time.process_time if processor else time.perf_counter
    console = Console(width=200)
    registry = ModelRegistry(device, Path.cwd())
    engine = Engine(registry)
    sizes = [int(size) for size in batches.split(",")]
    rows: dict[tuple[str, int], dict[str, Comparison]] = {}
    with Progress(console=Console(stderr=True)) as progress:
        names = models.split(",")
        task = progress.add_task("measuring", total=len(names) * len(sizes) * rounds)
        for name in names:
            spec = model_spec(name, precision, runtime)
            progress.update(task, description=f"loading {spec.name}")
            registry.load(spec)
            warm = registry.get(spec.name, spec.version)
            for batch in sizes:
                progress.update(task, description=f"{spec.name}, batch {batch}")
                cases = plain_cases(warm, job_maker(warm, batch)("predict", JobOptions()))
                cases |= engine_cases(engine, warm, batch)
                measured = []
                for seconds in rounds_of(cases, rounds=rounds, budget_s=budget_s, clock=clock):
                    measured.append(seconds)
                    progress.advance(task)
                rows[spec.name, batch] = compare(measured, baseline=PLAIN)
            registry.unload(spec.name, spec.version)
    console.print(results_table(rows, order=list(cases)))
    console.print(
        f"{machine_line('torch')}, {torch.get_num_threads()} threads, {device}, {precision}, {runtime}"
    )
    console.print(f"median of {rounds} interleaved rounds (quartiles), milliseconds a picture")


if __name__ == "__main__":
    typer.run(main)
