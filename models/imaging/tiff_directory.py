"""The directory of a TIFF file: read within bounds, and rewritten with what affects the pixels.

A few kilobytes of directory may point to the same megabyte thousands of times, to tiles far larger
than the image, or to a hundred times the tiles that there are places for. Decoders follow all of
it. Here only the tags that describe pixels are read, and a decoder gets a file that has no others.
Format: TIFF 6.0 (Adobe, 1992); BigTIFF (Aware Systems, 2007).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from models.errors import ImageTooLarge, ImageUndecodable

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER = 256, 257, 258, 259, 262, 266
ORIENTATION, SAMPLES, ROWS_PER_STRIP, PLANES, PREDICTOR = 274, 277, 278, 284, 317
TILE_WIDTH, TILE_HEIGHT, EXTRA, FORMAT = 322, 323, 338, 339
STRIPS, TILES = (273, 279), (324, 325)

# The options of fax compression, colour map, ink set, JPEG tables, and how YCbCr is stored.
_FAX, _COLOUR_MAP, _INKS, _JPEG_TABLES, _YCBCR = (292, 293), 320, 332, 347, (529, 530, 531, 532)
_COLOURS = frozenset((PHOTOMETRIC, _COLOUR_MAP, _INKS, _JPEG_TABLES, EXTRA, *_YCBCR))
_SAMPLES = frozenset((BITS, FORMAT, SAMPLES, PLANES, PREDICTOR, COMPRESSION, FILL_ORDER, *_FAX))
_PLACES = frozenset((WIDTH, HEIGHT, ORIENTATION, ROWS_PER_STRIP, TILE_WIDTH, TILE_HEIGHT))
_PIXEL_TAGS = _COLOURS | _SAMPLES | _PLACES | {*STRIPS, *TILES}

# Size of a value of each type, and how `struct` writes those that are whole numbers.
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
_NUMBERS = {1: "B", 3: "H", 4: "L", 13: "L", 16: "Q"}
_LONG, _LONG8 = 4, 16

_MAX_ENTRIES = 1000
_MAX_VALUE_BYTES = 1_000_000
# An image of 50 megapixels in tiles of 64 by 64 pixels has 12,208 of them.
_MAX_PARTS = 20_000
# Writers pad small images to one tile of 256, 512 or 1,024 pixels a side.
_SMALL_TILE, _MAX_TILE_SHARE = 1024 * 1024, 4


class _Entry(NamedTuple):
    kind: int
    length: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Directory:
    """Those tags of an image that describe its pixels.

    Attributes:
        order: byte order, as `struct` writes it.
        entries: by tag.
    """

    order: str
    entries: Mapping[int, _Entry]

    def __contains__(self, tag: int) -> bool:
        return tag in self.entries

    def numbers(self, tag: int, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """The values of a tag."""
        entry = self.entries.get(tag)
        if entry is None:
            return default
        if entry.kind not in _NUMBERS:
            raise ImageUndecodable("A TIFF tag that must be a number is not a number.")
        return struct.unpack(f"{self.order}{entry.length}{_NUMBERS[entry.kind]}", entry.body)

    def number(self, tag: int, default: int) -> int:
        """The first value of a tag."""
        return (self.numbers(tag) or (default,))[0]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the image as stored."""
        return self.number(WIDTH, 0), self.number(HEIGHT, 0)

    @property
    def tile(self) -> tuple[int, int] | None:
        """Width and height of a tile; None for strips."""
        return (
            (self.number(TILE_WIDTH, 0), self.number(TILE_HEIGHT, 0)) if TILES[0] in self else None
        )


def read(data: bytes) -> Directory:
    """Read the directory of the first image.

    Raises:
        ImageUndecodable: it is damaged, or claims what no writer writes.
    """
    try:
        directory = _read(data)
    except (struct.error, OverflowError) as error:
        raise ImageUndecodable("The directory of the TIFF image is damaged.") from error
    if not {WIDTH, HEIGHT} <= directory.entries.keys() or not (
        STRIPS[0] in directory or TILES[0] in directory
    ):
        raise ImageUndecodable("The TIFF file has no image.")
    return directory


