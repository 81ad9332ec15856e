"""A job that is cut into parts has the answer that it has in one pass."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec import structs

from models.engine import Engine
from models.suspended import Suspended
from models.types import ClassRef, Failure, Intervention, Job, JobOptions, Outcome, Target
from tests.models.conftest import OneModel, warm_of
from tests.models.test_engine import assert_same

TARGETS = tuple(Target(cls=ClassRef(kind="rank", value=rank)) for rank in (1, 2, 3))
LAYERS = ("body", "out")
EXPLAIN = JobOptions(
    targets=TARGETS,
    methods=("eigencam", "layercam", "saliency", "gradcam", "scorecam"),
    layers=LAYERS,
    statistics=True,
)
FEATURES = JobOptions(
    targets=TARGETS,
    layers=LAYERS,
    statistics=True,
    kinds=("output", "grad_output", "input"),
    grid=True,
    channels=2,
)


@pytest.fixture
def engine(flat_net) -> Engine:
    return Engine(OneModel(warm_of(flat_net)))


def job(operation: str, options: JobOptions) -> Job:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Job(
        id="1", operation=operation, model="tiny", version="1", input=pixels, options=options
    )


def finish(engine: Engine, asked: Job) -> tuple[Outcome, int]:
    """The outcome, and the number of steps after the first pass."""
    (result,), steps = engine.run([asked]), 0
    while isinstance(result, Suspended):
        (result,), steps = engine.advance([result]), steps + 1
    assert isinstance(result, Outcome), result
    return result, steps


@pytest.mark.parametrize(
    ("operation", "options"),
    [
        ("explain", EXPLAIN),
        ("explain", structs.replace(EXPLAIN, fuse="mean")),
        ("explain", structs.replace(EXPLAIN, methods=("gradcam",), faithfulness=("deletion",))),
        ("explain", structs.replace(EXPLAIN, methods=("saliency",))),
        ("features", FEATURES),
        ("features", structs.replace(FEATURES, kinds=("output",))),
    ],
)
def test_parts_answer_as_the_whole(engine, monkeypatch, operation, options):
    asked = job(operation, options)
    whole, steps = finish(engine, asked)
    monkeypatch.setattr("models.price.STEP_MS", 1e-9)
    parts, more_steps = finish(engine, asked)
    assert more_steps > steps
    assert_same(parts, whole)


def test_a_part_holds_one_layer_and_one_target_at_least(engine, monkeypatch):
    monkeypatch.setattr("models.price.STEP_MS", 1e-9)
    options = structs.replace(EXPLAIN, methods=("layercam",), statistics=False)
    _, steps = finish(engine, job("explain", options))
    assert steps == len(LAYERS) * len(TARGETS)


def test_interventions_that_leave_no_finite_score_are_the_callers_fault(engine):
    change = Intervention(layer="body", channels=(0, 1), op="scale", value=1e38)
    (result,) = engine.run([job("predict", JobOptions(interventions=(change, change)))])
    assert isinstance(result, Failure)
    assert (result.code, result.field) == ("invalid_option", "interventions")
