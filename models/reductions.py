"""Reductions of feature maps on their device, so that only a few numbers leave it.

They are the cheap ones: means, norms, extremes, and a fixed subsample of `SUBSAMPLE` values for the
quantiles, one at random from each of as many equal stretches of the tensor (all values of tensors
that are no larger).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

SUBSAMPLE = 2048
# Bytes of a batch up to which a tensor is kept and reduced later.
_SMALL = 5 << 18
# Bytes of neighbouring values that torch reduces at the speed of memory.
_ROW_BYTES = 128
# Neighbouring positions that are summed as channels of their own, so that rows are long.
_FOLD = 32


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


Reduction = Callable[[], Reductions]
"""Gives what a tensor is reduced to."""


def reduce_later(
    tensor: Tensor, *, channels_last: bool = False, keep_maps: bool = False, stays: bool = False
) -> Reduction:
    """Reduce a batch when the result is called, if that is the faster way.

    That is done from a copy, unless the tensor `stays` as it is.

    A small tensor of the CPU takes several times as long in the middle of a network's pass, where
    each operation finds the processor's caches full of other code. Others are reduced at once.
    """
    if tensor.device.type == "cpu" and tensor.nbytes <= _SMALL:
        kept = tensor.float()
        if kept is tensor and not stays:
            kept = tensor.clone()
        return partial(reduce, kept, channels_last=channels_last, keep_maps=keep_maps)
    reductions = reduce(tensor, channels_last=channels_last, keep_maps=keep_maps)
    return lambda: reductions


def reduce(tensor: Tensor, *, channels_last: bool = False, keep_maps: bool = False) -> Reductions:
    """Reduce a batch in float32, on the tensor's device.

    Args:
        tensor: (N, C, h, w) or (N, C); (N, h, w, C) or (N, tokens, C) if `channels_last`.
        channels_last: whether the last dimension is the channels' one.
        keep_maps: whether to keep the maps themselves (tensors with two spatial dimensions only).
    """
    on_host = tensor.device.type == "cpu"
    values = tensor if on_host and tensor.dtype == torch.bfloat16 else tensor.float()
    if 0 in values.stride():
        # An expanded tensor, such as the gradient of a mean, has no memory order of its own.
        values = values.contiguous()
    shape = tuple(values.shape[1:])
    if channels_last and values.ndim > 2:
        values = values.movedim(-1, 1)
    strides = values.stride()
    order = sorted(range(1, values.ndim), key=lambda dimension: -strides[dimension])
    # Without a copy, whatever the layout of a dense tensor.
    flat = values.permute(0, *order).reshape(len(values), -1)
    channels = values.shape[1] if on_host and values.ndim > 2 and order[-1] == 1 else 0
    totals = _of_half(flat, channels) if channels and flat.dtype == torch.bfloat16 else None
    if totals is None:
        values, flat = values.float(), flat.float()
        by_channel = _of_channels_last(flat, channels) if channels else _of_channels(values)
        totals = (*by_channel, *(_totals_by_numpy(flat) if on_host else _totals(flat)))
    means, maxima, low, norm, zeros = totals
    return Reductions(
        shape=shape,
        means=means,
        maxima=maxima,
        low=low,
        norm=norm,
        zeros=zeros,
        sample=_subsample(flat),
        maps=values.to(torch.float32, copy=True) if keep_maps and values.ndim == 4 else None,
    )


def _of_channels(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and maximum of each channel, (N, C, …) → (N, C) each."""
    space = tuple(range(2, values.ndim))
    if space:
        return values.mean(space), values.amax(space)
    # Nothing that is kept may be the tensor itself: what follows the layer may work in place.
    means = values.clone()
    return means, means


