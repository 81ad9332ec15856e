"""Reads the headers of images, and refuses those that announce more than an image can be.

Nothing is decoded, and no loop is longer than a bound. A decoder that is asked first has often taken
memory or time already when it tells the size.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import NamedTuple

from models.errors import ImageUndecodable, UnsupportedMediaType
from models.imaging import jpeg, tiff_directory

_BITMAP_CORE_HEADER = 12
_RLE = frozenset((1, 2))
# Pillow decodes run lengths in Python.
_MAX_RLE_PIXELS = 4_000_000

_GIF_EXTENSION, _GIF_FRAME = 0x21, 0x2C
_MAX_GIF_BLOCKS = 10_000


class Header(NamedTuple):
    """What an image is, as its header says.

    Attributes:
        size: width and height, of the first frame if that is larger.
        scans: passes over all pixels.
        deep: whether the samples have more than 8 bits.
        segments: of a JPEG, before its first scan; see `jpeg.Outline`.
    """

    size: tuple[int, int]
    media_type: str = ""
    scans: int = 1
    deep: bool = False
    segments: tuple[jpeg.Segment, ...] = ()

    @property
    def pixels(self) -> int:
        """Width times height."""
        return self.size[0] * self.size[1]


def read(data: bytes, media_type: str) -> Header:
    """Read the header of an image.

    Raises:
        ImageUndecodable: it is damaged, or claims what no encoder writes.
        UnsupportedMediaType: a rare kind that is costly to read.
    """
    try:
        return _READERS[media_type](data)._replace(media_type=media_type)
    except (struct.error, IndexError, OverflowError) as error:
        raise ImageUndecodable("The image is damaged or truncated.") from error


def _jpeg(data: bytes) -> Header:
    outline = jpeg.outline(data)
    return Header(outline.size, scans=outline.scans, segments=outline.segments)


def _png(data: bytes) -> Header:
    width, height, bits = struct.unpack_from(">IIB", data, 16)
    return Header((width, height), deep=bits > 8)


def _bmp(data: bytes) -> Header:
    (header,) = struct.unpack_from("<I", data, 14)
    if header == _BITMAP_CORE_HEADER:
        width, height = struct.unpack_from("<HH", data, 18)
        return Header((width, height))
    width, height, compression = struct.unpack_from("<ii4xI", data, 18)
    width, height = abs(width), abs(height)
    if compression in _RLE and width * height > _MAX_RLE_PIXELS:
        raise UnsupportedMediaType(
            f"Run-length encoded BMP images of more than {_MAX_RLE_PIXELS} pixels are not read; "
            "save the image as PNG."
        )
    return Header((width, height))


def _gif(data: bytes) -> Header:
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + _colours(flags)
    for _ in range(_MAX_GIF_BLOCKS):
        if data[at] == _GIF_FRAME:
            left, top, inner_width, inner_height = struct.unpack_from("<HHHH", data, at + 1)
            return Header((max(width, left + inner_width), max(height, top + inner_height)))
        # An extension is a kind, and blocks that each begin with their length.
        if data[at] == _GIF_EXTENSION:
            at += 2
        at += 1 + data[at]
    raise ImageUndecodable("The image has too much metadata.")


def _colours(flags: int) -> int:
    """Bytes of a colour table."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _webp(data: bytes) -> Header:
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
    elif kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    return Header((width, height))


def _tiff(data: bytes) -> Header:
    return Header(tiff_directory.read(data).size)


_READERS: Mapping[str, Callable[[bytes], Header]] = {
    "image/jpeg": _jpeg,
    "image/png": _png,
    "image/bmp": _bmp,
    "image/gif": _gif,
    "image/webp": _webp,
    "image/tiff": _tiff,
}
