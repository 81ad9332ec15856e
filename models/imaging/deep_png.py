"""PNG images with 16-bit samples, whose picture may not be in the high bytes alone."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from models.imaging import png_chunks
from models.imaging.modes import on_white, to_rgb
from models.imaging.samples import depth_of, to_levels

# How Pillow unpacks colour, of which it keeps the high bytes, and what makes it unpack the low ones
# instead: it takes the second byte of each sample for the high one then.
_LOW_BYTES = {"RGB;16B": "RGB;16L", "RGBA;16B": "RGBA;16L"}
# Grey and alpha have as many bytes together as an 8-bit pixel of four bands.
_GREY_ALPHA, _ALL_BYTES = "LA;16B", "RGBA"


def is_deep(data: bytes) -> bool:
    """Whether a PNG file has 16-bit samples."""
    return data[24:25] == b"\x10"


def read(image: Image.Image, data: bytes) -> tuple[Image.Image, tuple[str, ...]]:
    """Make a loaded 16-bit image RGB, and say what had to be assumed.

    Args:
        image: as Pillow decodes it: all bits of grey, the high bytes of colour.
        data: the file.
    """
    declared = png_chunks.significant_bits(data)
    if image.mode.startswith("I"):
        words, alpha = samples(image, data), False
    else:
        greatest = int(np.asarray(image)[..., :3].max())
        depth = depth_of(greatest << 8 | 0xFF, declared)
        if depth.bits == 16:
            return to_rgb(image), depth.warnings
        words = samples(image, data)
        alpha = words.shape[2] in (2, 4)
    values, warnings = to_levels(words[..., :-1] if alpha else words, declared_bits=declared)
    rgb = Image.fromarray(np.broadcast_to(values, (*values.shape[:2], 3)))
    if alpha:
        opacity = to_levels(words[..., -1], declared_bits=declared).values
        rgb = on_white(rgb, Image.fromarray(opacity))
    elif "transparency" in image.info:
        shown = (words != image.info["transparency"]).any(axis=-1)
        rgb = on_white(rgb, Image.fromarray(shown))
    return rgb, warnings


def samples(image: Image.Image, data: bytes) -> np.ndarray:
    """Samples of a loaded 16-bit image, uint16 (height, width, 1 to 4): grey or RGB, alpha."""
    if image.mode.startswith("I"):
        return np.asarray(image).astype(np.uint16)[..., None]
    with Image.open(io.BytesIO(data), formats=("PNG",)) as high:
        rawmode = str(high.tile[0].args)
        if rawmode == _GREY_ALPHA:
            return _unpacked(data, _ALL_BYTES).view(">u2")
        words = np.asarray(high).astype(np.uint16)
    words <<= 8
    words |= _unpacked(data, _LOW_BYTES[rawmode])
    return words


def _unpacked(data: bytes, rawmode: str) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        image.tile = [tile._replace(args=rawmode) for tile in image.tile]
        return np.asarray(image)
