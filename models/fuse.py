"""One map from the maps of several layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.types import Fuse


def fuse(maps: Sequence[Tensor], how: Fuse) -> Tensor:
    """Fuse maps of several layers into one.

    Each is upsampled to the finest one's size (bilinear, half-pixel centres) and scaled to [0, 1]
    by its own range, so that layers count alike whatever the size of their values; a constant map
    counts as 0.

    Args:
        maps: float32 (T, h, w) of each layer, sizes may differ.
        how: `mean`, `max` or `product` of the scaled maps.

    Returns:
        float32 (T, H, W), the finest size.
    """
    size = max((tuple(m.shape[-2:]) for m in maps), key=lambda s: s[0] * s[1])
    scaled = torch.stack([_unit(_resize(m, size)) for m in maps])
    if how == "max":
        return scaled.amax(0)
    return scaled.prod(0) if how == "product" else scaled.mean(0)


def _resize(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    if tuple(maps.shape[-2:]) == size:
        return maps
    return nn.functional.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[
        :, 0
    ]


def _unit(maps: Tensor) -> Tensor:
    low = maps.amin((-2, -1), keepdim=True)
    span = maps.amax((-2, -1), keepdim=True) - low
    return torch.where(span > 0, (maps - low) / torch.where(span > 0, span, 1.0), 0.0)
