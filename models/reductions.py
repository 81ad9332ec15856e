"""Reductions of feature maps on their device, so that only a few numbers leave it.

Quantiles are those of a fixed subsample of `SUBSAMPLE` values, one at random from each of as many
equal stretches of the tensor (all values of tensors that are no larger).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from models import native

SUBSAMPLE = 2048

QUANTILES = 0.01, 0.25, 0.5, 0.75, 0.99
# Of an image: mean, standard deviation, minimum, maximum, L2 norm, share of values that are exactly
# 0, number of channels that have none but zeros, and the quantiles.
NUMBERS = 7 + len(QUANTILES)


@dataclass(frozen=True)
class Reductions:
    """Reductions of a batch of one layer's tensors.

    Attributes:
        shape: of one image's tensor.
        found: (N, NUMBERS + 2 · C), float32, still on the device: the numbers of each image, then the
            means and the maxima of its channels.
        maps: (N, C, h, w), kept only where a grid was asked for.
    """

    shape: tuple[int, ...]
    found: Tensor
    maps: Tensor | None


def reduce(tensor: Tensor, *, channels_last: bool = False, keep_maps: bool = False) -> Reductions:
    """Reduce a batch on the tensor's device.

    Args:
        tensor: (N, C, h, w) or (N, C); (N, h, w, C) or (N, tokens, C) if `channels_last`.
        channels_last: whether the last dimension is the channels' one.
        keep_maps: whether to keep the maps themselves (tensors with two spatial dimensions only).
    """
    found = None
    layout = _layout(tuple(tensor.shape), tensor.stride(), channels_last=channels_last)
    if layout is not None and native.reduces(tensor):
        found = native.reduce(
            tensor, layout, _places(math.prod(layout), tensor.device), _quantiles(tensor.device)
        )
    values = tensor.movedim(-1, 1) if channels_last and tensor.ndim > 2 else tensor
    return Reductions(
        shape=tuple(tensor.shape[1:]),
        found=_reduced(values.float()) if found is None else found,
        maps=values.to(torch.float32, copy=True) if keep_maps and values.ndim == 4 else None,
    )


@lru_cache(maxsize=1024)
def _layout(
    shape: tuple[int, ...], strides: tuple[int, ...], *, channels_last: bool
) -> tuple[int, int, int] | None:
    """How an image lies in memory: in groups, positions and channels, the first or the last being 1.

    None where there are gaps, or positions both before and after the channels.
    """
    channel = len(shape) - 1 if channels_last else 1
    order = _memory_order(strides)
    size = 1
    for dimension in reversed(order):
        if shape[dimension] > 1 and strides[dimension] != size:
            return None
        size *= shape[dimension]
    channels = shape[channel]
    before = math.prod(shape[d] for d in order[: order.index(channel)])
    after = size // (before * channels)
    if before > 1 and after > 1:
        return None
    return (1, before, channels) if after == 1 else (channels, after, 1)


def _memory_order(strides: Sequence[int]) -> list[int]:
    """The dimensions of an image in the order of memory, the one with the farthest steps first."""
    return sorted(range(1, len(strides)), key=lambda dimension: -strides[dimension])


def _reduced(values: Tensor) -> Tensor:
    """What `native.reduce` gives, by torch: of float32 (N, C, …)."""
    # An expanded tensor, such as the gradient of a mean, has no memory order of its own.
    values = values.contiguous() if 0 in values.stride() else values
    flat = values.permute(0, *_memory_order(values.stride())).flatten(1)
    by_channel = values.flatten(2) if values.ndim > 2 else values[..., None]
    means, maxima = by_channel.mean(2), by_channel.amax(2)
    mean = means.double().mean(1)
    norm = torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64)
    sample = flat[:, _places(flat.shape[1], flat.device)]
    numbers = (
        mean,
        (norm**2 / flat.shape[1] - mean**2).clamp_min(0).sqrt(),
        flat.amin(1),
        maxima.amax(1),
        norm,
        (flat == 0).float().mean(1),
        # A channel without a positive value whose mean is 0 has none but zeros.
        ((maxima == 0) & (means == 0)).sum(1),
        *torch.quantile(sample, _quantiles(flat.device).float(), dim=1),
    )
    return torch.cat([torch.stack([n.float() for n in numbers], 1), means, maxima], 1)


@lru_cache(maxsize=256)
def _places(size: int, device: torch.device) -> Tensor:
    """One place in each of `SUBSAMPLE` equal stretches; a plain stride could miss channels."""
    if size <= SUBSAMPLE:
        return torch.arange(size, device=device)
    jitter = torch.rand(SUBSAMPLE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    places = ((torch.arange(SUBSAMPLE) + jitter) * (size / SUBSAMPLE)).long().clamp_max(size - 1)
    return places.to(device)


@cache
def _quantiles(device: torch.device) -> Tensor:
    return torch.tensor(QUANTILES, dtype=torch.float64, device=device)
