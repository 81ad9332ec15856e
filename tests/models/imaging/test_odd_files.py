"""Sound files that every viewer opens: odd metadata, deep samples, rare layouts."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image
from skimage import data as pictures

from models.errors import ImageTooLarge, UnsupportedMediaType
from models.imaging.decode import DecodedImage, DecodeLimits, decode
from models.types import Preprocess

SPEC = Preprocess(resize=256, crop=(224, 224))
PHOTO = Image.fromarray(pictures.chelsea()).resize((61, 40))
RGB = np.asarray(PHOTO)
GREY = np.asarray(PHOTO.convert("L"))
SHADES = GREY[..., None].repeat(3, axis=2)
OPAQUE = np.full((40, 61, 1), 65535)


def read(data: bytes, **changes: object) -> DecodedImage:
    return decode(data, **{"limits": DecodeLimits(), "preprocess": SPEC, **changes})


def distance(picture: DecodedImage, expected: np.ndarray) -> int:
    return int(np.abs(np.asarray(picture.image).astype(int) - expected).max())


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# ---------------------------------------------------------------- PNG metadata


def chunk(kind: bytes, body: bytes, *, crc: int | None = None) -> bytes:
    found = zlib.crc32(kind + body) if crc is None else crc
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", found)


LONG_TEXT = zlib.compress(b"a photograph of a cat, " * 90_000)
ODD_CHUNKS = {
    "long zTXt": chunk(b"zTXt", b"parameters\0\0" + LONG_TEXT),
    "long iTXt": chunk(b"iTXt", b"workflow\0\1\0\0\0" + LONG_TEXT),
    "long plain text": chunk(b"tEXt", b"workflow\0" + b"x" * 2_000_000),
    "long iCCP": chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(1_500_000))),
    "long EXIF text": chunk(b"zTXt", b"Raw profile type exif\0\0" + LONG_TEXT),
    "long XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LONG_TEXT),
    "unknown compression": chunk(b"zTXt", b"a\0\7b"),
    "unknown profile compression": chunk(b"iCCP", b"a\0\7b"),
    "wrong CRC of a text": chunk(b"tEXt", b"a\0b", crc=1),
    "wrong CRC of EXIF": chunk(b"eXIf", b"junk", crc=1),
    "wrong CRC of transparency": chunk(b"tRNS", bytes(6), crc=1),
    "short gAMA": chunk(b"gAMA", b"\0\0"),
    "short cHRM": chunk(b"cHRM", b""),
    "short sRGB": chunk(b"sRGB", b""),
    "short pHYs": chunk(b"pHYs", b"\0"),
    "short tRNS": chunk(b"tRNS", b"\0"),
    "short sBIT": chunk(b"sBIT", b""),
    "short acTL": chunk(b"acTL", b"\0"),
    "lone fcTL": chunk(b"fcTL", bytes(26)),
    "frame outside": chunk(b"fcTL", struct.pack(">5I", 5, 100, 100, 9, 9) + bytes(6)),
    "unknown": chunk(b"raNd", b"x" * 99),
}


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("name", ODD_CHUNKS)
def test_ancillary_chunks_do_not_decide_over_a_png(name: str, place: str) -> None:
    plain, odd = encode(PHOTO, "PNG"), ODD_CHUNKS[name]
    at = 33 if place == "first" else len(plain) - 12
    picture = read(plain[:at] + odd + plain[at:])
    assert distance(picture, RGB) == 0
    assert picture.warnings == ()


@pytest.mark.parametrize("keyword", [b"Raw profile type exif", b"XML:com.adobe.xmp"])
@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt", b"iTXt compressed"])
def test_an_orientation_in_a_text_is_applied(keyword: bytes, kind: bytes) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    text = b'<x:xmpmeta xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="3"/>'
    if keyword.startswith(b"Raw"):
        payload = exif.tobytes()
        text = b"\nexif\n%8d\n" % len(payload) + payload.hex().encode() + b"\n"
    body = {
        b"tEXt": text,
        b"zTXt": b"\0" + zlib.compress(text),
        b"iTXt": b"\0\0\0\0" + text,
        b"iTXt compressed": b"\1\0\0\0" + zlib.compress(text),
    }[kind]
    plain = encode(PHOTO, "PNG")
    data = plain[:33] + chunk(kind[:4], keyword + b"\0" + body) + plain[33:]
    with Image.open(io.BytesIO(data)) as image:
        told = image.getexif().get(0x0112, 1)
    assert distance(read(data), RGB[::-1, ::-1] if told == 3 else RGB) == 0
    if kind == b"zTXt" and keyword.startswith(b"Raw"):
        assert told == 3


def test_an_animated_png_gives_its_first_frame() -> None:
    frames = [PHOTO, PHOTO.rotate(90), PHOTO.rotate(180)]
    data = encode(frames[0], "PNG", save_all=True, append_images=frames[1:])
    assert distance(read(data), RGB) == 0


# ---------------------------------------------------------------- deep PNG


def deep_png(samples: np.ndarray, colour: int, *extra: bytes) -> bytes:
    """A 16-bit PNG of samples (height, width, bands)."""
    height, width = samples.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    parts = (chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(rows)))
    return b"\x89PNG\r\n\x1a\n" + b"".join((*parts, chunk(b"IEND", b"")))


def scaled(pixels: np.ndarray, bits: int) -> np.ndarray:
    return np.rint(pixels / 255 * (2**bits - 1)).astype(int)


@pytest.mark.parametrize("bits", [8, 10, 12])
@pytest.mark.parametrize("kind", ["grey", "grey+alpha", "colour", "colour+alpha", "narrow alpha"])
def test_samples_of_fewer_bits_than_they_are_stored_in(kind: str, bits: int) -> None:
    grey, colour = scaled(GREY[..., None], bits), scaled(RGB, bits)
    data, expected = {
        "grey": (deep_png(grey, 0), SHADES),
        "grey+alpha": (deep_png(np.dstack([grey, OPAQUE]), 4), SHADES),
        "colour": (deep_png(colour, 2), RGB),
        "colour+alpha": (deep_png(np.dstack([colour, OPAQUE]), 6), RGB),
        "narrow alpha": (deep_png(np.dstack([colour, 0 * OPAQUE + 2**bits - 1]), 6), RGB),
    }[kind]
    picture = read(data)
    assert distance(picture, expected) <= 1
    assert f"{bits} bits" in " ".join(picture.warnings)


@pytest.mark.parametrize("kind", ["grey", "colour"])
def test_the_depth_that_a_file_names_is_used(kind: str) -> None:
    said = chunk(b"sBIT", bytes([14] * (1 if kind == "grey" else 3)))
    if kind == "grey":
        picture, expected = read(deep_png(scaled(GREY[..., None], 14), 0, said)), SHADES
    else:
        picture, expected = read(deep_png(scaled(RGB, 14), 2, said)), RGB
    assert distance(picture, expected) <= 1
    assert "14 bits" in " ".join(picture.warnings)


def test_samples_that_fill_their_depth_need_no_warning() -> None:
    said = chunk(b"sBIT", bytes([12]))
    for extra in ((), (said,)):
        picture = read(deep_png(GREY[..., None].astype(int) * 257, 0, *extra))
        assert distance(picture, SHADES) == 0
        assert picture.warnings == ()
    assert read(deep_png(RGB.astype(int) * 257, 2)).warnings == ()


def test_dark_samples_are_not_scaled_but_said() -> None:
    picture = read(deep_png(scaled(GREY[..., None], 14), 0))
    assert distance(picture, SHADES // 4) <= 1
    assert "14 bits" in " ".join(picture.warnings)


def test_a_black_image_is_black() -> None:
    for bands, colour in ((1, 0), (2, 4), (3, 2), (4, 6)):
        samples = np.zeros((40, 61, bands), int)
        if bands % 2 == 0:
            samples[..., -1] = 65535
        picture = read(deep_png(samples, colour))
        assert np.asarray(picture.image).max() == 0
        assert picture.warnings == ()


def test_a_transparent_deep_grey_is_white() -> None:
    key = int(GREY[3, 3])
    for scale, key_value in ((257, key * 257), (16, key * 16)):
        data = deep_png(
            GREY[..., None].astype(int) * scale, 0, chunk(b"tRNS", struct.pack(">H", key_value))
        )
        got = np.asarray(read(data).image)
        assert (got[key == GREY] == 255).all()
        assert np.abs(got.astype(int) - SHADES)[key != GREY].max() <= 1


# ---------------------------------------------------------------- TIFF


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
    with pytest.raises(UnsupportedMediaType, match="mode LAB are not read"):
        read(encode(Image.new("LAB", (61, 40)), "TIFF"))


def test_samples_are_capped() -> None:
    data = tiff(np.moveaxis(DEPTHS["f8"], -1, 0), photometric="rgb", planarconfig="separate")
    with pytest.raises(ImageTooLarge, match="samples"):
        read(data, limits=DecodeLimits(max_pixels=61 * 40))
    wide = tiff(WORDS, photometric="rgb", tile=(1024, 1024))
    with pytest.raises(ImageTooLarge, match="tiles"):
        read(wide, limits=DecodeLimits(max_pixels=61 * 40))


# ---------------------------------------------------------------- JPEG


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


@pytest.mark.parametrize(
    ("marker", "body"), [(0xE0, b"JFIF\0"), (0xE0, b"JFIF\0\1"), (0xEE, b"Adobe"), (0xED, b"x")]
)
def test_odd_segments_do_not_decide_over_a_jpeg(marker: int, body: bytes) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    plain = encode(PHOTO, "JPEG", quality=95, exif=exif)
    data = plain[:2] + segment(marker, body) + plain[2:]
    assert distance(read(data), np.asarray(read(plain).image)) <= 1


@pytest.mark.parametrize(("marker", "precision"), [(0xC1, 12), (0xC3, 8), (0xC7, 8)])
def test_kinds_of_jpeg_that_are_not_read_are_named(marker: int, precision: int) -> None:
    data = bytearray(encode(PHOTO, "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 1], data[at + 4] = marker, precision
    with pytest.raises(UnsupportedMediaType, match="8-bit JPEG or PNG"):
        read(bytes(data))
