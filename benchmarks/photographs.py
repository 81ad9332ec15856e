"""Photographs as the service hands them to a model, and one job at a time through the engine."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np

from models.engine import Engine
from models.imaging.decode import DecodeLimits, decode
from models.imaging.preprocess import preprocess
from models.registry import ModelRegistry
from models.suspended import Suspended
from models.types import Job, JobOptions, Operation, Outcome
from models.warm_model import WarmModel


@dataclass(frozen=True)
class Photograph:
    """A model input, uint8 (height, width, 3), and the class that its label names."""

    pixels: np.ndarray
    class_id: int


def photographs(folder: Path, warm: WarmModel) -> list[Photograph]:
    """Read a folder with photographs and a `labels.csv` that has the columns `file` and `class_id`."""
    with (folder / "labels.csv").open() as file:
        return [
            Photograph(model_input((folder / row["file"]).read_bytes(), warm), int(row["class_id"]))
            for row in csv.DictReader(file)
        ]


def model_input(data: bytes, warm: WarmModel) -> np.ndarray:
    """What the service would hand to the model for an encoded picture."""
    assert warm.info.card.input is not None
    picture = decode(data, limits=DecodeLimits(), preprocess=warm.info.card.input)
    pixels, _ = preprocess(picture, warm.info.card.input)
    return pixels


def engine_of(warm: WarmModel) -> Engine:
    """An engine that has this one model."""
    return Engine(cast("ModelRegistry", SimpleNamespace(get=lambda *_: warm)))


def job_for(
    warm: WarmModel, pixels: np.ndarray, options: JobOptions, *, operation: Operation = "explain"
) -> Job:
    """A job on one picture that may take a day."""
    return Job(
        id="0",
        operation=operation,
        model=warm.name,
        version=warm.version,
        input=pixels,
        options=options,
    )


def answer(engine: Engine, job: Job) -> Outcome:
    """Run one job through all its steps.

    Raises:
        RuntimeError: the engine refused it.
    """
    found = engine.run([job])[0]
    while isinstance(found, Suspended):
        found = engine.advance([found])[0]
    if not isinstance(found, Outcome):
        raise RuntimeError(found)  # noqa: TRY004  (a failure of the model, no wrong type)
    return found
