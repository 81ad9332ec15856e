"""Statistics of feature maps, from what they were reduced to on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, starmap
from typing import Any

import numpy as np
import torch
from msgspec import UNSET
from torch import Tensor

from models.reductions import NUMBERS, Reductions
from models.types import ChannelStatistics, Kind, LayerFeatures, Quantiles


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
        maps: float32 (C, h, w), still on the device, where an image grid was asked for.
        numbers: the `NUMBERS` of the image.
    """

    shape: tuple[int, ...]
    channels: Channels
    row: int
    maps: Tensor | None
    numbers: list[float]


def summarise(reductions: Sequence[Reductions]) -> list[list[Summary]]:
    """Finish all reductions of a batch with one transfer: for each, one summary an image."""
    if not reductions:
        return []
    flat = torch.cat([r.found.flatten() for r in reductions]).cpu().numpy()
    ends = accumulate((r.found.numel() for r in reductions), initial=0)
    layers = [
        flat[start:end].reshape(r.found.shape)
        for (start, end), r in zip(pairwise(ends), reductions, strict=True)
    ]
    numbers = iter(np.concatenate([found[:, :NUMBERS] for found in layers]).tolist())

    def summaries(r: Reductions, found: np.ndarray) -> list[Summary]:
        middle = (NUMBERS + found.shape[1]) // 2
        channels = Channels(found[:, NUMBERS:middle], found[:, middle:])
        maps = [None] * len(found) if r.maps is None else r.maps
        return [Summary(r.shape, channels, row, own, next(numbers)) for row, own in enumerate(maps)]

    return [summaries(r, found) for r, found in zip(reductions, layers, strict=True)]


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
    mean, std, low, high, norm, sparsity, dead, p01, p25, p50, p75, p99 = summary.numbers
    return LayerFeatures(
        layer=layer,
        kind=kind,
        shape=summary.shape,
        mean=mean,
        std=std,
        min=low,
        max=high,
        l2=norm,
        sparsity=sparsity,
        dead_channels=int(dead),
        quantiles=Quantiles(p01=p01, p25=p25, p50=p50, p75=p75, p99=p99),
        top_channels=tuple(starmap(ChannelStatistics, channels)),
        target=UNSET if target is None else target,
        grid=summary.maps[places].cpu().numpy() if grid and summary.maps is not None else None,
    )


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Places (N, count) of the largest values of each row, largest first, ties by lower place."""
    places = np.arange(values.shape[1])
    count = min(count, len(places))
    # One integer of value, its bits in the order of values, and place; adding 0 takes the sign off
    # zeros.
    bits = (values + 0).view(np.int32)
    keys = (bits ^ (bits >> 31 & 0x7FFFFFFF)).astype(np.int64) << 32 | places[::-1]
    best = np.partition(keys, -count, axis=1)[:, -count:]
    best.sort(axis=1)
    found: np.ndarray = places[::-1][best[:, ::-1] & 0xFFFFFFFF]
    return found
