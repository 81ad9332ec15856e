"""Files that formats allow, that nobody sends, and that would cost a decoder seconds or gigabytes."""

from __future__ import annotations

import contextlib
import io
import struct
import time
import zlib
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import tifffile
from PIL import Image

from models.errors import HeatlensError, ImageTooLarge, ImageUndecodable, UnsupportedMediaType
from models.imaging import headers
from models.imaging.decode import FORMATS, sniff
from tests.models.imaging.photograph import PHOTO, RGB, distance, encode, read


def jpeg_with(segments: bytes) -> bytes:
    plain = encode(PHOTO, "JPEG", quality=95)
    return plain[:2] + segments + plain[2:]


def jpeg_with_junk(size: int) -> bytes:
    """Bytes that belong to nothing, between the first segment and the second."""
    plain = encode(PHOTO, "JPEG", quality=95)
    return plain[:20] + bytes(size) + plain[20:]


def segment(body: bytes, marker: int = 0xE1) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", 2 + len(body)) + body


def overlapping_exif(entries: int, size: int) -> bytes:
    """A directory whose entries are all the same bytes."""
    rows = (struct.pack("<HHII", 20_000 + i, 1, size, 8) for i in range(entries))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", entries) + b"".join(rows) + bytes(4)


def bmp_rle(width: int, height: int) -> bytes:
    """A run-length encoded image of nothing but ends of lines."""
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, 8, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1086, 0, 0, 1078) + info + bytes(1024) + b"\1\1\0\0" * 2


def gif_with_comment(blocks: int) -> bytes:
    plain = encode(PHOTO.quantize(), "GIF")
    at = plain.index(b",")
    return plain[:at] + b"!\xfe" + b"\x01a" * blocks + b"\0" + plain[at:]


def png_with(chunks: int) -> bytes:
    plain = encode(PHOTO, "PNG")
    empty = struct.pack(">I", 0) + b"teSt" + struct.pack(">I", zlib.crc32(b"teSt"))
    return plain[:33] + empty * chunks + plain[33:]


