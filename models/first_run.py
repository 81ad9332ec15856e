"""The first run of a network, and what to change where it raises an error."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from models.errors import ModelLoadFailed
from models.hooks import HookStack
from models.outputs import describe
from models.probe import probe_batch
from models.types import Preprocess

_Entered = tuple[nn.Module, Tensor | None]
"""A module, and the tensor that it was given first."""
_OWN_DEVICE = (
    "It moves tensors to a GPU itself, as .cuda() does: leave that out, for the service moves the "
    "network and the images."
)
_OWN_TYPE = (
    "It converts images to a type of its own, as .half() does, but is used in float32: leave that "
    "out. `precision` in the configuration says what the model computes in."
)
_SIGNS = {
    "CUDA": _OWN_DEVICE,
    "NVIDIA": _OWN_DEVICE,
    "on the same device": _OWN_DEVICE,
    "should be the same": _OWN_TYPE,
    "same dtype": _OWN_TYPE,
}
"""What torch says when a network does what it should leave out."""


@torch.no_grad()
def run_once(module: nn.Module, images: Tensor) -> Any:
    """What the network returns.

    Raises:
        ModelLoadFailed: it raised; the text says what it takes instead, if that can be told.
    """
    _check_arguments(module)
    entered: list[_Entered] = []
    try:
        with _watching(module, entered):
            return module(images)
    except Exception as error:
        raise ModelLoadFailed(_why_it_raised(module, entered, images, error)) from error


def settle(module: nn.Module, preprocess: Preprocess) -> list[str]:
    """Make all parameters float32, and give layers that wait for a first run their sizes.

    Returns:
        What was done, as sentences.

    Raises:
        ModelLoadFailed: the first run raised.
    """
    notes, parameters = [], list(module.parameters())
    waiting = any(map(is_lazy, [*parameters, *module.buffers()]))
    kinds = {p.dtype for p in parameters if p.is_floating_point()} - {torch.float32}
    if kinds:
        module.float()
        names = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        notes.append(f"The network is made in {names}; it is used in float32.")
    if waiting:
        run_once(module.eval(), probe_batch(preprocess))
    return notes


def _why_it_raised(
    module: nn.Module, entered: Sequence[_Entered], images: Tensor, error: Exception
) -> str:
    """What to change where a network raised within a layer, as sentences."""
    where, given = entered[-1] if entered else (module, None)
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
    for sign, sentence in _SIGNS.items():
        if sign in str(error):
            return text + sentence
    if isinstance(where, nn.Linear) and given is not None and given.shape[:1] != images.shape[:1]:
        return text + (
            f"The layer is given {describe(given)} for {len(images)} images: something before it "
            "mixes them, as a view of fixed size does. Use x.flatten(1)."
        )
    if isinstance(where, nn.Linear):
        return text + _other_size(where.in_features, channels)
    if not name:
        return text + (
            "It is called with one tensor, the images (N, channels, height, width); under "
            "[models.preprocess], crop is their size."
        )
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
def _watching(module: nn.Module, entered: list[_Entered]) -> Iterator[None]:
    """Keep the modules that were entered and not left, the innermost last."""

    def enter(child: nn.Module, args: tuple[Any, ...]) -> None:
        entered.append((child, args[0] if args and isinstance(args[0], Tensor) else None))

    def leave(_child: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        entered.pop()

    with HookStack() as hooks:
        for child in module.modules():
            hooks.forward_pre(child, enter)
            hooks.forward(child, leave)
        yield
