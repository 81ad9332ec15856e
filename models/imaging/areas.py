"""Areas of an image as masks of the model's input."""

from __future__ import annotations

import binascii
import math
from collections.abc import Sequence

import numpy as np

from models.areas import Area
from models.errors import HeatlensError, InvalidOption
from models.image_types import Preprocess
from models.imaging.decode import DecodeLimits, decode, inspect
from models.imaging.preprocess import to_input, to_original
from models.types import Geometry

MAX_MASK_PIXELS = 1_000_000

_LIMITS = DecodeLimits(max_pixels=MAX_MASK_PIXELS, min_side=1)
_DARK = 127
_MALFORMED = (
    f"A mask is base64 of a PNG of at most {MAX_MASK_PIXELS} pixels; it is stretched over the image, "
    "so a small one is enough."
)


def draw_areas(areas: Sequence[Area], geometry: Geometry) -> np.ndarray:
    """Masks of the model's input, uint8 (areas, H, W) of 0 and 1: pixels whose centre is in the area.

    An area between two centres is the pixel that it lies in.

    Raises:
        InvalidOption: a mask is malformed, or an area has no pixel in the model's input.
    """
    return np.stack([_draw(area, geometry) for area in areas]).astype(np.uint8)


def _draw(area: Area, geometry: Geometry) -> np.ndarray:
    columns = np.arange(geometry.input_width) + 0.5
    rows = np.arange(geometry.input_height) + 0.5
    left, top = to_original(geometry, 0, 0)
    xs = left + columns * geometry.region.width / geometry.input_width
    ys = top + rows * geometry.region.height / geometry.input_height
    drawn = np.zeros((len(rows), len(columns)), bool)
    if area.mask is not None:
        drawn = _stretched(_decode(area.mask), xs / geometry.width, ys / geometry.height)
    elif area.box is not None:
        box = area.box
        across = (xs >= box.x) & (xs < box.x + box.width)
        down = (ys >= box.y) & (ys < box.y + box.height)
        drawn = down[:, None] & across
        x, y = to_input(geometry, box.x + box.width / 2, box.y + box.height / 2)
        if not drawn.any() and 0 <= x < len(columns) and 0 <= y < len(rows):
            drawn[math.floor(y), math.floor(x)] = True
    if not drawn.any():
        raise InvalidOption(
            "An area has no pixel in the part of the image that the model sees (`image.region`).",
            field="targets",
        )
    return drawn


def _stretched(mask: np.ndarray, across: np.ndarray, down: np.ndarray) -> np.ndarray:
    """The mask at shares of the image's width and height; what is beyond the image is outside."""
    height, width = mask.shape
    x, y = (np.floor(share * size).astype(int) for share, size in ((across, width), (down, height)))
    inside = ((y >= 0) & (y < height))[:, None] & (x >= 0) & (x < width)
    drawn: np.ndarray = mask[np.ix_(y.clip(0, height - 1), x.clip(0, width - 1))] & inside
    return drawn


def _decode(text: str) -> np.ndarray:
    """The pixels of a mask that are not dark, bool (height, width)."""
    try:
        data = binascii.a2b_base64(text.partition(";base64,")[2] or text)
        if inspect(data, limits=_LIMITS).media_type != "image/png":
            raise InvalidOption(_MALFORMED, field="targets")
        decoded = decode(data, limits=_LIMITS, preprocess=Preprocess(resize=8, crop=(8, 8)))
    except (HeatlensError, ValueError):
        raise InvalidOption(_MALFORMED, field="targets") from None
    lit: np.ndarray = np.asarray(decoded.image).max(2) > _DARK
    return lit
