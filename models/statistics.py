"""Statistics of feature maps, from what they were reduced to on the device.

The standard deviation comes from the L2 norm and the mean; quantiles come from the subsample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from msgspec import UNSET
from torch import Tensor

from models.reductions import Reductions
from models.types import ChannelStatistics, Kind, LayerFeatures, Quantiles

_QUANTILES = np.array([0.01, 0.25, 0.5, 0.75, 0.99])


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
