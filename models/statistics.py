"""Statistics of feature maps, from what they were reduced to on the device.

The standard deviation comes from the L2 norm and the mean; quantiles come from the subsample.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, starmap
from typing import Any

import numpy as np
import torch
from msgspec import UNSET
from torch import Tensor

from models.reductions import Reductions
from models.types import ChannelStatistics, Kind, LayerFeatures, Quantiles

_QUANTILES = np.array([0.01, 0.25, 0.5, 0.75, 0.99])


class Channels:
    """Means and maxima of the channels of a batch, and which of them are the largest.

    What jobs of a batch ask for is mostly the same: the largest of all images are found together.
    """

    def __init__(self, means: np.ndarray, maxima: np.ndarray) -> None:
        """Args: float32 (N, C) each."""
        self._means, self._maxima = means, maxima
        self._found: dict[tuple[int, bool], tuple[list[Any], list[Any], list[Any]]] = {}

    def largest(
        self, row: int, *, count: int, by_size: bool
    ) -> tuple[list[int], list[float], list[float]]:
        """Places, means and maxima of an image's channels with the largest means, largest first.

        Ties go to the lower place. `by_size` compares magnitudes.
        """
        key = count, by_size
        if key not in self._found:
            places = _largest(np.abs(self._means) if by_size else self._means, count)
            at = np.arange(len(places))[:, None], places
            self._found[key] = places.tolist(), self._means[at].tolist(), self._maxima[at].tolist()
        indices, means, maxima = self._found[key]
        return indices[row], means[row], maxima[row]


@dataclass(frozen=True)
class Summary:
    """What `describe` needs of one image's tensor, on the host.

    Attributes:
        shape: of the tensor.
        channels: those of the batch, of which the image is `row`.
        quantiles: those of `Quantiles`, in its order.
        maps: float32 (C, h, w), still on the device, where an image grid was asked for.
    """

    shape: tuple[int, ...]
    channels: Channels
    row: int
    maps: Tensor | None
    mean: float
    std: float
    low: float
    high: float
    norm: float
    sparsity: float
    dead: int
    quantiles: list[float]


def summarise(reductions: Sequence[Reductions]) -> list[list[Summary]]:
    """Finish all reductions of a batch with one transfer: for each, one summary an image."""
    if not reductions:
        return []
    names = ("means", "maxima", "low", "norm", "zeros", "sample")
    parts = {name: [getattr(r, name) for r in reductions] for name in names}
    flat = torch.cat([t.reshape(-1) for name in names for t in parts[name]]).cpu().numpy()
    lengths = [sum(t.numel() for t in parts[name]) for name in names]
    means, maxima, low, norm, zeros, sample = _split(flat, lengths)
    images = [len(r.means) for r in reductions]
    counts = np.repeat([r.means.shape[1] for r in reductions], images)
    sizes = np.repeat([math.prod(r.shape) for r in reductions], images)
    starts = np.cumsum(counts) - counts
    mean = np.add.reduceat(means, starts, dtype=np.float64) / counts
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
    numbers: Iterator[Any] = zip(*(column.tolist() for column in columns.values()), strict=True)
    lengths = [r.means.numel() for r in reductions]
    spans = zip(_split(means, lengths), _split(maxima, lengths), strict=True)

    def summaries(r: Reductions, channels: Channels) -> list[Summary]:
        maps = [None] * len(r.means) if r.maps is None else r.maps
        # The columns stand in the order of a summary's fields.
        return [
            Summary(r.shape, channels, row, own, *next(numbers)) for row, own in enumerate(maps)
        ]

    return [
        summaries(r, Channels(*(values.reshape(r.means.shape) for values in span)))
        for r, span in zip(reductions, spans, strict=True)
    ]


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
    places, means, maxima = summary.channels.largest(
        summary.row, count=top, by_size=kind.startswith("grad_")
    )
    shares = [None] * len(places) if weights is None else weights[places].tolist()
    channels = zip(places, means, maxima, shares, strict=True)
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
        top_channels=tuple(starmap(ChannelStatistics, channels)),
        target=UNSET if target is None else target,
        grid=summary.maps[places].cpu().numpy() if grid and summary.maps is not None else None,
    )


def _split(flat: np.ndarray, lengths: Sequence[int]) -> list[np.ndarray]:
    """Parts of these lengths, as views."""
    starts = accumulate(lengths, initial=0)
    return [flat[start : start + length] for start, length in zip(starts, lengths, strict=False)]


def _quantiles(samples: np.ndarray, shapes: Sequence[Sequence[int]]) -> np.ndarray:
    """Quantiles (images, 5) of concatenated samples, one shape (images, values) for each layer.

    By linear interpolation between the two nearest values, as numpy's default.
    """
    found = []
    # Neighbours of the same width, which most have, are one array.
    for width, group in groupby(shapes, key=lambda shape: shape[1]):
        count = width * sum(images for images, _ in group)
        places = _QUANTILES * (width - 1)
        below = places.astype(np.intp)
        ranks = np.stack([below, np.minimum(below + 1, width - 1)])
        values = _at_ranks(samples[:count].reshape(-1, width), ranks)
        samples = samples[count:]
        found.append(values[:, 0] + (values[:, 1] - values[:, 0]) * (places - below))
    return np.concatenate(found)


def _at_ranks(samples: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """The values of some ranks in each row, ranks counted from the smallest value."""
    codes = samples.view(np.int32)
    if np.bitwise_or.reduce(codes, axis=None) & 0xFFFF:
        return np.sort(samples, axis=1)[:, ranks]
    # Values of bfloat16: their 16 bits are sorted by radix, several times as fast.
    keys = _ordered((codes >> 16).astype(np.int16))
    keys.sort(axis=1, kind="stable")
    return (_ordered(keys[:, ranks]).astype(np.int32) << 16).view(np.float32)


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Places (N, count) of the largest values of each row, largest first, ties by lower place."""
    places = np.arange(values.shape[1])
    count = min(count, len(places))
    # One integer of value and place; adding 0 takes the sign off zeros.
    keys = _ordered((values + 0).view(np.int32)).astype(np.int64) << 32 | places[::-1]
    best = np.partition(keys, -count, axis=1)[:, -count:]
    best.sort(axis=1)
    found: np.ndarray = places[::-1][best[:, ::-1] & 0xFFFFFFFF]
    return found


def _ordered(codes: np.ndarray) -> np.ndarray:
    """The bits of floats as integers in the order of the floats; a second time, the bits again."""
    ordered: np.ndarray = codes ^ (codes >> (8 * codes.itemsize - 1) & np.iinfo(codes.dtype).max)
    return ordered
