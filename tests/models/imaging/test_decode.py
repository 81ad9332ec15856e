from __future__ import annotations

import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageCms, ImageFile, ImageOps
from PIL.PngImagePlugin import PngImageFile, PngInfo
from skimage import data as pictures

from models.errors import (
    ImageTooLarge,
    ImageTooSmall,
    ImageUndecodable,
    UnsupportedMediaType,
)
from models.imaging.decode import (
    FORMATS,
    DecodedImage,
    DecodeLimits,
    decode,
    sniff,
)
from models.imaging.orientation import TURNS, turn_box
from models.types import Preprocess

SPEC = Preprocess(resize=256, crop=(224, 224))
LIMITS = DecodeLimits()
LOSSLESS = {"image/png": {}, "image/webp": {"lossless": True}, "image/bmp": {}, "image/tiff": {}}


def encode(image: Image.Image, media_type: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, FORMATS[media_type], **options)
    return buffer.getvalue()


CHELSEA = Image.fromarray(pictures.chelsea())


def photo(width: int = 61, height: int = 40) -> Image.Image:
    return CHELSEA.resize((width, height), Image.Resampling.BICUBIC)


def read(data: bytes, **changes: object) -> DecodedImage:
    options = {"limits": LIMITS, "preprocess": SPEC, "keep_original": False, **changes}
    return decode(data, **options)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(read(data).image)


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize("media_type", FORMATS)
def test_every_format_is_recognised_and_decoded(media_type: str) -> None:
    data = encode(photo(), media_type)
    picture = read(data)
    assert sniff(data) == media_type
    assert (picture.width, picture.height, picture.image.mode) == (61, 40, "RGB")
    assert picture.box == (0, 0, 61, 40)
    assert not picture.drafted
    with Image.open(io.BytesIO(data)) as expected:
        assert np.array_equal(np.asarray(picture.image), np.asarray(expected.convert("RGB")))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        b"<svg/>",
        b"%PDF-1.4",
        b"RIFF\0\0\0\0WAVEfmt ",
        b"P6 1 1 255 abc",
        b"\xff\xd8",
    ],
)
def test_other_formats_are_refused(data: bytes) -> None:
    assert sniff(data) is None
    with pytest.raises(UnsupportedMediaType, match="image/jpeg, image/png"):
        read(data)


def test_a_format_that_pillow_knows_but_we_do_not_allow_is_refused() -> None:
    buffer = io.BytesIO()
    photo().save(buffer, "PPM")
    with pytest.raises(UnsupportedMediaType):
        read(buffer.getvalue())


@pytest.mark.parametrize(("media_type", "options"), LOSSLESS.items())
def test_lossless_formats_keep_every_pixel(media_type: str, options: dict[str, object]) -> None:
    assert np.array_equal(pixels(encode(photo(), media_type, **options)), np.asarray(photo()))


@pytest.mark.parametrize("media_type", ["image/gif", "image/webp", "image/png", "image/tiff"])
def test_the_first_frame_counts(media_type: str) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    options = {} if media_type != "image/webp" else {"lossless": True}
    data = encode(frames[0], media_type, save_all=True, append_images=frames[1:], **options)
    assert (pixels(data) == (255, 0, 0)).all()


def test_a_stereo_photograph_gives_its_first_picture() -> None:
    buffer = io.BytesIO()
    photo(2400, 1600).save(
        buffer, "MPO", save_all=True, append_images=[Image.new("RGB", (2400, 1600))]
    )
    picture = read(buffer.getvalue())
    assert picture.image.size == (1200, 800)
    assert np.asarray(picture.image).mean() > 50


# ---------------------------------------------------------------- modes


def test_grey_and_one_bit_become_rgb() -> None:
    grey = photo().convert("L")
    assert np.array_equal(pixels(encode(grey, "image/png")), np.asarray(grey.convert("RGB")))
    bits = photo().convert("1")
    assert set(np.unique(pixels(encode(bits, "image/png")))) == {0, 255}


def test_palette_becomes_rgb() -> None:
    palette = photo().quantize(32)
    assert np.array_equal(pixels(encode(palette, "image/png")), np.asarray(palette.convert("RGB")))


