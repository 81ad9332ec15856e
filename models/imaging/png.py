"""A PNG writer for pictures that are made by the request: one filter for all rows and the fastest compression.

Pillow tries every filter on every row of an RGB picture, which costs several times the compression itself. Here all
rows take the same filter, so filtering is one subtraction. Format: PNG specification, third edition (W3C, 2025).
"""

from __future__ import annotations

import struct
import zlib

import numpy as np

MEDIA_TYPE = "image/png"

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR_RGB, _COLOUR_PALETTE = 2, 3
_FILTER_UP = 2
_LEVEL = 1


def encode_palette(indices: np.ndarray, *, palette: np.ndarray, opacity: np.ndarray) -> bytes:
    """Write an 8-bit palette picture.

    Args:
        indices: uint8 (height, width).
        palette: uint8 (256, 3), the colour of each index.
        opacity: uint8 (256,), 0 = transparent.
    """
    extra = _chunk(b"PLTE", palette.tobytes()) + _chunk(b"tRNS", opacity.tobytes())
    return _encode(indices, colour=_COLOUR_PALETTE, extra=extra)


def encode_rgb(pixels: np.ndarray) -> bytes:
    """Write an RGB picture, uint8 (height, width, 3)."""
    return _encode(pixels, colour=_COLOUR_RGB, extra=b"")


def size(data: bytes) -> tuple[int, int]:
    """Width and height of a picture that this module wrote."""
    width, height = struct.unpack_from(">II", data, len(_SIGNATURE) + 8)
    return width, height


def _encode(pixels: np.ndarray, *, colour: int, extra: bytes) -> bytes:
    height, width = pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    return b"".join(
        (
            _SIGNATURE,
            _chunk(b"IHDR", header),
            extra,
            _chunk(b"IDAT", zlib.compress(_filter_up(pixels.reshape(height, -1)), _LEVEL)),
            _chunk(b"IEND", b""),
        )
    )


def _filter_up(rows: np.ndarray) -> bytes:
    """Each row as its difference from the row above (modulo 256), behind the byte that names the filter."""
    filtered = np.empty((rows.shape[0], rows.shape[1] + 1), np.uint8)
    filtered[:, 0] = _FILTER_UP
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    return filtered.tobytes()


def _chunk(kind: bytes, body: bytes) -> bytes:
    return (
        struct.pack(">I", len(body))
        + kind
        + body
        + struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))
    )
