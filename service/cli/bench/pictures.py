"""Pictures to send: those of a folder, or drawn ones that no two look alike."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.cli.files import find_images

DRAWN = 64
DRAWN_SIZE = (500, 375)

_QUALITY = 85
_COARSE = 4  # waves are drawn so many times smaller
_WAVES = 6
_GRAIN = 20


class NoPictures(ValueError):
    """There is nothing to send."""


def read_pictures(folder: Path, *, most: int = 1000) -> list[bytes]:
    """Read the pictures in a folder and below it, at most `most`, in order of their names.

    Raises:
        NoPictures: there is none.
    """
    files = find_images([folder])[:most]
    if not files:
        raise NoPictures(f"There is no picture in {folder}.")
    return [file.path.read_bytes() for file in files]


def draw_pictures(
    count: int = DRAWN, *, size: tuple[int, int] = DRAWN_SIZE, seed: int = 0
) -> list[bytes]:
    """Draw `count` different JPEG pictures: coloured waves with grain, about as heavy as photographs.

    Args:
        count: how many.
        size: (width, height) in pixels.
        seed: the same one draws the same pictures.
    """
    noise = np.random.default_rng(seed)
    return [_encode(_draw(noise, size)) for _ in range(count)]


def _draw(noise: np.random.Generator, size: tuple[int, int]) -> NDArray[np.uint8]:
    """(height, width, 3) pixels: a sum of plane waves in each channel, a disc, and grain."""
    width, height = size
    small = np.full((max(1, height // _COARSE), max(1, width // _COARSE), 3), 128, np.float32)
    y, x = np.mgrid[0 : small.shape[0], 0 : small.shape[1]].astype(np.float32) / max(small.shape)
    for _ in range(_WAVES):
        along_x, along_y = noise.uniform(-60, 60, 2)
        wave = np.sin(along_x * x + along_y * y + noise.uniform(0, 2 * np.pi))
        small += wave[..., None] * noise.uniform(-25, 25, 3).astype(np.float32)
    centre = noise.uniform(0.2, 0.6, 2)
    disc = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < noise.uniform(0.01, 0.04)
    small[disc] = noise.uniform(0, 255, 3)
    smooth = Image.fromarray(np.clip(small, 0, 255).astype(np.uint8)).resize(size)
    grain = noise.integers(-_GRAIN, _GRAIN + 1, (height, width, 1), dtype=np.int16)
    return np.clip(np.asarray(smooth) + grain, 0, 255).astype(np.uint8)


def _encode(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()