def test_cmyk_becomes_rgb() -> None:
    # Red, green and white: no cyan, only yellow + cyan, no ink.
    inks = np.zeros((8, 24, 4), np.uint8)
    inks[:, :8] = (0, 255, 255, 0)
    inks[:, 8:16] = (255, 0, 255, 0)
    image = Image.fromarray(inks, mode="CMYK")
    for media_type, options in (("image/jpeg", {"quality": 100}), ("image/tiff", {})):
        got = pixels(encode(image, media_type, **options)).astype(int)
        for x, colour in ((4, (255, 0, 0)), (12, (0, 255, 0)), (20, (255, 255, 255))):
            assert np.abs(got[4, x] - colour).max() <= 4


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_alpha_is_composited_on_white(mode: str) -> None:
    rgba = np.asarray(photo().convert("RGBA")).copy()
    rgba[..., 3] = np.linspace(0, 255, 61).astype(np.uint8)
    image = Image.fromarray(rgba)
    if mode == "LA":
        image = image.convert("LA")
    elif mode == "PA":
        image = image.quantize(64)
    source = np.asarray(image.convert("RGBA")).astype(float)
    share = source[..., 3:] / 255
    expected = source[..., :3] * share + 255 * (1 - share)
    for media_type in ("image/png", "image/webp"):
        if mode == "RGBA" or media_type == "image/png":
            options = {"lossless": True, "exact": True} if media_type == "image/webp" else {}
            got = pixels(encode(image, media_type, **options))
            assert np.abs(got - expected).max() <= 1


def test_a_transparent_colour_is_white() -> None:
    data = encode(photo().quantize(16), "image/gif", transparency=3)
    with Image.open(io.BytesIO(data)) as source:
        clear = np.asarray(source) == source.info["transparency"]
    assert clear.any()
    got = pixels(data)
    assert (got[clear] == 255).all()
    grey = photo().convert("L")
    keyed = encode(grey, "image/png", transparency=int(grey.getpixel((0, 0))))
    assert tuple(pixels(keyed)[0, 0]) == (255, 255, 255)


RAMP = np.linspace(0, 1, 64)[None].repeat(4, axis=0)


@pytest.mark.parametrize(
    ("values", "media_type", "tolerance"),
    [
        ((RAMP * 65535).astype(np.uint16), "image/png", 1),
        ((RAMP * 65535).astype(np.uint16), "image/tiff", 1),
        ((RAMP * 65535).astype(">u2"), "image/tiff", 1),
        ((RAMP * 65535).astype(np.int32), "image/tiff", 1),
        ((RAMP * 2_000_000_000).astype(np.int32), "image/tiff", 1),
        ((RAMP * 4e9 - 2e9).astype(np.int32), "image/tiff", 1),
        ((RAMP * 255).astype(np.int32), "image/tiff", 1),
        (RAMP.astype(np.float32), "image/tiff", 1),
        ((RAMP * 255).astype(np.float32), "image/tiff", 1),
        ((RAMP * 65535).astype(np.float32), "image/tiff", 1),
        ((RAMP * 6e38 - 3e38).astype(np.float32), "image/tiff", 1),
        ((RAMP * 2 - 1).astype(np.float32), "image/tiff", 1),
    ],
)
def test_deep_pictures_are_scaled_not_clipped(
    values: np.ndarray, media_type: str, tolerance: int
) -> None:
    got = pixels(encode(Image.fromarray(values), media_type))
    assert np.abs(got - (RAMP * 255)[..., None]).max() <= tolerance


def test_dark_deep_pictures_stay_dark() -> None:
    assert pixels(encode(Image.fromarray((RAMP * 6553).astype(np.uint16)), "image/png")).max() == 25
    half = encode(Image.fromarray((RAMP / 2).astype(np.float32)), "image/tiff")
    assert pixels(half).max() in (127, 128)


def test_sixteen_bit_colour_keeps_its_high_byte() -> None:
    samples = (np.arange(4 * 6 * 3).reshape(4, 6, 3) * 900).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in samples)
    data = png((6, 4), zlib.compress(rows), depth=16)
    assert np.array_equal(pixels(data), samples >> 8)