def _of_channels_last(flat: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """The same on the CPU, from (N, values of an image) with the channels last in memory."""
    positions = flat.view(len(flat), -1, channels)
    return _by_rows(positions, torch.sum) / positions.shape[1], _by_rows(positions, torch.amax)


def _by_rows(positions: Tensor, how: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Reduce (N, positions, C) to (N, C) in rows of several positions.

    Where rows are none, torch takes twice as long for sums and thirty times as long for maxima.
    """
    images, count, channels = positions.shape
    row = _ROW_BYTES // positions.element_size()
    fold = row // math.gcd(channels, row)
    whole = count // fold * fold
    if fold == 1 or not whole:
        return how(positions, 1)
    rows = positions[:, :whole].reshape(images, -1, fold * channels)
    folded = how(rows, 1).view(images, fold, channels)
    if whole < count:
        folded = torch.cat([folded, positions[:, whole:]], 1)
    return how(folded, 1)


_Totals = tuple[Tensor, Tensor, Tensor]
"""Minimum, L2 norm and number of zeros of each image, (N,) each."""


def _totals(flat: Tensor) -> _Totals:
    """The totals of (N, values of an image)."""
    zeros = flat.shape[1] - flat.count_nonzero(1)
    return flat.amin(1), torch.linalg.vector_norm(flat, dim=1), zeros.float()


def _totals_by_numpy(flat: Tensor) -> _Totals:
    """The same on the CPU, where numpy reduces and counts several times faster than torch does."""
    images = flat.numpy()
    # In parts, whose rounding errors are smaller.
    parts = images.reshape(len(images), math.gcd(images.shape[1], _FOLD), -1)
    norms = np.sqrt(np.vecdot(parts, parts).sum(1, dtype=np.float64)).astype(np.float32)
    # Counting the booleans is faster than counting the floats.
    zeros = _zeros(images != 0)
    return torch.from_numpy(images.min(1)), torch.from_numpy(norms), zeros


def _zeros(images: np.ndarray) -> Tensor:
    zeros = [image.size - np.count_nonzero(image) for image in images]
    # Torch's own constructor takes several times as long.
    return torch.from_numpy(np.array(zeros, dtype=np.float32))


def _of_half(flat: Tensor, channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """Means and maxima of channels, and the totals, of bfloat16 values with the channels last.

    All but the sums reads the bits as integers: from 0 on they are in the order of the values, and
    negative numbers, the nearest to 0 first, come below. None where that does not do: for zeros
    with a sign, for values that are not finite.
    """
    codes = flat.view(torch.int16)
    integers = codes.numpy()
    lowest = integers.min(1)
    if lowest.min() == np.iinfo(np.int16).min:
        return None
    means, norms = _sums_of_half(flat, channels)
    if not bool(norms.isfinite().all()):
        return None
    positions = codes.view(len(flat), -1, channels)
    highest = _by_rows(positions, torch.amax)
    if int(highest.min()) < 0:
        highest = torch.where(highest < 0, _by_rows(positions, torch.amin), highest)
    if lowest.min() < 0:
        farthest = integers.view(np.uint16).max(1).view(np.int16)
        lowest = np.where(lowest < 0, farthest, lowest)
    low = torch.from_numpy(lowest).view(torch.bfloat16).float()
    return means, highest.view(torch.bfloat16).float(), low, norms, _zeros(integers)


def _sums_of_half(flat: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Means of channels and L2 norms, in float32.

    By what a batch-norm begins with: torch's one reduction of bfloat16 that gives float32.
    """
    images, size = flat.shape
    width = channels * math.gcd(size // channels, _FOLD)
    rows, unused = flat.view(images, -1, width), (torch.zeros(width), torch.zeros(width))
    found = [torch.batch_norm_update_stats(row.T[None, ..., None], *unused, 1.0) for row in rows]
    means, variances = (torch.stack(parts) for parts in zip(*found, strict=True))
    squares = (variances + means * means).sum(1) * rows.shape[1]
    return means.view(images, -1, channels).mean(1), squares.sqrt()


def _subsample(flat: Tensor) -> Tensor:
    if flat.shape[1] <= SUBSAMPLE:
        return flat.to(torch.float32, copy=True)
    places = _places(flat.shape[1])
    if flat.device.type != "cpu":
        return flat[:, places.to(flat.device)]
    if flat.dtype == torch.bfloat16:
        taken = flat.view(torch.int16).numpy().take(places.numpy(), axis=1)
        return torch.from_numpy(taken).view(torch.bfloat16).float()
    return torch.from_numpy(flat.numpy().take(places.numpy(), axis=1))


@lru_cache(maxsize=256)
def _places(size: int) -> Tensor:
    """One place in each of `SUBSAMPLE` equal stretches; a plain stride could miss channels."""
    jitter = torch.rand(SUBSAMPLE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return ((torch.arange(SUBSAMPLE) + jitter) * (size / SUBSAMPLE)).long().clamp_max(size - 1)
