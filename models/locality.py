"""Tests where a layer's positions lie in the image, by changing patches of the image.

Patches of an image are changed one at a time. A layer is a map where the positions that respond to
a patch lie where the patch is, in both directions: neither the number of tokens nor the shape of an
output decides. Responses are taken relative to their mean over the patches, since global attention
is felt everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from models.layers import TokenLayout, to_map

_ROWS = 3
"""Patches in each direction."""
_PATCH = 7
"""Part of the image's side that a patch covers, as a divisor."""
_LEAST = 0.45
"""Correlation of the places where patches are felt with their own places that proves a layout.

Maps of random networks of many families have 0.8 and more, shuffled and exchanged ones less than
0.4.
"""
_DOUBTFUL = 0.2
"""Correlation with one image from which on more of them may prove a layout."""
_FEW_POSITIONS = 16
"""Maps of so few positions see much of the image at each: there one image tells little."""
_NOISE = 1e-11
"""Energy of a response, relative to that of the map, that may be rounding."""
_CHANNELS = (4, 32)
"""Fewest and most channels that are looked at, evenly spread."""
_VALUES = 1 << 15
"""Values of an image that are looked at where that leaves enough channels."""


class Verdict(Enum):
    """What the patches say of a layer's layouts."""

    PROVED = "proved"
    REFUTED = "refuted"
    CONSTANT = "constant"


@dataclass(frozen=True, eq=False)
class Response:
    """Where a layer feels the patches of one or more images, if it has a layout.

    Attributes:
        layout: the layout; None = plain (N, C, h, w).
        felt: (P, h, w), how strongly each patch is felt at each position, relative to the other
            patches there, with a mean of 1 for each patch; None where nothing responds.
    """

    layout: TokenLayout | None
    felt: Tensor | None

    @classmethod
    def of(cls, output: Tensor, layout: TokenLayout | None) -> Response:
        """Read a layer's output for images of `patched` in one layout."""
        maps = to_map(output, layout)
        fewest, most = _CHANNELS
        channels = min(most, max(fewest, _VALUES // maps[0, 0].numel()))
        maps = maps[:, :: max(1, maps.shape[1] // channels)].float()
        response = (maps[1:] - maps[:1]).square().sum(1)
        energy = response.sum((1, 2))
        noise = _NOISE * maps[0].square().sum()
        if not bool((energy > noise).all()) or not bool(energy.isfinite().all()):
            return cls(layout, None)
        mean = response.mean(0)
        tiny = mean.mean() * 1e-12
        relative = (response + tiny) / (mean + tiny)
        return cls(layout, relative / relative.mean((1, 2), keepdim=True))

    def and_to(self, other: Response) -> Response:
        """The response to the patches of other images as well."""
        if self.felt is None or other.felt is None:
            return self if other.felt is None else other
        return Response(self.layout, self.felt + other.felt)

    def locality(self, places: Tensor) -> Locality:
        """How it follows the patches, whose centres are at the places (P, 2)."""
        if self.felt is None:
            return Locality(self.layout, 0, None, 0.0)
        excess = (self.felt / self.felt.mean((1, 2), keepdim=True) - 1).clamp_min(0).square()
        turned = _likeness(excess.mT, places) if min(excess.shape[1:]) > 1 else None
        likeness = _likeness(excess, places)
        return Locality(self.layout, excess[0].numel(), likeness, turned or 0.0)


@dataclass(frozen=True)
class Locality:
    """How the places where patches are felt follow the patches, if a layer has a layout.

    Attributes:
        layout: the layout; None = plain (N, C, h, w).
        positions: number of the map's positions.
        likeness: correlation of the two places over all responses, in the worse direction; None
            where nothing responds.
        turned: the same with rows and columns exchanged.
    """

    layout: TokenLayout | None
    positions: int
    likeness: float | None
    turned: float

    @property
    def doubtful(self) -> bool:
        """Whether more images may tell more."""
        if self.likeness is None:
            return False
        return self.positions <= _FEW_POSITIONS or _DOUBTFUL <= self.likeness < _LEAST


def patched(image: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
    """The image and copies with one patch changed; the centres of the patches, (P, 2) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    channels, height, width = image.shape
    size = (max(1, height // _PATCH), max(1, width // _PATCH))
    images, places = [image], []
    for row in range(_ROWS):
        for column in range(_ROWS):
            top = round((row + 0.5) * height / _ROWS - size[0] / 2)
            left = round((column + 0.5) * width / _ROWS - size[1] / 2)
            changed = image.clone()
            patch = 3 * torch.randn(channels, *size, generator=generator)
            changed[:, top : top + size[0], left : left + size[1]] = patch
            images.append(changed)
            places.append([(top + size[0] / 2) / height, (left + size[1] / 2) / width])
    return torch.stack(images), torch.tensor(places)


def judge(localities: Iterable[Locality]) -> tuple[Verdict, Locality | None]:
    """Choose among the layouts that a layer may have.

    Returns:
        Whether one is proved, all are refuted, or nothing responds to the image; and the one that
        is proved, or the likeliest by its shape where nothing responds.
    """
    found = list(localities)
    measured = [one for one in found if one.likeness is not None]
    if not measured:
        return (Verdict.CONSTANT, found[0]) if found else (Verdict.REFUTED, None)
    best = max(measured, key=lambda one: one.likeness or 0.0)
    likeness = best.likeness or 0.0
    turned = max(one.turned for one in measured) > likeness
    return (Verdict.REFUTED, None) if turned or likeness < _LEAST else (Verdict.PROVED, best)


def _likeness(excess: Tensor, places: Tensor) -> float | None:
    """Correlation of the row of a response with its patch's row, or of the columns if that is less.

    It is weighted by the excess (P, h, w) of each patch at each position; None without any.
    """
    likenesses = []
    for axis, size in enumerate(excess.shape[1:]):
        if size == 1:
            continue
        weights = excess.sum(2 - axis)
        weights = weights / weights.sum()
        felt = (torch.arange(size) + 0.5) / size
        patch = places[:, axis] - (weights.sum(1) @ places[:, axis])
        felt = felt - weights.sum(0) @ felt
        spread = (weights.sum(1) @ patch.square()) * (weights.sum(0) @ felt.square())
        likenesses.append(float(patch @ weights @ felt / spread.sqrt()))
    return None if any(map(math.isnan, likenesses)) else min(likenesses, default=None)
