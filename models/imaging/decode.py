"""From untrusted bytes to an RGB image, within limits.

Only the format that the first bytes announce is tried, the size is read from the header and checked
before memory for pixels is taken, and whatever goes wrong inside the decoder leaves as one of our
own errors with our own words.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, UnidentifiedImageError

from models.errors import (
    HeatlensError,
    ImageTooLarge,
    ImageTooSmall,
    ImageUndecodable,
    UnsupportedMediaType,
)
from models.imaging import deep_png, headers, jpeg, png_chunks, tiff, tiff_directory
from models.imaging.bands import make_bands, stored_samples
from models.imaging.headers import Header
from models.imaging.modes import to_rgb
from models.imaging.orientation import TURNS, Turn, orientation, turn_box
from models.imaging.samples import widen
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


# The most that JPEG and GIF can say. Decoders keep a pointer to each row, however short it is.
_MAX_SIDE = 65_535


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
        warnings: what had to be assumed to decode it.
        bands: float images of the samples as stored, 255 for white; only for networks that take
            more than `image` holds.
    """

    image: Image.Image
    width: int
    height: int
    box: tuple[float, float, float, float]
    drafted: bool
    warnings: tuple[str, ...] = ()
    bands: tuple[Image.Image, ...] = ()


def sniff(data: bytes) -> str | None:
    """Media type by the first bytes, None when it is not one that is decoded."""
    for magic, media_type in _MAGIC:
        if data.startswith(magic):
            return media_type
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return None


