"""A small photograph, and how far a decoded one is from it."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image
from skimage import data as pictures

from models.imaging.decode import DecodedImage, DecodeLimits, decode
from models.types import Preprocess

SPEC = Preprocess(resize=256, crop=(224, 224))
PHOTO = Image.fromarray(pictures.chelsea()).resize((61, 40))
RGB = np.asarray(PHOTO)
GREY = np.asarray(PHOTO.convert("L"))
SHADES = GREY[..., None].repeat(3, axis=2)


def read(data: bytes, **changes: object) -> DecodedImage:
    return decode(data, **{"limits": DecodeLimits(), "preprocess": SPEC, **changes})


def distance(picture: DecodedImage, expected: np.ndarray) -> int:
    return int(np.abs(np.asarray(picture.image).astype(int) - expected).max())


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def scaled(pixels: np.ndarray, bits: int) -> np.ndarray:
    """8-bit pixels as samples of another depth."""
    return np.rint(pixels / 255 * (2**bits - 1)).astype(int)
