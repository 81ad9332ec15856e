"""Requests that cost too much are refused, with the option to lower."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import structs

from models.errors import InvalidOption
from models.methods import METHODS
from service.api.body import ImageInput
from service.api.options import ExplainOptions, FeaturesOptions, PredictOptions
from service.api.plan import Plan, make_plan
from service.settings import LimitSettings
from tests.fakes import LAYERS, fake_info


def plan_of(options: Any, *, images: int = 1, seconds: float = 30.0, side: int = 7) -> Plan:
    info = fake_info(size=224)
    layers = tuple(structs.replace(layer, output_shape=(8, side, side)) for layer in info.layers)
    return make_plan(
        [ImageInput(data=b"x")] * images,
        options,
        structs.replace(info, layers=layers),
        limits=LimitSettings(),
        started=0.0,
        deadline=seconds,
    )


@pytest.mark.parametrize(
    ("field", "options", "more"),
    [
        ("samples", {"methods": ["rise"], "samples": 10_000}, {"seconds": 5}),
        ("steps", {"methods": ["integrated_gradients"], "steps": 1000}, {"seconds": 5}),
        ("images", {"methods": ["saliency"]}, {"images": 32, "seconds": 0.1}),
        ("faithfulness", {"faithfulness": ["deletion"], "layers": list(LAYERS)}, {"seconds": 0.3}),
    ],
)
def test_device_time(field, options, more):
    with pytest.raises(InvalidOption, match="of the device") as caught:
        plan_of(ExplainOptions(**options), **{"seconds": 1.0, **more})
    assert caught.value.field == field
    assert f"`{field}`" in caught.value.message


def test_a_model_that_became_slower_costs_more():
    info = fake_info()
    card = structs.replace(info.card, latency_ms={1: 4.0, 4: 12.0})
    found = [
        make_plan(
            [ImageInput(data=b"x")],
            PredictOptions(),
            model,
            limits=LimitSettings(),
            started=0.0,
            deadline=30.0,
        )
        for model in (info, structs.replace(info, card=card))
    ]
    assert found[1].device_ms == 2 * found[0].device_ms


def test_more_time_allows_more():
    options = ExplainOptions(methods=["rise"], samples=2000)
    with pytest.raises(InvalidOption):
        plan_of(options, seconds=1.0)
    assert plan_of(options, seconds=60.0).images[0].price.long


def test_a_plain_request_in_a_hurry_is_tried():
    assert plan_of(ExplainOptions(), seconds=0.001)


@pytest.mark.parametrize(
    ("field", "options", "more"),
    [
        (
            "overlay_format",
            {
                "overlay_format": "png",
                "outputs": ["overlay"],
                "methods": ["fem", "gradcam"],
                "targets": list(range(5)),
            },
            {"images": 32},
        ),
        ("canvas", {"canvas": "original", "outputs": ["heatmap"]}, {"images": 16}),
        ("methods", {"targets": list(range(5)), "outputs": ["values"]}, {"side": 448}),
    ],
)
def test_the_size_of_the_answer(field, options, more):
    one_pass = [name for name, row in METHODS.items() if row.cost in {"pass", "head"}]
    options = ExplainOptions(**{"methods": one_pass, "layers": [LAYERS[-1]], **options})
    with pytest.raises(InvalidOption, match="The answer would have") as caught:
        plan_of(options, seconds=1000, **more)
    assert caught.value.field == field


def test_grids_of_many_channels():
    options = FeaturesOptions(layers=["*"], grid=True, channels=4096, targets=["top1", "top2"])
    with pytest.raises(InvalidOption) as caught:
        plan_of(options, images=32, side=224)
    assert caught.value.field in {"grid", "images"}
