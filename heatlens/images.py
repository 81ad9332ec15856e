"""What a caller may give as an image, as the bytes that are sent."""

from __future__ import annotations

import io
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    ImageLike = str | PathLike[str] | bytes | Image.Image | np.ndarray


class Part(NamedTuple):
    """An encoded image and its name."""

    name: str
    data: bytes


def part_of(image: ImageLike) -> Part:
    """Encode an image, or read it.

    Args:
        image: a path; an encoded image as bytes; a PIL image; or an array of uint8, (height, width)
            or (height, width, 3 or 4). PIL images and arrays are sent as PNG, so nothing is lost.

    Raises:
        OSError: the file cannot be read.
        TypeError: it is none of these.
        ValueError: an array of another type or shape.
    """
    if isinstance(image, bytes | bytearray | memoryview):
        return Part("image", bytes(image))
    if isinstance(image, str | PathLike):
        path = Path(fspath(image))
        return Part(path.name, path.read_bytes())
    if hasattr(image, "save"):
        return Part("image.png", _png(image))
    if hasattr(image, "__array_interface__"):
        return Part("image.png", _png(_from_array(image)))
    raise TypeError(
        f"An image is a path, bytes, a PIL image or an array, not {type(image).__name__}."
    )


def _from_array(array: Any) -> Image.Image:
    from PIL import Image

    if str(array.dtype) != "uint8" or array.ndim not in (2, 3):
        raise ValueError(
            f"An array must be uint8, (height, width) or (height, width, channels); this one is "
            f"{array.dtype} {tuple(array.shape)}."
        )
    return Image.fromarray(array)


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
