"""The first run of a network, and what to change where it raises an error."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from models.errors import ModelLoadFailed
from models.hooks import HookStack


@torch.no_grad()
def run_once(module: nn.Module, images: Tensor) -> Any:
    """What the network returns.

    Raises:
        ModelLoadFailed: it raised; the text says what it takes instead, if that can be told.
    """
    _check_arguments(module)
    entered: list[nn.Module] = []
    try:
        with _watching(module, entered):
            return module(images)
    except Exception as error:
        where = entered[-1] if entered else module
        raise ModelLoadFailed(_why_it_raised(module, where, images)) from error


def _why_it_raised(module: nn.Module, where: nn.Module, images: Tensor) -> str:
    """What to change where a network raised within a layer, as sentences."""
    channels, height, width = images.shape[1:]
    name = next((n for n, child in module.named_modules() if child is where and n), "")
    place = f"its layer {name} ({type(where).__name__})" if name else "its forward"
    if isinstance(where, nn.Conv2d) and where.in_channels != channels:
        wanted = where.in_channels
        values = f"one value{' each' if wanted > 1 else ''}"
        return (
            f"The network takes images of {wanted} channel{'s' if wanted > 1 else ''}, but is "
            f"given {channels}. Under [models.preprocess] set channels = {wanted}, and mean and std "
            f"to {values}."
        )
    text = (
        f"The network raises an error in {place} for images of {width} x {height} pixels with "
        f"{channels} channel{'s' if channels > 1 else ''}. "
    )
    if isinstance(where, nn.Linear):
        return text + _other_size(where.in_features, channels)
    return text + (
        "Under [models.preprocess], crop is the size of its input, and channels are 1 for grey."
    )


def _other_size(features: int, channels: int) -> str:
    """Which images would fill a linear layer, if they are flattened for it."""
    for wanted in dict.fromkeys((channels, 1, 3)):
        side = math.isqrt(features // wanted)
        if side >= 8 and wanted * side * side == features:
            return (
                f"The layer takes {features} values, as flattened images of {side} x {side} with "
                f"{wanted} channel{'s' if wanted > 1 else ''} have: set crop = {side} and channels "
                f"= {wanted} under [models.preprocess]."
            )
    return (
        f"The layer takes {features} values: was the network trained at another input size? Set "
        "crop under [models.preprocess]."
    )


def _check_arguments(module: nn.Module) -> None:
    """Refuse networks that want more than images."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return
    needed = [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if len(needed) > 1:
        raise ModelLoadFailed(
            f"The network takes {len(needed)} inputs ({', '.join(needed)}); only images are "
            "served. Give the others a constant value each, as in "
            f"inputs = {{ {needed[1]} = [0.0] }}, or defaults in the network."
        )


@contextmanager
def _watching(module: nn.Module, entered: list[nn.Module]) -> Iterator[None]:
    """Keep the modules that were entered and not left, the innermost last."""

    def enter(child: nn.Module, _args: tuple[Any, ...]) -> None:
        entered.append(child)

    def leave(_child: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        entered.pop()

    with HookStack() as hooks:
        for child in module.modules():
            hooks.forward_pre(child, enter)
            hooks.forward(child, leave)
        yield
