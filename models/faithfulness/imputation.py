"""Noisy linear imputation: removed pixels are filled in from their neighbours (ROAD)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

NOISE = 0.01
"""Standard deviation of the noise on imputed pixels, in normalised space."""

RESIDUAL = 1e-3
"""Where the solver stops: the residual of each colour plane relative to its right-hand side."""

_MOST_ITERATIONS = 500


def impute(image: Tensor, removed: Tensor) -> Tensor:
    """Fill in removed pixels so that each is the weighted mean of its eight neighbours.

    From Rong et al. 2022, section 5. Direct neighbours weigh 1/6, diagonal ones 1/12; at the
    border, where some are missing, the weights are scaled to sum to 1 (as in the authors' code).
    The sparse, symmetric and positive definite system is solved by conjugate gradients, started
    from a coarse-to-fine guess, to a relative residual of `RESIDUAL`. Every image needs at least
    one pixel that is left.

    Args:
        image: float32 (3, H, W).
        removed: bool (n, H, W).

    Returns:
        float32 (n, 3, H, W), without the noise.
    """
    count, (height, width) = len(removed), removed.shape[1:]
    hole = removed[:, None].expand(-1, 3, -1, -1).reshape(-1, 1, height, width).to(image.dtype)
    known = (1 - hole) * image[:, None].repeat(count, 1, 1, 1)
    weight = _neighbours(torch.ones_like(known[:1]))
    target = hole * _neighbours(known)
    filled = hole * _coarse_to_fine(known, 1 - hole)
    residual = target - hole * (weight * filled - _neighbours(filled))
    direction = residual.clone()
    squared = _dot(residual, residual)
    goal = RESIDUAL**2 * _dot(target, target)
    for _ in range(_MOST_ITERATIONS):
        if bool((squared <= goal).all()):
            break
        product = hole * (weight * direction - _neighbours(direction))
        step = _ratio(squared, _dot(direction, product))
        filled.add_(step * direction)
        residual.sub_(step * product)
        previous, squared = squared, _dot(residual, residual)
        direction.mul_(_ratio(squared, previous)).add_(residual)
    return (known + filled).view(count, 3, height, width)


def _neighbours(planes: Tensor) -> Tensor:
    """The weighted sum of each pixel's neighbours, for (N, 1, H, W).

    The weights are (1 2 1) along the rows times (1 2 1) along the columns, less the pixel itself,
    over 12: sums of shifted planes take a tenth of the time of a convolution with a single channel.
    """
    rows = 2 * planes
    rows[:, :, 1:] += planes[:, :, :-1]
    rows[:, :, :-1] += planes[:, :, 1:]
    both = 2 * rows
    both[..., 1:] += rows[..., :-1]
    both[..., :-1] += rows[..., 1:]
    return both.sub_(planes, alpha=4).div_(12)


def _coarse_to_fine(known: Tensor, mask: Tensor) -> Tensor:
    """A smooth guess: unknown pixels are read from the known means of ever larger blocks."""
    height, width = mask.shape[2:]
    if max(height, width) == 1:
        return known / mask.clamp_min(1e-6)
    pool = nn.functional.avg_pool2d
    share = pool(mask, 2, ceil_mode=True)
    mean = pool(known, 2, ceil_mode=True) / share.clamp_min(1e-6)
    coarse_mask = (share > 0).to(mask.dtype)
    coarse = _coarse_to_fine(mean * coarse_mask, coarse_mask)
    fine = nn.functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
    return torch.where(mask > 0, known, fine)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).sum((1, 2, 3), keepdim=True)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, 0 where a plane is solved exactly."""
    some = denominator > 0
    return torch.where(some, numerator / torch.where(some, denominator, 1.0), 0.0)
