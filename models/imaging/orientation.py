"""The orientation that a file's metadata asks for, and how an image is turned upright."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import NamedTuple

from PIL import Image

ORIENTATION_TAG = 0x0112

# Bytes of a value of those TIFF types that have more than one.
_VALUE_SIZES = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}


class Turn(NamedTuple):
    """What brings an image upright: first swap the axes, then mirror."""

    transpose: Image.Transpose
    swap: bool
    mirror_x: bool
    mirror_y: bool


TURNS: Mapping[int, Turn] = {
    2: Turn(Image.Transpose.FLIP_LEFT_RIGHT, swap=False, mirror_x=True, mirror_y=False),
    3: Turn(Image.Transpose.ROTATE_180, swap=False, mirror_x=True, mirror_y=True),
    4: Turn(Image.Transpose.FLIP_TOP_BOTTOM, swap=False, mirror_x=False, mirror_y=True),
    5: Turn(Image.Transpose.TRANSPOSE, swap=True, mirror_x=False, mirror_y=False),
    6: Turn(Image.Transpose.ROTATE_270, swap=True, mirror_x=True, mirror_y=False),
    7: Turn(Image.Transpose.TRANSVERSE, swap=True, mirror_x=True, mirror_y=True),
    8: Turn(Image.Transpose.ROTATE_90, swap=True, mirror_x=False, mirror_y=True),
}
"""EXIF orientation 2 to 8; an image with any other value is upright."""


def orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8; 1 when there is none or it cannot be read."""
    try:
        if (exif := _exif(image)) is not None and not is_sound(exif):
            return 1
        value = image.getexif().get(ORIENTATION_TAG, 1)
    # Garbage in the metadata must not cost the image.
    except Exception:  # noqa: BLE001
        return 1
    return value if isinstance(value, int) else 1


def _exif(image: Image.Image) -> bytes | None:
    """EXIF data as the file has it, also where a PNG text holds it in hexadecimal digits."""
    text = image.info.get("Raw profile type exif")
    found = bytes.fromhex("".join(text.split("\n")[3:])) if text else image.info.get("exif")
    return found.removeprefix(b"Exif\0\0") if found else None


def is_sound(exif: bytes) -> bool:
    """Whether the directory of EXIF data, a small TIFF file, fits into it.

    A decoder follows every entry: thousands that point to the same bytes would fill the memory.
    """
    order = ">" if exif[:2] == b"MM" else "<"
    try:
        (start,) = struct.unpack_from(order + "L", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, start)
        entries = [
            struct.unpack_from(order + "HHL", exif, start + 2 + 12 * i) for i in range(count)
        ]
    except struct.error:
        return False
    size = sum(values * _VALUE_SIZES.get(kind, 1) for _, kind, values in entries)
    return bool(size <= len(exif))


def turn_box(
    inner: tuple[float, float], turn: Turn, size: tuple[int, int]
) -> tuple[float, float, float, float]:
    """Where the part `inner` (width, height) at the origin of an image lies after the turn."""
    width, height = inner
    gap_x, gap_y = size[0] - width, size[1] - height
    if turn.swap:
        width, height, gap_x, gap_y = height, width, gap_y, gap_x
    left = gap_x if turn.mirror_x else 0.0
    top = gap_y if turn.mirror_y else 0.0
    return left, top, left + width, top + height