def test_what_is_no_number_is_black() -> None:
    values = np.array([[np.nan, np.inf, -np.inf, 1.0], [0, 0.5, 1, 0]], np.float32)
    got = pixels(encode(Image.fromarray(values), "image/tiff"))[..., 0]
    assert got.tolist() == [[0, 0, 0, 255], [0, 128, 255, 0]]


def test_a_constant_deep_picture_is_decoded() -> None:
    flat = Image.fromarray(np.full((4, 4), -7, np.int32))
    assert pixels(encode(flat, "image/tiff")).max() == 0


def test_colour_profiles_are_ignored() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    data = encode(photo(), "image/png", icc_profile=profile)
    assert np.array_equal(pixels(data), np.asarray(photo()))


# ---------------------------------------------------------------- EXIF


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("media_type", ["image/jpeg", "image/png", "image/webp", "image/tiff"])
def test_orientation_is_applied(orientation: int, media_type: str) -> None:
    data = encode(photo(), media_type, exif=oriented(orientation), **LOSSLESS.get(media_type, {}))
    with Image.open(io.BytesIO(data)) as source:
        expected = ImageOps.exif_transpose(source)
    picture = read(data)
    assert (picture.width, picture.height) == expected.size
    assert picture.box == (0, 0, *expected.size)
    assert np.array_equal(np.asarray(picture.image), np.asarray(expected))


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_unknown_orientations_leave_the_picture_as_it_is(orientation: int) -> None:
    data = encode(photo(), "image/png", exif=oriented(orientation))
    assert np.array_equal(pixels(data), np.asarray(photo()))


