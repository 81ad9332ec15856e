"""TIFF images whose samples Pillow has no mode for: deep colour, floats, planes and extra bands.

Pillow and libtiff still find, bound and decompress the data: they get the same file with a
directory that describes each row as a row of bytes. What the bytes mean is worked out here. Format:
TIFF 6.0 (Adobe, 1992), Technical Note 3 (floating-point predictor).
"""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile

from models.errors import ImageTooLarge, UnsupportedMediaType
from models.imaging.modes import on_white
from models.imaging.orientation import ORIENTATION_TAG
from models.imaging.samples import to_levels

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER = 256, 257, 258, 259, 262, 266
_SAMPLES, _ROWS_PER_STRIP, _PLANES, _PREDICTOR = 277, 278, 284, 317
_TILE_WIDTH, _TILE_HEIGHT, _EXTRA, _FORMAT = 322, 323, 338, 339
_STRIPS = (273, 279)
_TILES = (324, 325)

# Bands of each photometric interpretation that is read here: white is zero, black is zero, RGB and
# CMYK.
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _CMYK = 0, 1, 2, 5
_COLOURS = {_WHITE_IS_ZERO: 1, _BLACK_IS_ZERO: 1, _RGB: 3, _CMYK: 4}

# None, LZW, deflate (new and old), PackBits and Zstandard: they keep data of any kind.
_BYTE_COMPRESSIONS = frozenset((1, 5, 8, 32946, 32773, 50000))
_KINDS = {1: "u", 2: "i", 3: "f", 4: "u"}
_TYPES = frozenset(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)) | {"f2", "f4", "f8"}
_ASSOCIATED_ALPHA, _ALPHA = 1, 2
_NO_PREDICTOR, _DIFFERENCES, _FLOAT_DIFFERENCES = 1, 2, 3

# Bytes of samples, as a multiple of the pixels that an image may have.
_MAX_SAMPLE_BYTES = 8


