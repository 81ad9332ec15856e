"""What jobs were expected to cost, over what they cost: random options on the real engine.

    OMP_NUM_THREADS=1 python -m benchmarks.price --jobs 200

Both sides are processor time, so that other work on the machine counts as little as possible: the
plain forward is timed anew beside every job, and its time is what the price is computed from.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from msgspec import structs
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.engine import model_spec
from benchmarks.photographs import job_for
from benchmarks.timing import machine_line
from models.engine import Engine
from models.heap import keep_heap
from models.methods import METHODS
from models.price import Price, price
from models.registry import ModelRegistry
from models.suspended import Suspended
from models.types import ClassRef, Failure, Job, JobOptions, ModelInfo, Operation, Target
from models.warm_model import WarmModel

KINDS = ("output", "input", "grad_output", "grad_input")
MEASURES = ("average_drop", "increase", "deletion", "insertion", "road")


def sample(draw: random.Random, info: ModelInfo) -> tuple[Operation, JobOptions]:
    """Random options of any operation, as a request might ask for them."""
    operation: Operation = draw.choice(["predict", "explain", "explain", "explain", "features"])
    target_layer = info.card.target_layer or ""
    if operation == "predict":
        described = draw.random() < 0.5
        layers = (target_layer,) if described else ()
        return operation, JobOptions(targets=(), statistics=described, layers=layers)
    ranks = range(1, 1 + draw.choice([1, 1, 1, 2, 3, 5, 10]))
    targets = tuple(Target(cls=ClassRef(kind="rank", value=rank)) for rank in ranks)
    maps = [layer.name for layer in info.layers if layer.spatial and layer.usable]
    number = draw.choice([0, 0, 1, 2, 4, 8, 16, 32, 64])
    layers = tuple(draw.sample(maps, min(number, len(maps)))) or (target_layer,)
    layers = tuple(layer.name for layer in info.layers if layer.name in layers)
    if operation == "features":
        return operation, JobOptions(
            targets=targets,
            layers=layers,
            statistics=True,
            kinds=tuple(draw.sample(KINDS, draw.choice([1, 1, 2, 4]))),
            channels=draw.choice([1, 16, 64]),
            grid=draw.random() < 0.3,
        )
    usable = [support.name for support in info.card.methods if support.applicable]
    if layers != (target_layer,):
        usable.remove("cam")
    return operation, JobOptions(
        targets=targets,
        layers=layers,
        statistics=draw.random() < 0.5,
        methods=tuple(draw.sample(usable, draw.choice([1, 1, 1, 2, 3, 6]))),
        fuse=draw.choice(["none", "none", "mean"]),
        samples=draw.choice([None, None, 1, 4, 16, 64]),
        steps=draw.choice([None, None, 4, 16, 64]),
        faithfulness=tuple(draw.sample(MEASURES, draw.choice([0, 0, 0, 0, 1, 2]))),
    )


def main(
    *,
    jobs: Annotated[int, typer.Option(help="Sampled jobs.")] = 200,
    model: str = "efficientnet_lite0",
    precision: str = "fp32",
    longest_s: Annotated[float, typer.Option(help="Skip jobs that should take longer.")] = 3.0,
    seed: int = 0,
    worst: Annotated[int, typer.Option(help="Show the jobs that were priced worst.")] = 0,
) -> None:
    """Compare prices with costs."""
    # As a device worker does.
    keep_heap()
    torch.set_num_threads(1)
    registry = ModelRegistry("cpu", Path())
    registry.load(spec := model_spec(model, precision))
    warm = registry.get(spec.name, spec.version)
    engine, draw = Engine(registry), random.Random(seed)
    pixels = np.random.default_rng(seed)
    console, rows, longest_step_ms = Console(), [], 0.0
    while len(rows) < jobs:
        operation, options = sample(draw, warm.info)
        if price(operation, options, warm.info).device_ms > 1000 * longest_s:
            continue
        picture = pixels.integers(0, 256, (*warm.input_size, 3), dtype=np.uint8)
        job = job_for(warm, picture, options, operation=operation)
        expected = price(operation, options, _with_latency(engine, warm, job))
        spent_ms, step_ms = _run(engine, job)
        longest_step_ms = max(longest_step_ms, step_ms)
        rows.append((operation, options, expected, spent_ms))
    console.print(machine_line())
    console.print(_table(rows))
    console.print(f"The longest step took {longest_step_ms:.0f} ms of processor time.")
    ranked = sorted(rows, key=lambda row: abs(np.log(_ratio(row))))
    for operation, options, expected, spent_ms in ranked[len(ranked) - worst :]:
        asked = structs.asdict(options) | {"targets": len(options.targets)}
        shown = {k: v for k, v in asked.items() if v != getattr(JobOptions(), k)}
        shown["layers"] = f"{len(options.layers)}: {options.layers[:2]}"
        console.print(f"{expected.device_ms:.0f} over {spent_ms:.0f} ms", operation, shown)


Row = tuple[Operation, JobOptions, Price, float]


def _ratio(row: Row) -> float:
    return row[2].device_ms / row[3]


def _table(rows: Sequence[Row]) -> Table:
    table = Table(box=box.MARKDOWN)
    for heading in ("jobs", "number", "5 %", "median", "95 %", "within 2x"):
        table.add_column(heading, justify="left" if heading == "jobs" else "right")
    for label, chosen in (
        ("all", rows),
        ("predict", [row for row in rows if row[0] == "predict"]),
        ("features", [row for row in rows if row[0] == "features"]),
        ("explain, one pass", [r for r in rows if r[0] == "explain" and not _has_steps(r)]),
        ("explain, further passes", [r for r in rows if r[0] == "explain" and _has_steps(r)]),
    ):
        ratios = np.array([_ratio(row) for row in chosen])
        low, middle, high = np.quantile(ratios, [0.05, 0.5, 0.95])
        near = np.mean((ratios > 0.5) & (ratios < 2))
        cells = [f"{low:.2f}", f"{middle:.2f}", f"{high:.2f}", f"{100 * near:.0f} %"]
        table.add_row(label, str(len(chosen)), *cells)
    return table


def _has_steps(row: Row) -> bool:
    costs = {METHODS[name].cost for name in row[1].methods}
    return bool(row[1].faithfulness or costs & {"passes", "many"})


def _with_latency(engine: Engine, warm: WarmModel, job: Job) -> ModelInfo:
    """The model as its card would be if it were timed now, from one image."""
    plain = structs.replace(job, operation="predict", options=JobOptions(targets=()))
    times = []
    for _ in range(3):
        started = time.process_time()
        engine.run([plain])
        times.append(1000 * (time.process_time() - started))
    best = warm.info.card.best_batch
    latency_ms = {size: size * min(times) for size in {1, best}}
    card = structs.replace(warm.info.card, latency_ms=latency_ms)
    return structs.replace(warm.info, card=card)


def _run(engine: Engine, job: Job) -> tuple[float, float]:
    """Milliseconds of a job, and of its longest step."""
    steps: list[float] = []
    results: Sequence[Any] = [None]
    while not steps or isinstance(results[0], Suspended):
        started = time.process_time()
        results = engine.advance(results) if steps else engine.run([job])
        steps.append(1000 * (time.process_time() - started))
    if isinstance(results[0], Failure):
        raise SystemExit(f"A job failed: {results[0]}")
    return sum(steps), max(steps)


if __name__ == "__main__":
    typer.run(main)
