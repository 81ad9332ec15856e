"""From untrusted bytes to an RGB image, within limits.

Only the format that the first bytes announce is tried, the size is read from the header and checked
before memory for pixels is taken, and whatever goes wrong inside the decoder leaves as one of our
own errors with our own words.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from models.errors import (
    HeatlensError,
    ImageTooLarge,
    ImageTooSmall,
    ImageUndecodable,
    UnsupportedMediaType,
)
from models.types import Preprocess, Struct

FORMATS: Mapping[str, str] = {
    "image/jpeg": "JPEG",
    "image/png": "PNG",
    "image/webp": "WEBP",
    "image/bmp": "BMP",
    "image/gif": "GIF",
    "image/tiff": "TIFF",
}
"""Media types that are decoded, and the name of each one's decoder."""

CANVAS_SIDE = 1024
"""Longest side, in pixels, at which a whole image is drawn."""

_MAGIC = (
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"BM", "image/bmp"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
    (b"II*\0", "image/tiff"),
    (b"MM\0*", "image/tiff"),
    (b"II+\0", "image/tiff"),
    (b"MM\0+", "image/tiff"),
)

_ORIENTATION_TAG = 0x0112


class _Turn(NamedTuple):
    """What brings an image upright: first swap the axes, then mirror."""

    transpose: Image.Transpose
    swap: bool
    mirror_x: bool
    mirror_y: bool


_TURNS: Mapping[int, _Turn] = {
    2: _Turn(Image.Transpose.FLIP_LEFT_RIGHT, swap=False, mirror_x=True, mirror_y=False),
    3: _Turn(Image.Transpose.ROTATE_180, swap=False, mirror_x=True, mirror_y=True),
    4: _Turn(Image.Transpose.FLIP_TOP_BOTTOM, swap=False, mirror_x=False, mirror_y=True),
    5: _Turn(Image.Transpose.TRANSPOSE, swap=True, mirror_x=False, mirror_y=False),
    6: _Turn(Image.Transpose.ROTATE_270, swap=True, mirror_x=True, mirror_y=False),
    7: _Turn(Image.Transpose.TRANSVERSE, swap=True, mirror_x=True, mirror_y=True),
    8: _Turn(Image.Transpose.ROTATE_90, swap=True, mirror_x=False, mirror_y=True),
}

# An image drafted to at least twice the size it will be resized to keeps what the resize needs:
# the model input differs by less than half a level of 256 on average and by 8 at most (measured on
# photographs). Filters that jump need every pixel.
_DRAFT_MARGIN = 2
_DRAFT_SCALES = (8, 4, 2)
_NEVER_DRAFTED = ("nearest", "box")

# A progressive JPEG may announce any number of passes over all its pixels in a few bytes each;
# encoders write about ten. The pattern is a start-of-scan marker with its length and component
# count: other data is not taken for one.
_MAX_JPEG_SCANS = 100
_JPEG_SCAN = re.compile(rb"\xff\xda\x00[\x08\x0a\x0c\x0e][\x01-\x04]")


class DecodeLimits(Struct):
    """What an image may be at most, and at least.

    Attributes:
        max_bytes: size of the encoded image.
        max_pixels: width times height. Above 178 megapixels Pillow's own limit holds.
        min_side: pixels that width and height must have.
    """

    max_bytes: int = 10_000_000
    max_pixels: int = 50_000_000
    min_side: int = 2


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """A decoded image.

    Attributes:
        image: RGB, upright; a large photograph may have a half, quarter or eighth of its size.
        width: width of the original in pixels, after EXIF rotation.
        height: its height.
        box: (left, top, right, bottom) of the original within `image`, whose last pixels may lie
            partly outside it when it is reduced.
        drafted: whether `image` is smaller than the original.
    """

    image: Image.Image
    width: int
    height: int
    box: tuple[float, float, float, float]
    drafted: bool


def sniff(data: bytes) -> str | None:
    """Media type by the first bytes, None when it is not one that is decoded."""
    for magic, media_type in _MAGIC:
        if data.startswith(magic):
            return media_type
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return None


