"""Converts samples of any depth to 8 bits; where that takes a guess, a warning says so."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

# Depths of cameras and scanners whose samples are often stored in 16 bits without being scaled.
_NARROW_DEPTHS = (8, 10, 12)


# 14-bit samples in 16 bits are dark, but may just as well be a dark image.
_DOUBTFUL_DEPTH = 14


class Depth(NamedTuple):
    """Bits that samples use of the 16 they are stored in, and what had to be assumed for it."""

    bits: int
    warnings: tuple[str, ...]


class Levels(NamedTuple):
    """Samples as 8 bits, uint8 of the same shape, and what had to be assumed for it."""

    values: np.ndarray
    warnings: tuple[str, ...] = ()


def to_levels(samples: np.ndarray, *, declared_bits: int | None = None) -> Levels:
    """Scale samples of any type to 8 bits.

    - 8-bit samples are left as they are, 16-bit ones keep their high byte. Where no 16-bit sample
      needs more than `declared_bits`, or none needs more than 8, 10 or 12 bits, they are taken for
      samples of that depth.
    - Signed and wider integers and floats do not say their range: [0, 1] (floats only), [0, 255]
      and [0, 65535] (the greatest value of a signed type of fewer bits) are recognised, anything
      else is stretched from its least to its greatest value. What is not a number is black.

    Args:
        samples: of any shape and numeric type, scaled together.
        declared_bits: the depth that the file says its 16-bit samples had before they were stored.
    """
    if samples.dtype == np.uint8:
        return Levels(samples)
    if samples.dtype.kind == "u" and samples.dtype.itemsize == 2:
        return _from_words(samples, declared_bits)
    return _from_range(samples)


def depth_of(greatest: int, declared: int | None) -> Depth:
    """Depth of samples that are stored in 16 bits, by the greatest of them and the file's word."""
    if declared is not None and greatest < 2**declared:
        bits = declared
    elif greatest == 0:
        # A black image says nothing of its depth.
        bits = 16
    else:
        bits = next((bits for bits in _NARROW_DEPTHS if greatest < 2**bits), 16)
    if bits < 16:
        return Depth(bits, (f"The 16-bit samples use {bits} bits: they were read as {bits}-bit.",))
    if declared is None and 0 < greatest < 2**_DOUBTFUL_DEPTH:
        return Depth(bits, (f"The 16-bit samples use {_DOUBTFUL_DEPTH} bits: scale them if dark.",))
    return Depth(bits, ())


def widen(words: np.ndarray, bits: int) -> np.ndarray:
    """Samples of `bits` bits, stored in 16, to 8 bits: uint8."""
    if bits == 16:
        return (words >> 8).astype(np.uint8)
    table = np.rint(np.arange(2**bits) * (255 / (2**bits - 1))).astype(np.uint8)
    return np.take(table, words, mode="clip")


def _from_words(words: np.ndarray, declared_bits: int | None) -> Levels:
    depth = depth_of(int(words.max()), declared_bits)
    return Levels(widen(words, depth.bits), depth.warnings)


def _from_range(samples: np.ndarray) -> Levels:
    dtype = samples.dtype
    exact = np.float64 if dtype.itemsize == 8 else np.float32
    levels: npt.NDArray[np.floating] = samples.astype(exact)
    np.nan_to_num(levels, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(levels.min()), float(levels.max())
    limits: tuple[float, ...] = (1.0, 255.0, 65535.0)
    if dtype.kind != "f":
        most = float(np.iinfo(dtype).max)
        limits = (min(255.0, most), min(65535.0, most))
    if low >= 0:
        low, high = 0.0, next((limit for limit in limits if high <= limit), high)
    # Halved, so that the range of values near the ends of a float is finite.
    levels *= 0.5
    levels -= low / 2
    levels *= 255.0 / ((high - low) / 2) if high > low else 0.0
    np.rint(levels, out=levels)
    warning = f"The samples are {dtype.name}: {low:g} was read as black and {high:g} as white."
    return Levels(levels.astype(np.uint8), (warning,))
