"""Statistics of feature maps, reduced on the device so that only a few numbers leave it.

The reductions are the cheap ones: means, norms, extremes. The standard deviation comes from the L2
norm and the mean; quantiles come from a fixed subsample of `SUBSAMPLE` values, one at random from
each of as many equal stretches of the tensor (exact for tensors that are no larger).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import numpy as np
import torch
from msgspec import UNSET
from torch import Tensor

from models.types import ChannelStatistics, Kind, LayerFeatures, Quantiles

SUBSAMPLE = 2048
_QUANTILES = np.array([0.01, 0.25, 0.5, 0.75, 0.99])
# Values from which numpy reduces rows at the speed of memory.
_LONG_ROW = 256


@dataclass(frozen=True)
class Reductions:
    """Reductions of a batch of one layer's tensors, float32 and still on the device.

    Attributes:
        shape: of one image's tensor.
        means, maxima: (N, C), of each channel.
        low, norm, zeros: (N,), minimum, L2 norm, and number of values that are exactly 0.
        sample: (N, at most `SUBSAMPLE`), values for the quantiles.
        maps: (N, C, h, w), kept only where a grid was asked for.
    """

    shape: tuple[int, ...]
    means: Tensor
    maxima: Tensor
    low: Tensor
    norm: Tensor
    zeros: Tensor
    sample: Tensor
    maps: Tensor | None


@dataclass(frozen=True)
class Summary:
    """What `describe` needs of one image's tensor, on the host.

    Attributes:
        shape: of the tensor.
        means, maxima: float32 (C,), of each channel.
        quantiles: those of `Quantiles`, in its order.
        maps: float32 (C, h, w), still on the device, where an image grid was asked for.
    """

    shape: tuple[int, ...]
    means: np.ndarray
    maxima: np.ndarray
    mean: float
    std: float
    low: float
    high: float
    norm: float
    sparsity: float
    dead: int
    quantiles: list[float]
    maps: Tensor | None


def reduce(tensor: Tensor, *, channels_last: bool = False, keep_maps: bool = False) -> Reductions:
    """Reduce a batch in float32, on the tensor's device.

    Args:
        tensor: (N, C, h, w) or (N, C); (N, h, w, C) or (N, tokens, C) if `channels_last`.
        channels_last: whether the last dimension is the channels' one.
        keep_maps: whether to keep the maps themselves (tensors with two spatial dimensions only).
    """
    values = tensor.float()
    if 0 in values.stride():
        # An expanded tensor, such as the gradient of a mean, has no memory order of its own.
        values = values.contiguous()
    shape = tuple(values.shape[1:])
    if channels_last and values.ndim > 2:
        values = values.movedim(-1, 1)
    space = tuple(range(2, values.ndim))
    flat = _in_memory_order(values)
    on_host = values.device.type == "cpu"
    # Nothing that is kept may be the tensor itself: what follows the layer may work in place.
    means = values.mean(space) if space else values.clone()
    low, norm, zeros = (_totals_by_numpy if on_host else _totals)(flat)
    return Reductions(
        shape=shape,
        means=means,
        maxima=_channel_maxima(values, flat) if space else means,
        low=low,
        norm=norm,
        zeros=zeros,
        sample=_subsample(flat),
        maps=values.clone() if keep_maps and values.ndim == 4 else None,
    )


def summarise(reductions: Sequence[Reductions]) -> list[list[Summary]]:
    """Finish all reductions of a batch with one transfer: for each, one summary an image."""
    if not reductions:
        return []
    names = ("means", "maxima", "low", "norm", "zeros", "sample")
    parts = {name: [getattr(r, name) for r in reductions] for name in names}
    flat = torch.cat([t.reshape(-1) for name in names for t in parts[name]]).cpu().numpy()
    ends = np.cumsum([sum(t.numel() for t in parts[name]) for name in names])
    means, maxima, low, norm, zeros, sample = np.split(flat, ends[:-1])
    channels = np.repeat([r.means.shape[1] for r in reductions], [len(r.means) for r in reductions])
    sizes = np.repeat([math.prod(r.shape) for r in reductions], [len(r.means) for r in reductions])
    starts = np.cumsum(channels) - channels
    mean = np.add.reduceat(means, starts, dtype=np.float64) / channels
    norms = norm.astype(np.float64)
    columns = {
        "mean": mean,
        "std": np.sqrt(np.maximum(norms * norms / sizes - mean * mean, 0)),
        "low": low,
        "high": np.maximum.reduceat(maxima, starts),
        "norm": norms,
        "sparsity": zeros / sizes,
        # A channel without a positive value whose mean is 0 has none but zeros.
        "dead": np.add.reduceat(((maxima == 0) & (means == 0)).astype(np.intp), starts),
        "quantiles": _quantiles(sample, [r.sample.shape for r in reductions]),
    }
    images = zip(*(column.tolist() for column in columns.values()), strict=True)
    spans = map(slice, starts.tolist(), (starts + channels).tolist())

    def summary(r: Reductions, row: int) -> Summary:
        span, numbers = next(spans), dict(zip(columns, next(images), strict=True))
        maps = None if r.maps is None else r.maps[row]
        return Summary(shape=r.shape, means=means[span], maxima=maxima[span], maps=maps, **numbers)

    return [[summary(r, row) for row in range(len(r.means))] for r in reductions]


def describe(
    summary: Summary,
    *,
    layer: str,
    kind: Kind,
    top: int,
    weights: np.ndarray | None = None,
    target: int | None = None,
    grid: bool = False,
) -> LayerFeatures:
    """Statistics of one image's tensor.

    `top` channels are listed, largest mean first (by magnitude for gradients), with their `weights`
    (C,) in the explaining method and, if `grid`, their maps where they were kept.
    """
    means = summary.means
    order = _largest(np.abs(means) if kind.startswith("grad_") else means, top)
    chosen = (order.tolist(), means[order].tolist(), summary.maxima[order].tolist())
    shares = [None] * len(order) if weights is None else weights[order].tolist()
    p01, p25, p50, p75, p99 = summary.quantiles
    return LayerFeatures(
        layer=layer,
        kind=kind,
        shape=summary.shape,
        mean=summary.mean,
        std=summary.std,
        min=summary.low,
        max=summary.high,
        l2=summary.norm,
        sparsity=summary.sparsity,
        dead_channels=summary.dead,
        quantiles=Quantiles(p01=p01, p25=p25, p50=p50, p75=p75, p99=p99),
        top_channels=tuple(
            ChannelStatistics(index=index, mean=m, max=high, weight=share)
            for index, m, high, share in zip(*chosen, shares, strict=True)
        ),
        target=UNSET if target is None else target,
        grid=summary.maps[chosen[0]].cpu().numpy() if grid and summary.maps is not None else None,
    )


def _totals(flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Minimum, L2 norm and number of zeros of each image, from (N, values of an image)."""
    zeros = flat.shape[1] - flat.count_nonzero(1)
    return flat.amin(1), torch.linalg.vector_norm(flat, dim=1), zeros.float()