def deflated_png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(height * (width + 1)))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def tiff(tags: Mapping[int, tuple[int, ...]], data: bytes, *, more: bytes = b"") -> bytes:
    """A grey image of 16 by 16 pixels, some tags of which are others; numbers are 32-bit."""
    whole = {256: (16,), 257: (16,), 258: (8,), 259: (1,), 262: (1,), 277: (1,), **tags}
    at = 8 + len(data)
    entries, values = [], b""
    behind = at + 2 + 12 * len(whole) + len(more) + 4
    for tag, numbers in sorted(whole.items()):
        body = struct.pack(f"<{len(numbers)}I", *numbers)
        place = body if len(numbers) == 1 else struct.pack("<I", behind + len(values))
        values += b"" if len(numbers) == 1 else body
        entries.append(struct.pack("<HHI", tag, 4, len(numbers)) + place)
    count = struct.pack("<H", len(whole) + len(more) // 12)
    head = b"II*\0" + struct.pack("<I", at) + data + count
    return head + b"".join(entries) + more + bytes(4) + values


STRIP = {273: (8,), 278: (16,), 279: (256,)}


def tiles(side: int, count: int, size: int) -> dict[int, tuple[int, ...]]:
    return {322: (side,), 323: (side,), 324: (8,) * count, 325: (size,) * count}


def overlapping_entries(entries: int) -> bytes:
    more = b"".join(struct.pack("<HHII", 20_000 + i, 1, 1_000_000, 8) for i in range(entries))
    return tiff(STRIP, bytes(1_000_256), more=more)


DEFLATED = zlib.compress(bytes(64_000_000), 9)

REFUSED: Mapping[str, tuple[Callable[[], bytes], type[HeatlensError]]] = {
    "JPEG, EXIF in pieces": (
        lambda: jpeg_with(segment(b"Exif\0\0" + bytes(10)) * 200_000),
        ImageUndecodable,
    ),
    "JPEG, many empty segments": (
        lambda: jpeg_with(segment(b"", 0xEA) * 2_000_000),
        ImageUndecodable,
    ),
    "JPEG, 100 scans of many pixels": (
        lambda: repeated_scans(Image.new("L", (5_000, 4_000)), 60),
        ImageUndecodable,
    ),
    "PNG, many chunks": (lambda: png_with(600_000), ImageUndecodable),
    "PNG, rows of two pixels": (lambda: deflated_png(2, 20_000_000), ImageTooLarge),
    "GIF, comment in pieces": (lambda: gif_with_comment(4_500_000), ImageUndecodable),
    "GIF, only extensions": (
        lambda: gif_with_comment(1)[:13] + b"!\xfe\0" * 20_000,
        ImageUndecodable,
    ),
    "BMP, run lengths": (lambda: bmp_rle(25_000_000, 2), UnsupportedMediaType),
    "TIFF, a tile of 64 megapixels": (
        lambda: tiff({259: (8,), **tiles(8_000, 1, len(DEFLATED))}, DEFLATED),
        ImageTooLarge,
    ),
    "TIFF, 300,000 tiles": (
        lambda: tiff({256: (2_000,), 257: (2_400,), **tiles(4, 300_000, 16)}, bytes(5_000_000)),
        ImageUndecodable,
    ),
    "TIFF, tiles of the same bytes": (
        lambda: tiff({256: (1_600,), 257: (1_600,), **tiles(16, 10_000, 256)}, bytes(256)),
        ImageUndecodable,
    ),
    "TIFF, a directory of 20,000 entries": (lambda: overlapping_entries(20_000), ImageUndecodable),
    "TIFF, a colour map of a megabyte": (
        lambda: tiff({**STRIP, 320: (0,) * 300_000}, bytes(256)),
        ImageUndecodable,
    ),
    "TIFF, JPEG as it once was": (
        lambda: tiff({**STRIP, 259: (6,)}, bytes(256)),
        UnsupportedMediaType,
    ),
    "TIFF, strips without rows": (lambda: tiff({**STRIP, 278: (0,)}, bytes(256)), ImageUndecodable),
    "TIFF, a directory beyond all addresses": (
        lambda: b"II+\0\x08\0\0\0" + b"\xff" * 8 + bytes(100),
        ImageUndecodable,
    ),
    "TIFF, no image": (lambda: tiff({}, b""), ImageUndecodable),
}


def repeated_scans(image: Image.Image, count: int) -> bytes:
    data = encode(image, "JPEG", progressive=True, quality=50)
    at = data.rfind(b"\xff\xda\x00\x08\x01")
    return data[:-2] + data[at:-2] * count + data[-2:]


def timed(data: bytes) -> float:
    """CPU seconds that reading an image, or refusing it, takes this process."""
    began = time.process_time()
    with contextlib.suppress(HeatlensError):
        read(data)
    return time.process_time() - began


@pytest.mark.parametrize("name", REFUSED)
def test_what_nobody_sends_is_refused_at_once(name: str) -> None:
    make, kind = REFUSED[name]
    data = make()
    with pytest.raises(kind) as refused:
        read(data)
    assert type(refused.value) is kind
    assert timed(data) < 0.5


ODD: Mapping[str, Callable[[], bytes]] = {
    "9 MB of fill bytes": lambda: jpeg_with(b"\xff" * 9_000_000),
    "9 MB of other bytes between segments": lambda: jpeg_with_junk(9_000_000),
    "EXIF whose entries are the same bytes": lambda: jpeg_with(
        segment(b"Exif\0\0" + overlapping_exif(5_000, 60_000))
    ),
    "a profile of 4 MB": lambda: encode(PHOTO, "JPEG", quality=95, icc_profile=bytes(4_000_000)),
    "two EXIF segments": lambda: jpeg_with(segment(b"Exif\0\0" + overlapping_exif(0, 0)) * 2),
}


@pytest.mark.parametrize("name", ODD)
def test_metadata_of_a_jpeg_costs_nothing(name: str) -> None:
    data = ODD[name]()
    assert distance(read(data), RGB) < 40
    assert timed(data) < 0.5


def test_entries_that_do_not_describe_pixels_are_not_read() -> None:
    more = overlapping_entries(900)
    began = time.process_time()
    assert (read(more).width, read(more).height) == (16, 16)
    assert time.process_time() - began < 0.5


def test_more_tiles_than_places_are_not_read() -> None:
    pixels = np.arange(256, dtype=np.uint8).tobytes()
    data = tiff({322: (16,), 323: (16,), 324: (8,) * 12_000, 325: (256,) * 12_000}, pixels)
    image = np.asarray(read(data).image)[..., 0]
    assert np.array_equal(image.reshape(-1), np.arange(256))
    assert timed(data) < 0.1


def test_a_small_image_in_one_padded_tile_is_read() -> None:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, RGB, photometric="rgb", tile=(512, 512), metadata=None)
    assert distance(read(buffer.getvalue()), RGB) == 0


@pytest.mark.parametrize("media_type", FORMATS)
def test_a_header_tells_the_size_of_what_is_decoded(media_type: str) -> None:
    data = encode(PHOTO, FORMATS[media_type])
    assert sniff(data) == media_type
    assert headers.read(data, media_type).size == PHOTO.size
    with pytest.raises(HeatlensError):
        headers.read(data[:14], media_type)


@pytest.mark.parametrize("options", [{"lossless": True}, {"exif": Image.Exif().tobytes()}], ids=str)
def test_each_kind_of_webp_tells_its_size(options: dict[str, object]) -> None:
    assert headers.read(encode(PHOTO, "WEBP", **options), "image/webp").size == PHOTO.size


def test_a_frame_larger_than_its_gif_counts() -> None:
    data = bytearray(encode(PHOTO.quantize(), "GIF"))
    data[6:10] = struct.pack("<HH", 4, 4)
    assert headers.read(bytes(data), "image/gif").size == PHOTO.size
