"""Entries of the catalog that make no sense are refused with the reason."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from models.catalog import ModelSpec


def entry(**fields) -> ModelSpec:
    return ModelSpec(name="m", source="timm:resnet50", **fields)


def test_torch_runs_a_model_as_it_is_unless_told_otherwise():
    assert entry().runtime == "torch"
    assert entry(runtime="openvino").runtime == "openvino"


def test_what_no_gpu_has_shown_to_gain_is_off():
    assert (entry().cuda_graphs, entry().copy_stream) == (False, False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"runtime": "onnx"}, "'torch' or 'openvino'"),
        ({"compile": True}, "key compile was removed: .* slower .* Delete it"),
        ({"compile": False}, "key compile was removed"),
    ],
)
def test_runtimes_that_do_not_exist(fields, message):
    with pytest.raises(ValidationError, match=message):
        entry(**fields)


def test_values_for_one_channel_are_explained():
    with pytest.raises(ValidationError, match="grey ones the same value is given three times"):
        entry(preprocess={"mean": [0.13]})
