"""What is written in C (`reductions.c`), for where it was built.

It is built as the package is installed, wherever there is a compiler. Without it torch does the same,
in several times the time for the statistics of many layers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from models.compiled import INT32, INT64, POINTER, find_function

_TYPES = torch.float32, torch.bfloat16


def reduces(tensor: Tensor) -> bool:
    """Whether `reduce` takes tensors of this device and type."""
    return tensor.device.type == "cpu" and tensor.dtype in _TYPES and _function() is not None


def reduce(
    tensor: Tensor, layout: tuple[int, int, int], places: Tensor, quantiles: Tensor
) -> Tensor | None:
    """Reduce a batch in one pass over its memory.

    Args:
        tensor: (N, …), one that is reduced here, with images that are dense in memory.
        layout: how many groups, positions and channels an image's memory is.
        places: int64, where in an image the values are whose quantiles are found.
        quantiles: float64 (5,).

    Returns:
        What `Reductions` calls found. None where a value is not finite, or all are too large or too
        small for their squares in float32: the numbers would be wrong.
    """
    function = _function()
    if function is None:
        raise RuntimeError("reductions.c is not built")
    images, (groups, _, channels) = tensor.shape[0], layout
    found = torch.empty(images, 7 + quantiles.numel() + 2 * groups * channels)
    right = function(
        tensor.data_ptr(),
        tensor.dtype == torch.bfloat16,
        images,
        tensor.stride(0),
        *layout,
        places.numel(),
        places.data_ptr(),
        quantiles.data_ptr(),
        found.data_ptr(),
    )
    return found if right else None


@cache
def _function() -> Callable[..., int] | None:
    kinds = (POINTER, INT32, *[INT64] * 6, *[POINTER] * 3)
    return find_function("models._reductions", "heatlens_reduce", *kinds)
