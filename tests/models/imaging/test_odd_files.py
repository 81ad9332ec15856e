"""PNG and JPEG files that every viewer opens: odd metadata, deep samples."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from models.errors import UnsupportedMediaType
from tests.models.imaging.photograph import (
    GREY,
    PHOTO,
    RGB,
    SHADES,
    distance,
    encode,
    read,
    scaled,
)

OPAQUE = np.full((40, 61, 1), 65535)


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
