"""Statistics of feature maps, reduced on the device inside the hook, so that only a few numbers leave it.

The reductions are the cheap ones: sums, norms, maxima. The standard deviation comes from the L2 norm and the mean;
quantiles come from a fixed subsample of `SUBSAMPLE` values, one at random from each of as many equal stretches of the
tensor (exact for tensors that are no larger).
"""

from __future__ import annotations

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
    if space:
        channels = torch.stack([values.mean(space), values.amax(space), values.amin(space)], 1)
    else:
        channels = values[:, None].expand(-1, 3, -1)
    return Reductions(
        shape=shape,
        channels=channels,
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
    """
    means, maxima, minima = reductions.channels[row].double().cpu().numpy()
    size = int(np.prod(reductions.shape))
    mean, norm = float(means.mean()), float(reductions.norm[row])
    variance = max(0.0, norm * norm / size - mean * mean)
    order = np.argsort(-(np.abs(means) if kind.startswith("grad_") else means), kind="stable")[:top]
    return LayerStatistics(
        layer=layer,
        kind=kind,
        shape=reductions.shape,
        mean=mean,
        std=variance**0.5,
        min=float(minima.min()),
        max=float(maxima.max()),
        l2=norm,
        sparsity=float(reductions.zeros[row]) / size,
        dead_channels=int(((maxima == 0) & (minima == 0)).sum()),
        quantiles=_quantiles(reductions.sample[row].cpu().numpy()),
        top_channels=tuple(
            ChannelStatistics(
                index=int(i),
                mean=float(means[i]),
                max=float(maxima[i]),
                weight=None if weights is None else float(weights[i]),
            )
            for i in order
        ),
        target=target,
        grid=None
        if reductions.maps is None
        else reductions.maps[row][torch.from_numpy(order.copy())].cpu().numpy(),
    )


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
    places = np.multiply(_QUANTILES, len(ascending) - 1)
    below = np.floor(places).astype(int)
    above = np.minimum(below + 1, len(ascending) - 1)
    low, high = ascending[below].astype(float), ascending[above].astype(float)
    p01, p25, p50, p75, p99 = map(float, low + (high - low) * (places - below))
    return Quantiles(p01=p01, p25=p25, p50=p50, p75=p75, p99=p99)