def _totals_by_numpy(flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same on the CPU, where numpy reduces and counts several times faster than torch does."""
    images = flat.numpy()
    norms = [math.sqrt(image @ image) for image in images]
    # Counting the booleans is faster than counting the floats.
    zeros = [float(image.size - np.count_nonzero(image != 0)) for image in images]
    return torch.from_numpy(images.min(1)), torch.tensor(norms), torch.tensor(zeros)


def _channel_maxima(values: Tensor, flat: Tensor) -> Tensor:
    """Maximum of each channel, (N, C, …) → (N, C).

    With channels last in memory numpy takes it row by row, and neighbouring short rows as one,
    since each row costs a call; torch is thirty times slower where the number of channels is no
    multiple of 32.
    """
    images, channels = values.shape[:2]
    if values.device.type != "cpu" or values.stride(1) != 1:
        return values.amax(tuple(range(2, values.ndim)))
    positions = flat.shape[1] // channels
    fold = 1
    while channels * fold < _LONG_ROW and positions % (2 * fold) == 0:
        fold *= 2
    rows = flat.numpy().reshape(images, positions // fold, fold * channels).max(1)
    return torch.from_numpy(rows.reshape(images, fold, channels).max(1))


def _in_memory_order(values: Tensor) -> Tensor:
    """(N, …) → (N, values of an image) without a copy, whatever the layout of a dense tensor."""
    strides = values.stride()
    order = sorted(range(1, values.ndim), key=lambda dimension: -strides[dimension])
    return values.permute(0, *order).reshape(len(values), -1)


def _subsample(flat: Tensor) -> Tensor:
    if flat.shape[1] <= SUBSAMPLE:
        return flat.clone()
    places = _places(flat.shape[1])
    if flat.device.type == "cpu":
        return torch.from_numpy(flat.numpy().take(places.numpy(), axis=1))
    return flat[:, places.to(flat.device)]


@lru_cache(maxsize=256)
def _places(size: int) -> Tensor:
    """One place in each of `SUBSAMPLE` equal stretches; a plain stride could miss channels."""
    jitter = torch.rand(SUBSAMPLE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return ((torch.arange(SUBSAMPLE) + jitter) * (size / SUBSAMPLE)).long().clamp_max(size - 1)


def _quantiles(samples: np.ndarray, shapes: Sequence[Sequence[int]]) -> np.ndarray:
    """Quantiles (images, 5) of concatenated samples, one shape (images, values) for each layer.

    By linear interpolation between the two nearest values, as numpy's default.
    """
    found = []
    # Neighbours of the same width, which most have, are one array.
    for width, group in groupby(shapes, key=lambda shape: shape[1]):
        count = width * sum(images for images, _ in group)
        ascending = np.sort(samples[:count].reshape(-1, width), axis=1)
        samples = samples[count:]
        places = _QUANTILES * (width - 1)
        below = places.astype(np.intp)
        low, high = ascending[:, below], ascending[:, np.minimum(below + 1, width - 1)]
        found.append(low + (high - low) * (places - below))
    return np.concatenate(found)


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Places of the `count` largest values, largest first, ties by lower place."""
    places = np.arange(len(values))
    if count < len(values):
        places = np.flatnonzero(values >= np.partition(values, -count)[-count])
    return places[np.argsort(-values[places], kind="stable")][:count]