def rewrite(data: bytes, directory: Directory, changes: Mapping[int, tuple[int, ...]]) -> bytes:
    """The same file with no other directory than this one, some of its values changed."""
    order = directory.order
    entries = {**directory.entries, **{tag: _longs(order, v) for tag, v in changes.items()}}
    # A classic header takes the first 8 bytes of any file.
    end = len(data) + len(data) % 2
    header = data[:2] + struct.pack(f"{order}HL", 42, end)
    return b"".join((header, data[8:].ljust(end - 8, b"\0"), _pack(entries, end, order)))


def check_parts(data: bytes, directory: Directory) -> dict[int, tuple[int, ...]]:
    """Where the strips or tiles of an image lie: as many as there are places for.

    Returns:
        Offsets and sizes by tag, for `rewrite`.

    Raises:
        ImageTooLarge: a tile is far larger than the image.
        ImageUndecodable: there are too many of them, or they are the same bytes.
    """
    width, height = directory.size
    tags = STRIPS
    across, down = width, min(directory.number(ROWS_PER_STRIP, height), height)
    if directory.tile is not None:
        tags, (across, down) = TILES, directory.tile
        if across * down > max(_SMALL_TILE, _MAX_TILE_SHARE * width * height):
            raise ImageTooLarge("The tiles of the image are too large to decode.")
    if across <= 0 or down <= 0:
        raise ImageUndecodable("The TIFF image has tiles or strips without a size.")
    planes = directory.number(SAMPLES, 1) if directory.number(PLANES, 1) == 2 else 1
    places = -(-width // across) * -(-height // down) * planes
    if places > _MAX_PARTS:
        raise ImageUndecodable(f"The TIFF image has more than {_MAX_PARTS} tiles or strips.")
    parts = {tag: directory.numbers(tag)[:places] for tag in tags if tag in directory}
    if sum(parts.get(tags[1], ())) > len(data):
        raise ImageUndecodable(
            "The TIFF image is damaged or truncated: its tiles or strips overlap, or are missing."
        )
    return parts


def _read(data: bytes) -> Directory:
    order = ">" if data[:2] == b"MM" else "<"
    big = data[2:4] in (b"+\0", b"\0+")
    offset, number, size = ("Q", "Q", 20) if big else ("L", "H", 12)
    (start,) = struct.unpack_from(order + offset, data, 8 if big else 4)
    (count,) = struct.unpack_from(order + number, data, start)
    if count > _MAX_ENTRIES:
        raise ImageUndecodable(f"The TIFF directory has more than {_MAX_ENTRIES} entries.")
    first = start + struct.calcsize(order + number)
    entries = {}
    for at in range(first, first + count * size, size):
        tag, kind, values = struct.unpack_from(f"{order}HH{offset}", data, at)
        length = values * _SIZES.get(kind, 0)
        if tag not in _PIXEL_TAGS or not length:
            continue
        if length > _MAX_VALUE_BYTES:
            raise ImageUndecodable("A tag of the TIFF image has too many values.")
        place = at + size - struct.calcsize(order + offset)
        if length > struct.calcsize(order + offset):
            (place,) = struct.unpack_from(order + offset, data, place)
        body = data[place : place + length]
        if len(body) < length:
            raise ImageUndecodable("A tag of the TIFF image lies outside the file.")
        entries[tag] = _Entry(kind, values, body)
    return Directory(order, entries)


def _longs(order: str, values: tuple[int, ...]) -> _Entry:
    return _Entry(_LONG, len(values), struct.pack(f"{order}{len(values)}L", *values))


def _pack(entries: Mapping[int, _Entry], offset: int, order: str) -> bytes:
    """Write a classic directory that is to lie at an offset."""
    packed, bodies = [struct.pack(f"{order}H", len(entries))], []
    offset += 2 + 12 * len(entries) + 4
    for tag, entry in sorted(entries.items()):
        kind, count, body = entry
        if kind == _LONG8:
            kind, count, body = _longs(order, struct.unpack(f"{order}{count}Q", body))
        packed.append(struct.pack(f"{order}HHL", tag, kind, count))
        if len(body) <= 4:
            packed.append(body.ljust(4, b"\0"))
        else:
            packed.append(struct.pack(f"{order}L", offset))
            bodies.append(body + b"\0" * (len(body) % 2))
            offset += len(bodies[-1])
    return b"".join((*packed, bytes(4), *bodies))
