"""From untrusted bytes to the model input: everything that touches pixels of the file, in one call.

What it returns is small whatever the image was, so that it can run in a process of its own.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from models.imaging.decode import DecodedImage, DecodeLimits, decode
from models.imaging.headers import Header
from models.imaging.preprocess import picture, preprocess
from models.imaging.render import shrink
from models.types import Geometry, Preprocess, Struct

Canvas = Literal["none", "input", "original"]
"""What a request draws on: nothing, the model's crop, or the whole image."""

# Decoders of these two take time and memory in proportion to pixels and passes over them, and have
# withstood the most. Measured bounds: 60 MB and 0.4 s.
_LIGHT_FORMATS = ("image/jpeg", "image/png")
_LIGHT_PIXELS = 4_000_000
_LIGHT_SCANNED_PIXELS = 40_000_000


class PreparedImage(Struct):
    """An image as the rest of the service keeps it.

    Attributes:
        input: the model's input, as `preprocess` makes it.
        picture: the same as uint8 (H, W, 3), if it is drawn on and differs.
        geometry: the place of that input in the original image.
        original: the whole image, shrunk to what is drawn on; None if it is not.
        areas: the areas that targets name, as a job has them.
        warnings: what had to be assumed to decode it.
    """

    input: np.ndarray
    geometry: Geometry
    picture: np.ndarray | None = None
    original: np.ndarray | None = None
    areas: np.ndarray | None = None
    warnings: tuple[str, ...] = ()


def prepare(
    data: bytes,
    *,
    limits: DecodeLimits,
    spec: Preprocess,
    canvas: Canvas,
    header: Header | None = None,
) -> PreparedImage:
    """Decode, resize and crop an image; keep what is drawn on.

    `header` is what `inspect` found, if it has been asked.

    Raises:
        HeatlensError: see `decode`.
    """
    whole = canvas == "original"
    image = decode(data, limits=limits, preprocess=spec, keep_original=whole, header=header)
    return from_decoded(image, spec=spec, canvas=canvas)


def from_decoded(image: DecodedImage, *, spec: Preprocess, canvas: Canvas) -> PreparedImage:
    """Resize and crop a decoded image; keep what is drawn on."""
    model_input, geometry = preprocess(image, spec)
    plain = spec.channels == 3 and not spec.raw
    return PreparedImage(
        input=model_input,
        geometry=geometry,
        picture=picture(image, spec) if canvas == "input" and not plain else None,
        # A whole image of 50 megapixels would be kept until the device answers.
        original=shrink(image) if canvas == "original" else None,
        warnings=image.warnings,
    )


def is_light(header: Header) -> bool:
    """Whether decoding is proved to take little time and memory, whatever else the bytes are."""
    return (
        header.media_type in _LIGHT_FORMATS
        and not header.deep
        and header.pixels <= _LIGHT_PIXELS
        and header.pixels * header.scans <= _LIGHT_SCANNED_PIXELS
    )
