"""Prices follow the options: whatever makes a job longer makes it dearer, and nothing is free."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from models.methods import METHODS
from models.price import price
from models.types import STEP_MS, ClassRef, JobOptions, Target
from tests.fakes import LAYERS, fake_info

INFO = fake_info()
TARGETS = tuple(Target(cls=ClassRef(kind="index", value=i)) for i in range(5))
PLAIN = price("predict", JobOptions(targets=()), INFO)
STEPPED = [name for name, row in METHODS.items() if row.cost in {"passes", "many"}]


def explain(**options: object):
    defaults = {"targets": TARGETS[:1], "methods": ("gradcam",), "layers": LAYERS[-1:]}
    return price("explain", JobOptions(**{**defaults, **options}), INFO)


def test_a_prediction_costs_its_part_of_the_best_batch():
    assert PLAIN.device_ms == INFO.card.latency_ms[4] / 4
    assert (PLAIN.long, PLAIN.extra_ms, PLAIN.maps) == (False, 0.0, 0)


def test_the_gradient_of_a_linear_head_is_nearly_free():
    assert not explain().long
    assert explain().device_ms < 1.1 * PLAIN.device_ms
    assert explain(layers=LAYERS[:1]).device_ms > 1.5 * PLAIN.device_ms


@pytest.mark.parametrize("name", STEPPED)
def test_further_passes_make_a_job_long(name):
    found = explain(methods=(name,), layers=LAYERS[:1])
    assert found.long
    assert found.device_ms > 2 * PLAIN.device_ms


@given(
    method=st.sampled_from(list(METHODS)),
    option=st.sampled_from(["targets", "layers", "methods", "samples", "steps", "faithfulness"]),
)
def test_more_of_anything_is_never_cheaper(method, option):
    less = {
        "targets": TARGETS[:1],
        "layers": LAYERS[:1],
        "methods": (method,),
        "samples": 5,
        "steps": 5,
        "faithfulness": (),
    }
    more = {
        "targets": TARGETS,
        "layers": LAYERS,
        "methods": tuple(METHODS),
        "samples": 500,
        "steps": 500,
        "faithfulness": ("deletion",),
    }
    few, many = explain(**less), explain(**{**less, option: more[option]})
    for part in ("device_ms", "device_bytes", "maps", "result_bytes"):
        assert getattr(many, part) >= getattr(few, part), part


def test_a_first_pass_that_is_no_step_makes_a_job_long():
    layers = tuple(structs.replace(layer, output_shape=(64, 112, 112)) for layer in INFO.layers)
    info = structs.replace(INFO, layers=layers)
    options = JobOptions(methods=("kpca_cam",), layers=LAYERS)
    found = price("explain", options, info)
    assert found.device_ms > STEP_MS
    # Its first batch is a plain prediction; the rest comes in steps.
    assert (found.long, found.extra_ms) == (True, 0.0)
