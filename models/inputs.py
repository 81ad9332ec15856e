"""Inputs of a network other than the image; the configuration sets them once for all images."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from models.errors import ModelLoadFailed

_BUFFER = "_constant_input_"


def fill_inputs(module: nn.Module, constants: Mapping[str, Any]) -> nn.Module:
    """Make a network take images alone, and the configured values for its other inputs.

    Each value is repeated for every image of a batch. The network itself is changed, to a subclass
    of its own, so that its layers keep their names; the values move with it to its device.

    Raises:
        ModelLoadFailed: it has no such input, or a value is not an array of numbers.
    """
    if not constants:
        return module
    if isinstance(module, (torch.jit.ScriptModule, fx.GraphModule)):
        raise ModelLoadFailed("A compiled network cannot be given the configured inputs.")
    known = inspect.signature(module.forward).parameters
    for name, value in constants.items():
        if name not in known:
            raise ModelLoadFailed(
                f"The network takes no input {name}. It takes: {', '.join(known)}."
            )
        module.register_buffer(f"{_BUFFER}{name}", _tensor(name, value), persistent=False)
    kind = type(module)

    def forward(self: nn.Module, images: Tensor) -> Any:
        filled = {}
        for name in constants:
            value: Tensor = getattr(self, f"{_BUFFER}{name}")
            filled[name] = value.expand(len(images), *value.shape)
        return kind.forward(self, images, **filled)

    module.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    return module


def _tensor(name: str, value: Any) -> Tensor:
    try:
        return torch.tensor(value)
    except (TypeError, ValueError) as error:
        raise ModelLoadFailed(
            f"inputs.{name} is neither a number nor an array of numbers."
        ) from error
