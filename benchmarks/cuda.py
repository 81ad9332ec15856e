"""What uploads on a stream of their own, and recorded passes, are worth on a CUDA device.

    python -m benchmarks.cuda --rounds 20

The engine answers the same jobs with each of the two on and off, beside the plain forward of the
same batch, precision and prepared module (`benchmarks.engine`). All cases of one model, precision
and batch size are interleaved; each number is the median over the rounds of the ratio within a
round. Where a head has no closed form (vision transformers), only predictions are recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated

import torch
import typer
from msgspec import structs
from rich.console import Console
from rich.progress import Progress

from benchmarks.engine import (
    PLAIN,
    engine_case,
    explained_layer,
    job_maker,
    model_spec,
    plain_cases,
    results_table,
)
from benchmarks.timing import Case, Comparison, compare, machine_line, rounds_of
from models.cuda.graphs import Graphs
from models.cuda.recorder import GraphRecorder
from models.cuda.staging import CopyStream
from models.engine import Engine
from models.registry import ModelRegistry
from models.types import JobOptions
from models.warm_model import WarmModel


@dataclass(frozen=True)
class OneModel:
    """A registry of one model, in the form to be measured."""

    warm: WarmModel

    def get(self, _name: str, _version: str) -> WarmModel:
        """Return it, whatever it is called."""
        return self.warm


def variants(warm: WarmModel, *, batch: int) -> Iterator[tuple[str, WarmModel]]:
    """The model with uploads of their own and recorded passes off and on, by what is on."""
    card = structs.replace(warm.info.card, best_batch=batch)  # larger batches are not recorded
    warm = replace(warm, info=structs.replace(warm.info, card=card))
    for staged, recorded in product((False, True), repeat=2):
        uploads = CopyStream(warm.device) if staged else None
        graphs = (
            Graphs(GraphRecorder(warm.device), dtype=warm.dtype, patience=0) if recorded else None
        )
        on = [name for name, is_on in (("staging", staged), ("graphs", recorded)) if is_on]
        yield " + ".join(on) or "neither", replace(warm, uploads=uploads, graphs=graphs)


def cases_of(warm: WarmModel, *, batch: int) -> dict[str, Case]:
    """The plain forward, and what the engine is asked for in each variant."""
    make = job_maker(warm, batch)
    explain = JobOptions(methods=("gradcam",), layers=(explained_layer(warm),))
    wanted = {
        "predict": make("predict", JobOptions()),
        "Grad-CAM of top-1": make("explain", explain),
    }

    cases = plain_cases(warm, wanted["predict"])
    for on, variant in variants(warm, batch=batch):
        engine = Engine(OneModel(variant))
        cases |= {f"{name}, {on}": engine_case(engine, jobs) for name, jobs in wanted.items()}
    return cases


def main(
    *,
    models: Annotated[str, typer.Option(help="Names, comma-separated.")] = "resnet50,vit_b_16",
    precisions: Annotated[str, typer.Option(help="Precisions, comma-separated.")] = "fp32,bf16",
    batches: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1,8,32",
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 15,
    budget_s: Annotated[float, typer.Option(help="Seconds for each case in a round.")] = 0.1,
    device: Annotated[str, typer.Option(help="cuda or cuda:N.")] = "cuda",
) -> None:
    """Measure and print one table."""
    if not torch.cuda.is_available():
        raise SystemExit("This benchmark needs a CUDA device, and torch finds none.")
    torch.cuda.set_device(device)
    registry = ModelRegistry(device, Path.cwd())
    names, sizes = list(product(models.split(","), precisions.split(","))), batches.split(",")
    rows: dict[tuple[str, int], dict[str, Comparison]] = {}
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("measuring", total=len(names) * len(sizes) * rounds)
        for name, precision in names:
            spec = model_spec(name, precision)
            registry.load(spec)
            warm = registry.get(spec.name, spec.version)
            for size in sizes:
                measured = []
                cases = cases_of(warm, batch=int(size))
                for seconds in rounds_of(cases, rounds=rounds, budget_s=budget_s):
                    measured.append(seconds)
                    progress.advance(task)
                served = warm.info.card.precision
                rows[f"{spec.name} {served}", int(size)] = compare(measured, baseline=PLAIN)
            registry.unload(spec.name, spec.version)
    console = Console(width=400)
    console.print(results_table(rows, order=list(next(iter(rows.values())))))
    console.print(f"{torch.cuda.get_device_name(device)}, {machine_line('torch')}")
    console.print(f"median of {rounds} interleaved rounds (quartiles), milliseconds a picture")


if __name__ == "__main__":
    typer.run(main)
