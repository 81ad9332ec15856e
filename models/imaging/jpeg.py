"""What is particular to JPEG files: metadata, progressive scans, and decoding at a reduced size."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from PIL import Image

from models.errors import ImageUndecodable, UnsupportedMediaType
from models.imaging import orientation
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
_MAX_SCANNED_PIXELS = 1_000_000_000
_SCAN = re.compile(rb"\xff\xda\x00[\x08\x0a\x0c\x0e][\x01-\x04]")

# The longest colour profile has 255 segments, and depth maps a few hundred.
_MAX_SEGMENTS = 1000
_MARKER = re.compile(rb"\xff[^\x00\xff]")
_START_OF_SCAN, _COMMENT = 0xDA, 0xFE
# Start and end of the image, restarts, and one for private use.
_WITHOUT_LENGTH = frozenset((0x01, *range(0xD0, 0xDA)))
_APPLICATION = frozenset(range(0xE0, 0xF0))
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Baseline, extended and progressive, with Huffman codes; the last two with arithmetic ones.
_READ_FRAMES = frozenset((0xC0, 0xC1, 0xC2, 0xC9, 0xCA))

_JFIF, _EXIF, _ADOBE = b"JFIF", b"Exif\0\0", b"Adobe"
_LEAST_SIZES = {_JFIF: 14, _ADOBE: 12}
_XMP = b"http://ns.adobe.com/xap/1.0/\0"


Segment = tuple[int, int, int]
"""Marker, start and end."""


class Outline(NamedTuple):
    """What a file says before its pixels: their number, the passes over them, and the segments."""

    size: tuple[int, int]
    scans: int
    segments: tuple[Segment, ...]


def outline(data: bytes) -> Outline:
    """Read a file up to its first scan.

    Raises:
        ImageUndecodable: more progressive scans, or more segments, than any encoder writes.
        UnsupportedMediaType: a kind of JPEG that is not read.
    """
    segments, size = [], None
    for marker, start, stop in _segments(data):
        segments.append((marker, start, stop))
        if len(segments) > _MAX_SEGMENTS:
            raise ImageUndecodable(f"The image has more than {_MAX_SEGMENTS} segments.")
        if marker in _FRAMES:
            precision, height, width = struct.unpack_from(">BHH", data, start + 4)
            if marker not in _READ_FRAMES or precision != 8:
                raise UnsupportedMediaType(
                    "Lossless JPEG images and those of more than 8 bits are not read; save the "
                    "image as 8-bit JPEG or PNG."
                )
            size = (width, height)
    if size is None:
        raise ImageUndecodable("The image is damaged or truncated.")
    scans = len(_SCAN.findall(data))
    if scans > _MAX_SCANS or scans * size[0] * size[1] > _MAX_SCANNED_PIXELS:
        raise ImageUndecodable("The image has too many progressive scans.")
    return Outline(size, scans, tuple(segments))


def essential(data: bytes, segments: Sequence[Segment]) -> bytes:
    """The same file with only those segments that say what its pixels are, and how they are shown.

    Fill bytes, comments, profiles and previews go, and EXIF data that is not well-formed.
    """
    kept, kinds = [data[:2]], set()
    for marker, start, stop in segments:
        if marker in _APPLICATION:
            kind = _kind(data[start + 4 : stop])
            if kind is None or kind in kinds:
                continue
            kinds.add(kind)
        if marker != _COMMENT:
            kept.append(data[start:stop])
    end = segments[-1][2]
    first_scan = next((m.start() for m in _MARKER.finditer(data, end)), len(data))
    return b"".join((*kept, memoryview(data)[first_scan:]))


def draft(image: Image.Image, preprocess: Preprocess, *, keep_original: bool) -> int:
    """Have an image decoded at 1/2, 1/4 or 1/8 where enough is left; returns the divisor."""
    whole = preprocess.raw or preprocess.fit == "none"
    if whole or preprocess.interpolation in _NEVER_DRAFTED:
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


def _kind(body: bytes) -> bytes | None:
    """Which of the application segments that are kept a body is; None if it is another."""
    kind = next((kind for kind in (_JFIF, _EXIF, _ADOBE, _XMP) if body.startswith(kind)), None)
    damaged = kind == _EXIF and not orientation.is_sound(body[len(_EXIF) :])
    return None if damaged or len(body) < _LEAST_SIZES.get(kind or b"", 0) else kind


def _segments(data: bytes) -> Iterator[Segment]:
    """Each segment before the first scan; what lies between is skipped."""
    at = 2
    while (match := _MARKER.search(data, at)) is not None:
        start, marker = match.start(), data[match.start() + 1]
        if marker == _START_OF_SCAN:
            return
        at = start + 2
        if marker not in _WITHOUT_LENGTH:
            at += max(2, int.from_bytes(data[start + 2 : start + 4], "big"))
            yield marker, start, at
