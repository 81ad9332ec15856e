"""What is particular to JPEG files: metadata, progressive scans, and decoding at a reduced size."""

from __future__ import annotations

import re
from collections.abc import Iterator

from PIL import Image

from models.errors import ImageUndecodable, UnsupportedMediaType
from models.types import Preprocess

CANVAS_SIDE = 1024
"""Longest side, in pixels, at which a whole image is drawn."""

# An image drafted to at least twice the size it will be resized to keeps what the resize needs:
# the model input differs by less than half a level of 256 on average and by 8 at most (measured on
# photographs). Filters that jump need every pixel.
_DRAFT_MARGIN = 2
_DRAFT_SCALES = (8, 4, 2)
_NEVER_DRAFTED = ("nearest", "box")

# A progressive JPEG may announce any number of passes over all its pixels in a few bytes each;
# encoders write about ten. The pattern is a start-of-scan marker with its length and component
# count: other data is not taken for one.
_MAX_SCANS = 100
_SCAN = re.compile(rb"\xff\xda\x00[\x08\x0a\x0c\x0e][\x01-\x04]")

_START_OF_SCAN = 0xDA
# Application segments with the orientation and the colour transform, and their least sizes.
_SHOWN = {0xE1: 0, 0xEE: 16}
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Baseline, extended and progressive, with Huffman codes; the last two with arithmetic ones.
_READ_FRAMES = frozenset((0xC0, 0xC1, 0xC2, 0xC9, 0xCA))


def check(data: bytes) -> None:
    """Refuse what is sure to fail, or to cost too much.

    Raises:
        ImageUndecodable: more progressive scans than any encoder writes.
        UnsupportedMediaType: a kind of JPEG that is not read.
    """
    if len(_SCAN.findall(data)) > _MAX_SCANS:
        raise ImageUndecodable("The image has too many progressive scans.")
    for marker, start, _ in _segments(data):
        if marker in _FRAMES and (marker not in _READ_FRAMES or data[start + 4] != 8):
            raise UnsupportedMediaType(
                "Lossless JPEG images and those of more than 8 bits are not read; save the image "
                "as 8-bit JPEG or PNG."
            )


def without_metadata(data: bytes) -> bytes:
    """The same file with only those application segments that say how it is shown."""
    dropped = [
        (start, stop)
        for marker, start, stop in _segments(data)
        if 0xE0 <= marker <= 0xEF and stop - start < _SHOWN.get(marker, len(data))
    ]
    ends = [0, *(stop for _, stop in dropped)]
    starts = [*(start for start, _ in dropped), len(data)]
    return b"".join(data[end:start] for end, start in zip(ends, starts, strict=True))


def draft(image: Image.Image, preprocess: Preprocess, *, keep_original: bool) -> int:
    """Have an image decoded at 1/2, 1/4 or 1/8 where enough is left; returns the divisor."""
    if preprocess.interpolation in _NEVER_DRAFTED:
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


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of each segment before the first scan."""
    start = 2
    while start + 4 <= len(data) and data[start] == 0xFF and data[start + 1] != _START_OF_SCAN:
        # A marker may be padded to the left.
        if data[start + 1] == 0xFF:
            start += 1
            continue
        stop = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        yield data[start + 1], start, stop
        start = stop