def decode(
    data: bytes,
    *,
    limits: DecodeLimits,
    preprocess: Preprocess,
    keep_original: bool = False,
    header: Header | None = None,
) -> DecodedImage:
    """Decode the first frame of an image to upright RGB.

    EXIF orientation is applied, transparency composited on white, and every other mode (CMYK,
    palette, grey, 1-bit, 16-bit, 32-bit, float) becomes RGB. Colour profiles and all other metadata
    are ignored, as the libraries that trained the models do. Large JPEGs are decoded at a reduced
    size, still twice what `preprocess` resizes to.

    Args:
        data: the encoded image.
        limits: caps.
        preprocess: what the image is for; it says how small a JPEG may be decoded.
        keep_original: keep enough pixels to draw the whole image, too.
        header: of the image, if `inspect` has read it already.

    Raises:
        UnsupportedMediaType: not a format that is decoded, or a rare kind of one.
        ImageTooLarge: more bytes or pixels than the caps allow.
        ImageTooSmall: a side shorter than the cap allows.
        ImageUndecodable: damaged or truncated.
    """
    header = header or inspect(data, limits=limits)
    try:
        return _decode(data, header, limits, preprocess, keep_original=keep_original)
    except HeatlensError:
        raise
    except (MemoryError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLarge("The image needs too much memory to decode.") from error
    # Damaged bytes raise anything at all inside a decoder.
    except Exception as error:
        raise ImageUndecodable("The image is damaged or truncated.") from error


def inspect(data: bytes, *, limits: DecodeLimits) -> Header:
    """Read an image's header, and refuse the image if it is unknown or too large.

    Raises:
        HeatlensError: see `decode`.
    """
    if len(data) > limits.max_bytes:
        raise ImageTooLarge(f"The image has more than {limits.max_bytes} bytes.")
    media_type = sniff(data)
    if media_type is None:
        allowed = ", ".join(FORMATS)
        raise UnsupportedMediaType(f"The image has an unknown format. Allowed: {allowed}.")
    header = headers.read(data, media_type)
    check_size(header.size, limits)
    return header


def from_pixels(
    pixels: np.ndarray, *, limits: DecodeLimits, preprocess: Preprocess
) -> DecodedImage:
    """Take pixels, uint8 (height, width, 1, 3 or 4), as a decoded image: grey, RGB or RGBA.

    Raises:
        UnsupportedMediaType: the network takes more channels.
        ImageTooLarge: more pixels than the caps allow.
        ImageTooSmall: a side shorter than the cap allows.
    """
    height, width, channels = pixels.shape
    check_size((width, height), limits)
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    found = _whole(to_rgb(image), None, ())
    return _with_bands(found, pixels, None, preprocess) if preprocess.raw else found


def _decode(
    data: bytes,
    header: Header,
    limits: DecodeLimits,
    preprocess: Preprocess,
    *,
    keep_original: bool,
) -> DecodedImage:
    media_type = header.media_type
    if media_type == "image/png":
        data = png_chunks.essential(data)
    elif media_type == "image/jpeg":
        data = jpeg.essential(data, header.segments)
    elif media_type == "image/tiff":
        directory = tiff_directory.read(data)
        layout = tiff.layout(directory)
        if layout is not None:
            rgb, warnings = tiff.read(data, layout, max_pixels=limits.max_pixels)
            turn = TURNS.get(layout.orientation)
            found = _whole(rgb, turn, warnings)
            if not preprocess.raw:
                return found
            stored = tiff.samples(data, layout, layout.bands)
            return _with_bands(found, stored, turn, preprocess)
        data = tiff.essential(data, directory)
    try:
        image = Image.open(io.BytesIO(data), formats=(FORMATS[media_type],))
    except UnidentifiedImageError:
        if media_type == "image/tiff":
            raise tiff.unsupported(directory) from None
        raise
    with image:
        # A frame may be larger than the image that the header announces.
        check_size(image.size, limits)
        return _load(image, data, preprocess, keep_original=keep_original)


def check_size(size: tuple[int, int], limits: DecodeLimits) -> None:
    """Refuse an image by its size.

    Raises:
        ImageTooLarge: more pixels than the caps allow.
        ImageTooSmall: a side shorter than the cap allows.
    """
    width, height = size
    if width * height > limits.max_pixels:
        raise ImageTooLarge(f"The image has more than {limits.max_pixels} pixels.")
    if max(width, height) > _MAX_SIDE:
        raise ImageTooLarge(f"The image is more than {_MAX_SIDE} pixels wide or high.")
    if min(width, height) < limits.min_side:
        raise ImageTooSmall(f"The image is less than {limits.min_side} pixels wide or high.")


def _load(
    image: Image.Image, data: bytes, preprocess: Preprocess, *, keep_original: bool
) -> DecodedImage:
    width, height = image.size
    scale = 1
    if image.format == "JPEG":
        scale = jpeg.draft(image, preprocess, keep_original=keep_original)
    image.load()
    rgb, warnings = _to_rgb(image, data)
    turn = TURNS.get(orientation(image))
    if preprocess.raw:
        found = _whole(rgb, turn, warnings)
        return _with_bands(found, stored_samples(image, data), turn, preprocess)
    if scale == 1:
        return _whole(rgb, turn, warnings)
    upright = rgb if turn is None else rgb.transpose(turn.transpose)
    # A draft rounds up to whole pixels: its last row and column may lie partly outside the
    # original.
    inner = (width / scale, height / scale)
    if turn is None:
        return DecodedImage(upright, width, height, (0.0, 0.0, *inner), drafted=True)
    if turn.swap:
        width, height = height, width
    box = turn_box(inner, turn, rgb.size)
    return DecodedImage(upright, width, height, box, drafted=True)


def _whole(rgb: Image.Image, turn: Turn | None, warnings: tuple[str, ...]) -> DecodedImage:
    """An image of which every pixel was decoded."""
    upright = rgb if turn is None else rgb.transpose(turn.transpose)
    box = (0.0, 0.0, float(upright.width), float(upright.height))
    return DecodedImage(upright, *upright.size, box, drafted=False, warnings=warnings)


def _with_bands(
    found: DecodedImage, samples: np.ndarray, turn: Turn | None, preprocess: Preprocess
) -> DecodedImage:
    """The same image with its samples as stored; its RGB form is only what maps are drawn on."""
    bands, warnings = make_bands(samples, turn, preprocess.channels)
    shown = "Maps are drawn on an 8-bit RGB form of the image; the model was given its samples."
    return replace(found, bands=bands, warnings=(shown, *warnings))


def _to_rgb(image: Image.Image, data: bytes) -> tuple[Image.Image, tuple[str, ...]]:
    """A loaded image as RGB, and what had to be assumed for it."""
    if image.format == "PNG" and deep_png.is_deep(data):
        return deep_png.read(image, data)
    if image.format == "TIFF" and image.mode == "I;16":
        # Of the deep modes only 12-bit grey is left to Pillow.
        image = Image.fromarray(widen(np.asarray(image), 12))
    return to_rgb(image), ()
