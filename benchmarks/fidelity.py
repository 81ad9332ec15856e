"""What a faster form of the embedded default model changes in its answers, on real photographs.

    python -m benchmarks.fidelity --pictures FOLDER

FOLDER holds photographs and a `labels.csv` with the columns `file` and `class_id`. Each form of the
model explains the first class of every photograph by Grad-CAM, and is held against the plain module
in float32: how often the first class is the same, how far its probability is off, and the cosine of
the maps. A precision that this device has no instructions for is computed all the same, slowly: its
numbers do not depend on that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated
from unittest import mock

import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.photographs import Photograph, answer, engine_of, job_for, photographs
from benchmarks.timing import machine_line
from models.catalog import default_spec
from models.registry import ModelRegistry
from models.types import ClassRef, JobOptions, Outcome, Precision, Target
from models.warm_model import WarmModel

HALF: tuple[Precision, ...] = ("bf16", "fp16")


def main(
    pictures: Annotated[Path, typer.Option(help="Folder with photographs and labels.csv.")],
    device: Annotated[str, typer.Option(help="cpu or cuda:N.")] = "cpu",
) -> None:
    """Compare every form with plain float32 and print one table."""
    console = Console(width=120)
    served = load(device, {"runtime": "torch"})
    plain = replace(served, variants=())
    known = photographs(pictures, plain)
    expected = explained(plain, known, "plain fp32")
    table = Table(box=box.MARKDOWN)
    for column in ("form", "first class agrees", "probability off by, median / most"):
        table.add_column(column)
    table.add_column("cosine of maps, least / mean")
    forms = {"fused fp32": served}
    if device == "cpu":
        for precision in ("fp32", "bf16"):
            changes = {"runtime": "openvino", "precision": precision}
            forms[f"OpenVINO {precision}"] = load(device, changes)
    for precision in HALF:
        with mock.patch("models.preparation.optimise.has_instructions", return_value=True):
            forms[f"fused {precision}"] = load(device, {"precision": precision, "runtime": "torch"})
    for name, warm in forms.items():
        table.add_row(name, *compared(explained(warm, known, name), expected))
    console.print(table)
    right = sum(
        outcome.predictions[0].class_id == photograph.class_id
        for outcome, photograph in zip(expected, known, strict=True)
    )
    console.print(f"plain fp32 names the label first for {right} of {len(known)} photographs")
    console.print(f"{machine_line('torch')}, {device}", highlight=False)


def load(device: str, changes: dict[str, str]) -> WarmModel:
    """The embedded default model with some keys of its entry changed."""
    registry, spec = ModelRegistry(device, Path(), warmup_s=0.1), default_spec()
    registry.load(spec.model_copy(update=changes))
    return registry.get(spec.name, spec.version)


def explained(warm: WarmModel, known: Sequence[Photograph], title: str) -> list[Outcome]:
    """First class and its Grad-CAM for each photograph."""
    assert warm.target_layer is not None
    engine, best = engine_of(warm), Target(cls=ClassRef(kind="rank", value=1))
    options = JobOptions(methods=("gradcam",), layers=(warm.target_layer,), targets=(best,))
    jobs = [job_for(warm, photograph.pixels, options) for photograph in known]
    return [answer(engine, job) for job in track(jobs, title, console=Console(stderr=True))]


def compared(found: Sequence[Outcome], expected: Sequence[Outcome]) -> list[str]:
    """Cells of a row. Maps are compared where the class is the same."""
    pairs = list(zip(found, expected, strict=True))
    same = [(a, b) for a, b in pairs if a.predictions[0].class_id == b.predictions[0].class_id]
    off = [abs(a.predictions[0].probability - b.predictions[0].probability) for a, b in same]
    cosines = [cosine(a.explanations[0].map, b.explanations[0].map) for a, b in same]
    return [
        f"{len(same)} of {len(pairs)}",
        f"{np.median(off):.5f} / {max(off):.4f}",
        f"{min(cosines):.5f} / {np.mean(cosines):.5f}",
    ]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of two maps."""
    return float((a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b)))


if __name__ == "__main__":
    typer.run(main)
