"""TIFF files of every depth, layout and number of bands."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from models.errors import ImageTooLarge, UnsupportedMediaType
from models.imaging.decode import DecodeLimits
from tests.models.imaging.photograph import GREY, RGB, SHADES, distance, read, scaled


def tiff(samples: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, samples, metadata=None, **options)
    return buffer.getvalue()


WORDS = RGB.astype(np.uint16) * 257
DEPTHS = {
    "u1": RGB,
    "u2": WORDS,
    "i2": (WORDS // 2).astype(np.int16),
    "f2": (RGB / 255).astype(np.float16),
    "f4": (RGB / 255).astype(np.float32),
    "f8": RGB / 255,
}
LAYOUTS = {
    "one strip": {},
    "strips": {"rowsperstrip": 7},
    "tiles": {"tile": (32, 32)},
    "big": {"bigtiff": True},
    "big-endian": {"byteorder": ">"},
}
COMPRESSIONS = {
    "none": {},
    "deflate": {"compression": "zlib"},
}


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_colour_of_any_depth_and_layout(
    depth: str, layout: str, compression: str, planar: str
) -> None:
    samples = DEPTHS[depth]
    if planar == "separate":
        samples = np.moveaxis(samples, -1, 0)
    options = {**LAYOUTS[layout], **COMPRESSIONS[compression]}
    data = tiff(samples, photometric="rgb", planarconfig=planar, **options)
    assert distance(read(data), RGB) <= 1


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("depth", DEPTHS)
def test_grey_of_any_depth(depth: str, layout: str, photometric: str) -> None:
    samples = DEPTHS[depth][..., 1]
    expected = RGB[..., 1:2].repeat(3, axis=2)
    data = tiff(samples, photometric=photometric, compression="zlib", **LAYOUTS[layout])
    assert distance(read(data), 255 - expected if photometric == "miniswhite" else expected) <= 1


def test_lzw() -> None:
    buffer = io.BytesIO()
    Image.fromarray(WORDS[..., 0]).save(buffer, "TIFF", compression="tiff_lzw")
    assert distance(read(buffer.getvalue()), RGB[..., :1].repeat(3, axis=2)) <= 1


def packbits(data: bytes) -> bytes:
    """PackBits without a run: each stretch after its length."""
    parts = [data[i : i + 128] for i in range(0, len(data), 128)]
    return b"".join(bytes([len(part) - 1]) + part for part in parts)


def differences(samples: np.ndarray) -> bytes:
    """Predictor 2: each sample less its left neighbour, modulo."""
    return np.diff(samples, axis=1, prepend=samples.dtype.type(0)).astype(samples.dtype).tobytes()


def float_differences(samples: np.ndarray) -> bytes:
    """Predictor 3: the bytes of a row sorted by significance, then differences of bytes."""
    height, width, bands = samples.shape
    size = samples.dtype.itemsize
    ordered = samples.astype(samples.dtype.newbyteorder(">")).view(np.uint8)
    planes = ordered.reshape(height, width * bands, size).transpose(0, 2, 1)
    rows = planes.reshape(height, width * size, bands)
    return np.diff(rows, axis=1, prepend=np.uint8(0)).astype(np.uint8).tobytes()


def tiled(samples: np.ndarray, side: int) -> list[np.ndarray]:
    height, width = samples.shape[:2]
    padded = np.pad(samples, ((0, -height % side), (0, -width % side), (0, 0)), mode="edge")
    rows, columns = range(0, padded.shape[0], side), range(0, padded.shape[1], side)
    return [padded[y : y + side, x : x + side] for y in rows for x in columns]


def written(samples: np.ndarray, *, predictor: int, compression: int, side: int | None) -> bytes:
    """A little-endian TIFF of interleaved samples, in one strip or in tiles."""
    encode_rows = {1: np.ndarray.tobytes, 2: differences, 3: float_differences}[predictor]
    compress = {1: bytes, 8: zlib.compress, 32773: packbits}[compression]
    blocks = [samples] if side is None else tiled(samples, side)
    parts = [compress(encode_rows(np.ascontiguousarray(block))) for block in blocks]
    offsets = [8 + sum(map(len, parts[:i])) for i in range(len(parts))]
    kind = {"u": 1, "i": 2, "f": 3}[samples.dtype.kind]
    height, width, bands = samples.shape
    tags = {256: [width], 257: [height], 258: [8 * samples.dtype.itemsize] * bands}
    tags |= {259: [compression], 262: [2], 277: [bands], 317: [predictor], 339: [kind] * bands}
    where, sizes = offsets, [len(part) for part in parts]
    tags |= {273: where, 278: [height], 279: sizes} if side is None else {
        322: [side], 323: [side], 324: where, 325: sizes}  # fmt: skip
    body = b"".join(parts)
    end = 8 + len(body)
    entries, values, at = b"", b"", end + 2 + 12 * len(tags) + 4
    for tag, numbers in sorted(tags.items()):
        packed = struct.pack(f"<{len(numbers)}L", *numbers)
        place = packed if len(packed) == 4 else struct.pack("<L", at + len(values))
        values += b"" if len(packed) == 4 else packed
        entries += struct.pack("<HHL", tag, 4, len(numbers)) + place
    header = b"II*\0" + struct.pack("<L", end)
    return header + body + struct.pack("<H", len(tags)) + entries + bytes(4) + values


@pytest.mark.parametrize("side", [None, 16, 48])
@pytest.mark.parametrize(
    ("compression", "predicted"), [(1, False), (8, False), (32773, False), (8, True)]
)
@pytest.mark.parametrize("depth", DEPTHS)
def test_predictors(depth: str, predicted: bool, compression: int, side: int | None) -> None:
    samples = DEPTHS[depth]
    predictor = 1 if not predicted else 3 if samples.dtype.kind == "f" else 2
    data = written(samples, predictor=predictor, compression=compression, side=side)
    assert distance(read(data), RGB) <= 1
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        assert file.pages[0].shape == RGB.shape


@pytest.mark.parametrize("depth", ["u1", "u2", "f4"])
def test_predictors_of_five_bands(depth: str) -> None:
    samples = np.concatenate([DEPTHS[depth], DEPTHS[depth][..., :2]], axis=-1)
    predictor = 3 if samples.dtype.kind == "f" else 2
    data = written(samples, predictor=predictor, compression=8, side=16)
    assert distance(read(data), RGB) <= 1


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("photometric", ["rgb", "minisblack"])
@pytest.mark.parametrize("depth", ["u1", "u2", "f4"])
def test_bands_beyond_the_third_are_dropped_and_said(
    depth: str, photometric: str, planar: str
) -> None:
    samples = DEPTHS[depth]
    samples = np.concatenate([samples, samples[..., :2]], axis=-1)
    if planar == "separate":
        samples = np.moveaxis(samples, -1, 0)
    extra = {"extrasamples": ["unspecified"] * 2} if photometric == "rgb" else {}
    data = tiff(samples, photometric=photometric, planarconfig=planar, **extra)
    picture = read(data)
    assert distance(picture, RGB) <= 1
    assert "5 bands" in " ".join(picture.warnings)
    assert ("red, green and blue" in " ".join(picture.warnings)) == (photometric == "minisblack")


@pytest.mark.parametrize("depth", ["u1", "u2", "f4"])
def test_alpha_of_any_depth_is_laid_on_white(depth: str) -> None:
    ramp = np.linspace(0, 1, 61)[None, :, None].repeat(40, axis=0)
    full = 1.0 if depth == "f4" else np.iinfo(DEPTHS[depth].dtype).max
    expected = RGB * ramp + 255 * (1 - ramp)
    for kind, colours in (("unassalpha", DEPTHS[depth]), ("assocalpha", DEPTHS[depth] * ramp)):
        samples = np.concatenate([colours, ramp * full], axis=-1).astype(DEPTHS[depth].dtype)
        planes = np.moveaxis(samples, -1, 0)
        data = tiff(planes, photometric="rgb", planarconfig="separate", extrasamples=[kind])
        assert distance(read(data), expected) <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_deep_colour(orientation: int) -> None:
    options = {"extratags": [(274, 3, 1, orientation, True)]}
    plain = read(tiff(RGB, photometric="rgb", **options))
    deep = read(
        tiff(np.moveaxis(WORDS, -1, 0), photometric="rgb", planarconfig="separate", **options)
    )
    assert (deep.width, deep.height) == (plain.width, plain.height)
    assert distance(deep, np.asarray(plain.image)) <= 1


def test_what_samples_without_a_range_were_taken_for_is_said() -> None:
    picture = read(tiff((RGB * 40.0 - 700).astype(np.float32), photometric="rgb"))
    assert "float32" in " ".join(picture.warnings)
    low, high = RGB.min() * 40.0 - 700, RGB.max() * 40.0 - 700
    assert f"{low:g} was read as black and {high:g} as white" in " ".join(picture.warnings)


def test_twelve_bits_that_are_declared_are_no_guess() -> None:
    rows = scaled(GREY[:, :60], 12)
    packed = np.stack(
        [rows[:, ::2] >> 4, (rows[:, ::2] & 15) << 4 | rows[:, 1::2] >> 8, rows[:, 1::2] & 255], -1
    )
    buffer = io.BytesIO()
    Image.fromarray(packed.astype(np.uint8).reshape(40, 90)).save(buffer, "TIFF")
    data = bytearray(buffer.getvalue())
    order = "<" if data[:2] == b"II" else ">"
    for tag, old, new in ((256, 90, 60), (258, 8, 12)):
        for kind, code in ((3, "H"), (4, "L")):
            entry = struct.pack(f"{order}HHL{code}", tag, kind, 1, old)
            if entry in data:
                at = data.index(entry)
                data[at : at + len(entry)] = struct.pack(f"{order}HHL{code}", tag, kind, 1, new)
    picture = read(bytes(data))
    assert distance(picture, SHADES[:, :60]) <= 1
    assert picture.warnings == ()


def test_a_kind_that_is_not_read_is_named() -> None:
    data = tiff(
        np.zeros((40, 60, 3), np.complex64), photometric="minisblack", planarconfig="contig"
    )
    with pytest.raises(UnsupportedMediaType, match=r"3 samples of 64 bits.*save it as 8-bit RGB"):
        read(data)


def test_samples_are_capped() -> None:
    data = tiff(np.moveaxis(DEPTHS["f8"], -1, 0), photometric="rgb", planarconfig="separate")
    with pytest.raises(ImageTooLarge, match="samples"):
        read(data, limits=DecodeLimits(max_pixels=61 * 40))
    wide = tiff(WORDS, photometric="rgb", tile=(1024, 1024))
    with pytest.raises(ImageTooLarge, match="samples"):
        read(wide, limits=DecodeLimits(max_pixels=61 * 40))
