"""Interventions: forward hooks that change feature maps during a pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from models.errors import InvalidOption, UnknownLayer
from models.hooks import ForwardHook
from models.layers import Layouts
from models.types import Intervention


def changes_for(
    layouts: Layouts, interventions: Sequence[Sequence[Intervention]]
) -> list[tuple[str, ForwardHook]]:
    """(layer, hook) pairs that change each row of a batch by its own interventions.

    A layer that has a layout keeps its channels in the last dimension.
    """
    by_layer: dict[str, list[tuple[int, Intervention]]] = {}
    for row, changes in enumerate(interventions):
        for change in changes:
            by_layer.setdefault(change.layer, []).append((row, change))
    images = len(interventions)
    return [
        (name, _hook(name, found, layouts.get(name) is not None, images))
        for name, found in by_layer.items()
    ]


def _hook(
    layer: str, changes: list[tuple[int, Intervention]], channels_last: bool, images: int
) -> ForwardHook:
    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, Tensor) or output.ndim == 0 or len(output) != images:
            raise UnknownLayer(f"{layer} cannot be changed: its first dimension is not the image.")
        changed = output.clone()
        for row, change in changes:
            _apply(changed[row], change, channels_last or output.ndim == 3)
        return changed

    return hook


def _apply(image: Tensor, change: Intervention, channels_last: bool) -> None:
    """Change one image's tensor, (C, …) or (…, C), in place."""
    channels_first = image.movedim(-1, 0) if channels_last else image
    count = channels_first.shape[0]
    if any(not 0 <= channel < count for channel in change.channels):
        raise InvalidOption(f"{change.layer} has channels 0 to {count - 1}.", field="interventions")
    chosen = list(change.channels)
    values = channels_first[chosen]
    if change.op == "zero":
        channels_first[chosen] = 0.0
    elif change.op == "scale":
        channels_first[chosen] = values * change.value
    else:
        # A feature of a vector has one position, and is its own mean.
        mean = values.reshape(len(chosen), -1).mean(1)
        channels_first[chosen] = mean.view(-1, *[1] * (values.ndim - 1)).expand_as(values)
