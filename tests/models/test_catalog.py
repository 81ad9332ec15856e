"""Entries of the catalog that make no sense are refused with the reason."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from models.catalog import ModelSpec
from models.errors import ModelLoadFailed
from models.types import Preprocess

BASE = Preprocess(resize=256, crop=(224, 224))


def entry(**fields) -> ModelSpec:
    return ModelSpec(name="m", source="timm:resnet50", **fields)


def test_the_runtime_is_what_serves_best_unless_told_otherwise():
    assert entry().runtime == "auto"
    assert entry(runtime="torch").runtime == "torch"
    assert entry(runtime="openvino").runtime == "openvino"


def test_what_no_gpu_has_shown_to_gain_is_off():
    assert (entry().cuda_graphs, entry().copy_stream) == (False, False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"runtime": "onnx"}, "'auto', 'torch' or 'openvino'"),
        ({"compile": True}, "key compile was removed: .* slower .* Delete it"),
        ({"compile": False}, "key compile was removed"),
    ],
)
def test_runtimes_that_do_not_exist(fields, message):
    with pytest.raises(ValidationError, match=message):
        entry(**fields)


def over(base: Preprocess = BASE, **fields) -> Preprocess:
    return entry(preprocess=fields).preprocess.over(base)


def test_the_margin_around_the_crop_is_kept():
    assert over(crop=28).resize == 32
    assert over(resize=224).crop == (224, 224)
    assert over() == BASE


@pytest.mark.parametrize(
    ("fields", "resize", "crop", "fit"),
    [
        ({"mode": "squash"}, (224, 224), (224, 224), "stretch"),
        ({"resize": [96, 64]}, (96, 64), (96, 64), "stretch"),
        ({"resize": [256, 256], "crop": 224}, (256, 256), (224, 224), "stretch"),
        ({"mode": "squash", "crop": [96, 64]}, (96, 64), (96, 64), "stretch"),
        ({"mode": "letterbox", "crop": 64}, (64, 64), (64, 64), "contain"),
        ({"mode": "none", "crop": 32}, (32, 32), (32, 32), "none"),
        ({"crop": [112, 224]}, (128, 256), (112, 224), "cover"),
        ({"mode": "crop", "resize": [96, 64]}, (96, 64), (224, 224), None),
        ({"mode": "crop", "resize": [96, 64], "crop": [80, 64]}, (96, 64), (80, 64), "cover"),
    ],
)
def test_modes(fields, resize, crop, fit):
    if fit is None:
        with pytest.raises(
            ModelLoadFailed, match=r"crop 224 is larger than preprocess\.resize 96 x"
        ):
            over(**fields)
        return
    made = over(**fields)
    assert (made.resize, made.crop, made.fit) == (resize, crop, fit)


def test_ranges_become_mean_and_deviation():
    signed = over(range=[-1, 1])
    assert (signed.mean, signed.std) == ((0.5,) * 3, (0.5,) * 3)
    bytes_ = over(range=[0, 255], mean=[103.94, 116.78, 123.68], order="bgr")
    assert bytes_.mean == pytest.approx((103.94 / 255, 116.78 / 255, 123.68 / 255))
    assert bytes_.std == pytest.approx((1 / 255,) * 3)


def test_one_value_stands_for_all_channels():
    assert over(mean=[0.5], std=[0.25]).mean == (0.5,) * 3
    grey = over(channels=1, mean=[0.13], std=[0.31])
    assert (grey.channels, grey.mean, grey.std) == (1, (0.13,), (0.31,))
    assert over(channels=5).mean == (0.0,) * 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mean": [0.1, 0.2]}, "mean has 2 values, but the network takes 3 channels"),
        ({"channels": 1, "std": [1, 1, 1]}, "std has 3 values, but the network takes 1 channel"),
        ({"range": [1, 0]}, "value of black, value of white"),
        ({"channels": 1, "order": "bgr"}, "order applies to three channels only"),
    ],
)
def test_contradictions_are_named(fields, message):
    with pytest.raises(ModelLoadFailed, match=message):
        over(**fields)