def decode(
    data: bytes, *, limits: DecodeLimits, preprocess: Preprocess, keep_original: bool = False
) -> DecodedImage:
    """Decode the first frame of an image to upright RGB.

    EXIF orientation is applied, transparency composited on white, and every other mode (CMYK,
    palette, grey, 1-bit, 16-bit, 32-bit, float) becomes RGB; colour profiles are ignored, as the
    libraries that trained the models do. Large JPEGs are decoded at a reduced size, still twice
    what `preprocess` resizes to.

    Args:
        data: the encoded image.
        limits: caps.
        preprocess: what the image is for; it says how small a JPEG may be decoded.
        keep_original: keep enough pixels to draw the whole image, too.

    Raises:
        UnsupportedMediaType: not a format that is decoded.
        ImageTooLarge: more bytes or pixels than the caps allow.
        ImageTooSmall: a side shorter than the cap allows.
        ImageUndecodable: damaged or truncated.
    """
    if len(data) > limits.max_bytes:
        raise ImageTooLarge(f"The image has more than {limits.max_bytes} bytes.")
    media_type = sniff(data)
    if media_type is None:
        allowed = ", ".join(FORMATS)
        raise UnsupportedMediaType(f"The image is of no known format. Allowed: {allowed}.")
    try:
        _check_header(data, media_type, limits)
        with Image.open(io.BytesIO(data), formats=(FORMATS[media_type],)) as image:
            _check_size(image.size, limits)
            return _load(image, preprocess, keep_original=keep_original)
    except HeatlensError:
        raise
    except (MemoryError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLarge("The image needs too much memory to decode.") from error
    # Damaged bytes raise anything at all inside a decoder.
    except Exception as error:
        raise ImageUndecodable("The image is damaged or truncated.") from error


def _check_header(data: bytes, media_type: str, limits: DecodeLimits) -> None:
    """Refuse what costs much before Pillow lets us see a size."""
    if media_type == "image/webp" and data[12:16] == b"VP8X" and len(data) >= 30:
        # Opening an extended WebP already takes memory for its canvas.
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
        _check_size((width, height), limits)
    if media_type == "image/jpeg" and len(_JPEG_SCAN.findall(data)) > _MAX_JPEG_SCANS:
        raise ImageUndecodable("The image has too many progressive scans.")


def _check_size(size: tuple[int, int], limits: DecodeLimits) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        raise ImageTooLarge(f"The image has more than {limits.max_pixels} pixels.")
    if min(width, height) < limits.min_side:
        raise ImageTooSmall(f"The image is less than {limits.min_side} pixels wide or high.")


def _load(image: Image.Image, preprocess: Preprocess, *, keep_original: bool) -> DecodedImage:
    width, height = image.size
    scale = _draft(image, preprocess, keep_original=keep_original)
    image.load()
    rgb = _to_rgb(image)
    turn = _TURNS.get(_orientation(image))
    upright = rgb if turn is None else rgb.transpose(turn.transpose)
    if scale == 1:
        box = (0.0, 0.0, float(upright.width), float(upright.height))
        return DecodedImage(upright, *upright.size, box, drafted=False)
    # A draft rounds up to whole pixels: its last row and column may lie partly outside the
    # original.
    inner = (width / scale, height / scale)
    if turn is None:
        return DecodedImage(upright, width, height, (0.0, 0.0, *inner), drafted=True)
    if turn.swap:
        width, height = height, width
    box = _turn_box(inner, turn, rgb.size)
    return DecodedImage(upright, width, height, box, drafted=True)


def _draft(image: Image.Image, preprocess: Preprocess, *, keep_original: bool) -> int:
    """Have a JPEG decoded at 1/2, 1/4 or 1/8 where enough is left; returns the divisor."""
    if image.format not in ("JPEG", "MPO") or preprocess.interpolation in _NEVER_DRAFTED:
        return 1
    resize = preprocess.resize
    needed = _DRAFT_MARGIN * (resize if isinstance(resize, int) else max(resize))
    room = min(image.size) / needed
    if keep_original:
        room = min(room, max(image.size) / CANVAS_SIDE)
    scale = next((s for s in _DRAFT_SCALES if room >= s), 1)
    if scale > 1:
        before = image.size
        image.draft(None, (before[0] // scale, before[1] // scale))
        if image.size == before:
            return 1
    return scale


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8; 1 when there is none or it cannot be read."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    # Garbage in the metadata must not cost the image.
    except Exception:  # noqa: BLE001
        return 1
    return value if isinstance(value, int) else 1


def _turn_box(
    inner: tuple[float, float], turn: _Turn, size: tuple[int, int]
) -> tuple[float, float, float, float]:
    """Where the part `inner` (width, height) at the origin of an image lies after the turn."""
    width, height = inner
    gap_x, gap_y = size[0] - width, size[1] - height
    if turn.swap:
        width, height, gap_x, gap_y = height, width, gap_y, gap_x
    left = gap_x if turn.mirror_x else 0.0
    top = gap_y if turn.mirror_y else 0.0
    return left, top, left + width, top + height


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_to_grey(image).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        on_white = Image.new("RGB", rgba.size, "white")
        on_white.paste(rgba, mask=rgba.getchannel("A"))
        return on_white
    return image.convert("RGB")


def _deep_to_grey(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float grey to 8 bits.

    16-bit images keep their high byte, as 16-bit colour does. Wider integers and floats do not
    say their range: [0, 1] (floats only), [0, 255] and [0, 65535] are recognised, anything else is
    stretched from its least to its greatest value. What is not a number is black.
    """
    values = np.asarray(image)
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        return Image.fromarray((values >> 8).astype(np.uint8))
    levels = np.nan_to_num(values.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(levels.min()), float(levels.max())
    limits = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
    if low >= 0:
        low, high = 0.0, next((limit for limit in limits if high <= limit), high)
    # Halved, so that the range of values near the ends of float32 is finite.
    levels *= 0.5
    levels -= low / 2
    levels *= 255.0 / ((high - low) / 2) if high > low else 0.0
    return Image.fromarray(np.rint(levels).astype(np.uint8))
