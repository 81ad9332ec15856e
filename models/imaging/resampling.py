"""Resizes parts of images in C (`resampling.c`), where that was built.

It is built as the package is installed, wherever there is a compiler. Without it Pillow does the same,
in four times the time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
from PIL import Image

from models.compiled import INT32, INT64, POINTER, find_function

# Pixels on each side that a filter looks at.
_REACHES: Mapping[Image.Resampling, int] = {
    Image.Resampling.BILINEAR: 1,
    Image.Resampling.BICUBIC: 2,
}

_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def resize_part(
    image: Image.Image,
    size: tuple[int, int],
    resample: Image.Resampling,
    part: tuple[int, int, int, int],
) -> np.ndarray | None:
    """A part (left, top, right, bottom) of a resized image, uint8 (height, width, 3).

    It is exactly what Pillow makes where it resizes along the rows first. None where this is left to
    Pillow: other modes than RGB, other filters than bilinear and bicubic, and images that do not lie
    in one block of memory, which those of more than 4 megapixels do not.
    """
    resize, reach = _function(), _REACHES.get(resample)
    if resize is None or reach is None or image.mode != "RGB":
        return None
    try:
        _, lent = image.__arrow_c_array__()
    except ValueError:
        return None
    left, top, right, bottom = part
    resized = np.empty((bottom - top, right - left, 3), np.uint8)
    array = _pointer(lent, b"arrow_array")
    done = resize(array, *image.size, *size, *part, reach, resized.ctypes.data)
    return resized if done else None


@cache
def _function() -> Callable[..., int] | None:
    kinds = (POINTER, *[INT64] * 8, INT32, POINTER)
    return find_function("models.imaging._resampling", "heatlens_resize", *kinds)
