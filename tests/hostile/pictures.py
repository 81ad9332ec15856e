"""Bad pictures, made by code: cut, mislabelled, contradicting themselves, or asking for the impossible."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Iterator
from functools import cache

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_CUTS = (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
_EXTREMES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@cache
def seeds() -> dict[str, bytes]:
    """Sound pictures of many kinds, by name."""
    noise = np.random.default_rng(1).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    rgb = Image.fromarray(noise).resize((40, 30))
    grey, alpha, palette = rgb.convert("L"), rgb.convert("RGBA"), rgb.quantize(32)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) << 8)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description " * 20
    icc = bytes(range(256)) * 8
    found = {kind.lower(): encode(rgb, kind) for kind in FORMATS}
    found |= {
        "jpeg grey": encode(grey, "JPEG"),
        "jpeg cmyk": encode(rgb.convert("CMYK"), "JPEG"),
        "jpeg progressive": encode(rgb, "JPEG", progressive=True),
        "jpeg with metadata": encode(rgb, "JPEG", exif=exif, icc_profile=icc),
        "jpeg of two pictures": encode(rgb, "MPO", save_all=True, append_images=[rgb]),
        "png grey": encode(grey, "PNG"),
        "png of 16 bits": encode(deep, "PNG"),
        "png with alpha": encode(alpha, "PNG"),
        "png palette": encode(palette, "PNG", transparency=3),
        "png with metadata": encode(rgb, "PNG", exif=exif, icc_profile=icc),
        "png animated": encode(rgb, "PNG", save_all=True, append_images=[rgb]),
        "webp lossless": encode(alpha, "WEBP", lossless=True),
        "webp animated": encode(rgb, "WEBP", save_all=True, append_images=[rgb], exif=exif),
        "gif animated": encode(palette, "GIF", save_all=True, append_images=[palette]),
        "gif transparent": encode(palette, "GIF", transparency=5, comment=b"c" * 600),
        "bmp palette": encode(palette, "BMP"),
        "bmp of one bit": encode(grey.convert("1"), "BMP"),
        "tiff grey": encode(grey, "TIFF"),
        "tiff of 16 bits": encode(deep, "TIFF"),
        "tiff float": encode(Image.fromarray(np.asarray(grey).astype(np.float32)), "TIFF"),
        "tiff cmyk": encode(rgb.convert("CMYK"), "TIFF"),
    }
    for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        found[f"tiff, {name}"] = encode(rgb, "TIFF", compression=name)
    found["tiff, group4"] = encode(grey.convert("1"), "TIFF", compression="group4")
    return found


def bad_pictures() -> Iterator[tuple[str, bytes]]:
    """Pictures of which none can be decoded as it claims to be, by name."""
    plain = {kind: seeds()[kind.lower()] for kind in FORMATS}
    for kind, data in plain.items():
        for share in _CUTS:
            yield f"{kind} cut at {share:.0%}", data[: max(4, int(len(data) * share))]
        yield f"{kind} of its first bytes", data[:12]
        yield f"{kind} whose rest is zero", data[:12] + bytes(len(data))
        yield f"{kind} whose rest is ones", data[:12] + b"\xff" * len(data)
        for other, content in plain.items():
            if other != kind:
                yield f"{other} that begins as {kind}", data[:12] + content[12:]
    for width, height in ((0, 0), (0, 9), (9, 0), (1, 1), (65535, 65535), (2**31 - 1, 2**31 - 1)):
        yield f"PNG of {width} x {height}", _png(width, height)
    for width, height in ((0, 0), (-5, 5), (5, -(2**31)), (2**31 - 1, 2)):
        yield f"BMP of {width} x {height}", _bmp(width, height)
    for tag in (256, 257, 258, 259, 262, 273, 277, 278, 279):
        for value in _EXTREMES:
            yield f"TIFF whose tag {tag} is {value:#x}", _tiff_with(plain["TIFF"], tag, value)


def mutated(random_: random.Random) -> tuple[str, bytes]:
    """A sound picture with some bytes changed, and its name."""
    name = random_.choice(list(seeds()))
    data = bytearray(seeds()[name])
    for _ in range(random_.choice((1, 1, 2, 4, 16))):
        _CHANGES[random_.randrange(len(_CHANGES))](data, random_)
    return name, bytes(data)


# ---------------------------------------------------------------- changes


def _flip(data: bytearray, random_: random.Random) -> None:
    if data:
        data[random_.randrange(len(data))] ^= 1 << random_.randrange(8)


def _set(data: bytearray, random_: random.Random) -> None:
    if data:
        data[random_.randrange(len(data))] = random_.choice((0, 1, 0x7F, 0x80, 0xFE, 0xFF))


def _set_number(data: bytearray, random_: random.Random) -> None:
    """A 32-bit number, mostly near the start, where sizes are."""
    if len(data) > 8:
        at = random_.randrange(min(len(data) - 4, random_.choice((64, len(data)))))
        order = random_.choice("<>")
        data[at : at + 4] = struct.pack(f"{order}I", random_.choice(_EXTREMES))


def _cut(data: bytearray, random_: random.Random) -> None:
    del data[random_.randrange(len(data) + 1) :]


def _drop(data: bytearray, random_: random.Random) -> None:
    at = random_.randrange(len(data) + 1)
    del data[at : at + random_.randrange(1, 64)]


def _repeat(data: bytearray, random_: random.Random) -> None:
    at = random_.randrange(len(data) + 1)
    data[at:at] = data[at : at + random_.randrange(1, 256)] * random_.choice((1, 2, 50))


def _insert(data: bytearray, random_: random.Random) -> None:
    at = random_.randrange(len(data) + 1)
    data[at:at] = random_.randbytes(random_.randrange(1, 64))


def _splice(data: bytearray, random_: random.Random) -> None:
    """The rest of another picture."""
    other = random_.choice(list(seeds().values()))
    at = random_.randrange(min(len(data), len(other)) + 1)
    data[at:] = other[at:]


_CHANGES = (
    _flip,
    _flip,
    _set,
    _set,
    _set_number,
    _set_number,
    _cut,
    _drop,
    _repeat,
    _insert,
    _splice,
)


# ---------------------------------------------------------------- headers


def _png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(4)))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


def _bmp(width: int, height: int) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + info


def _tiff_with(data: bytes, tag: int, value: int) -> bytes:
    """The same file with one value of its first directory changed."""
    out = bytearray(data)
    (start,) = struct.unpack_from("<I", out, 4)
    (count,) = struct.unpack_from("<H", out, start)
    for at in range(start + 2, start + 2 + 12 * count, 12):
        if struct.unpack_from("<H", out, at) == (tag,):
            out[at + 8 : at + 12] = struct.pack("<I", value)
    return bytes(out)