@dataclass(frozen=True, slots=True)
class Layout:
    """How the samples of a TIFF image lie.

    Attributes:
        size: width and height as stored.
        orientation: EXIF orientation.
        photometric: what the first bands are.
        bands: samples of a pixel.
        extra: what the bands after the colours are, as the file says.
        planar: whether each band is stored by itself.
        dtype: of a sample.
        predictor: what was done to rows before they were compressed.
        tile: width and height of a tile; None for strips.
        order: byte order, as `struct` writes it.
        tags: the file's directory.
    """

    size: tuple[int, int]
    orientation: int
    photometric: int
    bands: int
    extra: tuple[int, ...]
    planar: bool
    dtype: np.dtype
    predictor: int
    tile: tuple[int, int] | None
    order: str
    tags: Mapping[int, object]

    @property
    def stored(self) -> tuple[int, int]:
        """Width and height of what is stored: whole tiles, where there are tiles."""
        (width, height), (across, down) = self.size, self.tile or (1, 1)
        return -(-width // across) * across, -(-height // down) * down

    @property
    def interleaved(self) -> int:
        """Samples that lie beside each other for each pixel."""
        return 1 if self.planar else self.bands


def directory(data: bytes) -> ImageFileDirectory_v2 | None:
    """The tags of the first image of a file; None if they do not describe one."""
    big = data[2:4] in (b"+\0", b"\0+")
    tags = ImageFileDirectory_v2(data[: 16 if big else 8])
    file = io.BytesIO(data)
    file.seek(tags.next)
    tags.load(file)
    complete = _WIDTH in tags and _HEIGHT in tags and (_STRIPS[0] in tags or _TILES[0] in tags)
    return tags if complete else None


def tile_size(tags: ImageFileDirectory_v2) -> tuple[int, int]:
    """Width and height of a tile, which is decoded as a whole; zeros for strips."""
    return _number(tags, _TILE_WIDTH, 0), _number(tags, _TILE_HEIGHT, 0)


def unsupported(tags: Mapping[int, object]) -> UnsupportedMediaType:
    """The refusal of a sound image that is not read."""
    bits, bands = _numbers(tags, _BITS, (1,)), _number(tags, _SAMPLES, 1)
    return UnsupportedMediaType(
        f"TIFF images like this one are not read ({bands} samples of {bits[0]} bits, sample format "
        f"{_number(tags, _FORMAT, 1)}, photometric interpretation {_number(tags, _PHOTOMETRIC, 0)}"
        f", compression {_number(tags, _COMPRESSION, 1)}); save it as 8-bit RGB."
    )


def layout(tags: ImageFileDirectory_v2) -> Layout | None:
    """Describe an image, or None if it is left to Pillow.

    Raises:
        UnsupportedMediaType: a sound image that is not read.
    """
    bits, formats = _numbers(tags, _BITS, (1,)), _numbers(tags, _FORMAT, (1,))
    photometric, bands = _number(tags, _PHOTOMETRIC, 0), _number(tags, _SAMPLES, 1)
    extra = _numbers(tags, _EXTRA, ())
    planar = bands > 1 and _number(tags, _PLANES, 1) == 2
    colours = _COLOURS.get(photometric)
    compressed = _number(tags, _COMPRESSION, 1) not in _BYTE_COMPRESSIONS
    if colours is None or compressed or bits[0] not in (8, 16, 32, 64):
        return None
    plain = bits[0] == 8 and formats[0] == 1 and not planar
    if plain and (bands == colours or (photometric == _RGB and bands == 4 and extra != (0,))):
        return None
    name, order = f"{_KINDS.get(formats[0])}{bits[0] // 8}", ">" if tags.prefix == b"MM" else "<"
    if len({*bits}) > 1 or len({*formats}) > 1 or name not in _TYPES or bands < colours:
        raise unsupported(tags)
    return Layout(
        size=(_number(tags, _WIDTH, 0), _number(tags, _HEIGHT, 0)),
        orientation=_number(tags, ORIENTATION_TAG, 1),
        photometric=photometric,
        bands=bands,
        extra=extra,
        planar=planar,
        dtype=np.dtype(order + name),
        predictor=_number(tags, _PREDICTOR, _NO_PREDICTOR),
        tile=tile_size(tags) if _TILES[0] in tags else None,
        order=order,
        tags=tags,
    )


def read(data: bytes, layout: Layout, *, max_pixels: int) -> tuple[Image.Image, tuple[str, ...]]:
    """Decode an image of a mode that can be made RGB, and say what had to be assumed.

    Of a grey image with three bands or more the first three are taken for red, green and blue.
    Bands after the colours are dropped, but for alpha, with which an image is laid on white.

    Raises:
        ImageTooLarge: more samples than are decoded for an image of `max_pixels`.
    """
    width, height = layout.stored
    if width * height * layout.bands * layout.dtype.itemsize > _MAX_SAMPLE_BYTES * max_pixels:
        raise ImageTooLarge("The image has too many samples to decode.")
    colours = _COLOURS[layout.photometric]
    warnings: list[str] = []
    if layout.photometric == _BLACK_IS_ZERO and layout.bands >= 3 and not _says_alpha(layout, 1):
        colours = 3
        warnings.append("The first three bands were read as red, green and blue.")
    alpha = _says_alpha(layout, colours)
    used = colours + alpha
    if layout.bands > used:
        warnings.append(f"The image has {layout.bands} bands: only the first {used} were read.")
    samples = _samples(data, layout, used)
    levels = to_levels(samples[..., :colours])
    pixels = 255 - levels.values if layout.photometric == _WHITE_IS_ZERO else levels.values
    image = _image(pixels)
    if alpha:
        opacity = to_levels(samples[..., colours : colours + 1]).values
        image = _on_white(image, opacity, associated=layout.extra[:1] == (_ASSOCIATED_ALPHA,))
    return image, (*warnings, *levels.warnings)


def _says_alpha(layout: Layout, colours: int) -> bool:
    """Whether the band after the colours is alpha: four bands of RGB need not say so."""
    unsaid = layout.photometric == _RGB and layout.bands == 4 and not layout.extra
    first = layout.extra[:1]
    place = layout.bands - len(layout.extra) == colours
    return unsaid or (place and first in ((_ASSOCIATED_ALPHA,), (_ALPHA,)))


def _samples(data: bytes, layout: Layout, used: int) -> np.ndarray:
    """The first `used` bands, (height, width, used)."""
    width = layout.size[0]
    if not layout.planar:
        return _rows(data, layout, plane=0)[:, :width, :used]
    planes = [_rows(data, layout, plane=i)[:, :width, 0] for i in range(used)]
    return np.stack(planes, axis=-1)


def _rows(data: bytes, layout: Layout, *, plane: int) -> np.ndarray:
    """Samples of one plane, or of all bands where these are interleaved, (height, width, bands)."""
    file = io.BytesIO(_as_bytes(data, layout, plane))
    with TiffImageFile(file) as image:
        image.load()
        stored = np.array(image)
    width = layout.stored[0]
    shape = (layout.size[1], width, layout.interleaved)
    if layout.predictor == _NO_PREDICTOR:
        return stored.view(layout.dtype).reshape(shape)
    columns = width if layout.tile is None else layout.tile[0]
    size = columns * layout.interleaved * layout.dtype.itemsize
    parts = [
        _undo_predictor(np.ascontiguousarray(stored[:, start : start + size]), layout, columns)
        for start in range(0, stored.shape[1], size)
    ]
    return np.concatenate(parts, axis=1)


def _undo_predictor(stored: np.ndarray, layout: Layout, columns: int) -> np.ndarray:
    """Samples from their differences to the left neighbour, (height, columns, bands)."""
    height, bands, dtype = stored.shape[0], layout.interleaved, layout.dtype
    if layout.predictor == _DIFFERENCES and dtype.kind != "f":
        samples = stored.view(dtype).reshape(height, columns, bands)
        native = dtype.newbyteorder("=")
        return np.cumsum(samples, axis=1, dtype=native)
    if layout.predictor != _FLOAT_DIFFERENCES or dtype.kind != "f":
        raise ValueError("This predictor does not suit the samples.")
    # The bytes of a row's samples are sorted by significance, the most significant ones first.
    summed = np.cumsum(stored.reshape(height, -1, bands), axis=1, dtype=np.uint8)
    planes = summed.reshape(height, dtype.itemsize, columns * bands)
    sorted_bytes = np.ascontiguousarray(planes.transpose(0, 2, 1))
    return sorted_bytes.view(dtype.newbyteorder(">")).reshape(height, columns, bands)


def _as_bytes(data: bytes, layout: Layout, plane: int) -> bytes:
    """The same file with a directory by which each row of a plane is a row of bytes."""
    size = layout.interleaved * layout.dtype.itemsize
    tags: dict[int, tuple[int, ...]] = {
        _WIDTH: (layout.stored[0] * size,),
        _HEIGHT: (layout.size[1],),
        _BITS: (8,),
        _PHOTOMETRIC: (_BLACK_IS_ZERO,),
        _SAMPLES: (1,),
    }
    for tag in (_COMPRESSION, _FILL_ORDER, _ROWS_PER_STRIP, _TILE_HEIGHT):
        if tag in layout.tags:
            tags[tag] = _numbers(layout.tags, tag, ())
    if layout.tile is not None:
        tags[_TILE_WIDTH] = (layout.tile[0] * size,)
    planes = layout.bands if layout.planar else 1
    for tag in _STRIPS if layout.tile is None else _TILES:
        numbers = _numbers(layout.tags, tag, ())
        share = len(numbers) // planes
        if share:
            tags[tag] = numbers[plane * share : (plane + 1) * share]
    # A classic header takes the first 8 bytes of any file.
    end = len(data) + len(data) % 2
    header = data[:2] + struct.pack(f"{layout.order}HL", 42, end)
    return b"".join((header, data[8:].ljust(end - 8, b"\0"), _pack(tags, end, layout.order)))


def _pack(tags: Mapping[int, tuple[int, ...]], offset: int, order: str) -> bytes:
    """Write a directory, all of whose values are 32-bit integers, to lie at an offset."""
    entries, values = [struct.pack(f"{order}H", len(tags))], []
    offset += 2 + 12 * len(tags) + 4
    for tag, numbers in sorted(tags.items()):
        body = struct.pack(f"{order}{len(numbers)}L", *numbers)
        entries.append(struct.pack(f"{order}HHL", tag, 4, len(numbers)))
        if len(numbers) == 1:
            entries.append(body)
        else:
            entries.append(struct.pack(f"{order}L", offset))
            values.append(body)
            offset += len(body)
    return b"".join((*entries, bytes(4), *values))


def _image(pixels: np.ndarray) -> Image.Image:
    """An RGB image from 8-bit samples (height, width, 1, 3 or 4): grey, RGB or CMYK."""
    height, width, bands = pixels.shape
    mode = {1: "L", 3: "RGB", 4: "CMYK"}[bands]
    return Image.frombytes(mode, (width, height), pixels.tobytes()).convert("RGB")


def _on_white(image: Image.Image, opacity: np.ndarray, *, associated: bool) -> Image.Image:
    """Lay an image on white; associated alpha is in its colours already."""
    if associated:
        pixels = np.asarray(image)
        return Image.fromarray(pixels + np.minimum(255 - opacity, 255 - pixels))
    return on_white(image, Image.fromarray(np.ascontiguousarray(opacity[..., 0])))


def _numbers(tags: Mapping[int, object], tag: int, default: tuple[int, ...]) -> tuple[int, ...]:
    value = tags.get(tag, default)
    values = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(item, int) for item in values):
        raise ValueError("A tag that must be a number is none.")
    return values


def _number(tags: Mapping[int, object], tag: int, default: int) -> int:
    return _numbers(tags, tag, (default,))[0]
