"""TIFF images whose samples Pillow has no mode for: deep colour, floats, planes and extra bands.

Pillow and libtiff still find, bound and decompress the data: they get the same file with a
directory that describes each row as a row of bytes. What the bytes mean is worked out here. Format:
TIFF 6.0 (Adobe, 1992), Technical Note 3 (floating-point predictor).
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from models.errors import ImageTooLarge, UnsupportedMediaType
from models.imaging import tiff_directory as tags
from models.imaging.modes import on_white
from models.imaging.samples import to_levels
from models.imaging.tiff_directory import Directory

# Bands of each photometric interpretation that is read here: white is zero, black is zero, RGB and
# CMYK.
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _CMYK = 0, 1, 2, 5
_COLOURS = {_WHITE_IS_ZERO: 1, _BLACK_IS_ZERO: 1, _RGB: 3, _CMYK: 4}

# None, LZW, deflate (new and old), PackBits and Zstandard: they keep data of any kind.
_BYTE_COMPRESSIONS = frozenset((1, 5, 8, 32946, 32773, 50000))
_KINDS = {1: "u", 2: "i", 3: "f", 4: "u"}
_TYPES = frozenset(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)) | {"f2", "f4", "f8"}
_ASSOCIATED_ALPHA, _ALPHA = 1, 2
_OLD_JPEG = 6
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
        directory: the file's.
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
    directory: Directory

    @property
    def stored(self) -> tuple[int, int]:
        """Width and height of what is stored: whole tiles, where there are tiles."""
        (width, height), (across, down) = self.size, self.tile or (1, 1)
        return -(-width // across) * across, -(-height // down) * down

    @property
    def interleaved(self) -> int:
        """Samples that lie beside each other for each pixel."""
        return 1 if self.planar else self.bands


def essential(data: bytes, directory: Directory) -> bytes:
    """The same file with only those tags, strips and tiles that are its pixels.

    Raises:
        UnsupportedMediaType: the JPEG compression that the format itself has given up.
        ImageUndecodable, ImageTooLarge: see `tiff_directory.check_parts`.
    """
    if directory.number(tags.COMPRESSION, 1) == _OLD_JPEG:
        raise unsupported(directory)
    return tags.rewrite(data, directory, tags.check_parts(data, directory))


def unsupported(directory: Directory) -> UnsupportedMediaType:
    """The refusal of a sound image that is not read."""
    bits, number = directory.numbers(tags.BITS, (1,)), directory.number
    return UnsupportedMediaType(
        f"TIFF images like this one are not read ({number(tags.SAMPLES, 1)} samples of {bits[0]} "
        f"bits, sample format {number(tags.FORMAT, 1)}, photometric interpretation "
        f"{number(tags.PHOTOMETRIC, 0)}, compression {number(tags.COMPRESSION, 1)}); save it as "
        "8-bit RGB."
    )


def layout(directory: Directory) -> Layout | None:
    """Describe an image, or None if it is left to Pillow.

    Raises:
        UnsupportedMediaType: a sound image that is not read.
    """
    number = directory.number
    bits, formats = directory.numbers(tags.BITS, (1,)), directory.numbers(tags.FORMAT, (1,))
    photometric, bands = number(tags.PHOTOMETRIC, 0), number(tags.SAMPLES, 1)
    extra = directory.numbers(tags.EXTRA)
    planar = bands > 1 and number(tags.PLANES, 1) == 2
    colours = _COLOURS.get(photometric)
    compressed = number(tags.COMPRESSION, 1) not in _BYTE_COMPRESSIONS
    if colours is None or compressed or bits[0] not in (8, 16, 32, 64):
        return None
    plain = bits[0] == 8 and formats[0] == 1 and not planar
    if plain and (bands == colours or (photometric == _RGB and bands == 4 and extra != (0,))):
        return None
    name = f"{_KINDS.get(formats[0])}{bits[0] // 8}"
    if len({*bits}) > 1 or len({*formats}) > 1 or name not in _TYPES or bands < colours:
        raise unsupported(directory)
    return Layout(
        size=directory.size,
        orientation=number(tags.ORIENTATION, 1),
        photometric=photometric,
        bands=bands,
        extra=extra,
        planar=planar,
        dtype=np.dtype(directory.order + name),
        predictor=number(tags.PREDICTOR, _NO_PREDICTOR),
        tile=directory.tile,
        directory=directory,
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
    stored = samples(data, layout, used)
    levels = to_levels(stored[..., :colours])
    pixels = 255 - levels.values if layout.photometric == _WHITE_IS_ZERO else levels.values
    image = _image(pixels)
    if alpha:
        opacity = to_levels(stored[..., colours : colours + 1]).values
        image = _on_white(image, opacity, associated=layout.extra[:1] == (_ASSOCIATED_ALPHA,))
    return image, (*warnings, *levels.warnings)


def _says_alpha(layout: Layout, colours: int) -> bool:
    """Whether the band after the colours is alpha: four bands of RGB need not say so."""
    unsaid = layout.photometric == _RGB and layout.bands == 4 and not layout.extra
    first = layout.extra[:1]
    place = layout.bands - len(layout.extra) == colours
    return unsaid or (place and first in ((_ASSOCIATED_ALPHA,), (_ALPHA,)))


def samples(data: bytes, layout: Layout, used: int) -> np.ndarray:
    """The first `used` bands as stored, (height, width, used)."""
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
        differences = stored.view(dtype).reshape(height, columns, bands)
        native = dtype.newbyteorder("=")
        return np.cumsum(differences, axis=1, dtype=native)
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
    changes: dict[int, tuple[int, ...]] = {
        tags.WIDTH: (layout.stored[0] * size,),
        tags.HEIGHT: (layout.size[1],),
        tags.BITS: (8,),
        tags.PHOTOMETRIC: (_BLACK_IS_ZERO,),
        tags.SAMPLES: (1,),
    }
    kept = (tags.COMPRESSION, tags.FILL_ORDER, tags.ROWS_PER_STRIP, tags.TILE_HEIGHT)
    if layout.tile is not None:
        changes[tags.TILE_WIDTH] = (layout.tile[0] * size,)
    planes = layout.bands if layout.planar else 1
    for tag, numbers in tags.check_parts(data, layout.directory).items():
        share = len(numbers) // planes
        if share:
            changes[tag] = numbers[plane * share : (plane + 1) * share]
    entries = {tag: entry for tag, entry in layout.directory.entries.items() if tag in kept}
    return tags.rewrite(data, Directory(layout.directory.order, entries), changes)


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
