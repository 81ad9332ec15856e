"""Statistics of feature maps, reduced on the device inside the hook, so that only a few numbers leave it.

The reductions are the cheap ones: sums, norms, maxima. The standard deviation comes from the L2 norm and the mean;
quantiles come from a fixed subsample of `SUBSAMPLE` values, one at random from each of as many equal stretches of the
tensor (exact for tensors that are no larger).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from models.types import ChannelStatistics, Kind, LayerStatistics, Quantiles

SUBSAMPLE = 4096
_QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)


@dataclass(frozen=True)
class Reductions:
    """Reductions of a batch of one layer's tensors, still on the device.

    Attributes:
        shape: of one image's tensor.
        channels: float32 (N, 3, C): mean, maximum and minimum of each channel.
        norm: float32 (N,), L2 norm.
        zeros: (N,), number of values that are exactly 0.
        sample: float32 (N, at most `SUBSAMPLE`), in ascending order, for quantiles.
        maps: float32 (N, C, h, w), kept only where a picture grid was asked for.
    """

    shape: tuple[int, ...]
    channels: Tensor
    norm: Tensor
    zeros: Tensor
    sample: Tensor
    maps: Tensor | None


def reduce(tensor: Tensor, *, channels_last: bool = False, keep_maps: bool = False) -> Reductions:
    """Reduce a batch.

    Args:
        tensor: (N, C, h, w), (N, h, w, C) or (N, tokens, C) if `channels_last`, or (N, C).
        channels_last: whether the last dimension is the channels' one.
        keep_maps: whether to keep the maps themselves (tensors with two spatial dimensions only).

    Returns:
        The reductions, on the tensor's device. Values are reduced in float32.
    """
    values = tensor.float()
    shape = tuple(values.shape[1:])
    if channels_last and values.ndim > 2:
        values = values.movedim(-1, 1)
    space = tuple(range(2, values.ndim))
    means_and_extremes = (values.mean(space), *_extremes(values)) if space else (values,) * 3
    return Reductions(
        shape=shape,
        channels=torch.stack(means_and_extremes, 1),
        norm=torch.linalg.vector_norm(values, dim=tuple(range(1, values.ndim))),
        zeros=_count_zeros(values),
        sample=_subsample(values),
        maps=values.clone() if keep_maps and values.ndim == 4 else None,
    )


def describe(
    reductions: Reductions,
    row: int,
    *,
    layer: str,
    kind: Kind,
    top: int,
    weights: np.ndarray | None = None,
    target: int | None = None,
    grid: bool = False,
) -> LayerStatistics:
    """Statistics of one image of a batch.

    Args:
        reductions: of the batch.
        row: the image.
        layer: dotted name of the layer.
        kind: which of its tensors this is.
        top: number of channels to list, largest mean first (by magnitude for gradients).
        weights: (C,) weight of each channel in the explaining method.
        target: class whose gradient this is.
        grid: whether to add the listed channels' maps, where the batch kept maps.
    """
    means, maxima, minima = reductions.channels[row].cpu().numpy()
    size = math.prod(reductions.shape)
    mean, norm = float(means.mean(dtype=np.float64)), float(reductions.norm[row])
    variance = max(0.0, norm * norm / size - mean * mean)
    order = np.argsort(-(np.abs(means) if kind.startswith("grad_") else means), kind="stable")[:top]
    chosen = (order.tolist(), means[order].tolist(), maxima[order].tolist())
    shares = [None] * len(order) if weights is None else weights[order].tolist()
    return LayerStatistics(
        layer=layer,
        kind=kind,
        shape=reductions.shape,
        mean=mean,
        std=math.sqrt(variance),
        min=float(minima.min()),
        max=float(maxima.max()),
        l2=norm,
        sparsity=float(reductions.zeros[row]) / size,
        dead_channels=int(((maxima == 0) & (minima == 0)).sum()),
        quantiles=_quantiles(reductions.sample[row].cpu().numpy()),
        top_channels=tuple(
            ChannelStatistics(index=index, mean=m, max=high, weight=share)
            for index, m, high, share in zip(*chosen, shares, strict=True)
        ),
        target=target,
        grid=reductions.maps[row][order.tolist()].cpu().numpy()
        if grid and reductions.maps is not None
        else None,
    )


def _extremes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum and minimum of each channel, (N, C, …) → (N, C) twice.

    With channels last in memory torch reduces thirty times slower where their number is no multiple of 32, so
    neighbouring positions are first taken as more channels.
    """
    images, channels = values.shape[:2]
    if values.device.type == "cpu" and values.stride(1) == 1 and values[0, 0].numel() > 1:
        flat = _in_memory_order(values)
        positions = flat.shape[1] // channels
        fold = next((r for r in (1, 2, 4, 8) if r * channels % 32 == 0 and positions % r == 0), 1)
        rows = flat.view(images, positions // fold, fold * channels)
        high, low = rows.amax(1), rows.amin(1)
        return high.view(images, fold, channels).amax(1), low.view(images, fold, channels).amin(1)
    space = tuple(range(2, values.ndim))
    return values.amax(space), values.amin(space)


def _in_memory_order(values: Tensor) -> Tensor:
    """(N, …) → (N, values of an image) without a copy, whatever the layout of a dense tensor."""
    strides = values.stride()
    order = sorted(range(1, values.ndim), key=lambda dimension: -strides[dimension])
    return values.permute(0, *order).reshape(len(values), -1)


def _count_zeros(values: Tensor) -> Tensor:
    """Zeros of each image. On the CPU numpy counts several times faster than torch does."""
    if values.device.type != "cpu":
        return values[0].numel() - values.flatten(1).count_nonzero(1)
    images = _in_memory_order(values).numpy()
    # Counting the booleans is four times faster than counting the floats.
    return torch.tensor([image.size - np.count_nonzero(image != 0) for image in images])


def _subsample(values: Tensor) -> Tensor:
    flat = _in_memory_order(values)
    if flat.shape[1] > SUBSAMPLE:
        flat = flat[:, _places(flat.shape[1]).to(values.device)]
    if values.device.type != "cpu":
        return flat.sort(1).values
    return torch.from_numpy(np.sort(flat.numpy(), axis=1))


@lru_cache(maxsize=256)
def _places(size: int) -> Tensor:
    """One place in each of `SUBSAMPLE` equal stretches: a plain stride could meet the same channels only."""
    jitter = torch.rand(SUBSAMPLE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return ((torch.arange(SUBSAMPLE) + jitter) * (size / SUBSAMPLE)).long().clamp_max(size - 1)


def _quantiles(ascending: np.ndarray) -> Quantiles:
    """Quantiles by linear interpolation between the two nearest values, as numpy's default."""
    last = len(ascending) - 1
    values = []
    for share in _QUANTILES:
        below = int(share * last)
        low, high = float(ascending[below]), float(ascending[min(below + 1, last)])
        values.append(low + (high - low) * (share * last - below))
    p01, p25, p50, p75, p99 = values
    return Quantiles(p01=p01, p25=p25, p50=p50, p75=p75, p99=p99)
