"""Masks that perturbation methods lay over the input, made a chunk at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

GRID = 7
KEPT = 0.5


def varying_channels(activation: Tensor) -> Tensor:
    """Indices (long) of the channels of (K, h, w) that are not constant and so make a mask."""
    values = activation.flatten(1)
    return (values.amax(1) > values.amin(1)).nonzero().flatten()


def unit_masks(channels: Tensor, size: tuple[int, int]) -> Tensor:
    """Enlarge channels to the input and scale each to [0, 1]: s(Up(A_k)) in the words of Score-CAM.

    Bilinear between pixel centres (`align_corners=False`, as in the authors' code), then min-max,
    so that every mask reaches both 0 and 1: (n, h, w), none constant, → float32 (n, 1, H, W).
    """
    masks = nn.functional.interpolate(channels[:, None], size, mode="bilinear", align_corners=False)
    low, high = masks.amin((2, 3), keepdim=True), masks.amax((2, 3), keepdim=True)
    return (masks - low) / (high - low)


@dataclass(frozen=True)
class RandomMasks:
    """The masks of RISE (Petsiuk et al. 2018, section 3.2), kept as small grids.

    A mask is a random binary 7 x 7 grid, enlarged bilinearly to 8 x 8 cells and cropped at a random
    place within one cell. 4,000 grids take 0.2 MB and milliseconds to draw, their masks at 224 x
    224 would take 800 MB: masks are enlarged a chunk at a time and not kept.

    Attributes:
        grids: float32 (N, 7, 7), each 0 or 1.
        shifts: long (N, 2), the crop's first row and column.
        size: (H, W) of the masks.
    """

    grids: Tensor
    shifts: Tensor
    size: tuple[int, int]

    @classmethod
    def draw(cls, count: int, size: tuple[int, int], generator: torch.Generator) -> RandomMasks:
        """Draw `count` masks; each cell is kept with probability 1/2."""
        grids = (torch.rand(count, GRID, GRID, generator=generator) < KEPT).float()
        shifts = [torch.randint(cell, (count,), generator=generator) for cell in _cells(size)]
        return cls(grids=grids, shifts=torch.stack(shifts, 1), size=size)

    def masks(self, first: int, last: int, device: torch.device) -> Tensor:
        """Masks number `first` to `last` - 1: float32 (n, H, W) in [0, 1]."""
        grids = self.grids[first:last].to(device)
        shifts = self.shifts[first:last].to(device)
        rows, columns = (
            _enlarging(cell, device)[shift[:, None] + torch.arange(side, device=device)]
            for cell, side, shift in zip(_cells(self.size), self.size, shifts.T, strict=True)
        )
        return rows @ grids @ columns.mT


def _cells(size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a cell in pixels."""
    return math.ceil(size[0] / GRID), math.ceil(size[1] / GRID)


def _enlarging(cell: int, device: torch.device) -> Tensor:
    """Weights (8 * cell, 7) that enlarge a side of the grid bilinearly."""
    unit = torch.eye(GRID, device=device)[None]
    side = (GRID + 1) * cell
    return nn.functional.interpolate(unit, side, mode="linear", align_corners=False)[0].T
