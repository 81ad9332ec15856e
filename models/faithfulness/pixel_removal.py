"""Inputs whose pixels are removed or restored in a map's order, made a few at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from models.faithfulness.imputation import NOISE, impute

CURVE_STEPS = 56
"""Steps of deletion and insertion curves.

At 224 x 224 each changes 896 pixels, four of the authors' steps: a quarter of their passes, and
areas within 0.005 of theirs (measured on EfficientNet-Lite0 with photographs).
"""

IMPUTED_SHARES = (0.2, 0.4, 0.6, 0.8)
"""Shares of the pixels that ROAD removes."""

_BLUR_SIDE = 11
_BLUR_SIGMA = 5.0


@dataclass(frozen=True)
class Perturbed:
    """A sequence of changed inputs, made when they are needed.

    Attributes:
        count: how many there are.
        make: `make(first, last)` returns those in between, float32 (n, 3, H, W); called for each
            once, in order.
        at_once: most that are made for one step, where making them takes about as long as the pass.
    """

    count: int
    make: Callable[[int, int], Tensor]
    at_once: int | None = None


@dataclass(frozen=True)
class Original:
    """The image that maps are tried on.

    Attributes:
        inputs: normalised, float32 (3, H, W).
        seed: of random maps and noise.
    """

    inputs: Tensor
    seed: int

    @property
    def pixels(self) -> int:
        """Number of pixels."""
        return self.inputs.shape[1] * self.inputs.shape[2]

    @cached_property
    def blurred(self) -> Tensor:
        """The image under a Gaussian blur (11 x 11, sigma 5), padded with the mean colour."""
        at = torch.arange(_BLUR_SIDE, device=self.inputs.device) - _BLUR_SIDE // 2
        weights = torch.exp(-at.square() / (2 * _BLUR_SIGMA**2))
        weights = weights / weights.sum()
        planes = nn.functional.conv2d(
            self.inputs[:, None], weights.view(1, 1, -1, 1), padding=(_BLUR_SIDE // 2, 0)
        )
        rows = weights.view(1, 1, 1, -1)
        return nn.functional.conv2d(planes, rows, padding=(0, _BLUR_SIDE // 2))[:, 0]

    def random_map(self, shape: tuple[int, int]) -> Tensor:
        """A map (h, w) of uniform noise, as smooth on the image as any map of its shape."""
        noise = torch.rand(shape, generator=torch.Generator().manual_seed(self.seed))
        return noise.to(self.inputs.device)

    def enlarged(self, values: Tensor) -> Tensor:
        """A map (h, w) at the input's size, bilinear between pixel centres."""
        size = self.inputs.shape[1:]
        return nn.functional.interpolate(
            values[None, None], size, mode="bilinear", align_corners=False
        )[0, 0]


def kept(original: Original, values: Tensor) -> Perturbed:
    """One input: the image times the map, without its negative values, scaled to [0, 1]."""
    positive = original.enlarged(values.clamp_min(0))
    low, high = positive.min(), positive.max()
    mask = (positive - low) / (high - low) if bool(high > low) else torch.zeros_like(positive)
    return Perturbed(1, lambda first, last: (original.inputs * mask)[None][first:last])


def deleted(original: Original, values: Tensor) -> Perturbed:
    """The image without its 1/n, 2/n … first-ranked pixels; 0, the mean colour, replaces them."""
    ranks, counts = pixel_ranks(original, values), curve_counts(original.pixels)[1:]

    def make(first: int, last: int) -> Tensor:
        gone = ranks < counts[first:last, None, None].to(ranks.device)
        return torch.where(gone[:, None], 0.0, original.inputs)

    return Perturbed(len(counts), make)


def inserted(original: Original, values: Tensor) -> Perturbed:
    """The blurred image with none, 1/n, 2/n … of its pixels, first-ranked first, brought back."""
    ranks, counts = pixel_ranks(original, values), curve_counts(original.pixels)[:-1]

    def make(first: int, last: int) -> Tensor:
        back = ranks < counts[first:last, None, None].to(ranks.device)
        return torch.where(back[:, None], original.inputs, original.blurred)

    return Perturbed(len(counts), make)


def imputed(original: Original, values: Tensor) -> Perturbed:
    """The image with shares of its first-ranked, then of its last-ranked pixels imputed."""
    ranks, pixels = pixel_ranks(original, values), original.pixels
    counts = [round(share * pixels) for share in IMPUTED_SHARES]
    removed = [ranks < n for n in counts] + [ranks >= pixels - n for n in counts]
    generator = torch.Generator().manual_seed(original.seed)

    def make(first: int, last: int) -> Tensor:
        gone = torch.stack(removed[first:last])
        filled = impute(original.inputs, gone)
        # One image after the other, so that the noise does not depend on how many are made at
        # once.
        shape = original.inputs.shape
        noise = torch.stack([torch.randn(shape, generator=generator) for _ in gone])
        return filled + NOISE * gone[:, None] * noise.to(filled.device)

    return Perturbed(len(removed), make, at_once=2)


def pixel_ranks(original: Original, values: Tensor) -> Tensor:
    """Rank of each pixel, long (H, W): 0 for the greatest value; ties in reading order."""
    enlarged = original.enlarged(values)
    order = enlarged.flatten().argsort(descending=True, stable=True)
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order), device=order.device)
    return ranks.view_as(enlarged)


def curve_counts(pixels: int) -> Tensor:
    """How many pixels are changed at each point of a curve, long: 0 … all of them."""
    steps = min(CURVE_STEPS, pixels)
    return torch.tensor([round(i * pixels / steps) for i in range(steps + 1)])
