"""The samples of an image as they are stored, for networks that take more than 8-bit colours."""

from __future__ import annotations

import numpy as np
from PIL import Image

from models.errors import UnsupportedMediaType
from models.imaging import deep_png
from models.imaging.orientation import Turn

_LUMA = (0.299, 0.587, 0.114)
_MODES = ("L", "LA", "RGB", "RGBA", "CMYK", "I;16")
"""Modes of Pillow whose samples are those of the file."""


def make_bands(
    samples: np.ndarray, turn: Turn | None, channels: int
) -> tuple[tuple[Image.Image, ...], tuple[str, ...]]:
    """The first bands of an image, upright, and what was done to have as many as wanted.

    Each is a float image with 0 for black and 255 for white: integers of any depth are scaled by
    the greatest value of their type, and floats by 255, so that 1.0 is white.

    Args:
        samples: as stored, (height, width, bands) of any type.
        turn: makes the image upright.
        channels: bands that are wanted.

    Raises:
        UnsupportedMediaType: it has fewer bands.
    """
    found = samples.shape[2]
    scaled = _scaled(samples)
    warnings = []
    if channels == 1 and found >= len(_LUMA):
        scaled = scaled[..., : len(_LUMA)] @ np.array(_LUMA, np.float32)[:, None]
    elif channels == len(_LUMA) and found < channels:
        scaled = scaled[..., :1].repeat(channels, axis=2)
    elif found < channels:
        raise UnsupportedMediaType(
            f"The model takes images of {channels} bands, but this one has {found}. Send a TIFF "
            "file with all of them."
        )
    elif found > channels:
        warnings.append(f"The image has {found} bands: the model was given the first {channels}.")
    bands = (Image.fromarray(np.ascontiguousarray(scaled[..., i])) for i in range(channels))
    upright = bands if turn is None else (band.transpose(turn.transpose) for band in bands)
    return tuple(upright), tuple(warnings)


def stored_samples(image: Image.Image, data: bytes) -> np.ndarray:
    """Samples of a loaded image as stored, (height, width, bands)."""
    if image.format == "PNG" and deep_png.is_deep(data):
        return deep_png.samples(image, data)
    plain = image if image.mode in _MODES else image.convert("RGB")
    return np.atleast_3d(np.asarray(plain))


def _scaled(samples: np.ndarray) -> np.ndarray:
    """Samples as float32, 255 for white."""
    whole = samples.dtype.kind in "iu"
    white = float(np.iinfo(samples.dtype).max) if whole else 1.0
    scaled: np.ndarray = samples.astype(np.float32) * np.float32(255 / white)
    np.nan_to_num(scaled, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    return scaled
