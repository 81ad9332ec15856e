"""The chunks of a PNG file, and which of them affect its pixels.

Pillow refuses a sound image for its ancillary chunks: text or a profile of more than 1 MiB, a wrong
checksum, a gamma of the wrong length. None of them bears upon the pixels here, so that Pillow never
sees them. Format: PNG specification, third edition (W3C, 2025).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from models.errors import ImageUndecodable

_SIGNATURE_SIZE = 8
# An image of 10 MB in chunks of 256 bytes has 40,000 of them.
_MAX_CHUNKS = 50_000
_HEADER = struct.Struct(">I4s")
_CRC_SIZE = 4

_CRITICAL = frozenset((b"IHDR", b"PLTE", b"IDAT", b"IEND"))
_TOLD = frozenset((b"eXIf", b"sBIT"))
_TEXT = frozenset((b"tEXt", b"zTXt", b"iTXt"))
_GREY, _COLOUR, _PALETTE, _GREY_ALPHA = 0, 2, 3, 4
_TRANSPARENT_BYTES = {_GREY: 2, _COLOUR: 6}

# Texts that Pillow knows to hold EXIF data, and so an orientation.
_EXIF_KEYWORDS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
_MAX_TEXT = 65_536


class _Chunk(NamedTuple):
    kind: bytes
    start: int
    stop: int


def essential(data: bytes) -> bytes:
    """The same PNG file with only those chunks that say what its pixels are.

    These are the critical chunks, and transparency, depth and EXIF data that are well-formed. What
    is damaged in the critical ones stays as it is.

    Raises:
        ImageUndecodable: more chunks than any encoder writes.
    """
    view = memoryview(data)
    kept = (
        view[chunk.start : chunk.stop]
        for chunk in _chunks(data)
        if chunk.kind in _CRITICAL or _is_sound(data, chunk)
    )
    return b"".join((view[:_SIGNATURE_SIZE], *kept))


def significant_bits(data: bytes) -> int | None:
    """Depth that the samples had before they were stored (the most of all colours), where given."""
    for chunk in _chunks(data):
        if chunk.kind == b"IDAT":
            break
        if chunk.kind == b"sBIT":
            body = _body(data, chunk)[: 1 if data[25] in (_GREY, _GREY_ALPHA) else 3]
            return max(body) if body and 0 < max(body) <= 16 else None
    return None


def _chunks(data: bytes) -> Iterator[_Chunk]:
    """Chunks up to the end of the image; the last one may be cut off."""
    start, count = _SIGNATURE_SIZE, 0
    while start + _HEADER.size <= len(data):
        count += 1
        if count > _MAX_CHUNKS:
            raise ImageUndecodable(f"The image has more than {_MAX_CHUNKS} chunks.")
        length, kind = _HEADER.unpack_from(data, start)
        stop = start + _HEADER.size + length + _CRC_SIZE
        yield _Chunk(kind, start, stop)
        if kind == b"IEND":
            return
        start = stop


def _body(data: bytes, chunk: _Chunk) -> bytes:
    return data[chunk.start + _HEADER.size : chunk.stop - _CRC_SIZE]


def _is_sound(data: bytes, chunk: _Chunk) -> bool:
    """Whether an ancillary chunk bears upon the pixels and is well-formed."""
    if chunk.kind in _TEXT:
        return _holds_exif(data, chunk) and _has_right_crc(data, chunk)
    if chunk.kind == b"tRNS":
        size, colour = len(_body(data, chunk)), data[25]
        fits = 0 < size <= 256 if colour == _PALETTE else size == _TRANSPARENT_BYTES.get(colour)
        return fits and _has_right_crc(data, chunk)
    return chunk.kind in _TOLD and _has_right_crc(data, chunk)


def _has_right_crc(data: bytes, chunk: _Chunk) -> bool:
    crc = zlib.crc32(memoryview(data)[chunk.start + 4 : chunk.stop - _CRC_SIZE])
    return data[chunk.stop - _CRC_SIZE : chunk.stop] == struct.pack(">I", crc)


def _holds_exif(data: bytes, chunk: _Chunk) -> bool:
    """Whether a text may hold an orientation, and is short even when it is decompressed."""
    start = chunk.start + _HEADER.size
    keyword = next((word for word in _EXIF_KEYWORDS if data.startswith(word, start)), None)
    if keyword is None or chunk.stop - start > _MAX_TEXT:
        return False
    body = _body(data, chunk)[len(keyword) :]
    if chunk.kind == b"tEXt":
        return True
    if chunk.kind == b"zTXt":
        return body[:1] == b"\0" and _is_short(body[1:])
    # Compression flag and method, then language and translated keyword, each closed by a zero.
    return body[:1] == b"\0" or (body[:2] == b"\1\0" and _is_short(body[2:].split(b"\0", 2)[-1]))


def _is_short(compressed: bytes) -> bool:
    inflate = zlib.decompressobj()
    try:
        inflate.decompress(compressed, _MAX_TEXT)
    except zlib.error:
        return False
    return not inflate.unconsumed_tail
