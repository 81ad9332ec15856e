"""Entries of the catalog that make no sense are refused with the reason."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from models.catalog import ModelSpec


def entry(**fields) -> ModelSpec:
    return ModelSpec(name="m", source="timm:resnet50", **fields)


def test_torch_runs_a_model_as_it_is_unless_told_otherwise():
    assert (entry().runtime, entry().compile) == ("torch", False)
    assert entry(runtime="openvino").runtime == "openvino"
    assert entry(compile=True).compile


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"runtime": "onnx"}, "'torch' or 'openvino'"),
        ({"runtime": "openvino", "compile": True}, "compile = true is for the runtime torch"),
    ],
)
def test_runtimes_that_do_not_exist(fields, message):
    with pytest.raises(ValidationError, match=message):
        entry(**fields)