@pytest.mark.parametrize(
    "garbage",
    [
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12" * 40,
        b"Exif\0\0" + bytes(range(256)),
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0abc\0\0\0\0\0",
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow warns of it
def test_garbage_in_the_metadata_does_not_cost_the_picture(garbage: bytes) -> None:
    plain = encode(photo(), "image/jpeg")
    segment = b"\xff\xe1" + struct.pack(">H", len(garbage) + 2) + garbage
    assert np.array_equal(pixels(plain[:2] + segment + plain[2:]), pixels(plain))


@pytest.mark.parametrize("profile", ["exif\n 4\nzzzz", "", "exif\n 8\n4d4d002a"])
def test_garbage_in_a_text_chunk_does_not_cost_the_picture(profile: str) -> None:
    text = PngInfo()
    text.add_text("Raw profile type exif", profile)
    data = encode(photo(), "image/png", pnginfo=text)
    assert np.array_equal(pixels(data), np.asarray(photo()))


def test_metadata_that_cannot_be_read_does_not_cost_the_picture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def getexif(self: Image.Image) -> Image.Exif:
        raise ValueError

    data = encode(photo(), "image/png", exif=oriented(3))
    monkeypatch.setattr(Image.Image, "getexif", getexif)
    monkeypatch.setattr(PngImageFile, "getexif", getexif)
    assert np.array_equal(pixels(data), np.asarray(photo()))


# ---------------------------------------------------------------- draft


@pytest.mark.parametrize(
    ("size", "resize", "keep_original", "expected"),
    [
        ((1000, 800), 256, False, (1000, 800)),
        ((1024, 1024), 256, False, (512, 512)),
        ((4032, 3024), 256, False, (1008, 756)),
        ((4101, 4099), 256, False, (513, 513)),
        ((4032, 3024), 256, True, (2016, 1512)),
        ((2047, 2047), 256, True, (2047, 2047)),
        ((2047, 2047), (224, 448), False, (1024, 1024)),
    ],
)
def test_large_photographs_are_drafted(
    size: tuple[int, int],
    resize: int | tuple[int, int],
    keep_original: bool,
    expected: tuple[int, int],
) -> None:
    data = encode(Image.new("RGB", size, "teal"), "image/jpeg")
    spec = Preprocess(resize=resize, crop=(224, 224))
    picture = read(data, preprocess=spec, keep_original=keep_original)
    scale = round(size[0] / expected[0])
    assert picture.image.size == expected
    assert (picture.width, picture.height) == size
    assert picture.box == (0, 0, size[0] / scale, size[1] / scale)
    assert picture.drafted == (scale > 1)


@pytest.mark.parametrize("interpolation", ["nearest", "box"])
def test_filters_that_jump_get_every_pixel(interpolation: str) -> None:
    data = encode(Image.new("RGB", (2048, 2048)), "image/jpeg")
    spec = Preprocess(resize=64, crop=(64, 64), interpolation=interpolation)
    assert read(data, preprocess=spec).image.size == (2048, 2048)


def test_other_formats_are_not_drafted() -> None:
    assert read(encode(Image.new("RGB", (2048, 2048)), "image/png")).image.size == (2048, 2048)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_the_box_turns_with_the_picture(orientation: int) -> None:
    turn = TURNS[orientation]
    sheet = Image.new("L", (9, 7))
    sheet.paste(255, (0, 0, 8, 5))
    turned = sheet.transpose(turn.transpose)
    assert turn_box((8.0, 5.0), turn, (9, 7)) == turned.getbbox()


def test_a_drafted_photograph_remembers_its_turned_size() -> None:
    data = encode(photo(4001, 2001), "image/jpeg", exif=oriented(6))
    picture = read(data)
    assert (picture.width, picture.height) == (2001, 4001)
    assert picture.image.size == (1001, 2001)
    assert picture.box == (0.5, 0, 1001, 2000.5)


# ---------------------------------------------------------------- caps


def png(size: tuple[int, int], body: bytes, *, depth: int = 8) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + crc

    header = struct.pack(">IIBBBBB", *size, depth, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (chunk(b"IHDR", header), chunk(b"IDAT", body), chunk(b"IEND", b""))
    )


def claims(media_type: str, width: int, height: int) -> bytes:
    """A small file whose header announces a large picture."""
    if media_type == "image/png":
        return png((width, height), zlib.compress(bytes(100)))
    if media_type == "image/webp":
        sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        return b"RIFF" + struct.pack("<I", 30) + b"WEBPVP8X\x0a\0\0\0\0\0\0\0" + sides + bytes(8)
    small = bytearray(encode(Image.new("RGB", (16, 16)), media_type))
    if media_type == "image/jpeg":
        at = small.index(b"\xff\xc0") + 5
        small[at : at + 4] = struct.pack(">HH", height, width)
    elif media_type == "image/gif":
        small[6:10] = struct.pack("<HH", width, height)
    elif media_type == "image/bmp":
        small[18:26] = struct.pack("<ii", width, height)
    else:
        for tag, value in ((256, width), (257, height)):
            at = small.index(struct.pack("<HHI", tag, 4, 1)) + 8
            small[at : at + 4] = struct.pack("<I", value)
    return bytes(small)


@pytest.fixture
def unloadable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a pixel fails: caps must hold before."""

    def load(self: ImageFile.ImageFile) -> None:
        raise OSError

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)


@pytest.mark.parametrize("media_type", FORMATS)
@pytest.mark.parametrize(("width", "height"), [(10_000, 8_000), (16_000, 16_000)])
@pytest.mark.usefixtures("unloadable")
def test_large_pictures_are_refused_by_their_header(
    media_type: str, width: int, height: int
) -> None:
    with pytest.raises(ImageTooLarge, match=r"50000000 pixels|too much memory"):
        read(claims(media_type, width, height))


@pytest.mark.parametrize("media_type", ["image/png", "image/webp", "image/bmp"])
def test_pillows_own_limit_is_typed(media_type: str) -> None:
    with pytest.raises(ImageTooLarge):
        read(claims(media_type, 16_000, 16_000), limits=DecodeLimits(max_pixels=10**12))


def test_the_pixel_cap_is_exact() -> None:
    data = encode(photo(30, 20), "image/png")
    assert read(data, limits=DecodeLimits(max_pixels=600)).width == 30
    with pytest.raises(ImageTooLarge, match="599 pixels"):
        read(data, limits=DecodeLimits(max_pixels=599))


def test_the_byte_cap_is_exact() -> None:
    data = encode(photo(), "image/png")
    assert read(data, limits=DecodeLimits(max_bytes=len(data))).width == 61
    with pytest.raises(ImageTooLarge, match="bytes"):
        read(data, limits=DecodeLimits(max_bytes=len(data) - 1))


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1)])
def test_a_side_of_one_pixel_is_too_small(size: tuple[int, int]) -> None:
    with pytest.raises(ImageTooSmall, match="less than 2 pixels"):
        read(encode(Image.new("RGB", size), "image/png"))


def test_running_out_of_memory_is_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: ImageFile.ImageFile) -> None:
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(ImageTooLarge):
        read(encode(photo(), "image/png"))


def test_progressive_scan_bombs_are_refused() -> None:
    data = encode(photo(), "image/jpeg", progressive=True)
    assert read(data).width == 61
    last = data.rindex(b"\xff\xda")
    bomb = data[:last] + data[last:-2] * 101 + data[-2:]
    with pytest.raises(ImageUndecodable, match="scans"):
        read(bomb)


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("media_type", FORMATS)
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.8, 0.95])
def test_truncated_files_are_undecodable(media_type: str, share: float) -> None:
    data = encode(photo(200, 150), media_type)
    with pytest.raises(ImageUndecodable, match="damaged or truncated"):
        read(data[: int(len(data) * share)])


def test_the_decoders_words_stay_inside() -> None:
    data = encode(photo(), "image/png")
    with pytest.raises(ImageUndecodable) as caught:
        read(data[:100])
    assert caught.value.message == "The image is damaged or truncated."


SEEDS = [
    encode(photo(24, 18), "image/jpeg", exif=oriented(6)),
    encode(photo(24, 18), "image/jpeg", progressive=True),
    encode(photo(24, 18), "image/png"),
    encode(photo(24, 18).quantize(8), "image/png", transparency=2),
    encode(photo(24, 18), "image/webp"),
    encode(photo(24, 18).convert("RGBA"), "image/webp", lossless=True),
    encode(photo(24, 18), "image/bmp"),
    encode(photo(24, 18), "image/gif", save_all=True, append_images=[photo(24, 18).rotate(9)]),
    encode(photo(24, 18), "image/tiff"),
    encode(photo(24, 18), "image/tiff", compression="tiff_lzw"),
    encode(photo(24, 18), "image/tiff", compression="tiff_adobe_deflate"),
    encode(photo(24, 18), "image/tiff", compression="jpeg"),
]


def answers_or_refuses(data: bytes) -> None:
    limits = DecodeLimits(max_pixels=1_000_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            picture = decode(data, limits=limits, preprocess=SPEC, keep_original=True)
        except (ImageTooLarge, ImageTooSmall, ImageUndecodable, UnsupportedMediaType):
            return
    assert picture.image.mode == "RGB"
    assert min(picture.width, picture.height) >= limits.min_side
    assert np.asarray(picture.image).shape[2] == 3


@given(st.binary(max_size=200))
@settings(max_examples=100)
def test_any_bytes_give_a_picture_or_our_error(data: bytes) -> None:
    answers_or_refuses(data)


@given(st.sampled_from(SEEDS), st.integers(0, 40), st.binary(max_size=200))
@settings(max_examples=200)
def test_a_known_start_with_any_rest_gives_a_picture_or_our_error(
    seed: bytes, kept: int, rest: bytes
) -> None:
    answers_or_refuses(seed[:kept] + rest)


@given(
    st.sampled_from(SEEDS),
    st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=8)), max_size=6
    ),
    st.floats(0, 1),
)
@settings(max_examples=400)
def test_a_mutated_file_gives_a_picture_or_our_error(
    seed: bytes, edits: list[tuple[float, bytes]], kept: float
) -> None:
    data = bytearray(seed)
    for at, patch in edits:
        start = int(at * len(data))
        data[start : start + len(patch)] = patch
    answers_or_refuses(bytes(data[: max(1, int(kept * len(data)))]))
    answers_or_refuses(bytes(data))


# ---------------------------------------------------------------- threads


def test_threads_do_not_disturb_each_other() -> None:
    before = list(warnings.filters), Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    expected = [pixels(seed) for seed in SEEDS]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(10):
            for got, want in zip(pool.map(pixels, SEEDS), expected, strict=True):
                assert np.array_equal(got, want)
    assert before == (
        list(warnings.filters),
        Image.MAX_IMAGE_PIXELS,
        ImageFile.LOAD_TRUNCATED_IMAGES,
    )
